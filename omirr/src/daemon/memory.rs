//! Giving memory back to the system after a burst of work.
#![expect(unsafe_code, reason = "malloc_trim has no safe wrapper")]

/// Returns what the allocator holds free. glibc keeps it otherwise, and a
/// daemon at rest would look as big as it was at its busiest.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks and frees nothing
    // that is in use; it has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}
