//! What the programs counted, read without a system call.
//!
//! In: array maps, mapped as memory. Out: counters by processor, with hits by
//! hook, and how often the kernel itself passed over a program; and the word
//! that the reader need not be woken. The programs
//! go on counting while it is read; each value is whole, together they are of
//! about one moment.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering, fence},
};

use omirr_common::{counters::Counters, hooks::HOOK_COUNT};

/// A map's values, as words.
struct Words {
    start: *const AtomicU64,
    count: usize,
}

// SAFETY: the words are read and written atomically, and stay mapped for as long as
// the value lives.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    fn map(fd: BorrowedFd<'_>, count: usize, access: libc::c_int) -> io::Result<Self> {
        // SAFETY: a new mapping of a map's values; the kernel refuses a length
        // that the map does not have.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * 8,
                access,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast(),
            count,
        })
    }

    fn get(&self, index: usize) -> u64 {
        if index >= self.count {
            return 0;
        }
        // SAFETY: the mapping is page-aligned, `count` words long, and lives.
        unsafe { &*self.start.add(index) }.load(Ordering::Relaxed)
    }

    /// Only for what was mapped to be written.
    fn set(&self, index: usize, value: u64) {
        if index < self.count {
            // SAFETY: as above, and writable.
            unsafe { &*self.start.add(index) }.store(value, Ordering::Release);
        }
    }
}

impl Words {
    /// Only for what was mapped to be written. Seen by everyone before anything that
    /// comes after it.
    fn add_one(&self, index: usize) {
        if index < self.count {
            // SAFETY: as above, and writable.
            unsafe { &*self.start.add(index) }.fetch_add(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and unmapped once.
        unsafe { libc::munmap(self.start.cast_mut().cast(), self.count * 8) };
    }
}

/// The programs' counts.
pub struct Counts {
    counters: Words,
    processors: usize,
}

/// Words of one processor's set.
const SET: usize = size_of::<Counters>() / 8;

impl Counts {
    /// Maps the counters, which have one set per processor.
    pub fn new(counters: BorrowedFd<'_>, processors: usize) -> io::Result<Self> {
        Ok(Self {
            counters: Words::map(counters, SET * processors, libc::PROT_READ)?,
            processors,
        })
    }

    /// By processor.
    pub fn counters(&self) -> Vec<Counters> {
        let one = |processor: usize| {
            let word = |n: usize| self.counters.get(processor * SET + n);
            Counters {
                submitted: word(0),
                coalesced: word(1),
                dropped: word(2),
                lost: word(3),
                unframed: word(4),
                stale: word(5),
                high_water: word(6),
                unsure: word(7),
                hits: std::array::from_fn(|hook| word(8 + hook)),
            }
        };
        (0..self.processors).map(one).collect()
    }

    /// One count over all processors.
    pub fn sum(&self, of: impl Fn(&Counters) -> u64) -> u64 {
        self.counters().iter().map(of).sum()
    }

    /// By hook, over all processors.
    pub fn hits(&self) -> Vec<u64> {
        let all = self.counters();
        (0..HOOK_COUNT)
            .map(|hook| all.iter().map(|c| c.hits[hook]).sum())
            .collect()
    }
}

/// What the programs are told while they run.
pub struct Control(Words);

impl Control {
    pub fn new(control: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self(Words::map(
            control,
            size_of::<omirr_common::counters::Control>() / 8,
            libc::PROT_READ | libc::PROT_WRITE,
        )?))
    }

    /// Whose changes are passed over.
    pub fn set_own(&self, own: &super::own::Own) {
        let words = [own.start, own.space.0, own.space.1];
        for (index, word) in (2..).zip(words) {
            self.0.set(index, word);
        }
        // Last: from here on it counts.
        self.0.set(1, own.tgid);
    }

    /// Entries are being taken out of the map until the result is dropped: what the
    /// programs add meanwhile they tell by itself as well.
    pub fn taking(&self) -> Taking<'_> {
        self.0.add_one(TAKES);
        Taking(self)
    }

    /// An earlier process may have been killed while it took one.
    pub fn nobody_takes(&self) {
        if self.0.get(TAKES) & 1 != 0 {
            self.0.add_one(TAKES);
        }
    }

    /// Until then (`CLOCK_MONOTONIC`, ns) the reader comes by itself.
    pub fn quiet_until(&self, time_ns: u64) {
        self.0.set(0, time_ns);
    }
}

/// The word of [`omirr_common::counters::Control::takes`].
const TAKES: usize = 5;
const _: () = assert!(std::mem::offset_of!(omirr_common::counters::Control, takes) == 8 * TAKES);

/// See [`Control::taking`].
pub struct Taking<'a>(&'a Control);

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        self.0.0.add_one(TAKES);
    }
}

/// How often the kernel passed over a program because it was already running
/// on that processor: with a kernel that preempts itself, in another thread. 0
/// where the kernel does not say (before 5.12, where tracing programs are never
/// passed over).
pub(super) fn passed_over(program: BorrowedFd<'_>) -> u64 {
    /// `BPF_OBJ_GET_INFO_BY_FD`.
    const GET_INFO: libc::c_long = 15;
    /// Where `recursion_misses` lies in `struct bpf_prog_info`, in words.
    const MISSES: usize = 26;
    #[repr(C)]
    struct Request {
        fd: u32,
        len: u32,
        info: u64,
    }
    let mut info = [0u64; MISSES + 1];
    let mut request = Request {
        fd: u32::try_from(program.as_fd().as_raw_fd()).unwrap_or(u32::MAX),
        len: (info.len() * 8) as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel writes at most `len` bytes at `info`, which live.
    let failed = unsafe { libc::syscall(libc::SYS_bpf, GET_INFO, &raw mut request, size_of::<Request>()) };
    if failed == 0 { info[MISSES] } else { 0 }
}
