//! Whether the index is the one whose rows the peers have.
//!
//! In: what it was when it was opened, and up to which of its rows a peer says to
//! have it. Out: whether it was set back in its own file, as a filesystem's
//! snapshot that is rolled back does it. A copy of an index tells by itself that
//! it is one: see `start`.

use crate::model::ReplicaId;

/// An index as it was found, and where this run's rows begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    pub replica: ReplicaId,
    /// The highest sequence number.
    pub head: u64,
    /// The number before the first one that this run gives: by the clock, since
    /// an index that was set back must not number its rows as it did before. The
    /// numbers between tell that it was.
    pub began_at: u64,
}

/// What is to be made of a peer's cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// These rows are or were in this index.
    Fits,
    /// The peer has rows that this index no longer has: it must not number its
    /// rows as before, so it takes another replica number.
    SetBack,
    /// It has taken one already, and of that one no rows can have been lost: no
    /// index is put in place while it is in use.
    Impossible,
}

impl Opening {
    pub fn of(replica: ReplicaId, head: u64, now_ms: u64) -> Opening {
        /// More rows than are ever made in a second, for long: 2^12.
        const PER_SECOND: u64 = 12;
        Opening {
            replica,
            head,
            began_at: head.max((now_ms / 1000) << PER_SECOND),
        }
    }

    /// A peer says to have the rows of `replica`, which this index is now, up to
    /// `cursor`; on disk here they are up to `durable`.
    pub fn claim(&self, replica: ReplicaId, cursor: u64, durable: u64) -> Claim {
        let lost = self.head < cursor && cursor < self.began_at;
        if cursor <= durable && !lost {
            Claim::Fits
        } else if replica == self.replica {
            Claim::SetBack
        } else {
            Claim::Impossible
        }
    }
}
