//! One watched filesystem: what its handles mean, and which of its directories
//! lie beneath a watched root.
//!
//! fanotify reports the whole filesystem. Almost all of what a busy neighbour
//! does must be dropped for the price of one table look-up, so every directory
//! that was ever judged is remembered. A judgement is derived from events where
//! that is possible (a new directory lies where its parent lies) and else made
//! by walking up from the directory, which asks the disk once. It falls when a
//! directory crosses a root's border, since that moves everything beneath it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustc_hash::FxHashMap;
use rustix::fs::{AtFlags, Mode, OFlags, fstat, fstatvfs, openat, readlinkat, statat};
use rustix::io::Errno;

use super::handle::{HandleRef, Id, Layout, Numbers};
use super::record::FsId;
use super::{FanotifyError, sys};
use crate::source::Watch;

/// Judgements that are remembered, about 5 MiB. When there are more, all are
/// forgotten and made anew as they are needed.
const KNOWN_LIMIT: usize = 1 << 18;
/// Names on the way up, before the walk is given up; the longest path allows
/// half.
const DEPTH_LIMIT: usize = crate::model::PATH_MAX;
/// How often an inode's path is read again because it was moved meanwhile.
const ATTEMPTS: usize = 3;

/// Where a directory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is a watched root or lies beneath one.
    Inside,
    Outside,
    /// It does not exist any more, and nothing told where it was.
    Gone,
}

/// A filesystem on which at least one watched root lies.
pub(crate) struct Filesystem {
    pub(crate) dev: u64,
    fsid: FsId,
    /// A watched root, through which handles are opened.
    mount: OwnedFd,
    numbers: Numbers,
    /// btrfs: the roots' subvolume. Else 0.
    subvolume: u64,
    /// The inodes of the watched roots.
    roots: Vec<u64>,
    /// Directories that have been judged: whether they are inside.
    known: FxHashMap<u64, bool>,
}

impl Filesystem {
    /// Opens `watch`'s root and finds out how its filesystem makes handles.
    pub(crate) fn open(watch: &Watch) -> Result<Filesystem, FanotifyError> {
        let cannot_open = |source: io::Error| FanotifyError::Root {
            path: watch.path.clone(),
            source,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mount = rustix::fs::open(&watch.path, flags, Mode::empty()).map_err(|e| cannot_open(e.into()))?;
        let fsid = fsid_of(&fstatvfs(&mount).map_err(|e| cannot_open(e.into()))?);
        let no_handles = |source: io::Error| FanotifyError::Handles {
            path: watch.path.clone(),
            source,
        };
        let handle = sys::handle_of(mount.as_fd()).map_err(no_handles)?;
        let layout = Layout::detect(handle.as_ref(), watch.ino);
        if layout.is_none() {
            // Without a number in the handle each one must be opened: find out
            // now whether that works, not with the first change.
            sys::open_handle(mount.as_fd(), handle.as_ref(), libc::O_DIRECTORY).map_err(no_handles)?;
        }
        let mut numbers = Numbers::new(layout);
        let subvolume = numbers.of(handle.as_ref(), || Some(watch.ino)).subvolume;
        let roots = vec![watch.ino];
        Ok(Filesystem {
            dev: watch.dev,
            fsid,
            mount,
            numbers,
            subvolume,
            roots,
            known: FxHashMap::default(),
        })
    }

    pub(crate) fn add_root(&mut self, ino: u64) {
        self.roots.push(ino);
    }

    pub(crate) fn has_fsid(&self, fsid: FsId) -> bool {
        self.fsid == fsid
    }

    pub(crate) fn root(&self) -> &OwnedFd {
        &self.mount
    }

    /// The inode that `handle` names.
    pub(crate) fn id_of(&mut self, handle: HandleRef<'_>) -> Id {
        let mount = &self.mount;
        self.numbers.of(handle, || {
            let fd = sys::open_handle(mount.as_fd(), handle, 0).ok()?;
            Some(fstat(&fd).ok()?.st_ino)
        })
    }

    /// Whether the directory behind `handle`, which is `id`, is watched.
    pub(crate) fn place_of(&mut self, id: Id, handle: HandleRef<'_>) -> Place {
        if id.subvolume != self.subvolume {
            return Place::Outside;
        }
        if let Some(place) = self.remembered(id.ino) {
            return place;
        }
        match sys::open_handle(self.mount.as_fd(), handle, libc::O_DIRECTORY) {
            Ok(dir) => self.walk_up(dir),
            Err(error) if is_gone(&error) => Place::Gone,
            // Not being able to ask must not lose a change.
            Err(_) => Place::Inside,
        }
    }

    /// The judgement on a directory, if it has been made.
    pub(crate) fn remembered(&self, ino: u64) -> Option<Place> {
        if self.roots.contains(&ino) {
            return Some(Place::Inside);
        }
        self.known
            .get(&ino)
            .map(|&inside| if inside { Place::Inside } else { Place::Outside })
    }

    /// Follows `..` from `dir` until a directory whose place is known, and
    /// remembers all that lie on the way.
    fn walk_up(&mut self, mut dir: OwnedFd) -> Place {
        let mut way: Vec<u64> = Vec::new();
        let mut found = Place::Outside;
        while way.len() < DEPTH_LIMIT {
            let Ok(stat) = fstat(&dir) else {
                return Place::Inside;
            };
            // Another device: the walk left the mount through its root.
            if stat.st_dev != self.dev {
                break;
            }
            if let Some(place) = self.remembered(stat.st_ino) {
                found = place;
                break;
            }
            // The filesystem's own root is its own parent.
            if way.last() == Some(&stat.st_ino) {
                break;
            }
            way.push(stat.st_ino);
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            match openat(&dir, "..", flags, Mode::empty()) {
                Ok(parent) => dir = parent,
                Err(Errno::NOENT) => return Place::Gone,
                Err(_) => return Place::Inside,
            }
        }
        for ino in way {
            self.remember(ino, found);
        }
        found
    }

    /// Notes where a directory lies, as an event told it.
    pub(crate) fn remember(&mut self, ino: u64, place: Place) {
        if place == Place::Gone || self.roots.contains(&ino) {
            return;
        }
        if self.known.len() >= KNOWN_LIMIT {
            self.known.clear();
        }
        self.known.insert(ino, place == Place::Inside);
    }

    /// A directory is gone; its number may name another one soon.
    pub(crate) fn forget(&mut self, ino: u64) {
        self.known.remove(&ino);
    }

    /// A directory crossed a border, and everything beneath it with it.
    pub(crate) fn forget_all(&mut self) {
        self.known.clear();
    }

    /// The inode number of `name` in a directory, if it is itself a directory
    /// now.
    pub(crate) fn subdirectory(&self, dir: HandleRef<'_>, name: &[u8]) -> Option<u64> {
        let dir = sys::open_handle(self.mount.as_fd(), dir, libc::O_DIRECTORY).ok()?;
        let stat = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        (stat.st_mode & libc::S_IFMT == libc::S_IFDIR && stat.st_dev == self.dev).then_some(stat.st_ino)
    }

    /// Where the inode behind `handle` is now, and none if it is gone.
    pub(crate) fn whereabouts(&mut self, handle: HandleRef<'_>) -> Option<Whereabouts> {
        let fd = sys::open_handle(self.mount.as_fd(), handle, 0).ok()?;
        for _ in 0..ATTEMPTS {
            if fstat(&fd).ok()?.st_nlink == 0 {
                return None;
            }
            // The path may lose its truth before its folder is open.
            let Some((parent, name)) = parent_and_name(&fd) else {
                continue;
            };
            let Ok(stat) = fstat(&parent) else { continue };
            if stat.st_dev == self.dev {
                let place = self.walk_up(parent);
                return Some(Whereabouts::Named {
                    dir: stat.st_ino,
                    name,
                    place,
                });
            }
        }
        Some(Whereabouts::Unnamed)
    }
}

/// The directory that holds what `fd` is open on, and its name there, as
/// the kernel's own path of it tells.
fn parent_and_name(fd: &OwnedFd) -> Option<(OwnedFd, Box<[u8]>)> {
    use std::os::fd::AsRawFd;
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let path = readlinkat(rustix::fs::CWD, link, Vec::new()).ok()?.into_bytes();
    let slash = path.iter().rposition(|&byte| byte == b'/')?;
    let name = &path[slash + 1..];
    // A path of "/" is how the kernel writes that it knows no name.
    if path.first() != Some(&b'/') || name.is_empty() {
        return None;
    }
    let parent: &[u8] = if slash == 0 { b"/" } else { &path[..slash] };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Some((rustix::fs::open(parent, flags, Mode::empty()).ok()?, name.into()))
}

/// Where an inode is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Whereabouts {
    Named {
        dir: u64,
        name: Box<[u8]>,
        place: Place,
    },
    /// It exists, but the kernel knows no name of it.
    Unnamed,
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ESTALE | libc::ENOENT | libc::ENOTDIR)
    )
}

/// The id as fanotify's records hold it: two native 32-bit words.
fn fsid_of(stat: &rustix::fs::StatVfs) -> FsId {
    let mut bytes = FsId::default();
    bytes[..4].copy_from_slice(&(stat.f_fsid as u32).to_ne_bytes());
    bytes[4..].copy_from_slice(&((stat.f_fsid >> 32) as u32).to_ne_bytes());
    bytes
}
