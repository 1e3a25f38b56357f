//! Places at which a debug build can be made to die, so that tests can see what
//! a death there leaves.
//!
//! In: `OMIRR_CRASH_AT=NAME` or `NAME:NTH` in the environment. Out: the process
//! kills itself, as `kill -9` would, when it comes to that place for the first or
//! NTH time. There is a place after everything that the daemon does to a disk:
//! a tree, an index, its own files. [`Point::ALL`] has them all, and a test goes
//! through them; whoever adds a write adds its point. A release build has none
//! of this.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where the daemon dies, and the occurrence, from 1.
const VARIABLE: &str = "OMIRR_CRASH_AT";

macro_rules! points {
    ($($(#[$doc:meta])* $point:ident = $name:literal,)*) => {
        /// A place after a write.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $($(#[$doc])* $point,)*
        }

        impl Point {
            /// Every place that there is.
            pub const ALL: &[Point] = &[$(Point::$point),*];

            /// As the environment has it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Point::$point => $name,)*
                }
            }
        }
    };
}

points! {
    // The daemon's own files.
    /// A new private key is in a file without a name.
    KeyWritten = "key-written",
    StateDirMade = "state-dir-made",
    LockTaken = "lock-taken",
    /// redb has made its file, and nothing is in it.
    IndexMade = "index-made",
    /// The tables are there, and not yet the format and the replica.
    IndexTables = "index-tables",
    IndexOpened = "index-opened",
    PeersNoted = "peers-noted",
    RootNoted = "root-noted",
    /// The control socket of the last run is gone.
    SocketRemoved = "socket-removed",
    SocketBound = "socket-bound",
    JournalWritten = "journal-written",
    JournalEmptied = "journal-emptied",

    // What users changed here.
    RowsDecided = "rows-decided",
    RowsDurable = "rows-durable",
    /// All that the first comparison found has its rows.
    Compared = "compared",

    // Contents from a peer, without a name.
    ContentWritten = "content-written",
    ContentTruncated = "content-truncated",
    ContentFinished = "content-finished",
    ContentSynced = "content-synced",
    FilesystemSynced = "filesystem-synced",

    // Contents that are written over older ones.
    RedoWritten = "redo-written",
    RedoSealed = "redo-sealed",
    /// There is room for all that is new.
    PatchRoomMade = "patch-room-made",
    PatchWritten = "patch-written",
    PatchCut = "patch-cut",
    PatchDone = "patch-done",
    RedoRemoved = "redo-removed",

    // Rows from a peer.
    Intended = "intended",
    Executed = "executed",
    RowsCommitted = "rows-committed",
    TidiedUp = "tidied-up",
    CursorsDurable = "cursors-durable",
    Acknowledged = "acknowledged",
    NamesNoted = "names-noted",

    // Names in the tree.
    /// New content has its name, where there was nothing.
    FileLinked = "file-linked",
    /// New content has a temporary name, beside what it will displace.
    FileBesides = "file-besides",
    /// What was made under a temporary name has its own.
    Named = "named",
    /// What was displaced has the temporary name now.
    Exchanged = "exchanged",
    DisplacedRemoved = "displaced-removed",
    SecondName = "second-name",
    /// A second name that will displace something.
    SecondBesides = "second-besides",
    TakenAway = "taken-away",
    FileRemoved = "file-removed",
    DirRemoved = "dir-removed",
    EntryMoved = "entry-moved",
    LeftoverRemoved = "leftover-removed",

    // Inodes in the tree.
    /// A directory, a symlink or the like, under a temporary name.
    EntryMade = "entry-made",
    OwnerSet = "owner-set",
    XattrRemoved = "xattr-removed",
    XattrSet = "xattr-set",
    ModeSet = "mode-set",
    TimeSet = "time-set",

    // At the start after a crash.
    RecoveryNoted = "recovery-noted",
    /// Something of a half-written content is new now, too.
    RecoveryPatched = "recovery-patched",
    RecoveryCompleted = "recovery-completed",
    RecoveryTakenBack = "recovery-taken-back",
    RecoveryTimesSet = "recovery-times-set",
    RecoverySynced = "recovery-synced",
    RecoveryDurable = "recovery-durable",
}

struct Plan {
    name: String,
    nth: u64,
    passed: AtomicU64,
}

static PLAN: LazyLock<Option<Plan>> = LazyLock::new(|| {
    let text = std::env::var(VARIABLE).ok()?;
    let (name, nth) = text.split_once(':').unwrap_or((&text, "1"));
    Some(Plan {
        name: name.to_owned(),
        nth: nth.parse().unwrap_or(1),
        passed: AtomicU64::new(0),
    })
});

/// The process dies here if it was asked to.
#[inline]
pub fn here(point: Point) {
    if cfg!(debug_assertions) {
        die_if_asked(point);
    }
}

fn die_if_asked(point: Point) {
    let Some(plan) = PLAN.as_ref().filter(|plan| plan.name == point.name()) else {
        return;
    };
    if plan.passed.fetch_add(1, Ordering::Relaxed) + 1 == plan.nth {
        // Not `abort`: that would leave a core, and run what is registered for it.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own() {
        let mut names: Vec<_> = Point::ALL.iter().map(|point| point.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Point::ALL.len());
    }
}
