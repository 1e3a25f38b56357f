//! From the inodes that events name to paths beneath one share. Pure.
//!
//! In: what a scan finds ([`Resolver::learn_dir`]) and the source's events in
//! their order ([`Resolver::apply`]). Out: changes of paths. The resolver never
//! asks the disk; `fallback` does, for the rare directory that it does not
//! know.
//!
//! Three habits of whoever scans make the paths right however events and scans
//! overlap. Ask [`Resolver::now`] before looking, and tell it with what was seen:
//! a rename that has been applied meanwhile is newer. Attach the source first and scan second. Tell a directory before
//! its entries are read: an entry that is made later then comes as an event in
//! a directory that is known, and one made earlier is among the entries.
//!
//! A change is a hint to look at the disk. Directories that arrive (`Touched`
//! with a directory there, `Moved` with `is_dir`) must be walked by whoever
//! looks: what is beneath them may not be known here, and an event from beneath
//! them may have been merged by the kernel into an earlier one, which named
//! their former place.

pub mod fallback;
mod table;

use std::collections::VecDeque;

use self::table::{Slot, Table};
use crate::model::RelPath;
use crate::source::{Dirent, Event, Op};

/// Directories that lost their place, with what is beneath them, and are kept
/// because the next event may tell their new one.
const DISPLACED_LIMIT: usize = 256;

/// A change of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Look at this path.
    Touched {
        path: RelPath,
        /// Its content may differ, not only its attributes.
        content: bool,
        /// The last writer has closed it.
        at_rest: bool,
    },
    /// Look at both paths; what was at the one is probably at the other.
    Moved {
        from: RelPath,
        to: RelPath,
        is_dir: bool,
    },
    /// Look at both paths; each holds what the other held.
    Exchanged { a: RelPath, b: RelPath },
    /// Look at this path; there is probably nothing.
    Gone { path: RelPath },
    /// The event lies in a directory that is not known to be in this share, or
    /// names no directory at all. `fallback` can find out.
    Unknown(Unknown),
}

/// What is known of a change whose path is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// The directory and the name in it, where the event tells.
    pub at: Option<Dirent>,
    /// The changed inode, 0 where the event does not tell.
    pub ino: u64,
    pub generation: u32,
    pub content: bool,
}

/// The directories of one share and where they are.
pub struct Resolver {
    table: Table,
    /// Numbers of directories that were displaced, oldest first.
    displaced: VecDeque<u64>,
    /// Events applied so far.
    events: u64,
    stats: ResolverStats,
}

/// What the resolver counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ResolverStats {
    /// Directories known now.
    pub directories: u64,
    /// What their table takes in memory.
    pub bytes: u64,
    /// Events whose path was found, and those whose was not.
    pub hits: u64,
    pub misses: u64,
}

impl Resolver {
    /// A share of which only the root is known.
    pub fn new(root_ino: u64) -> Resolver {
        Resolver {
            table: Table::new(root_ino),
            displaced: VecDeque::new(),
            events: 0,
            stats: ResolverStats::default(),
        }
    }

    pub fn stats(&self) -> ResolverStats {
        ResolverStats {
            directories: self.table.len() as u64,
            bytes: self.table.bytes() as u64,
            ..self.stats
        }
    }

    pub fn root_ino(&self) -> u64 {
        self.table.ino(self.table.root())
    }

    /// Notes that `ino` is the directory `name` in `parent_ino`. False if the
    /// parent is not known, or the name cannot be one.
    pub fn learn_dir(&mut self, ino: u64, parent_ino: u64, name: &[u8]) -> bool {
        let Some(parent) = self.table.find(parent_ino) else {
            return false;
        };
        self.learn_in(ino, parent, name)
    }

    /// The same, of something that was seen after [`Resolver::now`] had said
    /// `since`: an event that has been applied since knows better.
    pub fn learn_dir_seen(&mut self, since: u64, ino: u64, parent_ino: u64, name: &[u8]) -> bool {
        let moved = self
            .table
            .find(ino)
            .is_some_and(|slot| self.table.placed(slot) > since);
        moved || self.learn_dir(ino, parent_ino, name)
    }

    /// A moment, as the count of the events that have been applied. To be asked
    /// for before looking at what is then learned.
    pub fn now(&self) -> u64 {
        self.events
    }

    fn learn_in(&mut self, ino: u64, parent: Slot, name: &[u8]) -> bool {
        if ino == 0 || RelPath::root().join(name).is_err() {
            return false;
        }
        let slot = self.table.find(ino).unwrap_or_else(|| self.table.insert(ino));
        if slot == self.table.root() {
            return false;
        }
        self.place(slot, parent, name);
        self.trim_displaced();
        true
    }

    /// Forgets a directory that was seen to be gone after [`Resolver::now`] had
    /// said `since`, and everything beneath it; unless an event has given the
    /// number a place since.
    pub fn forget_dir_seen(&mut self, since: u64, ino: u64) {
        if let Some(slot) = self.table.find(ino)
            && slot != self.table.root()
            && self.table.placed(slot) <= since
        {
            self.table.remove(slot);
        }
    }

    /// Where a directory is, as far as is known.
    pub fn path_of(&self, dir_ino: u64) -> Option<RelPath> {
        self.path(self.table.find(dir_ino)?)
    }

    /// The directory at a path, as far as is known.
    pub fn dir_at(&self, path: &RelPath) -> Option<u64> {
        let mut slot = self.table.root();
        for name in path.names() {
            slot = self.table.child(slot, name)?;
        }
        Some(self.table.ino(slot))
    }

    /// Whether the event touches a directory of this share. Of several shares
    /// on one filesystem, an event concerns those that answer yes.
    pub fn knows(&self, event: &Event) -> bool {
        let mut dirs = [&event.at, &event.to]
            .into_iter()
            .flatten()
            .map(|dirent| dirent.dir);
        let known = |ino| {
            self.table
                .find(ino)
                .is_some_and(|slot| self.table.is_rooted(slot))
        };
        dirs.any(known) || (event.is_dir && event.ino != 0 && known(event.ino))
    }

    /// Takes the next event: says which paths changed, and moves its own
    /// directories as the event tells.
    pub fn apply(&mut self, event: &Event) -> Vec<Change> {
        let mut changes = Vec::new();
        self.events += 1;
        match event.op {
            Op::Rename if event.is_dir => self.rename_dir(event, &mut changes),
            Op::Rename => self.rename_file(event, &mut changes),
            Op::Exchange => self.exchange(event, &mut changes),
            Op::Unlink => match self.entry(event.at.as_ref()) {
                Some(path) => changes.push(Change::Gone { path }),
                None => changes.push(unknown(event, event.at.as_ref())),
            },
            Op::Rmdir => self.rmdir(event, &mut changes),
            Op::Link => self.link(event, &mut changes),
            Op::Write
            | Op::Truncate
            | Op::Fallocate
            | Op::Create
            | Op::Mkdir
            | Op::Mknod
            | Op::Symlink
            | Op::Attr
            | Op::Xattr
            | Op::Close => self.touch(event, &mut changes),
        }
        self.trim_displaced();
        if changes.iter().any(|change| matches!(change, Change::Unknown(_))) {
            self.stats.misses += 1;
        } else {
            self.stats.hits += 1;
        }
        changes
    }

    fn touch(&mut self, event: &Event, changes: &mut Vec<Change>) {
        if event.is_dir {
            self.learn_from(event);
        }
        let path = match &event.at {
            Some(_) => self.entry(event.at.as_ref()),
            None if event.is_dir => self.path_of(event.ino),
            None => None,
        };
        match path {
            Some(path) => changes.push(touched(event, path)),
            None => changes.push(unknown(event, event.at.as_ref())),
        }
    }

    /// Takes the place of a directory from an event about itself: always, if
    /// that made it; else only if there is none yet, since the place in an
    /// event may be older than what a scan saw.
    fn learn_from(&mut self, event: &Event) {
        let Some(at) = event.at.as_ref().filter(|at| !at.name.is_empty()) else {
            return;
        };
        let Some(parent) = self.table.find(at.dir) else {
            return;
        };
        let is_new = event.ino != 0
            && self
                .table
                .find(event.ino)
                .is_none_or(|slot| self.table.is_detached(slot));
        let is_free = self.table.child(parent, &at.name).is_none();
        let made = event.op == Op::Mkdir;
        let learned = (made || (is_new && is_free)) && self.learn_in(event.ino, parent, &at.name);
        if let Some(slot) = self.table.find(event.ino).filter(|_| learned && made) {
            self.table.set_placed(slot, self.events);
        }
    }

    fn rmdir(&mut self, event: &Event, changes: &mut Vec<Change>) {
        let Some(path) = self.entry(event.at.as_ref()) else {
            changes.push(unknown(event, event.at.as_ref()));
            return;
        };
        // Another directory under this name, or this number under another
        // name, is newer than the event: a scan ran ahead.
        if let Some(slot) = self.child_at(event.at.as_ref())
            && (event.ino == 0 || self.table.ino(slot) == event.ino)
        {
            self.table.remove(slot);
        }
        changes.push(Change::Gone { path });
    }

    fn link(&mut self, event: &Event, changes: &mut Vec<Change>) {
        for half in [event.to.as_ref(), event.at.as_ref()].into_iter().flatten() {
            changes.push(match self.entry(Some(half)) {
                Some(path) => touched(event, path),
                None => unknown(event, Some(half)),
            });
        }
        if changes.is_empty() {
            changes.push(unknown(event, None));
        }
    }

    /// One half of a rename leads to a directory that is not known: it may lie
    /// outside of the share, or have been made a moment ago.
    fn other_half(event: &Event, half: Option<&Dirent>, changes: &mut Vec<Change>) {
        if half.is_some() {
            changes.push(unknown(event, half));
        }
    }

    fn rename_file(&mut self, event: &Event, changes: &mut Vec<Change>) {
        match (self.entry(event.at.as_ref()), self.entry(event.to.as_ref())) {
            (Some(from), Some(to)) => changes.push(Change::Moved {
                from,
                to,
                is_dir: false,
            }),
            (Some(path), None) => {
                changes.push(Change::Gone { path });
                Resolver::other_half(event, event.to.as_ref(), changes);
            }
            (None, Some(path)) => {
                changes.push(touched(event, path));
                Resolver::other_half(event, event.at.as_ref(), changes);
            }
            (None, None) => changes.push(unknown(event, event.to.as_ref().or(event.at.as_ref()))),
        }
    }

    fn rename_dir(&mut self, event: &Event, changes: &mut Vec<Change>) {
        let (from, to) = (self.entry(event.at.as_ref()), self.entry(event.to.as_ref()));
        let slot = match event.ino {
            0 => self.child_at(event.at.as_ref()),
            ino => self.table.find(ino),
        };
        // Where it was believed to be, should that not be what the event says:
        // whoever listens believes the same, and must look there too.
        let believed = slot
            .and_then(|slot| self.path(slot))
            .filter(|path| from.as_ref() != Some(path));
        match (&event.to, to) {
            (Some(dirent), Some(to)) => {
                if let Some(slot) = slot.or_else(|| (event.ino != 0).then(|| self.table.insert(event.ino)))
                    && let Some(parent) = self.table.find(dirent.dir)
                {
                    self.place_now(slot, parent, &dirent.name);
                }
                match (from, believed) {
                    (Some(from), believed) => {
                        changes.push(Change::Moved {
                            from,
                            to,
                            is_dir: true,
                        });
                        changes.extend(believed.map(|path| touched(event, path)));
                    }
                    (None, Some(from)) if from != to => changes.push(Change::Moved {
                        from,
                        to,
                        is_dir: true,
                    }),
                    (None, _) => {
                        changes.push(touched(event, to));
                        Resolver::other_half(event, event.at.as_ref(), changes);
                    }
                }
            }
            (_, _) => {
                let left: Vec<_> = from.into_iter().chain(believed).collect();
                if let Some(slot) = slot {
                    self.leave(slot, event.ino);
                }
                let other = match left.is_empty() {
                    true => event.to.as_ref().or(event.at.as_ref()),
                    false => event.to.as_ref(),
                };
                if left.is_empty() && other.is_none() {
                    changes.push(unknown(event, None));
                }
                changes.extend(left.into_iter().map(|path| Change::Gone { path }));
                Resolver::other_half(event, other, changes);
            }
        }
    }

    /// A directory went out of the share, or to where the event does not say.
    fn leave(&mut self, slot: Slot, ino: u64) {
        if ino == 0 {
            // The source tells the two halves of a rename apart: the other one
            // may come, and name the directory by its number.
            self.displace(slot);
        } else {
            self.table.remove(slot);
        }
    }

    fn exchange(&mut self, event: &Event, changes: &mut Vec<Change>) {
        let (at, to) = (event.at.as_ref(), event.to.as_ref());
        let paths = (self.entry(at), self.entry(to));
        let slots = (self.child_at(at), self.child_at(to));
        for slot in [slots.0, slots.1].into_iter().flatten() {
            self.table.detach(slot);
        }
        // Each takes the other's place; what went out of the share is forgotten.
        for (slot, place) in [(slots.0, to), (slots.1, at)] {
            let Some(slot) = slot else { continue };
            match place.and_then(|place| Some((self.table.find(place.dir)?, &place.name))) {
                Some((parent, name)) => self.place_now(slot, parent, name),
                None => self.table.remove(slot),
            }
        }
        match paths {
            (Some(a), Some(b)) => changes.push(Change::Exchanged { a, b }),
            (Some(path), None) => {
                changes.push(touched(event, path));
                Resolver::other_half(event, to, changes);
            }
            (None, Some(path)) => {
                changes.push(touched(event, path));
                Resolver::other_half(event, at, changes);
            }
            (None, None) => changes.push(unknown(event, at.or(to))),
        }
    }

    /// Puts a directory where an event says that it is.
    fn place_now(&mut self, slot: Slot, parent: Slot, name: &[u8]) {
        self.place(slot, parent, name);
        self.table.set_placed(slot, self.events);
    }

    /// Puts a directory somewhere, from wherever it was.
    fn place(&mut self, slot: Slot, parent: Slot, name: &[u8]) {
        if self.table.is_at(slot, parent, name) || slot == self.table.root() {
            return;
        }
        if let Some(other) = self.table.child(parent, name) {
            // Replaced, hence empty; or the first half of an exchange.
            if self.table.has_children(other) {
                self.displace(other);
            } else {
                self.table.remove(other);
            }
        }
        if parent == slot {
            // It cannot lie in itself: what is known of it is out of date.
            self.displace(slot);
            return;
        }
        self.table.detach(slot);
        if self.table.is_within(parent, slot) {
            // The parent has left it before, and that is not known yet.
            self.displace(parent);
        }
        self.table.attach(slot, parent, name);
    }

    /// Takes a directory out of its place, and keeps it for a while.
    fn displace(&mut self, slot: Slot) {
        self.table.detach(slot);
        self.displaced.push_back(self.table.ino(slot));
    }

    /// Forgets the directories that have been without a place the longest.
    fn trim_displaced(&mut self) {
        while self.displaced.len() > DISPLACED_LIMIT {
            if let Some(oldest) = self.displaced.pop_front().and_then(|ino| self.table.find(ino))
                && self.table.is_detached(oldest)
            {
                self.table.remove(oldest);
            }
        }
    }

    fn path(&self, slot: Slot) -> Option<RelPath> {
        RelPath::new(&self.table.path(slot)?).ok()
    }

    /// The path of a directory entry, if its directory is known.
    fn entry(&self, dirent: Option<&Dirent>) -> Option<RelPath> {
        let dirent = dirent?;
        let dir = self.path_of(dirent.dir)?;
        if dirent.name.is_empty() {
            Some(dir)
        } else {
            dir.join(&dirent.name).ok()
        }
    }

    /// The directory that is known under a name.
    fn child_at(&self, dirent: Option<&Dirent>) -> Option<Slot> {
        let dirent = dirent?;
        self.table.child(self.table.find(dirent.dir)?, &dirent.name)
    }
}

fn touched(event: &Event, path: RelPath) -> Change {
    Change::Touched {
        path,
        content: event.touches_content(),
        at_rest: event.is_at_rest(),
    }
}

fn unknown(event: &Event, at: Option<&Dirent>) -> Change {
    Change::Unknown(Unknown {
        at: at.cloned(),
        ino: event.ino,
        generation: event.generation,
        content: event.touches_content(),
    })
}

#[cfg(test)]
mod tests;
