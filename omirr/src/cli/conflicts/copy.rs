//! A conflict copy on disk, and what stands under the name that it had before.
//!
//! In: a path, and the names of nodes as far as the configuration has them. Out:
//! names in one directory, which is held open, so that what is looked at and
//! what is then changed are in the same place. Nothing is changed here.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::Args;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};

use super::super::{ConfigFile, terminal::shown};
use crate::{
    config::Config,
    engine::{CopyName, Original},
};

/// What helps to tell the name that a copy had before.
#[derive(Clone, Debug, Args)]
pub(super) struct OriginalArgs {
    /// The name that the copy had before, where its own does not tell
    ///
    /// Names that were too long were cut; and where a node's name has dots in
    /// it, a copy's name can be read in two ways. The configuration helps there:
    /// it names the nodes.
    #[arg(long, value_name = "NAME")]
    original: Option<OsString>,
    #[command(flatten)]
    pub(super) config: ConfigFile,
}

/// A conflict copy that is there.
pub(super) struct Copy {
    dir: OwnedFd,
    dir_path: PathBuf,
    pub(super) name: OsString,
    pub(super) says: CopyName,
    pub(super) stat: Stat,
}

impl Copy {
    /// Refuses what has no conflict copy's name, and what is not there.
    pub(super) fn open(path: &Path) -> anyhow::Result<Copy> {
        let name = path.file_name().unwrap_or_default().to_owned();
        let Some(says) = CopyName::parse(name.as_bytes()) else {
            bail!(
                "{} is not the name of a conflict copy: `omirr conflicts list` shows those that there are",
                shown(path)
            );
        };
        let dir_path = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            _ => PathBuf::from("."),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&dir_path, flags, Mode::empty())
            .with_context(|| format!("cannot open {}", shown(&dir_path)))?;
        let stat = stat(dir.as_fd(), &name)
            .and_then(|found| found.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .with_context(|| format!("cannot look at {}", shown(path)))?;
        Ok(Copy {
            dir,
            dir_path,
            name,
            says,
            stat,
        })
    }

    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// A name in the copy's directory as a path, for people.
    pub(super) fn shown(&self, name: &OsStr) -> String {
        shown(&self.path_of(name))
    }

    /// A name in the copy's directory as a path.
    pub(super) fn path_of(&self, name: &OsStr) -> PathBuf {
        match self.dir_path.as_os_str() == "." {
            true => PathBuf::from(name),
            false => self.dir_path.join(name),
        }
    }

    /// What is at a name in the copy's directory, if anything is.
    pub(super) fn stat(&self, name: &OsStr) -> anyhow::Result<Option<Stat>> {
        stat(self.dir(), name).with_context(|| format!("cannot look at {}", self.shown(name)))
    }

    /// The name that the copy had before. None is guessed: an error says what
    /// it may have been. `says` knows more afterwards.
    pub(super) fn original(&mut self, args: &OriginalArgs) -> anyhow::Result<OsString> {
        let original = match &args.original {
            Some(given) if self.says.may_be_of(given.as_bytes()) => given.clone(),
            Some(given) => bail!(
                "{} cannot be what {} was called before: the name of its copy would be another",
                shown(Path::new(given)),
                self.shown(&self.name)
            ),
            None => self.original_by_name(&args.config)?,
        };
        self.says = self.says.clone().of_original(original.as_bytes());
        Ok(original)
    }

    fn original_by_name(&mut self, config: &ConfigFile) -> anyhow::Result<OsString> {
        // Without a configuration the name and what is there must do.
        if let Ok(config) = Config::load(&config.config) {
            let nodes = config.peers.keys().chain([&config.node.name]);
            self.says = self.says.clone().of_nodes(nodes.map(String::as_str));
        }
        let copy = self.shown(&self.name);
        match self.says.original(self.present()?) {
            Original::Is(name) => Ok(OsString::from_vec(name)),
            Original::OneOf(names) => {
                let names: Vec<_> = names
                    .iter()
                    .map(|name| shown(Path::new(OsStr::from_bytes(name))))
                    .collect();
                bail!(
                    "{copy} may have been {} before: say which with --original NAME",
                    names.join(" or ")
                );
            }
            Original::Cut => bail!(
                "{copy} had a name before that was too long to be kept whole, and nothing here is called so: say it \
                 with --original NAME"
            ),
        }
    }

    /// The names beside the copy that it may have had before.
    fn present(&self) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut found = Vec::new();
        if !self.says.is_cut() {
            for name in self.says.originals() {
                if self.stat(OsStr::from_bytes(&name))?.is_some() {
                    found.push(name);
                }
            }
            return Ok(found);
        }
        let cannot = || format!("cannot read {}", shown(&self.dir_path));
        for entry in rustix::fs::Dir::read_from(&self.dir).with_context(cannot)? {
            let entry = entry.with_context(cannot)?;
            let name = entry.file_name().to_bytes();
            if self.says.may_be_of(name) {
                found.push(name.to_vec());
            }
        }
        Ok(found)
    }
}

fn stat(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(why) => Err(why.into()),
    }
}

/// The kind in words, as other commands say it.
pub(super) fn kind(stat: &Stat) -> &'static str {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        _ => "thing of unknown kind",
    }
}

/// Whether both are names of one inode.
pub(super) fn same_inode(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

pub(super) fn is_dir(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}
