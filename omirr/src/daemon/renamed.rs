//! Directories that the keeper has renamed for a peer, for a while.
//!
//! In: where a directory was, where it is. Out: where a path is now that someone
//! named before that was known. The daemon's own renames make no events, and the
//! resolver hears of one only after it was made: what users changed in the
//! directory a moment before has been, or is just being, called by the old name.
//! Looking at a path too many costs a `stat`.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::model::RelPath;

/// From the moment an event is resolved until its path is taken out of the dirty
/// set passes far less.
const KEPT_FOR: Duration = Duration::from_secs(60);
const KEPT: usize = 1024;

/// Renames in their order.
#[derive(Debug, Default)]
pub(super) struct Renamed {
    moves: VecDeque<(Instant, RelPath, RelPath)>,
}

impl Renamed {
    /// Notes that what was at `from` is at `to`.
    pub(super) fn note(&mut self, from: RelPath, to: RelPath, now: Instant) {
        while self.moves.len() >= KEPT || self.moves.front().is_some_and(|one| one.0 + KEPT_FOR < now) {
            self.moves.pop_front();
        }
        self.moves.push_back((now, from, to));
    }

    /// Where what was called `path` from `named` on may be by now, one rename after
    /// another, each with the moment from which it may be called so. Earlier renames
    /// are not about it; were they applied again to what they gave, a directory that
    /// was moved into another and back would make ever longer paths.
    pub(super) fn now_at(&self, path: &RelPath, named: Instant) -> Vec<(RelPath, Instant)> {
        let mut places = Vec::new();
        let mut at = path.clone();
        for (when, from, to) in self.moves.iter().filter(|(when, ..)| *when >= named) {
            if let Some(moved) = at.rebase(from, to) {
                at = moved;
                places.push((at.clone(), *when + Duration::from_nanos(1)));
            }
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn an_old_name_leads_through_all_renames_and_is_forgotten_in_time() {
        let mut renamed = Renamed::default();
        let start = Instant::now();
        renamed.note(path("a"), path("b/c"), start);
        renamed.note(path("b"), path("d"), start + KEPT_FOR);
        let places = |renamed: &Renamed, text: &str, named: Instant| {
            let places = renamed.now_at(&path(text), named);
            places.into_iter().map(|(place, _)| place).collect::<Vec<_>>()
        };
        assert_eq!(places(&renamed, "a/x", start), [path("b/c/x"), path("d/c/x")]);
        assert_eq!(places(&renamed, "b/y", start), [path("d/y")]);
        assert_eq!(places(&renamed, "ab", start), []);
        let later = start + KEPT_FOR + Duration::from_secs(1);
        renamed.note(path("e"), path("f"), later);
        assert_eq!(places(&renamed, "a/x", start), []);
        assert_eq!(places(&renamed, "b/y", start), [path("d/y")]);
        assert_eq!(places(&renamed, "b/y", later), [], "it was called so afterwards");
    }

    #[test]
    fn a_directory_that_goes_to_and_fro_makes_no_endless_paths() {
        let mut renamed = Renamed::default();
        let start = Instant::now();
        renamed.note(path("a"), path("b/a"), start);
        renamed.note(path("b"), path("a/b"), start + Duration::from_millis(1));
        let mut all = vec![(path("a/x"), start)];
        let mut next = 0;
        while let Some((at, named)) = all.get(next).cloned() {
            all.extend(renamed.now_at(&at, named));
            next += 1;
            assert!(next < 10, "{all:?}");
        }
    }
}
