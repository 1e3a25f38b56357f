//! The resolver against a model tree: whatever happened, and however a scan and
//! the events overlapped, it must end with the tree's own paths.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const ROOT: u64 = 2;
/// The parent of directories that lie outside the share.
const OUTSIDE: u64 = 1;

fn path(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).expect("a path")
}

fn dirent(dir: u64, name: &str) -> Option<Dirent> {
    Some(Dirent {
        dir,
        name: name.as_bytes().into(),
    })
}

fn event(op: Op, ino: u64, is_dir: bool, at: Option<Dirent>, to: Option<Dirent>) -> Event {
    Event {
        time_ns: 0,
        op,
        dev: 0,
        ino,
        generation: 0,
        is_dir,
        at,
        to,
        range: None,
        written: Default::default(),
        unmapped: false,
        pid: 0,
        uid: 0,
        also: Default::default(),
        mapped: false,
        stale: false,
        cgroup: 0,
        comm: [0; 16],
    }
}

fn touched(text: &str, content: bool) -> Change {
    Change::Touched {
        path: path(text),
        content,
        at_rest: false,
    }
}

#[test]
fn follows_a_directory_through_its_life() {
    let mut resolver = Resolver::new(ROOT);
    let made = resolver.apply(&event(Op::Mkdir, 10, true, dirent(ROOT, "a"), None));
    assert_eq!(made, [touched("a", false)]);
    resolver.apply(&event(Op::Mkdir, 11, true, dirent(10, "b"), None));
    let written = resolver.apply(&event(Op::Write, 50, false, dirent(11, "f"), None));
    assert_eq!(written, [touched("a/b/f", true)]);
    let moved = resolver.apply(&event(Op::Rename, 10, true, dirent(ROOT, "a"), dirent(ROOT, "z")));
    assert_eq!(
        moved,
        [Change::Moved {
            from: path("a"),
            to: path("z"),
            is_dir: true
        }]
    );
    let closed = resolver.apply(&event(Op::Close, 50, false, dirent(11, "f"), None));
    assert_eq!(
        closed,
        [Change::Touched {
            path: path("z/b/f"),
            content: true,
            at_rest: true
        }]
    );
    assert_eq!(
        resolver.apply(&event(Op::Attr, 11, true, dirent(11, ""), None)),
        [touched("z/b", false)]
    );
    let removed = resolver.apply(&event(Op::Rmdir, 11, true, dirent(10, "b"), None));
    assert_eq!(removed, [Change::Gone { path: path("z/b") }]);
    assert_eq!(
        (resolver.path_of(11), resolver.dir_at(&path("z"))),
        (None, Some(10))
    );
    assert_eq!((resolver.stats().hits, resolver.stats().misses), (7, 0));
}

#[test]
fn a_directory_that_leaves_is_forgotten_with_what_is_beneath_it() {
    let mut resolver = Resolver::new(ROOT);
    resolver.learn_dir(10, ROOT, b"a");
    resolver.learn_dir(11, 10, b"b");
    for to in [None, dirent(OUTSIDE, "a")] {
        resolver.learn_dir(10, ROOT, b"a");
        resolver.learn_dir(11, 10, b"b");
        let left = resolver.apply(&event(Op::Rename, 10, true, dirent(ROOT, "a"), to.clone()));
        assert_eq!(left[0], Change::Gone { path: path("a") });
        // Where it went may be a directory of the share that was just made.
        assert_eq!(
            left.get(1),
            to.map(|at| {
                Change::Unknown(Unknown {
                    at: Some(at),
                    ino: 10,
                    generation: 0,
                    content: true,
                })
            })
            .as_ref()
        );
        assert_eq!(
            (
                resolver.path_of(10),
                resolver.path_of(11),
                resolver.stats().directories
            ),
            (None, None, 1)
        );
    }
    let later = event(Op::Write, 50, false, dirent(11, "f"), None);
    assert!(!resolver.knows(&later));
    assert!(matches!(&resolver.apply(&later)[..], [Change::Unknown(unknown)] if unknown.ino == 50));
    let back = resolver.apply(&event(
        Op::Rename,
        10,
        true,
        dirent(OUTSIDE, "a"),
        dirent(ROOT, "c"),
    ));
    assert_eq!(back[0], touched("c", true));
    assert!(matches!(&back[1..], [Change::Unknown(unknown)] if unknown.at == dirent(OUTSIDE, "a")));
    assert_eq!(resolver.path_of(10), Some(path("c")));
}

#[test]
fn a_rename_told_in_halves_keeps_what_is_beneath() {
    let mut resolver = Resolver::new(ROOT);
    resolver.learn_dir(10, ROOT, b"a");
    resolver.learn_dir(11, 10, b"b");
    let left = resolver.apply(&event(Op::Rename, 0, true, dirent(ROOT, "a"), None));
    assert_eq!(left, [Change::Gone { path: path("a") }]);
    assert_eq!(resolver.path_of(11), None);
    let arrived = resolver.apply(&event(Op::Rename, 10, true, None, dirent(ROOT, "c")));
    assert_eq!(arrived, [touched("c", true)]);
    assert_eq!(resolver.path_of(11), Some(path("c/b")));
}

#[test]
fn an_exchange_swaps_subtrees_in_one_event_or_two() {
    for op in [Op::Exchange, Op::Rename] {
        let mut resolver = Resolver::new(ROOT);
        for (ino, parent, name) in [(10, ROOT, "a"), (11, 10, "x"), (20, ROOT, "b"), (21, 20, "y")] {
            assert!(resolver.learn_dir(ino, parent, name.as_bytes()));
        }
        let first = resolver.apply(&event(op, 10, true, dirent(ROOT, "a"), dirent(ROOT, "b")));
        if op == Op::Rename {
            resolver.apply(&event(op, 20, true, dirent(ROOT, "b"), dirent(ROOT, "a")));
        } else {
            assert_eq!(
                first,
                [Change::Exchanged {
                    a: path("a"),
                    b: path("b")
                }]
            );
        }
        assert_eq!(resolver.path_of(11), Some(path("b/x")), "{op:?}");
        assert_eq!(resolver.path_of(21), Some(path("a/y")), "{op:?}");
    }
}

#[test]
fn a_directory_never_comes_to_lie_in_itself() {
    let mut resolver = Resolver::new(ROOT);
    resolver.learn_dir(10, ROOT, b"a");
    resolver.learn_dir(11, 10, b"b");
    resolver.learn_dir(12, 11, b"c");
    // Only possible if "c" left "a" before, which no event told.
    resolver.apply(&event(Op::Rename, 10, true, dirent(ROOT, "a"), dirent(12, "a")));
    assert_eq!((resolver.path_of(10), resolver.path_of(12)), (None, None));
    assert!(resolver.learn_dir(12, ROOT, b"c"));
    assert_eq!(resolver.path_of(11), Some(path("c/a/b")));
}

#[test]
fn hostile_names_and_numbers_are_refused() {
    let mut resolver = Resolver::new(ROOT);
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
        assert!(!resolver.learn_dir(10, ROOT, name), "{name:?}");
    }
    assert!(!resolver.learn_dir(ROOT, ROOT, b"a") && !resolver.learn_dir(0, ROOT, b"a"));
    assert!(!resolver.learn_dir(11, 99, b"a"), "the parent is not known");
    assert_eq!(resolver.stats().directories, 1);
}

/// The true tree: each directory's parent and name. Directories outside the
/// share are kept as well, since they can come back with what they hold.
#[derive(Clone, Debug, Default)]
struct Model {
    dirs: BTreeMap<u64, (u64, u8)>,
    next_ino: u64,
}

/// Names are letters, so that sequences meet often.
fn name_of(letter: u8) -> String {
    char::from(b'a' + letter).to_string()
}

impl Model {
    fn new() -> Model {
        Model {
            dirs: BTreeMap::new(),
            next_ino: 100,
        }
    }

    fn pick(&self, choice: u16) -> Option<u64> {
        self.dirs
            .keys()
            .nth(usize::from(choice) % self.dirs.len().max(1))
            .copied()
    }

    /// A directory to put something in: the share's root, the outside, or any.
    fn pick_parent(&self, choice: u16) -> u64 {
        match choice % 6 {
            0 => ROOT,
            1 => OUTSIDE,
            _ => self.pick(choice / 6).unwrap_or(ROOT),
        }
    }

    fn child(&self, parent: u64, name: u8) -> Option<u64> {
        self.dirs
            .iter()
            .find(|(_, place)| **place == (parent, name))
            .map(|(ino, _)| *ino)
    }

    fn is_empty(&self, ino: u64) -> bool {
        self.dirs.values().all(|(parent, _)| *parent != ino)
    }

    fn is_within(&self, mut ino: u64, ancestor: u64) -> bool {
        loop {
            if ino == ancestor {
                return true;
            }
            match self.dirs.get(&ino) {
                Some((parent, _)) => ino = *parent,
                None => return false,
            }
        }
    }

    fn is_inside(&self, ino: u64) -> bool {
        self.is_within(ino, ROOT)
    }

    fn path(&self, ino: u64) -> String {
        match self.dirs.get(&ino) {
            None => String::new(),
            Some((ROOT, name)) => name_of(*name),
            Some((parent, name)) => format!("{}/{}", self.path(*parent), name_of(*name)),
        }
    }

    /// The entry as a source names it: not at all outside the share.
    fn at(&self, parent: u64, name: u8) -> Option<Dirent> {
        if self.is_inside(parent) {
            dirent(parent, &name_of(name))
        } else {
            None
        }
    }

    /// Does what `step` says, if that is possible; gives the event.
    fn act(&mut self, step: &Step) -> Option<Event> {
        let event = match *step {
            Step::Mkdir { parent, name } => {
                let parent = self.pick_parent(parent);
                if self.child(parent, name).is_some() {
                    return None;
                }
                self.next_ino += 1;
                self.dirs.insert(self.next_ino, (parent, name));
                event(Op::Mkdir, self.next_ino, true, self.at(parent, name), None)
            }
            Step::Rmdir { dir } => {
                let ino = self.pick(dir).filter(|&ino| self.is_empty(ino))?;
                let (parent, name) = self.dirs.remove(&ino)?;
                event(Op::Rmdir, ino, true, self.at(parent, name), None)
            }
            Step::Rename { dir, parent, name } => {
                let (ino, to) = (self.pick(dir)?, self.pick_parent(parent));
                let from = self.dirs[&ino];
                if self.is_within(to, ino) || from == (to, name) {
                    return None;
                }
                if let Some(other) = self.child(to, name) {
                    if !self.is_empty(other) {
                        return None;
                    }
                    self.dirs.remove(&other);
                }
                let at = self.at(from.0, from.1);
                self.dirs.insert(ino, (to, name));
                event(Op::Rename, ino, true, at, self.at(to, name))
            }
            Step::Exchange { a, b } => {
                let (a, b) = (self.pick(a)?, self.pick(b)?);
                if self.is_within(a, b) || self.is_within(b, a) {
                    return None;
                }
                let (at, to) = (self.dirs[&a], self.dirs[&b]);
                let event = event(Op::Exchange, a, true, self.at(at.0, at.1), self.at(to.0, to.1));
                self.dirs.insert(a, to);
                self.dirs.insert(b, at);
                event
            }
        };
        (event.at.is_some() || event.to.is_some()).then_some(event)
    }

    /// What a scan of `top` tells, parents first.
    fn scan(&self, top: u64, resolver: &mut Resolver) {
        let children: Vec<_> = self
            .dirs
            .iter()
            .filter(|(_, (parent, _))| *parent == top)
            .map(|(ino, at)| (*ino, at.1))
            .collect();
        for (ino, name) in children {
            assert!(resolver.learn_dir(ino, top, name_of(name).as_bytes()));
            self.scan(ino, resolver);
        }
    }

    /// What an observer does on a change: where a directory is now, its subtree
    /// is walked.
    fn observe(&self, changes: &[Change], resolver: &mut Resolver) {
        let mut paths = Vec::new();
        for change in changes {
            match change {
                Change::Touched { path, .. } => paths.push(path.clone()),
                Change::Moved { from, to, .. } => paths.extend([from.clone(), to.clone()]),
                Change::Exchanged { a, b } => paths.extend([a.clone(), b.clone()]),
                Change::Gone { path } => paths.push(path.clone()),
                Change::Unknown(_) => {}
            }
        }
        for path in paths {
            let found = self
                .dirs
                .keys()
                .find(|ino| self.is_inside(**ino) && self.path(**ino) == path.to_string());
            if let Some(ino) = found {
                let (parent, name) = self.dirs[ino];
                // A parent that is new as well is not known yet; then its own
                // event is still to come, and will have it walked.
                if resolver.learn_dir(*ino, parent, name_of(name).as_bytes()) {
                    self.scan(*ino, resolver);
                }
            }
        }
    }

    fn check(&self, resolver: &Resolver) -> Result<(), TestCaseError> {
        for ino in self.dirs.keys().filter(|ino| self.is_inside(**ino)) {
            let known = resolver.path_of(*ino).map(|path| path.to_string());
            prop_assert_eq!(known, Some(self.path(*ino)), "directory {}", ino);
        }
        Ok(())
    }

    /// The same, and nothing is known that is not there.
    fn check_exactly(&self, resolver: &Resolver) -> Result<(), TestCaseError> {
        self.check(resolver)?;
        let inside = self.dirs.keys().filter(|ino| self.is_inside(**ino)).count() as u64;
        prop_assert_eq!(resolver.stats().directories, inside + 1);
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Step {
    Mkdir { parent: u16, name: u8 },
    Rmdir { dir: u16 },
    Rename { dir: u16, parent: u16, name: u8 },
    Exchange { a: u16, b: u16 },
}

fn step() -> impl Strategy<Value = Step> {
    let letter = 0u8..4;
    prop_oneof![
        4 => (any::<u16>(), letter.clone()).prop_map(|(parent, name)| Step::Mkdir { parent, name }),
        2 => any::<u16>().prop_map(|dir| Step::Rmdir { dir }),
        4 => (any::<u16>(), any::<u16>(), letter).prop_map(|(dir, parent, name)| Step::Rename { dir, parent, name }),
        1 => (any::<u16>(), any::<u16>()).prop_map(|(a, b)| Step::Exchange { a, b }),
    ]
}

/// An exchange as fanotify tells it: two renames.
fn as_two_renames(event: &Event, other: u64) -> [Event; 2] {
    let mut first = event.clone();
    first.op = Op::Rename;
    let mut second = first.clone();
    (second.ino, second.at, second.to) = (other, event.to.clone(), event.at.clone());
    [first, second]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn in_step_with_the_disk_nothing_is_wrong_or_left_over(
        steps in prop::collection::vec(step(), 1..60),
        exchanges_in_halves in any::<bool>(),
    ) {
        let mut model = Model::new();
        let mut resolver = Resolver::new(ROOT);
        for step in &steps {
            let before = model.clone();
            let Some(event) = model.act(step) else { continue };
            if event.op == Op::Exchange && exchanges_in_halves {
                let place = before.dirs[&event.ino];
                let other = model.child(place.0, place.1).expect("it took the place");
                for half in as_two_renames(&event, other) {
                    if half.at.is_some() || half.to.is_some() {
                        let changes = resolver.apply(&half);
                        model.observe(&changes, &mut resolver);
                    }
                }
            } else {
                let changes = resolver.apply(&event);
                prop_assert!(!changes.iter().any(|change| matches!(change, Change::Unknown(_))), "{changes:?}");
                model.observe(&changes, &mut resolver);
            }
            model.check_exactly(&resolver)?;
        }
    }

    #[test]
    fn a_scan_that_runs_ahead_of_the_events_does_no_harm(
        steps in prop::collection::vec(step(), 1..60),
        attached_at in 0usize..30,
        scanned_after in 0usize..30,
        lag in 0usize..20,
    ) {
        let mut model = Model::new();
        let mut states = vec![model.clone()];
        let mut events = Vec::new();
        for step in &steps {
            events.push(model.act(step));
            states.push(model.clone());
        }
        let last = steps.len();
        let attached_at = attached_at.min(last);
        let scanned_at = (attached_at + scanned_after).min(last);
        let mut resolver = Resolver::new(ROOT);
        states[scanned_at].scan(ROOT, &mut resolver);
        // Every event since the source was attached, read late: the disk that
        // the observer sees is ahead.
        for (number, event) in events.iter().enumerate().skip(attached_at) {
            let Some(event) = event else { continue };
            let disk = &states[(number + 1 + lag).max(scanned_at).min(last)];
            let changes = resolver.apply(event);
            disk.observe(&changes, &mut resolver);
        }
        model.check(&resolver)?;
    }
}

#[test]
fn what_was_seen_before_a_rename_was_applied_does_not_undo_it() {
    let mut resolver = Resolver::new(ROOT);
    resolver.learn_dir(10, ROOT, b"a");
    let since = resolver.now();
    // Somebody looks, sees 10 at `a`, and is slow to tell.
    resolver.apply(&event(Op::Rename, 10, true, dirent(ROOT, "a"), dirent(ROOT, "b")));
    assert!(resolver.learn_dir_seen(since, 10, ROOT, b"a"));
    assert_eq!(resolver.path_of(10), Some(path("b")));
    resolver.forget_dir_seen(since, 10);
    assert_eq!(resolver.path_of(10), Some(path("b")));
    // What was seen after it is newer, for events may have been lost.
    let since = resolver.now();
    assert!(resolver.learn_dir_seen(since, 10, ROOT, b"c"));
    assert_eq!(resolver.path_of(10), Some(path("c")));
    resolver.forget_dir_seen(since, 10);
    assert_eq!(resolver.path_of(10), None);
}
