//! A directory's move, as one thing: what a node must know to make by itself the
//! rows that the move made elsewhere.

use serde::{Deserialize, Serialize};

use super::{Hash, RelPath, Stamp};

/// What the tombstone of a renamed directory says of the move that made it and
/// all the rows that go with it; `engine/trees.rs` tells which those are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeMove {
    /// Where the directory is now.
    pub to: RelPath,
    /// How many live rows went along, the directory's own included: so many rows
    /// at and beneath `to`, and as many tombstones.
    pub count: u32,
    /// Of the rows before the move: who has the same can make those after it.
    pub digest: Hash,
}

impl TreeMove {
    /// How far the number of the first of its rows is before that of the last.
    pub fn span(&self) -> u64 {
        (u64::from(self.count) * 2).saturating_sub(1)
    }
}

/// A move whose rows this node's index has under consecutive numbers, the last
/// of which is the tombstone's at `from`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    pub from: RelPath,
    /// Of all its rows.
    pub stamp: Stamp,
    pub tree: TreeMove,
}
