//! Which steps of a plan may still be done once some have failed.
//!
//! In: the steps, one after another, and which of them failed. Out: whether the
//! next one may be tried, and in the end the paths whose rows must not go into
//! the index yet.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{RelPath, Row};

use super::plan::{Install, Step};
use super::rows::{Decided, Rows, Standing};

/// Follows the steps of one plan.
#[derive(Debug, Default)]
pub struct Progress {
    failed: BTreeSet<RelPath>,
    /// Paths that become directories: until they are, nothing may be put
    /// beneath them, even if there should be another directory at the path.
    new_dirs: BTreeSet<RelPath>,
    /// Directories that become something else or nothing: not before all that
    /// is beneath them has.
    old_dirs: BTreeSet<RelPath>,
    /// Second names that have been given, by the first.
    asides: BTreeMap<RelPath, RelPath>,
    /// All paths that are decided.
    decided: BTreeSet<RelPath>,
}

impl Progress {
    pub fn new<R: Rows>(rows: &R, decided: &[Decided]) -> Result<Progress, R::Error> {
        let mut progress = Progress::default();
        for one in decided {
            progress.decided.insert(one.path.clone());
            let was_dir = rows.standing(&one.path)? == Standing::Directory;
            match (was_dir, one.row.is_live_dir()) {
                (false, true) => drop(progress.new_dirs.insert(one.path.clone())),
                (true, false) => drop(progress.old_dirs.insert(one.path.clone())),
                _ => {}
            }
        }
        Ok(progress)
    }

    /// Whether `step` may be tried. If not, what it serves counts as failed.
    pub fn admits(&mut self, step: &Step) -> bool {
        if matches!(step, Step::Restore { .. }) {
            return true;
        }
        let path = step.path();
        let no_parent = matches!(step, Step::Install { .. })
            && path
                .parent()
                .is_some_and(|dir| self.new_dirs.contains(&dir) && self.failed.contains(&dir));
        if no_parent || self.failed.contains(path) {
            self.fail(step);
            return false;
        }
        if let Step::Aside { path, to } = step {
            self.asides.insert(path.clone(), to.clone());
        }
        true
    }

    /// Takes note that `step` failed. A directory whose times could not be set
    /// has been brought to its row all the same, and changed since: it must be
    /// looked at again, but its row is done, like those of what it holds.
    pub fn fail(&mut self, step: &Step) {
        match step {
            Step::Times { .. } | Step::Restore { .. } => return,
            Step::Aside { to, .. } => drop(self.failed.insert(to.clone())),
            // Its old name is still there: the tombstone waits.
            Step::Install {
                how: Install::Moved { from },
                ..
            } => drop(self.failed.insert(from.clone())),
            // Nothing in it has moved.
            Step::Install {
                path,
                how: Install::MovedTree { from },
                ..
            } => {
                let both = [from, path]
                    .into_iter()
                    .flat_map(|top| within(&self.decided, top));
                self.failed.extend(both.cloned());
            }
            _ => {}
        }
        self.failed.insert(step.path().clone());
        if let Step::Aside { path, .. } = step {
            self.asides.remove(path);
        }
    }

    /// What is to be done after all steps, once the rows that are done are in
    /// the index, which `rows` shows: content that kept its first name after
    /// all loses the second again. Otherwise the two would pass for hard links.
    pub fn take_back<R: Rows>(&self, rows: &R) -> Result<Vec<Step>, R::Error> {
        let mut steps = Vec::new();
        let kept = self.asides.iter().filter(|(path, _)| self.failed.contains(*path));
        for (_, to) in kept {
            steps.push(Step::Remove { path: to.clone() });
        }
        let parents: BTreeSet<RelPath> = steps.iter().filter_map(|step| step.path().parent()).collect();
        for path in parents {
            if let Some(row) = rows.row(&path)?.filter(Row::is_live_dir) {
                steps.push(Step::Times {
                    path,
                    entry: row.entry,
                });
            }
        }
        Ok(steps)
    }

    /// Whether the row for `path` may go into the index.
    pub fn is_done(&self, path: &RelPath) -> bool {
        // Someone may have taken a directory away together with something that
        // was to be removed from it; the index must not lose the parent first.
        let lost_child = || within(&self.failed, path).any(|failed| failed != path);
        let taken_back = self
            .asides
            .iter()
            .any(|(from, to)| to == path && self.failed.contains(from));
        let waits = self.failed.contains(path) || taken_back;
        let waits = waits || (self.old_dirs.contains(path) && lost_child());
        !waits
    }
}

/// The paths at and beneath `top`.
fn within<'a>(paths: &'a BTreeSet<RelPath>, top: &'a RelPath) -> impl Iterator<Item = &'a RelPath> {
    let end = top.beneath_range().1;
    paths
        .range::<RelPath, _>(top..)
        .take_while(move |path| end.as_ref().is_none_or(|end| path.as_bytes() < &end[..]))
        .filter(move |path| path.is_within(top))
}
