//! What was done for peers, and whose rows are not durable yet.
//!
//! In: the paths at which something was done. Out: since when there is
//! something, and which paths, so that they can be synced one by one where the
//! whole filesystem cannot: another program's disk errors, or those of a file
//! that finds no room, are not theirs.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::model::RelPath;

/// More paths are not remembered: then only the whole filesystem can be synced.
const PATHS_MAX: usize = 4096;

#[derive(Default)]
pub(super) struct Unsynced {
    since: Option<Instant>,
    paths: BTreeSet<RelPath>,
    too_many: bool,
}

impl Unsynced {
    pub(super) fn is_empty(&self) -> bool {
        self.since.is_none()
    }

    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Rows are decided, of which perhaps none has to do with the disk.
    pub(super) fn begin(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    pub(super) fn add(&mut self, paths: BTreeSet<RelPath>) {
        self.begin();
        if self.too_many || self.paths.len() + paths.len() > PATHS_MAX {
            self.too_many = true;
            self.paths.clear();
        } else {
            self.paths.extend(paths);
        }
    }

    /// All paths that are perhaps not on the disk; none if they were too many.
    pub(super) fn paths(&self) -> Option<Vec<RelPath>> {
        (!self.too_many).then(|| self.paths.iter().cloned().collect())
    }

    /// All of it is on the disk; that the rows say so is not durable yet.
    pub(super) fn is_on_disk(&mut self) {
        self.paths.clear();
        self.too_many = false;
    }

    /// The rows are durable, too.
    pub(super) fn clear(&mut self) {
        *self = Unsynced::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(names: std::ops::Range<usize>) -> BTreeSet<RelPath> {
        names
            .map(|n| RelPath::new(format!("f{n}").as_bytes()).unwrap())
            .collect()
    }

    #[test]
    fn too_many_paths_are_forgotten_until_all_is_synced() {
        let mut unsynced = Unsynced::default();
        assert!(unsynced.is_empty());
        unsynced.add(paths(0..PATHS_MAX));
        assert_eq!(unsynced.paths().unwrap().len(), PATHS_MAX);
        unsynced.add(paths(0..1));
        assert_eq!(unsynced.paths(), None);
        unsynced.add(paths(0..1));
        assert_eq!(unsynced.paths(), None, "one of those before is not known");
        unsynced.is_on_disk();
        assert!(!unsynced.is_empty(), "its rows are not durable");
        assert_eq!(unsynced.paths(), Some(Vec::new()));
        unsynced.clear();
        assert!(unsynced.is_empty());
    }
}
