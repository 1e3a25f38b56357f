//! After a crash: what to make of paths at which rows were being applied.
//!
//! In: the intent that was durable before the disk was touched, the path's row
//! in the index, and what is there now. Out: whether the intent was carried
//! out. Without this, a peer's row that is on disk but not in the index would
//! be taken for this node's own change, newer than what the peer has made since.
//!
//! One thing more is for the caller, who knows inodes: where a path is found
//! `Done` at which there was nothing before, and its inode is also at a path
//! found `Untouched`, the crash came between the two halves of keeping something
//! aside. The `Done` path must be removed and its intent forgotten; else the two
//! names pass for hard links. (Where something was before, that is gone, and
//! removing would pass for a user's deletion.)
//! What was found `Untouched` is locked again if its row says so; a directory gets
//! its row's times back, and
//! what is done to directories is done deepest first.

use crate::model::{Entry, Flags, Row};

use super::change::Seen;

/// What a path with an intent is found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// As the index says, but for a directory's times and for flags that lock
    /// it: nothing was done yet. The peer sends the row again.
    Untouched,
    /// As the intent says: its row goes into the index as it is.
    Done,
    /// The content is right but the attributes are neither; the intent is to
    /// be carried out again.
    Halfway,
    /// Something else: it has been changed since, on this node.
    Changed,
}

/// Compares what is at a path with its row in the index and its intent.
pub fn recover(base: Option<&Row>, intent: &Row, seen: &Seen) -> Found {
    let bare = |entry: &Entry| Entry {
        link: None,
        ..entry.clone()
    };
    let is = |row: Option<&Entry>| match (row, seen) {
        (None, Seen::Absent) => true,
        (Some(entry), Seen::Present(seen)) => bare(entry) == bare(seen),
        _ => false,
    };
    if is(intent.live()) {
        return Found::Done;
    }
    let base = base.and_then(Row::live);
    // What locks an inode is cleared before anything is done to it.
    let unlocked = base.map(|base| Entry {
        flags: base.flags & !Flags::LOCKS,
        ..base.clone()
    });
    if is(base) || (base.is_some() && is(unlocked.as_ref())) {
        return Found::Untouched;
    }
    match (base, intent.live(), seen) {
        (_, Some(intent), Seen::Present(seen)) if intent.kind == seen.kind => Found::Halfway,
        // Only times can differ: names beneath have come and gone.
        (Some(base), None, Seen::Present(seen))
            if base.is_dir()
                && Entry {
                    mtime: base.mtime,
                    flags: seen.flags | (base.flags & Flags::LOCKS),
                    ..bare(seen)
                } == bare(base) =>
        {
            Found::Untouched
        }
        _ => Found::Changed,
    }
}
