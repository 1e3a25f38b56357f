//! Keys, TLS and connections between nodes.
//!
//! In: addresses, this node's key, the keys of its peers. Out: connections that
//! carry messages to and from exactly the peer that was meant, or an error in
//! plain words that names the other side and the way out. What the messages say
//! is not looked at here, and no file but the key's is touched.
//!
//! - [`key`]: a node's key pair, its file, its public key as people see it.
//! - `tls`: TLS 1.3 with raw public keys (RFC 7250), pinned on both sides.
//! - `dial`, `handshake`: from an address to a connection.
//! - [`connection`]: messages over one connection.
//! - `link`: how fast a connection is.
//! - [`listener`]: the sockets that peers dial, and how they are let in.

pub mod connection;
mod dial;
mod error;
mod handshake;
pub mod key;
mod link;
pub mod listener;
mod tls;
mod turns;

pub use connection::{Connection, Reader, Writer};
pub use dial::dial;
pub use error::NetError;
pub use handshake::check_protocol;
pub use key::{Identity, KeyError, PublicKey};
pub use listener::{Incoming, Known, Listener, accept};
pub use turns::Limit;

use std::time::Duration;

/// From the first byte to the greeting; a peer takes milliseconds.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
