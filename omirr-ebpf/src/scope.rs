//! Is this change beneath a share, and not the daemon's own?

use aya_ebpf::{
    bindings::bpf_pidns_info,
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{bpf_get_current_task, bpf_get_ns_current_pid_tgid},
    },
};
use omirr_common::{
    counters::Control,
    identity::{MAX_DEPTH, RootKey, device},
};

use crate::{
    count,
    kernel::{self, Addr, Site},
    maps::{CONTROL, DEVICES, MOVES, PLACES, ROOTS, constant},
};

/// Where a dentry is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Outside,
    Inside,
    /// A share's root itself.
    Root,
}

/// Whether the process that the programs pass over is the one that runs.
#[inline(always)]
pub fn is_own() -> bool {
    let Some(control) = CONTROL.get_ptr(0) else {
        return false;
    };
    // SAFETY: a live map value; the user side writes each word whole.
    let control = unsafe { &*control };
    control.own_tgid != 0 && has_own_number(control) && started_as_own(control.own_start)
}

#[inline(always)]
fn has_own_number(control: &Control) -> bool {
    if control.pid_space_ino == 0 {
        return bpf_get_current_pid_tgid() >> 32 == control.own_tgid;
    }
    let mut info = bpf_pidns_info { pid: 0, tgid: 0 };
    // SAFETY: the helper writes at most the given size at the pointer.
    let failed = unsafe {
        bpf_get_ns_current_pid_tgid(
            control.pid_space_dev,
            control.pid_space_ino,
            &raw mut info,
            size_of::<bpf_pidns_info>() as u32,
        )
    };
    failed == 0 && u64::from(info.tgid) == control.own_tgid
}

/// Whether it is not a later process with the same number.
#[inline(always)]
fn started_as_own(since: u64) -> bool {
    /// What `/proc/PID/stat` counts in, ns (`USER_HZ`).
    const TICK_NS: u64 = 10_000_000;
    if since == 0 {
        return true;
    }
    // SAFETY: a helper without preconditions.
    let task = unsafe { bpf_get_current_task() };
    let leader: Addr = kernel::probe(task + u64::from(constant!(OFFSETS.task_leader)));
    let start: u64 = kernel::probe(leader + u64::from(constant!(OFFSETS.task_start)));
    start / TICK_NS == since
}

/// The bits of a device; 0 if it is not watched.
#[inline(always)]
pub fn device_bits(dev: u32) -> u32 {
    let one = constant!(SETTINGS.one_dev);
    if one != 0 {
        return if dev == one {
            constant!(SETTINGS.one_dev_flags)
        } else {
            0
        };
    }
    match DEVICES.get_ptr(&dev) {
        // SAFETY: a map value pointer that was just checked.
        Some(bits) => unsafe { *bits },
        None => 0,
    }
}

#[inline(always)]
pub fn is_root(dev: u32, ino: u64) -> bool {
    ROOTS
        .get_ptr(&RootKey {
            dev,
            reserved: 0,
            ino,
        })
        .is_some()
}

/// Follows a dentry's ancestors up to a share's root. `dentry` has an inode.
#[inline(always)]
pub fn place<S: Site>(site: &S, dentry: Addr, sb: Addr, dev: u32, bits: u32) -> Place {
    let sb_root = kernel::sb_root(site, sb);
    if bits & device::WHOLE != 0 {
        return if dentry == sb_root {
            Place::Root
        } else {
            Place::Inside
        };
    }
    let mut at = dentry;
    for level in 0..MAX_DEPTH {
        let ino = kernel::inode_ino(site, kernel::dentry_inode(site, at));
        if is_root(dev, ino) {
            return if level == 0 { Place::Root } else { Place::Inside };
        }
        let parent = kernel::dentry_parent(site, at);
        if parent == at {
            // A dentry without a path (opened by handle, as nfsd does) has
            // only itself above it: it may be beneath a share.
            return if at == sb_root {
                Place::Outside
            } else {
                Place::Inside
            };
        }
        at = parent;
    }
    Place::Inside
}

/// Directories whose place is remembered; a power of two.
pub const PLACES_KEPT: u32 = 4096;

/// A directory at a moment between two moves, as one word: a slot is read and
/// written in one step, and two directories that share a slot differ in it. The
/// lowest bit is free.
#[derive(Clone, Copy)]
pub struct DirAt {
    slot: u64,
    mark: u64,
}

impl DirAt {
    /// No directory. No `Option`: Linux 5.10 refuses a program that copies the
    /// unused part of one.
    pub const NONE: Self = Self { slot: 0, mark: 0 };
}

/// The directory that a file's name is in. It is asked for before looking: a
/// directory that moves meanwhile makes the answer out of date.
#[inline(always)]
pub fn dir_at<S: Site>(site: &S, parent: Addr, dev: u32) -> DirAt {
    /// Odd, with its bits spread (from the golden ratio).
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    let moves = match MOVES.get_ptr(0) {
        // SAFETY: a live map value; others add to it.
        Some(moves) => unsafe { core::ptr::read_volatile(moves) },
        None => 0,
    };
    let inode = kernel::dentry_inode(site, parent);
    let ino = kernel::inode_ino(site, inode);
    // A number that is used again was removed before, which counts as a move.
    let which = u64::from(kernel::inode_generation(site, inode)) << 32 | u64::from(dev);
    let mut mark = (ino ^ ino >> 32).wrapping_mul(SPREAD);
    let slot = (mark >> 40) & u64::from(PLACES_KEPT - 1);
    mark = (mark ^ mark >> 32 ^ which).wrapping_mul(SPREAD);
    mark = (mark ^ mark >> 29 ^ moves).wrapping_mul(SPREAD);
    mark ^= mark >> 31;
    DirAt { slot, mark: mark | 1 }
}

/// Whether what is in the directory lies beneath a share, if that was found out
/// before.
#[inline(always)]
pub fn remembered(dir: DirAt) -> Option<bool> {
    if dir.mark == 0 {
        return None;
    }
    // SAFETY: a live map value, written whole.
    let kept = unsafe { core::ptr::read_volatile(PLACES.get_ptr(dir.slot as u32)?) };
    if kept | 1 == dir.mark {
        Some(kept & 1 == 1)
    } else {
        None
    }
}

/// Remembers it.
#[inline(always)]
pub fn remember(dir: DirAt, inside: bool) {
    if dir.mark != 0
        && let Some(kept) = PLACES.get_ptr_mut(dir.slot as u32)
    {
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(kept, dir.mark & !1 | u64::from(inside)) };
    }
}

/// A directory may have moved, or its number become free.
#[inline(always)]
pub fn forget_places() {
    if let Some(moves) = MOVES.get_ptr_mut(0) {
        count::add_one(moves);
    }
}
