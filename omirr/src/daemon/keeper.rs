//! The keeper: the one thread that writes a share's index and tree.
//!
//! In: dirty paths and [`Input`]s. Out: rows in the index, files in the tree,
//! acknowledgements to peers, and the durable head for the senders. It does one
//! thing at a time, in this order of haste: what local users changed, what
//! peers sent, what waited for another try, making all of it durable.
//!
//! Its two hands are `local` (dirty paths → rows) and `remote` (rows → tree).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::{mpsc, oneshot, watch};

use super::remote::{Group, Pending};
use super::renamed::Renamed;
use super::share::{Command, Inbound, Input, Share, Waiting};
use super::unread::Unread;
use super::unsynced::Unsynced;
use super::until;
use super::who::Origins;
use crate::apply::{self, ApplyError};
use crate::crash::{self, Point};
use crate::engine::{Author, Sequence};
use crate::index::{Durable, Meta};
use crate::model::{Gap, Record, RelPath, ReplicaId};

/// Applied rows wait at most so long to be made durable and acknowledged.
const FLUSH_AFTER: Duration = Duration::from_millis(50);
/// Cursors that moved past rows of which this node needs nothing are made durable
/// after so long, if no other commit has done it by then: should they be lost, the
/// rows come again and are known.
const CURSORS_AFTER: Duration = Duration::from_secs(1);
/// A row that could not be applied is tried again after so long.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(2);
/// Rows are put together up to so many.
const GROUP_ROWS: usize = 4096;
/// Rows are made again in portions of so many.
const RENEWED_ROWS: usize = 4096;
/// Without anything to do, memory is given back after so long.
const IDLE_AFTER: Duration = Duration::from_secs(2);
/// So many nodes' names are kept, for the names of conflict copies: they are
/// written with every commit, and a peer could tell any number.
const NAMES_MAX: usize = 1024;
/// From so many files on that went back in time, a restored tree is suspected.
const WENT_BACK_MIN: u64 = 3;
/// How many waiting rows `status` names.
const WAITING_SHOWN: usize = 20;

/// Someone who waits until what was dirty when he came is in the index.
struct Barrier {
    since: Instant,
    /// A comparison went on then: what it finds is among it.
    comparing: bool,
    /// Given the durable head.
    done: oneshot::Sender<u64>,
}

pub struct Keeper {
    pub(super) share: Arc<Share>,
    pub(super) author: Author,
    pub(super) origins: Origins,
    inputs: mpsc::Receiver<Input>,
    /// Taken from `inputs` and still to be looked at.
    next: Option<Input>,
    stop: watch::Receiver<bool>,
    pub(super) runtime: tokio::runtime::Handle,
    /// Rows that are applied and in the index, but not yet durable.
    pub(super) unsynced: Unsynced,
    /// Since when cursors are further than the index has them, though nothing was
    /// applied.
    pub(super) cursors_since: Option<Instant>,
    /// What each connection has delivered.
    pub(super) inbounds: Vec<Delivered>,
    /// Rows that could not be applied yet, by the peer's place and path.
    pub(super) pending: FxHashMap<(u32, RelPath), Pending>,
    /// What was renamed for peers lately.
    pub(super) renamed: Renamed,
    /// Paths of this node that could not be looked at.
    pub(super) unread: Unread,
    /// The share's filesystem could not be synced: not before this moment again.
    sync_again: Option<(Instant, ApplyError)>,
    /// Who waits, since when, for everything to be looked at that was dirty then.
    barriers: VecDeque<Barrier>,
    /// Everything in the tree was looked at once.
    pub(super) compared: bool,
    /// Files that the first comparison found with an older content than before.
    pub(super) went_back: u64,
    idle_since: Instant,
    trimmed: bool,
    /// What this node cannot have and has said so.
    pub(super) said: FxHashSet<Box<str>>,
}

/// Goes on where the index ends, or after the number `at_least`.
fn author_of(meta: &Meta, at_least: u64) -> Author {
    let mut author = Author::new(meta.replica, meta.head.max(at_least), Some(meta.stamp), None);
    if let Some(stamp) = meta.forgotten {
        author.forgets(stamp);
    }
    author
}

/// What is on the disk now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Synced {
    Everything,
    /// What was done for peers; the filesystem as a whole could not be synced.
    WhatWasDone,
}

/// How far a connection's rows have come.
pub(super) struct Delivered {
    pub(super) inbound: Arc<Inbound>,
    /// Everything up to here was received and decided.
    pub(super) upto: u64,
    /// What was acknowledged last.
    pub(super) acked: u64,
    /// Rows of it are being decided and applied, and are not in `pending`
    /// meanwhile: how far it is applied is not known until that is done.
    pub(super) in_hand: bool,
    pub(super) told: (u64, Option<String>),
    /// It was asked to begin again: what comes until it does comes once more.
    pub(super) deaf: bool,
}

impl Keeper {
    pub fn new(
        share: Arc<Share>,
        inputs: mpsc::Receiver<Input>,
        stop: watch::Receiver<bool>,
        runtime: tokio::runtime::Handle,
    ) -> Keeper {
        let mut meta = share.index.meta();
        if share.first_contact {
            // What is found now need not win over forgotten deletions: it is as
            // old as it is.
            meta.forgotten = None;
        }
        Keeper {
            author: author_of(&meta, share.opening.began_at),
            origins: Origins::new(),
            share,
            inputs,
            next: None,
            stop,
            runtime,
            unsynced: Unsynced::default(),
            cursors_since: None,
            inbounds: Vec::new(),
            pending: FxHashMap::default(),
            renamed: Renamed::default(),
            unread: Unread::default(),
            sync_again: None,
            barriers: VecDeque::new(),
            compared: false,
            went_back: 0,
            idle_since: Instant::now(),
            trimmed: false,
            said: FxHashSet::default(),
        }
    }

    pub fn share(&self) -> Arc<Share> {
        Arc::clone(&self.share)
    }

    /// Runs until told to stop. An error stops the share, not the daemon.
    pub fn run(mut self) {
        if self.share.stopped().is_some() {
            return;
        }
        let result = loop {
            match self.step() {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let result = result.and_then(|()| self.flush());
        if !self.unsynced.is_empty() {
            // What is not on the disk must not be in the index after a restart.
            self.share.index.freeze();
        }
        if let Err(error) = result {
            self.share.stop_because(&error);
        }
    }

    /// One round; false when it is time to end.
    fn step(&mut self) -> anyhow::Result<bool> {
        let force = !self.barriers.is_empty();
        let mut busy = self.local_pass(force)?;
        if !self.compared && self.has_looked_at_all_found() {
            self.now_compared()?;
        }
        self.answer_barriers()?;
        while let Some(input) = self.next_input() {
            busy = true;
            self.take(input)?;
            if !self.share.dirty().is_empty() {
                break;
            }
        }
        for (path, dirt) in self.unread.due(Instant::now()) {
            self.share
                .dirty()
                .put_back(path, dirt, Duration::ZERO, Instant::now());
            busy = true;
        }
        busy |= self.retry()?;
        if self
            .unsynced
            .since()
            .is_some_and(|since| !busy || since.elapsed() > FLUSH_AFTER)
            && self.may_sync()
        {
            self.flush()?;
            busy = true;
        }
        if !busy && let Some(since) = self.cursors_since.filter(|_| self.unsynced.is_empty()) {
            match since.elapsed() < CURSORS_AFTER {
                // All that is before them is on the disk.
                true => self.acknowledge(),
                false => self.flush()?,
            }
        }
        self.publish();
        if self.unsynced.is_empty() && self.unread.is_empty() {
            self.share.has_kept_up(self.share.index.meta().head);
        }
        if busy {
            self.idle_since = Instant::now();
            self.trimmed = false;
            return Ok(!*self.stop.borrow());
        }
        self.wait()
    }

    /// Whether all that the comparisons have found is in the index. What users have
    /// changed since is not theirs: on a busy share there is always something.
    fn has_looked_at_all_found(&self) -> bool {
        let handed_over = self.share.handed_over();
        handed_over.is_some_and(|moment| !self.share.dirty().has_at_rest_from_before(moment))
    }

    /// Everything in the tree has been looked at once since the start.
    fn now_compared(&mut self) -> anyhow::Result<()> {
        self.compared = true;
        let meta = self.share.index.meta();
        if let Some(stamp) = meta.forgotten {
            self.author.forgets(stamp);
        }
        if self.share.is_first_comparison() {
            self.share.index.write(|w| {
                w.set_comparing(false);
                Ok(((), Durable::Later))
            })?;
            crash::here(Point::Compared);
            // With what is made durable next; what peers sent may not be yet.
            self.cursors_since.get_or_insert_with(Instant::now);
        }
        self.share.compared_at.store(meta.head, Ordering::Release);
        self.say_what_went_back();
        // What the comparison needed is given back as well, once there is nothing to do.
        (self.idle_since, self.trimmed) = (Instant::now(), false);
        Ok(())
    }

    /// Tells the operator of a tree that was restored beneath its index.
    fn say_what_went_back(&self) {
        if self.went_back >= WENT_BACK_MIN {
            tracing::warn!(
                share = %self.share.name,
                "{} files have older contents than when omirr last saw them: if the tree was restored from a backup, \
                 this counts as a change made here, and the peers get the older contents, too",
                self.went_back
            );
        }
    }

    /// Answers those before whom everything has been looked at that was dirty
    /// when they came. What users do meanwhile is not theirs to wait for: on a
    /// busy share there is always something.
    fn answer_barriers(&mut self) -> anyhow::Result<()> {
        if let Some(handed_over) = self.share.handed_over() {
            for barrier in self.barriers.iter_mut().filter(|barrier| barrier.comparing) {
                barrier.since = barrier.since.max(handed_over);
                barrier.comparing = false;
            }
        }
        let Some(front) = self.barriers.front() else {
            return Ok(());
        };
        if !self.has_looked(front) {
            return Ok(());
        }
        // Conflict copies of what was applied are rows of this node's own.
        self.flush()?;
        if !self.unsynced.is_empty() {
            return Ok(());
        }
        while let Some(barrier) = self.barriers.pop_front() {
            if !self.has_looked(&barrier) {
                self.barriers.push_front(barrier);
                break;
            }
            // Whoever asked may have given up.
            let _ = barrier.done.send(*self.share.head.borrow());
        }
        Ok(())
    }

    /// Whether everything that was dirty then, or was found by a comparison that went on
    /// then, is in the index.
    fn has_looked(&self, barrier: &Barrier) -> bool {
        self.unread.is_empty()
            && self.share.has_compared()
            && !barrier.comparing
            && !self.share.dirty().has_from_before(barrier.since)
    }

    /// Whether it is not yet too early for another try to sync.
    fn may_sync(&self) -> bool {
        self.sync_again
            .as_ref()
            .is_none_or(|(again, _)| *again <= Instant::now())
    }

    /// Brings what was done in the tree to the disk. Until that succeeds, the
    /// rows that say so must not become durable, so nothing else may either.
    /// Returns how much was brought there.
    pub(super) fn sync_done(&mut self) -> Result<Synced, ApplyError> {
        if let Some((_, error)) = self.sync_again.as_ref().filter(|_| !self.may_sync()) {
            return Err(error.clone());
        }
        let synced = apply::sync_all(&self.share.root).map(|()| Synced::Everything);
        let synced = synced.or_else(|error| {
            let paths = self.unsynced.paths().ok_or_else(|| error.clone())?;
            let folders: Vec<RelPath> = paths
                .iter()
                .map(|path| path.parent().unwrap_or_else(RelPath::root))
                .collect();
            match apply::sync_each(&self.share.root.batch(), &paths, &folders, &self.runtime)? {
                true => Ok(Synced::WhatWasDone),
                false => Err(error),
            }
        });
        match &synced {
            Ok(_) => {
                self.unsynced.is_on_disk();
                if self.sync_again.take().is_some() {
                    tracing::info!(share = %self.share.name, "the filesystem can be synced again");
                }
            }
            Err(error) => {
                if self.sync_again.is_none() {
                    tracing::error!(share = %self.share.name, "nothing is acknowledged until this is mended: {error}");
                }
                self.sync_again = Some((Instant::now() + RETRY_AFTER, error.clone()));
            }
        }
        synced
    }

    fn next_input(&mut self) -> Option<Input> {
        self.next.take().or_else(|| self.inputs.try_recv().ok())
    }

    /// Applies what has come from peers since the last time, each connection's
    /// rows together: the further behind this node is, the more rows share a
    /// sync and a commit.
    fn receive(&mut self, first: Input) -> anyhow::Result<()> {
        let mut groups: Vec<Group> = Vec::new();
        let mut input = Some(first);
        while let Some(next) = input {
            match next {
                // The next connection brings it again. What waits for this one
                // must not be touched: it holds the cursor back.
                Input::Batch { inbound, .. } | Input::Content { inbound, .. }
                    if Self::is_closed(&inbound) => {}
                Input::Batch { inbound, .. } if self.delivered(&inbound).deaf => {}
                Input::Batch {
                    inbound,
                    upto,
                    rows,
                    held,
                } => {
                    self.delivered(&inbound).in_hand = true;
                    let group = Group::of(&mut groups, inbound);
                    group.upto = Some(upto);
                    self.take_rows(group, rows);
                    drop(held);
                }
                Input::Content {
                    inbound,
                    path,
                    seq,
                    outcome,
                } => {
                    self.delivered(&inbound).in_hand = true;
                    let group = Group::of(&mut groups, inbound);
                    self.take_content(group, &path, seq, outcome);
                }
                other => {
                    self.next = Some(other);
                    break;
                }
            }
            if groups.iter().map(Group::len).sum::<usize>() >= apply::staged_max().min(GROUP_ROWS) {
                break;
            }
            input = self.next_input();
        }
        for group in groups {
            self.apply_group(group)?;
        }
        Ok(())
    }

    fn take(&mut self, input: Input) -> anyhow::Result<()> {
        match input {
            Input::Batch { .. } | Input::Content { .. } => self.receive(input)?,
            Input::Closed { inbound } => {
                self.inbounds
                    .retain(|delivered| !Arc::ptr_eq(&delivered.inbound, &inbound));
                self.pending
                    .retain(|_, pending| !Arc::ptr_eq(&pending.inbound, &inbound));
            }
            Input::Again { inbound } => {
                if !Self::is_closed(&inbound) {
                    self.delivered(&inbound).deaf = false;
                }
            }
            Input::Barrier(done) => {
                self.unread.hurry(Instant::now());
                let comparing = self.share.handed_over().is_none();
                self.barriers.push_back(Barrier {
                    since: Instant::now(),
                    comparing,
                    done,
                });
            }
            // Several peers may ask for it at once.
            Input::Renew(_) if self.share.index.meta().replica != self.share.opening.replica => {}
            Input::Renew(gap) => {
                self.flush()?;
                if !self.unsynced.is_empty() {
                    // The peer comes again.
                    return Ok(());
                }
                self.renew(gap)?;
            }
            Input::Names(names) => {
                let known = self.share.index.meta().names;
                let new: Vec<_> = names
                    .into_iter()
                    .filter(|name| !known.iter().any(|k| k.0 == name.0))
                    .take(NAMES_MAX.saturating_sub(known.len()))
                    .collect();
                if !new.is_empty() {
                    self.share.index.write(|w| {
                        w.meta().names.extend(new);
                        Ok(((), Durable::Later))
                    })?;
                    crash::here(Point::NamesNoted);
                }
            }
        }
        Ok(())
    }

    /// Gives the index, which was set back, another number, and makes again what
    /// was made since under the old one.
    fn renew(&mut self, gap: Gap) -> anyhow::Result<()> {
        let share = Arc::clone(&self.share);
        let replica = ReplicaId(crate::index::random_u64());
        let meta = Meta {
            replica,
            ..share.index.meta()
        };
        let mut author = author_of(&meta, self.author.seq());
        let reader = share.index.read()?;
        share.index.write(|w| {
            let meta = w.meta();
            meta.replica = replica;
            meta.names.push((replica, share.node.clone()));
            let mut from = gap.upto;
            loop {
                let rows = reader.after(from, RENEWED_ROWS)?;
                let Some((_, last)) = rows.last() else { break };
                from = last.seq;
                for (path, record) in rows {
                    if let Some((seq, row)) = share.opening.made_again(&record.row, gap, &mut author) {
                        w.put(&path, &Record { seq, row, ..record })?;
                    }
                }
            }
            Ok(((), Durable::Yes))
        })?;
        self.author = author;
        self.durable_now();
        if share.is_first_comparison() {
            // It takes rows with new numbers for such as were made since it began.
            share.ask_rescan();
        }
        Ok(())
    }

    /// Makes everything applied so far durable, then acknowledges it; does
    /// neither, and leaves `unsynced` as it is, if it cannot be synced.
    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        if !self.unsynced.is_empty() && self.sync_done().is_err() {
            return Ok(());
        }
        if !self.unsynced.is_empty() || self.cursors_since.is_some() {
            self.unsynced.clear();
            self.cursors_since = None;
            let cursors = self.cursors();
            self.share.index.write(|w| {
                for (place, replica, cursor) in &cursors {
                    let peer = &mut w.meta().peers[*place as usize];
                    peer.replica = *replica;
                    peer.cursor = *cursor;
                }
                Ok(((), Durable::Yes))
            })?;
            crash::here(Point::CursorsDurable);
            self.share.redos.forget_used();
        }
        self.durable_now();
        Ok(())
    }

    /// Per connection: how far everything is applied.
    pub(super) fn cursors(&self) -> Vec<(u32, ReplicaId, u64)> {
        self.inbounds
            .iter()
            .map(|delivered| {
                (
                    delivered.inbound.place,
                    delivered.inbound.replica,
                    self.applied(delivered),
                )
            })
            .collect()
    }

    /// The sequence number before the first row that waits, or that one which waits
    /// has taken the place of.
    fn applied(&self, delivered: &Delivered) -> u64 {
        if delivered.in_hand {
            return delivered.acked;
        }
        self.pending
            .values()
            .filter(|pending| Arc::ptr_eq(&pending.inbound, &delivered.inbound))
            .map(|pending| pending.tries.oldest(pending.row.seq) - 1)
            .min()
            .map_or(delivered.upto, |before| before.min(delivered.upto))
    }

    /// After a durable commit: senders may go on, peers hear of their rows.
    pub(super) fn durable_now(&mut self) {
        let head = self.share.index.durable_head();
        if self.unsynced.is_empty() {
            self.acknowledge();
        }
        self.share.head.send_if_modified(|durable| {
            let more = head > *durable;
            *durable = head;
            more
        });
    }

    fn acknowledge(&mut self) {
        let head = self.share.index.meta().head;
        let applied: Vec<u64> = self
            .inbounds
            .iter()
            .map(|delivered| self.applied(delivered))
            .collect();
        for (delivered, durable) in self.inbounds.iter_mut().zip(applied) {
            let mine = self
                .pending
                .values()
                .filter(|p| Arc::ptr_eq(&p.inbound, &delivered.inbound));
            let mut count = 0;
            let mut reason: Option<(&RelPath, &String)> = None;
            for pending in mine {
                count += 1;
                // The same one each time.
                let here = pending.tries.reason.as_ref().map(|why| (&pending.row.path, why));
                reason = match (reason, here) {
                    (Some(first), Some(here)) => Some(here.min(first)),
                    (first, here) => first.or(here),
                };
            }
            let reason = reason.map(|(path, why)| format!("{path}: {why}"));
            let told = (count, reason.clone());
            if durable > delivered.acked || told != delivered.told {
                delivered.acked = durable;
                delivered.told = told;
                // A closed connection needs no acknowledgement.
                let _ = delivered.inbound.commands.send(Command::Ack {
                    durable,
                    pending: count,
                    reason,
                    head,
                });
                crash::here(Point::Acknowledged);
            }
        }
    }

    /// Shows `status` where things stand.
    fn publish(&self) {
        let mut progress = self.share.progress.lock();
        progress.pending = (self.pending.len() + self.unread.len()) as u64;
        progress.unread = self
            .unread
            .reasons()
            .next()
            .map(|(_, why)| (self.unread.len() as u64, why.to_owned()));
        progress.unsettled = !self.unsynced.is_empty();
        let own = self.unread.reasons().map(|(path, why)| Waiting {
            path: path.to_string(),
            peer: self.share.node.clone(),
            reason: why.to_owned(),
        });
        let others = self.pending.values().filter_map(|pending| {
            Some(Waiting {
                path: pending.row.path.to_string(),
                peer: pending.inbound.peer.clone(),
                reason: pending.tries.reason.clone()?,
            })
        });
        progress.waiting = own.chain(others).take(WAITING_SHOWN).collect();
    }

    /// Sleeps until there is something to do; false when it is time to end.
    fn wait(&mut self) -> anyhow::Result<bool> {
        if *self.stop.borrow() {
            return Ok(false);
        }
        if self.idle_since.elapsed() >= IDLE_AFTER && self.sweep()? {
            return Ok(true);
        }
        if !self.trimmed && self.idle_since.elapsed() >= IDLE_AFTER {
            self.share.recent.clear();
            super::memory::give_back();
            self.trimmed = true;
        }
        let now = Instant::now();
        let mut until = now
            + if self.trimmed {
                Duration::from_secs(10)
            } else {
                IDLE_AFTER
            };
        if let Some(due) = self.share.dirty().next_due() {
            until = until.min(due);
        }
        if let Some(due) = self.pending.values().filter_map(|pending| pending.again).min() {
            until = until.min(due);
        }
        if let Some(due) = self.unread.next_due() {
            until = until.min(due);
        }
        if let Some(since) = self.cursors_since.filter(|_| self.unsynced.is_empty()) {
            until = until.min(since + CURSORS_AFTER);
        }
        if let Some((again, _)) = self.sync_again.as_ref().filter(|_| !self.unsynced.is_empty()) {
            until = until.min(*again);
        }
        let first = async {
            tokio::select! {
                biased;
                _ = self.stop.wait_for(|stop| *stop) => None,
                input = self.inputs.recv() => input,
                () = self.share.wake.notified() => None,
            }
        };
        self.share.keeper_rests.store(true, Ordering::Relaxed);
        let input = until::done_or(until, first).flatten();
        self.share.keeper_rests.store(false, Ordering::Relaxed);
        if let Some(input) = input {
            self.idle_since = Instant::now();
            self.trimmed = false;
            self.take(input)?;
        }
        if let Err(reason) = self.share.root.still_there() {
            anyhow::bail!(reason);
        }
        Ok(!*self.stop.borrow())
    }

    pub(super) fn delivered(&mut self, inbound: &Arc<Inbound>) -> &mut Delivered {
        let at = self
            .inbounds
            .iter()
            .position(|delivered| Arc::ptr_eq(&delivered.inbound, inbound));
        let at = at.unwrap_or_else(|| {
            let state = &self.share.index.meta().peers[inbound.place as usize];
            let cursor = if state.replica == inbound.replica {
                state.cursor
            } else {
                0
            };
            self.inbounds.push(Delivered {
                inbound: Arc::clone(inbound),
                upto: cursor,
                acked: cursor,
                in_hand: false,
                told: (0, None),
                deaf: false,
            });
            self.inbounds.len() - 1
        });
        &mut self.inbounds[at]
    }

    pub(super) fn is_closed(inbound: &Inbound) -> bool {
        inbound.closed.load(Ordering::Acquire)
    }
}
