//! The end of threads that go on until they are told, also if the test panics.

use std::sync::atomic::{AtomicBool, Ordering};

/// Sets a flag when it is dropped: threads of a scope that wait for the flag would
/// otherwise keep a panic of the scope's own thread from being seen.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
