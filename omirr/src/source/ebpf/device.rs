//! Which filesystem a watched tree lies on.
//!
//! In: a path. Out: the kernel's own device number of its superblock, the
//! filesystem's type, and whether the path is the filesystem's root. The
//! kernel's number (`major << 20 | minor`) is not what `stat` shows (another
//! encoding), and on btrfs not even the same device: each subvolume has its
//! own `st_dev`, while the mount table shows the superblock's. Inodes of two
//! subvolumes may have the same number; an event of one may thus be taken for
//! one of the other, which costs a look at the disk.

use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    #[error("{path}: cannot be looked at: {source}")]
    Stat { path: PathBuf, source: std::io::Error },
    #[error("/proc/self/mountinfo cannot be read: {0}")]
    Mounts(std::io::Error),
    #[error("{path}: its mount {mount_id} is not in /proc/self/mountinfo")]
    NoMount { path: PathBuf, mount_id: u64 },
}

/// A filesystem, as the kernel sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `major << 20 | minor` of the superblock.
    pub kernel_dev: u32,
    /// `ext4`, `tmpfs`, …
    pub filesystem: String,
    /// The path is the root of the filesystem, and all of it is beneath.
    pub whole: bool,
}

/// Finds the device of a watched tree whose `st_dev` is `stat_dev`.
pub fn device_of(path: &Path, stat_dev: u64) -> Result<Device, DeviceError> {
    let stat = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).map_err(|e| {
        DeviceError::Stat {
            path: path.to_owned(),
            source: e.into(),
        }
    })?;
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(DeviceError::Mounts)?;
    let mount = find_mount(&table, stat.stx_mnt_id).ok_or_else(|| DeviceError::NoMount {
        path: path.to_owned(),
        mount_id: stat.stx_mnt_id,
    })?;
    let kernel_dev = mount.major << 20 | mount.minor;
    let real = path.canonicalize().map_err(|source| DeviceError::Stat {
        path: path.to_owned(),
        source,
    })?;
    Ok(Device {
        kernel_dev,
        filesystem: mount.filesystem,
        // A filesystem whose files show another device has trees of its own
        // beneath: then each inode's place is looked up.
        whole: mount.root == "/" && Path::new(&mount.point) == real && stat_dev == to_stat(kernel_dev),
    })
}

/// The kernel's device number as `st_dev` shows it.
pub fn to_stat(kernel_dev: u32) -> u64 {
    rustix::fs::makedev(kernel_dev >> 20, kernel_dev & 0xf_ffff)
}

struct Mount {
    major: u32,
    minor: u32,
    root: String,
    point: String,
    filesystem: String,
}

/// One line of the mount table: `id parent major:minor root point options
/// [fields] - type source options`.
fn find_mount(table: &str, mount_id: u64) -> Option<Mount> {
    table.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ');
        if left.next()?.parse() != Ok(mount_id) {
            return None;
        }
        let (major, minor) = left.nth(1)?.split_once(':')?;
        Some(Mount {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            root: left.next()?.to_owned(),
            point: left.next()?.to_owned(),
            filesystem: right.split(' ').next()?.to_owned(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_tells_device_root_and_type() {
        let table = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                     30 22 0:27 /@home /home rw master:1 - btrfs /dev/sdb rw,subvol=/@home\n";
        let mount = find_mount(table, 30).unwrap();
        assert_eq!((mount.major, mount.minor), (0, 27));
        assert_eq!((mount.root.as_str(), mount.point.as_str()), ("/@home", "/home"));
        assert_eq!(mount.filesystem, "btrfs");
        assert!(find_mount(table, 31).is_none());
    }

    #[test]
    fn a_temporary_folder_has_a_device() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let dev = dir.path().metadata().unwrap().dev();
        let device = device_of(dir.path(), dev).unwrap();
        assert!(!device.filesystem.is_empty());
        assert!(!device.whole);
        assert_eq!(to_stat(8 << 20 | 17), rustix::fs::makedev(8, 17));
    }
}
