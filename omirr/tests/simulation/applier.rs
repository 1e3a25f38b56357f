//! The applier of a simulated node: steps on its disk, done or refused.

use std::collections::{HashMap, HashSet};

use omirr::engine::{Content, Install, Step};
use omirr::model::{Entry, Hash, RelPath};

use crate::disk::Disk;
use crate::index::Index;
use crate::node::Want;

/// Does steps on a disk, as the real applier must: never touching what is not
/// as the index says.
pub(crate) struct Applier {
    /// Content that is at hand.
    pub(crate) content: HashSet<Hash>,
    /// Inode and entry at paths that steps have changed.
    pub(crate) expected: HashMap<RelPath, Option<(u64, Entry)>>,
    pub(crate) wants: Vec<Want>,
}

impl Applier {
    pub(crate) fn step(&mut self, disk: &mut Disk, index: &Index, step: &Step) -> bool {
        let done = match step {
            Step::Stage { path, entry, content } => self.stage(disk, path, entry, content),
            Step::Aside { path, to } => {
                let ino = disk.ino(path);
                let done = self.is_expected(disk, index, path)
                    && disk.entry(to).is_none()
                    && ino.is_some_and(|ino| disk.put(to, ino).is_ok());
                if done {
                    self.note(disk, to);
                }
                done
            }
            Step::Install { path, entry, how } => {
                let done = self.install(disk, index, path, entry, how);
                if let Install::Moved { from } = how
                    && done
                {
                    self.note(disk, from);
                }
                done
            }
            Step::Remove { path } => {
                disk.entry(path).is_none()
                    || (self.is_expected(disk, index, path) && disk.remove(path).is_ok())
            }
            Step::Times { path, entry } => {
                let same = disk.entry(path).is_some_and(|here| {
                    *here
                        == Entry {
                            mtime: here.mtime,
                            ..entry.clone()
                        }
                });
                same && disk.set(path, entry).is_ok()
            }
            Step::Restore { path, entry } => {
                if self.is_expected(disk, index, path) && disk.is_dir(path) {
                    return disk.set(path, entry).is_ok();
                }
                true
            }
        };
        if done && !matches!(step, Step::Stage { .. }) {
            self.note(disk, step.path());
        }
        done
    }

    fn stage(&mut self, disk: &Disk, path: &RelPath, entry: &Entry, content: &Content) -> bool {
        let Some((_, hash)) = entry.content() else {
            return false;
        };
        if let Content::Copy { from } = content
            && disk.entry(from).is_some_and(|here| here.kind == entry.kind)
        {
            return true;
        }
        if !self.content.contains(&hash) {
            self.wants.push(Want {
                path: path.clone(),
                hash,
            });
            return false;
        }
        true
    }

    fn install(
        &mut self,
        disk: &mut Disk,
        index: &Index,
        path: &RelPath,
        entry: &Entry,
        how: &Install,
    ) -> bool {
        if !self.is_expected(disk, index, path) {
            return false;
        }
        let bare = Entry {
            link: None,
            ..entry.clone()
        };
        match how {
            Install::Staged | Install::Fresh => {
                let ino = disk.make(entry);
                let put = disk.put(path, ino).is_ok();
                if !put {
                    disk.inodes.remove(&ino);
                }
                put
            }
            Install::Link { existing } => {
                let Some(ino) = disk.ino(existing) else {
                    return false;
                };
                disk.entry(existing) == Some(&bare) && disk.put(path, ino).is_ok()
            }
            Install::Moved { from } => {
                self.is_expected(disk, index, from)
                    && disk.entry(from) == Some(&bare)
                    && disk.rename(from, path).is_ok()
            }
            Install::MovedTree { from } => {
                let is = |(_, entry): &&(u64, Entry)| entry.is_dir();
                let known = self.expected_at(index, from);
                let Some((ino, _)) = known.as_ref().filter(is) else {
                    return false;
                };
                if disk.ino(from) != Some(*ino) || !disk.is_dir(from) {
                    return false;
                }
                let beneath: Vec<RelPath> = index.live_at_and_beneath(from);
                let carried: Vec<_> = beneath
                    .into_iter()
                    .map(|at| (self.expected_at(index, &at), at))
                    .collect();
                if disk.rename(from, path).is_err() {
                    return false;
                }
                for (known, at) in carried {
                    self.expected.extend(at.rebase(from, path).map(|to| (to, known)));
                    self.expected.insert(at, None);
                }
                true
            }
            Install::Attributes => {
                let Some(ino) = disk.ino(path) else { return false };
                let names = disk.names_of(ino);
                let kind = disk.entry(path).is_some_and(|here| here.kind == entry.kind);
                let fine = kind && names.iter().all(|name| self.is_expected(disk, index, name));
                if fine && disk.set(path, entry).is_ok() {
                    for name in &names {
                        self.note(disk, name);
                    }
                    return true;
                }
                false
            }
        }
    }

    fn note(&mut self, disk: &Disk, path: &RelPath) {
        let now = disk.ino(path).map(|ino| (ino, disk.inodes[&ino].entry.clone()));
        self.expected.insert(path.clone(), now);
    }

    fn expected_at(&self, index: &Index, path: &RelPath) -> Option<(u64, Entry)> {
        match self.expected.get(path) {
            Some(expected) => expected.clone(),
            None => index.get(path).and_then(|record| {
                let entry = Entry {
                    link: None,
                    ..record.row.live()?.clone()
                };
                Some((record.sig.map_or(0, |sig| sig.ino), entry))
            }),
        }
    }

    fn is_expected(&self, disk: &Disk, index: &Index, path: &RelPath) -> bool {
        let expected = self.expected_at(index, path);
        let here = disk.ino(path).map(|ino| (ino, disk.inodes[&ino].entry.clone()));
        match (here, expected) {
            (None, None) => true,
            (Some((ino, here)), Some((expected_ino, expected))) => {
                let mtime = if here.is_dir() { here.mtime } else { expected.mtime };
                (ino == expected_ino) && here == Entry { mtime, ..expected }
            }
            _ => false,
        }
    }
}
