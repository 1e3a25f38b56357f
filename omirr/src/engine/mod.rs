//! Decisions: versions, winners, what to send, what to do with what arrived.
//!
//! Pure: values in, values out. No I/O, no clock, no locks, no threads, so that
//! thousands of histories of several nodes can be run in a second
//! (`tests/simulation.rs`). Its caller is the keeper of a share, which owns the
//! index and the disk; the simulated node is a model of its loop:
//!
//! 1. Paths are dirty: look at them, and at what [`observe_also`] names; put back
//!    what is [`incoherent`]; give files their [`link_group`]; [`decide_local`];
//!    write the rows.
//! 2. Rows came: first do 1 for whatever is dirty; [`decide_remote`]; [`plan`];
//!    make the intents durable; do the steps; write the rows whose steps went
//!    well; keep the others for another try; move the cursor up to them; then
//!    [`relink`] the groups of the rows written.
//!    A directory's move of which only the last row came is [`expand`]ed first.
//! 3. A peer is behind: [`Outgoing::next_batch`].
//! 4. Nothing else is to do: tombstones that [`may_forget`] allows go.
//! 5. After a crash: [`recover`] for paths with intents, the rest as in 1.

mod change;
mod clock;
mod closure;
mod collect;
mod conflict;
mod decide;
mod links;
mod merge;
mod offset;
mod opening;
mod outgoing;
mod plan;
mod progress;
mod reached;
mod recover;
mod rows;
mod start;
mod trees;

pub use change::{Seen, differs, local_change};
pub use clock::{Author, Clock, Reserve};
pub use closure::{incoherent, observe_also};
pub use collect::{Marks, Past, may_forget, past_all};
pub use conflict::{CopyName, Original, conflict_path, is_conflict_path};
pub use decide::{Arrived, Context, Observed, decide_local, decide_remote};
pub use links::{Name, link_group, relink};
pub use merge::{Loser, Policy, Verdict, precedence, remote_row};
pub use offset::Offset;
pub use opening::{Claim, Opening};
pub use outgoing::{Outbound, Outgoing, Sequence, goes_inline};
pub use plan::{Content, Install, Step, plan, plan_one_by_one};
pub use progress::Progress;
pub use reached::Reached;
pub use recover::{Found, recover};
pub use rows::{Decided, Rows, Standing, Work};
pub use start::{AtStart, Groups, Start, bears_out, start};
pub use trees::{Expansion, TREE_ROWS_MAX, expand, whole_moves};
