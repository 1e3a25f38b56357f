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

/// Until where the user side has kept up with a share, for the case that it
/// comes back while the programs have stayed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Names the index that has kept up.
    pub replica: u64,
    /// Its highest sequence number, at least.
    pub head: u64,
    /// The boot, as a hash of the kernel's own name for it.
    pub boot: u64,
    /// Losses that have been told: see `Counters::lost` and the kernel's own
    /// count of programs passed over.
    pub lost_told: u64,
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
    /// Its filesystem's own `fallocate` is hooked, likewise.
    pub const FALLOCATE: u32 = 8;
}

/// How far up a dentry's ancestors are followed. A deeper change counts as
/// inside: a needless event costs less than a lost one.
pub const MAX_DEPTH: u32 = 64;

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, integers only, no padding.
    unsafe impl aya::Pod for super::RootKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Mark {}
}
