//! Small wrappers of system calls.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result};

/// A page, and aligned like one, as `O_DIRECT` wants it.
pub const PAGE: usize = 4096;

#[repr(align(4096))]
pub struct Aligned(pub [u8; PAGE]);

/// `CLOCK_MONOTONIC`, ns: the clock of the events.
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Turns the -1 of a system call into the error.
pub fn check<T: PartialOrd + From<i8>>(result: T) -> io::Result<T> {
    if result < T::from(0) {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Writes a filesystem's dirty pages to its disk.
pub fn syncfs(folder: &Path) -> Result<()> {
    let file = File::open(folder).with_context(|| folder.display().to_string())?;
    Ok(rustix::fs::syncfs(file)?)
}

/// A shared, writable mapping of a file's first page; ended when it is dropped.
pub struct Mapping(*mut u8);

impl Mapping {
    pub fn of(file: &File) -> Result<Self> {
        let (protection, null) = (libc::PROT_READ | libc::PROT_WRITE, std::ptr::null_mut());
        // SAFETY: a fresh mapping, of which nothing else knows.
        let page = unsafe { libc::mmap(null, PAGE, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("mmap");
        }
        Ok(Self(page.cast()))
    }

    pub fn store(&self, byte: u8) {
        // SAFETY: the page is mapped as long as `self` lives, and the file is
        // at least that long.
        unsafe { self.0.write_volatile(byte) };
    }

    pub fn sync(&self) -> Result<()> {
        // SAFETY: the page is mapped as long as `self` lives.
        check(unsafe { libc::msync(self.0.cast(), PAGE, libc::MS_SYNC) }).context("msync")?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, unmapped once.
        unsafe { libc::munmap(self.0.cast(), PAGE) };
    }
}
