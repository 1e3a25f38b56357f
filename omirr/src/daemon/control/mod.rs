//! The control socket: how `omirr status`, `stats`, `wait`, `log` and
//! `conflicts` ask the daemon.
//!
//! A Unix socket, `control.sock` in the state directory, mode 0600. One JSON
//! object a line in both directions, any number of requests on a connection, one
//! after the other:
//!
//! ```text
//! {"cmd":"status"}                                             → {"ok":{…StatusReport…}}
//! {"cmd":"stats"}                                              → {"ok":{…StatsReport…}}
//! {"cmd":"wait","share":"www","peer":null,"timeout_ms":30000}  → {"ok":{…WaitReply…}}
//! {"cmd":"log","path":"/srv/www/a"}                            → {"ok":{…LogReport…}}
//! {"cmd":"conflicts","share":null}                             → {"ok":{…ConflictsReport…}}
//! anything else                                                → {"error":"what is wrong with it"}
//! ```
//!
//! - [`types`]: what is said; values only.
//! - [`server`]: the daemon's side, which asks a [`ControlHandler`].
//! - [`client`]: the commands' side.

pub mod client;
pub mod server;
#[cfg(test)]
mod tests;
pub mod types;

use std::path::{Path, PathBuf};

pub use self::{
    client::CallError,
    server::{Answer, ControlError, ControlHandler, bind, serve},
    types::*,
};

/// The longest line in either direction, bytes. A status with many shares has
/// some ten thousand; a request has a hundred.
pub const REPLY_BYTES_MAX: usize = 16 << 20;
pub const REQUEST_BYTES_MAX: usize = 64 << 10;

/// The control socket of a daemon with this state directory.
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("control.sock")
}
