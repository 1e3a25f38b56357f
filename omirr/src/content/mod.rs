//! What is in files: hashes, chunks, and content on its way in pieces.
//!
//! In: readers, files, the parts that a peer sent. Out: hashes, lists of chunks,
//! parts to send, bytes written to a sink. Everything here blocks and belongs on
//! a blocking thread; nothing here knows paths, shares or connections.
//!
//! - [`whole`]: the hash that names a content, in which holes cost nothing.
//! - [`leaves`]: what that hash is made of, to compare large contents by.
//! - [`patch`]: a content as its difference from one that the receiver has.
//! - [`hash`]: that of whole files.
//! - [`sketch`]: which contents are alike, so that one can be sent as its
//!   difference from another.
//! - [`chunks`]: content-defined chunks, which tell what two versions share.
//! - [`send`]: a file as parts, with holes and with what the receiver has.
//! - [`receive`]: parts as a file, checked against what was announced.

pub mod chunks;
pub mod hash;
pub mod leaves;
pub mod patch;
pub mod receive;
pub mod send;
pub mod sketch;
pub mod whole;

pub use chunks::{Chunk, ChunkId, ChunkSize, chunk_list};
pub(crate) use hash::{Hashed, hash_again, hash_while};
pub use hash::{hash_bytes, hash_file};
pub use leaves::{LEAVES_MAX, Leaves};
pub use receive::{AssembleError, Assembler, OwnChunks, Sink};
pub use send::{SendError, Source, send_content};
pub use whole::Hasher;

/// Runs of zeros of at least this many bytes, aligned to as many, travel as
/// holes and take no blocks at the receiver.
pub const HOLE_BYTES: usize = 64 << 10;

static ZEROS: [u8; HOLE_BYTES] = [0; HOLE_BYTES];

fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(ZEROS.len())
        .all(|block| *block == ZEROS[..block.len()])
}

#[cfg(test)]
mod tests;
