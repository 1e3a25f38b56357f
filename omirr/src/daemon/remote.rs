//! The keeper's other hand: from a peer's rows to the tree.
//!
//! In: rows, and contents that were asked for. Out: the tree as the rows say,
//! and the rows in the index. A row that cannot be applied yet waits in
//! `pending` with its reason; the others go on. The steps themselves are done in
//! `steps`.
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

use std::collections::hash_map;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::{FxHashMap, FxHashSet};

use super::bases::bases;
use super::dirty::Hint;
use super::keeper::{Keeper, RETRY_AFTER, Synced};
use super::locks::{concerned, lock_again};
use super::sender::INLINE_MAX;
use super::share::{Arrival, Command, Fetched, Figures, Inbound, Share, Tries};
use super::steps::{Outcome, execute, stage, step_once};
use crate::apply::{self, ApplyError, Dirs, Ready};
use crate::content::Leaves;
use crate::crash::{self, Point};
use crate::engine::{self, Arrived, Content, Context, Decided, Expansion, Install, Progress, Step, Work};
use crate::index::{Durable, IndexError, Reader};
use crate::model::{Entry, LinkGroup, Record, RelPath, ReplicaId, Sketch, StatSig};
use crate::observe;
use crate::wire::WireRow;

/// A content that could not be taken is asked for again after [`RETRY_AFTER`],
/// then after twice as long, up to so many times.
const TRANSFER_PAUSES: u32 = 3;

/// A row that could not be applied yet.
pub(super) struct Pending {
    pub(super) row: WireRow,
    pub(super) inbound: Arc<Inbound>,
    /// When to try again; none while something is awaited.
    pub(super) again: Option<Instant>,
    /// With the reason, in words; none while its content is on the way for the
    /// first time.
    pub(super) tries: Tries,
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

    fn add(&mut self, mut arrival: Arrival) {
        if arrival.row.moved_tree.is_some() {
            // What comes before it must stay before it, what comes after, after.
            self.places.clear();
            self.arrivals.push(arrival);
            return;
        }
        match self.places.entry(arrival.row.path.clone()) {
            hash_map::Entry::Occupied(place) => {
                let before = &mut self.arrivals[*place.get()];
                arrival.tries.replace(before.row.seq, &before.tries);
                *before = arrival;
            }
            hash_map::Entry::Vacant(place) => {
                place.insert(self.arrivals.len());
                self.arrivals.push(arrival);
            }
        }
    }
}

impl Keeper {
    /// Adds a batch to its connection's group. A newer row of the same peer
    /// takes the place of one that waits, be it for content or in the group.
    pub(super) fn take_rows(&mut self, group: &mut Group, rows: Vec<Arrival>) {
        for mut arrival in rows {
            let path = &arrival.row.path;
            self.replace_waiting(&(group.inbound.place, path.clone()), &mut arrival.tries);
            // Where a directory goes need not be excluded, too.
            let moved = arrival.row.moved_tree.is_some();
            if moved || !self.share.is_excluded(path, arrival.row.row.entry.is_dir()) {
                group.add(arrival);
            }
        }
    }

    /// Takes out what waits at a peer's path; the row with `tries` takes its place.
    fn replace_waiting(&mut self, key: &(u32, RelPath), tries: &mut Tries) {
        if let Some(waited) = self.pending.remove(key) {
            tries.replace(waited.row.seq, &waited.tries);
        }
    }

    /// Content has arrived, or could not be had.
    pub(super) fn take_content(
        &mut self,
        group: &mut Group,
        path: &RelPath,
        seq: u64,
        outcome: Result<Fetched, String>,
    ) {
        let key = (group.inbound.place, path.clone());
        let current =
            |pending: &&mut Pending| pending.row.seq == seq && Arc::ptr_eq(&pending.inbound, &group.inbound);
        let Some(pending) = self.pending.get_mut(&key).filter(current) else {
            return;
        };
        match outcome {
            Ok(fetched) => {
                if let Some(Pending { mut row, tries, .. }) = self.pending.remove(&key) {
                    self.take_companions(group, &row);
                    let ready = match fetched {
                        Fetched::Staged(ready) => Some(ready),
                        Fetched::Whole(content) => {
                            row.inline = Some(content);
                            None
                        }
                    };
                    group.add(Arrival { row, ready, tries });
                }
            }
            Err(reason) => {
                // All of it is sent again with each try.
                let pause = RETRY_AFTER * (1 << pending.tries.transfers.min(TRANSFER_PAUSES));
                tracing::warn!(share = %self.share.name, peer = %group.inbound.peer, "cannot fetch '{path}' yet: {reason}");
                pending.tries.transfers += 1;
                pending.tries.reason = Some(reason);
                pending.again = Some(Instant::now() + pause);
            }
        }
    }

    /// Adds the other names of the file whose content has come.
    fn take_companions(&mut self, group: &mut Group, row: &WireRow) {
        if !has_companions(row) {
            return;
        }
        let inbound = Arc::clone(&group.inbound);
        let is_companion =
            |pending: &Pending| Arc::ptr_eq(&pending.inbound, &inbound) && is_one_file(&pending.row, row);
        let keys: Vec<_> = self
            .pending
            .iter()
            .filter(|(_, pending)| is_companion(pending))
            .map(|(key, _)| key.clone())
            .collect();
        for key in keys {
            if let Some(Pending { row, tries, .. }) = self.pending.remove(&key) {
                group.add(Arrival {
                    row,
                    ready: None,
                    tries,
                });
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
        if upto.is_none() && arrivals.is_empty() {
            self.delivered(&inbound).in_hand = false;
            return Ok(());
        }
        let nothing_came = arrivals.is_empty();
        // Even if the connection has closed since: rows that waited are in here,
        // and nothing else holds the cursor back for them now.
        let delivered = self.delivered(&inbound);
        let before = delivered.upto;
        delivered.upto = upto.unwrap_or(before);
        if !self.compared {
            self.look_first(arrivals.iter().map(|arrival| arrival.row.path.clone()))?;
        }
        let mut rows = Vec::new();
        let mut arrivals = arrivals.into_iter();
        while let Some(arrival) = arrivals.next() {
            if arrival.row.moved_tree.is_none() {
                rows.push(arrival);
                continue;
            }
            self.apply(&inbound, std::mem::take(&mut rows))?;
            // Those that are to come again may stand for others that do not.
            let rest = arrivals
                .as_slice()
                .iter()
                .filter(|arrival| arrival.row.seq > before);
            let oldest = rest.filter_map(|arrival| arrival.tries.replaces).min();
            let after = before.min(oldest.map_or(u64::MAX, |oldest| oldest - 1));
            if !self.apply_move(&inbound, &arrival, after)? {
                // Rows that come again are not decided before what they follow;
                // those whose content has just come do not come again.
                rows.extend(arrivals.by_ref().filter(|arrival| arrival.row.seq <= before));
            }
        }
        self.apply(&inbound, rows)?;
        self.delivered(&inbound).in_hand = false;
        match nothing_came && self.unsynced.is_empty() {
            // The peer has passed by what it has from here.
            true => drop(self.cursors_since.get_or_insert_with(Instant::now)),
            false => self.unsynced.begin(),
        }
        Ok(())
    }

    /// Makes the rows of a directory's move, of which the peer has sent the last,
    /// and applies them together. If they cannot be made, asks the peer to begin
    /// again after row `after`, or before, and returns false.
    fn apply_move(&mut self, inbound: &Arc<Inbound>, arrival: &Arrival, after: u64) -> anyhow::Result<bool> {
        let (row, tries) = (&arrival.row, &arrival.tries);
        let Some(tree) = &row.moved_tree else {
            return Ok(true);
        };
        let reader = self.share.index.read()?;
        let first = row.seq.saturating_sub(tree.span());
        let rows = match engine::expand(&reader, &reader.moves()?, &row.path, &row.row, tree)? {
            Expansion::Known => return Ok(true),
            Expansion::Rows(rows) => rows,
            Expansion::Unlike => {
                tracing::debug!(share = %self.share.name, from = %inbound.peer, "{} was moved to {}, and is not the same here: its rows are asked for", row.path, tree.to);
                let after = after.min(tries.oldest(first).saturating_sub(1));
                let delivered = self.delivered(inbound);
                delivered.upto = after;
                delivered.deaf = true;
                // A closed connection's rows come again with the next one.
                let _ = inbound.commands.send(Command::Plain { after, upto: row.seq });
                return Ok(false);
            }
        };
        drop(reader);
        let mut arrivals = Vec::with_capacity(rows.len());
        for (seq, made) in (first..).zip(rows) {
            let mut tries = Tries {
                replaces: tries.replaces,
                ..Tries::default()
            };
            self.replace_waiting(&(inbound.place, made.path.clone()), &mut tries);
            if self.share.is_excluded(&made.path, made.row.entry.is_dir()) {
                continue;
            }
            arrivals.push(Arrival {
                row: WireRow {
                    seq,
                    path: made.path,
                    row: made.row,
                    moved_from: made.moved_from,
                    inline: None,
                    moved_tree: made.moved_tree,
                    sketch: Sketch::default(),
                },
                ready: None,
                tries,
            });
        }
        self.apply(inbound, arrivals)?;
        Ok(true)
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
            self.delivered(&inbound).in_hand = true;
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
            self.delivered(&inbound).in_hand = false;
            self.unsynced.begin();
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
        for Arrival { row, tries, .. } in absent {
            // One content is enough for all names of a file; the first of them waits
            // for it, since the plan begins with that.
            let comes = has_companions(&row)
                && self.pending.values().any(|pending| {
                    let awaited = pending.again.is_none() && Arc::ptr_eq(&pending.inbound, inbound);
                    awaited && pending.row.path < row.path && is_one_file(&pending.row, &row)
                });
            match comes {
                true => {
                    let row = WireRow { inline: None, ..row };
                    self.wait_for(inbound, row, Some(Instant::now() + RETRY_AFTER), tries);
                }
                false => self.fetch(inbound, &reader, row, tries)?,
            }
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
        let now = share.resolver.lock().now();
        let mut outcome = Outcome::new(Progress::new(reader, &decided)?, now);
        let locked = self.unlock(&dirs, reader, &steps, &mut outcome)?;
        let mut staged = stage(&dirs, reader, &steps, &mut arrivals, &mut outcome);
        // One sync for this batch's contents and the last batch's names, where
        // that is possible.
        let (mut synced, mut cursors) = (Synced::WhatWasDone, Vec::new());
        if !self.unsynced.is_empty() {
            match self.sync_done() {
                Ok(done) => synced = done,
                Err(error) => {
                    self.keep_unsynced(inbound, arrivals, &error);
                    return Ok(());
                }
            }
            cursors = self.cursors();
        }
        let unsynced = match synced {
            Synced::Everything => {
                intend(&share, &decided, &steps, &cursors)?;
                Vec::new()
            }
            Synced::WhatWasDone => {
                let contents: Vec<&Ready> = staged.values().collect();
                // Both must be on the disk before a name changes, and neither needs
                // the other: a content without an intent goes, an intent without a
                // content is found untouched.
                let syncing = apply::begin_sync(&share.root, &contents, &self.runtime);
                intend(&share, &decided, &steps, &cursors)?;
                self.runtime.block_on(syncing)
            }
        };
        for error in unsynced {
            staged.remove(error.path());
            let staging = |step: &&Step| matches!(step, Step::Stage { path, .. } if path == error.path());
            if let Some(step) = steps.iter().find(staging) {
                outcome.fail(step, error);
            }
        }
        let leaves: FxHashMap<RelPath, Leaves> = staged
            .iter_mut()
            .filter_map(|(path, ready)| Some((path.clone(), ready.take_leaves()?)))
            .collect();
        crash::here(Point::Intended);

        self.forget_doomed(reader, &steps)?;
        self.unsynced.add(concerned(&steps));
        execute(&dirs, reader, &steps, staged, &mut outcome)?;
        crash::here(Point::Executed);
        lock_again(&dirs, reader, &locked, &decided, &mut outcome)?;
        let sketches: FxHashMap<&RelPath, &Sketch> = arrivals
            .iter()
            .map(|arrival| (&arrival.row.path, &arrival.row.sketch))
            .filter(|(_, sketch)| !sketch.is_empty())
            .collect();
        let mut applied = 0;
        let moves = engine::whole_moves(&decided, &|path| outcome.progress.is_done(path));
        share.index.write(|w| {
            w.put_moves(moves)?;
            let mut written = FxHashSet::default();
            for one in &decided {
                if !outcome.progress.is_done(&one.path) {
                    continue;
                }
                applied += 1;
                if let Work::KeepAside { from } = &one.work {
                    tracing::warn!(share = %share.name, from = %inbound.peer, "conflict: '{from}' was changed here, too; that version is kept as '{}'", one.path);
                }
                let what = if one.row.deleted { "deleted" } else { one.row.entry.kind_name() };
                tracing::debug!(target: "omirr::applied", share = %share.name, from = %inbound.peer, what, "{}", one.path);
                // What a directory has carried along is what it was.
                let carried_from = outcome.carried_from(&one.path);
                let before = w.get(&one.path)?;
                let old = match &carried_from {
                    Some(from) => reader.get(from)?,
                    None => before.clone(),
                };
                let stayed = old.as_ref().filter(|_| carried_from.is_none());
                if let Some(old) = stayed.filter(|old| old.row.has_content_of(&one.row)) {
                    share.unchanged.note(old.seq, one.seq);
                }
                let (old_sig, old_here) = old.map_or((None, None), |old| (old.sig, old.here));
                let sig = outcome.sigs.get(&one.path).copied().unwrap_or(old_sig);
                let here = outcome.here.get(&one.path).cloned().unwrap_or(old_here);
                let record = Record {
                    row: one.row.clone(),
                    seq: one.seq,
                    sig: sig.filter(|_| !one.row.deleted),
                    via: one.via,
                    moved_from: one.moved_from.clone(),
                    here: here.filter(|_| !one.row.deleted),
                };
                w.put_over(before.as_ref(), &one.path, &record)?;
                written.insert(&one.path);
                if let Some(sketch) = sketches.get(&one.path) {
                    w.put_sketch(&one.row.entry, sketch)?;
                }
                w.put_leaves(&one.row.entry, leaves.get(&one.path))?;
            }
            let decided = decided.iter().map(|one| &one.path);
            w.settle(decided.chain(steps.iter().map(Step::path)).chain(&locked))?;
            // Directories whose times were set again, and other names of an
            // inode: only what `stat` says has changed.
            for (path, sig) in outcome.sigs.iter().filter(|(path, _)| !written.contains(path)) {
                w.set_sig(path, *sig)?;
            }
            Ok(((), Durable::Later))
        })?;
        crash::here(Point::RowsCommitted);
        {
            // What is told of their bytes from here on says nothing of this.
            let mut trust = share.trust.lock();
            outcome
                .sigs
                .values()
                .flatten()
                .for_each(|sig| trust.forget(sig.ino));
        }
        self.say_lacks(&outcome);
        Figures::add(&share.figures.rows_applied, applied);
        self.tidy_up(&dirs, &decided, &mut outcome)?;
        self.learn(&dirs, reader, &decided, &outcome)?;
        // What a comparison has not come to yet went along, and it may have passed the
        // new place already.
        if !self.compared || !share.has_compared() {
            let whole = Hint {
                subtree: true,
                ..Hint::default()
            };
            share.touch(outcome.carried.iter().map(|(_, to)| (to.clone(), whole)));
        }
        // Only now: until the resolver has learned it, events were called by the old name.
        for (from, to) in &outcome.carried {
            self.renamed.note(from.clone(), to.clone(), Instant::now());
        }
        self.keep_failed(inbound, arrivals, outcome);
        Ok(())
    }

    /// Says each reason for which something cannot be had here, once.
    fn say_lacks(&mut self, outcome: &Outcome) {
        for (path, here) in &outcome.here {
            for why in here.iter().flat_map(|here| &here.lacks) {
                if self.said.insert(why.clone()) {
                    tracing::warn!(share = %self.share.name, "{why}: all else of '{path}' is applied; `omirr status` counts what lacks it");
                }
            }
        }
    }

    /// Tells the resolver of directories that are about to go: the next one that
    /// is made may get the number, and what users do in that one at once must not
    /// be looked for at the old place. One that stays after all is found again.
    fn forget_doomed(&self, reader: &Reader, steps: &[Step]) -> anyhow::Result<()> {
        for step in steps {
            let path = match step {
                Step::Remove { path } => path,
                Step::Install { path, how, .. } if *how != Install::Attributes => path,
                _ => continue,
            };
            if let Some(sig) = reader
                .get(path)?
                .and_then(|record| record.sig)
                .filter(StatSig::is_dir)
            {
                let mut resolver = self.share.resolver.lock();
                let now = resolver.now();
                resolver.forget_dir_seen(now, sig.ino);
            }
        }
        Ok(())
    }

    /// Second names of what has kept its first are removed again, and what the
    /// rows say is one inode is joined.
    fn tidy_up(&mut self, dirs: &Dirs<'_>, decided: &[Decided], outcome: &mut Outcome) -> anyhow::Result<()> {
        let reader = self.share.index.read()?;
        let mut steps = outcome.progress.take_back(&reader)?;
        let groups = decided.iter().filter_map(|one| one.row.live()?.link).collect();
        steps.extend(relinking(&reader, groups)?);
        let mut after = Outcome::new(Progress::default(), outcome.since);
        after.sigs.clone_from(&outcome.sigs);
        let locked = self.unlock(dirs, &reader, &steps, &mut after)?;
        self.unsynced.add(concerned(&steps));
        follow_up(&self.share, dirs, &reader, &steps, &locked, &mut after)?;
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
                moved_tree: arrival.row.moved_tree.clone(),
            })
            .collect();
        let decided = engine::decide_remote(reader, arrived, inbound.place, &mut self.author, &context)?;
        let steps = match arrivals.iter().any(|arrival| arrival.tries.any()) {
            true => engine::plan_one_by_one(reader, &decided)?,
            false => engine::plan(reader, &decided)?,
        };
        Ok((decided, steps))
    }

    /// Asks for the content of a row, which waits until it is there.
    fn fetch(
        &mut self,
        inbound: &Arc<Inbound>,
        reader: &Reader,
        row: WireRow,
        tries: Tries,
    ) -> Result<(), IndexError> {
        if row.row.entry.content().is_some() {
            let want = Command::Want {
                path: row.path.clone(),
                seq: row.seq,
                entry: row.row.entry.clone(),
                bases: bases(reader, &row)?,
                compare: !tries.any(),
            };
            // A closed connection's rows come again with the next one.
            let _ = inbound.commands.send(want);
        }
        let row = WireRow { inline: None, ..row };
        self.wait_for(inbound, row, None, tries);
        Ok(())
    }

    fn wait_for(&mut self, inbound: &Arc<Inbound>, row: WireRow, again: Option<Instant>, mut tries: Tries) {
        let key = (inbound.place, row.path.clone());
        self.replace_waiting(&key, &mut tries);
        let pending = Pending {
            row,
            inbound: Arc::clone(inbound),
            again,
            tries,
        };
        self.pending.insert(key, pending);
    }

    /// Nothing of these rows was done, because what was done before cannot be
    /// brought to the disk.
    fn keep_unsynced(&mut self, inbound: &Arc<Inbound>, arrivals: Vec<Arrival>, error: &ApplyError) {
        let again = Instant::now() + RETRY_AFTER;
        for Arrival { row, mut tries, .. } in arrivals {
            tries.reason = Some(error.concerning(&row.path).to_string());
            self.wait_for(inbound, row, Some(again), tries);
        }
    }

    /// Tells the resolver of directories that came and went, and marks the other
    /// names of inodes that lost one.
    fn learn(
        &self,
        dirs: &Dirs<'_>,
        reader: &Reader,
        decided: &[Decided],
        outcome: &Outcome,
    ) -> anyhow::Result<()> {
        let resolver = &self.share.resolver;
        let mut others = Vec::new();
        for one in decided {
            let since = resolver.lock().now();
            let was = reader.get(&one.path)?.and_then(|record| record.sig);
            if let Some(was) = was.filter(|was| was.nlink > 1 && !was.is_dir()) {
                // What users did to it by this name a moment ago has an event
                // that leads here, where it may not be any more.
                let names = reader.paths_of_ino(was.ino)?;
                others.extend(names.into_iter().filter(|name| *name != one.path));
            }
            let was = was.filter(StatSig::is_dir);
            let is = outcome
                .sigs
                .get(&one.path)
                .copied()
                .flatten()
                .filter(StatSig::is_dir);
            let carried = outcome.carried.iter().any(|(from, _)| *from == one.path);
            if let Some(was) = was.filter(|was| is.is_none_or(|is| !is.same_inode(was)))
                && !carried
                && outcome.sigs.contains_key(&one.path)
            {
                resolver.lock().forget_dir_seen(outcome.since, was.ino);
            }
            // Where it is now: users may have moved it or what it was made in.
            if let Some(is) = is.filter(|is| was.is_none_or(|was| !is.same_inode(&was)))
                && let Some((parent, found)) = observe::place(dirs, &one.path)
                && found.ino == is.ino
            {
                resolver
                    .lock()
                    .learn_dir_seen(since, is.ino, parent, one.path.name());
            }
        }
        self.share
            .touch(others.into_iter().map(|path| (path, Hint::default())));
        Ok(())
    }

    fn keep_failed(&mut self, inbound: &Arc<Inbound>, arrivals: Vec<Arrival>, mut outcome: Outcome) {
        let changed = Hint {
            content: true,
            subtree: true,
            at_rest: true,
            ..Hint::default()
        };
        let mut look: Vec<_> = outcome.touched.drain(..).map(|path| (path, changed)).collect();
        look.extend(outcome.renamed.drain(..).map(|path| (path, Hint::default())));
        let now = Instant::now();
        for Arrival { mut row, tries, .. } in arrivals {
            if outcome.progress.is_done(&row.path) {
                continue;
            }
            // By itself it is a row like any other.
            row.moved_tree = None;
            let error = outcome.errors.remove(&row.path);
            let error = error.unwrap_or_else(|| ApplyError::Changed {
                path: row.path.clone(),
            });
            let (reason, wait, changed) = if error.is_changed() {
                // It is looked at first; then the rows are decided again. What
                // does not come right by that needs a person or a newer row.
                look.push((row.path.clone(), changed));
                look.push((error.path().clone(), changed));
                look.extend(row.path.parent().map(|parent| (parent, Hint::default())));
                let wait = Duration::from_millis(5 << tries.changed.min(9)).min(RETRY_AFTER);
                (
                    (tries.changed > 5).then(|| error.to_string()),
                    wait,
                    tries.changed + 1,
                )
            } else {
                look.push((error.path().clone(), Hint::default()));
                // There may be very many such rows, and it may take days; the peer
                // sends it again.
                row.inline = None;
                (Some(error.to_string()), RETRY_AFTER, tries.changed)
            };
            if let Some(reason) = reason
                .as_ref()
                .filter(|reason| tries.reason.as_ref() != Some(reason))
            {
                tracing::warn!(share = %self.share.name, peer = %inbound.peer, "cannot apply yet: {reason}");
            }
            let tries = Tries {
                changed,
                reason,
                ..tries
            };
            self.wait_for(inbound, row, Some(now + wait), tries);
        }
        // Directories that are not as expected, in which something was done.
        look.extend(outcome.errors.into_keys().map(|path| (path, Hint::default())));
        self.share.touch(look);
    }
}

/// Writes down, durably, what is about to be done, and how far each connection's
/// rows are applied.
fn intend(
    share: &Share,
    decided: &[Decided],
    steps: &[Step],
    cursors: &[(u32, ReplicaId, u64)],
) -> Result<(), IndexError> {
    share.index.write(|w| {
        // Of directories in which something is done, only the times change.
        let decided_paths: FxHashSet<&RelPath> = decided.iter().map(|one| &one.path).collect();
        let mut beside = Vec::new();
        for step in steps {
            if let Step::Times { path, .. } | Step::Restore { path, .. } = step
                && !decided_paths.contains(path)
                && let Some(record) = w.get(path)?
            {
                beside.push((path, record.row));
            }
        }
        let to_do = decided.iter().filter(|one| one.work != Work::Nothing);
        let rows = to_do.map(|one| (&one.path, &one.row));
        w.intend(rows.chain(beside.iter().map(|(path, row)| (*path, row))))?;
        for (place, replica, cursor) in cursors {
            let peer = &mut w.meta().peers[*place as usize];
            peer.replica = *replica;
            peer.cursor = *cursor;
        }
        Ok(((), Durable::Yes))
    })
}

/// Whether looking for the file's other names is worth it: all that waits is gone
/// through for that, and it may be very much.
fn has_companions(row: &WireRow) -> bool {
    let entry = row.row.live().filter(|entry| entry.link.is_some());
    entry
        .and_then(Entry::content)
        .is_some_and(|(size, _)| size > INLINE_MAX)
}

/// Whether both rows are of one file with several names, with one content.
fn is_one_file(one: &WireRow, other: &WireRow) -> bool {
    let (one, other) = (&one.row, &other.row);
    let link = one.live().and_then(|entry| entry.link);
    link.is_some() && link == other.live().and_then(|entry| entry.link) && one.entry.kind == other.entry.kind
}

/// The steps that join what the rows of these groups say is one inode.
pub(super) fn relinking(reader: &Reader, mut groups: Vec<LinkGroup>) -> Result<Vec<Step>, IndexError> {
    groups.sort_unstable();
    groups.dedup();
    let mut steps = Vec::new();
    for group in groups {
        let mut members = Vec::new();
        for path in reader.group(group)? {
            members.extend(reader.get(&path)?.map(|record| (path, record)));
        }
        steps.extend(engine::relink(reader, &members)?);
    }
    Ok(steps)
}

/// Does steps that follow from rows in the index already, locks again what was
/// unlocked for that, and notes what `stat` says then.
pub(super) fn follow_up(
    share: &Share,
    dirs: &Dirs<'_>,
    reader: &Reader,
    steps: &[Step],
    locked: &[RelPath],
    after: &mut Outcome,
) -> anyhow::Result<()> {
    if steps.is_empty() {
        return Ok(());
    }
    for step in steps {
        let done = step_once(dirs, reader, step, after)?;
        after.note(reader, step, done)?;
    }
    lock_again(dirs, reader, locked, &[], after)?;
    share.index.write(|w| {
        w.settle(locked)?;
        for (path, sig) in &after.sigs {
            w.set_sig(path, *sig)?;
        }
        Ok(((), Durable::Later))
    })?;
    crash::here(Point::TidiedUp);
    Ok(())
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
