//! `fuzz_seeds FOLDER`: what the fuzz targets of `tests/fuzz` begin with, made by
//! the code that makes the real thing.

#![allow(clippy::unwrap_used, reason = "a tool for developers")]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use omirr::model::{
    Entry, Flags, Hash, Kind, LinkGroup, Origin, Record, RelPath, ReplicaId, Row, Sketch, Stamp, Time,
    Vector, Version, Xattr,
};
use omirr::wire::{self, Encoder, Message, PROTOCOL, Pack, Part, WireRow, frame};

fn main() {
    let folder = std::env::args_os().nth(1).expect("usage: fuzz_seeds FOLDER");
    let folder = Path::new(&folder);
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let folder = folder.join(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), bytes).unwrap();
    };
    let mut all = vec![15];
    for message in messages() {
        let mut plain = BytesMut::new();
        Encoder::default()
            .encode(&message, Pack::Never, &mut plain)
            .unwrap();
        let name = message.name();
        put("message", name, &plain);
        all.extend_from_slice(&plain);
        let packed = wire::encode(&message).unwrap();
        if packed != plain {
            put("message", &format!("{name}-packed"), &packed);
        }
        if matches!(message, Message::Batch { .. }) {
            // Without the frame's header and the message's number.
            put("rows", "batch", &plain[frame::HEADER_BYTES + 1..]);
        }
    }
    put("frame", "all", &all);
    let record = Record {
        row: rows()[0].row.clone(),
        seq: 9,
        sig: None,
        via: Some(1),
        moved_from: RelPath::new(b"old").ok(),
        here: None,
    };
    put("rows", "record", &wire::to_bytes(&record).unwrap());
    put("index", "journal", &[&[0][..], &[7; 64]].concat());
    put("index", "no-index", b"\x01redb");
    for at in [0u32, 64, 4096, 20_000, 70_000] {
        let [a, b, c, _] = at.to_le_bytes();
        let patch = [2, a, b, c, 4, 0xff, 0xff, 0xff, 0xff];
        put("index", &format!("patch-{at}"), &patch);
        put("index", &format!("cut-{at}"), &[3, a, b, c, 0]);
    }
    put("config", "whole", CONFIG.as_bytes());
    put(
        "config",
        "mistakes",
        b"[node]\nnmae = 1\n[peers.x]\naddress = \"x\"\n[shares.a]\n",
    );
    put("btf", "thing", &thing());
}

const CONFIG: &str = r#"
[node]
name = "web1"
listen = ["0.0.0.0:808", "[::1]:809"]
key = "/etc/omirr/node.key"
state_dir = "/var/lib/omirr"

[tracer]
source = "auto"
attach = "kprobe"
transport = "ring"
ring_size = "8MiB"

[peers.web2]
address = "web2.example.org:808"
key = "1mdYSnC7K+m3B0l19URIM2vRkJer3cnBgwNfvKciGg0="

[shares.www]
path = "/"
peers = ["web2"]
exclude = ["*.tmp", "/cache/", "!a[b-c]?", "**/x"]
conflicts = "newest-wins"
"#;

fn messages() -> Vec<Message> {
    let names = vec![
        (ReplicaId(1), "web1".to_owned()),
        (ReplicaId(2), "web2".to_owned()),
    ];
    vec![
        Message::Hello {
            protocol: PROTOCOL,
            software: "omirr 0.1.0".to_owned(),
            node: "web1".to_owned(),
            share: "www".to_owned(),
            replica: ReplicaId(1),
            head: 70_000,
            names: names.clone(),
        },
        Message::Welcome {
            protocol: PROTOCOL,
            software: "omirr 0.1.0".to_owned(),
            node: "web2".to_owned(),
            replica: ReplicaId(2),
            cursor: 5,
            bare: true,
            names,
            head: 9,
        },
        Message::Refuse {
            reason: "no such share".to_owned(),
        },
        Message::Batch {
            upto: 40,
            rows: rows(),
        },
        Message::Compare {
            id: 2,
            path: RelPath::new(b"large").unwrap(),
            size: 9 << 20,
            hash: Hash([7; 32]),
            base: Hash([8; 32]),
            base_size: 8 << 20,
            leaves: vec![[5; 16]; 8],
        },
        Message::Differs {
            id: 2,
            leaves: Some(vec![3, 8]),
        },
        Message::Blocks {
            id: 2,
            blocks: vec![[6; 16]; 256],
        },
        Message::Want {
            id: 3,
            path: RelPath::new(b"a/big").unwrap(),
            size: 300_000,
            hash: Hash([9; 32]),
            have: vec![[1; 16], [2; 16]],
        },
        Message::Content {
            id: 3,
            parts: vec![
                Part::Data(Bytes::from(vec![b'x'; 2000])),
                Part::Have(1),
                Part::Hole(65_536),
            ],
            last: true,
        },
        Message::Gone {
            id: 3,
            reason: "it has changed".to_owned(),
        },
        Message::Ack {
            durable: 300,
            pending: 1,
            reason: Some("the disk is full".to_owned()),
            head: 9,
        },
        Message::Ping,
        Message::Pong {
            clock_ms: 1_700_000_000_000,
        },
    ]
}

fn rows() -> Vec<WireRow> {
    let kinds = [
        Kind::File {
            size: 5,
            hash: Hash(*blake3::hash(b"hello").as_bytes()),
        },
        Kind::Directory,
        Kind::Symlink {
            target: b"../else".as_slice().into(),
        },
        Kind::Fifo,
        Kind::Socket,
        Kind::CharDevice { rdev: 259 },
        Kind::BlockDevice { rdev: 2049 },
    ];
    let origin = Arc::new(Origin {
        pid: 77,
        uid: Some(1000),
        command: "vim".into(),
        cgroup: "/user.slice".into(),
    });
    let mut rows = Vec::new();
    for (n, kind) in (1..).zip(kinds) {
        let inline = matches!(kind, Kind::File { .. }).then(|| Bytes::from_static(b"hello"));
        rows.push(WireRow {
            seq: n,
            path: RelPath::new(format!("dir/entry-{n}").as_bytes()).unwrap(),
            row: Row {
                entry: Entry {
                    kind,
                    mode: 0o644,
                    uid: 1000,
                    gid: 1000,
                    mtime: Time {
                        secs: 1_700_000_000,
                        nanos: 5,
                    },
                    xattrs: vec![Xattr {
                        name: b"user.a".as_slice().into(),
                        value: b"v".as_slice().into(),
                    }],
                    link: (n == 1).then_some(LinkGroup(4)),
                    user: Some("alice".into()),
                    group: None,
                    flags: Flags::default(),
                },
                deleted: n == 4,
                version: Version {
                    vector: Vector::from_iter([(ReplicaId(1), n), (ReplicaId(2), 9)]),
                    stamp: Stamp {
                        wall_ms: 1_700_000_000_000,
                        count: 1,
                        replica: ReplicaId(1),
                    },
                },
                origin: (n != 2).then(|| Arc::clone(&origin)),
            },
            moved_from: (n == 3).then(|| RelPath::new(b"old/place").unwrap()),
            inline,
            moved_tree: None,
            sketch: Sketch::default(),
        });
    }
    rows
}

/// A type description with a struct, an unnamed union, an alias and a function.
fn thing() -> Vec<u8> {
    let mut strings = vec![0u8];
    let mut string = |text: &str| {
        let at = strings.len() as u32;
        strings.extend_from_slice(text.as_bytes());
        strings.push(0);
        at
    };
    let names: Vec<u32> = [
        "unsigned int",
        "alias_t",
        "thing",
        "make_thing",
        "a",
        "b",
        "c",
        "x",
        "y",
    ]
    .iter()
    .map(|text| string(text))
    .collect();
    let [int, alias, thing, make, a, b, c, x, y] = names[..] else {
        unreachable!("there are nine")
    };
    // Name, kind and number of members, size or type, then the members.
    let types: [&[u32]; 7] = [
        &[int, 1 << 24, 4, 32],
        &[0, 5 << 24 | 1, 4, b, 1, 0],
        &[alias, 8 << 24, 1],
        &[thing, 4 << 24 | 3, 12, a, 1, 0, 0, 2, 32, c, 3, 64],
        &[0, 2 << 24, 4],
        &[0, 13 << 24 | 2, 5, x, 1, y, 5],
        &[make, 12 << 24 | 1, 6],
    ];
    let types: Vec<u8> = types
        .iter()
        .flat_map(|words| words.iter().flat_map(|word| word.to_le_bytes()))
        .collect();
    let mut out = vec![0x9f, 0xeb, 1, 0];
    let lengths = [
        24,
        0,
        types.len() as u32,
        types.len() as u32,
        strings.len() as u32,
    ];
    out.extend(lengths.iter().flat_map(|word| word.to_le_bytes()));
    out.extend(types);
    out.extend(strings);
    out
}
