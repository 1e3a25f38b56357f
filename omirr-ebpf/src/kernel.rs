//! Reading the kernel: the only raw loads.
//!
//! A [`Site`] is where a program stands. At an `fentry`/`fexit` site arguments
//! are typed pointers and a plain load is followed by the verifier and faults
//! safely; at a kprobe site each load goes through a helper. Either way a load
//! from a bad address is 0, so an address of 0 leads to zeros, never to a fault.

use aya_ebpf::{
    EbpfContext,
    bindings::pt_regs,
    helpers::generated::bpf_probe_read_kernel,
    programs::{FEntryContext, FExitContext, ProbeContext, RetProbeContext},
};
use core::{
    arch::asm,
    ffi::c_void,
    mem::{MaybeUninit, offset_of},
};
use omirr_common::settings::{ABSENT, Slots};

use crate::maps::constant;

/// A kernel address.
pub type Addr = u64;

pub trait Site {
    /// The context, for the perf helper.
    fn context(&self) -> *mut c_void;
    /// The nth argument; 0 for one that is not there.
    fn arg(&self, n: u8) -> u64;
    /// What lies at `base + offset`.
    fn load<T: Copy>(&self, base: Addr, offset: u32) -> T;
}

/// Loads one word of the context by an instruction of its own. Written in Rust,
/// the arms of a `match` would be merged into one load with a computed offset,
/// which the verifier refuses ("modified ctx ptr").
macro_rules! context_word {
    ($context:expr, $offset:expr) => {{
        let value: u64;
        // SAFETY: the offset lies inside the context; the verifier checks it.
        unsafe {
            asm!("{value} = *(u64 *)({context} + {offset})", value = out(reg) value, context = in(reg) $context,
                offset = const $offset, options(readonly, nostack, preserves_flags));
        }
        value
    }};
}

macro_rules! typed_site {
    ($context:ty) => {
        impl Site for $context {
            fn context(&self) -> *mut c_void {
                self.as_ptr()
            }

            #[inline(always)]
            fn arg(&self, n: u8) -> u64 {
                let context = self.as_ptr();
                match n {
                    0 => context_word!(context, 0),
                    1 => context_word!(context, 8),
                    2 => context_word!(context, 16),
                    3 => context_word!(context, 24),
                    4 => context_word!(context, 32),
                    5 => context_word!(context, 40),
                    6 => context_word!(context, 48),
                    _ => 0,
                }
            }

            #[inline(always)]
            fn load<T: Copy>(&self, base: Addr, offset: u32) -> T {
                // SAFETY: the verifier knows the type behind `base` and that
                // `offset` is a constant inside it; a stale pointer reads 0.
                unsafe { core::ptr::read_volatile((base + u64::from(offset)) as *const T) }
            }
        }
    };
}
typed_site!(FEntryContext);
typed_site!(FExitContext);

/// Where the registers of the first six arguments are in `pt_regs`.
#[cfg(bpf_target_arch = "x86_64")]
const REGISTERS: [usize; 6] = [
    offset_of!(pt_regs, rdi),
    offset_of!(pt_regs, rsi),
    offset_of!(pt_regs, rdx),
    offset_of!(pt_regs, rcx),
    offset_of!(pt_regs, r8),
    offset_of!(pt_regs, r9),
];
#[cfg(bpf_target_arch = "aarch64")]
const REGISTERS: [usize; 6] = {
    let first = offset_of!(pt_regs, regs);
    [first, first + 8, first + 16, first + 24, first + 32, first + 40]
};

impl Site for ProbeContext {
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }

    #[inline(always)]
    fn arg(&self, n: u8) -> u64 {
        let context = self.as_ptr();
        match n {
            0 => context_word!(context, REGISTERS[0]),
            1 => context_word!(context, REGISTERS[1]),
            2 => context_word!(context, REGISTERS[2]),
            3 => context_word!(context, REGISTERS[3]),
            4 => context_word!(context, REGISTERS[4]),
            5 => context_word!(context, REGISTERS[5]),
            _ => 0,
        }
    }

    #[inline(always)]
    fn load<T: Copy>(&self, base: Addr, offset: u32) -> T {
        probe(base + u64::from(offset))
    }
}

impl Site for RetProbeContext {
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }

    /// A return probe has no arguments of its own.
    fn arg(&self, _: u8) -> u64 {
        0
    }

    #[inline(always)]
    fn load<T: Copy>(&self, base: Addr, offset: u32) -> T {
        probe(base + u64::from(offset))
    }
}

/// A return probe, with the arguments that were kept from the entry.
pub struct SavedSite {
    pub context: RetProbeContext,
    pub args: [u64; 6],
}

impl Site for SavedSite {
    fn context(&self) -> *mut c_void {
        self.context.as_ptr()
    }

    #[inline(always)]
    fn arg(&self, n: u8) -> u64 {
        match n {
            0 => self.args[0],
            1 => self.args[1],
            2 => self.args[2],
            3 => self.args[3],
            4 => self.args[4],
            5 => self.args[5],
            _ => 0,
        }
    }

    #[inline(always)]
    fn load<T: Copy>(&self, base: Addr, offset: u32) -> T {
        probe(base + u64::from(offset))
    }
}

/// A site whose addresses have lost their types, because they are computed: every
/// load goes through the helper.
pub struct Untyped<'a, S>(pub &'a S);

impl<S: Site> Site for Untyped<'_, S> {
    fn context(&self) -> *mut c_void {
        self.0.context()
    }

    #[inline(always)]
    fn arg(&self, n: u8) -> u64 {
        self.0.arg(n)
    }

    #[inline(always)]
    fn load<T: Copy>(&self, base: Addr, offset: u32) -> T {
        probe(base + u64::from(offset))
    }
}

/// Reads through the helper: for kprobes, and for an address that has lost its
/// type because it was kept in a map.
#[inline(always)]
pub fn probe<T: Copy>(addr: Addr) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes `size_of::<T>()` bytes at the pointer, zeros
    // if the address is bad; `T` is an integer.
    unsafe {
        bpf_probe_read_kernel(
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            addr as *const c_void,
        );
        value.assume_init()
    }
}

/// Where this hook's arguments are.
#[inline(always)]
pub fn slots(hook: u8) -> Slots {
    Slots {
        a: constant!(SLOTS.0[hook as usize].a),
        b: constant!(SLOTS.0[hook as usize].b),
        c: constant!(SLOTS.0[hook as usize].c),
        d: constant!(SLOTS.0[hook as usize].d),
        ret: constant!(SLOTS.0[hook as usize].ret),
        ret_is_pointer: constant!(SLOTS.0[hook as usize].ret_is_pointer),
        reserved: [0; 2],
    }
}

macro_rules! members {
    ($( $name:ident: $kind:ty = $offset:ident; )*) => {
        $(
            #[inline(always)]
            pub fn $name<S: Site>(site: &S, base: Addr) -> $kind {
                site.load(base, constant!(OFFSETS.$offset))
            }
        )*
    };
}

/// The hash that the kernel keeps of a name: it lies before the length
/// (`struct qstr`, `HASH_LEN_DECLARE`, little-endian).
#[inline(always)]
pub fn dentry_name_hash<S: Site>(site: &S, dentry: Addr) -> u32 {
    site.load(dentry, constant!(OFFSETS.dentry_name_len) - 4)
}

members! {
    file_dentry: Addr = file_dentry;
    file_inode: Addr = file_inode;
    file_mode: u32 = file_mode;
    dentry_parent: Addr = dentry_parent;
    dentry_inode: Addr = dentry_inode;
    dentry_name_len: u32 = dentry_name_len;
    dentry_name: Addr = dentry_name;
    dentry_hashed: Addr = dentry_hashed;
    inode_mode: u16 = inode_mode;
    inode_sb: Addr = inode_sb;
    inode_ino: u64 = inode_ino;
    inode_generation: u32 = inode_generation;
    inode_nlink: u32 = inode_nlink;
    inode_mapping: Addr = inode_mapping;
    sb_dev: u32 = sb_dev;
    sb_root: Addr = sb_root;
    kiocb_file: Addr = kiocb_file;
    kiocb_pos: u64 = kiocb_pos;
    kiocb_flags: u32 = kiocb_flags;
    rename_old_dentry: Addr = rename_old_dentry;
    rename_new_dentry: Addr = rename_new_dentry;
    rename_flags: u32 = rename_flags;
    iattr_valid: u32 = iattr_valid;
    iattr_size: u64 = iattr_size;
    fault_vma: Addr = fault_vma;
    vma_file: Addr = vma_file;
    io_kiocb_file: Addr = io_kiocb_file;
    path_dentry: Addr = path_dentry;
    kiocb_complete: Addr = kiocb_complete;
    dio_iocb: Addr = dio_iocb;
    dio_flags: u32 = dio_flags;
    mapping_host: Addr = mapping_host;
    mapping_writable: i32 = mapping_writable;
}

/// How many names of an inode are looked at for one that lives.
const MAX_ALIASES: u32 = 8;

/// A name of an inode that lives, else any; 0 if the kernel holds none. The list
/// is not locked: it may be changing, and the name be another one.
#[inline(always)]
pub fn inode_dentry(inode: Addr) -> Addr {
    if constant!(OFFSETS.dentry_alias) == ABSENT {
        return 0;
    }
    let mut alias: Addr = probe(inode + u64::from(constant!(OFFSETS.inode_first_alias)));
    let mut any = 0;
    for _ in 0..MAX_ALIASES {
        if alias == 0 {
            break;
        }
        let dentry = alias - u64::from(constant!(OFFSETS.dentry_alias));
        if probe::<u64>(dentry + u64::from(constant!(OFFSETS.dentry_hashed))) != 0 {
            return dentry;
        }
        any = dentry;
        // The next of the list is what a member of it begins with.
        alias = probe(alias);
    }
    any
}
