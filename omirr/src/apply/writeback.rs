//! Sending written bytes on their way to the disk, without waiting for them.
#![expect(unsafe_code, reason = "sync_file_range has no safe wrapper")]

use std::os::fd::{AsRawFd, BorrowedFd};

/// Has the kernel begin to write `len` bytes from `at` on, as far as they are not on
/// the disk. This promises nothing: whoever needs them there syncs the file, and is
/// told then what went wrong. A filesystem that cannot do it leaves all to that.
pub(super) fn begin(fd: BorrowedFd<'_>, at: u64, len: u64) {
    let (Ok(at), Ok(len)) = (i64::try_from(at), i64::try_from(len)) else {
        return;
    };
    // SAFETY: a plain system call on a descriptor that is borrowed, hence open; it
    // touches none of this process' memory.
    unsafe {
        libc::sync_file_range(fd.as_raw_fd(), at, len, libc::SYNC_FILE_RANGE_WRITE);
    }
}
