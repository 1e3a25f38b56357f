//! The thread that empties the ring.
//!
//! In: records, from the BPF ring (one, in order) or from the perf buffers
//! (one per processor, put in order of their times). Out: batches into the
//! sink, a word of loss when the programs counted one, and the time up to which
//! everything has been handed over, which barriers wait for. What leaves the ring
//! or a map was noted with the sink before: the process may be killed at any
//! time. It never stops before a ring is empty, and never waits for anything but
//! the rings.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aya::maps::{
    MapData, RingBuf,
    perf::{PerfEvent, PerfEventArrayBuffer},
};
use omirr_common::dirty::{Dirty, DirtyKey};
use omirr_common::event::{FrameKey, HEADER_BYTES, TO_OFFSET, flag, op};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::{
    COMPARE_EVERY, EbpfError,
    decode::{Decoded, decode},
    load::{LoadError, Loaded, Maps, WatchedDevice, chain, perf_pages},
    take::{Undisturbed, ops},
    told::{extents, written},
};
use crate::source::{Op, Recoverable, Recovered, Signal, Sink, now_ns};

/// How long the thread sleeps when nothing comes; then it looks at the
/// counters, because a loss may be the last thing that happened.
const IDLE: Duration = Duration::from_millis(250);
/// A record of another processor may take this long from its time stamp to
/// its buffer; younger ones are kept back until then.
const REORDER: Duration = Duration::from_millis(1);
/// Events per call of the sink.
const BATCH: usize = 4096;
/// An operation that has not ended after this long may have lost its exit: the
/// number of return probes that can be pending is limited.
const OVERDUE: Duration = Duration::from_secs(2);

/// After reading, the thread lets changes gather for so long, and asks not to be
/// woken meanwhile: the first change after a rest is handed over at once, and
/// what follows it in a hurry costs its writer no wake-up.
const GATHER_MIN: Duration = Duration::from_micros(500);
const GATHER_MAX: Duration = Duration::from_millis(8);

/// What the reader's thread and the source share.
pub(super) struct Shared {
    stop: AtomicBool,
    waiting: AtomicU32,
    /// Of these, those who wait for operations under way as well.
    waiting_for_all: AtomicU32,
    /// Everything that was sent before this time has been handed over.
    handed_over: Mutex<u64>,
    moved: Condvar,
    wake: OwnedFd,
    events: AtomicU64,
    high_water: AtomicU64,
    /// Losses that have been handed over.
    lost_told: AtomicU64,
    /// Some changes are not seen.
    compare: AtomicBool,
    recovery: Mutex<Recovery>,
}

/// What was recovered from the maps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Recovery {
    pub overflows: u64,
    pub inodes: u64,
    pub dirs: u64,
    pub taken_over: u64,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            stop: AtomicBool::new(false),
            waiting: AtomicU32::new(0),
            waiting_for_all: AtomicU32::new(0),
            handed_over: Mutex::new(0),
            moved: Condvar::new(),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            events: AtomicU64::new(0),
            high_water: AtomicU64::new(0),
            lost_told: AtomicU64::new(0),
            compare: AtomicBool::new(false),
            recovery: Mutex::default(),
        })
    }

    pub(super) fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    pub(super) fn high_water(&self) -> u64 {
        self.high_water.load(Ordering::Relaxed)
    }

    /// From now on the trees are to be compared regularly.
    pub(super) fn compare_regularly(&self) {
        self.compare.store(true, Ordering::Release);
    }

    pub(super) fn lost_told(&self) -> u64 {
        self.lost_told.load(Ordering::Acquire)
    }

    pub(super) fn recovery(&self) -> Recovery {
        *self.recovery.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.kick();
    }

    /// The time that a barrier must see handed over; with `all`, what is under way then
    /// is told as well.
    pub(super) fn begin_wait(&self, all: bool) -> u64 {
        self.waiting_for_all.fetch_add(u32::from(all), Ordering::AcqRel);
        self.waiting.fetch_add(1, Ordering::AcqRel);
        now_ns()
    }

    pub(super) fn end_wait(&self, all: bool) {
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        self.waiting_for_all.fetch_sub(u32::from(all), Ordering::AcqRel);
    }

    /// Whether everything sent before `time_ns` was handed over by `deadline`.
    pub(super) fn wait_until(&self, time_ns: u64, deadline: Instant) -> bool {
        self.kick();
        let mut handed_over = self.handed_over.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if *handed_over >= time_ns {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            handed_over = self
                .moved
                .wait_timeout(handed_over, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn publish(&self, time_ns: u64) {
        let mut handed_over = self.handed_over.lock().unwrap_or_else(PoisonError::into_inner);
        if time_ns > *handed_over {
            *handed_over = time_ns;
            self.moved.notify_all();
        }
    }

    fn kick(&self) {
        // A full counter wakes as well as one more.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

enum Buffers {
    Ring(RingBuf<MapData>),
    Perf(Vec<PerfEventArrayBuffer<MapData>>),
}

pub(super) struct Reader {
    buffers: Buffers,
    maps: Arc<Maps>,
    shared: Arc<Shared>,
    sink: Sink,
    /// From the kernel's device number to those that `stat` shows.
    devices: HashMap<u32, Vec<u64>>,
    /// Those, by the kernel's number, on which each change of a content is told with
    /// its bytes.
    exact: HashSet<u32>,
    roots: HashSet<(u32, u64)>,
    /// Read but kept back, to be put in order.
    pending: Vec<Decoded>,
    /// The newest time read in this pass, and in the last one.
    newest: u64,
    newest_before: u64,
    /// Changes of an inode are merged in the map.
    merge: bool,
    /// What the programs had counted when the maps were last gone through.
    kept: u64,
    /// The maps are to be gone through, whatever was counted.
    go_through: bool,
    /// When they last were: of what was told before, the entry may have been taken
    /// without it.
    gone_through_at: u64,
    /// How long changes gather, if the last pass found some.
    gather: Option<Duration>,
    /// Changes of which some bytes may be untold, as the programs had counted them.
    unsure: u64,
    /// Losses and late reports that were already told.
    lost: u64,
    overdue: HashSet<(FrameKey, u64)>,
    next_overdue_look: Instant,
    /// Programs that the kernel did not run.
    passed_over: u64,
    next_missed_look: Instant,
    next_comparison: Instant,
}

impl Reader {
    pub(super) fn new(
        loaded: &mut Loaded,
        watched: &[WatchedDevice],
        merge: bool,
        shared: Arc<Shared>,
        sink: Sink,
    ) -> Result<Self, EbpfError> {
        let passed_over = loaded.maps.passed_over();
        shared
            .lost_told
            .store(lost_count(&loaded.maps) + passed_over, Ordering::Release);
        let transport_error = |why: String| LoadError::Transport {
            transport: loaded.transport.name(),
            why,
        };
        let buffers = match (loaded.ring.take(), loaded.perf.take()) {
            (Some(ring), _) => Buffers::Ring(ring),
            (None, Some(mut perf)) => {
                let pages = perf_pages(usize::try_from(loaded.buffer_bytes).unwrap_or(usize::MAX));
                let cpus =
                    aya::util::online_cpus().map_err(|(path, e)| transport_error(format!("{path}: {e}")))?;
                let open = |cpu| {
                    perf.open(cpu, Some(pages))
                        .map_err(|e| transport_error(chain(&e)))
                };
                Buffers::Perf(cpus.into_iter().map(open).collect::<Result<_, _>>()?)
            }
            (None, None) => return Err(transport_error("there is none".to_owned()).into()),
        };
        let mut devices: HashMap<u32, Vec<u64>> = HashMap::new();
        for d in watched {
            let known = devices.entry(d.device.kernel_dev).or_default();
            if !known.contains(&d.stat_dev) {
                known.push(d.stat_dev);
            }
        }
        Ok(Self {
            buffers,
            maps: Arc::clone(&loaded.maps),
            shared,
            sink,
            devices,
            exact: watched
                .iter()
                .filter(|watched| loaded.tells_ranges(&watched.device))
                .map(|watched| watched.device.kernel_dev)
                .collect(),
            roots: watched
                .iter()
                .map(|d| (d.device.kernel_dev, d.root_ino))
                .collect(),
            pending: Vec::new(),
            newest: 0,
            newest_before: 0,
            merge,
            kept: kept_count(&loaded.maps),
            go_through: loaded.taken_over,
            gone_through_at: 0,
            gather: None,
            // Until something is read by its bytes there is nothing to doubt.
            unsure: unsure_count(&loaded.maps),
            // What was lost before is judged by whoever takes over.
            lost: lost_count(&loaded.maps) + passed_over,
            overdue: HashSet::new(),
            next_overdue_look: Instant::now() + OVERDUE,
            passed_over,
            next_missed_look: Instant::now() + IDLE,
            next_comparison: Instant::now() + COMPARE_EVERY,
        })
    }

    pub(super) fn run(mut self) {
        loop {
            let stopping = self.shared.stop.load(Ordering::Acquire);
            let more = self.pass();
            if stopping {
                return;
            }
            if !more {
                self.sleep();
            }
        }
    }

    /// Reads what is there and hands it over; whether there may be more.
    fn pass(&mut self) -> bool {
        let waiting = self.shared.waiting.load(Ordering::Acquire) > 0;
        let for_all = self.shared.waiting_for_all.load(Ordering::Acquire) > 0;
        let started = now_ns();
        self.newest_before = self.newest;
        let more = self.drain();
        let found = !self.pending.is_empty();
        self.gather = match self.gather {
            _ if !found || waiting => None,
            None => Some(GATHER_MIN),
            Some(gather) => Some((gather * 2).min(GATHER_MAX)),
        };
        // The BPF ring is in order by itself, and what is read now lies behind
        // everything sent before. A perf buffer says nothing of the others:
        // only a whole pass after an event has read all that was older.
        let (horizon, complete) = match self.buffers {
            Buffers::Ring(_) => (u64::MAX, self.newest),
            Buffers::Perf(_) if waiting => (u64::MAX, self.newest_before),
            Buffers::Perf(_) => {
                let horizon = started.saturating_sub(REORDER.as_nanos() as u64);
                (horizon, self.newest_before.min(horizon))
            }
        };
        let undisturbed = (self.maps.careful && !self.pending.is_empty()).then(Undisturbed::begin);
        let mut batch = self.release(horizon);
        drop(undisturbed);
        self.recover(&mut batch);
        self.tell_losses(waiting, &mut batch);
        if Instant::now() >= self.next_comparison {
            self.next_comparison = Instant::now() + COMPARE_EVERY;
            batch.extend(
                self.shared
                    .compare
                    .load(Ordering::Acquire)
                    .then_some(Signal::Compare),
            );
        }
        if for_all || Instant::now() >= self.next_overdue_look {
            let before = if for_all {
                complete
            } else {
                started.saturating_sub(OVERDUE.as_nanos() as u64)
            };
            self.tell_overdue(before, &mut batch);
        }
        let in_hand = self.pending.iter().map(|d| d.event.time_ns).min();
        if found || !batch.is_empty() {
            self.sink.tell(batch, in_hand);
        }
        self.shared.lost_told.store(self.lost, Ordering::Release);
        self.shared.publish(complete);
        more
    }

    fn drain(&mut self) -> bool {
        let mut bytes = 0u64;
        let mut more = false;
        let mut newest = self.newest;
        let Self {
            pending,
            sink,
            devices,
            merge,
            ..
        } = self;
        let mut take = |record: &[u8]| match decode(record) {
            Some(decoded) => {
                newest = newest.max(decoded.event.time_ns);
                pending.push(if *merge && !decoded.own {
                    note(sink, devices, decoded)
                } else {
                    decoded
                });
            }
            None => {
                tracing::error!(
                    bytes = record.len(),
                    "a record in the kernel's ring is not one of omirr's"
                )
            }
        };
        match &mut self.buffers {
            Buffers::Ring(ring) => {
                let mut count = 0;
                while let Some(record) = ring.next() {
                    take(&record);
                    count += 1;
                    if count == BATCH {
                        more = true;
                        break;
                    }
                }
            }
            Buffers::Perf(buffers) => {
                let mut whole = Vec::new();
                for buffer in buffers {
                    let mut of_this = 0;
                    buffer.for_each(|event| match event {
                        PerfEvent::Sample { head, tail } => {
                            of_this += (head.len() + tail.len()) as u64;
                            if tail.is_empty() {
                                take(head);
                            } else {
                                whole.clear();
                                whole.extend_from_slice(head);
                                whole.extend_from_slice(tail);
                                take(&whole);
                            }
                        }
                        // The programs count what found no room.
                        PerfEvent::Lost { .. } => {}
                    });
                    bytes = bytes.max(of_this);
                }
            }
        }
        self.newest = newest;
        self.shared.high_water.fetch_max(bytes, Ordering::Relaxed);
        more
    }

    /// What is older than the horizon, in order.
    fn release(&mut self, horizon: u64) -> Vec<Signal> {
        if matches!(self.buffers, Buffers::Perf(_)) {
            self.pending.sort_by_key(|d| d.event.time_ns);
        }
        let ready = self
            .pending
            .partition_point(|d| horizon == u64::MAX || d.event.time_ns <= horizon);
        let mut batch = Vec::with_capacity(ready);
        for decoded in self.pending.drain(..ready) {
            let mut decoded = decoded;
            let taken = match self.merge {
                true => take(&self.maps, &mut decoded),
                false => Ok(None),
            };
            match taken {
                Ok(entry) => {
                    // What is not seen at all is told with no bytes either.
                    let told = written(&decoded.event, entry.as_ref());
                    decoded.event.stale = decoded.event.time_ns <= self.gone_through_at;
                    if self.exact.contains(&decoded.kernel_dev)
                        && self.maps.takes_all()
                        && !decoded.event.stale
                        && !self.shared.compare.load(Ordering::Acquire)
                    {
                        (decoded.event.written, decoded.event.unmapped) = told;
                    } else {
                        decoded.event.unmapped = false;
                    }
                    if let Some(entry) = &entry {
                        decoded.event.range = range(entry);
                    }
                }
                // It stays, and holds back further events of its inode.
                Err(error) => {
                    decoded.event.unmapped = false;
                    tracing::error!(%error, "an entry cannot be taken out of the kernel's map");
                    self.kept = u64::MAX;
                }
            }
            translate(decoded, &self.devices, &self.roots, &mut batch);
        }
        self.shared
            .events
            .fetch_add(batch.len() as u64, Ordering::Relaxed);
        batch
    }

    /// Goes through the maps if the ring was full since the last time.
    fn recover(&mut self, batch: &mut Vec<Signal>) {
        let kept = kept_count(&self.maps);
        if !self.merge || (kept == self.kept && !self.go_through) {
            return;
        }
        let taken = self.take_kept();
        self.gone_through_at = now_ns();
        let (inodes, dirs, signals) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                tracing::error!(?error, "the kernel's maps cannot be read: the trees are compared");
                batch.push(Signal::Lost {
                    dev: None,
                    count: kept.wrapping_sub(self.kept),
                });
                (self.kept, self.go_through) = (kept, false);
                return;
            }
        };
        {
            let mut recovery = self
                .shared
                .recovery
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if self.go_through {
                recovery.taken_over += inodes + dirs;
            } else {
                recovery.overflows += 1;
                recovery.inodes += inodes;
                recovery.dirs += dirs;
            }
        }
        (self.kept, self.go_through) = (kept, false);
        batch.extend(signals);
    }

    /// Notes what the maps hold, then takes it out: how many inodes, how many
    /// directories, and what to tell.
    fn take_kept(&mut self) -> io::Result<(u64, u64, Vec<Signal>)> {
        let _undisturbed = self.maps.careful.then(Undisturbed::begin);
        let mut by_device: HashMap<u32, Recovered> = HashMap::new();
        let (inodes, dirs) = (self.maps.all()?, self.maps.dirs()?);
        for (key, dirty) in &inodes {
            let of_device = by_device.entry(key.dev).or_default();
            of_device.inodes.push(recoverable(key, dirty));
        }
        for key in &dirs {
            let of_device = by_device.entry(key.dev).or_default();
            of_device.dirs.push(key.ino);
            of_device.moved = true;
        }
        let mut signals = Vec::new();
        self.hand_over(by_device, &mut signals);
        self.sink.note(&signals);
        // What was added meanwhile: a name may have come or gone.
        let mut by_device: HashMap<u32, Recovered> = HashMap::new();
        for (key, before) in &inodes {
            if let Some(dirty) = self.maps.take(key)?
                && recoverable(key, &dirty) != recoverable(key, before)
            {
                let of_device = by_device.entry(key.dev).or_default();
                of_device.inodes.push(recoverable(key, &dirty));
            }
        }
        for key in &dirs {
            self.maps.take_dir(key)?;
        }
        self.hand_over(by_device, &mut signals);
        Ok((inodes.len() as u64, dirs.len() as u64, signals))
    }

    fn hand_over(&self, by_device: HashMap<u32, Recovered>, batch: &mut Vec<Signal>) {
        for (kernel_dev, recovered) in by_device {
            for &dev in self.devices.get(&kernel_dev).map_or(&[][..], Vec::as_slice) {
                batch.push(Signal::Recovered(Recovered {
                    dev,
                    ..recovered.clone()
                }));
            }
        }
    }

    fn tell_losses(&mut self, waiting: bool, batch: &mut Vec<Signal>) {
        if Instant::now() >= self.next_missed_look || waiting {
            self.next_missed_look = Instant::now() + IDLE;
            self.passed_over = self.maps.passed_over();
        }
        let unsure = unsure_count(&self.maps);
        if unsure != self.unsure {
            self.unsure = unsure;
            batch.push(Signal::Doubt);
        }
        let lost = lost_count(&self.maps) + self.passed_over;
        if lost != self.lost {
            batch.push(Signal::Lost {
                dev: None,
                count: lost.wrapping_sub(self.lost),
            });
            self.lost = lost;
        }
    }

    /// Operations that began before `before` and have not ended: told once, as
    /// if they had happened, or may have. If they do end they are told again.
    fn tell_overdue(&mut self, before: u64, batch: &mut Vec<Signal>) {
        self.next_overdue_look = Instant::now() + OVERDUE;
        let _undisturbed = self.maps.careful.then(Undisturbed::begin);
        let mut seen = HashSet::new();
        let mut by_device: HashMap<u32, Recovered> = HashMap::new();
        let mut look_at = |dev: u32, ino: u64, parents: [u64; 2]| {
            let of_device = by_device.entry(dev).or_default();
            of_device.dirs.extend(parents.into_iter().filter(|&dir| dir != 0));
            of_device.moved |= parents[1] != 0;
            if ino != 0 {
                of_device.inodes.push(Recoverable {
                    ino,
                    parent: parents[0],
                    named: false,
                    mapped: false,
                });
            }
        };
        for (key, frame) in self.maps.frames() {
            let header = &frame.record.header;
            // The frame of a running program, not of an operation.
            if key.hook > 0xff || header.time_ns >= before {
                continue;
            }
            let mark = (key, header.time_ns);
            seen.insert(mark);
            if self.overdue.contains(&mark) {
                continue;
            }
            match header.op {
                // A directory that is believed to have moved, and has not, would be
                // looked for in the wrong place.
                op::RENAME | op::EXCHANGE => {
                    look_at(header.dev, header.ino, [header.parent, header.to_parent]);
                }
                _ => {
                    if let Some(decoded) = decode(&frame_bytes(&frame)) {
                        translate(decoded, &self.devices, &self.roots, batch);
                    }
                }
            }
        }
        for (key, call) in self.maps.calls() {
            let mark = (key, call.time_ns);
            if call.time_ns < before && seen.insert(mark) && !self.overdue.contains(&mark) {
                look_at(call.dev, call.ino, [call.parent, call.to_parent]);
            }
        }
        self.hand_over(by_device, batch);
        self.overdue = seen;
    }

    fn sleep(&mut self) {
        if let Some(gather) = self.gather {
            let until = now_ns() + gather.as_nanos() as u64;
            self.maps.control.quiet_until(until);
            self.wait_for(&[], gather);
            return;
        }
        let busy = self.shared.waiting.load(Ordering::Acquire) > 0 || !self.pending.is_empty();
        let timeout = if busy { REORDER } else { IDLE };
        let fds: Vec<BorrowedFd<'_>> = match &self.buffers {
            Buffers::Ring(ring) => vec![ring.as_fd()],
            Buffers::Perf(buffers) => buffers.iter().map(AsFd::as_fd).collect(),
        };
        self.wait_for(&fds, timeout);
    }

    /// Sleeps until one of the buffers has something, or somebody asks for a
    /// pass.
    fn wait_for(&self, buffers: &[BorrowedFd<'_>], timeout: Duration) {
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let fds = [&[self.shared.wake.as_fd()], buffers].concat();
        let mut polled: Vec<PollFd<'_>> = fds
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        // Interrupted is as good as woken.
        let _ = rustix::event::poll(&mut polled, Some(&timeout));
        if polled[0].revents().contains(PollFlags::IN) {
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.shared.wake, &mut count);
        }
    }
}

/// Notes a record that is about to be taken from its ring.
fn note(sink: &mut Sink, devices: &HashMap<u32, Vec<u64>>, decoded: Decoded) -> Decoded {
    let (kernel_dev, own) = (decoded.kernel_dev, decoded.own);
    let mut event = decoded.event;
    for &dev in devices.get(&kernel_dev).map_or(&[][..], Vec::as_slice) {
        event.dev = dev;
        let signal = Signal::Event(event);
        sink.note(std::slice::from_ref(&signal));
        let Signal::Event(noted) = signal else {
            unreachable!("it was made of an event")
        };
        event = noted;
    }
    Decoded {
        event,
        kernel_dev,
        own,
    }
}

/// An entry of the map, for whoever looks for what it was about.
fn recoverable(key: &DirtyKey, dirty: &Dirty) -> Recoverable {
    let ops = ops(dirty);
    let named = [Op::Create, Op::Mknod, Op::Symlink, Op::Unlink];
    Recoverable {
        ino: key.ino,
        parent: dirty.parent,
        named: ops.is_empty() || named.iter().any(|&op| ops.contains(op)),
        mapped: dirty.mapped != 0,
    }
}

/// Adds to an event what has happened to its inode since, which is returned as
/// well: from here on a change makes a new entry, and its own event.
fn take(maps: &Maps, decoded: &mut Decoded) -> io::Result<Option<Dirty>> {
    let event = &mut decoded.event;
    if decoded.own || event.ino == 0 || event.to.is_some() {
        return Ok(None);
    }
    let key = DirtyKey {
        ino: event.ino,
        dev: decoded.kernel_dev,
        generation: event.generation,
    };
    let taken = maps.take(&key)?;
    if let Some(dirty) = &taken {
        event.also = ops(dirty);
        event.mapped |= dirty.mapped != 0;
        (event.pid, event.uid) = (dirty.pid, dirty.uid);
        (event.cgroup, event.comm) = (dirty.cgroup, dirty.comm);
    }
    Ok(taken)
}

/// Changes that were kept in the maps because the ring was full, or because
/// their end was not seen.
fn kept_count(maps: &Maps) -> u64 {
    maps.counts.sum(|c| c.dropped + c.stale)
}

/// Changes of which nothing is known.
fn lost_count(maps: &Maps) -> u64 {
    maps.counts.sum(|c| c.lost)
}

/// Changes of which an entry that was taken may not have had the bytes.
fn unsure_count(maps: &Maps) -> u64 {
    maps.counts.sum(|c| c.unsure)
}

/// The bytes that an entry knows to have changed, as one range; none if there
/// are others.
fn range(dirty: &Dirty) -> Option<(u64, u64)> {
    let (from, to) = (
        extents(dirty)?.map(|(from, _)| from).min()?,
        extents(dirty)?.map(|(_, to)| to).max()?,
    );
    Some((from, to))
}

/// Hands an event on under the device numbers that the daemon knows.
fn translate(
    decoded: Decoded,
    devices: &HashMap<u32, Vec<u64>>,
    roots: &HashSet<(u32, u64)>,
    batch: &mut Vec<Signal>,
) {
    let event = decoded.event;
    let own = decoded.own || event.pid == std::process::id();
    if own && event.op == Op::Attr && roots.contains(&(decoded.kernel_dev, event.ino)) {
        // The marker of a barrier.
        return;
    }
    let known = devices.get(&decoded.kernel_dev).map_or(&[][..], Vec::as_slice);
    for (index, &dev) in known.iter().enumerate() {
        if index + 1 == known.len() {
            let mut event = event;
            event.dev = dev;
            batch.push(Signal::Event(event));
            return;
        }
        let mut copy = event.clone();
        copy.dev = dev;
        batch.push(Signal::Event(copy));
    }
}

/// A frame's record as it would lie in the ring.
fn frame_bytes(frame: &omirr_common::event::Frame) -> Vec<u8> {
    let header = &frame.record.header;
    let mut bytes = Vec::with_capacity(TO_OFFSET);
    for word in [
        header.time_ns,
        header.ino,
        header.start,
        header.end,
        header.parent,
        header.to_parent,
        header.cgroup,
    ] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    for word in [header.pid, header.uid, header.dev, header.generation] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(&[header.op, header.flags, header.hook, 0]);
    bytes.extend_from_slice(&header.name_len.to_ne_bytes());
    bytes.extend_from_slice(&header.to_len.to_ne_bytes());
    bytes.extend_from_slice(&header.comm);
    debug_assert_eq!(bytes.len(), HEADER_BYTES);
    bytes.extend_from_slice(&frame.record.name);
    if header.flags & flag::TO != 0 {
        bytes.extend_from_slice(&frame.record.to);
    }
    bytes
}
