//! What the programs counted, read without a system call.
//!
//! In: two array maps, mapped as memory. Out: counters by processor, hits by
//! hook, and how often the kernel itself passed over a program. The programs
//! go on counting while it is read; each value is whole, together they are of
//! about one moment.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use omirr_common::{counters::Counters, hooks::HOOK_COUNT};

/// A map's values, as words.
struct Words {
    start: *const AtomicU64,
    count: usize,
}

// SAFETY: the words are only read, atomically, and stay mapped for as long as
// the value lives.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    fn map(fd: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        // SAFETY: a new read-only mapping of a map's values; the kernel refuses
        // a length that the map does not have.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * 8,
                libc::PROT_READ,
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
    hits: Words,
    processors: usize,
}

impl Counts {
    /// Maps the two maps, which have one set of entries per processor.
    pub fn new(counters: BorrowedFd<'_>, hits: BorrowedFd<'_>, processors: usize) -> io::Result<Self> {
        let words = size_of::<Counters>() / 8;
        Ok(Self {
            counters: Words::map(counters, words * processors)?,
            hits: Words::map(hits, HOOK_COUNT * processors)?,
            processors,
        })
    }

    /// By processor.
    pub fn counters(&self) -> Vec<Counters> {
        let words = size_of::<Counters>() / 8;
        let one = |processor: usize| {
            let word = |n: usize| self.counters.get(processor * words + n);
            Counters {
                submitted: word(0),
                dropped: word(1),
                unframed: word(2),
                stale: word(3),
                high_water: word(4),
                reserved: [0; 3],
            }
        };
        (0..self.processors).map(one).collect()
    }

    /// Records that were lost, over all processors.
    pub fn lost(&self) -> u64 {
        self.counters().iter().map(|c| c.dropped + c.unframed).sum()
    }

    /// By hook, over all processors.
    pub fn hits(&self) -> Vec<u64> {
        (0..HOOK_COUNT)
            .map(|hook| {
                (0..self.processors)
                    .map(|p| self.hits.get(p * HOOK_COUNT + hook))
                    .sum()
            })
            .collect()
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
