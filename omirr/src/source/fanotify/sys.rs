//! The four system calls that `rustix` does not have: `fanotify_init`,
//! `fanotify_mark`, `name_to_handle_at`, `open_by_handle_at`.
//!
//! Nothing here decides anything; every function is one call with owned or
//! borrowed values in and a result out.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::handle::{Handle, HandleRef};

/// Opens an event group. `flags` are `FAN_*` init flags.
pub(crate) fn init(flags: u32) -> io::Result<OwnedFd> {
    let event_flags = (libc::O_RDONLY | libc::O_CLOEXEC | libc::O_LARGEFILE) as u32;
    // SAFETY: the call takes two integers and no pointer.
    let fd = unsafe { libc::fanotify_init(flags, event_flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a non-negative result is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds `mask` for the whole filesystem on which `on` lies.
pub(crate) fn mark_filesystem(group: BorrowedFd<'_>, mask: u64, on: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
    // SAFETY: both descriptors are open for the call; a null path means `on`
    // itself.
    let rc = unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, mask, on.as_raw_fd(), std::ptr::null()) };
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// `struct file_handle` with room for the longest handle there is.
#[repr(C)]
struct RawHandle {
    len: u32,
    kind: i32,
    bytes: [u8; libc::MAX_HANDLE_SZ as usize],
}

/// The handle of what `fd` is open on.
pub(crate) fn handle_of(fd: BorrowedFd<'_>) -> io::Result<Handle> {
    let mut raw = RawHandle {
        len: libc::MAX_HANDLE_SZ as u32,
        kind: 0,
        bytes: [0; libc::MAX_HANDLE_SZ as usize],
    };
    let mut mount_id = 0;
    // SAFETY: `raw` has the layout of `struct file_handle` with `len` bytes of
    // room, the path is a NUL-terminated literal, `mount_id` outlives the call.
    let rc = unsafe {
        libc::name_to_handle_at(
            fd.as_raw_fd(),
            c"".as_ptr(),
            (&raw mut raw).cast(),
            &raw mut mount_id,
            libc::AT_EMPTY_PATH,
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    let bytes = raw
        .bytes
        .get(..raw.len as usize)
        .ok_or(io::ErrorKind::InvalidData)?;
    Ok(Handle::new(raw.kind, bytes))
}

/// Opens what `handle` names, on the mount where `mount` lies, without the
/// right to read it (`O_PATH`).
pub(crate) fn open_handle(mount: BorrowedFd<'_>, handle: HandleRef<'_>, flags: i32) -> io::Result<OwnedFd> {
    let mut raw = RawHandle {
        len: handle.bytes.len() as u32,
        kind: handle.kind,
        bytes: [0; libc::MAX_HANDLE_SZ as usize],
    };
    raw.bytes
        .get_mut(..handle.bytes.len())
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(handle.bytes);
    let flags = flags | libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: `raw` has the layout of `struct file_handle` with `len` valid
    // bytes, and outlives the call.
    let fd = unsafe { libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut raw).cast(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a non-negative result is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
