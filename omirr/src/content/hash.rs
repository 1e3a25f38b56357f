//! BLAKE3 over whole files.
//!
//! Files are read, never mapped: a file that shrinks under a mapping kills the
//! process that looks at it.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::hash_zeros;
use super::send::{Source, data_range};
use crate::model::Hash;

/// Large enough for BLAKE3's widest vectors and for few system calls, small
/// enough to stay in the second-level cache.
const BUFFER_BYTES: usize = 256 << 10;

thread_local! {
    /// Most files are small: a buffer of their own would cost more than reading
    /// them does.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The hash of bytes in memory.
pub fn hash_bytes(bytes: &[u8]) -> Hash {
    Hash(blake3::hash(bytes).into())
}

/// Size and hash of a file from its first byte to its end, as it is while it is
/// read. Holes are not read. The file's own offset is not used, but may be moved.
pub fn hash_file(file: &File) -> io::Result<(u64, Hash)> {
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(BUFFER_BYTES, 0);
        hash_file_with(file, buffer)
    })
}

fn hash_file_with(file: &File, buffer: &mut [u8]) -> io::Result<(u64, Hash)> {
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    // Up to here is data without a hole. Small files, by far the most, are done
    // after two reads: asking where their data is would cost as much again.
    let mut known = buffer.len() as u64;
    loop {
        if at >= known {
            let end = file.metadata()?.len();
            let (data, hole) = if at < end {
                data_range(&mut &*file, at, end)?
            } else {
                (at, u64::MAX)
            };
            hash_zeros(&mut hasher, data - at);
            (at, known) = (data, hole);
        }
        let len = (buffer.len() as u64).min(known.max(at + 1) - at) as usize;
        let got = read_at(file, &mut buffer[..len], at)?;
        if got == 0 {
            return Ok((at, Hash(hasher.finalize().into())));
        }
        hasher.update(&buffer[..got]);
        at += got as u64;
    }
}

fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    loop {
        match file.read_at(buffer, at) {
            Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// Files as sources of what is sent.
impl Source for &File {
    fn read_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        read_at(self, buffer, at)
    }

    fn next_data(&mut self, at: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(self, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => Ok(Some(data)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A filesystem that keeps no holes: all is data.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(at)),
            Err(why) => Err(why.into()),
        }
    }

    fn next_hole(&mut self, at: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(self, rustix::fs::SeekFrom::Hole(at)) {
            Ok(hole) => Ok(Some(hole)),
            Err(rustix::io::Errno::NXIO | rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
                Ok(None)
            }
            Err(why) => Err(why.into()),
        }
    }
}
