use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::model::{
    Entry, Flags, Hash, Here, Kind, LinkGroup, Origin, Record, RelPath, ReplicaId, Row, Sketch, Stamp,
    StatSig, Time, TreeMove, Vector, Version, Xattr,
};
use crate::wire::{Part, WireRow};

fn entry() -> impl Strategy<Value = Entry> {
    let bytes = |range| prop::collection::vec(1u8..=255, range).prop_map(Vec::into_boxed_slice);
    let kind = prop_oneof![
        (0..1u64 << 62, any::<[u8; 32]>()).prop_map(|(size, hash)| Kind::File {
            size,
            hash: Hash(hash)
        }),
        Just(Kind::Directory),
        bytes(1..80).prop_map(|target| Kind::Symlink { target }),
        Just(Kind::Fifo),
        Just(Kind::Socket),
        any::<u64>().prop_map(|rdev| Kind::CharDevice { rdev }),
        any::<u64>().prop_map(|rdev| Kind::BlockDevice { rdev }),
    ];
    let xattrs = prop::collection::btree_map(bytes(1..20), bytes(0..60), 0..4).prop_map(|map| {
        map.into_iter()
            .map(|(name, value)| Xattr { name, value })
            .collect::<Vec<_>>()
    });
    let owner = 0..u32::MAX;
    let time = (any::<i64>(), 0..1_000_000_000u32).prop_map(|(secs, nanos)| Time { secs, nanos });
    let link = prop::option::of(any::<u64>().prop_map(LinkGroup));
    let name = prop::option::of("[a-z_][a-z0-9-]{0,9}".prop_map(Arc::<str>::from));
    let flags = any::<u32>().prop_map(Flags::from_bits);
    let owners = (owner.clone(), owner, name.clone(), name);
    (kind, 0..0o10000u32, owners, time, xattrs, flags, link).prop_map(
        |(kind, mode, (uid, gid, user, group), mtime, xattrs, flags, link)| {
            let has_flags = matches!(kind, Kind::File { .. } | Kind::Directory);
            Entry {
                kind,
                mode,
                uid,
                gid,
                user,
                group,
                mtime,
                xattrs,
                flags: if has_flags { flags } else { Flags::NONE },
                link,
            }
        },
    )
}

/// Few enough that rows of a batch share some.
fn origin() -> impl Strategy<Value = Option<Arc<Origin>>> {
    let origin = (
        0..3u32,
        prop::option::of(0..2u32),
        "[a-z]{0,2}",
        "(/[a-z.]{1,9}){0,1}",
    )
        .prop_map(|(pid, uid, command, cgroup)| Arc::new(Origin::new(pid, uid, command.as_bytes(), &cgroup)));
    prop::option::of(origin)
}

fn row() -> impl Strategy<Value = Row> {
    let pairs = prop::collection::vec((any::<u64>(), 1..1u64 << 60), 1..4);
    let stamp = (0..1u64 << 48, 0..1u32 << 20);
    (entry(), any::<bool>(), pairs, stamp, origin()).prop_map(
        |(entry, deleted, pairs, (wall_ms, count), origin)| {
            let replica = ReplicaId(pairs[0].0);
            let vector = Vector::from_iter(pairs.into_iter().map(|(id, counter)| (ReplicaId(id), counter)));
            Row {
                entry,
                deleted,
                version: Version {
                    vector,
                    stamp: Stamp {
                        wall_ms,
                        count,
                        replica,
                    },
                },
                origin,
            }
        },
    )
}

fn path() -> impl Strategy<Value = RelPath> {
    "[a-z\u{e9}\u{7}]{1,12}(/[a-zA-Z. ]{3,20}x){0,4}".prop_map(|text| RelPath::new(text.as_bytes()).unwrap())
}

fn chunk_names() -> impl Strategy<Value = Vec<[u8; 16]>> {
    prop::collection::vec(any::<[u8; 16]>(), 0..50)
}

fn message() -> impl Strategy<Value = Message> {
    let name = "[a-z0-9]{1,20}";
    let names = prop::collection::vec((any::<u64>().prop_map(ReplicaId), name), 0..4);
    let data = prop::collection::vec(any::<u8>(), 1..2000).prop_map(Bytes::from);
    let zeros = (1..200_000usize).prop_map(|len| Bytes::from(vec![0; len]));
    let part = prop_oneof![
        data.prop_map(Part::Data),
        zeros.prop_map(Part::Data),
        any::<u32>().prop_map(Part::Have),
        (1..1u64 << 60).prop_map(Part::Hole),
    ];
    let rows = prop::collection::vec((path(), row(), prop::option::of(path()), any::<bool>()), 0..20);
    let batch = (rows, 0..1u64 << 40).prop_map(|(rows, base)| {
        let mut seq = base;
        let rows = rows
            .into_iter()
            .map(|(path, mut row, moved_from, inline)| {
                seq += 1 + base % 3;
                let mut content = None;
                if let (Kind::File { size, .. }, true, false) = (&mut row.entry.kind, inline, row.deleted) {
                    *size %= 3000;
                    content = Some(Bytes::from(vec![b'x'; *size as usize]));
                }
                WireRow {
                    seq,
                    path,
                    row,
                    moved_from,
                    inline: content,
                    moved_tree: None,
                    sketch: Sketch::default(),
                }
            })
            .collect();
        Message::Batch { upto: seq, rows }
    });
    prop_oneof![
        (
            any::<u32>(),
            name,
            name,
            any::<u64>(),
            0..1u64 << 60,
            names.clone()
        )
            .prop_map(|(protocol, node, share, replica, head, names)| Message::Hello {
                protocol,
                software: "omirr 0.1.0".into(),
                node,
                share,
                replica: ReplicaId(replica),
                head,
                names,
            }),
        (name, any::<u64>(), 0..1u64 << 60, any::<bool>(), names).prop_map(
            |(node, replica, cursor, bare, names)| {
                Message::Welcome {
                    protocol: 3,
                    software: "omirr 0.1.0".into(),
                    node,
                    replica: ReplicaId(replica),
                    cursor,
                    bare,
                    names,
                    head: cursor / 3,
                }
            }
        ),
        "[ -~]{0,80}".prop_map(|reason| Message::Refuse { reason }),
        batch,
        (
            any::<u64>(),
            path(),
            0..1u64 << 60,
            prop::collection::vec(any::<[u8; 16]>(), 0..50)
        )
            .prop_map(|(id, path, size, have)| Message::Want {
                id,
                path,
                size,
                hash: Hash([3; 32]),
                have
            }),
        (any::<u64>(), prop::collection::vec(part, 0..5), any::<bool>())
            .prop_map(|(id, parts, last)| Message::Content { id, parts, last }),
        (any::<u64>(), "[ -~]{0,80}").prop_map(|(id, reason)| Message::Gone { id, reason }),
        (0..1u64 << 60, any::<u64>(), prop::option::of("[ -~]{0,80}")).prop_map(
            |(durable, pending, reason)| Message::Ack {
                durable,
                pending,
                reason,
                head: durable ^ 1,
            }
        ),
        Just(Message::Ping),
        (0..1u64 << 48).prop_map(|clock_ms| Message::Pong { clock_ms }),
        (0..1u64 << 60).prop_map(|after| Message::Plain {
            after,
            upto: after + 1
        }),
        (0..1u64 << 60).prop_map(|after| Message::Again { after }),
        (any::<u64>(), path(), 0..1u64 << 60, chunk_names()).prop_map(|(id, path, size, leaves)| {
            Message::Compare {
                id,
                path,
                size,
                hash: Hash([3; 32]),
                base: Hash([4; 32]),
                base_size: size / 2,
                leaves,
            }
        }),
        (
            any::<u64>(),
            prop::option::of(prop::collection::btree_set(any::<u64>(), 0..9))
        )
            .prop_map(|(id, leaves)| Message::Differs {
                id,
                leaves: leaves.map(|leaves| leaves.into_iter().collect()),
            }),
        (any::<u64>(), chunk_names()).prop_map(|(id, blocks)| Message::Blocks { id, blocks }),
        (path(), row(), 1..1000u32).prop_map(|(path, mut row, count)| {
            let to = RelPath::root().join(b"0 is in no path").unwrap();
            row.deleted = true;
            row.entry.kind = Kind::Directory;
            let author = row.version.stamp.replica;
            row.version.vector.raise(author, 1 << 61);
            let digest = Hash([9; 32]);
            Message::Batch {
                upto: 2000,
                rows: vec![WireRow {
                    seq: 2000,
                    path,
                    row,
                    moved_from: None,
                    inline: None,
                    moved_tree: Some(TreeMove { to, count, digest }),
                    sketch: Sketch::of_least(vec![3, 1 << 60, u64::MAX]),
                }],
            }
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn messages_come_out_as_they_went_in(messages in prop::collection::vec(message(), 1..4)) {
        // One encoder and one decoder, as on a connection: their buffers must
        // not leak from one message into the next.
        let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
        let mut stream = BytesMut::new();
        for message in &messages {
            encoder.encode(message, Pack::IfSmaller, &mut stream).unwrap();
        }
        for message in &messages {
            let Progress::Whole(frame) = frame::take(&mut stream).unwrap() else { panic!("frame is missing") };
            prop_assert_eq!(&decoder.decode(&frame).unwrap(), message);
        }
        prop_assert!(stream.is_empty());
    }

    #[test]
    fn records_come_out_as_they_went_in(row in row(), seq in any::<u64>(), moved_from in prop::option::of(path())) {
        let time = row.entry.mtime;
        let sig = StatSig {
            ino: seq, btime: time, mtime: time, ctime: time, size: 5, mode: 6, uid: 7, gid: 8, nlink: 9, racy: true,
        };
        let here = Here::of(&Entry { mode: 1, ..row.entry.clone() }, &row.entry, &["why".into()]);
        let record = Record { row, seq, sig: Some(sig), via: Some(3), moved_from, here };
        prop_assert_eq!(from_bytes::<Record>(&to_bytes(&record).unwrap()).unwrap(), record);
    }

    #[test]
    fn a_truncated_frame_is_an_error(message in message(), cut in any::<prop::sample::Index>()) {
        let bytes = encode(&message).unwrap();
        prop_assert!(decode(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn a_truncated_body_is_an_error(message in message(), cut in any::<prop::sample::Index>()) {
        let mut bytes = encode(&message).unwrap();
        let left = cut.index(bytes.len() - frame::HEADER_BYTES);
        bytes.truncate(frame::HEADER_BYTES + left);
        bytes[..4].copy_from_slice(&(left as u32 + 1).to_le_bytes());
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn flipped_bits_never_panic(message in message(), flips in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..9)) {
        let mut bytes = encode(&message).unwrap();
        for (at, flip) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
        }
        // Most flips are errors, some make another message; none may panic.
        let _outcome = decode(&bytes);
        let mut body = bytes.split_off(frame::HEADER_BYTES);
        body.truncate(1 << 20);
        let _outcome = Decoder::default().decode(&Frame { flags: 0, body });
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), flags in 0u8..3) {
        let _outcome = decode(&bytes);
        let _outcome = Decoder::default().decode(&Frame { flags, body: BytesMut::from(&bytes[..]) });
        let _outcome = from_bytes::<Record>(&bytes);
    }
}

/// The body of a message, by hand.
fn body(parts: &[&[u8]]) -> Result<Message, WireError> {
    Decoder::default().decode(&Frame {
        flags: 0,
        body: BytesMut::from(&parts.concat()[..]),
    })
}

/// A length of 2^60, as bincode writes it.
fn huge() -> Vec<u8> {
    let mut bytes = vec![253];
    bytes.extend_from_slice(&(1u64 << 60).to_le_bytes());
    bytes
}

const BATCH: u8 = 3;
const CONTENT: u8 = 5;

#[test]
fn the_variants_have_the_numbers_that_the_protocol_gives_them() {
    let plain = |message: &Message| encode(message).unwrap()[frame::HEADER_BYTES];
    assert_eq!(
        plain(&Message::Refuse {
            reason: String::new()
        }),
        2
    );
    assert_eq!(
        plain(&Message::Batch {
            upto: 0,
            rows: Vec::new()
        }),
        BATCH
    );
    assert_eq!(
        plain(&Message::Content {
            id: 0,
            parts: Vec::new(),
            last: false
        }),
        CONTENT
    );
    assert_eq!(
        plain(&Message::Gone {
            id: 0,
            reason: String::new()
        }),
        6
    );
    assert_eq!(plain(&Message::Ping), 8);
    assert_eq!(plain(&Message::Pong { clock_ms: 0 }), 9);
    assert_eq!(plain(&Message::Plain { after: 0, upto: 1 }), 10);
    assert_eq!(plain(&Message::Again { after: 0 }), 11);
    let compare = Message::Compare {
        id: 0,
        path: RelPath::new(b"x").unwrap(),
        size: 0,
        hash: Hash([0; 32]),
        base: Hash([0; 32]),
        base_size: 0,
        leaves: Vec::new(),
    };
    assert_eq!(plain(&compare), 12);
    assert_eq!(plain(&Message::Differs { id: 0, leaves: None }), 13);
    assert_eq!(
        plain(&Message::Blocks {
            id: 0,
            blocks: Vec::new()
        }),
        14
    );
    // A frame as docs/PROTOCOL.md shows it.
    let ack = Message::Ack {
        durable: 300,
        pending: 0,
        reason: None,
        head: 200,
    };
    assert_eq!(
        &encode(&ack).unwrap()[..],
        [8, 0, 0, 0, 0, 7, 251, 0x2c, 0x01, 0, 0, 200]
    );
}

#[test]
fn huge_lengths_are_refused_without_being_allocated() {
    // A batch by 2^60 processes or of 2^60 rows, content of 2^60 parts, a part of 2^60 bytes, a
    // reason of 2^60 bytes, a path of 2^60 bytes in a row.
    for bytes in [
        [vec![BATCH, 1], huge()].concat(),
        [vec![CONTENT, 1], huge()].concat(),
        [vec![CONTENT, 1, 1, 0], huge()].concat(),
        [vec![2], huge()].concat(),
        [vec![BATCH, 1, 0], huge()].concat(),
        [vec![BATCH, 1, 0, 1, 1], huge()].concat(),
    ] {
        let said = body(&[&bytes]).unwrap_err();
        assert!(matches!(said, WireError::Malformed { .. }), "{said:?}");
    }
    let said = body(&[&[CONTENT, 1, 1, 0], &huge()]).unwrap_err().to_string();
    assert_eq!(
        said,
        "a frame that holds no message: it would take more memory than is allowed"
    );
}

#[test]
fn small_elements_cannot_grow_into_much_memory() {
    // Two bytes on the wire, forty in memory, sixteen million times.
    let mut bytes = vec![CONTENT, 1, 252];
    bytes.extend_from_slice(&(1u32 << 24).to_le_bytes());
    bytes.resize(bytes.len() + (2 << 24) - 8, 2);
    let said = body(&[&bytes]).unwrap_err().to_string();
    assert!(said.ends_with("more memory than is allowed"), "{said}");
}

#[test]
fn who_made_the_rows_of_a_batch_is_written_once() {
    let written = |rows: u64, command: &[u8]| {
        let origin = Some(Arc::new(Origin::new(
            1,
            Some(0),
            command,
            "/system.slice/nginx.service",
        )));
        let rows = (1..=rows)
            .map(|seq| WireRow {
                seq,
                path: RelPath::root(),
                row: Row {
                    entry: Entry {
                        kind: Kind::Directory,
                        mode: 0,
                        uid: 0,
                        gid: 0,
                        mtime: Time { secs: 0, nanos: 0 },
                        xattrs: Vec::new(),
                        flags: Flags::NONE,
                        user: None,
                        group: None,
                        link: None,
                    },
                    deleted: false,
                    version: Version {
                        vector: Vector::default(),
                        stamp: Stamp {
                            wall_ms: 0,
                            count: 0,
                            replica: ReplicaId(1),
                        },
                    },
                    origin: (!command.is_empty()).then(|| origin.clone()).flatten(),
                },
                moved_from: None,
                inline: None,
                moved_tree: None,
                sketch: Sketch::default(),
            })
            .collect();
        to_bytes(&Message::Batch { upto: 9, rows }).unwrap()
    };
    let table = 1 + 2 + 1 + 5 + 1 + 27;
    for rows in [1, 9] {
        assert_eq!(written(rows, b"nginx").len(), written(rows, b"").len() + table);
    }
    // A row that names a process which is not in the table.
    let mut bytes = written(1, b"nginx");
    let place = bytes.len() - 5;
    assert_eq!(bytes[place..], [1, 0, 0, 0, 0]);
    bytes[place] = 2;
    let said = body(&[&bytes]).unwrap_err().to_string();
    assert!(said.contains("number 2 of 1 processes"), "{said}");
    // More processes than rows.
    let said = body(&[&[BATCH, 1, 1, 1, 0, 0, 0, 0]]).unwrap_err().to_string();
    assert!(
        said.contains("0 rows cannot have been made by 1 processes"),
        "{said}"
    );
}

#[test]
fn full_messages_pass() {
    let data = Bytes::from(vec![7; LIMITS.body_bytes - 1000]);
    let content = Message::Content {
        id: 1,
        parts: vec![Part::Data(data)],
        last: true,
    };
    assert_eq!(decode(&encode(&content).unwrap()).unwrap(), content);

    let have = (0..crate::wire::MAX_HAVE as u128)
        .map(u128::to_le_bytes)
        .collect();
    let want = Message::Want {
        id: 1,
        path: RelPath::new(b"a").unwrap(),
        size: 1,
        hash: Hash([0; 32]),
        have,
    };
    assert_eq!(decode(&encode(&want).unwrap()).unwrap(), want);

    let replica = ReplicaId(u64::MAX);
    let row = Row {
        entry: Entry {
            kind: Kind::File {
                size: 0,
                hash: Hash([9; 32]),
            },
            mode: 0o644,
            uid: 1000,
            gid: 1000,
            mtime: Time {
                secs: 1_700_000_000,
                nanos: 5,
            },
            xattrs: Vec::new(),
            flags: Flags::NONE,
            user: None,
            group: None,
            link: Some(LinkGroup(1)),
        },
        deleted: false,
        version: Version {
            vector: Vector::from_iter((0..20).map(|id| (ReplicaId(u64::MAX - id), 1 << 40))),
            stamp: Stamp {
                wall_ms: 1 << 41,
                count: 1 << 20,
                replica,
            },
        },
        origin: None,
    };
    let rows = (1..=LIMITS.batch_rows as u64)
        .map(|seq| WireRow {
            seq,
            path: RelPath::new(
                format!("{}/{seq}", "directory/".repeat(20))
                    .replace("//", "/")
                    .as_bytes(),
            )
            .unwrap(),
            // Each made by another process.
            row: Row {
                origin: Some(Arc::new(Origin::new(
                    u32::MAX - seq as u32,
                    Some(0),
                    b"fifteen-letters",
                    &"c".repeat(255),
                ))),
                ..row.clone()
            },
            moved_from: None,
            inline: None,
            moved_tree: None,
            sketch: Sketch::default(),
        })
        .collect();
    let batch = Message::Batch {
        upto: LIMITS.batch_rows as u64,
        rows,
    };
    assert_eq!(decode(&encode(&batch).unwrap()).unwrap(), batch);
}

#[test]
fn messages_beyond_the_limits_are_not_encoded() {
    let part = Part::Data(Bytes::from(vec![0; LIMITS.body_bytes]));
    let said = encode(&Message::Content {
        id: 1,
        parts: vec![part],
        last: true,
    })
    .unwrap_err();
    assert!(matches!(said, WireError::BodyTooLong { .. }), "{said:?}");
    // Within the body's limit, but noise: it does not shrink into a frame.
    let mut noise = vec![0; LIMITS.frame_bytes + 1];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let part = Part::Data(Bytes::from(noise));
    let said = encode(&Message::Content {
        id: 1,
        parts: vec![part],
        last: true,
    })
    .unwrap_err();
    assert!(matches!(said, WireError::FrameTooLong { .. }), "{said:?}");
}

#[test]
fn only_what_shrinks_is_compressed() {
    let flags = |data: Vec<u8>| {
        let parts = vec![Part::Data(Bytes::from(data))];
        encode(&Message::Content {
            id: 1,
            parts,
            last: true,
        })
        .unwrap()[4]
    };
    let mut noise = vec![0; 1 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    assert_eq!(flags(vec![b'a'; 400]), 0, "too small");
    assert_eq!(flags(vec![b'a'; 600]), FLAG_ZSTD);
    assert_eq!(flags(vec![b'a'; 1 << 20]), FLAG_ZSTD);
    assert_eq!(flags(noise[..1000].to_vec()), 0);
    assert_eq!(flags(noise), 0);
}

#[test]
fn more_work_makes_fewer_bytes_of_many() {
    let mut random = blake3::Hasher::new().finalize_xof();
    let mut words = |bytes: usize| {
        let mut text = Vec::new();
        while text.len() < bytes {
            let mut pick = [0];
            random.fill(&mut pick);
            text.extend([b"inode ", b"dentry", b"vector", b"fence "][usize::from(pick[0] % 4)]);
        }
        Message::Content {
            id: 1,
            parts: vec![Part::Data(Bytes::from(text))],
            last: true,
        }
    };
    let len = |message: &Message, pack: Pack| {
        let (mut encoder, mut out) = (Encoder::default(), BytesMut::new());
        encoder.encode(message, pack, &mut out).unwrap();
        let len = out.len();
        assert_eq!(&decode(&out).unwrap(), message);
        len
    };
    let many = words(256 << 10);
    assert!(len(&many, Pack::Thoroughly) < len(&many, Pack::IfSmaller));
    let few = words(4 << 10);
    assert_eq!(len(&few, Pack::Thoroughly), len(&few, Pack::IfSmaller));
}

#[test]
fn a_bomb_is_refused_by_its_size() {
    let mut bomb = zstd::bulk::compress(&vec![0; LIMITS.body_bytes + 1], 19).unwrap();
    assert!(bomb.len() < 5000);
    let unpack = |bytes: &[u8]| {
        Decoder::default().decode(&Frame {
            flags: FLAG_ZSTD,
            body: BytesMut::from(bytes),
        })
    };
    assert!(matches!(
        unpack(&bomb).unwrap_err(),
        WireError::BodyTooLong { .. }
    ));

    // The same with a header that lies: the frame's content size, four bytes
    // after magic and descriptor, says 100.
    let announced = bomb[5..]
        .windows(4)
        .position(|four| four == (LIMITS.body_bytes as u32 + 1).to_le_bytes());
    let at = 5 + announced.unwrap();
    bomb[at..at + 4].copy_from_slice(&100u32.to_le_bytes());
    assert!(matches!(
        unpack(&bomb).unwrap_err(),
        WireError::Compression { .. }
    ));

    // Two frames in one body: the second is not announced.
    let ping = zstd::bulk::compress(&[8], 1).unwrap();
    assert_eq!(unpack(&ping).unwrap(), Message::Ping);
    assert!(matches!(
        unpack(&[&ping[..], &ping[..]].concat()).unwrap_err(),
        WireError::Compression { .. }
    ));
    assert!(matches!(
        unpack(b"not zstd").unwrap_err(),
        WireError::Compression { .. }
    ));
}

#[test]
fn what_follows_a_message_is_an_error() {
    assert_eq!(body(&[&[8]]), Ok(Message::Ping));
    assert_eq!(body(&[&[8, 8]]), Err(WireError::TrailingBytes { bytes: 1 }));
    assert_eq!(
        from_bytes::<u8>(&[1, 2, 3]),
        Err(WireError::TrailingBytes { bytes: 2 })
    );
    let two = [encode(&Message::Ping).unwrap(), encode(&Message::Ping).unwrap()].concat();
    assert_eq!(decode(&two), Err(WireError::TrailingBytes { bytes: 6 }));
}

#[test]
fn unknown_messages_and_flags_are_named() {
    let said = body(&[&[99]]).unwrap_err().to_string();
    assert_eq!(
        said,
        "a frame that holds no message: something in it is of an unknown kind (number 99)"
    );
    let frame = Frame {
        flags: 0b101,
        body: BytesMut::from(&[8][..]),
    };
    let said = Decoder::default().decode(&frame).unwrap_err().to_string();
    assert_eq!(said, "a frame with unknown flags 0b00000101");
}

#[test]
fn bad_paths_are_named() {
    let good = Message::Want {
        id: 1,
        path: RelPath::new(b"a/b.c/d").unwrap(),
        size: 0,
        hash: Hash([0; 32]),
        have: Vec::new(),
    };
    let bytes = encode(&good).unwrap();
    for (bad, why) in [
        (b"../../x", "'..'"),
        (b"/etc/ab", "absolute"),
        (b"a//bc/d", "empty name"),
        (b"a/b\0c/d", "NUL"),
    ] {
        let mut bytes = bytes.clone();
        let at = bytes.windows(7).position(|seven| seven == b"a/b.c/d").unwrap();
        bytes[at..at + 7].copy_from_slice(bad);
        let said = decode(&bytes).unwrap_err().to_string();
        let name = String::from_utf8_lossy(bad);
        assert!(
            said.contains(why) && said.contains(&format!("{name:?}")),
            "{said}"
        );
    }
}
