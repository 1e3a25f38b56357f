//! Reading a file's content and hashing it.
//!
//! In: an open file and the size that `stat` gave. Out: the BLAKE3 hash and,
//! for small files, the bytes. Whether the file kept still meanwhile is for the
//! caller to find out, except that a long read is given up early.

use std::os::fd::BorrowedFd;

use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::io::{self, Errno};

use super::stat::{sig_of, statx_fd};
use crate::content::{self, Hashed, Leaves};
use crate::model::{Hash, Sketch, StatSig};
use crate::source::Ranges;

/// Contents up to this size are handed over with the entry, so that a sender
/// need not open the file again.
pub const INLINE_MAX: u64 = 128 << 10;
/// After so many bytes a long read asks whether it is still worth going on.
const ASK_EVERY: u64 = 64 << 20;

/// What was read.
pub(super) struct Read {
    pub(super) size: u64,
    pub(super) hash: Hash,
    pub(super) content: Option<Bytes>,
    /// Of a large content.
    pub(super) sketch: Sketch,
    pub(super) leaves: Option<Leaves>,
}

/// Reads the whole file. None if it changed so much that the rest need not be
/// read: `before` is what `stat` said before.
pub(super) fn read(fd: BorrowedFd<'_>, before: &StatSig) -> io::Result<Option<Read>> {
    if before.size <= INLINE_MAX {
        read_small(fd, before)
    } else {
        read_large(fd, before)
    }
}

/// Reads what may be other than in the content that had these leaves, which was not
/// larger; none if it is better read in full.
pub(super) fn read_again(
    fd: BorrowedFd<'_>,
    before: &StatSig,
    leaves: &Leaves,
    ranges: &Ranges,
) -> io::Result<Option<Read>> {
    let leaves = content::hash_again(fd, leaves, before.size, ranges.bytes())
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(leaves.map(|leaves| Read {
        size: leaves.size(),
        hash: leaves.hash(),
        content: None,
        sketch: Sketch::default(),
        leaves: Some(leaves),
    }))
}

/// One `read` in the ordinary case: it is offered one byte more than the file
/// has, and if it returns exactly the file's size, the caller's second `stat`
/// vouches that this was all.
fn read_small(fd: BorrowedFd<'_>, before: &StatSig) -> io::Result<Option<Read>> {
    let size = usize::try_from(before.size).unwrap_or(usize::MAX);
    let mut content = Vec::with_capacity(size + 1);
    loop {
        let got = io::retry_on_intr(|| io::read(fd, spare_capacity(&mut content)))?;
        if content.len() > size {
            return Ok(None);
        }
        if got == 0 || content.len() == size {
            break;
        }
    }
    let hash = Hash(*blake3::hash(&content).as_bytes());
    Ok(Some(Read {
        size: content.len() as u64,
        hash,
        content: Some(Bytes::from(content)),
        sketch: Sketch::default(),
        leaves: None,
    }))
}

fn read_large(fd: BorrowedFd<'_>, before: &StatSig) -> io::Result<Option<Read>> {
    let mut ask_at = ASK_EVERY;
    let mut still = true;
    let Hashed {
        size,
        hash,
        sketch,
        leaves,
    } = content::hash_while(fd, |done| {
        if done >= ask_at {
            ask_at = done + ASK_EVERY;
            still = done <= before.size && sig_of(&statx_fd(fd)?).same_as(before);
        }
        Ok(still)
    })
    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(still.then_some(Read {
        size,
        hash,
        content: None,
        sketch,
        leaves,
    }))
}
