//! Parts as a file.
//!
//! The assembler writes what arrives to a fresh sink and hashes it on the way, unless
//! the sink's owner does.
//! Nothing that a peer sends is believed: parts may not lead beyond the announced
//! size, and only the announced hash makes the content whole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::chunks::Chunk;
use super::{ChunkId, Hasher};
use crate::model::Hash;
use crate::wire::Part;

/// Where assembled content goes: an empty file, or memory in tests.
pub trait Sink {
    fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()>;
    /// Bytes that are never written read as zero.
    fn set_len(&mut self, bytes: u64) -> io::Result<()>;
    /// Whether whoever takes the sink back makes sure that it holds the announced
    /// content: hashing it twice would be for nothing.
    fn is_checked_later(&self) -> bool {
        false
    }
}

impl Sink for &File {
    fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        File::set_len(self, bytes)
    }
}

impl Sink for File {
    fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        File::set_len(self, bytes)
    }
}

impl Sink for Vec<u8> {
    fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        let at = at as usize;
        self[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        self.resize(bytes as usize, 0);
        Ok(())
    }
}

/// Files that the receiver has, and their chunks as `Want::have` names them.
#[derive(Debug, Default)]
pub struct OwnChunks {
    files: Vec<File>,
    /// With the place of the file that each is in.
    chunks: Vec<(usize, Chunk)>,
}

impl OwnChunks {
    pub fn new(file: File, chunks: Vec<Chunk>) -> OwnChunks {
        let mut own = OwnChunks::default();
        own.add(file, chunks);
        own
    }

    /// Adds a file whose chunks these are.
    pub fn add(&mut self, file: File, chunks: Vec<Chunk>) {
        let place = self.files.len();
        self.chunks.extend(chunks.into_iter().map(|chunk| (place, chunk)));
        self.files.push(file);
    }

    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// For `Want::have`.
    pub fn ids(&self) -> Vec<ChunkId> {
        self.chunks.iter().map(|(_, chunk)| chunk.id).collect()
    }

    fn read(&self, (file, chunk): (usize, Chunk), buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.resize(chunk.len as usize, 0);
        self.files[file].read_exact_at(buffer, chunk.offset)
    }
}

/// Why parts do not make the announced content. Except for `Io`, another attempt
/// with nothing to build upon, an empty `Want::have`, may succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AssembleError {
    #[error("content of more than the announced {announced_bytes} bytes")]
    TooLong { announced_bytes: u64 },
    #[error("{actual_bytes} bytes of content, {announced_bytes} were announced")]
    TooShort { announced_bytes: u64, actual_bytes: u64 },
    #[error("a reference to chunk {place} of {count} that this node has")]
    NoSuchChunk { place: u32, count: usize },
    #[error("content with hash {actual:?}, {announced:?} was announced")]
    OtherContent { announced: Hash, actual: Hash },
    /// The file that the chunks were taken from is shorter than it was.
    #[error("what this node had of it changed meanwhile")]
    OwnChanged,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Puts one file's parts together.
#[derive(Debug)]
pub struct Assembler<S> {
    sink: S,
    own: Option<OwnChunks>,
    announced_bytes: u64,
    announced: Hash,
    at: u64,
    /// None if the sink is checked later.
    hasher: Option<Hasher>,
    buffer: Vec<u8>,
}

impl<S: Sink> Assembler<S> {
    /// Content of `announced_bytes` bytes with hash `announced` into `sink`,
    /// which is empty. The sink gets its length at once, so that a file that is
    /// too large for its filesystem is known before it is transferred.
    pub fn new(
        mut sink: S,
        announced_bytes: u64,
        announced: Hash,
        own: Option<OwnChunks>,
    ) -> Result<Assembler<S>, AssembleError> {
        sink.set_len(announced_bytes)?;
        let hasher = (!sink.is_checked_later()).then(Hasher::new);
        Ok(Assembler {
            sink,
            own,
            announced_bytes,
            announced,
            at: 0,
            hasher,
            buffer: Vec::new(),
        })
    }

    /// How many bytes are there by now.
    pub fn progress(&self) -> u64 {
        self.at
    }

    /// Takes the next parts, in order.
    pub fn take(&mut self, parts: &[Part]) -> Result<(), AssembleError> {
        parts.iter().try_for_each(|part| self.take_part(part))
    }

    fn take_part(&mut self, part: &Part) -> Result<(), AssembleError> {
        match part {
            Part::Data(data) => {
                let end = self.end_of(data.len() as u64)?;
                if let Some(hasher) = &mut self.hasher {
                    hasher.update(data);
                }
                self.sink.write_at(data, self.at)?;
                self.at = end;
            }
            Part::Have(place) => {
                let own = self.own.as_ref();
                let found = own.and_then(|own| Some((own, *own.chunks.get(*place as usize)?)));
                let Some((own, chunk)) = found else {
                    let count = own.map_or(0, OwnChunks::len);
                    return Err(AssembleError::NoSuchChunk { place: *place, count });
                };
                let end = self.end_of(u64::from(chunk.1.len))?;
                own.read(chunk, &mut self.buffer)
                    .map_err(|why| match why.kind() {
                        io::ErrorKind::UnexpectedEof => AssembleError::OwnChanged,
                        _ => AssembleError::Io(why),
                    })?;
                if let Some(hasher) = &mut self.hasher {
                    hasher.update(&self.buffer);
                }
                self.sink.write_at(&self.buffer, self.at)?;
                self.at = end;
            }
            Part::Hole(bytes) => {
                let end = self.end_of(*bytes)?;
                if let Some(hasher) = &mut self.hasher {
                    hasher.zeros(*bytes);
                }
                self.at = end;
            }
        }
        Ok(())
    }

    fn end_of(&self, bytes: u64) -> Result<u64, AssembleError> {
        let announced_bytes = self.announced_bytes;
        self.at
            .checked_add(bytes)
            .filter(|&end| end <= announced_bytes)
            .ok_or(AssembleError::TooLong { announced_bytes })
    }

    /// After the last part: the sink, if it holds what was announced, as far as that
    /// is not checked later.
    pub fn finish(self) -> Result<S, AssembleError> {
        let Assembler {
            announced_bytes,
            announced,
            at: actual_bytes,
            ..
        } = self;
        if actual_bytes < announced_bytes {
            return Err(AssembleError::TooShort {
                announced_bytes,
                actual_bytes,
            });
        }
        if let Some(actual) = self.hasher.map(|hasher| hasher.finish())
            && actual != announced
        {
            return Err(AssembleError::OtherContent { announced, actual });
        }
        Ok(self.sink)
    }
}
