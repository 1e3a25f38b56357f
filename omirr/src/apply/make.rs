//! Directories, symlinks, fifos, sockets and devices; and attributes alone.
//!
//! Whatever is new is made under a temporary name, gets its attributes there,
//! and then takes its name: nobody sees it half made, and a failure or a crash
//! leaves nothing that could be taken for a user's work.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, mkdirat, mknodat, openat, symlinkat};
use rustix::io::{self, Errno};

use super::attrs::{self, handle};
use super::beneath::{DirFd, Dirs};
use super::error::ApplyError;
use super::place::{Temp, outcome, place};
use super::{Applied, Expect, is_as_expected, settled, temp_name};
use crate::crash::{self, Point};
use crate::model::{Entry, Kind, RelPath, StatSig, Time};
use crate::observe::{sig_of, statx_fd};

/// Makes a directory. One that exists already gets its attributes by
/// [`set_attrs`].
pub fn make_dir(
    dirs: &Dirs<'_>,
    path: &RelPath,
    entry: &Entry,
    expect: &Expect,
) -> Result<Applied, ApplyError> {
    if !entry.is_dir() {
        return Err(wrong_kind(path, entry));
    }
    make(dirs, path, entry, expect, |dir, name| {
        mkdirat(dir, name, Mode::RWXU)
    })
}

pub fn make_symlink(
    dirs: &Dirs<'_>,
    path: &RelPath,
    entry: &Entry,
    expect: &Expect,
) -> Result<Applied, ApplyError> {
    let Kind::Symlink { target } = &entry.kind else {
        return Err(wrong_kind(path, entry));
    };
    make(dirs, path, entry, expect, |dir, name| {
        symlinkat(&target[..], dir, name)
    })
}

/// Makes a fifo, a socket (the file only: nobody listens on it) or a device.
pub fn make_node(
    dirs: &Dirs<'_>,
    path: &RelPath,
    entry: &Entry,
    expect: &Expect,
) -> Result<Applied, ApplyError> {
    let (file_type, rdev) = match entry.kind {
        Kind::Fifo => (FileType::Fifo, 0),
        Kind::Socket => (FileType::Socket, 0),
        Kind::CharDevice { rdev } => (FileType::CharacterDevice, rdev),
        Kind::BlockDevice { rdev } => (FileType::BlockDevice, rdev),
        Kind::File { .. } | Kind::Directory | Kind::Symlink { .. } => return Err(wrong_kind(path, entry)),
    };
    make(dirs, path, entry, expect, |dir, name| {
        mknodat(dir, name, file_type, Mode::RUSR | Mode::WUSR, rdev)
    })
}

fn wrong_kind(path: &RelPath, entry: &Entry) -> ApplyError {
    ApplyError::Kind {
        path: path.clone(),
        kind: entry.kind_name(),
    }
}

fn make(
    dirs: &Dirs<'_>,
    path: &RelPath,
    entry: &Entry,
    expect: &Expect,
    create: impl FnOnce(&DirFd, &str) -> io::Result<()>,
) -> Result<Applied, ApplyError> {
    let (dir, name) = dirs.parent(path)?;
    let fail = |errno| match (errno, &entry.kind) {
        (Errno::PERM, Kind::CharDevice { .. } | Kind::BlockDevice { .. }) => {
            let reason =
                "making a device needs CAP_MKNOD; run the daemon as root or with that capability".to_owned();
            ApplyError::because("create", path, errno, reason)
        }
        (errno, _) => ApplyError::system("create", path, errno),
    };
    let temp = temp_name();
    create(&dir, &temp).map_err(fail)?;
    crash::here(Point::EntryMade);
    let temp = Temp::new(&dir, temp, entry.is_dir());
    let made = open_handle(&dir, temp.name().as_bytes()).map_err(fail)?;
    let look = || Ok(sig_of(&statx_fd(made.as_fd()).map_err(fail)?));
    let of = handle(made.as_fd());
    let lacks = attrs::set_all_but_time(dirs.root().owners(), of, path, &look()?, entry)?;
    attrs::set_mtime(of, path, entry.mtime)?;
    let sig = look()?;
    let here = lacks.here(of, path, &sig, entry)?;
    place(dirs, path, temp, &sig, expect)?;
    Ok(outcome(&dir, name, &sig).but(here))
}

/// Holds an inode of any kind without opening it.
fn open_handle(dir: &DirFd, name: &[u8]) -> io::Result<OwnedFd> {
    let name = if name.is_empty() { b"." } else { name };
    openat(
        dir,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Gives what is at `path` the entry's mode, owner, extended attributes and
/// modification time; its kind and content must be the entry's already.
pub fn set_attrs(
    dirs: &Dirs<'_>,
    path: &RelPath,
    entry: &Entry,
    expected: &StatSig,
) -> Result<Applied, ApplyError> {
    let (dir, name) = dirs.parent(path)?;
    let fail = |errno| match errno {
        Errno::NOENT | Errno::NOTDIR => ApplyError::changed(path),
        errno => ApplyError::system("set the attributes of", path, errno),
    };
    let inode = open_handle(&dir, name).map_err(fail)?;
    let look = || Ok(sig_of(&statx_fd(inode.as_fd()).map_err(fail)?));
    let have = look()?;
    if !is_as_expected(expected, &have) || file_type_of(entry) != FileType::from_raw_mode(have.mode) {
        return Err(ApplyError::changed(path));
    }
    let of = handle(inode.as_fd());
    let lacks = attrs::set_all_but_time(dirs.root().owners(), of, path, &have, entry)?;
    let mut sig = look()?;
    let mut racy = expected.racy;
    if sig.mtime != entry.mtime {
        if !entry.is_dir() && (sig.mtime != have.mtime || sig.size != have.size) {
            return Ok(Applied::ChangedSince);
        }
        attrs::set_mtime(of, path, entry.mtime)?;
        sig = look()?;
        // A write that came between the look and the new time has lost its own
        // time; its event, if there is one, must find the file suspect.
        racy |= entry.content().is_some();
    }
    let unwritten = entry.is_dir() || (sig.size == have.size && attrs::is_rounded(sig.mtime, entry.mtime));
    if !unwritten {
        return Ok(Applied::ChangedSince);
    }
    let settled = settled(sig, entry.mtime);
    let here = lacks.here(of, path, &settled, entry)?;
    let sig = StatSig {
        racy: settled.racy || racy,
        ..settled
    };
    Ok(Applied::new(sig, here))
}

fn file_type_of(entry: &Entry) -> FileType {
    match entry.kind {
        Kind::File { .. } => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink { .. } => FileType::Symlink,
        Kind::Fifo => FileType::Fifo,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice { .. } => FileType::CharacterDevice,
        Kind::BlockDevice { .. } => FileType::BlockDevice,
    }
}

/// Sets a directory's modification time, after what was done in it, if it is
/// still the one that is expected, with the attributes that are expected.
pub fn set_dir_time(
    dirs: &Dirs<'_>,
    path: &RelPath,
    mtime: Time,
    expected: &StatSig,
) -> Result<StatSig, ApplyError> {
    let (parent, name) = dirs.parent(path)?;
    let fail = |errno| match errno {
        Errno::NOENT | Errno::NOTDIR => ApplyError::changed(path),
        errno => ApplyError::system("set the time of", path, errno),
    };
    // By its name, and not by a descriptor of before: it may be another by now.
    let dir = open_handle(&parent, name).map_err(fail)?;
    let look = || Ok(sig_of(&statx_fd(dir.as_fd()).map_err(fail)?));
    if !is_as_expected(expected, &look()?) {
        return Err(ApplyError::changed(path));
    }
    attrs::set_mtime(handle(dir.as_fd()), path, mtime)?;
    let sig = look()?;
    match is_as_expected(expected, &sig) {
        true => Ok(sig),
        false => Err(ApplyError::changed(path)),
    }
}

/// Makes the directories on the way to `path` that are missing, mode 0755 and
/// owned by the daemon's user; their own rows bring the rest. Returns those
/// that were made, from the root down.
pub fn ensure_parents(dirs: &Dirs<'_>, path: &RelPath) -> Result<Vec<RelPath>, ApplyError> {
    let mut made = Vec::new();
    if let Some(parent) = path.parent() {
        // An obstacle is reported for the path that was asked for.
        ensure_dir(dirs, &parent, &mut made).map_err(|error| match error {
            ApplyError::Beneath {
                component, obstacle, ..
            } => ApplyError::Beneath {
                path: path.clone(),
                component,
                obstacle,
            },
            error => error,
        })?;
    }
    Ok(made)
}

fn ensure_dir(dirs: &Dirs<'_>, path: &RelPath, made: &mut Vec<RelPath>) -> Result<(), ApplyError> {
    match dirs.dir(path) {
        Ok(_) => return Ok(()),
        Err(ApplyError::ParentMissing { .. }) => {}
        Err(error) => return Err(error),
    }
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    ensure_dir(dirs, &parent, made)?;
    let (dir, name) = dirs.parent(path)?;
    match mkdirat(&dir, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => made.push(path.clone()),
        // Another thread of the batch, or a user; whatever it is shows when it
        // is opened.
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(ApplyError::system("create the directory", path, errno)),
    }
    dirs.dir(path).map(|_| ())
}
