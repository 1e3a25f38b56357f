//! Reading again, in full, what is not sure: the belt to the braces.
//!
//! In: paths whose content was read within a clock tick of its last change, or only
//! where events told that it had changed; the index knows them as racy. Out: a look at
//! each, once it has been quiet for long, or long after its first look in part, however
//! often it changes. So what no event tells of is found late and not never. What this
//! daemon has itself written for a peer is not among them. As the index keeps what is
//! racy, it is found again after a restart. The contents of large files are read here,
//! so that nobody waits for it, and slowly when changes pile up; of one that is written
//! to meanwhile, what differs is looked at again. Nothing is written, and nothing
//! decided.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::watch;

use super::dirty::Hint;
use super::share::Share;
use crate::apply;
use crate::content::leaves::LEAVES_MIN_BYTES;
use crate::content::whole::LEAF_BYTES;
use crate::content::{self, Leaves};
use crate::engine::Sequence;
use crate::index::IndexError;
use crate::model::{Entry, RelPath, StatSig};
use crate::observe::{sig_of, statx_fd};
use crate::source::Written;

/// A path is looked at again when nothing has been heard of it for so long; or for so
/// long after its first look in part.
const QUIET: Duration = Duration::from_secs(600);
/// Another one in debug builds, for tests: milliseconds.
const VARIABLE: &str = "OMIRR_QUIET_MS";
/// And no sooner than reading so many bytes a second takes: what changes all the time
/// costs no more than that.
const BYTES_PER_SECOND: u64 = 16 << 20;
/// So many paths are remembered; more of them are looked for in the index.
const WAITING_MAX: usize = 8192;
/// Rows of the index that are gone through at once.
const PORTION: usize = 2048;
/// So many paths are looked at again at once, small ones.
const FEW: usize = 32;
/// While there is something else to do, the next bytes wait for so long at most.
const WAIT_MAX: Duration = Duration::from_secs(1);
/// Small files that are too many at once are looked at again after so long.
const LATER: Duration = Duration::from_secs(5);
/// Between two looks for something to do, if there was nothing, and if there was.
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// More changed paths than these, waiting, are a backlog.
const BACKLOG: usize = 64;
/// Small files of so many bytes are looked at again at once: the keeper reads them.
const FEW_BYTES: u64 = 16 << 20;
/// Before so many further bytes it is asked whether to go on.
const ASK_EVERY: u64 = 8 << 20;

#[derive(Clone, Copy, Debug)]
struct Waiting {
    due: Instant,
    /// Of its content only what was told was read.
    in_part: bool,
}

/// How far the index was gone through for racy rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Walk {
    /// Up to this number.
    At(u64),
    Done,
}

#[derive(Debug)]
struct Paths {
    waiting: FxHashMap<RelPath, Waiting>,
    walk: Walk,
    /// There was no room for some: the index is to be gone through once more.
    again: bool,
}

#[derive(Debug)]
pub struct Belt {
    quiet: Duration,
    paths: Mutex<Paths>,
    /// What was just read in full and is what the index says, as of when.
    read: Mutex<FxHashMap<RelPath, StatSig>>,
}

impl Belt {
    pub fn new() -> Belt {
        let asked = match cfg!(debug_assertions) {
            true => std::env::var(VARIABLE).ok().and_then(|ms| ms.parse().ok()),
            false => None,
        };
        Belt::after(asked.map_or(QUIET, Duration::from_millis))
    }

    fn after(quiet: Duration) -> Belt {
        Belt {
            quiet,
            paths: Mutex::new(Paths {
                waiting: FxHashMap::default(),
                walk: Walk::Done,
                again: false,
            }),
            read: Mutex::default(),
        }
    }

    /// A look has left these paths racy, each with the bytes of a content that was read
    /// in part.
    pub fn note<'a>(&self, racy: impl Iterator<Item = (&'a RelPath, Option<u64>)>, now: Instant) {
        let mut paths = None;
        for (path, part_of) in racy {
            let paths = paths.get_or_insert_with(|| self.paths.lock());
            paths.add(path, self.waiting(part_of, now));
        }
    }

    fn waiting(&self, part_of: Option<u64>, now: Instant) -> Waiting {
        let reading = Duration::from_secs(part_of.unwrap_or(0) / BYTES_PER_SECOND);
        Waiting {
            due: now + self.quiet + reading,
            in_part: part_of.is_some(),
        }
    }

    /// An earlier daemon has left racy rows, and no comparison of the tree, which reads
    /// what they are of, will come upon them.
    pub fn go_through_index(&self) {
        self.paths.lock().again = true;
    }

    /// Something of what was told may be wrong: what was read in part is read in full
    /// as soon as there is time.
    pub fn hurry(&self, now: Instant) {
        let mut paths = self.paths.lock();
        for waiting in paths.waiting.values_mut().filter(|waiting| waiting.in_part) {
            waiting.due = waiting.due.min(now);
        }
    }

    /// Whether the content of the file with this signature was just read in full and
    /// found to be what the index says. Said once.
    pub fn has_read(&self, path: &RelPath, now: &StatSig) -> bool {
        let mut read = self.read.lock();
        !read.is_empty() && read.remove(path).is_some_and(|sig| sig.same_as(now))
    }

    fn has_waiting(&self, now: Instant) -> bool {
        let paths = self.paths.lock();
        paths.walks() || paths.waiting.values().any(|waiting| waiting.due <= now)
    }

    /// Takes a few that are due.
    fn due(&self, now: Instant) -> Vec<RelPath> {
        let mut paths = self.paths.lock();
        let due = paths.waiting.iter().filter(|(_, waiting)| waiting.due <= now);
        let due: Vec<RelPath> = due.map(|(path, _)| path.clone()).take(FEW).collect();
        for path in &due {
            paths.waiting.remove(path);
        }
        due
    }

    /// There are too many at once, or the daemon ends.
    fn put_back(&self, path: &RelPath, now: Instant) {
        let waiting = Waiting {
            due: now + LATER.min(self.quiet),
            in_part: true,
        };
        self.paths.lock().add(path, waiting);
    }

    /// It was read, and written to meanwhile: it is as unsure as before.
    fn once_more(&self, path: &RelPath, size: u64, now: Instant) {
        self.paths.lock().add(path, self.waiting(Some(size), now));
    }
}

impl Paths {
    fn add(&mut self, path: &RelPath, waiting: Waiting) {
        if let Some(known) = self.waiting.get_mut(path) {
            // What is looked at in part again and again is due all the same.
            known.due = match known.in_part {
                true => known.due.min(waiting.due),
                false => waiting.due,
            };
            known.in_part |= waiting.in_part;
        } else if self.waiting.len() < WAITING_MAX {
            self.waiting.insert(path.clone(), waiting);
        } else {
            self.again = true;
        }
    }

    /// Whether the index is to be gone through, and there is room for what is found.
    fn walks(&self) -> bool {
        (self.walk != Walk::Done || self.again) && self.waiting.len() <= WAITING_MAX / 2
    }
}

/// Looks for something to do, for as long as there is nothing better to do, until
/// told to stop.
pub async fn run(share: Arc<Share>, mut stop: watch::Receiver<bool>) {
    let at_most = PAUSE.min(share.belt.quiet / 4);
    let mut pause = at_most;
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            () = tokio::time::sleep(pause) => {}
        }
        if share.stopped().is_some() {
            return;
        }
        pause = at_most;
        if !is_idle(&share) || !share.belt.has_waiting(Instant::now()) {
            continue;
        }
        pause = PAUSE_MIN;
        let (task_share, task_stop) = (Arc::clone(&share), stop.clone());
        let task = move || step(&task_share, &|| goes_on(&task_share, &task_stop));
        match tokio::task::spawn_blocking(task).await {
            Ok(Ok(())) => {}
            // Whoever has more to do with the index says it as well.
            Ok(Err(error)) => {
                tracing::warn!(share = %share.name, "what is not sure cannot be read again: {error:#}")
            }
            Err(_cancelled) => return,
        }
    }
}

/// Whether the keeper keeps up with what users and peers do. What cannot be applied,
/// or never stops changing, is no reason to wait.
fn is_idle(share: &Share) -> bool {
    let inputs = &share.inputs;
    share.has_compared() && share.dirty().len() <= BACKLOG && inputs.capacity() == inputs.max_capacity()
}

/// Waits while there is something better to do, but for no longer than makes reading on
/// slow; false if it is to end.
fn goes_on(share: &Share, stop: &watch::Receiver<bool>) -> bool {
    let since = Instant::now();
    while !is_idle(share) && since.elapsed() < WAIT_MAX && !*stop.borrow() {
        std::thread::sleep(PAUSE_MIN);
    }
    !*stop.borrow() && share.stopped().is_none()
}

/// Goes through a part of the index, if need be, and reads a few files again, for as
/// long as `go_on` says so.
fn step(share: &Share, go_on: &dyn Fn() -> bool) -> anyhow::Result<()> {
    share.belt.read.lock().clear();
    walk(share)?;
    let (mut small, mut ready) = (0, Vec::new());
    let due = share.belt.due(Instant::now());
    // After that: what was noted is in it.
    let reader = share.index.read()?;
    let dirs = share.root.batch();
    for path in due {
        let Some(record) = reader.get(&path)?.filter(|record| !record.row.deleted) else {
            continue;
        };
        let Some(known) = record.sig.filter(|sig| sig.racy) else {
            continue;
        };
        if !go_on() {
            share.belt.put_back(&path, Instant::now());
            continue;
        }
        let size = record.row.entry.content().map_or(0, |(size, _)| size);
        if size < LEAVES_MIN_BYTES {
            small += size;
            if small > FEW_BYTES {
                share.belt.put_back(&path, Instant::now());
                continue;
            }
        }
        if size >= LEAVES_MIN_BYTES {
            match read(share, &dirs, &path, &record.row.entry, &known, go_on) {
                Found::Same => {
                    share.belt.read.lock().insert(path.clone(), known);
                }
                // The keeper finds the same, and what is to be said of it.
                Found::Other => {}
                Found::InMotion(leaves) => {
                    share.belt.once_more(&path, size, Instant::now());
                    let written = differing(share, &path, &leaves)?;
                    ready.extend((written != Written::Nowhere).then_some((
                        path,
                        Hint {
                            content: true,
                            written,
                            ..Hint::default()
                        },
                    )));
                    continue;
                }
                Found::NotNow => {
                    share.belt.put_back(&path, Instant::now());
                    continue;
                }
            }
        }
        tracing::debug!(target: "omirr::touched", share = %share.name, "{path} is read again");
        ready.push((path, Hint::default()));
    }
    share.touch(ready);
    Ok(())
}

/// Looks for racy rows in the next part of the index.
fn walk(share: &Share) -> anyhow::Result<()> {
    let from = {
        let mut paths = share.belt.paths.lock();
        if !paths.walks() {
            return Ok(());
        }
        match paths.walk {
            Walk::At(seq) => seq,
            Walk::Done => {
                paths.again = false;
                0
            }
        }
    };
    let rows = share.index.read()?.after(from, PORTION)?;
    let now = Instant::now();
    let mut paths = share.belt.paths.lock();
    for (path, record) in &rows {
        // What a peer sent was hashed while it was written.
        let own = record.via.is_none() && !record.row.deleted;
        let Some(sig) = record.sig.filter(|sig| sig.racy && own) else {
            continue;
        };
        if !paths.waiting.contains_key(path) {
            let age = Duration::from_millis(super::now_ms().saturating_sub(sig.ctime.millis()));
            let due = now + share.belt.quiet.saturating_sub(age);
            paths.add(path, Waiting { due, in_part: true });
        }
    }
    paths.walk = match rows.last() {
        Some((_, last)) => Walk::At(last.seq),
        None => Walk::Done,
    };
    Ok(())
}

/// What reading a file has shown.
enum Found {
    /// Its content is the entry's.
    Same,
    /// It is not, or there is none.
    Other,
    /// It is being written to; what its leaves were when they were read.
    InMotion(Leaves),
    /// The daemon ends.
    NotNow,
}

/// Where the content of which these leaves were read is not what the index has of the
/// path by now.
fn differing(share: &Share, path: &RelPath, read: &Leaves) -> Result<Written, IndexError> {
    let reader = share.index.read()?;
    let row = reader.get(path)?.filter(|record| !record.row.deleted);
    let hash = row.and_then(|record| record.row.entry.content().map(|(_, hash)| hash));
    let known = hash.map(|hash| reader.leaves_of(&hash)).transpose()?.flatten();
    let Some(known) = known else {
        return Ok(Written::Nowhere);
    };
    let leaf = |leaf: u64| Written::within(leaf * LEAF_BYTES, (leaf + 1) * LEAF_BYTES);
    let differing = read.differing(&known.names()).into_iter().map(leaf);
    Ok(differing.fold(Written::Nowhere, Written::and))
}

/// Reads the whole file.
fn read(
    share: &Share,
    dirs: &apply::Dirs<'_>,
    path: &RelPath,
    entry: &Entry,
    known: &StatSig,
    go_on: &dyn Fn() -> bool,
) -> Found {
    let Some(content) = entry.content() else {
        return Found::Other;
    };
    let Ok(file) = apply::open_file(dirs, path) else {
        return Found::Other;
    };
    let is_still = || statx_fd(file.as_fd()).is_ok_and(|stat| sig_of(&stat).same_as(known));
    let was_still = is_still();
    let mut ask_at = ASK_EVERY;
    let mut whole = true;
    let hashed = content::hash_while(file.as_fd(), |done| {
        if done >= ask_at {
            ask_at = done + ASK_EVERY;
            whole = go_on();
        }
        Ok(whole)
    });
    let hashed = match hashed {
        Ok(hashed) if whole => hashed,
        _ if !whole => return Found::NotNow,
        _ => return Found::Other,
    };
    if !was_still || !is_still() {
        return hashed.leaves.map_or(Found::Other, Found::InMotion);
    }
    if (hashed.size, hashed.hash) == content {
        return Found::Same;
    }
    tracing::info!(share = %share.name, "{path} has changed, though no event told where");
    Found::Other
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(n: usize) -> RelPath {
        RelPath::new(format!("f{n}").as_bytes()).unwrap()
    }

    #[test]
    fn a_path_is_due_when_it_has_been_quiet_and_a_few_at_once() {
        let quiet = Duration::from_secs(60);
        let belt = Belt::after(quiet);
        let now = Instant::now();
        belt.note([(&path(1), None)].into_iter(), now);
        assert!(belt.due(now + quiet / 2).is_empty());
        // Heard of again.
        belt.note([(&path(1), None)].into_iter(), now + quiet / 2);
        assert!(belt.due(now + quiet).is_empty());
        assert_eq!(belt.due(now + quiet * 2), [path(1)]);
        assert!(belt.due(now + quiet * 2).is_empty());
        for n in 0..FEW + 1 {
            belt.note([(&path(n), None)].into_iter(), now);
        }
        assert_eq!(belt.due(now + quiet).len(), FEW);
        assert_eq!(belt.due(now + quiet).len(), 1);
    }

    #[test]
    fn in_doubt_what_was_read_in_part_is_due_at_once() {
        let belt = Belt::after(Duration::from_secs(60));
        let now = Instant::now();
        belt.note([(&path(1), Some(1)), (&path(2), None)].into_iter(), now);
        belt.hurry(now);
        assert_eq!(belt.due(now), [path(1)]);
    }

    #[test]
    fn what_is_looked_at_in_part_all_the_time_is_due_after_its_first_look() {
        let quiet = Duration::from_secs(60);
        let belt = Belt::after(quiet);
        let start = Instant::now();
        let size = 100 * BYTES_PER_SECOND;
        for seconds in 0..160 {
            let now = start + Duration::from_secs(seconds);
            assert!(belt.due(now).is_empty(), "{seconds}");
            belt.note([(&path(1), Some(size))].into_iter(), now);
        }
        let now = start + quiet + Duration::from_secs(100);
        assert_eq!(belt.due(now), [path(1)]);
        belt.once_more(&path(1), size, now);
        assert!(belt.due(now + quiet).is_empty());
        assert_eq!(belt.due(now + quiet * 3), [path(1)]);
    }

    #[test]
    fn what_there_is_no_room_for_is_looked_for_in_the_index() {
        let belt = Belt::after(Duration::from_secs(60));
        let now = Instant::now();
        assert!(!belt.paths.lock().walks());
        for n in 0..WAITING_MAX {
            belt.note([(&path(n), None)].into_iter(), now);
        }
        assert!(!belt.paths.lock().again);
        belt.note([(&path(WAITING_MAX), None)].into_iter(), now);
        let paths = belt.paths.lock();
        assert_eq!(paths.waiting.len(), WAITING_MAX);
        assert!(paths.again && !paths.walks(), "not before there is room");
        drop(paths);
        while !belt.paths.lock().walks() {
            assert!(!belt.due(now + Duration::from_secs(60)).is_empty());
        }
    }
}
