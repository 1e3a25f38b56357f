//! What has been done, brought to the disk.
//!
//! In: staged files, or paths at which something was done. Out: the word that a
//! power cut does not undo it any more, or what the disk says to that. Content
//! and names are never changed here.

use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, StatVfsMountFlags, fstatvfs, fsync, statat, syncfs};
use rustix::io::Errno;

use super::beneath::{Dirs, ShareRoot};
use super::error::ApplyError;
use super::stage::Ready;
use crate::crash::{self, Point};
use crate::model::RelPath;

/// Up to so many files are synced one by one; more are cheaper with one sync of
/// the whole filesystem, which also writes what others have changed.
const SYNCED_SINGLY: usize = 32;

/// Returns once everything on the filesystem of the share is on the disk.
///
/// # Errors
/// Also for what is not the share's: the kernel remembers for each open
/// filesystem that something could not be written, and not what (`errseq_t` of
/// the superblock, since 5.8).
pub fn sync_all(root: &ShareRoot) -> Result<(), ApplyError> {
    let fail = |errno| ApplyError::system("sync the filesystem of", &RelPath::root(), errno);
    syncfs(root.fd()).map_err(fail)?;
    crash::here(Point::FilesystemSynced);
    // A filesystem that has become read-only because of an error has nothing to
    // sync, says the kernel, whatever was changed in it before.
    let state = fstatvfs(root.fd()).map_err(fail)?;
    match state.f_flag.contains(StatVfsMountFlags::RDONLY) {
        true => Err(fail(Errno::ROFS)),
        false => Ok(()),
    }
}

/// Returns once the content of all of them is on the disk, but for those that
/// the answer names.
pub fn sync_batch(root: &ShareRoot, batch: &[&Ready]) -> Vec<ApplyError> {
    if batch.len() > SYNCED_SINGLY && sync_all(root).is_ok() {
        return Vec::new();
    }
    // At once: the filesystem's journal then commits them together. Where the
    // filesystem as a whole cannot be synced, this tells whose content it is;
    // it may be nobody's here.
    batch.par_iter().filter_map(|ready| ready.sync().err()).collect()
}

/// Returns once what is at these paths is on the disk, as it was when this was
/// called: content, attributes, and names.
pub fn sync_seen(dirs: &Dirs<'_>, paths: &[RelPath]) -> Result<(), ApplyError> {
    match paths.len() <= SYNCED_SINGLY && sync_each(dirs, paths)? {
        true => Ok(()),
        false => sync_all(dirs.root()),
    }
}

/// The same without a word to the rest of the filesystem. False if one of the
/// paths has something that cannot be synced by itself, like a symlink.
pub fn sync_each(dirs: &Dirs<'_>, paths: &[RelPath]) -> Result<bool, ApplyError> {
    // Files first: a directory's sync then finds most of it in the same commit of
    // the filesystem's journal.
    let found: Vec<Found> = paths
        .par_iter()
        .map(|path| sync_file(dirs, path))
        .collect::<Result<_, _>>()?;
    if found.contains(&Found::Special) {
        return Ok(false);
    }
    let of_its_own = paths
        .iter()
        .zip(&found)
        .filter(|(_, found)| **found == Found::Dir);
    let mut folders: Vec<RelPath> = of_its_own.map(|(path, _)| path.clone()).collect();
    folders.extend(
        paths
            .iter()
            .map(|path| path.parent().unwrap_or_else(RelPath::root)),
    );
    folders.sort_unstable();
    folders.dedup();
    folders.par_iter().try_for_each(|path| {
        let dir = match dirs.readable_dir(path) {
            Ok(dir) => dir,
            // Removed by the same batch, or by a user: its parent's sync says it.
            Err(ApplyError::ParentMissing { .. } | ApplyError::Beneath { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        fsync(dir).map_err(|errno| ApplyError::system("sync the directory", path, errno))
    })?;
    Ok(true)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// It is synced, or not there any more, which its directory's sync says.
    Done,
    Dir,
    /// What must not be opened for that, or cannot be.
    Special,
}

fn sync_file(dirs: &Dirs<'_>, path: &RelPath) -> Result<Found, ApplyError> {
    if path.is_root() {
        return Ok(Found::Dir);
    }
    let Ok((dir, name)) = dirs.parent(path) else {
        return Ok(Found::Done);
    };
    match statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => return Ok(Found::Dir),
            FileType::RegularFile => {}
            _ => return Ok(Found::Special),
        },
        Err(Errno::NOENT) => return Ok(Found::Done),
        Err(errno) => return Err(ApplyError::system("sync", path, errno)),
    }
    let file = match super::open_file(dirs, path) {
        Ok(file) => file,
        Err(error) if error.is_changed() => return Ok(Found::Done),
        // What may not be read, say.
        Err(_) => return Ok(Found::Special),
    };
    fsync(file).map_err(|errno| ApplyError::system("sync", path, errno))?;
    Ok(Found::Done)
}
