//! The keeper's one hand: from dirty paths to rows.
//!
//! In: paths that are due. Out: rows of what this node's users have changed,
//! durable, in an order in which a peer can apply them: parents before
//! children, a moved file before the tombstone of its old name.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};

use super::dirty::{Dirt, Hint};
use super::keeper::Keeper;
use super::share::Figures;
use crate::apply::{self, Dirs};
use crate::engine::{self, Name, Rows, Seen};
use crate::index::{Durable, IndexError, Reader};
use crate::model::{Entry, LinkGroup, Record, RelPath, StatSig};
use crate::observe::{self, Observed, Reading, Sight};

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
    dirt: Dirt,
    record: Option<Record>,
    /// None if it is as the record says.
    seen: Option<Seen>,
    /// As of now; none if nothing is there.
    sig: Option<StatSig>,
    /// What was read of it, if that is little.
    content: Option<Bytes>,
    /// The inode was under this path before, or is there as well.
    elsewhere: Option<Elsewhere>,
}

/// Looks by path: parents before what is in them.
type Looks = BTreeMap<RelPath, Look>;

/// What is to be looked at in one pass, each path once, directories before what
/// is in them: one that is replaced after its look is found to be another at the
/// next, and then what is in it is looked at again.
#[derive(Default)]
struct Queue {
    /// By depth.
    todo: BTreeMap<usize, BTreeMap<RelPath, Dirt>>,
    /// Everything that was looked at or is about to be, if only to be put back.
    looked: FxHashSet<RelPath>,
    /// What was looked at before something was found that may have changed it:
    /// for the next pass.
    again: Vec<(RelPath, Hint)>,
}

impl Queue {
    fn add(&mut self, path: RelPath, dirt: Dirt) {
        if self.looked.contains(&path) {
            let hint = Hint {
                content: dirt.content,
                ..Hint::default()
            };
            self.again.push((path, hint));
        } else {
            let level = self.todo.entry(path.depth()).or_default();
            level.entry(path).or_insert(dirt);
        }
    }

    /// The paths of the least depth.
    fn next(&mut self) -> Option<Vec<(RelPath, Dirt)>> {
        let (_, level) = self.todo.pop_first()?;
        self.looked.extend(level.keys().cloned());
        Some(level.into_iter().collect())
    }
}

impl Keeper {
    /// Looks at what is due (at everything, if `force`) and writes its rows.
    /// Returns whether there was anything.
    pub(super) fn local_pass(&mut self, force: bool) -> anyhow::Result<bool> {
        let taken = self.share.dirty().take(Instant::now(), force, PORTION);
        if taken.is_empty() {
            return Ok(false);
        }
        let reader = self.share.index.read()?;
        let mut looks = self.look_at_all(&reader, taken)?;
        // After looking: what a directory lost after it was moved away from the
        // share's path is no deletion.
        if let Err(reason) = self.share.root.still_there() {
            anyhow::bail!(reason);
        }
        self.put_back_incoherent(&reader, &mut looks)?;
        link(&reader, &mut looks)?;
        self.write_rows(&reader, looks)?;
        Ok(true)
    }

    /// Looks at the paths, at what lies beneath those that turn out to be new
    /// directories, at the other names of changed inodes, and at what else must
    /// be seen together.
    fn look_at_all(&self, reader: &Reader, taken: Vec<(RelPath, Dirt)>) -> anyhow::Result<Looks> {
        let mut done = Looks::new();
        let mut queue = Queue::default();
        for (path, dirt) in taken {
            queue.add(path, dirt);
        }
        while let Some(paths) = queue.next() {
            let started = Instant::now();
            let looks = self.look_at(reader, paths)?;
            let cost = started.elapsed();
            for (path, look) in looks {
                let look = match look {
                    Looking::Done(look) => look,
                    Looking::Unstable(dirt) => {
                        self.share.dirty().put_back(path, dirt, cost, Instant::now());
                        continue;
                    }
                };
                // Not for its own sake: neither read it unasked nor walk it.
                let along = Dirt {
                    content: false,
                    subtree: false,
                    ..look.dirt
                };
                if look.is_unknown_dir() {
                    self.walk(&path, look.dirt, &mut queue);
                    // And what it has no more: it may be another directory than
                    // before, or have been elsewhere, where names in it went.
                    reader.live_beneath(&path, &mut |beneath| {
                        queue.add(beneath.clone(), along);
                        ControlFlow::Continue(())
                    })?;
                }
                if let Some(parent) = path.parent().filter(|_| look.came_or_went()) {
                    // For its times.
                    queue.add(parent, along);
                }
                let mut also = other_names(reader, &look)?;
                if let Some(seen) = &look.seen {
                    also.extend(engine::observe_also(reader, &path, seen)?);
                }
                also.retain(|path| !queue.looked.contains(path));
                for path in also {
                    queue.add(path, along);
                }
                done.insert(path, *look);
            }
        }
        self.share.touch(queue.again);
        Ok(done)
    }

    /// Takes out what does not fit together because the tree changed meanwhile,
    /// to be looked at again.
    fn put_back_incoherent(&self, reader: &Reader, looks: &mut Looks) -> anyhow::Result<()> {
        let seen = looks
            .iter()
            .map(|(path, look)| (path, look.seen.as_ref()))
            .collect();
        for path in engine::incoherent(reader, &seen)? {
            if let Some(look) = looks.remove(&path) {
                let dirt = Dirt {
                    subtree: true,
                    ..look.dirt
                };
                self.share
                    .dirty()
                    .put_back(path, dirt, Duration::ZERO, Instant::now());
            }
        }
        Ok(())
    }

    /// Adds everything beneath a directory, and its directories to the
    /// resolver.
    fn walk(&self, start: &RelPath, dirt: Dirt, queue: &mut Queue) {
        let share = &self.share;
        let skip = |path: &RelPath, is_dir: bool| share.is_excluded(path, is_dir);
        let mut names = Vec::new();
        let now = || share.resolver.lock().now();
        let walked = observe::scan(&share.root, start, &skip, now, |dir, since| {
            let mut resolver = share.resolver.lock();
            for child in &dir.children {
                if is_dir(&child.sig) {
                    resolver.learn_dir_seen(since, child.sig.ino, dir.ino, &child.name);
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
        for name in names {
            let content = dirty.remove(&name).is_some_and(|dirt| dirt.content);
            let dirt = Dirt {
                content,
                subtree: false,
                ..dirt
            };
            queue.add(name, dirt);
        }
    }

    fn look_at(
        &self,
        reader: &Reader,
        paths: Vec<(RelPath, Dirt)>,
    ) -> anyhow::Result<Vec<(RelPath, Looking)>> {
        let dirs = self.share.root.batch();
        let look = |(path, dirt): (RelPath, Dirt)| {
            let look = self.look_at_one(reader, &dirs, &path, dirt)?;
            Ok(look.map(|look| (path, look)))
        };
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
        path: &RelPath,
        dirt: Dirt,
    ) -> Result<Option<Looking>, IndexError> {
        let record = reader.get(path)?;
        let mut elsewhere = None;
        let found = match observe::sight(dirs, path) {
            Ok(Sight::Absent) => Ok(Observed::Absent),
            Ok(Sight::Foreign) => Ok(Observed::Foreign),
            Ok(Sight::Here(found)) => {
                let known = record
                    .as_ref()
                    .and_then(|record| Some((record.row.live()?, record.sig.as_ref()?)));
                if known.is_none() {
                    // A file that has just got this name may be known under another.
                    elsewhere = known_elsewhere(reader, path, &found.sig())?;
                }
                let known = known.or(elsewhere
                    .as_ref()
                    .map(|other| (&other.record.row.entry, &other.sig)));
                found.read(known, Reading::IfChanged)
            }
            Err(error) => Err(error),
        };
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(share = %self.share.name, "cannot look at {path}: {error}");
                return Ok(None);
            }
        };
        let (seen, sig, content) = match found {
            Observed::Foreign => return Ok(None),
            Observed::Unstable { .. } => return Ok(Some(Looking::Unstable(dirt))),
            Observed::Absent => (Some(Seen::Absent), None, None),
            // The same as under its other name.
            Observed::Unchanged { sig } => (
                elsewhere
                    .as_ref()
                    .map(|other| Seen::Present(other.record.row.entry.clone())),
                Some(sig),
                None,
            ),
            Observed::Present { entry, sig, content } => (Some(Seen::Present(entry)), Some(sig), content),
        };
        let is_dir = match &sig {
            Some(sig) => is_dir(sig),
            None => record.as_ref().is_some_and(|record| record.row.is_live_dir()),
        };
        if self.share.is_excluded(path, is_dir) {
            // Rows of before it was excluded go with their directory, and only
            // with it.
            let went = sig.is_none() && record.as_ref().is_some_and(|record| !record.row.deleted);
            let parent = path.parent().map(|parent| observe::stat(dirs, &parent));
            if !went || matches!(parent, Some(Ok(Some(parent))) if self::is_dir(&parent)) {
                return Ok(None);
            }
        }
        Ok(Some(Looking::Done(Box::new(Look {
            dirt,
            record,
            seen,
            sig,
            content,
            elsewhere,
        }))))
    }

    /// Writes the rows of what was found, and tells the senders.
    fn write_rows(&mut self, reader: &Reader, looks: Looks) -> anyhow::Result<()> {
        let share = Arc::clone(&self.share);
        let mut sigs: FxHashMap<&RelPath, StatSig> = FxHashMap::default();
        let mut observed = Vec::with_capacity(looks.len());
        let dirs = share.root.batch();
        let mut parents = FxHashMap::default();
        for (path, look) in &looks {
            tracing::debug!(
                target: "omirr::looked",
                share = %share.name,
                known = look.record.as_ref().is_some_and(|record| !record.row.deleted),
                was = look.record.as_ref().and_then(|record| record.sig).map(|sig| sig.ino),
                ino = look.sig.map(|sig| sig.ino),
                changed = look.seen.is_some(),
                "{path}"
            );
            sigs.extend(look.sig.map(|sig| (path, sig)));
            let Some(seen) = &look.seen else { continue };
            // When the change was made, not when it was seen: what a scan finds
            // after a long absence must not win over what peers did since.
            let when_ms = match seen {
                Seen::Present(_) => look.sig.map(|sig| sig.ctime.millis()),
                Seen::Absent => gone_since(&dirs, path, &mut parents),
            };
            observed.push(engine::Observed {
                path: path.clone(),
                seen: seen.clone(),
                when_ms,
                moved_from: look.moved_from().cloned(),
            });
        }
        let decided = engine::decide_local(reader, observed, &mut self.author, super::now_ms())?;
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
                w.set_sig(path, Some(sig))?;
            }
            Ok(((), if made > 0 { Durable::Yes } else { Durable::Later }))
        })?;
        if made > 0 {
            Figures::add(&share.figures.rows_made, made);
            for look in looks.values().filter(|look| look.seen.is_some()) {
                share.figures.delay(look.dirt.since);
                if let (Some(Seen::Present(entry)), Some(content)) = (&look.seen, &look.content)
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

/// What looking at a path came to.
enum Looking {
    Done(Box<Look>),
    /// It changed while it was read.
    Unstable(Dirt),
}

impl Look {
    /// Whether it is a directory of whose names nothing is known, or not enough.
    fn is_unknown_dir(&self) -> bool {
        let Some(sig) = self.sig.filter(is_dir) else {
            return false;
        };
        let known = self.record.as_ref().filter(|record| record.row.is_live_dir());
        self.dirt.subtree
            || known
                .and_then(|known| known.sig)
                .is_none_or(|known| known.ino != sig.ino)
    }

    /// Whether its directory's times must have changed with it.
    fn came_or_went(&self) -> bool {
        let was = self.record.as_ref().filter(|record| !record.row.deleted);
        match (&self.seen, self.sig) {
            (None, _) => false,
            (Some(_), None) => was.is_some(),
            (Some(_), Some(sig)) => was.and_then(|was| was.sig).is_none_or(|was| was.ino != sig.ino),
        }
    }

    /// Where peers most likely have the content that was found.
    fn moved_from(&self) -> Option<&RelPath> {
        let other = self.elsewhere.as_ref()?;
        // Read or not, it must be the same content for the peers to look there.
        match &self.seen {
            Some(Seen::Present(entry)) if entry.kind == other.record.row.entry.kind => Some(&other.path),
            _ => None,
        }
    }

    /// The inode with several names, or once with several, that it is.
    fn inode(&self) -> Option<u64> {
        let sig = self.sig.filter(|sig| !is_dir(sig))?;
        let here = self.record.as_ref().and_then(|record| record.row.live());
        let there = self.elsewhere.as_ref().map(|other| &other.record.row.entry);
        let linked = here.into_iter().chain(there).any(|entry| entry.link.is_some());
        (sig.nlink > 1 || linked).then_some(sig.ino)
    }
}

/// The names under which the index has the inode that was found, if that has
/// several.
fn other_names(reader: &Reader, look: &Look) -> Result<Vec<RelPath>, IndexError> {
    let (Some(ino), Some(Seen::Present(_))) = (look.inode(), &look.seen) else {
        return Ok(Vec::new());
    };
    let group = look.record.as_ref().and_then(|record| record.row.live()?.link);
    let mut names = group
        .map(|group| reader.group(group))
        .transpose()?
        .unwrap_or_default();
    names.extend(reader.path_of_ino(ino)?);
    Ok(names)
}

/// Gives the files that were found their hard-link groups.
fn link(reader: &Reader, looks: &mut Looks) -> Result<(), IndexError> {
    let mut inodes: BTreeMap<u64, Vec<RelPath>> = BTreeMap::new();
    for (path, look) in looks.iter_mut() {
        match look.inode() {
            Some(ino) => inodes.entry(ino).or_default().push(path.clone()),
            None => look.set_group(None),
        }
    }
    for (ino, paths) in inodes {
        let found: Vec<&Look> = paths.iter().filter_map(|path| looks.get(path)).collect();
        let Some(entry) = found.iter().find_map(|look| match &look.seen {
            Some(Seen::Present(entry)) => Some(entry),
            _ => None,
        }) else {
            continue;
        };
        let names: Vec<Name<'_>> = found
            .iter()
            .map(|look| Name {
                record: look.record.as_ref(),
                moved: look.elsewhere.as_ref().map(|other| &other.record),
            })
            .collect();
        let mut failed = None;
        let mut strangers = |group| match has_strangers(reader, group, ino) {
            Ok(has) => has,
            Err(error) => {
                failed = Some(error);
                true
            }
        };
        let mut fresh = || LinkGroup(crate::index::random_u64());
        let group = engine::link_group(ino, entry, &names, &mut strangers, &mut fresh);
        if let Some(error) = failed {
            return Err(error);
        }
        for path in paths {
            if let Some(look) = looks.get_mut(&path) {
                look.set_group(group);
            }
        }
    }
    Ok(())
}

/// Whether live records of a group name another inode than `ino`.
fn has_strangers(reader: &Reader, group: LinkGroup, ino: u64) -> Result<bool, IndexError> {
    for path in reader.group(group)? {
        let sig = reader.get(&path)?.and_then(|record| record.sig);
        if sig.is_some_and(|sig| sig.ino != ino) {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Look {
    fn set_group(&mut self, group: Option<LinkGroup>) {
        match &mut self.seen {
            Some(Seen::Present(entry)) => entry.link = group,
            Some(Seen::Absent) => {}
            // Nothing else has changed, but the group may have.
            None => {
                let entry = self.record.as_ref().and_then(|record| record.row.live());
                if let Some(entry) = entry.filter(|entry| entry.link != group) {
                    self.seen = Some(Seen::Present(Entry {
                        link: group,
                        ..entry.clone()
                    }));
                }
            }
        }
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

/// An inode that the index knows under another path.
struct Elsewhere {
    path: RelPath,
    record: Record,
    /// As the index has it.
    sig: StatSig,
}

/// Where the index has the regular file that `now` is found at `path`.
fn known_elsewhere(reader: &Reader, path: &RelPath, now: &StatSig) -> Result<Option<Elsewhere>, IndexError> {
    if now.mode & S_IFMT != S_IFREG {
        return Ok(None);
    }
    let Some(other) = reader.path_of_ino(now.ino)?.filter(|other| other != path) else {
        return Ok(None);
    };
    let Some(record) = reader.get(&other)? else {
        return Ok(None);
    };
    let Some(sig) = record.sig.filter(|sig| sig.same_content(now)) else {
        return Ok(None);
    };
    Ok((!record.row.deleted).then_some(Elsewhere {
        path: other,
        record,
        sig,
    }))
}
