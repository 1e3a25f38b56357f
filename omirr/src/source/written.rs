//! Where a content was written to.
//!
//! In: the byte ranges that a source tells. Out: a few ranges of whole MiB that
//! cover them, so that a file of any size is read again only there. In doubt it
//! is everywhere: what is left out here is not read. Pure.

use std::ops::Range;

/// What is told apart: about what is hashed as one, bytes as a power of two.
const GRAIN_BITS: u32 = 20;
/// So many ranges are kept; the nearest are joined where there are more.
const RANGES: usize = 4;

/// Which bytes of a content may be others than before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Written {
    /// All of them, as far as is known.
    #[default]
    Anywhere,
    /// None: only attributes have changed, or a writer has let go of the file.
    Nowhere,
    /// Those in these ranges, which lie in order and apart from each other.
    Within(Ranges),
}

/// Ranges of grains, from and up to; those behind the last are empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranges([(u32, u32); RANGES]);

impl Written {
    /// The bytes from `from` up to `to`.
    pub fn within(from: u64, to: u64) -> Written {
        // Nothing, or backwards: whoever says so does not know.
        if to <= from {
            return Written::Anywhere;
        }
        let end = to.div_ceil(1 << GRAIN_BITS);
        match (u32::try_from(from >> GRAIN_BITS), u32::try_from(end)) {
            (Ok(from), Ok(end)) if from < end => {
                let mut ranges = [(0, 0); RANGES];
                ranges[0] = (from, end);
                Written::Within(Ranges(ranges))
            }
            // Up to the end, wherever that is.
            _ => Written::Anywhere,
        }
    }

    /// What may have changed after both.
    #[must_use]
    pub fn and(self, other: Written) -> Written {
        match (self, other) {
            (Written::Anywhere, _) | (_, Written::Anywhere) => Written::Anywhere,
            (Written::Nowhere, other) => other,
            (one, Written::Nowhere) => one,
            (Written::Within(one), Written::Within(other)) => Written::Within(one.joined(other)),
        }
    }

    /// Whether there is nothing of `other` that is not in this.
    pub fn covers(self, other: Written) -> bool {
        match (self, other) {
            (Written::Anywhere, _) | (_, Written::Nowhere) => true,
            (_, Written::Anywhere) | (Written::Nowhere, _) => false,
            (Written::Within(all), Written::Within(some)) => some
                .grains()
                .all(|(from, to)| all.grains().any(|(start, end)| start <= from && to <= end)),
        }
    }
}

impl Ranges {
    /// In bytes.
    pub fn bytes(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let bytes = |grains: u32| u64::from(grains) << GRAIN_BITS;
        self.grains().map(move |(from, to)| bytes(from)..bytes(to))
    }

    fn grains(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.0.iter().copied().filter(|(from, to)| from < to)
    }

    fn joined(self, other: Ranges) -> Ranges {
        let mut all = [(0, 0); 2 * RANGES];
        let mut count = 0;
        let mut sorted: [(u32, u32); 2 * RANGES] = std::array::from_fn(|n| {
            let of = if n < RANGES { &self } else { &other };
            of.0[n % RANGES]
        });
        sorted.sort_unstable();
        for (from, to) in sorted.into_iter().filter(|(from, to)| from < to) {
            match all[..count].last_mut() {
                Some((_, end)) if from <= *end => *end = to.max(*end),
                _ => {
                    all[count] = (from, to);
                    count += 1;
                }
            }
        }
        while count > RANGES {
            let gap = |n: &usize| all[n + 1].0 - all[*n].1;
            let nearest = (0..count - 1).min_by_key(gap).unwrap_or(0);
            all[nearest].1 = all[nearest + 1].1;
            all.copy_within(nearest + 2..count, nearest + 1);
            count -= 1;
        }
        let mut ranges = [(0, 0); RANGES];
        let kept = count.min(RANGES);
        ranges[..kept].copy_from_slice(&all[..kept]);
        Ranges(ranges)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << GRAIN_BITS;

    fn bytes(written: Written) -> Vec<Range<u64>> {
        match written {
            Written::Within(ranges) => ranges.bytes().collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_range_covers_whole_mib_and_nonsense_is_everywhere() {
        assert_eq!(bytes(Written::within(MIB - 1, MIB + 1)), vec![0..2 * MIB]);
        assert_eq!(bytes(Written::within(3 * MIB, 4 * MIB)), vec![3 * MIB..4 * MIB]);
        for (from, to) in [(0, 0), (MIB, MIB), (5, 5), (5, 4), (2 * MIB, 0), (5, u64::MAX)] {
            assert_eq!(Written::within(from, to), Written::Anywhere, "{from}..{to}");
        }
    }

    #[test]
    fn doubt_wins_and_nothing_adds_nothing() {
        let one = Written::within(0, 1);
        assert_eq!(Written::Nowhere.and(one), one);
        assert_eq!(one.and(Written::Nowhere), one);
        assert_eq!(Written::Nowhere.and(Written::Nowhere), Written::Nowhere);
        assert_eq!(one.and(Written::default()), Written::Anywhere);
        assert_eq!(Written::Anywhere.and(Written::Nowhere), Written::Anywhere);
    }

    #[test]
    fn a_part_covers_what_lies_in_it_and_no_more() {
        let part = Written::within(0, 2 * MIB).and(Written::within(5 * MIB, 6 * MIB));
        for inside in [
            Written::within(1, 5),
            Written::within(5 * MIB, 5 * MIB + 1),
            part,
            Written::Nowhere,
        ] {
            assert!(
                part.covers(inside) && Written::Anywhere.covers(inside),
                "{inside:?}"
            );
        }
        for outside in [
            Written::within(3 * MIB, 4 * MIB),
            Written::within(MIB, 3 * MIB),
            Written::Anywhere,
            Written::within(1, 5).and(Written::within(9 * MIB, 10 * MIB)),
        ] {
            assert!(!part.covers(outside), "{outside:?}");
        }
        assert!(Written::Nowhere.covers(Written::Nowhere) && !Written::Nowhere.covers(part));
    }

    #[test]
    fn where_there_are_too_many_the_nearest_are_joined() {
        let places = [0, 10, 13, 30, 50];
        let all = places
            .map(|place| Written::within(place * MIB, place * MIB + 1))
            .into_iter()
            .fold(Written::Nowhere, Written::and);
        let expected = [0..1, 10..14, 30..31, 50..51].map(|r| r.start * MIB..r.end * MIB);
        assert_eq!(bytes(all), expected);
    }

    proptest! {
        #[test]
        fn whatever_was_written_is_covered(
            writes in prop::collection::vec((0..100 * MIB, 1..3 * MIB), 1..20),
        ) {
            let all = writes
                .iter()
                .map(|(from, len)| Written::within(*from, from + len))
                .fold(Written::Nowhere, Written::and);
            let ranges = bytes(all);
            prop_assert!(ranges.len() <= RANGES);
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
            for (from, len) in writes {
                let covers = |range: &Range<u64>| range.start <= from && from + len <= range.end;
                prop_assert!(ranges.iter().any(covers), "{from} +{len}: {ranges:?}");
            }
        }
    }
}
