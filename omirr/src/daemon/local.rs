//! The keeper's one hand: from dirty paths to rows.
//!
//! In: paths that are due. Out: rows of what this node's users have changed,
//! durable, in an order in which a peer can apply them: parents before
//! children, a moved file before the tombstone of its old name.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::{FxHashMap, FxHashSet};

use super::dirty::{Dirt, Hint};
use super::keeper::Keeper;
use super::look::{Look, Looking, is_dir, look_at, other_names};
use super::share::Figures;
use crate::apply::{self, Dirs};
use crate::crash::{self, Point};
use crate::engine::{self, Name, Rows, Seen};
use crate::index::{Durable, IndexError, Reader};
use crate::model::{LinkGroup, Record, RelPath, StatSig};
use crate::observe;

/// So many paths are looked at before their rows are written.
const PORTION: usize = 2048;

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
    again: Vec<(RelPath, Dirt)>,
}

impl Queue {
    fn add(&mut self, path: RelPath, dirt: Dirt) {
        if self.looked.contains(&path) {
            self.again.push((path, dirt));
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
            let looks = look_at(&self.share, reader, paths)?;
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
                    read: false,
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
        let now = Instant::now();
        for (path, dirt) in queue.again {
            let hint = Hint {
                content: dirt.content,
                ..Hint::default()
            };
            self.share.dirty().add_for(path, hint, &dirt, now);
        }
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
        match walked {
            Ok(summary) => apply::remove_leftovers(&share.root.batch(), &summary.leftovers),
            // It is gone again, most likely; then an event says so.
            Err(error) => tracing::debug!(share = %share.name, "cannot walk {start}: {error}"),
        }
        // What is looked at now need not be looked at for older events.
        let mut dirty = share.dirty();
        for name in names {
            let known = dirty.remove(&name);
            let dirt = Dirt {
                content: known.is_some_and(|known| known.content),
                read: known.is_some_and(|known| known.read),
                who: known.and_then(|known| known.who).or(dirt.who),
                subtree: false,
                ..dirt
            };
            queue.add(name, dirt);
        }
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
                origin: self.origins.of(look.dirt.who),
            });
        }
        let decided = engine::decide_local(reader, observed, &mut self.author, super::now_ms())?;
        let made = decided.len() as u64;
        if made > 0 && self.unflushed.is_some() {
            // This commit makes the rows of what was received durable, too:
            // their names must be on the disk before.
            apply::sync_all(&share.root)?;
        }
        crash::here(Point::RowsDecided);
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
            crash::here(Point::RowsDurable);
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
