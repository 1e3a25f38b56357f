//! Comparing the tree with the index by stat alone.
//!
//! In: a request to rescan. Out: the paths that differ, in the dirty set, and
//! the directories, in the resolver. Runs at start and after events were lost;
//! what it finds takes the same way as an event. Nothing is written here, but
//! that temporary names of an earlier run go.

use std::sync::Arc;
use std::time::Instant;

use rustc_hash::FxHashSet;
use tokio::sync::watch;

use super::dirty::Hint;
use super::recovered;
use super::share::{Figures, Share};
use crate::apply;
use crate::index::{IndexError, Reader};
use crate::model::{RelPath, StatSig};
use crate::observe;

/// Paths are handed over in portions of this size.
const PORTION: usize = 2048;

/// A path's place in the set of those seen: 128 bits of its hash, so that the
/// names of a million entries need not be held in memory.
fn seen_mark(path: &RelPath) -> u128 {
    let hash = blake3::hash(path.as_bytes());
    u128::from_le_bytes(*hash.as_bytes().first_chunk().expect("a BLAKE3 hash has 32 bytes"))
}

/// Why the tree is compared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// The start, or events that were lost.
    Special,
    /// The time has come, where there are no events.
    Routine,
}

/// Scans at the start, and whenever it is asked for, until told to stop.
pub async fn run(share: Arc<Share>, mut stop: watch::Receiver<bool>) {
    // Known already, if the source has gone on without the daemon.
    let mut occasion = (!share.progress.lock().scanned).then_some(Occasion::Special);
    loop {
        if share.stopped().is_some() {
            return;
        }
        let task_share = Arc::clone(&share);
        let task = move || match occasion {
            Some(occasion) => scan(&task_share, occasion),
            None => recover(&task_share),
        };
        match tokio::task::spawn_blocking(task).await {
            Ok(Ok(())) => share.wake.notify_one(),
            Ok(Err(error)) => {
                share.stop_because(&error.context("the tree cannot be scanned"));
                return;
            }
            Err(_cancelled) => return,
        }
        occasion = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            () = share.rescan.notified() => Some(Occasion::Special),
            () = share.routine.notified() => Some(Occasion::Routine),
            () = share.recovery.notified() => None,
        };
    }
}

/// Finds what was recovered.
fn recover(share: &Arc<Share>) -> anyhow::Result<()> {
    loop {
        let what = std::mem::take(&mut *share.recovered.lock());
        if !what.is_empty() {
            let started = Instant::now();
            match share.locator.get() {
                Some(locator) => recovered::find(share, locator, &what)?,
                None => share.ask_rescan(),
            }
            let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            let (inodes, directories) = (what.inodes.len(), what.dirs.len());
            tracing::info!(share = %share.name, inodes, directories, ms, "what changed untold is found");
        }
        // The lock order is that of whoever adds: the set, then the word of it.
        let left = share.recovered.lock();
        if left.is_empty() {
            share.progress.lock().recovering = false;
            return Ok(());
        }
    }
}

/// What the index has where the walk has found something.
struct Verdict {
    mark: u128,
    /// A live row.
    is_known: bool,
    /// Nothing needs to be looked at.
    is_same: bool,
}

fn judged(reader: &Reader, path: &RelPath, sig: &StatSig) -> Result<Verdict, IndexError> {
    let record = reader.get(path)?;
    Ok(Verdict {
        mark: seen_mark(path),
        is_known: record.as_ref().is_some_and(|record| !record.row.deleted),
        is_same: record.is_some_and(|record| record.is_as(sig)),
    })
}

/// Compares everything beneath the share's root.
fn scan(share: &Arc<Share>, occasion: Occasion) -> anyhow::Result<()> {
    let started = Instant::now();
    share.progress.lock().scan_asked = false;
    Figures::add(&share.figures.rescans, 1);
    let reader = share.index.read()?;
    let mut seen = FxHashSet::default();
    let mut portion = Vec::new();
    let mut differing = 0u64;
    // Live rows that the walk has met.
    let mut known = 0u64;
    let mut failed: anyhow::Result<()> = Ok(());
    let judge = |path: &RelPath, sig: &StatSig| judged(&reader, path, sig);
    let mut take = |verdict: Result<Verdict, IndexError>, path: &dyn Fn() -> Option<RelPath>| {
        let Verdict {
            mark,
            is_known,
            is_same,
        } = verdict?;
        known += u64::from(seen.insert(mark) && is_known);
        if !is_same {
            differing += 1;
            portion.extend(path().map(|path| (path, Hint::default())));
            if portion.len() >= PORTION {
                share.touch(portion.drain(..));
            }
        }
        anyhow::Ok(())
    };
    if let Some(sig) = observe::stat(&share.root.batch(), &RelPath::root())? {
        take(judge(&RelPath::root(), &sig), &|| Some(RelPath::root()))?;
    }
    let skip = |path: &RelPath, is_dir: bool| share.is_excluded(path, is_dir);
    let now = || share.resolver.lock().now();
    let root = RelPath::root();
    let summary = observe::scan_judged(&share.root, &root, &skip, &judge, now, |dir, since| {
        if failed.is_err() {
            return;
        }
        {
            let mut resolver = share.resolver.lock();
            for child in dir.children.iter().filter(|child| child.sig.is_dir()) {
                resolver.learn_dir_seen(since, child.sig.ino, dir.ino, &child.name);
            }
        }
        share.progress.lock().scan_seen += dir.children.len() as u64;
        for child in dir.children {
            if let Err(error) = take(child.verdict, &|| dir.path.join(&child.name).ok()) {
                failed = Err(error);
                return;
            }
        }
    })?;
    failed?;
    apply::remove_leftovers(&share.root.batch(), &summary.leftovers);
    // The keeper finds the same and says so, and tries again until it can be read.
    let unseen = summary.unseen.iter().filter(|unseen| !unseen.foreign);
    share.touch(unseen.map(|unseen| {
        let hint = Hint {
            subtree: true,
            ..Hint::default()
        };
        (unseen.path.clone(), hint)
    }));
    // What the index has and the walk has not met is gone, or was made since.
    if known < reader.live()? {
        for pair in reader.beneath(&RelPath::root())? {
            let (path, record) = pair?;
            let is_dir = record.row.entry.is_dir();
            let unseen = || summary.unseen.iter().any(|unseen| path.is_within(&unseen.path));
            if !record.row.deleted
                && !seen.contains(&seen_mark(&path))
                && !share.is_excluded(&path, is_dir)
                && !unseen()
            {
                differing += 1;
                portion.push((path, Hint::default()));
                if portion.len() >= PORTION {
                    share.touch(portion.drain(..));
                }
            }
        }
    }
    share.touch(portion.drain(..));
    let (entries, ms) = (
        seen.len(),
        u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    );
    let text = "the tree is compared with the index";
    if occasion == Occasion::Routine && differing == 0 {
        tracing::debug!(share = %share.name, entries, differing, ms, "{text}");
    } else {
        tracing::info!(share = %share.name, entries, differing, ms, "{text}");
    }
    let mut progress = share.progress.lock();
    progress.scanned |= !progress.scan_asked;
    Ok(())
}
