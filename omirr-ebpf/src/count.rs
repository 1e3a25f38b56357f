//! The programs' counters, one set per processor.

use aya_ebpf::helpers::bpf_get_smp_processor_id;
use core::arch::asm;
use omirr_common::{counters::Counters, hooks::HOOK_COUNT};

use crate::maps::COUNTERS;

#[inline(always)]
pub fn processor() -> u32 {
    // SAFETY: a helper without preconditions.
    unsafe { bpf_get_smp_processor_id() }
}

/// Counts one.
#[inline(always)]
pub fn count(which: impl Fn(*mut Counters) -> *mut u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(processor()) {
        add_one(which(counters));
    }
}

/// Counts a change that a hook saw beneath a share, and that it was merged.
#[inline(always)]
pub fn hit(hook: u8, merged: bool) {
    if let Some(counters) = COUNTERS.get_ptr_mut(processor())
        && usize::from(hook) < HOOK_COUNT
    {
        // SAFETY: a live map value; the index was checked.
        add_one(unsafe { &raw mut (*counters).hits[usize::from(hook)] });
        if merged {
            // SAFETY: as above.
            add_one(unsafe { &raw mut (*counters).coalesced });
        }
    }
}

/// Keeps the most that was seen waiting in the ring, bytes.
#[inline(always)]
pub fn high_water(waiting: u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(processor()) {
        // SAFETY: a live map value; a lost update costs a little accuracy.
        unsafe {
            if waiting > (*counters).high_water {
                (*counters).high_water = waiting;
            }
        }
    }
}

/// Adds atomically, because a program may be preempted by another on the same
/// processor. The target has no atomics in the language.
#[inline(always)]
pub fn add_one(counter: *mut u64) {
    // SAFETY: callers pass a live map value.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) 1u64, options(nostack)) };
}

/// What was written to map values before is seen by others before what is read
/// next, by an addition of nothing. So on x86-64; elsewhere such an addition orders
/// nothing, and the user side does not rely on it.
#[inline(always)]
pub fn barrier(word: *mut u64) {
    // SAFETY: callers pass a live map value.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) word, in(reg) 0u64, options(nostack)) };
}

/// Takes one off again.
#[inline(always)]
pub fn take_one(counter: *mut u64) {
    // SAFETY: callers pass a live map value.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) u64::MAX, options(nostack)) };
}
