//! What `cargo xtask` is made of.
//!
//! The commands are modules of the binary's command line, one file each:
//! [`setup`], [`build`], [`run`], [`test`], [`vm`], [`lint`], [`ci`]. Beneath
//! them lie the rooms that several commands share, and that the tests use too:
//!
//! - [`workspace`]: where things are: the root, the target folder, the cache.
//! - [`shell`]: running a command so that a failure names it.
//! - [`apt`]: Debian packages: installing them, and fetching those of other
//!   releases without touching the machine's own sources.
//! - [`bpf`]: the compiler and the linker for the eBPF program.
//! - [`kernel`]: the distribution kernels that guests boot.
//! - [`guest`]: booting one of them under QEMU and running a command inside.

pub mod apt;
pub mod bench;
pub mod bpf;
pub mod build;
pub mod ci;
pub mod coverage;
pub mod fuzz;
pub mod guest;
pub mod kernel;
pub mod lint;
pub mod run;
pub mod setup;
pub mod shell;
pub mod test;
pub mod vm;
pub mod workspace;
