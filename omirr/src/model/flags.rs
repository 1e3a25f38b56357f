//! Inode flags, as `chattr` sets them.
//!
//! Kept are those that a user may set and that mean the same on every
//! filesystem; how a filesystem stores a file (extents, inline data,
//! encryption, verity, case folding) is its own business and no part of an
//! entry. The numbers are those of `FS_IOC_GETFLAGS`.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitXor, Not};

use serde::{Deserialize, Serialize};

/// A set of inode flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Flags(u32);

impl Flags {
    pub const NONE: Flags = Flags(0);
    pub const COMPRESS: Flags = Flags(0x4);
    pub const SYNC: Flags = Flags(0x8);
    pub const IMMUTABLE: Flags = Flags(0x10);
    pub const APPEND: Flags = Flags(0x20);
    pub const NODUMP: Flags = Flags(0x40);
    pub const NOATIME: Flags = Flags(0x80);
    pub const DIRSYNC: Flags = Flags(0x1_0000);
    /// Filesystems take it for empty files only.
    pub const NOCOW: Flags = Flags(0x80_0000);

    /// All that are kept, in the order of `lsattr`'s letters.
    const KEPT: [(Flags, char); 8] = [
        (Flags::SYNC, 'S'),
        (Flags::DIRSYNC, 'D'),
        (Flags::IMMUTABLE, 'i'),
        (Flags::APPEND, 'a'),
        (Flags::NODUMP, 'd'),
        (Flags::NOATIME, 'A'),
        (Flags::COMPRESS, 'c'),
        (Flags::NOCOW, 'C'),
    ];
    /// Those under which nobody changes the inode, or names in the directory,
    /// before they are cleared.
    pub const LOCKS: Flags = Flags(Flags::IMMUTABLE.0 | Flags::APPEND.0);

    /// Of all the bits that a filesystem tells, those that are kept.
    pub fn from_bits(bits: u32) -> Flags {
        let kept = Flags::KEPT.iter().fold(0, |all, (flag, _)| all | flag.0);
        Flags(bits & kept)
    }

    /// Whether there is none but kept ones in it: what a peer sends need not be.
    pub fn is_kept(self) -> bool {
        Flags::from_bits(self.0) == self
    }

    pub fn bits(self) -> u32 {
        self.0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// One by one.
    pub fn each(self) -> impl Iterator<Item = Flags> {
        let all = Flags::KEPT.into_iter().map(|(flag, _)| flag);
        all.filter(move |&flag| !(flag & self).is_empty())
    }
}

impl BitAnd for Flags {
    type Output = Flags;
    fn bitand(self, other: Flags) -> Flags {
        Flags(self.0 & other.0)
    }
}

impl BitOr for Flags {
    type Output = Flags;
    fn bitor(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

impl BitXor for Flags {
    type Output = Flags;
    fn bitxor(self, other: Flags) -> Flags {
        Flags(self.0 ^ other.0)
    }
}

impl Not for Flags {
    type Output = Flags;
    fn not(self) -> Flags {
        Flags(!self.0)
    }
}

impl fmt::Display for Flags {
    /// In `lsattr`'s letters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters = Flags::KEPT.iter().filter(|(flag, _)| !(*flag & *self).is_empty());
        letters
            .map(|(_, letter)| *letter)
            .try_for_each(|letter| write!(f, "{letter}"))
    }
}
