//! The share's root, and the only way to what lies beneath it.
//!
//! Every path is opened by `openat2` from the root's descriptor, so that the
//! kernel itself refuses `..`, symlinks and mount points on the way, however
//! the tree is changed meanwhile. What is then done to the last name is done
//! with `*at` calls on the parent's descriptor, never following a symlink.
//! Nothing here reads or writes a file.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::{self, Errno};

use super::error::{ApplyError, Obstacle};
use super::is_temp_name;
use super::owners::{Owners, OwnersBy};
use crate::model::RelPath;
use crate::observe::{dev_of, file_type, is_foreign, statx_at, statx_fd};

/// Directories that a batch keeps open.
const DIRS_KEPT: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not zero");
/// For how long a directory's descriptor is trusted to be still at its path.
/// A user who renames the directory in this time gets what is written to it
/// under its new name, as if it had been written before the rename; the rename
/// has its event, so the index follows. Opening anew with every file would
/// leave the same gap, only shorter.
const TRUSTED_FOR: Duration = Duration::from_millis(20);
/// `openat2` gives up with `EAGAIN` when anything was renamed or mounted on the
/// machine while it resolved a path; the next try nearly always succeeds.
const OPEN_TRIES: u32 = 64;

/// The longest path that one system call takes, bytes: Linux' `PATH_MAX` less
/// its NUL.
const PIECE_MAX: usize = 4095;

/// Why a share's root cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RootError {
    #[error("the share's path '{}' does not exist; create the directory or mount what belongs there", .path.display())]
    Absent { path: PathBuf },
    #[error("the share's path '{}' is not a directory; name the directory that should be mirrored", .path.display())]
    NotDirectory { path: PathBuf },
    #[error("the share's path '{}' cannot be opened: permission denied; run the daemon as root or with CAP_DAC_READ_SEARCH", .path.display())]
    Denied { path: PathBuf },
    #[error("the share's path '{}' cannot be opened: {reason}", .path.display())]
    Other { path: PathBuf, reason: String },
}

/// A share's root directory, held open.
#[derive(Debug)]
pub struct ShareRoot {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    dev: u64,
    ino: u64,
    /// Cleared when the filesystem turns out to have no `O_TMPFILE`.
    pub(super) has_tmpfile: AtomicBool,
    owners: Arc<Owners>,
}

impl ShareRoot {
    pub fn open(path: &Path) -> Result<ShareRoot, RootError> {
        let fail = |errno| {
            let path = path.to_owned();
            match errno {
                Errno::NOENT => RootError::Absent { path },
                Errno::NOTDIR => RootError::NotDirectory { path },
                Errno::ACCESS | Errno::PERM => RootError::Denied { path },
                errno => RootError::Other {
                    path,
                    reason: std::io::Error::from(errno).to_string(),
                },
            }
        };
        let fd = openat(
            CWD,
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(fail)?;
        let stat = statx_fd(fd.as_fd()).map_err(fail)?;
        Ok(ShareRoot {
            fd: Arc::new(fd),
            path: path.to_owned(),
            dev: dev_of(&stat),
            ino: stat.stx_ino,
            has_tmpfile: AtomicBool::new(true),
            owners: Arc::new(Owners::new(OwnersBy::Numbers)),
        })
    }

    /// The same, where owners are told from one another as `by` says.
    pub fn with_owners(self, by: OwnersBy) -> ShareRoot {
        let owners = Arc::new(Owners::new(by));
        ShareRoot { owners, ..self }
    }

    pub fn owners(&self) -> &Arc<Owners> {
        &self.owners
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `st_dev` of the root directory.
    pub fn dev(&self) -> u64 {
        self.dev
    }

    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// What tells this directory from any other that may be found under its
    /// path after a restart: its inode and its birth time, ns (0 where the
    /// filesystem keeps none). Device numbers change from boot to boot.
    pub fn identity(&self) -> Result<(u64, u64), ApplyError> {
        let stat = crate::observe::statx_fd(self.fd.as_fd())
            .map_err(|errno| ApplyError::system("look at", &RelPath::root(), errno))?;
        let sig = crate::observe::sig_of(&stat);
        let secs = u64::try_from(sig.btime.secs).unwrap_or(0);
        Ok((
            sig.ino,
            secs.wrapping_mul(1_000_000_000) + u64::from(sig.btime.nanos),
        ))
    }

    /// Whether there is anything in the root directory; if it cannot be read it
    /// counts as empty.
    pub fn has_entries(&self) -> bool {
        let Ok(mut names) = rustix::fs::Dir::read_from(&self.fd) else {
            return false;
        };
        names.any(|entry| entry.is_ok_and(|entry| !matches!(entry.file_name().to_bytes(), b"." | b"..")))
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the configured path still leads to the directory that was
    /// opened. If not, the share was unmounted, mounted over, moved or deleted,
    /// and its emptiness must not be taken for deletions.
    pub fn still_there(&self) -> Result<(), String> {
        let shown = self.path.display();
        let stat = match rustix::fs::stat(&self.path) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Err(format!("'{shown}' does not exist any more")),
            Err(errno) => {
                return Err(format!(
                    "'{shown}' cannot be reached: {}",
                    std::io::Error::from(errno)
                ));
            }
        };
        if (stat.st_dev, stat.st_ino) == (self.dev, self.ino) {
            return Ok(());
        }
        if stat.st_dev == self.dev {
            return Err(format!(
                "'{shown}' is another directory than the one that was mirrored"
            ));
        }
        Err(format!(
            "'{shown}' is on another filesystem than before; was something mounted or unmounted there?"
        ))
    }

    /// Starts a batch of work beneath the root.
    pub fn batch(&self) -> Dirs<'_> {
        Dirs {
            root: self,
            kept: Mutex::new(LruCache::new(DIRS_KEPT)),
        }
    }

    pub(super) fn tmpfile_unsupported(&self) {
        self.has_tmpfile.store(false, Ordering::Relaxed);
    }

    /// Opens `path`, a directory or whatever `flags` say, by the kernel's rules
    /// for staying beneath the root. What is too long for one call is walked in
    /// pieces, each beneath the one before.
    fn resolve(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let mut at: Option<OwnedFd> = None;
        let mut rest = path;
        while rest.len() > PIECE_MAX {
            let cut = rest[..=PIECE_MAX].iter().rposition(|&b| b == b'/');
            let cut = cut.ok_or(Errno::NAMETOOLONG)?;
            let from = at.as_ref().unwrap_or(&self.fd);
            at = Some(Self::resolve_piece(
                from,
                &rest[..cut],
                OFlags::PATH | OFlags::DIRECTORY,
            )?);
            rest = &rest[cut + 1..];
        }
        Self::resolve_piece(at.as_ref().unwrap_or(&self.fd), rest, flags)
    }

    fn resolve_piece(from: &OwnedFd, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let mut tries = 0;
        loop {
            match openat2(
                from,
                path,
                flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
                Mode::empty(),
                resolve,
            ) {
                Err(Errno::AGAIN | Errno::INTR) if tries < OPEN_TRIES => {
                    tries += 1;
                    if tries > 4 {
                        std::thread::yield_now();
                    }
                }
                other => return other,
            }
        }
    }
}

/// A directory that is held open.
pub type DirFd = Arc<OwnedFd>;

/// The directories that a batch of work has open. Short-lived: keep it for a
/// batch, not for longer. Shared by the threads that do the batch.
pub struct Dirs<'root> {
    root: &'root ShareRoot,
    kept: Mutex<LruCache<Box<[u8]>, Kept>>,
}

struct Kept {
    dir: DirFd,
    opened: Instant,
}

impl<'root> Dirs<'root> {
    pub fn root(&self) -> &'root ShareRoot {
        self.root
    }

    /// The directory that holds `path`, as an `O_PATH` descriptor, and the last
    /// name; the root itself and an empty name for the root.
    pub fn parent<'p>(&self, path: &'p RelPath) -> Result<(DirFd, &'p [u8]), ApplyError> {
        let name = path.name();
        if path.names().any(is_temp_name) {
            return Err(ApplyError::Reserved { path: path.clone() });
        }
        let bytes = path.as_bytes();
        let parent = &bytes[..bytes.len().saturating_sub(name.len() + 1)];
        match self.open_dir(parent) {
            Ok(dir) => Ok((dir, name)),
            Err(errno) => Err(self.explain(path, parent, errno)),
        }
    }

    /// The directory at `path` itself, as an `O_PATH` descriptor.
    pub fn dir(&self, path: &RelPath) -> Result<DirFd, ApplyError> {
        self.open_dir(path.as_bytes())
            .map_err(|errno| self.explain(path, path.as_bytes(), errno))
    }

    /// The directory at `path`, open for reading its names and for `fsync`;
    /// never from the cache.
    pub(crate) fn readable_dir(&self, path: &RelPath) -> Result<OwnedFd, ApplyError> {
        let bytes: &[u8] = if path.is_root() { b"." } else { path.as_bytes() };
        self.root
            .resolve(bytes, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME)
            .or_else(|errno| match errno {
                // Not the owner, and no CAP_FOWNER.
                Errno::PERM => self.root.resolve(bytes, OFlags::RDONLY | OFlags::DIRECTORY),
                errno => Err(errno),
            })
            .map_err(|errno| self.explain(path, path.as_bytes(), errno))
    }

    /// Forgets `path` and what lies beneath it: it was moved, removed or
    /// replaced by this batch.
    pub(super) fn forget(&self, path: &RelPath) {
        let mut kept = self.kept.lock();
        let stale: Vec<Box<[u8]>> = kept
            .iter()
            .filter(|(dir, _)| {
                dir.strip_prefix(path.as_bytes())
                    .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
            })
            .map(|(dir, _)| dir.clone())
            .collect();
        for dir in stale {
            kept.pop(&dir);
        }
    }

    fn open_dir(&self, path: &[u8]) -> io::Result<DirFd> {
        if path.is_empty() {
            return Ok(Arc::clone(&self.root.fd));
        }
        let now = Instant::now();
        if let Some(kept) = self.kept.lock().get(path)
            && now.duration_since(kept.opened) < TRUSTED_FOR
        {
            return Ok(Arc::clone(&kept.dir));
        }
        // Opened outside the lock: a slow disk must not stop the other threads.
        let dir = Arc::new(self.root.resolve(path, OFlags::PATH | OFlags::DIRECTORY)?);
        self.kept.lock().put(
            path.into(),
            Kept {
                dir: Arc::clone(&dir),
                opened: now,
            },
        );
        Ok(dir)
    }

    /// Why the directory `dir` on the way to `path` could not be opened, with
    /// the component at which the way ends.
    fn explain(&self, path: &RelPath, dir: &[u8], errno: Errno) -> ApplyError {
        match errno {
            Errno::NOENT => return ApplyError::ParentMissing { path: path.clone() },
            Errno::LOOP | Errno::NOTDIR | Errno::XDEV => {}
            errno => return ApplyError::system("open the directory of", path, errno),
        }
        let ends = (0..dir.len()).filter(|&at| dir[at] == b'/').chain([dir.len()]);
        for end in ends {
            let Ok(component) = RelPath::new(&dir[..end]) else {
                break;
            };
            let Some(parent) = component.parent() else { break };
            let Ok(holder) = self.open_dir(parent.as_bytes()) else {
                break;
            };
            let Ok(stat) = statx_at(&holder, component.name()) else {
                break;
            };
            let obstacle = if is_foreign(&stat, self.root.dev) {
                Obstacle::Mount
            } else {
                match file_type(&stat) {
                    FileType::Directory => continue,
                    FileType::Symlink => Obstacle::Symlink,
                    _ => Obstacle::NotDirectory,
                }
            };
            return ApplyError::Beneath {
                path: path.clone(),
                component,
                obstacle,
            };
        }
        // It was removed again while we looked for it.
        ApplyError::changed(path)
    }
}
