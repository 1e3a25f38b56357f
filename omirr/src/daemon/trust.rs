//! Of which files the bytes that events tell are believed to be all.
//!
//! In: events, in their order, and which files were read in full. Out: whether a file
//! must be read in any case, and whether nobody can have stored into it unseen. A
//! store through a mapping is told at a page's first one only, and one into a page
//! that was written to before this daemon listened is not told at all. So a file is
//! believed once nobody had it mapped to write, and it was read in full after that;
//! until someone maps it, or its name goes, or something may not have been told.
//! Nothing of this outlives the daemon. Pure.

use rustc_hash::{FxHashMap, FxHashSet};

use crate::source::{Event, Recovered, Written};

/// So many files are remembered. Who has more that are large and change reads some
/// in full once more.
const WHOLE_MAX: usize = 65_536;

#[derive(Debug, Default)]
pub struct Trust {
    /// Inodes that someone had mapped to write when an event last told.
    mapped: FxHashSet<u64>,
    /// Inodes that were read in full since nobody had.
    whole: FxHashSet<u64>,
    /// How often something was not told that should have been: what was said before of
    /// a file, and what is read because of that, says nothing of now.
    doubts: u64,
    /// The last of these times that was about any file.
    all_doubted: u64,
    /// Those that were about some inodes.
    doubted: FxHashMap<u64, u64>,
}

/// What follows from an event for whoever looks at the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// It may have changed although `stat` says the same: someone has it mapped to
    /// write, or had until this close. A store through a mapping sets the times at a
    /// page's first store only.
    pub must_be_read: bool,
    pub unmapped: Option<Unmapped>,
}

/// That nobody had an inode mapped to write, and when. The greater one is the later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unmapped {
    doubts: u64,
    ino: u64,
}

impl Unmapped {
    pub fn is_of(self, ino: u64) -> bool {
        self.ino == ino
    }
}

impl Trust {
    pub fn hear(&mut self, event: &Event) -> Heard {
        let must_be_read = if event.mapped {
            self.mapped.insert(event.ino);
            true
        } else if event.stale {
            event.is_at_rest() && self.is_mapped(event.ino)
        } else {
            event.is_at_rest() && self.mapped.remove(&event.ino)
        };
        if must_be_read || event.written == Written::Anywhere {
            self.whole.remove(&event.ino);
        }
        Heard {
            must_be_read,
            unmapped: event.unmapped.then_some(Unmapped {
                doubts: self.doubts,
                ino: event.ino,
            }),
        }
    }

    /// These changed untold. Events of them that are still to come know nothing of it.
    pub fn recovered(&mut self, recovered: &Recovered) {
        if recovered.moved || self.doubted.len() + recovered.inodes.len() > WHOLE_MAX {
            // A directory may have left the share, and come back with what is mapped.
            self.doubt_all();
        }
        self.doubts += 1;
        for inode in &recovered.inodes {
            self.whole.remove(&inode.ino);
            self.doubted.insert(inode.ino, self.doubts);
            if inode.mapped {
                self.mapped.insert(inode.ino);
            }
        }
    }

    /// Something may not have been told, of whatever file.
    pub fn doubt_all(&mut self) {
        self.doubts += 1;
        self.all_doubted = self.doubts;
        self.doubted.clear();
        self.whole.clear();
    }

    /// Whether someone may have it mapped to write.
    pub fn is_mapped(&self, ino: u64) -> bool {
        self.mapped.contains(&ino)
    }

    /// All of it was read, and is in the index, after an event had said that nobody had
    /// it mapped.
    pub fn read_in_full(&mut self, unmapped: Unmapped) {
        let Unmapped { doubts, ino } = unmapped;
        let doubted = self.doubted.get(&ino).copied().unwrap_or(0).max(self.all_doubted);
        if doubts < doubted || self.mapped.contains(&ino) {
            return;
        }
        if self.whole.len() >= WHOLE_MAX
            && let Some(any) = self.whole.iter().next().copied()
        {
            self.whole.remove(&any);
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Op, Recoverable};

    /// One that tells its bytes and was asked for a mapping.
    fn event(op: Op, mapped: bool) -> Event {
        Event {
            mapped,
            unmapped: !mapped,
            written: if mapped {
                Written::Anywhere
            } else {
                Written::within(0, 1)
            },
            ..Event::told_by(op, 1, 0, b"test")
        }
    }

    /// What is heard of an event, and a look that reads all of the file because of it.
    fn hear_and_read(trust: &mut Trust, event: &Event) -> Heard {
        let heard = trust.hear(event);
        if let Some(unmapped) = heard.unmapped {
            trust.read_in_full(unmapped);
        }
        heard
    }

    #[test]
    fn what_is_mapped_is_not_whole_until_it_was_read_after_the_mapping() {
        let mut trust = Trust::default();
        let write = event(Op::Write, false);
        let ino = write.ino;
        let heard = trust.hear(&write);
        assert!(!heard.must_be_read && !trust.is_whole(ino));
        let since = heard.unmapped.unwrap();
        trust.read_in_full(since);
        assert!(trust.is_whole(ino));
        let heard = trust.hear(&event(Op::Write, true));
        assert_eq!((heard.must_be_read, heard.unmapped), (true, None));
        assert!(!trust.is_whole(ino) && trust.is_mapped(ino));
        // A look that began before the mapping was told of.
        trust.read_in_full(since);
        assert!(!trust.is_whole(ino));
        assert!(!trust.hear(&event(Op::Attr, false)).must_be_read);
        assert!(trust.is_mapped(ino), "only a close tells that it ended");
        let heard = trust.hear(&event(Op::Close, false));
        assert!(heard.must_be_read && !trust.is_mapped(ino) && !trust.is_whole(ino));
        assert!(!hear_and_read(&mut trust, &event(Op::Close, false)).must_be_read);
        assert!(trust.is_whole(ino));
    }

    #[test]
    fn a_name_that_comes_or_goes_ends_it() {
        let mut trust = Trust::default();
        for op in [Op::Unlink, Op::Rename, Op::Link] {
            let write = event(Op::Write, false);
            hear_and_read(&mut trust, &write);
            assert!(trust.is_whole(write.ino));
            trust.hear(&Event {
                written: Written::Anywhere,
                unmapped: false,
                ..event(op, false)
            });
            assert!(!trust.is_whole(write.ino), "{op:?}");
        }
    }

    #[test]
    fn what_was_told_before_something_was_not_counts_no_more() {
        let write = event(Op::Write, false);
        let ino = write.ino;
        let inode = |mapped| Recovered {
            inodes: vec![Recoverable {
                ino,
                parent: 2,
                named: false,
                mapped,
            }],
            ..Recovered::default()
        };
        let moved = Recovered {
            moved: true,
            ..Recovered::default()
        };
        type Doubting<'a> = &'a dyn Fn(&mut Trust);
        let doubts: [(&str, Doubting<'_>); 3] = [
            ("recovered", &|trust| trust.recovered(&inode(false))),
            ("a directory moved", &|trust| trust.recovered(&moved)),
            ("lost", &Trust::doubt_all),
        ];
        for (name, doubt) in doubts {
            let mut trust = Trust::default();
            hear_and_read(&mut trust, &write);
            let before = trust.hear(&write).unmapped.unwrap();
            doubt(&mut trust);
            assert!(!trust.is_whole(ino), "{name}");
            trust.read_in_full(before);
            assert!(!trust.is_whole(ino), "{name}");
            hear_and_read(&mut trust, &write);
            assert!(trust.is_whole(ino), "{name}");
        }
        // Another's are no reason.
        let mut trust = Trust::default();
        let before = trust.hear(&write).unmapped.unwrap();
        trust.recovered(&Recovered {
            inodes: vec![Recoverable {
                ino: ino + 1,
                ..inode(false).inodes[0]
            }],
            dirs: vec![2],
            ..Recovered::default()
        });
        trust.read_in_full(before);
        assert!(trust.is_whole(ino));
        // That it is mapped was in what was recovered, and in no event.
        let mut trust = Trust::default();
        trust.recovered(&inode(true));
        hear_and_read(&mut trust, &write);
        assert!(!trust.is_whole(ino) && trust.is_mapped(ino));
        // Sent before it was mapped.
        let stale = Event {
            stale: true,
            unmapped: false,
            written: Written::Anywhere,
            ..event(Op::Close, false)
        };
        assert!(trust.hear(&stale).must_be_read && trust.is_mapped(ino));
        assert!(trust.hear(&event(Op::Close, false)).must_be_read && !trust.is_mapped(ino));
        assert!(!trust.hear(&stale).must_be_read && !trust.is_mapped(ino));
    }

    #[test]
    fn what_is_remembered_has_a_limit() {
        let mut trust = Trust::default();
        for ino in 0..WHOLE_MAX as u64 + 5 {
            trust.read_in_full(Unmapped { doubts: 0, ino });
        }
        assert!(trust.is_whole(WHOLE_MAX as u64 + 4) && trust.whole.len() == WHOLE_MAX);
        trust.forget(WHOLE_MAX as u64 + 4);
        assert!(!trust.is_whole(WHOLE_MAX as u64 + 4));
        trust.doubt_all();
        assert!(trust.whole.is_empty());
    }
}
