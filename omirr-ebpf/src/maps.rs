//! Maps, and the settings that the loader patches in.

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    macros::map,
    maps::{Array, HashMap, PerfEventByteArray, RingBuf},
};
use omirr_common::{
    counters::{Control, Counters},
    dirty::{Call, Dirty, DirtyKey},
    event::{Frame, FrameKey},
    hooks::HOOK_COUNT,
    identity::{Mark, RootKey},
    settings::{AllSlots, Offsets, Settings, Slots},
};

#[unsafe(no_mangle)]
pub static SETTINGS: Global<Settings> = Global::new(Settings {
    transport: 0,
    one_dev: 0,
    one_dev_flags: 0,
    merge: 0,
});

#[unsafe(no_mangle)]
pub static OFFSETS: Global<Offsets> = Global::new(Offsets::UNKNOWN);

#[unsafe(no_mangle)]
pub static SLOTS: Global<AllSlots> = Global::new(AllSlots([Slots::UNKNOWN; HOOK_COUNT]));

/// Watched devices and what is known of them.
#[map]
pub static DEVICES: HashMap<u32, u32> = HashMap::with_max_entries(1024, 0);

/// The shares' root inodes.
#[map]
pub static ROOTS: HashMap<RootKey, u32> = HashMap::with_max_entries(1024, 0);

/// Renames between entry and exit, and records being built. A value belongs to
/// one thread, so a program that is preempted keeps its own.
#[map]
pub static FRAMES: HashMap<FrameKey, Frame> = HashMap::with_max_entries(1024, 0);

/// Operations between entry and exit, where an exit program does not see the
/// arguments (kprobe).
#[map]
pub static CALLS: HashMap<FrameKey, Call> = HashMap::with_max_entries(8192, 0);

/// What changed and has not been taken. Sized by the loader.
#[map]
pub static DIRTY: HashMap<DirtyKey, Dirty> = HashMap::with_max_entries(1, 0);

/// Directories to be compared with the index, because there was no room to say
/// more. Sized by the loader.
#[map]
pub static DIRS: HashMap<DirtyKey, u32> = HashMap::with_max_entries(1, 0);

/// By processor; sized by the loader, which reads it as memory.
#[map]
pub static COUNTERS: Array<Counters> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Written by the user side, as memory.
#[map]
pub static CONTROL: Array<Control> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// What the user side remembers for as long as the programs stay.
#[map]
pub static MARKS: HashMap<RootKey, Mark> = HashMap::with_max_entries(1024, 0);

/// Sized by the loader; the one that is not used is kept at its smallest.
#[map]
pub static RING: RingBuf = RingBuf::with_byte_size(4096, 0);

#[map]
pub static PERF: PerfEventByteArray = PerfEventByteArray::new(0);

/// Reads one member of a patched global.
macro_rules! constant {
    ($global:ident.$($member:tt)+) => {{
        // SAFETY: the pointer is derived from a live static of that type; the
        // read is volatile because the loader changes the value after the
        // compiler has seen it.
        unsafe { core::ptr::read_volatile(&raw const (*(&raw const $crate::maps::$global).cast::<crate::maps::types::$global>()).$($member)+) }
    }};
}
pub(crate) use constant;

/// The types of the globals under the names of the globals, for [`constant`].
#[allow(
    non_camel_case_types,
    clippy::upper_case_acronyms,
    reason = "named like the statics they describe"
)]
pub mod types {
    pub type SETTINGS = omirr_common::settings::Settings;
    pub type OFFSETS = omirr_common::settings::Offsets;
    pub type SLOTS = omirr_common::settings::AllSlots;
}
