//! Renamed directories, row by row: what one node makes of them, what goes over
//! the wire, and what the next node does. That it works together with everything
//! else is what `simulation` shows.

mod rows;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::ControlFlow;

use omirr::engine::{
    Arrived, Author, Context, Expansion, Install, Observed, Outgoing, Policy, Progress, Rows, Seen, Sequence,
    Step, Work, decide_local, decide_remote, expand, plan, plan_one_by_one, whole_moves,
};
use omirr::model::{Entry, Hash, LinkGroup, Moved, Record, RelPath, ReplicaId, Row, TreeMove};
use rows::{at, dir, file};

/// A node that has no disk: what is to be done there is in `steps`.
struct Node {
    place: u32,
    records: BTreeMap<RelPath, Record>,
    moves: BTreeMap<u64, Moved>,
    author: Author,
    /// What was done for the rows of peers.
    steps: Vec<Step>,
    /// How many rows came over the wire.
    received: usize,
    /// How many moves could not be expanded.
    unlike: usize,
    /// How many were taken before.
    known: usize,
    now_ms: u64,
}

impl Rows for Node {
    type Error = Infallible;

    fn row(&self, path: &RelPath) -> Result<Option<Row>, Infallible> {
        Ok(self.records.get(path).map(|record| record.row.clone()))
    }

    fn live_beneath(
        &self,
        path: &RelPath,
        each: &mut dyn FnMut(&RelPath) -> ControlFlow<()>,
    ) -> Result<(), Infallible> {
        let live = self.records.iter().filter(|(_, record)| !record.row.deleted);
        let mut beneath = live.filter(|(at, _)| *at != path && at.is_within(path));
        let _ = beneath.try_for_each(|(at, _)| each(at));
        Ok(())
    }

    fn linked(&self, group: LinkGroup) -> Result<Vec<RelPath>, Infallible> {
        let is = |record: &Record| record.row.live().is_some_and(|entry| entry.link == Some(group));
        let linked = self.records.iter().filter(|(_, record)| is(record));
        Ok(linked.map(|(path, _)| path.clone()).collect())
    }

    fn holder(&self, _hash: &Hash) -> Result<Option<RelPath>, Infallible> {
        Ok(None)
    }
}

impl Sequence for Node {
    type Error = Infallible;

    fn record(&self, path: &RelPath) -> Result<Option<Record>, Infallible> {
        Ok(self.records.get(path).cloned())
    }

    fn after(&self, seq: u64, limit: usize) -> Result<Vec<(RelPath, Record)>, Infallible> {
        let after = self.records.iter().filter(|(_, record)| record.seq > seq);
        let mut after: Vec<_> = after
            .map(|(path, record)| (path.clone(), record.clone()))
            .collect();
        after.sort_by_key(|(_, record)| record.seq);
        after.truncate(limit);
        Ok(after)
    }

    fn changed_beneath(&self, path: &RelPath, seq: u64) -> Result<bool, Infallible> {
        let mut beneath = self
            .records
            .iter()
            .filter(|(at, _)| *at != path && at.is_within(path));
        Ok(beneath.any(|(_, record)| record.seq > seq))
    }

    fn move_over(&self, seq: u64) -> Result<Option<(u64, Moved)>, Infallible> {
        let next = self.moves.range(seq..).next();
        let over = next.filter(|(last, moved)| seq >= **last - moved.tree.span());
        Ok(over.map(|(last, moved)| (*last, moved.clone())))
    }
}

/// What a user left at a path, and where it was before.
type Sight<'a> = (&'a str, Option<Entry>, Option<&'a str>);

impl Node {
    fn new(place: u32) -> Node {
        Node {
            place,
            records: BTreeMap::new(),
            moves: BTreeMap::new(),
            author: Author::new(ReplicaId(u64::from(place) + 1), 0, None, None),
            steps: Vec::new(),
            received: 0,
            unlike: 0,
            known: 0,
            now_ms: 1000 + u64::from(place),
        }
    }

    fn put(&mut self, path: RelPath, record: Record) {
        self.records.insert(path, record);
    }

    /// Users have changed something; returns how many moves were recognised.
    fn see(&mut self, seen: &[Sight<'_>]) -> usize {
        self.now_ms += 1000;
        let observed = seen.iter().map(|(path, entry, from)| Observed {
            path: at(path),
            seen: entry.clone().map_or(Seen::Absent, Seen::Present),
            when_ms: None,
            moved_from: from.map(at),
            origin: None,
        });
        let mut author = self.author.clone();
        let Ok(decided) = decide_local(self, observed.collect(), &mut author, self.now_ms);
        self.author = author;
        assert!(decided.windows(2).all(|pair| pair[0].seq < pair[1].seq));
        let moves = whole_moves(&decided, &|_| true);
        let count = moves.len();
        self.moves.extend(moves);
        for one in decided {
            self.put(
                one.path,
                Record {
                    row: one.row,
                    seq: one.seq,
                    sig: None,
                    via: None,
                    moved_from: one.moved_from,
                    here: None,
                },
            );
        }
        self.check_whole();
        count
    }

    /// The user moves a directory with all that the index has in it.
    fn rename(&mut self, from: &str, to: &str) -> usize {
        let live = self.live();
        let mut seen = Vec::new();
        for (path, entry) in &live {
            if let Some(new) = at(path).rebase(&at(from), &at(to)) {
                seen.push((path.clone(), None, None));
                seen.push((new.to_string(), Some(entry.clone()), Some(path.clone())));
            }
        }
        let seen: Vec<Sight<'_>> = seen
            .iter()
            .map(|(path, entry, from)| (path.as_str(), entry.clone(), from.as_deref()))
            .collect();
        self.see(&seen)
    }

    fn live(&self) -> BTreeMap<String, Entry> {
        let live = self.records.iter().filter(|(_, record)| !record.row.deleted);
        live.map(|(path, record)| (path.to_string(), record.row.entry.clone()))
            .collect()
    }

    fn rows(&self) -> BTreeMap<String, Row> {
        let rows = self.records.iter();
        rows.map(|(path, record)| (path.to_string(), record.row.clone()))
            .collect()
    }

    fn check_whole(&self) {
        for (path, record) in &self.records {
            let parent = path.parent().filter(|dir| !record.row.deleted && !dir.is_root());
            if let Some(parent) = parent {
                let above = self.records.get(&parent);
                assert!(
                    above.is_some_and(|above| above.row.is_live_dir()),
                    "{path} hangs in the air"
                );
            }
        }
    }

    fn apply(&mut self, arrived: Vec<Arrived>, via: u32) {
        self.now_ms += 1000;
        let names = |replica: ReplicaId| format!("n{}", replica.0);
        let context = Context {
            now_ms: self.now_ms,
            policy: Policy::KeepBoth,
            names: &names,
        };
        let mut author = self.author.clone();
        let Ok(decided) = decide_remote(self, arrived, via, &mut author, &context);
        self.author = author;
        let Ok(steps) = plan(self, &decided);
        self.steps.extend(steps);
        self.moves.extend(whole_moves(&decided, &|_| true));
        for one in decided {
            self.put(
                one.path,
                Record {
                    row: one.row,
                    seq: one.seq,
                    sig: None,
                    via: one.via,
                    moved_from: one.moved_from,
                    here: None,
                },
            );
        }
        self.check_whole();
    }

    /// Takes everything that `from` has after `cursor`; returns the new cursor.
    fn take(&mut self, from: &Node, cursor: u64) -> u64 {
        let mut outgoing = Outgoing::new(self.place, cursor, 0);
        let mut upto = cursor;
        'begin: loop {
            let Ok(batch) = outgoing.next_batch(from, 100);
            let Some(batch) = batch else { return upto };
            self.received += batch.rows.len();
            let mut rows = Vec::new();
            for (path, record) in batch.rows {
                let arrived = |moved_from, moved_tree| Arrived {
                    path: path.clone(),
                    row: record.row.clone(),
                    moved_from,
                    moved_tree,
                };
                let Some(tree) = batch.moves.get(&record.seq) else {
                    rows.push(arrived(record.moved_from.clone(), None));
                    continue;
                };
                self.apply(std::mem::take(&mut rows), from.place);
                let taken: Vec<Moved> = self.moves.values().cloned().collect();
                let Ok(expansion) = expand(self, &taken, &path, &record.row, tree);
                match expansion {
                    Expansion::Known => self.known += 1,
                    Expansion::Rows(rows) => self.apply(rows, from.place),
                    Expansion::Unlike => {
                        self.unlike += 1;
                        upto = outgoing.rewind(upto.min(record.seq - tree.span() - 1), record.seq);
                        continue 'begin;
                    }
                }
            }
            self.apply(rows, from.place);
            upto = batch.upto;
        }
    }

    /// Only directories that were renamed as they are, since the last time.
    fn renames(&mut self) -> Vec<(String, String)> {
        let steps = std::mem::take(&mut self.steps);
        let renamed = steps.into_iter().filter_map(|step| match step {
            Step::Install {
                path,
                how: Install::MovedTree { from },
                ..
            } => Some((from.to_string(), path.to_string())),
            Step::Times { .. } | Step::Restore { .. } => None,
            step => panic!("{step:?} is no rename of a directory"),
        });
        renamed.collect()
    }
}

/// Two nodes that both have `d/a`, `d/s/b`, `d/s/c` and `d-e`.
fn pair() -> (Node, Node, [u64; 2]) {
    let (mut one, mut two) = (Node::new(0), Node::new(1));
    one.see(&[
        ("d", Some(dir()), None),
        ("d/a", Some(file(1)), None),
        ("d/s", Some(dir()), None),
        ("d/s/b", Some(file(2)), None),
        ("d/s/c", Some(file(3)), None),
        ("d-e", Some(file(4)), None),
    ]);
    let cursors = exchange(&mut one, &mut two, [0, 0]);
    two.steps.clear();
    two.received = 0;
    (one, two, cursors)
}

/// Both take what the other has until nothing is new; then both have the same.
fn exchange(one: &mut Node, two: &mut Node, cursors: [u64; 2]) -> [u64; 2] {
    let [mut of_one, mut of_two] = cursors;
    for _ in 0..8 {
        of_one = two.take(one, of_one);
        of_two = one.take(two, of_two);
    }
    assert_eq!(one.rows(), two.rows());
    [of_one, of_two]
}

fn pairs<const N: usize>(all: [(&str, &str); N]) -> Vec<(String, String)> {
    all.map(|(from, to)| (from.to_owned(), to.to_owned())).into()
}

#[test]
fn a_renamed_directory_is_one_row_and_one_step() {
    let (mut one, mut two, cursors) = pair();
    assert_eq!(one.rename("d", "e"), 1);
    exchange(&mut one, &mut two, cursors);
    assert_eq!(two.received, 1);
    assert_eq!(two.renames(), pairs([("d", "e")]));
    let names: Vec<_> = two.live().into_keys().collect();
    assert_eq!(names, ["d-e", "e", "e/a", "e/s", "e/s/b", "e/s/c"]);
    // Each row is numbered as the author's, and all have one stamp.
    let rows = two.rows();
    let number = |path: &str| rows[path].version.vector.get(ReplicaId(1));
    let order = [
        "e", "e/a", "e/s", "e/s/b", "e/s/c", "d/s/b", "d/s/c", "d/a", "d/s", "d",
    ]
    .map(number);
    assert_eq!(order, [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    let stamps: std::collections::BTreeSet<_> = ["e", "e/s/c", "d/a", "d"]
        .map(|path| rows[path].version.stamp)
        .into();
    assert_eq!(stamps.len(), 1);
}

#[test]
fn it_stays_one_row_through_a_chain_and_is_known_on_the_way_round() {
    let (mut one, mut two, cursors) = pair();
    let mut three = Node::new(2);
    let from_two = three.take(&two, 0);
    let from_one = three.take(&one, 0);
    three.received = 0;
    three.steps.clear();
    one.rename("d", "e");
    exchange(&mut one, &mut two, cursors);
    three.take(&two, from_two);
    assert_eq!(three.received, 1);
    assert_eq!(three.renames(), pairs([("d", "e")]));
    assert_eq!(three.rows(), one.rows());
    three.take(&one, from_one);
    assert_eq!((three.received, three.known, three.unlike), (2, 1, 0));
    assert_eq!(three.renames(), []);
}

#[test]
fn what_changed_in_it_besides_follows_as_rows_of_its_own() {
    let (mut one, mut two, cursors) = pair();
    let moves = one.see(&[
        ("d", None, None),
        ("d/a", None, None),
        ("d/s", None, None),
        ("d/s/b", None, None),
        ("d/s/c", None, None),
        ("e", Some(dir()), Some("d")),
        ("e/a", Some(file(9)), None),
        ("e/s", Some(dir()), Some("d/s")),
        ("e/s/b", None, None),
        ("e/s/c", Some(file(3)), Some("d/s/c")),
        ("e/new", Some(file(8)), None),
    ]);
    assert_eq!(moves, 1);
    exchange(&mut one, &mut two, cursors);
    assert_eq!(two.received, 4);
    let installed: Vec<_> = two
        .steps
        .iter()
        .filter(|step| !matches!(step, Step::Times { .. } | Step::Stage { .. }))
        .map(|step| step.path().to_string())
        .collect();
    assert_eq!(installed, ["e", "e/a", "e/new", "e/s/b"]);
}

#[test]
fn what_was_made_in_it_elsewhere_is_not_lost() {
    let (mut one, mut two, cursors) = pair();
    one.rename("d", "e");
    two.see(&[("d/new", Some(file(7)), None)]);
    exchange(&mut one, &mut two, cursors);
    assert_eq!(two.unlike, 1);
    assert_eq!(one.live()["d/new"], file(7));
    assert_eq!(one.live()["e/s/b"], file(2));
}

#[test]
fn one_directory_renamed_twice_at_once_is_there_under_both_names() {
    let (mut one, mut two, cursors) = pair();
    one.rename("d", "e");
    two.rename("d", "f");
    exchange(&mut one, &mut two, cursors);
    let live = one.live();
    for path in ["e/a", "f/a", "e/s/b", "f/s/c"] {
        assert!(live.contains_key(path), "{path} is not in {live:?}");
    }
    assert!(!live.contains_key("d"), "{live:?}");
}

#[test]
fn directories_moved_into_one_another_at_once_are_both_kept() {
    let (mut one, mut two) = (Node::new(0), Node::new(1));
    one.see(&[
        ("a", Some(dir()), None),
        ("a/x", Some(file(1)), None),
        ("b", Some(dir()), None),
        ("b/y", Some(file(2)), None),
    ]);
    let cursors = exchange(&mut one, &mut two, [0, 0]);
    assert_eq!(one.rename("a", "b/a"), 1);
    assert_eq!(two.rename("b", "a/b"), 1);
    exchange(&mut one, &mut two, cursors);
    let live = one.live();
    assert!(live.values().any(|entry| *entry == file(1)), "{live:?}");
    assert!(live.values().any(|entry| *entry == file(2)), "{live:?}");
}

#[test]
fn there_and_back_again_is_one_row_each_time() {
    let (mut one, mut two, mut cursors) = pair();
    for (from, to) in [("d", "e"), ("e", "d"), ("d", "e"), ("e", "f/e")] {
        if to.starts_with('f') {
            one.see(&[("f", Some(dir()), None)]);
            cursors = exchange(&mut one, &mut two, cursors);
            two.steps.clear();
        }
        two.received = 0;
        // Over the tombstones of an earlier life as well.
        assert_eq!(one.rename(from, to), 1, "{from} {to}");
        cursors = exchange(&mut one, &mut two, cursors);
        assert_eq!((two.received, two.unlike), (1, 0), "{from} {to}");
        assert_eq!(two.renames(), pairs([(from, to)]));
    }
}

#[test]
fn moves_that_a_peer_has_missed_come_one_after_another() {
    let (mut one, mut two, cursors) = pair();
    one.rename("d", "e");
    one.rename("e", "f");
    exchange(&mut one, &mut two, cursors);
    assert_eq!(two.received, 2);
    assert_eq!(two.renames(), pairs([("d", "e"), ("e", "f")]));

    let (mut one, mut two, cursors) = pair();
    one.rename("d", "e");
    let gone = ["e", "e/a", "e/s", "e/s/b", "e/s/c"].map(|path| (path, None, None));
    one.see(&gone);
    exchange(&mut one, &mut two, cursors);
    assert_eq!(two.unlike, 0);
    let names: Vec<_> = two.live().into_keys().collect();
    assert_eq!(names, ["d-e"]);
}

#[test]
fn moves_within_moves_are_found_in_one_pass() {
    let (mut one, mut two, cursors) = pair();
    // `mv d e; mv e/s f`, and `mkdir g` for nothing.
    let moves = one.see(&[
        ("d", None, None),
        ("d/a", None, None),
        ("d/s", None, None),
        ("d/s/b", None, None),
        ("d/s/c", None, None),
        ("e", Some(dir()), Some("d")),
        ("e/a", Some(file(1)), Some("d/a")),
        ("e/s", None, None),
        ("e/s/b", None, None),
        ("e/s/c", None, None),
        ("f", Some(dir()), Some("d/s")),
        ("f/b", Some(file(2)), Some("d/s/b")),
        ("f/c", Some(file(3)), Some("d/s/c")),
        ("g", Some(dir()), None),
    ]);
    assert_eq!(moves, 2);
    exchange(&mut one, &mut two, cursors);
    assert_eq!(two.received, 3);

    // Into a directory that is new, which goes before it.
    let (mut one, mut two, cursors) = pair();
    let mut seen: Vec<Sight<'_>> = ["d", "d/a", "d/s", "d/s/b", "d/s/c"]
        .map(|path| (path, None, None))
        .into();
    seen.extend([
        ("n", Some(dir()), None),
        ("n/e", Some(dir()), Some("d")),
        ("n/e/a", Some(file(1)), Some("d/a")),
        ("n/e/s", Some(dir()), Some("d/s")),
        ("n/e/s/b", Some(file(2)), Some("d/s/b")),
        ("n/e/s/c", Some(file(3)), Some("d/s/c")),
    ]);
    assert_eq!(one.see(&seen), 1);
    exchange(&mut one, &mut two, cursors);
    assert_eq!(two.received, 2);
}

#[test]
fn what_is_not_all_there_is_no_move() {
    // Something is left, or is there again; something was there; one was not
    // looked at.
    let all: Vec<Sight<'_>> = vec![
        ("d", None, None),
        ("d/a", None, None),
        ("d/s", None, None),
        ("d/s/b", None, None),
        ("d/s/c", None, None),
        ("e", Some(dir()), Some("d")),
        ("e/a", Some(file(1)), Some("d/a")),
        ("e/s", Some(dir()), Some("d/s")),
        ("e/s/b", Some(file(2)), Some("d/s/b")),
        ("e/s/c", Some(file(3)), Some("d/s/c")),
    ];
    let (mut one, ..) = pair();
    assert_eq!(one.see(&all), 1);

    let (mut one, ..) = pair();
    let mut again = all.clone();
    again[0] = ("d", Some(dir()), None);
    assert_eq!(one.see(&again), 1, "`s` has moved, but `d` has not");

    let (mut one, ..) = pair();
    one.see(&[("e", Some(dir()), None), ("e/other", Some(file(6)), None)]);
    assert_eq!(one.see(&all), 1, "only `s` finds nothing in its place");

    let (mut one, mut two, cursors) = pair();
    let unseen: Vec<_> = all
        .into_iter()
        .filter(|seen| !seen.0.starts_with("e/s"))
        .collect();
    assert_eq!(one.see(&unseen), 0);
    exchange(&mut one, &mut two, cursors);
}

#[test]
fn hard_links_within_and_across_stay_what_they_are() {
    let (mut one, mut two) = (Node::new(0), Node::new(1));
    let linked = |content, group| Entry {
        link: Some(LinkGroup(group)),
        ..file(content)
    };
    one.see(&[
        ("d", Some(dir()), None),
        ("d/a", Some(linked(1, 10)), None),
        ("d/b", Some(linked(1, 10)), None),
        ("d/c", Some(linked(2, 20)), None),
        ("out", Some(linked(2, 20)), None),
    ]);
    let cursors = exchange(&mut one, &mut two, [0, 0]);
    two.steps.clear();
    one.rename("d", "e");
    exchange(&mut one, &mut two, cursors);
    assert_eq!(two.renames(), pairs([("d", "e")]));
    assert_eq!(two.live()["e/b"], linked(1, 10));
    assert_eq!(two.live()["out"], two.live()["e/c"]);
}

#[test]
fn a_move_that_a_peer_lies_about_is_not_made() {
    let (mut one, two, cursors) = pair();
    one.rename("d", "e");
    let mut outgoing = Outgoing::new(1, cursors[0], 0);
    let Ok(batch) = outgoing.next_batch(&one, 100);
    let batch = batch.unwrap();
    let (path, record) = &batch.rows[0];
    let tree = &batch.moves[&record.seq];
    let expands = |row: &Row, tree: &TreeMove| {
        let Ok(expansion) = expand(&two, &[], path, row, tree);
        matches!(expansion, Expansion::Rows(_))
    };
    assert!(expands(&record.row, tree));
    let with = |change: &dyn Fn(&mut TreeMove)| {
        let mut tree = tree.clone();
        change(&mut tree);
        tree
    };
    assert!(!expands(&record.row, &with(&|tree| tree.count -= 1)));
    assert!(!expands(&record.row, &with(&|tree| tree.digest.0[5] ^= 1)));
    assert!(!expands(&record.row, &with(&|tree| tree.to = at("d-e"))));
    assert!(!expands(&record.row, &with(&|tree| tree.to = at("d-e/x"))) || two.row(&at("d-e")).is_ok());
    let mut other = record.row.clone();
    other.entry.mode = 0o700;
    assert!(
        !expands(&other, tree),
        "the tombstone is not what follows from the row"
    );
}

#[test]
fn a_rename_that_fails_fails_for_all_and_can_be_done_one_by_one() {
    let (mut one, mut two, cursors) = pair();
    one.rename("d", "e");
    let mut outgoing = Outgoing::new(1, cursors[0], 0);
    let Ok(batch) = outgoing.next_batch(&one, 100);
    let batch = batch.unwrap();
    let (path, record) = &batch.rows[0];
    let Ok(Expansion::Rows(rows)) = expand(&two, &[], path, &record.row, &batch.moves[&record.seq]) else {
        panic!("both have the same rows");
    };
    let names = |_: ReplicaId| String::new();
    let context = Context {
        now_ms: 5000,
        policy: Policy::KeepBoth,
        names: &names,
    };
    let mut author = two.author.clone();
    let Ok(decided) = decide_remote(&two, rows, 0, &mut author, &context);
    assert!(decided.iter().all(|one| one.work == Work::Apply));
    let Ok(mut progress) = Progress::new(&two, &decided);
    let Ok(steps) = plan(&two, &decided);
    progress.fail(&steps[0]);
    assert!(decided.iter().all(|one| !progress.is_done(&one.path)));
    assert_eq!(whole_moves(&decided, &|path| progress.is_done(path)), []);
    let Ok(singly) = plan_one_by_one(&two, &decided);
    let moved = singly.iter().filter(|step| {
        matches!(
            step,
            Step::Install {
                how: Install::Moved { .. },
                ..
            }
        )
    });
    assert_eq!(moved.count(), 3, "{singly:?}");
    assert!(two.renames().is_empty());
}
