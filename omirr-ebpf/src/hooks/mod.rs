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

use aya_ebpf::programs::RetProbeContext;
use omirr_common::{
    dirty::Call,
    event::{Header, flag, op},
    settings::Slots,
};

use crate::{
    count::{self, count},
    dirty,
    emit::{self, Bytes, Change, Known, Life},
    kernel::{self, SavedSite, Site},
    maps::{CALLS, FRAMES},
    scope,
};

pub trait Hook {
    const ID: u8;

    /// What the call is about; none if it is not a change. `ret`: what the
    /// function returned, 0 at its entry.
    fn change<S: Site>(site: &S, slots: Slots, ret: u64) -> Option<Change>;

    /// Whether what the function returned means that it happened.
    #[inline(always)]
    fn succeeded(ret: u64, _slots: Slots) -> bool {
        ret as i32 == 0
    }

    /// Whether it may have happened in part, though what was returned is an error.
    #[inline(always)]
    fn half_done<S: Site>(_site: &S, _slots: Slots, _ret: u64) -> bool {
        false
    }

    /// The bytes written, from and up to.
    #[inline(always)]
    fn range<S: Site>(_site: &S, _slots: Slots, _ret: u64) -> Bytes {
        Bytes::UNKNOWN
    }

    /// The same of a function whose arguments are gone by then.
    #[inline(always)]
    fn ended_half_done(_ret: u64) -> bool {
        false
    }

    /// Adds what only the end of a function tells whose entry was told of.
    #[inline(always)]
    fn finish(_header: &mut Header, _ret: u64) {}
}

/// One program, at the function's entry; the change has already happened.
#[inline(always)]
fn at_entry<H: Hook, S: Site>(site: &S) {
    let slots = kernel::slots(H::ID);
    tell::<H, S>(site, slots, 0);
}

/// At the function's exit, with the arguments at hand.
#[inline(always)]
fn at_exit<H: Hook, S: Site>(site: &S, ret: u64) {
    let slots = kernel::slots(H::ID);
    let whole = H::succeeded(ret, slots);
    if !whole && !H::half_done(site, slots, ret) {
        return;
    }
    let Some(change) = H::change(site, slots, ret) else {
        return;
    };
    if let Some(target) = emit::target(site, &change) {
        // Where an error left off, nobody says.
        let range = if whole {
            H::range(site, slots, ret)
        } else {
            Bytes::UNKNOWN
        };
        emit::report(site, &change, &target, range);
    }
}

#[inline(always)]
fn tell<H: Hook, S: Site>(site: &S, slots: Slots, ret: u64) {
    let Some(change) = H::change(site, slots, ret) else {
        return;
    };
    if let Some(target) = emit::target(site, &change) {
        let range = H::range(site, slots, ret);
        emit::report(site, &change, &target, range);
    }
}

/// Keeps the arguments for the return probe.
#[inline(always)]
fn keep_call<H: Hook, S: Site>(site: &S) {
    let slots = kernel::slots(H::ID);
    let Some(change) = H::change(site, slots, 0) else {
        return;
    };
    let Some(target) = emit::target(site, &change) else {
        return;
    };
    if change.op != op::ATTR && emit::is_own(H::ID) {
        return;
    }
    let key = emit::key(H::ID, Life::Operation);
    if let Some(stale) = CALLS.get_ptr(&key) {
        // The exit of this thread's last operation was not seen: the number of
        // return probes that can be pending at once is limited.
        // SAFETY: a live map value that only this thread uses.
        dirty::keep_unsure(unsafe { &*stale });
    }
    let dir_of = |dentry| {
        let parent = kernel::dentry_parent(site, dentry);
        kernel::inode_ino(site, kernel::dentry_inode(site, parent))
    };
    let call = Call {
        args: [
            site.arg(0),
            site.arg(1),
            site.arg(2),
            site.arg(3),
            site.arg(4),
            site.arg(5),
        ],
        time_ns: emit::now(),
        ino: target.key.ino,
        parent: dir_of(change.dentry),
        to_parent: if change.to == 0 { 0 } else { dir_of(change.to) },
        dev: target.key.dev,
        generation: target.key.generation,
    };
    if CALLS.insert(&key, &call, 0).is_err() {
        dirty::keep_unsure(&call);
        count(|c| unsafe { &raw mut (*c).unframed });
    }
}

/// The return probe of a call whose arguments were kept.
#[inline(always)]
fn end_call<H: Hook>(context: RetProbeContext) {
    let key = emit::key(H::ID, Life::Operation);
    let Some(call) = CALLS.get_ptr(&key) else {
        return;
    };
    // SAFETY: a live map value that only this thread uses.
    let args = unsafe { (*call).args };
    // Gone already is as good as removed.
    let _ = CALLS.remove(&key);
    let ret = context.ret();
    at_exit::<H, _>(&SavedSite { context, args }, ret);
}

/// The first of two programs: takes down what names the change.
#[inline(always)]
fn enter<H: Hook, S: Site>(site: &S) {
    let slots = kernel::slots(H::ID);
    let Some(change) = H::change(site, slots, 0) else {
        return;
    };
    if let Some(target) = emit::target(site, &change) {
        let frame = emit::open(site, &change, &target, Life::Operation, Known::NOTHING);
        if let Some(frame) = frame {
            emit::set_range(frame, H::range(site, slots, 0));
            // Whoever is told at the end was not asked then: no proof of the contrary.
            if emit::is_mapped(site, &change) == Some(true) {
                emit::add_flags(frame, flag::MAPPED);
            }
        }
    }
}

/// The second of two programs: sends what the first took down.
#[inline(always)]
fn leave<H: Hook, S: Site>(site: &S, ret: u64) {
    let Some(frame) = FRAMES.get_ptr_mut(emit::key(H::ID, Life::Operation)) else {
        return;
    };
    let whole = H::succeeded(ret, kernel::slots(H::ID));
    if whole || H::ended_half_done(ret) {
        // SAFETY: a live map value that only this thread uses.
        let header = unsafe { &mut (*frame).record.header };
        if whole {
            H::finish(header, ret);
        } else {
            header.flags &= !flag::RANGE;
        }
        if header.flags & flag::DIR != 0 || header.op == op::EXCHANGE {
            scope::forget_places();
        }
        count::hit(H::ID, false);
        emit::send(site, frame);
    }
    emit::close(H::ID, Life::Operation);
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

/// The kprobe flavour of a hook whose arguments are still right at exit.
macro_rules! probe_programs {
    ($hook:ty, $kprobe:ident, $kretprobe:ident) => {
        #[aya_ebpf::macros::kprobe]
        fn $kprobe(ctx: aya_ebpf::programs::ProbeContext) -> u32 {
            $crate::hooks::keep_call::<$hook, _>(&ctx);
            0
        }

        #[aya_ebpf::macros::kretprobe]
        fn $kretprobe(ctx: aya_ebpf::programs::RetProbeContext) -> u32 {
            $crate::hooks::end_call::<$hook>(ctx);
            0
        }
    };
}

/// Programs of a hook whose arguments are still right at exit.
macro_rules! exit_programs {
    ($hook:ty, $fexit:ident, $kprobe:ident, $kretprobe:ident) => {
        #[aya_ebpf::macros::fexit]
        fn $fexit(ctx: aya_ebpf::programs::FExitContext) -> i32 {
            let ret = $crate::kernel::Site::arg(
                &ctx,
                $crate::kernel::slots(<$hook as $crate::hooks::Hook>::ID).ret,
            );
            $crate::hooks::at_exit::<$hook, _>(&ctx, ret);
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

pub(crate) use {around_programs, entry_programs, exit_programs, probe_programs};
