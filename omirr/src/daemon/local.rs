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

use super::dirty::{Beneath, Dirt, Hint};
use super::keeper::{Keeper, RETRY_AFTER, Synced};
use super::look::{Look, Looking, look_at, other_names, unsure};
use super::share::Figures;
use crate::apply::{self, ApplyError, Dirs};
use crate::crash::{self, Point};
use crate::engine::{self, Name, Rows, Seen};
use crate::index::{Durable, IndexError, Reader};
use crate::model::{Entry, Here, LinkGroup, Record, RelPath, StatSig};
use crate::observe;
use crate::source::Written;

/// So many paths are looked at before their rows are written.
const PORTION: usize = 2048;

/// A name that is gone waits for so many looks at what its inode is called now.
const FORMER_NAME_WAITS: u32 = 4;

/// After so many looks at parts that were not sure all of the file is read.
const PART_TRIES: u32 = 4;

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
            let kept = level.entry(path).or_insert(dirt);
            *kept = kept.or(dirt);
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
        self.look_and_write(taken)?;
        self.share.dirty().passed(Instant::now());
        Ok(true)
    }

    /// Looks at paths of which peers have rows, before those are decided: until
    /// the tree has been compared, the index cannot say what is there.
    pub(super) fn look_first(&mut self, paths: impl Iterator<Item = RelPath>) -> anyhow::Result<()> {
        let now = Instant::now();
        let hint = Hint {
            beneath: self.share.sees_to_what_lies_beneath(),
            ..Hint::default()
        };
        let mut taken = Vec::new();
        {
            let mut dirty = self.share.dirty();
            for path in paths {
                dirty.add(path.clone(), hint, now);
                taken.extend(dirty.remove(&path).map(|dirt| (path, dirt)));
            }
        }
        self.look_and_write(taken)
    }

    fn look_and_write(&mut self, taken: Vec<(RelPath, Dirt)>) -> anyhow::Result<()> {
        let reader = self.share.index.read()?;
        let mut looks = self.look_at_all(&reader, taken)?;
        // After looking: what a directory lost after it was moved away from the
        // share's path is no deletion.
        if let Err(reason) = self.share.root.still_there() {
            anyhow::bail!(reason);
        }
        self.put_back_incoherent(&reader, &mut looks)?;
        link(&reader, &mut looks)?;
        self.write_rows(&reader, looks)
    }

    /// Looks at the paths, at what lies beneath those that turn out to be new
    /// directories, at the other names of changed inodes, and at what else must
    /// be seen together.
    fn look_at_all(&mut self, reader: &Reader, taken: Vec<(RelPath, Dirt)>) -> anyhow::Result<Looks> {
        let mut done = Looks::new();
        let mut queue = Queue::default();
        // Before anything is looked at: what is found later, a comparison may have passed.
        let beneath = self.share.sees_to_what_lies_beneath();
        for (path, dirt) in taken {
            for (moved, named) in self.renamed.now_at(&path, dirt.named) {
                queue.add(moved, Dirt { named, ..dirt });
            }
            queue.add(path, dirt);
        }
        // Names whose inodes were found under others that change at this moment.
        let mut former = Vec::new();
        // In the whole pass: a directory that could not be walked may be looked at
        // once more without.
        let mut failed = FxHashSet::default();
        while let Some(mut paths) = queue.next() {
            let started = Instant::now();
            let mut failed_before = Vec::new();
            if !self.unread.is_empty() {
                for (path, dirt) in &mut paths {
                    *dirt = self.unread.with_reasons(path, *dirt);
                    failed_before.push(path.clone());
                }
            }
            let looks = look_at(&self.share, reader, paths)?;
            let cost = started.elapsed();
            for (path, look) in looks {
                let look = match look {
                    Looking::Done(look) => look,
                    Looking::Failed(dirt, why) => {
                        failed.insert(path.clone());
                        self.cannot_look(path, dirt, why);
                        continue;
                    }
                    Looking::Unstable(dirt, known_as) => {
                        let known_as = known_as.filter(|_| dirt.unstable < FORMER_NAME_WAITS);
                        former.extend(known_as.map(|name| (name, dirt.unstable, cost)));
                        self.share.dirty().put_back(path, dirt, cost, Instant::now());
                        continue;
                    }
                };
                // Not for its own sake: neither read it unasked nor walk it.
                let along = Dirt {
                    content: false,
                    read: false,
                    written: Written::Anywhere,
                    unmapped: None,
                    subtree: false,
                    beneath,
                    ..look.dirt
                };
                if look.is_to_be_walked() {
                    for (unseen, why) in self.walk(&path, look.dirt, &mut queue) {
                        let dirt = Dirt {
                            subtree: true,
                            ..look.dirt
                        };
                        failed.insert(unseen.clone());
                        self.cannot_look(unseen, dirt, why);
                    }
                }
                if look.is_unknown_dir() {
                    // And what it has no more: it may be another directory than
                    // before, or have been elsewhere, where names in it went.
                    reader.live_beneath(&path, &mut |beneath| {
                        queue.add(beneath.clone(), along);
                        ControlFlow::Continue(())
                    })?;
                }
                if let (Some(from), true) =
                    (look.moved_from(), look.sig.as_ref().is_some_and(StatSig::is_dir))
                {
                    // It was another directory's name: all that was in that is
                    // looked for at both places, so that it goes as a whole.
                    reader.live_beneath(from, &mut |beneath| {
                        let here = beneath.rebase(from, &path);
                        if let Some(here) = here.filter(|here| !queue.looked.contains(here)) {
                            queue.add(here, along);
                        }
                        ControlFlow::Continue(())
                    })?;
                    if !queue.looked.contains(from) {
                        queue.add(from.clone(), along);
                    }
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
                let mut dirty = self.share.dirty();
                for path in also {
                    // Now, and not once more for itself.
                    let known = dirty.remove(&path);
                    queue.add(path, known.map_or(along, |known| known.or(along)));
                }
                drop(dirty);
                done.insert(path, *look);
            }
            for path in failed_before {
                if !failed.contains(&path) {
                    self.unread.succeeded(&path);
                }
            }
        }
        let now = Instant::now();
        // Peers take the content from where it was: that name goes with the new one's
        // row, and not before it.
        for (path, unstable, cost) in former {
            if done.get(&path).is_some_and(|look| look.sig.is_none())
                && let Some(Look { dirt, .. }) = done.remove(&path)
            {
                // Not before that one is due.
                let dirt = Dirt { unstable, ..dirt };
                self.share.dirty().put_back(path, dirt, cost, now);
            }
        }
        for path in unsure(&self.share, done.iter()) {
            if let Some(Look { dirt, .. }) = done.remove(&path) {
                let written = match dirt.unstable < PART_TRIES {
                    true => dirt.written,
                    false => Written::Anywhere,
                };
                let dirt = Dirt { written, ..dirt };
                self.share.dirty().put_back(path, dirt, Duration::ZERO, now);
            }
        }
        for (path, dirt) in queue.again {
            let hint = Hint {
                content: dirt.content,
                read: dirt.read,
                subtree: dirt.subtree,
                ..Hint::default()
            };
            self.share.dirty().add_for(path, hint, &dirt, now);
        }
        Ok(done)
    }

    /// What cannot be looked at waits, with the reason, for another try.
    fn cannot_look(&mut self, path: RelPath, dirt: Dirt, why: String) {
        let text = format!("cannot look at {path}: {why}");
        if self.unread.failed(path, dirt, why, Instant::now()) {
            tracing::warn!(share = %self.share.name, "{text}");
        }
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
    /// resolver. Returns what could not be looked at, and why.
    fn walk(&self, start: &RelPath, dirt: Dirt, queue: &mut Queue) -> Vec<(RelPath, String)> {
        let share = &self.share;
        let skip = |path: &RelPath, is_dir: bool| share.is_excluded(path, is_dir);
        let mut names = Vec::new();
        let now = || share.resolver.lock().now();
        let walked = observe::scan(&share.root, start, &skip, now, |dir, since| {
            let mut resolver = share.resolver.lock();
            for child in &dir.children {
                if child.sig.is_dir() {
                    resolver.learn_dir_seen(since, child.sig.ino, dir.ino, &child.name);
                }
                let comes = Beneath::comes(&child.sig);
                names.extend(dir.path.join(&child.name).map(|name| (name, comes)));
            }
        });
        let mut unseen = Vec::new();
        match walked {
            Ok(summary) => {
                apply::remove_leftovers(&share.root.batch(), &summary.leftovers);
                let failed = summary.unseen.into_iter().filter(|unseen| !unseen.foreign);
                unseen.extend(failed.map(|failed| (failed.path, failed.why)));
            }
            // It is gone again; an event says so.
            Err(
                error @ (ApplyError::ParentMissing { .. }
                | ApplyError::Changed { .. }
                | ApplyError::Beneath { .. }),
            ) => {
                tracing::debug!(share = %share.name, "cannot walk {start}: {error}");
            }
            Err(error) => unseen.push((start.clone(), error.to_string())),
        }
        // What is looked at now need not be looked at for older events.
        let mut dirty = share.dirty();
        for (name, beneath) in names {
            let known = dirty.remove(&name);
            let along = Dirt {
                content: false,
                read: false,
                written: Written::Anywhere,
                unmapped: None,
                subtree: false,
                beneath,
                ..dirt
            };
            // What was renamed may have come when its new place had been read.
            let dirt = known.map_or(along, |known| Dirt {
                beneath,
                ..known.or(along)
            });
            queue.add(name, dirt);
        }
        unseen
    }

    /// Writes the rows of what was found, and tells the senders.
    fn write_rows(&mut self, reader: &Reader, looks: Looks) -> anyhow::Result<()> {
        let share = Arc::clone(&self.share);
        let mut sigs: FxHashMap<&RelPath, (StatSig, Option<Box<Here>>)> = FxHashMap::default();
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
            sigs.extend(look.sig.map(|sig| (path, (sig, look.here.clone()))));
            let Some(seen) = &look.seen else { continue };
            // When the change was made, not when it was seen: what a scan finds
            // after a long absence must not win over what peers did since.
            let when_ms = match seen {
                Seen::Present(entry) => look.sig.map(|sig| {
                    let known = look.record.as_ref().and_then(|record| record.row.live());
                    self.went_back +=
                        u64::from(!self.compared && known.is_some_and(|known| has_gone_back(known, entry)));
                    look.when_made(&sig, self.share.first_contact && !self.compared)
                }),
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
        let synced = match observed.is_empty() {
            true => Ok(()),
            false => self.sync_observed(&dirs, &looks, &observed),
        };
        if let Err(error) = synced {
            tracing::debug!(share = %share.name, "changes made here wait: {error}");
            for (path, look) in looks {
                share
                    .dirty()
                    .put_back(path, look.dirt, RETRY_AFTER, Instant::now());
            }
            return Ok(());
        }
        let decided = engine::decide_local(reader, observed, &mut self.author, super::now_ms())?;
        let made = decided.len() as u64;
        let moves = engine::whole_moves(&decided, &|_| true);
        crash::here(Point::RowsDecided);
        share.index.write(|w| {
            w.put_moves(moves)?;
            let mut written = FxHashSet::default();
            for one in decided {
                // A path may have two rows: its directory's move, and then its own.
                let before = looks.get(&one.path).and_then(|look| look.record.as_ref());
                if let Some(before) = before.filter(|before| before.row.has_content_of(&one.row)) {
                    share.unchanged.note(before.seq, one.seq);
                }
                let found = sigs.get(&one.path).cloned().filter(|_| !one.row.deleted);
                let (sig, here) = found.map_or((None, None), |(sig, here)| (Some(sig), here));
                let record = Record {
                    row: one.row,
                    seq: one.seq,
                    sig,
                    via: one.via,
                    moved_from: one.moved_from,
                    here,
                };
                w.put(&one.path, &record)?;
                written.insert(one.path);
            }
            for look in looks.values() {
                if let Some(Seen::Present(entry)) = &look.seen {
                    w.put_sketch(entry, &look.sketch)?;
                    w.put_leaves(entry, look.leaves.as_deref())?;
                }
            }
            // Where only `stat` has changed, the row stays as it is.
            for (path, (sig, here)) in sigs {
                if written.contains(path) {
                    continue;
                }
                w.set_sig(path, Some(sig))?;
                w.set_here(path, here)?;
            }
            Ok(((), if made > 0 { Durable::Yes } else { Durable::Later }))
        })?;
        // Only now: what is not in the index must be read again.
        let mut trust = share.trust.lock();
        for look in looks.values() {
            if let Some(unmapped) = look.in_full_since {
                trust.read_in_full(unmapped);
            }
        }
        drop(trust);
        let racy = looks
            .iter()
            .filter(|(_, look)| look.sig.is_some_and(|sig| sig.racy));
        share
            .belt
            .note(racy.map(|(path, look)| (path, look.part_of())), Instant::now());
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

    /// Brings what users did to the disk: after a power cut an index must not be
    /// ahead of its tree, since what is missing then would pass for a deletion, on
    /// all nodes.
    fn sync_observed(
        &mut self,
        dirs: &Dirs<'_>,
        looks: &Looks,
        observed: &[engine::Observed],
    ) -> Result<(), ApplyError> {
        // The commit makes the rows of what was received durable, too, whose
        // names are perhaps not on the disk.
        if !self.unsynced.is_empty() && self.sync_done()? == Synced::Everything {
            return Ok(());
        }
        let paths: Vec<RelPath> = observed.iter().map(|seen| seen.path.clone()).collect();
        // The others' names are on the disk as long as their rows are.
        let names = looks
            .iter()
            .filter(|(_, look)| look.seen.is_some() && look.name_changed());
        let folders: Vec<RelPath> = names
            .map(|(path, _)| path.parent().unwrap_or_else(RelPath::root))
            .collect();
        apply::sync_seen(dirs, &paths, &folders, &self.runtime)
    }
}

/// Whether a file has another content than before and is older than that.
fn has_gone_back(known: &Entry, now: &Entry) -> bool {
    known.content().is_some() && now.content().is_some() && known.kind != now.kind && now.mtime < known.mtime
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
