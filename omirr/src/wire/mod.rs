//! Messages between nodes and their bytes.
//!
//! In: bytes from a connection, or messages to send. Out: messages that have
//! been checked, or bytes. Nothing here opens a socket or a file.

mod message;

pub use message::{Message, Part, WireRow, LIMITS, Limits, MAGIC, PROTOCOL};
