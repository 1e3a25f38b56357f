//! The first start beside trees that are there already, of more files than one portion
//! of a comparison, natively between two real nodes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use omirr_tests::nodes::{Node, Pair, copy_all, may_mirror};

const SOON: Duration = Duration::from_secs(120);
/// Far more than are looked at in one pass.
const FILES: usize = 7_500;

/// Files in several folders; each third has a second name in a folder that comes last.
fn make(root: &Path) {
    let last = root.join("z/deep");
    fs::create_dir_all(&last).unwrap();
    for nth in 0..FILES {
        let folder = root.join(format!("{}/{}", nth / 1500, nth / 250));
        if nth % 250 == 0 {
            fs::create_dir_all(&folder).unwrap();
        }
        let file = folder.join(format!("{nth}"));
        fs::write(&file, format!("content {nth}")).unwrap();
        if nth % 3 == 0 {
            fs::hard_link(&file, last.join(format!("{nth}"))).unwrap();
        }
    }
}

/// How many files have both of their names on that node.
fn linked(root: &Path) -> usize {
    let entries = fs::read_dir(root.join("z/deep")).unwrap();
    entries
        .filter(|entry| entry.as_ref().unwrap().metadata().unwrap().nlink() == 2)
        .count()
}

#[test]
fn two_nodes_with_the_same_tree_agree_without_a_conflict() {
    let Some(mut pair) = Pair::running(module_path!(), |pair| {
        make(&pair.one.share);
        // With times and owners.
        fs::remove_dir(&pair.two.share).unwrap();
        copy_all(&pair.one.share, &pair.two.share);
    }) else {
        return;
    };
    pair.settle_equal(SOON);
    for node in [&pair.one, &pair.two] {
        let conflicts = &node.status().unwrap()["shares"][0]["conflicts"];
        assert_eq!(conflicts, 0, "{}", node.log_tail());
        assert_eq!(linked(&node.share), FILES / 3, "on {}", node.name);
    }
}

/// While the first comparison goes on, users go on as well: new names, moved folders and
/// second names, each in parts that were compared already and in some that were not.
#[test]
fn what_changes_during_the_first_comparison_is_not_lost() {
    if !may_mirror(module_path!()) {
        return;
    }
    let mut pair = Pair::new();
    make(&pair.one.share);
    pair.start();
    let root = pair.one.share.clone();
    for nth in 0..200 {
        let (from, to) = (nth % 30, nth % 5);
        fs::create_dir_all(root.join(format!("new/{nth}/beneath"))).unwrap();
        fs::write(root.join(format!("new/{nth}/beneath/file")), "new").unwrap();
        let moved = root.join(format!("{to}/moved{nth}"));
        let folder = root.join(format!("{}/{from}", from / 6));
        if nth < 12 && fs::rename(&folder, &moved).is_ok() {
            fs::write(moved.join("later"), "later").unwrap();
        }
        let old = root.join(format!("z/deep/{}", nth * 3));
        fs::hard_link(&old, root.join(format!("z/third{nth}"))).unwrap();
        if nth % 2 == 0 {
            fs::remove_file(&old).unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    pair.settle_equal(SOON);
    pair.one.kill();
    fs::write(root.join("while it is away"), "x").unwrap();
    pair.one.start();
    pair.settle_equal(SOON);
}

/// Folders of so many files: more than a comparison hands over before it waits.
const FOLDERS: usize = 40;
const FILES_EACH: usize = 1000;

fn folder(root: &Path, nth: usize) -> PathBuf {
    root.join(format!("{nth:02}"))
}

/// In each folder, and first of all that is in it.
const SUBS: [&str; 3] = ["!deleted", "!moved", "!replaced"];

/// Folders with three folders each. A comparison finds all of these before it comes to
/// what is in any, and while it waits for what else it has found to be looked at, their
/// rows go to the peer.
fn make_more_than_waits(root: &Path) {
    for nth in 0..FOLDERS {
        let folder = folder(root, nth);
        for sub in SUBS {
            fs::create_dir_all(folder.join(sub)).unwrap();
            fs::write(folder.join(sub).join("file"), "within").unwrap();
        }
        for nth in 0..FILES_EACH {
            fs::write(folder.join(format!("{nth}")), "").unwrap();
        }
    }
}

/// How many entries are known, and whether more are being found; nothing before the
/// daemon answers.
fn looked_at(node: &Node) -> Option<(usize, bool)> {
    let share = node.status()?["shares"][0].take();
    let entries = usize::try_from(share["entries"].as_u64()?).unwrap();
    Some((entries, share["state"] == "scanning"))
}

/// Waits until so many entries are known, of more. On a machine that is too busy to ask
/// in time it is the end that is waited for: what follows holds as well.
fn wait_for_a_part(node: &Node, least: usize) {
    node.until("a part is looked at", SOON, || {
        looked_at(node).is_some_and(|(entries, more)| {
            if !more && entries > 1 {
                println!("too late for a part: {entries}");
            }
            entries >= least
        })
    });
}

/// A peer has a folder before what is in it, and its user moves it, deletes it, or puts
/// a file in its place.
#[test]
fn what_a_peer_does_with_a_folder_that_is_not_all_there_loses_nothing() {
    if !may_mirror(module_path!()) {
        return;
    }
    let mut pair = Pair::new();
    make_more_than_waits(&pair.one.share);
    pair.start();
    let (one, two) = (pair.one.share.clone(), pair.two.share.clone());
    let mut there = None;
    pair.two.until("the folders are there", SOON, || {
        let is_there = |folder: &PathBuf| SUBS.iter().all(|sub| folder.join(sub).exists());
        there = (0..FOLDERS).find(|&nth| is_there(&folder(&two, nth)));
        there.is_some()
    });
    // Nothing more comes meanwhile.
    pair.one.stop_reading();
    let nth = there.unwrap();
    let theirs = folder(&two, nth);
    fs::rename(theirs.join("!moved"), theirs.join("moved")).unwrap();
    for sub in ["!deleted", "!replaced"] {
        fs::remove_dir(theirs.join(sub)).expect("nothing is in it yet");
    }
    fs::write(theirs.join("!replaced"), "a file now").unwrap();
    assert!(!theirs.join("moved/file").exists(), "nothing is in it yet");
    pair.one.go_on();
    pair.settle_equal(SOON);
    for root in [&one, &two] {
        let folder = folder(root, nth);
        for sub in ["moved", "!deleted", "!replaced"] {
            let content = fs::read_to_string(folder.join(sub).join("file"));
            assert_eq!(content.ok().as_deref(), Some("within"), "in {sub}");
        }
        assert!(!folder.join("!moved").exists());
    }
}

/// Files of long ago, as a restored backup has them, come to be newly found: before and
/// after the daemon is killed and ended half way through, and under a second name that
/// comes long after the first. Versions that a peer has of later win over them.
#[test]
fn what_is_found_in_any_part_of_the_first_comparison_is_as_old_as_it_says() {
    let put = |path: &Path, content: &str, when: SystemTime| {
        fs::write(path, content).unwrap();
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(when)
            .unwrap();
    };
    if !may_mirror(module_path!()) {
        return;
    }
    let mut pair = Pair::new();
    let (one, two) = (pair.one.share.clone(), pair.two.share.clone());
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let an_hour_ago = SystemTime::now() - Duration::from_secs(3600);
    make_more_than_waits(&one);
    for nth in 0..FOLDERS {
        let (here, there) = (folder(&one, nth), folder(&two, nth));
        put(&here.join("!moved/file"), "old", long_ago);
        put(&here.join("linked"), "old", long_ago);
        fs::hard_link(here.join("linked"), here.join("!moved/second")).unwrap();
        fs::create_dir_all(there.join("!moved")).unwrap();
        put(&there.join("!moved/file"), "newer", an_hour_ago);
        put(&there.join("linked"), "newer", an_hour_ago);
    }
    pair.one.start();
    wait_for_a_part(&pair.one, 2000);
    pair.one.kill();
    pair.one.start();
    wait_for_a_part(&pair.one, 6000);
    pair.one.stop();
    pair.one.start();
    // The root and its folders, and what is in each.
    let all = 1 + FOLDERS * (1 + FILES_EACH + 2 * SUBS.len() + 2);
    pair.one.until("all is looked at", SOON, || {
        looked_at(&pair.one) == Some((all, false))
    });
    pair.two.start();
    pair.settle_equal(SOON);
    for root in [&one, &two] {
        for nth in 0..FOLDERS {
            let content = |name: &str| fs::read_to_string(folder(root, nth).join(name)).unwrap();
            assert_eq!(content("!moved/file"), "newer", "in {nth}");
            assert_eq!(content("linked"), "newer", "in {nth}");
            assert_eq!(content("!moved/second"), "old", "in {nth}");
        }
    }
}

/// What waits to be looked at has a limit: without it these took over 200 MB.
#[test]
fn the_memory_of_a_first_comparison_does_not_grow_with_the_tree() {
    if !may_mirror(module_path!()) {
        return;
    }
    let mut pair = Pair::new();
    let made = Command::new("sh")
        .args([
            "-c",
            "for d in $(seq 40); do mkdir $d && (cd $d && touch $(seq 1000)) || exit 1; done",
        ])
        .current_dir(&pair.one.share)
        .status()
        .unwrap();
    assert!(made.success());
    pair.start();
    // It waits for all that was there, though that is not found yet.
    pair.one.settle(SOON);
    pair.assert_equal();
    let status = fs::read_to_string(format!("/proc/{}/status", pair.one.pid())).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("at most {kib} KiB");
    assert!(kib < 130 << 10, "{kib} KiB");
}
