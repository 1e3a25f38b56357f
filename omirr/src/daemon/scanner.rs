//! Comparing the tree with the index by stat alone.
//!
//! In: a request to rescan. Out: the paths that differ, in the dirty set, and
//! the directories, in the resolver. Runs at start and after events were lost;
//! what it finds takes the same way as an event. Nothing is written here, but
//! that temporary names of an earlier run go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use roaring::RoaringTreemap;
use tokio::sync::watch;

use super::dirty::{Beneath, Hint};
use super::recovered;
use super::share::{Figures, Share};
use crate::apply;
use crate::model::{Record, RelPath, StatSig};
use crate::observe::{self, Child};

/// Paths are handed over in portions of this size.
const PORTION: usize = 2048;
/// While so many paths wait for the keeper, a first comparison finds no more.
const WAITING_MAX: usize = 8 * PORTION;
/// If so many wait still, though the keeper has rested for so long, they have their own
/// reasons, a disk that cannot be written say.
const STUCK: Duration = Duration::from_secs(2);
/// How often it is asked how many wait.
const ASKED_EVERY: Duration = Duration::from_millis(1);

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
        let (task_share, task_stop) = (Arc::clone(&share), stop.clone());
        let task = move || match occasion {
            Some(occasion) => scan(&task_share, occasion, &task_stop),
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
            let mut progress = share.progress.lock();
            progress.recovering = false;
            progress.handed_over = Some(Instant::now());
            return Ok(());
        }
    }
}

/// A path, made when it is wanted.
type Path<'a> = &'a dyn Fn() -> Option<RelPath>;

/// What the index has where the walk has found something.
#[derive(Default)]
struct Verdict {
    /// The number of the row, if it was live when the comparison began.
    known: Option<u64>,
    /// Nothing needs to be looked at.
    is_same: bool,
}

impl Verdict {
    /// Rows with greater numbers than `head` have come since.
    fn of(record: Option<&Record>, head: u64, sig: &StatSig) -> Verdict {
        record.map_or_else(Verdict::default, |record| Verdict {
            known: (!record.row.deleted && record.seq <= head).then_some(record.seq),
            is_same: record.is_as(sig),
        })
    }
}

/// Compares everything beneath the share's root.
///
/// The first time most is new: the keeper need not walk the directories that are handed
/// to it, since what is in them follows, and what it has not looked at yet has a limit,
/// so that memory does not grow with the tree.
fn scan(share: &Arc<Share>, occasion: Occasion, stop: &watch::Receiver<bool>) -> anyhow::Result<()> {
    let started = Instant::now();
    share.progress.lock().scan_asked = false;
    Figures::add(&share.figures.rescans, 1);
    let is_first = share.is_first_comparison();
    let reader = share.index.read()?;
    let (live, head) = (reader.live()?, reader.head()?);
    // As long as one is held, the index does not use its old pages again.
    let reader = RwLock::new((live > 0).then_some(reader));
    let ended = AtomicBool::new(false);
    let ends = || ended.load(Ordering::Relaxed) || *stop.borrow();
    let mut entries = 0u64;
    // Numbers of live rows that the walk has met: most lie close together.
    let mut seen = RoaringTreemap::new();
    let mut portion = Vec::new();
    let mut differing = 0u64;
    let failed: Mutex<Option<anyhow::Error>> = Mutex::new(None);
    let fail = |error| {
        ended.store(true, Ordering::Relaxed);
        failed.lock().get_or_insert(error);
    };
    let judge = |dir: &RelPath, children: &mut [Child<Verdict>]| {
        let reader = reader.read();
        let Some(reader) = reader.as_ref() else { return };
        let asked = reader.get_each(
            dir,
            children,
            |child| &child.name,
            |child, record| {
                child.verdict = Verdict::of(record.as_ref(), head, &child.sig);
            },
        );
        if let Err(error) = asked {
            fail(error.into());
        }
    };
    let hint_of = |sig: &StatSig| Hint {
        beneath: match is_first {
            true => Beneath::comes(sig),
            false => Beneath::Walk,
        },
        ..Hint::default()
    };
    let mut take = |Verdict { known, is_same }: Verdict, sig: &StatSig, path: Path<'_>| {
        entries += 1;
        seen.extend(known);
        if !is_same {
            differing += 1;
            portion.extend(path().map(|path| (path, hint_of(sig))));
            if portion.len() >= PORTION {
                share.touch(portion.drain(..));
                if is_first {
                    let goes_on = wait_for_room(share, stop);
                    ended.fetch_or(!goes_on, Ordering::Relaxed);
                    let mut reader = reader.write();
                    if reader.is_some() {
                        *reader = Some(share.index.read()?);
                    }
                }
            }
        }
        anyhow::Ok(())
    };
    if let Some(sig) = observe::stat(&share.root.batch(), &RelPath::root())? {
        let record = match reader.read().as_ref() {
            Some(reader) => reader.get(&RelPath::root())?,
            None => None,
        };
        take(Verdict::of(record.as_ref(), head, &sig), &sig, &|| {
            Some(RelPath::root())
        })?;
    }
    let skip = |path: &RelPath, is_dir: bool| ends() || share.is_excluded(path, is_dir);
    let now = || share.resolver.lock().now();
    let root = RelPath::root();
    let summary = observe::scan_judged(&share.root, &root, &skip, &judge, now, |dir, since| {
        if failed.lock().is_some() {
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
            if let Err(error) = take(child.verdict, &child.sig, &|| dir.path.join(&child.name).ok()) {
                fail(error);
                return;
            }
        }
    })?;
    if let Some(error) = failed.lock().take() {
        return Err(error);
    }
    if ends() {
        return Ok(());
    }
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
    let reader = reader.into_inner().filter(|_| seen.len() < live);
    if let Some(reader) = reader {
        for pair in reader.beneath(&RelPath::root())? {
            let (path, record) = pair?;
            let is_dir = record.row.entry.is_dir();
            let unseen = || summary.unseen.iter().any(|unseen| path.is_within(&unseen.path));
            if !record.row.deleted
                && record.seq <= head
                && !seen.contains(record.seq)
                && !share.is_excluded(&path, is_dir)
                && !unseen()
            {
                differing += 1;
                portion.push((path, Hint::default()));
                if portion.len() >= PORTION {
                    share.touch(portion.drain(..));
                    if is_first && !wait_for_room(share, stop) {
                        return Ok(());
                    }
                }
            }
        }
    }
    share.touch(portion.drain(..));
    let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let text = "the tree is compared with the index";
    if occasion == Occasion::Routine && differing == 0 {
        tracing::debug!(share = %share.name, entries, differing, ms, "{text}");
    } else {
        tracing::info!(share = %share.name, entries, differing, ms, "{text}");
    }
    let mut progress = share.progress.lock();
    progress.scanned |= !progress.scan_asked;
    progress.handed_over = Some(Instant::now());
    Ok(())
}

/// Waits for the keeper while it has much to do. False if there is nobody to wait for.
fn wait_for_room(share: &Share, stop: &watch::Receiver<bool>) -> bool {
    let mut wait = Wait::new(Instant::now());
    loop {
        if *stop.borrow() || share.stopped().is_some() {
            return false;
        }
        let waiting = {
            let dirty = share.dirty();
            dirty.len() + dirty.in_hand()
        };
        let rests = share.keeper_rests.load(Ordering::Relaxed);
        if !wait.goes_on(waiting, rests, Instant::now()) {
            return true;
        }
        std::thread::sleep(ASKED_EVERY);
    }
}

/// Whether a comparison waits for the keeper, by how many paths wait or are in its
/// hands and whether it is at work, be that at what peers sent.
struct Wait {
    /// The least that have waited so far.
    least: usize,
    /// For how long the keeper has rested since.
    rested: Duration,
    asked: Instant,
}

impl Wait {
    fn new(now: Instant) -> Wait {
        Wait {
            least: usize::MAX,
            rested: Duration::ZERO,
            asked: now,
        }
    }

    fn goes_on(&mut self, waiting: usize, rests: bool, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.asked);
        self.asked = now;
        if waiting < self.least {
            (self.least, self.rested) = (waiting, Duration::ZERO);
        } else if rests {
            self.rested += passed;
        }
        waiting > WAITING_MAX && self.rested <= STUCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: usize = WAITING_MAX + 1;

    #[test]
    fn a_comparison_goes_on_when_there_is_room() {
        let now = Instant::now();
        let mut wait = Wait::new(now);
        assert!(wait.goes_on(MANY, true, now));
        assert!(!wait.goes_on(MANY - PORTION, false, now));
    }

    #[test]
    fn a_slow_pass_is_waited_for_and_a_keeper_that_does_not_get_on_is_not() {
        let mut now = Instant::now();
        let mut wait = Wait::new(now);
        for _ in 0..100 {
            assert!(wait.goes_on(MANY, false, now), "it is at work");
            now += STUCK / 2;
        }
        // It puts back whatever it takes.
        let mut asked = 0;
        while wait.goes_on(MANY, asked % 2 == 0, now) {
            now += STUCK / 4;
            asked += 1;
        }
        assert!((4..=12).contains(&asked), "{asked}");
    }
}
