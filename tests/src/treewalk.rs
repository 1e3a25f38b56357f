//! An independent look at a tree, to compare what the daemon made of it.
//!
//! In: a directory. Out: everything about every path in it that two mirrored
//! trees must have in common, and the differences between two such trees in
//! words. Shares no code with the daemon, on purpose: it opens by path, lists
//! by `std::fs` and keeps attributes as the kernel gives them, so that a
//! mistake in the daemon's own walk is not repeated here.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Larger files are compared by those of their blocks that are not zero.
const HUGE: u64 = 1 << 30;
/// How many differences are told; the rest is counted.
const TOLD: usize = 50;

/// Everything about one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub what: What,
    /// `st_mode & 0o7777`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Nanoseconds since 1970.
    pub mtime_ns: i128,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
    /// What `chattr` sets, as far as it means the same on all filesystems.
    pub flags: u32,
    /// The first path, in order, that names the same inode, if there is more
    /// than one in the tree.
    pub linked_to: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    File { size: u64, blake3: [u8; 32] },
    Dir,
    Symlink { target: OsString },
    Fifo,
    Socket,
    CharDevice { rdev: u64 },
    BlockDevice { rdev: u64 },
}

/// A tree: path beneath its root → what is there. The root is the empty path.
pub type Tree = BTreeMap<PathBuf, Node>;

/// Which attributes are the business of a mirror: not what this host computes or
/// signs for its own files.
fn counts(name: &OsStr) -> bool {
    let name = name.as_bytes();
    !matches!(name, b"security.ima" | b"security.evm")
        && !name.starts_with(b"trusted.overlay.")
        && !name.starts_with(b"trusted.SGI_ACL_")
        && !name.starts_with(b"btrfs.")
}

/// Walks everything beneath `root`, mounts excepted. Fails with the path at
/// which it failed.
pub fn walk(root: &Path) -> io::Result<Tree> {
    let root_meta = fs::symlink_metadata(root).map_err(|error| at(root, &error))?;
    let top = Way {
        path: root.to_owned(),
        _held: None,
    };
    let mut found: Vec<(PathBuf, Way, fs::Metadata)> = vec![(PathBuf::new(), top.clone(), root_meta.clone())];
    let mut dirs = vec![(PathBuf::new(), top)];
    while let Some((dir, way)) = dirs.pop() {
        let full = &way.path;
        let way = way.shortened().map_err(|error| at(full, &error))?;
        for child in fs::read_dir(&way.path).map_err(|error| at(full, &error))? {
            let child = child.map_err(|error| at(full, &error))?;
            let path = dir.join(child.file_name());
            let way = Way {
                path: way.path.join(child.file_name()),
                _held: way._held.clone(),
            };
            let meta = child.metadata().map_err(|error| at(&child.path(), &error))?;
            if meta.is_dir() {
                if meta.dev() != root_meta.dev() {
                    continue;
                }
                dirs.push((path.clone(), way.clone()));
            }
            found.push((path, way, meta));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));

    // Contents and attributes, on all processors.
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, io::Result<Node>)>> = Mutex::new(Vec::with_capacity(found.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut own = Vec::new();
                loop {
                    // By the handful, so that the counter is not fought over.
                    let from = next.fetch_add(32, Ordering::Relaxed);
                    if from >= found.len() {
                        break;
                    }
                    for (place, (_, way, meta)) in found.iter().enumerate().skip(from).take(32) {
                        own.push((place, look(&way.path, meta)));
                    }
                }
                done.lock().expect("no walker panicked").append(&mut own);
            });
        }
    });
    let mut done = done.into_inner().expect("no walker panicked");
    done.sort_by_key(|(place, _)| *place);

    let mut names: HashMap<u64, Vec<&Path>> = HashMap::new();
    for (path, _, meta) in found
        .iter()
        .filter(|(_, _, meta)| !meta.is_dir() && meta.nlink() > 1)
    {
        names.entry(meta.ino()).or_default().push(path);
    }
    let mut tree = Tree::new();
    for ((path, _, meta), (_, node)) in found.iter().zip(done) {
        let mut node = node?;
        if let Some(names) = names.get(&meta.ino()).filter(|names| names.len() > 1) {
            node.linked_to = (!meta.is_dir()).then(|| names[0].to_path_buf());
        }
        tree.insert(path.clone(), node);
    }
    Ok(tree)
}

/// How a path is reached: one that is too long for a system call by way of a
/// directory on it that is held open.
#[derive(Clone)]
struct Way {
    path: PathBuf,
    _held: Option<Arc<fs::File>>,
}

impl Way {
    /// The same, short enough for a name to follow.
    fn shortened(&self) -> io::Result<Way> {
        if self.path.as_os_str().len() < 3500 {
            return Ok(self.clone());
        }
        let held = fs::File::open(&self.path)?;
        Ok(Way {
            path: PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd())),
            _held: Some(Arc::new(held)),
        })
    }
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn look(path: &Path, meta: &fs::Metadata) -> io::Result<Node> {
    let kind = meta.file_type();
    let fail = |error: io::Error| at(path, &error);
    let what = if kind.is_file() {
        let (size, blake3) = hash(path).map_err(fail)?;
        What::File { size, blake3 }
    } else if kind.is_dir() {
        What::Dir
    } else if kind.is_symlink() {
        What::Symlink {
            target: fs::read_link(path).map_err(fail)?.into_os_string(),
        }
    } else if kind.is_fifo() {
        What::Fifo
    } else if kind.is_socket() {
        What::Socket
    } else if kind.is_char_device() {
        What::CharDevice { rdev: meta.rdev() }
    } else {
        What::BlockDevice { rdev: meta.rdev() }
    };
    Ok(Node {
        what,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
        xattrs: xattrs(path).map_err(fail)?,
        flags: flags(path, meta).map_err(fail)?,
        linked_to: None,
    })
}

fn hash(path: &Path) -> io::Result<(u64, [u8; 32])> {
    let mut file = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 64 << 10];
    let mut size = file.metadata()?.len();
    if size > HUGE {
        hash_blocks(&file, size, &mut hasher)?;
        return Ok((size, *hasher.finalize().as_bytes()));
    }
    size = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((size, *hasher.finalize().as_bytes())),
            got => {
                size += got as u64;
                hasher.update(&buffer[..got]);
            }
        }
    }
}

/// Hashes all blocks that are not zero, each with its place: the same whatever
/// is a hole, and in no time where most of it is.
fn hash_blocks(file: &fs::File, size: u64, hasher: &mut blake3::Hasher) -> io::Result<()> {
    const BLOCK: u64 = 64 << 10;
    let mut buffer = vec![0; BLOCK as usize];
    let mut at = 0;
    while at < size {
        at = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data / BLOCK * BLOCK,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let len = BLOCK.min(size - at) as usize;
        file.read_exact_at(&mut buffer[..len], at)?;
        if buffer[..len].iter().any(|&byte| byte != 0) {
            hasher.update(&at.to_le_bytes());
            hasher.update(&buffer[..len]);
        }
        at += BLOCK;
    }
    Ok(())
}

/// The kernel's numbers of `S i a d A c D C` in `lsattr`'s letters.
const FLAGS: u32 = 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x4 | 0x1_0000 | 0x80_0000;

fn flags(path: &Path, meta: &fs::Metadata) -> io::Result<u32> {
    if !meta.is_file() && !meta.is_dir() {
        return Ok(0);
    }
    let file = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let mut flags: libc::c_int = 0;
    // SAFETY: the call writes one `int`, for which `flags` is room; the
    // descriptor is open.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) };
    match done {
        0 => Ok(flags as u32 & FLAGS),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP)) => Ok(0),
            error => Err(error),
        },
    }
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    let mut names = vec![0; 64 << 10];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        other => other?,
    };
    let mut found = BTreeMap::new();
    for name in names[..len].split(|&b| b == 0).filter(|name| !name.is_empty()) {
        let name = OsString::from_vec(name.to_vec());
        if counts(&name) {
            let mut value = vec![0; 64 << 10];
            let len = rustix::fs::lgetxattr(path, name.as_os_str(), &mut value[..])?;
            value.truncate(len);
            found.insert(name, value);
        }
    }
    Ok(found)
}

/// What differs between two trees, in words, at most the first 50 and a count
/// of the rest. Empty if they are the same.
pub fn diff(a: &Tree, b: &Tree) -> Vec<String> {
    let mut told = Vec::new();
    let mut count = 0usize;
    let mut tell = |line: String| {
        count += 1;
        if told.len() < TOLD {
            told.push(line);
        }
    };
    for (path, node) in a {
        let shown = show(path);
        match b.get(path) {
            None => tell(format!("{shown}: only in the first ({})", node.what.word())),
            Some(other) => {
                for difference in node.differences(other) {
                    tell(format!("{shown}: {difference}"));
                }
            }
        }
    }
    for (path, node) in b.iter().filter(|(path, _)| !a.contains_key(*path)) {
        tell(format!(
            "{}: only in the second ({})",
            show(path),
            node.what.word()
        ));
    }
    if count > told.len() {
        told.push(format!("and {} more differences", count - told.len()));
    }
    told
}

fn show(path: &Path) -> String {
    if path.as_os_str().is_empty() {
        "the root".to_owned()
    } else {
        format!("{path:?}")
    }
}

impl What {
    fn word(&self) -> &'static str {
        match self {
            What::File { .. } => "file",
            What::Dir => "directory",
            What::Symlink { .. } => "symlink",
            What::Fifo => "fifo",
            What::Socket => "socket",
            What::CharDevice { .. } => "character device",
            What::BlockDevice { .. } => "block device",
        }
    }
}

impl Node {
    fn differences(&self, other: &Node) -> Vec<String> {
        let mut found = Vec::new();
        match (&self.what, &other.what) {
            (a, b) if a == b => {}
            (What::File { size: a, .. }, What::File { size: b, .. }) if a != b => {
                found.push(format!("size {a} and {b}"));
            }
            (What::File { .. }, What::File { .. }) => found.push("content differs".to_owned()),
            (a, b) if a.word() == b.word() => found.push(format!("{a:?} and {b:?}")),
            (a, b) => found.push(format!("{} and {}", a.word(), b.word())),
        }
        if self.mode != other.mode {
            found.push(format!("mode {:04o} and {:04o}", self.mode, other.mode));
        }
        if (self.uid, self.gid) != (other.uid, other.gid) {
            found.push(format!(
                "owner {}:{} and {}:{}",
                self.uid, self.gid, other.uid, other.gid
            ));
        }
        if self.mtime_ns != other.mtime_ns {
            found.push(format!(
                "mtime {} and {}",
                seconds(self.mtime_ns),
                seconds(other.mtime_ns)
            ));
        }
        if self.flags != other.flags {
            found.push(format!("flags {:#x} and {:#x}", self.flags, other.flags));
        }
        if self.xattrs != other.xattrs {
            let mut line = "extended attributes".to_owned();
            for (name, value) in &self.xattrs {
                if other.xattrs.get(name) != Some(value) {
                    _ = write!(line, ", {name:?} {value:?} and {:?}", other.xattrs.get(name));
                }
            }
            for name in other
                .xattrs
                .keys()
                .filter(|name| !self.xattrs.contains_key(*name))
            {
                _ = write!(line, ", {name:?} only in the second");
            }
            found.push(line);
        }
        if self.linked_to != other.linked_to {
            found.push(format!(
                "hard link to {:?} and {:?}",
                self.linked_to, other.linked_to
            ));
        }
        found
    }
}

fn seconds(ns: i128) -> String {
    format!(
        "{}.{:09}",
        ns.div_euclid(1_000_000_000),
        ns.rem_euclid(1_000_000_000)
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn sample(root: &Path) {
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/f"), "content").unwrap();
        fs::hard_link(root.join("d/f"), root.join("g")).unwrap();
        symlink("nowhere", root.join("s")).unwrap();
        for path in ["d/f", "d", ""] {
            let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
            fs::File::open(root.join(path)).unwrap().set_times(times).unwrap();
        }
    }

    /// A pair of like trees, in which the symlinks have one time.
    fn pair() -> (tempfile::TempDir, tempfile::TempDir) {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for root in [a.path(), b.path()] {
            sample(root);
            let time = rustix::fs::Timespec {
                tv_sec: 5,
                tv_nsec: 6,
            };
            let times = rustix::fs::Timestamps {
                last_access: time,
                last_modification: time,
            };
            let nofollow = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::utimensat(rustix::fs::CWD, root.join("s"), &times, nofollow).unwrap();
        }
        (a, b)
    }

    fn differences(a: &Path, b: &Path) -> String {
        diff(&walk(a).unwrap(), &walk(b).unwrap()).join("\n")
    }

    #[test]
    fn like_trees_have_no_difference() {
        let (a, b) = pair();
        assert_eq!(differences(a.path(), b.path()), "");
    }

    #[test]
    fn each_single_difference_is_told() {
        type Change = fn(&Path);
        let cases: [(&str, Change); 8] = [
            ("flags 0x0 and 0x40", |root| {
                let done = std::process::Command::new("chattr")
                    .arg("+d")
                    .arg(root.join("d"))
                    .status();
                assert!(done.unwrap().success());
            }),
            ("\"user.one\" only in the second", |root| {
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::setxattr(root.join("d"), "user.one", b"1", flags).unwrap();
            }),
            ("mode", |root| {
                fs::set_permissions(root.join("d/f"), fs::Permissions::from_mode(0o4711)).unwrap();
            }),
            ("content differs", |root| {
                fs::write(root.join("g"), "CONTENT").unwrap()
            }),
            ("size 7 and 3", |root| fs::write(root.join("g"), "new").unwrap()),
            ("\"d/f\": only in the first (file)", |root| {
                fs::remove_file(root.join("d/f")).unwrap()
            }),
            ("hard link to", |root| {
                fs::remove_file(root.join("g")).unwrap();
                fs::write(root.join("g"), "content").unwrap();
            }),
            ("file and symlink", |root| {
                fs::remove_file(root.join("g")).unwrap();
                symlink("x", root.join("g")).unwrap();
            }),
        ];
        for (expected, change) in cases {
            let (a, b) = pair();
            change(b.path());
            let told = differences(a.path(), b.path());
            assert!(told.contains(expected), "{expected} is missing in: {told}");
        }
    }

    #[test]
    fn a_nanosecond_counts() {
        let (a, b) = pair();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(1);
        fs::File::open(b.path().join("d"))
            .unwrap()
            .set_times(fs::FileTimes::new().set_modified(time))
            .unwrap();
        assert_eq!(
            differences(a.path(), b.path()),
            "\"d\": mtime 0.000000000 and 0.000000001"
        );
    }
}
