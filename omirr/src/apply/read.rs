//! Opening a file for reading, as strictly as for writing.

use std::fs::File;

use rustix::fs::{FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;

use super::{ApplyError, Dirs};
use crate::model::RelPath;

/// The regular file at `path`; `Changed` if something else, or nothing, is
/// there.
pub fn open_file(dirs: &Dirs<'_>, path: &RelPath) -> Result<File, ApplyError> {
    let (dir, name) = dirs.parent(path)?;
    // `NONBLOCK`: a fifo may have taken the file's place.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = match openat(&dir, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::ISDIR) => {
            return Err(ApplyError::changed(path));
        }
        Err(errno) => return Err(ApplyError::system("read", path, errno)),
    };
    let stat = fstat(&fd).map_err(|errno| ApplyError::system("read", path, errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(ApplyError::changed(path));
    }
    Ok(File::from(fd))
}
