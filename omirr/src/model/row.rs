//! Rows: an entry's state at a version. Records: a row as this node's index
//! keeps it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Entry, Here, Origin, RelPath, Time, Version};

/// A path's state, the same on every node once it has arrived there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// What is there; for a tombstone, what was there last.
    pub entry: Entry,
    /// Whether this row is a tombstone.
    pub deleted: bool,
    pub version: Version,
    /// Who made it so, where the event source told; no decision looks at it.
    /// Shared among the many rows of one process.
    pub origin: Option<Arc<Origin>>,
}

impl Row {
    /// The entry, unless the row is a tombstone.
    pub fn live(&self) -> Option<&Entry> {
        (!self.deleted).then_some(&self.entry)
    }

    pub fn is_live_dir(&self) -> bool {
        !self.deleted && self.entry.is_dir()
    }

    /// Whether both are regular files with one and the same content.
    pub fn has_content_of(&self, other: &Row) -> bool {
        let content = |row: &Row| row.live().and_then(Entry::content);
        content(self).is_some() && content(self) == content(other)
    }
}

/// What `stat` said when a path was last read or written: as long as it says
/// the same, the content need not be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatSig {
    pub ino: u64,
    /// Birth time: tells a reused inode number from the old inode. Zero where
    /// the filesystem keeps none.
    pub btime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub size: u64,
    /// With the file type, as `st_mode`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    /// The content was read within a clock tick of its last change, and a later
    /// change may have left the same times; or only where an event told of one. So
    /// an event or a comparison means reading again, and at last quiet does.
    pub racy: bool,
}

impl StatSig {
    /// `S_IFMT` and two of its values.
    const TYPE: u32 = 0o170_000;
    const DIRECTORY: u32 = 0o040_000;
    const REGULAR: u32 = 0o100_000;

    pub fn is_dir(&self) -> bool {
        self.mode & Self::TYPE == Self::DIRECTORY
    }

    /// Whether it is a regular file's.
    pub fn is_file(&self) -> bool {
        self.mode & Self::TYPE == Self::REGULAR
    }

    /// Whether nothing has changed between the two, `racy` aside.
    pub fn same_as(&self, other: &StatSig) -> bool {
        StatSig { racy: false, ..*self }
            == StatSig {
                racy: false,
                ..*other
            }
    }

    /// Whether both are of one inode: ext4 gives the number of one that was
    /// removed to the next that is made.
    pub fn same_inode(&self, other: &StatSig) -> bool {
        let of = |sig: &StatSig| (sig.ino, sig.btime, sig.mode & Self::TYPE);
        of(self) == of(other)
    }

    /// Whether both name the same inode with the same content as far as `stat`
    /// can tell: what a rename or a link leaves alone.
    pub fn same_content(&self, other: &StatSig) -> bool {
        self.ino == other.ino
            && self.btime == other.btime
            && self.btime.secs != 0
            && self.size == other.size
            && self.mtime == other.mtime
    }
}

/// A row as the index of this node keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub row: Row,
    /// This node's sequence number of the row's last change here.
    pub seq: u64,
    /// The inode behind it when last looked at; none for tombstones and for
    /// paths that must be read again.
    pub sig: Option<StatSig>,
    /// The peer it came from, by its place in the index' table of peers; none
    /// if it was made here. It is not sent back there.
    pub via: Option<u32>,
    /// Where the content was before, if a rename was recognised.
    pub moved_from: Option<RelPath>,
    /// The attributes on this node's disk, where they are not the row's.
    pub here: Option<Box<Here>>,
}

impl Record {
    /// Whether `stat` shows the path as it was when it was last looked at, and
    /// can be believed.
    pub fn is_as(&self, now: &StatSig) -> bool {
        !self.row.deleted && self.sig.is_some_and(|known| known.same_as(now) && !known.racy)
    }
}
