//! Read-only values that the loader patches into the programs.
//!
//! The verifier sees them as constants, so an offset costs nothing and a branch
//! on a setting that is off is removed.

use crate::hooks::HOOK_COUNT;

/// How records reach the user side.
pub mod transport {
    pub const RING: u32 = 0;
    pub const PERF: u32 = 1;
}

/// A member that this kernel does not have; hooks that need it are not loaded.
pub const ABSENT: u32 = u32::MAX;
/// A parameter that this kernel's function does not have.
pub const NO_ARG: u8 = u8::MAX;

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// One of [`transport`].
    pub transport: u32,
    /// The only watched device, and its bits; 0: ask the map.
    pub one_dev: u32,
    pub one_dev_flags: u32,
    /// 1: an inode's changes are merged until they are taken; 0: each one is a
    /// record.
    pub merge: u32,
}

const _: () = assert!(size_of::<Settings>() == 16);

/// Byte offsets of members in the running kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    pub file_dentry: u32,
    pub file_inode: u32,
    pub file_mode: u32,
    pub dentry_parent: u32,
    pub dentry_inode: u32,
    pub dentry_name_len: u32,
    pub dentry_name: u32,
    pub inode_mode: u32,
    pub inode_sb: u32,
    pub inode_ino: u32,
    pub inode_generation: u32,
    pub inode_nlink: u32,
    pub sb_dev: u32,
    pub sb_root: u32,
    pub kiocb_file: u32,
    pub kiocb_pos: u32,
    pub kiocb_flags: u32,
    pub rename_old_dentry: u32,
    pub rename_new_dentry: u32,
    pub rename_flags: u32,
    pub iattr_valid: u32,
    pub iattr_size: u32,
    pub fault_vma: u32,
    pub vma_file: u32,
    pub io_kiocb_file: u32,
    pub path_dentry: u32,
    pub task_leader: u32,
    pub task_start: u32,
    pub inode_mapping: u32,
    pub mapping_host: u32,
    pub mapping_writable: u32,
    pub inode_first_alias: u32,
    pub dentry_alias: u32,
    pub dentry_hashed: u32,
    pub dio_iocb: u32,
    pub dio_flags: u32,
    pub kiocb_complete: u32,
}

const _: () = assert!(size_of::<Offsets>() == 37 * 4);

impl Offsets {
    /// No member is known.
    pub const UNKNOWN: Self = Self {
        file_dentry: ABSENT,
        file_inode: ABSENT,
        file_mode: ABSENT,
        dentry_parent: ABSENT,
        dentry_inode: ABSENT,
        dentry_name_len: ABSENT,
        dentry_name: ABSENT,
        inode_mode: ABSENT,
        inode_sb: ABSENT,
        inode_ino: ABSENT,
        inode_generation: ABSENT,
        inode_nlink: ABSENT,
        sb_dev: ABSENT,
        sb_root: ABSENT,
        kiocb_file: ABSENT,
        kiocb_pos: ABSENT,
        kiocb_flags: ABSENT,
        rename_old_dentry: ABSENT,
        rename_new_dentry: ABSENT,
        rename_flags: ABSENT,
        iattr_valid: ABSENT,
        iattr_size: ABSENT,
        fault_vma: ABSENT,
        vma_file: ABSENT,
        io_kiocb_file: ABSENT,
        path_dentry: ABSENT,
        task_leader: ABSENT,
        task_start: ABSENT,
        inode_mapping: ABSENT,
        mapping_host: ABSENT,
        mapping_writable: ABSENT,
        inode_first_alias: ABSENT,
        dentry_alias: ABSENT,
        dentry_hashed: ABSENT,
        dio_iocb: ABSENT,
        dio_flags: ABSENT,
        kiocb_complete: ABSENT,
    };
}

/// Where a hook finds its arguments. What `a` to `d` are is said in
/// [`crate::hooks`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    pub a: u8,
    pub b: u8,
    pub c: u8,
    pub d: u8,
    /// The slot after the last argument: where an exit program finds the
    /// returned value on every kernel (the helper for it came only in 5.17).
    pub ret: u8,
    /// 1: the function returns a pointer, and an error is a pointer too.
    pub ret_is_pointer: u8,
    pub reserved: [u8; 2],
}

impl Slots {
    pub const UNKNOWN: Self = Self {
        a: NO_ARG,
        b: NO_ARG,
        c: NO_ARG,
        d: NO_ARG,
        ret: NO_ARG,
        ret_is_pointer: 0,
        reserved: [0; 2],
    };
}

/// One [`Slots`] per hook.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllSlots(pub [Slots; HOOK_COUNT]);

const _: () = assert!(size_of::<AllSlots>() == 8 * HOOK_COUNT);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, integers only; the asserted sizes leave no padding.
    unsafe impl aya::Pod for super::Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Offsets {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::AllSlots {}
}
