//! Paths of this node that could not be looked at.
//!
//! In: what went wrong at a look, and which looks went well. Out: which paths
//! are to be tried again, and what `status` says of them. A path stays in here
//! until a look at it succeeds, whatever that finds, so that nothing which
//! changed is forgotten because the disk could not be read at that moment.
//! Nothing is looked at here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::dirty::Dirt;
use crate::model::RelPath;

/// The first pause before another try; each further one is twice as long.
const PAUSE_MIN: Duration = Duration::from_secs(2);
/// The longest pause. What comes right with an event, a mode say, does not wait
/// for it.
const PAUSE_MAX: Duration = Duration::from_secs(30);

struct Failed {
    dirt: Dirt,
    why: String,
    pause: Duration,
    /// None while it is being looked at again.
    again: Option<Instant>,
}

#[derive(Default)]
pub(super) struct Unread(BTreeMap<RelPath, Failed>);

impl Unread {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A look failed; whether that is news.
    pub(super) fn failed(&mut self, path: RelPath, dirt: Dirt, why: String, now: Instant) -> bool {
        match self.0.get_mut(&path) {
            Some(known) => {
                let is_news = known.why != why;
                known.pause = (known.pause * 2).min(PAUSE_MAX);
                known.again = Some(now + known.pause);
                known.dirt = dirt.or(known.dirt);
                known.why = why;
                is_news
            }
            None => {
                let again = Some(now + PAUSE_MIN);
                let pause = PAUSE_MIN;
                self.0.insert(
                    path,
                    Failed {
                        dirt,
                        why,
                        pause,
                        again,
                    },
                );
                true
            }
        }
    }

    /// Why the path is looked at now, with the reasons of a look at it that failed: a
    /// success is one for all of them.
    pub(super) fn with_reasons(&self, path: &RelPath, dirt: Dirt) -> Dirt {
        self.0.get(path).map_or(dirt, |failed| dirt.or(failed.dirt))
    }

    /// A look succeeded.
    pub(super) fn succeeded(&mut self, path: &RelPath) {
        self.0.remove(path);
    }

    /// Whoever waits for everything to be looked at does not wait for a pause.
    pub(super) fn hurry(&mut self, now: Instant) {
        for failed in self.0.values_mut().filter(|failed| failed.again.is_some()) {
            failed.again = Some(now);
        }
    }

    /// What is to be looked at again.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(RelPath, Dirt)> {
        let due = self
            .0
            .iter_mut()
            .filter(|(_, failed)| failed.again.is_some_and(|again| again <= now));
        due.map(|(path, failed)| {
            failed.again = None;
            (path.clone(), failed.dirt)
        })
        .collect()
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.0.values().filter_map(|failed| failed.again).min()
    }

    /// Paths with what went wrong.
    pub(super) fn reasons(&self) -> impl Iterator<Item = (&RelPath, &str)> {
        self.0.iter().map(|(path, failed)| (path, failed.why.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::dirty::{DirtySet, Hint};

    fn dirt(path: &RelPath) -> Dirt {
        let mut set = DirtySet::default();
        set.add(path.clone(), Hint::default(), Instant::now());
        set.take(Instant::now(), true, 1)[0].1
    }

    #[test]
    fn the_reasons_of_a_look_that_failed_are_those_of_the_next_one() {
        let path = RelPath::new(b"a").unwrap();
        let (dirt, start) = (dirt(&path), Instant::now());
        let walk = Dirt {
            subtree: true,
            ..dirt
        };
        let mut unread = Unread::default();
        assert!(!unread.with_reasons(&path, dirt).subtree);
        unread.failed(path.clone(), walk, "no".to_owned(), start);
        assert!(unread.with_reasons(&path, dirt).subtree);
        let read = Dirt { read: true, ..dirt };
        unread.failed(path.clone(), read, "no".to_owned(), start);
        let all = unread.due(start + PAUSE_MAX)[0].1;
        assert!(all.subtree && all.read);
        unread.succeeded(&path);
        assert!(!unread.with_reasons(&path, dirt).subtree);
    }

    #[test]
    fn a_path_stays_until_a_look_succeeds_and_pauses_grow() {
        let path = RelPath::new(b"a").unwrap();
        let (dirt, start) = (dirt(&path), Instant::now());
        let mut unread = Unread::default();
        assert!(unread.failed(path.clone(), dirt, "no".to_owned(), start));
        assert!(unread.due(start).is_empty());
        assert_eq!(unread.due(start + PAUSE_MIN).len(), 1);
        assert!(unread.due(start + PAUSE_MIN).is_empty(), "it is under way");
        assert!(!unread.failed(path.clone(), dirt, "no".to_owned(), start));
        assert!(unread.due(start + PAUSE_MIN).is_empty());
        for _ in 0..20 {
            unread.failed(path.clone(), dirt, "no".to_owned(), start);
        }
        assert_eq!(unread.due(start + PAUSE_MAX).len(), 1);
        assert!(unread.failed(path.clone(), dirt, "other".to_owned(), start));
        unread.hurry(start);
        assert_eq!(unread.due(start).len(), 1);
        assert_eq!(unread.reasons().next(), Some((&path, "other")));
        unread.succeeded(&path);
        assert!(unread.is_empty() && unread.next_due().is_none());
    }
}
