//! Big files of which little changes: what is sent, read and written is what
//! changed, and the file stays the inode that it is.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use omirr_tests::nodes::{Node, Pair};

const SOON: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// Of the file that is changed.
const SIZE: u64 = 48 * MIB;
/// Rows, lists and what else the daemons read and write: logs, `/proc`, the index.
const BESIDES: u64 = 6 * MIB;

/// What is done to a file, how much of it may be sent for that, and how.
type Change = (&'static str, u64, fn(&File));

/// Bytes that no other place has.
fn noise(seed: u64, bytes: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut made = Vec::with_capacity(bytes as usize);
    while (made.len() as u64) < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        made.extend_from_slice(&state.to_le_bytes());
    }
    made.truncate(bytes as usize);
    made
}

/// A pair that has a big file in common, and where it is on each.
fn pair_with(test: &str, size: u64) -> Option<(Pair, [PathBuf; 2])> {
    let mut pair = Pair::running(test, |_| ())?;
    fs::write(pair.one.share.join("big"), noise(1, size)).unwrap();
    pair.settle_equal(SOON);
    let places = [&pair.one, &pair.two].map(|node| node.share.join("big"));
    aged(&places[1]);
    Some((pair, places))
}

/// Waits until what was written a moment ago is old enough to be told by `stat`
/// from what is written now.
fn aged(path: &Path) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    while modified
        .elapsed()
        .is_ok_and(|age| age < Duration::from_millis(200))
    {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// What a daemon has read and written so far by system calls, sockets included,
/// and the content that it has sent and received, bytes.
fn counts(node: &Node) -> BTreeMap<&'static str, u64> {
    let stats = node.stats();
    let content = |name: &str| stats["shares"][0][name].as_u64().unwrap();
    BTreeMap::from([
        ("read", node.read_bytes()),
        ("written", node.written_bytes()),
        ("sent", content("content_sent_bytes")),
        ("received", content("content_received_bytes")),
    ])
}

/// What a daemon did since.
fn since(node: &Node, before: &BTreeMap<&'static str, u64>) -> BTreeMap<&'static str, u64> {
    let now = counts(node);
    now.iter()
        .map(|(name, count)| (*name, count - before[name]))
        .collect()
}

/// Whether big files stay the inodes that they are here: not where blocks are
/// shared, since a new file costs nothing there.
fn is_written_over(pair: &Pair) -> bool {
    let (from, to) = (pair.base().join("from"), pair.base().join("to"));
    fs::write(&from, "x").unwrap();
    let (from, to) = (File::open(from).unwrap(), File::create(to).unwrap());
    rustix::fs::ioctl_ficlone(&to, &from).is_err()
}

#[test]
fn a_change_in_the_middle_moves_what_changed_and_no_more() {
    let Some((mut pair, [here, there])) = pair_with(module_path!(), SIZE) else {
        return;
    };
    let before = [counts(&pair.one), counts(&pair.two)];
    let ino = inode(&there);
    // Over two leaves, at the border of no block. It stays open: a close may come
    // long after the write here, and is a reason to read the file once more.
    let file = open(&here);
    file.write_all_at(&noise(2, MIB), 20 * MIB + 777_777).unwrap();
    pair.settle(SOON);
    let [one, two] = [since(&pair.one, &before[0]), since(&pair.two, &before[1])];
    pair.assert_equal();
    if is_written_over(&pair) {
        assert_eq!(inode(&there), ino);
    }
    assert!(one["sent"] <= MIB + 16_384, "{one:?}");
    assert!(two["received"] <= MIB + 16_384, "{two:?}");
    // Once by the look, and then what is sent.
    assert!(one["read"] <= SIZE + 2 * MIB + BESIDES, "{one:?}");
    // The two leaves, for their names and again, and the record.
    assert!(two["read"] <= 7 * MIB + BESIDES, "{two:?}");
    assert!(two["written"] <= 2 * MIB + BESIDES, "{two:?}");
    drop(file);
}

#[test]
fn a_file_that_grows_shrinks_or_gets_holes_is_the_same_on_the_other_side() {
    let Some((mut pair, [here, there])) = pair_with(module_path!(), SIZE + 12_345) else {
        return;
    };
    let over = is_written_over(&pair);
    let ino = inode(&there);
    let changes: [Change; 8] = [
        ("appended to", 32_768, |file| {
            file.write_all_at(&noise(3, 10_000), SIZE + 12_345).unwrap();
        }),
        ("cut in the middle of a block", 8192, |file| {
            file.set_len(SIZE - 4321).unwrap()
        }),
        ("cut at the end of a leaf", 0, |file| {
            file.set_len(40 * MIB).unwrap()
        }),
        ("lengthened by a hole", 4096, |file| {
            file.set_len(44 * MIB + 99).unwrap()
        }),
        ("given a hole", 3 * 65_536, |file| {
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, 5 * MIB + 5, 3 * MIB).unwrap();
        }),
        ("written in the hole", 8192, |file| {
            file.write_all_at(b"in the hole", 6 * MIB).unwrap()
        }),
        ("changed here and there", 16_384, |file| {
            for at in [0, 9 * MIB + 1, 30 * MIB] {
                file.write_all_at(b"here and there", at).unwrap();
            }
        }),
        ("changed and lengthened", MIB + 16_384, |file| {
            file.write_all_at(b"once more", 30 * MIB).unwrap();
            file.write_all_at(&noise(4, MIB), 46 * MIB).unwrap();
        }),
    ];
    for (what, most, change) in changes {
        aged(&there);
        let before = counts(&pair.two);
        change(&open(&here));
        pair.settle(SOON);
        let two = since(&pair.two, &before);
        pair.assert_equal();
        assert!(two["received"] <= most, "{what}: {two:?}");
        if over {
            assert_eq!(inode(&there), ino, "{what}");
        }
    }
    let blocks = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(blocks(&there) <= blocks(&here) + MIB, "{} bytes", blocks(&there));
}

#[test]
fn who_has_the_file_open_keeps_the_old_one_whole() {
    let Some((mut pair, [here, there])) = pair_with(module_path!(), SIZE) else {
        return;
    };
    let old = fs::read(&there).unwrap();
    let reader = File::open(&there).unwrap();
    let ino = inode(&there);
    let before = counts(&pair.two);
    open(&here).write_all_at(b"new", 7 * MIB).unwrap();
    pair.settle_equal(SOON);
    assert_ne!(inode(&there), ino);
    let mut read = vec![0; old.len()];
    reader.read_exact_at(&mut read, 0).unwrap();
    assert!(read == old, "it has changed under the reader");
    let two = since(&pair.two, &before);
    assert!(two["received"] <= 16_384, "what is here was sent: {two:?}");
    assert_eq!(fs::read(&here).unwrap(), fs::read(&there).unwrap());
}

#[test]
fn whoever_reads_meanwhile_sees_the_old_file_or_the_new_one() {
    let Some((mut pair, [here, there])) = pair_with(module_path!(), 8 * MIB) else {
        return;
    };
    let file = open(&here);
    for byte in 1..=20_u8 {
        // All of it is one change for the sender.
        pair.one.stop_reading();
        for at in 0..8 {
            file.write_all_at(&[byte; 5000], at * MIB + 100).unwrap();
        }
        pair.one.go_on();
        pair.one.until("the change is there", SOON, || {
            let read = fs::read(&there).unwrap();
            let found: Vec<u8> = (0..8).map(|at| read[(at * MIB) as usize + 2000]).collect();
            assert!(byte == 1 || found.iter().all(|one| *one == found[0]), "{found:?}");
            found == [byte; 8]
        });
    }
    drop(file);
    pair.settle_equal(SOON);
}

#[test]
fn changes_that_follow_one_another_quickly_all_arrive() {
    let Some((mut pair, [here, _])) = pair_with(module_path!(), SIZE) else {
        return;
    };
    for round in 0..30_u64 {
        open(&here)
            .write_all_at(&noise(round, 3000), round * MIB + 17 * round)
            .unwrap();
        std::thread::sleep(Duration::from_millis(round * 7 % 60));
    }
    pair.settle_equal(SOON);
    // Both sides, each the file that the other has just written.
    for round in 0..4_u64 {
        let node = if round % 2 == 0 { &pair.one } else { &pair.two };
        open(&node.share.join("big"))
            .write_all_at(&noise(99 + round, 3000), round * MIB)
            .unwrap();
        pair.settle_equal(SOON);
    }
}

#[test]
fn a_file_with_several_names_stays_one() {
    let Some((mut pair, [here, there])) = pair_with(module_path!(), SIZE) else {
        return;
    };
    fs::hard_link(&here, here.with_file_name("again")).unwrap();
    pair.settle_equal(SOON);
    aged(&there);
    let (over, ino) = (is_written_over(&pair), inode(&there));
    for round in 0..3 {
        let before = counts(&pair.two);
        open(&here).write_all_at(b"by two names", round * MIB).unwrap();
        pair.settle_equal(SOON);
        aged(&there);
        let two = since(&pair.two, &before);
        assert!(two["received"] <= 16_384, "{two:?}");
        assert_eq!(inode(&there), inode(&there.with_file_name("again")));
        if over {
            assert_eq!(inode(&there), ino);
        }
    }
    // A name of which the other node knows nothing keeps what it has.
    let own = pair.two.folder.join("outside");
    fs::hard_link(&there, &own).unwrap();
    let old = fs::read(&own).unwrap();
    open(&here).write_all_at(b"not outside", 9 * MIB).unwrap();
    pair.settle_equal(SOON);
    assert_ne!(inode(&there), inode(&own));
    assert!(
        fs::read(&own).unwrap() == old,
        "a name outside of the share has changed"
    );
}

#[test]
fn what_was_changed_on_both_sides_is_kept() {
    let Some((mut pair, [here, there])) = pair_with(module_path!(), SIZE) else {
        return;
    };
    pair.two.stop();
    open(&there).write_all_at(b"two was here", 3 * MIB).unwrap();
    open(&here).write_all_at(b"one was here, later", 8 * MIB).unwrap();
    let ours = fs::read(&there).unwrap();
    pair.two.start();
    pair.settle_equal(SOON);
    let copies: Vec<_> = fs::read_dir(&pair.two.share)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("omirr-conflict"))
        .collect();
    assert_eq!(copies.len(), 1, "{copies:?}");
    let kept = [&copies[0], &there].map(|path| fs::read(path).unwrap());
    assert!(kept.contains(&ours), "what two wrote is gone");
    assert_ne!(inode(&copies[0]), inode(&there));
}

#[test]
fn a_node_that_lacks_the_lists_of_leaves_asks_for_no_more() {
    let Some((mut pair, [here, there])) = pair_with(module_path!(), SIZE) else {
        return;
    };
    // The sender's index is new, and so knows nothing of what the peer has.
    pair.one.stop();
    fs::remove_dir_all(pair.one.state_dir()).unwrap();
    pair.one.start();
    pair.settle_equal(SOON);
    for round in 0..2 {
        aged(&there);
        let before = counts(&pair.two);
        open(&here).write_all_at(b"changed", round * MIB).unwrap();
        pair.settle_equal(SOON);
        let two = since(&pair.two, &before);
        assert!(two["received"] <= 8192, "{two:?}");
    }
}
