//! Why something beneath a share's root could not be read or written.
//!
//! Every error concerns one path; none ends the share. What to do next is the
//! caller's decision: [`ApplyError::is_changed`] says "look again and decide
//! anew", [`ApplyError::is_transient`] says "the same may work later by itself".

use std::fmt;

use rustix::io::Errno;

use crate::model::{Hash, RelPath};

/// What lies on the way to a path and may not be passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    Symlink,
    /// A file, fifo, socket or device where a directory should be.
    NotDirectory,
    /// A mount point: another filesystem, or this one a second time.
    Mount,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Obstacle::Symlink => "a symlink",
            Obstacle::NotDirectory => "something that is no directory",
            Obstacle::Mount => "a mount point",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// Someone else was faster: what is there is not what was expected, and
    /// has been left alone.
    #[error("'{path}' was changed on disk in the meantime")]
    Changed { path: RelPath },
    /// The way to the path does not stay beneath the root. Nothing was touched.
    #[error("refused: '{path}' leads through {obstacle}, '{component}'")]
    Beneath {
        path: RelPath,
        component: RelPath,
        obstacle: Obstacle,
    },
    /// The directory that should hold the path is not there.
    #[error("the directory that should hold '{path}' does not exist")]
    ParentMissing { path: RelPath },
    /// A directory should go or be replaced, but something lives in it.
    #[error("the directory '{path}' is not empty")]
    NotEmpty { path: RelPath },
    /// The path has a name that the daemon uses for unfinished work.
    #[error("refused: '{path}' has a name that omirr keeps for its own temporary files")]
    Reserved { path: RelPath },
    /// What was staged is not what the row announced.
    #[error(
        "the content for '{path}' is {actual_size} bytes with hash {actual:?}, not {expected_size} bytes with hash {expected:?}"
    )]
    Content {
        path: RelPath,
        expected: Hash,
        expected_size: u64,
        actual: Hash,
        actual_size: u64,
    },
    /// The row's kind does not fit the step.
    #[error("'{path}' is a {kind}, which this step cannot make")]
    Kind { path: RelPath, kind: &'static str },
    /// A content was being written over an older one, and is now neither. What is
    /// needed to complete it is noted; a start does so.
    #[error("'{path}' was not written to its end: {reason}")]
    Torn { path: RelPath, reason: String },
    /// The kernel refused.
    #[error("cannot {action} '{path}': {reason}")]
    System {
        action: &'static str,
        path: RelPath,
        reason: String,
        errno: Errno,
    },
}

impl ApplyError {
    /// A refusal by the kernel, in plain words.
    pub(crate) fn system(action: &'static str, path: &RelPath, errno: Errno) -> ApplyError {
        ApplyError::System {
            action,
            path: path.clone(),
            reason: plain(errno),
            errno,
        }
    }

    /// The same, where the step knows better than the error number what is
    /// missing.
    pub(crate) fn because(action: &'static str, path: &RelPath, errno: Errno, reason: String) -> ApplyError {
        ApplyError::System {
            action,
            path: path.clone(),
            reason,
            errno,
        }
    }

    /// The same refusal, of what is done for `path`.
    pub(crate) fn concerning(&self, path: &RelPath) -> ApplyError {
        match self {
            ApplyError::System { reason, errno, .. } => {
                ApplyError::because("bring to the disk", path, *errno, reason.clone())
            }
            _ => self.clone(),
        }
    }

    pub(crate) fn changed(path: &RelPath) -> ApplyError {
        ApplyError::Changed { path: path.clone() }
    }

    /// The path that it is about; of an obstacle on the way, the obstacle's.
    pub fn path(&self) -> &RelPath {
        match self {
            ApplyError::Beneath { component, .. } => component,
            ApplyError::Changed { path }
            | ApplyError::ParentMissing { path }
            | ApplyError::NotEmpty { path }
            | ApplyError::Reserved { path }
            | ApplyError::Content { path, .. }
            | ApplyError::Kind { path, .. }
            | ApplyError::Torn { path, .. }
            | ApplyError::System { path, .. } => path,
        }
    }

    /// Whether the path must be observed again before anything is decided.
    pub fn is_changed(&self) -> bool {
        matches!(
            self,
            ApplyError::Changed { .. } | ApplyError::ParentMissing { .. } | ApplyError::NotEmpty { .. }
        )
    }

    /// Whether the same step may work later with nobody doing anything about
    /// this path: space is freed, a file is closed, memory comes back. What is
    /// not transient needs a hand (a privilege, another filesystem, a shorter
    /// name); it is worth trying again too, but seldom.
    pub fn is_transient(&self) -> bool {
        match self {
            ApplyError::Torn { .. }
            | ApplyError::Changed { .. }
            | ApplyError::ParentMissing { .. }
            | ApplyError::NotEmpty { .. } => true,
            ApplyError::System { errno, .. } => matches!(
                *errno,
                Errno::NOSPC
                    | Errno::DQUOT
                    | Errno::ROFS
                    | Errno::IO
                    | Errno::AGAIN
                    | Errno::BUSY
                    | Errno::NFILE
                    | Errno::MFILE
                    | Errno::NOMEM
                    | Errno::TXTBSY
                    | Errno::INTR
                    | Errno::STALE
                    | Errno::MLINK
            ),
            _ => false,
        }
    }
}

/// An error number in words that say what to do about it, where there is
/// something to do.
fn plain(errno: Errno) -> String {
    let known = match errno {
        Errno::NOSPC => "the disk is full, or has no inodes left (see df and df -i)",
        Errno::DQUOT => "the disk quota is used up",
        Errno::ROFS => "the filesystem is mounted read-only",
        Errno::NAMETOOLONG => "the name is too long for this filesystem",
        Errno::PERM => {
            "not permitted; is it immutable or append-only (see lsattr) or in use as swap (see swapon), or does the \
             daemon lack a capability?"
        }
        Errno::ACCESS => "permission denied; the daemon needs CAP_DAC_OVERRIDE or to run as root",
        Errno::OPNOTSUPP => "this filesystem does not support it",
        Errno::IO => "the disk reports an input/output error",
        Errno::BUSY => "it is in use, or a mount point",
        Errno::AGAIN => "another program holds a lease on it and is asked to give it up",
        Errno::MFILE => "the daemon has too many files open; raise LimitNOFILE",
        Errno::NFILE => "the system has too many files open",
        Errno::MLINK => "the file has as many hard links as this filesystem allows",
        Errno::FBIG => "the file is too large for this filesystem",
        Errno::INVAL => "this filesystem refuses it as invalid",
        Errno::ILSEQ => "this filesystem refuses the bytes of the name",
        _ => return std::io::Error::from(errno).to_string(),
    };
    known.to_owned()
}
