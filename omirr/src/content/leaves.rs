//! The hashes of a large content's leaves.
//!
//! In: leaves' hashes, as a content is hashed, or the bytes that an index keeps
//! of them. Out: the content's hash; which leaves of two contents differ; the
//! hash of a content of which some leaves were replaced, though the others are
//! not read. A list that does not join to the hash it is kept for is none, so
//! nothing here need be believed.

use std::ops::Range;

use super::ChunkId;
use super::whole::{LEAF_BYTES, joined};
use crate::model::Hash;

/// Smaller contents are read and sent about as fast as they are compared.
pub const LEAVES_MIN_BYTES: u64 = 4 << 20;
/// Longer lists, of files above 256 GiB, take more memory than they are worth.
pub const LEAVES_MAX: usize = 262_144;

/// One hash per leaf of a content, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaves {
    /// The content's, bytes.
    size: u64,
    hashes: Vec<[u8; 32]>,
}

impl Leaves {
    /// None for contents that are too small or too large, and where there are
    /// not as many hashes as the size demands.
    pub fn new(size: u64, hashes: Vec<[u8; 32]>) -> Option<Leaves> {
        let fits = (LEAVES_MIN_BYTES..=LEAF_BYTES * LEAVES_MAX as u64).contains(&size)
            && size.div_ceil(LEAF_BYTES) == hashes.len() as u64;
        fits.then_some(Leaves { size, hashes })
    }

    /// Bytes of the content.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many leaves there are.
    pub fn count(&self) -> usize {
        self.hashes.len()
    }

    /// The hash of leaf number `leaf`.
    pub fn get(&self, leaf: usize) -> Option<&[u8; 32]> {
        self.hashes.get(leaf)
    }

    /// The hash of the content.
    pub fn hash(&self) -> Hash {
        joined(&self.hashes, self.size)
    }

    /// The first 16 bytes of each: enough to tell two leaves apart, and if it is
    /// not, the content's hash shows it.
    pub fn names(&self) -> Vec<ChunkId> {
        self.hashes.iter().map(name_of).collect()
    }

    /// The leaves of this content that another, whose leaves have these names,
    /// does not have in the same place.
    pub fn differing(&self, other: &[ChunkId]) -> Vec<u64> {
        let differs = |(leaf, hash): &(usize, &[u8; 32])| other.get(*leaf) != Some(&name_of(hash));
        let differing = self.hashes.iter().enumerate().filter(differs);
        differing.map(|(leaf, _)| leaf as u64).collect()
    }

    /// The list of a content of `size` bytes that has these leaves where they
    /// are named, and this one's everywhere else.
    pub fn replaced(&self, size: u64, new: &[(u64, [u8; 32])]) -> Option<Leaves> {
        let count = usize::try_from(size.div_ceil(LEAF_BYTES)).ok()?;
        if count > LEAVES_MAX {
            return None;
        }
        let mut hashes = self.hashes.clone();
        // What is missing must be among the new ones, or the hash tells.
        hashes.resize(count, [0; 32]);
        for (leaf, hash) in new {
            *hashes.get_mut(usize::try_from(*leaf).ok()?)? = *hash;
        }
        Leaves::new(size, hashes)
    }

    /// Where leaf number `leaf` lies in a content of `size` bytes.
    pub fn place(leaf: u64, size: u64) -> Range<u64> {
        let start = leaf.saturating_mul(LEAF_BYTES).min(size);
        start..size.min(start.saturating_add(LEAF_BYTES))
    }

    /// For an index: the size, then runs of like leaves, each as its length and
    /// the hash. Holes are long runs.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.size.to_le_bytes().to_vec();
        for run in self.hashes.chunk_by(|one, next| one == next) {
            bytes.extend((run.len() as u32).to_le_bytes());
            bytes.extend(run[0]);
        }
        bytes
    }

    /// What [`to_bytes`](Leaves::to_bytes) made of the list of the content with
    /// this hash; none if it is that of another, or damaged.
    pub fn from_bytes(bytes: &[u8], of: &Hash) -> Option<Leaves> {
        let (size, mut runs) = bytes.split_first_chunk::<8>()?;
        let mut hashes = Vec::new();
        while !runs.is_empty() {
            let (count, rest) = runs.split_first_chunk::<4>()?;
            let (hash, rest) = rest.split_first_chunk::<32>()?;
            let count = u32::from_le_bytes(*count) as usize;
            if count > LEAVES_MAX - hashes.len() {
                return None;
            }
            hashes.resize(hashes.len() + count, *hash);
            runs = rest;
        }
        Leaves::new(u64::from_le_bytes(*size), hashes).filter(|leaves| leaves.hash() == *of)
    }
}

fn name_of(hash: &[u8; 32]) -> ChunkId {
    *hash.first_chunk().expect("16 of 32 bytes")
}

#[cfg(test)]
mod tests {
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

    fn leaves(bytes: &[u8]) -> Leaves {
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        hasher.leaves().unwrap()
    }

    #[test]
    fn a_list_joins_to_the_hash_of_the_content() {
        for size in [4 * MIB, 4 * MIB + 1, 7 * MIB - 1, 9 * MIB] {
            let bytes = noise(1, size);
            let list = leaves(&bytes);
            assert_eq!(list.hash(), super::super::hash_bytes(&bytes), "{size}");
            assert_eq!(list.count(), size.div_ceil(MIB));
        }
        let mut small = Hasher::new();
        small.update(&[1; 4 * MIB - 1]);
        assert_eq!(small.leaves(), None);
    }

    #[test]
    fn what_a_hole_has_is_kept_in_few_bytes_and_a_huge_one_not_at_all() {
        let mut hasher = Hasher::new();
        hasher.zeros(100 << 30);
        hasher.update(b"end");
        let list = hasher.leaves().unwrap();
        let bytes = list.to_bytes();
        assert_eq!(bytes.len(), 8 + 2 * 36);
        assert_eq!(Leaves::from_bytes(&bytes, &hasher.finish()), Some(list));
        hasher.zeros(1 << 60);
        assert_eq!(hasher.leaves(), None);
    }

    #[test]
    fn the_difference_of_two_contents_gives_the_second_ones_hash() {
        let old = noise(1, 8 * MIB + 5);
        let mut new = old.clone();
        new[3 * MIB - 1] ^= 1;
        new[3 * MIB] ^= 1;
        new.extend(noise(2, 2 * MIB));
        for (from, to) in [(&old, &new), (&new, &old)] {
            let (from, to) = (leaves(from), leaves(to));
            let differing = to.differing(&from.names());
            let expected: &[u64] = if from.size() < to.size() {
                &[2, 3, 8, 9, 10]
            } else {
                &[2, 3, 8]
            };
            assert_eq!(differing, expected);
            let new: Vec<_> = differing
                .iter()
                .map(|&leaf| (leaf, *to.get(leaf as usize).unwrap()))
                .collect();
            assert_eq!(from.replaced(to.size(), &new).unwrap().hash(), to.hash());
            assert_ne!(
                from.replaced(to.size(), &new[1..]).map(|list| list.hash()),
                Some(to.hash())
            );
        }
    }

    #[test]
    fn a_damaged_list_is_none() {
        let list = leaves(&noise(3, 5 * MIB));
        let (bytes, hash) = (list.to_bytes(), list.hash());
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x80;
            assert_eq!(Leaves::from_bytes(&bad, &hash), None, "byte {at}");
            assert_eq!(Leaves::from_bytes(&bytes[..at], &hash), None, "up to {at}");
        }
        let endless = [&[0; 8][..], &[255; 36]].concat();
        assert_eq!(Leaves::from_bytes(&endless, &hash), None);
    }
}
