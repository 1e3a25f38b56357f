//! Names that come, go and move.
//!
//! The `vfs_*` functions are called with the parents' locks held, so the order
//! in which their events are sent is the order in which they happened. They
//! are what system calls, nfsd, overlayfs and io_uring share; the functions
//! above them (`do_*`, `filename_*`) change from version to version.

use omirr_common::{
    event::{Frame, flag, op},
    hooks,
    settings::Slots,
};

use super::{Hook, around_programs, entry_programs, exit_programs};
use crate::{
    emit::Change,
    kernel::{self, Addr, Site},
    maps::constant,
};

/// Set by the filesystem in `file.f_mode` when `open` made the file.
const FMODE_CREATED: u32 = 1 << 20;
/// `renameat2`: the two names swap.
const RENAME_EXCHANGE: u32 = 1 << 1;
/// Addresses from here on are errors, not pointers.
const FIRST_ERROR: u64 = (-4095_i64) as u64;

#[inline(always)]
fn named(hook: u8, op: u8, dentry: Addr, inode: Addr) -> Change {
    Change {
        hook,
        op,
        dentry,
        inode,
        to: 0,
        aux: 0,
        above_funnel: false,
    }
}

/// Reads the inode that the new name got.
#[inline(always)]
fn fill_new_inode(frame: *mut Frame, dentry: Addr) {
    let inode: Addr = kernel::probe(dentry + u64::from(constant!(OFFSETS.dentry_inode)));
    if inode == 0 {
        return;
    }
    // SAFETY: a live map value that only this thread uses.
    let header = unsafe { &mut (*frame).record.header };
    header.ino = kernel::probe(inode + u64::from(constant!(OFFSETS.inode_ino)));
    header.generation = kernel::probe(inode + u64::from(constant!(OFFSETS.inode_generation)));
    let mode: u16 = kernel::probe(inode + u64::from(constant!(OFFSETS.inode_mode)));
    if mode & 0xf000 == 0x4000 {
        header.flags |= flag::DIR;
    }
}

/// `vfs_open`: a file that `open(O_CREAT)` made never passes `vfs_create`. It
/// exists before it is opened, also if opening it then fails.
struct Open;
impl Hook for Open {
    const ID: u8 = hooks::VFS_OPEN;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots) -> Option<Change> {
        if kernel::file_mode(site, site.arg(slots.b)) & FMODE_CREATED == 0 {
            return None;
        }
        let dentry = kernel::path_dentry(site, site.arg(slots.a));
        Some(named(
            Self::ID,
            op::CREATE,
            dentry,
            kernel::dentry_inode(site, dentry),
        ))
    }
}
entry_programs!(Open, fentry_vfs_open, kprobe_vfs_open);

/// A function that makes a name and returns 0.
macro_rules! maker {
    ($hook:ident, $id:ident, $op:ident, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        struct $hook;
        impl Hook for $hook {
            const ID: u8 = hooks::$id;
            #[inline(always)]
            fn change<S: Site>(site: &S, slots: Slots) -> Option<Change> {
                let dentry = site.arg(slots.a);
                Some(Change {
                    aux: dentry,
                    ..named(Self::ID, op::$op, dentry, 0)
                })
            }
            #[inline(always)]
            fn finish(frame: *mut Frame, _ret: u64, _slots: Slots) {
                // SAFETY: a live map value that only this thread uses.
                fill_new_inode(frame, unsafe { (*frame).aux });
            }
        }
        exit_programs!($hook, $fexit, $kprobe, $kretprobe);
    };
}
maker!(
    Create,
    VFS_CREATE,
    CREATE,
    fexit_vfs_create,
    kprobe_vfs_create,
    kretprobe_vfs_create
);
maker!(
    Mknod,
    VFS_MKNOD,
    MKNOD,
    fexit_vfs_mknod,
    kprobe_vfs_mknod,
    kretprobe_vfs_mknod
);
maker!(
    Symlink,
    VFS_SYMLINK,
    SYMLINK,
    fexit_vfs_symlink,
    kprobe_vfs_symlink,
    kretprobe_vfs_symlink
);

/// `vfs_mkdir`: from 6.15 it returns the dentry, and an error is a pointer.
struct Mkdir;
impl Hook for Mkdir {
    const ID: u8 = hooks::VFS_MKDIR;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots) -> Option<Change> {
        let dentry = site.arg(slots.a);
        Some(Change {
            aux: dentry,
            ..named(Self::ID, op::MKDIR, dentry, 0)
        })
    }
    #[inline(always)]
    fn succeeded(ret: u64, slots: Slots) -> bool {
        if slots.ret_is_pointer == 0 {
            ret as i32 == 0
        } else {
            ret != 0 && ret < FIRST_ERROR
        }
    }
    #[inline(always)]
    fn finish(frame: *mut Frame, ret: u64, slots: Slots) {
        // SAFETY: a live map value that only this thread uses.
        let dentry = if slots.ret_is_pointer == 0 {
            unsafe { (*frame).aux }
        } else {
            ret
        };
        fill_new_inode(frame, dentry);
        // SAFETY: as above.
        unsafe { (*frame).record.header.flags |= flag::DIR };
    }
}
exit_programs!(Mkdir, fexit_vfs_mkdir, kprobe_vfs_mkdir, kretprobe_vfs_mkdir);

/// `vfs_link`: also gives an `O_TMPFILE` file its first name.
struct Link;
impl Hook for Link {
    const ID: u8 = hooks::VFS_LINK;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots) -> Option<Change> {
        let dentry = site.arg(slots.a);
        let to = site.arg(slots.b);
        Some(Change {
            to,
            ..named(Self::ID, op::LINK, dentry, kernel::dentry_inode(site, dentry))
        })
    }
}
exit_programs!(Link, fexit_vfs_link, kprobe_vfs_link, kretprobe_vfs_link);

/// A function that takes a name away.
macro_rules! remover {
    ($hook:ident, $id:ident, $op:ident, $fentry:ident, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        struct $hook;
        impl Hook for $hook {
            const ID: u8 = hooks::$id;
            #[inline(always)]
            fn change<S: Site>(site: &S, slots: Slots) -> Option<Change> {
                let dentry = site.arg(slots.a);
                Some(named(
                    Self::ID,
                    op::$op,
                    dentry,
                    kernel::dentry_inode(site, dentry),
                ))
            }
        }
        around_programs!($hook, $fentry, $fexit, $kprobe, $kretprobe);
    };
}
remover!(
    Unlink,
    VFS_UNLINK,
    UNLINK,
    fentry_vfs_unlink,
    fexit_vfs_unlink,
    kprobe_vfs_unlink,
    kretprobe_vfs_unlink
);
remover!(
    Rmdir,
    VFS_RMDIR,
    RMDIR,
    fentry_vfs_rmdir,
    fexit_vfs_rmdir,
    kprobe_vfs_rmdir,
    kretprobe_vfs_rmdir
);

/// `vfs_rename`: reported if either end is beneath a share.
struct Rename;
impl Hook for Rename {
    const ID: u8 = hooks::VFS_RENAME;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots) -> Option<Change> {
        let data = site.arg(slots.a);
        let dentry = kernel::rename_old_dentry(site, data);
        let to = kernel::rename_new_dentry(site, data);
        let exchange = kernel::rename_flags(site, data) & RENAME_EXCHANGE != 0;
        let op = if exchange { op::EXCHANGE } else { op::RENAME };
        Some(Change {
            to,
            ..named(Self::ID, op, dentry, kernel::dentry_inode(site, dentry))
        })
    }
}
around_programs!(
    Rename,
    fentry_vfs_rename,
    fexit_vfs_rename,
    kprobe_vfs_rename,
    kretprobe_vfs_rename
);
