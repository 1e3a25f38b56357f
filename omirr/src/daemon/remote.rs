//! The keeper's other hand: from a peer's rows to the tree.
//!
//! In: rows, and contents that were asked for. Out: the tree as the rows say,
//! and the rows in the index. A row that cannot be applied yet waits in
//! `pending` with its reason; the others go on.
//!
//! The order of writes, and what a crash between two of them leaves:
//!
//! 1. Contents are staged in files without a name, and synced: nothing.
//! 2. The rows are written down as *intents*, durably, together with the rows
//!    applied before: the index says what may be found on disk.
//! 3. Names are changed: each is as before or as its intent; at the next start
//!    the intents tell which (`engine::recover`).
//! 4. The rows go into the index; a later commit makes them durable.
//! 5. After that commit the peer hears of it.

use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};

use super::dirty::Hint;
use super::keeper::{Keeper, RETRY_AFTER};
use super::local::is_dir;
use super::share::{Arrival, Command, Figures, Inbound, Share};
use crate::apply::{self, Applied, ApplyError, DirRemoval, Dirs, Expect, Ready};
use crate::engine::{self, Arrived, Content, Context, Decided, Install, Progress, Step, Work};
use crate::index::{Durable, Reader};
use crate::model::{self, Kind, Record, RelPath, Row, StatSig};
use crate::observe::{self, Observed, Reading};
use crate::wire::WireRow;

/// A row that could not be applied yet.
pub(super) struct Pending {
    pub(super) row: WireRow,
    pub(super) inbound: Arc<Inbound>,
    /// Why, in words; none while its content is on the way.
    pub(super) reason: Option<String>,
    /// When to try again; none while something is awaited.
    pub(super) again: Option<Instant>,
    /// How often it was found that the disk is not what the index says.
    pub(super) tries: u32,
}

/// What has come over one connection and is to be applied together.
pub(super) struct Group {
    inbound: Arc<Inbound>,
    /// The last batch's, if there is one.
    pub(super) upto: Option<u64>,
    arrivals: Vec<Arrival>,
    /// By path: where in `arrivals` its row is.
    places: FxHashMap<RelPath, usize>,
}

impl Group {
    /// The group of a connection, made if there is none.
    pub(super) fn of(groups: &mut Vec<Group>, inbound: Arc<Inbound>) -> &mut Group {
        let place = groups
            .iter()
            .position(|group| Arc::ptr_eq(&group.inbound, &inbound));
        let place = place.unwrap_or_else(|| {
            groups.push(Group {
                inbound,
                upto: None,
                arrivals: Vec::new(),
                places: FxHashMap::default(),
            });
            groups.len() - 1
        });
        &mut groups[place]
    }

    pub(super) fn len(&self) -> usize {
        self.arrivals.len()
    }

    fn add(&mut self, arrival: Arrival) {
        match self.places.entry(arrival.row.path.clone()) {
            Entry::Occupied(place) => self.arrivals[*place.get()] = arrival,
            Entry::Vacant(place) => {
                place.insert(self.arrivals.len());
                self.arrivals.push(arrival);
            }
        }
    }
}

/// What has become of steps.
struct Outcome {
    progress: Progress,
    /// By path: what `stat` says after the last step; none if it is gone.
    sigs: FxHashMap<RelPath, Option<StatSig>>,
    /// Why steps failed, by path.
    errors: FxHashMap<RelPath, ApplyError>,
    /// Someone has written to these since.
    touched: Vec<RelPath>,
    /// The resolver's moment before the first step.
    since: u64,
    /// Names that an inode got which has, or had, another: what users did to it
    /// by that one a moment ago has an event that leads there.
    renamed: Vec<RelPath>,
}

impl Keeper {
    /// Adds a batch to its connection's group. A newer row of the same peer
    /// takes the place of one that waits, be it for content or in the group.
    pub(super) fn take_rows(&mut self, group: &mut Group, rows: Vec<Arrival>) {
        for arrival in rows {
            let path = &arrival.row.path;
            self.pending.remove(&(group.inbound.place, path.clone()));
            if !self.share.is_excluded(path, arrival.row.row.entry.is_dir()) {
                group.add(arrival);
            }
        }
    }

    /// Content has arrived, or could not be had.
    pub(super) fn take_content(
        &mut self,
        group: &mut Group,
        path: &RelPath,
        seq: u64,
        outcome: Result<Ready, String>,
    ) {
        let key = (group.inbound.place, path.clone());
        let current =
            |pending: &&mut Pending| pending.row.seq == seq && Arc::ptr_eq(&pending.inbound, &group.inbound);
        let Some(pending) = self.pending.get_mut(&key).filter(current) else {
            return;
        };
        match outcome {
            Ok(ready) => {
                if let Some(Pending { row, tries, .. }) = self.pending.remove(&key) {
                    group.add(Arrival {
                        row,
                        ready: Some(ready),
                        tries,
                    });
                }
            }
            Err(reason) => {
                pending.reason = Some(reason);
                pending.again = Some(Instant::now() + RETRY_AFTER);
            }
        }
    }

    /// Decides on what has come over one connection, and applies it.
    pub(super) fn apply_group(&mut self, group: Group) -> anyhow::Result<()> {
        let Group {
            inbound,
            upto,
            arrivals,
            ..
        } = group;
        if Self::is_closed(&inbound) {
            return Ok(());
        }
        if let Some(upto) = upto {
            self.delivered(&inbound).upto = upto;
        } else if arrivals.is_empty() {
            return Ok(());
        }
        self.apply(&inbound, arrivals)?;
        self.unflushed.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Tries rows again whose time has come. Returns whether there were any.
    pub(super) fn retry(&mut self) -> anyhow::Result<bool> {
        let now = Instant::now();
        let due: Vec<(u32, RelPath)> = self
            .pending
            .iter()
            .filter(|(_, pending)| pending.again.is_some_and(|again| again <= now))
            .map(|(key, _)| key.clone())
            .collect();
        let mut by_inbound: Vec<(Arc<Inbound>, Vec<Arrival>)> = Vec::new();
        for key in &due {
            let Some(Pending {
                row, inbound, tries, ..
            }) = self.pending.remove(key)
            else {
                continue;
            };
            let arrival = Arrival {
                row,
                ready: None,
                tries,
            };
            match by_inbound
                .iter_mut()
                .find(|(other, _)| Arc::ptr_eq(other, &inbound))
            {
                Some((_, arrivals)) => arrivals.push(arrival),
                None => by_inbound.push((inbound, vec![arrival])),
            }
        }
        for (inbound, arrivals) in by_inbound {
            self.apply(&inbound, arrivals)?;
            self.unflushed.get_or_insert_with(Instant::now);
        }
        Ok(!due.is_empty())
    }

    fn apply(&mut self, inbound: &Arc<Inbound>, mut arrivals: Vec<Arrival>) -> anyhow::Result<()> {
        if arrivals.is_empty() {
            return Ok(());
        }
        let share = Arc::clone(&self.share);
        let reader = share.index.read()?;
        let mut absent = Vec::new();
        let (decided, steps) = loop {
            let (decided, steps) = self.decide(&reader, inbound, &arrivals)?;
            let missing = missing_content(&steps, &arrivals);
            if missing.is_empty() {
                break (decided, steps);
            }
            // The rest must not wait for what is still to be fetched.
            let (there, missing): (Vec<_>, Vec<_>) = arrivals
                .into_iter()
                .partition(|arrival| !missing.contains(&arrival.row.path));
            arrivals = there;
            absent.extend(missing);
        };
        if !decided.is_empty() {
            self.carry_out(inbound, &reader, decided, steps, arrivals)?;
        }
        // Only now are the directories there in which it is to be staged.
        for arrival in absent {
            self.fetch(inbound, arrival.row, arrival.tries);
        }
        Ok(())
    }

    /// Does the steps and writes the rows, in the order that the module's
    /// description gives.
    fn carry_out(
        &mut self,
        inbound: &Arc<Inbound>,
        reader: &Reader,
        decided: Vec<Decided>,
        steps: Vec<Step>,
        mut arrivals: Vec<Arrival>,
    ) -> anyhow::Result<()> {
        let share = Arc::clone(&self.share);
        if let Err(reason) = share.root.still_there() {
            anyhow::bail!(reason);
        }
        let dirs = share.root.batch();
        let mut outcome = Outcome {
            progress: Progress::new(reader, &decided)?,
            sigs: FxHashMap::default(),
            errors: FxHashMap::default(),
            touched: Vec::new(),
            renamed: Vec::new(),
            since: share.resolver.lock().now(),
        };
        let staged = stage(&dirs, reader, &steps, &mut arrivals, &mut outcome);
        if self.unflushed.is_some() {
            // One sync for this batch's contents and the last batch's names.
            apply::sync_all(&share.root)?;
        } else {
            apply::sync_batch(&share.root, &staged.values().collect::<Vec<_>>())?;
        }
        let cursors = if self.unflushed.is_some() {
            self.cursors_before(inbound)
        } else {
            Vec::new()
        };
        share.index.write(|w| {
            for one in decided.iter().filter(|one| one.work != Work::Nothing) {
                w.intend(&one.path, &one.row)?;
            }
            // Of directories in which something is done, only the times change.
            let decided_paths: FxHashSet<&RelPath> = decided.iter().map(|one| &one.path).collect();
            for step in &steps {
                if let Step::Times { path, .. } | Step::Restore { path, .. } = step
                    && !decided_paths.contains(path)
                    && let Some(record) = w.get(path)?
                {
                    w.intend(path, &record.row)?;
                }
            }
            for (place, replica, cursor) in cursors {
                let peer = &mut w.meta().peers[place as usize];
                peer.replica = replica;
                peer.cursor = cursor;
            }
            Ok(((), Durable::Yes))
        })?;

        execute(&dirs, reader, &steps, staged, &mut outcome)?;

        let mut applied = 0;
        share.index.write(|w| {
            for one in &decided {
                w.settle(&one.path)?;
                if !outcome.progress.is_done(&one.path) {
                    continue;
                }
                applied += 1;
                let what = if one.row.deleted { "deleted" } else { one.row.entry.kind_name() };
                tracing::debug!(target: "omirr::applied", share = %share.name, from = %inbound.peer, what, "{}", one.path);
                let old = w.get(&one.path)?;
                let sig = match one.row.deleted {
                    true => None,
                    false => match outcome.sigs.get(&one.path) {
                        Some(sig) => *sig,
                        None => old.and_then(|old| old.sig),
                    },
                };
                let record = Record {
                    row: one.row.clone(),
                    seq: one.seq,
                    sig,
                    via: one.via,
                    moved_from: one.moved_from.clone(),
                };
                w.put(&one.path, &record)?;
            }
            for step in &steps {
                w.settle(step.path())?;
            }
            // Directories whose times were set again, and other names of an
            // inode: only what `stat` says has changed.
            for (path, sig) in &outcome.sigs {
                w.set_sig(path, *sig)?;
            }
            Ok(((), Durable::Later))
        })?;
        Figures::add(&share.figures.rows_applied, applied);
        self.tidy_up(&dirs, &decided, &mut outcome)?;
        self.learn(&dirs, reader, &decided, &outcome)?;
        self.keep_failed(inbound, arrivals, outcome);
        Ok(())
    }

    /// Second names of what has kept its first are removed again, and what the
    /// rows say is one inode is joined.
    fn tidy_up(&self, dirs: &Dirs<'_>, decided: &[Decided], outcome: &mut Outcome) -> anyhow::Result<()> {
        let reader = self.share.index.read()?;
        let mut steps = outcome.progress.take_back(&reader)?;
        let mut groups: Vec<_> = decided.iter().filter_map(|one| one.row.live()?.link).collect();
        groups.sort_unstable();
        groups.dedup();
        for group in groups {
            let mut members = Vec::new();
            for path in reader.group(group)? {
                members.extend(reader.get(&path)?.map(|record| (path, record)));
            }
            steps.extend(engine::relink(&reader, &members)?);
        }
        if steps.is_empty() {
            return Ok(());
        }
        let mut after = Outcome {
            progress: Progress::default(),
            sigs: outcome.sigs.clone(),
            errors: FxHashMap::default(),
            touched: Vec::new(),
            renamed: Vec::new(),
            since: outcome.since,
        };
        for step in &steps {
            let done = step_once(dirs, &reader, step, &after)?;
            after.note(step, done);
        }
        self.share.index.write(|w| {
            for (path, sig) in &after.sigs {
                w.set_sig(path, *sig)?;
            }
            Ok(((), Durable::Later))
        })?;
        outcome.touched.extend(after.touched);
        outcome.renamed.extend(after.renamed);
        outcome.touched.extend(after.errors.into_keys());
        Ok(())
    }

    fn decide(
        &mut self,
        reader: &Reader,
        inbound: &Inbound,
        arrivals: &[Arrival],
    ) -> anyhow::Result<(Vec<Decided>, Vec<Step>)> {
        let names = self.share.index.meta().names;
        let name_of = |replica| {
            names
                .iter()
                .find(|known| known.0 == replica)
                .map(|known| known.1.clone())
                .unwrap_or_default()
        };
        let context = Context {
            now_ms: super::now_ms(),
            policy: self.share.policy,
            names: &name_of,
        };
        let arrived = arrivals
            .iter()
            .map(|arrival| Arrived {
                path: arrival.row.path.clone(),
                row: arrival.row.row.clone(),
                moved_from: arrival.row.moved_from.clone(),
            })
            .collect();
        let decided = engine::decide_remote(reader, arrived, inbound.place, &mut self.author, &context)?;
        let steps = engine::plan(reader, &decided)?;
        Ok((decided, steps))
    }

    /// Asks for the content of a row, which waits until it is there.
    fn fetch(&mut self, inbound: &Arc<Inbound>, row: WireRow, tries: u32) {
        if row.row.entry.content().is_some() {
            let want = Command::Want {
                path: row.path.clone(),
                seq: row.seq,
                entry: row.row.entry.clone(),
            };
            // A closed connection's rows come again with the next one.
            let _ = inbound.commands.send(want);
        }
        let row = WireRow { inline: None, ..row };
        let pending = Pending {
            row,
            inbound: Arc::clone(inbound),
            reason: None,
            again: None,
            tries,
        };
        self.pending
            .insert((inbound.place, pending.row.path.clone()), pending);
    }

    /// Cursors as of before the batch that is being applied for `inbound`.
    fn cursors_before(&self, inbound: &Arc<Inbound>) -> Vec<(u32, crate::model::ReplicaId, u64)> {
        let mut cursors = self.cursors();
        for (delivered, cursor) in self.inbounds.iter().zip(&mut cursors) {
            if Arc::ptr_eq(&delivered.inbound, inbound) {
                cursor.2 = delivered.acked;
            }
        }
        cursors
    }

    /// Tells the resolver of directories that came and went.
    fn learn(
        &self,
        dirs: &Dirs<'_>,
        reader: &Reader,
        decided: &[Decided],
        outcome: &Outcome,
    ) -> anyhow::Result<()> {
        let resolver = &self.share.resolver;
        for one in decided {
            let since = resolver.lock().now();
            let was = reader
                .get(&one.path)?
                .and_then(|record| record.sig)
                .filter(is_dir);
            let is = outcome.sigs.get(&one.path).copied().flatten().filter(is_dir);
            if let Some(was) = was.filter(|was| is.is_none_or(|is| is.ino != was.ino))
                && outcome.sigs.contains_key(&one.path)
            {
                resolver.lock().forget_dir_seen(outcome.since, was.ino);
            }
            // Where it is now: users may have moved it or what it was made in.
            if let Some(is) = is.filter(|is| was.is_none_or(|was| is.ino != was.ino))
                && let Some((parent, found)) = observe::place(dirs, &one.path)
                && found.ino == is.ino
            {
                resolver
                    .lock()
                    .learn_dir_seen(since, is.ino, parent, one.path.name());
            }
        }
        Ok(())
    }

    fn keep_failed(&mut self, inbound: &Arc<Inbound>, arrivals: Vec<Arrival>, mut outcome: Outcome) {
        let changed = Hint {
            content: true,
            subtree: true,
            at_rest: true,
        };
        let mut look: Vec<_> = outcome.touched.drain(..).map(|path| (path, changed)).collect();
        look.extend(outcome.renamed.drain(..).map(|path| (path, Hint::default())));
        let now = Instant::now();
        for Arrival { row, tries, .. } in arrivals {
            if outcome.progress.is_done(&row.path) {
                continue;
            }
            let error = outcome.errors.remove(&row.path);
            let error = error.unwrap_or_else(|| ApplyError::Changed {
                path: row.path.clone(),
            });
            let (reason, wait, tries) = if error.is_changed() {
                // It is looked at first; then the rows are decided again. What
                // does not come right by that needs a person or a newer row.
                look.push((row.path.clone(), changed));
                look.push((error.path().clone(), changed));
                look.extend(row.path.parent().map(|parent| (parent, Hint::default())));
                let wait = Duration::from_millis(5 << tries.min(9)).min(RETRY_AFTER);
                ((tries > 5).then(|| error.to_string()), wait, tries + 1)
            } else {
                look.push((error.path().clone(), Hint::default()));
                (Some(error.to_string()), RETRY_AFTER, tries)
            };
            if let Some(reason) = &reason {
                tracing::warn!(share = %self.share.name, peer = %inbound.peer, "cannot apply yet: {reason}");
            }
            let pending = Pending {
                row,
                inbound: Arc::clone(inbound),
                reason,
                again: Some(now + wait),
                tries,
            };
            self.pending
                .insert((inbound.place, pending.row.path.clone()), pending);
        }
        // Directories that are not as expected, in which something was done.
        look.extend(outcome.errors.into_keys().map(|path| (path, Hint::default())));
        self.share.touch(look);
    }
}

/// Paths whose content neither came with the row nor was fetched.
fn missing_content(steps: &[Step], arrivals: &[Arrival]) -> FxHashSet<RelPath> {
    let wanted = steps.iter().filter_map(|step| match step {
        Step::Stage {
            path,
            content: Content::Transfer,
            ..
        } => Some(path),
        _ => None,
    });
    let there: FxHashSet<&RelPath> = arrivals
        .iter()
        .filter(|arrival| {
            arrival.ready.is_some()
                || arrival.row.inline.is_some()
                || arrival.row.row.entry.content().is_some_and(|(size, _)| size == 0)
        })
        .map(|arrival| &arrival.row.path)
        .collect();
    wanted.filter(|path| !there.contains(path)).cloned().collect()
}

/// Makes all contents ready, several at a time.
fn stage(
    dirs: &Dirs<'_>,
    reader: &Reader,
    steps: &[Step],
    arrivals: &mut [Arrival],
    outcome: &mut Outcome,
) -> FxHashMap<RelPath, Ready> {
    let mut sources: FxHashMap<RelPath, &mut Arrival> = arrivals
        .iter_mut()
        .map(|arrival| (arrival.row.path.clone(), arrival))
        .collect();
    let jobs: Vec<_> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Stage { path, entry, content } => Some((step, path, entry, content, sources.remove(path))),
            _ => None,
        })
        .collect();
    let results: Vec<_> = jobs
        .into_par_iter()
        .with_min_len(4)
        .map(|(step, path, entry, content, source)| {
            (step, stage_one(dirs, reader, path, entry, content, source))
        })
        .collect();
    let mut staged = FxHashMap::default();
    for (step, result) in results {
        match result {
            Ok(ready) => {
                staged.insert(step.path().clone(), ready);
            }
            Err(error) => outcome.fail(step, error),
        }
    }
    staged
}

fn stage_one(
    dirs: &Dirs<'_>,
    reader: &Reader,
    path: &RelPath,
    entry: &model::Entry,
    content: &Content,
    source: Option<&mut Arrival>,
) -> Result<Ready, ApplyError> {
    // What came is of use only as long as it is what was decided.
    let source = source.filter(|arrival| arrival.row.row.entry == *entry);
    let (ready, inline) = match source {
        Some(arrival) => (arrival.ready.take(), arrival.row.inline.clone()),
        None => (None, None),
    };
    let staged = match (content, ready, inline) {
        (_, Some(ready), _) => return Ok(ready),
        (_, None, Some(inline)) => {
            let mut staged = apply::stage_file(dirs, path)?;
            staged.append(&inline)?;
            staged
        }
        (Content::Copy { from }, None, None) => {
            let Ok(Some(Record { sig: Some(sig), .. })) = reader.get(from) else {
                return Err(ApplyError::Changed { path: from.clone() });
            };
            apply::clone_local(dirs, from, &sig, path)?
        }
        (Content::Transfer, None, None) => apply::stage_file(dirs, path)?,
    };
    staged.finish(entry)
}

/// Does the steps in order; runs of independent new files at once.
fn execute(
    dirs: &Dirs<'_>,
    reader: &Reader,
    steps: &[Step],
    mut staged: FxHashMap<RelPath, Ready>,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let mut at = 0;
    while at < steps.len() {
        // A run of staged files, each under a name of its own.
        let run = steps[at..]
            .iter()
            .take_while(|step| {
                matches!(
                    step,
                    Step::Install {
                        how: Install::Staged,
                        ..
                    }
                )
            })
            .count();
        if run == 0 {
            if outcome.progress.admits(&steps[at]) {
                let done = step_once(dirs, reader, &steps[at], outcome)?;
                outcome.note(&steps[at], done);
            }
            at += 1;
            continue;
        }
        let jobs: Vec<_> = steps[at..at + run]
            .iter()
            .filter(|step| outcome.progress.admits(step))
            .filter_map(|step| Some((step, staged.remove(step.path())?)))
            .collect();
        let results: Vec<_> = jobs
            .into_par_iter()
            .with_min_len(4)
            .map(|(step, ready)| -> anyhow::Result<_> {
                let done = match outcome.expected(reader, step.path())? {
                    Ok(expect) => apply::install(dirs, ready, &expect).map(Some),
                    Err(error) => Err(error),
                };
                Ok((step, done))
            })
            .collect::<anyhow::Result<_>>()?;
        for (step, done) in results {
            outcome.note(step, done);
        }
        at += run;
    }
    Ok(())
}

impl Outcome {
    fn note(&mut self, step: &Step, done: Result<Option<Applied>, ApplyError>) {
        let path = match step {
            Step::Aside { to, .. } => to,
            step => step.path(),
        };
        match done {
            Ok(Some(applied)) => {
                if applied == Applied::ChangedSince {
                    self.touched.push(path.clone());
                }
                self.sigs.insert(path.clone(), applied.sig());
                // The inode's other name has seen the same; a moved one is gone.
                match step {
                    Step::Aside { path: other, .. }
                    | Step::Install {
                        how: Install::Link { existing: other },
                        ..
                    } => {
                        self.renamed.push(path.clone());
                        self.sigs.insert(other.clone(), applied.sig());
                    }
                    Step::Install {
                        how: Install::Moved { from },
                        ..
                    } => {
                        self.renamed.push(path.clone());
                        self.sigs.insert(from.clone(), None);
                    }
                    _ => {}
                }
            }
            Ok(None) if matches!(step, Step::Remove { .. }) => {
                self.sigs.insert(path.clone(), None);
            }
            Ok(None) => {}
            Err(error) => self.fail(step, error),
        }
    }

    /// What must be at a path: what the last step left there, else what the
    /// index says.
    fn expected(&self, reader: &Reader, path: &RelPath) -> anyhow::Result<Result<Expect, ApplyError>> {
        let changed = || ApplyError::Changed { path: path.clone() };
        let expect = match (self.sigs.get(path), self.touched.contains(path)) {
            (_, true) => return Ok(Err(changed())),
            (Some(Some(sig)), false) => Expect::Sig(*sig),
            (Some(None), false) => Expect::Absent,
            (None, false) => match reader.get(path)? {
                Some(record) if !record.row.deleted => match record.sig {
                    Some(sig) => Expect::Sig(sig),
                    None => return Ok(Err(changed())),
                },
                _ => Expect::Absent,
            },
        };
        Ok(Ok(expect))
    }

    fn fail(&mut self, step: &Step, error: ApplyError) {
        self.progress.fail(step);
        self.errors.insert(step.path().clone(), error);
    }
}

/// Does one step other than installing staged content.
fn step_once(
    dirs: &Dirs<'_>,
    reader: &Reader,
    step: &Step,
    outcome: &Outcome,
) -> anyhow::Result<Result<Option<Applied>, ApplyError>> {
    let expect = match outcome.expected(reader, step.path())? {
        Ok(expect) => expect,
        Err(error) => return Ok(Err(error)),
    };
    let changed = |path: &RelPath| Err(ApplyError::Changed { path: path.clone() });
    let sig_of = |path: &RelPath| -> anyhow::Result<Option<StatSig>> {
        Ok(match outcome.expected(reader, path)? {
            Ok(Expect::Sig(sig)) => Some(sig),
            _ => None,
        })
    };
    Ok(match step {
        Step::Stage { .. }
        | Step::Install {
            how: Install::Staged, ..
        } => Ok(None),
        Step::Aside { path, to } => match sig_of(path)? {
            Some(sig) => apply::link_existing(dirs, path, &sig, to, &Expect::Absent).map(Some),
            None => changed(path),
        },
        Step::Install {
            path,
            how: Install::Link { existing },
            ..
        } => match sig_of(existing)? {
            Some(sig) => apply::link_existing(dirs, existing, &sig, path, &expect).map(Some),
            None => changed(existing),
        },
        Step::Install {
            path,
            how: Install::Moved { from },
            ..
        } => match sig_of(from)? {
            Some(sig) => apply::move_entry(dirs, from, &sig, path, &expect).map(Some),
            None => changed(from),
        },
        Step::Install {
            path,
            entry,
            how: Install::Fresh,
        } => match entry.kind {
            Kind::Directory => apply::make_dir(dirs, path, entry, &expect).map(Some),
            Kind::Symlink { .. } => apply::make_symlink(dirs, path, entry, &expect).map(Some),
            _ => apply::make_node(dirs, path, entry, &expect).map(Some),
        },
        Step::Install {
            path,
            entry,
            how: Install::Attributes,
        } => match expect {
            Expect::Sig(sig) => apply::set_attrs(dirs, path, entry, &sig).map(Some),
            Expect::Absent => changed(path),
        },
        Step::Remove { path } => match expect {
            Expect::Sig(sig) if is_dir(&sig) => match apply::remove_dir(dirs, path) {
                Ok(DirRemoval::NotEmpty) => Err(ApplyError::NotEmpty { path: path.clone() }),
                Ok(DirRemoval::Removed | DirRemoval::Absent) => Ok(None),
                Err(error) => Err(error),
            },
            Expect::Sig(sig) => apply::remove_file(dirs, path, &sig).map(|()| None),
            Expect::Absent => Ok(None),
        },
        Step::Times { path, entry } => match expect {
            Expect::Sig(sig) => apply::set_dir_time(dirs, path, entry.mtime, &sig)
                .map(Applied::AsWritten)
                .map(Some),
            Expect::Absent => changed(path),
        },
        // Another one that a user has put there is not this step's business.
        Step::Restore { path, entry } => match reader.get(path)?.and_then(|record| record.sig) {
            Some(sig) if is_dir(&sig) => match apply::set_dir_time(dirs, path, entry.mtime, &sig) {
                Ok(sig) => Ok(Some(Applied::AsWritten(sig))),
                Err(_gone) => Ok(None),
            },
            _ => Ok(None),
        },
    })
}

/// What a restart finds of rows that were being applied when the last run was
/// killed; see `engine::recover`.
pub(super) fn recover(share: &Share) -> anyhow::Result<()> {
    let reader = share.index.read()?;
    let intents = reader.intents()?;
    if intents.is_empty() {
        return Ok(());
    }
    tracing::info!(share = %share.name, rows = intents.len(), "the last run was cut off while it applied rows");
    let dirs = share.root.batch();
    let mut done = Vec::new();
    let mut untouched = FxHashSet::default();
    let mut restored = Vec::new();
    for (path, row) in &intents {
        let base = reader.get(path)?;
        let (seen, sig) = match observe::observe(&dirs, path, None, Reading::Always) {
            Ok(Observed::Present { entry, sig, .. }) => (engine::Seen::Present(entry), Some(sig)),
            Ok(Observed::Absent) => (engine::Seen::Absent, None),
            // It is looked at like anything else.
            _ => continue,
        };
        let base = base.as_ref().map(|base| &base.row);
        match (engine::recover(base, row, &seen), sig) {
            (engine::Found::Done, sig) => done.push((path.clone(), row.clone(), sig)),
            (engine::Found::Halfway, Some(sig)) => {
                if let Ok(applied) = apply::set_attrs(&dirs, path, &row.entry, &sig) {
                    done.push((path.clone(), row.clone(), applied.sig()));
                }
            }
            // The peer sends it again. What was done within a directory has
            // moved its times, which must not pass for a user's change.
            (engine::Found::Untouched, Some(sig)) => {
                untouched.insert(sig.ino);
                if let Some(entry) = base.and_then(Row::live).filter(|entry| entry.is_dir()) {
                    restored.push((path.clone(), entry.mtime, sig));
                }
            }
            // Changed here since, or gone: it is looked at like anything else.
            _ => {}
        }
    }
    // A name at which something was to be kept aside, while the old one still
    // has the same inode: that half is taken back.
    done.retain(|(path, row, sig): &(RelPath, Row, Option<StatSig>)| {
        let Some(sig) = sig.filter(|sig| sig.nlink > 1 && !row.deleted) else {
            return true;
        };
        if !untouched.contains(&sig.ino) {
            return true;
        }
        // If it cannot be removed, it is looked at like anything else.
        drop(apply::remove_file(&dirs, path, &sig));
        false
    });
    restored.sort_by_key(|(path, ..)| std::cmp::Reverse(path.depth()));
    for (path, mtime, sig) in &restored {
        // If it cannot be set, the directory is looked at like anything else.
        drop(apply::set_dir_time(&dirs, path, *mtime, sig));
    }
    apply::sync_all(&share.root)?;
    share.index.write(|w| {
        for (path, _) in &intents {
            w.settle(path)?;
        }
        for (path, row, sig) in done {
            let seq = w.next_seq();
            w.put(
                &path,
                &Record {
                    row,
                    seq,
                    sig,
                    via: None,
                    moved_from: None,
                },
            )?;
        }
        Ok(((), Durable::Yes))
    })?;
    Ok(())
}
