//! What is at a path: kind, attributes, content by hash.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Flags;

/// A BLAKE3 content hash, 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Hash(pub [u8; 32]);

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:02x}{:02x}{:02x}{:02x}",
            self.0[0], self.0[1], self.0[2], self.0[3]
        )
    }
}

/// A point in time as `stat` gives it: seconds since 1970 and nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Time {
    pub secs: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

impl Time {
    /// Milliseconds since 1970; 0 for times before.
    pub fn millis(self) -> u64 {
        u64::try_from(self.secs).unwrap_or(0).saturating_mul(1000) + u64::from(self.nanos / 1_000_000)
    }
}

/// An extended attribute; POSIX ACLs are among them, as `system.posix_acl_*`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Xattr {
    #[serde(with = "serde_bytes_box")]
    pub name: Box<[u8]>,
    #[serde(with = "serde_bytes_box")]
    pub value: Box<[u8]>,
}

/// Names an inode that has several names in the share, across all nodes. It is
/// drawn at random by the node that first sees the inode's second name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LinkGroup(pub u64);

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// `size` in bytes; `hash` over the whole content.
    File {
        size: u64,
        hash: Hash,
    },
    Directory,
    Symlink {
        #[serde(with = "serde_bytes_box")]
        target: Box<[u8]>,
    },
    Fifo,
    Socket,
    /// The device number as `st_rdev` has it.
    CharDevice {
        rdev: u64,
    },
    BlockDevice {
        rdev: u64,
    },
}

/// Everything about a path that is the same on every node.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Entry {
    pub kind: Kind,
    /// Permission bits with set-id and sticky, `mode & 0o7777`. For symlinks
    /// always 0o777.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// The owner's name where the owner was last changed, if it has one there
    /// and the share goes by names; never that of 0.
    pub user: Option<Arc<str>>,
    /// The same of the group.
    pub group: Option<Arc<str>>,
    pub mtime: Time,
    /// Ordered by name.
    pub xattrs: Vec<Xattr>,
    /// None but for files and directories.
    pub flags: Flags,
    /// Set while the inode has, or had, more than one name.
    pub link: Option<LinkGroup>,
}

impl Entry {
    pub fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Directory)
    }

    /// The content's size and hash, for a regular file.
    pub fn content(&self) -> Option<(u64, Hash)> {
        match self.kind {
            Kind::File { size, hash } => Some((size, hash)),
            _ => None,
        }
    }

    /// The kind in a word, for messages.
    pub fn kind_name(&self) -> &'static str {
        match self.kind {
            Kind::File { .. } => "file",
            Kind::Directory => "directory",
            Kind::Symlink { .. } => "symlink",
            Kind::Fifo => "fifo",
            Kind::Socket => "socket",
            Kind::CharDevice { .. } => "character device",
            Kind::BlockDevice { .. } => "block device",
        }
    }
}

/// `Box<[u8]>` as one run of bytes rather than a sequence of numbers.
mod serde_bytes_box {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<[u8]>, D::Error> {
        bytes::Bytes::deserialize(deserializer).map(|bytes| bytes.to_vec().into_boxed_slice())
    }
}
