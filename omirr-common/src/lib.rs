//! The bytes that the kernel side and the user side of omirr share.
//!
//! In: nothing. Out: the layout of an event in the ring, of the read-only
//! settings that are patched into the programs at load, of the maps' keys and
//! values, and the one list of hooks that both sides name alike. No logic.
//! Every layout is `repr(C)` without padding, and its size is asserted, because
//! the two sides are compiled by different compilers for different machines.

#![no_std]

pub mod counters;
pub mod dirty;
pub mod event;
pub mod hooks;
pub mod identity;
pub mod settings;
