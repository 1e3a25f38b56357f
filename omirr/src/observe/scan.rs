//! Walking a tree by `stat` alone.
//!
//! In: a directory beneath the root. Out: each directory's children with their
//! signatures, parents before what is beneath them. Reads no file, follows no
//! symlink, enters no other filesystem. What could not be looked at is said,
//! because nobody may take it for deleted.

use std::cell::RefCell;
use std::os::fd::AsFd;

use rustix::fs::{FileType, RawDir};
use rustix::io::Errno;

use super::stat::{file_type, is_foreign, sig_of, statx_at, statx_fd};
use crate::apply::{ApplyError, Dirs, ShareRoot};
use crate::model::{RelPath, StatSig, is_temp_name};
use crate::parallel;

/// Directories that are read at once: enough to keep the processors busy, few
/// enough to keep what is read ahead of the caller small.
const AT_ONCE: usize = 64;
const NAMES_BUFFER: usize = 64 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child<V = ()> {
    pub name: Box<[u8]>,
    pub sig: StatSig,
    /// What the caller's judge says of it.
    pub verdict: V,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScannedDir<V = ()> {
    pub path: RelPath,
    pub ino: u64,
    /// The directory's own signature, from before its names were read.
    pub sig: StatSig,
    /// In the order of their names.
    pub children: Vec<Child<V>>,
}

/// A path that the scan can say nothing about, nor about what is beneath it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unseen {
    pub path: RelPath,
    pub why: String,
    /// Whether it is a mount point, which is no part of the share, rather than
    /// a failure.
    pub foreign: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScanSummary {
    pub dirs: u64,
    /// Children reported, directories among them.
    pub entries: u64,
    pub unseen: Vec<Unseen>,
    /// Temporary files and directories of an earlier run of the daemon, which
    /// nobody else uses; the paths' last names are temporary ones.
    pub leftovers: Vec<RelPath>,
}

/// Walks the tree from the directory `start` down and hands each directory to
/// `out`, on the calling thread, parents first. `skip` is asked for each child,
/// and whether it is a directory; what it says yes to is neither reported nor
/// entered. `moment` is asked before a directory is read, and its answer comes
/// with what was found.
pub fn scan<M: Copy>(
    root: &ShareRoot,
    start: &RelPath,
    skip: &(dyn Fn(&RelPath, bool) -> bool + Sync),
    moment: impl FnMut() -> M,
    out: impl FnMut(ScannedDir, M),
) -> Result<ScanSummary, ApplyError> {
    scan_judged(root, start, skip, &|_, _| {}, moment, out)
}

/// Says of the children of a directory, which come in the order of their names, what
/// there is to say of them.
type Judge<'a, V> = &'a (dyn Fn(&RelPath, &mut [Child<V>]) + Sync);

/// The same, with what `judge` says of each child: it is asked on the threads
/// that read.
pub fn scan_judged<M: Copy, V: Send + Default>(
    root: &ShareRoot,
    start: &RelPath,
    skip: &(dyn Fn(&RelPath, bool) -> bool + Sync),
    judge: Judge<'_, V>,
    mut moment: impl FnMut() -> M,
    mut out: impl FnMut(ScannedDir<V>, M),
) -> Result<ScanSummary, ApplyError> {
    let mut summary = ScanSummary::default();
    let mut waiting = vec![start.clone()];
    let mut first = true;
    while !waiting.is_empty() {
        // From the end: depth first, so that few directories wait.
        let batch = waiting.split_off(waiting.len().saturating_sub(AT_ONCE));
        let dirs = root.batch();
        let now = moment();
        let read: Vec<_> = parallel::map(batch.iter().collect(), 1, |path| {
            read_dir(&dirs, path, skip, judge)
        });
        for (path, read) in batch.into_iter().zip(read) {
            match read {
                Ok(read) => {
                    summary.dirs += 1;
                    summary.entries += read.dir.children.len() as u64;
                    summary.unseen.extend(read.unseen);
                    summary.leftovers.extend(read.leftovers);
                    waiting.extend(read.beneath);
                    out(read.dir, now);
                }
                Err(error) if first => return Err(error),
                Err(error) => summary.unseen.push(Unseen {
                    path,
                    why: error.to_string(),
                    foreign: false,
                }),
            }
            first = false;
        }
    }
    Ok(summary)
}

/// One directory, as [`scan`] reports it.
pub struct Listed {
    pub dir: ScannedDir,
    pub unseen: Vec<Unseen>,
    /// Names that an earlier run of the daemon gave for a moment.
    pub leftovers: Vec<RelPath>,
}

/// One directory's children.
pub fn list(
    root: &ShareRoot,
    path: &RelPath,
    skip: &(dyn Fn(&RelPath, bool) -> bool + Sync),
) -> Result<Listed, ApplyError> {
    let read = read_dir(&root.batch(), path, skip, &|_, _| {})?;
    Ok(Listed {
        dir: read.dir,
        unseen: read.unseen,
        leftovers: read.leftovers,
    })
}

struct ReadDir<V> {
    dir: ScannedDir<V>,
    /// Directories to enter.
    beneath: Vec<RelPath>,
    unseen: Vec<Unseen>,
    leftovers: Vec<RelPath>,
}

#[derive(Default)]
struct Scratch {
    raw: Vec<u8>,
    /// All names, each ended by its NUL, in one piece.
    names: Vec<u8>,
    /// Inode and where the name begins.
    order: Vec<(u64, usize)>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn read_dir<V: Default>(
    dirs: &Dirs<'_>,
    path: &RelPath,
    skip: &(dyn Fn(&RelPath, bool) -> bool + Sync),
    judge: Judge<'_, V>,
) -> Result<ReadDir<V>, ApplyError> {
    // Taken out rather than borrowed: a thread that waits within rayon may be
    // given another directory to read meanwhile.
    let mut scratch = SCRATCH.take();
    let result = read_dir_with(dirs, path, skip, judge, &mut scratch);
    SCRATCH.set(scratch);
    result
}

fn read_dir_with<V: Default>(
    dirs: &Dirs<'_>,
    path: &RelPath,
    skip: &(dyn Fn(&RelPath, bool) -> bool + Sync),
    judge: Judge<'_, V>,
    scratch: &mut Scratch,
) -> Result<ReadDir<V>, ApplyError> {
    let fail = |errno| ApplyError::system("read the directory", path, errno);
    let fd = dirs.readable_dir(path)?;
    let own = sig_of(&statx_fd(fd.as_fd()).map_err(fail)?);
    let Scratch { raw, names, order } = scratch;
    raw.reserve(NAMES_BUFFER);
    names.clear();
    order.clear();
    let mut entries = RawDir::new(&fd, raw.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_bytes_with_nul();
        if name != b".\0" && name != b"..\0" {
            order.push((entry.ino(), names.len()));
            names.extend_from_slice(name);
        }
    }
    // Names come in hash order, inodes lie on disk in theirs: with a cold cache
    // this order reads each block of inodes once.
    order.sort_unstable();

    let mut children = Vec::with_capacity(order.len());
    let mut beneath = Vec::new();
    let mut unseen = Vec::new();
    let mut leftovers = Vec::new();
    for &(_, at) in order.iter() {
        let name = std::ffi::CStr::from_bytes_until_nul(&names[at..]).unwrap_or_default();
        let bytes = name.to_bytes();
        let child = match path.join(bytes) {
            Ok(child) => child,
            Err(why) => {
                let shown = String::from_utf8_lossy(bytes).into_owned();
                unseen.push(Unseen {
                    path: path.clone(),
                    why: format!("'{shown}' in '{path}': {why}"),
                    foreign: false,
                });
                continue;
            }
        };
        if is_temp_name(bytes) {
            leftovers.push(child);
            continue;
        }
        let stat = match statx_at(&fd, name) {
            Ok(stat) => stat,
            // Deleted since its name was read.
            Err(Errno::NOENT) => continue,
            Err(errno) => {
                let why = ApplyError::system("look at", &child, errno).to_string();
                unseen.push(Unseen {
                    path: child,
                    why,
                    foreign: false,
                });
                continue;
            }
        };
        let is_dir = file_type(&stat) == FileType::Directory;
        if skip(&child, is_dir) {
            continue;
        }
        if is_foreign(&stat, dirs.root().dev()) {
            let why = format!("something is mounted on '{child}'; mounts beneath a share are not mirrored");
            unseen.push(Unseen {
                path: child,
                why,
                foreign: true,
            });
            continue;
        }
        children.push(Child {
            name: bytes.into(),
            verdict: V::default(),
            sig: sig_of(&stat),
        });
        if is_dir {
            beneath.push(child);
        }
    }
    children.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    judge(path, &mut children);
    let dir = ScannedDir {
        path: path.clone(),
        ino: own.ino,
        sig: own,
        children,
    };
    Ok(ReadDir {
        dir,
        beneath,
        unseen,
        leftovers,
    })
}
