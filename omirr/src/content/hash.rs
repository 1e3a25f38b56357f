//! The hash of whole files.
//!
//! Files are read, never mapped: a file that shrinks under a mapping kills the
//! process that looks at it.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use rayon::prelude::*;

use super::leaves::{LEAVES_MAX, Leaves};
use super::send::{Source, data_range};
use super::whole::{HashedLeaf, Hasher, LEAF_BYTES};
use crate::model::{Hash, Sketch};

/// Large enough for BLAKE3's widest vectors and for few system calls, small
/// enough to stay in the second-level cache.
const BUFFER_BYTES: usize = 256 << 10;
/// So many leaves are hashed at once, by all processors; smaller files are not
/// worth waking them.
const STRIDE_LEAVES: u64 = 32;

thread_local! {
    /// Most files are small: a buffer of their own would cost more than reading
    /// them does.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The hash of bytes in memory.
pub fn hash_bytes(bytes: &[u8]) -> Hash {
    let mut hasher = Hasher::new();
    hasher.update(bytes);
    hasher.finish()
}

/// Size and hash of a file from its first byte to its end, as it is while it is
/// read. Holes are not read. The file's own offset is not used, but may be moved.
pub fn hash_file(file: &File) -> io::Result<(u64, Hash)> {
    let hashed = hash_while(file.as_fd(), |_| Ok(true))?;
    Ok((hashed.size, hashed.hash))
}

/// A file as it was when it was read.
pub(crate) struct Hashed {
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) hash: Hash,
    pub(crate) sketch: Sketch,
    /// If it is large.
    pub(crate) leaves: Option<Leaves>,
}

/// The same, and a sketch, as long as `go_on`, which is asked after each buffer with the bytes
/// so far, says yes.
pub(crate) fn hash_while(
    file: BorrowedFd<'_>,
    mut go_on: impl FnMut(u64) -> io::Result<bool>,
) -> io::Result<Hashed> {
    // Taken out, since this thread may begin another file while it waits for the
    // leaves of this one.
    let mut buffer = BUFFER.take();
    buffer.resize(BUFFER_BYTES, 0);
    let hashed = hash_with(file, &mut buffer, &mut go_on);
    BUFFER.set(buffer);
    hashed
}

fn hash_with(
    mut file: BorrowedFd<'_>,
    buffer: &mut [u8],
    go_on: &mut dyn FnMut(u64) -> io::Result<bool>,
) -> io::Result<Hashed> {
    let mut hasher = Hasher::sketching();
    let mut at = 0;
    // Up to here is data without a hole. Small files, by far the most, are done
    // after two reads: asking where their data is would cost as much again.
    let mut known = buffer.len() as u64;
    let size = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
    // The last leaf stays open, though it may be full.
    let mut going = true;
    while going && size.saturating_sub(at) > STRIDE_LEAVES * LEAF_BYTES {
        // Whole leaves of a hole are passed over at once, however many they are.
        let hole = data_range(&mut { file }, at, size)?.0 - at;
        if hole >= LEAF_BYTES {
            let passed = hole - hole % LEAF_BYTES;
            hasher.zeros(passed);
            at += passed;
            known = at;
            going = go_on(at)?;
            continue;
        }
        let Some(stride) = hash_stride(file, at)? else {
            break;
        };
        stride.iter().for_each(|leaf| hasher.leaf(leaf));
        at += STRIDE_LEAVES * LEAF_BYTES;
        known = at;
        going = go_on(at)?;
    }
    while going {
        if at >= known {
            let end = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
            let (data, hole) = if at < end {
                data_range(&mut file, at, end)?
            } else {
                (at, u64::MAX)
            };
            hasher.zeros(data - at);
            (at, known) = (data, hole);
        }
        let len = (buffer.len() as u64).min(known.max(at + 1) - at) as usize;
        let got = file.read_at(&mut buffer[..len], at)?;
        if got == 0 {
            break;
        }
        hasher.update(&buffer[..got]);
        at += got as u64;
        going = go_on(at)?;
    }
    Ok(Hashed {
        size: at,
        hash: hasher.finish(),
        sketch: hasher.sketch(),
        leaves: hasher.leaves(),
    })
}

/// The leaves of a file of `size` bytes whose content had the leaves `known` and may
/// have changed in `ranges`, and where it is longer: of the file these are read, and no
/// more. None if that is most of it, if it is too long for a list of leaves, or if the
/// file is not as large as was said.
pub(crate) fn hash_again(
    file: BorrowedFd<'_>,
    known: &Leaves,
    size: u64,
    ranges: impl Iterator<Item = Range<u64>>,
) -> io::Result<Option<Leaves>> {
    if size.div_ceil(LEAF_BYTES) > LEAVES_MAX as u64 {
        return Ok(None);
    }
    let grown = (size > known.size()).then_some(known.size()..size);
    let leaves_of = |range: Range<u64>| range.start / LEAF_BYTES..range.end.min(size).div_ceil(LEAF_BYTES);
    let mut again: Vec<u64> = ranges.chain(grown).flat_map(leaves_of).collect();
    again.sort_unstable();
    again.dedup();
    if again.len() as u64 > size.div_ceil(LEAF_BYTES) / 2 {
        return Ok(None);
    }
    let hashed = again.into_par_iter().with_min_len(STRIDE_LEAVES as usize);
    let hashed = hashed.map(|leaf| {
        let place = Leaves::place(leaf, size);
        let mut file = file;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut hasher = blake3::Hasher::new();
        let mut at = place.start;
        while at < place.end {
            let len = (place.end - at).min(BUFFER_BYTES as u64) as usize;
            file.read_exact_at(&mut buffer[..len], at)?;
            hasher.update(&buffer[..len]);
            at += len as u64;
        }
        Ok((leaf, hasher.finalize().into()))
    });
    match hashed.collect::<io::Result<Vec<_>>>() {
        Ok(hashed) => Ok(known.replaced(size, &hashed)),
        Err(why) if why.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(why) => Err(why),
    }
}

/// [`STRIDE_LEAVES`] leaves from `at` on, several at a time; none if the file
/// ends in them.
fn hash_stride(file: BorrowedFd<'_>, at: u64) -> io::Result<Option<Vec<HashedLeaf>>> {
    let first = at / LEAF_BYTES;
    let hashed = (first..first + STRIDE_LEAVES).into_par_iter().map(|number| {
        let start = number * LEAF_BYTES;
        let mut source = file;
        let (data, _) = data_range(&mut source, start, start + LEAF_BYTES)?;
        if data == start + LEAF_BYTES {
            return Ok(HashedLeaf::zero());
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        HashedLeaf::of(number, &mut buffer, |buffer, from| {
            source.read_exact_at(buffer, start + from)
        })
    });
    match hashed.collect::<io::Result<Vec<HashedLeaf>>>() {
        Ok(hashed) => Ok(Some(hashed)),
        Err(why) if why.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(why) => Err(why),
    }
}

/// Files as sources of what is sent.
impl Source for &File {
    fn read_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        self.as_fd().read_at(buffer, at)
    }

    fn next_data(&mut self, at: u64) -> io::Result<Option<u64>> {
        self.as_fd().next_data(at)
    }

    fn next_hole(&mut self, at: u64) -> io::Result<Option<u64>> {
        self.as_fd().next_hole(at)
    }
}

impl Source for BorrowedFd<'_> {
    fn read_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        Ok(rustix::io::retry_on_intr(|| {
            rustix::io::pread(*self, &mut *buffer, at)
        })?)
    }

    fn next_data(&mut self, at: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(*self, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => Ok(Some(data)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A filesystem that keeps no holes: all is data.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(at)),
            Err(why) => Err(why.into()),
        }
    }

    fn next_hole(&mut self, at: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(*self, rustix::fs::SeekFrom::Hole(at)) {
            Ok(hole) => Ok(Some(hole)),
            Err(rustix::io::Errno::NXIO | rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
                Ok(None)
            }
            Err(why) => Err(why.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_content_too_long_for_a_list_no_leaf_is_even_counted() {
        let file = tempfile::tempfile().unwrap();
        let known = Leaves::new(4 << 20, vec![[0; 32]; 4]).unwrap();
        let everything = std::iter::once(0..u64::MAX);
        let again = hash_again(file.as_fd(), &known, u64::MAX, everything).unwrap();
        assert_eq!(again, None);
    }
}
