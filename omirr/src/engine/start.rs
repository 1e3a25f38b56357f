//! What to make of a share's directory and index at the start.
//!
//! In: whether the index and the directory are those of the last run, and
//! whether anything is in them. Out: whether to go on, to doubt the index, or to
//! stop. The rule behind all of it: emptiness is no deletion.

use std::collections::HashMap;

use crate::model::{Entry, LinkGroup, StatSig};

/// A directory with nothing in it is believed to have been emptied by hand where
/// the index has fewer live rows than this; where it has more, it is asked
/// whether the share's filesystem is mounted.
const EMPTIED_MIN: u64 = 16;

/// What is found at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtStart {
    /// Live rows in the index, the root's included.
    pub live: u64,
    /// The index was copied, restored or cloned since it was last used.
    pub index_is_copy: bool,
    /// The root is another directory than the one that was mirrored.
    pub other_root: bool,
    /// Nothing is in the root.
    pub root_is_empty: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The index says what was on disk.
    GoOn,
    /// The index is a copy: it takes a new replica number, and its rows count
    /// only where the disk bears them out. What is not there is no deletion.
    Doubt,
    /// Another directory than before: most likely something is not mounted.
    OtherRoot,
    /// The same directory with nothing in it.
    Emptied,
}

pub fn start(found: AtStart) -> Start {
    let AtStart {
        live,
        index_is_copy,
        other_root,
        root_is_empty,
    } = found;
    // An index without rows can make nothing of what is missing.
    let knows = live > 1;
    if index_is_copy {
        return match knows && root_is_empty {
            true => Start::Emptied,
            false => Start::Doubt,
        };
    }
    if knows && other_root {
        Start::OtherRoot
    } else if live >= EMPTIED_MIN && root_is_empty {
        Start::Emptied
    } else {
        Start::GoOn
    }
}

/// Whether what `stat` says is what a row of a doubted index says, as far as can
/// be told without reading: then the row's version stands. If not, the disk may
/// be newer than the index or older, and only a comparison with the peers can
/// tell. Directories are judged by their names, not by their times, which every
/// restored name changes.
pub fn bears_out(entry: &Entry, sig: Option<&StatSig>) -> bool {
    let Some(sig) = sig else { return false };
    if entry.is_dir() || sig.is_dir() {
        return entry.is_dir() && sig.is_dir();
    }
    entry.content().is_some() == sig.is_file()
        && sig.mtime == entry.mtime
        && entry.content().is_none_or(|(size, _)| size == sig.size)
}

/// Which hard-link groups of a doubted index are still one inode each. Only their
/// names may be believed to be linked: groups that were named anew would pass for
/// changes made here.
#[derive(Debug, Default)]
pub struct Groups(HashMap<LinkGroup, Option<u64>>);

impl Groups {
    /// A name of the group stands, and its inode is `ino`.
    pub fn found(&mut self, group: LinkGroup, ino: u64) {
        let known = self.0.entry(group).or_insert(Some(ino));
        *known = known.filter(|known| *known == ino);
    }

    /// Whether all names that were found are one inode.
    pub fn is_one(&self, group: LinkGroup) -> bool {
        self.0.get(&group).is_some_and(Option::is_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_linked_that_are_one_inode() {
        let mut groups = Groups::default();
        for (group, ino) in [(1, 5), (1, 5), (2, 6), (2, 7), (2, 6)] {
            groups.found(LinkGroup(group), ino);
        }
        let is_one = [1, 2, 3].map(|group| groups.is_one(LinkGroup(group)));
        assert_eq!(is_one, [true, false, false]);
    }

    #[test]
    fn emptiness_is_no_deletion() {
        let same = AtStart {
            live: 100,
            index_is_copy: false,
            other_root: false,
            root_is_empty: false,
        };
        let cases = [
            (same, Start::GoOn),
            (
                AtStart {
                    other_root: true,
                    ..same
                },
                Start::OtherRoot,
            ),
            (
                AtStart {
                    other_root: true,
                    live: 1,
                    ..same
                },
                Start::GoOn,
            ),
            (
                AtStart {
                    root_is_empty: true,
                    ..same
                },
                Start::Emptied,
            ),
            (
                AtStart {
                    root_is_empty: true,
                    live: 5,
                    ..same
                },
                Start::GoOn,
            ),
            (
                AtStart {
                    index_is_copy: true,
                    ..same
                },
                Start::Doubt,
            ),
            (
                AtStart {
                    index_is_copy: true,
                    other_root: true,
                    ..same
                },
                Start::Doubt,
            ),
            (
                AtStart {
                    index_is_copy: true,
                    root_is_empty: true,
                    live: 5,
                    ..same
                },
                Start::Emptied,
            ),
            (
                AtStart {
                    index_is_copy: true,
                    root_is_empty: true,
                    live: 1,
                    ..same
                },
                Start::Doubt,
            ),
        ];
        for (found, expected) in cases {
            assert_eq!(start(found), expected, "{found:?}");
        }
    }
}
