//! omirr keeps directory trees identical on several Linux servers,
//! continuously.
//!
//! A change flows one way, and each step is a module:
//!
//! source → resolve → observe → index → send ⇒ receive → apply → index
//!
//! - [`source`]: where changes come from: the kernel, by eBPF or fanotify, or a
//!   scan of the tree.
//! - [`resolve`]: from the inodes that events name to paths beneath a share.
//! - [`observe`]: what is at a path now.
//! - [`index`]: the durable rows of a share, by path and by local sequence.
//! - [`engine`]: versions, winners, what to do with what arrived; no I/O.
//! - [`content`]: hashes and chunks.
//! - [`wire`]: messages and their bytes.
//! - [`net`]: keys, TLS, connections.
//! - [`apply`]: writing beneath a share's root.
//! - [`daemon`]: the tasks that join the rooms.
//! - `parallel`: many files at once.
//! - [`crash`]: places at which a debug build can be made to die.

pub mod apply;
pub mod cli;
pub mod config;
pub mod content;
pub mod crash;
pub mod daemon;
pub mod engine;
pub mod index;
pub mod model;
pub mod net;
pub mod observe;
mod parallel;
pub mod resolve;
pub mod source;
pub mod wire;
