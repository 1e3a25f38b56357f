//! The engine's decisions one by one: winners, asides, steps, order of sending.
//! That they work together is what `simulation` shows.

mod rows;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;

use omirr::engine::{
    Arrived, Author, Content, Context, Decided, Found, Install, Loser, Observed, Outgoing, Policy, Progress,
    Rows, Seen, Sequence, Step, Verdict, Work, decide_local, decide_remote, incoherent, plan, precedence,
    recover, remote_row,
};
use omirr::model::{
    Entry, Flags, Hash, Kind, LinkGroup, Origin, Record, RelPath, ReplicaId, Row, Stamp, StatSig, Time,
    Vector, Version,
};
use proptest::prelude::*;
use rows::{at, dir, entry, file};

#[derive(Default)]
struct Index(BTreeMap<RelPath, Record>);

impl Index {
    fn put(&mut self, path: &str, seq: u64, row: Row) {
        let record = Record {
            row,
            seq,
            sig: None::<StatSig>,
            via: None,
            moved_from: None,
            here: None,
        };
        self.0.insert(at(path), record);
    }
}

impl Rows for Index {
    type Error = Infallible;
    fn row(&self, path: &RelPath) -> Result<Option<Row>, Infallible> {
        Ok(self.0.get(path).map(|record| record.row.clone()))
    }
    fn live_beneath(
        &self,
        path: &RelPath,
        each: &mut dyn FnMut(&RelPath) -> ControlFlow<()>,
    ) -> Result<(), Infallible> {
        let mut live = self
            .0
            .iter()
            .filter(|(at, r)| *at != path && at.is_within(path) && !r.row.deleted);
        let _ = live.try_for_each(|(at, _)| each(at));
        Ok(())
    }
    fn linked(&self, group: LinkGroup) -> Result<Vec<RelPath>, Infallible> {
        let linked = self
            .0
            .iter()
            .filter(|(_, r)| r.row.live().is_some_and(|entry| entry.link == Some(group)));
        Ok(linked.map(|(path, _)| path.clone()).collect())
    }
    fn holder(&self, hash: &Hash) -> Result<Option<RelPath>, Infallible> {
        let has = |r: &Record| {
            r.row
                .live()
                .and_then(Entry::content)
                .is_some_and(|content| content.1 == *hash)
        };
        Ok(self.0.iter().find(|(_, r)| has(r)).map(|(path, _)| path.clone()))
    }
}

impl Sequence for Index {
    type Error = Infallible;
    fn record(&self, path: &RelPath) -> Result<Option<Record>, Infallible> {
        Ok(self.0.get(path).cloned())
    }
    fn after(&self, seq: u64, limit: usize) -> Result<Vec<(RelPath, Record)>, Infallible> {
        let mut after: Vec<_> = self
            .0
            .iter()
            .filter(|(_, r)| r.seq > seq)
            .map(|(p, r)| (p.clone(), r.clone()))
            .collect();
        after.sort_by_key(|(_, record)| record.seq);
        after.truncate(limit);
        Ok(after)
    }
    fn changed_beneath(&self, path: &RelPath, seq: u64) -> Result<bool, Infallible> {
        Ok(self
            .0
            .iter()
            .any(|(at, r)| at != path && at.is_within(path) && r.seq > seq))
    }
}

/// A row with the given vector; its stamp is `wall_ms` of the last replica in it.
fn row(entry: Entry, vector: &[(u64, u64)], wall_ms: u64) -> Row {
    let vector: Vector = vector
        .iter()
        .map(|&(replica, seq)| (ReplicaId(replica), seq))
        .collect();
    let replica = vector.pairs().last().unwrap().0;
    Row {
        entry,
        deleted: false,
        version: Version {
            vector,
            stamp: Stamp {
                wall_ms,
                count: 0,
                replica,
            },
        },
        origin: None,
    }
}

fn gone(row: Row) -> Row {
    Row { deleted: true, ..row }
}

fn decide(index: &Index, rows: &[(&str, Row)]) -> BTreeMap<String, Decided> {
    let arrived = rows
        .iter()
        .map(|(path, row)| Arrived {
            path: at(path),
            row: row.clone(),
            moved_from: None,
            moved_tree: None,
        })
        .collect();
    let names = |replica: ReplicaId| format!("n{}", replica.0);
    let context = Context {
        now_ms: 1000,
        policy: Policy::KeepBoth,
        names: &names,
    };
    let mut author = Author::new(ReplicaId(9), 50, None, None);
    let Ok(decided) = decide_remote(index, arrived, 3, &mut author, &context);
    decided
        .into_iter()
        .map(|one| (one.path.to_string(), one))
        .collect()
}

fn steps(index: &Index, decided: &BTreeMap<String, Decided>) -> Vec<Step> {
    let decided: Vec<Decided> = decided.values().cloned().collect();
    let Ok(steps) = plan(index, &decided);
    steps
}

#[test]
fn the_later_stamp_wins_and_only_unseen_content_is_kept() {
    let path = at("a");
    let old = row(file(1), &[(1, 1)], 10);
    let chmod = Entry {
        mode: 0o600,
        ..file(1)
    };
    for (why, local, remote, expected) in [
        ("the same row", old.clone(), old.clone(), Verdict::Known),
        (
            "the same row, said to be made by another process",
            old.clone(),
            Row {
                origin: Some(Arc::new(Origin::new(7, Some(0), b"vi", ""))),
                ..old.clone()
            },
            Verdict::Known,
        ),
        (
            "an older one",
            row(file(2), &[(1, 1), (2, 5)], 20),
            old.clone(),
            Verdict::Known,
        ),
        (
            "a newer one",
            old.clone(),
            row(file(2), &[(1, 1), (2, 5)], 20),
            Verdict::Take(Loser::Superseded),
        ),
        (
            "a concurrent winner",
            old.clone(),
            row(file(2), &[(2, 5)], 20),
            Verdict::Take(Loser::KeptAside),
        ),
        (
            "a concurrent loser",
            old.clone(),
            row(file(2), &[(2, 5)], 5),
            Verdict::Known,
        ),
        (
            "a concurrent chmod",
            old.clone(),
            row(chmod, &[(2, 5)], 20),
            Verdict::Take(Loser::Superseded),
        ),
        (
            "the same content",
            old.clone(),
            row(file(1), &[(2, 5)], 20),
            Verdict::Adopt,
        ),
        (
            "a concurrent tombstone",
            old.clone(),
            gone(row(file(3), &[(2, 5)], 20)),
            Verdict::Take(Loser::KeptAside),
        ),
        (
            "a tombstone of it",
            old.clone(),
            gone(row(file(1), &[(1, 1), (2, 5)], 20)),
            Verdict::Take(Loser::Superseded),
        ),
        (
            "a file for a directory",
            row(dir(), &[(1, 1)], 10),
            row(file(2), &[(2, 5)], 20),
            Verdict::Take(Loser::Superseded),
        ),
        (
            "two tombstones",
            gone(old.clone()),
            gone(row(file(2), &[(2, 5)], 20)),
            Verdict::Adopt,
        ),
    ] {
        assert_eq!(
            remote_row(&path, Some(&local), &remote, Policy::KeepBoth),
            expected,
            "{why}"
        );
    }
    let winner = row(file(2), &[(2, 5)], 20);
    assert_eq!(
        remote_row(&path, Some(&old), &winner, Policy::NewestWins),
        Verdict::Take(Loser::Superseded)
    );
    let root = gone(row(dir(), &[(1, 1), (2, 5)], 99));
    assert_eq!(
        remote_row(&RelPath::root(), None, &root, Policy::KeepBoth),
        Verdict::Known
    );
}

#[test]
fn what_loses_is_kept_once_and_under_one_name() {
    let mut index = Index::default();
    index.put("a.txt", 1, row(file(1), &[(1, 1)], 10));
    let winner = row(file(2), &[(2, 5)], 20);
    let decided = decide(&index, &[("a.txt", winner.clone())]);
    let copy = "a.omirr-conflict-19700101-000000-n1.txt";
    assert_eq!(decided[copy].work, Work::KeepAside { from: at("a.txt") });
    assert_eq!(decided[copy].row.entry, file(1));
    assert_eq!((decided[copy].via, decided["a.txt"].via), (None, Some(3)));
    let steps = steps(&index, &decided);
    let place = |wanted: &Step| steps.iter().position(|step| step == wanted).unwrap();
    let aside = place(&Step::Aside {
        path: at("a.txt"),
        to: at(copy),
    });
    assert!(
        aside
            < place(&Step::Install {
                path: at("a.txt"),
                entry: file(2),
                how: Install::Staged
            })
    );

    // Another node was faster with the copy, or a user has removed it already.
    for copied in [row(file(1), &[(4, 8)], 30), gone(row(file(1), &[(4, 8)], 30))] {
        index.put(copy, 2, copied);
        assert_eq!(decide(&index, &[("a.txt", winner.clone())]).len(), 1);
    }
    // A copy of that name was removed before this version was made: the same
    // content, within the same second, and yet another version.
    index.put(copy, 2, gone(row(file(1), &[(4, 8)], 9)));
    let decided = decide(&index, &[("a.txt", winner.clone())]);
    assert_eq!(decided[copy].work, Work::KeepAside { from: at("a.txt") });
    assert!(!decided[copy].row.deleted);
    // The name holds something else.
    index.put(copy, 2, row(file(7), &[(4, 8)], 30));
    let decided = decide(&index, &[("a.txt", winner)]);
    assert!(
        decided.contains_key("a.omirr-conflict-19700101-000000-n1-2.txt"),
        "{:?}",
        decided.keys()
    );
}

#[test]
fn a_living_child_brings_its_directory_back() {
    let mut index = Index::default();
    index.put("d", 1, row(dir(), &[(1, 1)], 10));
    index.put("d/new", 2, row(file(1), &[(1, 2)], 11));
    let removed = gone(row(dir(), &[(1, 1), (2, 5)], 20));
    let decided = decide(&index, &[("d", removed.clone())]);
    let back = &decided["d"].row;
    assert!(back.is_live_dir() && back.version.stamp > removed.version.stamp);
    assert!(steps(&index, &decided).is_empty(), "nothing is removed");

    // A file that took the directory's name stays with whoever has it: the row
    // that brings the directory back does not claim to know it.
    let taken = row(file(5), &[(1, 1), (2, 5)], 20);
    let back = &decide(&index, &[("d", taken.clone())])["d"].row;
    assert_eq!(
        remote_row(&at("d"), Some(&taken), back, Policy::KeepBoth),
        Verdict::Take(Loser::KeptAside)
    );

    // If it goes with its children, it goes.
    let child = gone(row(file(1), &[(1, 2), (2, 6)], 21));
    let decided = decide(&index, &[("d", removed), ("d/new", child)]);
    assert!(decided.values().all(|one| one.row.deleted));
    let removals = steps(&index, &decided);
    assert_eq!(
        removals[..2],
        [Step::Remove { path: at("d/new") }, Step::Remove { path: at("d") }]
    );
}

#[test]
fn a_file_with_living_children_moves_aside() {
    let mut index = Index::default();
    index.put("d", 1, row(file(1), &[(1, 1)], 30));
    let there = row(dir(), &[(2, 1)], 10);
    let child = row(file(2), &[(2, 2)], 11);
    let decided = decide(&index, &[("d", there), ("d/x", child)]);
    assert!(decided["d"].row.is_live_dir());
    let copy = decided
        .values()
        .find(|one| matches!(one.work, Work::KeepAside { .. }))
        .unwrap();
    assert_eq!(copy.row.entry, file(1));
    let steps = steps(&index, &decided);
    let order = |path: &RelPath| {
        steps
            .iter()
            .position(|step| matches!(step, Step::Install { path: at, .. } if at == path))
    };
    assert!(order(&at("d")) < order(&at("d/x")));
}

#[test]
fn a_directory_that_comes_back_has_the_attributes_that_are_known() {
    let mut index = Index::default();
    index.put("d", 1, row(file(1), &[(1, 1)], 30));
    let private = Entry {
        mode: 0o710,
        uid: 7,
        ..dir()
    };
    let child = row(file(2), &[(2, 2)], 11);
    let decided = decide(
        &index,
        &[("d", row(private.clone(), &[(2, 1)], 10)), ("d/x", child.clone())],
    );
    assert_eq!(decided["d"].row.entry, private);
    // Nothing is known: closed to others, and no later than need be.
    let back = decide(&index, &[("d/x", child)])["d"].row.clone();
    assert_eq!(
        (
            back.entry.mode,
            back.version.stamp.wall_ms,
            back.version.stamp.count
        ),
        (0o700, 30, 1)
    );
}

#[test]
fn rows_keep_who_made_them_and_omirr_owns_to_its_own() {
    let by = |name: &[u8]| Some(Arc::new(Origin::new(7, Some(33), name, "")));
    let made = |row: Row, name: &[u8]| Row {
        origin: by(name),
        ..row
    };
    let mut index = Index::default();
    index.put("a", 1, made(row(file(1), &[(1, 1)], 10), b"here"));
    let decided = decide(
        &index,
        &[
            ("a", made(row(file(2), &[(2, 5)], 20), b"there")),
            ("lost/b", made(row(file(3), &[(2, 6)], 21), b"there")),
        ],
    );
    let origin = |path: &str| decided[path].row.origin.clone();
    assert_eq!((origin("a"), origin("lost/b")), (by(b"there"), by(b"there")));
    // The conflict copy of `a`, and the directory that nobody has sent.
    let own: Vec<_> = decided
        .values()
        .filter(|one| one.row.origin.as_ref().is_some_and(|origin| origin.is_daemon()))
        .map(|one| one.path.to_string())
        .collect();
    assert_eq!((own.len(), own[1].as_str()), (2, "lost"), "{own:?}");

    let seen = |origin| Observed {
        path: at("a"),
        seen: Seen::Present(file(9)),
        when_ms: None,
        moved_from: None,
        origin,
    };
    let mut author = Author::new(ReplicaId(9), 50, None, None);
    for origin in [by(b"vi"), None] {
        let Ok(decided) = decide_local(&index, vec![seen(origin.clone())], &mut author, 1000);
        assert_eq!(decided[0].row.origin, origin);
    }
    // Nothing differs but who touched it: no row.
    let same = Observed {
        seen: Seen::Present(file(1)),
        ..seen(by(b"touch"))
    };
    let Ok(decided) = decide_local(&index, vec![same], &mut author, 1000);
    assert!(decided.is_empty(), "{decided:?}");
}

fn local(index: &Index, seen: &[(&str, Option<Entry>)]) -> Vec<(String, bool)> {
    let observed = seen.iter().map(|(path, entry)| Observed {
        path: at(path),
        seen: entry.clone().map_or(Seen::Absent, Seen::Present),
        when_ms: None,
        moved_from: None,
        origin: None,
    });
    let mut author = Author::new(ReplicaId(9), 50, None, None);
    let Ok(decided) = decide_local(index, observed.collect(), &mut author, 1000);
    assert!(decided.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    decided
        .into_iter()
        .map(|one| (one.path.to_string(), one.row.deleted))
        .collect()
}

#[test]
fn own_changes_are_numbered_so_that_every_beginning_is_a_whole_tree() {
    let mut index = Index::default();
    for (seq, path) in ["d", "d/e", "gone", "gone/x", "same"].iter().enumerate() {
        let entry = if path.ends_with('x') || *path == "same" {
            file(1)
        } else {
            dir()
        };
        index.put(path, seq as u64 + 1, row(entry, &[(1, seq as u64 + 1)], 10));
    }
    let order = local(
        &index,
        &[
            ("gone", None),
            ("new/y", Some(file(2))),
            ("d", Some(file(3))),
            ("new", Some(dir())),
            ("gone/x", None),
            ("same", Some(file(1))),
            ("never", None),
            ("d/e", None),
        ],
    );
    let expected = [
        ("d/e", true),
        ("d", false),
        ("new", false),
        ("new/y", false),
        ("gone/x", true),
        ("gone", true),
    ];
    assert_eq!(order, expected.map(|(path, deleted)| (path.to_owned(), deleted)));
}

fn apply(index: &Index, rows: &[(&str, Row, Option<&str>)]) -> Vec<Step> {
    let decided: Vec<Decided> = rows
        .iter()
        .map(|(path, row, from)| Decided {
            path: at(path),
            seq: 99,
            row: row.clone(),
            via: Some(1),
            moved_from: from.map(at),
            moved_tree: None,
            work: Work::Apply,
        })
        .collect();
    let Ok(steps) = plan(index, &decided);
    steps
}

#[test]
fn a_rename_moves_no_content() {
    let mut index = Index::default();
    index.put("a", 1, row(file(1), &[(1, 1)], 10));
    let (new, old) = (row(file(1), &[(1, 2)], 20), gone(row(file(1), &[(1, 3)], 20)));
    for hint in [Some("a"), None] {
        let steps = apply(&index, &[("b", new.clone(), hint), ("a", old.clone(), None)]);
        assert_eq!(
            steps,
            [Step::Install {
                path: at("b"),
                entry: file(1),
                how: Install::Moved { from: at("a") }
            }]
        );
    }
    // A changed mode makes it a copy: the inode must stay as it is while it
    // still has its old name.
    let changed = Entry {
        mode: 0o600,
        ..file(1)
    };
    let steps = apply(
        &index,
        &[("b", row(changed.clone(), &[(1, 2)], 20), None), ("a", old, None)],
    );
    assert_eq!(
        steps[0],
        Step::Stage {
            path: at("b"),
            entry: changed,
            content: Content::Copy { from: at("a") }
        }
    );
    assert_eq!(steps[2], Step::Remove { path: at("a") });
}

#[test]
fn chains_and_swaps_read_before_they_write() {
    let mut index = Index::default();
    index.put("a", 1, row(file(1), &[(1, 1)], 10));
    index.put("b", 2, row(file(2), &[(1, 2)], 10));
    let a_to_b = row(file(1), &[(1, 3)], 20);
    let b_to_c = row(file(2), &[(1, 4)], 20);
    let steps = apply(
        &index,
        &[
            ("b", a_to_b.clone(), Some("a")),
            ("c", b_to_c.clone(), Some("b")),
            ("a", gone(b_to_c.clone()), None),
        ],
    );
    assert_eq!(
        steps,
        [
            Step::Stage {
                path: at("c"),
                entry: file(2),
                content: Content::Copy { from: at("b") }
            },
            Step::Install {
                path: at("b"),
                entry: file(1),
                how: Install::Moved { from: at("a") }
            },
            Step::Install {
                path: at("c"),
                entry: file(2),
                how: Install::Staged
            },
        ]
    );
    let steps = apply(&index, &[("b", a_to_b, Some("a")), ("a", b_to_c, Some("b"))]);
    let stages = steps.iter().take_while(|step| {
        matches!(
            step,
            Step::Stage {
                content: Content::Copy { .. },
                ..
            }
        )
    });
    assert_eq!((stages.count(), steps.len()), (2, 4), "{steps:?}");
}

#[test]
fn hard_links_are_made_and_broken_as_the_rows_say() {
    let linked = |content| Entry {
        link: Some(LinkGroup(7)),
        ..file(content)
    };
    let mut index = Index::default();
    index.put("a", 1, row(linked(1), &[(1, 1)], 10));
    index.put("b", 2, row(linked(1), &[(1, 2)], 10));
    let new = |entry: Entry| row(entry, &[(1, 9)], 20);
    let steps = apply(&index, &[("c", new(linked(1)), None)]);
    assert_eq!(
        steps,
        [Step::Install {
            path: at("c"),
            entry: linked(1),
            how: Install::Link { existing: at("a") }
        }]
    );

    let chmod = Entry {
        mode: 0o600,
        ..linked(1)
    };
    let together = apply(
        &index,
        &[("a", new(chmod.clone()), None), ("b", new(chmod.clone()), None)],
    );
    assert!(
        together.iter().all(|step| matches!(
            step,
            Step::Install {
                how: Install::Attributes,
                ..
            }
        )),
        "{together:?}"
    );
    let alone = apply(&index, &[("a", new(chmod.clone()), None)]);
    assert!(
        matches!(&alone[0], Step::Stage { content: Content::Copy { from }, .. } if *from == at("a")),
        "{alone:?}"
    );

    let parted = apply(&index, &[("a", new(file(1)), None), ("b", new(file(1)), None)]);
    let copies = parted.iter().filter(|step| {
        matches!(
            step,
            Step::Stage {
                content: Content::Copy { .. },
                ..
            }
        )
    });
    assert_eq!(copies.count(), 2, "each has its own inode then: {parted:?}");

    let write = apply(
        &index,
        &[("a", new(linked(2)), None), ("b", new(linked(2)), None)],
    );
    assert!(matches!(&write[0], Step::Stage { path, content: Content::Transfer, .. } if *path == at("a")));
    let how = Install::Link { existing: at("a") };
    assert_eq!(
        write[2],
        Step::Install {
            path: at("b"),
            entry: linked(2),
            how
        }
    );
    assert_eq!(write.len(), 3, "one transfer for both: {write:?}");
}

#[test]
fn directories_get_their_times_last_and_deepest_first() {
    let mut index = Index::default();
    index.put("d", 1, row(dir(), &[(1, 1)], 10));
    let steps = apply(
        &index,
        &[
            ("d/e", row(dir(), &[(1, 2)], 20), None),
            ("d/e/x", row(file(1), &[(1, 3)], 20), None),
        ],
    );
    let times: Vec<&RelPath> = steps
        .iter()
        .skip_while(|step| !matches!(step, Step::Times { .. }))
        .map(|step| {
            if let Step::Times { path, .. } = step {
                path
            } else {
                panic!("{step:?} after times")
            }
        })
        .collect();
    assert_eq!(times, [&at("d/e"), &at("d")]);
}

#[test]
fn a_directory_that_becomes_a_file_is_emptied_first() {
    let mut index = Index::default();
    index.put("d", 1, row(dir(), &[(1, 1)], 10));
    index.put("d/x", 2, row(file(1), &[(1, 2)], 10));
    let steps = apply(
        &index,
        &[
            ("d", row(file(2), &[(1, 4)], 20), None),
            ("d/x", gone(row(file(1), &[(1, 3)], 20)), None),
        ],
    );
    assert!(matches!(steps[0], Step::Stage { .. }));
    assert_eq!(steps[1], Step::Remove { path: at("d/x") });
    assert_eq!(
        steps[2],
        Step::Install {
            path: at("d"),
            entry: file(2),
            how: Install::Staged
        }
    );
    assert_eq!(
        steps[3],
        Step::Restore {
            path: at("d"),
            entry: dir()
        }
    );
}

#[test]
fn failures_take_with_them_what_depends_on_them() {
    let mut index = Index::default();
    index.put("a", 1, row(file(1), &[(1, 1)], 10));
    index.put("old", 2, row(dir(), &[(1, 2)], 10));
    index.put("old/x", 3, row(file(3), &[(1, 3)], 10));
    let decided = decide(
        &index,
        &[
            ("a", row(file(2), &[(2, 5)], 20)),
            ("new", row(dir(), &[(2, 6)], 20)),
            ("new/y", row(entry(Kind::Fifo), &[(2, 7)], 20)),
            ("old", gone(row(dir(), &[(1, 2), (2, 8)], 20))),
            ("old/x", gone(row(file(3), &[(1, 3), (2, 9)], 20))),
        ],
    );
    let all: Vec<Decided> = decided.values().cloned().collect();
    let Ok(mut progress) = Progress::new(&index, &all);
    let fails = ["a", "new", "old/x"].map(at);
    for step in steps(&index, &decided) {
        let tried = progress.admits(&step);
        let is_change = matches!(step, Step::Install { .. } | Step::Remove { .. });
        assert!(
            !(tried && *step.path() == at("new/y")),
            "nothing goes beneath what is not there"
        );
        if tried && is_change && fails.contains(step.path()) {
            progress.fail(&step);
        }
    }
    assert!(all.iter().all(|one| !progress.is_done(&one.path)), "{progress:?}");
    let copy = at("a.omirr-conflict-19700101-000000-n1");
    assert_eq!(progress.take_back(&index), Ok(vec![Step::Remove { path: copy }]));
}

fn sent(outgoing: &mut Outgoing, index: &Index, limit: usize) -> Vec<(u64, Vec<String>)> {
    let mut batches = Vec::new();
    while let Ok(Some(batch)) = outgoing.next_batch(index, limit) {
        batches.push((
            batch.upto,
            batch.rows.iter().map(|(path, _)| path.to_string()).collect(),
        ));
    }
    batches
}

#[test]
fn only_what_ends_with_the_snapshot_is_all_of_it() {
    let mut index = Index::default();
    for (nth, name) in ["a", "b", "c"].into_iter().enumerate() {
        index.put(name, nth as u64 + 1, row(file(1), &[(1, 1)], 10));
    }
    let mut outgoing = Outgoing::new(1, 0, 0);
    let first = outgoing.next_batch(&index, 2).unwrap().unwrap();
    assert_eq!((first.rows.len(), first.is_all), (2, false));
    // One that was sent has changed meanwhile, one that was not is replaced.
    index.put("a", 4, row(file(2), &[(1, 2)], 11));
    index.put("c", 5, row(file(2), &[(1, 2)], 11));
    let second = outgoing.next_batch(&index, 3).unwrap().unwrap();
    assert_eq!((second.rows.len(), second.upto, second.is_all), (2, 5, true));
    assert_eq!(outgoing.next_batch(&index, 3), Ok(None));
}

#[test]
fn parents_go_first_and_what_makes_way_goes_last() {
    let mut index = Index::default();
    let live = |entry| row(entry, &[(1, 1)], 10);
    // Directories change after what is in them.
    index.put("d/e/x", 1, live(file(1)));
    index.put("d/e", 2, live(dir()));
    index.put("d", 3, live(dir()));
    // A removed directory whose contents' tombstones came again later.
    index.put("old", 4, gone(live(dir())));
    index.put("y", 5, live(file(2)));
    index.put("old/x", 6, gone(live(file(3))));
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let batches = sent(&mut Outgoing::new(1, 0, 0), &index, 1);
    // What is held back is not counted as sent.
    let expected = [
        (1, names(&["d", "d/e", "d/e/x"])),
        (3, names(&["y"])),
        (6, names(&["old/x", "old"])),
    ];
    assert_eq!(batches, expected);
}

#[test]
fn rows_do_not_go_back_unless_the_peer_may_have_lost_them() {
    let mut index = Index::default();
    for seq in 1..=4 {
        index.put(&format!("f{seq}"), seq, row(file(1), &[(1, seq)], 10));
    }
    for record in index.0.values_mut() {
        record.via = Some(if record.seq == 3 { 8 } else { 1 });
    }
    let batches = sent(&mut Outgoing::new(1, 0, 1), &index, 10);
    assert_eq!(batches, [(4, vec!["f1".to_owned(), "f3".to_owned()])]);
    assert!(sent(&mut Outgoing::new(1, 4, 1), &index, 10).is_empty());
}

prop_compose! {
    fn any_row()(replica in 1..4u64, seq in 1..4u64, wall in 1..5u64, content in 0..3u8, deleted: bool, other in 0..4u64) -> Row {
        let vector = if other == 0 { vec![(replica, seq)] } else { vec![(other, 1), (replica, seq)] };
        Row { deleted, ..row(file(content), &vector, wall) }
    }
}

fn winner(a: &Row, b: &Row) -> Row {
    let verdict = remote_row(&at("p"), Some(a), b, Policy::KeepBoth);
    if verdict == Verdict::Known {
        a.clone()
    } else {
        b.clone()
    }
}

proptest! {
    #[test]
    fn the_winner_is_the_same_in_whatever_order(a in any_row(), b in any_row(), c in any_row()) {
        // Rows that are different have different stamps or vectors.
        let differ = |a: &Row, b: &Row| a == b || precedence(a, b).is_ne();
        prop_assume!(differ(&a, &b) && differ(&b, &c) && differ(&a, &c));
        prop_assert_eq!(winner(&a, &a), a.clone());
        prop_assert_eq!(winner(&a, &b), winner(&b, &a));
        prop_assert_eq!(winner(&winner(&a, &b), &c), winner(&a, &winner(&b, &c)));
    }
}

/// What was seen, `None` where it is as the row says, and what of it is left out.
fn left_out(index: &Index, seen: &[(&str, Option<Seen>)]) -> Vec<String> {
    let seen: Vec<(RelPath, Option<Seen>)> =
        seen.iter().map(|(path, seen)| (at(path), seen.clone())).collect();
    let seen = seen.iter().map(|(path, seen)| (path, seen.as_ref())).collect();
    let Ok(out) = incoherent(index, &seen);
    out.iter().map(ToString::to_string).collect()
}

#[test]
fn looks_that_do_not_fit_together_are_left_out() {
    let mut index = Index::default();
    index.put("d", 1, row(dir(), &[(1, 1)], 1));
    index.put("d/e", 2, row(dir(), &[(1, 2)], 2));
    index.put("d/e/f", 3, row(file(1), &[(1, 3)], 3));
    index.put("g", 4, row(file(1), &[(1, 4)], 4));
    let there = |entry: Entry| Some(Seen::Present(entry));
    let gone = || Some(Seen::Absent);

    // A whole tree that went, one that came, a directory that became a file.
    let went = [("d", gone()), ("d/e", gone()), ("d/e/f", gone())];
    assert!(left_out(&index, &went).is_empty());
    let came = [
        ("n", there(dir())),
        ("n/m", there(dir())),
        ("n/m/x", there(file(2))),
    ];
    assert!(left_out(&index, &came).is_empty());
    let turned = [("d", there(file(3))), ("d/e", gone()), ("d/e/f", gone())];
    assert!(left_out(&index, &turned).is_empty());

    // It came back while its names were looked at.
    let back = [
        ("d", gone()),
        ("d/e", None),
        ("d/e/f", None),
        ("g", there(file(9))),
    ];
    assert_eq!(left_out(&index, &back), ["d", "d/e", "d/e/f"]);
    let new_name = [
        ("d", gone()),
        ("d/e", gone()),
        ("d/e/f", gone()),
        ("d/n", there(file(2))),
    ];
    assert_eq!(left_out(&index, &new_name), ["d", "d/e", "d/e/f", "d/n"]);
    // A file took its place, after a name in it had been looked at.
    let replaced = [("d/e", there(file(3))), ("d/e/f", there(file(4)))];
    assert_eq!(left_out(&index, &replaced), ["d/e", "d/e/f"]);
    // One name could not be looked at.
    let unsure = [("d", gone()), ("d/e", gone())];
    assert_eq!(left_out(&index, &unsure), ["d", "d/e"]);
    // What is left out takes along what rests on it, and the rest stays.
    let above = [
        ("d", gone()),
        ("d/e", gone()),
        ("d/e/f", there(file(4))),
        ("g", gone()),
    ];
    assert_eq!(left_out(&index, &above), ["d", "d/e", "d/e/f"]);
    // A new directory that kept changing: nothing in it has a place yet.
    let orphan = [("n/m", there(dir())), ("n/m/x", there(file(2))), ("g", None)];
    assert_eq!(left_out(&index, &orphan), ["n/m", "n/m/x"]);
}

#[test]
fn an_inode_that_a_crash_left_unlocked_is_not_a_users_change() {
    let locked = |entry: Entry| Entry {
        flags: Flags::IMMUTABLE | Flags::NODUMP,
        ..entry
    };
    let unlocked = |entry: Entry| Entry {
        flags: Flags::NODUMP,
        ..entry
    };
    let later = |entry: Entry| Entry {
        mtime: Time { secs: 9, nanos: 0 },
        ..entry
    };
    let base = row(locked(file(1)), &[(1, 1)], 1);
    let deleted = Row {
        deleted: true,
        ..base.clone()
    };
    let changed = row(locked(file(2)), &[(1, 2)], 2);
    let folder = row(locked(dir()), &[(1, 1)], 1);
    let found = |base: &Row, intent: &Row, seen: Entry| recover(Some(base), intent, &Seen::Present(seen));
    // Before anything else was done.
    for intent in [&deleted, &changed, &base] {
        assert_eq!(found(&base, intent, unlocked(file(1))), Found::Untouched);
    }
    // After: the flags are still to be set.
    assert_eq!(found(&base, &changed, unlocked(file(2))), Found::Halfway);
    assert_eq!(found(&base, &changed, locked(file(2))), Found::Done);
    // A directory in which names have come and gone.
    assert_eq!(found(&folder, &folder, later(unlocked(dir()))), Found::Halfway);
    let gone = Row {
        deleted: true,
        ..folder.clone()
    };
    assert_eq!(found(&folder, &gone, later(unlocked(dir()))), Found::Untouched);
    // What a user did meanwhile is one, all the same.
    assert_eq!(found(&base, &deleted, unlocked(file(3))), Found::Changed);
    let dumped = Entry {
        flags: Flags::IMMUTABLE,
        ..file(1)
    };
    assert_eq!(found(&base, &deleted, dumped), Found::Changed);
}

#[test]
fn a_conflict_copy_that_is_renamed_back_and_loses_again_is_kept_again() {
    // Made on a node whose clock is far ahead of this one's.
    let copy = "a.omirr-conflict-19700101-000000-n1.txt";
    let mut index = Index::default();
    index.put("a.txt", 1, row(file(2), &[(2, 1)], 500));
    index.put(copy, 2, row(file(1), &[(2, 2)], 600));
    let mut author = Author::new(ReplicaId(1), 2, None, None);
    let seen = |path: &str, seen: Seen, from: Option<&str>| Observed {
        path: at(path),
        seen,
        when_ms: Some(20),
        moved_from: from.map(at),
        origin: None,
    };
    let observed = vec![
        seen("a.txt", Seen::Present(file(1)), Some(copy)),
        seen(copy, Seen::Absent, None),
    ];
    let Ok(decided) = decide_local(&index, observed, &mut author, 20);
    let [back, end] = &decided[..] else {
        panic!("{decided:?}")
    };
    assert!(!back.row.deleted && end.row.deleted);
    assert!(back.row.version.stamp.wall_ms >= 600, "newer than the copy");
    assert_eq!(back.row.version.stamp, end.row.version.stamp, "it is one change");
    index.put("a.txt", 3, back.row.clone());
    index.put(copy, 4, end.row.clone());
    // Somebody else's change, made without knowing of it, wins: within the same
    // second the copy has the same name again.
    let winner = row(file(9), &[(3, 1)], 900);
    let decided = decide(&index, &[("a.txt", winner)]);
    assert_eq!(decided[copy].work, Work::KeepAside { from: at("a.txt") });
}
