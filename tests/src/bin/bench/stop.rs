//! Ctrl-C: asks everything that waits to give up, so that values are dropped in
//! order and take their processes, namespaces and mounts with them.
//!
//! In: SIGINT, SIGTERM, SIGHUP. Out: [`check`] fails. Nothing is ended here.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// From now on these signals only ask.
pub fn listen() {
    let handler: extern "C" fn(libc::c_int) = note;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: all-zero is a valid action with an empty mask and without
        // flags, so that waiting calls return; the handler only stores a flag.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as libc::sighandler_t;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

/// The user wants the run to end.
#[derive(Debug)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// # Errors
/// [`Interrupted`].
pub fn check() -> Result<()> {
    if ASKED.load(Ordering::Relaxed) {
        return Err(Interrupted.into());
    }
    Ok(())
}

/// A measurement took longer than it may.
#[derive(Debug)]
pub struct TimedOut;

impl fmt::Display for TimedOut {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("it took longer than it may")
    }
}

impl std::error::Error for TimedOut {}

/// Waits until `there` says so: looks at once, then ever less often, with pauses
/// from `first` to `last`. Returns when it was so.
///
/// # Errors
/// [`TimedOut`] or [`Interrupted`].
pub fn until(
    end: Instant,
    first: Duration,
    last: Duration,
    mut there: impl FnMut() -> bool,
) -> Result<Instant> {
    let started = Instant::now();
    loop {
        if there() {
            return Ok(Instant::now());
        }
        check()?;
        if Instant::now() > end {
            return Err(TimedOut.into());
        }
        // A hundredth of what it took so far spoils no figure.
        std::thread::sleep((started.elapsed() / 100).clamp(first, last));
    }
}
