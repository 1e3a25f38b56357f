//! New content on its way to a name.
//!
//! In: bytes and holes, in order or by offset. Out: a [`Ready`] file: complete,
//! of the size and hash that its row announced, with all its attributes, and
//! without a name. [`install`](super::install) gives it one. Dropped before
//! that, it leaves nothing behind.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use rustc_hash::FxHashMap;
use rustix::fs::{
    AtFlags, FallocateFlags, Mode, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, ftruncate,
    ioctl_ficlone, openat, seek, unlinkat,
};
use rustix::io::{self, Errno};
use rustix::process::{Resource, getrlimit};

use super::beneath::{DirFd, Dirs};
use super::error::ApplyError;
use super::owners::Owners;
use super::patch::Patch;
use super::{attrs, flags, is_as_expected, temp_name, writeback};
use crate::content::{self, Hasher, Leaves};
use crate::crash::{self, Point};
use crate::model::{Entry, Flags, Here, RelPath, StatSig};
use crate::observe::{XattrOf, sig_of, statx_fd};
use crate::parallel;

const COPY_BUFFER: usize = 256 << 10;
/// From so many bytes on they are written and hashed at the same time.
const APART_BYTES: usize = 256 << 10;
/// So many bytes are sent on their way to the disk together while the rest comes: the
/// sync that must follow would have to write all of them.
const WRITEBACK_BYTES: u64 = 32 << 20;

/// What is known of the hash of what was written so far.
enum Running {
    /// Everything so far came in order.
    Hasher(Box<Hasher>),
    /// It must be read back.
    Unknown,
    /// Whoever wrote it knows the leaves of what has come of it.
    Known(Leaves),
}

/// A file that is being written and has no name yet.
pub struct Staged {
    inner: Inner,
    /// Where the next [`append`](Staged::append) goes.
    at: u64,
    /// What lies before is on the disk or on its way there.
    on_its_way: u64,
    running: Running,
}

/// A finished content that waits for its name.
pub struct Ready {
    pub(super) made: Made,
    leaves: Option<Leaves>,
}

/// How a content waits.
pub(super) enum Made {
    Whole(Whole),
    /// As what must be written over the file that has the name now.
    Patch(Box<Patch>),
}

/// A finished file without its name.
pub(super) struct Whole {
    inner: Inner,
    pub(super) sig: StatSig,
    /// What it has where that is not as its row says.
    pub(super) here: Option<Box<Here>>,
}

struct Inner {
    fd: OwnedFd,
    /// Its temporary name and where that is, where the filesystem has no files
    /// without one.
    temp: Option<(DirFd, String)>,
    path: RelPath,
    owners: Arc<Owners>,
}

/// Staged files that are open in this process. It only ever decides how many
/// more are begun ahead of need, so no order of memory accesses matters.
static OPEN: AtomicUsize = AtomicUsize::new(0);

/// How many staged files may be open at once: each holds a descriptor, of which
/// others need some, too.
pub fn staged_max() -> usize {
    static MAX: LazyLock<usize> = LazyLock::new(|| {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        usize::try_from(limit / 4).unwrap_or(usize::MAX).clamp(64, 8192)
    });
    *MAX
}

impl Drop for Inner {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
        if let Some((dir, temp)) = &self.temp {
            // Nothing to do about a failure: the start of the next run sweeps.
            _ = unlinkat(dir, temp.as_str(), AtFlags::empty());
        }
    }
}

/// Begins new content for `path`, whose directory must exist; `entry` is what
/// it is to become.
pub fn stage_file(dirs: &Dirs<'_>, path: &RelPath, entry: &Entry) -> Result<Staged, ApplyError> {
    let (dir, _) = dirs.parent(path)?;
    if let Some(fd) = nameless_near(dirs, &dir, path, entry)? {
        return Ok(Staged::new(dirs, fd, None, path, entry));
    }
    let name = temp_name();
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat(&dir, name.as_str(), flags, PRIVATE).map_err(|errno| cannot_stage(path, errno))?;
    Ok(Staged::new(dirs, fd, Some((dir, name)), path, entry))
}

/// Begins new content for paths whose directories need not exist yet.
pub struct Ahead<'d, 'root> {
    dirs: &'d Dirs<'root>,
    /// Directories that were asked for: each itself, or the nearest one above
    /// it that is there.
    nearest: FxHashMap<RelPath, DirFd>,
}

impl<'d, 'root> Ahead<'d, 'root> {
    pub fn new(dirs: &'d Dirs<'root>) -> Ahead<'d, 'root> {
        Ahead {
            dirs,
            nearest: FxHashMap::default(),
        }
    }

    /// The directory, on the share's filesystem, in which content for `path`
    /// can be staged now; the root's own at worst.
    pub fn place(&mut self, path: &RelPath) -> Result<DirFd, ApplyError> {
        let Some(parent) = path.parent() else {
            return self.dirs.dir(path);
        };
        if let Some(known) = self.nearest.get(&parent) {
            return Ok(DirFd::clone(known));
        }
        let dir = match self.dirs.dir(&parent) {
            Ok(dir) => dir,
            Err(error) if parent.is_root() => return Err(error),
            Err(_) => self.place(&parent)?,
        };
        self.nearest.insert(parent, DirFd::clone(&dir));
        Ok(dir)
    }

    /// Begins new content for `path` at `place`; none where the filesystem has
    /// no files without a name (a name would show, and change its directory's
    /// times), and where [`staged_max`] are open.
    pub fn stage(&self, place: &DirFd, path: &RelPath, entry: &Entry) -> Result<Option<Staged>, ApplyError> {
        if OPEN.load(Ordering::Relaxed) >= staged_max() {
            return Ok(None);
        }
        Ok(nameless(self.dirs, place, path, entry)?.map(|fd| Staged::new(self.dirs, fd, None, path, entry)))
    }
}

/// Who may read and write staged content that has a name before it has its attributes.
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

fn cannot_stage(path: &RelPath, errno: Errno) -> ApplyError {
    ApplyError::system("stage new content for", path, errno)
}

/// The same in the nearest directory above that takes new files: one that is
/// immutable takes none. What has no name can get one anywhere.
fn nameless_near(
    dirs: &Dirs<'_>,
    dir: &DirFd,
    path: &RelPath,
    entry: &Entry,
) -> Result<Option<OwnedFd>, ApplyError> {
    let refused = match nameless(dirs, dir, path, entry) {
        Err(
            error @ ApplyError::System {
                errno: Errno::PERM, ..
            },
        ) => error,
        other => return other,
    };
    for above in std::iter::successors(path.parent(), RelPath::parent).skip(1) {
        if let Ok(Some(fd)) = nameless(dirs, &dirs.dir(&above)?, path, entry) {
            return Ok(Some(fd));
        }
    }
    Err(refused)
}

/// A new file without a name, on the filesystem of `dir`; none if that has no
/// such files. It has the entry's mode as far as the daemon's umask leaves it:
/// nobody else finds what has no name, and most need no other mode then.
fn nameless(
    dirs: &Dirs<'_>,
    dir: &DirFd,
    path: &RelPath,
    entry: &Entry,
) -> Result<Option<OwnedFd>, ApplyError> {
    let root = dirs.root();
    // Attributes `user.*` can be set by who may write to the file, and its owner's
    // being the daemon helps only if the mode says so.
    let mode = match entry.xattrs.is_empty() {
        true => Mode::from_raw_mode(entry.mode & 0o777),
        false => PRIVATE,
    };
    if !root.has_tmpfile.load(Ordering::Relaxed) {
        return Ok(None);
    }
    match openat(dir, c".", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        Ok(fd) => Ok(Some(fd)),
        // A filesystem without: its directory is opened for writing.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            root.tmpfile_unsupported();
            Ok(None)
        }
        Err(errno) => Err(cannot_stage(path, errno)),
    }
}

/// Stages the content that `from` has, for `path`: shares its blocks where the
/// filesystem can, copies it otherwise. `Changed` names `from` if that is not
/// what was expected; whether the content is the right one shows in
/// [`Staged::finish`].
pub fn clone_local(
    dirs: &Dirs<'_>,
    from: &RelPath,
    from_sig: &StatSig,
    path: &RelPath,
    entry: &Entry,
) -> Result<Staged, ApplyError> {
    let (source, size) = open_source(dirs, from, from_sig)?;
    let mut staged = stage_file(dirs, path, entry)?;
    if !staged.share_blocks(&source, size) {
        copy(&source, from, size, &mut staged)?;
    }
    Ok(staged)
}

/// The same for `path` itself, if the filesystem can share blocks; nothing is read
/// then.
pub fn reflink(
    dirs: &Dirs<'_>,
    path: &RelPath,
    sig: &StatSig,
    entry: &Entry,
) -> Result<Option<Staged>, ApplyError> {
    let (source, size) = open_source(dirs, path, sig)?;
    let mut staged = stage_file(dirs, path, entry)?;
    if !staged.share_blocks(&source, size) {
        return Ok(None);
    }
    // What is shared is what was open, if that is still as expected.
    let now = statx_fd(source.as_fd()).map_err(|errno| ApplyError::system("read", path, errno))?;
    match is_as_expected(sig, &sig_of(&now)) {
        true => Ok(Some(staged)),
        false => Err(ApplyError::changed(path)),
    }
}

/// A file that is as expected, and how many bytes it has.
fn open_source(dirs: &Dirs<'_>, from: &RelPath, from_sig: &StatSig) -> Result<(OwnedFd, u64), ApplyError> {
    let source = OwnedFd::from(super::open_file(dirs, from)?);
    let found = statx_fd(source.as_fd()).map_err(|errno| ApplyError::system("read", from, errno))?;
    match is_as_expected(from_sig, &sig_of(&found)) {
        true => Ok((source, found.stx_size)),
        false => Err(ApplyError::changed(from)),
    }
}

/// Copies data and holes, by the kernel where it can, which may share blocks or
/// leave the work to a server. Filesystems that tell no holes show all as data.
fn copy(source: &OwnedFd, from: &RelPath, size: u64, staged: &mut Staged) -> Result<(), ApplyError> {
    let fail = |errno| ApplyError::system("read", from, errno);
    let mut buffer = vec![0; COPY_BUFFER.min(usize::try_from(size).unwrap_or(COPY_BUFFER).max(1))];
    let mut at = 0;
    while at < size {
        let data = match seek(source, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            Err(Errno::NXIO) => size,
            Err(_) => at,
        };
        staged.hole(data - at)?;
        at = data;
        let end = seek(source, SeekFrom::Hole(at)).unwrap_or(size).min(size);
        at = staged.copy_within_kernel(source, at, end)?;
        while at < end {
            let want = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let got = io::retry_on_intr(|| io::pread(source, &mut buffer[..want], at)).map_err(fail)?;
            if got == 0 {
                return Err(ApplyError::changed(from));
            }
            staged.append(&buffer[..got])?;
            at += got as u64;
        }
    }
    Ok(())
}

impl Staged {
    fn new(
        dirs: &Dirs<'_>,
        fd: OwnedFd,
        temp: Option<(DirFd, String)>,
        path: &RelPath,
        entry: &Entry,
    ) -> Staged {
        OPEN.fetch_add(1, Ordering::Relaxed);
        if !(entry.flags & Flags::NOCOW).is_empty() {
            // Only an empty file takes it; why one did not is said in the end.
            drop(flags::set(fd.as_fd(), Flags::NOCOW, Flags::NOCOW));
        }
        Staged {
            inner: Inner {
                fd,
                temp,
                path: path.clone(),
                owners: Arc::clone(dirs.root().owners()),
            },
            at: 0,
            on_its_way: 0,
            running: Running::Hasher(Box::default()),
        }
    }

    /// Writes the next bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), ApplyError> {
        let (inner, at) = (&self.inner, self.at);
        match &mut self.running {
            Running::Hasher(hasher) if bytes.len() >= APART_BYTES => {
                let (put, ()) = parallel::both(|| inner.put(at, bytes), || hasher.update(bytes));
                put?;
            }
            Running::Hasher(hasher) => {
                inner.put(at, bytes)?;
                hasher.update(bytes);
            }
            Running::Unknown | Running::Known(_) => inner.put(at, bytes)?,
        }
        self.at += bytes.len() as u64;
        if self.at - self.on_its_way >= WRITEBACK_BYTES {
            writeback::begin(inner.fd.as_fd(), self.on_its_way, self.at - self.on_its_way);
            self.on_its_way = self.at;
        }
        Ok(())
    }

    /// Begins with all blocks of `source`, which has `size` bytes, if the
    /// filesystem can.
    fn share_blocks(&mut self, source: &OwnedFd, size: u64) -> bool {
        let shared = ioctl_ficlone(&self.inner.fd, source).is_ok();
        if shared {
            self.at = size;
            self.running = Running::Unknown;
        }
        shared
    }

    /// Lets the kernel copy the next bytes from the same place in `source`; returns
    /// up to where it has done so.
    fn copy_within_kernel(&mut self, source: &OwnedFd, at: u64, end: u64) -> Result<u64, ApplyError> {
        let (mut from, mut to) = (at, at);
        while from < end {
            let len = usize::try_from(end - from).unwrap_or(usize::MAX);
            match copy_file_range(source, Some(&mut from), &self.inner.fd, Some(&mut to), len) {
                Ok(0) => break,
                Ok(_) => self.running = Running::Unknown,
                Err(Errno::INTR) => {}
                Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::IO)) => {
                    return Err(ApplyError::system("write", &self.inner.path, errno));
                }
                // Not between these two files; or whatever it is shows again.
                Err(_) => break,
            }
        }
        self.at = from;
        Ok(from)
    }

    /// Leaves the next bytes zero without giving them blocks.
    pub fn hole(&mut self, len: u64) -> Result<(), ApplyError> {
        let Some(end) = self.at.checked_add(len).filter(|&end| i64::try_from(end).is_ok()) else {
            return Err(ApplyError::system("write", &self.inner.path, Errno::FBIG));
        };
        if let Running::Hasher(hasher) = &mut self.running {
            hasher.zeros(len);
        }
        self.at = end;
        Ok(())
    }

    /// Writes bytes anywhere. The content's hash must then be read back when
    /// the file is finished.
    pub fn write_at(&mut self, at: u64, bytes: &[u8]) -> Result<(), ApplyError> {
        self.inner.put(at, bytes)?;
        self.running = Running::Unknown;
        self.at = self.at.max(at + bytes.len() as u64);
        Ok(())
    }

    /// The same of zeros, which lose their blocks where the filesystem can.
    pub fn zero_at(&mut self, at: u64, len: u64) -> Result<(), ApplyError> {
        self.running = Running::Unknown;
        let end = at + len;
        if at < self.at {
            let within = end.min(self.at) - at;
            zero(&self.inner.fd, at, within)
                .map_err(|errno| ApplyError::system("write", &self.inner.path, errno))?;
            crash::here(Point::ContentWritten);
        }
        self.at = self.at.max(end);
        Ok(())
    }

    /// Makes it end after `len` bytes. Whoever knows the leaves of what has come
    /// of it saves reading it back.
    pub fn resize(&mut self, len: u64, leaves: Option<Leaves>) {
        self.at = len;
        self.running = leaves.map_or(Running::Unknown, Running::Known);
    }

    /// Bytes so far, holes included.
    pub fn len(&self) -> u64 {
        self.at
    }

    pub fn is_empty(&self) -> bool {
        self.at == 0
    }

    /// Gives the file its size and its attributes, after making sure that its
    /// content is the entry's.
    pub fn finish(self, entry: &Entry) -> Result<Ready, ApplyError> {
        let Staged {
            inner, at, running, ..
        } = self;
        let path = &inner.path;
        let Some((expected_size, expected)) = entry.content() else {
            return Err(ApplyError::Kind {
                path: path.clone(),
                kind: entry.kind_name(),
            });
        };
        let fail = |errno| ApplyError::system("write", path, errno);
        let mut have = sig_of(&statx_fd(inner.fd.as_fd()).map_err(fail)?);
        if have.size != at {
            ftruncate(&inner.fd, at).map_err(fail)?;
            have.size = at;
            crash::here(Point::ContentTruncated);
        }
        let (actual_size, actual, leaves) = match running {
            Running::Hasher(hasher) => (at, hasher.finish(), hasher.leaves()),
            Running::Known(leaves) => (leaves.size(), leaves.hash(), Some(leaves)),
            Running::Unknown => content::hash_while(inner.fd.as_fd(), |_| Ok(true))
                .map(|read| (read.size, read.hash, read.leaves))
                .map_err(|error| fail(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?,
        };
        if (actual_size, actual) != (expected_size, expected) {
            let path = path.clone();
            return Err(ApplyError::Content {
                path,
                expected,
                expected_size,
                actual,
                actual_size,
            });
        }
        let of = XattrOf::Open(inner.fd.as_fd());
        let lacks = attrs::set_all_but_time(&inner.owners, of, path, &have, entry)?;
        attrs::set_mtime(of, path, entry.mtime)?;
        let sig = sig_of(&statx_fd(inner.fd.as_fd()).map_err(fail)?);
        let here = lacks.here(of, path, &sig, entry)?;
        crash::here(Point::ContentFinished);
        Ok(Ready {
            made: Made::Whole(Whole { inner, sig, here }),
            leaves,
        })
    }
}

impl Inner {
    fn put(&self, mut at: u64, mut bytes: &[u8]) -> Result<(), ApplyError> {
        while !bytes.is_empty() {
            match io::pwrite(&self.fd, bytes, at) {
                Ok(put) => {
                    bytes = &bytes[put..];
                    at += put as u64;
                    crash::here(Point::ContentWritten);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ApplyError::system("write", &self.path, errno)),
            }
        }
        Ok(())
    }
}

/// For copying into it; the error is the plain one of [`Staged::append`].
impl std::io::Write for Staged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.append(bytes).map_err(std::io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Ready {
    /// One that waits as a patch; `leaves` are those of what comes of it.
    pub(super) fn patch(patch: Patch, leaves: Leaves) -> Ready {
        Ready {
            made: Made::Patch(Box::new(patch)),
            leaves: Some(leaves),
        }
    }

    /// The path that it was staged for.
    pub fn path(&self) -> &RelPath {
        match &self.made {
            Made::Whole(whole) => whole.path(),
            Made::Patch(patch) => patch.path(),
        }
    }

    /// The hashes of its leaves, if it is large.
    pub fn take_leaves(&mut self) -> Option<Leaves> {
        self.leaves.take()
    }

    /// Whether it is to be written over the file at its path, if that can be.
    pub fn is_patch(&self) -> bool {
        matches!(self.made, Made::Patch(_))
    }

    /// How many names the file at its path has that are all to get its content, if
    /// it must be written over that.
    pub fn shared_by(&mut self, names: u32) {
        if let Made::Patch(patch) = &mut self.made {
            patch.names = names;
        }
    }

    /// Returns once content and size are on the disk; a patch is from the
    /// beginning.
    pub fn sync(&self) -> Result<(), ApplyError> {
        match &self.made {
            Made::Whole(whole) => whole.sync(),
            Made::Patch(_) => Ok(()),
        }
    }
}

/// Makes bytes zero, and frees their blocks where the filesystem can.
pub(super) fn zero(fd: impl AsFd, at: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match io::retry_on_intr(|| fallocate(&fd, flags, at, len)) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = vec![0; usize::try_from(len).unwrap_or(COPY_BUFFER).min(COPY_BUFFER)];
            let mut done = 0;
            while done < len {
                let left = usize::try_from(len - done)
                    .unwrap_or(COPY_BUFFER)
                    .min(zeros.len());
                done += io::retry_on_intr(|| io::pwrite(&fd, &zeros[..left], at + done))? as u64;
            }
            Ok(())
        }
        other => other,
    }
}

impl Whole {
    pub(super) fn path(&self) -> &RelPath {
        &self.inner.path
    }

    pub(super) fn sync(&self) -> Result<(), ApplyError> {
        fdatasync(&self.inner.fd).map_err(|errno| ApplyError::system("sync", self.path(), errno))?;
        crash::here(Point::ContentSynced);
        Ok(())
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.inner.fd
    }

    /// The temporary name and its directory, which are the caller's to use up or
    /// remove from here on.
    pub(super) fn take_temp(&mut self) -> Option<(DirFd, String)> {
        self.inner.temp.take()
    }
}
