//! From a dentry to an entry in the map and a record in the ring.
//!
//! A record is built in a map entry that belongs to the thread and the hook,
//! not on the stack (512 bytes are too few for two names) and not in a
//! per-processor scratch value (a preempted program would find another's data
//! in it). For renames it lives from entry to exit.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_CURRENT_CPU, BPF_RB_AVAIL_DATA, BPF_RB_NO_WAKEUP},
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_ktime_get_ns,
        generated::{
            bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_perf_event_output, bpf_probe_read_kernel,
            bpf_ringbuf_output,
        },
    },
};
use core::{arch::asm, ffi::c_void, mem::MaybeUninit};
use omirr_common::{
    dirty::DirtyKey,
    event::{Frame, FrameKey, HEADER_BYTES, NAME_MAX, NAME_SPACE, TO_OFFSET, flag, op},
    hooks,
    identity::device,
    settings::transport,
};

use crate::{
    count::{self, count, processor},
    dirty,
    kernel::{self, Addr, Site, Untyped},
    maps::{CONTROL, FRAMES, PERF, RING, constant},
    scope::{self, DirAt, Place},
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
    /// The hook lies above a function of the filesystem's own and stays silent where
    /// that is hooked, as this bit of the device says.
    pub above: u32,
}

/// Where a change on a watched device is.
#[derive(Clone, Copy)]
pub struct Target {
    pub sb: Addr,
    pub bits: u32,
    /// The inode is 0 if it does not exist yet.
    pub key: DirtyKey,
}

/// Bytes of a file, where they are known. No `Option` of two numbers: those of a `None`
/// are not initialised, and the compiler may move them about all the same, which the
/// verifier refuses (5.10: `R0 !read_ok`).
#[derive(Clone, Copy)]
pub struct Bytes {
    pub known: bool,
    /// From this on.
    pub start: u64,
    /// Up to this.
    pub end: u64,
}

impl Bytes {
    pub const UNKNOWN: Self = Self {
        known: false,
        start: 0,
        end: 0,
    };

    #[inline(always)]
    pub fn new(start: u64, end: u64) -> Self {
        Self {
            known: true,
            start,
            end,
        }
    }
}

static EMPTY: MaybeUninit<Frame> = MaybeUninit::zeroed();

#[inline(always)]
pub fn key(hook: u8, life: Life) -> FrameKey {
    let pid_tgid = bpf_get_current_pid_tgid();
    // All idle tasks are thread 0, and an interrupt may come upon any of them.
    let processor = if life == Life::Program || pid_tgid == 0 {
        (u64::from(processor()) + 1) << 8
    } else {
        0
    };
    FrameKey {
        pid_tgid,
        hook: u64::from(hook) | processor,
    }
}

/// The change's inode, if it is on a watched device and this hook's to tell.
/// The device comes first: it is all that a change elsewhere costs.
#[inline(always)]
pub fn target<S: Site>(site: &S, change: &Change) -> Option<Target> {
    let known = change.inode != 0;
    let judged = if known {
        change.inode
    } else {
        kernel::dentry_inode(site, kernel::dentry_parent(site, change.dentry))
    };
    let sb = kernel::inode_sb(site, judged);
    let dev = kernel::sb_dev(site, sb);
    let bits = scope::device_bits(dev);
    if bits == 0 || bits & change.above != 0 {
        return None;
    }
    let (ino, generation) = if known {
        (
            kernel::inode_ino(site, change.inode),
            kernel::inode_generation(site, change.inode),
        )
    } else {
        (0, 0)
    };
    Some(Target {
        sb,
        bits,
        key: DirtyKey { ino, dev, generation },
    })
}

/// Tells of a change that has happened.
#[inline(always)]
pub fn report<S: Site>(site: &S, change: &Change, target: &Target, range: Bytes) {
    if change.op == op::RMDIR {
        scope::forget_places();
    }
    let mapped = is_mapped(site, change);
    // A write by a name that is gone, of a file that has another: whoever looks at
    // the other reads all of it.
    let loose = change.inode != 0
        && kernel::inode_nlink(site, change.inode) > 0
        && kernel::dentry_hashed(site, change.dentry) == 0;
    let range = if loose { Bytes::UNKNOWN } else { range };
    let dir = remembered_by(site, change, target);
    let inside = scope::remembered(dir);
    if inside == Some(false) {
        return;
    }
    if change.inode != 0
        && !loose
        && dirty::merges(change.op)
        && dirty::widened(site, change, &target.key, range, mapped)
    {
        count::hit(change.hook, true);
        return;
    }
    let known = Known { dir, inside };
    if let Some(frame) = open(site, change, target, Life::Program, known) {
        set_range(frame, range);
        match mapped {
            Some(true) => add_flags(frame, flag::ASKED | flag::MAPPED),
            Some(false) => add_flags(frame, flag::ASKED),
            None => {}
        }
        send(site, frame);
        close(change.hook, Life::Program);
    }
}

/// Whether someone has a file mapped to write, where it matters: at a page fault,
/// where the mapping is there, at write-back, at a close that may not be the last,
/// and at each write, since a store beside it need not be told.
#[inline(always)]
pub fn is_mapped<S: Site>(site: &S, change: &Change) -> Option<bool> {
    matches!(change.op, op::WRITE | op::FALLOCATE | op::CLOSE)
        .then(|| kernel::mapping_writable(site, kernel::inode_mapping(site, change.inode)) > 0)
}

/// What is known of a change's place.
#[derive(Clone, Copy)]
pub struct Known {
    /// The directory whose place stands for the change's.
    pub dir: DirAt,
    pub inside: Option<bool>,
}

impl Known {
    pub const NOTHING: Self = Self {
        dir: DirAt::NONE,
        inside: None,
    };
}

/// The directory that decides about a change: that of a file with one name, and
/// by that name.
#[inline(always)]
fn remembered_by<S: Site>(site: &S, change: &Change, target: &Target) -> DirAt {
    if target.bits & device::WHOLE != 0 || change.to != 0 {
        return DirAt::NONE;
    }
    if change.inode != 0 {
        let is_dir = kernel::inode_mode(site, change.inode) & 0xf000 == 0x4000;
        let is_own_name = kernel::dentry_inode(site, change.dentry) == change.inode
            && kernel::dentry_hashed(site, change.dentry) != 0;
        if is_dir || !is_own_name || kernel::inode_nlink(site, change.inode) > 1 {
            return DirAt::NONE;
        }
    }
    let parent = kernel::dentry_parent(site, change.dentry);
    // A dentry without a path is its own parent.
    if parent == change.dentry {
        DirAt::NONE
    } else {
        scope::dir_at(site, parent, target.key.dev)
    }
}

/// Whether a change that the hook sees is the daemon's own. Some hooks tell what others
/// have done, whoever runs: that an asynchronous write has ended, perhaps in an interrupt
/// upon the daemon, which writes nothing so itself; or that a file that is mapped was
/// written back, perhaps by the daemon's sync.
#[inline(always)]
pub fn is_own(hook: u8) -> bool {
    let is_of_others = matches!(
        hook,
        hooks::AIO_COMPLETE | hooks::IO_COMPLETE | hooks::DIRECT_COMPLETE | hooks::WRITE_BACK
    );
    !is_of_others && scope::is_own()
}

/// Judges a change and, if it is to be reported, opens its frame and fills in
/// all that is known now.
#[inline(always)]
pub fn open<S: Site>(
    site: &S,
    change: &Change,
    target: &Target,
    life: Life,
    judged: Known,
) -> Option<*mut Frame> {
    let known = change.inode != 0;
    let own = is_own(change.hook);
    if own && change.op != op::ATTR {
        return None;
    }
    let DirtyKey { ino, dev, generation } = target.key;
    let parent = kernel::dentry_parent(site, change.dentry);
    let parent_inode = kernel::dentry_inode(site, parent);
    let mode = if known {
        kernel::inode_mode(site, change.inode)
    } else {
        0
    };
    let is_dir = mode & 0xf000 == 0x4000;
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
    let first = if known { change.dentry } else { parent };
    let mut place = if living != 0 {
        scope::place(untyped, living, target.sb, dev, target.bits)
    } else if astray || judged.inside.is_some() {
        // Astray and without a name, nobody here knows: the listener asks its
        // index.
        Place::Inside
    } else {
        scope::place(site, first, target.sb, dev, target.bits)
    };
    if judged.inside.is_none() {
        scope::remember(judged.dir, place != Place::Outside);
    }
    if place == Place::Outside && change.to != 0 {
        place = scope::place(
            site,
            kernel::dentry_parent(site, change.to),
            target.sb,
            dev,
            target.bits,
        );
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

    // The marker of a barrier is no change.
    if life == Life::Program && !own {
        count::hit(change.hook, false);
    }
    if life == Life::Operation && (is_dir || change.op == op::EXCHANGE) {
        scope::forget_places();
    }
    let frame_key = key(change.hook, life);
    if life == Life::Operation
        && let Some(stale) = FRAMES.get_ptr_mut(&frame_key)
    {
        // The exit of this thread's last operation was not seen: the number of
        // return probes that can be pending at once is limited. It may have
        // happened, so it is told now.
        count(|c| unsafe { &raw mut (*c).stale });
        send(site, stale);
    }
    // SAFETY: zeros are a value of `Frame`.
    let empty: &Frame = unsafe { &*EMPTY.as_ptr() };
    if FRAMES.insert(&frame_key, empty, u64::from(BPF_ANY)).is_err() {
        count(|c| unsafe { &raw mut (*c).unframed });
        count(|c| unsafe { &raw mut (*c).lost });
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
    header.generation = generation;
    let mut flags = 0;
    if is_dir || matches!(change.op, op::MKDIR) {
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
    unsafe {
        (*frame).dentry = change.dentry;
        (*frame).name = dirty::name_mark(site, change.dentry);
    }
    Some(frame)
}

/// Gives a frame back.
#[inline(always)]
pub fn close(hook: u8, life: Life) {
    // Gone already is as good as removed.
    let _ = FRAMES.remove(key(hook, life));
}

#[inline(always)]
pub fn set_range(frame: *mut Frame, range: Bytes) {
    // SAFETY: a live map value that only this thread uses.
    let header = unsafe { &mut (*frame).record.header };
    if range.known {
        header.start = range.start;
        header.end = range.end;
        header.flags |= flag::RANGE;
    }
}

#[inline(always)]
pub fn add_flags(frame: *mut Frame, flags: u8) {
    // SAFETY: a live map value that only this thread uses.
    unsafe { (*frame).record.header.flags |= flags };
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

/// Sends the frame's record with the time of now, its entry made before.
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
    if header.ino != 0 && header.flags & flag::OWN == 0 && dirty::merges(header.op) {
        dirty::begin(frame);
    }
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
        let wake = wake_up(header.time_ns);
        // SAFETY: the map is a ring buffer, the record is `len` bytes of a
        // map value.
        unsafe { bpf_ringbuf_output((&raw const RING).cast_mut().cast(), frame.cast(), len, wake) }
    };
    if failed < 0 {
        if header.flags & flag::OWN == 0 {
            dirty::keep_unsent(frame);
        }
        return;
    }
    if header.flags & flag::OWN == 0 {
        count(|c| unsafe { &raw mut (*c).submitted });
    }
    if constant!(SETTINGS.transport) == transport::RING {
        count::high_water(RING.query(u64::from(BPF_RB_AVAIL_DATA)));
    }
}

/// Whether the reader must be woken: most of a watcher's cost to a writer is
/// that, and a reader that has just been here comes again by itself.
#[inline(always)]
fn wake_up(now_ns: u64) -> u64 {
    match CONTROL.get_ptr(0) {
        // SAFETY: a live map value; the user side writes it whole.
        Some(control)
            if now_ns < unsafe { core::ptr::read_volatile(&raw const (*control).quiet_until_ns) } =>
        {
            u64::from(BPF_RB_NO_WAKEUP)
        }
        _ => 0,
    }
}
