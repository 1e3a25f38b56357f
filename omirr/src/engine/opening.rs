//! Whether the index is the one whose rows the peers have.
//!
//! In: what it was when it was opened, and up to which of its rows a peer says to
//! have it. Out: whether it was set back in its own file, as a filesystem's
//! snapshot that is rolled back does it. A copy of an index tells by itself that
//! it is one: see `start`.

use crate::model::{ReplicaId, Row, Vector, Version};

use super::clock::Author;

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

    /// A row that this run has made before it was found that the index was set
    /// back, as `author`, who has another number, makes it again; none if `row` is
    /// not one of these. By its number it says to descend from all that the lost
    /// rows had, which this node's disk has not had since: what other nodes have of
    /// them would be taken for superseded, and not be kept.
    pub fn made_again(&self, row: &Row, author: &mut Author) -> Option<(u64, Row)> {
        let Version { vector, stamp } = &row.version;
        if stamp.replica != self.replica || vector.get(self.replica) <= self.began_at {
            return None;
        }
        let known = vector.pairs().iter().map(|&(replica, counter)| match replica {
            replica if replica == self.replica => (replica, counter.min(self.head)),
            _ => (replica, counter),
        });
        let mut vector: Vector = known.filter(|pair| pair.1 > 0).collect();
        let seq = author.next_seq();
        vector.raise(author.replica(), seq);
        // Just above that of the row, which some peers may have.
        let stamp = author.stamp_for(stamp.wall_ms, Some(stamp.wall_ms), Some(stamp));
        let version = Version { vector, stamp };
        let row = Row {
            version,
            ..row.clone()
        };
        Some((seq, row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Entry, Flags, Kind, Stamp, Time};

    const OPENING: Opening = Opening {
        replica: ReplicaId(1),
        head: 10,
        began_at: 4096,
    };

    #[test]
    fn a_cursor_that_no_row_of_this_index_has_tells_that_it_was_set_back() {
        let opening = Opening::of(ReplicaId(1), 10, 1999);
        assert_eq!(opening, OPENING);
        let claims = [
            (10, Claim::Fits),
            (11, Claim::SetBack),
            (4096, Claim::Fits),
            (4098, Claim::SetBack),
        ];
        for (cursor, claim) in claims {
            assert_eq!(opening.claim(ReplicaId(1), cursor, 4097), claim, "{cursor}");
        }
        assert_eq!(opening.claim(ReplicaId(2), 4098, 4097), Claim::Impossible);
        assert_eq!(
            Opening::of(ReplicaId(1), 5000, 1000).began_at,
            5000,
            "a clock that is late"
        );
    }

    #[test]
    fn what_was_made_since_it_was_set_back_does_not_descend_from_what_was_lost() {
        let row = |pairs: &[(u64, u64)], by: u64| {
            let pairs = pairs
                .iter()
                .map(|&(replica, counter)| (ReplicaId(replica), counter));
            let stamp = Stamp {
                wall_ms: 500,
                count: 3,
                replica: ReplicaId(by),
            };
            let vector = pairs.collect();
            Row {
                entry: Entry {
                    kind: Kind::Directory,
                    mode: 0o700,
                    uid: 0,
                    gid: 0,
                    mtime: Time { secs: 0, nanos: 0 },
                    xattrs: Vec::new(),
                    flags: Flags::NONE,
                    user: None,
                    group: None,
                    link: None,
                },
                deleted: true,
                version: Version { vector, stamp },
                origin: None,
            }
        };
        let mut author = Author::new(ReplicaId(2), 5000, None, None);
        let before = row(&[(1, 5001), (3, 7)], 1);
        let (seq, after) = OPENING.made_again(&before, &mut author).unwrap();
        assert_eq!(
            after.version.vector.pairs(),
            [(ReplicaId(1), 10), (ReplicaId(2), seq), (ReplicaId(3), 7)]
        );
        assert!(
            after.version.stamp > before.version.stamp,
            "it wins over the one that was sent"
        );
        for other in [row(&[(1, 9), (3, 7)], 1), row(&[(1, 5001), (3, 7)], 3)] {
            assert_eq!(OPENING.made_again(&other, &mut author), None, "{other:?}");
        }
    }
}
