//! Owner, mode, extended attributes, flags and modification time of one inode.
//!
//! In: a descriptor and the entry whose attributes it should have. Changes only
//! what differs, in the order that the kernel's side effects demand: changing
//! the owner drops set-id bits and file capabilities, setting an access control
//! list may change the mode, and everything but the last step may be followed
//! by a write; so owner, attributes, mode, flags, time. Flags that lock the
//! inode are not set here but at the very end, by [`super::lock`].
//!
//! What this filesystem or the daemon's privileges do not allow is left out and
//! said ([`Lacks`]); all else is set nevertheless. What may work later, as on a
//! full disk, is an error.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmodat, chownat,
    fchmod, fchown, fremovexattr, fsetxattr, futimens, removexattr, setxattr, utimensat,
};
use rustix::io::{self, Errno};

use super::error::ApplyError;
use super::flags;
use super::owners::Owners;
use crate::crash::{self, Point};
use crate::model::{Entry, Flags, Here, RelPath, StatSig, Time, Xattr};
use crate::observe::{XattrOf, is_kept_xattr, is_label, read_xattrs};

/// What an inode did not get.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Lacks {
    /// Why, one sentence per reason.
    reasons: Vec<Box<str>>,
    /// Its flags, but for those that lock it.
    flags: Flags,
}

impl Lacks {
    fn add(&mut self, reason: String) {
        self.reasons.push(reason.into());
    }

    /// What the inode has where it is not what `entry` says; `sig` is how it
    /// came out.
    pub(super) fn here(
        &self,
        of: XattrOf<'_>,
        path: &RelPath,
        sig: &StatSig,
        entry: &Entry,
    ) -> Result<Option<Box<Here>>, ApplyError> {
        let rounded = sig.mtime != entry.mtime && is_rounded(sig.mtime, entry.mtime);
        let owned = (sig.uid, sig.gid) == (entry.uid, entry.gid);
        if self.reasons.is_empty() && owned && !rounded && !has_label(of) {
            return Ok(None);
        }
        let xattrs = read_xattrs(of)
            .map_err(|errno| ApplyError::system("read the extended attributes of", path, errno))?;
        let is_symlink = FileType::from_raw_mode(sig.mode) == FileType::Symlink;
        let seen = Entry {
            mode: if is_symlink { entry.mode } else { sig.mode & 0o7777 },
            uid: sig.uid,
            gid: sig.gid,
            mtime: if rounded { sig.mtime } else { entry.mtime },
            xattrs,
            flags: (self.flags & !Flags::LOCKS) | (entry.flags & Flags::LOCKS),
            ..entry.clone()
        };
        let mut reasons = self.reasons.clone();
        if rounded {
            reasons.push("this filesystem keeps times less exactly".into());
        }
        reasons.sort_unstable();
        reasons.dedup();
        Ok(Here::of(&seen, entry, &reasons))
    }
}

/// Whether a filesystem that keeps times less exactly makes `found` of `set`.
pub(super) fn is_rounded(found: Time, set: Time) -> bool {
    let ns = |time: Time| i128::from(time.secs) * 1_000_000_000 + i128::from(time.nanos);
    found == set || (found.nanos.is_multiple_of(100) && (0..2_000_000_000).contains(&(ns(set) - ns(found))))
}

/// Whether this host's security module labels what is made: then every inode
/// has an attribute that no row need have.
fn has_label(of: XattrOf<'_>) -> bool {
    static LABELS: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let active = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
        active
            .split(',')
            .any(|module| matches!(module.trim(), "selinux" | "smack"))
    });
    *LABELS && read_xattrs(of).is_ok_and(|all| all.iter().any(|one| is_label(&one.name)))
}

/// Gives the inode the entry's owner, extended attributes, mode and flags, but
/// for those that lock it; `have` is how it is now. The time comes last, by
/// [`set_mtime`].
pub(super) fn set_all_but_time(
    owners: &Owners,
    of: XattrOf<'_>,
    path: &RelPath,
    have: &StatSig,
    entry: &Entry,
) -> Result<Lacks, ApplyError> {
    let mut lacks = Lacks::default();
    let file_type = FileType::from_raw_mode(have.mode);
    let (uid, gid) = owners.numbers(entry);
    let chown = (have.uid, have.gid) != (uid, gid);
    let mut is_owned = true;
    if chown {
        is_owned = change_owner(of, path, uid, gid, &mut lacks)?;
        crash::here(Point::OwnerSet);
    }
    let touched_acl = set_xattrs(of, path, &entry.xattrs, &mut lacks)?;
    if file_type == FileType::Symlink {
        return Ok(lacks);
    }
    // What runs as its owner must not run as somebody else.
    let mode = if is_owned {
        entry.mode
    } else {
        entry.mode & !0o6000
    };
    let set_id = mode & 0o6000 != 0;
    if have.mode & 0o7777 != mode || touched_acl || (chown && set_id) {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let set = match of {
            XattrOf::Open(fd) => fchmod(fd, mode),
            XattrOf::Handle(_) | XattrOf::Named(..) => chmodat(CWD, of.proc_path(), mode, AtFlags::empty()),
        };
        match set {
            Ok(()) => {}
            Err(Errno::PERM | Errno::OPNOTSUPP) => {
                lacks.add(
                    "modes cannot be set: the filesystem keeps none, or the daemon lacks CAP_FOWNER"
                        .to_owned(),
                );
            }
            Err(errno) => return Err(ApplyError::system("set the mode of", path, errno)),
        }
        crash::here(Point::ModeSet);
    }
    set_flags(of, file_type, path, entry, &mut lacks)?;
    Ok(lacks)
}

fn set_flags(
    of: XattrOf<'_>,
    file_type: FileType,
    path: &RelPath,
    entry: &Entry,
    lacks: &mut Lacks,
) -> Result<(), ApplyError> {
    let opened;
    let fd = match of {
        XattrOf::Open(fd) => fd,
        XattrOf::Handle(_) | XattrOf::Named(..) => match flags::open_again(of, file_type) {
            Ok(Some(fd)) => {
                opened = fd;
                opened.as_fd()
            }
            Ok(None) => return Ok(()),
            // Without the right to read it there is nothing to be found out.
            Err(Errno::ACCESS | Errno::PERM) if entry.flags.is_empty() => return Ok(()),
            Err(errno) => return Err(ApplyError::system("open, for its flags,", path, errno)),
        },
    };
    let (now, reasons) = flags::set(fd, !Flags::LOCKS, entry.flags)
        .map_err(|errno| ApplyError::system("set the flags of", path, errno))?;
    lacks.flags = now;
    lacks.reasons.extend(reasons);
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

/// Whether the inode has its owner then; the group alone is better than nothing.
fn change_owner(
    of: XattrOf<'_>,
    path: &RelPath,
    uid: u32,
    gid: u32,
    lacks: &mut Lacks,
) -> Result<bool, ApplyError> {
    let refused = match set_owner(of, Some(uid), Some(gid)) {
        Ok(()) => return Ok(true),
        Err(refused @ (Errno::PERM | Errno::INVAL | Errno::OPNOTSUPP)) => refused,
        Err(errno) => return Err(ApplyError::system("set the owner of", path, errno)),
    };
    let reason = match refused {
        Errno::PERM => {
            "giving files to their owners needs CAP_CHOWN; run the daemon as root or with that capability"
        }
        _ => "this filesystem, or this user namespace, does not know some owners",
    };
    lacks.add(reason.to_owned());
    // Of no use where even that is refused.
    _ = set_owner(of, None, Some(gid));
    Ok(false)
}

fn set_owner(of: XattrOf<'_>, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
    match of {
        XattrOf::Open(fd) => fchown(fd, uid, gid),
        XattrOf::Handle(fd) => chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH),
        XattrOf::Named(dir, name) => chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW),
    }
}

/// Makes the inode's extended attributes those of the entry, as far as they
/// are replicated; says whether an access control list was among the changes.
/// A new inode may have some, inherited from its directory. A label of this
/// host's security module that the entry lacks stays.
fn set_xattrs(
    of: XattrOf<'_>,
    path: &RelPath,
    wanted: &[Xattr],
    lacks: &mut Lacks,
) -> Result<bool, ApplyError> {
    let have = read_xattrs(of)
        .map_err(|errno| ApplyError::system("read the extended attributes of", path, errno))?;
    if have == wanted {
        return Ok(false);
    }
    let mut touched_acl = false;
    let gone = have
        .iter()
        .filter(|old| !is_label(&old.name) && !wanted.iter().any(|new| new.name == old.name));
    for old in gone {
        let name = &old.name[..];
        let removed = match of {
            XattrOf::Open(fd) => fremovexattr(fd, name),
            XattrOf::Handle(_) | XattrOf::Named(..) => removexattr(of.proc_path(), name),
        };
        match removed {
            Ok(()) => touched_acl |= is_acl(name),
            Err(Errno::NODATA) => {}
            Err(errno) => lack_xattr("remove an extended attribute of", path, name, errno, lacks)?,
        }
        crash::here(Point::XattrRemoved);
    }
    for new in wanted.iter().filter(|new| !have.contains(new)) {
        let name = &new.name[..];
        if !is_kept_xattr(name) {
            lacks.add(format!("attributes like '{}' are not mirrored", family(name)));
            continue;
        }
        let set = match of {
            XattrOf::Open(fd) => fsetxattr(fd, name, &new.value, XattrFlags::empty()),
            XattrOf::Handle(_) | XattrOf::Named(..) => {
                setxattr(of.proc_path(), name, &new.value, XattrFlags::empty())
            }
        };
        match set {
            Ok(()) => touched_acl |= is_acl(name),
            Err(errno) => lack_xattr("set an extended attribute of", path, name, errno, lacks)?,
        }
        crash::here(Point::XattrSet);
    }
    Ok(touched_acl)
}

fn is_acl(name: &[u8]) -> bool {
    name.starts_with(b"system.posix_acl_")
}

/// The kind of an attribute: reasons must not be as many as names.
fn family(name: &[u8]) -> String {
    const KNOWN: [&[u8]; 4] = [
        b"security.capability",
        b"security.selinux",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
    ];
    if KNOWN.contains(&name) {
        return String::from_utf8_lossy(name).into_owned();
    }
    let known = ["user.", "trusted.", "security.", "system."];
    let known = known
        .into_iter()
        .find(|family| name.starts_with(family.as_bytes()));
    format!("{}*", known.unwrap_or_default())
}

/// Takes note of an attribute that cannot be had here; what may pass is an error.
fn lack_xattr(
    action: &'static str,
    path: &RelPath,
    name: &[u8],
    errno: Errno,
    lacks: &mut Lacks,
) -> Result<(), ApplyError> {
    let shown = family(name);
    lacks.add(match errno {
        Errno::OPNOTSUPP => format!("this filesystem keeps no attributes '{shown}'"),
        Errno::PERM | Errno::ACCESS if name.starts_with(b"trusted.") => {
            format!("attributes '{shown}' need CAP_SYS_ADMIN")
        }
        Errno::PERM | Errno::ACCESS if name == b"security.capability" => {
            format!("attributes '{shown}' need CAP_SETFCAP")
        }
        Errno::PERM | Errno::ACCESS if name.starts_with(b"security.") => {
            format!(
                "the security policy of this host, or a lack of CAP_SYS_ADMIN, forbids attributes '{shown}'"
            )
        }
        Errno::PERM | Errno::ACCESS => {
            format!("attributes '{shown}' are not permitted; does the daemon lack CAP_FOWNER?")
        }
        Errno::INVAL if !is_acl(name) => format!("this host refuses some attributes '{shown}' as invalid"),
        Errno::RANGE | Errno::TOOBIG => {
            format!("some attributes '{shown}' are too large for this filesystem")
        }
        Errno::NOSPC | Errno::DQUOT => {
            let reason = format!(
                "no space for '{}': the disk is full or the attribute too large for this filesystem",
                String::from_utf8_lossy(name)
            );
            return Err(ApplyError::because(action, path, errno, reason));
        }
        errno => {
            let reason = format!(
                "'{}': {}",
                String::from_utf8_lossy(name),
                std::io::Error::from(errno)
            );
            return Err(ApplyError::because(action, path, errno, reason));
        }
    });
    Ok(())
}

/// A descriptor's attributes by way of `O_PATH`.
pub(super) fn handle(fd: BorrowedFd<'_>) -> XattrOf<'_> {
    XattrOf::Handle(fd)
}
