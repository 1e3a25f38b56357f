//! What has been done, brought to the disk.
//!
//! In: staged files, or paths at which something was done. Out: the word that a
//! power cut does not undo it any more, or what the disk says to that. Content
//! and names are never changed here.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, StatVfsMountFlags, fdatasync, fstatvfs, fsync, statat, syncfs};
use rustix::io::Errno;
use tokio::runtime::Handle;

use super::beneath::{Dirs, ShareRoot};
use super::error::ApplyError;
use super::stage::{Made, Ready};
use crate::crash::{self, Point};
use crate::model::RelPath;
use crate::parallel;

/// Up to so many files are synced one by one; more are cheaper with one sync of
/// the whole filesystem, which also writes what others have changed.
const SYNCED_SINGLY: usize = 32;
/// So many wait for the disk at once.
const SYNC_HANDS: usize = 4;
/// Up to so many files are synced while the intents are written.
const SYNCED_MEANWHILE: usize = 16;

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

/// Begins to bring the content of all of them to the disk. The future is done
/// once it is there, but for those that its answer names. Few contents are
/// written meanwhile by threads of `runtime`, more of them before this returns.
pub fn begin_sync<'a>(
    root: &ShareRoot,
    batch: &[&'a Ready],
    runtime: &Handle,
) -> impl Future<Output = Vec<ApplyError>> + use<'a> {
    let mut failed = Vec::new();
    let mut to_sync: Vec<(&'a Ready, OwnedFd)> = Vec::new();
    if batch.len() > SYNCED_MEANWHILE {
        failed = sync_batch(root, batch);
    } else {
        for ready in batch {
            let Made::Whole(whole) = &ready.made else {
                // What is to be written over a file is on the disk already.
                continue;
            };
            match whole.fd().try_clone() {
                Ok(fd) => to_sync.push((*ready, fd)),
                Err(_) => failed.extend(ready.sync().err()),
            }
        }
    }
    let sync = |fds: Vec<OwnedFd>| -> Vec<Result<(), Errno>> { fds.into_iter().map(fdatasync).collect() };
    let begun: Vec<_> = in_hands(to_sync)
        .into_iter()
        .map(|hand| {
            let (batch, fds): (Vec<_>, Vec<_>) = hand.into_iter().unzip();
            (batch, runtime.spawn_blocking(move || sync(fds)))
        })
        .collect();
    async move {
        for (batch, syncing) in begun {
            // The runtime may be ending.
            let Ok(synced) = syncing.await else {
                failed.extend(batch.into_iter().filter_map(|ready| ready.sync().err()));
                continue;
            };
            for (ready, synced) in batch.into_iter().zip(synced) {
                match synced {
                    Ok(()) => crash::here(Point::ContentSynced),
                    Err(errno) => failed.push(ApplyError::system("sync", ready.path(), errno)),
                }
            }
        }
        failed
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
    let synced: Vec<_> = parallel::map(batch.to_vec(), 1, |ready: &Ready| ready.sync().err());
    synced.into_iter().flatten().collect()
}

/// Returns once what is at these paths is on the disk, as it was when this was
/// called: content and attributes, and what names the `folders` have.
pub fn sync_seen(
    dirs: &Dirs<'_>,
    paths: &[RelPath],
    folders: &[RelPath],
    runtime: &Handle,
) -> Result<(), ApplyError> {
    match paths.len() <= SYNCED_SINGLY && sync_each(dirs, paths, folders, runtime)? {
        true => Ok(()),
        false => sync_all(dirs.root()),
    }
}

/// The same without a word to the rest of the filesystem. False if one of the
/// paths has something that cannot be synced by itself, like a symlink.
pub fn sync_each(
    dirs: &Dirs<'_>,
    paths: &[RelPath],
    folders: &[RelPath],
    runtime: &Handle,
) -> Result<bool, ApplyError> {
    let mut to_sync: Vec<(RelPath, OwnedFd)> = Vec::with_capacity(paths.len());
    let mut listed: BTreeSet<&RelPath> = folders.iter().collect();
    for path in paths {
        match found(dirs, path)? {
            Found::Gone => {}
            Found::File(file) => to_sync.push((path.clone(), file)),
            Found::Dir => drop(listed.insert(path)),
            Found::Special => return Ok(false),
        }
    }
    for folder in listed {
        match dirs.readable_dir(folder) {
            Ok(dir) => to_sync.push((folder.clone(), dir)),
            // Removed by the same batch, or by a user: its parent's sync says it.
            Err(ApplyError::ParentMissing { .. } | ApplyError::Beneath { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    // At once: the filesystem's journal then commits most of it together. Files
    // come first. By a few threads of the runtime: those of the pool would look for
    // more to do afterwards, and these only wait for the disk.
    let sync = |hand: Vec<(RelPath, OwnedFd)>| {
        let mut synced = hand.into_iter().map(|(path, fd)| failed(&path, fsync(fd)));
        synced.try_for_each(|result| result)
    };
    let mut hands = in_hands(to_sync).into_iter();
    let first = hands.next();
    let begun: Vec<_> = hands
        .map(|hand| runtime.spawn_blocking(move || sync(hand)))
        .collect();
    let mut result = first.map_or(Ok(()), sync);
    for syncing in begun {
        // Only a runtime that is ending does not do it.
        let cancelled = Err(ApplyError::system("sync", &RelPath::root(), Errno::CANCELED));
        result = result.and(runtime.block_on(syncing).unwrap_or(cancelled));
    }
    result.map(|()| true)
}

/// Dealt out, one after the other, to as many as may wait for the disk at once.
fn in_hands<T>(items: Vec<T>) -> Vec<Vec<T>> {
    let mut hands: Vec<Vec<T>> = Vec::new();
    for (nth, item) in items.into_iter().enumerate() {
        match hands.get_mut(nth % SYNC_HANDS) {
            Some(hand) => hand.push(item),
            None => hands.push(vec![item]),
        }
    }
    hands
}

fn failed(path: &RelPath, synced: Result<(), Errno>) -> Result<(), ApplyError> {
    synced.map_err(|errno| ApplyError::system("sync", path, errno))
}

/// What is at a path, as far as syncing goes.
enum Found {
    /// Nothing any more, which its directory's sync says.
    Gone,
    File(OwnedFd),
    Dir,
    /// What must not be opened for that, or cannot be.
    Special,
}

fn found(dirs: &Dirs<'_>, path: &RelPath) -> Result<Found, ApplyError> {
    if path.is_root() {
        return Ok(Found::Dir);
    }
    let Ok((dir, name)) = dirs.parent(path) else {
        return Ok(Found::Gone);
    };
    match statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => return Ok(Found::Dir),
            FileType::RegularFile => {}
            _ => return Ok(Found::Special),
        },
        Err(Errno::NOENT) => return Ok(Found::Gone),
        Err(errno) => return Err(ApplyError::system("sync", path, errno)),
    }
    match super::open_file(dirs, path) {
        Ok(file) => Ok(Found::File(file.into())),
        Err(error) if error.is_changed() => Ok(Found::Gone),
        // What may not be read, say.
        Err(_) => Ok(Found::Special),
    }
}
