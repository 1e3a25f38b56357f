//! Extended attributes, as far as they belong to an entry.
//!
//! In: an open file, or a name in a directory. Out: the attributes that every
//! node should have, ordered by name. A filesystem without extended attributes
//! has none. Access control lists are attributes named `system.posix_acl_*`.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{fgetxattr, flistxattr, getxattr, lgetxattr, listxattr, llistxattr};
use rustix::io::{self, Errno};

use crate::model::Xattr;

/// The kernel's own limit on a list of names and on a value, bytes.
const XATTR_MAX: usize = 65_536;

/// Whose attributes.
#[derive(Clone, Copy)]
pub(crate) enum XattrOf<'a> {
    /// A file that is open for reading or writing.
    Open(BorrowedFd<'a>),
    /// Whatever an `O_PATH` descriptor refers to, a symlink included.
    Handle(BorrowedFd<'a>),
    /// A name in a directory, not followed; empty for the directory itself.
    Named(BorrowedFd<'a>, &'a [u8]),
}

impl XattrOf<'_> {
    /// The calls on extended attributes take no directory descriptor, so what
    /// is not open is reached through `/proc`.
    pub(crate) fn proc_path(&self) -> Vec<u8> {
        match self {
            XattrOf::Open(fd) | XattrOf::Handle(fd) => {
                format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes()
            }
            XattrOf::Named(dir, name) => {
                let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
                path.extend_from_slice(if name.is_empty() { b"." } else { name });
                path
            }
        }
    }
}

/// Whether an attribute is part of the entry. Left out: what this host computes
/// or signs for its own files (IMA, EVM), overlayfs' own notes, XFS' second
/// spelling of access control lists, and virtual ones.
pub(crate) fn is_kept(name: &[u8]) -> bool {
    if name.starts_with(b"user.") {
        return true;
    }
    if name.starts_with(b"trusted.") {
        return !name.starts_with(b"trusted.overlay.") && !name.starts_with(b"trusted.SGI_ACL_");
    }
    if name.starts_with(b"security.") {
        return name != b"security.ima" && name != b"security.evm";
    }
    name == b"system.posix_acl_access" || name == b"system.posix_acl_default"
}

/// Whether it is a label that a security module may put on whatever is made.
pub(crate) fn is_label(name: &[u8]) -> bool {
    name == b"security.selinux" || name.starts_with(b"security.SMACK64")
}

/// The attributes that belong to the entry, ordered by name.
pub(crate) fn read(of: XattrOf<'_>) -> io::Result<Vec<Xattr>> {
    let path = if let XattrOf::Open(_) = of {
        Vec::new()
    } else {
        of.proc_path()
    };
    let path = &path[..];
    let mut small = [0u8; 512];
    let mut large = Vec::new();
    let list = |buffer: &mut [u8]| match of {
        XattrOf::Open(fd) => flistxattr(fd, buffer),
        XattrOf::Handle(_) => listxattr(path, buffer),
        XattrOf::Named(..) => llistxattr(path, buffer),
    };
    let names: &[u8] = match list(&mut small) {
        // By far the most frequent answer.
        Ok(0) => return Ok(Vec::new()),
        Ok(len) => &small[..len],
        Err(Errno::RANGE) => {
            large.resize(XATTR_MAX, 0);
            let len = list(&mut large)?;
            &large[..len]
        }
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(errno) => return Err(errno),
    };
    let mut found = Vec::new();
    let mut value = Vec::new();
    for name in names.split(|&b| b == 0).filter(|name| is_kept(name)) {
        value.resize(4096, 0);
        let get = |buffer: &mut Vec<u8>| match of {
            XattrOf::Open(fd) => fgetxattr(fd, name, &mut buffer[..]),
            XattrOf::Handle(_) => getxattr(path, name, &mut buffer[..]),
            XattrOf::Named(..) => lgetxattr(path, name, &mut buffer[..]),
        };
        let len = match get(&mut value) {
            Err(Errno::RANGE) => {
                value.resize(XATTR_MAX, 0);
                get(&mut value)
            }
            other => other,
        };
        match len {
            Ok(len) => found.push(Xattr {
                name: name.into(),
                value: value[..len].into(),
            }),
            // Removed since it was listed; the change has its own event. Or a
            // security module hides the value from everyone without a right.
            Err(Errno::NODATA) => {}
            Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) if name.starts_with(b"security.") => {}
            Err(errno) => return Err(errno),
        }
    }
    found.sort_unstable();
    Ok(found)
}
