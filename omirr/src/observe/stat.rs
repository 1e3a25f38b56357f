//! One `statx` and what is made of it.
//!
//! In: a directory's descriptor and a name. Out: a [`StatSig`], or that there
//! is nothing, or that what is there is no part of the share because something
//! is mounted on it. Never follows a symlink, never opens a file.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Statx, StatxAttributes, StatxFlags, statx};
use rustix::io::{self, Errno};
use rustix::path::Arg;
use rustix::time::{ClockId, clock_gettime};

use crate::apply::{ApplyError, Dirs, Obstacle};
use crate::model::{RelPath, StatSig, Time};

/// How long after its last change a file's times may stay the same although it
/// changes again: file times come from the kernel's coarse clock, which ticks
/// every 1 to 10 ms. The rest is margin for clocks that are being slewed.
const TICK_NS: i128 = 50_000_000;
/// The same for filesystems that keep whole seconds (ext4 with small inodes) or
/// every other one (FAT).
const WHOLE_SECONDS_NS: i128 = 2_500_000_000;

/// What is at a path, as far as `stat` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Looked {
    Absent,
    Here(StatSig),
    /// Something is mounted there, or on the way.
    Foreign,
}

/// Looks at `path` without reading it.
pub fn look(dirs: &Dirs<'_>, path: &RelPath) -> Result<Looked, ApplyError> {
    Ok(match look_raw(dirs, path)? {
        Raw::Absent => Looked::Absent,
        Raw::Foreign => Looked::Foreign,
        Raw::Here { stat, .. } => Looked::Here(sig_of(&stat)),
    })
}

/// The signature of what is at `path`; none if nothing is. A mount point is an
/// error here; [`look`] tells it apart.
pub fn stat(dirs: &Dirs<'_>, path: &RelPath) -> Result<Option<StatSig>, ApplyError> {
    match look(dirs, path)? {
        Looked::Absent => Ok(None),
        Looked::Here(sig) => Ok(Some(sig)),
        Looked::Foreign => Err(ApplyError::Beneath {
            path: path.clone(),
            component: path.clone(),
            obstacle: Obstacle::Mount,
        }),
    }
}

/// The inode of the directory that holds `path`, and what is there; none if
/// nothing is, or if it is no part of the share.
pub fn place(dirs: &Dirs<'_>, path: &RelPath) -> Option<(u64, StatSig)> {
    let (dir, name) = dirs.parent(path).ok()?;
    let holder = statx_fd(dir.as_fd()).ok()?;
    let found = statx_at(&dir, name).ok()?;
    (!is_foreign(&found, dirs.root().dev())).then(|| (holder.stx_ino, sig_of(&found)))
}

/// [`Looked`] with what a reader needs to go on.
pub(super) enum Raw {
    Absent,
    Foreign,
    Here {
        dir: crate::apply::DirFd,
        stat: Box<Statx>,
    },
}

pub(super) fn look_raw(dirs: &Dirs<'_>, path: &RelPath) -> Result<Raw, ApplyError> {
    let (dir, name) = match dirs.parent(path) {
        Ok(found) => found,
        // What lies beneath a symlink or a file is not in the share.
        Err(
            ApplyError::ParentMissing { .. }
            | ApplyError::Reserved { .. }
            | ApplyError::Beneath {
                obstacle: Obstacle::Symlink | Obstacle::NotDirectory,
                ..
            },
        ) => return Ok(Raw::Absent),
        Err(ApplyError::Beneath {
            obstacle: Obstacle::Mount,
            ..
        }) => return Ok(Raw::Foreign),
        Err(error) => return Err(error),
    };
    match statx_at(&dir, name) {
        Ok(stat) if !path.is_root() && is_foreign(&stat, dirs.root().dev()) => Ok(Raw::Foreign),
        Ok(stat) => Ok(Raw::Here {
            dir,
            stat: Box::new(stat),
        }),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(Raw::Absent),
        Err(errno) => Err(ApplyError::system("look at", path, errno)),
    }
}

/// `statx` of `name` in `dir`, or of `dir` itself where `name` is empty.
pub(crate) fn statx_at(dir: impl AsFd, name: impl Arg) -> io::Result<Statx> {
    statx(
        dir,
        name,
        AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH,
        StatxFlags::BASIC_STATS | StatxFlags::BTIME,
    )
}

pub(crate) fn statx_fd(fd: BorrowedFd<'_>) -> io::Result<Statx> {
    statx_at(fd, c"")
}

/// Whether something is mounted there. A directory of another device with no
/// mount in between is a btrfs subvolume, whose inode numbers start again;
/// other kinds are not asked, because overlayfs shows a file's device as that
/// of its layer.
pub(crate) fn is_foreign(stat: &Statx, root_dev: u64) -> bool {
    stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
        || (file_type(stat) == FileType::Directory && dev_of(stat) != root_dev)
}

pub(crate) fn dev_of(stat: &Statx) -> u64 {
    rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor)
}

pub(crate) fn file_type(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

pub(crate) fn sig_of(stat: &Statx) -> StatSig {
    let time = |t: rustix::fs::StatxTimestamp| Time {
        secs: t.tv_sec,
        nanos: t.tv_nsec,
    };
    let has_btime = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    StatSig {
        ino: stat.stx_ino,
        btime: if has_btime {
            time(stat.stx_btime)
        } else {
            Time { secs: 0, nanos: 0 }
        },
        mtime: time(stat.stx_mtime),
        ctime: time(stat.stx_ctime),
        size: stat.stx_size,
        mode: u32::from(stat.stx_mode),
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        nlink: stat.stx_nlink,
        racy: false,
    }
}

/// Whether a change made from now on could leave a file with these times.
pub(crate) fn is_racy(times: &[Time]) -> bool {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    let now = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    let whole = times.iter().all(|time| time.nanos == 0);
    let margin = if whole { WHOLE_SECONDS_NS } else { TICK_NS };
    // A time in the future counts as racy only while the clock is near it: a
    // file may well be dated next year.
    times
        .iter()
        .any(|time| (now - (i128::from(time.secs) * 1_000_000_000 + i128::from(time.nanos))).abs() < margin)
}
