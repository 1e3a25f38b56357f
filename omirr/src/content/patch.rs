//! A content as its difference from one that the receiver has.
//!
//! In: on one side a file and the list of its leaves, on the other an older
//! file, the list of its leaves, and parts. Out: parts, which hold of the leaves
//! that differ only the blocks that differ; the edits that make the new content
//! of the old one; and its list of leaves. Of what is the same nothing is read,
//! on either side, and yet nothing is believed: each leaf that is sent is hashed
//! by both, and all leaves together must join to the announced hash. What the
//! edits are done to is the caller's business.

use std::io;
use std::ops::ControlFlow;

use super::chunks::chunk_id;
use super::leaves::Leaves;
use super::send::{Groups, LONGER, SHORTER, SendError, Source};
use super::whole::LEAF_BYTES;
use super::{AssembleError, ChunkId, HOLE_BYTES, is_zero};
use crate::model::Hash;
use crate::wire::Part;

/// What is compared within a leaf: small enough that a database's page is one.
pub const BLOCK_BYTES: usize = 4 << 10;
/// If more leaves differ, the file is sent as its chunks: then most of it may be
/// new, and what is noted for a crash would take as much room again.
pub const PATCH_LEAVES_MAX: usize = 512;
/// So many bytes in the place of others are sent without asking whether the
/// receiver has them somewhere else.
const MOVED_MAX: u64 = 8 << 20;
/// So many blocks are in them.
pub const PATCH_BLOCKS_MAX: usize = PATCH_LEAVES_MAX * (LEAF_BYTES as usize / BLOCK_BYTES);

/// How many blocks leaf number `leaf` has in a content of `size` bytes.
fn blocks_in(leaf: u64, size: u64) -> usize {
    let place = Leaves::place(leaf, size);
    ((place.end - place.start) as usize).div_ceil(BLOCK_BYTES)
}

/// How many names [`block_names`] gives.
pub fn count_blocks(leaves: &[u64], size: u64) -> usize {
    leaves.iter().map(|leaf| blocks_in(*leaf, size)).sum()
}

/// One leaf's bytes in a content of `size` bytes; few or none at its end.
fn read_leaf<S: Source>(source: &mut S, leaf: u64, size: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
    let place = Leaves::place(leaf, size);
    buffer.clear();
    buffer.resize((place.end - place.start) as usize, 0);
    source.read_exact_at(buffer, place.start)
}

fn is_leaf(list: &Leaves, leaf: u64, bytes: &[u8]) -> bool {
    let known = usize::try_from(leaf).ok().and_then(|leaf| list.get(leaf));
    known == Some(blake3::hash(bytes).as_bytes())
}

/// The names of all blocks of some leaves of what `list` is of, in order. None
/// if the source has something else than the list says.
pub fn block_names<S: Source>(
    mut source: S,
    list: &Leaves,
    leaves: &[u64],
) -> io::Result<Option<Vec<ChunkId>>> {
    let mut names = Vec::with_capacity(count_blocks(leaves, list.size()));
    let mut buffer = Vec::new();
    for &leaf in leaves {
        match read_leaf(&mut source, leaf, list.size(), &mut buffer) {
            Ok(()) => {}
            Err(why) if why.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(why) => return Err(why),
        }
        if !buffer.is_empty() && !is_leaf(list, leaf, &buffer) {
            return Ok(None);
        }
        names.extend(buffer.chunks(BLOCK_BYTES).map(chunk_id));
    }
    Ok(Some(names))
}

/// Sends leaves of what `list` is of, as groups of parts. `have` names all blocks
/// that the receiver has in these leaves; its content has `have_size` bytes.
pub fn send_patch<S: Source>(
    mut source: S,
    list: &Leaves,
    leaves: &[u64],
    have: &[ChunkId],
    have_size: u64,
    emit: impl FnMut(Vec<Part>, bool) -> ControlFlow<()>,
) -> Result<(), SendError> {
    let mut groups = Groups::new(emit);
    let mut buffer = Vec::new();
    let mut first = 0;
    for &leaf in leaves {
        match read_leaf(&mut source, leaf, list.size(), &mut buffer) {
            Ok(()) => {}
            Err(why) if why.kind() == io::ErrorKind::UnexpectedEof => return Err(SHORTER),
            Err(why) => return Err(why.into()),
        }
        if !is_leaf(list, leaf, &buffer) {
            return Err(SendError::Changed {
                what: "its content is another than announced",
            });
        }
        let had = blocks_in(leaf, have_size);
        let known = have.get(first..first + had).unwrap_or_default();
        let mut block = 0;
        for piece in buffer.chunks(HOLE_BYTES) {
            let same: Vec<bool> = piece
                .chunks(BLOCK_BYTES)
                .enumerate()
                .map(|(n, bytes)| known.get(block + n) == Some(&chunk_id(bytes)))
                .collect();
            if piece.len() == HOLE_BYTES && same.contains(&false) && is_zero(piece) {
                groups.hole(HOLE_BYTES as u64)?;
            } else {
                for (n, bytes) in piece.chunks(BLOCK_BYTES).enumerate() {
                    match same[n] {
                        true => groups.have((first + block + n) as u32)?,
                        false => groups.copy_data(bytes)?,
                    }
                }
            }
            block += same.len();
        }
        first += had;
    }
    match source.read_at(&mut [0], list.size())? {
        0 => groups.finish(),
        _ => Err(LONGER),
    }
}

/// Whether so much of what the receiver has would be sent anew that most of it is
/// perhaps only somewhere else, because bytes were inserted or removed. Chunks
/// tell; but they take reading everything, which a sixteenth of it does not.
pub fn is_too_much<S: Source>(
    mut source: S,
    list: &Leaves,
    leaves: &[u64],
    have: &[ChunkId],
    have_size: u64,
) -> io::Result<bool> {
    let most = MOVED_MAX.max(list.size() / 16);
    if leaves.len() as u64 * LEAF_BYTES <= most {
        return Ok(false);
    }
    let mut buffer = Vec::new();
    let (mut first, mut changed) = (0, 0);
    for &leaf in leaves {
        match read_leaf(&mut source, leaf, list.size(), &mut buffer) {
            Ok(()) => {}
            // Sending it tells.
            Err(why) if why.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(why) => return Err(why),
        }
        let had = blocks_in(leaf, have_size);
        let known = have.get(first..first + had).unwrap_or_default();
        for (bytes, known) in buffer.chunks(BLOCK_BYTES).zip(known) {
            changed += match *known == chunk_id(bytes) {
                true => 0,
                false => bytes.len() as u64,
            };
        }
        if changed > most {
            return Ok(true);
        }
        first += had;
    }
    Ok(false)
}

/// Something to be written over the old content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit<'a> {
    /// From where on, bytes.
    pub at: u64,
    pub len: u64,
    /// None for a hole.
    pub bytes: Option<&'a [u8]>,
    /// What the old content has there; less than `len` where it ends.
    pub old: &'a [u8],
}

/// Makes edits of parts.
pub struct Patcher<S> {
    /// The old content and its leaves.
    source: S,
    old_list: Leaves,
    size: u64,
    hash: Hash,
    leaves: Vec<u64>,
    /// Those that are whole, with their new hashes.
    done: Vec<(u64, [u8; 32])>,
    /// The first block of the leaf that is being made.
    first_block: usize,
    old: Vec<u8>,
    new: Vec<u8>,
    /// What of it is new: from, up to, and whether that is a hole.
    runs: Vec<(usize, usize, bool)>,
}

impl<S: Source> Patcher<S> {
    /// For the content of `size` bytes with `hash` that differs in `leaves`,
    /// ascending, from what `source` has and `old_list` is of.
    pub fn new(
        source: S,
        old_list: Leaves,
        leaves: Vec<u64>,
        size: u64,
        hash: Hash,
    ) -> io::Result<Patcher<S>> {
        let mut patcher = Patcher {
            source,
            old_list,
            size,
            hash,
            leaves,
            done: Vec::new(),
            first_block: 0,
            old: Vec::new(),
            new: Vec::new(),
            runs: Vec::new(),
        };
        patcher.begin()?;
        Ok(patcher)
    }

    /// Reads the old bytes of the next leaf.
    fn begin(&mut self) -> io::Result<()> {
        self.new.clear();
        self.runs.clear();
        match self.leaves.get(self.done.len()) {
            Some(&leaf) => read_leaf(&mut self.source, leaf, self.old_list.size(), &mut self.old),
            None => Ok(()),
        }
    }

    /// How many bytes the leaf that is being made lacks.
    fn lacking(&self) -> usize {
        let Some(&leaf) = self.leaves.get(self.done.len()) else {
            return 0;
        };
        let place = Leaves::place(leaf, self.size);
        (place.end - place.start) as usize - self.new.len()
    }

    /// Takes the next parts, in order; `edit` gets what follows from them, leaf by
    /// leaf.
    pub fn take(
        &mut self,
        parts: &[Part],
        edit: &mut dyn FnMut(Edit<'_>) -> io::Result<()>,
    ) -> Result<(), AssembleError> {
        for part in parts {
            match part {
                Part::Data(data) => {
                    let mut data = &data[..];
                    while !data.is_empty() {
                        let (now, later) = data.split_at(data.len().min(self.lacking()));
                        self.add(now, false)?;
                        self.end_leaf(edit)?;
                        data = later;
                    }
                }
                Part::Hole(bytes) => {
                    // As they are sent; smaller ones would be many and save nothing.
                    if *bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES as u64) {
                        return Err(self.too_long());
                    }
                    let mut left = *bytes;
                    while left > 0 {
                        let now = left.min(self.lacking() as u64);
                        self.add(&vec![0; now as usize], true)?;
                        self.end_leaf(edit)?;
                        left -= now;
                    }
                }
                Part::Have(place) => {
                    self.keep(*place)?;
                    self.end_leaf(edit)?;
                }
            }
        }
        Ok(())
    }

    fn too_long(&self) -> AssembleError {
        AssembleError::TooLong {
            announced_bytes: self.size,
        }
    }

    fn add(&mut self, bytes: &[u8], hole: bool) -> Result<(), AssembleError> {
        if bytes.is_empty() {
            return Err(self.too_long());
        }
        let from = self.new.len();
        self.new.extend_from_slice(bytes);
        match self.runs.last_mut() {
            Some((_, upto, kind)) if *upto == from && *kind == hole => *upto = self.new.len(),
            _ => self.runs.push((from, self.new.len(), hole)),
        }
        Ok(())
    }

    /// A block that stays as it is: the one that is at this very place.
    fn keep(&mut self, place: u32) -> Result<(), AssembleError> {
        let at = self.new.len();
        let block = self.first_block + at / BLOCK_BYTES;
        let old = self.old.get(at..).unwrap_or_default();
        let old = &old[..old.len().min(BLOCK_BYTES)];
        if place as usize != block
            || !at.is_multiple_of(BLOCK_BYTES)
            || old.is_empty()
            || old.len() > self.lacking()
        {
            return Err(AssembleError::NoSuchChunk {
                place,
                count: count_blocks(&self.leaves, self.old_list.size()),
            });
        }
        self.new.extend_from_slice(old);
        Ok(())
    }

    fn end_leaf(&mut self, edit: &mut dyn FnMut(Edit<'_>) -> io::Result<()>) -> Result<(), AssembleError> {
        let Some(&leaf) = self.leaves.get(self.done.len()).filter(|_| self.lacking() == 0) else {
            return Ok(());
        };
        let start = Leaves::place(leaf, self.size).start;
        for &(from, upto, hole) in &self.runs {
            let clip = |at: usize| at.min(self.old.len());
            edit(Edit {
                at: start + from as u64,
                len: (upto - from) as u64,
                bytes: (!hole).then(|| &self.new[from..upto]),
                old: &self.old[clip(from)..clip(upto)],
            })?;
        }
        self.done.push((leaf, blake3::hash(&self.new).into()));
        self.first_block += blocks_in(leaf, self.old_list.size());
        Ok(self.begin()?)
    }

    /// After the last part: the leaves of the new content, if it is the announced
    /// one.
    pub fn finish(self) -> Result<Leaves, AssembleError> {
        if self.done.len() < self.leaves.len() {
            return Err(AssembleError::TooShort {
                announced_bytes: self.size,
                actual_bytes: Leaves::place(self.leaves[self.done.len()], self.size).start,
            });
        }
        let announced = self.hash;
        let list = self.old_list.replaced(self.size, &self.done);
        let actual = list.as_ref().map_or(Hash([0; 32]), Leaves::hash);
        list.filter(|_| actual == announced)
            .ok_or(AssembleError::OtherContent { announced, actual })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::Hasher;
    use super::*;

    const MIB: usize = 1 << 20;

    fn noise(seed: u8, bytes: usize) -> Vec<u8> {
        let mut made = vec![0; bytes];
        blake3::Hasher::new_derive_key("omirr test")
            .update(&[seed])
            .finalize_xof()
            .fill(&mut made);
        made
    }

    fn list(bytes: &[u8]) -> Leaves {
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        hasher.leaves().unwrap()
    }

    /// Sends `new` to someone who has `old`; what comes of it, and the bytes of
    /// data that were sent.
    fn send(old: &[u8], new: &[u8]) -> (Vec<u8>, u64) {
        let (old_list, new_list) = (list(old), list(new));
        let leaves = new_list.differing(&old_list.names());
        let names = block_names(old, &old_list, &leaves).unwrap().unwrap();
        let mut patcher =
            Patcher::new(old, old_list, leaves.clone(), new_list.size(), new_list.hash()).unwrap();
        let (mut made, mut sent, mut ended) = (old.to_vec(), 0, false);
        send_patch(
            new,
            &new_list,
            &leaves,
            &names,
            old.len() as u64,
            |parts, last| {
                sent += parts.iter().map(Part::data_bytes).sum::<u64>();
                ended |= last;
                patcher
                    .take(&parts, &mut |edit| {
                        let (at, len) = (edit.at as usize, edit.len as usize);
                        let known = &old[at.min(old.len())..(at + len).min(old.len())];
                        assert_eq!(edit.old, known);
                        made.resize(made.len().max(at + len), 0);
                        match edit.bytes {
                            Some(bytes) => made[at..at + len].copy_from_slice(bytes),
                            None => made[at..at + len].fill(0),
                        }
                        Ok(())
                    })
                    .unwrap();
                ControlFlow::Continue(())
            },
        )
        .unwrap();
        assert!(ended);
        assert_eq!(patcher.finish().unwrap(), new_list);
        made.resize(new.len(), 0);
        (made, sent)
    }

    #[test]
    fn what_is_the_same_is_not_sent() {
        let old = noise(1, 6 * MIB + 100);
        let changed = |from: usize, with: &[u8]| {
            let mut new = old.clone();
            new[from..from + with.len()].copy_from_slice(with);
            new
        };
        let cases = [
            // In the middle of a block; over the end of a leaf; the last byte.
            (changed(2 * MIB + 5, b"new"), BLOCK_BYTES),
            (changed(3 * MIB - 10, &noise(2, 20)), 2 * BLOCK_BYTES),
            (changed(old.len() - 1, b"?"), 100),
            (changed(MIB / 2, &noise(2, MIB)), MIB),
            (old[..5 * MIB + 7].to_vec(), 7),
            (old[..5 * MIB].to_vec(), 0),
            ([&old[..], &noise(3, 3 * MIB)].concat(), 3 * MIB + 100),
            (changed(MIB, &[0; 256 << 10]), 0),
        ];
        for (n, (new, most)) in cases.iter().enumerate() {
            let (made, sent) = send(&old, new);
            assert!(made == *new, "case {n}");
            assert!(sent <= *most as u64, "case {n}: {sent} bytes");
        }
    }

    #[test]
    fn what_has_only_moved_is_not_sent_as_changed() {
        let old = noise(1, 16 * MIB);
        let verdict = |new: &[u8]| {
            let (old_list, new_list) = (list(&old), list(new));
            let leaves = new_list.differing(&old_list.names());
            let names = block_names(&old[..], &old_list, &leaves).unwrap().unwrap();
            is_too_much(new, &new_list, &leaves, &names, old.len() as u64).unwrap()
        };
        assert!(verdict(&[b"inserted", &old[..]].concat()));
        assert!(verdict(&old[1..]));
        // A page here and there, or something new at the end.
        let mut pages = old.clone();
        (0..4096).step_by(3).for_each(|page| pages[page * 4096] ^= 1);
        assert!(!verdict(&pages));
        assert!(!verdict(&[&old[..], &noise(2, 20 * MIB)].concat()));
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let old = noise(1, 5 * MIB);
        let new_hash = list(&noise(2, 5 * MIB)).hash();
        let cases: [(&[Part], &str); 8] = [
            (&[Part::Have(1)], "a reference to chunk 1 of 256"),
            (&[Part::Have(0), Part::Have(0)], "a reference to chunk 0 of 256"),
            (
                &[Part::Data(Bytes::from_static(b"x")), Part::Have(0)],
                "a reference",
            ),
            (&[Part::Hole(5)], "more than"),
            (&[Part::Hole(0)], "more than"),
            (&[Part::Hole(2 << 20)], "more than"),
            (&[Part::Hole(1 << 20), Part::Have(256)], "a reference"),
            (&[Part::Hole(1 << 20)], "with hash"),
        ];
        for (parts, expected) in cases {
            let mut patcher = Patcher::new(&old[..], list(&old), vec![2], 5 << 20, new_hash).unwrap();
            let taken = patcher.take(parts, &mut |_| Ok(()));
            let error = taken
                .err()
                .or_else(|| patcher.finish().err())
                .unwrap()
                .to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
        let short = Patcher::new(&old[..], list(&old), vec![2], 5 << 20, new_hash).unwrap();
        assert!(matches!(short.finish(), Err(AssembleError::TooShort { .. })));
    }

    #[test]
    fn a_source_that_is_not_as_listed_is_found_out() {
        let bytes = noise(1, 5 * MIB);
        let other = noise(2, 5 * MIB);
        assert_eq!(block_names(&other[..], &list(&bytes), &[1]).unwrap(), None);
        assert_eq!(block_names(&bytes[..MIB], &list(&bytes), &[1]).unwrap(), None);
        let sent = |source: &[u8]| {
            send_patch(source, &list(&bytes), &[1], &[], 0, |_, _| {
                ControlFlow::Continue(())
            })
            .unwrap_err()
            .to_string()
        };
        assert!(sent(&other).contains("another than announced"));
        assert!(sent(&bytes[..MIB]).contains("shorter"));
        assert!(sent(&[&bytes[..], b"+"].concat()).contains("longer"));
    }
}
