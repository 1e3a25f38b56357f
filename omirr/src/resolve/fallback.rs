//! Finds the path of a change that the resolver does not know, by asking the
//! kernel for the inode's present place.
//!
//! In: what the event told. Out: a path beneath the share with the directories
//! above it learned, or the word that it is none of this share's business, or,
//! where the filesystem cannot be asked, the smallest part that must be
//! compared. Opens inodes by file handle and without the right to read them; it
//! never writes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fstat, fstatfs, openat, readlinkat, statat};

use super::{Resolver, Unknown};
use crate::model::{PATH_MAX, RelPath};
use crate::source::fanotify::handle::{Handle, Id, Layout};
use crate::source::fanotify::sys;
use crate::source::{Dirent, Watch};

/// A path and its inode are read in two steps; when something moves in between
/// they are read again, this often.
const ATTEMPTS: usize = 3;
/// Names on the way up, before the climb is given up; the longest path allows
/// half.
const DEPTH_LIMIT: usize = PATH_MAX;
/// `f_type` of ext4 (and ext2, ext3): a generation of zero opens any.
const EXT4_MAGIC: u64 = 0xef53;

/// Where an unknown change lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Located {
    /// Look here. The directories above are known to the resolver now.
    Path(RelPath),
    /// It exists and may be in the share, but the kernel knows no name of it
    /// (nfsd's file handles): look its inode up in the index.
    Nameless,
    /// Not beneath this share.
    Outside,
    /// It does not exist any more; its end is told where it was.
    Gone,
    /// It cannot be found out: compare everything beneath this directory.
    Rescan(RelPath),
}

/// Asks the filesystem of one share.
pub struct Locator {
    root: OwnedFd,
    dev: u64,
    root_ino: u64,
    layout: Option<Layout>,
    /// The root's own identity, as a pattern for others.
    root_id: Id,
    is_ext4: bool,
}

impl Locator {
    /// Opens the root of a share. A filesystem without file handles is not an
    /// error here: every question is then answered with a rescan.
    pub fn open(watch: &Watch) -> io::Result<Locator> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&watch.path, flags, Mode::empty())?;
        let is_ext4 = fstatfs(&root)?.f_type as u64 == EXT4_MAGIC;
        let handle = sys::handle_of(root.as_fd()).ok();
        let layout = handle
            .as_ref()
            .and_then(|handle| Layout::detect(handle.as_ref(), watch.ino));
        let root_id = layout
            .zip(handle)
            .and_then(|(layout, handle)| layout.decode(handle.as_ref()));
        Ok(Locator {
            root,
            dev: watch.dev,
            root_ino: watch.ino,
            layout,
            root_id: root_id.unwrap_or_default(),
            is_ext4,
        })
    }

    /// Finds where `unknown` is now, and tells `resolver` the directories that
    /// lead there. A directory of which only the number is known may since have
    /// given it to another one, whose path is then told: good as a hint.
    pub fn locate(&self, unknown: &Unknown, resolver: &mut Resolver) -> Located {
        let everything = || Located::Rescan(RelPath::root());
        // The directory says more than the inode: a name that is gone still has
        // a path to look at.
        if let Some(at) = &unknown.at {
            match self.open_any(at.dir) {
                // A number that now names a file: the directory is gone.
                Some(Ok(dir)) if !is_directory(&dir) => return Located::Gone,
                Some(Ok(dir)) => return self.path_in(dir, at, resolver),
                Some(Err(error)) if is_gone(&error) => return Located::Gone,
                Some(Err(_)) | None => {}
            }
        }
        if unknown.ino == 0 {
            return everything();
        }
        let exact = (unknown.generation != 0)
            .then(|| self.exact_handle(unknown))
            .flatten();
        let opened = match exact {
            Some(handle) => Some(sys::open_handle(self.root.as_fd(), handle.as_ref(), 0)),
            None => self.open_any(unknown.ino),
        };
        match opened {
            Some(Ok(fd)) => self.path_of(&fd, resolver),
            // Of a name that was removed only the directory could tell.
            Some(Err(error)) if is_gone(&error) && unknown.at.is_none() => Located::Gone,
            Some(Err(_)) | None => everything(),
        }
    }

    fn exact_handle(&self, unknown: &Unknown) -> Option<Handle> {
        let id = Id {
            ino: unknown.ino,
            generation: unknown.generation,
            subvolume: self.root_id.subvolume,
        };
        self.layout?.encode(id)
    }

    /// Opens an inode of which only the number is known, if this filesystem
    /// allows that.
    fn open_any(&self, ino: u64) -> Option<io::Result<OwnedFd>> {
        let handle = self
            .layout?
            .encode_any_generation(ino, self.root_id, self.is_ext4)?;
        Some(sys::open_handle(self.root.as_fd(), handle.as_ref(), 0))
    }

    /// The path of a name in an open directory.
    fn path_in(&self, dir: OwnedFd, at: &Dirent, resolver: &mut Resolver) -> Located {
        match self.path_of(&dir, resolver) {
            Located::Path(path) if at.name.is_empty() => Located::Path(path),
            Located::Path(path) => path.join(&at.name).map_or(Located::Gone, Located::Path),
            other => other,
        }
    }

    /// The present path of what is open, checked against the way up from it.
    fn path_of(&self, fd: &OwnedFd, resolver: &mut Resolver) -> Located {
        let Ok(stat) = fstat(fd) else {
            return Located::Rescan(RelPath::root());
        };
        if stat.st_nlink == 0 {
            return Located::Gone;
        }
        let is_dir = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        for _ in 0..ATTEMPTS {
            let absolute = match self.name_of(fd) {
                Ok(Some(absolute)) => absolute,
                Ok(None) => return Located::Nameless,
                // Deeper than the kernel tells.
                Err(_) => break,
            };
            let Ok(Some(root)) = self.name_of(&self.root) else {
                break;
            };
            // A name that is gone, of an inode that lives (it has links): made by
            // `O_TMPFILE`, say. The kernel does not know its other names now.
            let is_gone = absolute.ends_with(b" (deleted)");
            let Some(path) = strip(&absolute, &root) else {
                return if is_gone {
                    Located::Nameless
                } else {
                    Located::Outside
                };
            };
            let Ok(path) = RelPath::new(path) else { break };
            let found = statat(&self.root, path.as_os(), AtFlags::SYMLINK_NOFOLLOW);
            let is_it = found.is_ok_and(|it| (it.st_ino, it.st_dev) == (stat.st_ino, self.dev));
            if !is_it && is_gone {
                return Located::Nameless;
            }
            if !is_it {
                continue;
            }
            let dir = if is_dir { Some(path.clone()) } else { path.parent() };
            let Some(dir) = dir else { break };
            if self.learn_way(&dir, resolver) {
                return Located::Path(path);
            }
        }
        Located::Rescan(self.nearest_known(fd, is_dir, resolver))
    }

    /// The absolute path of a descriptor; none if the kernel knows none, an error
    /// if it is too long to be told.
    fn name_of(&self, fd: &OwnedFd) -> io::Result<Option<Vec<u8>>> {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let path = match readlinkat(CWD, link, Vec::new()) {
            Ok(path) => path.into_bytes(),
            Err(error @ rustix::io::Errno::NAMETOOLONG) => return Err(error.into()),
            Err(_) => return Ok(None),
        };
        Ok((path.first() == Some(&b'/') && path != b"/").then_some(path))
    }

    /// Tells the resolver every directory on the way down to `dir`.
    fn learn_way(&self, dir: &RelPath, resolver: &mut Resolver) -> bool {
        let mut parent_ino = self.root_ino;
        let mut at = RelPath::root();
        for name in dir.names() {
            let Ok(next) = at.join(name) else {
                return false;
            };
            let Ok(stat) = statat(&self.root, next.as_os(), AtFlags::SYMLINK_NOFOLLOW) else {
                return false;
            };
            let is_dir = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
            if !is_dir || stat.st_dev != self.dev || !resolver.learn_dir(stat.st_ino, parent_ino, name) {
                return false;
            }
            (parent_ino, at) = (stat.st_ino, next);
        }
        true
    }

    /// The deepest directory above `fd` whose path is known; else the root.
    fn nearest_known(&self, fd: &OwnedFd, is_dir: bool, resolver: &Resolver) -> RelPath {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut climbing = if is_dir {
            openat(fd, ".", flags, Mode::empty()).ok()
        } else {
            None
        };
        for _ in 0..DEPTH_LIMIT {
            let Some(dir) = climbing else { break };
            let Ok(stat) = fstat(&dir) else { break };
            if stat.st_dev == self.dev
                && let Some(path) = resolver.path_of(stat.st_ino)
            {
                return path;
            }
            climbing = openat(&dir, "..", flags, Mode::empty()).ok();
        }
        RelPath::root()
    }
}

fn is_directory(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ESTALE | libc::ENOENT))
}

/// What follows `root` in `path`, if `path` is `root` or lies beneath it.
fn strip<'a>(path: &'a [u8], root: &[u8]) -> Option<&'a [u8]> {
    let rest = path.strip_prefix(root)?;
    if rest.is_empty() {
        Some(rest)
    } else {
        rest.strip_prefix(b"/")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use super::*;

    fn ino(path: &Path) -> u64 {
        fs::metadata(path).expect("it is there").ino()
    }

    fn unknown(dir: u64, name: &str, ino: u64, generation: u32) -> Unknown {
        let at = (dir != 0).then(|| Dirent {
            dir,
            name: name.as_bytes().into(),
        });
        Unknown {
            at,
            ino,
            generation,
            content: true,
        }
    }

    fn path(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).expect("a path")
    }

    /// A share and a neighbour in a fresh folder of `base`; none, with the
    /// reason printed, where handles cannot be opened.
    fn share_in(base: &str) -> Option<(tempfile::TempDir, Locator, Resolver)> {
        let folder = tempfile::tempdir_in(base).expect("a folder");
        let root = folder.path().join("share");
        fs::create_dir_all(root.join("a/b")).expect("mkdir");
        fs::create_dir_all(folder.path().join("share-2/x")).expect("mkdir");
        let stat = fs::metadata(&root).expect("it is there");
        let locator = Locator::open(&Watch {
            path: root,
            dev: stat.dev(),
            ino: stat.ino(),
        })
        .expect("the root opens");
        let handle = sys::handle_of(locator.root.as_fd());
        if let Err(error) =
            handle.and_then(|handle| sys::open_handle(locator.root.as_fd(), handle.as_ref(), 0))
        {
            println!("skipped {base}: {error}");
            return None;
        }
        let resolver = Resolver::new(stat.ino());
        Some((folder, locator, resolver))
    }

    #[test]
    fn a_file_that_was_linked_after_it_was_made_without_a_name_is_nameless() {
        let folder = tempfile::tempdir().expect("a folder");
        let (root, beside) = (folder.path().join("share"), folder.path().join("beside"));
        for path in [&root, &beside] {
            fs::create_dir(path).expect("mkdir");
        }
        let stat = fs::metadata(&root).expect("it is there");
        let locator = Locator::open(&Watch {
            path: root.clone(),
            dev: stat.dev(),
            ino: stat.ino(),
        })
        .expect("a locator");
        let mut resolver = Resolver::new(stat.ino());
        for made_in in [&root, &beside] {
            let Ok(file) = rustix::fs::open(made_in, OFlags::TMPFILE | OFlags::WRONLY, Mode::RUSR) else {
                println!("skipped: this filesystem has no O_TMPFILE");
                return;
            };
            assert_eq!(locator.path_of(&file, &mut resolver), Located::Gone);
            let held = format!("/proc/self/fd/{}", file.as_raw_fd());
            let name = root.join(made_in.file_name().expect("a name"));
            rustix::fs::linkat(CWD, held, CWD, name, AtFlags::SYMLINK_FOLLOW).expect("linkat");
            assert_eq!(locator.path_of(&file, &mut resolver), Located::Nameless);
        }
    }

    #[test]
    fn finds_directories_by_their_number_alone_on_ext4() {
        let Some((folder, locator, mut resolver)) =
            share_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))
        else {
            return;
        };
        if !locator.is_ext4 {
            println!("skipped: the target folder is not on ext4");
            return;
        }
        let (share, neighbour) = (folder.path().join("share"), folder.path().join("share-2"));
        let (a, b, x) = (
            ino(&share.join("a")),
            ino(&share.join("a/b")),
            ino(&neighbour.join("x")),
        );
        let mut locate = |unknown: &Unknown| locator.locate(unknown, &mut resolver);
        assert_eq!(locate(&unknown(b, "file", 0, 0)), Located::Path(path("a/b/file")));
        assert_eq!(locate(&unknown(x, "file", 0, 0)), Located::Outside);
        let file = share.join("a/file");
        fs::write(&file, b"x").expect("write");
        let number = fs::metadata(&file).expect("it is there").ino();
        assert_eq!(
            locate(&unknown(number, "file", 0, 0)),
            Located::Gone,
            "a file holds nothing"
        );
        fs::remove_dir(share.join("a/b")).expect("rmdir");
        assert_eq!(locate(&unknown(b, "file", 0, 0)), Located::Gone);
        assert_eq!(
            (resolver.path_of(a), resolver.path_of(b)),
            (Some(path("a")), Some(path("a/b")))
        );
    }

    #[test]
    fn finds_files_by_number_and_generation() {
        for base in [concat!(env!("CARGO_MANIFEST_DIR"), "/../target"), "/dev/shm"] {
            let Some((folder, locator, mut resolver)) = share_in(base) else {
                continue;
            };
            let Some(layout) = locator.layout else {
                continue;
            };
            let file = folder.path().join("share/a/file");
            fs::write(&file, b"x").expect("write");
            let fd = OwnedFd::from(fs::File::open(&file).expect("it opens"));
            let id = layout
                .decode(sys::handle_of(fd.as_fd()).expect("a handle").as_ref())
                .expect("its layout");
            let nameless = unknown(0, "", id.ino, id.generation);
            assert_eq!(
                locator.locate(&nameless, &mut resolver),
                Located::Path(path("a/file")),
                "{base}"
            );
            assert_eq!(
                resolver.path_of(ino(&folder.path().join("share/a"))),
                Some(path("a"))
            );
            let older = unknown(0, "", id.ino, id.generation.wrapping_add(1).max(1));
            assert_eq!(locator.locate(&older, &mut resolver), Located::Gone, "{base}");
            fs::rename(&file, folder.path().join("file")).expect("rename");
            assert_eq!(
                locator.locate(&nameless, &mut resolver),
                Located::Outside,
                "{base}"
            );
        }
    }

    #[test]
    fn says_so_where_it_cannot_find_out() {
        let Some((_folder, locator, mut resolver)) = share_in("/dev/shm") else {
            return;
        };
        // tmpfs wants the generation, and an event tells that of the inode only.
        assert_eq!(
            locator.locate(&unknown(123_456, "f", 0, 0), &mut resolver),
            Located::Rescan(RelPath::root())
        );
    }

    #[test]
    fn a_longer_name_is_not_beneath() {
        assert_eq!(strip(b"/srv/www-2/x", b"/srv/www"), None);
        assert_eq!(strip(b"/srv/www/x", b"/srv/www"), Some(&b"x"[..]));
        assert_eq!(strip(b"/srv/www", b"/srv/www"), Some(&b""[..]));
    }
}
