//! A file that nobody else has open.
//!
//! In: a descriptor. Out: a [`Lease`], as long as which whoever opens the file
//! waits, by this name or another; or none, because somebody has it open or
//! mapped, or because the filesystem or the daemon's privileges know no such
//! thing. What waits does so for the kernel's `lease-break-time` at most (45 s),
//! after which it gets the file as it is; nothing is done under a lease that
//! takes long. Who opens with `O_NONBLOCK` is refused meanwhile (`EAGAIN`).

use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{F_SETLEASE, F_UNLCK, F_WRLCK, SIGURG, c_int, fcntl};

/// Which signal tells that somebody waits; by default it is SIGIO, which ends a
/// process that does not expect it. SIGURG does nothing.
const F_SETSIG: c_int = 10;

/// Given back when dropped.
pub(super) struct Lease<'f>(BorrowedFd<'f>);

impl<'f> Lease<'f> {
    /// None if there is no being alone with the file.
    pub(super) fn take(file: BorrowedFd<'f>) -> Option<Lease<'f>> {
        let set = |command, value: c_int| {
            // SAFETY: the descriptor is open as long as `file` is borrowed, and both
            // commands take a number and no pointer.
            unsafe { fcntl(file.as_raw_fd(), command, value) == 0 }
        };
        (set(F_SETSIG, SIGURG) && set(F_SETLEASE, F_WRLCK)).then_some(Lease(file))
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        // SAFETY: as above. If it fails the kernel has taken the lease already.
        unsafe { fcntl(self.0.as_raw_fd(), F_SETLEASE, F_UNLCK) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, OpenOptions};
    use std::os::fd::AsFd;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn whoever_opens_the_file_waits_until_the_lease_is_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, "old").unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let other = File::open(&path).unwrap();
        assert!(Lease::take(file.as_fd()).is_none(), "somebody has it open");
        drop(other);
        let Some(lease) = Lease::take(file.as_fd()) else {
            // A filesystem that knows none.
            return;
        };
        let (say, said) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            let read = fs::read(&path).unwrap();
            say.send(()).unwrap();
            read
        });
        assert!(
            said.recv_timeout(Duration::from_millis(100)).is_err(),
            "it does not wait"
        );
        std::os::unix::fs::FileExt::write_all_at(&file, b"new", 0).unwrap();
        drop(lease);
        assert_eq!(reader.join().unwrap(), b"new");
    }
}
