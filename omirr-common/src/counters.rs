//! What the programs count, and what they are told while they run.
//!
//! The values lie in maps that the user side sees as memory, one set per
//! processor, and not in per-processor maps, because reading those takes a
//! system call during which the kernel runs no kprobe program on that
//! processor: on a kernel that preempts itself a change would go unseen.

use crate::hooks::HOOK_COUNT;

/// Room for the hooks' counts.
pub const HITS: usize = 56;

/// Written by the programs, summed by the user side.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Records handed over.
    pub submitted: u64,
    /// Changes that only widened an entry that was waiting.
    pub coalesced: u64,
    /// Records that the ring had no room for; the inode's entry, or its
    /// directories', says what they were about.
    pub dropped: u64,
    /// Changes of which nothing was kept: the tree must be compared.
    pub lost: u64,
    /// Operations that could not be followed from entry to exit, because too
    /// many were under way.
    pub unframed: u64,
    /// Operations whose exit was never seen, found by the thread's next one
    /// and reported then.
    pub stale: u64,
    /// The most that was seen waiting in the ring, bytes.
    pub high_water: u64,
    /// Of `dropped`: those whose entry may have been taken while they were added to
    /// it, so that whoever took it does not know all of its bytes.
    pub unsure: u64,
    /// Changes beneath a share that each hook saw.
    pub hits: [u64; HITS],
}

const _: () = assert!(size_of::<Counters>() == 512);
const _: () = assert!(HOOK_COUNT <= HITS);

/// Written by the user side.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// Until then (`CLOCK_MONOTONIC`, ns) the reader comes by itself and need
    /// not be woken.
    pub quiet_until_ns: u64,
    /// The process whose changes are passed over; 0: none.
    pub own_tgid: u64,
    /// When it started, in hundredths of a second since boot: the number alone
    /// may be given to another process while the programs stay. 0: the programs
    /// go with the process.
    pub own_start: u64,
    /// The process number space that it counts in, as (device, inode) of its
    /// file; 0: the first one.
    pub pid_space_dev: u64,
    pub pid_space_ino: u64,
    /// Counts up when the user side begins to take an entry out of the map, and again
    /// when it has: odd meanwhile. Taking copies first and removes then, so what is
    /// added in between is in neither the copy nor the map.
    pub takes: u64,
    /// Fills the line of memory.
    pub reserved: [u64; 2],
}

const _: () = assert!(size_of::<Control>() == 64);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, integers of one size only, no padding.
    unsafe impl aya::Pod for super::Counters {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Control {}
}
