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

    /// Where what was called `path` may be by now, one rename after another.
    pub(super) fn now_at(&self, path: &RelPath) -> Vec<RelPath> {
        let mut places = Vec::new();
        let mut at = path.clone();
        for (_, from, to) in &self.moves {
            if let Some(moved) = at.rebase(from, to) {
                at = moved;
                places.push(at.clone());
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
        assert_eq!(renamed.now_at(&path("a/x")), [path("b/c/x"), path("d/c/x")]);
        assert_eq!(renamed.now_at(&path("b/y")), [path("d/y")]);
        assert_eq!(renamed.now_at(&path("ab")), []);
        let later = start + KEPT_FOR + Duration::from_secs(1);
        renamed.note(path("e"), path("f"), later);
        assert_eq!(renamed.now_at(&path("a/x")), []);
        assert_eq!(renamed.now_at(&path("b/y")), [path("d/y")]);
    }
}
