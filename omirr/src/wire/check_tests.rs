use std::sync::Arc;

use bytes::Bytes;

use super::*;
use crate::model::{Flags, Hash, Row, Sketch, Stamp, Time, Vector};

fn row(path: &str, seq: u64) -> WireRow {
    let replica = ReplicaId(7);
    WireRow {
        seq,
        path: RelPath::new(path.as_bytes()).unwrap(),
        row: Row {
            entry: Entry {
                kind: Kind::File {
                    size: 2,
                    hash: Hash([1; 32]),
                },
                mode: 0o644,
                uid: 0,
                gid: 0,
                mtime: Time {
                    secs: 1,
                    nanos: 999_999_999,
                },
                xattrs: vec![xattr("security.a", 3), xattr("user.b", 65_536)],
                flags: Flags::NONE,
                user: None,
                group: None,
                link: None,
            },
            deleted: false,
            version: Version {
                vector: Vector::from_iter([(replica, seq)]),
                stamp: Stamp {
                    wall_ms: 5,
                    count: 0,
                    replica,
                },
            },
            origin: Some(origin(16, 255)),
        },
        moved_from: None,
        inline: Some(Bytes::from_static(b"ab")),
        moved_tree: None,
        sketch: Sketch::default(),
    }
}

fn origin(command_bytes: usize, cgroup_bytes: usize) -> Arc<Origin> {
    Arc::new(Origin {
        pid: 1,
        uid: None,
        command: "c".repeat(command_bytes).into(),
        cgroup: "/".repeat(cgroup_bytes).into(),
    })
}

fn xattr(name: &str, bytes: usize) -> Xattr {
    Xattr {
        name: name.as_bytes().into(),
        value: vec![0; bytes].into(),
    }
}

fn verdict(rows: Vec<WireRow>, upto: u64) -> Result<(), String> {
    check(&mut Message::Batch { upto, rows }).map_err(|wrong| wrong.to_string())
}

#[test]
fn rows_as_a_node_makes_them_pass() {
    let mut root = row("x", 1);
    root.path = RelPath::root();
    root.row.entry.kind = Kind::Directory;
    root.inline = None;
    let mut gone = row("gone", 3);
    gone.row.deleted = true;
    gone.inline = None;
    assert_eq!(verdict(vec![root, row("a/b", 2), gone], 3), Ok(()));
}

#[test]
fn each_impossible_row_is_refused_with_its_path() {
    type Spoil = fn(&mut WireRow);
    let cases: [(&str, Spoil); 23] = [
        ("command that is said to have changed it has 17 bytes", |r| {
            r.row.origin = Some(origin(17, 0))
        }),
        ("cgroup that is said to have changed it has 256 bytes", |r| {
            r.row.origin = Some(origin(0, 256))
        }),
        ("control character", |r| {
            r.row.origin = Some(Arc::new(Origin {
                pid: 1,
                uid: None,
                command: "\u{1b}[2J".into(),
                cgroup: "".into(),
            }));
        }),
        ("its mode 0o100644 has bits beyond 0o7777", |r| {
            r.row.entry.mode = 0o100644
        }),
        ("no file can belong to 4294967295:0", |r| {
            r.row.entry.uid = u32::MAX
        }),
        ("1000000000 nanoseconds", |r| {
            r.row.entry.mtime.nanos = 1_000_000_000
        }),
        ("target is empty", |r| {
            r.row.entry.kind = Kind::Symlink {
                target: Box::default(),
            }
        }),
        ("target has 4096 bytes", |r| {
            r.row.entry.kind = Kind::Symlink {
                target: vec![b'x'; 4096].into(),
            };
        }),
        ("NUL", |r| {
            r.row.entry.kind = Kind::Symlink {
                target: b"a\0b"[..].into(),
            }
        }),
        ("no file can have", |r| {
            r.row.entry.kind = Kind::File {
                size: 1 << 63,
                hash: Hash([0; 32]),
            };
        }),
        ("has no name", |r| r.row.entry.xattrs = vec![xattr("", 0)]),
        ("has 256 bytes", |r| {
            r.row.entry.xattrs = vec![xattr(&"x".repeat(256), 0)]
        }),
        ("NUL", |r| r.row.entry.xattrs = vec![xattr("user.\0", 0)]),
        ("out of order", |r| r.row.entry.xattrs.reverse()),
        ("twice", |r| {
            r.row.entry.xattrs = vec![xattr("user.a", 0), xattr("user.a", 0)]
        }),
        ("has 65537 bytes", |r| {
            r.row.entry.xattrs = vec![xattr("user.a", 65_537)]
        }),
        ("zero counter", |r| {
            r.row.version.vector = Vector::from_iter([(ReplicaId(1), 0)])
        }),
        ("too far ahead", |r| r.row.version.stamp.wall_ms = 1 << 48),
        ("changes in one millisecond", |r| {
            r.row.version.stamp.count = u32::MAX
        }),
        ("said to have 2 bytes, but 3 came", |r| {
            r.inline = Some(Bytes::from_static(b"abc"))
        }),
        ("content came with a directory", |r| {
            r.row.entry.kind = Kind::Directory
        }),
        ("content came with a deleted file", |r| r.row.deleted = true),
        ("moved from b/.omirr-tmp-0a/c", |r| {
            r.moved_from = Some(RelPath::new(b"b/.omirr-tmp-0a/c").unwrap());
        }),
    ];
    for (expected, spoil) in cases {
        let mut bad = row("dir/name", 2);
        spoil(&mut bad);
        let said = verdict(vec![row("good", 1), bad], 9).unwrap_err();
        assert!(said.contains(expected), "{said:?} lacks {expected:?}");
        assert!(said.contains("for dir/name:"), "{said:?}");
    }
    let said = verdict(vec![row("a/.omirr-tmp-12/b", 1)], 1).unwrap_err();
    assert!(said.contains("being staged"), "{said}");
}

#[test]
fn a_move_that_cannot_be_is_refused() {
    let moved = || {
        let mut row = row("dir/name", 10);
        row.inline = None;
        row.row.deleted = true;
        row.row.entry.kind = Kind::Directory;
        row.moved_tree = Some(TreeMove {
            to: RelPath::new(b"dir/new").unwrap(),
            count: 5,
            digest: Hash([0; 32]),
        });
        row
    };
    fn tree(row: &mut WireRow) -> &mut TreeMove {
        row.moved_tree.as_mut().unwrap()
    }
    assert_eq!(verdict(vec![moved()], 10), Ok(()));
    type Spoil = fn(&mut WireRow);
    let cases: [(&str, Spoil); 9] = [
        ("only the tombstone of a directory", |r| r.row.deleted = false),
        ("only the tombstone of a directory", |r| {
            r.row.entry.kind = Kind::Fifo
        }),
        ("the share's root", |r| tree(r).to = RelPath::root()),
        ("being staged", |r| {
            tree(r).to = RelPath::new(b".omirr-tmp-12/b").unwrap()
        }),
        ("into itself", |r| {
            tree(r).to = RelPath::new(b"dir/name/x").unwrap()
        }),
        ("what it is in", |r| tree(r).to = RelPath::new(b"dir").unwrap()),
        ("nothing moved", |r| tree(r).count = 0),
        ("131073 rows that moved", |r| tree(r).count = TREE_ROWS_MAX + 1),
        ("cannot end at number 10, which its author calls 9", |r| {
            r.row.version.vector = Vector::from_iter([(ReplicaId(7), 9)])
        }),
    ];
    for (expected, spoil) in cases {
        let mut bad = moved();
        spoil(&mut bad);
        let said = verdict(vec![bad], 20).unwrap_err();
        assert!(said.contains(expected), "{said:?} lacks {expected:?}");
    }
    let said = check(&mut Message::Plain { after: 7, upto: 7 })
        .unwrap_err()
        .to_string();
    assert!(said.contains("after 7 and up to 7"), "{said}");
    assert!(check(&mut Message::Again { after: 1 << 62 }).is_err());
}

#[test]
fn a_comparison_names_no_more_than_a_file_has() {
    let compare = |leaves: usize, base_size: u64| Message::Compare {
        id: 1,
        path: RelPath::new(b"x").unwrap(),
        size: 1,
        hash: Hash([0; 32]),
        base: Hash([0; 32]),
        base_size,
        leaves: vec![[0; 16]; leaves],
    };
    let differs = |leaves: Vec<u64>| Message::Differs {
        id: 1,
        leaves: Some(leaves),
    };
    let blocks = |count: usize| Message::Blocks {
        id: 1,
        blocks: vec![[0; 16]; count],
    };
    let good = [
        compare(262_144, i64::MAX as u64),
        differs((0..512).collect()),
        differs(Vec::new()),
        blocks(131_072),
    ];
    for mut message in good {
        assert_eq!(check(&mut message).map_err(|error| error.to_string()), Ok(()));
    }
    let bad = [
        (compare(262_145, 0), "262145 names of leaves"),
        (compare(0, 1 << 63), "bytes"),
        (differs((0..513).collect()), "513 leaves that differ"),
        (differs(vec![4, 4]), "not in order"),
        (blocks(131_073), "131073 names of blocks"),
    ];
    for (mut message, expected) in bad {
        let said = check(&mut message).unwrap_err().to_string();
        assert!(said.contains(expected), "{said:?} lacks {expected:?}");
    }
}

#[test]
fn a_sketch_has_eight_values_in_order_at_most() {
    let said = |values: &[u64]| {
        let bytes = crate::wire::codec::to_bytes(&values.to_vec()).unwrap();
        let mut odd = row("x", 1);
        odd.sketch = crate::wire::codec::from_bytes(&bytes).unwrap();
        verdict(vec![odd], 1)
    };
    assert_eq!(said(&[1, 2, 3, 4, 5, 6, 7, 8]), Ok(()));
    assert!(
        said(&[1, 2, 3, 4, 5, 6, 7, 8, 9])
            .unwrap_err()
            .contains("a sketch of 9 values, 8 are allowed")
    );
    assert!(said(&[1, 1]).unwrap_err().contains("not in order"));
}

#[test]
fn the_root_is_a_directory_for_good() {
    let mut root = row("x", 1);
    root.path = RelPath::root();
    assert!(
        verdict(vec![root.clone()], 1)
            .unwrap_err()
            .contains("root cannot be a file")
    );
    root.row.deleted = true;
    assert!(
        verdict(vec![root], 1)
            .unwrap_err()
            .contains("root cannot be deleted")
    );
}

#[test]
fn sequence_numbers_begin_at_one() {
    let said = verdict(vec![row("a", 2), row("b", 0)], 9).unwrap_err();
    assert!(said.contains("for b: its sequence number is 0"), "{said}");
    assert_eq!(verdict(vec![row("a", 10), row("b", 2)], 9), Ok(()));
}

#[test]
fn names_cannot_leave_a_folder_or_paint_a_terminal() {
    for bad in ["", "a/b", "a\x1b[2J", &"x".repeat(256)] {
        let mut welcome = Message::Welcome {
            protocol: 4,
            software: "omirr".into(),
            node: "web1".into(),
            replica: ReplicaId(1),
            cursor: 0,
            bare: false,
            names: vec![(ReplicaId(2), bad.to_owned())],
            head: 0,
        };
        assert!(check(&mut welcome).is_err(), "{bad:?}");
    }
    let mut refusal = Message::Refuse {
        reason: format!("no\x1b[2J{}", "é".repeat(4096)),
    };
    check(&mut refusal).unwrap();
    let Message::Refuse { reason } = refusal else {
        unreachable!()
    };
    assert!(reason.starts_with("no [2Jé") && reason.len() <= 4096);
}

#[test]
fn impossible_parts_and_wants_are_refused() {
    for part in [Part::Data(Bytes::new()), Part::Hole(0), Part::Hole(1 << 63)] {
        let mut content = Message::Content {
            id: 1,
            parts: vec![part.clone()],
            last: true,
        };
        assert!(check(&mut content).is_err(), "{part:?}");
    }
    let want = |path: &[u8], size, have| Message::Want {
        id: 1,
        path: RelPath::new(path).unwrap(),
        size,
        hash: Hash([0; 32]),
        have: vec![[0; 16]; have],
    };
    assert!(check(&mut want(b"a", 1, MAX_HAVE)).is_ok());
    assert!(check(&mut want(b"a", 1, MAX_HAVE + 1)).is_err());
    assert!(check(&mut want(b"", 1, 0)).is_err());
    assert!(check(&mut want(b"a", u64::MAX, 0)).is_err());
}
