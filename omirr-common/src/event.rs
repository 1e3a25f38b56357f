//! One event as it lies in the ring buffer.
//!
//! A record is the header, then the first name's bytes, then, only for the
//! operations that have two names, the second name at a fixed place. Records
//! are cut after the last byte that is used.

/// The longest name of a directory entry on Linux.
pub const NAME_MAX: usize = 255;
/// The space kept for one name: a power of two, so that a masked length is
/// provably within it.
pub const NAME_SPACE: usize = 256;

/// Operations, in the words of the user side's `Op`.
pub mod op {
    pub const WRITE: u8 = 1;
    pub const TRUNCATE: u8 = 2;
    pub const FALLOCATE: u8 = 3;
    pub const CREATE: u8 = 4;
    pub const MKDIR: u8 = 5;
    pub const MKNOD: u8 = 6;
    pub const SYMLINK: u8 = 7;
    pub const LINK: u8 = 8;
    pub const UNLINK: u8 = 9;
    pub const RMDIR: u8 = 10;
    pub const RENAME: u8 = 11;
    pub const EXCHANGE: u8 = 12;
    pub const ATTR: u8 = 13;
    pub const XATTR: u8 = 14;
    pub const CLOSE: u8 = 15;
}

/// Bits of [`Header::flags`].
pub mod flag {
    /// `start` and `end` are known.
    pub const RANGE: u8 = 1;
    /// The changed inode is a directory.
    pub const DIR: u8 = 2;
    /// `parent` and the first name are known.
    pub const AT: u8 = 4;
    /// `to_parent` and the second name are known.
    pub const TO: u8 = 8;
    /// Caused by the process that the programs were told to pass over: the
    /// marker of a barrier.
    pub const OWN: u8 = 16;
    /// Someone has the file mapped to write: its content may change, or have
    /// changed, without any other sign.
    pub const MAPPED: u8 = 32;
    /// It was asked, right before this was told, whether someone has.
    pub const ASKED: u8 = 64;
}

/// The fixed part of every record.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// `CLOCK_MONOTONIC`, ns, taken right before the record is handed over.
    pub time_ns: u64,
    pub ino: u64,
    /// Bytes written, from and up to.
    pub start: u64,
    pub end: u64,
    /// Inode of the directory that the name is in.
    pub parent: u64,
    pub to_parent: u64,
    /// The process's cgroup (v2): the inode number of its directory.
    pub cgroup: u64,
    pub pid: u32,
    pub uid: u32,
    /// The kernel's own encoding: `major << 20 | minor`.
    pub dev: u32,
    pub generation: u32,
    pub op: u8,
    pub flags: u8,
    /// Which hook made the event: index into [`crate::hooks::HOOKS`].
    pub hook: u8,
    pub reserved: u8,
    pub name_len: u16,
    pub to_len: u16,
    pub comm: [u8; 16],
}

/// A record with room for both names; what is handed over is its beginning.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Record {
    pub header: Header,
    pub name: [u8; NAME_SPACE],
    pub to: [u8; NAME_SPACE],
}

/// Bytes of the fixed part.
pub const HEADER_BYTES: usize = size_of::<Header>();
/// Where the second name begins.
pub const TO_OFFSET: usize = HEADER_BYTES + NAME_SPACE;

const _: () = assert!(HEADER_BYTES == 96);
const _: () = assert!(size_of::<Record>() == 96 + 2 * NAME_SPACE);
const _: () = assert!(align_of::<Record>() == 8);

/// An operation between its entry and its exit, or while its record is built.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Frame {
    pub record: Record,
    /// The name's dentry, and what the kernel keeps of the name: see
    /// [`crate::dirty::Dirty`].
    pub dentry: u64,
    pub name: u64,
}

const _: () = assert!(size_of::<Frame>() == size_of::<Record>() + 16);

/// The key of a [`Frame`]: the thread and the hook, so that an operation that
/// runs inside another one has its own frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameKey {
    pub pid_tgid: u64,
    /// The hook; for a frame that lives only while one program runs, also the
    /// processor, because all idle tasks share thread number 0.
    pub hook: u64,
}

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, integers and arrays of them, no padding (the sizes
    // are asserted above), so every bit pattern is a value.
    unsafe impl aya::Pod for super::Frame {}
    // SAFETY: as above: two integers of the same size.
    unsafe impl aya::Pod for super::FrameKey {}
}
