//! How many connections may be open for the same thing at once.
//!
//! In: connections as they begin, each with what it counts against. Out: word to
//! the oldest that it must give way. Nobody is kept waiting and nobody new is
//! turned away: what a peer is about to do matters more than what somebody began
//! long ago and has not ended, be it a stranger who dawdles or a connection whose
//! other side has lost power.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Connections under way, oldest first.
#[derive(Debug)]
pub struct Turns<K> {
    /// At most so many altogether,
    all: usize,
    /// and so many with the same key.
    each: usize,
    under_way: Mutex<VecDeque<(K, Arc<Ended>)>>,
}

#[derive(Debug, Default)]
struct Ended {
    word: Notify,
    limit: Mutex<Option<Limit>>,
}

/// Which limit made a connection give way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    All(usize),
    Each(usize),
}

impl<K: PartialEq> Turns<K> {
    pub fn new(all: usize, each: usize) -> Arc<Turns<K>> {
        Arc::new(Turns {
            all,
            each,
            under_way: Mutex::default(),
        })
    }

    /// Enters a new one; the oldest gives way if there are too many.
    pub fn begin(turns: &Arc<Turns<K>>, key: K) -> Turn<K> {
        let over = Arc::new(Ended::default());
        let mut under_way = turns.under_way.lock();
        let same = || {
            under_way
                .iter()
                .enumerate()
                .filter(|(_, (other, _))| *other == key)
        };
        let out = if same().count() >= turns.each {
            same().next().map(|(at, _)| (at, Limit::Each(turns.each)))
        } else {
            (under_way.len() >= turns.all).then_some((0, Limit::All(turns.all)))
        };
        if let Some((at, limit)) = out
            && let Some((_, oldest)) = under_way.remove(at)
        {
            *oldest.limit.lock() = Some(limit);
            oldest.word.notify_one();
        }
        under_way.push_back((key, Arc::clone(&over)));
        drop(under_way);
        Turn {
            turns: Arc::clone(turns),
            over,
        }
    }
}

/// A place among them, until dropped.
#[derive(Debug)]
pub struct Turn<K: PartialEq> {
    turns: Arc<Turns<K>>,
    over: Arc<Ended>,
}

impl<K: PartialEq> Turn<K> {
    /// Returns when this one must give way, and why. Cancel-safe.
    pub async fn is_over(&self) -> Limit {
        loop {
            if let Some(limit) = *self.over.limit.lock() {
                return limit;
            }
            self.over.word.notified().await;
        }
    }
}

impl<K: PartialEq> Drop for Turn<K> {
    fn drop(&mut self) {
        self.turns
            .under_way
            .lock()
            .retain(|(_, other)| !Arc::ptr_eq(other, &self.over));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit<K: PartialEq>(turn: &Turn<K>) -> Option<Limit> {
        *turn.over.limit.lock()
    }

    #[test]
    fn as_many_as_allowed_stay_and_one_more_ends_the_oldest_of_its_key() {
        let turns = Turns::new(4, 2);
        let (a1, b1, a2) = (
            Turns::begin(&turns, 'a'),
            Turns::begin(&turns, 'b'),
            Turns::begin(&turns, 'a'),
        );
        assert_eq!((limit(&a1), limit(&b1), limit(&a2)), (None, None, None));
        let a3 = Turns::begin(&turns, 'a');
        assert_eq!(limit(&a1), Some(Limit::Each(2)));
        assert_eq!((limit(&b1), limit(&a2), limit(&a3)), (None, None, None));
        let c1 = Turns::begin(&turns, 'c');
        assert_eq!(limit(&b1), None, "four are as many as may be");
        let c2 = Turns::begin(&turns, 'c');
        assert_eq!(limit(&b1), Some(Limit::All(4)));
        // One that has ended makes room.
        drop(a2);
        let _d = Turns::begin(&turns, 'd');
        assert_eq!((limit(&a3), limit(&c1), limit(&c2)), (None, None, None));
    }
}
