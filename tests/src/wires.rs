//! A network of several nodes in user space, whose wires lose, delay, reorder,
//! double and cut packets as told.
//!
//! In: how many nodes, and a [`Quality`] per pair. Out: a network namespace per
//! node, in which a daemon talks to the others by the kernel's own TCP. Each
//! namespace has a TUN device, whose packets come to this process, wait here as
//! long as the wire says, and go on. So the kernel needs neither netem nor
//! packet filters. Never touches the network of the machine itself. Needs root,
//! `ip` and `/dev/net/tun`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::net::{self, ip};
use crate::users::Rng;

/// The interface's name in each namespace.
const DEVICE: &str = "wire";
/// Bytes of a packet at most: the device's MTU is 1500.
const PACKET: usize = 2048;
/// Packets that would leave a slow wire later than this are lost instead, as
/// with a router whose queue is full.
const QUEUE: Duration = Duration::from_millis(300);
/// How soon threads notice that it is time to end.
const TICK: Duration = Duration::from_millis(50);

/// What a wire does to packets, in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quality {
    pub cut: bool,
    pub delay: Duration,
    /// Up to so much more, each packet by itself: they overtake one another.
    pub jitter: Duration,
    pub lost_per_mille: u64,
    pub doubled_per_mille: u64,
    /// None: as fast as this machine is.
    pub bytes_per_second: Option<u64>,
}

impl Quality {
    pub const GOOD: Quality = Quality {
        cut: false,
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        lost_per_mille: 0,
        doubled_per_mille: 0,
        bytes_per_second: None,
    };

    /// Some trouble or other, or none.
    pub fn random(rng: &mut Rng) -> Quality {
        let good = Quality::GOOD;
        match rng.below(6) {
            0 => Quality { cut: true, ..good },
            1 => Quality {
                bytes_per_second: Some(20_000 + rng.below(500_000)),
                ..good
            },
            2 => Quality {
                lost_per_mille: 5 + rng.below(100),
                ..good
            },
            3 => Quality {
                delay: rng.millis_below(150),
                jitter: rng.millis_below(40),
                ..good
            },
            4 => Quality {
                delay: rng.millis_below(60),
                jitter: rng.millis_below(20),
                lost_per_mille: rng.below(40),
                doubled_per_mille: rng.below(40),
                bytes_per_second: Some(100_000 + rng.below(2_000_000)),
                ..good
            },
            _ => good,
        }
    }
}

/// One direction of a wire.
struct Lane {
    quality: Quality,
    /// When what is on it has left.
    free_at: Instant,
}

struct Packet {
    due: Instant,
    /// Packets of one moment keep their order.
    number: u64,
    to: usize,
    bytes: Vec<u8>,
}

impl PartialEq for Packet {
    fn eq(&self, other: &Packet) -> bool {
        self.number == other.number
    }
}

impl Eq for Packet {}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Packet) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Packet {
    fn cmp(&self, other: &Packet) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

struct Inner {
    lanes: Vec<Vec<Lane>>,
    on_the_way: BinaryHeap<Reverse<Packet>>,
    rng: Rng,
    number: u64,
}

struct Shared {
    inner: Mutex<Inner>,
    more: Condvar,
    stop: AtomicBool,
    devices: Vec<File>,
    carried: AtomicU64,
    lost: AtomicU64,
}

/// The network; its namespaces are taken away when this is dropped.
pub struct Wires {
    namespaces: Vec<String>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// Why this cannot be had here, if so.
#[must_use]
pub fn unavailable() -> Option<String> {
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => None,
        Err(error) => Some(format!("/dev/net/tun cannot be opened: {error}")),
    }
}

impl Wires {
    /// Lays wires between so many nodes, each with each, all good. What chance
    /// does to packets follows from `seed` and from timing.
    ///
    /// # Panics
    /// No root, or a kernel without network namespaces or TUN.
    #[must_use]
    pub fn lay(nodes: usize, seed: u64) -> Wires {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut namespaces = Vec::new();
        let mut devices = Vec::new();
        for node in 0..nodes {
            let name = format!("omirr-{}-{number}-node{node}", std::process::id());
            ip(&["netns", "add", &name]);
            devices.push(device_in(&name).unwrap_or_else(|error| panic!("no TUN device in {name}: {error}")));
            let address = format!("{}/24", Self::address(node));
            ip(&["-n", &name, "address", "add", &address, "dev", DEVICE]);
            ip(&["-n", &name, "link", "set", "lo", "up"]);
            ip(&["-n", &name, "link", "set", DEVICE, "up"]);
            namespaces.push(name);
        }
        let lane = || Lane {
            quality: Quality::GOOD,
            free_at: Instant::now(),
        };
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                lanes: (0..nodes).map(|_| (0..nodes).map(|_| lane()).collect()).collect(),
                on_the_way: BinaryHeap::new(),
                rng: Rng(seed),
                number: 0,
            }),
            more: Condvar::new(),
            stop: AtomicBool::new(false),
            devices,
            carried: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        });
        let mut threads = Vec::new();
        for node in 0..nodes {
            let shared = Arc::clone(&shared);
            threads.push(std::thread::spawn(move || shared.take_from(node)));
        }
        let delivering = Arc::clone(&shared);
        threads.push(std::thread::spawn(move || delivering.deliver()));
        Wires {
            namespaces,
            shared,
            threads,
        }
    }

    /// A node's address, and nobody else's.
    #[must_use]
    pub fn address(node: usize) -> String {
        format!("10.78.0.{}", node + 1)
    }

    /// From now on the wire between the two is like this, both ways.
    pub fn set(&self, one: usize, two: usize, quality: Quality) {
        let mut inner = self.shared.inner.lock().expect("no thread panicked");
        for (from, to) in [(one, two), (two, one)] {
            inner.lanes[from][to].quality = quality;
            inner.lanes[from][to].free_at = Instant::now();
        }
    }

    /// From now on every wire is good.
    pub fn heal(&self) {
        for one in 0..self.namespaces.len() {
            for two in one + 1..self.namespaces.len() {
                self.set(one, two, Quality::GOOD);
            }
        }
    }

    /// A command that runs with that node's network and no other.
    #[must_use]
    pub fn command(&self, node: usize, program: &Path) -> Command {
        net::command_in(&self.namespaces[node], program)
    }

    /// How many packets arrived, and how many did not.
    #[must_use]
    pub fn figures(&self) -> (u64, u64) {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (of(&self.shared.carried), of(&self.shared.lost))
    }
}

impl Drop for Wires {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
        for name in &self.namespaces {
            // A test that failed half-way may have lost one.
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

impl Shared {
    /// Reads what a node sends.
    fn take_from(&self, from: usize) {
        let mut device = &self.devices[from];
        let mut buffer = [0; PACKET];
        while !self.stop.load(Ordering::Relaxed) {
            let mut wanted = [PollFd::new(device, PollFlags::IN)];
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: TICK.as_nanos() as i64,
            };
            if !matches!(poll(&mut wanted, Some(&tick)), Ok(1..)) {
                continue;
            }
            while let Ok(length) = device.read(&mut buffer) {
                self.accept(from, &buffer[..length]);
            }
        }
    }

    fn accept(&self, from: usize, bytes: &[u8]) {
        // Version 4, and an address of ours; the kernel also asks for neighbours
        // and routers of version 6, of which there are none.
        let [10, 78, 0, last] = *bytes.get(16..20).unwrap_or_default() else {
            return;
        };
        let to = usize::from(last.wrapping_sub(1));
        if bytes[0] >> 4 != 4 || to >= self.devices.len() {
            return;
        }
        let now = Instant::now();
        let mut guard = self.inner.lock().expect("no thread panicked");
        let inner = &mut *guard;
        let lane = &mut inner.lanes[from][to];
        let quality = lane.quality;
        let leaves = match quality.bytes_per_second {
            None => now,
            Some(rate) => {
                let takes = Duration::from_secs_f64(bytes.len() as f64 / rate as f64);
                lane.free_at.max(now) + takes
            }
        };
        let lost = quality.cut || leaves > now + QUEUE || inner.rng.below(1000) < quality.lost_per_mille;
        if lost {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        lane.free_at = leaves;
        let copies = 1 + usize::from(inner.rng.below(1000) < quality.doubled_per_mille);
        for _ in 0..copies {
            let jitter = u64::try_from(quality.jitter.as_micros()).unwrap_or(u64::MAX);
            let extra = Duration::from_micros(if jitter == 0 { 0 } else { inner.rng.below(jitter) });
            inner.number += 1;
            inner.on_the_way.push(Reverse(Packet {
                due: leaves + quality.delay + extra,
                number: inner.number,
                to,
                bytes: bytes.to_vec(),
            }));
        }
        drop(guard);
        self.more.notify_one();
    }

    /// Hands packets over when they are due.
    fn deliver(&self) {
        let mut inner = self.inner.lock().expect("no thread panicked");
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            let wait = match inner.on_the_way.peek() {
                Some(Reverse(packet)) if packet.due <= now => Duration::ZERO,
                Some(Reverse(packet)) => (packet.due - now).min(TICK),
                None => TICK,
            };
            if !wait.is_zero() {
                inner = self.more.wait_timeout(inner, wait).expect("no thread panicked").0;
                continue;
            }
            let Some(Reverse(packet)) = inner.on_the_way.pop() else {
                continue;
            };
            drop(inner);
            // A device that does not take it loses it, as networks do.
            match (&self.devices[packet.to]).write_all(&packet.bytes) {
                Ok(()) => self.carried.fetch_add(1, Ordering::Relaxed),
                Err(_) => self.lost.fetch_add(1, Ordering::Relaxed),
            };
            inner = self.inner.lock().expect("no thread panicked");
        }
    }
}

/// Makes a TUN device in that namespace; it is there as long as it is open.
fn device_in(namespace: &str) -> io::Result<File> {
    let namespace = File::open(Path::new("/run/netns").join(namespace))?;
    // A thread of its own, since it does not come back from there.
    let made = std::thread::spawn(move || {
        // SAFETY: setns is a plain system call on a descriptor that is open.
        if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let device = File::options().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: all-zero is a valid request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the descriptor is open; the request names the device with room
        // for its NUL, and outlives the call.
        if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        rustix::io::ioctl_fionbio(&device, true)?;
        Ok(device)
    });
    made.join().expect("making a device does not panic")
}
