//! Content-defined chunks (FastCDC, 2020): where a file is cut depends on the
//! bytes around the cut and not on their offset, so that an insertion moves
//! chunks and does not change them.
//!
//! Both sides of a transfer must cut alike. They do because the sizes follow
//! from the size of the file that is wanted, which both know.

use std::io::{self, Read};

use fastcdc::v2020::{Normalization, cut, select_masks};

use super::send::{Reader, Source, data_run};

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

/// Cuts bytes into chunks, one buffer at a time.
pub(super) struct Chunker {
    size: ChunkSize,
    masks: (u64, u64),
    buffer: Vec<u8>,
}

impl Chunker {
    pub(super) fn new(size: ChunkSize) -> Chunker {
        Chunker {
            size,
            masks: select_masks(size.average, Normalization::Level1),
            // Room for several chunks, so that the rest is moved to the front rarely.
            buffer: vec![0; size.max * 4],
        }
    }

    /// Cuts what `reader` yields, from its beginning.
    pub(super) fn begin<R: Read>(&mut self, reader: R) -> Run<'_, R> {
        Run {
            chunker: self,
            reader,
            start: 0,
            end: 0,
            at_end: false,
        }
    }
}

/// One reader's bytes while they are cut.
pub(super) struct Run<'a, R> {
    chunker: &'a mut Chunker,
    reader: R,
    /// What of the buffer is read and not yet handed out.
    start: usize,
    end: usize,
    at_end: bool,
}

impl<R: Read> Run<'_, R> {
    /// The next chunk's bytes; none at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<&[u8]>> {
        let ChunkSize { min, average, max } = self.chunker.size;
        if self.end - self.start < max && !self.at_end {
            self.fill()?;
        }
        let rest = &self.chunker.buffer[self.start..self.end];
        if rest.is_empty() {
            return Ok(None);
        }
        let (strict, loose) = self.chunker.masks;
        let (_, len) = cut(rest, min, average, max, strict, loose, strict << 1, loose << 1);
        self.start += len;
        Ok(Some(&self.chunker.buffer[self.start - len..self.start]))
    }

    fn fill(&mut self) -> io::Result<()> {
        let buffer = &mut self.chunker.buffer;
        buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        while self.end < buffer.len() {
            match self.reader.read(&mut buffer[self.end..]) {
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

/// The chunks of `source`, in order, at most `limit` of them: what a receiver
/// says that it has. What lies behind the limit is sent again; great holes are
/// in no chunk.
pub fn chunk_list<S: Source>(mut source: S, size: ChunkSize, limit: usize) -> io::Result<Vec<Chunk>> {
    let mut chunker = Chunker::new(size);
    let mut chunks = Vec::new();
    let mut at = 0;
    loop {
        let (data, hole) = data_run(&mut source, at, u64::MAX)?;
        if data == u64::MAX {
            return Ok(chunks);
        }
        at = data;
        let mut run = chunker.begin(Reader {
            source: &mut source,
            at,
            end: hole,
        });
        while chunks.len() < limit {
            let Some(bytes) = run.next()? else { break };
            chunks.push(Chunk {
                offset: at,
                len: bytes.len() as u32,
                id: chunk_id(bytes),
            });
            at += bytes.len() as u64;
        }
        // The end of the file, unless it has shrunk meanwhile.
        if at < hole || chunks.len() >= limit {
            return Ok(chunks);
        }
    }
}
