//! Up to where a peer has everything.
//!
//! In: what was sent to a peer over a connection, and what it acknowledged. Out:
//! the number up to which all that this node's index ever had is on the peer's
//! disk, or something newer. An acknowledged number alone does not say so: a path
//! that changes again and again has its row further on each time, so that a peer
//! may be past all numbers at which it ever stood and have none of its rows. Only
//! a snapshot of which everything was sent leaves nothing out.

use std::collections::VecDeque;

/// So many snapshots may wait for their acknowledgement; of more, only the last
/// does.
const WAITING_MAX: usize = 1024;

/// How far one peer is, for this node's life.
#[derive(Clone, Debug, Default)]
pub struct Reached {
    /// The peer's last acknowledgement.
    acked: u64,
    /// Everything up to here has reached it.
    upto: u64,
    /// Snapshots that were sent as a whole: what the peer must acknowledge for
    /// that, and the number that the snapshot ended at.
    waiting: VecDeque<(u64, u64)>,
}

impl Reached {
    /// A connection begins: the peer has this node's rows up to `cursor`.
    pub fn connected(&mut self, cursor: u64) {
        if cursor < self.acked {
            // It has less than it had: it was restored from a copy.
            self.upto = 0;
        }
        self.acked = cursor;
        self.waiting.clear();
    }

    /// The peer has asked to begin again: what was sent and is not acknowledged it may
    /// not have looked at.
    pub fn begins_again(&mut self) {
        self.waiting.clear();
    }

    /// All of a snapshot that ended at `head` was sent, the last of it with a
    /// batch up to `sent`.
    pub fn sent_all(&mut self, sent: u64, head: u64) {
        if self.waiting.len() == WAITING_MAX {
            self.waiting.pop_back();
        }
        self.waiting.push_back((sent, head));
        self.acknowledged(self.acked);
    }

    /// The peer has the rows up to `durable` on its disk.
    pub fn acknowledged(&mut self, durable: u64) {
        self.acked = self.acked.max(durable);
        while let Some((_, head)) = self.waiting.pop_front_if(|(sent, _)| *sent <= self.acked) {
            self.upto = self.upto.max(head);
        }
    }

    /// The peer's last acknowledgement: see [`Reached::upto`] for what it leaves out.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// Everything up to here, or something newer of the same paths, is on the
    /// peer's disk.
    pub fn upto(&self) -> u64 {
        self.upto
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_snapshot_counts() {
        let mut reached = Reached::default();
        reached.connected(3);
        reached.acknowledged(7);
        assert_eq!(reached.upto(), 0, "a row may have gone from 5 to 12");
        reached.sent_all(12, 14);
        reached.acknowledged(11);
        assert_eq!(reached.upto(), 0);
        reached.acknowledged(12);
        assert_eq!(reached.upto(), 14);
    }

    #[test]
    fn what_the_peer_has_already_needs_no_acknowledgement() {
        let mut reached = Reached::default();
        reached.connected(9);
        reached.sent_all(9, 9);
        assert_eq!(reached.upto(), 9);
        // The connection ends and another begins.
        reached.sent_all(12, 12);
        reached.connected(9);
        reached.acknowledged(12);
        assert_eq!(reached.upto(), 9, "that was sent over the other one");
        reached.sent_all(12, 13);
        assert_eq!(reached.upto(), 13);
    }

    #[test]
    fn what_the_peer_did_not_look_at_does_not_count() {
        let mut reached = Reached::default();
        reached.sent_all(12, 12);
        reached.begins_again();
        // It comes once more, and something of it has gone on meanwhile.
        reached.acknowledged(12);
        assert_eq!(reached.upto(), 0);
        reached.sent_all(15, 15);
        reached.acknowledged(15);
        assert_eq!(reached.upto(), 15);
    }

    #[test]
    fn a_peer_that_was_set_back_has_nothing_for_certain() {
        let mut reached = Reached::default();
        reached.connected(9);
        reached.sent_all(9, 9);
        reached.connected(4);
        assert_eq!(reached.upto(), 0);
    }

    #[test]
    fn of_very_many_snapshots_the_last_one_counts() {
        let mut reached = Reached::default();
        let last = 5 * WAITING_MAX as u64;
        for nth in 1..=last {
            reached.sent_all(nth, nth);
        }
        assert_eq!(reached.waiting.len(), WAITING_MAX);
        reached.acknowledged(last);
        assert_eq!(reached.upto(), last);
    }
}
