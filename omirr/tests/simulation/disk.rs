//! A directory tree in memory, with inodes, that refuses what a kernel would.

use std::collections::{BTreeMap, BTreeSet};

use omirr::model::{Entry, Kind, RelPath, Time};
use rustc_hash::FxHashMap;

use crate::beneath;

#[derive(Clone, Debug)]
pub(crate) struct Inode {
    /// `link` is always none here: groups are the index' business.
    pub(crate) entry: Entry,
    /// When it last changed, by this node's clock.
    pub(crate) ctime_ms: u64,
}

/// Why something could not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused;

#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) names: BTreeMap<RelPath, u64>,
    pub(crate) inodes: FxHashMap<u64, Inode>,
    next_ino: u64,
    /// Counts whatever is done to it.
    pub(crate) changes: u64,
    /// The node's clock: stamps directories when names in them change.
    pub(crate) clock: Time,
}

impl Disk {
    pub(crate) fn new(root: Entry) -> Disk {
        let clock = root.mtime;
        let inode = Inode {
            ctime_ms: clock.millis(),
            entry: root,
        };
        Disk {
            names: BTreeMap::from([(RelPath::root(), 1)]),
            inodes: FxHashMap::from_iter([(1, inode)]),
            next_ino: 2,
            changes: 0,
            clock,
        }
    }

    pub(crate) fn ino(&self, path: &RelPath) -> Option<u64> {
        self.names.get(path).copied()
    }

    pub(crate) fn entry(&self, path: &RelPath) -> Option<&Entry> {
        self.ino(path).map(|ino| &self.inodes[&ino].entry)
    }

    pub(crate) fn ctime_ms(&self, path: &RelPath) -> Option<u64> {
        self.ino(path).map(|ino| self.inodes[&ino].ctime_ms)
    }

    pub(crate) fn is_dir(&self, path: &RelPath) -> bool {
        self.entry(path).is_some_and(Entry::is_dir)
    }

    pub(crate) fn names_of(&self, ino: u64) -> Vec<RelPath> {
        self.names
            .iter()
            .filter(|(_, at)| **at == ino)
            .map(|(path, _)| path.clone())
            .collect()
    }

    pub(crate) fn has_several_names(&self, ino: u64) -> bool {
        self.names.values().filter(|at| **at == ino).nth(1).is_some()
    }

    pub(crate) fn beneath(&self, path: &RelPath) -> Vec<RelPath> {
        beneath(&self.names, path).map(|(at, _)| at.clone()).collect()
    }

    fn has_something_beneath(&self, path: &RelPath) -> bool {
        // A file, most often.
        self.is_dir(path) && beneath(&self.names, path).next().is_some()
    }

    /// A new inode under no name.
    pub(crate) fn make(&mut self, entry: &Entry) -> u64 {
        let ino = self.next_ino;
        self.next_ino += 1;
        let entry = Entry {
            link: None,
            ..entry.clone()
        };
        self.inodes.insert(
            ino,
            Inode {
                entry,
                ctime_ms: self.clock.millis(),
            },
        );
        ino
    }

    /// Puts `ino` at `path`, in place of whatever is there but a directory
    /// with something in it.
    pub(crate) fn put(&mut self, path: &RelPath, ino: u64) -> Result<(), Refused> {
        self.changes += 1;
        self.parent_is_dir(path)?;
        if self.has_something_beneath(path) {
            return Err(Refused);
        }
        let old = self.names.insert(path.clone(), ino);
        self.forget(old);
        self.inode_changed(ino);
        self.dir_changed(path);
        Ok(())
    }

    pub(crate) fn set(&mut self, path: &RelPath, entry: &Entry) -> Result<(), Refused> {
        self.changes += 1;
        let ino = self.ino(path).ok_or(Refused)?;
        let ctime_ms = self.clock.millis();
        let entry = Entry {
            link: None,
            ..entry.clone()
        };
        self.inodes.insert(ino, Inode { entry, ctime_ms });
        Ok(())
    }

    pub(crate) fn remove(&mut self, path: &RelPath) -> Result<(), Refused> {
        self.changes += 1;
        if path.is_root() || self.has_something_beneath(path) {
            return Err(Refused);
        }
        let old = self.names.remove(path);
        if old.is_none() {
            return Err(Refused);
        }
        self.forget(old);
        self.dir_changed(path);
        Ok(())
    }

    /// Renames a file, or a directory with all beneath it.
    pub(crate) fn rename(&mut self, from: &RelPath, to: &RelPath) -> Result<(), Refused> {
        self.changes += 1;
        let ino = self.ino(from).ok_or(Refused)?;
        self.parent_is_dir(to)?;
        if from.is_root() || to.is_within(from) || from.is_within(to) || self.has_something_beneath(to) {
            return Err(Refused);
        }
        if self.names.contains_key(to) && self.is_dir(to) != self.is_dir(from) {
            return Err(Refused);
        }
        let old = self.names.remove(to);
        for at in self.beneath(from) {
            let new = at.rebase(from, to).ok_or(Refused)?;
            if let Some(ino) = self.names.remove(&at) {
                self.names.insert(new, ino);
            }
        }
        self.names.remove(from);
        self.names.insert(to.clone(), ino);
        self.forget(old);
        self.inode_changed(ino);
        self.dir_changed(from);
        self.dir_changed(to);
        Ok(())
    }

    /// What the tree was once is put back by a tool that leaves alone what has not
    /// changed, or writes everything anew: contents and attributes are as they
    /// were, inodes and change times are not.
    pub(crate) fn put_back(&mut self, old: &Disk, all_anew: bool) {
        self.changes += 1;
        let mut names = BTreeMap::new();
        let mut inodes = FxHashMap::default();
        let mut made: FxHashMap<u64, u64> = FxHashMap::default();
        for (path, was) in &old.names {
            let entry = &old.inodes[was].entry;
            let here = self.ino(path).filter(|ino| {
                let kept = *ino == 1 || !all_anew;
                kept && self.inodes[ino].entry == *entry && !made.values().any(|made| made == ino)
            });
            let ino = *made.entry(*was).or_insert_with(|| match (here, path.is_root()) {
                (Some(ino), _) => ino,
                (None, true) => 1,
                (None, false) => {
                    self.next_ino += 1;
                    self.next_ino - 1
                }
            });
            names.insert(path.clone(), ino);
            let kept = here
                .filter(|here| *here == ino)
                .and_then(|ino| self.inodes.get(&ino));
            inodes.entry(ino).or_insert_with(|| {
                let anew = Inode {
                    entry: entry.clone(),
                    ctime_ms: self.clock.millis(),
                };
                kept.cloned().unwrap_or(anew)
            });
        }
        (self.names, self.inodes) = (names, inodes);
    }

    /// The filesystem is rolled back to a snapshot of it: all is as it was.
    pub(crate) fn roll_back(&mut self, old: &Disk) {
        self.changes += 1;
        (self.names, self.inodes) = (old.names.clone(), old.inodes.clone());
        // Numbers of inodes that were made since, or on another disk, stay theirs.
        self.next_ino = self.next_ino.max(old.next_ino);
    }

    fn parent_is_dir(&self, path: &RelPath) -> Result<(), Refused> {
        match path.parent() {
            Some(dir) if self.is_dir(&dir) => Ok(()),
            _ => Err(Refused),
        }
    }

    fn dir_changed(&mut self, path: &RelPath) {
        let (Some(dir), clock) = (path.parent(), self.clock) else {
            return;
        };
        if let Some(inode) = self.ino(&dir).and_then(|ino| self.inodes.get_mut(&ino)) {
            inode.entry.mtime = clock;
            inode.ctime_ms = clock.millis();
        }
    }

    fn inode_changed(&mut self, ino: u64) {
        let ctime_ms = self.clock.millis();
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.ctime_ms = ctime_ms;
        }
    }

    fn forget(&mut self, ino: Option<u64>) {
        if let Some(ino) = ino
            && !self.names.values().any(|at| *at == ino)
        {
            self.inodes.remove(&ino);
        }
    }

    /// Everything that must be the same on all nodes: entries, and which names
    /// share an inode.
    pub(crate) fn picture(&self) -> (BTreeMap<RelPath, Entry>, BTreeSet<Vec<RelPath>>) {
        let entries = self
            .names
            .keys()
            .filter_map(|path| Some((path.clone(), self.entry(path)?.clone())));
        let shared = self
            .names
            .values()
            .map(|ino| self.names_of(*ino))
            .filter(|names| names.len() > 1);
        (entries.collect(), shared.collect())
    }

    /// What each name other than a directory's holds.
    pub(crate) fn contents(&self) -> BTreeMap<RelPath, Kind> {
        let held = self.names.keys().filter_map(|path| {
            let entry = self.entry(path)?;
            (!entry.is_dir()).then(|| (path.clone(), entry.kind.clone()))
        });
        held.collect()
    }
}
