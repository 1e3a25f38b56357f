//! New content written over the old, where most of it stays.
//!
//! In: a [`Redo`], and what `stat` said of the file that it was made for. Out:
//! the file with the new content and its row's attributes. Nobody sees it half
//! written: it is done under a [`Lease`], while whoever opens the file waits, and
//! only if `stat` under the lease still says the same. Where somebody has the
//! file open or mapped, and where it has names that shall keep the old content, a
//! copy is made, changed and exchanged instead, as for any other content. After a
//! crash [`complete`] does what was not done, and leaves alone what users have
//! changed since.

use std::fs::File;
use std::io as std_io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fdatasync, ftruncate, openat};
use rustix::io::{self, Errno};

use super::beneath::Dirs;
use super::error::ApplyError;
use super::lease::Lease;
use super::place::{install_whole, outcome};
use super::redo::{Noted, Redo, Redos, SECTOR_BYTES, sector_name};
use super::stage::{Made, Ready, clone_local, zero};
use super::{Applied, Expect, attrs, is_as_expected, settled};
use crate::content::{self, Leaves};
use crate::crash::{self, Point};
use crate::model::{Entry, Hash, RelPath, StatSig};
use crate::observe::{XattrOf, sig_of, statx_fd};

/// A content that waits as its difference from the one that is there.
pub(super) struct Patch {
    redo: Redo,
    /// Of the file that it was made for, as `stat` says it.
    base: StatSig,
    entry: Entry,
    /// As many names as the file has, if all of them are to get the content.
    pub(super) names: u32,
}

/// Makes ready what must be written over the file at the record's path, which was
/// `base` when it was compared. If somebody has the file open, that is a copy.
pub fn stage_patch(
    dirs: &Dirs<'_>,
    redo: Redo,
    base: StatSig,
    entry: &Entry,
    leaves: Leaves,
) -> Result<Ready, ApplyError> {
    let patch = Patch {
        redo,
        base,
        entry: entry.clone(),
        names: 1,
    };
    let alone = patch
        .open(dirs)?
        .is_some_and(|file| Lease::take(file.as_fd()).is_some());
    match alone {
        true => Ok(Ready::patch(patch, leaves)),
        false => patch.copy(dirs, &base),
    }
}

impl Patch {
    pub(super) fn path(&self) -> &RelPath {
        &self.redo.head.path
    }

    /// The file, to be written; none if it may not be.
    fn open(&self, dirs: &Dirs<'_>) -> Result<Option<File>, ApplyError> {
        open_to_write(dirs, self.path())
    }

    /// Gives the path its new content.
    pub(super) fn install(
        mut self: Box<Self>,
        dirs: &Dirs<'_>,
        expect: &Expect,
    ) -> Result<Applied, ApplyError> {
        let Expect::Sig(expected) = expect else {
            return Err(ApplyError::changed(self.path()));
        };
        if let Some(applied) = self.in_place(dirs, expected)? {
            return Ok(applied);
        }
        let copy = self.copy(dirs, expected)?;
        // It was not there when all else was synced.
        copy.sync()?;
        match copy.made {
            Made::Whole(whole) => install_whole(dirs, whole, expect),
            Made::Patch(_) => Err(ApplyError::changed(self.path())),
        }
    }

    /// A file of its own, as if all of it had been sent. It is read in the end,
    /// since the one that it is a copy of may have changed meanwhile.
    fn copy(&self, dirs: &Dirs<'_>, expected: &StatSig) -> Result<Ready, ApplyError> {
        let path = self.path();
        let mut staged = clone_local(dirs, path, expected, path, &self.entry)?;
        let written = self.redo.each(|noted| {
            match &noted.bytes {
                Some(bytes) => staged.write_at(noted.at, bytes)?,
                None => staged.zero_at(noted.at, noted.len)?,
            }
            Ok::<_, Failed>(())
        });
        written.map_err(|failed| failed.concerning(path))?;
        staged.resize(self.redo.head.size, None);
        staged.finish(&self.entry)
    }

    /// Writes over what is there; nothing is done, and none comes back, if that
    /// must not be.
    fn in_place(&mut self, dirs: &Dirs<'_>, expected: &StatSig) -> Result<Option<Applied>, ApplyError> {
        let path = self.path().clone();
        let fail = |errno| ApplyError::system("write", &path, errno);
        let (dir, name) = dirs.parent(&path)?;
        let Some(file) = self.open(dirs)? else {
            return Ok(None);
        };
        let Some(lease) = Lease::take(file.as_fd()) else {
            return Ok(None);
        };
        let found = sig_of(&statx_fd(file.as_fd()).map_err(fail)?);
        if !is_as_expected(expected, &found) {
            return Err(ApplyError::changed(&path));
        }
        // Whatever was done to it meanwhile, though it may say nothing of the
        // content: a copy is read again in the end.
        if !found.same_as(&self.base) || found.nlink != self.names {
            return Ok(None);
        }
        if !self.make_room(&file, &found)? {
            return Ok(None);
        }
        let of = XattrOf::Open(file.as_fd());
        let owners = Arc::clone(dirs.root().owners());
        // What may fail for want of room fails before the content changes.
        if let Err(error) = attrs::set_all_but_time(&owners, of, &path, &found, &self.entry) {
            attrs::set_mtime(of, &path, found.mtime)?;
            return Err(error);
        }
        self.redo.using();
        self.write(&file, found.size).map_err(|why| ApplyError::Torn {
            path: path.clone(),
            reason: why.to_string(),
        })?;
        let torn = |error: ApplyError| ApplyError::Torn {
            path: path.clone(),
            reason: error.to_string(),
        };
        // Writing takes capabilities away.
        let have = sig_of(&statx_fd(file.as_fd()).map_err(fail).map_err(torn)?);
        let lacks = attrs::set_all_but_time(&owners, of, &path, &have, &self.entry).map_err(torn)?;
        attrs::set_mtime(of, &path, self.entry.mtime).map_err(torn)?;
        let sig = sig_of(&statx_fd(file.as_fd()).map_err(fail).map_err(torn)?);
        let here = lacks.here(of, &path, &sig, &self.entry).map_err(torn)?;
        crash::here(Point::PatchDone);
        drop(lease);
        let sig = settled(sig, self.entry.mtime);
        Ok(Some(outcome(&dir, name, &sig).but(here)))
    }

    /// Takes the room that the new bytes need, so that what is begun can be ended.
    /// False where the filesystem cannot tell.
    fn make_room(&self, file: &File, found: &StatSig) -> Result<bool, ApplyError> {
        let path = self.path();
        let took = self.redo.each(|noted| {
            if noted.bytes.is_some() && noted.len > 0 {
                let flags = FallocateFlags::KEEP_SIZE;
                io::retry_on_intr(|| fallocate(file, flags, noted.at, noted.len))?;
            }
            Ok::<_, Failed>(())
        });
        crash::here(Point::PatchRoomMade);
        let Err(failed) = took else { return Ok(true) };
        // It counts as a change of the file, which it is not.
        attrs::set_mtime(XattrOf::Open(file.as_fd()), path, found.mtime)?;
        match failed {
            Failed::Errno(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
            failed => Err(failed.concerning(path)),
        }
    }

    fn write(&self, file: &File, old_size: u64) -> std_io::Result<()> {
        let size = self.redo.head.size;
        self.redo.each(|noted| {
            match &noted.bytes {
                Some(bytes) => file.write_all_at(bytes, noted.at)?,
                // What lies behind the end is a hole when the size is set.
                None => zero(file, noted.at, noted.len)?,
            }
            crash::here(Point::PatchWritten);
            Ok::<_, std_io::Error>(())
        })?;
        if old_size != size {
            ftruncate(file, size)?;
            crash::here(Point::PatchCut);
        }
        Ok(())
    }
}

/// Why going through a record ended.
enum Failed {
    Apply(ApplyError),
    Errno(Errno),
    Record(std_io::Error),
}

impl From<ApplyError> for Failed {
    fn from(error: ApplyError) -> Failed {
        Failed::Apply(error)
    }
}

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Failed {
        Failed::Errno(errno)
    }
}

impl From<std_io::Error> for Failed {
    fn from(why: std_io::Error) -> Failed {
        Failed::Record(why)
    }
}

impl Failed {
    fn concerning(self, path: &RelPath) -> ApplyError {
        let of = |why: &std_io::Error| Errno::from_io_error(why).unwrap_or(Errno::IO);
        match self {
            Failed::Apply(error) => error,
            Failed::Errno(errno) => ApplyError::system("write", path, errno),
            Failed::Record(why) => ApplyError::system("read what is to be written to", path, of(&why)),
        }
    }
}

fn open_to_write(dirs: &Dirs<'_>, path: &RelPath) -> Result<Option<File>, ApplyError> {
    let (dir, name) = dirs.parent(path)?;
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match openat(&dir, name, flags, Mode::empty()) {
        Ok(file) => Ok(Some(File::from(file))),
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::ISDIR) => Err(ApplyError::changed(path)),
        // A program that runs, what may only be read, and the like.
        Err(_) => Ok(None),
    }
}

/// Completes what the last run was writing over files when it was killed.
/// `is_meant` says whether a path was to get the content with a hash. Returns the
/// paths that something was completed at; the caller clears the records when all
/// is durable.
pub fn complete(
    dirs: &Dirs<'_>,
    redos: &Arc<Redos>,
    is_meant: &dyn Fn(&RelPath, &Hash) -> bool,
) -> Result<Vec<RelPath>, ApplyError> {
    let root = RelPath::root();
    let unreadable = |why: std_io::Error| Failed::from(why).concerning(&root);
    let mut completed = Vec::new();
    for redo in redos.left().map_err(unreadable)? {
        let head = redo.head.clone();
        if !is_meant(&head.path, &head.hash) {
            continue;
        }
        let file = match open_to_write(dirs, &head.path) {
            Ok(Some(file)) => file,
            // Gone, or something else: nothing of it is left to be completed.
            Ok(None)
            | Err(
                ApplyError::Changed { .. } | ApplyError::ParentMissing { .. } | ApplyError::Beneath { .. },
            ) => {
                continue;
            }
            Err(error) => return Err(error),
        };
        // If somebody has it open, it is read as it is in the meantime.
        let lease = Lease::take(file.as_fd());
        let done = complete_one(&file, &redo).map_err(|failed| failed.concerning(&head.path))?;
        drop(lease);
        if done {
            completed.push(head.path);
        }
    }
    Ok(completed)
}

/// Whether the file is now complete, but for what users have changed in it since
/// it was begun to be written over. If it was not, and they have changed it, it is
/// theirs.
fn complete_one(file: &File, redo: &Redo) -> Result<bool, Failed> {
    let head = &redo.head;
    let found = sig_of(&statx_fd(file.as_fd())?);
    let between = head.old_size.min(head.size)..=head.old_size.max(head.size);
    if (found.ino, found.btime) != (head.ino, head.btime) || !found.is_file() || found.size < *between.start()
    {
        return Ok(false);
    }
    let mut begun = found.size != head.old_size && between.contains(&found.size);
    let mut missing = false;
    redo.each(|noted| {
        for sector in sectors(file, &noted)? {
            begun |= sector == Sector::New;
            missing |= sector == Sector::Old;
        }
        Ok::<_, Failed>(())
    })?;
    // All is as it was, but for the room that was taken, which counts as a change
    // of the file; or a user has changed it somewhere.
    if !begun && (found.size, head.old_hash) != content::hash_file(file)? {
        return Ok(false);
    }
    if missing {
        redo.each(|noted| {
            for (number, sector) in sectors(file, &noted)?.into_iter().enumerate() {
                if sector == Sector::Old {
                    let from = number * SECTOR_BYTES;
                    let upto = (from + SECTOR_BYTES).min(noted.len as usize);
                    let at = noted.at + from as u64;
                    match &noted.bytes {
                        Some(bytes) => file.write_all_at(&bytes[from..upto], at)?,
                        None => file.write_all_at(&[0; SECTOR_BYTES][..upto - from], at)?,
                    }
                    crash::here(Point::RecoveryPatched);
                }
            }
            Ok::<_, Failed>(())
        })?;
    }
    // A size that is neither is a user's.
    let now = sig_of(&statx_fd(file.as_fd())?).size;
    if now != head.size && between.contains(&now) {
        ftruncate(file, head.size)?;
        crash::here(Point::RecoveryPatched);
    }
    fdatasync(file)?;
    Ok(true)
}

/// What is on disk of something that was to be written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sector {
    Old,
    New,
    /// Old and new are the same, or a user has changed it.
    Other,
}

fn sectors(file: &File, noted: &Noted) -> Result<Vec<Sector>, Failed> {
    let len = noted.len as usize;
    let mut disk = vec![0; len];
    let mut got = 0;
    while got < len {
        match io::retry_on_intr(|| io::pread(file, &mut disk[got..], noted.at + got as u64))? {
            // What is not there yet is as zeros.
            0 => break,
            more => got += more,
        }
    }
    let zeros = [0; SECTOR_BYTES];
    let state = |(number, sector): (usize, &[u8])| {
        let from = number * SECTOR_BYTES;
        let new = noted
            .bytes
            .as_ref()
            .map_or(&zeros[..sector.len()], |bytes| &bytes[from..from + sector.len()]);
        let is_old = noted.old.get(number) == Some(&sector_name(sector));
        match (sector == new, is_old) {
            (true, false) => Sector::New,
            (false, true) => Sector::Old,
            _ => Sector::Other,
        }
    };
    Ok(disk.chunks(SECTOR_BYTES).enumerate().map(state).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::{Path, PathBuf};

    use super::super::{RedoHead, ShareRoot};
    use super::*;
    use crate::content::Hasher;
    use crate::content::patch::Edit;
    use crate::model::{Flags, Kind};
    use crate::observe;

    const MIB: usize = 1 << 20;

    /// A file of a little above 5 MiB in a share, what it shall become, and where that is noted.
    struct Case {
        folder: tempfile::TempDir,
        root: ShareRoot,
        redos: Arc<Redos>,
        old: Vec<u8>,
        new: Vec<u8>,
    }

    fn leaves(bytes: &[u8]) -> Leaves {
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        hasher.leaves().unwrap()
    }

    /// Where [`Case::new`] changes what it becomes, and whether that is a hole.
    const EDITS: [(usize, usize, bool); 3] = [
        (4096, 8192, false),
        (2 * MIB, 64 << 10, true),
        (5 * MIB, 9000, false),
    ];

    impl Case {
        fn new() -> Case {
            let folder = tempfile::tempdir().unwrap();
            fs::create_dir(folder.path().join("share")).unwrap();
            let old: Vec<u8> = (0..5 * MIB + 100).map(|at| (at % 251) as u8).collect();
            let mut new = old.clone();
            for (at, len, hole) in EDITS {
                new.resize(new.len().max(at + len), 0);
                new[at..at + len].fill(if hole { 0 } else { 253 });
            }
            fs::write(folder.path().join("share/f"), &old).unwrap();
            Case {
                root: ShareRoot::open(&folder.path().join("share")).unwrap(),
                redos: Redos::new(folder.path().join("redo")),
                folder,
                old,
                new,
            }
        }

        fn file(&self) -> PathBuf {
            self.folder.path().join("share/f")
        }

        fn sig(&self) -> StatSig {
            observe::stat(&self.root.batch(), &path()).unwrap().unwrap()
        }

        fn entry(&self) -> Entry {
            Entry {
                kind: Kind::File {
                    size: self.new.len() as u64,
                    hash: leaves(&self.new).hash(),
                },
                mode: 0o640,
                uid: self.sig().uid,
                gid: self.sig().gid,
                user: None,
                group: None,
                mtime: crate::model::Time {
                    secs: 1_000_000_000,
                    nanos: 5,
                },
                xattrs: Vec::new(),
                flags: Flags::NONE,
                link: None,
            }
        }

        fn redo(&self) -> Redo {
            let (sig, entry) = (self.sig(), self.entry());
            let (size, hash) = entry.content().unwrap();
            let head = RedoHead {
                path: path(),
                ino: sig.ino,
                btime: sig.btime,
                old_size: self.old.len() as u64,
                old_hash: leaves(&self.old).hash(),
                size,
                hash,
            };
            let mut writer = self.redos.begin(head).unwrap();
            for (at, len, hole) in EDITS {
                let clip = |at: usize| at.min(self.old.len());
                let edit = Edit {
                    at: at as u64,
                    len: len as u64,
                    bytes: (!hole).then(|| &self.new[at..at + len]),
                    old: &self.old[clip(at)..clip(at + len)],
                };
                writer.edit(edit).unwrap();
            }
            writer.seal().unwrap()
        }

        fn stage(&self) -> Ready {
            stage_patch(
                &self.root.batch(),
                self.redo(),
                self.sig(),
                &self.entry(),
                leaves(&self.new),
            )
            .unwrap()
        }

        fn install(&self, ready: Ready) -> Result<Applied, ApplyError> {
            super::super::install(&self.root.batch(), ready, &Expect::Sig(self.sig()))
        }

        fn records(&self) -> usize {
            fs::read_dir(self.folder.path().join("redo")).unwrap().count()
        }

        /// As after a crash that came upon this file and a record.
        fn recovered(&self, disk: &[u8]) -> (Vec<u8>, usize) {
            fs::write(self.file(), disk).unwrap();
            self.redo().using();
            let completed = complete(&self.root.batch(), &self.redos, &|_, _| true).unwrap();
            self.redos.clear().unwrap();
            (fs::read(self.file()).unwrap(), completed.len())
        }
    }

    fn path() -> RelPath {
        RelPath::new(b"f").unwrap()
    }

    fn ino(path: &Path) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    /// Whether files can be had alone here.
    fn has_leases(case: &Case) -> bool {
        let file = File::options().write(true).open(case.file()).unwrap();
        Lease::take(file.as_fd()).is_some()
    }

    #[test]
    fn what_differs_is_written_over_the_file() {
        let case = Case::new();
        let before = ino(&case.file());
        let Applied::AsWritten(sig) = case.install(case.stage()).unwrap() else {
            panic!("it was changed")
        };
        assert!(fs::read(case.file()).unwrap() == case.new);
        assert!(sig.same_as(&case.sig()));
        assert_eq!((sig.mtime, sig.mode & 0o7777), (case.entry().mtime, 0o640));
        if has_leases(&case) {
            assert_eq!((ino(&case.file()), case.records()), (before, 1));
        }
        case.redos.forget_used();
        assert_eq!(case.records(), 0);
    }

    #[test]
    fn a_file_that_is_not_ours_alone_is_exchanged() {
        for reason in ["open", "opened after it was staged", "another name", "touched"] {
            let case = Case::new();
            let before = ino(&case.file());
            let reader = (reason == "open").then(|| File::open(case.file()).unwrap());
            let ready = case.stage();
            let reader = reader.or_else(|| {
                reason
                    .starts_with("opened")
                    .then(|| File::open(case.file()).unwrap())
            });
            if reason == "another name" {
                fs::hard_link(case.file(), case.folder.path().join("other")).unwrap();
            }
            if reason == "touched" {
                let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
                File::open(case.file()).unwrap().set_times(times).unwrap();
            }
            assert!(
                matches!(case.install(ready), Ok(Applied::AsWritten(_))),
                "{reason}"
            );
            assert!(fs::read(case.file()).unwrap() == case.new, "{reason}");
            assert_ne!(ino(&case.file()), before, "{reason}");
            assert_eq!(case.records(), 0, "{reason}");
            drop(reader);
        }
    }

    #[test]
    fn another_content_than_was_compared_is_left_alone() {
        let case = Case::new();
        let ready = case.stage();
        let mut other = case.old.clone();
        other[4 * MIB] ^= 1;
        fs::write(case.file(), &other).unwrap();
        let refused = case.install(ready).unwrap_err();
        assert!(matches!(refused, ApplyError::Content { .. }), "{refused}");
        assert!(fs::read(case.file()).unwrap() == other);
    }

    #[test]
    fn what_a_crash_has_left_is_completed_sector_by_sector() {
        let case = Case::new();
        assert!(case.recovered(&case.old) == (case.new.clone(), 1));
        // Cut off anywhere in the first edit, or behind the old end.
        for cut in [4608, 8192, 12_288] {
            let mut torn = case.old.clone();
            torn[4096..cut].copy_from_slice(&case.new[4096..cut]);
            assert!(case.recovered(&torn) == (case.new.clone(), 1), "cut at {cut}");
        }
        let longer = case.new[..5 * MIB + 4096].to_vec();
        assert!(case.recovered(&longer) == (case.new.clone(), 1));
        assert!(case.recovered(&case.new) == (case.new.clone(), 1));
    }

    #[test]
    fn what_users_change_after_a_crash_stays() {
        let case = Case::new();
        let mut torn = case.old.clone();
        torn[4096..5120].copy_from_slice(&case.new[4096..5120]);
        torn[7200..7210].fill(1);
        torn[3 * MIB] = 1;
        let mut expected = case.new.clone();
        // The sector that a user has written to is wholly the user's.
        expected[7168..7680].copy_from_slice(&torn[7168..7680]);
        expected[3 * MIB] = 1;
        assert!(case.recovered(&torn) == (expected, 1));
        // One that was not begun.
        let mut theirs = case.old.clone();
        theirs[3 * MIB] = 1;
        assert!(case.recovered(&theirs) == (theirs.clone(), 0));
        // A size that is no part of it.
        let shorter = case.old[..MIB].to_vec();
        assert!(case.recovered(&shorter) == (shorter.clone(), 0));
        // Another file.
        case.redo().using();
        fs::remove_file(case.file()).unwrap();
        assert!(
            complete(&case.root.batch(), &case.redos, &|_, _| true)
                .unwrap()
                .is_empty()
        );
        fs::write(case.folder.path().join("g"), &torn).unwrap();
        fs::rename(case.folder.path().join("g"), case.file()).unwrap();
        assert!(
            complete(&case.root.batch(), &case.redos, &|_, _| true)
                .unwrap()
                .is_empty()
        );
        assert!(fs::read(case.file()).unwrap() == torn);
    }
}
