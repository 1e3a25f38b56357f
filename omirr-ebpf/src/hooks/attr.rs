//! Mode, owner, times, size, flags, extended attributes, access lists.

use omirr_common::{event::op, hooks, settings::Slots};

use super::{Hook, entry_programs, exit_programs};
use crate::{
    emit::{Bytes, Change},
    kernel::{self, Site},
};

/// `iattr.ia_valid`: the size changes.
const ATTR_SIZE: u32 = 1 << 3;

/// `notify_change`: every change of mode, owner, times and size ends here,
/// `O_TRUNC` included.
struct Notify;
impl Hook for Notify {
    const ID: u8 = hooks::NOTIFY_CHANGE;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
        let dentry = site.arg(slots.a);
        let truncates = kernel::iattr_valid(site, site.arg(slots.b)) & ATTR_SIZE != 0;
        Some(Change {
            hook: Self::ID,
            op: if truncates { op::TRUNCATE } else { op::ATTR },
            dentry,
            inode: kernel::dentry_inode(site, dentry),
            to: 0,
            above: 0,
        })
    }
    /// A truncation may have cut, or emptied the rest of a block, before it failed.
    #[inline(always)]
    fn half_done<S: Site>(site: &S, slots: Slots, _ret: u64) -> bool {
        kernel::iattr_valid(site, site.arg(slots.b)) & ATTR_SIZE != 0
    }
    /// A truncation's range is empty and stands at the new size.
    #[inline(always)]
    fn range<S: Site>(site: &S, slots: Slots, _ret: u64) -> Bytes {
        let attr = site.arg(slots.b);
        let size = kernel::iattr_size(site, attr);
        if kernel::iattr_valid(site, attr) & ATTR_SIZE != 0 {
            Bytes::new(size, size)
        } else {
            Bytes::UNKNOWN
        }
    }
}
exit_programs!(
    Notify,
    fexit_notify_change,
    kprobe_notify_change,
    kretprobe_notify_change
);

macro_rules! of_dentry {
    ($hook:ident, $id:ident, $op:ident, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        struct $hook;
        impl Hook for $hook {
            const ID: u8 = hooks::$id;
            #[inline(always)]
            fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
                let dentry = site.arg(slots.a);
                Some(Change {
                    hook: Self::ID,
                    op: op::$op,
                    dentry,
                    inode: kernel::dentry_inode(site, dentry),
                    to: 0,
                    above: 0,
                })
            }
        }
        exit_programs!($hook, $fexit, $kprobe, $kretprobe);
    };
}
of_dentry!(
    SetXattr,
    SETXATTR,
    XATTR,
    fexit_vfs_setxattr_noperm,
    kprobe_vfs_setxattr_noperm,
    kretprobe_vfs_setxattr_noperm
);
of_dentry!(
    RemoveXattr,
    REMOVEXATTR,
    XATTR,
    fexit_vfs_removexattr_locked,
    kprobe_vfs_removexattr_locked,
    kretprobe_vfs_removexattr_locked
);
of_dentry!(
    SetAcl,
    SET_ACL,
    XATTR,
    fexit_vfs_set_acl,
    kprobe_vfs_set_acl,
    kretprobe_vfs_set_acl
);
of_dentry!(
    RemoveAcl,
    REMOVE_ACL,
    XATTR,
    fexit_vfs_remove_acl,
    kprobe_vfs_remove_acl,
    kretprobe_vfs_remove_acl
);
of_dentry!(
    FileAttr,
    FILEATTR_SET,
    ATTR,
    fexit_vfs_fileattr_set,
    kprobe_vfs_fileattr_set,
    kretprobe_vfs_fileattr_set
);

/// `mnt_drop_write_file`: what a filesystem's own `chattr` calls when it is done.
/// `fchown` and `fsetxattr` call it too and are told twice on such a kernel; a
/// `chattr` that failed is told as well.
struct DropWrite;
impl Hook for DropWrite {
    const ID: u8 = hooks::DROP_WRITE;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
        let file = site.arg(slots.a);
        Some(Change {
            hook: Self::ID,
            op: op::ATTR,
            dentry: kernel::file_dentry(site, file),
            inode: kernel::file_inode(site, file),
            to: 0,
            above: 0,
        })
    }
}
entry_programs!(DropWrite, fentry_mnt_drop_write_file, kprobe_mnt_drop_write_file);
