//! What each hooked function tells, in three families, and the four ways to
//! enter one.
//!
//! A hook is written once, as a [`Hook`]; the macros at the end make its
//! programs. What is common: an operation counts when it succeeded, so what is
//! only right before it is taken down at entry, and what is only right after
//! it (the new inode, the file position) is read at exit.

mod attr;
mod data;
mod namespace;

use omirr_common::{event::Frame, settings::Slots};

use crate::{
    emit::{self, Change, Life},
    kernel::{self, Site},
    maps::FRAMES,
};

pub trait Hook {
    const ID: u8;

    /// What the call is about; none if it is not a change.
    fn change<S: Site>(site: &S, slots: Slots) -> Option<Change>;

    /// Adds what only the arguments tell.
    #[inline(always)]
    fn note<S: Site>(_site: &S, _slots: Slots, _frame: *mut Frame) {}

    /// Whether what the function returned means that it happened.
    #[inline(always)]
    fn succeeded(ret: u64, _slots: Slots) -> bool {
        ret as i32 == 0
    }

    /// Adds what is known only after the function.
    #[inline(always)]
    fn finish(_frame: *mut Frame, _ret: u64, _slots: Slots) {}
}

/// One program, at the function's entry; the change has already happened.
#[inline(always)]
fn at_entry<H: Hook, S: Site>(site: &S) {
    let slots = kernel::slots(H::ID);
    let Some(change) = H::change(site, slots) else {
        return;
    };
    if let Some(frame) = emit::open(site, &change, Life::Program) {
        H::note(site, slots, frame);
        emit::send(site, frame);
        drop_frame::<H>(Life::Program);
    }
}

/// One program, at the function's exit, with the arguments at hand.
#[inline(always)]
fn at_exit<H: Hook, S: Site>(site: &S) {
    let slots = kernel::slots(H::ID);
    let ret = site.arg(slots.ret);
    if !H::succeeded(ret, slots) {
        return;
    }
    let Some(change) = H::change(site, slots) else {
        return;
    };
    if let Some(frame) = emit::open(site, &change, Life::Program) {
        H::note(site, slots, frame);
        H::finish(frame, ret, slots);
        emit::send(site, frame);
        drop_frame::<H>(Life::Program);
    }
}

/// The first of two programs: takes down what names the change.
#[inline(always)]
fn enter<H: Hook, S: Site>(site: &S) {
    let slots = kernel::slots(H::ID);
    let Some(change) = H::change(site, slots) else {
        return;
    };
    if let Some(frame) = emit::open(site, &change, Life::Operation) {
        H::note(site, slots, frame);
    }
}

/// The second of two programs: sends what the first took down.
#[inline(always)]
fn leave<H: Hook, S: Site>(site: &S, ret: u64) {
    let Some(frame) = FRAMES.get_ptr_mut(emit::key(H::ID, Life::Operation)) else {
        return;
    };
    let slots = kernel::slots(H::ID);
    if H::succeeded(ret, slots) {
        H::finish(frame, ret, slots);
        emit::send(site, frame);
    }
    drop_frame::<H>(Life::Operation);
}

#[inline(always)]
fn drop_frame<H: Hook>(life: Life) {
    // Gone already is as good as removed.
    let _ = FRAMES.remove(emit::key(H::ID, life));
}

/// Programs of a hook that is complete at entry.
macro_rules! entry_programs {
    ($hook:ty, $fentry:ident, $kprobe:ident) => {
        #[aya_ebpf::macros::fentry]
        fn $fentry(ctx: aya_ebpf::programs::FEntryContext) -> i32 {
            $crate::hooks::at_entry::<$hook, _>(&ctx);
            0
        }

        #[aya_ebpf::macros::kprobe]
        fn $kprobe(ctx: aya_ebpf::programs::ProbeContext) -> u32 {
            $crate::hooks::at_entry::<$hook, _>(&ctx);
            0
        }
    };
}

/// The kprobe flavour of a hook that sends at exit.
macro_rules! probe_programs {
    ($hook:ty, $kprobe:ident, $kretprobe:ident) => {
        #[aya_ebpf::macros::kprobe]
        fn $kprobe(ctx: aya_ebpf::programs::ProbeContext) -> u32 {
            $crate::hooks::enter::<$hook, _>(&ctx);
            0
        }

        #[aya_ebpf::macros::kretprobe]
        fn $kretprobe(ctx: aya_ebpf::programs::RetProbeContext) -> u32 {
            let ret = ctx.ret();
            $crate::hooks::leave::<$hook, _>(&ctx, ret);
            0
        }
    };
}

/// Programs of a hook whose arguments are still right at exit.
macro_rules! exit_programs {
    ($hook:ty, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        #[aya_ebpf::macros::fexit]
        fn $fexit(ctx: aya_ebpf::programs::FExitContext) -> i32 {
            $crate::hooks::at_exit::<$hook, _>(&ctx);
            0
        }

        $crate::hooks::probe_programs!($hook, $kprobe, $kretprobe);
    };
}

/// Programs of a hook whose function destroys what names the change.
macro_rules! around_programs {
    ($hook:ty, $fentry:ident, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        #[aya_ebpf::macros::fentry]
        fn $fentry(ctx: aya_ebpf::programs::FEntryContext) -> i32 {
            $crate::hooks::enter::<$hook, _>(&ctx);
            0
        }

        #[aya_ebpf::macros::fexit]
        fn $fexit(ctx: aya_ebpf::programs::FExitContext) -> i32 {
            let ret = $crate::kernel::Site::arg(
                &ctx,
                $crate::kernel::slots(<$hook as $crate::hooks::Hook>::ID).ret,
            );
            $crate::hooks::leave::<$hook, _>(&ctx, ret);
            0
        }

        $crate::hooks::probe_programs!($hook, $kprobe, $kretprobe);
    };
}

pub(crate) use {around_programs, entry_programs, exit_programs, probe_programs};
