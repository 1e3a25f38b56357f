//! The map of what changed and has not been taken: entries begin, are widened,
//! and are marked when the ring could not tell of them.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        generated::{bpf_get_current_cgroup_id, bpf_get_current_comm},
    },
};
use core::mem::MaybeUninit;
use omirr_common::{
    dirty::{Call, Dirty, DirtyKey, EXTENTS},
    event::{Frame, Header, flag, op},
};

use crate::{
    count::{self, count},
    emit::{Bytes, Change},
    kernel::{self, Addr, Site},
    maps::{CONTROL, DIRS, DIRTY, constant},
    scope,
};

static EMPTY: MaybeUninit<Dirty> = MaybeUninit::zeroed();

/// Whether an operation is about one inode and one name of it: such changes are
/// merged. The others move names about, and each is told in its order.
#[inline(always)]
pub fn merges(op: u8) -> bool {
    constant!(SETTINGS.merge) != 0
        && matches!(
            op,
            op::WRITE
                | op::TRUNCATE
                | op::FALLOCATE
                | op::CREATE
                | op::MKNOD
                | op::SYMLINK
                | op::UNLINK
                | op::ATTR
                | op::XATTR
                | op::CLOSE
        )
}

/// What the kernel keeps of a name: hash and length.
#[inline(always)]
pub fn name_mark<S: Site>(site: &S, dentry: Addr) -> u64 {
    u64::from(kernel::dentry_name_hash(site, dentry)) << 32 | u64::from(kernel::dentry_name_len(site, dentry))
}

/// How often entries have been taken, twice; odd while one is.
#[inline(always)]
fn takes() -> u64 {
    match CONTROL.get_ptr(0) {
        // SAFETY: a live map value; the user side writes it whole.
        Some(control) => unsafe { core::ptr::read_volatile(&raw const (*control).takes) },
        None => 1,
    }
}

/// Whether what was added to this entry since `before` was said is in it for
/// whoever takes it: nobody was taking one then, and nobody has since.
#[inline(always)]
fn is_in(entry: *mut Dirty, before: u64) -> bool {
    // SAFETY: a live map value.
    count::barrier(unsafe { &raw mut (*entry).writers });
    before & 1 == 0 && takes() == before
}

/// Widens the inode's entry, if there is one under this name. False if there is none
/// or if that may have been in vain; then the change is told by itself.
#[inline(always)]
pub fn widened<S: Site>(
    site: &S,
    change: &Change,
    key: &DirtyKey,
    range: Bytes,
    mapped: Option<bool>,
) -> bool {
    let before = takes();
    if before & 1 != 0 {
        return false;
    }
    let Some(entry) = DIRTY.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: a live map value; should it be taken and given to another inode
    // now, that one gets a mark too many.
    let dirty = unsafe { &mut *entry };
    if dirty.dentry != change.dentry || dirty.name != name_mark(site, change.dentry) {
        return false;
    }
    // What happens to the file by another name must not go with this one.
    if dirty.ops[usize::from(op::UNLINK)] != 0 && kernel::inode_nlink(site, change.inode) > 0 {
        return false;
    }
    // The marker of a barrier must arrive.
    if change.op == op::ATTR && scope::is_own() {
        return false;
    }
    let who = bpf_get_current_pid_tgid() >> 32;
    if dirty.pid != who as u32 {
        dirty.pid = who as u32;
        dirty.uid = bpf_get_current_uid_gid() as u32;
        // SAFETY: a helper without preconditions.
        dirty.cgroup = unsafe { bpf_get_current_cgroup_id() };
        // SAFETY: the helper writes the 16 bytes that it is given.
        unsafe { bpf_get_current_comm((&raw mut dirty.comm).cast(), size_of_val(&dirty.comm) as u32) };
    }
    note(dirty, change.op, range);
    if let Some(mapped) = mapped {
        dirty.asked = 1;
        if mapped {
            dirty.mapped = 1;
        }
    }
    is_in(entry, before) && DIRTY.get_ptr_mut(key) == Some(entry)
}

/// Makes the entry of a record that is about to be sent.
#[inline(always)]
pub fn begin(frame: *mut Frame) {
    // SAFETY: a live map value that only this thread uses.
    let (header, dentry, name) = unsafe { (&(*frame).record.header, (*frame).dentry, (*frame).name) };
    let key = key_of(header);
    // SAFETY: zeros are a value of `Dirty`.
    let empty: &Dirty = unsafe { &*EMPTY.as_ptr() };
    // There may be one, by now or under another name.
    let _ = DIRTY.insert(&key, empty, u64::from(BPF_NOEXIST));
    let Some(entry) = DIRTY.get_ptr_mut(&key) else {
        // No room: the record is sent all the same.
        return;
    };
    // SAFETY: as in `widened`.
    let dirty = unsafe { &mut *entry };
    dirty.parent = if header.flags & flag::AT != 0 {
        header.parent
    } else {
        0
    };
    dirty.dentry = dentry;
    dirty.name = name;
    dirty.cgroup = header.cgroup;
    dirty.pid = header.pid;
    dirty.uid = header.uid;
    copy_comm(&header.comm, &mut dirty.comm);
    let range = if header.flags & flag::RANGE != 0 {
        Bytes::new(header.start, header.end)
    } else {
        Bytes::UNKNOWN
    };
    note(dirty, header.op, range);
    if header.flags & flag::ASKED != 0 {
        dirty.asked = 1;
    }
    if header.flags & flag::MAPPED != 0 {
        dirty.mapped = 1;
    }
}

/// As two words: for an array the compiler calls a function, which these
/// programs must not have (see `emit::open`).
#[inline(always)]
fn copy_comm(from: &[u8; 16], to: &mut [u8; 16]) {
    for word in 0..2 {
        // SAFETY: both are 16 bytes long and lie at multiples of 8 in map values.
        unsafe {
            let value = core::ptr::read_volatile(from.as_ptr().cast::<u64>().add(word));
            core::ptr::write_volatile(to.as_mut_ptr().cast::<u64>().add(word), value);
        }
    }
}

#[inline(always)]
fn key_of(header: &Header) -> DirtyKey {
    DirtyKey {
        ino: header.ino,
        dev: header.dev,
        generation: header.generation,
    }
}

/// Adds an operation and its bytes.
#[inline(always)]
fn note(dirty: &mut Dirty, op: u8, range: Bytes) {
    dirty.ops[usize::from(op & 15)] = 1;
    match op {
        op::WRITE | op::FALLOCATE if range.known => add_extent(dirty, range.start, range.end),
        op::WRITE | op::FALLOCATE | op::TRUNCATE => dirty.range_unknown = 1,
        _ => {}
    }
}

#[inline(always)]
fn add_extent(dirty: &mut Dirty, start: u64, end: u64) {
    count::add_one(&raw mut dirty.writers);
    // SAFETY: a live map value; read again because others count here, too.
    if unsafe { core::ptr::read_volatile(&raw const dirty.writers) } == 1 {
        for n in 0..EXTENTS {
            let [from, to] = &mut dirty.extents[n];
            let unused = *to == 0;
            if unused || (start <= *to && end >= *from) || n == EXTENTS - 1 {
                if unused || start < *from {
                    *from = start;
                }
                if end > *to {
                    *to = end;
                }
                break;
            }
        }
    } else {
        dirty.range_unknown = 1;
    }
    count::take_one(&raw mut dirty.writers);
}

/// A record found no room: keeps what it was about where it will be found.
#[inline(always)]
pub fn keep_unsent(frame: *mut Frame) {
    // SAFETY: a live map value that only this thread uses.
    let header = unsafe { &(*frame).record.header };
    let key = key_of(header);
    if key.ino != 0 && merges(header.op) {
        let before = takes();
        // Once more: it may have been taken before this was noted.
        begin(frame);
        if let Some(entry) = DIRTY.get_ptr_mut(&key) {
            if !is_in(entry, before) {
                count(|c| unsafe { &raw mut (*c).unsure });
            }
            count(|c| unsafe { &raw mut (*c).dropped });
            return;
        }
    }
    let mut kept = header.flags & (flag::AT | flag::TO) != 0;
    if header.flags & flag::AT != 0 {
        kept &= compare_dir(header.dev, header.parent);
    }
    if header.flags & flag::TO != 0 {
        kept &= compare_dir(header.dev, header.to_parent);
    }
    if !kept {
        count(|c| unsafe { &raw mut (*c).lost });
    }
    // Last: whoever sees this count finds what was kept.
    count(|c| unsafe { &raw mut (*c).dropped });
}

/// An operation's exit was not seen. It may have happened.
#[inline(always)]
pub fn keep_unsure(call: &Call) {
    let mut kept = call.parent != 0 && compare_dir(call.dev, call.parent);
    if call.to_parent != 0 {
        kept &= compare_dir(call.dev, call.to_parent);
    }
    if !kept {
        count(|c| unsafe { &raw mut (*c).lost });
    }
    count(|c| unsafe { &raw mut (*c).stale });
}

/// False if there is no room for the directory either.
#[inline(always)]
fn compare_dir(dev: u32, ino: u64) -> bool {
    let key = DirtyKey {
        ino,
        dev,
        generation: 0,
    };
    constant!(SETTINGS.merge) != 0 && DIRS.insert(&key, &1, 0).is_ok()
}
