//! Changes as fanotify reports them.
//!
//! In: the notification queues of the filesystems on which the watched roots
//! lie. Out: events that name directories by inode number, of changes beneath
//! those roots only, without those of one's own process. Byte ranges and stores
//! through a mapping that stays open are not seen this way; the close that ends
//! such a mapping is.
//!
//! - `sys`: the system calls. `record`: the bytes that they give. `handle`: from
//!   file handles to inode numbers. `filesystem`: what is watched of it.
//!   `translate`: from records to events. `who`: process names.
//!
//! The kernel queues an event in the system call that makes the change, so a
//! read that finds the queue empty has seen everything before it: that is the
//! whole of a barrier.

pub(crate) mod handle;
pub(crate) mod sys;

mod filesystem;
mod record;
mod translate;
mod who;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use self::filesystem::Filesystem;
pub(crate) use self::translate::Format;
use self::translate::{Filter, Translator};
use super::choice::Detail;
use super::{About, Signal, Sink, Source, SourceStats, Watch};

/// One read takes up to this much: some two thousand events.
const BUFFER_BYTES: usize = 256 << 10;
/// How long a thread that cannot read waits before it tries again.
const RETRY: Duration = Duration::from_millis(200);

const INIT_FLAGS: u32 = libc::FAN_CLASS_NOTIF
    | libc::FAN_CLOEXEC
    | libc::FAN_NONBLOCK
    | libc::FAN_UNLIMITED_QUEUE
    | libc::FAN_UNLIMITED_MARKS;
const MASK: u64 = libc::FAN_CREATE
    | libc::FAN_DELETE
    | libc::FAN_MODIFY
    | libc::FAN_ATTRIB
    | libc::FAN_CLOSE_WRITE
    | libc::FAN_ONDIR;

impl Format {
    /// Best first.
    const ALL: [Format; 2] = [Format::Rename, Format::MovedFromTo];

    pub(crate) fn init_flags(self) -> u32 {
        INIT_FLAGS
            | match self {
                Format::Rename => libc::FAN_REPORT_DFID_NAME_TARGET,
                Format::MovedFromTo => libc::FAN_REPORT_DFID_NAME | libc::FAN_REPORT_FID,
            }
    }

    pub(crate) fn mask(self) -> u64 {
        MASK | match self {
            Format::Rename => libc::FAN_RENAME,
            Format::MovedFromTo => libc::FAN_MOVE,
        }
    }
}

/// Why fanotify cannot watch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FanotifyError {
    #[error("fanotify cannot be opened: {source}; {}", init_remedy(.source))]
    Init { source: io::Error },
    #[error("fanotify cannot watch the filesystem of {path}: {source}; {}", mark_remedy(.source))]
    Mark { path: PathBuf, source: io::Error },
    #[error("the folder {path} cannot be opened: {source}")]
    Root { path: PathBuf, source: io::Error },
    #[error("the filesystem of {path} cannot name its files by handle: {source}; {}", mark_remedy(.source))]
    Handles { path: PathBuf, source: io::Error },
    #[error("no thread could be started for fanotify: {0}")]
    Thread(io::Error),
    #[error("no event descriptor could be made for fanotify: {0}")]
    Wake(io::Error),
}

fn init_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "run omirr as root or with CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH",
        Some(libc::ENOSYS) => "this kernel is built without fanotify",
        Some(libc::EMFILE) => "this user has too many event groups open, raise fs.fanotify.max_user_groups",
        Some(libc::EINVAL) => "this kernel cannot report names; Linux 5.9 or newer can",
        _ => "run `omirr doctor` for what this host allows",
    }
}

fn mark_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "run omirr as root or with CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH",
        Some(libc::ENODEV | libc::EOPNOTSUPP | libc::EOVERFLOW) => {
            "this filesystem has no file handles, use the scan source for it"
        }
        Some(libc::EXDEV) => "this kernel cannot watch a btrfs subvolume, use ebpf or scan for it",
        _ => "run `omirr doctor` for what this host allows",
    }
}

/// Watches until it is dropped.
pub struct FanotifySource {
    about: About,
    format: Format,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the source and its thread share.
struct Shared {
    state: Mutex<State>,
    answered: Condvar,
    /// Wakes the thread for a barrier or the end.
    wake: OwnedFd,
}

#[derive(Default)]
struct State {
    stop: bool,
    /// Barriers asked for, and answered, as counts.
    asked: u64,
    answered: u64,
    stats: SourceStats,
}

impl FanotifySource {
    /// Starts to watch everything beneath `watches`. Every change made after
    /// this returns is reported to `sink`.
    pub fn open(
        watches: &[Watch],
        own_pid: Option<u32>,
        detail: Detail,
        sink: Sink,
    ) -> Result<FanotifySource, FanotifyError> {
        let mut refused = None;
        for format in Format::ALL {
            match FanotifySource::open_as(format, watches, Filter { own_pid, detail }) {
                Ok((group, translator)) => {
                    return FanotifySource::start(group, translator, format, sink);
                }
                // An unknown flag: the kernel is older than this format.
                Err(error) if is_invalid(&error) => refused = refused.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        Err(refused.unwrap_or_else(|| FanotifyError::Init {
            source: io::ErrorKind::Unsupported.into(),
        }))
    }

    fn open_as(
        format: Format,
        watches: &[Watch],
        filter: Filter,
    ) -> Result<(OwnedFd, Translator), FanotifyError> {
        let group = sys::init(format.init_flags()).map_err(|source| FanotifyError::Init { source })?;
        let mut filesystems: Vec<Filesystem> = Vec::new();
        for watch in watches {
            if let Some(fs) = filesystems.iter_mut().find(|fs| fs.dev == watch.dev) {
                fs.add_root(watch.ino);
                continue;
            }
            let fs = Filesystem::open(watch)?;
            sys::mark_filesystem(group.as_fd(), format.mask(), fs.root().as_fd()).map_err(|source| {
                FanotifyError::Mark {
                    path: watch.path.clone(),
                    source,
                }
            })?;
            filesystems.push(fs);
        }
        Ok((group, Translator::new(filesystems, format, filter)))
    }

    fn start(
        group: OwnedFd,
        translator: Translator,
        format: Format,
        sink: Sink,
    ) -> Result<FanotifySource, FanotifyError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| FanotifyError::Wake(error.into()))?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            answered: Condvar::new(),
            wake,
        });
        let mut reader = Reader {
            group,
            translator,
            sink,
            shared: Arc::clone(&shared),
            delivered: 0,
        };
        let thread = std::thread::Builder::new()
            .name("omirr-fanotify".into())
            .spawn(move || reader.run())
            .map_err(FanotifyError::Thread)?;
        let about = About {
            kind: "fanotify",
            attach: None,
            transport: None,
            reason: String::new(),
        };
        Ok(FanotifySource {
            about,
            format,
            shared,
            thread: Some(thread),
        })
    }

    /// What this kernel's fanotify lacks, to be added to a reason.
    pub(crate) fn limitation(&self) -> &'static str {
        match self.format {
            Format::Rename => "",
            Format::MovedFromTo => {
                " (without the inodes of renamed directories, which Linux 5.17 and newer tell)"
            }
        }
    }

    /// Says why this source was taken, in the words of who took it.
    pub(crate) fn set_reason(&mut self, reason: String) {
        self.about.reason = reason;
    }
}

fn is_invalid(error: &FanotifyError) -> bool {
    let (FanotifyError::Init { source } | FanotifyError::Mark { source, .. }) = error else {
        return false;
    };
    source.raw_os_error() == Some(libc::EINVAL)
}

impl Source for FanotifySource {
    fn about(&self) -> &About {
        &self.about
    }

    fn stats(&self) -> SourceStats {
        self.shared.state.lock().stats.clone()
    }

    fn barrier(&self, timeout: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        state.asked += 1;
        let ticket = state.asked;
        self.shared.wake_up();
        while state.answered < ticket {
            if self.shared.answered.wait_until(&mut state, deadline).timed_out() && state.answered < ticket {
                anyhow::bail!("fanotify's queue was not empty within {timeout:?}");
            }
        }
        Ok(())
    }
}

impl Drop for FanotifySource {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.wake_up();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been printed; there is nothing
            // left of it to clean up.
            drop(thread.join());
        }
    }
}

impl Shared {
    fn wake_up(&self) {
        // The only way to fail is a counter that is full, which wakes as well.
        rustix::io::write(&self.wake, &1u64.to_ne_bytes()).ok();
    }
}

/// When to let events gather. Each wake-up costs more than ten events; where
/// they never stop coming, reading them in portions costs a fraction and
/// delays them by [`GATHER`]. So does reading what is nobody's business here: what
/// is written beside the shares, by the daemon itself among others.
#[derive(Default)]
struct Pace {
    last: Option<Instant>,
    /// Wake-ups in a row that followed one another at once.
    hasty: u32,
}

/// Wake-ups closer together than this count as at once.
const AT_ONCE: Duration = Duration::from_micros(300);
/// So many of them may follow one another.
const HASTY_MAX: u32 = 16;
const GATHER: Duration = Duration::from_millis(1);

impl Pace {
    /// How long to sleep after a drain that ended `now`, if at all.
    /// `told` is whether anybody was told of something.
    fn after_drain(&mut self, now: Instant, told: bool) -> Option<Duration> {
        let pause = (self.hasty >= HASTY_MAX).then_some(GATHER);
        let allowed = AT_ONCE + pause.unwrap_or_default() * 2;
        let at_once = self.last.is_some_and(|last| now.duration_since(last) < allowed);
        self.hasty = if at_once { self.hasty.saturating_add(1) } else { 0 };
        self.last = Some(now);
        (!told || self.hasty >= HASTY_MAX).then_some(GATHER)
    }
}

/// The thread's side.
struct Reader {
    group: OwnedFd,
    translator: Translator,
    sink: Sink,
    shared: Arc<Shared>,
    delivered: u64,
}

impl Reader {
    fn run(&mut self) {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut pace = Pace::default();
        loop {
            if let Err(error) = self.wait() {
                tracing::error!(%error, "waiting for fanotify's events");
                std::thread::sleep(RETRY);
            }
            let asked = {
                let state = self.shared.state.lock();
                if state.stop {
                    return;
                }
                state.asked
            };
            let before = self.delivered;
            let drained_bytes = self.drain(&mut buffer);
            let pause = pace.after_drain(Instant::now(), self.delivered > before);
            let mut state = self.shared.state.lock();
            state.answered = asked;
            state.stats.events = self.delivered;
            state.stats.dropped = self.translator.overflows;
            state.stats.high_water_bytes = state.stats.high_water_bytes.max(drained_bytes);
            self.shared.answered.notify_all();
            drop(state);
            if let Some(pause) = pause {
                std::thread::sleep(pause);
            }
        }
    }

    /// Returns when there is something to read or somebody asks for something.
    fn wait(&self) -> io::Result<()> {
        let mut fds = [
            PollFd::new(&self.group, PollFlags::IN),
            PollFd::new(&self.shared.wake, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds[1].revents().contains(PollFlags::IN) {
            let mut count = [0; 8];
            match rustix::io::read(&self.shared.wake, &mut count) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Reads until the queue is empty, and gives everything to the sink.
    fn drain(&mut self, buffer: &mut [u8]) -> u64 {
        let mut drained_bytes = 0;
        loop {
            let len = match rustix::io::read(&self.group, &mut *buffer) {
                Ok(len) => len,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => break,
                Err(error) => {
                    tracing::error!(%error, "reading fanotify's events");
                    self.sink.tell(vec![Signal::Lost { dev: None, count: 0 }], None);
                    std::thread::sleep(RETRY);
                    break;
                }
            };
            drained_bytes += len as u64;
            let mut signals = Vec::new();
            if let Err(error) = self.translator.take(&buffer[..len], &mut signals) {
                tracing::error!(%error, "reading fanotify's events");
                signals.push(Signal::Lost { dev: None, count: 0 });
            }
            self.deliver(signals);
            if self.shared.state.lock().stop {
                break;
            }
        }
        let mut signals = Vec::new();
        self.translator.end_of_drain(&mut signals);
        self.deliver(signals);
        drained_bytes
    }

    fn deliver(&mut self, signals: Vec<Signal>) {
        if !signals.is_empty() {
            self.delivered += signals.len() as u64;
            self.sink.tell(signals, None);
        }
    }
}

#[cfg(test)]
mod tests;
