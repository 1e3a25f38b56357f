//! Does what is attached also speak? One change of each kind is made, and must
//! come back as an event.
//!
//! In: a share's root, before anything else happens there. Out: the operations
//! that were made and not seen. A function may be hooked and yet never called,
//! because the compiler folded it into its callers; only trying tells. What is
//! made bears a temporary name, which is never mirrored, and is removed again;
//! the root keeps its times.

use std::{
    fs::File,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, FallocateFlags, FileType, Mode, RenameFlags, Timespec, Timestamps, UTIME_OMIT,
        XattrFlags,
    },
    io::Errno,
};

use crate::model::TEMP_PREFIX;
use crate::source::{Op, OpSet};

/// Makes one change of each kind in a folder of its own beneath `root`; returns
/// what was made. Where the filesystem does not offer something, it is left out.
pub fn make_changes(root: &Path) -> std::io::Result<OpSet> {
    let before = root.metadata()?;
    let scratch = Scratch(root.join(format!("{TEMP_PREFIX}test-{}", std::process::id())));
    let made = scratch.fill();
    drop(scratch);
    // The folder came and went: nobody need know.
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: before.mtime(),
            tv_nsec: before.mtime_nsec(),
        },
    };
    rustix::fs::utimensat(CWD, root, &times, AtFlags::empty())?;
    let mut made = made?;
    made.insert(Op::Unlink);
    made.insert(Op::Rmdir);
    Ok(made)
}

/// What was made and not seen.
pub fn silent(made: OpSet, seen: OpSet) -> Vec<&'static str> {
    Op::ALL
        .into_iter()
        .filter(|&op| made.contains(op) && !seen.contains(op))
        .map(Op::name)
        .collect()
}

/// The folder; removed with all that is in it.
struct Scratch(PathBuf);

impl Scratch {
    fn fill(&self) -> std::io::Result<OpSet> {
        let mut made = OpSet::default();
        let at = |name: &str| self.0.join(name);
        std::fs::create_dir(&self.0)?;
        made.insert(Op::Mkdir);
        let mut file = File::create_new(at("file"))?;
        made.insert(Op::Create);
        file.write_all(b"a change")?;
        made.insert(Op::Write);
        file.set_len(3)?;
        made.insert(Op::Truncate);
        let mut offered = |op, result: rustix::io::Result<()>| match result {
            Ok(()) => {
                made.insert(op);
                Ok(())
            }
            Err(Errno::OPNOTSUPP | Errno::PERM | Errno::INVAL) => Ok(()),
            Err(error) => Err(error),
        };
        offered(
            Op::Fallocate,
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 4096),
        )?;
        offered(
            Op::Xattr,
            rustix::fs::fsetxattr(&file, "user.omirr-test", b"1", XattrFlags::empty()),
        )?;
        offered(Op::Attr, rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR))?;
        drop(file);
        offered(
            Op::Mknod,
            rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0),
        )?;
        offered(Op::Symlink, rustix::fs::symlink("file", at("symlink")))?;
        offered(Op::Link, rustix::fs::link(at("file"), at("link")))?;
        offered(Op::Rename, rustix::fs::rename(at("file"), at("renamed")))?;
        offered(
            Op::Exchange,
            rustix::fs::renameat_with(CWD, at("renamed"), CWD, at("fifo"), RenameFlags::EXCHANGE),
        )?;
        made.insert(Op::Close);
        Ok(made)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("{}: cannot be removed: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_each_is_made_and_nothing_stays() {
        let folder = tempfile::tempdir().unwrap();
        let before = folder.path().metadata().unwrap();
        let made = make_changes(folder.path()).unwrap();
        for op in [Op::Create, Op::Write, Op::Rename, Op::Rmdir, Op::Close] {
            assert!(made.contains(op), "{op:?}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(
            folder.path().metadata().unwrap().mtime_nsec(),
            before.mtime_nsec()
        );
    }

    #[test]
    fn what_was_made_and_not_seen_is_named() {
        let (mut made, mut seen) = (OpSet::default(), OpSet::default());
        made.insert(Op::Write);
        made.insert(Op::Rmdir);
        seen.insert(Op::Write);
        assert_eq!(silent(made, seen), ["rmdir"]);
    }
}
