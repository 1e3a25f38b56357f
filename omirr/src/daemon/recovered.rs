//! What changed while there was no room, or nobody, to tell of it one by one.
//!
//! In: inodes, and directories of which only the number is known. Out: dirty
//! paths. An inode that the index knows is looked at where the index has it; a
//! directory is compared with the index, its names and what is behind them. The
//! cost goes with what changed, not with the tree. Nothing is written here, but
//! that temporary names of an earlier run go.

use rustc_hash::{FxHashMap, FxHashSet};

use super::dirty::{Beneath, Hint};
use super::share::Share;
use crate::apply;
use crate::index::{IndexError, Reader};
use crate::model::RelPath;
use crate::observe;
use crate::resolve::Unknown;
use crate::resolve::fallback::{Located, Locator};
use crate::source::{Dirent, Recovered, Written};

/// What is still to be found.
#[derive(Debug, Default)]
pub struct Recovering {
    /// Inodes whose content may have changed, with the directory of the name
    /// under which they did; 0 if unknown.
    pub inodes: FxHashMap<u64, u64>,
    /// Directories in which names may have come or gone.
    pub dirs: FxHashSet<u64>,
}

impl Recovering {
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty() && self.dirs.is_empty()
    }

    /// Adds an inode with its directory, and directories; 0 is none.
    pub fn add(&mut self, ino: u64, parent: u64, dirs: &[u64]) {
        if ino != 0 {
            self.inodes.insert(ino, parent);
        }
        self.dirs.extend(dirs.iter().filter(|&&dir| dir != 0));
    }

    pub fn add_recovered(&mut self, recovered: &Recovered) {
        for inode in &recovered.inodes {
            let dir = if inode.named { inode.parent } else { 0 };
            self.add(inode.ino, inode.parent, &[dir]);
        }
        self.dirs.extend(&recovered.dirs);
    }
}

/// An inode that changed, nobody can say when: what was read of it before says
/// nothing, even if `stat` says the same.
const CHANGED: Hint = Hint {
    content: true,
    read: true,
    written: Written::Anywhere,
    unmapped: None,
    subtree: false,
    beneath: Beneath::Walk,
    at_rest: false,
    who: None,
};

/// Touches what has changed.
pub(super) fn find(share: &Share, locator: &Locator, what: &Recovering) -> Result<(), IndexError> {
    let reader = share.index.read()?;
    let dirs = share.root.batch();
    let mut touched = Vec::new();
    let mut todo = what.dirs.clone();
    for (&ino, &parent) in &what.inodes {
        let mut found = false;
        for path in reader.paths_of_ino(ino)? {
            found |= matches!(observe::stat(&dirs, &path), Ok(Some(sig)) if sig.ino == ino);
            touched.push((path, CHANGED));
        }
        // It is new, or has moved: it is among the names of its directory, if
        // it still is.
        if !found && parent != 0 {
            todo.insert(parent);
        }
    }
    share.touch(touched);
    // A directory that moved is where one of its two directories now has it:
    // what is not found at first may be found after those.
    let mut todo: Vec<u64> = todo.into_iter().collect();
    loop {
        let before = todo.len();
        let mut left = Vec::new();
        for dir in todo {
            match place_of(share, locator, &reader, dir)? {
                Place::At(path) => compare(share, &reader, &path, &what.inodes)?,
                Place::Gone(last) => share.touch(last.into_iter().map(|path| (path, CHANGED))),
                Place::Unknown => left.push(dir),
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        if left.len() == before {
            tracing::warn!(share = %share.name, directories = left.len(),
                "directories in which something changed cannot be found: the tree is compared with the index");
            share.ask_rescan();
            return Ok(());
        }
        todo = left;
    }
}

enum Place {
    At(RelPath),
    /// Not in the share any more; where it was.
    Gone(Vec<RelPath>),
    Unknown,
}

fn place_of(share: &Share, locator: &Locator, reader: &Reader, dir: u64) -> Result<Place, IndexError> {
    let believed = share.resolver.lock().path_of(dir);
    let known: Vec<RelPath> = believed.into_iter().chain(reader.paths_of_ino(dir)?).collect();
    let dirs = share.root.batch();
    for path in &known {
        let found = observe::stat(&dirs, path);
        if matches!(found, Ok(Some(sig)) if sig.ino == dir && sig.is_dir()) {
            return Ok(Place::At(path.clone()));
        }
    }
    let unknown = Unknown {
        at: Some(Dirent {
            dir,
            name: Box::default(),
        }),
        ino: 0,
        generation: 0,
        content: false,
    };
    let located = locator.locate(&unknown, &mut share.resolver.lock());
    Ok(match located {
        Located::Path(path) => Place::At(path),
        Located::Outside | Located::Gone => Place::Gone(known),
        Located::Nameless | Located::Rescan(_) => Place::Unknown,
    })
}

/// Compares a directory with the index: names, and `stat` of what is behind
/// them.
fn compare(
    share: &Share,
    reader: &Reader,
    path: &RelPath,
    changed: &FxHashMap<u64, u64>,
) -> Result<(), IndexError> {
    let skip = |path: &RelPath, is_dir: bool| share.is_excluded(path, is_dir);
    let since = share.resolver.lock().now();
    let differs = Hint {
        content: true,
        ..Hint::default()
    };
    let mut touched = vec![(path.clone(), differs)];
    let observe::Listed {
        dir,
        unseen,
        leftovers,
    } = match observe::list(&share.root, path, &skip) {
        Ok(listed) => listed,
        Err(error) => {
            // Gone again, most likely; then looking at it says so.
            tracing::debug!(share = %share.name, "cannot list {path}: {error}");
            share.touch(touched);
            return Ok(());
        }
    };
    {
        let mut resolver = share.resolver.lock();
        for child in dir.children.iter().filter(|child| child.sig.is_dir()) {
            resolver.learn_dir_seen(since, child.sig.ino, dir.ino, &child.name);
        }
    }
    apply::remove_leftovers(&share.root.batch(), &leftovers);
    let mut seen = FxHashSet::default();
    for child in &dir.children {
        let Ok(path) = path.join(&child.name) else {
            continue;
        };
        let same = reader.get(&path)?.is_some_and(|record| record.is_as(&child.sig));
        if changed.contains_key(&child.sig.ino) {
            touched.push((path.clone(), CHANGED));
        } else if !same {
            touched.push((path.clone(), differs));
        }
        seen.insert(path);
    }
    for (child, _) in reader.children(path)? {
        if !seen.contains(&child) && !unseen.iter().any(|unseen| unseen.path == child) {
            touched.push((child, Hint::default()));
        }
    }
    share.touch(touched);
    Ok(())
}
