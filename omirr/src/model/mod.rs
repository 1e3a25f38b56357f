//! The words that every room shares: paths, entries, versions, rows.
//!
//! Plain values with no I/O, no clock and no locks. What is written to disk or
//! sent to a peer is made of these types; `wire/codec.rs` turns them to bytes.

mod entry;
mod flags;
mod here;
mod mode;
mod origin;
mod path;
mod row;
mod sketch;
mod tree;
mod version;

pub use entry::{Entry, Hash, Kind, LinkGroup, Time, Xattr};
pub use flags::Flags;
pub use here::Here;
pub use mode::Mode;
pub use origin::{CGROUP_BYTES_MAX, COMMAND_BYTES_MAX, Origin};
pub use path::{PATH_MAX, PathError, RelPath, TEMP_PREFIX, is_temp_name};
pub use row::{Record, Row, StatSig};
pub use sketch::Sketch;
pub use tree::{Moved, TreeMove};
pub use version::{Gap, Relation, ReplicaId, Stamp, Vector, Version};
