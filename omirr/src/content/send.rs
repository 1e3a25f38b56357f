//! A file as parts on their way to a peer.
//!
//! The sender reads the file once. It sends the last group only if the size is
//! still the announced one and, where it is asked to make sure, the hash. Whoever
//! receives the parts hashes them in any case: a file that changes meanwhile is
//! never taken for what its row says.

use std::collections::HashMap;
use std::io::{self, Read};
use std::ops::ControlFlow;

use bytes::{Bytes, BytesMut};

use super::chunks::{ChunkId, ChunkSize, Chunker, chunk_id};
use super::{HOLE_BYTES, Hasher, is_zero};
use crate::model::Hash;
use crate::wire::Part;

/// Data in one group of parts, and thus in one message.
pub const GROUP_BYTES: usize = 1 << 20;
/// Parts in one group: they are cheap, but not free.
const GROUP_PARTS: usize = 4096;

/// From this size on a hole is not read when a file is cut into chunks.
const GREAT_HOLE_BYTES: u64 = 1 << 20;

/// Where content is read from.
pub trait Source {
    /// As `pread`: fewer bytes than asked for are no end, none are.
    fn read_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<usize>;

    /// Fills the buffer; `UnexpectedEof` if the source ends before.
    fn read_exact_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let mut got = 0;
        while got < buffer.len() {
            match self.read_at(&mut buffer[got..], at + got as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => got += more,
            }
        }
        Ok(())
    }

    /// Where the first data at or after `at` begins; none if only a hole is left.
    fn next_data(&mut self, at: u64) -> io::Result<Option<u64>> {
        Ok(Some(at))
    }

    /// Where the first hole at or after `at` begins; none if that is not known.
    fn next_hole(&mut self, _at: u64) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

impl Source for &[u8] {
    fn read_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let rest = usize::try_from(at)
            .ok()
            .and_then(|at| self.get(at..))
            .unwrap_or_default();
        let got = rest.len().min(buffer.len());
        buffer[..got].copy_from_slice(&rest[..got]);
        Ok(got)
    }
}

/// Why content was not sent to its end.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error(transparent)]
    Read(#[from] io::Error),
    /// The peer is to be told with `Gone`; a newer row follows.
    #[error("it changed while it was read: {what}")]
    Changed { what: &'static str },
    /// `emit` asked for it.
    #[error("sending was stopped")]
    Stopped,
}

pub(super) const SHORTER: SendError = SendError::Changed {
    what: "it is shorter than announced",
};
pub(super) const LONGER: SendError = SendError::Changed {
    what: "it is longer than announced",
};

/// Sends `source`, announced with `size`, as groups of parts; with a `hash` only if
/// it has that.
///
/// `have` names the chunks that the receiver has, in its order; empty if it has
/// nothing of the file. `emit` gets each group, and whether it is the last one.
pub fn send_content<S: Source>(
    source: S,
    size: u64,
    hash: Option<Hash>,
    have: &[ChunkId],
    emit: impl FnMut(Vec<Part>, bool) -> ControlFlow<()>,
) -> Result<(), SendError> {
    let mut sender = Sender {
        source,
        size,
        hasher: hash.map(|_| Hasher::new()),
        groups: Groups::new(emit),
    };
    if have.is_empty() {
        sender.whole()?
    } else {
        sender.difference(have)?
    }
    if sender.hasher.map(|hasher| hasher.finish()) != hash {
        return Err(SendError::Changed {
            what: "its content is another than announced",
        });
    }
    sender.groups.finish()
}

/// The first data between `at` and `end`, as a range; empty at `end` if there is
/// none.
pub(super) fn data_range<S: Source>(source: &mut S, at: u64, end: u64) -> io::Result<(u64, u64)> {
    let Some(data) = source.next_data(at)?.filter(|&data| data < end) else {
        return Ok((end, end));
    };
    // The file may change between the two questions: an answer that lies before
    // the question is none.
    let data = data.max(at);
    let hole = source.next_hole(data)?.filter(|&hole| hole > data).unwrap_or(end);
    Ok((data, hole.min(end)))
}

/// The same, but only holes of [`GREAT_HOLE_BYTES`] count. Cutting begins anew
/// after each of them, on both sides of a transfer.
pub(super) fn data_run<S: Source>(source: &mut S, at: u64, end: u64) -> io::Result<(u64, u64)> {
    let (first, mut hole) = data_range(source, at, end)?;
    while hole < end {
        let (data, next) = data_range(source, hole, end)?;
        if data - hole >= GREAT_HOLE_BYTES || data >= end {
            break;
        }
        hole = next;
    }
    Ok((first, hole))
}

struct Sender<S, E> {
    source: S,
    size: u64,
    /// If the hash is to be checked.
    hasher: Option<Hasher>,
    groups: Groups<E>,
}

impl<S: Source, E: FnMut(Vec<Part>, bool) -> ControlFlow<()>> Sender<S, E> {
    /// Everything, holes aside.
    fn whole(&mut self) -> Result<(), SendError> {
        let mut at = 0;
        while at < self.size {
            let (data, hole) = data_range(&mut self.source, at, self.size)?;
            if data > at {
                self.zeros(data - at);
                self.groups.hole(data - at)?;
            }
            at = data;
            while at < hole {
                // Reads end at multiples of the group's size, so that blocks of
                // zeros are found wherever data begins.
                let group_end = (at / GROUP_BYTES as u64 + 1) * GROUP_BYTES as u64;
                let len = (hole.min(group_end) - at) as usize;
                let bytes = self.read(at, len)?;
                if let Some(hasher) = &mut self.hasher {
                    hasher.update(&bytes);
                }
                self.data(at, &bytes)?;
                at += len as u64;
            }
        }
        self.expect_end()
    }

    fn zeros(&mut self, count: u64) {
        if let Some(hasher) = &mut self.hasher {
            hasher.zeros(count);
        }
    }

    /// Exactly `len` bytes.
    fn read(&mut self, at: u64, len: usize) -> Result<Bytes, SendError> {
        let mut buffer = vec![0; len];
        let mut got = 0;
        while got < len {
            match self.source.read_at(&mut buffer[got..], at + got as u64)? {
                0 => return Err(SHORTER),
                more => got += more,
            }
        }
        Ok(Bytes::from(buffer))
    }

    fn expect_end(&mut self) -> Result<(), SendError> {
        match self.source.read_at(&mut [0], self.size)? {
            0 => Ok(()),
            _ => Err(LONGER),
        }
    }

    /// Data as it is, but for aligned blocks of zeros. Nothing is copied.
    fn data(&mut self, at: u64, bytes: &Bytes) -> Result<(), SendError> {
        let to_boundary = (HOLE_BYTES - (at % HOLE_BYTES as u64) as usize) % HOLE_BYTES;
        let mut plain_from = 0;
        let mut block = to_boundary;
        while block + HOLE_BYTES <= bytes.len() {
            if is_zero(&bytes[block..block + HOLE_BYTES]) {
                self.groups.data(bytes.slice(plain_from..block))?;
                self.groups.hole(HOLE_BYTES as u64)?;
                plain_from = block + HOLE_BYTES;
            }
            block += HOLE_BYTES;
        }
        self.groups.data(bytes.slice(plain_from..))
    }

    /// Only what the receiver lacks.
    fn difference(&mut self, have: &[ChunkId]) -> Result<(), SendError> {
        let mut places = HashMap::with_capacity(have.len());
        for (place, id) in have.iter().enumerate() {
            places.entry(*id).or_insert(place as u32);
        }
        let mut chunker = Chunker::new(ChunkSize::for_file(self.size));
        let mut at = 0;
        while at < self.size {
            let (data, hole) = data_run(&mut self.source, at, self.size)?;
            if data > at {
                self.zeros(data - at);
                self.groups.hole(data - at)?;
            }
            at = data;
            let mut run = chunker.begin(Reader {
                source: &mut self.source,
                at: data,
                end: hole,
            });
            while let Some(bytes) = run.next()? {
                if let Some(hasher) = &mut self.hasher {
                    hasher.update(bytes);
                }
                at += bytes.len() as u64;
                if bytes.len() >= HOLE_BYTES && is_zero(bytes) {
                    self.groups.hole(bytes.len() as u64)?;
                } else if let Some(&place) = places.get(&chunk_id(bytes)) {
                    self.groups.have(place)?;
                } else {
                    self.groups.copy_data(bytes)?;
                }
            }
            if at < hole {
                return Err(SHORTER);
            }
        }
        self.expect_end()
    }
}

/// A source from `at` to `end`.
pub(super) struct Reader<'a, S> {
    pub(super) source: &'a mut S,
    pub(super) at: u64,
    pub(super) end: u64,
}

impl<S: Source> Read for Reader<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = (buffer.len() as u64).min(self.end - self.at) as usize;
        let got = self.source.read_at(&mut buffer[..len], self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

/// Gathers parts to groups.
pub(super) struct Groups<E> {
    emit: E,
    parts: Vec<Part>,
    /// Data in `parts` and `run`.
    bytes: usize,
    /// Data of neighbouring chunks, not yet a part.
    run: BytesMut,
}

impl<E: FnMut(Vec<Part>, bool) -> ControlFlow<()>> Groups<E> {
    pub(super) fn new(emit: E) -> Groups<E> {
        Groups {
            emit,
            parts: Vec::new(),
            bytes: 0,
            run: BytesMut::new(),
        }
    }

    fn data(&mut self, bytes: Bytes) -> Result<(), SendError> {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.bytes + bytes.len() > GROUP_BYTES {
            self.flush()?;
        }
        self.bytes += bytes.len();
        self.push(Part::Data(bytes))
    }

    pub(super) fn copy_data(&mut self, mut bytes: &[u8]) -> Result<(), SendError> {
        while !bytes.is_empty() {
            if self.bytes >= GROUP_BYTES {
                self.flush()?;
            }
            let (now, later) = bytes.split_at(bytes.len().min(GROUP_BYTES - self.bytes));
            self.run.extend_from_slice(now);
            self.bytes += now.len();
            bytes = later;
        }
        Ok(())
    }

    pub(super) fn have(&mut self, place: u32) -> Result<(), SendError> {
        self.end_run();
        self.push(Part::Have(place))
    }

    pub(super) fn hole(&mut self, bytes: u64) -> Result<(), SendError> {
        self.end_run();
        if let Some(Part::Hole(before)) = self.parts.last_mut() {
            *before += bytes;
            return Ok(());
        }
        self.push(Part::Hole(bytes))
    }

    fn push(&mut self, part: Part) -> Result<(), SendError> {
        if self.parts.len() >= GROUP_PARTS {
            self.flush()?;
        }
        self.parts.push(part);
        Ok(())
    }

    fn end_run(&mut self) {
        if !self.run.is_empty() {
            self.parts.push(Part::Data(self.run.split().freeze()));
        }
    }

    fn flush(&mut self) -> Result<(), SendError> {
        self.emit(false)
    }

    pub(super) fn finish(mut self) -> Result<(), SendError> {
        self.emit(true)
    }

    fn emit(&mut self, last: bool) -> Result<(), SendError> {
        self.end_run();
        self.bytes = 0;
        match (self.emit)(std::mem::take(&mut self.parts), last) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(SendError::Stopped),
        }
    }
}
