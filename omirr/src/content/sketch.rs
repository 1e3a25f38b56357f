//! Which contents are alike.
//!
//! In: a large content's bytes, as they are hashed. Out: its [`Sketch`]. Each
//! window of [`WINDOW_BYTES`] gives one value, the least that a rolling hash of
//! 64 bytes takes in it, so that a few inserted bytes seldom change it; of all
//! values the least few are kept (Broder, "On the resemblance and containment
//! of documents", 1997). Windows are few, since every byte of them costs about
//! as much as hashing it: all of the first leaf, and the beginning of each
//! later one.

use super::whole::LEAF_BYTES;
use crate::model::Sketch;

const WINDOW_BYTES: u64 = 64 << 10;
/// So many bytes a value depends on.
const ROLLED_BYTES: usize = 64;

/// By byte: numbers as good as random. Every node must have the same, so they
/// are made by a rule: Steele, Lea and Flood's SplitMix64, from 0.
static GEAR: [u64; 256] = gear();

const fn gear() -> [u64; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < table.len() {
        table[byte] = mixed((byte as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        byte += 1;
    }
    table
}

const fn mixed(value: u64) -> u64 {
    let z = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[derive(Clone, Debug)]
pub(super) struct Sketcher {
    rolled: u64,
    /// Of the window.
    bytes: usize,
    least: u64,
    greatest: u64,
    values: Vec<u64>,
}

impl Sketcher {
    pub(super) fn new() -> Sketcher {
        Sketcher {
            rolled: 0,
            bytes: 0,
            least: u64::MAX,
            greatest: 0,
            values: Vec::new(),
        }
    }

    /// Takes bytes of leaf number `leaf`, which begin `at` bytes into it and end
    /// in it.
    pub(super) fn take(&mut self, leaf: u64, mut at: u64, mut bytes: &[u8]) {
        let until = if leaf == 0 { LEAF_BYTES } else { WINDOW_BYTES };
        while at < until && !bytes.is_empty() {
            let room = usize::try_from(WINDOW_BYTES - at % WINDOW_BYTES).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.roll(now);
            at += now.len() as u64;
            bytes = later;
            if at.is_multiple_of(WINDOW_BYTES) {
                self.end_window();
            }
        }
    }

    fn roll(&mut self, bytes: &[u8]) {
        let step = |rolled: u64, byte: u8| (rolled << 1).wrapping_add(GEAR[usize::from(byte)]);
        // The first values would depend on where the window begins.
        let (first, rest) = bytes.split_at(bytes.len().min(ROLLED_BYTES.saturating_sub(self.bytes)));
        let mut rolled = first.iter().fold(self.rolled, |rolled, byte| step(rolled, *byte));
        for byte in rest {
            rolled = step(rolled, *byte);
            self.least = self.least.min(rolled);
            self.greatest = self.greatest.max(rolled);
        }
        self.rolled = rolled;
        self.bytes += bytes.len();
    }

    /// What follows has nothing to do with what came: a hole, or another window.
    pub(super) fn end_window(&mut self) {
        // Zeros, or any byte again and again, make nothing alike.
        if self.least < self.greatest {
            self.values.push(mixed(self.least));
            if self.values.len() >= 4 * Sketch::VALUES_MAX {
                self.values = self.so_far().values().to_vec();
            }
        }
        *self = Sketcher {
            values: std::mem::take(&mut self.values),
            ..Sketcher::new()
        };
    }

    /// Takes what another made of what comes next, in windows of its own.
    pub(super) fn join(&mut self, next: &Sketcher) {
        self.end_window();
        let mut next = next.clone();
        next.end_window();
        self.values.append(&mut next.values);
        if self.values.len() >= 4 * Sketch::VALUES_MAX {
            self.values = self.so_far().values().to_vec();
        }
    }

    fn so_far(&self) -> Sketch {
        Sketch::of_least(self.values.clone())
    }

    pub(super) fn finish(mut self) -> Sketch {
        self.end_window();
        self.so_far()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Hasher;
    use super::*;

    fn noise(seed: u64, bytes: usize) -> Vec<u8> {
        (0..bytes as u64 / 8)
            .flat_map(|n| mixed((seed << 40 | n).wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes())
            .collect()
    }

    fn sketch(bytes: &[u8]) -> Sketch {
        let mut hasher = Hasher::sketching();
        // In pieces of odd sizes: how they come makes no difference.
        for piece in bytes.chunks(77_777) {
            hasher.update(piece);
        }
        hasher.sketch()
    }

    #[test]
    fn versions_of_a_content_are_alike_and_others_are_not() {
        let old = noise(1, 20 << 20);
        let known = sketch(&old);
        assert_eq!(known.values().len(), Sketch::VALUES_MAX);
        let mut whole = Hasher::sketching();
        whole.update(&old);
        assert_eq!(whole.sketch(), known);
        let mut edited = old.clone();
        edited[7 << 20..8 << 20].copy_from_slice(&noise(2, 1 << 20));
        let longer = [&old[..], &noise(3, 5 << 20)].concat();
        let begun_anew = [b"a few new bytes at the front", &old[..]].concat();
        let inserted = [&old[..10_000_000], b"here", &old[10_000_000..]].concat();
        for (what, new) in [
            ("edited", edited),
            ("longer", longer),
            ("begun anew", begun_anew),
            ("inserted", inserted),
        ] {
            let common = sketch(&new).in_common(&known);
            assert!(common >= 4, "{what}: {common}");
        }
        assert_eq!(sketch(&noise(4, 20 << 20)).in_common(&known), 0);
    }

    #[test]
    fn what_is_all_the_same_is_like_nothing() {
        assert!(sketch(&[0; 3 << 20]).is_empty());
        assert!(sketch(&[b'x'; 3 << 20]).is_empty());
        let mut holes = Hasher::sketching();
        holes.zeros(5 << 30);
        holes.update(&noise(1, 1000));
        holes.zeros(5 << 30);
        assert_eq!(holes.sketch().values().len(), 1);
    }
}
