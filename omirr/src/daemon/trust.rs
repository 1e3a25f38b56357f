//! Of which files the bytes that events tell are believed to be all.
//!
//! In: events, in their order, and which files were read in full. Out: whether a file
//! must be read in any case, and whether nobody can have stored into it unseen. A
//! store through a mapping is told at a page's first one only, and one into a page
//! that was written to before this daemon listened is not told at all. So a file is
//! believed once nobody had it mapped to write, and it was read in full after that;
//! until someone maps it. Nothing of this outlives the daemon. Pure.

use rustc_hash::FxHashSet;

use crate::source::{Event, Op};

/// So many files are remembered. Who has more that are large and change reads some
/// in full once more.
const WHOLE_MAX: usize = 65_536;

#[derive(Debug, Default)]
pub struct Trust {
    /// Inodes that someone had mapped to write when an event last told.
    mapped: FxHashSet<u64>,
    /// Inodes that were read in full since nobody had.
    whole: FxHashSet<u64>,
}

impl Trust {
    /// Whether the file may have changed although `stat` says the same: someone has
    /// it mapped to write, or had until this close. A store through a mapping sets
    /// the times at a page's first store only.
    pub fn must_be_read(&mut self, event: &Event) -> bool {
        if event.op == Op::Unlink {
            self.whole.remove(&event.ino);
        }
        let read = if event.mapped {
            self.mapped.insert(event.ino);
            true
        } else {
            event.is_at_rest() && self.mapped.remove(&event.ino)
        };
        if read {
            self.whole.remove(&event.ino);
        }
        read
    }

    /// Whether someone may have it mapped to write.
    pub fn is_mapped(&self, ino: u64) -> bool {
        self.mapped.contains(&ino)
    }

    /// All of it was read after an event had said that nobody had it mapped.
    pub fn read_in_full(&mut self, ino: u64) {
        if self.mapped.contains(&ino) {
            return;
        }
        if self.whole.len() >= WHOLE_MAX {
            self.whole.clear();
        }
        self.whole.insert(ino);
    }

    pub fn is_whole(&self, ino: u64) -> bool {
        self.whole.contains(&ino)
    }

    /// It was changed otherwise than by a user.
    pub fn forget(&mut self, ino: u64) {
        self.whole.remove(&ino);
    }

    /// Something may not have been told.
    pub fn forget_all(&mut self) {
        self.whole.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(op: Op, mapped: bool) -> Event {
        Event {
            mapped,
            ..Event::told_by(op, 1, 0, b"test")
        }
    }

    #[test]
    fn what_is_mapped_is_not_whole_until_it_was_read_after_the_mapping() {
        let mut trust = Trust::default();
        let ino = event(Op::Write, false).ino;
        assert!(!trust.must_be_read(&event(Op::Write, false)) && !trust.is_whole(ino));
        trust.read_in_full(ino);
        assert!(trust.is_whole(ino));
        assert!(trust.must_be_read(&event(Op::Write, true)));
        assert!(!trust.is_whole(ino) && trust.is_mapped(ino));
        // A look that began before the mapping was told of.
        trust.read_in_full(ino);
        assert!(!trust.is_whole(ino));
        assert!(!trust.must_be_read(&event(Op::Attr, false)));
        assert!(trust.is_mapped(ino), "only a close tells that it ended");
        assert!(trust.must_be_read(&event(Op::Close, false)));
        assert!(!trust.is_mapped(ino) && !trust.is_whole(ino));
        assert!(!trust.must_be_read(&event(Op::Close, false)));
        trust.read_in_full(ino);
        assert!(trust.is_whole(ino));
        trust.must_be_read(&event(Op::Unlink, false));
        assert!(!trust.is_whole(ino));
    }

    #[test]
    fn what_is_remembered_has_a_limit() {
        let mut trust = Trust::default();
        for ino in 0..WHOLE_MAX as u64 + 5 {
            trust.read_in_full(ino);
        }
        assert!(trust.is_whole(WHOLE_MAX as u64 + 4) && trust.whole.len() <= WHOLE_MAX);
        trust.forget(WHOLE_MAX as u64 + 4);
        assert!(!trust.is_whole(WHOLE_MAX as u64 + 4));
        trust.forget_all();
        assert!(trust.whole.is_empty());
    }
}
