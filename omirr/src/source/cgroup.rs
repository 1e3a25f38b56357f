//! From a cgroup's number to its path, and from a process to that number.
//!
//! In: the number that an event has, which is the inode number of the cgroup's
//! directory; or a process, for sources that are not told the number. Out: the
//! path beneath the root of the cgroup filesystem, `/system.slice/nginx.service`
//! say; or the number. Each number is asked for once. One that
//! cannot be found (the cgroup is gone, version 2 is not mounted, no right to
//! open by handle) has the empty path; it is never guessed.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use lru::LruCache;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, fstat, fstatfs, openat, statat};

use super::fanotify::handle::Handle;
use super::fanotify::sys;

/// Cgroups that are remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// Where version 2 is mounted: alone, or beside version 1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
/// More than most files of a process in `/proc` have, bytes.
const PROC_BYTES: usize = 4096;
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
/// The type of the kernel's handles for such directories, whose bytes are the
/// number.
const FILEID_KERNFS: i32 = 0xfe;

pub struct Cgroups {
    mount: Option<(PathBuf, OwnedFd)>,
    known: LruCache<u64, Box<str>>,
}

impl Cgroups {
    pub fn open() -> Cgroups {
        Cgroups {
            mount: MOUNTS.iter().find_map(|path| mount(Path::new(path))),
            known: LruCache::new(REMEMBERED),
        }
    }

    /// The path of the cgroup with this number; empty if it is not known.
    pub fn path_of(&mut self, id: u64) -> &str {
        let mount = &self.mount;
        self.known.get_or_insert(id, || {
            let found = mount.as_ref().filter(|_| id != 0);
            found
                .and_then(|(path, fd)| look_up(path, fd, id))
                .unwrap_or_default()
        })
    }

    /// The number of the cgroup in which a process is now; 0 if it is not known.
    pub fn of_process(&self, pid: u32) -> u64 {
        let Some((_, fd)) = &self.mount else { return 0 };
        let Ok(text) = read_whole(&format!("/proc/{pid}/cgroup")) else {
            return 0;
        };
        // The other lines are of version 1.
        let path = text
            .split(|&byte| byte == b'\n')
            .find_map(|line| line.strip_prefix(b"0::/"));
        let path = match path {
            None => return 0,
            Some(b"") => &b"."[..],
            Some(path) => path,
        };
        statat(fd, path, AtFlags::empty()).map_or(0, |found| found.st_ino)
    }
}

/// A file of `/proc`, in one or two reads: of its size, which is not told there, the
/// standard library's reading feels its way up from 32 bytes.
pub(super) fn read_whole(path: &str) -> rustix::io::Result<Vec<u8>> {
    let fd = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = Vec::with_capacity(PROC_BYTES);
    loop {
        if bytes.spare_capacity_mut().is_empty() {
            bytes.reserve(PROC_BYTES);
        }
        if rustix::io::read(&fd, rustix::buffer::spare_capacity(&mut bytes))? == 0 {
            return Ok(bytes);
        }
    }
}

fn mount(path: &Path) -> Option<(PathBuf, OwnedFd)> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = openat(CWD, path, flags, Mode::empty()).ok()?;
    let found = fstatfs(&fd).ok()?;
    (found.f_type as u64 == CGROUP2_SUPER_MAGIC).then(|| (path.to_owned(), fd))
}

fn look_up(mount: &Path, fd: &OwnedFd, id: u64) -> Option<Box<str>> {
    let handle = Handle::new(FILEID_KERNFS, &id.to_ne_bytes());
    let found = sys::open_handle(fd.as_fd(), handle.as_ref(), 0).ok()?;
    if fstat(&found).ok()?.st_ino != id {
        return None;
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()?;
    let beneath = path.strip_prefix(mount).ok()?;
    Some(format!("/{}", beneath.display()).into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn finds_the_path_of_a_cgroup_and_of_no_other_number() {
        let mut cgroups = Cgroups::open();
        let Some((mount, _)) = &cgroups.mount else {
            println!("skipped: version 2 of cgroups is not mounted here");
            return;
        };
        let made = mount.join(format!("omirr-test-{}", std::process::id()));
        if let Err(why) = std::fs::create_dir(&made) {
            println!("skipped: no cgroup can be made here: {why}");
            return;
        }
        let id = std::fs::metadata(&made).map(|found| found.ino());
        let path = id.as_ref().map(|id| cgroups.path_of(*id).to_owned());
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep starts");
        let before = cgroups.of_process(child.id());
        let moved = std::fs::write(made.join("cgroup.procs"), child.id().to_string());
        let after = cgroups.of_process(child.id());
        child.kill().expect("it can be ended");
        child.wait().expect("it ends");
        std::fs::remove_dir(&made).expect("an empty cgroup can be removed");
        let name = made.file_name().expect("it has a name").display().to_string();
        assert_eq!(path.expect("it was there"), format!("/{name}"));
        let id = id.expect("it was there");
        assert_eq!(cgroups.path_of(id), format!("/{name}"), "it is remembered");
        moved.expect("a process can be moved");
        assert!(before != 0 && before != id, "{before}");
        assert_eq!((after, cgroups.of_process(child.id())), (id, 0));
        assert_eq!(Cgroups::open().path_of(id), "", "it is gone");
        assert_eq!(cgroups.path_of(0), "");
    }
}
