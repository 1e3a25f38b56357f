//! Content that changes.
//!
//! write, pwrite, writev, append, aio, io_uring, sendfile, splice, the loop
//! driver and nfsd all end in the filesystem's own `write_iter`: where that is
//! known it is hooked, and the hooks above it stay silent. What does not end
//! there has a hook of its own. A store through a shared mapping is seen when a
//! page becomes writable, before the store; while the mapping lives, each
//! write-back of the file tells of the stores before it; the last close is what
//! says that the content is at rest.

use omirr_common::{
    event::{Header, op},
    hooks,
    identity::device,
    settings::Slots,
};

use super::{Hook, around_programs, entry_programs, exit_programs, probe_programs};
use crate::{
    emit::{Bytes, Change},
    kernel::{self, Addr, Site, Untyped},
};

/// `file.f_mode`: open for writing.
const FMODE_WRITE: u32 = 1 << 1;
/// `kiocb.ki_flags`: past the page cache.
const IOCB_DIRECT: u32 = 1 << 17;
/// `kiocb.ki_flags`: it is a write.
const IOCB_WRITE: u32 = 1 << 18;
/// It would have had to wait: the kernel's own word for "again".
const EAGAIN: i64 = -11;
/// It was queued, and is told when it completes.
const EIOCBQUEUED: i64 = -529;
/// `iomap_dio.flags`: it is a write.
const DIO_WRITE: u32 = 1 << 30;
/// `fallocate`: bytes move, up to the end of the file.
const COLLAPSE_OR_INSERT: u64 = 0x08 | 0x20;

#[inline(always)]
fn of_file<S: Site>(site: &S, hook: u8, op: u8, file: Addr) -> Change {
    Change {
        hook,
        op,
        dentry: kernel::file_dentry(site, file),
        inode: kernel::file_inode(site, file),
        to: 0,
        above: 0,
    }
}

/// The `written` bytes that end at a position.
#[inline(always)]
fn range_before(end: u64, written: u64) -> Bytes {
    if end >= written {
        Bytes::new(end - written, end)
    } else {
        Bytes::UNKNOWN
    }
}

#[inline(always)]
fn wrote(ret: u64) -> bool {
    ret as i64 > 0
}

/// A filesystem's `write_iter`. A write that was only queued is reported when
/// it completes.
macro_rules! write_iter {
    ($hook:ident, $id:ident, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        struct $hook;
        impl Hook for $hook {
            const ID: u8 = hooks::$id;
            #[inline(always)]
            fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
                let iocb = site.arg(slots.a);
                let file = kernel::kiocb_file(site, iocb);
                Some(of_file(site, Self::ID, op::WRITE, file))
            }
            #[inline(always)]
            fn succeeded(ret: u64, _slots: Slots) -> bool {
                wrote(ret)
            }
            /// What went into the page cache stays there although bringing it to the
            /// disk failed, and a direct write may fail half way. One into the page
            /// cache that would have to wait says so only if it has written nothing.
            #[inline(always)]
            fn half_done<S: Site>(site: &S, slots: Slots, ret: u64) -> bool {
                let ret = ret as i64;
                let flags = kernel::kiocb_flags(site, site.arg(slots.a));
                ret < 0 && ret != EIOCBQUEUED && (ret != EAGAIN || flags & IOCB_DIRECT != 0)
            }
            #[inline(always)]
            fn range<S: Site>(site: &S, slots: Slots, ret: u64) -> Bytes {
                range_before(kernel::kiocb_pos(site, site.arg(slots.a)), ret)
            }
        }
        exit_programs!($hook, $fexit, $kprobe, $kretprobe);
    };
}
write_iter!(
    Ext4,
    EXT4_WRITE,
    fexit_ext4_file_write_iter,
    kprobe_ext4_file_write_iter,
    kretprobe_ext4_file_write_iter
);
write_iter!(
    Shmem,
    SHMEM_WRITE,
    fexit_shmem_file_write_iter,
    kprobe_shmem_file_write_iter,
    kretprobe_shmem_file_write_iter
);
write_iter!(
    Generic,
    GENERIC_WRITE,
    fexit_generic_file_write_iter,
    kprobe_generic_file_write_iter,
    kretprobe_generic_file_write_iter
);
write_iter!(
    Xfs,
    XFS_WRITE,
    fexit_xfs_file_write_iter,
    kprobe_xfs_file_write_iter,
    kretprobe_xfs_file_write_iter
);
write_iter!(
    Btrfs,
    BTRFS_WRITE,
    fexit_btrfs_file_write_iter,
    kprobe_btrfs_file_write_iter,
    kretprobe_btrfs_file_write_iter
);

/// A write above the filesystem, with the position behind a pointer.
macro_rules! write_above {
    ($hook:ident, $id:ident, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        struct $hook;
        impl Hook for $hook {
            const ID: u8 = hooks::$id;
            #[inline(always)]
            fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
                let change = of_file(site, Self::ID, op::WRITE, site.arg(slots.a));
                Some(Change {
                    above: device::FUNNEL,
                    ..change
                })
            }
            #[inline(always)]
            fn succeeded(ret: u64, _slots: Slots) -> bool {
                wrote(ret)
            }
            #[inline(always)]
            fn range<S: Site>(site: &S, slots: Slots, ret: u64) -> Bytes {
                let position = site.arg(slots.b);
                if position == 0 {
                    return Bytes::UNKNOWN;
                }
                range_before(kernel::probe(position), ret)
            }
        }
        exit_programs!($hook, $fexit, $kprobe, $kretprobe);
    };
}
write_above!(
    Write,
    VFS_WRITE,
    fexit_vfs_write,
    kprobe_vfs_write,
    kretprobe_vfs_write
);
write_above!(
    Writev,
    VFS_WRITEV,
    fexit_vfs_writev,
    kprobe_vfs_writev,
    kretprobe_vfs_writev
);
write_above!(
    IterWrite,
    VFS_ITER_WRITE,
    fexit_vfs_iter_write,
    kprobe_vfs_iter_write,
    kretprobe_vfs_iter_write
);
write_above!(
    IocbWrite,
    VFS_IOCB_WRITE,
    fexit_vfs_iocb_iter_write,
    kprobe_vfs_iocb_iter_write,
    kretprobe_vfs_iocb_iter_write
);
write_above!(
    SpliceWrite,
    SPLICE_WRITE,
    fexit_iter_file_splice_write,
    kprobe_iter_file_splice_write,
    kretprobe_iter_file_splice_write
);

/// `io_write`: what it returns says only that it was issued; 0 and more is
/// taken for a write.
struct IoWrite;
impl Hook for IoWrite {
    const ID: u8 = hooks::IO_WRITE;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
        let file = kernel::io_kiocb_file(site, site.arg(slots.a));
        Some(Change {
            above: device::FUNNEL,
            ..of_file(site, Self::ID, op::WRITE, file)
        })
    }
    #[inline(always)]
    fn succeeded(ret: u64, _slots: Slots) -> bool {
        ret as i32 >= 0
    }
}
exit_programs!(IoWrite, fexit_io_write, kprobe_io_write, kretprobe_io_write);

/// The completion of an asynchronous request: by then the bytes are in place.
/// It may run in an interrupt, so the process that it names is chance.
macro_rules! completion {
    ($hook:ident, $id:ident, $fentry:ident, $kprobe:ident) => {
        struct $hook;
        impl Hook for $hook {
            const ID: u8 = hooks::$id;
            #[inline(always)]
            fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
                let iocb = site.arg(slots.a);
                // An error may come after a part.
                if site.arg(slots.b) == 0 || kernel::kiocb_flags(site, iocb) & IOCB_WRITE == 0 {
                    return None;
                }
                let file = kernel::kiocb_file(site, iocb);
                Some(of_file(site, Self::ID, op::WRITE, file))
            }
            #[inline(always)]
            fn range<S: Site>(site: &S, slots: Slots, _ret: u64) -> Bytes {
                let written = site.arg(slots.b);
                if !wrote(written) {
                    return Bytes::UNKNOWN;
                }
                range_before(kernel::kiocb_pos(site, site.arg(slots.a)), written)
            }
        }
        entry_programs!($hook, $fentry, $kprobe);
    };
}
completion!(
    AioComplete,
    AIO_COMPLETE,
    fentry_aio_complete_rw,
    kprobe_aio_complete_rw
);
completion!(
    IoComplete,
    IO_COMPLETE,
    fentry_io_complete_rw,
    kprobe_io_complete_rw
);

/// `iomap_dio_complete`: the end of a direct write on ext4, xfs and btrfs. Those
/// that somebody waits for are told by `write_iter`; the others include those of
/// the loop driver, which no completion above knows. Around, because it drops
/// what the page cache held of the old bytes and frees its argument.
struct DirectComplete;
impl Hook for DirectComplete {
    const ID: u8 = hooks::DIRECT_COMPLETE;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
        let dio = site.arg(slots.a);
        let iocb = kernel::dio_iocb(site, dio);
        if kernel::dio_flags(site, dio) & DIO_WRITE == 0 || kernel::kiocb_complete(site, iocb) == 0 {
            return None;
        }
        Some(of_file(site, Self::ID, op::WRITE, kernel::kiocb_file(site, iocb)))
    }
    #[inline(always)]
    fn succeeded(ret: u64, _slots: Slots) -> bool {
        wrote(ret)
    }
    /// Part of it may be there.
    #[inline(always)]
    fn ended_half_done(ret: u64) -> bool {
        (ret as i64) < 0
    }
    /// How much it was is known at the end, should that be seen.
    #[inline(always)]
    fn range<S: Site>(site: &S, slots: Slots, _ret: u64) -> Bytes {
        let position = kernel::kiocb_pos(site, kernel::dio_iocb(site, site.arg(slots.a)));
        Bytes::new(position, u64::MAX)
    }
    #[inline(always)]
    fn finish(header: &mut Header, ret: u64) {
        header.end = header.start + ret;
    }
}
around_programs!(
    DirectComplete,
    fentry_iomap_dio_complete,
    fexit_iomap_dio_complete,
    kprobe_iomap_dio_complete,
    kretprobe_iomap_dio_complete
);

/// Copies inside the kernel that may not pass `write_iter`: the position is
/// an argument, the length is what was returned.
macro_rules! copy {
    ($hook:ident, $id:ident, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        struct $hook;
        impl Hook for $hook {
            const ID: u8 = hooks::$id;
            #[inline(always)]
            fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
                Some(of_file(site, Self::ID, op::WRITE, site.arg(slots.a)))
            }
            #[inline(always)]
            fn succeeded(ret: u64, _slots: Slots) -> bool {
                wrote(ret)
            }
            #[inline(always)]
            fn half_done<S: Site>(_site: &S, _slots: Slots, ret: u64) -> bool {
                (ret as i64) < 0
            }
            #[inline(always)]
            fn range<S: Site>(site: &S, slots: Slots, ret: u64) -> Bytes {
                let start = site.arg(slots.b);
                Bytes::new(start, start + ret)
            }
        }
        exit_programs!($hook, $fexit, $kprobe, $kretprobe);
    };
}
copy!(
    CopyRange,
    COPY_RANGE,
    fexit_vfs_copy_file_range,
    kprobe_vfs_copy_file_range,
    kretprobe_vfs_copy_file_range
);
copy!(
    CloneRange,
    CLONE_RANGE,
    fexit_vfs_clone_file_range,
    kprobe_vfs_clone_file_range,
    kretprobe_vfs_clone_file_range
);

/// `fallocate`, the kernel's and the filesystems' own.
macro_rules! fallocate {
    ($hook:ident, $id:ident, $above:expr, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        struct $hook;
        impl Hook for $hook {
            const ID: u8 = hooks::$id;
            #[inline(always)]
            fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
                Some(Change {
                    above: $above,
                    ..of_file(site, Self::ID, op::FALLOCATE, site.arg(slots.a))
                })
            }
            /// It may have failed after some blocks.
            #[inline(always)]
            fn half_done<S: Site>(_site: &S, _slots: Slots, ret: u64) -> bool {
                (ret as i32) < 0
            }
            #[inline(always)]
            fn range<S: Site>(site: &S, slots: Slots, _ret: u64) -> Bytes {
                let start = site.arg(slots.b);
                let moves = site.arg(slots.d) & COLLAPSE_OR_INSERT != 0;
                let end = if moves {
                    u64::MAX
                } else {
                    start + site.arg(slots.c)
                };
                Bytes::new(start, end)
            }
        }
        exit_programs!($hook, $fexit, $kprobe, $kretprobe);
    };
}
fallocate!(
    Fallocate,
    VFS_FALLOCATE,
    device::FALLOCATE,
    fexit_vfs_fallocate,
    kprobe_vfs_fallocate,
    kretprobe_vfs_fallocate
);
fallocate!(
    Ext4Fallocate,
    EXT4_FALLOCATE,
    0,
    fexit_ext4_fallocate,
    kprobe_ext4_fallocate,
    kretprobe_ext4_fallocate
);
fallocate!(
    ShmemFallocate,
    SHMEM_FALLOCATE,
    0,
    fexit_shmem_fallocate,
    kprobe_shmem_fallocate,
    kretprobe_shmem_fallocate
);
fallocate!(
    XfsFallocate,
    XFS_FALLOCATE,
    0,
    fexit_xfs_file_fallocate,
    kprobe_xfs_file_fallocate,
    kretprobe_xfs_file_fallocate
);
fallocate!(
    BtrfsFallocate,
    BTRFS_FALLOCATE,
    0,
    fexit_btrfs_fallocate,
    kprobe_btrfs_fallocate,
    kretprobe_btrfs_fallocate
);

/// A page of a shared mapping becomes writable.
struct PageDirty;
impl Hook for PageDirty {
    const ID: u8 = hooks::PAGE_DIRTY;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
        let vma = kernel::fault_vma(site, site.arg(slots.a));
        let file = kernel::vma_file(site, vma);
        if file == 0 {
            return None;
        }
        Some(of_file(site, Self::ID, op::WRITE, file))
    }
}
entry_programs!(
    PageDirty,
    fentry_fault_dirty_shared_page,
    kprobe_fault_dirty_shared_page
);

/// `__fput`: a mapping holds the file too, so this comes after its last store.
struct Fput;
impl Hook for Fput {
    const ID: u8 = hooks::FPUT;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
        let file = site.arg(slots.a);
        if kernel::file_mode(site, file) & FMODE_WRITE == 0 {
            return None;
        }
        let change = of_file(site, Self::ID, op::CLOSE, file);
        // A file whose opening failed has neither name nor inode.
        if change.dentry == 0 || change.inode == 0 {
            None
        } else {
            Some(change)
        }
    }
}
entry_programs!(Fput, fentry_fput, kprobe_fput);

/// `do_writepages`, of a file that someone has mapped to write: the stores since
/// the page fault were seen by nobody, and from now on the next store to a page
/// that was written faults again. Told at its end only, for until then a page
/// takes stores without a fault. Filesystems without a disk have no write-back.
struct WriteBack;
impl Hook for WriteBack {
    const ID: u8 = hooks::WRITE_BACK;
    #[inline(always)]
    fn change<S: Site>(site: &S, slots: Slots, _ret: u64) -> Option<Change> {
        let mapping = site.arg(slots.a);
        if kernel::mapping_writable(site, mapping) <= 0 {
            return None;
        }
        let inode = kernel::mapping_host(site, mapping);
        let dentry = kernel::inode_dentry(inode);
        if inode == 0 || dentry == 0 {
            return None;
        }
        Some(Change {
            hook: Self::ID,
            op: op::WRITE,
            dentry,
            inode,
            to: 0,
            above: 0,
        })
    }
    /// Also if some page could not be written.
    #[inline(always)]
    fn succeeded(_ret: u64, _slots: Slots) -> bool {
        true
    }
}

#[aya_ebpf::macros::fexit]
fn fexit_do_writepages(ctx: aya_ebpf::programs::FExitContext) -> i32 {
    super::at_exit::<WriteBack, _>(&Untyped(&ctx), 0);
    0
}
probe_programs!(WriteBack, kprobe_do_writepages, kretprobe_do_writepages);
