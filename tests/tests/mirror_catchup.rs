//! Catching up at any distance: trees that meet for the first time, nodes that
//! come back from a backup, without their index, or twice, and shares whose
//! disk is not there. Whatever happens, nothing is lost, the trees become the
//! same, and the operator is told.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use omirr_tests::nodes::{Node, Pair, copy_all, may_mirror};
use omirr_tests::treewalk;

const SOON: Duration = Duration::from_secs(120);

/// The same bytes for the same seed, and no two alike for long.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..bytes)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        })
        .collect()
}

/// A tree of some hundred entries of most kinds, 6 MiB in all.
fn fill(share: &Path) {
    for n in 0..240u64 {
        let folder = share.join(format!("d{}/e{}", n % 6, n % 4));
        fs::create_dir_all(&folder).unwrap();
        let size = usize::try_from(n * 37 % 9000).unwrap();
        fs::write(folder.join(format!("f{n}")), noise(n, size)).unwrap();
    }
    fs::write(share.join("image"), noise(1000, 4 << 20)).unwrap();
    fs::write(share.join("d0/middle"), noise(1001, 200 << 10)).unwrap();
    fs::hard_link(share.join("image"), share.join("d1/second-name")).unwrap();
    symlink("../image", share.join("d2/link")).unwrap();
    fs::set_permissions(share.join("d3"), fs::Permissions::from_mode(0o750)).unwrap();
    let old = fs::File::options()
        .write(true)
        .open(share.join("d0/middle"))
        .unwrap();
    old.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000))
        .unwrap();
}

/// A pair with the same tree, settled, and stopped again.
fn settled_pair(test: &str) -> Option<Pair> {
    let mut pair = Pair::running(test, |pair| fill(&pair.one.share))?;
    pair.settle_equal(SOON);
    Some(pair)
}

fn figure(node: &Node, name: &str) -> u64 {
    node.stats()["shares"][0][name].as_u64().unwrap()
}

/// What a tree has, by name and content: no times, since who compares those with
/// what they were has to know them.
fn files(share: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![share.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                todo.push(path);
            } else {
                let name = path.strip_prefix(share).unwrap().to_owned();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn conflict_copies(share: &Path) -> Vec<PathBuf> {
    let is_copy = |path: &PathBuf| path.to_string_lossy().contains(".omirr-conflict-");
    files(share).into_keys().filter(is_copy).collect()
}

fn index_of(node: &Node) -> PathBuf {
    node.state_dir().join("shares/tree/index.redb")
}

/// Puts back what was copied before, in the place of what is there now: new
/// inodes with old contents, as from a backup.
fn restore(copy: &Path, place: &Path) {
    if place.is_dir() {
        fs::remove_dir_all(place).unwrap();
    } else {
        fs::remove_file(place).unwrap();
    }
    copy_all(copy, place);
}

/// File times are no finer than the kernel's tick: what is done after this is
/// later by any clock.
fn later() {
    std::thread::sleep(Duration::from_millis(30));
}

#[test]
fn two_equal_trees_that_meet_send_no_content_and_stay_as_they_are() {
    let test = "two_equal_trees_that_meet_send_no_content_and_stay_as_they_are";
    if !may_mirror(test) {
        return;
    }
    let mut pair = Pair::new();
    fill(&pair.one.share);
    fs::remove_dir(&pair.two.share).unwrap();
    copy_all(&pair.one.share, &pair.two.share);
    let before = treewalk::walk(&pair.one.share).unwrap();
    let inodes = |share: &Path| {
        let names = files(share).into_keys();
        names
            .map(|name| fs::symlink_metadata(share.join(name)).unwrap().ino())
            .collect::<Vec<_>>()
    };
    let (ones, twos) = (inodes(&pair.one.share), inodes(&pair.two.share));
    pair.start();
    pair.settle_equal(SOON);
    let changed = treewalk::diff(&before, &treewalk::walk(&pair.one.share).unwrap());
    assert!(changed.is_empty(), "{}", changed.join("\n"));
    assert_eq!(inodes(&pair.one.share), ones, "a file was replaced");
    assert_eq!(inodes(&pair.two.share), twos, "a file was replaced");
    for node in [&pair.one, &pair.two] {
        for name in ["content_sent_bytes", "content_received_bytes"] {
            assert_eq!(figure(node, name), 0, "{name} of {}", node.name);
        }
    }
    // From here on contents travel with their rows again.
    pair.still_mirrors();
}

/// What `wait` promises holds from the first moment: while the tree is still
/// being compared, rows are looked at, decided and applied bit by bit.
#[test]
fn nothing_is_acknowledged_before_it_is_there_while_the_tree_is_still_compared() {
    let test = "nothing_is_acknowledged_before_it_is_there_while_the_tree_is_still_compared";
    let Some(mut pair) = settled_pair(test) else {
        return;
    };
    let (one, two) = (pair.one.share.clone(), pair.two.share.clone());
    for round in 0..5u64 {
        pair.two.kill();
        for n in 0..120u64 {
            // Too big to go with its row.
            fs::write(one.join(format!("d0/new{n}")), noise(round << 32 | n, 300 << 10)).unwrap();
            // Changed on both sides: rows are made here while others are applied.
            fs::write(one.join(format!("d1/both{n}")), format!("one {round}")).unwrap();
            fs::write(two.join(format!("d1/both{n}")), format!("two {round}")).unwrap();
        }
        pair.two.start();
        let waited = pair.one.wait("100s");
        let there = |n: &u64| {
            fs::read(two.join(format!("d0/new{n}"))).unwrap_or_default() == noise(round << 32 | n, 300 << 10)
        };
        let missing = (0..120u64).filter(|n| !there(n)).count();
        assert_eq!(waited.status.code(), Some(0), "{}", pair.one.status_text());
        assert_eq!(
            missing,
            0,
            "files are acknowledged and not there\n{}",
            pair.two.log_tail()
        );
    }
    pair.settle_equal(SOON);
}

#[test]
fn of_two_trees_that_differ_only_the_difference_is_sent() {
    let test = "of_two_trees_that_differ_only_the_difference_is_sent";
    if !may_mirror(test) {
        return;
    }
    let mut pair = Pair::new();
    fill(&pair.one.share);
    fs::remove_dir(&pair.two.share).unwrap();
    copy_all(&pair.one.share, &pair.two.share);
    later();
    // Both have something new, and one has changed what both had.
    fs::write(pair.one.share.join("d4/only-one"), noise(2000, 50_000)).unwrap();
    fs::write(pair.two.share.join("d5/only-two"), noise(2001, 60_000)).unwrap();
    let mut changed = 110_000;
    for n in [12u64, 24, 36] {
        let name = format!("d{}/e{}/f{n}", n % 6, n % 4);
        changed += fs::metadata(pair.one.share.join(&name)).unwrap().len() + 7_000;
        fs::write(pair.one.share.join(&name), noise(3000 + n, 7_000)).unwrap();
    }
    let image = fs::File::options()
        .write(true)
        .open(pair.one.share.join("image"))
        .unwrap();
    image.write_all_at(b"other bytes", 2 << 20).unwrap();
    drop(image);
    let expected = files(&pair.one.share);
    pair.start();
    pair.settle_equal(SOON);
    let now = files(&pair.two.share);
    for (name, content) in &expected {
        assert!(
            now[name] == *content,
            "{}: the newer one has not won",
            name.display()
        );
    }
    assert_eq!(now[Path::new("d5/only-two")], noise(2001, 60_000));
    // What lost was never the other's, so it is kept; the image has two names.
    assert_eq!(
        conflict_copies(&pair.two.share).len(),
        3 + 2,
        "{:?}",
        conflict_copies(&pair.two.share)
    );
    let sent = figure(&pair.one, "content_sent_bytes") + figure(&pair.two, "content_sent_bytes");
    println!("{changed} bytes in small files and 11 in 4 MiB are different; {sent} were sent");
    // Of the image no more than the chunks around the change, each way.
    assert!(
        sent >= changed && sent < changed + (3 << 19),
        "{sent} bytes for {changed}"
    );
}

#[test]
fn what_the_receiver_has_anywhere_in_the_share_is_not_sent() {
    let test = "what_the_receiver_has_anywhere_in_the_share_is_not_sent";
    if !may_mirror(test) {
        return;
    }
    let mut pair = Pair::new();
    let (one, two) = (pair.one.share.clone(), pair.two.share.clone());
    let (image, other) = (noise(1, 24 << 20), noise(2, 3 << 20));
    let mut edited = image.clone();
    edited[9 << 20..10 << 20].copy_from_slice(&noise(3, 1 << 20));
    let inserted = [&image[..5_000_000], b"a line", &image[5_000_000..]].concat();
    fs::create_dir_all(two.join("old/place")).unwrap();
    fs::write(two.join("old/place/image"), &image).unwrap();
    fs::write(two.join("old/other"), &other).unwrap();
    fs::create_dir(one.join("new")).unwrap();
    fs::write(one.join("new/same"), &other).unwrap();
    fs::write(one.join("new/edited"), &edited).unwrap();
    fs::write(one.join("new/inserted"), &inserted).unwrap();
    pair.start();
    pair.settle_equal(SOON);
    assert!(fs::read(two.join("new/edited")).unwrap() == edited);
    // What two has and one has not goes the other way: it, too, has most of it.
    let sent = figure(&pair.one, "content_sent_bytes") + figure(&pair.two, "content_sent_bytes");
    println!("first contact: {sent} bytes");
    // Two files of one image are made from the third, but they may be on their
    // way before the third is known.
    assert!(sent < 2 * (24 << 20), "{sent} bytes");
    // From here on everything is known, so little is sent.
    let before = figure(&pair.one, "content_sent_bytes");
    let mut again = edited.clone();
    again[20 << 20..(20 << 20) + 200_000].copy_from_slice(&noise(4, 200_000));
    fs::write(one.join("new/again"), &again).unwrap();
    fs::copy(one.join("old/other"), one.join("new/copy")).unwrap();
    pair.settle_equal(SOON);
    let sent = figure(&pair.one, "content_sent_bytes") - before;
    println!("a copy, and a copy with 200,000 other bytes: {sent} bytes");
    assert!(sent < 1 << 20, "{sent} bytes");
    assert!(fs::read(two.join("new/again")).unwrap() == again);
    assert!(fs::read(two.join("new/copy")).unwrap() == other);
}

/// What the index says of a file may be older than the file.
#[test]
fn a_copy_of_a_file_that_has_changed_unseen_is_sent() {
    let test = "a_copy_of_a_file_that_has_changed_unseen_is_sent";
    let Some(mut pair) = Pair::running(test, |pair| {
        fs::write(pair.one.share.join("image"), noise(1, 3 << 20)).unwrap();
    }) else {
        return;
    };
    pair.settle_equal(SOON);
    // Neither size nor time of modification show it, and two has not heard of it
    // when it is to make a copy of what it believes to be in the file.
    let image = pair.two.share.join("image");
    let was = fs::metadata(&image).unwrap();
    pair.two.stop_reading();
    fs::copy(pair.one.share.join("image"), pair.one.share.join("copy")).unwrap();
    let file = fs::File::options().write(true).open(&image).unwrap();
    file.write_all_at(b"other", 1 << 20).unwrap();
    file.set_modified(was.modified().unwrap()).unwrap();
    drop(file);
    pair.two.go_on();
    pair.settle_equal(SOON);
    assert!(fs::read(pair.two.share.join("copy")).unwrap() == noise(1, 3 << 20));
    assert_eq!(
        fs::read(pair.one.share.join("image")).unwrap()[1 << 20..][..5],
        *b"other"
    );
}

#[test]
fn a_node_that_is_restored_with_its_index_from_a_backup_catches_up() {
    let Some(mut pair) = settled_pair("a_node_that_is_restored_with_its_index_from_a_backup_catches_up")
    else {
        return;
    };
    pair.one.stop();
    let backup = pair.base().join("backup");
    copy_all(&pair.one.folder, &backup);
    pair.one.start();
    later();
    // After the backup: changes, deletions and new files from both sides.
    fs::write(pair.one.share.join("d0/e0/f0"), "changed here after the backup").unwrap();
    fs::remove_file(pair.one.share.join("d1/e1/f1")).unwrap();
    fs::write(pair.one.share.join("new-here"), noise(4000, 3000)).unwrap();
    fs::write(pair.two.share.join("d2/e2/f2"), "changed there after the backup").unwrap();
    fs::remove_dir_all(pair.two.share.join("d3/e3")).unwrap();
    fs::write(pair.two.share.join("new-there"), noise(4001, 3000)).unwrap();
    pair.settle_equal(SOON);
    let expected = files(&pair.two.share);
    pair.one.stop();
    fs::write(pair.two.share.join("made-while-away"), "made while one was away").unwrap();

    restore(&backup.join("share"), &pair.one.share);
    restore(&backup.join("state"), &pair.one.state_dir());
    pair.one.start();
    pair.settle_equal(SOON);
    let mut now = files(&pair.one.share);
    assert_eq!(
        now.remove(Path::new("made-while-away")).as_deref(),
        Some(&b"made while one was away"[..])
    );
    assert!(
        now.keys().eq(expected.keys()),
        "{:?}",
        conflict_copies(&pair.one.share)
    );
    assert!(now == expected, "an old content has come back");
    pair.one
        .wait_for_log("is a copy of an index: it was last used in another file", SOON);
    pair.still_mirrors();
}

#[test]
fn a_tree_that_is_restored_beneath_its_index_is_a_change_made_here() {
    let Some(mut pair) = settled_pair("a_tree_that_is_restored_beneath_its_index_is_a_change_made_here")
    else {
        return;
    };
    let backup = pair.base().join("backup");
    copy_all(&pair.one.share, &backup);
    let old = files(&backup);
    later();
    for n in [0u64, 6, 12, 18, 24] {
        let name = format!("d0/e{}/f{n}", n % 4);
        fs::write(pair.one.share.join(name), format!("a mistake, {n}")).unwrap();
    }
    fs::remove_dir_all(pair.one.share.join("d5")).unwrap();
    fs::write(pair.one.share.join("made-after"), "not in the backup").unwrap();
    pair.settle_equal(SOON);
    pair.one.stop();
    // As an administrator does who wants the old state back, in place.
    let restored = Command::new("rsync")
        .args(["-aHAX", "--delete"])
        .arg(format!("{}/", backup.display()))
        .arg(&pair.one.share)
        .status();
    let Ok(restored) = restored else {
        omirr_tests::skip("a_tree_that_is_restored_beneath_its_index", "rsync is missing");
        return;
    };
    assert!(restored.success());
    pair.one.start();
    pair.settle_equal(SOON);
    assert!(files(&pair.two.share) == old, "the peers have not followed");
    pair.one
        .wait_for_log("5 files have older contents than when omirr last saw them", SOON);
}

#[test]
fn a_node_whose_index_was_deleted_loses_nothing_and_brings_nothing_old_back() {
    let Some(mut pair) = settled_pair("a_node_whose_index_was_deleted_loses_nothing") else {
        return;
    };
    pair.one.stop();
    let received = figure(&pair.two, "content_received_bytes");
    later();
    fs::write(pair.two.share.join("d0/e0/f0"), "changed there meanwhile").unwrap();
    fs::remove_file(pair.two.share.join("d1/e1/f1")).unwrap();
    fs::write(pair.two.share.join("new-there"), noise(5000, 2000)).unwrap();
    fs::write(pair.one.share.join("d2/e2/f2"), "changed here meanwhile").unwrap();
    fs::write(pair.one.share.join("new-here"), noise(5001, 2000)).unwrap();
    let lost = files(&pair.one.share);
    fs::remove_file(index_of(&pair.one)).unwrap();
    pair.one.start();
    pair.settle_equal(SOON);
    let now = files(&pair.one.share);
    assert_eq!(now[Path::new("d0/e0/f0")], b"changed there meanwhile");
    assert_eq!(now[Path::new("d2/e2/f2")], b"changed here meanwhile");
    assert!(now.contains_key(Path::new("new-there")) && now.contains_key(Path::new("new-here")));
    assert!(
        !now.contains_key(Path::new("d1/e1/f1")),
        "what was deleted has its name back"
    );
    // The replaced, the deleted, and two's former version of what one changed:
    // nobody knew any more that they were superseded.
    let copies = conflict_copies(&pair.one.share);
    assert_eq!(copies.len(), 3, "{copies:?}");
    for (name, content) in &lost {
        assert!(
            now.values().any(|kept| kept == content),
            "{} was lost",
            name.display()
        );
    }
    let sent = figure(&pair.two, "content_received_bytes") - received;
    assert!(
        sent < 50 << 10,
        "{sent} bytes were sent though two had nearly all"
    );
}

#[test]
fn a_node_that_was_cloned_with_key_and_index_is_noticed_and_gets_an_identity_of_its_own() {
    let Some(mut pair) = settled_pair("a_node_that_was_cloned_with_key_and_index_is_noticed") else {
        return;
    };
    pair.one.stop();
    let mut clone = pair.one.cloned(pair.base(), "clone");
    pair.one.start();
    pair.one.settle(SOON);
    later();
    clone.start();
    clone.wait_for_log("is a copy of an index: it was last used in another file", SOON);
    // Both claim to be one; the peer takes the second for what it is.
    pair.two
        .wait_for_log("this is another node with its key: was it cloned?", SOON);
    clone.wait_for_log("two refuses: one is connected already", SOON);
    // Both go on to be changed at the same paths.
    fs::write(pair.one.share.join("d0/e0/f0"), "changed by one").unwrap();
    fs::write(pair.one.share.join("by-one"), "by one").unwrap();
    later();
    fs::write(clone.share.join("d0/e0/f0"), "changed by the clone").unwrap();
    fs::write(clone.share.join("by-clone"), "by the clone").unwrap();
    pair.settle_equal(SOON);
    pair.still_mirrors();
    assert!(!pair.two.share.join("by-clone").exists());

    // The operator does what the message says.
    clone.stop();
    clone.renew_key();
    clone.name = "three".to_owned();
    pair.two.stop();
    pair.two.knows(&clone);
    pair.two.start();
    clone.start();
    pair.settle(SOON);
    clone.settle(SOON);
    pair.settle(SOON);
    let (one, two, three) = (
        files(&pair.one.share),
        files(&pair.two.share),
        files(&clone.share),
    );
    assert!(one == two && two == three, "the three differ");
    assert_eq!(one[Path::new("d0/e0/f0")], b"changed by the clone");
    assert!(
        one.values().any(|content| content == b"changed by one"),
        "one's version is lost"
    );
    assert_eq!(one[Path::new("by-one")], b"by one");
    assert_eq!(one[Path::new("by-clone")], b"by the clone");
}

#[test]
fn an_index_that_is_restored_alone_undoes_nothing() {
    let Some(mut pair) = settled_pair("an_index_that_is_restored_alone_undoes_nothing") else {
        return;
    };
    pair.one.stop();
    let backup = pair.base().join("index");
    copy_all(&index_of(&pair.one), &backup);
    pair.one.start();
    later();
    fs::write(pair.one.share.join("d0/e0/f0"), "changed since").unwrap();
    fs::remove_file(pair.one.share.join("d1/e1/f1")).unwrap();
    fs::write(pair.two.share.join("d2/e2/f2"), "changed there since").unwrap();
    fs::remove_file(pair.two.share.join("d3/e3/f3")).unwrap();
    fs::write(pair.two.share.join("new-there"), "new").unwrap();
    fs::rename(pair.two.share.join("d4"), pair.two.share.join("renamed")).unwrap();
    pair.settle_equal(SOON);
    let expected = files(&pair.one.share);
    pair.one.stop();
    restore(&backup, &index_of(&pair.one));
    pair.one.start();
    pair.settle_equal(SOON);
    let now = files(&pair.one.share);
    assert!(
        now.keys().eq(expected.keys()),
        "{:?}",
        conflict_copies(&pair.one.share)
    );
    assert!(now == expected, "something was undone");
    pair.one.wait_for_log("is a copy of an index", SOON);
    assert_eq!(figure(&pair.one, "content_received_bytes"), 0);
    assert_eq!(figure(&pair.one, "content_sent_bytes"), 0);
    pair.still_mirrors();
}

#[test]
fn an_index_that_is_older_in_the_same_file_is_noticed_by_the_peer() {
    let Some(mut pair) = settled_pair("an_index_that_is_older_in_the_same_file_is_noticed_by_the_peer")
    else {
        return;
    };
    pair.one.stop();
    let backup = pair.base().join("index");
    copy_all(&index_of(&pair.one), &backup);
    pair.one.start();
    later();
    fs::write(pair.one.share.join("d0/e0/f0"), "changed since").unwrap();
    fs::remove_file(pair.one.share.join("d1/e1/f1")).unwrap();
    fs::write(pair.two.share.join("new-there"), "new").unwrap();
    pair.settle_equal(SOON);
    let expected = files(&pair.one.share);
    pair.one.stop();
    // Written over, not replaced: the file's inode does not tell, as with a
    // filesystem's snapshot that is rolled back.
    fs::write(index_of(&pair.one), fs::read(&backup).unwrap()).unwrap();
    pair.one.start();
    pair.one.wait_for_log("the index was restored from a copy", SOON);
    pair.settle_equal(SOON);
    let now = files(&pair.one.share);
    for (name, content) in &expected {
        assert!(now.get(name) == Some(content), "{} was undone", name.display());
    }
    pair.still_mirrors();
}

#[test]
fn who_was_away_for_long_catches_up_with_changes_and_deletions_of_both_sides() {
    let Some(mut pair) = settled_pair("who_was_away_for_long_catches_up") else {
        return;
    };
    pair.two.stop();
    later();
    for round in 0..20 {
        for n in 0..60u64 {
            let name = pair.one.share.join(format!("d{}/e{}/f{n}", n % 6, n % 4));
            fs::write(name, format!("one's round {round} of {n}")).unwrap();
        }
    }
    for n in 60..100u64 {
        fs::remove_file(pair.one.share.join(format!("d{}/e{}/f{n}", n % 6, n % 4))).unwrap();
    }
    for n in 100..160u64 {
        let name = pair.two.share.join(format!("d{}/e{}/f{n}", n % 6, n % 4));
        fs::write(name, format!("two's {n}")).unwrap();
    }
    for n in 160..200u64 {
        fs::remove_file(pair.two.share.join(format!("d{}/e{}/f{n}", n % 6, n % 4))).unwrap();
    }
    fs::rename(pair.two.share.join("d2/link"), pair.two.share.join("link")).unwrap();
    pair.two.start();
    pair.settle_equal(SOON);
    let now = files(&pair.two.share);
    for n in 0..240u64 {
        let found = now.get(&PathBuf::from(format!("d{}/e{}/f{n}", n % 6, n % 4)));
        match n {
            0..60 => assert_eq!(found.unwrap(), format!("one's round 19 of {n}").as_bytes()),
            60..100 | 160..200 => assert!(found.is_none(), "f{n} is back"),
            100..160 => assert_eq!(found.unwrap(), format!("two's {n}").as_bytes()),
            _ => assert!(found.is_some(), "f{n} is gone"),
        }
    }
    assert_eq!(conflict_copies(&pair.two.share), Vec::<PathBuf>::new());
    // Catching up costs what changed: 60 small files, not 6 MiB.
    assert!(figure(&pair.two, "content_received_bytes") < 10_000);
}

/// A mount that goes with the value.
struct Mounted(PathBuf);

impl Mounted {
    fn new(args: &[&str], at: &Path) -> Option<Mounted> {
        let done = Command::new("mount").args(args).arg(at).output().ok()?;
        done.status.success().then(|| Mounted(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily, since a daemon may have it open; nothing else can be done.
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_share_whose_disk_is_not_mounted_stops_and_goes_on_when_it_is_back() {
    let test = "a_share_whose_disk_is_not_mounted_stops_and_goes_on_when_it_is_back";
    if !may_mirror(test) {
        return;
    }
    let mut pair = Pair::new();
    let image = pair.base().join("disk");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let made = Command::new("mkfs.ext4").arg("-q").arg(&image).status();
    let mount = |pair: &Pair| Mounted::new(&["-o", "loop", image.to_str().unwrap()], &pair.one.share);
    let Some(disk) = made.ok().filter(|made| made.success()).and_then(|_| mount(&pair)) else {
        omirr_tests::skip(test, "a loop device cannot be mounted here");
        return;
    };
    fill(&pair.one.share);
    pair.start();
    pair.settle_equal(SOON);
    let all = files(&pair.two.share);

    // Under the running daemon, by force.
    drop(disk);
    let reason = pair.one.stopped_because(SOON);
    assert!(
        reason.contains("is on another filesystem than before"),
        "{reason}"
    );
    // And at a start.
    pair.one.stop();
    pair.one.start();
    let reason = pair.one.stopped_because(SOON);
    assert!(reason.contains("is its filesystem mounted?"), "{reason}");
    assert!(files(&pair.two.share) == all, "something was deleted");
    assert!(files(&pair.one.share).is_empty(), "the mount point was filled");
    fs::write(pair.two.share.join("meanwhile"), "meanwhile").unwrap();
    pair.one.stop();

    let _disk = mount(&pair).unwrap();
    pair.one.start();
    pair.settle_equal(SOON);
    assert!(pair.one.share.join("meanwhile").exists());
    pair.one.stop();
}

#[test]
fn a_share_that_something_is_mounted_over_stops_and_a_folder_within_is_left_alone() {
    let test = "a_share_that_something_is_mounted_over_stops_and_a_folder_within_is_left_alone";
    let Some(mut pair) = settled_pair(test) else {
        return;
    };
    let all = files(&pair.two.share);
    let empty = pair.base().join("empty");
    fs::create_dir(&empty).unwrap();
    // Within the share: what lies beneath is hidden, not deleted.
    let Some(within) = Mounted::new(&["-t", "tmpfs", "none"], &pair.one.share.join("d0")) else {
        omirr_tests::skip(test, "nothing can be mounted here");
        return;
    };
    fs::write(
        pair.one.share.join("d0/of-the-other-filesystem"),
        "not of the share",
    )
    .unwrap();
    pair.one.stop();
    pair.one.start();
    pair.settle(SOON);
    pair.still_mirrors();
    assert!(
        pair.two.share.join("d0/e0/f0").exists(),
        "what was hidden counts as deleted"
    );
    assert!(!pair.two.share.join("d0/of-the-other-filesystem").exists());
    drop(within);
    pair.settle_equal(SOON);

    // Over the share, a directory of the same filesystem.
    let over = Mounted::new(&["--bind", empty.to_str().unwrap()], &pair.one.share).unwrap();
    let reason = pair.one.stopped_because(SOON);
    assert!(
        reason.contains("is another directory than the one that was mirrored"),
        "{reason}"
    );
    pair.one.stop();
    drop(over);
    pair.one.start();
    pair.settle_equal(SOON);
    let mut now = files(&pair.two.share);
    now.retain(|name, _| !name.to_string_lossy().starts_with("still-mirrors-"));
    assert!(now == all, "something was changed");
}

#[test]
fn a_share_that_is_found_empty_is_not_taken_for_deleted() {
    let test = "a_share_that_is_found_empty_is_not_taken_for_deleted";
    let Some(mut pair) = settled_pair(test) else {
        return;
    };
    let all = files(&pair.two.share);
    pair.one.stop();
    empty(&pair.one.share);
    pair.one.start();
    let reason = pair.one.stopped_because(SOON);
    assert!(reason.contains("is empty, and had 2"), "{reason}");
    assert!(
        reason.contains("remove ") && reason.contains("make a file in it"),
        "{reason}"
    );
    assert!(files(&pair.two.share) == all, "something was deleted");
    // One way out: to have it filled again.
    pair.one.stop();
    fs::remove_file(index_of(&pair.one)).unwrap();
    pair.one.start();
    pair.settle_equal(SOON);
    assert!(files(&pair.one.share) == all);
    // The other: it was meant.
    pair.one.stop();
    empty(&pair.one.share);
    fs::write(pair.one.share.join("meant"), "it was meant").unwrap();
    pair.one.start();
    pair.settle_equal(SOON);
    assert_eq!(files(&pair.two.share).len(), 1);
}

/// Removes everything in a folder, as `rm -rf FOLDER/*` does.
fn empty(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
}
