//! The dirty set: paths that must be looked at, each once, however often they
//! changed.
//!
//! In: changes, from the resolver on the source's thread and from scans. Out:
//! paths that are due, to the keeper. Adding never waits. A path is due a
//! moment after its first change, so that a create, its write and its close
//! become one look; a big file that is still being written is looked at again
//! only after a pause in proportion to what looking costs.
//!
//! Where changes keep coming while others are looked at, one pause after each look
//! lets them gather, and grows while that goes on: what a look and a commit cost
//! is shared by all of them. A change on an idle share waits for none.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::trust::Unmapped;
use super::who::Who;
use crate::model::{RelPath, StatSig, Time};
use crate::source::Written;

/// How long a change waits for its companions: a file that was just made, for
/// its writes and its close.
const SETTLE: Duration = Duration::from_millis(1);
/// The same where nothing more is to be expected of the file itself: long enough
/// for the rename that follows when a program replaces a file by a new one.
const SETTLE_AT_REST: Duration = Duration::from_micros(150);
/// The pause after a pass during which more came, and what it grows to.
const GATHER_MIN: Duration = Duration::from_micros(500);
const GATHER_MAX: Duration = Duration::from_millis(32);
/// So many need not wait for more.
const GATHERED: usize = 256;
/// How long a file that was not closed yet may wait at most.
const HOLD_MAX: Duration = Duration::from_secs(2);

/// What was found changing so often while it was read never rests, as far as anybody
/// waits for it who need not.
const RESTLESS: u32 = 8;

/// Who sees to it that what lies beneath a path is looked at, should a directory be
/// found there of which nothing is known. [`Dirt::subtree`] takes precedence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Beneath {
    /// Whoever looks at it.
    #[default]
    Walk,
    /// Whoever has added it adds that as well, as long as it is still this directory.
    Comes(DirId),
    /// A comparison of the whole tree is going on: either it finds the directory, or a
    /// rename tells of it.
    Compared,
}

/// A directory, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirId {
    ino: u64,
    btime: Time,
}

impl Beneath {
    /// What lies beneath comes by itself, if that is a directory.
    pub fn comes(sig: &StatSig) -> Beneath {
        match DirId::of(sig) {
            Some(dir) => Beneath::Comes(dir),
            None => Beneath::Walk,
        }
    }

    /// Whether what lies beneath the directory that was found need not be walked.
    pub fn comes_by_itself(self, found: &StatSig) -> bool {
        match self {
            Beneath::Walk => false,
            Beneath::Comes(dir) => DirId::of(found) == Some(dir),
            Beneath::Compared => true,
        }
    }

    /// This, or `other` where this says nothing. An event about a directory does not
    /// take back what a comparison has said of it; one that moved it has `subtree`.
    fn or(self, other: Beneath) -> Beneath {
        match (self, other) {
            (Beneath::Walk, other) => other,
            // The stricter one.
            (Beneath::Compared, Beneath::Comes(_)) => other,
            (this, _) => this,
        }
    }
}

impl DirId {
    fn of(sig: &StatSig) -> Option<DirId> {
        sig.is_dir().then_some(DirId {
            ino: sig.ino,
            btime: sig.btime,
        })
    }
}

/// Why a path is in the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirt {
    /// The content was written to: it may differ though size and time of
    /// modification are the same.
    pub content: bool,
    /// Its content is to be read whatever `stat` says: it was mapped to write, or
    /// the daemon ended, or lost sight of it, while it changed.
    pub read: bool,
    /// Where the content was written to since the path was last looked at, if all
    /// that happened under its name is told so.
    pub written: Written,
    /// Nobody had it mapped to write at some time since it was last looked at.
    pub unmapped: Option<Unmapped>,
    /// What lies beneath must be looked at as well, though the directory is
    /// known.
    pub subtree: bool,
    pub beneath: Beneath,
    /// When it was first added.
    pub since: Instant,
    /// Since when it may be called so: directories that were renamed before that
    /// are not its own.
    pub named: Instant,
    /// Not to be looked at before.
    pub due: Instant,
    /// How often it was found changing while it was read.
    pub unstable: u32,
    /// Who changed it last, as far as events told.
    pub who: Option<Who>,
    /// The set's age when it was added: see [`DirtySet::turn`].
    pub age: u64,
}

/// What is known of a change when it is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hint {
    pub content: bool,
    /// Whatever `stat` says, its content is to be read.
    pub read: bool,
    /// Where the content was written to: anywhere, also if the name came or went.
    pub written: Written,
    /// A source that would have told of a mapping since says that nobody had it
    /// mapped to write.
    pub unmapped: Option<Unmapped>,
    pub subtree: bool,
    pub beneath: Beneath,
    /// The last writer has closed the file: no reason to wait any longer.
    pub at_rest: bool,
    /// Who made the change, if it is told.
    pub who: Option<Who>,
}

impl Dirt {
    /// This, with what is missing in it from `other`, which is a reason of the
    /// same look.
    pub fn or(self, other: Dirt) -> Dirt {
        Dirt {
            content: self.content | other.content,
            read: self.read | other.read,
            written: self.written.and(other.written),
            unmapped: self.unmapped.max(other.unmapped),
            subtree: self.subtree | other.subtree,
            beneath: self.beneath.or(other.beneath),
            who: self.who.or(other.who),
            since: self.since.min(other.since),
            named: self.named.min(other.named),
            age: self.age.min(other.age),
            ..other
        }
    }
}

#[derive(Debug, Default)]
pub struct DirtySet {
    paths: BTreeMap<RelPath, Dirt>,
    /// How many the pass has taken that is not over.
    in_hand: usize,
    age: u64,
    /// Changes came since the last pass began.
    more: bool,
    /// The present pause between passes, and when it ends.
    gather: Duration,
    gather_until: Option<Instant>,
    /// When the keeper comes, if it has asked since it last took something, or was
    /// woken since.
    awaited: Option<Instant>,
}

impl DirtySet {
    pub fn len(&self) -> usize {
        self.paths.len()
    }

    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// How many have been taken and are being looked at.
    pub fn in_hand(&self) -> usize {
        self.in_hand
    }

    /// Begins a new age: what is added from now on can be told from what was
    /// added before.
    pub fn turn(&mut self) {
        self.age += 1;
    }

    /// Whether something is left from before the last turn.
    pub fn has_older(&self) -> bool {
        self.paths.values().any(|dirt| dirt.age < self.age)
    }

    /// Whether something is left that was first added at `moment` or before.
    pub fn has_from_before(&self, moment: Instant) -> bool {
        self.paths.values().any(|dirt| dirt.since <= moment)
    }

    /// The same, but for what is found changing whenever it is looked at.
    pub fn has_at_rest_from_before(&self, moment: Instant) -> bool {
        let mut dirts = self.paths.values();
        dirts.any(|dirt| dirt.since <= moment && dirt.unstable < RESTLESS)
    }

    /// Adds `path` at `now` because of something that is no newer than `cause`:
    /// whoever waits for that waits for this.
    pub fn add_for(&mut self, path: RelPath, hint: Hint, cause: &Dirt, now: Instant) {
        self.add(path.clone(), hint, now);
        if let Some(dirt) = self.paths.get_mut(&path) {
            dirt.since = dirt.since.min(cause.since);
            dirt.age = dirt.age.min(cause.age);
        }
    }

    /// Adds changes that have just been told; true if the keeper, which sleeps until
    /// [`DirtySet::next_due`], has to be woken.
    pub fn arrive(&mut self, changes: impl IntoIterator<Item = (RelPath, Hint)>, now: Instant) -> bool {
        let mut first: Option<Instant> = None;
        for (path, hint) in changes {
            self.more = true;
            let due = self.add(path, hint, now);
            first = Some(first.map_or(due, |first| first.min(due)));
        }
        let Some(first) = first else { return false };
        let first = self.not_before(first);
        let sooner = self.awaited.is_none_or(|awaited| first < awaited);
        if sooner {
            self.awaited = Some(first);
        }
        sooner
    }

    /// A pass over what was taken has ended at `now`.
    pub fn passed(&mut self, now: Instant) {
        self.in_hand = 0;
        self.gather = match std::mem::take(&mut self.more) {
            true => (self.gather * 2).clamp(GATHER_MIN, GATHER_MAX),
            false if self.gather > GATHER_MIN => self.gather / 2,
            false => Duration::ZERO,
        };
        self.gather_until = Some(now + self.gather);
    }

    /// Adds a change of `path` at `now`; returns when it is due by itself.
    pub fn add(&mut self, path: RelPath, hint: Hint, now: Instant) -> Instant {
        let dirt = self.paths.entry(path).or_insert(Dirt {
            content: false,
            read: false,
            written: Written::Nowhere,
            unmapped: None,
            subtree: false,
            beneath: Beneath::Walk,
            since: now,
            named: now,
            due: now + SETTLE,
            unstable: 0,
            who: None,
            age: self.age,
        });
        dirt.content |= hint.content;
        dirt.read |= hint.read;
        dirt.written = dirt.written.and(hint.written);
        dirt.unmapped = dirt.unmapped.max(hint.unmapped);
        dirt.subtree |= hint.subtree;
        dirt.beneath = hint.beneath.or(dirt.beneath);
        dirt.who = hint.who.or(dirt.who);
        if hint.at_rest {
            dirt.due = dirt.due.min(now + SETTLE_AT_REST);
        }
        dirt.due
    }

    /// Puts back a path that changed while it was read, or that is too dear to
    /// look at again at once: `cost` is how long the last look took.
    pub fn put_back(&mut self, path: RelPath, dirt: Dirt, cost: Duration, now: Instant) {
        let pause = (cost * 4).clamp(Duration::from_millis(20), HOLD_MAX) * (dirt.unstable + 1).min(8);
        let due = now + pause.min(HOLD_MAX);
        let kept = self.paths.entry(path).or_insert(Dirt {
            due,
            unstable: dirt.unstable + 1,
            ..dirt
        });
        kept.content |= dirt.content;
        kept.read |= dirt.read;
        kept.written = kept.written.and(dirt.written);
        kept.unmapped = kept.unmapped.max(dirt.unmapped);
        kept.subtree |= dirt.subtree;
        kept.beneath = kept.beneath.or(dirt.beneath);
        // What has come meanwhile is newer.
        kept.who = kept.who.or(dirt.who);
        kept.since = kept.since.min(dirt.since);
        kept.named = kept.named.min(dirt.named);
        kept.age = kept.age.min(dirt.age);
    }

    /// Takes up to `limit` paths that are due at `now`, those of least depth, so
    /// that a directory and its former name come before what is in them; with
    /// `force` also those that are not, unless they keep changing.
    pub fn take(&mut self, now: Instant, force: bool, limit: usize) -> Vec<(RelPath, Dirt)> {
        if !force && self.gathers().is_some_and(|until| now < until) {
            return Vec::new();
        }
        let taken = self.take_ready(now, force, limit);
        self.in_hand = taken.len();
        taken
    }

    fn take_ready(&mut self, now: Instant, force: bool, limit: usize) -> Vec<(RelPath, Dirt)> {
        self.more = false;
        self.awaited = None;
        let ready = |dirt: &Dirt| dirt.due <= now || (force && dirt.unstable == 0);
        if self.paths.len() <= limit && self.paths.values().all(ready) {
            return std::mem::take(&mut self.paths).into_iter().collect();
        }
        let mut depths: BTreeMap<usize, usize> = BTreeMap::new();
        for (path, _) in self.paths.iter().filter(|(_, dirt)| ready(dirt)) {
            *depths.entry(path.depth()).or_default() += 1;
        }
        // By depth: how many of them are taken.
        let mut left = limit;
        for count in depths.values_mut() {
            *count = left.min(*count);
            left -= *count;
        }
        let mut taken = Vec::new();
        self.paths.retain(|path, dirt| {
            let room = depths.get_mut(&path.depth()).filter(|room| **room > 0);
            if let Some(room) = room.filter(|_| ready(dirt)) {
                *room -= 1;
                taken.push((path.clone(), *dirt));
                return false;
            }
            true
        });
        taken
    }

    /// Why a path is in, if it is.
    pub fn get(&self, path: &RelPath) -> Option<&Dirt> {
        self.paths.get(path)
    }

    /// Takes one path out, if it is in.
    pub fn remove(&mut self, path: &RelPath) -> Option<Dirt> {
        self.paths.remove(path)
    }

    /// When the next path can be taken, if there is one: the keeper sleeps until
    /// then, or until [`DirtySet::arrive`] says otherwise.
    pub fn next_due(&mut self) -> Option<Instant> {
        let due = self.paths.values().map(|dirt| dirt.due).min();
        self.awaited = due.map(|due| self.not_before(due));
        self.awaited
    }

    /// When what is due then can be taken.
    fn not_before(&self, due: Instant) -> Instant {
        self.gathers().map_or(due, |until| due.max(until))
    }

    /// Until when nothing is taken, if more is waited for.
    fn gathers(&self) -> Option<Instant> {
        self.gather_until.filter(|_| self.paths.len() < GATHERED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn many_changes_of_a_path_are_one() {
        let mut set = DirtySet::default();
        let now = Instant::now();
        set.add(
            path("a"),
            Hint {
                content: true,
                ..Hint::default()
            },
            now,
        );
        set.add(
            path("a"),
            Hint {
                at_rest: true,
                ..Hint::default()
            },
            now,
        );
        assert!(set.take(now, false, 10).is_empty(), "it settles first");
        let taken = set.take(now + SETTLE, false, 10);
        assert_eq!(taken.len(), 1);
        assert!(taken[0].1.content && set.is_empty());
    }

    #[test]
    fn what_changed_while_it_was_read_comes_again_later() {
        let mut set = DirtySet::default();
        let now = Instant::now();
        set.add(path("a"), Hint::default(), now);
        let (name, dirt) = set.take(now, true, 10).remove(0);
        set.put_back(name, dirt, Duration::from_millis(100), now);
        assert!(set.take(now + Duration::from_millis(100), false, 10).is_empty());
        assert_eq!(set.take(now + HOLD_MAX, false, 10).len(), 1);
    }

    fn dir(ino: u64) -> StatSig {
        let time = Time { secs: 1, nanos: 0 };
        StatSig {
            ino,
            btime: time,
            mtime: time,
            ctime: time,
            size: 0,
            mode: 0o040_755,
            uid: 0,
            gid: 0,
            nlink: 2,
            racy: false,
        }
    }

    #[test]
    fn what_a_comparison_has_said_of_a_directory_stays_said() {
        let now = Instant::now();
        let beneath = |hints: &[Beneath]| {
            let mut set = DirtySet::default();
            for &beneath in hints {
                let hint = Hint {
                    beneath,
                    ..Hint::default()
                };
                set.add(path("a"), hint, now);
            }
            set.remove(&path("a")).unwrap().beneath
        };
        let (old, new) = (Beneath::comes(&dir(1)), Beneath::comes(&dir(2)));
        assert_eq!(beneath(&[Beneath::Walk]), Beneath::Walk);
        assert_eq!(beneath(&[old, Beneath::Walk]), old);
        assert_eq!(beneath(&[Beneath::Walk, old]), old);
        // Of the two, what was found last, and which directory it was.
        assert_eq!(beneath(&[old, new]), new);
        assert_eq!(beneath(&[old, Beneath::Compared]), old);
        assert_eq!(beneath(&[Beneath::Compared, old]), old);
        assert_eq!(beneath(&[Beneath::Compared, Beneath::Walk]), Beneath::Compared);
    }

    #[test]
    fn what_a_pass_has_taken_counts_until_it_is_over() {
        let mut set = DirtySet::default();
        let now = Instant::now();
        for name in ["a", "b", "c"] {
            set.add(path(name), Hint::default(), now);
        }
        assert_eq!(set.take(now, true, 2).len(), 2);
        assert_eq!((set.len(), set.in_hand()), (1, 2));
        set.passed(now);
        assert_eq!((set.len(), set.in_hand()), (1, 0));
    }

    #[test]
    fn a_close_ends_the_wait() {
        let mut set = DirtySet::default();
        let now = Instant::now();
        set.add(path("a"), Hint::default(), now);
        let (name, dirt) = set.take(now, true, 10).remove(0);
        set.put_back(name, dirt, Duration::from_secs(1), now);
        set.add(
            path("a"),
            Hint {
                at_rest: true,
                ..Hint::default()
            },
            now,
        );
        assert_eq!(set.take(now + SETTLE, false, 10).len(), 1);
    }

    #[test]
    fn what_came_later_is_told_from_what_was_there() {
        let mut set = DirtySet::default();
        let start = Instant::now();
        let moment = start + Duration::from_millis(5);
        let later = start + Duration::from_millis(10);
        set.add(path("a"), Hint::default(), start);
        set.add(path("b"), Hint::default(), later);
        assert!(set.has_from_before(moment));
        let dirt = set.remove(&path("a")).unwrap();
        assert!(!set.has_from_before(moment));
        // What is looked at again for an older one's sake is as old.
        set.turn();
        set.add(path("c"), Hint::default(), later);
        set.add_for(path("c"), Hint::default(), &dirt, later);
        assert!(set.has_from_before(moment) && set.has_older());
    }

    #[test]
    fn what_never_rests_is_not_waited_for_by_who_need_not() {
        let mut set = DirtySet::default();
        let start = Instant::now();
        set.add(path("a"), Hint::default(), start);
        for _ in 0..RESTLESS {
            assert!(set.has_at_rest_from_before(start));
            let dirt = set.remove(&path("a")).unwrap();
            set.put_back(path("a"), dirt, Duration::ZERO, start);
        }
        assert!(!set.has_at_rest_from_before(start) && set.has_from_before(start));
    }

    /// One pass over one path; `meanwhile` another change comes. Returns how much
    /// later than at rest the next one is due.
    fn pause_after_a_pass(set: &mut DirtySet, now: Instant, meanwhile: bool) -> Duration {
        let at_rest = Hint {
            at_rest: true,
            ..Hint::default()
        };
        set.arrive([(path("a"), at_rest)], now);
        let due = set.next_due().unwrap();
        assert_eq!(set.take(due, false, 10).len(), 1);
        if meanwhile {
            set.arrive([(path("b"), at_rest)], now);
            set.remove(&path("b"));
        }
        set.passed(now);
        set.arrive([(path("c"), at_rest)], now);
        let due = set.next_due().unwrap();
        assert!(set.take(due - Duration::from_nanos(1), false, 10).is_empty());
        assert_eq!(set.take(due, false, 10).len(), 1);
        due.saturating_duration_since(now + SETTLE_AT_REST)
    }

    #[test]
    fn a_change_on_an_idle_share_waits_for_no_others_and_many_share_a_pass() {
        let mut set = DirtySet::default();
        let mut now = Instant::now();
        for _ in 0..3 {
            assert_eq!(pause_after_a_pass(&mut set, now, false), Duration::ZERO);
            now += Duration::from_millis(1);
        }
        let mut last = Duration::ZERO;
        for _ in 0..10 {
            let pause = pause_after_a_pass(&mut set, now, true);
            assert!(pause >= last && pause <= GATHER_MAX, "{pause:?} after {last:?}");
            last = pause;
            now += Duration::from_millis(20);
        }
        assert_eq!(last, GATHER_MAX - SETTLE_AT_REST);
        for _ in 0..10 {
            last = pause_after_a_pass(&mut set, now, false);
            now += Duration::from_millis(20);
        }
        assert_eq!(last, Duration::ZERO);
    }

    #[test]
    fn a_barrier_does_not_wait_for_more() {
        let mut set = DirtySet::default();
        let now = Instant::now();
        set.arrive([(path("a"), Hint::default())], now);
        set.passed(now);
        assert!(set.take(now, false, 10).is_empty());
        assert_eq!(set.take(now, true, 10).len(), 1);
    }

    #[test]
    fn the_keeper_is_woken_for_what_is_due_before_the_rest() {
        let mut set = DirtySet::default();
        let now = Instant::now();
        let at_rest = Hint {
            at_rest: true,
            ..Hint::default()
        };
        assert!(!set.arrive([], now));
        assert!(set.arrive([(path("a"), Hint::default())], now));
        assert!(!set.arrive([(path("b"), Hint::default())], now));
        assert!(set.arrive([(path("b"), at_rest)], now));
        assert!(!set.arrive([(path("c"), at_rest)], now));
        // It is at work, and asks before it sleeps again.
        assert_eq!(set.take(now, true, 10).len(), 3);
        assert!(set.arrive([(path("a"), Hint::default())], now));
        assert_eq!(set.next_due(), Some(now + SETTLE));
        assert!(!set.arrive([(path("b"), Hint::default())], now));
    }

    #[test]
    fn a_limit_leaves_the_rest() {
        let mut set = DirtySet::default();
        let now = Instant::now();
        for name in ["a", "b", "c"] {
            set.add(path(name), Hint::default(), now);
        }
        assert_eq!(set.take(now, true, 2).len(), 2);
        assert_eq!(set.len(), 1);
    }

    #[test]
    fn directories_are_taken_before_what_is_in_others() {
        let mut set = DirtySet::default();
        let now = Instant::now();
        for name in ["a/1", "a/2", "a", "b"] {
            set.add(path(name), Hint::default(), now);
        }
        let taken: Vec<_> = set.take(now, true, 3).into_iter().map(|(path, _)| path).collect();
        assert_eq!(taken, [path("a"), path("a/1"), path("b")]);
    }
}
