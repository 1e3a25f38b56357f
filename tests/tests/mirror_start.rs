//! The first start beside trees that are there already, of more files than one portion
//! of a comparison, natively between two real nodes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use omirr_tests::nodes::{Pair, copy_all, may_mirror};

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
