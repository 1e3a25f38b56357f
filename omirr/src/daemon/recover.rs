//! After a crash: what it has left of rows that were being applied.
//!
//! In: the intents that the last run wrote down. Out: each is either done, and
//! then has its row, or never happened; see `engine::recover` and `docs/INDEX.md`.
//! Runs before anything else of the share does.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::path::Path;

use rustc_hash::{FxHashMap, FxHashSet};

use super::journal::Journal;
use super::look::known_elsewhere;
use super::remote::{follow_up, relinking};
use super::share::Share;
use super::steps::Outcome;
use crate::apply::{self, Applied, ApplyError, Dirs};
use crate::crash::{self, Point};
use crate::engine::{self, Progress};
use crate::index::{Durable, IndexError, Reader};
use crate::model::{Entry, Flags, Hash, Here, LinkGroup, Record, RelPath, Row, Sketch, StatSig, Time};
use crate::observe::{self, Observed, Reading, Sight};
use crate::source::{Recoverable, Recovered, Signal};

/// What a restart finds of rows that were being applied when the last run was
/// killed; see `engine::recover`.
pub(super) fn recover(share: &Share, journal: &Path) -> anyhow::Result<()> {
    let reader = share.index.read()?;
    let intents = reader.intents()?;
    if intents.is_empty() {
        // What is left is of rows that are durable, or were never begun.
        share.redos.clear()?;
        return Ok(());
    }
    tracing::info!(share = %share.name, rows = intents.len(), "the last run was cut off while it applied rows");
    let dirs = share.root.batch();
    note(share, journal, &intents)?;
    crash::here(Point::RecoveryNoted);
    sweep(share, &intents);
    complete_patches(share, &dirs, &intents)?;
    let mut done = Vec::new();
    // Those at whose paths there was nothing before.
    let mut fresh = FxHashSet::default();
    let mut untouched = FxHashSet::default();
    // Directories, with the times that they shall have: what was done within them,
    // and what is taken back here, has moved them, which must not pass for a
    // user's change.
    let mut dated: Vec<(RelPath, Time, StatSig)> = Vec::new();
    // What must be locked again, with its row's entry.
    let mut locked = Vec::new();
    for (path, row) in &intents {
        let base = reader.get(path)?;
        let (seen, sig) = match look(&reader, &dirs, path)? {
            Ok(Observed::Present { entry, sig, .. }) => {
                let known = base.as_ref().filter(|base| !base.row.deleted);
                let entry = match known {
                    Some(base) => Here::read(&base.row.entry, base.here.as_deref(), &entry),
                    None => entry,
                };
                (engine::Seen::Present(entry), Some(sig))
            }
            Ok(Observed::Absent) => (engine::Seen::Absent, None),
            // It is looked at like anything else.
            _ => continue,
        };
        let base_record = base;
        let base = base_record.as_ref().map(|base| &base.row);
        match (engine::recover(base, row, &seen), sig) {
            (engine::Found::Done, sig) => {
                let is_new = base.and_then(Row::live).is_none();
                fresh.extend(is_new.then(|| path.clone()));
                dated.extend(date(path, row.live(), sig));
                let here = known_here(base_record.as_ref(), row);
                done.push((path.clone(), row.clone(), sig, here));
            }
            (engine::Found::Halfway, Some(sig)) => {
                // It may be locked already; then nothing is missing but what
                // this node cannot have.
                let sig = apply::unlock(&dirs, path, &sig).unwrap_or(sig);
                locked.push((path.clone(), row.entry.flags, sig));
                if let Ok(applied) = apply::set_attrs(&dirs, path, &row.entry, &sig) {
                    crash::here(Point::RecoveryCompleted);
                    let sig = applied.sig();
                    let here = match applied {
                        Applied::Short { here, .. } => Some(here),
                        _ => None,
                    };
                    dated.extend(date(path, row.live(), sig));
                    done.push((path.clone(), row.clone(), sig, here));
                }
            }
            // The peer sends it again.
            (engine::Found::Untouched, Some(sig)) => {
                untouched.insert(sig.ino);
                let flags = base.and_then(Row::live).map(|entry| entry.flags);
                locked.extend(flags.map(|flags| (path.clone(), flags, sig)));
                dated.extend(date(path, base.and_then(Row::live), Some(sig)));
            }
            // Changed here since, or gone: it is looked at like anything else.
            _ => {}
        }
    }
    // A name at which something was to be kept aside, while the old one still
    // has the same inode: that half is taken back.
    done.retain(
        |(path, row, sig, _): &(RelPath, Row, Option<StatSig>, Option<Box<Here>>)| {
            let Some(sig) = sig.filter(|sig| sig.nlink > 1 && !row.deleted) else {
                return true;
            };
            if !untouched.contains(&sig.ino) || !fresh.contains(path) {
                return true;
            }
            // If it cannot be removed, it is looked at like anything else.
            drop(apply::remove_file(&dirs, path, &sig));
            crash::here(Point::RecoveryTakenBack);
            false
        },
    );
    let mut sigs: FxHashMap<RelPath, Option<StatSig>> = FxHashMap::default();
    dated.sort_by_key(|(path, ..)| Reverse(path.depth()));
    for (path, mtime, sig) in &dated {
        // If it cannot be set, the directory is looked at like anything else.
        if let Ok(sig) = apply::set_dir_time(&dirs, path, *mtime, sig) {
            sigs.insert(path.clone(), Some(sig));
        }
        crash::here(Point::RecoveryTimesSet);
    }
    let is_locked = |(_, flags, _): &(RelPath, Flags, StatSig)| !(*flags & Flags::LOCKS).is_empty();
    for (path, flags, sig) in locked.iter().filter(|one| is_locked(one)) {
        let sig = sigs.get(path).copied().flatten().unwrap_or(*sig);
        if let Ok((sig, _)) = apply::lock(&dirs, path, *flags, &sig) {
            sigs.insert(path.clone(), Some(sig));
        }
    }
    // Seen by this run, and not by the next one if this one dies before the end:
    // that begins anew, with the intents.
    let groups: Vec<LinkGroup> = done.iter().filter_map(|(_, row, ..)| row.live()?.link).collect();
    let any = !done.is_empty();
    share.index.write(|w| {
        if any {
            let meta = w.meta();
            meta.head = meta.head.max(share.opening.began_at);
        }
        for (path, row, sig, here) in done {
            let seq = w.next_seq();
            let sig = sigs.get(&path).copied().unwrap_or(sig);
            w.put(
                &path,
                &Record {
                    row,
                    seq,
                    sig,
                    via: None,
                    moved_from: None,
                    here,
                },
            )?;
        }
        Ok(((), Durable::Later))
    })?;
    join(share, &dirs, groups)?;
    // A filesystem that has become read-only cannot be synced, and need not be.
    if any {
        apply::sync_all(&share.root)?;
    }
    crash::here(Point::RecoverySynced);
    share.index.write(|w| {
        w.settle(intents.iter().map(|(path, _)| path))?;
        Ok(((), Durable::Yes))
    })?;
    crash::here(Point::RecoveryDurable);
    share.redos.clear()?;
    Ok(())
}

/// Completes contents that were being written over others, before anything is
/// looked at: one that is neither the old nor the new must not pass for a user's.
fn complete_patches(share: &Share, dirs: &Dirs<'_>, intents: &[(RelPath, Row)]) -> anyhow::Result<()> {
    let meant: FxHashMap<&RelPath, &Row> = intents.iter().map(|(path, row)| (path, row)).collect();
    let is_meant = |path: &RelPath, hash: &Hash| {
        let content = meant.get(path).and_then(|row| row.live()?.content());
        content.is_some_and(|(_, meant)| meant == *hash)
    };
    for path in apply::complete(dirs, &share.redos, &is_meant)? {
        tracing::info!(share = %share.name, "the content of '{path}' was half written, and is complete now");
    }
    Ok(())
}

/// A directory's place among those that get their times last.
fn date(path: &RelPath, entry: Option<&Entry>, sig: Option<StatSig>) -> Option<(RelPath, Time, StatSig)> {
    let entry = entry.filter(|entry| entry.is_dir())?;
    Some((path.clone(), entry.mtime, sig?))
}

/// Joins what the rows say is one inode and is not. A name whose content and
/// attributes are right is found done, whichever inode it names.
fn join(share: &Share, dirs: &Dirs<'_>, groups: Vec<LinkGroup>) -> anyhow::Result<()> {
    let reader = share.index.read()?;
    let steps = relinking(&reader, groups)?;
    let mut after = Outcome::new(Progress::default(), share.resolver.lock().now());
    // What cannot be joined is looked at like anything else.
    follow_up(share, dirs, &reader, &steps, &[], &mut after)
}

/// Removes temporary names where something was under way, before anything is
/// looked at: were they to go later, their directories' times would move again,
/// which must not pass for a user's change, least of all in a directory that a
/// peer has deleted.
fn sweep(share: &Share, intents: &[(RelPath, Row)]) {
    let dirs = share.root.batch();
    let parents: BTreeSet<RelPath> = intents.iter().filter_map(|(path, _)| path.parent()).collect();
    for parent in parents {
        // One that is gone has none; one that cannot be read is the scan's to
        // tell of.
        if let Ok(listed) = observe::list(&share.root, &parent, &|_, _| false) {
            apply::remove_leftovers(&dirs, &listed.leftovers);
        }
    }
}

/// What a path has that is as its intent says, as far as its record knows.
fn known_here(base: Option<&Record>, intent: &Row) -> Option<Box<Here>> {
    base.filter(|base| base.row.live().is_some() && base.row.live() == intent.live())
        .and_then(|base| base.here.clone())
}

/// What is at a path. It is read, unless the index has the very inode elsewhere
/// and `stat` says the same: a great directory may have been renamed.
fn look(
    reader: &Reader,
    dirs: &Dirs<'_>,
    path: &RelPath,
) -> Result<Result<Observed, ApplyError>, IndexError> {
    let found = match observe::sight(dirs, path) {
        Ok(Sight::Here(found)) => found,
        Ok(Sight::Absent) => return Ok(Ok(Observed::Absent)),
        Ok(Sight::Foreign) => return Ok(Ok(Observed::Foreign)),
        Err(error) => return Ok(Err(error)),
    };
    let Some(other) = known_elsewhere(reader, path, &found.sig())? else {
        return Ok(found.read(None, Reading::Always));
    };
    let entry = &other.record.row.entry;
    let found = found.read(Some((entry, &other.sig)), Reading::IfChanged);
    Ok(found.map(|found| match found {
        Observed::Unchanged { sig } => Observed::Present {
            entry: entry.clone(),
            sig,
            content: None,
            sketch: Sketch::default(),
            leaves: None,
            in_part: false,
        },
        found => found,
    }))
}

/// Notes where something was under way: what else it left there, a copy that was
/// kept aside for instance, is to be found even if the tree is not compared. The
/// intents are gone after this.
fn note(share: &Share, journal: &Path, intents: &[(RelPath, Row)]) -> anyhow::Result<()> {
    let dirs = share.root.batch();
    let ino = |path: &RelPath| match observe::stat(&dirs, path) {
        Ok(Some(sig)) => sig.ino,
        // Gone, or not to be looked at: then there is nothing to find.
        _ => 0,
    };
    let mut recovered = Recovered {
        dev: share.root.dev(),
        ..Recovered::default()
    };
    for (path, _) in intents {
        // The nearest directory that is there.
        let mut above = path.parent();
        let mut parent = 0;
        while let Some(dir) = above.filter(|_| parent == 0) {
            parent = ino(&dir);
            above = dir.parent();
        }
        recovered.inodes.push(Recoverable {
            ino: ino(path),
            parent,
            named: true,
            mapped: false,
        });
    }
    let (mut journal, _) = Journal::open(journal)?;
    Ok(journal.note(recovered.dev, &[Signal::Recovered(recovered)])?)
}
