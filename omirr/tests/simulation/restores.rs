//! Backups: what a node had once is put back, all of it or a part, or its index
//! is lost. What a node then does is the daemon's `doubt` and `keeper`; what the
//! users may lose by it is told to `Users` here.

use std::collections::BTreeMap;

use omirr::engine::{AtStart, Groups, Start, bears_out, is_conflict_path, start};
use omirr::model::{Gap, Kind, Record, RelPath, ReplicaId, StatSig};

use crate::disk::Disk;
use crate::index::Index;
use crate::node::Node;
use crate::world::{Manner, World, root_entry};

/// So many backups of one node are kept.
const KEPT: usize = 3;

/// A node's state at one moment.
pub(crate) struct Backup {
    disk: Disk,
    /// As a crash at that moment would have left it.
    index: Index,
    replica: ReplicaId,
    clean: bool,
    copied: bool,
    set_back: bool,
}

/// What is put back, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restore {
    /// The tree alone: by a tool that copies, or by rolling its filesystem back.
    Tree(How),
    /// The index alone.
    Index(How),
    Both(How),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Files are copied: the index can tell by its own file.
    Copied,
    /// A filesystem is rolled back to a snapshot: nothing tells.
    RolledBack,
}

impl World {
    /// A backup is made, or put back.
    pub(crate) fn save_or_restore(&mut self, at: usize) {
        if self.manner == Manner::OneWriter && at == 0 {
            return;
        }
        if self.places[at].backups.is_empty() || self.rng.chance(50) {
            self.save(at);
        } else {
            self.restore(at);
        }
    }

    fn save(&mut self, at: usize) {
        self.trace.say(|| format!("n{at} is backed up"));
        let place = &mut self.places[at];
        if place.backups.len() == KEPT {
            let which = self.rng.below(KEPT as u64) as usize;
            place.backups.swap_remove(which);
        }
        place.backups.push(Backup {
            disk: place.node.disk.clone(),
            index: place.node.durable.clone(),
            replica: place.node.replica,
            clean: place.clean && !place.up,
            copied: place.node.copied,
            set_back: place.node.set_back,
        });
    }

    fn restore(&mut self, at: usize) {
        let which = self.rng.below(self.places[at].backups.len() as u64) as usize;
        let backup = self.places[at].backups.swap_remove(which);
        let node = &self.places[at].node;
        // What a node sends before it is durable is noticed by no peer's cursor,
        // and an index of before it took another number has none to notice.
        let noticed = !node.hasty && backup.replica == node.replica && !node.copied;
        let how = match self.rng.below(2) {
            0 if noticed => How::RolledBack,
            _ => How::Copied,
        };
        let restore = match self.rng.below(4) {
            // Other trees than the writer's must not become anything else.
            _ if self.manner == Manner::OneWriter => Restore::Both(how),
            0 => Restore::Tree(if self.rng.chance(50) {
                How::Copied
            } else {
                How::RolledBack
            }),
            1 => Restore::Index(how),
            _ => Restore::Both(how),
        };
        if !matches!(restore, Restore::Tree(_)) || self.rng.chance(70) {
            match self.rng.chance(50) {
                true => self.stop(at),
                false => self.crash(at),
            }
        }
        self.trace.say(|| format!("n{at} is put back: {restore:?}"));
        // It takes its time.
        self.users.now_ns += 2_000_000_000 + self.rng.below(10_000_000_000);
        self.set_clock(at);
        let before = self.places[at].node.disk.contents();
        let all_anew = self.rng.chance(50);
        let place = &mut self.places[at];
        let node = &mut place.node;
        let paths: Vec<RelPath> = node
            .disk
            .names
            .keys()
            .chain(backup.disk.names.keys())
            .cloned()
            .collect();
        match restore {
            Restore::Tree(How::Copied) | Restore::Both(How::Copied) => {
                node.disk.put_back(&backup.disk, all_anew);
            }
            Restore::Tree(How::RolledBack) | Restore::Both(How::RolledBack) => {
                node.disk.roll_back(&backup.disk);
            }
            Restore::Index(_) => {}
        }
        if let Restore::Index(how) | Restore::Both(how) = restore {
            node.durable = backup.index;
            node.replica = backup.replica;
            node.copied = how == How::Copied || backup.copied;
            node.set_back = how == How::RolledBack || backup.set_back;
            place.clean = backup.clean;
        }
        let only_tree = matches!(restore, Restore::Tree(_));
        if !only_tree {
            self.not_rewritten(at);
        }
        let place = &mut self.places[at];
        if place.up {
            match self.rng.chance(50) {
                true => place.events.extend(paths),
                false => place.lost = true,
            }
        }
        let emptied = only_tree && !self.places[at].up && self.stops_at_start(at);
        let changed = only_tree && !emptied;
        self.gone(at, &before, !changed);
        // A tree that was rolled back has its old change times as well: whoever has
        // removed a conflict copy of the same since has removed this version.
        if changed && restore == Restore::Tree(How::Copied) {
            self.written_again(at, &before);
        }
        if only_tree || self.rng.chance(50) {
            self.start(at);
        }
    }

    /// A node's tree was other than it is now: what users wrote there may be gone.
    /// `unless_known`: a node that begins with less than it had only loses what no
    /// other node has, since what is missing counts as no deletion.
    fn gone(&mut self, at: usize, before: &BTreeMap<RelPath, Kind>, unless_known: bool) {
        let after = self.places[at].node.disk.contents();
        let others = self
            .places
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != at && unless_known);
        let elsewhere: Vec<Kind> = others
            .flat_map(|(_, place)| place.node.disk.contents().into_values())
            .collect();
        for (path, kind) in before {
            let gained = after
                .iter()
                .any(|(to, now)| now == kind && (unless_known || before.get(to) != Some(kind)));
            // Whoever removes a conflict copy removes the version that it is of,
            // wherever else the same restore brings that back: it is dated as it was.
            let removed = !unless_known && is_conflict_path(path);
            if after.get(path) != Some(kind) && (!gained || removed) && !elsewhere.contains(kind) {
                self.users.removed.insert(kind.clone());
            }
        }
    }

    /// The index is of before what was written again: it takes that for the old
    /// version, which others may have replaced. What has reached another node's
    /// disk is a new one there.
    fn not_rewritten(&mut self, at: usize) {
        for kind in std::mem::take(&mut self.places[at].rewritten) {
            if !self.others_know(at, |_, known| *known == kind) {
                self.users.removed.insert(kind);
            }
        }
    }

    /// Whether the index of another node has a live path and content like that.
    fn others_know(&self, at: usize, like: impl Fn(&RelPath, &Kind) -> bool) -> bool {
        let others = self.places.iter().enumerate().filter(|(other, _)| *other != at);
        let mut indexes = others.flat_map(|(_, place)| [&place.node.index, &place.node.durable]);
        indexes.any(|index| {
            let mut live = index.records.iter().filter(|(_, record)| !record.row.deleted);
            live.any(|(path, record)| like(path, &record.row.entry.kind))
        })
    }

    /// A tree that was put back beneath its index is a change made here: what it
    /// has otherwise than the index is written again. What a peer knows at that
    /// path may count as the same version, if this index was lost: then it is for
    /// that peer's users to replace it.
    fn written_again(&mut self, at: usize, before: &BTreeMap<RelPath, Kind>) {
        let node = &self.places[at].node;
        let index = if self.places[at].up {
            &node.index
        } else {
            &node.durable
        };
        let mut again = Vec::new();
        for (path, kind) in node.disk.contents() {
            let known = index.get(&path).and_then(|record| record.row.live());
            let copy_removed = before
                .iter()
                .any(|(copy, was)| *was == kind && is_conflict_path(copy) && node.disk.entry(copy).is_none());
            if before.get(&path) != Some(&kind)
                && !copy_removed
                && known.is_none_or(|entry| entry.kind != kind)
                && !self.others_know(at, |there, known| *there == path && *known == kind)
            {
                again.push(kind);
            }
        }
        for kind in &again {
            self.users.removed.remove(kind);
        }
        self.places[at].rewritten.extend(again);
    }

    /// Whether the share stops at the start because its tree is empty; then its
    /// index is removed, so that it is filled from the peers.
    fn stops_at_start(&mut self, at: usize) -> bool {
        let node = &mut self.places[at].node;
        let stops = start(node.durable.at_start(false, &node.disk)) == Start::Emptied;
        if stops {
            node.lose_index();
        }
        stops
    }

    /// A node that is down comes back without its index, perhaps without its
    /// disk. Nobody's tree can then be expected to be as its users left it.
    pub(crate) fn lose_index(&mut self, at: usize) {
        if self.places[at].up || self.manner != Manner::Free {
            return;
        }
        self.set_clock(at);
        let before = self.places[at].node.disk.contents();
        let disk_too = self.rng.chance(50);
        if disk_too {
            let root = self.places[at].node.disk.entry(&RelPath::root()).cloned();
            let root = root.unwrap_or_else(|| root_entry(&mut self.users));
            self.places[at].node.disk = Disk::new(root);
        }
        self.trace.say(|| {
            format!(
                "n{at} starts without its index{}",
                if disk_too { " and disk" } else { "" }
            )
        });
        self.places[at].node.lose_index();
        self.gone(at, &before, true);
        self.start(at);
    }
}

impl Node {
    /// With a new index comes a new replica.
    pub(crate) fn lose_index(&mut self) {
        self.durable = Index::default();
        self.copied = false;
        self.set_back = false;
        self.take_new_number();
    }

    /// Every hundredth is another life of the index of one node.
    fn take_new_number(&mut self) {
        self.replica = ReplicaId(self.replica.0 % 100 + 100 * self.lives);
        self.lives += 1;
    }

    /// Makes a copy of an index one that can be used here: see the daemon's `doubt`.
    pub(crate) fn doubt(&mut self) {
        if start(self.index.at_start(true, &self.disk)) == Start::Emptied {
            // The share stops, and whoever has it filled from the peers removes
            // the index first.
            self.lose_index();
            self.index = Index::default();
            return;
        }
        let mut groups = Groups::default();
        let mut found = Vec::new();
        for (path, record) in &*self.index.records {
            let Some(entry) = record.row.live().filter(|_| !path.is_root()) else {
                continue;
            };
            let stands = self.stat(path).filter(|sig| bears_out(entry, Some(sig)));
            if let (Some(group), Some(sig)) = (entry.link, stands) {
                groups.found(group, sig.ino);
            }
            found.push((path.clone(), stands.is_some()));
        }
        for (path, stands) in found {
            self.log.say(|| format!("{path} stands: {stands}"));
            let Some(record) = self.index.get(&path).cloned().filter(|_| stands) else {
                self.index.disown(&path);
                continue;
            };
            let linked = record.row.entry.link.is_some_and(|group| groups.is_one(group));
            let sig = self.sig(&path).filter(|_| linked);
            self.index.put(path, Record { sig, ..record });
        }
        self.index.cursors.clear();
        self.take_new_number();
    }

    /// What `stat` says, kind and size included.
    fn stat(&self, path: &RelPath) -> Option<StatSig> {
        let entry = self.disk.entry(path)?;
        let of_kind = match entry.kind {
            Kind::Directory => 0o040_000,
            Kind::File { .. } => 0o100_000,
            _ => 0o120_000,
        };
        let sig = self.sig(path)?;
        Some(StatSig {
            mode: sig.mode | of_kind,
            size: entry.content().map_or(0, |(size, _)| size),
            ..sig
        })
    }

    /// The index was set back in its own file, and a peer has told.
    pub(crate) fn renew(&mut self, gap: Gap) {
        self.commit();
        self.take_new_number();
        self.set_back = false;
        self.author = self.author_after(self.author.seq(), None);
        let made: Vec<RelPath> = self.index.by_seq.values().cloned().collect();
        for path in made {
            let Some(record) = self.index.get(&path).cloned() else {
                continue;
            };
            if let Some((seq, row)) = self.opening.made_again(&record.row, gap, &mut self.author) {
                self.index.put(path, Record { seq, row, ..record });
            }
        }
        self.commit();
    }
}

impl Index {
    fn at_start(&self, index_is_copy: bool, disk: &Disk) -> AtStart {
        let live = self.records.values().filter(|record| !record.row.deleted);
        AtStart {
            live: live.count() as u64,
            index_is_copy,
            other_root: false,
            root_is_empty: disk.names.len() == 1,
        }
    }
}
