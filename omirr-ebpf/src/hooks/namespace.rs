//! Names that come, go and move.
//!
//! The `vfs_*` functions are called with the parents' locks held, so the order
//! in which their events are sent is the order in which they happened. They
//! are what system calls, nfsd, overlayfs and io_uring share; the functions
//! above them (`do_*`, `filename_*`) change from version to version.

use omirr_common::{event::op, hooks, settings::Slots};

use super::{Hook, around_programs, entry_programs, exit_programs};
use crate::{
    emit::Change,
    kernel::{self, Addr, Site},
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
        above: 0,
    }
}

/// `vfs_open`: a file that `open(O_CREAT)` made never passes `vfs_create`. It
/// exists before it is opened, also if opening it then fails.
struct Open;
impl Hook for Open {
    const ID: u8 = hooks::VFS_OPEN;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
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
            fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
                let dentry = site.arg(slots.a);
                // None before it is made; then the parent says where it is.
                let inode = kernel::dentry_inode(site, dentry);
                Some(named(Self::ID, op::$op, dentry, inode))
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
    fn change<S: Site>(site: &S, slots: Slots, ret: u64) -> Option<Change> {
        let dentry = if slots.ret_is_pointer == 0 || ret == 0 {
            site.arg(slots.a)
        } else {
            ret
        };
        let inode = kernel::dentry_inode(site, dentry);
        Some(named(Self::ID, op::MKDIR, dentry, inode))
    }
    #[inline(always)]
    fn succeeded(ret: u64, slots: Slots) -> bool {
        if slots.ret_is_pointer == 0 {
            ret as i32 == 0
        } else {
            ret != 0 && ret < FIRST_ERROR
        }
    }
}
exit_programs!(Mkdir, fexit_vfs_mkdir, kprobe_vfs_mkdir, kretprobe_vfs_mkdir);

/// `vfs_link`: also gives an `O_TMPFILE` file its first name.
struct Link;
impl Hook for Link {
    const ID: u8 = hooks::VFS_LINK;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
        let dentry = site.arg(slots.a);
        let to = site.arg(slots.b);
        Some(Change {
            to,
            ..named(Self::ID, op::LINK, dentry, kernel::dentry_inode(site, dentry))
        })
    }
}
exit_programs!(Link, fexit_vfs_link, kprobe_vfs_link, kretprobe_vfs_link);

/// `d_delete`: what `vfs_unlink` and `vfs_rmdir` call once the name is gone from
/// the directory and before the dentry lets go of its inode. It is hooked in
/// their place because some kernels are built with `vfs_rmdir` folded into its
/// caller (Debian's 5.10), where a hook on it never fires; this one lies in
/// another file, is called on success only, and knows all at its entry.
struct Delete;
impl Hook for Delete {
    const ID: u8 = hooks::D_DELETE;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
        let dentry = site.arg(slots.a);
        let inode = kernel::dentry_inode(site, dentry);
        if inode == 0 {
            return None;
        }
        let is_dir = kernel::inode_mode(site, inode) & 0xf000 == 0x4000;
        Some(named(
            Self::ID,
            if is_dir { op::RMDIR } else { op::UNLINK },
            dentry,
            inode,
        ))
    }
}
entry_programs!(Delete, fentry_d_delete, kprobe_d_delete);

/// `vfs_rename`: reported if either end is beneath a share.
struct Rename;
impl Hook for Rename {
    const ID: u8 = hooks::VFS_RENAME;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
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
