//! Since when a path has had its content, where a newer row of it changed only
//! something else.
//!
//! In: rows that keep their path's content, as they are committed. Out: the number
//! of the row that brought the content, for the senders: a peer that has been told
//! of that one has the content, and is not sent it once more with each `chmod`.
//! What is not known here, after a restart say, is sent; a peer that lacks what
//! was not sent asks for it.

use lru::LruCache;
use parking_lot::Mutex;

/// So many rows are remembered.
const REMEMBERED: usize = 1 << 16;

/// Sequence numbers by sequence number.
pub struct Unchanged(Mutex<LruCache<u64, u64>>);

impl Unchanged {
    pub fn new() -> Unchanged {
        Unchanged(Mutex::new(LruCache::unbounded()))
    }

    /// The row `seq` has the content of the row `before`, whose place it takes.
    pub fn note(&self, before: u64, seq: u64) {
        let mut known = self.0.lock();
        let since = known.pop(&before).unwrap_or(before);
        known.put(seq, since);
        if known.len() > REMEMBERED {
            known.pop_lru();
        }
    }

    /// The number of the row with which the content of the row `seq` came, as far
    /// as it is known.
    pub fn since(&self, seq: u64) -> u64 {
        self.0.lock().peek(&seq).copied().unwrap_or(seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_that_brought_the_content_is_known_however_often_the_rest_changes() {
        let unchanged = Unchanged::new();
        unchanged.note(5, 8);
        unchanged.note(8, 9);
        assert_eq!((unchanged.since(9), unchanged.since(7)), (5, 7));
        for seq in 0..=REMEMBERED as u64 {
            unchanged.note(1, 100 + seq);
        }
        assert_eq!(unchanged.since(9), 9, "what is forgotten counts as new");
    }
}
