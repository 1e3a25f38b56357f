//! The hash that names a whole content.
//!
//! In: bytes and runs of zeros, in order. Out: the same hash however they were
//! divided, and whether zeros came as a hole or as bytes. Up to [`LEAF_BYTES`]
//! it is the content's BLAKE3 hash. Longer contents are cut into leaves of that
//! size, the last one shorter, whose BLAKE3 hashes are joined by a binary tree
//! of the shape of BLAKE3's own: the left half of a node is the greatest power
//! of two of leaves that leaves something for the right.
//!
//! BLAKE3 itself would not do for a file of a terabyte with a few bytes in it:
//! it numbers its chunks, so that no two of them hash alike and every zero of a
//! hole must be hashed. Here like leaves hash alike: a hole of any size costs a
//! node per level.

use std::sync::LazyLock;

use super::leaves::{LEAVES_MAX, LEAVES_MIN_BYTES, Leaves};
use super::sketch::Sketcher;
use crate::model::{Hash, Sketch};

/// Large enough that the tree costs nothing beside the leaves.
pub const LEAF_BYTES: u64 = 1 << 20;
/// More than a file has levels.
const LEVELS: usize = 44;
/// Inner nodes and roots are hashed with keys, so that no content's own bytes
/// have their hashes.
const NODE_KEY: &[u8; 32] = b"omirr: content tree: inner node.";
const ROOT_KEY: &[u8; 32] = b"omirr: content tree: root, size.";

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// By level: the hash of a subtree of nothing but zeros.
static ZERO_TREES: LazyLock<[[u8; 32]; LEVELS]> = LazyLock::new(|| {
    let mut hasher = blake3::Hasher::new();
    feed_zeros(&mut hasher, LEAF_BYTES);
    let mut trees = [hasher.finalize().into(); LEVELS];
    for level in 1..LEVELS {
        trees[level] = join(&trees[level - 1], &trees[level - 1]);
    }
    trees
});

fn join(left: &[u8; 32], right: &[u8; 32]) -> [u8; 32] {
    blake3::keyed_hash(NODE_KEY, &[*left, *right].concat()).into()
}

/// The hash of a content of `bytes` bytes whose leaves have these hashes.
pub(super) fn joined(leaves: &[[u8; 32]], bytes: u64) -> Hash {
    let mut tree = Tree::default();
    let Some((last, closed)) = leaves.split_last() else {
        return Hasher::new().finish();
    };
    for leaf in closed {
        tree.push(*leaf, 0);
    }
    tree.finish(*last, bytes)
}

fn feed_zeros(hasher: &mut blake3::Hasher, mut count: u64) {
    while count > 0 {
        let step = count.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..usize::try_from(step).unwrap_or(ZEROS.len())]);
        count -= step;
    }
}

/// Hashes a content piece by piece.
#[derive(Clone, Debug)]
pub struct Hasher {
    /// Of the leaf that is not closed; it is when more comes than it can take.
    leaf: blake3::Hasher,
    leaf_bytes: u64,
    tree: Tree,
    /// The closed leaves' hashes; none where they became too many.
    list: Option<Vec<[u8; 32]>>,
    /// If a sketch is wanted, too.
    sketcher: Option<Sketcher>,
}

impl Default for Hasher {
    fn default() -> Hasher {
        Hasher::new()
    }
}

impl Hasher {
    pub fn new() -> Hasher {
        Hasher {
            leaf: blake3::Hasher::new(),
            leaf_bytes: 0,
            tree: Tree::default(),
            list: Some(Vec::new()),
            sketcher: None,
        }
    }

    /// One that makes a [`sketch`](Hasher::sketch), too.
    pub fn sketching() -> Hasher {
        Hasher {
            sketcher: Some(Sketcher::new()),
            ..Hasher::new()
        }
    }

    /// What the content is like; nothing if that was not asked for.
    pub fn sketch(&self) -> Sketch {
        self.sketcher.clone().map(Sketcher::finish).unwrap_or_default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.leaf_bytes == LEAF_BYTES {
                self.close_leaf();
            }
            let room = usize::try_from(LEAF_BYTES - self.leaf_bytes).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.leaf.update(now);
            if let Some(sketcher) = &mut self.sketcher {
                sketcher.take(self.tree.leaves, self.leaf_bytes, now);
            }
            self.leaf_bytes += now.len() as u64;
            bytes = later;
        }
    }

    /// Takes `count` zero bytes.
    pub fn zeros(&mut self, mut count: u64) {
        if let Some(sketcher) = &mut self.sketcher {
            sketcher.end_window();
        }
        let now = count.min(LEAF_BYTES - self.leaf_bytes);
        feed_zeros(&mut self.leaf, now);
        self.leaf_bytes += now;
        count -= now;
        if count == 0 {
            return;
        }
        self.close_leaf();
        // The last leaf stays open, though it may be full.
        while count > LEAF_BYTES {
            let level = self.tree.leaves.trailing_zeros();
            let level = level.min(((count - 1) / LEAF_BYTES).ilog2());
            let level = level.min(LEVELS as u32 - 1);
            self.tree.push(ZERO_TREES[level as usize], level);
            self.note(&ZERO_TREES[0], 1 << level);
            count -= LEAF_BYTES << level;
        }
        feed_zeros(&mut self.leaf, count);
        self.leaf_bytes = count;
    }

    /// Takes a leaf whose bytes were hashed elsewhere, when all before it is whole
    /// leaves and more comes after it; with the values of its sketch.
    pub(super) fn leaf(&mut self, leaf: &HashedLeaf) {
        if self.leaf_bytes == LEAF_BYTES {
            self.close_leaf();
        }
        debug_assert_eq!(self.leaf_bytes, 0, "leaves follow whole leaves");
        self.tree.push(leaf.hash, 0);
        self.note(&leaf.hash, 1);
        if let (Some(sketcher), Some(own)) = (&mut self.sketcher, &leaf.sketcher) {
            sketcher.join(own);
        }
    }

    /// The hash of all that came.
    pub fn finish(&self) -> Hash {
        let last: [u8; 32] = self.leaf.finalize().into();
        self.tree
            .finish(last, self.tree.leaves * LEAF_BYTES + self.leaf_bytes)
    }

    /// The hashes of its leaves, if it is worth having them.
    pub fn leaves(&self) -> Option<Leaves> {
        let closed = self.list.as_ref()?;
        let bytes = self.tree.leaves * LEAF_BYTES + self.leaf_bytes;
        if bytes < LEAVES_MIN_BYTES {
            return None;
        }
        let mut hashes = closed.clone();
        hashes.push(self.leaf.finalize().into());
        Leaves::new(bytes, hashes)
    }

    fn close_leaf(&mut self) {
        let leaf = self.leaf.finalize().into();
        self.leaf.reset();
        self.leaf_bytes = 0;
        self.tree.push(leaf, 0);
        self.note(&leaf, 1);
    }

    /// Adds like leaves to the list.
    fn note(&mut self, leaf: &[u8; 32], count: u64) {
        if let Some(list) = &mut self.list {
            match usize::try_from(count)
                .ok()
                .filter(|count| *count <= LEAVES_MAX - list.len())
            {
                Some(count) => list.resize(list.len() + count, *leaf),
                None => self.list = None,
            }
        }
    }
}

/// A whole leaf, hashed by itself.
pub(super) struct HashedLeaf {
    hash: [u8; 32],
    sketcher: Option<Sketcher>,
}

impl HashedLeaf {
    /// Hashes what `read` gives for the leaf with this number; `read` fills the
    /// buffer that it gets from the place in the leaf that it is told.
    pub(super) fn of<E>(
        number: u64,
        buffer: &mut [u8],
        mut read: impl FnMut(&mut [u8], u64) -> Result<(), E>,
    ) -> Result<HashedLeaf, E> {
        let mut hasher = blake3::Hasher::new();
        let mut sketcher = Sketcher::new();
        let mut at = 0;
        while at < LEAF_BYTES {
            let len = buffer
                .len()
                .min(usize::try_from(LEAF_BYTES - at).unwrap_or(usize::MAX));
            read(&mut buffer[..len], at)?;
            hasher.update(&buffer[..len]);
            sketcher.take(number, at, &buffer[..len]);
            at += len as u64;
        }
        Ok(HashedLeaf {
            hash: hasher.finalize().into(),
            sketcher: Some(sketcher),
        })
    }

    /// One of zeros, which need not be read.
    pub(super) fn zero() -> HashedLeaf {
        HashedLeaf {
            hash: ZERO_TREES[0],
            sketcher: None,
        }
    }
}

/// Closed leaves, joined as far as they can be.
#[derive(Clone, Debug, Default)]
struct Tree {
    leaves: u64,
    /// Subtrees that wait for a right half, the largest first.
    stack: Vec<[u8; 32]>,
}

impl Tree {
    /// Adds a subtree of 2^`level` leaves, which begins at a multiple of that.
    fn push(&mut self, mut tree: [u8; 32], level: u32) {
        self.leaves += 1 << level;
        let mut pairs = self.leaves >> level;
        while pairs & 1 == 0 {
            let Some(left) = self.stack.pop() else { break };
            tree = join(&left, &tree);
            pairs >>= 1;
        }
        self.stack.push(tree);
    }

    /// The hash of a content of `bytes` bytes that ends with the leaf `last`.
    fn finish(&self, last: [u8; 32], bytes: u64) -> Hash {
        if self.leaves == 0 {
            return Hash(last);
        }
        let tree = self.stack.iter().rfold(last, |right, left| join(left, &right));
        let mut root = blake3::Hasher::new_keyed(ROOT_KEY);
        root.update(&tree).update(&bytes.to_le_bytes());
        Hash(root.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The tree by its definition, of bytes in memory.
    fn plain(bytes: &[u8]) -> Hash {
        fn tree(leaves: &[[u8; 32]]) -> [u8; 32] {
            match leaves {
                [leaf] => *leaf,
                _ => {
                    let half = leaves.len().next_power_of_two() / 2;
                    join(&tree(&leaves[..half]), &tree(&leaves[half..]))
                }
            }
        }
        let leaves: Vec<[u8; 32]> = bytes
            .chunks(LEAF_BYTES as usize)
            .map(|leaf| blake3::hash(leaf).into())
            .collect();
        if leaves.len() < 2 {
            return Hash(blake3::hash(bytes).into());
        }
        let mut root = blake3::Hasher::new_keyed(ROOT_KEY);
        root.update(&tree(&leaves))
            .update(&(bytes.len() as u64).to_le_bytes());
        Hash(root.finalize().into())
    }

    #[test]
    fn what_fits_into_a_leaf_has_its_blake3_hash() {
        for size in [0, 1, 1024, LEAF_BYTES as usize] {
            let bytes = vec![7; size];
            let mut hasher = Hasher::new();
            hasher.update(&bytes);
            assert_eq!(hasher.finish(), Hash(blake3::hash(&bytes).into()), "{size}");
        }
    }

    #[test]
    fn a_hole_of_a_terabyte_costs_no_time_and_counts_every_byte() {
        let of = |bytes: u64| {
            let mut hasher = Hasher::new();
            hasher.zeros(bytes);
            hasher.finish()
        };
        let started = std::time::Instant::now();
        let hashes: std::collections::BTreeSet<Hash> =
            [(1 << 40) - 1, 1 << 40, (1 << 40) + 1, i64::MAX as u64]
                .map(of)
                .into();
        assert_eq!(hashes.len(), 4);
        // Hashing them would take minutes.
        assert!(started.elapsed() < std::time::Duration::from_secs(20));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        #[test]
        fn however_a_content_comes_it_has_one_hash(
            runs in prop::collection::vec((any::<bool>(), 0..3 * LEAF_BYTES), 0..6),
            cut in 1..3 * LEAF_BYTES as usize,
        ) {
            let mut bytes = Vec::new();
            let mut hasher = Hasher::new();
            for (is_hole, len) in runs {
                // Whole leaves are where mistakes would be.
                let len = if len % 3 == 0 { len / LEAF_BYTES * LEAF_BYTES } else { len };
                let byte = if is_hole { 0 } else { (bytes.len() % 250) as u8 };
                bytes.resize(bytes.len() + len as usize, byte);
                if is_hole {
                    hasher.zeros(len);
                } else {
                    hasher.update(&vec![byte; len as usize]);
                }
            }
            prop_assert_eq!(hasher.finish(), plain(&bytes));
            let mut pieces = Hasher::new();
            bytes.chunks(cut).for_each(|piece| pieces.update(piece));
            prop_assert_eq!(pieces.finish(), plain(&bytes));
        }
    }
}
