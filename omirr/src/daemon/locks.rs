//! Immutable and append-only inodes while a peer's rows are applied.
//!
//! In: the steps of a plan. Out: whatever they touch is free of these flags while
//! they are done, and has them again afterwards, as its row says. What is
//! cleared is durably an intent before, so that a crash in between is healed by
//! recovery and never taken for a user's change.

use std::collections::BTreeSet;

use super::keeper::Keeper;
use super::steps::Outcome;
use crate::apply::{self, ApplyError, Dirs};
use crate::engine::{Decided, Install, Step};
use crate::index::{Durable, IndexError, Reader};
use crate::model::{Flags, Here, Record, RelPath};

/// The locks that the record's path has on this disk.
fn locks_of(record: &Record) -> Flags {
    match record.row.live() {
        Some(entry) => record.here.as_ref().map_or(entry.flags, |here| here.flags) & Flags::LOCKS,
        None => Flags::NONE,
    }
}

/// The paths whose inodes the steps change or rename, and the directories in
/// which names change.
pub(super) fn concerned(steps: &[Step]) -> BTreeSet<RelPath> {
    let mut paths = BTreeSet::new();
    let mut renamed = |path: &RelPath| {
        paths.insert(path.clone());
        paths.extend(path.parent());
    };
    for step in steps {
        match step {
            Step::Stage { .. } => {}
            Step::Aside { path, to } => {
                renamed(path);
                renamed(to);
            }
            Step::Install { path, how, .. } => {
                renamed(path);
                if let Install::Link { existing: other }
                | Install::Moved { from: other }
                | Install::MovedTree { from: other } = how
                {
                    renamed(other);
                }
            }
            Step::Remove { path } | Step::Times { path, .. } | Step::Restore { path, .. } => renamed(path),
        }
    }
    paths
}

impl Keeper {
    /// Clears what keeps the steps from being done; returns the paths at which
    /// it did. Where it cannot, the step fails and says why.
    pub(super) fn unlock(
        &mut self,
        dirs: &Dirs<'_>,
        reader: &Reader,
        steps: &[Step],
        outcome: &mut Outcome,
    ) -> anyhow::Result<Vec<RelPath>> {
        let share = std::sync::Arc::clone(&self.share);
        if share.index.meta().locked == 0 {
            return Ok(Vec::new());
        }
        let mut locked = Vec::new();
        for path in concerned(steps) {
            let Some(record) = reader.get(&path)?.filter(|record| !locks_of(record).is_empty()) else {
                continue;
            };
            // The inode's other names show the same.
            let names = match record.row.entry.link {
                Some(group) => reader.group(group)?,
                None => Vec::new(),
            };
            for other in names.into_iter().filter(|other| *other != path) {
                locked.extend(reader.get(&other)?.map(|record| (other, record)));
            }
            locked.push((path, record));
        }
        if locked.is_empty() {
            return Ok(Vec::new());
        }
        // This commit makes earlier rows durable: their names must be before.
        if !self.unsynced.is_empty() && self.sync_done().is_err() {
            // The steps will say that something is locked, and are tried again.
            return Ok(Vec::new());
        }
        share.index.write(|w| {
            w.intend(locked.iter().map(|(path, record)| (path, &record.row)))?;
            Ok(((), Durable::Yes))
        })?;
        self.unsynced
            .add(locked.iter().map(|(path, _)| path.clone()).collect());
        let mut paths = Vec::new();
        for (path, record) in locked {
            let known = outcome.sigs.get(&path).copied().flatten().or(record.sig);
            if let Some(known) = known {
                match apply::unlock(dirs, &path, &known) {
                    Ok(sig) => drop(outcome.sigs.insert(path.clone(), Some(sig))),
                    Err(ApplyError::Changed { .. }) => {}
                    Err(error) => tracing::debug!(share = %share.name, "{error}"),
                }
            }
            paths.push(path);
        }
        Ok(paths)
    }
}

/// Sets again what [`Keeper::unlock`] has cleared at `paths`, and what the decided
/// rows that are done say.
pub(super) fn lock_again(
    dirs: &Dirs<'_>,
    reader: &Reader,
    paths: &[RelPath],
    decided: &[Decided],
    outcome: &mut Outcome,
) -> Result<(), IndexError> {
    let done = |one: &&Decided| outcome.progress.is_done(&one.path);
    let mut rows: Vec<(RelPath, crate::model::Entry)> = Vec::new();
    for one in decided.iter().filter(done) {
        let entry = one
            .row
            .live()
            .filter(|entry| !(entry.flags & Flags::LOCKS).is_empty());
        rows.extend(entry.map(|entry| (one.path.clone(), entry.clone())));
    }
    let decided: BTreeSet<&RelPath> = decided.iter().filter(done).map(|one| &one.path).collect();
    for path in paths.iter().filter(|path| !decided.contains(path)) {
        let record = reader.get(path)?;
        rows.extend(record.and_then(|record| Some((path.clone(), record.row.live()?.clone()))));
    }
    for (path, entry) in rows {
        let known = match outcome.sigs.get(&path) {
            Some(sig) => *sig,
            None => reader.get(&path)?.and_then(|record| record.sig),
        };
        let Some(known) = known else { continue };
        match apply::lock(dirs, &path, entry.flags, &known) {
            Ok((sig, lacks)) => {
                outcome.sigs.insert(path.clone(), Some(sig));
                if !lacks.is_empty() {
                    let here = outcome.here_of(reader, &path)?;
                    let seen = crate::model::Entry {
                        flags: Here::shown(&entry, here.as_deref()).flags & !Flags::LOCKS,
                        ..Here::shown(&entry, here.as_deref())
                    };
                    let mut reasons = here.map(|here| here.lacks).unwrap_or_default();
                    reasons.extend(lacks);
                    reasons.sort_unstable();
                    reasons.dedup();
                    outcome.here.insert(path, Here::of(&seen, &entry, &reasons));
                }
            }
            // Someone was there meanwhile: it is looked at.
            Err(_) => outcome.touched.push(path),
        }
    }
    Ok(())
}
