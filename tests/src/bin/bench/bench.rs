//! What every measurement works with: the wire, the ground, and the limits.
//!
//! In: what the user chose. Out: fresh folders, originals that are made once,
//! and judgements of copies. Nothing on a disk is deleted before the end, since
//! for minutes after a deletion ext4 passes over the inodes that became free
//! (`recently_deleted` in fs/ext4/ialloc.c), which makes every new file dear.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Result;
use omirr_tests::treewalk::{self, Tree};

use crate::tools::{Place, Session, Tool};
use crate::trees::{Exactness, Ground, compare};
use crate::wire::{Carried, Wire};

/// How much is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// A first look.
    Quick,
    /// What the table asks for.
    Full,
}

impl Scale {
    pub fn pick<T>(self, quick: T, full: T) -> T {
        match self {
            Scale::Quick => quick,
            Scale::Full => full,
        }
    }
}

/// What a tree stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    Disk,
    Memory,
    /// An ext4 of its own, with room for so many files, in a file on the disk: it goes
    /// at once, where millions of files take minutes to remove.
    Image(u64),
}

/// The disk has not enough left for the largest measurement.
#[derive(Debug)]
pub struct NoRoom {
    folder: String,
    /// Bytes.
    left: u64,
    needed: u64,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "the disk of {} has {} GiB left, and a measurement may need {}; make room there, or choose another disk by --dir, and run the rows that are missing",
            self.folder,
            self.left >> 30,
            self.needed >> 30
        )
    }
}

impl std::error::Error for NoRoom {}

pub struct Bench {
    pub wire: Wire,
    pub scale: Scale,
    /// For one measurement.
    pub limit: Duration,
    /// What the disk's filesystem is called.
    pub filesystem: String,
    folder: PathBuf,
    places: Cell<usize>,
    originals: RefCell<HashMap<String, Rc<Original>>>,
}

/// A tree that several tools copy, and none changes.
pub struct Original {
    pub path: PathBuf,
    pub tree: Tree,
    _ground: Ground,
}

impl Bench {
    pub fn new(wire: Wire, scale: Scale, limit: Duration, folder: PathBuf, filesystem: String) -> Bench {
        Bench {
            wire,
            scale,
            limit,
            filesystem,
            folder,
            places: Cell::new(0),
            originals: RefCell::default(),
        }
    }

    /// When a wait that begins now must be over.
    pub fn end(&self) -> Instant {
        Instant::now() + self.limit
    }

    /// # Errors
    /// [`NoRoom`]: what fails for want of it would be taken for the tool's fault.
    pub fn ensure_room(&self) -> Result<()> {
        let there = rustix::fs::statvfs(&self.folder)?;
        let (left, needed) = (there.f_bavail * there.f_frsize, self.scale.pick(1, 13) << 30);
        if left < needed {
            let folder = self.folder.display().to_string();
            return Err(NoRoom { folder, left, needed }.into());
        }
        Ok(())
    }

    /// `said` without the name of this run's folder, for whoever reads it elsewhere.
    pub fn without_folder(&self, said: &str) -> String {
        said.replace(&format!("{}/", self.folder.display()), "")
    }

    /// A fresh folder; in memory, on a filesystem of its own.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn ground(&self, on: On) -> Result<Ground> {
        let number = self.places.get();
        self.places.set(number + 1);
        // Short, since sockets in it have short paths.
        let path = self.folder.join(number.to_string());
        match on {
            On::Disk => Ground::folder(path),
            On::Memory => Ground::tmpfs(path),
            On::Image(files) => Ground::image(path, files),
        }
    }

    /// The tree of that name, which `make` fills the first time.
    ///
    /// # Errors
    /// It cannot be made or walked.
    pub fn original(
        &self,
        name: &str,
        on: On,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Rc<Original>> {
        let key = format!("{on:?} {name}");
        if let Some(original) = self.originals.borrow().get(&key) {
            return Ok(Rc::clone(original));
        }
        let ground = self.ground(on)?;
        let path = ground.fresh("a")?;
        make(&path)?;
        // Warm: what is measured is not this disk's reading.
        let tree = treewalk::walk(&path)?;
        let original = Rc::new(Original {
            path,
            tree,
            _ground: ground,
        });
        self.originals.borrow_mut().insert(key, Rc::clone(&original));
        Ok(original)
    }

    /// Lets the originals in memory go.
    pub fn forget_originals(&self) {
        self.originals
            .borrow_mut()
            .retain(|key, _| !key.starts_with("Memory"));
    }

    /// A tool between `a` and an empty folder on the ground.
    ///
    /// # Errors
    /// The tool cannot be prepared.
    pub fn open<'bench>(
        &'bench self,
        tool: &dyn Tool,
        ground: &Ground,
        a: &Path,
    ) -> Result<(Box<dyn Session + 'bench>, PathBuf)> {
        let b = ground.fresh("b")?;
        let place = Place {
            a: a.to_owned(),
            b: b.clone(),
            home: ground.fresh("home")?,
        };
        let session = tool.open(&self.wire, place)?;
        // What was written so far is not for the tool to wait for.
        rustix::fs::sync();
        Ok((session, b))
    }

    /// What is wrong with the tool's copy.
    ///
    /// # Errors
    /// It cannot be walked.
    pub fn judge(&self, tool: &dyn Tool, a: &Tree, b: &Path) -> Result<Option<String>> {
        let exactness = if tool.name() == "omirr" {
            Exactness::Everything
        } else {
            Exactness::Content
        };
        compare(a, b, exactness)
    }

    /// # Errors
    /// The counters cannot be read.
    pub fn carried_since(&self, before: Carried) -> Result<Carried> {
        Ok(self.wire.carried()?.since(before))
    }
}
