//! The daemon's own directory, and the lock that makes it one daemon's.
//!
//! In: a path. Out: a directory that is there, is nobody else's to read, and is
//! held until the value is dropped. What lies in it (index, socket) is the
//! business of those who put it there.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::{fs::FlockOperation, io::Errno};

use crate::crash::{self, Point};

/// Only the daemon's user looks in: the index holds every name in every share.
const MODE: u32 = 0o700;

/// Why the state directory cannot be used; each of these ends the daemon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    #[error(
        "another omirr daemon{} uses {path}: stop it first, or give this one its own state_dir",
        .pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
    )]
    InUse { path: PathBuf, pid: Option<u32> },
    #[error("the state directory {path} is no directory: name another as state_dir in [node]")]
    NotADirectory { path: PathBuf },
    #[error("cannot {action} {path}: {why}")]
    Io {
        action: &'static str,
        path: PathBuf,
        why: io::Error,
    },
}

/// An open, locked state directory.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// The lock lives as long as this is open; the kernel drops it when the
    /// daemon dies, however that happens.
    _lock: File,
}

impl StateDir {
    /// Makes the directory at `path` if it is missing, and takes it for this
    /// process.
    pub fn open(path: &Path) -> Result<StateDir, StateError> {
        if let Err(why) = DirBuilder::new().mode(MODE).recursive(true).create(path) {
            return Err(match why.kind() {
                io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => StateError::NotADirectory {
                    path: path.to_owned(),
                },
                _ => failed("make the state directory", path)(why),
            });
        }
        crash::here(Point::StateDirMade);
        let found = fs::metadata(path).map_err(failed("look at the state directory", path))?;
        if found.mode() & 0o077 != 0 {
            fs::set_permissions(path, fs::Permissions::from_mode(MODE))
                .map_err(failed("close the state directory to others", path))?;
        }
        let lock_path = path.join("lock");
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(failed("open the lock", &lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(StateError::InUse {
                    path: path.to_owned(),
                    pid: read_pid(&mut lock),
                });
            }
            Err(why) => return Err(failed("lock", &lock_path)(why.into())),
        }
        // Only after the lock is held: until then the pid in it is the other's.
        lock.set_len(0)
            .and_then(|()| lock.write_all(format!("{}\n", std::process::id()).as_bytes()))
            .map_err(failed("write this process's number to", &lock_path))?;
        crash::here(Point::LockTaken);
        Ok(StateDir {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |why| StateError::Io { action, path, why }
}

/// Who holds the lock; none if that process has not written its number yet.
fn read_pid(lock: &mut File) -> Option<u32> {
    let mut text = String::new();
    lock.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_made_and_closed_to_others() {
        let outer = tempfile::tempdir().unwrap();
        let path = outer.path().join("a/state");
        let state = StateDir::open(&path).unwrap();
        assert_eq!(state.path(), path);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        drop(state);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        StateDir::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_second_daemon_is_told_who_was_first() {
        let outer = tempfile::tempdir().unwrap();
        let first = StateDir::open(outer.path()).unwrap();
        let shown = outer.path().display();
        assert_eq!(
            StateDir::open(outer.path()).unwrap_err().to_string(),
            format!(
                "another omirr daemon (pid {}) uses {shown}: stop it first, or give this one its own state_dir",
                std::process::id()
            )
        );
        drop(first);
        StateDir::open(outer.path()).unwrap();
    }

    #[test]
    fn what_a_dead_daemon_left_does_not_matter() {
        let outer = tempfile::tempdir().unwrap();
        fs::write(outer.path().join("lock"), "4194304999999\n").unwrap();
        let _state = StateDir::open(outer.path()).unwrap();
        let pid = fs::read_to_string(outer.path().join("lock")).unwrap();
        assert_eq!(pid, format!("{}\n", std::process::id()));
    }

    #[test]
    fn a_file_in_its_place_is_named() {
        let outer = tempfile::tempdir().unwrap();
        let path = outer.path().join("state");
        fs::write(&path, "").unwrap();
        for path in [path.clone(), path.join("deeper")] {
            let found = StateDir::open(&path).unwrap_err().to_string();
            assert!(found.contains("is no directory: name another"), "{found}");
        }
    }
}
