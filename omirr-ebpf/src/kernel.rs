//! Reading the kernel: the only raw loads.
//!
//! A [`Site`] is where a program stands. At an `fentry`/`fexit` site arguments
//! are typed pointers and a plain load is followed by the verifier and faults
//! safely; at a kprobe site each load goes through a helper. Either way a load
//! from a bad address is 0, so an address of 0 leads to zeros, never to a fault.

use aya_ebpf::{
    EbpfContext,
    helpers::generated::bpf_probe_read_kernel,
    programs::{FEntryContext, FExitContext, ProbeContext, RetProbeContext},
};
use core::{arch::asm, ffi::c_void, mem::MaybeUninit};
use omirr_common::settings::Slots;

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

/// Keeps a context load where it is: two loads that are merged into one with a
/// computed offset are refused by the verifier ("modified ctx ptr"). The text
/// differs per argument, so the compiler cannot take two of them for one.
macro_rules! pinned {
    ($number:literal, $value:expr) => {{
        let mut value: u64 = $value;
        // SAFETY: no instruction, only a comment.
        unsafe { asm!(concat!("// argument ", $number, " in {value}"), value = inout(reg) value, options(nomem, nostack, preserves_flags)) };
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
                match n {
                    0 => pinned!("0", self.arg(0)),
                    1 => pinned!("1", self.arg(1)),
                    2 => pinned!("2", self.arg(2)),
                    3 => pinned!("3", self.arg(3)),
                    4 => pinned!("4", self.arg(4)),
                    5 => pinned!("5", self.arg(5)),
                    6 => pinned!("6", self.arg(6)),
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

impl Site for ProbeContext {
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }

    #[inline(always)]
    fn arg(&self, n: u8) -> u64 {
        match n {
            0 => pinned!("0", self.arg(0).unwrap_or(0)),
            1 => pinned!("1", self.arg(1).unwrap_or(0)),
            2 => pinned!("2", self.arg(2).unwrap_or(0)),
            3 => pinned!("3", self.arg(3).unwrap_or(0)),
            4 => pinned!("4", self.arg(4).unwrap_or(0)),
            5 => pinned!("5", self.arg(5).unwrap_or(0)),
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

    /// A return probe has no arguments.
    fn arg(&self, _: u8) -> u64 {
        0
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
        bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, addr as *const c_void);
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

members! {
    file_dentry: Addr = file_dentry;
    file_inode: Addr = file_inode;
    file_mode: u32 = file_mode;
    dentry_parent: Addr = dentry_parent;
    dentry_inode: Addr = dentry_inode;
    dentry_name_len: u32 = dentry_name_len;
    dentry_name: Addr = dentry_name;
    inode_mode: u16 = inode_mode;
    inode_sb: Addr = inode_sb;
    inode_ino: u64 = inode_ino;
    inode_generation: u32 = inode_generation;
    inode_nlink: u32 = inode_nlink;
    sb_dev: u32 = sb_dev;
    sb_root: Addr = sb_root;
    kiocb_file: Addr = kiocb_file;
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
}
