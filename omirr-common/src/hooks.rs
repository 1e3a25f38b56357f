//! The list of kernel functions that omirr hooks: one name on both sides.
//!
//! A hook's programs are called `fentry_F`, `fexit_F`, `kprobe_F` and
//! `kretprobe_F` after its function F, without leading underscores; which of
//! them exist follows from its
//! [`Timing`].

/// When a hook learns what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// The function is called when the change has already happened: one
    /// program at its entry.
    Entry,
    /// What is needed can be read after the function: one `fexit` program. A
    /// return probe has no arguments, so that flavour has two programs.
    Exit,
    /// The function destroys what names the change: a program at entry takes
    /// it down, one at exit sends it if the function succeeded.
    Around,
}

macro_rules! hooks {
    ($( $(#[$doc:meta])* $constant:ident = $function:literal, $timing:ident; )*) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, reason = "only the discriminants are used")]
        #[repr(usize)]
        enum Index { $( $constant ),* , END }
        $( $(#[$doc])* pub const $constant: u8 = Index::$constant as u8; )*
        pub const HOOK_COUNT: usize = Index::END as usize;
        /// Function and timing of every hook, by its number.
        pub const HOOKS: [(&str, Timing); HOOK_COUNT] = [ $( ($function, Timing::$timing) ),* ];
    };
}

hooks! {
    /// a: path, b: file. Creation by `open`: the file exists by now and says so.
    VFS_OPEN = "vfs_open", Entry;
    /// a: dentry.
    VFS_CREATE = "vfs_create", Exit;
    /// a: dentry. From 6.15 the dentry is returned.
    VFS_MKDIR = "vfs_mkdir", Exit;
    /// a: dentry.
    VFS_MKNOD = "vfs_mknod", Exit;
    /// a: dentry.
    VFS_SYMLINK = "vfs_symlink", Exit;
    /// a: old dentry, b: new dentry.
    VFS_LINK = "vfs_link", Exit;
    /// a: dentry. A name was taken away; it still knows its inode here.
    D_DELETE = "d_delete", Entry;
    /// a: renamedata.
    VFS_RENAME = "vfs_rename", Around;
    /// a: dentry, b: iattr.
    NOTIFY_CHANGE = "notify_change", Exit;
    /// a: dentry.
    SETXATTR = "__vfs_setxattr_noperm", Exit;
    /// a: dentry.
    REMOVEXATTR = "__vfs_removexattr_locked", Exit;
    /// a: dentry.
    SET_ACL = "vfs_set_acl", Exit;
    /// a: dentry.
    REMOVE_ACL = "vfs_remove_acl", Exit;
    /// a: dentry.
    FILEATTR_SET = "vfs_fileattr_set", Exit;
    /// a: file, b: offset, c: length, d: mode. Above the filesystem's own, which the
    /// loop driver and iSCSI targets call by themselves.
    VFS_FALLOCATE = "vfs_fallocate", Exit;
    /// a: kiocb; the filesystem's own write, which most routes end in.
    EXT4_WRITE = "ext4_file_write_iter", Exit;
    /// a: kiocb; tmpfs from 6.6.
    SHMEM_WRITE = "shmem_file_write_iter", Exit;
    /// a: kiocb; tmpfs before 6.6, and small filesystems.
    GENERIC_WRITE = "generic_file_write_iter", Exit;
    /// a: kiocb.
    XFS_WRITE = "xfs_file_write_iter", Exit;
    /// a: kiocb.
    BTRFS_WRITE = "btrfs_file_write_iter", Exit;
    /// a: file, b: position.
    VFS_WRITE = "vfs_write", Exit;
    /// a: file, b: position.
    VFS_WRITEV = "vfs_writev", Exit;
    /// a: file, b: position.
    VFS_ITER_WRITE = "vfs_iter_write", Exit;
    /// a: file.
    VFS_IOCB_WRITE = "vfs_iocb_iter_write", Exit;
    /// a: output file.
    SPLICE_WRITE = "iter_file_splice_write", Exit;
    /// a: io_kiocb.
    IO_WRITE = "io_write", Exit;
    /// a: kiocb, b: result. An asynchronous write has landed.
    AIO_COMPLETE = "aio_complete_rw", Entry;
    /// a: kiocb, b: result.
    IO_COMPLETE = "io_complete_rw", Entry;
    /// a: output file, b: position.
    COPY_RANGE = "vfs_copy_file_range", Exit;
    /// a: output file, b: position.
    CLONE_RANGE = "vfs_clone_file_range", Exit;
    /// a: vm_fault. A page of a shared mapping becomes writable: content will
    /// change; the last close says when it is at rest.
    PAGE_DIRTY = "fault_dirty_shared_page", Entry;
    /// a: file. The last reference to a writable file goes away.
    FPUT = "__fput", Entry;
    /// a: address_space. Pages went to the disk, and a store into one of them
    /// faults again: what was stored without a fault is there by now.
    WRITE_BACK = "do_writepages", Exit;
    /// a: file. The end of a change of a file by its descriptor: what is left of
    /// a `chattr` on a kernel without `vfs_fileattr_set`.
    DROP_WRITE = "mnt_drop_write_file", Entry;
    /// a: iomap_dio. A direct write has landed, whoever waits for it.
    DIRECT_COMPLETE = "iomap_dio_complete", Around;
    /// a: file, b: offset, c: length, d: mode; and so are the next ones.
    EXT4_FALLOCATE = "ext4_fallocate", Exit;
    SHMEM_FALLOCATE = "shmem_fallocate", Exit;
    XFS_FALLOCATE = "xfs_file_fallocate", Exit;
    BTRFS_FALLOCATE = "btrfs_fallocate", Exit;
}
