//! Small contents that were just read, for the senders: what the observer has
//! hashed need not be read again from the file to be sent.

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use crate::model::Hash;

/// How much is kept, bytes of content.
const BUDGET: usize = 16 << 20;

pub struct Recent {
    kept: Mutex<(LruCache<Hash, Bytes>, usize)>,
}

impl Recent {
    pub fn new() -> Recent {
        Recent {
            kept: Mutex::new((LruCache::unbounded(), 0)),
        }
    }

    pub fn put(&self, hash: Hash, content: Bytes) {
        let mut kept = self.kept.lock();
        kept.1 += content.len();
        if let Some(old) = kept.0.put(hash, content) {
            kept.1 -= old.len();
        }
        while kept.1 > BUDGET {
            let Some((_, old)) = kept.0.pop_lru() else { break };
            kept.1 -= old.len();
        }
    }

    pub fn get(&self, hash: &Hash) -> Option<Bytes> {
        self.kept.lock().0.get(hash).cloned()
    }

    /// Gives the memory back; called when nothing has happened for a while.
    pub fn clear(&self) {
        let mut kept = self.kept.lock();
        kept.0 = LruCache::unbounded();
        kept.1 = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_within_its_budget() {
        let recent = Recent::new();
        for n in 0..40u8 {
            recent.put(Hash([n; 32]), Bytes::from(vec![n; 1 << 20]));
        }
        assert!(recent.get(&Hash([0; 32])).is_none());
        assert_eq!(recent.get(&Hash([39; 32])).unwrap().len(), 1 << 20);
        assert!(recent.kept.lock().1 <= BUDGET);
    }
}
