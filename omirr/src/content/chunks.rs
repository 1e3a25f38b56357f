//! Content-defined chunks (FastCDC, 2020): where a file is cut depends on the
//! bytes around the cut and not on their offset, so that an insertion moves
//! chunks and does not change them.
//!
//! Both sides of a transfer must cut alike. They do because the sizes follow
//! from the size of the file that is wanted, which both know.

use std::io::{self, Read};

use fastcdc::v2020::{Normalization, cut, select_masks};

/// The first 16 bytes of a chunk's BLAKE3 hash. Two chunks with one name would
/// only cost time: the whole file's hash decides whether it has arrived.
pub type ChunkId = [u8; 16];

/// A chunk of a file that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub offset: u64,
    pub len: u32,
    pub id: ChunkId,
}

/// How large chunks are, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSize {
    min: usize,
    pub(super) average: usize,
    max: usize,
}

impl ChunkSize {
    const AVERAGE: usize = 64 << 10;
    /// FastCDC's own limit; reached at files of 512 GiB.
    const LARGEST_AVERAGE: usize = 4 << 20;
    /// Names of so many chunks are 2 MiB; larger files get larger chunks.
    const ENOUGH_CHUNKS: u64 = 131_072;

    /// The sizes for a transfer whose outcome is a file of `wanted_bytes`.
    pub fn for_file(wanted_bytes: u64) -> ChunkSize {
        let mut average = ChunkSize::AVERAGE;
        while average < ChunkSize::LARGEST_AVERAGE && wanted_bytes / average as u64 > ChunkSize::ENOUGH_CHUNKS
        {
            average *= 2;
        }
        ChunkSize {
            min: average / 4,
            average,
            max: average * 4,
        }
    }
}

pub(super) fn chunk_id(bytes: &[u8]) -> ChunkId {
    let hash: [u8; 32] = blake3::hash(bytes).into();
    *hash.first_chunk().expect("16 of 32 bytes")
}

/// Cuts a reader's bytes into chunks, one buffer at a time.
pub(super) struct Chunker<R> {
    reader: R,
    size: ChunkSize,
    masks: (u64, u64),
    buffer: Vec<u8>,
    /// What of `buffer` is read and not yet handed out.
    start: usize,
    end: usize,
    at_end: bool,
}

impl<R: Read> Chunker<R> {
    pub(super) fn new(reader: R, size: ChunkSize) -> Chunker<R> {
        // Room for several chunks, so that the rest is moved to the front rarely.
        let buffer = vec![0; size.max * 4];
        let masks = select_masks(size.average, Normalization::Level1);
        Chunker {
            reader,
            size,
            masks,
            buffer,
            start: 0,
            end: 0,
            at_end: false,
        }
    }

    /// The next chunk's bytes; none at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<&[u8]>> {
        if self.end - self.start < self.size.max && !self.at_end {
            self.fill()?;
        }
        let rest = &self.buffer[self.start..self.end];
        if rest.is_empty() {
            return Ok(None);
        }
        let (strict, loose) = self.masks;
        let ChunkSize { min, average, max } = self.size;
        let (_, len) = cut(rest, min, average, max, strict, loose, strict << 1, loose << 1);
        self.start += len;
        Ok(Some(&self.buffer[self.start - len..self.start]))
    }

    fn fill(&mut self) -> io::Result<()> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        while self.end < self.buffer.len() {
            match self.reader.read(&mut self.buffer[self.end..]) {
                Ok(0) => {
                    self.at_end = true;
                    return Ok(());
                }
                Ok(got) => self.end += got,
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) => return Err(why),
            }
        }
        Ok(())
    }
}

/// The chunks of what `reader` yields, in order, at most `limit` of them: what
/// a receiver says that it has. What lies behind the limit is sent again.
pub fn chunk_list(reader: impl Read, size: ChunkSize, limit: usize) -> io::Result<Vec<Chunk>> {
    let mut chunker = Chunker::new(reader, size);
    let mut chunks = Vec::new();
    let mut offset = 0;
    while chunks.len() < limit {
        let Some(bytes) = chunker.next()? else { break };
        chunks.push(Chunk {
            offset,
            len: bytes.len() as u32,
            id: chunk_id(bytes),
        });
        offset += bytes.len() as u64;
    }
    Ok(chunks)
}
