//! Owner, mode, extended attributes and modification time of one inode.
//!
//! In: a descriptor and the entry whose attributes it should have. Changes only
//! what differs, in the order that the kernel's side effects demand: changing
//! the owner drops set-id bits and file capabilities, setting an access control
//! list may change the mode, and everything but the last step may be followed
//! by a write; so owner, attributes, mode, time.

use std::os::fd::BorrowedFd;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmodat, chownat,
    fchmod, fchown, fremovexattr, fsetxattr, futimens, removexattr, setxattr, utimensat,
};
use rustix::io::{self, Errno};

use super::error::ApplyError;
use crate::crash::{self, Point};
use crate::model::{Entry, RelPath, StatSig, Time, Xattr};
use crate::observe::{XattrOf, read_xattrs};

/// Gives the inode the entry's owner, extended attributes and mode; `have` is
/// how it is now. The time comes last, by [`set_mtime`].
pub(super) fn set_all_but_time(
    of: XattrOf<'_>,
    path: &RelPath,
    have: &StatSig,
    entry: &Entry,
) -> Result<(), ApplyError> {
    let file_type = FileType::from_raw_mode(have.mode);
    let chown = (have.uid, have.gid) != (entry.uid, entry.gid);
    if chown {
        set_owner(of, entry).map_err(|errno| owner_error(path, entry, errno))?;
        crash::here(Point::OwnerSet);
    }
    let touched_acl = set_xattrs(of, path, &entry.xattrs)?;
    if file_type == FileType::Symlink {
        return Ok(());
    }
    let set_id = entry.mode & 0o6000 != 0;
    if have.mode & 0o7777 != entry.mode || touched_acl || (chown && set_id) {
        let mode = Mode::from_raw_mode(entry.mode & 0o7777);
        match of {
            XattrOf::Open(fd) => fchmod(fd, mode),
            XattrOf::Handle(_) | XattrOf::Named(..) => chmodat(CWD, of.proc_path(), mode, AtFlags::empty()),
        }
        .map_err(|errno| ApplyError::system("set the mode of", path, errno))?;
        crash::here(Point::ModeSet);
    }
    Ok(())
}

/// Sets the modification time and leaves the access time alone.
pub(super) fn set_mtime(of: XattrOf<'_>, path: &RelPath, mtime: Time) -> Result<(), ApplyError> {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: mtime.secs,
            tv_nsec: i64::from(mtime.nanos),
        },
    };
    match of {
        XattrOf::Open(fd) => futimens(fd, &times),
        XattrOf::Handle(fd) => utimensat(fd, c"", &times, AtFlags::EMPTY_PATH),
        XattrOf::Named(dir, name) => utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW),
    }
    .map_err(|errno| ApplyError::system("set the time of", path, errno))?;
    crash::here(Point::TimeSet);
    Ok(())
}

fn set_owner(of: XattrOf<'_>, entry: &Entry) -> io::Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    match of {
        XattrOf::Open(fd) => fchown(fd, uid, gid),
        XattrOf::Handle(fd) => chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH),
        XattrOf::Named(dir, name) => chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW),
    }
}

fn owner_error(path: &RelPath, entry: &Entry, errno: Errno) -> ApplyError {
    let action = "set the owner of";
    match errno {
        Errno::PERM => ApplyError::because(
            action,
            path,
            errno,
            format!(
                "giving it to {}:{} needs CAP_CHOWN; run the daemon as root or with that capability",
                entry.uid, entry.gid
            ),
        ),
        errno => ApplyError::system(action, path, errno),
    }
}

/// Makes the inode's extended attributes those of the entry, as far as they
/// are replicated; says whether an access control list was among the changes.
/// A new inode may have some, inherited from its directory.
fn set_xattrs(of: XattrOf<'_>, path: &RelPath, wanted: &[Xattr]) -> Result<bool, ApplyError> {
    let have = read_xattrs(of)
        .map_err(|errno| ApplyError::system("read the extended attributes of", path, errno))?;
    if have == wanted {
        return Ok(false);
    }
    let mut touched_acl = false;
    for old in have
        .iter()
        .filter(|old| !wanted.iter().any(|new| new.name == old.name))
    {
        touched_acl |= is_acl(&old.name);
        let name = &old.name[..];
        match of {
            XattrOf::Open(fd) => fremovexattr(fd, name),
            XattrOf::Handle(_) | XattrOf::Named(..) => removexattr(of.proc_path(), name),
        }
        .or_else(|errno| {
            if errno == Errno::NODATA {
                Ok(())
            } else {
                Err(errno)
            }
        })
        .map_err(|errno| xattr_error("remove an extended attribute of", path, &old.name, errno))?;
        crash::here(Point::XattrRemoved);
    }
    for new in wanted.iter().filter(|new| !have.contains(new)) {
        touched_acl |= is_acl(&new.name);
        let name = &new.name[..];
        match of {
            XattrOf::Open(fd) => fsetxattr(fd, name, &new.value, XattrFlags::empty()),
            XattrOf::Handle(_) | XattrOf::Named(..) => {
                setxattr(of.proc_path(), name, &new.value, XattrFlags::empty())
            }
        }
        .map_err(|errno| xattr_error("set an extended attribute of", path, &new.name, errno))?;
        crash::here(Point::XattrSet);
    }
    Ok(touched_acl)
}

fn is_acl(name: &[u8]) -> bool {
    name.starts_with(b"system.posix_acl_")
}

fn xattr_error(action: &'static str, path: &RelPath, name: &[u8], errno: Errno) -> ApplyError {
    let shown = String::from_utf8_lossy(name);
    let reason = match errno {
        Errno::OPNOTSUPP => format!("this filesystem keeps no attribute '{shown}'"),
        Errno::PERM if name.starts_with(b"trusted.") => format!("'{shown}' needs CAP_SYS_ADMIN"),
        Errno::PERM if name == b"security.capability" => format!("'{shown}' needs CAP_SETFCAP"),
        Errno::PERM => format!("'{shown}' is not permitted; does the daemon lack CAP_FOWNER?"),
        Errno::NOSPC | Errno::DQUOT => {
            format!("no space for '{shown}': the disk is full or the attribute too large for this filesystem")
        }
        Errno::RANGE | Errno::TOOBIG => format!("'{shown}' is too large for this filesystem"),
        errno => format!("'{shown}': {}", std::io::Error::from(errno)),
    };
    ApplyError::because(action, path, errno, reason)
}

/// A descriptor's attributes by way of `O_PATH`.
pub(super) fn handle(fd: BorrowedFd<'_>) -> XattrOf<'_> {
    XattrOf::Handle(fd)
}
