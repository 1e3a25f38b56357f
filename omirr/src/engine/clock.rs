//! The hybrid logical clock, and the author of this node's own versions.
//!
//! In: the wall clock's milliseconds, stamps that peers sent. Out: stamps and
//! sequence numbers for rows. The clock is never read here.
//!
//! What must hold: of two rows of one path that descend from one another, the
//! later has the greater stamp; and no stamp is given twice to one path. That
//! must survive a crash that loses the end of the index after rows from that
//! end have reached a peer. Hence [`Reserve`]: numbers and stamps up to it may
//! be in use, and after a crash the author goes on beyond it.

use crate::model::{ReplicaId, Row, Stamp};

use super::change::{Seen, differs, local_change};

/// How far ahead sequence numbers are reserved by one durable commit.
const RESERVE_SEQS: u64 = 1 << 20;
/// How far ahead wall time is reserved by one durable commit, milliseconds.
/// After a crash, a change found by the scan is stamped at most this far into
/// the future.
const RESERVE_MS: u64 = 10_000;

/// Gives stamps that are greater than every stamp given or seen before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clock {
    replica: ReplicaId,
    /// The greatest given or witnessed.
    last: Stamp,
    /// No stamp is given whose wall time is not beyond this: rows lost in a
    /// crash may carry them.
    floor_ms: u64,
}

impl Clock {
    /// `last` is the greatest stamp in the index; `floor_ms` the reserve of a
    /// life that ended in a crash, else 0.
    pub fn new(replica: ReplicaId, last: Option<Stamp>, floor_ms: u64) -> Clock {
        let last = last.unwrap_or(Stamp {
            wall_ms: 0,
            count: 0,
            replica,
        });
        Clock {
            replica,
            last,
            floor_ms,
        }
    }

    /// The greatest stamp given or witnessed.
    pub fn last(&self) -> Stamp {
        self.last
    }

    /// A stamp greater than all given and witnessed, for a change that is
    /// happening now.
    pub fn tick(&mut self, now_ms: u64) -> Stamp {
        let wall_ms = now_ms.max(self.floor_ms.saturating_add(1));
        let stamp = self.after(wall_ms, &self.last);
        self.last = stamp;
        stamp
    }

    /// Takes note of a stamp that came from a peer.
    pub fn witness(&mut self, stamp: Stamp) {
        self.last = self.last.max(stamp);
    }

    /// A stamp for a change of one path. `when_ms` is the change's own time, if
    /// it was found long after it happened; then the stamp may be lower than
    /// the clock's last, but it is greater than that of `old`, the path's row.
    /// That is enough: stamps of different paths are never compared.
    pub fn stamp_for(&mut self, now_ms: u64, when_ms: Option<u64>, old: Option<&Stamp>) -> Stamp {
        let Some(when_ms) = when_ms else {
            return self.tick(now_ms);
        };
        let wall_ms = when_ms.min(now_ms).max(self.floor_ms.saturating_add(1));
        let stamp = match old {
            Some(old) => self.after(wall_ms, old),
            None => Stamp {
                wall_ms,
                count: 0,
                replica: self.replica,
            },
        };
        self.witness(stamp);
        stamp
    }

    /// The least stamp at `wall_ms` or later that is greater than `old`.
    fn after(&self, wall_ms: u64, old: &Stamp) -> Stamp {
        let (wall_ms, count) = if wall_ms > old.wall_ms {
            (wall_ms, 0)
        } else {
            match old.count.checked_add(1) {
                Some(count) => (old.wall_ms, count),
                None => (old.wall_ms.saturating_add(1), 0),
            }
        };
        Stamp {
            wall_ms,
            count,
            replica: self.replica,
        }
    }
}

/// What this node may have used, durable in the index before it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserve {
    pub seq: u64,
    pub wall_ms: u64,
}

/// Makes this node's rows: owns its clock and its sequence numbers. A row's
/// version counter is the sequence number at which it was made.
#[derive(Clone, Debug)]
pub struct Author {
    replica: ReplicaId,
    clock: Clock,
    seq: u64,
    /// The greatest stamp of a tombstone that was forgotten.
    forgotten: Option<Stamp>,
}

impl Author {
    /// For an index whose highest sequence number and stamp are given.
    /// `reserve` is what the index holds if its last life did not end cleanly.
    pub fn new(replica: ReplicaId, head: u64, last: Option<Stamp>, reserve: Option<Reserve>) -> Author {
        let reserve = reserve.unwrap_or_default();
        Author {
            replica,
            clock: Clock::new(replica, last, reserve.wall_ms),
            seq: head.max(reserve.seq),
            forgotten: None,
        }
    }

    /// A tombstone with this stamp, or those with lower ones, were forgotten. A
    /// path without a row may have had one, which other nodes may still have: a
    /// row that is made there must win over it.
    pub fn forgets(&mut self, stamp: Stamp) {
        self.forgotten = self.forgotten.max(Some(stamp));
    }

    pub fn replica(&self) -> ReplicaId {
        self.replica
    }

    /// What a row must win over at a path that has none; see [`Author::forgets`].
    pub fn forgotten(&self) -> Option<Stamp> {
        self.forgotten
    }

    /// The last sequence number given.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    pub fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    pub fn witness(&mut self, stamp: Stamp) {
        self.clock.witness(stamp);
    }

    /// A stamp for a change that is happening now.
    pub fn tick(&mut self, now_ms: u64) -> Stamp {
        self.clock.tick(now_ms)
    }

    /// As [`Clock::stamp_for`].
    pub fn stamp_for(&mut self, now_ms: u64, when_ms: Option<u64>, old: Option<&Stamp>) -> Stamp {
        self.clock
            .stamp_for(now_ms, when_ms, old.or(self.forgotten.as_ref()))
    }

    /// Whether rows made so far go beyond `reserve`: then a new reserve must be
    /// durable before any of them can be seen by a peer.
    pub fn exceeds(&self, reserve: &Reserve) -> bool {
        self.seq > reserve.seq || self.clock.last.wall_ms > reserve.wall_ms
    }

    /// The reserve to store with the next durable commit.
    pub fn reserve(&self, now_ms: u64) -> Reserve {
        Reserve {
            seq: self.seq + RESERVE_SEQS,
            wall_ms: self.clock.last.wall_ms.max(now_ms).saturating_add(RESERVE_MS),
        }
    }

    /// The row for what was seen at a path, with its sequence number; none if
    /// nothing differs. `when_ms` as in [`Clock::stamp_for`].
    pub fn observe(
        &mut self,
        old: Option<&Row>,
        seen: &Seen,
        now_ms: u64,
        when_ms: Option<u64>,
    ) -> Option<(u64, Row)> {
        if !differs(old, seen) {
            return None;
        }
        let stamp = self.stamp_for(now_ms, when_ms, old.map(|row| &row.version.stamp));
        self.made(old, seen, stamp)
    }

    /// The same with a stamp that this author has given, greater than the old
    /// row's.
    pub fn observe_at(&mut self, old: Option<&Row>, seen: &Seen, stamp: Stamp) -> Option<(u64, Row)> {
        if !differs(old, seen) {
            return None;
        }
        self.made(old, seen, stamp)
    }

    /// The row for what differs.
    fn made(&mut self, old: Option<&Row>, seen: &Seen, stamp: Stamp) -> Option<(u64, Row)> {
        let seq = self.next_seq();
        local_change(old, seen, self.replica, seq, stamp).map(|row| (seq, row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(wall_ms: u64, count: u32, replica: u64) -> Stamp {
        Stamp {
            wall_ms,
            count,
            replica: ReplicaId(replica),
        }
    }

    #[test]
    fn ticks_beyond_what_it_gave_and_saw() {
        let mut clock = Clock::new(ReplicaId(1), None, 0);
        let mut last = clock.tick(100);
        assert_eq!(last, stamp(100, 0, 1));
        for now in [100, 99, 5, 101] {
            let next = clock.tick(now);
            assert!(next > last, "{next:?} after {last:?}");
            last = next;
        }
        clock.witness(stamp(5000, 7, 9));
        assert_eq!(clock.tick(102), stamp(5000, 8, 1));
        clock.witness(stamp(6000, u32::MAX, 9));
        assert_eq!(clock.tick(102), stamp(6001, 0, 1));
    }

    #[test]
    fn a_change_found_late_keeps_its_own_time() {
        let mut clock = Clock::new(ReplicaId(1), Some(stamp(9000, 0, 2)), 0);
        assert_eq!(
            clock.stamp_for(10_000, Some(4000), Some(&stamp(3000, 5, 2))),
            stamp(4000, 0, 1)
        );
        assert_eq!(
            clock.stamp_for(10_000, Some(4000), Some(&stamp(4000, 5, 2))),
            stamp(4000, 6, 1)
        );
        assert_eq!(
            clock.stamp_for(10_000, Some(4000), Some(&stamp(7000, 5, 2))),
            stamp(7000, 6, 1)
        );
        // A time in the future, from a clock that was wrong, is not believed.
        assert_eq!(clock.stamp_for(10_000, Some(99_000), None), stamp(10_000, 0, 1));
        assert!(clock.tick(0) > stamp(10_000, 0, 1));
    }

    #[test]
    fn goes_on_beyond_the_reserve_after_a_crash() {
        let mut author = Author::new(
            ReplicaId(1),
            5,
            None,
            Some(Reserve {
                seq: 100,
                wall_ms: 7000,
            }),
        );
        assert_eq!(author.next_seq(), 101);
        assert!(author.clock.stamp_for(6000, Some(5000), None).wall_ms > 7000);
        assert!(author.clock.tick(6000).wall_ms > 7000);
        assert!(author.exceeds(&Reserve {
            seq: 100,
            wall_ms: 7000
        }));
        assert!(!author.exceeds(&author.reserve(6000)));
    }
}
