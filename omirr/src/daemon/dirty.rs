//! The dirty set: paths that must be looked at, each once, however often they
//! changed.
//!
//! In: changes, from the resolver on the source's thread and from scans. Out:
//! paths that are due, to the keeper. Adding never waits. A path is due a
//! moment after its first change, so that a create, its write and its close
//! become one look; a big file that is still being written is looked at again
//! only after a pause in proportion to what looking costs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::who::Who;
use crate::model::RelPath;

/// How long a change waits for its companions: a file that was just made, for
/// its writes and its close.
const SETTLE: Duration = Duration::from_millis(1);
/// The same where nothing more is to be expected of the file itself: long enough
/// for the rename that follows when a program replaces a file by a new one.
const SETTLE_AT_REST: Duration = Duration::from_micros(150);
/// How long a file that was not closed yet may wait at most.
const HOLD_MAX: Duration = Duration::from_secs(2);

/// Why a path is in the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirt {
    /// The content was written to: it may differ though size and time of
    /// modification are the same.
    pub content: bool,
    /// Its content is to be read whatever `stat` says: it was mapped to write, or
    /// the daemon ended, or lost sight of it, while it changed.
    pub read: bool,
    /// What lies beneath must be looked at as well, though the directory is
    /// known.
    pub subtree: bool,
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
    pub subtree: bool,
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
            subtree: self.subtree | other.subtree,
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
    age: u64,
}

impl DirtySet {
    pub fn len(&self) -> usize {
        self.paths.len()
    }

    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
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

    /// Adds `path` at `now` because of something that is no newer than `cause`:
    /// whoever waits for that waits for this.
    pub fn add_for(&mut self, path: RelPath, hint: Hint, cause: &Dirt, now: Instant) {
        self.add(path.clone(), hint, now);
        if let Some(dirt) = self.paths.get_mut(&path) {
            dirt.since = dirt.since.min(cause.since);
            dirt.age = dirt.age.min(cause.age);
        }
    }

    /// Adds a change of `path` at `now`.
    pub fn add(&mut self, path: RelPath, hint: Hint, now: Instant) {
        let dirt = self.paths.entry(path).or_insert(Dirt {
            content: false,
            read: false,
            subtree: false,
            since: now,
            named: now,
            due: now + SETTLE,
            unstable: 0,
            who: None,
            age: self.age,
        });
        dirt.content |= hint.content;
        dirt.read |= hint.read;
        dirt.subtree |= hint.subtree;
        dirt.who = hint.who.or(dirt.who);
        if hint.at_rest {
            dirt.due = dirt.due.min(now + SETTLE_AT_REST);
        }
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
        kept.subtree |= dirt.subtree;
        // What has come meanwhile is newer.
        kept.who = kept.who.or(dirt.who);
        kept.since = kept.since.min(dirt.since);
        kept.named = kept.named.min(dirt.named);
        kept.age = kept.age.min(dirt.age);
    }

    /// Takes up to `limit` paths that are due at `now`, those of least depth, so
    /// that a directory and its former name come before what is in them; with `force` also those that are not, unless they keep changing.
    pub fn take(&mut self, now: Instant, force: bool, limit: usize) -> Vec<(RelPath, Dirt)> {
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

    /// Takes one path out, if it is in.
    pub fn remove(&mut self, path: &RelPath) -> Option<Dirt> {
        self.paths.remove(path)
    }

    /// When the next path is due, if there is one.
    pub fn next_due(&self) -> Option<Instant> {
        self.paths.values().map(|dirt| dirt.due).min()
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
