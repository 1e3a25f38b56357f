//! Writing beneath a share's root.
//!
//! In: a path, the entry that should be there, and what is expected to be
//! there now. Out: the entry is there, with its signature; or what is there is
//! not what was expected, and is untouched. Every step either happens wholly
//! or leaves what was there: content is staged in a file without a name,
//! verified against the row's hash, and takes its name in one system call;
//! whatever it displaces is looked at before it is deleted, and put back if it
//! is not what was expected.
//!
//! Decides nothing: which version wins, and what becomes of the other, is the
//! engine's business. Keeps no record either: a caller that must survive a
//! crash notes what it is about to do, then stages, syncs, installs, and syncs
//! the names before it notes that it is done.
//!
//! All functions may be called from several threads at once with one [`Dirs`];
//! steps on one path, or on a path and its parent, must follow one another.

mod attrs;
mod beneath;
mod error;
mod flags;
mod lease;
mod make;
mod owners;
mod patch;
mod place;
mod read;
mod redo;
mod stage;
mod sync;
#[cfg(test)]
mod tests;
mod writeback;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FileType;

pub use beneath::{DirFd, Dirs, RootError, ShareRoot};
pub use error::{ApplyError, Obstacle};
pub(crate) use flags::get as flags_of;
pub use flags::{lock, unlock};
pub use make::{ensure_parents, make_dir, make_node, make_symlink, set_attrs, set_dir_time};
pub use owners::{Owners, OwnersBy};
pub use patch::{complete, stage_patch};
pub use place::{
    DirRemoval, install, link_existing, move_entry, remove_dir, remove_file, remove_leftover,
    remove_leftovers, set_aside,
};
pub use read::open_file;
pub use redo::{Redo, RedoHead, RedoWriter, Redos};
pub use stage::{Ahead, Ready, Staged, clone_local, reflink, stage_file, staged_max};
pub use sync::{begin_sync, sync_all, sync_batch, sync_each, sync_seen};

use crate::model::{Here, StatSig, TEMP_PREFIX, Time, is_temp_name};

/// What temporary names of this process begin with: random.
static TEMP_NAMES: LazyLock<String> =
    LazyLock::new(|| format!("{TEMP_PREFIX}{:08x}", RandomState::new().hash_one(0) as u32));

/// A temporary name that nobody else has.
fn temp_name() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{}{count:08x}", *TEMP_NAMES)
}

/// Whether this process has given a temporary name, and may still need it.
fn is_own_temp(name: &[u8]) -> bool {
    name.starts_with(TEMP_NAMES.as_bytes())
}

/// What must be at a path for a step to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    Absent,
    /// What was last observed. If that signature is racy, observe again first:
    /// a change that left the same times is not noticed here.
    Sig(StatSig),
}

/// A step that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Applied {
    /// This is what is there now.
    AsWritten(StatSig),
    /// The same, but this node cannot have all that was asked for.
    Short { sig: StatSig, here: Box<Here> },
    /// It was carried out, and somebody has changed the path since: observe it.
    ChangedSince,
}

impl Applied {
    fn new(sig: StatSig, here: Option<Box<Here>>) -> Applied {
        match here {
            None => Applied::AsWritten(sig),
            Some(here) => Applied::Short { sig, here },
        }
    }

    /// The same with `here`, if it was carried out and nothing has come since.
    fn but(self, here: Option<Box<Here>>) -> Applied {
        match self {
            Applied::AsWritten(sig) | Applied::Short { sig, .. } => Applied::new(sig, here),
            Applied::ChangedSince => Applied::ChangedSince,
        }
    }

    pub fn sig(&self) -> Option<StatSig> {
        match self {
            Applied::AsWritten(sig) | Applied::Short { sig, .. } => Some(*sig),
            Applied::ChangedSince => None,
        }
    }
}

/// Whether `found` is what was expected. A directory's times, size and link
/// count change with its children and say nothing about itself.
fn is_as_expected(expected: &StatSig, found: &StatSig) -> bool {
    if is_dir(expected) || expected.nlink > 1 || found.nlink > 1 {
        // What is done to an inode's other names moves its change time and its
        // link count, and says nothing about this one.
        same_object(expected, found)
    } else {
        expected.same_as(found)
    }
}

/// Whether `found` is the inode `expected`, unchanged except for what renaming
/// and linking it changes: its change time and link count.
fn same_object(expected: &StatSig, found: &StatSig) -> bool {
    let same = expected.ino == found.ino
        && expected.btime == found.btime
        && (expected.mode, expected.uid, expected.gid) == (found.mode, found.uid, found.gid);
    same && (is_dir(expected) || (expected.size, expected.mtime) == (found.size, found.mtime))
}

fn is_dir(sig: &StatSig) -> bool {
    FileType::from_raw_mode(sig.mode) == FileType::Directory
}

/// The signature after a step: `written_time` is the modification time that
/// the step gave the path. Only that time counts for raciness: a writer who
/// comes after the step moves it, whereas the change time is the step's own.
fn settled(sig: StatSig, written_time: Time) -> StatSig {
    StatSig {
        racy: crate::observe::is_racy(&[written_time]),
        ..sig
    }
}
