//! Inode flags (`chattr`), read and set on an open inode; and the two of them
//! that lock it.
//!
//! In: a descriptor that is open for reading, and the flags that it should
//! have. Out: it has them, or the sentences that say which it could not get and
//! why. Bits that are no part of an entry are left as they are. An immutable or
//! append-only inode cannot be changed, renamed, linked or removed before the
//! flag is cleared: [`unlock`] does that for a step, [`lock`] sets it again
//! when all steps are done. Whoever unlocks has noted it durably before.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, FileType, IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags, openat};
use rustix::io::{self, Errno};

use super::beneath::Dirs;
use super::error::ApplyError;
use super::same_object;
use crate::model::{Flags, RelPath, StatSig};
use crate::observe::{XattrOf, sig_of, statx_fd};

/// All bits of an open inode; none where the filesystem has no flags.
fn bits(fd: BorrowedFd<'_>) -> io::Result<Option<IFlags>> {
    match ioctl_getflags(fd) {
        Ok(flags) => Ok(Some(flags)),
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The flags of an open file or directory.
pub(crate) fn get(fd: BorrowedFd<'_>) -> io::Result<Flags> {
    Ok(bits(fd)?.map_or(Flags::NONE, |bits| Flags::from_bits(bits.bits())))
}

/// Makes those of the inode's flags that are in `mask` what they are in `want`;
/// returns what the inode has then and why it is not all that is wanted.
pub(super) fn set(fd: BorrowedFd<'_>, mask: Flags, want: Flags) -> io::Result<(Flags, Vec<Box<str>>)> {
    let Some(before) = bits(fd)? else {
        let lacks = (want & mask).each().map(|flag| {
            format!("this filesystem keeps no flags of files (chattr), '{flag}' among them").into()
        });
        return Ok((Flags::NONE, lacks.collect()));
    };
    let have = Flags::from_bits(before.bits());
    let differs = (have ^ want) & mask;
    if differs.is_empty() {
        return Ok((have, Vec::new()));
    }
    let flipped = |by: Flags| IFlags::from_bits_retain(before.bits() ^ by.bits());
    let mut refused = Vec::new();
    if let Err(whole) = ioctl_setflags(fd, flipped(differs)) {
        // One that is not known here keeps none of the others from being set.
        let mut done = Flags::NONE;
        for flag in differs.each() {
            match ioctl_setflags(fd, flipped(done | flag)) {
                Ok(()) => done = done | flag,
                Err(errno) => refused.push((flag, errno)),
            }
        }
        if refused.is_empty() && done != differs {
            return Err(whole);
        }
    }
    let now = get(fd)?;
    let lacks = ((now ^ want) & mask).each().map(|flag| {
        let errno = refused
            .iter()
            .find(|(which, _)| *which == flag)
            .map(|(_, errno)| *errno);
        lack(flag, errno).into()
    });
    Ok((now, lacks.collect()))
}

fn lack(flag: Flags, errno: Option<Errno>) -> String {
    match errno {
        Some(Errno::PERM | Errno::ACCESS) if !(flag & Flags::LOCKS).is_empty() => {
            format!("the flag '{flag}' (chattr) needs CAP_LINUX_IMMUTABLE")
        }
        Some(Errno::PERM | Errno::ACCESS) => {
            format!("the flag '{flag}' (chattr) is not permitted; does the daemon lack CAP_FOWNER?")
        }
        None if flag == Flags::NOCOW => {
            format!("the flag '{flag}' (chattr) can be changed on empty files only")
        }
        Some(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOTTY) | None => {
            format!("this filesystem does not keep the flag '{flag}' (chattr)")
        }
        Some(errno) => format!("the flag '{flag}' (chattr): {}", std::io::Error::from(errno)),
    }
}

/// Opens again, for its flags, what an `O_PATH` descriptor refers to; none for
/// what is neither a file nor a directory, and has none.
pub(super) fn open_again(of: XattrOf<'_>, file_type: FileType) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match file_type {
        FileType::RegularFile | FileType::Directory => {
            openat(CWD, of.proc_path(), flags, Mode::empty()).map(Some)
        }
        _ => Ok(None),
    }
}

/// The inode that is expected at `path`, open for its flags.
fn open_expected(dirs: &Dirs<'_>, path: &RelPath, expected: &StatSig) -> Result<OwnedFd, ApplyError> {
    let (dir, name) = dirs.parent(path)?;
    let name: &[u8] = if name.is_empty() { b"." } else { name };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fail = |errno| ApplyError::system("change the flags of", path, errno);
    let fd = match openat(&dir, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Err(ApplyError::changed(path)),
        Err(errno) => return Err(fail(errno)),
    };
    let found = sig_of(&statx_fd(fd.as_fd()).map_err(fail)?);
    match same_object(expected, &found) {
        true => Ok(fd),
        false => Err(ApplyError::changed(path)),
    }
}

/// Clears what keeps the inode at `path` from being changed; returns what `stat`
/// says then. Its content and attributes must be as `expected`.
pub fn unlock(dirs: &Dirs<'_>, path: &RelPath, expected: &StatSig) -> Result<StatSig, ApplyError> {
    let fd = open_expected(dirs, path, expected)?;
    let fail = |errno| ApplyError::system("change the flags of", path, errno);
    let (_, lacks) = set(fd.as_fd(), Flags::LOCKS, Flags::NONE).map_err(fail)?;
    if let Some(why) = lacks.into_iter().next() {
        return Err(ApplyError::because("unlock", path, Errno::PERM, why.into()));
    }
    let sig = sig_of(&statx_fd(fd.as_fd()).map_err(fail)?);
    match same_object(expected, &sig) {
        true => Ok(StatSig {
            racy: expected.racy,
            ..sig
        }),
        false => Err(ApplyError::changed(path)),
    }
}

/// Gives the inode at `path`, which must be `expected`, the locks of `flags`,
/// and no others; returns what `stat` says then, and why it lacks one.
pub fn lock(
    dirs: &Dirs<'_>,
    path: &RelPath,
    flags: Flags,
    expected: &StatSig,
) -> Result<(StatSig, Vec<Box<str>>), ApplyError> {
    let fd = open_expected(dirs, path, expected)?;
    let fail = |errno| ApplyError::system("change the flags of", path, errno);
    let (_, lacks) = set(fd.as_fd(), Flags::LOCKS, flags).map_err(fail)?;
    let sig = sig_of(&statx_fd(fd.as_fd()).map_err(fail)?);
    match same_object(expected, &sig) {
        true => Ok((
            StatSig {
                racy: expected.racy,
                ..sig
            },
            lacks,
        )),
        false => Err(ApplyError::changed(path)),
    }
}
