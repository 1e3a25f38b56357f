//! Where changes come from.
//!
//! In: the kernel (eBPF programs, fanotify) or the clock (scans). Out: typed
//! [`Event`]s that name inodes and names, in the order in which they happened.
//! A source never looks at a file and never waits for what is behind it: its
//! thread drains the kernel's queue into the sink as fast as it can. An event
//! is a hint; what is true is on disk.

pub mod auto;
pub mod cgroup;
pub mod choice;
pub mod ebpf;
pub mod fanotify;
pub mod scan;
mod written;

use std::time::Duration;

pub use written::{Ranges, Written};

/// What happened. The set is the tracer's; a source that knows less detail
/// reports the nearest one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Write,
    Truncate,
    Fallocate,
    Create,
    Mkdir,
    Mknod,
    Symlink,
    Link,
    Unlink,
    Rmdir,
    Rename,
    /// Two names swapped their inodes.
    Exchange,
    /// Mode, owner, times, flags.
    Attr,
    Xattr,
    /// The last writer closed the file: its content is at rest.
    Close,
}

impl Op {
    pub const ALL: [Op; 15] = [
        Op::Write,
        Op::Truncate,
        Op::Fallocate,
        Op::Create,
        Op::Mkdir,
        Op::Mknod,
        Op::Symlink,
        Op::Link,
        Op::Unlink,
        Op::Rmdir,
        Op::Rename,
        Op::Exchange,
        Op::Attr,
        Op::Xattr,
        Op::Close,
    ];

    /// The operation in one lower-case word, as `omirr trace` prints it.
    pub fn name(self) -> &'static str {
        match self {
            Op::Write => "write",
            Op::Truncate => "truncate",
            Op::Fallocate => "fallocate",
            Op::Create => "create",
            Op::Mkdir => "mkdir",
            Op::Mknod => "mknod",
            Op::Symlink => "symlink",
            Op::Link => "link",
            Op::Unlink => "unlink",
            Op::Rmdir => "rmdir",
            Op::Rename => "rename",
            Op::Exchange => "exchange",
            Op::Attr => "attr",
            Op::Xattr => "xattr",
            Op::Close => "close",
        }
    }

    /// Whether the operation may have changed a file's content.
    pub fn touches_content(self) -> bool {
        matches!(
            self,
            Op::Write
                | Op::Truncate
                | Op::Fallocate
                | Op::Create
                | Op::Close
                | Op::Link
                | Op::Rename
                | Op::Exchange
        )
    }
}

/// Several operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpSet(u16);

impl OpSet {
    pub fn insert(&mut self, op: Op) {
        self.0 |= 1 << op as u16;
    }

    pub fn extend(&mut self, others: OpSet) {
        self.0 |= others.0;
    }

    pub fn contains(self, op: Op) -> bool {
        self.0 & 1 << op as u16 != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether there are none but these.
    pub fn is_of(self, others: &[Op]) -> bool {
        others.iter().fold(self.0, |left, &op| left & !(1 << op as u16)) == 0
    }
}

/// A name in a directory that is known by its inode.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Dirent {
    /// The directory's inode number; on the event's device.
    pub dir: u64,
    /// Empty: the directory itself.
    pub name: Box<[u8]>,
}

/// One change, as a source reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// `CLOCK_MONOTONIC`, ns: when it happened, or under fanotify when it was read from
    /// the kernel; 0 where the source does not know.
    pub time_ns: u64,
    pub op: Op,
    /// What happened to the same inode under the same name until the event was
    /// read, where the source merges changes.
    pub also: OpSet,
    /// The kernel's device number of the filesystem (`st_dev` of its files).
    pub dev: u64,
    /// The changed inode; 0 where the source does not know.
    pub ino: u64,
    /// Its generation; 0 where unknown.
    pub generation: u32,
    /// Whether the changed inode is a directory.
    pub is_dir: bool,
    /// Where it is, or was before a rename; none for an inode whose name the
    /// source does not know.
    pub at: Option<Dirent>,
    /// Rename, exchange, link: the new name.
    pub to: Option<Dirent>,
    /// The bytes written, from and up to, where the source knows.
    pub range: Option<(u64, u64)>,
    /// Where it may have changed the content since the source last told of this
    /// inode under this name; `Anywhere` where the source cannot be relied upon to
    /// tell of each change with its bytes.
    pub written: Written,
    /// At some time since then nobody had the file mapped to write, as far as a source
    /// tells that would have told of a mapping since.
    pub unmapped: bool,
    /// Someone has the file mapped to write, and may change it without any sign.
    pub mapped: bool,
    /// What else happened to the inode since this was sent may have been told already,
    /// as [`Recovered`]: that nobody has it mapped was before that.
    pub stale: bool,
    /// Who did it: process, command, user. 0 and empty where unknown.
    pub pid: u32,
    pub uid: u32,
    /// Its cgroup (v2), as the inode number of the cgroup's directory; 0 where
    /// unknown.
    pub cgroup: u64,
    pub comm: [u8; 16],
}

#[cfg(test)]
impl Event {
    /// A change of some inode by this process, for tests of who.
    pub(crate) fn told_by(op: Op, pid: u32, uid: u32, comm: &[u8]) -> Event {
        let mut bytes = [0; 16];
        bytes[..comm.len()].copy_from_slice(comm);
        Event {
            time_ns: 0,
            op,
            also: OpSet::default(),
            dev: 1,
            ino: 2,
            generation: 0,
            is_dir: false,
            at: None,
            to: None,
            range: None,
            written: Written::Anywhere,
            unmapped: false,
            mapped: false,
            stale: false,
            pid,
            uid,
            cgroup: 0,
            comm: bytes,
        }
    }
}

impl Event {
    /// Whether the file's content may have changed.
    pub fn touches_content(&self) -> bool {
        let also = [Op::Write, Op::Truncate, Op::Fallocate, Op::Close];
        self.op.touches_content() || also.iter().any(|&op| self.also.contains(op))
    }

    /// Whether the last writer has closed the file.
    pub fn is_at_rest(&self) -> bool {
        self.op == Op::Close || self.also.contains(Op::Close)
    }

    /// The command as text, up to its first NUL.
    pub fn comm(&self) -> String {
        let end = self.comm.iter().position(|&b| b == 0).unwrap_or(self.comm.len());
        String::from_utf8_lossy(&self.comm[..end]).into_owned()
    }
}

/// What changed while there was no room, or nobody, to tell of it one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Device number as `stat` shows it.
    pub dev: u64,
    /// Changed inodes.
    pub inodes: Vec<Recoverable>,
    /// Inodes of directories to be compared with the index, names and children.
    pub dirs: Vec<u64>,
    /// A directory among these names may have moved, and what is in it with it.
    pub moved: bool,
}

/// An inode that changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recoverable {
    pub ino: u64,
    /// The directory of the name under which it changed; 0 if unknown.
    pub parent: u64,
    /// It came, went, or was made: the directory has to be compared, too.
    pub named: bool,
    /// Someone had it mapped to write.
    pub mapped: bool,
}

/// What a source hands to whoever listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signal {
    Event(Event),
    Recovered(Recovered),
    /// Events were lost on this device (all devices if none): what lies there
    /// must be compared with the index. `count` of them, if known.
    Lost {
        dev: Option<u64>,
        count: u64,
    },
    /// [`Event::written`] may have left out something, of whatever file.
    Doubt,
    /// Nothing is known of any device, as ever: all must be compared with the
    /// index. Only a source without events says so.
    Compare,
}

/// The time of now, ns, on the clock of [`Event::time_ns`].
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Whom a source reports to; called on the source's own thread, must not block.
/// A function that takes batches is one that writes nothing down.
pub trait Listener: Send {
    /// What will be told, in any order. A source that goes on when this process
    /// is killed gives a change away only after this: what is written down here
    /// is not lost.
    fn note(&mut self, _signals: &[Signal]) {}

    /// A batch, in the order of the changes. `in_hand` is the time (ns, as in
    /// [`Event::time_ns`]) of the oldest change that was noted and is still to be
    /// told; none if all were.
    fn tell(&mut self, batch: Vec<Signal>, in_hand: Option<u64>);
}

impl<F: FnMut(Vec<Signal>) + Send> Listener for F {
    fn tell(&mut self, batch: Vec<Signal>, _in_hand: Option<u64>) {
        if !batch.is_empty() {
            self(batch);
        }
    }
}

pub type Sink = Box<dyn Listener>;

/// A tree that a source must report on.
#[derive(Clone, Debug)]
pub struct Watch {
    /// The share's root, absolute.
    pub path: std::path::PathBuf,
    /// `st_dev` and inode of the root.
    pub dev: u64,
    pub ino: u64,
}

/// Which source runs and why, for `status`, `doctor` and the log.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct About {
    /// `ebpf`, `fanotify` or `scan`.
    pub kind: &'static str,
    /// `fentry` or `kprobe`, for eBPF.
    pub attach: Option<&'static str>,
    /// `ring` or `perf`, for eBPF.
    pub transport: Option<&'static str>,
    /// One sentence: why this one, and why not a better one.
    pub reason: String,
}

/// What a source counts, since it started.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct SourceStats {
    /// Events that reached the daemon.
    pub events: u64,
    /// Events that the kernel could not hand over.
    pub dropped: u64,
    /// Changes merged into an entry that was already waiting.
    pub coalesced: u64,
    /// Entries of the kernel's map of changed inodes now, and its size.
    pub map_entries: u64,
    pub map_capacity: u64,
    /// Times that the ring was found to have been full.
    pub overflows: u64,
    /// Inodes recovered from the map after that.
    pub recovered: u64,
    /// Directories compared because the map was full, or names had no room.
    pub dirs_compared: u64,
    /// Changes that only a comparison of the whole tree can make good.
    pub lost: u64,
    /// Changed inodes and directories found waiting at the start, from while no
    /// daemon was there.
    pub taken_over: u64,
    /// Size of the kernel's buffer, bytes; 0 where there is none.
    pub buffer_bytes: u64,
    /// The most that was seen waiting in it, bytes.
    pub high_water_bytes: u64,
    /// Per CPU: handed over, dropped. Empty where the source does not tell.
    pub per_cpu: Vec<CpuStats>,
    /// Hooks that are attached, and those that are not with what covers them.
    pub hooks: Vec<HookStats>,
}

#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct CpuStats {
    pub cpu: u32,
    pub submitted: u64,
    pub coalesced: u64,
    pub dropped: u64,
}

#[derive(Clone, Debug, serde::Serialize)]
pub struct HookStats {
    /// The kernel function.
    pub hook: String,
    pub attached: bool,
    /// Why not, and what covers it.
    pub note: Option<String>,
    pub hits: u64,
}

/// How far an index had kept up with a tree, as remembered by a source that goes
/// on without the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptUp {
    /// Names the index.
    pub replica: u64,
    /// Its highest sequence number, at least.
    pub head: u64,
}

/// A running source. Dropping it detaches it and ends its thread; what it can
/// keep beyond that it keeps.
pub trait Source: Send + Sync {
    fn about(&self) -> &About;
    fn stats(&self) -> SourceStats;
    /// Whether it goes on collecting changes when the daemon ends.
    fn keeps(&self) -> bool {
        false
    }
    /// What was remembered of a watch (by its place) when the source was opened,
    /// if no change was missed since; what changed since then is handed over
    /// like anything else.
    fn kept_up(&self, _watch: usize) -> Option<KeptUp> {
        None
    }
    /// Remembers that an index has kept up with a watch, or that it has not.
    fn set_kept_up(&self, _watch: usize, _kept_up: Option<KeptUp>) -> anyhow::Result<()> {
        Ok(())
    }
    /// Returns once every change made before the call has been given to the
    /// sink; an error says that it took longer than `timeout`.
    fn barrier(&self, timeout: Duration) -> anyhow::Result<()>;
    /// The same, but for operations that have not ended yet, of which a barrier tells as
    /// if they had: returns once what was told by now has been given to the sink.
    fn hand_over(&self, timeout: Duration) -> anyhow::Result<()> {
        self.barrier(timeout)
    }
}
