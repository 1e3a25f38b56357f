//! Comparing the tree with the index by stat alone.
//!
//! In: a request to rescan. Out: the paths that differ, in the dirty set, and
//! the directories, in the resolver. Runs at start and after events were lost;
//! what it finds takes the same way as an event. It never writes.

use std::sync::Arc;
use std::time::Instant;

use rustc_hash::FxHashSet;

use super::dirty::Hint;
use super::share::{Figures, Share};
use crate::model::RelPath;
use crate::observe;

/// Paths are handed over in portions of this size.
const PORTION: usize = 2048;

/// A path's place in the set of those seen: 128 bits of its hash, so that the
/// names of a million entries need not be held in memory.
fn seen_mark(path: &RelPath) -> u128 {
    let hash = blake3::hash(path.as_bytes());
    u128::from_le_bytes(*hash.as_bytes().first_chunk().expect("a BLAKE3 hash has 32 bytes"))
}

/// Compares everything beneath the share's root.
pub fn scan(share: &Arc<Share>) -> anyhow::Result<()> {
    let started = Instant::now();
    Figures::add(&share.figures.rescans, 1);
    let reader = share.index.read()?;
    let mut seen = FxHashSet::default();
    let mut portion = Vec::new();
    let mut differing = 0u64;
    let mut failed: anyhow::Result<()> = Ok(());
    let mut compare = |path: RelPath, sig: &crate::model::StatSig| -> anyhow::Result<()> {
        seen.insert(seen_mark(&path));
        let known = reader.get(&path)?;
        let same = known.is_some_and(|record| {
            !record.row.deleted && record.sig.is_some_and(|known| known.same_as(sig) && !known.racy)
        });
        if !same {
            differing += 1;
            portion.push((path, Hint { content: true, ..Hint::default() }));
            if portion.len() >= PORTION {
                share.touch(portion.drain(..));
            }
        }
        Ok(())
    };
    let root_sig = observe::stat(&share.root.batch(), &RelPath::root())?;
    if let Some(sig) = root_sig {
        compare(RelPath::root(), &sig)?;
    }
    let skip = |path: &RelPath, is_dir: bool| share.is_excluded(path, is_dir);
    observe::scan(&share.root, &RelPath::root(), &skip, |dir| {
        if failed.is_err() {
            return;
        }
        {
            let mut resolver = share.resolver.lock();
            for (name, sig) in &dir.children {
                if sig.mode & 0o170_000 == 0o040_000 {
                    resolver.learn_dir(sig.ino, dir.ino, name);
                }
            }
        }
        for (name, sig) in &dir.children {
            let Ok(path) = dir.path.join(name) else { continue };
            if let Err(error) = compare(path, sig) {
                failed = Err(error);
                return;
            }
        }
        share.progress.lock().scan_seen += dir.children.len() as u64;
    })?;
    failed?;
    // What the index has and the walk has not met is gone, or was made since.
    for pair in reader.beneath(&RelPath::root())? {
        let (path, record) = pair?;
        let is_dir = record.row.entry.is_dir();
        if !record.row.deleted && !seen.contains(&seen_mark(&path)) && !share.is_excluded(&path, is_dir) {
            differing += 1;
            portion.push((path, Hint::default()));
            if portion.len() >= PORTION {
                share.touch(portion.drain(..));
            }
        }
    }
    share.touch(portion.drain(..));
    tracing::info!(
        share = %share.name,
        entries = seen.len(),
        differing,
        ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "the tree is compared with the index"
    );
    Ok(())
}
