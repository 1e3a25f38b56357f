//! What fanotify allows, and which filesystems can be watched by it.

use std::{
    collections::BTreeSet,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

use super::Check;
use crate::source::{
    Watch,
    choice::Detail,
    fanotify::{FanotifySource, Format, sys},
};

/// Filesystems of which more than this many are mounted are not all listed.
const FILESYSTEMS: usize = 16;

/// What to do about errors that are none of the known ones.
const NO_OTHER: &str = "nothing, as long as eBPF works; else the trees are compared every 10 seconds";

pub(super) fn checks(watch: &Watch) -> Vec<Check> {
    let mut checks = vec![open(), queue(), renames(watch)];
    for path in filesystems(&watch.path) {
        checks.push(handles(&path));
        checks.push(watching(&path));
    }
    checks
}

fn open() -> Check {
    match sys::init(Format::MovedFromTo.init_flags()) {
        Ok(_) => Check::yes("fanotify", "the kernel reports changes with their names"),
        Err(error) => {
            let detail = format!("{error}: omirr cannot be told of changes this way");
            Check::no("fanotify", detail, Some(remedy(&error).unwrap_or(NO_OTHER)))
        }
    }
}

/// Without a limit on what waits no event is lost while there is memory.
fn queue() -> Check {
    let name = "fanotify queue";
    let flags = Format::MovedFromTo.init_flags();
    match (sys::init(flags), sys::init(flags & !libc::FAN_UNLIMITED_QUEUE)) {
        (Ok(_), _) => Check::yes(name, "any number of events may wait (FAN_UNLIMITED_QUEUE)"),
        (Err(error), Ok(_)) => Check::no(
            name,
            format!(
                "{error}: an unlimited queue is refused (FAN_UNLIMITED_QUEUE), and omirr takes no other: a burst would lose events"
            ),
            Some(remedy(&error).unwrap_or(NO_OTHER)),
        ),
        (Err(error), Err(_)) => Check::no(
            name,
            format!("{error}: it could not be tried"),
            Some(remedy(&error).unwrap_or(NO_OTHER)),
        ),
    }
}

/// The better form, in which a rename is one event.
fn renames(watch: &Watch) -> Check {
    let name = "fanotify renames";
    let tried = sys::init(Format::Rename.init_flags()).and_then(|group| {
        let root = open_folder(&watch.path)?;
        sys::mark_filesystem(group.as_fd(), Format::Rename.mask(), root.as_fd())
    });
    match tried {
        Ok(()) => Check::yes(
            name,
            "a rename is one event, with the inode that was renamed (FAN_REPORT_DFID_NAME_TARGET)",
        ),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Check::no(
            name,
            "a rename is told in two events without its inode: renamed folders cost a look at the disk",
            Some("boot Linux 5.17 or newer, if many folders are renamed"),
        ),
        Err(error) => Check::no(
            name,
            format!("{error}: it could not be tried"),
            Some(remedy(&error).unwrap_or(NO_OTHER)),
        ),
    }
}

fn handles(path: &Path) -> Check {
    let name = format!("file handles on {}", path.display());
    let tried = open_folder(path).and_then(|folder| {
        let handle = sys::handle_of(folder.as_fd())?;
        sys::open_handle(folder.as_fd(), handle.as_ref(), libc::O_DIRECTORY)
    });
    match tried {
        Ok(_) => Check::yes(name, "inodes can be found by their handle"),
        Err(error) => {
            let detail = format!("{error}: a change whose path is not known costs a rescan");
            Check::no(name, detail, Some(remedy(&error).unwrap_or(NO_OTHER)))
        }
    }
}

fn watching(path: &Path) -> Check {
    let name = format!("fanotify on {}", path.display());
    let tried = watch_of(path)
        .map_err(|error| error.to_string())
        .and_then(|watch| {
            FanotifySource::open(&[watch], Some(std::process::id()), Detail::Lean, Box::new(|_| ()))
                .map_err(|error| error.to_string())
        });
    match tried {
        Ok(_) => Check::yes(name, "all of it can be watched at once (FAN_MARK_FILESYSTEM)"),
        Err(error) => {
            let mut check = Check::refused(name, &error);
            check.remedy.get_or_insert_with(|| NO_OTHER.to_owned());
            check
        }
    }
}

fn watch_of(path: &Path) -> io::Result<Watch> {
    let stat = path.metadata()?;
    Ok(Watch {
        path: path.into(),
        dev: stat.dev(),
        ino: stat.ino(),
    })
}

fn open_folder(path: &Path) -> io::Result<std::os::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn remedy(error: &io::Error) -> Option<&'static str> {
    Some(match error.raw_os_error()? {
        libc::EPERM | libc::EACCES => {
            "run omirr as root, or give its service CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH"
        }
        libc::ENOSYS => "boot a kernel with CONFIG_FANOTIFY",
        libc::EINVAL => "boot Linux 5.9 or newer",
        libc::EMFILE => "raise fs.fanotify.max_user_groups, or stop other programs that watch",
        _ => return None,
    })
}

/// The folder that was named and the mounted filesystems that hold files, one
/// mount point each.
fn filesystems(named: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mut seen = BTreeSet::new();
    let candidates = std::iter::once(named.to_owned()).chain(mount_points(&mounts));
    candidates
        .filter(|path| {
            path.metadata()
                .is_ok_and(|stat| stat.is_dir() && seen.insert(stat.dev()))
        })
        .take(FILESYSTEMS)
        .collect()
}

/// Mount points of filesystems that a share may lie on: those that can be
/// written to.
fn mount_points(mounts: &[u8]) -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    const KINDS: [&[u8]; 9] = [
        b"ext4", b"ext3", b"ext2", b"xfs", b"btrfs", b"tmpfs", b"f2fs", b"zfs", b"overlay",
    ];
    let parse = |line: &[u8]| {
        let mut fields = line.split(|&byte| byte == b' ');
        let point = fields.nth(4)?;
        let is_writable = fields
            .next()?
            .split(|&byte| byte == b',')
            .any(|option| option == b"rw");
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        let point = unescape(point);
        let is_for_files = KINDS.contains(&kind) && !point.starts_with(b"/sys/");
        (is_writable && is_for_files).then(|| PathBuf::from(std::ffi::OsString::from_vec(point)))
    };
    mounts.split(|&byte| byte == b'\n').filter_map(parse).collect()
}

/// Spaces, tabs, newlines and backslashes are written as three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match code {
            Some(byte) if first == b'\\' => {
                out.push(byte);
                rest = &after[3..];
            }
            _ => {
                out.push(first);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_mount_points_of_filesystems_that_hold_files() {
        let mounts = b"22 1 0:21 / /proc rw - proc proc rw\n\
            25 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
            31 25 0:40 / /mnt/a\\040b\\134 rw master:2 propagate_from:1 - tmpfs none rw\n\
            40 25 0:41 / /mnt/cd ro,relatime - ext4 /dev/sr0 ro\n\
            broken line\n";
        assert_eq!(
            mount_points(mounts),
            [PathBuf::from("/"), PathBuf::from("/mnt/a b\\")]
        );
    }

    #[test]
    fn the_named_folder_comes_first_and_no_filesystem_twice() {
        let found = filesystems(Path::new("/tmp"));
        assert_eq!(found.first().map(PathBuf::as_path), Some(Path::new("/tmp")));
        let devices: BTreeSet<_> = found
            .iter()
            .map(|path| path.metadata().expect("it is there").dev())
            .collect();
        assert_eq!(devices.len(), found.len());
    }
}
