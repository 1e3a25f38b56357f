//! Taking out of the kernel's map what has changed.
//!
//! In: the map, and keys that records or the map itself name. Out: entries, each
//! taken once, one by one: a process that is killed in between has noted what it
//! was about to take. Whoever takes an entry looks at the inode afterwards: a
//! change in between makes a new one.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use omirr_common::dirty::{Dirty, DirtyKey};

use crate::source::{OpSet, ebpf::decode::op_of};

/// Commands of `bpf(2)`.
const LOOKUP: libc::c_long = 1;
const DELETE: libc::c_long = 3;
const GET_NEXT_KEY: libc::c_long = 4;
const LOOKUP_AND_DELETE: libc::c_long = 21;
const LOOKUP_BATCH: libc::c_long = 24;
/// Entries per call.
const PORTION: usize = 1024;
/// The kernel's `ENOTSUPP`, which user space has no name for.
const ENOTSUPP: i32 = 524;

/// `union bpf_attr` of the commands on one element.
#[repr(C)]
struct OnElement {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` of the commands on many.
#[repr(C)]
struct OnBatch {
    /// Where the last call ended, as the kernel writes it; 0 at the beginning.
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Calls `bpf(2)`.
fn call<T>(command: libc::c_long, attributes: &mut T) -> io::Result<()> {
    // SAFETY: the attributes live, are as long as said, and what they point at
    // is the caller's and as large as the map's keys and values.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The map of what changed, or the one of directories to compare.
pub struct Taker {
    map: OwnedFd,
    /// Whether the kernel can take one entry in one step (5.14).
    atomic: bool,
}

impl Taker {
    pub fn new(map: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self {
            map: map.as_fd().try_clone_to_owned()?,
            atomic: true,
        })
    }

    fn fd(&self) -> u32 {
        u32::try_from(self.map.as_raw_fd()).unwrap_or(u32::MAX)
    }

    /// Whether an entry is taken with all that it has ever held (Linux 5.14).
    pub fn is_atomic(&self) -> bool {
        self.atomic
    }

    /// Takes one entry out; none if there is none. `V` is the map's value. Below
    /// Linux 5.14 what is added to it meanwhile may not be in it.
    pub fn take<V: aya::Pod + Default>(&mut self, key: &DirtyKey) -> io::Result<Option<V>> {
        let mut value = V::default();
        let mut attributes = OnElement {
            map: self.fd(),
            padding: 0,
            key: std::ptr::from_ref(key) as u64,
            value: (&raw mut value) as u64,
            flags: 0,
        };
        if self.atomic {
            match call(LOOKUP_AND_DELETE, &mut attributes) {
                Ok(()) => return Ok(Some(value)),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
                Err(error) if matches!(error.raw_os_error(), Some(ENOTSUPP | libc::EINVAL)) => {
                    self.atomic = false;
                }
                Err(error) => return Err(error),
            }
        }
        let found = call(LOOKUP, &mut attributes);
        let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
        match found.and_then(|()| {
            attributes.value = 0;
            call(DELETE, &mut attributes)
        }) {
            Ok(()) => Ok(Some(value)),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How many entries there are, at most `limit`. Walks the map; if it changes
    /// meanwhile the number is about right.
    pub fn count(&self, limit: u64) -> io::Result<u64> {
        let (mut key, mut next) = ([0u64; 2], [0u64; 2]);
        let mut begun = false;
        let mut count = 0;
        while count < limit {
            let mut attributes = OnElement {
                map: self.fd(),
                padding: 0,
                key: if begun { (&raw mut key) as u64 } else { 0 },
                value: (&raw mut next) as u64,
                flags: 0,
            };
            match call(GET_NEXT_KEY, &mut attributes) {
                Ok(()) => count += 1,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(count),
                Err(error) => return Err(error),
            }
            key = next;
            begun = true;
        }
        Ok(count)
    }

    /// Everything that is in the map for as long as this looks. `V` is the map's
    /// value.
    pub fn all<V: aya::Pod + Default>(&self) -> io::Result<Vec<(DirtyKey, V)>> {
        let empty = DirtyKey {
            ino: 0,
            dev: 0,
            generation: 0,
        };
        let mut all = Vec::new();
        let (mut place, mut next) = ([0u64; 2], [0u64; 2]);
        let mut portion = PORTION;
        let mut begun = false;
        loop {
            let mut keys = vec![empty; portion];
            let mut values = vec![V::default(); portion];
            let mut attributes = OnBatch {
                in_batch: if begun { (&raw mut place) as u64 } else { 0 },
                out_batch: (&raw mut next) as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: u32::try_from(portion).unwrap_or(u32::MAX),
                map: self.fd(),
                element_flags: 0,
                flags: 0,
            };
            let result = call(LOOKUP_BATCH, &mut attributes);
            let last = match &result {
                Ok(()) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                // One bucket of the map holds more.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    portion *= 2;
                    continue;
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                Err(_) => return result.map(|()| all),
            };
            let count = (attributes.count as usize).min(portion);
            all.extend(keys.into_iter().zip(values).take(count));
            if last {
                return Ok(all);
            }
            place = next;
            begun = true;
        }
    }
}

/// The operations that an entry has seen.
pub fn ops(dirty: &Dirty) -> OpSet {
    let mut set = OpSet::default();
    for (number, seen) in (0u8..).zip(dirty.ops) {
        if seen != 0
            && let Some(op) = op_of(number)
        {
            set.insert(op);
        }
    }
    set
}

/// While it lives, no ordinary thread runs in this one's place. A system call on
/// a map keeps kprobe programs from running on its processor
/// (`bpf_disable_instrumentation`), so on a kernel that preempts itself a change
/// that another thread makes meanwhile would go unseen.
pub struct Undisturbed(());

impl Undisturbed {
    /// Does nothing where it is not allowed: then such a change is counted as
    /// passed over, and the tree is compared.
    pub fn begin() -> Undisturbed {
        Undisturbed::schedule(libc::SCHED_FIFO, 1);
        Undisturbed(())
    }

    fn schedule(policy: libc::c_int, priority: libc::c_int) {
        // SAFETY: zeros are a value of the struct, which may have more members
        // elsewhere.
        let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
        parameters.sched_priority = priority;
        // SAFETY: the parameters live; 0 is the calling thread.
        unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    }
}

impl Drop for Undisturbed {
    fn drop(&mut self) {
        Undisturbed::schedule(libc::SCHED_OTHER, 0);
    }
}
