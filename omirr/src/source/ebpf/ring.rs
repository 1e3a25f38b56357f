//! The thread that empties the ring.
//!
//! In: records, from the BPF ring (one, in order) or from the perf buffers
//! (one per processor, put in order of their times). Out: batches into the
//! sink, a word of loss when the programs counted one, and the time up to which
//! everything has been handed over, which barriers wait for. It never stops
//! before a ring is empty, and never waits for anything but the rings.

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
use omirr_common::event::{FrameKey, HEADER_BYTES, TO_OFFSET, flag};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec},
    time::ClockId,
};

use super::{
    EbpfError,
    decode::{Decoded, decode},
    load::{LoadError, Loaded, Maps, WatchedDevice, chain, perf_pages},
};
use crate::source::{Op, Signal, Sink};

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

/// What the reader's thread and the source share.
pub(super) struct Shared {
    stop: AtomicBool,
    waiting: AtomicU32,
    /// Everything that was sent before this time has been handed over.
    handed_over: Mutex<u64>,
    moved: Condvar,
    wake: OwnedFd,
    events: AtomicU64,
    high_water: AtomicU64,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            stop: AtomicBool::new(false),
            waiting: AtomicU32::new(0),
            handed_over: Mutex::new(0),
            moved: Condvar::new(),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            events: AtomicU64::new(0),
            high_water: AtomicU64::new(0),
        })
    }

    pub(super) fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    pub(super) fn high_water(&self) -> u64 {
        self.high_water.load(Ordering::Relaxed)
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.kick();
    }

    /// The time that a barrier must see handed over.
    pub(super) fn begin_wait(&self) -> u64 {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        now_ns()
    }

    pub(super) fn end_wait(&self) {
        self.waiting.fetch_sub(1, Ordering::AcqRel);
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
    roots: HashSet<(u32, u64)>,
    /// Read but kept back, to be put in order.
    pending: Vec<Decoded>,
    /// The newest time read in this pass, and in the last one.
    newest: u64,
    newest_before: u64,
    /// Losses and late reports that were already told.
    lost: u64,
    overdue: HashSet<(FrameKey, u64)>,
    next_overdue_look: Instant,
    /// Programs that the kernel did not run.
    passed_over: u64,
    next_missed_look: Instant,
}

impl Reader {
    pub(super) fn new(
        loaded: &mut Loaded,
        watched: &[WatchedDevice],
        shared: Arc<Shared>,
        sink: Sink,
    ) -> Result<Self, EbpfError> {
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
            roots: watched
                .iter()
                .map(|d| (d.device.kernel_dev, d.root_ino))
                .collect(),
            pending: Vec::new(),
            newest: 0,
            newest_before: 0,
            lost: 0,
            overdue: HashSet::new(),
            next_overdue_look: Instant::now() + OVERDUE,
            passed_over: 0,
            next_missed_look: Instant::now() + IDLE,
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
        let started = now_ns();
        self.newest_before = self.newest;
        let more = self.drain();
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
        let mut batch = self.release(horizon);
        self.tell_losses(waiting, &mut batch);
        if waiting || Instant::now() >= self.next_overdue_look {
            let before = if waiting {
                complete
            } else {
                started.saturating_sub(OVERDUE.as_nanos() as u64)
            };
            self.tell_overdue(before, &mut batch);
        }
        if !batch.is_empty() {
            (self.sink)(batch);
        }
        self.shared.publish(complete);
        more
    }

    fn drain(&mut self) -> bool {
        let mut bytes = 0u64;
        let mut more = false;
        let mut newest = self.newest;
        let pending = &mut self.pending;
        let mut take = |record: &[u8]| match decode(record) {
            Some(decoded) => {
                newest = newest.max(decoded.event.time_ns);
                pending.push(decoded);
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
            translate(decoded, &self.devices, &self.roots, &mut batch);
        }
        self.shared
            .events
            .fetch_add(batch.len() as u64, Ordering::Relaxed);
        batch
    }

    fn tell_losses(&mut self, waiting: bool, batch: &mut Vec<Signal>) {
        let mut lost = self.maps.counts.lost();
        if Instant::now() >= self.next_missed_look || waiting {
            self.next_missed_look = Instant::now() + IDLE;
            self.passed_over = self.maps.passed_over();
        }
        lost += self.passed_over;
        if lost != self.lost {
            batch.push(Signal::Lost {
                dev: None,
                count: lost.wrapping_sub(self.lost),
            });
            self.lost = lost;
        }
    }

    /// Operations that began before `before` and have not ended: told once, as
    /// if they had happened. If they do end they are told again.
    fn tell_overdue(&mut self, before: u64, batch: &mut Vec<Signal>) {
        self.next_overdue_look = Instant::now() + OVERDUE;
        let mut seen = HashSet::new();
        for (key, frame) in self.maps.frames() {
            // The frame of a running program, not of an operation.
            if key.hook > 0xff || frame.record.header.time_ns >= before {
                continue;
            }
            let mark = (key, frame.record.header.time_ns);
            seen.insert(mark);
            if !self.overdue.contains(&mark)
                && let Some(decoded) = decode(&frame_bytes(&frame))
            {
                translate(decoded, &self.devices, &self.roots, batch);
            }
        }
        self.overdue = seen;
    }

    fn sleep(&mut self) {
        let busy = self.shared.waiting.load(Ordering::Acquire) > 0 || !self.pending.is_empty();
        let timeout = if busy { REORDER } else { IDLE };
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let mut fds: Vec<BorrowedFd<'_>> = vec![self.shared.wake.as_fd()];
        match &self.buffers {
            Buffers::Ring(ring) => fds.push(ring.as_fd()),
            Buffers::Perf(buffers) => fds.extend(buffers.iter().map(AsFd::as_fd)),
        }
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

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
