//! From what is at a path to a row of this node's own.
//!
//! In: the path's row and what was seen there now. Out: the new row, or none if
//! nothing differs. Looking at the disk is `observe`'s business.

use crate::model::{Entry, ReplicaId, Row, Stamp, Version};

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Absent,
    Present(Entry),
}

/// Whether what was seen is not what the row says.
pub fn differs(old: Option<&Row>, seen: &Seen) -> bool {
    match (old.and_then(Row::live), seen) {
        (None, Seen::Absent) => false,
        (Some(entry), Seen::Present(seen)) => entry != seen,
        _ => true,
    }
}

/// The row for what was seen, made by `replica` as its change number `seq`;
/// none if nothing differs. `stamp` must be greater than the old row's. Who made
/// the change is for the caller to add.
pub fn local_change(
    old: Option<&Row>,
    seen: &Seen,
    replica: ReplicaId,
    seq: u64,
    stamp: Stamp,
) -> Option<Row> {
    if !differs(old, seen) {
        return None;
    }
    let mut vector = old.map(|row| row.version.vector.clone()).unwrap_or_default();
    vector.raise(replica, seq);
    let (entry, deleted) = match seen {
        Seen::Present(entry) => (entry.clone(), false),
        // A tombstone keeps what was there last; without an old row nothing
        // can have differed.
        Seen::Absent => (old?.entry.clone(), true),
    };
    Some(Row {
        entry,
        deleted,
        version: Version { vector, stamp },
        origin: None,
    })
}
