//! The record of what changed: one entry per changed inode, which outlives a
//! full ring and a daemon that is away.
//!
//! A change makes an entry and sends one record; further changes of the inode
//! under the same name only widen the entry, until the user side takes it out.
//! Taking comes before looking, so a change during the look makes a new entry.

/// Key of an entry, and of a directory (its generation is 0 there).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DirtyKey {
    pub ino: u64,
    /// The kernel's own encoding: `major << 20 | minor`.
    pub dev: u32,
    pub generation: u32,
}

/// So many separate ranges of bytes are kept; after that they are widened.
pub const EXTENTS: usize = 4;

/// What is known of a changed inode. Several processors may write to one entry
/// at once: marks are bytes that are only set, and whoever finds another one at
/// the extents leaves them and says that they are incomplete.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Inode of the directory that the name is in; 0 if unknown.
    pub parent: u64,
    /// The name under which it changed last: its dentry's address, and the hash
    /// and length that the kernel keeps of it.
    pub dentry: u64,
    pub name: u64,
    /// Programs that are at the extents now.
    pub writers: u64,
    /// Who changed it last.
    pub cgroup: u64,
    pub pid: u32,
    pub uid: u32,
    pub comm: [u8; 16],
    /// 1 for each operation seen, by its number.
    pub ops: [u8; 16],
    /// 1: bytes outside of the extents changed, too.
    pub range_unknown: u8,
    /// 1: someone had the file mapped to write.
    pub mapped: u8,
    /// 1: it was asked whether someone had.
    pub asked: u8,
    pub reserved: [u8; 5],
    /// Bytes written, from and up to; unused ones are empty.
    pub extents: [[u64; 2]; EXTENTS],
}

const _: () = assert!(size_of::<DirtyKey>() == 16);
const _: () = assert!(core::mem::offset_of!(Dirty, comm) % 8 == 0);
const _: () = assert!(size_of::<Dirty>() == 88 + 16 * EXTENTS);

/// An operation under way that only its exit can report, by thread and hook.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// The function's arguments.
    pub args: [u64; 6],
    /// `CLOCK_MONOTONIC`, ns.
    pub time_ns: u64,
    /// The inode that will have changed, 0 if it does not exist yet, and the
    /// directories that its names are in: what to compare if the exit is missed.
    pub ino: u64,
    pub parent: u64,
    pub to_parent: u64,
    pub dev: u32,
    pub generation: u32,
}

const _: () = assert!(size_of::<Call>() == 88);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, integers and arrays of them; the asserted sizes leave
    // no padding, so every bit pattern is a value.
    unsafe impl aya::Pod for super::DirtyKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Dirty {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Call {}
}
