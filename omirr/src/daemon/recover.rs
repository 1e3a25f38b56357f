//! After a crash: what it has left of rows that were being applied.
//!
//! In: the intents that the last run wrote down. Out: each is either done, and
//! then has its row, or never happened; see `engine::recover` and `docs/INDEX.md`.
//! Runs before anything else of the share does.

use std::path::Path;

use rustc_hash::FxHashSet;

use super::journal::Journal;
use super::look::known_elsewhere;
use super::share::Share;
use crate::apply::{self, Applied, ApplyError, Dirs};
use crate::engine;
use crate::index::{Durable, IndexError, Reader};
use crate::model::{Flags, Here, Record, RelPath, Row, StatSig};
use crate::observe::{self, Observed, Reading, Sight};
use crate::source::{Recoverable, Recovered, Signal};

/// What a restart finds of rows that were being applied when the last run was
/// killed; see `engine::recover`.
pub(super) fn recover(share: &Share, journal: &Path) -> anyhow::Result<()> {
    let reader = share.index.read()?;
    let intents = reader.intents()?;
    if intents.is_empty() {
        return Ok(());
    }
    tracing::info!(share = %share.name, rows = intents.len(), "the last run was cut off while it applied rows");
    let dirs = share.root.batch();
    note(share, journal, &intents)?;
    let mut done = Vec::new();
    // Those at whose paths there was nothing before.
    let mut fresh = FxHashSet::default();
    let mut untouched = FxHashSet::default();
    let mut restored = Vec::new();
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
                let here = known_here(base_record.as_ref(), row);
                done.push((path.clone(), row.clone(), sig, here));
            }
            (engine::Found::Halfway, Some(sig)) => {
                // It may be locked already; then nothing is missing but what
                // this node cannot have.
                let sig = apply::unlock(&dirs, path, &sig).unwrap_or(sig);
                locked.push((path.clone(), row.entry.flags, sig));
                if let Ok(applied) = apply::set_attrs(&dirs, path, &row.entry, &sig) {
                    let sig = applied.sig();
                    let here = match applied {
                        Applied::Short { here, .. } => Some(here),
                        _ => None,
                    };
                    done.push((path.clone(), row.clone(), sig, here));
                }
            }
            // The peer sends it again. What was done within a directory has
            // moved its times, which must not pass for a user's change.
            (engine::Found::Untouched, Some(sig)) => {
                untouched.insert(sig.ino);
                let flags = base.and_then(Row::live).map(|entry| entry.flags);
                locked.extend(flags.map(|flags| (path.clone(), flags, sig)));
                if let Some(entry) = base.and_then(Row::live).filter(|entry| entry.is_dir()) {
                    restored.push((path.clone(), entry.mtime, sig));
                }
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
            false
        },
    );
    restored.sort_by_key(|(path, ..)| std::cmp::Reverse(path.depth()));
    for (path, mtime, sig) in &restored {
        // If it cannot be set, the directory is looked at like anything else.
        drop(apply::set_dir_time(&dirs, path, *mtime, sig));
    }
    let is_locked = |(_, flags, _): &(RelPath, Flags, StatSig)| !(*flags & Flags::LOCKS).is_empty();
    for (path, flags, sig) in locked.iter().filter(|one| is_locked(one)) {
        if let Ok((sig, _)) = apply::lock(&dirs, path, *flags, sig) {
            let this = done.iter_mut().find(|one| one.0 == *path);
            this.into_iter().for_each(|one| one.2 = Some(sig));
        }
    }
    if !done.is_empty() {
        apply::sync_all(&share.root)?;
    }
    share.index.write(|w| {
        for (path, _) in &intents {
            w.settle(path)?;
        }
        if !done.is_empty() {
            let meta = w.meta();
            meta.head = meta.head.max(share.began_at);
        }
        for (path, row, sig, here) in done {
            let seq = w.next_seq();
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
        Ok(((), Durable::Yes))
    })?;
    Ok(())
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
        });
    }
    let (mut journal, _) = Journal::open(journal)?;
    Ok(journal.note(recovered.dev, &[Signal::Recovered(recovered)])?)
}
