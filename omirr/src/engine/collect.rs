//! When a tombstone may be forgotten.
//!
//! In: what peers acknowledge, how far this node has their rows. Out: whether a
//! tombstone's work is done. It is, once no node can bring back what was deleted
//! by way of a peer of this node: each peer has the tombstone durably, and what
//! it had sent before it had it has arrived here. What a peer's own peers still
//! have, that peer's tombstone deals with: it, too, is kept until they are past
//! it. So a tombstone goes where it was made first, and at the far end last.
//!
//! A node that comes with an older tree, because its index was lost or restored
//! from a copy, may bring a deleted path back where the tombstone is gone. Where
//! another node still has it, the two would never agree: so a living row that
//! loses against a tombstone has the tombstone told again (`decide_remote`).

use crate::model::{Record, ReplicaId};

/// What is known of a peer that is sent rows and whose rows are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// The peer's index.
    replica: Option<ReplicaId>,
    /// This node's rows up to here are durable there.
    acked: u64,
    /// And up to here also all is here that the peer had before it had them.
    confirmed: u64,
    /// An acknowledgement to be confirmed: `acked` then, and the peer's head.
    waiting: Option<(u64, u64)>,
    /// The last one that has come meanwhile.
    latest: Option<(u64, u64)>,
}

impl Marks {
    /// The peer's index is `replica`, which has this node's rows up to `cursor`
    /// and ends at `head`.
    pub fn connected(&mut self, replica: ReplicaId, cursor: u64, head: u64) {
        let same = self.replica == Some(replica);
        *self = Marks {
            replica: Some(replica),
            acked: cursor,
            // It has less than it had, if it was restored from a copy.
            confirmed: if same { self.confirmed.min(cursor) } else { 0 },
            waiting: None,
            latest: None,
        };
        self.acknowledged(cursor, head);
    }

    /// The peer has this node's rows up to `durable` on disk; its own end at
    /// `head`.
    pub fn acknowledged(&mut self, durable: u64, head: u64) {
        self.acked = self.acked.max(durable);
        match self.waiting {
            _ if durable <= self.confirmed => {}
            None => self.waiting = Some((durable, head)),
            Some(_) => self.latest = Some((durable, head)),
        }
    }

    /// Of the rows of `replica` all up to `cursor` are durable here.
    pub fn received(&mut self, replica: ReplicaId, cursor: u64) {
        while self.replica == Some(replica)
            && let Some((durable, head)) = self.waiting
            && cursor >= head
        {
            self.confirmed = self.confirmed.max(durable);
            self.waiting = self.latest.take();
        }
    }

    /// How far a peer is that nothing is taken from.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// How far a peer is whose rows are taken.
    pub fn confirmed(&self) -> u64 {
        self.confirmed
    }
}

/// Which of this node's tombstones a peer is past.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// Those with a sequence number up to this.
    Upto(u64),
    /// It is sent nothing: those that came from it, by its place.
    Own(u32),
}

/// The sequence number up to which it is worth looking for tombstones.
pub fn past_all(peers: &[Past]) -> u64 {
    let upto = peers.iter().map(|past| match past {
        Past::Upto(seq) => *seq,
        Past::Own(_) => u64::MAX,
    });
    upto.min().unwrap_or(0)
}

/// Whether `record`, a tombstone, need not be kept for any of `peers`.
pub fn may_forget(record: &Record, peers: &[Past]) -> bool {
    record.row.deleted
        && peers.iter().all(|past| match past {
            Past::Upto(seq) => record.seq <= *seq,
            Past::Own(place) => record.via == Some(*place),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: ReplicaId = ReplicaId(7);

    #[test]
    fn what_the_peer_had_before_must_have_arrived() {
        let mut marks = Marks::default();
        marks.connected(PEER, 10, 100);
        assert_eq!((marks.acked(), marks.confirmed()), (10, 0));
        marks.received(PEER, 99);
        assert_eq!(marks.confirmed(), 0, "row 100 may bring back what is deleted");
        marks.received(ReplicaId(8), 200);
        assert_eq!(marks.confirmed(), 0, "that is another index");
        marks.received(PEER, 100);
        assert_eq!(marks.confirmed(), 10);
    }

    #[test]
    fn an_acknowledgement_while_another_waits_does_not_move_the_bar() {
        let mut marks = Marks::default();
        marks.connected(PEER, 10, 100);
        marks.acknowledged(20, 150);
        marks.received(PEER, 120);
        assert_eq!((marks.acked(), marks.confirmed()), (20, 10));
        marks.received(PEER, 150);
        assert_eq!(marks.confirmed(), 20);
    }

    #[test]
    fn a_peer_with_another_or_an_older_index_is_past_nothing_more() {
        let mut marks = Marks::default();
        marks.connected(PEER, 10, 5);
        marks.received(PEER, 5);
        marks.connected(PEER, 4, 5);
        assert_eq!(marks.confirmed(), 4);
        marks.connected(ReplicaId(8), 0, 0);
        assert_eq!((marks.acked(), marks.confirmed()), (0, 0));
    }

    #[test]
    fn a_peer_that_is_sent_nothing_is_past_what_it_sent() {
        assert_eq!(past_all(&[Past::Upto(9), Past::Own(1), Past::Upto(4)]), 4);
        assert_eq!(past_all(&[]), 0, "without peers nothing is known");
    }
}
