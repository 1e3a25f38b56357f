//! Whether the index is the one whose rows the peers have.
//!
//! In: what it was when it was opened, and up to which of its rows a peer says to
//! have it. Out: whether it was set back in its own file, as a filesystem's
//! snapshot that is rolled back does it, and what follows for the rows that were
//! made since. A copy of an index tells by itself that it is one: see `start`.

use crate::model::{Gap, ReplicaId, Row, Vector, Version};

use super::clock::Author;

/// So many gaps are kept, the latest: each is of a run that made rows.
const GAPS_KEPT: usize = 256;

/// An index as it was found, and where this run's rows begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    pub replica: ReplicaId,
    /// The highest sequence number.
    pub head: u64,
    /// The number before the first one that this run gives: by the clock, since
    /// an index that was set back must not number its rows as it did before.
    pub began_at: u64,
    /// The numbers that were left out by this run, and by those before it, the
    /// oldest first. An index that was set back may have given them.
    pub gaps: Vec<Gap>,
}

/// What is to be made of a peer's cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// These rows are or were in this index.
    Fits,
    /// The peer has rows of before the gap's end that this index no longer has: it
    /// takes another replica number.
    SetBack(Gap),
    /// It has taken one already, and of that one no rows can have been lost: no
    /// index is put in place while it is in use.
    Impossible,
}

impl Opening {
    /// `gaps` are those that the index remembers.
    pub fn of(replica: ReplicaId, head: u64, mut gaps: Vec<Gap>, now_ms: u64) -> Opening {
        /// More rows than are ever made in a second, for long: 2^12.
        const PER_SECOND: u64 = 12;
        let began_at = head.max((now_ms / 1000) << PER_SECOND);
        // A run that made no rows has left out none.
        gaps.retain(|gap| gap.after < head);
        gaps.push(Gap {
            after: head,
            upto: began_at,
        });
        gaps.drain(..gaps.len().saturating_sub(GAPS_KEPT));
        Opening {
            replica,
            head,
            began_at,
            gaps,
        }
    }

    /// A peer says to have the rows of `replica`, which this index is now, up to
    /// `cursor`; on disk here they are up to `durable`.
    pub fn claim(&self, replica: ReplicaId, cursor: u64, durable: u64) -> Claim {
        let lost = self
            .gaps
            .iter()
            .find(|gap| gap.after < cursor && cursor < gap.upto);
        let beyond = self.gaps.last().filter(|_| cursor > durable);
        match lost.or(beyond) {
            None => Claim::Fits,
            Some(gap) if replica == self.replica => Claim::SetBack(*gap),
            Some(_) => Claim::Impossible,
        }
    }

    /// A row that was made after `gap`, before it was found that the index was set
    /// back, as `author`, who has another number, makes it again; none if `row` is
    /// not one of these. By its number it says to descend from all rows that were
    /// lost, which this node's disk has not had since: what other nodes have of
    /// them would be taken for superseded, and not be kept.
    pub fn made_again(&self, row: &Row, gap: Gap, author: &mut Author) -> Option<(u64, Row)> {
        let Version { vector, stamp } = &row.version;
        if stamp.replica != self.replica || vector.get(self.replica) <= gap.upto {
            return None;
        }
        let known = vector.pairs().iter().map(|&(replica, counter)| match replica {
            replica if replica == self.replica => (replica, counter.min(gap.after)),
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

    const ONE: ReplicaId = ReplicaId(1);
    const LEFT_OUT: Gap = Gap {
        after: 10,
        upto: 4096,
    };

    #[test]
    fn a_cursor_that_no_row_of_this_index_has_tells_that_it_was_set_back() {
        let first = Opening::of(ONE, 10, Vec::new(), 1999);
        assert_eq!((first.began_at, &first.gaps[..]), (4096, &[LEFT_OUT][..]));
        // The next run knows it, too; one without rows leaves nothing.
        let idle = Opening::of(ONE, 4097, first.gaps.clone(), 5000);
        let second = Opening::of(ONE, 4097, idle.gaps, 3000);
        let later = Gap {
            after: 4097,
            upto: 3 << 12,
        };
        assert_eq!(second.gaps, [LEFT_OUT, later]);
        for (cursor, claim) in [
            (10, Claim::Fits),
            (11, Claim::SetBack(LEFT_OUT)),
            (4096, Claim::Fits),
            (4098, Claim::SetBack(later)),
            (20_000, Claim::SetBack(later)),
        ] {
            assert_eq!(second.claim(ONE, cursor, 13_000), claim, "{cursor}");
        }
        assert_eq!(second.claim(ReplicaId(2), 4098, 4097), Claim::Impossible);
        assert_eq!(
            Opening::of(ONE, 5000, Vec::new(), 1000).began_at,
            5000,
            "a late clock"
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
        let opening = Opening::of(ONE, 10, Vec::new(), 1999);
        let mut author = Author::new(ReplicaId(2), 5000, None, None);
        let before = row(&[(1, 5001), (3, 7)], 1);
        let (seq, after) = opening.made_again(&before, LEFT_OUT, &mut author).unwrap();
        assert_eq!(
            after.version.vector.pairs(),
            [(ReplicaId(1), 10), (ReplicaId(2), seq), (ReplicaId(3), 7)]
        );
        assert!(
            after.version.stamp > before.version.stamp,
            "it wins over the one that was sent"
        );
        for other in [row(&[(1, 9), (3, 7)], 1), row(&[(1, 5001), (3, 7)], 3)] {
            assert_eq!(
                opening.made_again(&other, LEFT_OUT, &mut author),
                None,
                "{other:?}"
            );
        }
    }
}
