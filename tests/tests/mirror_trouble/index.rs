//! A receiver whose index cannot be written.

use std::fs;

use omirr_tests::disk::Disk;
use omirr_tests::nodes::{Node, Pair};

use crate::{SOON, heals, noise};

/// Mounts something of its own at the node's state directory.
fn state_on(disk: &Disk, node: &Node) {
    fs::create_dir(disk.path().join("state")).unwrap();
    std::os::unix::fs::symlink(disk.path().join("state"), node.state_dir()).unwrap();
}

fn stops_because_of_its_index(node: &Node) {
    node.until("the share stops", SOON, || {
        node.status()
            .is_some_and(|status| status["shares"][0]["state"] == "stopped")
    });
    let status = node.status().unwrap();
    let reason = status["shares"][0]["reason"].as_str().unwrap();
    assert!(
        reason.contains("index.redb") && reason.contains("No space left"),
        "{reason}"
    );
    assert!(
        node.status_text().contains("No space left"),
        "{}",
        node.status_text()
    );
}

/// Many rows, so that the index must grow.
fn put_many(pair: &Pair) {
    for dir in 0..40 {
        let dir = pair.one.share.join(format!("{}{dir}", "d".repeat(200)));
        fs::create_dir(&dir).unwrap();
        for n in 0..100 {
            fs::write(dir.join(format!("{}{n}", "n".repeat(200))), "x").unwrap();
        }
    }
}

#[test]
fn a_share_whose_index_has_no_room_stops_and_goes_on_when_there_is_some() {
    const TEST: &str = "an index without room";
    let Some(disk) = Disk::ext4(TEST, 16, &[], "") else {
        return;
    };
    let Some(mut pair) = Pair::running(TEST, |pair| state_on(&disk, &pair.two)) else {
        return;
    };
    pair.one.put("before", "before");
    pair.settle(SOON);
    disk.fill(0);
    put_many(&pair);
    stops_because_of_its_index(&pair.two);
    assert_eq!(pair.one.wait("300ms").status.code(), Some(1));
    disk.free();
    heals(&mut pair);
    pair.still_mirrors();
}

#[test]
fn a_disk_that_is_full_for_share_and_index_loses_nothing() {
    const TEST: &str = "share and index on one full disk";
    let Some(disk) = Disk::ext4(TEST, 48, &[], "") else {
        return;
    };
    let prepare = |pair: &mut Pair| {
        state_on(&disk, &pair.two);
        pair.two.share = disk.path().join("share");
        fs::create_dir(&pair.two.share).unwrap();
    };
    let Some(mut pair) = Pair::running(TEST, prepare) else {
        return;
    };
    pair.one.put("before", "before");
    fs::write(pair.two.share.join("own"), "own").unwrap();
    pair.settle(SOON);
    disk.fill(512);
    fs::write(pair.one.share.join("big"), noise(4 << 20)).unwrap();
    put_many(&pair);
    pair.two.until("the disk is too small", SOON, || {
        let text = pair.two.status_text();
        text.contains("No space left") || text.contains("the disk is full")
    });
    // In the middle of it.
    pair.two.kill();
    assert_eq!(fs::read_to_string(pair.two.share.join("own")).unwrap(), "own");
    disk.free();
    pair.two.start();
    heals(&mut pair);
    assert_eq!(fs::read_to_string(pair.one.share.join("own")).unwrap(), "own");
}
