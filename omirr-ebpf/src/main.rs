//! The programs that watch the kernel change files.
//!
//! In: calls of the hooked functions. Out: records in the ring, counters. A
//! program takes one way: is it ours to report ([`scope`]) → what is it
//! ([`kernel`]) → widen the inode's entry ([`dirty`]), or make one and send a
//! record ([`emit`]); what finds no room stays in the map, and is counted
//! ([`count`]). The
//! [`hooks`] say which function tells what; how a function is entered (`fentry`
//! or `kprobe`) and which ring is used changes nothing in them.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod count;
mod dirty;
mod emit;
mod hooks;
mod kernel;
mod maps;
mod scope;

// The helpers that read kernel memory are given to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
