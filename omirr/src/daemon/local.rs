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

use super::dirty::{Dirt, Hint};
use super::keeper::Keeper;
use super::share::Figures;
use crate::apply::{self, Dirs};
use crate::engine::{self, Seen};
use crate::index::{Durable, IndexError, Reader};
use crate::model::{Entry, LinkGroup, Record, RelPath, StatSig};
use crate::observe::{self, Observed, Reading};

/// So many paths are looked at before their rows are written.
const PORTION: usize = 2048;

/// File types in `st_mode`.
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;

pub(super) fn is_dir(sig: &StatSig) -> bool {
    sig.mode & S_IFMT == S_IFDIR
}

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
        let mut looks = self.look_at_all(taken)?;
        // After looking: what a directory lost after it was moved away from the
        // share's path is no deletion.
        if let Err(reason) = self.share.root.still_there() {
            anyhow::bail!(reason);
        }
        looks.retain(|look| !matches!(look.found, Observed::Foreign));
        self.write_rows(&looks)?;
        Ok(true)
    }

    /// Looks at the paths, at what lies beneath those that turn out to be new
    /// directories, and at the other names of changed inodes.
    fn look_at_all(&mut self, taken: Vec<(RelPath, Dirt)>) -> anyhow::Result<Vec<Look>> {
        let reader = self.share.index.read()?;
        let mut done: BTreeMap<RelPath, Look> = BTreeMap::new();
        // Everything that was looked at, if only to be put back: what happens to
        // it from then on is for the next pass.
        let mut looked: FxHashSet<RelPath> = FxHashSet::default();
        let mut again = Vec::new();
        let mut todo = taken;
        while !todo.is_empty() {
            let started = Instant::now();
            looked.extend(todo.iter().map(|(path, _)| path.clone()));
            let looks = self.look_at(&reader, std::mem::take(&mut todo))?;
            let cost = started.elapsed();
            let mut more: FxHashMap<RelPath, Dirt> = FxHashMap::default();
            for look in looks {
                match &look.found {
                    Observed::Unstable { .. } => {
                        self.share
                            .dirty()
                            .put_back(look.path, look.dirt, cost, Instant::now());
                        continue;
                    }
                    Observed::Present { entry, sig, .. } if entry.is_dir() => {
                        let is_new = !look
                            .record
                            .as_ref()
                            .is_some_and(|record| record.row.is_live_dir());
                        if is_new
                            || look.dirt.subtree
                            || look
                                .record
                                .as_ref()
                                .and_then(|r| r.sig)
                                .is_none_or(|s| s.ino != sig.ino)
                        {
                            self.walk(&look.path, look.dirt, &looked, &mut more)?;
                        }
                    }
                    Observed::Unchanged { sig } if look.dirt.subtree && is_dir(sig) => {
                        self.walk(&look.path, look.dirt, &looked, &mut more)?;
                    }
                    Observed::Present { sig, .. } if sig.nlink > 1 => {
                        let group = look.record.as_ref().and_then(|record| record.row.live()?.link);
                        let names = group
                            .map(|group| reader.group(group))
                            .transpose()?
                            .unwrap_or_default();
                        for name in names.into_iter().chain(reader.path_of_ino(sig.ino)?) {
                            more.entry(name).or_insert(Dirt {
                                content: false,
                                subtree: false,
                                ..look.dirt
                            });
                        }
                    }
                    _ => {}
                }
                if let (Some(parent), true) = (look.path.parent(), appeared_or_gone(&look)) {
                    if looked.contains(&parent) {
                        // It was looked at before this name came or went: its
                        // times may have changed since.
                        again.push((parent, Hint::default()));
                    } else {
                        more.entry(parent).or_insert(Dirt {
                            content: false,
                            subtree: false,
                            ..look.dirt
                        });
                    }
                }
                done.insert(look.path.clone(), look);
            }
            todo = more
                .into_iter()
                .filter(|(path, _)| !looked.contains(path))
                .collect();
            todo.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        }
        again.dedup();
        self.share.touch(again);
        Ok(done.into_values().collect())
    }

    /// Adds everything beneath a directory, and its directories to the
    /// resolver.
    fn walk(
        &self,
        start: &RelPath,
        dirt: Dirt,
        looked: &FxHashSet<RelPath>,
        found: &mut FxHashMap<RelPath, Dirt>,
    ) -> anyhow::Result<()> {
        let share = &self.share;
        let skip = |path: &RelPath, is_dir: bool| share.is_excluded(path, is_dir);
        let mut names = Vec::new();
        let walked = observe::scan(&share.root, start, &skip, |dir| {
            let mut resolver = share.resolver.lock();
            for child in &dir.children {
                if is_dir(&child.sig) {
                    resolver.learn_dir(child.sig.ino, dir.ino, &child.name);
                }
                names.extend(dir.path.join(&child.name));
            }
        });
        if let Err(error) = walked {
            // It is gone again, most likely; then an event says so.
            tracing::debug!(share = %share.name, "cannot walk {start}: {error}");
        }
        // What is looked at now need not be looked at for older events.
        let mut dirty = share.dirty();
        for name in names.into_iter().filter(|name| !looked.contains(name)) {
            let content = dirty.remove(&name).is_some_and(|dirt| dirt.content);
            found.entry(name).or_insert(Dirt {
                content,
                subtree: false,
                ..dirt
            });
        }
        Ok(())
    }

    fn look_at(&self, reader: &Reader, paths: Vec<(RelPath, Dirt)>) -> anyhow::Result<Vec<Look>> {
        let dirs = self.share.root.batch();
        let look = |(path, dirt): (RelPath, Dirt)| self.look_at_one(reader, &dirs, path, dirt);
        let looks: Vec<_> = if paths.len() < 8 {
            paths.into_iter().map(look).collect::<Result<_, IndexError>>()?
        } else {
            paths
                .into_par_iter()
                .with_min_len(8)
                .map(look)
                .collect::<Result<_, IndexError>>()?
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
        let known = record
            .as_ref()
            .and_then(|record| Some((record.row.live()?, record.sig.as_ref()?)));
        // A file that has just got this name may be known under another.
        let elsewhere = match known {
            None => known_elsewhere(reader, dirs, &path)?,
            Some(_) => None,
        };
        let known = known.or(elsewhere
            .as_ref()
            .map(|other| (&other.record.row.entry, &other.sig)));
        let found = match observe::observe(dirs, &path, known, Reading::IfChanged) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(share = %self.share.name, "cannot look at {path}: {error}");
                return Ok(None);
            }
        };
        let found = match (found, &elsewhere) {
            (Observed::Unchanged { sig }, Some(other)) => Observed::Present {
                entry: other.record.row.entry.clone(),
                sig,
                content: None,
            },
            (found, _) => found,
        };
        let is_dir = match &found {
            Observed::Present { entry, .. } => entry.is_dir(),
            _ => record.as_ref().is_some_and(|record| record.row.is_live_dir()),
        };
        if self.share.is_excluded(&path, is_dir) {
            return Ok(None);
        }
        // Read or not, it must be the same content for the peers to look there.
        let same = |other: &Elsewhere| match &found {
            Observed::Present { entry, .. } => entry.kind == other.record.row.entry.kind,
            _ => false,
        };
        let moved_from = elsewhere.filter(same).map(|other| other.path);
        Ok(Some(Look {
            path,
            dirt,
            record,
            found,
            moved_from,
        }))
    }

    /// Writes the rows of what was found, and tells the senders.
    fn write_rows(&mut self, looks: &[Look]) -> anyhow::Result<()> {
        let share = Arc::clone(&self.share);
        let reader = share.index.read()?;
        let mut groups: FxHashMap<u64, LinkGroup> = FxHashMap::default();
        let mut sigs: FxHashMap<&RelPath, StatSig> = FxHashMap::default();
        let mut observed = Vec::with_capacity(looks.len());
        let dirs = share.root.batch();
        let mut parents = FxHashMap::default();
        // A directory that went while its names were looked at: what was seen
        // in it is looked at again.
        let gone: FxHashSet<&RelPath> = looks
            .iter()
            .filter(|look| matches!(look.found, Observed::Absent))
            .map(|look| &look.path)
            .collect();
        let is_left_behind = |path: &RelPath| {
            std::iter::successors(path.parent(), RelPath::parent).any(|above| gone.contains(&above))
        };
        let mut again = Vec::new();
        for look in looks {
            if !gone.is_empty() && !matches!(look.found, Observed::Absent) && is_left_behind(&look.path) {
                again.push((look.path.clone(), Hint::default()));
                continue;
            }
            let seen = match &look.found {
                Observed::Present { entry, sig, .. } => {
                    sigs.insert(&look.path, *sig);
                    Seen::Present(linked(&reader, entry, sig, look.record.as_ref(), &mut groups)?)
                }
                Observed::Absent => Seen::Absent,
                Observed::Unchanged { sig } => {
                    sigs.insert(&look.path, *sig);
                    continue;
                }
                Observed::Unstable { .. } | Observed::Foreign => continue,
            };
            let still_dir = matches!(&seen, Seen::Present(entry) if entry.is_dir());
            if !still_dir {
                for pair in reader.beneath(&look.path)? {
                    let (path, record) = pair?;
                    if !record.row.deleted {
                        let when_ms = gone_since(&dirs, &path, &mut parents);
                        observed.push(engine::Observed {
                            path,
                            seen: Seen::Absent,
                            when_ms,
                            moved_from: None,
                        });
                    }
                }
            }
            // When the change was made, not when it was seen: what a scan finds
            // after a long absence must not win over what peers did since.
            let when_ms = match &seen {
                Seen::Present(_) => sigs.get(&look.path).map(|sig| sig.ctime.millis()),
                Seen::Absent => gone_since(&dirs, &look.path, &mut parents),
            };
            observed.push(engine::Observed {
                path: look.path.clone(),
                seen,
                when_ms,
                moved_from: look.moved_from.clone(),
            });
        }
        share.touch(again);
        observed.sort_by(|a, b| a.path.cmp(&b.path));
        observed.dedup_by(|a, b| a.path == b.path);
        let decided = engine::decide_local(&reader, observed, &mut self.author, super::now_ms())?;
        let made = decided.len() as u64;
        if made > 0 && self.unflushed.is_some() {
            // This commit makes the rows of what was received durable, too:
            // their names must be on the disk before.
            apply::sync_all(&share.root)?;
        }
        share.index.write(|w| {
            for one in decided {
                let sig = sigs.remove(&one.path).filter(|_| !one.row.deleted);
                let record = Record {
                    row: one.row,
                    seq: one.seq,
                    sig,
                    via: one.via,
                    moved_from: one.moved_from,
                };
                w.put(&one.path, &record)?;
            }
            // Where only `stat` has changed, the row stays as it is.
            for (path, sig) in sigs {
                if let Some(old) = w.get(path)?
                    && !old.row.deleted
                    && old.sig != Some(sig)
                {
                    w.put(
                        path,
                        &Record {
                            sig: Some(sig),
                            ..old
                        },
                    )?;
                }
            }
            Ok(((), if made > 0 { Durable::Yes } else { Durable::Later }))
        })?;
        if made > 0 {
            Figures::add(&share.figures.rows_made, made);
            for look in looks {
                if matches!(look.found, Observed::Present { .. } | Observed::Absent) {
                    share.figures.delay(look.dirt.since);
                }
                if let Observed::Present {
                    entry,
                    content: Some(content),
                    ..
                } = &look.found
                    && let Some((_, hash)) = entry.content()
                {
                    share.recent.put(hash, content.clone());
                }
            }
            self.durable_now();
        }
        Ok(())
    }
}

/// When a path that is not there went, at the latest: the change time of the
/// nearest directory above that is there, ms since 1970.
fn gone_since(dirs: &Dirs<'_>, path: &RelPath, known: &mut FxHashMap<RelPath, Option<u64>>) -> Option<u64> {
    let parent = path.parent()?;
    if let Some(known) = known.get(&parent) {
        return *known;
    }
    let when = match observe::stat(dirs, &parent) {
        Ok(Some(sig)) => Some(sig.ctime.millis()),
        Ok(None) => gone_since(dirs, &parent, known),
        Err(_) => None,
    };
    known.insert(parent, when);
    when
}

/// `entry` with its hard-link group: the inode's, as this pass or the index
/// knows it, or a new one.
fn linked(
    reader: &Reader,
    entry: &Entry,
    sig: &StatSig,
    old: Option<&Record>,
    groups: &mut FxHashMap<u64, LinkGroup>,
) -> Result<Entry, IndexError> {
    let mut entry = Entry {
        link: None,
        ..entry.clone()
    };
    if entry.is_dir() {
        return Ok(entry);
    }
    let old_entry = old.and_then(|old| old.row.live());
    if sig.nlink == 1 {
        // A group that has lost its other names is kept until something else
        // changes: it is not worth a row.
        let kept = Entry {
            link: old_entry.and_then(|old| old.link),
            ..entry.clone()
        };
        return Ok(if old_entry == Some(&kept) { kept } else { entry });
    }
    let same_inode = |record: &&Record| {
        record
            .sig
            .is_some_and(|s| s.ino == sig.ino && s.btime == sig.btime)
    };
    let group_of = |record: &Record| record.row.live().and_then(|entry| entry.link);
    let mut group = groups.get(&sig.ino).copied();
    if group.is_none() {
        group = old.filter(same_inode).and_then(group_of);
    }
    if group.is_none()
        && let Some(other) = reader.path_of_ino(sig.ino)?
    {
        group = reader.get(&other)?.as_ref().filter(same_inode).and_then(group_of);
    }
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

fn known_elsewhere(
    reader: &Reader,
    dirs: &Dirs<'_>,
    path: &RelPath,
) -> Result<Option<Elsewhere>, IndexError> {
    let Ok(Some(now)) = observe::stat(dirs, path) else {
        return Ok(None);
    };
    if now.mode & S_IFMT != S_IFREG {
        return Ok(None);
    }
    let Some(other) = reader.path_of_ino(now.ino)?.filter(|other| other != path) else {
        return Ok(None);
    };
    let Some(record) = reader.get(&other)? else {
        return Ok(None);
    };
    let Some(sig) = record.sig.filter(|sig| sig.same_content(&now)) else {
        return Ok(None);
    };
    Ok((!record.row.deleted).then_some(Elsewhere {
        path: other,
        record,
        sig,
    }))
}

fn appeared_or_gone(look: &Look) -> bool {
    let was = look.record.as_ref().is_some_and(|record| !record.row.deleted);
    match look.found {
        Observed::Absent => was,
        Observed::Present { sig, .. } => {
            !was || look
                .record
                .as_ref()
                .and_then(|record| record.sig)
                .is_none_or(|old| old.ino != sig.ino)
        }
        _ => false,
    }
}
