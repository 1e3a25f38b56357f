//! After a crash: what it has left of rows that were being applied.
//!
//! In: the intents that the last run wrote down. Out: each is either done, and
//! then has its row, or never happened; see `engine::recover` and `docs/INDEX.md`.
//! Runs before anything else of the share does.

use std::path::Path;

use rustc_hash::FxHashSet;

use super::journal::Journal;
use super::share::Share;
use crate::apply;
use crate::engine;
use crate::index::Durable;
use crate::model::{Record, RelPath, Row, StatSig};
use crate::observe::{self, Observed, Reading};
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
    for (path, row) in &intents {
        let base = reader.get(path)?;
        let (seen, sig) = match observe::observe(&dirs, path, None, Reading::Always) {
            Ok(Observed::Present { entry, sig, .. }) => (engine::Seen::Present(entry), Some(sig)),
            Ok(Observed::Absent) => (engine::Seen::Absent, None),
            // It is looked at like anything else.
            _ => continue,
        };
        let base = base.as_ref().map(|base| &base.row);
        match (engine::recover(base, row, &seen), sig) {
            (engine::Found::Done, sig) => {
                let is_new = base.and_then(Row::live).is_none();
                fresh.extend(is_new.then(|| path.clone()));
                done.push((path.clone(), row.clone(), sig));
            }
            (engine::Found::Halfway, Some(sig)) => {
                if let Ok(applied) = apply::set_attrs(&dirs, path, &row.entry, &sig) {
                    done.push((path.clone(), row.clone(), applied.sig()));
                }
            }
            // The peer sends it again. What was done within a directory has
            // moved its times, which must not pass for a user's change.
            (engine::Found::Untouched, Some(sig)) => {
                untouched.insert(sig.ino);
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
    done.retain(|(path, row, sig): &(RelPath, Row, Option<StatSig>)| {
        let Some(sig) = sig.filter(|sig| sig.nlink > 1 && !row.deleted) else {
            return true;
        };
        if !untouched.contains(&sig.ino) || !fresh.contains(path) {
            return true;
        }
        // If it cannot be removed, it is looked at like anything else.
        drop(apply::remove_file(&dirs, path, &sig));
        false
    });
    restored.sort_by_key(|(path, ..)| std::cmp::Reverse(path.depth()));
    for (path, mtime, sig) in &restored {
        // If it cannot be set, the directory is looked at like anything else.
        drop(apply::set_dir_time(&dirs, path, *mtime, sig));
    }
    if !done.is_empty() {
        apply::sync_all(&share.root)?;
    }
    share.index.write(|w| {
        for (path, _) in &intents {
            w.settle(path)?;
        }
        for (path, row, sig) in done {
            let seq = w.next_seq();
            w.put(
                &path,
                &Record {
                    row,
                    seq,
                    sig,
                    via: None,
                    moved_from: None,
                },
            )?;
        }
        Ok(((), Durable::Yes))
    })?;
    Ok(())
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
