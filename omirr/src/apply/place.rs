//! Giving a name to something, and taking it away.
//!
//! A name is never overwritten and never unlinked while it may mean something
//! unexpected. What has to go is first moved to a temporary name, by the same
//! system call that puts its successor in place; there it is looked at, and put
//! back if it is not what was expected. So a user who is faster by a
//! microsecond still has the file.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, openat, renameat_with, unlinkat};
use rustix::io::{self, Errno};

use super::beneath::{DirFd, Dirs};
use super::error::ApplyError;
use super::stage::{Made, Ready, Whole};
use super::{Applied, Expect, is_as_expected, is_dir, is_temp_name, same_object, settled, temp_name};
use crate::crash::{self, Point};
use crate::model::{RelPath, StatSig};
use crate::observe::{XattrOf, sig_of, statx_at, statx_fd};

/// Something under a temporary name; removed when dropped.
pub(super) struct Temp {
    dir: DirFd,
    name: String,
    kind: AtFlags,
    armed: bool,
}

impl Temp {
    pub(super) fn new(dir: &DirFd, name: String, is_dir: bool) -> Temp {
        let kind = if is_dir {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        Temp {
            dir: DirFd::clone(dir),
            name,
            kind,
            armed: true,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What was here has its own name now.
    fn used_up(mut self) {
        self.armed = false;
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if self.armed {
            // Nothing to do about a failure: the start of the next run sweeps.
            _ = unlinkat(&self.dir, self.name.as_str(), self.kind);
        }
    }
}

/// Gives a staged file its name.
pub fn install(dirs: &Dirs<'_>, ready: Ready, expect: &Expect) -> Result<Applied, ApplyError> {
    match ready.made {
        Made::Whole(whole) => install_whole(dirs, whole, expect),
        Made::Patch(patch) => patch.install(dirs, expect),
    }
}

pub(super) fn install_whole(
    dirs: &Dirs<'_>,
    mut ready: Whole,
    expect: &Expect,
) -> Result<Applied, ApplyError> {
    let path = ready.path().clone();
    let here = ready.here.take();
    let (dir, name) = dirs.parent(&path)?;
    if let Some((staged_in, temp)) = ready.take_temp() {
        let temp = Temp::new(&staged_in, temp, false);
        if !Arc::ptr_eq(&staged_in, &dir) && !is_same_dir(&staged_in, &dir) {
            // The directory was moved or replaced meanwhile.
            return Err(ApplyError::changed(&path));
        }
        place(dirs, &path, temp, &ready.sig, expect)?;
    } else if let Expect::Absent = expect {
        match link_fd(ready.fd(), &dir, name) {
            Ok(()) => crash::here(Point::FileLinked),
            Err(Errno::EXIST) => return Err(ApplyError::changed(&path)),
            Err(errno) => return Err(ApplyError::system("create", &path, errno)),
        }
    } else {
        let temp = temp_name();
        link_fd(ready.fd(), &dir, temp.as_bytes())
            .map_err(|errno| ApplyError::system("create", &path, errno))?;
        crash::here(Point::FileBesides);
        place(dirs, &path, Temp::new(&dir, temp, false), &ready.sig, expect)?;
    }
    Ok(outcome(&dir, name, &ready.sig).but(here))
}

fn is_same_dir(a: &DirFd, b: &DirFd) -> bool {
    let inode = |dir: &DirFd| statx_fd(dir.as_fd()).map(|stat| sig_of(&stat).ino);
    matches!((inode(a), inode(b)), (Ok(a), Ok(b)) if a == b)
}

/// What is at the name after a step that put `put` there.
pub(super) fn outcome(dir: &DirFd, name: &[u8], put: &StatSig) -> Applied {
    match statx_at(dir, name) {
        Ok(stat) => {
            let sig = sig_of(&stat);
            let same = (sig.ino, sig.mode, sig.uid, sig.gid) == (put.ino, put.mode, put.uid, put.gid);
            if same && (is_dir(put) || (sig.size, sig.mtime) == (put.size, put.mtime)) {
                let settled = settled(sig, put.mtime);
                Applied::AsWritten(StatSig {
                    racy: settled.racy || put.racy,
                    ..settled
                })
            } else {
                Applied::ChangedSince
            }
        }
        Err(_) => Applied::ChangedSince,
    }
}

/// Links an inode by its descriptor. Without CAP_DAC_READ_SEARCH the kernel
/// allows that only by way of `/proc`.
fn link_fd(fd: &OwnedFd, dir: &DirFd, name: &[u8]) -> io::Result<()> {
    static BY_PROC: AtomicBool = AtomicBool::new(false);
    if !BY_PROC.load(Ordering::Relaxed) {
        match linkat(fd, c"", dir, name, AtFlags::EMPTY_PATH) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
    }
    linkat(
        CWD,
        XattrOf::Handle(fd.as_fd()).proc_path(),
        dir,
        name,
        AtFlags::SYMLINK_FOLLOW,
    )?;
    BY_PROC.store(true, Ordering::Relaxed);
    Ok(())
}

/// How often a displaced file is offered its name again while users keep
/// replacing it; after that it stays under its temporary name.
const PUT_BACK_TRIES: u32 = 1000;

/// Moves `put`, which is at a temporary name, to the last name of `path`, in the
/// same directory, in the place of what is expected there.
pub(super) fn place(
    dirs: &Dirs<'_>,
    path: &RelPath,
    temp: Temp,
    put: &StatSig,
    expect: &Expect,
) -> Result<(), ApplyError> {
    let dir = DirFd::clone(&temp.dir);
    let name = path.name();
    match expect {
        Expect::Absent => match renameat_with(&dir, temp.name(), &dir, name, RenameFlags::NOREPLACE) {
            Ok(()) => {
                temp.used_up();
                crash::here(Point::Named);
                Ok(())
            }
            Err(Errno::EXIST) => Err(ApplyError::changed(path)),
            Err(errno) => Err(ApplyError::system("create", path, errno)),
        },
        Expect::Sig(expected) => {
            check(&dir, path, expected)?;
            swap_in(dirs, path, temp, put, expected)
        }
    }
}

/// Puts `put` in the place of what is at `path`, and deletes that if it is
/// `expected`; whatever else it is gets its name back.
fn swap_in(
    dirs: &Dirs<'_>,
    path: &RelPath,
    mut temp: Temp,
    put: &StatSig,
    expected: &StatSig,
) -> Result<(), ApplyError> {
    let dir = DirFd::clone(&temp.dir);
    exchange(&dir, temp.name().as_bytes(), &dir, path)?;
    crash::here(Point::Exchanged);
    temp.armed = false;
    dirs.forget(path);
    let fits = statx_at(&dir, temp.name()).is_ok_and(|found| same_object(expected, &sig_of(&found)));
    let removed = if fits {
        let flags = if is_dir(expected) {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        unlinkat(&dir, temp.name(), flags).map_err(|errno| match errno {
            Errno::NOTEMPTY | Errno::EXIST => ApplyError::NotEmpty { path: path.clone() },
            errno => ApplyError::system("replace", path, errno),
        })
    } else {
        Err(ApplyError::changed(path))
    };
    match removed {
        Ok(()) => crash::here(Point::DisplacedRemoved),
        Err(_) => put_back(&dir, &mut temp, path.name(), put),
    }
    removed
}

/// Undoes an exchange: what was displaced gets its name back. Users may go on
/// replacing the name meanwhile, so what comes out in return need not be `ours`:
/// if it is something new, it is newer than what was just put there, and is
/// itself put back.
fn put_back(dir: &DirFd, temp: &mut Temp, name: &[u8], ours: &StatSig) {
    let inode = |sig: &StatSig| (sig.ino, sig.btime);
    let look = || statx_at(dir, temp.name()).map(|stat| inode(&sig_of(&stat)));
    let mut older = inode(ours);
    let Ok(mut newest) = look() else { return };
    for _ in 0..PUT_BACK_TRIES {
        let back = match renameat_with(dir, temp.name(), dir, name, RenameFlags::EXCHANGE) {
            // A user has deleted the name; and may create it again.
            Err(Errno::NOENT) => renameat_with(dir, temp.name(), dir, name, RenameFlags::NOREPLACE),
            Ok(()) => match look() {
                Ok(out) if out == older => {
                    temp.armed = true;
                    return;
                }
                Ok(out) => {
                    older = newest;
                    newest = out;
                    continue;
                }
                Err(_) => return,
            },
            Err(errno) => Err(errno),
        };
        if back != Err(Errno::EXIST) {
            return;
        }
    }
}

/// Errs unless what is at `path` is what is expected there.
fn check(dir: &DirFd, path: &RelPath, expected: &StatSig) -> Result<(), ApplyError> {
    match statx_at(dir, path.name()) {
        Ok(found) if is_as_expected(expected, &sig_of(&found)) => Ok(()),
        Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => Err(ApplyError::changed(path)),
        Err(errno) => Err(ApplyError::system("look at", path, errno)),
    }
}

fn exchange(from_dir: &DirFd, from: &[u8], dir: &DirFd, path: &RelPath) -> Result<(), ApplyError> {
    renameat_with(from_dir, from, dir, path.name(), RenameFlags::EXCHANGE).map_err(|errno| match errno {
        Errno::NOENT => ApplyError::changed(path),
        Errno::INVAL => ApplyError::because(
            "replace",
            path,
            errno,
            "this filesystem cannot exchange two names (RENAME_EXCHANGE)".to_owned(),
        ),
        errno => ApplyError::system("replace", path, errno),
    })
}

/// Makes `path` one more name of the inode at `existing`, which must be
/// `existing_sig` as far as content goes. Nothing to do if it is one already.
pub fn link_existing(
    dirs: &Dirs<'_>,
    existing: &RelPath,
    existing_sig: &StatSig,
    path: &RelPath,
    expect: &Expect,
) -> Result<Applied, ApplyError> {
    let (existing_dir, existing_name) = dirs.parent(existing)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inode = match openat(&existing_dir, existing_name, flags, Mode::empty()) {
        Ok(inode) => inode,
        Err(Errno::NOENT) => return Err(ApplyError::changed(existing)),
        Err(errno) => return Err(ApplyError::system("open", existing, errno)),
    };
    let found =
        sig_of(&statx_fd(inode.as_fd()).map_err(|errno| ApplyError::system("open", existing, errno))?);
    if !is_as_expected(existing_sig, &found) {
        return Err(ApplyError::changed(existing));
    }
    let (dir, name) = dirs.parent(path)?;
    match expect {
        Expect::Absent => match link_fd(&inode, &dir, name) {
            Ok(()) => crash::here(Point::SecondName),
            Err(Errno::EXIST) => return Err(ApplyError::changed(path)),
            Err(errno) => return Err(ApplyError::system("link", path, errno)),
        },
        Expect::Sig(sig) if sig.ino == found.ino => check(&dir, path, sig)?,
        Expect::Sig(_) => {
            let temp = temp_name();
            link_fd(&inode, &dir, temp.as_bytes())
                .map_err(|errno| ApplyError::system("link", path, errno))?;
            crash::here(Point::SecondBesides);
            place(dirs, path, Temp::new(&dir, temp, false), &found, expect)?;
        }
    }
    Ok(outcome(
        &dir,
        name,
        &StatSig {
            racy: existing_sig.racy,
            ..found
        },
    ))
}

/// Removes anything but a directory. Something else in its place is left where
/// it is. Absent already is `Changed`, too.
pub fn remove_file(dirs: &Dirs<'_>, path: &RelPath, expected: &StatSig) -> Result<(), ApplyError> {
    let (dir, _) = dirs.parent(path)?;
    check(&dir, path, expected)?;
    take_away(&dir, path, expected)
}

/// Deletes what is at `path` if it is `expected`; whatever else it is gets its
/// name back.
fn take_away(dir: &DirFd, path: &RelPath, expected: &StatSig) -> Result<(), ApplyError> {
    let name = path.name();
    let temp = temp_name();
    match renameat_with(dir, name, dir, temp.as_str(), RenameFlags::NOREPLACE) {
        Ok(()) => crash::here(Point::TakenAway),
        Err(Errno::NOENT) => return Err(ApplyError::changed(path)),
        Err(errno) => return Err(ApplyError::system("remove", path, errno)),
    }
    let fits = statx_at(dir, temp.as_str()).is_ok_and(|found| same_object(expected, &sig_of(&found)));
    let removed = if fits {
        unlinkat(dir, temp.as_str(), AtFlags::empty())
            .map_err(|errno| ApplyError::system("remove", path, errno))
    } else {
        Err(ApplyError::changed(path))
    };
    match removed {
        Ok(()) => crash::here(Point::FileRemoved),
        // If the name has been taken again at this very moment, what was there
        // stays under its temporary name rather than be lost.
        Err(_) => _ = renameat_with(dir, temp.as_str(), dir, name, RenameFlags::NOREPLACE),
    }
    removed
}

/// How [`remove_dir`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum DirRemoval {
    Removed,
    NotEmpty,
    /// There is none, or something else than a directory.
    Absent,
}

/// Removes a directory, if it is empty.
pub fn remove_dir(dirs: &Dirs<'_>, path: &RelPath) -> Result<DirRemoval, ApplyError> {
    let (dir, name) = match dirs.parent(path) {
        Ok(found) => found,
        Err(ApplyError::ParentMissing { .. } | ApplyError::Beneath { .. }) => return Ok(DirRemoval::Absent),
        Err(error) => return Err(error),
    };
    match unlinkat(&dir, name, AtFlags::REMOVEDIR) {
        Ok(()) => {
            crash::here(Point::DirRemoved);
            dirs.forget(path);
            Ok(DirRemoval::Removed)
        }
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(DirRemoval::NotEmpty),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(DirRemoval::Absent),
        Err(errno) => Err(ApplyError::system("remove the directory", path, errno)),
    }
}

/// Moves the inode `from_sig`, of whatever kind, from `from` to `to`. With
/// something expected at `to`, the two change places and that is removed.
/// `Changed` names the path that was not as expected.
pub fn move_entry(
    dirs: &Dirs<'_>,
    from: &RelPath,
    from_sig: &StatSig,
    to: &RelPath,
    expect: &Expect,
) -> Result<Applied, ApplyError> {
    let (from_dir, from_name) = dirs.parent(from)?;
    let (to_dir, to_name) = dirs.parent(to)?;
    check(&from_dir, from, from_sig)?;
    let flags = match expect {
        Expect::Absent => RenameFlags::NOREPLACE,
        Expect::Sig(expected) => {
            check(&to_dir, to, expected)?;
            RenameFlags::EXCHANGE
        }
    };
    match renameat_with(&from_dir, from_name, &to_dir, to_name, flags) {
        Ok(()) => crash::here(Point::EntryMoved),
        Err(Errno::EXIST) => return Err(ApplyError::changed(to)),
        Err(Errno::NOENT) => return Err(ApplyError::changed(from)),
        Err(errno) => return Err(ApplyError::system("move to", to, errno)),
    }
    dirs.forget(from);
    dirs.forget(to);
    if !statx_at(&to_dir, to_name).is_ok_and(|moved| same_object(from_sig, &sig_of(&moved))) {
        _ = renameat_with(&to_dir, to_name, &from_dir, from_name, flags);
        return Err(ApplyError::changed(from));
    }
    if let Expect::Sig(displaced) = expect {
        let removed = if is_dir(displaced) {
            remove_dir(dirs, from).and_then(|removal| match removal {
                DirRemoval::NotEmpty => Err(ApplyError::NotEmpty { path: to.clone() }),
                DirRemoval::Removed | DirRemoval::Absent => Ok(()),
            })
        } else {
            statx_at(&from_dir, from_name)
                .map_err(|errno| ApplyError::system("look at", from, errno))
                // The rename moved its change time; all else must be as expected.
                .and_then(|now| {
                    let now = sig_of(&now);
                    if same_object(displaced, &now) {
                        remove_file(dirs, from, &now)
                    } else {
                        Err(ApplyError::changed(to))
                    }
                })
        };
        if let Err(error) = removed {
            _ = renameat_with(&to_dir, to_name, &from_dir, from_name, RenameFlags::EXCHANGE);
            dirs.forget(from);
            dirs.forget(to);
            return Err(error);
        }
    }
    Ok(outcome(&to_dir, to_name, from_sig))
}

/// Moves whatever is at `path` to `to`, where nothing must be: `Changed` names
/// `to` if something is, and `path` if nothing is there. Says what was moved.
pub fn set_aside(dirs: &Dirs<'_>, path: &RelPath, to: &RelPath) -> Result<StatSig, ApplyError> {
    let (dir, name) = dirs.parent(path)?;
    let (to_dir, to_name) = dirs.parent(to)?;
    match renameat_with(&dir, name, &to_dir, to_name, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Err(ApplyError::changed(to)),
        Err(Errno::NOENT) => return Err(ApplyError::changed(path)),
        Err(errno) => return Err(ApplyError::system("set aside", path, errno)),
    }
    dirs.forget(path);
    dirs.forget(to);
    match statx_at(&to_dir, to_name) {
        Ok(stat) => Ok(sig_of(&stat)),
        Err(_) => Err(ApplyError::changed(to)),
    }
}

/// Removes what an earlier run left under temporary names; what cannot be removed
/// is said and stays.
pub fn remove_leftovers(dirs: &Dirs<'_>, paths: &[RelPath]) {
    for path in paths.iter().filter(|path| !super::is_own_temp(path.name())) {
        if let Err(error) = remove_leftover(dirs, path) {
            tracing::warn!("{error}");
        }
    }
}

/// Removes something that an earlier run left under a temporary name. A
/// directory goes only if it is empty: the daemon never fills one before it has
/// its name.
pub fn remove_leftover(dirs: &Dirs<'_>, path: &RelPath) -> Result<(), ApplyError> {
    let name = path.name();
    let Some(holder) = path.parent().filter(|_| is_temp_name(name)) else {
        return Err(ApplyError::Reserved { path: path.clone() });
    };
    let dir = dirs.dir(&holder)?;
    let result = match unlinkat(&dir, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => unlinkat(&dir, name, AtFlags::REMOVEDIR),
        other => other,
    };
    match result {
        Ok(()) => {
            crash::here(Point::LeftoverRemoved);
            Ok(())
        }
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(ApplyError::system("remove the leftover", path, errno)),
    }
}

#[cfg(test)]
mod tests {
    //! What happens between the two looks, one case at a time.

    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::apply::ShareRoot;

    struct Case {
        folder: tempfile::TempDir,
        root: ShareRoot,
    }

    fn case(files: &[&str]) -> Case {
        let folder = tempfile::tempdir().unwrap();
        for name in files {
            fs::write(folder.path().join(name), name).unwrap();
        }
        let root = ShareRoot::open(folder.path()).unwrap();
        Case { folder, root }
    }

    impl Case {
        fn sig(&self, name: &str) -> StatSig {
            sig_of(&statx_at(self.root.fd(), name).unwrap())
        }

        fn temp(&self, dirs: &Dirs<'_>, name: &str) -> Temp {
            Temp::new(&dirs.dir(&RelPath::root()).unwrap(), name.to_owned(), false)
        }

        /// Name and content of all that is left.
        fn left(&self) -> Vec<String> {
            let read = |path: &Path| String::from_utf8(fs::read(path).unwrap()).unwrap();
            let mut left: Vec<_> = fs::read_dir(self.folder.path())
                .unwrap()
                .map(|file| file.unwrap())
                .map(|file| format!("{}={}", file.file_name().display(), read(&file.path())))
                .collect();
            left.sort();
            left
        }
    }

    fn f() -> RelPath {
        RelPath::new(b"f").unwrap()
    }

    #[test]
    fn what_came_after_the_first_look_gets_its_name_back() {
        let case = case(&["ours", "f", "seen"]);
        let dirs = case.root.batch();
        let (ours, seen) = (case.sig("ours"), case.sig("seen"));
        let result = swap_in(&dirs, &f(), case.temp(&dirs, "ours"), &ours, &seen);
        assert_eq!(result, Err(ApplyError::changed(&f())));
        let result = take_away(&dirs.dir(&RelPath::root()).unwrap(), &f(), &seen);
        assert_eq!(result, Err(ApplyError::changed(&f())));
        assert_eq!(case.left(), ["f=f", "seen=seen"]);
        // And goes if it is what was seen.
        fs::write(case.folder.path().join("ours"), "ours").unwrap();
        let (ours, seen) = (case.sig("ours"), case.sig("f"));
        assert_eq!(
            swap_in(&dirs, &f(), case.temp(&dirs, "ours"), &ours, &seen),
            Ok(())
        );
        assert_eq!(case.left(), ["f=ours", "seen=seen"]);
        assert_eq!(
            take_away(&dirs.dir(&RelPath::root()).unwrap(), &f(), &case.sig("f")),
            Ok(())
        );
        assert_eq!(case.left(), ["seen=seen"]);
    }

    #[test]
    fn a_user_who_goes_on_keeps_the_newest() {
        // Ours was put at `f`, then the user put `f` there: that is newer than
        // what was displaced.
        let case = case(&["displaced", "f", "gone"]);
        let dirs = case.root.batch();
        let ours = case.sig("gone");
        fs::remove_file(case.folder.path().join("gone")).unwrap();
        let mut temp = case.temp(&dirs, "displaced");
        temp.armed = false;
        put_back(&dirs.dir(&RelPath::root()).unwrap(), &mut temp, b"f", &ours);
        drop(temp);
        assert_eq!(case.left(), ["f=f"]);
    }

    #[test]
    fn a_user_who_deletes_gets_the_displaced_back() {
        let case = case(&["displaced", "gone"]);
        let dirs = case.root.batch();
        let ours = case.sig("gone");
        fs::remove_file(case.folder.path().join("gone")).unwrap();
        let mut temp = case.temp(&dirs, "displaced");
        temp.armed = false;
        put_back(&dirs.dir(&RelPath::root()).unwrap(), &mut temp, b"f", &ours);
        drop(temp);
        assert_eq!(case.left(), ["f=displaced"]);
    }
}
