//! What the programs count.
//!
//! The counts lie in maps that the user side sees as memory, one set per
//! processor, and not in per-processor maps, because reading those takes a
//! system call during which the kernel runs no kprobe program on that
//! processor: on a kernel that preempts itself a change would go unseen.

/// Written by the programs, summed by the user side.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records handed over.
    pub submitted: u64,
    /// Records that the ring had no room for.
    pub dropped: u64,
    /// Operations that could not be followed from entry to exit, because too
    /// many were under way.
    pub unframed: u64,
    /// Operations whose exit was never seen, found by the thread's next one
    /// and reported then.
    pub stale: u64,
    /// The most that was seen waiting in the ring, bytes.
    pub high_water: u64,
    /// Fills the line of memory, so that processors do not share it.
    pub reserved: [u64; 3],
}

const _: () = assert!(size_of::<Counters>() == 64);

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers of one size only, no padding.
unsafe impl aya::Pod for Counters {}
