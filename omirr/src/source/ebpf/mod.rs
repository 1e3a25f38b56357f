//! The eBPF source: the kernel tells of each change as it happens.
//!
//! In: the trees to watch. Out: events, in the order of the ring (BPF ring) or
//! of their times (perf ring), and a word when some were lost. The programs
//! filter by device, by ancestor and by process, so that a busy neighbour
//! directory costs no room in the ring. Nothing here looks at a watched file
//! or waits for the receiver.
//!
//! - `closed`: what need not be tried here;
//!   [`btf`]: the running kernel's types; [`hooks`]: what each hook needs of them.
//! - [`load`]: settings in, programs attached, one way or another.
//! - [`ring`]: the thread that empties the ring; [`decode`]: bytes to events;
//!   [`take`]: entries out of the map of changed inodes, which outlives a full
//!   ring; [`counts`]: what the programs counted.
//! - [`pins`]: what outlives the daemon; [`own`]: whose changes are passed over.
//! - [`selftest`]: whether what is attached also speaks.
//! - [`device`]: the kernel's device numbers; [`probe`]: what this host allows.

pub mod btf;
mod closed;
mod counts;
pub mod decode;
pub mod device;
pub mod hooks;
pub mod load;
mod own;
pub mod pins;
pub mod probe;
mod ring;
mod selftest;
mod take;
mod told;

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context;
use omirr_common::{
    counters::Counters,
    hooks::HOOK_COUNT,
    identity::{Mark, RootKey},
};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT};

use super::{About, CpuStats, HookStats, KeptUp, Listener, OpSet, Signal, Sink, Source, SourceStats, Watch};
use load::{Loaded, WatchedDevice};
use ring::{Reader, Shared};

/// The programs, if this build has them.
#[cfg(ebpf_object)]
pub const EMBEDDED: Option<&[u8]> = Some(aya::include_bytes_aligned!(env!("OMIRR_EBPF_OBJECT")));
/// The programs, if this build has them.
#[cfg(not(ebpf_object))]
pub const EMBEDDED: Option<&[u8]> = None;

/// How programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    #[default]
    Auto,
    Fentry,
    Kprobe,
}

/// How records reach the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    #[default]
    Auto,
    Ring,
    Perf,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub attach: Attach,
    pub transport: Transport,
    /// Memory for records on their way; rounded up to a power of two. The perf
    /// ring shares it out among the processors.
    pub ring_bytes: usize,
    /// Inodes that may have changed and wait to be taken, if an inode's changes
    /// are merged; none: each change is an event.
    pub dirty_entries: Option<u32>,
    /// Where everything is kept when this process ends, and looked for when it
    /// comes: see [`pins::base_of`].
    pub keep: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            attach: Attach::Auto,
            transport: Transport::Auto,
            ring_bytes: 8 << 20,
            dirty_entries: None,
            keep: None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EbpfError {
    #[error(
        "this omirr was built without eBPF; build it with `cargo xtask build`, or set source = \"fanotify\""
    )]
    NotEmbedded,
    #[error(transparent)]
    Types(#[from] btf::BtfError),
    #[error(transparent)]
    Device(#[from] device::DeviceError),
    #[error("{0}")]
    Load(#[from] load::LoadError),
    #[error("no way of attaching works here: {0}; `omirr doctor` says what this host allows")]
    NoneWorks(String),
    #[error("the thread that reads the ring cannot be started: {0}")]
    Thread(std::io::Error),
}

/// How long the changes of the self-test may take to arrive.
const TEST_WITHIN: Duration = Duration::from_secs(20);
/// How often the trees are compared where some changes are not seen.
const COMPARE_EVERY: Duration = Duration::from_secs(600);

/// Hears which operations come by.
struct Hearing {
    heard: Arc<Mutex<OpSet>>,
    sink: Sink,
}

impl Listener for Hearing {
    fn note(&mut self, signals: &[Signal]) {
        self.sink.note(signals);
    }

    fn tell(&mut self, batch: Vec<Signal>, in_hand: Option<u64>) {
        {
            let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            for signal in &batch {
                if let Signal::Event(event) = signal {
                    heard.insert(event.op);
                    heard.extend(event.also);
                }
            }
        }
        self.sink.tell(batch, in_hand);
    }
}

/// The running source.
pub struct EbpfSource {
    about: About,
    loaded: Option<Loaded>,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    roots: Vec<PathBuf>,
    devices: Vec<WatchedDevice>,
    /// By watch: what had been kept up with when this process came.
    held: Vec<Option<KeptUp>>,
}

/// What the programs remember of a share, if nothing was missed since.
fn held(loaded: &Loaded, shared: &Shared, device: &WatchedDevice) -> Option<KeptUp> {
    let mark = loaded.maps.mark(&key_of(device))?;
    let unbroken = mark.boot == boot() && mark.lost_told == shared.lost_told();
    (loaded.taken_over && unbroken).then_some(KeptUp {
        replica: mark.replica,
        head: mark.head,
    })
}

fn key_of(device: &WatchedDevice) -> RootKey {
    RootKey {
        dev: device.device.kernel_dev,
        reserved: 0,
        ino: device.root_ino,
    }
}

/// This boot of the kernel, as a number; 0 if it does not say.
fn boot() -> u64 {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let hash = blake3::hash(id.trim().as_bytes());
    u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a BLAKE3 hash has 32 bytes"))
}

impl EbpfSource {
    /// Attaches to the kernel and starts to report on `watches`. `own_pid`:
    /// the process whose changes are passed over; none: everybody's are told.
    pub fn open(
        watches: &[Watch],
        options: Options,
        own_pid: Option<u32>,
        sink: Sink,
    ) -> Result<Self, EbpfError> {
        let object = EMBEDDED.ok_or(EbpfError::NotEmbedded)?;
        let ways = Ways::of(options.attach);
        if ways.open.is_empty() {
            return Err(EbpfError::NoneWorks(ways.closed.join("; ")));
        }
        let types = btf::KernelTypes::of_this_kernel()?;
        let layout = hooks::Layout::resolve(&types)?;
        drop(types);
        let mut devices: Vec<WatchedDevice> = Vec::new();
        for watch in watches {
            let device = device::device_of(&watch.path, watch.dev)?;
            devices.push(WatchedDevice {
                device,
                stat_dev: watch.dev,
                root_ino: watch.ino,
            });
        }
        let heard = Arc::new(Mutex::new(OpSet::default()));
        let sink = Box::new(Hearing {
            heard: Arc::clone(&heard),
            sink,
        });
        let (loaded, reason) = load_best(object, &layout, &devices, &options, ways)?;
        let about = About {
            kind: "ebpf",
            attach: Some(loaded.attach.name()),
            transport: Some(loaded.transport.name()),
            reason,
        };
        let mut loaded = loaded;
        // Only a daemon tries itself: a trace leaves the tree alone.
        let fresh = !loaded.taken_over && options.dirty_entries.is_some();
        // Until it is known that everything is seen, its own changes are, too.
        loaded
            .maps
            .control
            .set_own(&own::Own::of(own_pid.filter(|_| !fresh)));
        let shared = Arc::new(Shared::new().map_err(EbpfError::Thread)?);
        let merge = options.dirty_entries.is_some();
        let reader = Reader::new(&mut loaded, &devices, merge, Arc::clone(&shared), sink)?;
        let held = devices.iter().map(|d| held(&loaded, &shared, d)).collect();
        let reader = std::thread::Builder::new()
            .name("omirr-tracer".into())
            .spawn(move || reader.run())
            .map_err(EbpfError::Thread)?;
        let roots = watches.iter().map(|w| w.path.clone()).collect();
        let mut source = Self {
            about,
            loaded: Some(loaded),
            shared,
            reader: Some(reader),
            roots,
            devices,
            held,
        };
        if fresh {
            let silent = source.test_yourself(&heard);
            if let Some(loaded) = &source.loaded {
                loaded.maps.control.set_own(&own::Own::of(own_pid));
            }
            source.say_silent(&silent);
        }
        Ok(source)
    }

    /// Makes a change of each kind and says which were not seen.
    fn test_yourself(&self, heard: &Mutex<OpSet>) -> Vec<&'static str> {
        let mut silent = Vec::new();
        for root in &self.roots {
            *heard.lock().unwrap_or_else(PoisonError::into_inner) = OpSet::default();
            let made = match selftest::make_changes(root) {
                Ok(made) => made,
                // A full disk, say: nothing is known then.
                Err(error) => {
                    tracing::warn!(
                        "{}: the event source cannot be tried there: {error}",
                        root.display()
                    );
                    continue;
                }
            };
            let seen = match self.barrier(TEST_WITHIN) {
                Ok(()) => *heard.lock().unwrap_or_else(PoisonError::into_inner),
                Err(error) => {
                    tracing::error!("{error:#}");
                    OpSet::default()
                }
            };
            for op in selftest::silent(made, seen) {
                tracing::error!("{}: {op} is attached to and not seen", root.display());
                if !silent.contains(&op) {
                    silent.push(op);
                }
            }
        }
        silent
    }

    /// What is not seen is made good by comparing the trees now and then.
    fn say_silent(&mut self, silent: &[&str]) {
        if !silent.is_empty() {
            self.about.reason += &format!(
                "; it does not see {} here, so the trees are compared every {} minutes",
                silent.join(", "),
                COMPARE_EVERY.as_secs() / 60
            );
            self.shared.compare_regularly();
        }
    }

    /// Makes a change that the programs report although it is the daemon's
    /// own: the access time of a share's root is set to what it is. The
    /// modification time is left alone, because another process may be
    /// changing it at this moment.
    fn mark(root: &Path) -> anyhow::Result<()> {
        let now = root
            .metadata()
            .with_context(|| format!("{}: cannot be looked at", root.display()))?;
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: now.atime(),
                tv_nsec: now.atime_nsec(),
            },
            last_modification: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
        };
        rustix::fs::utimensat(CWD, root, &times, AtFlags::empty()).with_context(|| {
            format!(
                "{}: its access time cannot be set, which marks a barrier",
                root.display()
            )
        })
    }
}

impl Source for EbpfSource {
    fn about(&self) -> &About {
        &self.about
    }

    fn stats(&self) -> SourceStats {
        let Some(loaded) = &self.loaded else {
            return SourceStats::default();
        };
        let counters = loaded.maps.counts.counters();
        let hits = loaded.maps.counts.hits();
        let recovery = self.shared.recovery();
        let sum = |of: fn(&Counters) -> u64| counters.iter().map(of).sum::<u64>();
        SourceStats {
            events: self.shared.events(),
            dropped: sum(|c| c.dropped),
            coalesced: sum(|c| c.coalesced),
            map_entries: loaded.maps.waiting(),
            map_capacity: loaded.maps.dirty_capacity,
            overflows: recovery.overflows,
            recovered: recovery.inodes,
            dirs_compared: recovery.dirs,
            lost: sum(|c| c.lost) + loaded.maps.passed_over(),
            taken_over: recovery.taken_over,
            buffer_bytes: loaded.buffer_bytes,
            high_water_bytes: counters
                .iter()
                .map(|c| c.high_water)
                .max()
                .unwrap_or(0)
                .max(self.shared.high_water()),
            per_cpu: (0u32..)
                .zip(&counters)
                .map(|(cpu, c)| CpuStats {
                    cpu,
                    submitted: c.submitted,
                    coalesced: c.coalesced,
                    dropped: c.dropped,
                })
                .collect(),
            hooks: loaded
                .hooks
                .iter()
                .map(|h| HookStats {
                    hook: h.function.to_owned(),
                    attached: h.attached,
                    note: h.note.clone(),
                    hits: hits.get(usize::from(h.id)).copied().unwrap_or(0),
                })
                .collect(),
        }
    }

    fn kept_up(&self, watch: usize) -> Option<KeptUp> {
        self.held.get(watch).copied().flatten()
    }

    fn keeps(&self) -> bool {
        self.loaded.as_ref().is_some_and(|loaded| loaded.kept)
    }

    fn set_kept_up(&self, watch: usize, kept_up: Option<KeptUp>) -> anyhow::Result<()> {
        let (Some(loaded), Some(device)) = (&self.loaded, self.devices.get(watch)) else {
            return Ok(());
        };
        let mark = kept_up.map(|kept_up| Mark {
            replica: kept_up.replica,
            head: kept_up.head,
            boot: boot(),
            lost_told: self.shared.lost_told(),
        });
        Ok(loaded.maps.set_mark(&key_of(device), mark)?)
    }

    fn barrier(&self, timeout: Duration) -> anyhow::Result<()> {
        self.wait(timeout, true)
    }

    fn hand_over(&self, timeout: Duration) -> anyhow::Result<()> {
        self.wait(timeout, false)
    }
}

impl EbpfSource {
    /// One marker on any root is enough, because all devices share the ring:
    /// whatever was sent before the marker lies before it.
    fn wait(&self, timeout: Duration, all: bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + timeout;
        if self.roots.is_empty() {
            return Ok(());
        }
        let since = self.shared.begin_wait(all);
        let outcome = loop {
            let marked = self.roots.iter().map(|root| Self::mark(root)).find_or_last_ok();
            if let Err(error) = marked {
                break Err(error);
            }
            // A marker may find the ring full like any other event; then it is
            // made again.
            let step = (Instant::now() + Duration::from_millis(100)).min(deadline);
            if self.shared.wait_until(since, step) {
                break Ok(());
            }
            if Instant::now() >= deadline {
                break Err(anyhow::anyhow!(
                    "the kernel's events up to now did not arrive within {timeout:?}; `omirr stats` shows the ring"
                ));
            }
        };
        self.shared.end_wait(all);
        outcome
    }
}

impl Drop for EbpfSource {
    fn drop(&mut self) {
        // Detach first: after that nothing new comes.
        drop(self.loaded.take());
        self.shared.stop();
        if let Some(reader) = self.reader.take()
            && reader.join().is_err()
        {
            tracing::error!("the thread that reads the kernel's events had panicked");
        }
    }
}

/// The first success, or the last failure.
trait FirstOk {
    fn find_or_last_ok(self) -> anyhow::Result<()>;
}

impl<I: Iterator<Item = anyhow::Result<()>>> FirstOk for I {
    fn find_or_last_ok(self) -> anyhow::Result<()> {
        let mut last = Ok(());
        for result in self {
            if result.is_ok() {
                return Ok(());
            }
            last = result;
        }
        last
    }
}

/// The ways of attaching that are wanted, the best first.
struct Ways {
    open: Vec<load::Attaching>,
    /// Those that this host does not have, and why.
    closed: Vec<String>,
    /// How the kernel preempts itself, if that decided about the order.
    preemption: Option<&'static str>,
}

impl Ways {
    fn of(wanted: Attach) -> Ways {
        use load::Attaching::{Fentry, Kprobe};
        let preemption = probe::preemption().filter(|_| wanted == Attach::Auto);
        let all: &[load::Attaching] = match wanted {
            Attach::Auto if preemption.is_some() => &[Kprobe, Fentry],
            Attach::Auto => &[Fentry, Kprobe],
            Attach::Fentry => &[Fentry],
            Attach::Kprobe => &[Kprobe],
        };
        let mut ways = Ways {
            open: Vec::new(),
            closed: Vec::new(),
            preemption,
        };
        for &attach in all {
            match closed::why(attach) {
                Some(why) => ways.closed.push(format!("{}: {why}", attach.name())),
                None => ways.open.push(attach),
            }
        }
        ways
    }
}

/// Tries the ways from the best down, and says in one sentence how it went.
fn load_best(
    object: &[u8],
    layout: &hooks::Layout,
    devices: &[WatchedDevice],
    options: &Options,
    ways: Ways,
) -> Result<(Loaded, String), EbpfError> {
    let transports = match options.transport {
        Transport::Auto => &[load::Carrier::Ring, load::Carrier::Perf][..],
        Transport::Ring => &[load::Carrier::Ring],
        Transport::Perf => &[load::Carrier::Perf],
    };
    let mut failures: Vec<String> = ways.closed;
    let not_kept = options.keep.as_ref().and_then(|_| pins::unusable());
    let keep = options.keep.clone().filter(|_| not_kept.is_none());
    for attach in ways.open {
        for &transport in transports {
            let plan = load::Plan {
                object,
                layout,
                devices,
                attach,
                transport,
                ring_bytes: options.ring_bytes,
                merge: options.dirty_entries.is_some(),
                dirty_entries: options.dirty_entries.unwrap_or(0),
                keep: keep.as_deref(),
            };
            match load::load(&plan) {
                Ok(loaded) => {
                    let chosen = options.attach != Attach::Auto && options.transport != Transport::Auto;
                    let why = match (failures.is_empty(), chosen) {
                        (true, _) if let Some(how) = ways.preemption => {
                            format!(
                                "fentry programs may be passed over, because this kernel preempts itself ({how})"
                            )
                        }
                        (true, true) => "as configured".to_owned(),
                        (true, false) => "the best that this kernel offers".to_owned(),
                        (false, _) => failures.join("; "),
                    };
                    let mut reason = format!("{} with the {} buffer: {why}", attach.name(), transport.name());
                    if let Some(why) = not_kept.or_else(|| loaded.not_kept.clone()) {
                        reason += &format!(
                            "; changes made while the daemon is away are found by comparing the trees, because {why}"
                        );
                    }
                    return Ok((loaded, reason));
                }
                Err(error) => {
                    tracing::debug!(attach = attach.name(), transport = transport.name(), error = %error, "cannot be used");
                    let said = format!("{} with {}: {error}", attach.name(), transport.name());
                    failures.push(said);
                    // Another ring does not make a refused program load.
                    if !error.is_about_transport() {
                        break;
                    }
                }
            }
        }
    }
    Err(EbpfError::NoneWorks(failures.join("; ")))
}

const _: () = assert!(HOOK_COUNT <= 256, "a hook's number is one byte");
