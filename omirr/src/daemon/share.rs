//! What the tasks of one share have in common.
//!
//! The keeper (see `keeper`) is the only one that writes the index and the
//! tree; everyone else reads the index in snapshots, adds to the dirty set, or
//! sends the keeper an [`Input`].

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::belt::Belt;
use super::budget::{Budget, Held};
use super::claim::Claims;
use super::dirty::{Beneath, DirtySet, Hint};
use super::journal::Journal;
use super::recent::Recent;
use super::recovered::Recovering;
use super::trust::Trust;
use super::unchanged::Unchanged;
use crate::apply::{ApplyError, Ready, Redos, ShareRoot};
use crate::config::Excludes;
use crate::engine::{Marks, Offset, Opening, Policy, Reached};
use crate::index::{Index, IndexError};
use crate::model::{Entry, Gap, Mode, RelPath, ReplicaId};
use crate::resolve::Resolver;
use crate::resolve::fallback::Locator;
use crate::source::{KeptUp, Source};
use crate::wire::WireRow;

/// What the keeper is asked to do.
pub enum Input {
    /// Rows from a peer.
    Batch {
        inbound: Arc<Inbound>,
        upto: u64,
        rows: Vec<Arrival>,
        /// Given back when the keeper has taken them.
        held: Held,
    },
    /// Content that was asked for has arrived, or could not be had.
    Content {
        inbound: Arc<Inbound>,
        path: RelPath,
        seq: u64,
        outcome: Result<Fetched, String>,
    },
    /// A connection has ended: what waited for it is forgotten, the peer sends
    /// it again.
    Closed { inbound: Arc<Inbound> },
    /// A peer that was asked to begin again does so.
    Again { inbound: Arc<Inbound> },
    /// Look at everything that is dirty; answer with the durable head after it.
    Barrier(oneshot::Sender<u64>),
    /// A peer has rows of this index that the index itself no longer has: it
    /// was restored from a copy and must not number its rows as before. Done
    /// once: no copy of an index is put in place while it is in use, so there
    /// are no lost rows of a replica that began meanwhile. The lost rows had
    /// numbers within the gap.
    Renew(Gap),
    /// Names of nodes that a peer knows.
    Names(Vec<(ReplicaId, String)>),
}

/// A row that a peer sent, with its content if that is here.
pub struct Arrival {
    pub row: WireRow,
    /// The row's content with the row's attributes, waiting for its name.
    pub ready: Option<Ready>,
    pub tries: Tries,
}

/// What came of a row so far, while it waits.
#[derive(Clone, Debug, Default)]
pub struct Tries {
    /// How often it was found that the disk is not what the index says.
    pub changed: u32,
    /// How often its content was sent in vain.
    pub transfers: u32,
    /// What was wrong the last time: shown until it has been tried again.
    pub reason: Option<String>,
    /// The number of the oldest row of this path whose place this one has taken
    /// before that was applied.
    pub replaces: Option<u64>,
}

impl Tries {
    /// Takes the place of a row with number `seq` that was not applied.
    pub fn replace(&mut self, seq: u64, tries: &Tries) {
        let oldest = tries.oldest(seq);
        self.replaces = Some(self.replaces.map_or(oldest, |own| own.min(oldest)));
    }

    /// The number of the oldest row that the row with number `seq` stands for: until
    /// this is applied, the peer's rows up to there are not.
    pub fn oldest(&self, seq: u64) -> u64 {
        self.replaces.map_or(seq, |oldest| oldest.min(seq))
    }

    /// Whether it was tried before.
    pub fn any(&self) -> bool {
        self.changed > 0 || self.transfers > 0 || self.reason.is_some()
    }
}

/// Content that was asked for.
pub enum Fetched {
    /// In a file without a name, with the row's attributes.
    Staged(Ready),
    /// Little enough to be handed over as if it had come with its row.
    Whole(Bytes),
}

/// A connection over which a peer sends its rows.
pub struct Inbound {
    pub peer: String,
    /// The peer's place in the index' table.
    pub place: u32,
    /// The peer's index.
    pub replica: ReplicaId,
    pub commands: mpsc::UnboundedSender<Command>,
    pub closed: AtomicBool,
}

/// What the keeper wants said on such a connection.
#[derive(Debug)]
pub enum Command {
    Want {
        path: RelPath,
        seq: u64,
        /// A file's.
        entry: Entry,
        /// Where this node may have most of the content, best first.
        bases: Vec<RelPath>,
        /// Whether to ask for what differs from the file at the path; it did not
        /// work out the last time.
        compare: bool,
    },
    Ack {
        durable: u64,
        pending: u64,
        reason: Option<String>,
        /// This index' head.
        head: u64,
    },
    /// Begin again after number `after`, and send the rows of directories' moves
    /// up to number `upto` one by one.
    Plain { after: u64, upto: u64 },
}

/// The outgoing side of a peer, as `status` and `wait` see it.
pub struct Link {
    pub peer: String,
    pub address: String,
    pub key: [u8; 32],
    /// The peer's place in the index' table.
    pub place: u32,
    /// Which way the share's changes go.
    pub mode: Mode,
    /// What the peer may let this node hold.
    pub budget: Budget,
    /// What the peer has acknowledged of this node's rows, and up to where it has
    /// everything: see [`Reached`].
    pub reached: watch::Sender<Reached>,
    /// Which of this node's tombstones the peer is past.
    pub marks: Mutex<Marks>,
    pub state: Mutex<LinkState>,
    /// How far the peer's clock is from this node's, when last asked.
    pub clock: Mutex<Option<Offset>>,
    /// The peer has just been heard of: no reason to wait before dialling it.
    pub alive: Notify,
    /// Who sends its rows here in the peer's name.
    pub claims: Arc<Claims>,
}

#[derive(Clone, Debug, Default)]
pub struct LinkState {
    pub connected: bool,
    /// Rows that wait at the peer, and why.
    pub pending: u64,
    pub last_error: Option<String>,
}

/// An entry that could not be applied yet.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Waiting {
    pub path: String,
    pub peer: String,
    pub reason: String,
}

#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Tree and index have been compared, as often as was asked for.
    pub scanned: bool,
    /// A comparison is asked for and has not begun.
    pub scan_asked: bool,
    /// What was recovered is still to be turned into dirty paths.
    pub recovering: bool,
    /// When the last comparison, or the last search for what was recovered, had added
    /// all that it found to the dirty set.
    pub handed_over: Option<Instant>,
    /// Entries that the running scan has seen.
    pub scan_seen: u64,
    /// Why the share no longer takes part.
    pub stopped: Option<String>,
    /// Whether that may come right by itself: see `again`.
    pub stopped_for_now: bool,
    /// Rows received but not applied, and paths of this node that cannot be looked at.
    pub pending: u64,
    /// How many of those are this node's own, and what is wrong with the first.
    pub unread: Option<(u64, String)>,
    /// The first of them.
    pub waiting: Vec<Waiting>,
    /// Received rows that are applied but not yet durable.
    pub unsettled: bool,
}

pub struct Share {
    pub name: String,
    /// This node's name.
    pub node: String,
    pub root: ShareRoot,
    pub index: Index,
    pub excludes: Excludes,
    pub policy: Policy,
    pub links: Vec<Arc<Link>>,
    /// The index knew nothing of the tree when it was opened, or little that
    /// could be believed: what is found first is dated by its content.
    pub first_contact: bool,
    /// The head when everything in the tree had been looked at once since the
    /// start; `u64::MAX` before.
    pub compared_at: AtomicU64,
    /// What the index was when it was opened; see [`Input::Renew`].
    pub opening: Opening,
    /// What is noted of contents that are written over others.
    pub redos: Arc<Redos>,
    dirty: Mutex<DirtySet>,
    /// Wakes the keeper after `dirty` has got its first path.
    pub wake: Notify,
    pub resolver: Mutex<Resolver>,
    pub recent: Recent,
    pub unchanged: Unchanged,
    /// The sequence up to which rows are on disk: senders go no further.
    pub head: watch::Sender<u64>,
    pub inputs: mpsc::Sender<Input>,
    pub progress: Mutex<Progress>,
    /// A scan is asked for; the scanner clears it.
    pub rescan: Notify,
    /// What could not be told one by one, to be found by the scanner.
    pub recovered: Mutex<Recovering>,
    pub recovery: Notify,
    /// What was handed over and is not yet in the index, where the source goes
    /// on without the daemon.
    pub journal: Mutex<Option<Journal>>,
    /// Where changes come from; it outlives the share's tasks.
    pub source: OnceLock<Weak<dyn Source>>,
    pub keeping: OnceLock<Keeping>,
    pub locator: OnceLock<Arc<Locator>>,
    /// The keeper has nothing to do at this moment, or waits before another try.
    pub keeper_rests: AtomicBool,
    pub trust: Mutex<Trust>,
    pub belt: Belt,
    /// A scan is due where only scans find changes; the scanner clears it.
    pub routine: Notify,
    pub figures: Figures,
}

impl Progress {
    /// See [`Share::has_compared`].
    fn has_compared(&self) -> bool {
        self.scanned && !self.recovering
    }
}

/// The source remembers how far this share's index has kept up, and what changed
/// since, should the daemon end.
pub struct Keeping {
    /// The share's place among its watches.
    pub watch: usize,
    /// Names the index and what of the tree it shall have.
    pub identity: u64,
    /// What the source was told last.
    pub told: Mutex<Option<u64>>,
}

impl Keeping {
    /// Tells the source, if it is news.
    fn tell(&self, source: Option<Arc<dyn Source>>, head: Option<u64>) {
        let mut told = self.told.lock();
        let Some(source) = source.filter(|_| *told != head) else {
            return;
        };
        let kept_up = head.map(|head| KeptUp {
            replica: self.identity,
            head,
        });
        match source.set_kept_up(self.watch, kept_up) {
            Ok(()) => *told = head,
            Err(error) => tracing::error!("the event source cannot be told how far the index is: {error:#}"),
        }
    }
}

/// What is counted for `stats`.
#[derive(Default)]
pub struct Figures {
    pub resolved: AtomicU64,
    pub unresolved: AtomicU64,
    pub lost: AtomicU64,
    /// When events were last lost, ms since 1970; 0 for never.
    pub lost_at_ms: AtomicU64,
    pub rescans: AtomicU64,
    pub rows_made: AtomicU64,
    pub rows_applied: AtomicU64,
    pub content_sent_bytes: AtomicU64,
    pub content_received_bytes: AtomicU64,
    /// Microseconds from a path's first change to its row, lately.
    pub row_delays: Mutex<Vec<u32>>,
}

impl Figures {
    pub fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }

    /// Keeps the last few thousand delays for the percentiles.
    pub fn delay(&self, since: Instant) {
        const KEPT: usize = 4096;
        let micros = u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX);
        let mut delays = self.row_delays.lock();
        if delays.len() >= KEPT {
            delays.drain(..KEPT / 2);
        }
        delays.push(micros);
    }
}

/// What a share is made of; see the fields of [`Share`].
pub struct Parts {
    pub name: String,
    pub node: String,
    pub root: ShareRoot,
    pub index: Index,
    pub excludes: Excludes,
    pub policy: Policy,
    pub links: Vec<Arc<Link>>,
    pub first_contact: bool,
    pub opening: Opening,
    pub redos: Arc<Redos>,
}

impl Share {
    pub fn new(parts: Parts) -> (Arc<Share>, mpsc::Receiver<Input>) {
        // Some batches may wait, their contents staged, to be applied together;
        // after that the peer's connection waits.
        let (inputs, receiver) = mpsc::channel(16);
        let meta = parts.index.meta();
        let head = meta.head;
        let resolver = Mutex::new(Resolver::new(parts.root.ino()));
        let share = Share {
            name: parts.name,
            node: parts.node,
            root: parts.root,
            index: parts.index,
            excludes: parts.excludes,
            policy: parts.policy,
            links: parts.links,
            first_contact: parts.first_contact,
            compared_at: AtomicU64::new(u64::MAX),
            opening: parts.opening,
            redos: parts.redos,
            dirty: Mutex::default(),
            wake: Notify::new(),
            resolver,
            recent: Recent::new(),
            unchanged: Unchanged::new(),
            head: watch::Sender::new(head),
            inputs,
            progress: Mutex::default(),
            rescan: Notify::new(),
            recovered: Mutex::default(),
            recovery: Notify::new(),
            journal: Mutex::default(),
            source: OnceLock::new(),
            keeping: OnceLock::new(),
            locator: OnceLock::new(),
            keeper_rests: AtomicBool::new(false),
            trust: Mutex::default(),
            belt: Belt::new(),
            routine: Notify::new(),
            figures: Figures::default(),
        };
        (Arc::new(share), receiver)
    }

    /// Marks paths to be looked at.
    pub fn touch(&self, paths: impl IntoIterator<Item = (RelPath, Hint)>) {
        let sooner = self.dirty.lock().arrive(paths, Instant::now());
        if sooner {
            self.wake.notify_one();
        }
    }

    fn source(&self) -> Option<Arc<dyn Source>> {
        self.source.get().and_then(Weak::upgrade)
    }

    /// Waits until everything that the kernel has told by now is in the dirty set;
    /// false if it cannot be known in time. Not for whoever holds a lock.
    pub fn hear_all(&self) -> bool {
        /// Longer than any pass of a reader that keeps up.
        const WITHIN: Duration = Duration::from_secs(1);
        let heard = self.source().map(|source| source.hand_over(WITHIN));
        heard.is_some_and(|heard| {
            heard
                .inspect_err(|error| tracing::debug!(share = %self.name, "{error:#}"))
                .is_ok()
        })
    }

    /// Asks for a comparison of the tree with the index; until it has ended, the
    /// index has not kept up.
    pub fn ask_rescan(&self) {
        if let Some(keeping) = self.keeping.get() {
            keeping.tell(self.source(), None);
        }
        {
            let mut progress = self.progress.lock();
            progress.scanned = false;
            progress.scan_asked = true;
        }
        self.rescan.notify_one();
    }

    /// Leaves what was recovered to the scanner.
    pub fn ask_recovery(&self, add: impl FnOnce(&mut Recovering)) {
        add(&mut self.recovered.lock());
        self.progress.lock().recovering = true;
        self.recovery.notify_one();
    }

    /// Whether everything that was ever told is a dirty path or in the index.
    pub fn has_compared(&self) -> bool {
        self.progress.lock().has_compared()
    }

    /// The same, with when the last of what a comparison found had become dirty: until
    /// that is looked at, it is not in the index.
    pub fn handed_over(&self) -> Option<Instant> {
        let progress = self.progress.lock();
        progress.handed_over.filter(|_| progress.has_compared())
    }

    /// Whether not everything in the tree has been looked at once, by this run or one
    /// before it.
    pub fn is_first_comparison(&self) -> bool {
        self.first_contact && self.compared_at.load(Ordering::Acquire) == u64::MAX
    }

    /// Who sees to what lies beneath directories of which nothing is known. While the
    /// first comparison finds them, the keeper walks only what was renamed.
    pub fn sees_to_what_lies_beneath(&self) -> Beneath {
        match self.is_first_comparison() && !self.progress.lock().scanned {
            true => Beneath::Compared,
            false => Beneath::Walk,
        }
    }

    /// The index is durable up to `head`, and has everything that was taken out
    /// of the dirty set: forgets what was noted for the case of a kill. For the
    /// keeper only.
    pub fn has_kept_up(&self, head: u64) {
        let Some(keeping) = self.keeping.get() else { return };
        // Whoever holds it is noting something; there will be another time.
        let Some(mut journal) = self.journal.try_lock() else {
            return;
        };
        let Some(journal) = journal.as_mut() else { return };
        if !self.has_compared() {
            return;
        }
        let mut dirty = self.dirty.lock();
        if dirty.is_empty() || keeping.told.lock().is_some() {
            keeping.tell(self.source(), Some(head));
        }
        let done = journal.has_kept_up(&mut dirty);
        if let Err(error) = done {
            tracing::error!(share = %self.name, "the journal of changes cannot be emptied: {error}");
        }
    }

    pub fn dirty(&self) -> parking_lot::MutexGuard<'_, DirtySet> {
        self.dirty.lock()
    }

    pub fn is_excluded(&self, path: &RelPath, is_dir: bool) -> bool {
        !path.is_root() && self.excludes.is_excluded(path, is_dir)
    }

    pub fn link_of(&self, key: &[u8; 32]) -> Option<&Arc<Link>> {
        self.links.iter().find(|link| link.key == *key)
    }

    /// Ends the share's part in the mirror; the daemon and its other shares go on.
    pub fn stop(&self, reason: String) {
        let mut progress = self.progress.lock();
        if progress.stopped.is_none() {
            tracing::error!(share = %self.name, "the share is stopped: {reason}");
            progress.stopped = Some(reason);
        }
    }

    /// Ends it because of something that failed; for now only, if that was the
    /// disk's refusal to be written.
    pub fn stop_because(&self, error: &anyhow::Error) {
        if is_passing(error) {
            self.stop(format!(
                "{error:#}; nothing is lost or acknowledged by that, and it starts again by itself when it can be \
                 written to"
            ));
            self.progress.lock().stopped_for_now = true;
        } else {
            self.stop(format!("{error:#}"));
        }
    }

    pub fn stopped(&self) -> Option<String> {
        self.progress.lock().stopped.clone()
    }
}

/// Whether something failed that may come right by itself: a full disk, say.
pub fn is_passing(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let index = cause.downcast_ref::<IndexError>().map(IndexError::is_passing);
        let tree = cause.downcast_ref::<ApplyError>().map(ApplyError::is_transient);
        index.or(tree).unwrap_or(false)
    })
}
