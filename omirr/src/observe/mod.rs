//! What is at a path now.
//!
//! In: a path beneath a share's root, and what the index knows of it. Out: the
//! entry as it is on disk, or that nothing has changed. A file is read only if
//! its content may differ; attributes are read in any case: what changes them
//! within a clock tick after a look leaves the same times, and an event of it is
//! all that tells. Whatever
//! is reported was seen at one moment: a file that changed while it was read
//! is reported as such and not as a mixture. Nothing is ever written here.
//!
//! `Entry::link` is left empty: which inodes have several names in the share
//! is known only to whoever has the whole index. So are the owners' names, which
//! the disk does not have.

mod content;
mod scan;
mod stat;
mod xattrs;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{FileType, Mode, OFlags, Statx, openat, readlinkat};
use rustix::io::{self, Errno};

use crate::apply::{ApplyError, DirFd, Dirs, flags_of};
use crate::content::Leaves;
use crate::model::{Entry, Flags, Kind, RelPath, Sketch, StatSig};

pub use content::INLINE_MAX;
pub use scan::{Child, Listed, ScanSummary, ScannedDir, Unseen, list, scan, scan_judged};
pub use stat::{Looked, look, place, stat};
pub(crate) use stat::{dev_of, file_type, is_foreign, is_racy, sig_of, statx_at, statx_fd};
pub(crate) use xattrs::{XattrOf, is_kept as is_kept_xattr, is_label, read as read_xattrs};

/// How a path was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "most are the large one, and none is kept"
)]
pub enum Observed {
    /// Nothing is there, or a directory on the way is missing or no directory.
    Absent,
    /// The same as is known; its content was not read.
    Unchanged { sig: StatSig },
    Present {
        entry: Entry,
        sig: StatSig,
        /// The whole content, if the file was read and has at most
        /// [`INLINE_MAX`] bytes.
        content: Option<Bytes>,
        /// What the content is like, if the file was read and has more.
        sketch: Sketch,
        /// The hashes of its leaves, if it was read and is large.
        leaves: Option<Box<Leaves>>,
    },
    /// It changed while it was read: look again later.
    Unstable { sig: StatSig },
    /// A mount point: not part of the share.
    Foreign,
}

/// Whether to believe `stat` that nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Read only what `stat` says has changed, or what is racy. A file of the
    /// same size and time of modification is taken to have the same content.
    IfChanged,
    /// The kernel told of a write, after which that time may have been put back:
    /// the content is as it was only if the time of change is, too.
    IfTouched,
    /// Read in any case.
    Always,
}

/// Looks at `path`, and reads what may differ from `known`.
///
/// A kernel's refusal to read (`EACCES`, `EIO`) is an error and never taken for
/// an absence.
pub fn observe(
    dirs: &Dirs<'_>,
    path: &RelPath,
    known: Option<(&Entry, &StatSig)>,
    reading: Reading,
) -> Result<Observed, ApplyError> {
    match sight(dirs, path)? {
        Sight::Absent => Ok(Observed::Absent),
        Sight::Foreign => Ok(Observed::Foreign),
        Sight::Here(found) => found.read(known, reading),
    }
}

/// What `stat` alone says of a path.
pub enum Sight<'p> {
    Absent,
    /// A mount point: not part of the share.
    Foreign,
    Here(Found<'p>),
}

/// Something that is there and has not been read yet.
pub struct Found<'p> {
    dir: DirFd,
    path: &'p RelPath,
    stat: Box<Statx>,
}

/// The first half of [`observe`]: for callers to whom it depends on the inode
/// what is known of it.
pub fn sight<'p>(dirs: &Dirs<'_>, path: &'p RelPath) -> Result<Sight<'p>, ApplyError> {
    Ok(match stat::look_raw(dirs, path)? {
        stat::Raw::Absent => Sight::Absent,
        stat::Raw::Foreign => Sight::Foreign,
        stat::Raw::Here { dir, stat } => Sight::Here(Found { dir, path, stat }),
    })
}

impl Found<'_> {
    pub fn sig(&self) -> StatSig {
        sig_of(&self.stat)
    }

    /// The second half of [`observe`].
    pub fn read(&self, known: Option<(&Entry, &StatSig)>, reading: Reading) -> Result<Observed, ApplyError> {
        let sig = self.sig();
        let same =
            known.filter(|(_, known)| reading != Reading::Always && !known.racy && known.same_as(&sig));
        let place = Place {
            dir: self.dir.as_fd(),
            name: self.path.name(),
            path: self.path,
        };
        match place.read(&self.stat, sig, known, reading) {
            Ok(Observed::Present { entry, .. }) if same.is_some_and(|(known, _)| is_same(known, &entry)) => {
                Ok(Observed::Unchanged { sig })
            }
            Ok(observed) => Ok(observed),
            // Gone, or replaced by another kind, since `stat` saw it.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP | Errno::NXIO | Errno::INVAL) => {
                Ok(Observed::Unstable { sig })
            }
            Err(errno) => Err(ApplyError::system("read", self.path, errno)),
        }
    }
}

/// Whether both are the same but for the hard-link group, which is not looked
/// at here.
fn is_same(known: &Entry, found: &Entry) -> bool {
    found.kind == known.kind
        && (found.mode, found.uid, found.gid) == (known.mode, known.uid, known.gid)
        && (found.mtime, found.flags, &found.xattrs) == (known.mtime, known.flags, &known.xattrs)
}

struct Place<'a> {
    dir: BorrowedFd<'a>,
    name: &'a [u8],
    path: &'a RelPath,
}

impl Place<'_> {
    fn read(
        &self,
        stat: &Statx,
        before: StatSig,
        known: Option<(&Entry, &StatSig)>,
        reading: Reading,
    ) -> io::Result<Observed> {
        let rdev = || rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
        let named = XattrOf::Named(self.dir, self.name);
        let (mut content, mut sketch, mut leaves) = (None, Sketch::default(), None);
        let (kind, xattrs, flags, after) = match file_type(stat) {
            FileType::RegularFile => match known_content(known, &before, reading) {
                Some(kind) => (kind, read_xattrs(named)?, self.flags(known)?, self.stat_again()?),
                None => {
                    let fd = self.open()?;
                    let Some(read) = content::read(fd.as_fd(), &before)? else {
                        return Ok(Observed::Unstable { sig: before });
                    };
                    (content, sketch, leaves) = (read.content, read.sketch, read.leaves.map(Box::new));
                    let kind = Kind::File {
                        size: read.size,
                        hash: read.hash,
                    };
                    (
                        kind,
                        read_xattrs(XattrOf::Open(fd.as_fd()))?,
                        flags_of(fd.as_fd())?,
                        sig_of(&statx_fd(fd.as_fd())?),
                    )
                }
            },
            FileType::Symlink => {
                let target = readlinkat(self.dir, self.name, Vec::new())?
                    .into_bytes()
                    .into_boxed_slice();
                (
                    Kind::Symlink { target },
                    read_xattrs(named)?,
                    Flags::NONE,
                    self.stat_again()?,
                )
            }
            FileType::Directory => (
                Kind::Directory,
                read_xattrs(named)?,
                self.flags(known)?,
                self.stat_again()?,
            ),
            other => {
                let kind = match other {
                    FileType::Fifo => Kind::Fifo,
                    FileType::Socket => Kind::Socket,
                    FileType::CharacterDevice => Kind::CharDevice { rdev: rdev() },
                    FileType::BlockDevice => Kind::BlockDevice { rdev: rdev() },
                    // `stat` gives no other kind on Linux.
                    _ => return Err(Errno::INVAL),
                };
                (kind, read_xattrs(named)?, Flags::NONE, self.stat_again()?)
            }
        };
        if !after.same_as(&before) {
            return Ok(Observed::Unstable { sig: after });
        }
        let is_symlink = matches!(kind, Kind::Symlink { .. });
        let entry = Entry {
            kind,
            mode: if is_symlink { 0o777 } else { after.mode & 0o7777 },
            uid: after.uid,
            gid: after.gid,
            user: None,
            group: None,
            mtime: after.mtime,
            xattrs,
            flags,
            link: None,
        };
        let racy = is_racy(&[after.mtime, after.ctime]);
        Ok(Observed::Present {
            entry,
            sig: StatSig { racy, ..after },
            content,
            sketch,
            leaves,
        })
    }

    /// Opens the file for reading, without leaving a trace in its access time
    /// where that is allowed. `NONBLOCK`, because a fifo may have taken the
    /// file's place.
    fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match openat(self.dir, self.name, flags | OFlags::NOATIME, Mode::empty()) {
            Err(Errno::PERM) => openat(self.dir, self.name, flags, Mode::empty()),
            other => other,
        }
    }

    /// The flags of a file or directory that is not open, and need not be for
    /// anything else. Who may not open it sees none but what is known.
    fn flags(&self, known: Option<(&Entry, &StatSig)>) -> io::Result<Flags> {
        let name: &[u8] = if self.name.is_empty() { b"." } else { self.name };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match openat(self.dir, name, flags, Mode::empty()) {
            Ok(fd) => flags_of(fd.as_fd()),
            Err(Errno::ACCESS | Errno::PERM) => Ok(known.map_or(Flags::NONE, |(entry, _)| entry.flags)),
            Err(errno) => Err(errno),
        }
    }

    fn stat_again(&self) -> io::Result<StatSig> {
        let stat = statx_at(self.dir, self.name)?;
        debug_assert!(!self.name.is_empty() || self.path.is_root());
        Ok(sig_of(&stat))
    }
}

/// The content as it is known, if `stat` shows that only attributes or the
/// name have changed since.
fn known_content(known: Option<(&Entry, &StatSig)>, now: &StatSig, reading: Reading) -> Option<Kind> {
    let (entry, sig) = known?;
    let (size, _) = entry.content()?;
    let same = match reading {
        Reading::IfChanged => sig.same_content(now),
        Reading::IfTouched => sig.same_content(now) && sig.ctime == now.ctime,
        Reading::Always => false,
    };
    (same && !sig.racy && size == now.size).then(|| entry.kind.clone())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    use super::*;
    use crate::apply::ShareRoot;

    /// Does `meanwhile` between the first `stat` and the reading.
    fn observe_while(folder: &Path, meanwhile: impl FnOnce(&Path)) -> Observed {
        let root = ShareRoot::open(folder).unwrap();
        let dirs = root.batch();
        let path = RelPath::new(b"f").unwrap();
        let stat::Raw::Here { dir, stat } = stat::look_raw(&dirs, &path).unwrap() else {
            panic!("'f' is missing")
        };
        meanwhile(&folder.join("f"));
        let place = Place {
            dir: dir.as_fd(),
            name: b"f",
            path: &path,
        };
        match place.read(&stat, sig_of(&stat), None, Reading::IfChanged) {
            Ok(observed) => observed,
            Err(errno) => panic!("{errno}"),
        }
    }

    #[test]
    fn what_changes_while_it_is_read_is_unstable() {
        for size in [0, 5, INLINE_MAX + 1, 3 << 20] {
            let content = vec![1; usize::try_from(size).unwrap()];
            let with = |meanwhile: &dyn Fn(&Path)| {
                let folder = tempfile::tempdir().unwrap();
                let f = folder.path().join("f");
                fs::write(&f, &content).unwrap();
                fs::File::open(f)
                    .unwrap()
                    .set_times(fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH))
                    .unwrap();
                observe_while(folder.path(), meanwhile)
            };
            let unstable = |meanwhile: &dyn Fn(&Path)| {
                let observed = with(meanwhile);
                assert!(
                    matches!(observed, Observed::Unstable { .. }),
                    "{size} bytes: {observed:?}"
                );
            };
            unstable(&|f| fs::write(f, vec![2; content.len() + 1]).unwrap());
            unstable(&|f| fs::write(f, [2; 3]).unwrap());
            if size > 0 {
                unstable(&|f| fs::write(f, vec![2; content.len()]).unwrap());
            }
            unstable(&|f| fs::set_permissions(f, fs::Permissions::from_mode(0o600)).unwrap());
            unstable(&|f| {
                fs::write(f.with_extension("new"), &content).unwrap();
                fs::rename(f.with_extension("new"), f).unwrap();
            });
            let Observed::Present {
                entry, content: read, ..
            } = with(&|_| {})
            else {
                panic!("it held still")
            };
            let hash = crate::content::hash_bytes(&content);
            assert_eq!(entry.content(), Some((size, hash)));
            assert_eq!(read.as_deref(), (size <= INLINE_MAX).then_some(&content[..]));
        }
    }

    #[test]
    fn another_kind_that_takes_the_place_is_not_read() {
        for replace in [
            |f: &Path| symlink("/etc/passwd", f).unwrap(),
            |f: &Path| fs::create_dir(f).unwrap(),
            // Opening it must not wait for a writer.
            |f: &Path| rustix::fs::mknodat(rustix::fs::CWD, f, FileType::Fifo, Mode::RWXU, 0).unwrap(),
        ] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("f"), "file").unwrap();
            let root = ShareRoot::open(folder.path()).unwrap();
            let dirs = root.batch();
            let path = RelPath::new(b"f").unwrap();
            let stat::Raw::Here { dir, stat } = stat::look_raw(&dirs, &path).unwrap() else {
                panic!("'f' is missing")
            };
            fs::remove_file(folder.path().join("f")).unwrap();
            replace(&folder.path().join("f"));
            let place = Place {
                dir: dir.as_fd(),
                name: b"f",
                path: &path,
            };
            let read = place.read(&stat, sig_of(&stat), None, Reading::IfChanged);
            assert!(
                matches!(
                    read,
                    Err(Errno::LOOP | Errno::ISDIR) | Ok(Observed::Unstable { .. })
                ),
                "{read:?}"
            );
            let observed = observe(&dirs, &path, None, Reading::IfChanged).unwrap();
            assert!(
                matches!(observed, Observed::Present { content: None, .. }),
                "{observed:?}"
            );
        }
    }
}
