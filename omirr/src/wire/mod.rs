//! Messages between nodes and their bytes.
//!
//! In: bytes from a connection, or messages to send. Out: messages that have
//! been checked, or bytes. Nothing here opens a socket or a file.
//!
//! - `message`: what nodes say to one another.
//! - [`codec`]: values to bytes and back; the one place that knows bincode and
//!   zstd.
//! - [`frame`]: where one message ends and the next begins.
//! - `rows`: how the rows of a batch are written.
//! - `check`: whether a decoded message is one that this node may act upon.

mod check;
pub mod codec;
mod error;
pub mod frame;
mod message;
mod rows;

pub use check::MAX_HAVE;
pub use codec::{Decoder, Encoder, Pack, decode, encode, from_bytes, to_bytes};
pub use error::WireError;
pub use message::{LIMITS, Limits, MAGIC, Message, PROTOCOL, Part, WireRow};
