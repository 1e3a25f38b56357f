//! Keys and values of the maps that say what lies beneath a share.

/// A share's root inode.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RootKey {
    /// The kernel's own encoding: `major << 20 | minor`.
    pub dev: u32,
    pub reserved: u32,
    pub ino: u64,
}

/// Bits of what is known about a watched device.
pub mod device {
    /// On the list.
    pub const WATCHED: u32 = 1;
    /// A share's root is the filesystem's root: everything on it is inside.
    pub const WHOLE: u32 = 2;
    /// Its filesystem's own `write_iter` is hooked, so the hooks above it stay
    /// silent and a write is reported once.
    pub const FUNNEL: u32 = 4;
}

/// How far up a dentry's ancestors are followed. A deeper change counts as
/// inside: a needless event costs less than a lost one.
pub const MAX_DEPTH: u32 = 64;

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, no padding.
unsafe impl aya::Pod for RootKey {}
