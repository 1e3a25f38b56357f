//! The keeper's one hand: from dirty paths to rows.
//!
//! In: paths that are due. Out: rows of what this node's users have changed,
//! durable, in an order in which a peer can apply them: parents before
//! children, a moved file before the tombstone of its old name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};

use super::dirty::Dirt;
use super::keeper::Keeper;
use super::share::Figures;
use crate::apply::Dirs;
use crate::engine::{self, Clock, Seen};
use crate::index::{Durable, IndexError, Reader, Writer};
use crate::model::{Entry, LinkGroup, Record, RelPath, StatSig};
use crate::observe::{self, Observed};

/// So many paths are looked at before their rows are written.
const PORTION: usize = 2048;

/// A path that was looked at, with its record as of before.
struct Look {
    path: RelPath,
    dirt: Dirt,
    record: Option<Record>,
    found: Observed,
    /// The content was under this path before, or is there as well.
    moved_from: Option<RelPath>,
}

impl Keeper {
    /// Looks at what is due (at everything, if `force`) and writes its rows.
    /// Returns whether there was anything.
    pub(super) fn local_pass(&mut self, force: bool) -> anyhow::Result<bool> {
        let taken = self.share.dirty().take(Instant::now(), force, PORTION);
        if taken.is_empty() {
            return Ok(false);
        }
        if let Err(reason) = self.share.root.still_there() {
            anyhow::bail!(reason);
        }
        let mut looks = self.look_at_all(taken)?;
        looks.retain(|look| !matches!(look.found, Observed::Foreign));
        self.write_rows(&looks)?;
        Ok(true)
    }

    /// Looks at the paths, at what lies beneath those that turn out to be new
    /// directories, and at the other names of changed inodes.
    fn look_at_all(&mut self, taken: Vec<(RelPath, Dirt)>) -> anyhow::Result<Vec<Look>> {
        let reader = self.share.index.read()?;
        let mut done: BTreeMap<RelPath, Look> = BTreeMap::new();
        let mut todo = taken;
        while !todo.is_empty() {
            let started = Instant::now();
            let looks = self.look_at(&reader, std::mem::take(&mut todo))?;
            let cost = started.elapsed();
            let mut more: FxHashMap<RelPath, Dirt> = FxHashMap::default();
            for look in looks {
                match &look.found {
                    Observed::Unstable { .. } => {
                        self.share.dirty().put_back(look.path, look.dirt, cost, Instant::now());
                        continue;
                    }
                    Observed::Present { entry, sig, .. } if entry.is_dir() => {
                        let is_new = !look.record.as_ref().is_some_and(|record| record.row.is_live_dir());
                        if is_new || look.dirt.subtree || look.record.as_ref().and_then(|r| r.sig).is_none_or(|s| s.ino != sig.ino) {
                            self.walk(&look.path, look.dirt, &mut more)?;
                        }
                    }
                    Observed::Unchanged { sig } if look.dirt.subtree && sig.mode & 0o170_000 == 0o040_000 => {
                        self.walk(&look.path, look.dirt, &mut more)?;
                    }
                    Observed::Present { sig, .. } if sig.nlink > 1 => {
                        let group = look.record.as_ref().and_then(|record| record.row.live()?.link);
                        let names = group.map(|group| reader.group(group)).transpose()?.unwrap_or_default();
                        for name in names.into_iter().chain(reader.path_of_ino(sig.ino)?) {
                            more.entry(name).or_insert(Dirt { content: false, subtree: false, ..look.dirt });
                        }
                    }
                    _ => {}
                }
                if let (Some(parent), true) = (look.path.parent(), appeared_or_gone(&look)) {
                    more.entry(parent).or_insert(Dirt { content: false, subtree: false, ..look.dirt });
                }
                done.insert(look.path.clone(), look);
            }
            todo = more.into_iter().filter(|(path, _)| !done.contains_key(path)).collect();
            todo.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        }
        Ok(done.into_values().collect())
    }

    /// Adds everything beneath a directory, and its directories to the
    /// resolver.
    fn walk(&self, start: &RelPath, dirt: Dirt, found: &mut FxHashMap<RelPath, Dirt>) -> anyhow::Result<()> {
        let share = &self.share;
        let skip = |path: &RelPath, is_dir: bool| share.is_excluded(path, is_dir);
        let mut names = Vec::new();
        let walked = observe::scan(&share.root, start, &skip, |dir| {
            let mut resolver = share.resolver.lock();
            for (name, sig) in &dir.children {
                if sig.mode & 0o170_000 == 0o040_000 {
                    resolver.learn_dir(sig.ino, dir.ino, name);
                }
                names.extend(dir.path.join(name));
            }
        });
        if let Err(error) = walked {
            // It is gone again, most likely; then an event says so.
            tracing::debug!(share = %share.name, "cannot walk {start}: {error}");
        }
        // What is looked at now need not be looked at for older events.
        let mut dirty = share.dirty();
        for name in names {
            let content = dirty.remove(&name).is_some_and(|dirt| dirt.content);
            found.entry(name).or_insert(Dirt { content, subtree: false, ..dirt });
        }
        Ok(())
    }

    fn look_at(&self, reader: &Reader, paths: Vec<(RelPath, Dirt)>) -> anyhow::Result<Vec<Look>> {
        let dirs = self.share.root.batch();
        let look = |(path, dirt): (RelPath, Dirt)| self.look_at_one(reader, &dirs, path, dirt);
        let looks: Vec<_> = if paths.len() < 8 {
            paths.into_iter().map(look).collect::<Result<_, IndexError>>()?
        } else {
            paths.into_par_iter().with_min_len(8).map(look).collect::<Result<_, IndexError>>()?
        };
        Ok(looks.into_iter().flatten().collect())
    }

    /// None if the path is none of the share's business, or cannot be read.
    fn look_at_one(
        &self,
        reader: &Reader,
        dirs: &Dirs<'_>,
        path: RelPath,
        dirt: Dirt,
    ) -> Result<Option<Look>, IndexError> {
        let record = reader.get(&path)?;
        let known = record.as_ref().and_then(|record| Some((record.row.live()?, record.sig.as_ref()?)));
        // A file that has just got this name may be known under another.
        let elsewhere = match known {
            None => known_elsewhere(reader, dirs, &path)?,
            Some(_) => None,
        };
        let known = known.or(elsewhere.as_ref().map(|other| (&other.record.row.entry, &other.sig)));
        let force = dirt.content && elsewhere.is_none() && known.is_none_or(|(_, sig)| sig.racy);
        let found = match observe::observe(dirs, &path, known, force) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(share = %self.share.name, "cannot look at {path}: {error}");
                return Ok(None);
            }
        };
        let found = match (found, &elsewhere) {
            (Observed::Unchanged { sig }, Some(other)) => {
                Observed::Present { entry: other.record.row.entry.clone(), sig, content: None }
            }
            (found, _) => found,
        };
        let is_dir = match &found {
            Observed::Present { entry, .. } => entry.is_dir(),
            _ => record.as_ref().is_some_and(|record| record.row.is_live_dir()),
        };
        if self.share.is_excluded(&path, is_dir) {
            return Ok(None);
        }
        Ok(Some(Look { path, dirt, record, found, moved_from: elsewhere.map(|other| other.path) }))
    }

    /// Writes the rows of what was found, and tells the senders.
    fn write_rows(&mut self, looks: &[Look]) -> anyhow::Result<()> {
        let share = Arc::clone(&self.share);
        let now_ms = super::now_ms();
        let mut made = 0u64;
        let mut groups: FxHashMap<u64, LinkGroup> = FxHashMap::default();
        let gone: FxHashSet<&RelPath> =
            looks.iter().filter(|look| matches!(look.found, Observed::Absent)).map(|look| &look.path).collect();
        let clock = &mut self.clock;
        share.index.write(|w| {
            let mut local = LocalRows { clock, now_ms, made: &mut made };
            for look in looks {
                match &look.found {
                    Observed::Present { entry, sig, .. } => {
                        let old = w.get(&look.path)?;
                        if !entry.is_dir() && old.as_ref().is_some_and(|old| old.row.is_live_dir()) {
                            local.bury_beneath(w, &look.path)?;
                        }
                        let entry = linked(w, entry, sig, old.as_ref(), &mut groups)?;
                        local.present(w, &look.path, entry, sig, look.moved_from.as_ref())?;
                        if let Some(from) = look.moved_from.as_ref().filter(|from| gone.contains(from)) {
                            local.bury(w, from)?;
                        }
                    }
                    Observed::Unchanged { sig } => {
                        if let Some(old) = w.get(&look.path)?
                            && old.sig.as_ref() != Some(sig)
                            && !old.row.deleted
                        {
                            w.put(&look.path, &Record { sig: Some(*sig), ..old })?;
                        }
                    }
                    _ => {}
                }
            }
            // Children before parents, so that a peer can remove as it reads.
            for look in looks.iter().rev().filter(|look| matches!(look.found, Observed::Absent)) {
                local.bury_beneath(w, &look.path)?;
                local.bury(w, &look.path)?;
            }
            let durable = if *local.made > 0 { Durable::Yes } else { Durable::Later };
            Ok(((), durable))
        })?;
        if made > 0 {
            Figures::add(&share.figures.rows_made, made);
            for look in looks {
                if !matches!(look.found, Observed::Unchanged { .. }) {
                    share.figures.delay(look.dirt.since);
                }
                if let Observed::Present { entry, content: Some(content), .. } = &look.found
                    && let Some((_, hash)) = entry.content()
                {
                    share.recent.put(hash, content.clone());
                }
            }
            self.durable_now();
        }
        let touched = looks.iter().map(|look| look.path.clone()).collect::<Vec<_>>();
        self.repair(&touched)
    }
}

/// Makes rows of local changes within one transaction.
pub(super) struct LocalRows<'a> {
    pub(super) clock: &'a mut Clock,
    pub(super) now_ms: u64,
    /// How many rows were made.
    pub(super) made: &'a mut u64,
}

impl LocalRows<'_> {
    /// Writes a row for what is at `path` now, if it differs from its row.
    pub(super) fn present(
        &mut self,
        w: &mut Writer<'_>,
        path: &RelPath,
        entry: Entry,
        sig: &StatSig,
        moved_from: Option<&RelPath>,
    ) -> Result<(), IndexError> {
        let old = w.get(path)?;
        // When the change was made, not when it was seen: a scan after a long
        // absence must not win over what peers have done since.
        let when = sig.ctime.millis();
        let old_row = old.as_ref().map(|old| &old.row);
        let stamp = self.clock.stamp_for(self.now_ms, Some(when), old_row.map(|row| &row.version.stamp));
        let seq = w.meta().head + 1;
        match engine::local_change(old_row, Seen::Present(entry), w.meta().replica, seq, stamp) {
            Some(row) => {
                let seq = w.next_seq();
                let record = Record { row, seq, sig: Some(*sig), via: None, moved_from: moved_from.cloned() };
                w.put(path, &record)?;
                *self.made += 1;
            }
            None => {
                if let Some(old) = old.filter(|old| old.sig.as_ref() != Some(sig)) {
                    w.put(path, &Record { sig: Some(*sig), ..old })?;
                }
            }
        }
        Ok(())
    }

    /// Writes a tombstone for `path`, if it is live.
    pub(super) fn bury(&mut self, w: &mut Writer<'_>, path: &RelPath) -> Result<(), IndexError> {
        let Some(old) = w.get(path)? else { return Ok(()) };
        let stamp = self.clock.stamp_for(self.now_ms, None, Some(&old.row.version.stamp));
        let seq = w.meta().head + 1;
        if let Some(row) = engine::local_change(Some(&old.row), Seen::Absent, w.meta().replica, seq, stamp) {
            let seq = w.next_seq();
            w.put(path, &Record { row, seq, sig: None, via: None, moved_from: None })?;
            *self.made += 1;
        }
        Ok(())
    }

    /// Tombstones for everything beneath `path`, deepest first.
    pub(super) fn bury_beneath(&mut self, w: &mut Writer<'_>, path: &RelPath) -> Result<(), IndexError> {
        let live: Vec<RelPath> =
            w.beneath(path)?.into_iter().filter(|(_, record)| !record.row.deleted).map(|(path, _)| path).collect();
        for path in live.iter().rev() {
            self.bury(w, path)?;
        }
        Ok(())
    }
}

/// `entry` with its hard-link group: the inode's, as this pass or the index
/// knows it, or a new one.
fn linked(
    w: &mut Writer<'_>,
    entry: &Entry,
    sig: &StatSig,
    old: Option<&Record>,
    groups: &mut FxHashMap<u64, LinkGroup>,
) -> Result<Entry, IndexError> {
    let mut entry = entry.clone();
    entry.link = None;
    if entry.is_dir() {
        return Ok(entry);
    }
    let old_entry = old.and_then(|old| old.row.live());
    if sig.nlink == 1 {
        // A group that has lost its other names is kept until something else
        // changes: it is not worth a row.
        let kept = Entry { link: old_entry.and_then(|old| old.link), ..entry.clone() };
        return Ok(if old_entry == Some(&kept) { kept } else { entry });
    }
    let group = match groups.get(&sig.ino) {
        Some(group) => Some(*group),
        None => {
            let same_inode = |record: &Record| record.sig.is_some_and(|s| s.ino == sig.ino && s.btime == sig.btime);
            let own = old.filter(|old| same_inode(old)).and_then(|old| old.row.live()?.link);
            match own {
                Some(group) => Some(group),
                None => match w.path_of_ino(sig.ino)? {
                    Some(other) => {
                        w.get(&other)?.filter(same_inode).and_then(|other| other.row.live()?.link)
                    }
                    None => None,
                },
            }
        }
    };
    let group = group.unwrap_or_else(|| LinkGroup(crate::index::random_u64()));
    groups.insert(sig.ino, group);
    entry.link = Some(group);
    Ok(entry)
}

/// An inode that the index knows under another path.
struct Elsewhere {
    path: RelPath,
    record: Record,
    /// As the index has it.
    sig: StatSig,
}

fn known_elsewhere(reader: &Reader, dirs: &Dirs<'_>, path: &RelPath) -> Result<Option<Elsewhere>, IndexError> {
    let Ok(Some(now)) = observe::stat(dirs, path) else { return Ok(None) };
    if now.mode & 0o170_000 != 0o100_000 {
        return Ok(None);
    }
    let Some(other) = reader.path_of_ino(now.ino)?.filter(|other| other != path) else { return Ok(None) };
    let Some(record) = reader.get(&other)? else { return Ok(None) };
    let Some(sig) = record.sig.filter(|sig| sig.same_content(&now) && !sig.racy) else { return Ok(None) };
    Ok((!record.row.deleted).then_some(Elsewhere { path: other, record, sig }))
}

fn appeared_or_gone(look: &Look) -> bool {
    let was = look.record.as_ref().is_some_and(|record| !record.row.deleted);
    match look.found {
        Observed::Absent => was,
        Observed::Present { sig, .. } => {
            !was || look.record.as_ref().and_then(|record| record.sig).is_none_or(|old| old.ino != sig.ino)
        }
        _ => false,
    }
}
