//! The directories beneath the traced folder, walked without following links
//! and without leaving its filesystem.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, openat, statat};

use crate::{model::RelPath, resolve::Resolver, source::Watch};

/// The traced folder.
pub(super) struct Tree {
    root: OwnedFd,
    dev: u64,
}

/// A directory that is to be read.
struct Found {
    path: RelPath,
    ino: u64,
}

impl Tree {
    pub(super) fn open(watch: &Watch) -> io::Result<Tree> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&watch.path, flags, Mode::empty())?;
        Ok(Tree { root, dev: watch.dev })
    }

    /// Tells the resolver the directory at `top`, if there is one, and all that
    /// lie beneath it. Each is told before its entries are read: what is made in
    /// it later comes as an event in a directory that is known. False if there
    /// is none, or the one above is not known.
    pub(super) fn learn(&self, top: &RelPath, resolver: &mut Resolver) -> bool {
        let parent = top.parent().map(|parent| self.directory(&parent));
        let is_known = match (parent, self.directory(top)) {
            (None, Some(_)) => true,
            (Some(Some(parent)), Some(ino)) => resolver.learn_dir(ino, parent, top.name()),
            _ => false,
        };
        if is_known {
            self.learn_beneath(top.clone(), resolver);
        }
        is_known
    }

    fn learn_beneath(&self, top: RelPath, resolver: &mut Resolver) {
        let Some(ino) = self.directory(&top) else { return };
        let mut pending = vec![Found { path: top, ino }];
        while let Some(parent) = pending.pop() {
            self.entries(&parent, Which::Directories, |path, stat| {
                if resolver.learn_dir(stat.st_ino, parent.ino, path.name()) {
                    pending.push(Found {
                        path,
                        ino: stat.st_ino,
                    });
                }
            });
        }
    }

    /// Calls `each` with every entry beneath the folder.
    pub(super) fn walk(&self, mut each: impl FnMut(RelPath, &Stat)) {
        let Some(ino) = self.directory(&RelPath::root()) else {
            return;
        };
        let mut pending = vec![Found {
            path: RelPath::root(),
            ino,
        }];
        while let Some(parent) = pending.pop() {
            self.entries(&parent, Which::All, |path, stat| {
                if is_dir(stat) {
                    pending.push(Found {
                        path: path.clone(),
                        ino: stat.st_ino,
                    });
                }
                each(path, stat);
            });
        }
    }

    /// The inode of the directory at a path, if it is one of this filesystem's.
    fn directory(&self, path: &RelPath) -> Option<u64> {
        let stat = statat(&self.root, path.as_os(), AtFlags::SYMLINK_NOFOLLOW).ok()?;
        (is_dir(&stat) && stat.st_dev == self.dev).then_some(stat.st_ino)
    }

    /// The entries of one directory. One that is gone, or has become another, is
    /// passed over: events tell of it.
    fn entries(&self, dir: &Found, which: Which, mut each: impl FnMut(RelPath, &Stat)) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(fd) = openat(&self.root, dir.path.as_os(), flags, Mode::empty()) else {
            return;
        };
        // The way there may have led through a link that has just been put in.
        let is_it = fstat(&fd).is_ok_and(|stat| (stat.st_ino, stat.st_dev) == (dir.ino, self.dev));
        if !is_it {
            return;
        }
        let Ok(entries) = Dir::read_from(fd.as_fd()) else {
            return;
        };
        for entry in entries.flatten() {
            let kind = entry.file_type();
            if which == Which::Directories && !matches!(kind, FileType::Directory | FileType::Unknown) {
                continue;
            }
            // "." and ".." are no names and are refused here.
            let Ok(path) = dir.path.join(entry.file_name().to_bytes()) else {
                continue;
            };
            let Ok(stat) = statat(&fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let is_wanted = which == Which::All || is_dir(&stat);
            if is_wanted && stat.st_dev == self.dev {
                each(path, &stat);
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    Directories,
}

pub(super) fn is_dir(stat: &Stat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;

    #[test]
    fn learns_what_lies_beneath_and_follows_no_link() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("a/b")).expect("mkdir");
        fs::create_dir_all(folder.path().join("elsewhere/secret")).expect("mkdir");
        std::os::unix::fs::symlink(folder.path().join("elsewhere"), root.join("link")).expect("symlink");
        let ino = |path: &str| fs::metadata(folder.path().join(path)).expect("it is there").ino();
        let stat = fs::metadata(&root).expect("it is there");
        let tree = Tree::open(&Watch {
            path: root.clone(),
            dev: stat.dev(),
            ino: stat.ino(),
        })
        .expect("it opens");
        let mut resolver = Resolver::new(stat.ino());
        tree.learn(&RelPath::root(), &mut resolver);
        assert_eq!(
            resolver.path_of(ino("root/a/b")).map(|path| path.to_string()),
            Some("a/b".into())
        );
        assert_eq!(resolver.path_of(ino("elsewhere/secret")), None);
        assert_eq!(resolver.stats().directories, 3);
        let mut names = Vec::new();
        tree.walk(|path, _| names.push(path.to_string()));
        names.sort();
        assert_eq!(names, ["a", "a/b", "link"]);
    }
}
