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

mod belief;
mod content;
mod scan;
mod stat;
mod xattrs;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{FileType, Mode, OFlags, Statx, StatxAttributes, openat, readlinkat};
use rustix::io::{self, Errno};

use self::belief::{Believed, Case, believed};
use crate::apply::{ApplyError, DirFd, Dirs, flags_of};
use crate::content::Leaves;
use crate::model::{Entry, Flags, Kind, RelPath, Sketch, StatSig};

pub use belief::Told;
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
        /// Only what was told of its bytes was read, if anything.
        in_part: bool,
    },
    /// It changed while it was read: look again later.
    Unstable { sig: StatSig },
    /// A mount point: not part of the share.
    Foreign,
}

/// Whether to believe `stat` that nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading<'a> {
    /// Read only what `stat` says has changed, or what is racy. A file of the
    /// same size and time of modification is taken to have the same content.
    IfChanged,
    /// The kernel told of a write, after which that time may have been put back:
    /// the content is as it was only if the time of change is, too.
    IfTouched,
    /// The kernel told of the content's changes since the path was last looked at with
    /// their bytes: the rest is as it was, if nothing speaks against it; else as
    /// [`Reading::IfTouched`], or [`Reading::IfChanged`] where it was not about the
    /// content. What such a look has not read stays or becomes racy.
    Told(Told<'a>),
    /// All of the content was read a moment ago, long after its last change, and was
    /// what is known.
    JustRead,
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
    reading: Reading<'_>,
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
    pub fn read(
        &self,
        known: Option<(&Entry, &StatSig)>,
        reading: Reading<'_>,
    ) -> Result<Observed, ApplyError> {
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
        reading: Reading<'_>,
    ) -> io::Result<Observed> {
        let rdev = || rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
        let named = XattrOf::Named(self.dir, self.name);
        let (mut content, mut sketch, mut leaves) = (None, Sketch::default(), None);
        let told = told(known, &before, stat, reading);
        // Whether something of a content rests on what the kernel told.
        let mut in_part = false;
        let (kind, xattrs, flags, after) = match file_type(stat) {
            FileType::RegularFile => match known_content(known, &before, reading, &told) {
                Some(kind) => {
                    // As it was known to be, also as to whether that is sure.
                    in_part = matches!(reading, Reading::Told(_)) && known.is_some_and(|(_, sig)| sig.racy);
                    (kind, read_xattrs(named)?, self.flags(known)?, self.stat_again()?)
                }
                None => {
                    let fd = self.open()?;
                    let again = match told {
                        Some(Believed::Part(leaves, ranges)) => {
                            content::read_again(fd.as_fd(), &before, leaves, &ranges)?
                        }
                        _ => None,
                    };
                    in_part = again.is_some();
                    let read = match again {
                        Some(read) => Some(read),
                        None => content::read(fd.as_fd(), &before)?,
                    };
                    let Some(read) = read else {
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
        let racy = in_part || is_racy(&[after.mtime, after.ctime]);
        Ok(Observed::Present {
            entry,
            sig: StatSig { racy, ..after },
            content,
            sketch,
            leaves,
            in_part,
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
/// name have changed since, or the kernel says so.
fn known_content(
    known: Option<(&Entry, &StatSig)>,
    now: &StatSig,
    reading: Reading<'_>,
    told: &Option<Believed<'_>>,
) -> Option<Kind> {
    if let Some(Believed::Same(kind)) = told {
        return Some(kind.clone());
    }
    let (entry, sig) = known?;
    let (size, _) = entry.content()?;
    let same_content = sig.same_content(now);
    let same = match reading {
        Reading::IfChanged => !sig.racy && same_content,
        Reading::IfTouched => !sig.racy && same_content && sig.ctime == now.ctime,
        // A part is to be read.
        Reading::Told(_) if told.is_some() => false,
        Reading::Told(told) => !sig.racy && same_content && (!told.touched || sig.ctime == now.ctime),
        Reading::JustRead => same_content && sig.ctime == now.ctime,
        Reading::Always => false,
    };
    (same && size == now.size).then(|| entry.kind.clone())
}

/// What is believed of what was told of the file's bytes, if it was.
fn told<'a>(
    known: Option<(&'a Entry, &'a StatSig)>,
    now: &'a StatSig,
    stat: &Statx,
    reading: Reading<'a>,
) -> Option<Believed<'a>> {
    let Reading::Told(told) = reading else {
        return None;
    };
    let case = Case {
        told,
        known,
        now,
        dax: stat.stx_attributes.contains(StatxAttributes::DAX),
    };
    believed(&case)
        .inspect_err(|doubt| tracing::trace!(ino = now.ino, ?doubt, "not read by its bytes"))
        .ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
    use std::path::Path;

    use super::*;
    use crate::apply::ShareRoot;
    use crate::source::Written;

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

    /// A file of 8 MiB, and what is known of it after a look.
    struct Large {
        folder: tempfile::TempDir,
        entry: Entry,
        sig: StatSig,
        leaves: Leaves,
    }

    impl Large {
        fn new() -> Large {
            let folder = tempfile::tempdir().unwrap();
            let noise: Vec<u8> = (0..8 << 20).map(|at: u32| (at ^ at >> 9) as u8).collect();
            fs::write(folder.path().join("f"), noise).unwrap();
            let Observed::Present {
                entry, sig, leaves, ..
            } = observed(&folder, None, Reading::Always)
            else {
                panic!("it is there")
            };
            Large {
                folder,
                entry,
                sig: StatSig { racy: true, ..sig },
                leaves: *leaves.expect("it is large"),
            }
        }

        fn file(&self) -> fs::File {
            let path = self.folder.path().join("f");
            fs::File::options().write(true).open(path).unwrap()
        }

        fn content(&self) -> Vec<u8> {
            fs::read(self.folder.path().join("f")).unwrap()
        }

        /// What a look finds after it was told that, and whether it read a part.
        fn told(&self, written: Written) -> (Entry, StatSig, bool) {
            let reading = Reading::Told(Told {
                written,
                touched: written != Written::Nowhere,
                whole: true,
                leaves: Some(&self.leaves),
            });
            match observed(&self.folder, Some((&self.entry, &self.sig)), reading) {
                Observed::Present {
                    entry,
                    sig,
                    leaves,
                    in_part,
                    ..
                } => {
                    if let Some(leaves) = leaves {
                        assert_eq!(Some((leaves.size(), leaves.hash())), entry.content());
                    }
                    (entry, sig, in_part)
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn observed(
        folder: &tempfile::TempDir,
        known: Option<(&Entry, &StatSig)>,
        reading: Reading<'_>,
    ) -> Observed {
        let root = ShareRoot::open(folder.path()).unwrap();
        observe(&root.batch(), &RelPath::new(b"f").unwrap(), known, reading).unwrap()
    }

    const MIB: u64 = 1 << 20;

    fn content_of(bytes: &[u8]) -> Option<(u64, crate::model::Hash)> {
        Some((bytes.len() as u64, crate::content::hash_bytes(bytes)))
    }

    #[test]
    fn of_a_large_file_only_what_was_told_is_read() {
        let large = Large::new();
        large.file().write_all_at(b"told", 5 * MIB).unwrap();
        let told = content_of(&large.content());
        // Nobody tells of this one: whoever finds it has read too much.
        large.file().write_all_at(b"not told", 2 * MIB).unwrap();
        let (entry, sig, in_part) = large.told(Written::within(5 * MIB, 5 * MIB + 4));
        assert_eq!(entry.content(), told);
        assert!(
            in_part && sig.racy,
            "what was not read is to be read in a comparison"
        );
        let both = Written::within(5 * MIB, 5 * MIB + 4).and(Written::within(2 * MIB, 2 * MIB + 8));
        assert_eq!(large.told(both).0.content(), content_of(&large.content()));
        assert_eq!(
            large.told(Written::Anywhere).0.content(),
            content_of(&large.content())
        );
    }

    #[test]
    fn what_a_large_file_has_grown_by_is_read_and_if_it_shrank_all_is() {
        for size in [8 * MIB + 3, 10 * MIB, 8 * MIB - 1, 4 * MIB + 7, 100] {
            let large = Large::new();
            large.file().write_all_at(b"x", 0).unwrap();
            large.file().set_len(size).unwrap();
            let (entry, _, in_part) = large.told(Written::within(0, 1));
            assert_eq!(entry.content(), content_of(&large.content()), "{size}");
            assert!(!in_part, "nobody has told of the new size {size}");
        }
        for (from, len) in [(8 * MIB, 3), (8 * MIB + 5, 2 << 20), (8 * MIB - 1, 2)] {
            let large = Large::new();
            large.file().write_all_at(&vec![1; len], from).unwrap();
            let (entry, _, in_part) = large.told(Written::within(from, from + len as u64));
            assert_eq!(entry.content(), content_of(&large.content()), "{from} +{len}");
            assert!(in_part, "{from} +{len}");
        }
        let large = Large::new();
        large.file().write_all_at(&[1; 6 << 20], MIB).unwrap();
        let (entry, _, in_part) = large.told(Written::within(MIB, 7 * MIB));
        assert_eq!(entry.content(), content_of(&large.content()));
        assert!(!in_part, "most of it is all of it");
    }

    #[test]
    fn a_file_that_was_not_written_to_is_not_read_unless_its_times_say_otherwise() {
        let large = Large::new();
        let known = large.entry.content();
        large
            .file()
            .set_permissions(fs::Permissions::from_mode(0o600))
            .unwrap();
        let (entry, sig, _) = large.told(Written::Nowhere);
        assert_eq!((entry.mode, entry.content(), sig.racy), (0o600, known, true));
        large.file().write_all_at(b"not told", 2 * MIB).unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        large.file().set_modified(later).unwrap();
        let (entry, ..) = large.told(Written::Nowhere);
        assert_eq!(entry.content(), content_of(&large.content()));
    }

    #[test]
    fn a_file_with_two_names_or_in_the_place_of_another_is_read_in_full() {
        let replaced: [fn(&Path); 2] = [
            |f| fs::hard_link(f, f.with_extension("other")).unwrap(),
            |f| {
                fs::copy(f, f.with_extension("new")).unwrap();
                fs::rename(f.with_extension("new"), f).unwrap();
            },
        ];
        for replace in replaced {
            let large = Large::new();
            replace(&large.folder.path().join("f"));
            large.file().write_all_at(b"not told", 2 * MIB).unwrap();
            let (entry, ..) = large.told(Written::within(0, 1));
            assert_eq!(entry.content(), content_of(&large.content()));
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
