//! From a dentry to a record in the ring.
//!
//! A record is built in a map entry that belongs to the thread and the hook,
//! not on the stack (512 bytes are too few for two names) and not in a
//! per-processor scratch value (a preempted program would find another's data
//! in it). For operations with two programs it lives from entry to exit.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_CURRENT_CPU, BPF_RB_AVAIL_DATA},
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_get_smp_processor_id, bpf_ktime_get_ns,
        generated::{
            bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_perf_event_output, bpf_probe_read_kernel,
            bpf_ringbuf_output,
        },
    },
};
use core::{arch::asm, ffi::c_void, mem::MaybeUninit};
use omirr_common::{
    counters::Counters,
    event::{Frame, FrameKey, HEADER_BYTES, NAME_MAX, NAME_SPACE, TO_OFFSET, flag, op},
    hooks::HOOK_COUNT,
    identity::device,
    settings::transport,
};

use crate::{
    kernel::{self, Addr, Site, Untyped},
    maps::{COUNTERS, FRAMES, HITS, PERF, RING, constant},
    scope::{self, Place},
};

/// How long a frame is needed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Within this program.
    Program,
    /// Until the function returns, in this thread.
    Operation,
}

/// What a hook found out about a change.
#[derive(Clone, Copy)]
pub struct Change {
    pub hook: u8,
    pub op: u8,
    /// The name that the change is about.
    pub dentry: Addr,
    /// The changed inode; 0: it does not exist yet, judge by the parent.
    pub inode: Addr,
    /// Rename, exchange, link: the other name.
    pub to: Addr,
    /// Kept for the hook's second half.
    pub aux: u64,
    /// The hook lies above the filesystem's own write, which is hooked.
    pub above_funnel: bool,
}

static EMPTY: MaybeUninit<Frame> = MaybeUninit::zeroed();

#[inline(always)]
pub fn key(hook: u8, life: Life) -> FrameKey {
    let processor = match life {
        Life::Program => (u64::from(processor()) + 1) << 8,
        Life::Operation => 0,
    };
    FrameKey {
        pid_tgid: bpf_get_current_pid_tgid(),
        hook: u64::from(hook) | processor,
    }
}

#[inline(always)]
fn count(which: impl Fn(*mut Counters) -> *mut u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(processor()) {
        add_one(which(counters));
    }
}

/// Adds atomically, because a program may be preempted by another on the same
/// processor. The target has no atomics in the language.
#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: callers pass a live map value.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) 1u64, options(nostack)) };
}

/// Judges a change and, if it is to be reported, opens its frame and fills in
/// all that is known now.
#[inline(always)]
pub fn open<S: Site>(site: &S, change: &Change, life: Life) -> Option<*mut Frame> {
    let known = change.inode != 0;
    let judged = if known {
        change.inode
    } else {
        kernel::dentry_inode(site, kernel::dentry_parent(site, change.dentry))
    };
    // The device first: it is all that a change elsewhere costs.
    let sb = kernel::inode_sb(site, judged);
    let dev = kernel::sb_dev(site, sb);
    let bits = scope::device_bits(dev);
    if bits == 0 || (change.above_funnel && bits & device::FUNNEL != 0) {
        return None;
    }
    let own = scope::is_own();
    if own && change.op != op::ATTR {
        return None;
    }
    let parent = kernel::dentry_parent(site, change.dentry);
    let parent_inode = kernel::dentry_inode(site, parent);
    let mode = if known {
        kernel::inode_mode(site, change.inode)
    } else {
        0
    };
    let is_dir = mode & 0xf000 == 0x4000;
    let ino = if known {
        kernel::inode_ino(site, change.inode)
    } else {
        0
    };
    // A file that lives, by a name that is not its own: an `O_TMPFILE` file that
    // was linked since (overlayfs copies files up that way), one of which
    // another name was taken away, or overlayfs's name of a file beneath (up to
    // Linux 6.6). Its own name is asked of the inode.
    let astray = known
        && !is_dir
        && change.to == 0
        && kernel::inode_nlink(site, change.inode) > 0
        && (kernel::dentry_hashed(site, change.dentry) == 0
            || kernel::dentry_inode(site, change.dentry) != change.inode);
    let untyped = &Untyped(site);
    let mut living = 0;
    if astray {
        living = kernel::inode_dentry(change.inode);
        if living != 0 && kernel::dentry_hashed(untyped, living) == 0 {
            living = 0;
        }
    }
    let mut place = if living != 0 {
        scope::place(untyped, living, sb, dev, bits)
    } else if astray {
        // Nobody here knows: the listener asks its index.
        Place::Inside
    } else {
        scope::place(site, if known { change.dentry } else { parent }, sb, dev, bits)
    };
    if place == Place::Outside && change.to != 0 {
        place = scope::place(site, kernel::dentry_parent(site, change.to), sb, dev, bits);
        if place == Place::Root {
            place = Place::Inside;
        }
    }
    if place == Place::Outside {
        // Another name of the same file may be beneath a share.
        if !known || is_dir || kernel::inode_nlink(site, change.inode) < 2 {
            return None;
        }
        place = Place::Inside;
    }
    let at_root = known && place == Place::Root;
    // Of its own changes only the marker of a barrier passes.
    if own && !at_root {
        return None;
    }

    if let Some(hits) = HITS.get_ptr_mut(processor() * HOOK_COUNT as u32 + u32::from(change.hook)) {
        add_one(hits);
    }
    let frame_key = key(change.hook, life);
    if life == Life::Operation && FRAMES.get_ptr(&frame_key).is_some() {
        // The exit of this thread's last operation was not seen: the number of
        // return probes that can be pending at once is limited. It may have
        // happened, so it is told now.
        count(|c| unsafe { &raw mut (*c).stale });
        if let Some(stale) = FRAMES.get_ptr_mut(&frame_key) {
            send(site, stale);
        }
    }
    // SAFETY: zeros are a value of `Frame`.
    let empty: &Frame = unsafe { &*EMPTY.as_ptr() };
    if FRAMES.insert(&frame_key, empty, u64::from(BPF_ANY)).is_err() {
        count(|c| unsafe { &raw mut (*c).unframed });
        return None;
    }
    let frame = FRAMES.get_ptr_mut(&frame_key)?;
    // SAFETY: a live map value that only this thread uses.
    let header = unsafe { &mut (*frame).record.header };
    header.time_ns = now();
    header.op = change.op;
    header.hook = change.hook;
    header.dev = dev;
    header.pid = (frame_key.pid_tgid >> 32) as u32;
    header.uid = bpf_get_current_uid_gid() as u32;
    // SAFETY: a helper without preconditions.
    header.cgroup = unsafe { bpf_get_current_cgroup_id() };
    header.ino = ino;
    if known {
        header.generation = kernel::inode_generation(site, change.inode);
    }
    let mut flags = 0;
    if is_dir {
        flags |= flag::DIR;
    }
    if own {
        flags |= flag::OWN;
    }
    if at_root {
        flags |= flag::AT;
        header.parent = ino;
    } else if astray {
        if living != 0 {
            flags |= flag::AT;
            let parent = kernel::dentry_parent(untyped, living);
            header.parent = kernel::inode_ino(untyped, kernel::dentry_inode(untyped, parent));
            header.name_len = copy_name(untyped, living, frame, HEADER_BYTES);
        }
    } else if parent != change.dentry {
        flags |= flag::AT;
        header.parent = kernel::inode_ino(site, parent_inode);
        header.name_len = copy_name(site, change.dentry, frame, HEADER_BYTES);
    }
    if change.to != 0 {
        flags |= flag::TO;
        let to_parent = kernel::dentry_parent(site, change.to);
        header.to_parent = kernel::inode_ino(site, kernel::dentry_inode(site, to_parent));
        header.to_len = copy_name(site, change.to, frame, TO_OFFSET);
    }
    header.flags = flags;
    // Straight into place: through a value of its own the compiler calls a
    // `memset`, and a tracing program with a function in it crashes Linux 5.10
    // at its first load from a bad address (its table of such loads is lost).
    // SAFETY: the helper writes the 16 bytes that it is given.
    unsafe { bpf_get_current_comm((&raw mut header.comm).cast(), size_of_val(&header.comm) as u32) };
    // SAFETY: as above.
    unsafe { (*frame).aux = change.aux };
    Some(frame)
}

#[inline(always)]
fn processor() -> u32 {
    // SAFETY: a helper without preconditions.
    unsafe { bpf_get_smp_processor_id() }
}

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: a helper without preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// Bounds a length in a way that the optimiser cannot reason away and the
/// verifier sees.
#[inline(always)]
fn bounded(len: u32) -> u64 {
    let mut len = u64::from(if len > NAME_MAX as u32 {
        NAME_MAX as u32
    } else {
        len
    });
    // SAFETY: one arithmetic instruction on a register.
    unsafe { asm!("{0} &= 255", inout(reg) len, options(nomem, nostack)) };
    len
}

#[inline(always)]
fn copy_name<S: Site>(site: &S, dentry: Addr, frame: *mut Frame, offset: usize) -> u16 {
    let len = bounded(kernel::dentry_name_len(site, dentry));
    let name = kernel::dentry_name(site, dentry);
    // SAFETY: `offset` is where one of the two names begins, and `len` is less
    // than the space of a name.
    let failed = unsafe {
        bpf_probe_read_kernel(
            frame.byte_add(offset).cast::<c_void>(),
            len as u32,
            name as *const c_void,
        )
    };
    if failed == 0 { len as u16 } else { 0 }
}

/// Sends the frame's record with the time of now.
#[inline(always)]
pub fn send<S: Site>(site: &S, frame: *mut Frame) {
    // SAFETY: a live map value that only this thread uses.
    let header = unsafe { &mut (*frame).record.header };
    let mut len = if header.flags & flag::TO != 0 {
        TO_OFFSET as u64 + bounded(u32::from(header.to_len))
    } else {
        HEADER_BYTES as u64 + bounded(u32::from(header.name_len))
    };
    const { assert!(TO_OFFSET + NAME_SPACE < 1024) };
    // SAFETY: one arithmetic instruction on a register.
    unsafe { asm!("{0} &= 1023", inout(reg) len, options(nomem, nostack)) };
    if len > size_of::<omirr_common::event::Record>() as u64 {
        return;
    }
    header.time_ns = now();
    let failed = if constant!(SETTINGS.transport) == transport::PERF {
        // SAFETY: the map is a perf event array, the record is `len` bytes of
        // a map value.
        unsafe {
            bpf_perf_event_output(
                site.context(),
                (&raw const PERF).cast_mut().cast(),
                u64::from(BPF_F_CURRENT_CPU as u32),
                frame.cast(),
                len,
            )
        }
    } else {
        // SAFETY: the map is a ring buffer, the record is `len` bytes of a
        // map value.
        unsafe { bpf_ringbuf_output((&raw const RING).cast_mut().cast(), frame.cast(), len, 0) }
    };
    if failed < 0 {
        count(|c| unsafe { &raw mut (*c).dropped });
        return;
    }
    count(|c| unsafe { &raw mut (*c).submitted });
    if constant!(SETTINGS.transport) == transport::RING {
        let waiting = RING.query(u64::from(BPF_RB_AVAIL_DATA));
        if let Some(counters) = COUNTERS.get_ptr_mut(processor()) {
            // SAFETY: a live map value; a lost update costs a little accuracy.
            unsafe {
                if waiting > (*counters).high_water {
                    (*counters).high_water = waiting;
                }
            }
        }
    }
}
