//! A share's directory that goes away under a running daemon: an unmounted
//! filesystem, a directory moved aside. Its emptiness is not a deletion.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use omirr_tests::nodes::{Pair, may_mirror};

const SOON: Duration = Duration::from_secs(60);

/// Names and contents of the files in a directory.
fn files(folder: &Path) -> BTreeMap<String, String> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (
                entry.file_name().into_string().unwrap(),
                fs::read_to_string(entry.path()).unwrap(),
            )
        })
        .collect()
}

fn full_pair(test: &str) -> Option<Pair> {
    if !may_mirror(test) {
        return None;
    }
    let mut pair = Pair::new();
    for n in 0..50 {
        fs::write(pair.one.share.join(format!("file-{n}")), format!("content {n}")).unwrap();
    }
    pair.start();
    pair.still_mirrors();
    pair.settle_equal(SOON);
    Some(pair)
}

#[test]
fn a_root_that_is_moved_away_stops_the_share_and_deletes_nothing() {
    let Some(mut pair) = full_pair("a_root_that_is_moved_away_stops_the_share_and_deletes_nothing") else {
        return;
    };
    let all = files(&pair.two.share);
    let root = pair.one.share.clone();
    let away = root.with_file_name("away");
    fs::rename(&root, &away).unwrap();
    fs::create_dir(&root).unwrap();
    let reason = pair.one.stopped_because(SOON);
    assert_eq!(
        reason,
        format!(
            "'{}' is another directory than the one that was mirrored",
            root.display()
        )
    );
    pair.one
        .wait_for_log(&format!("the share is stopped: {reason}"), SOON);
    assert!(pair.one.is_running(), "{}", pair.one.log_tail());
    let waited = pair.one.wait("100ms");
    assert_eq!(waited.status.code(), Some(1));
    let said = String::from_utf8(waited.stderr).unwrap();
    assert!(said.contains(&reason), "{said}");
    // What is done on either side meanwhile stays where it is.
    fs::write(root.join("stray"), "not of the share").unwrap();
    fs::remove_file(away.join("file-1")).unwrap();
    fs::write(pair.two.share.join("meanwhile"), "meanwhile").unwrap();
    // The peer hears of it, and what it has to send waits.
    pair.two.wait_for_log("is stopped here", SOON);
    assert_eq!(files(&root).len(), 1);

    // A restart does not make the empty directory the share.
    pair.one.stop();
    pair.one.start();
    let reason = pair.one.stopped_because(SOON);
    assert!(
        reason.contains("is not the directory that was mirrored before"),
        "{reason}"
    );
    assert!(
        reason.contains("remove ") && reason.contains("index.redb"),
        "{reason}"
    );
    let mut expected = all.clone();
    expected.insert("meanwhile".to_owned(), "meanwhile".to_owned());
    assert_eq!(files(&pair.two.share), expected);
    assert_eq!(files(&root).len(), 1);

    // Put back, it goes on where it was, with what was changed in it.
    pair.one.stop();
    fs::remove_dir_all(&root).unwrap();
    fs::rename(&away, &root).unwrap();
    pair.one.start();
    pair.still_mirrors();
    pair.settle_equal(SOON);
    expected.remove("file-1");
    let mut now = files(&pair.two.share);
    now.retain(|name, _| !name.starts_with("still-mirrors-") || all.contains_key(name));
    assert_eq!(now, expected);
}

#[test]
fn emptying_a_root_that_was_moved_away_deletes_nothing() {
    let Some(mut pair) = full_pair("emptying_a_root_that_was_moved_away_deletes_nothing") else {
        return;
    };
    let all = files(&pair.two.share);
    let root = pair.one.share.clone();
    let away = root.with_file_name("away");
    fs::rename(&root, &away).unwrap();
    // The daemon still has this directory open, and hears of every deletion.
    for name in all.keys() {
        fs::remove_file(away.join(name)).unwrap();
    }
    fs::remove_dir(&away).unwrap();
    let reason = pair.one.stopped_because(SOON);
    assert_eq!(reason, format!("'{}' does not exist any more", root.display()));
    assert_eq!(files(&pair.two.share), all);

    // Whoever wants the share anew follows what the daemon says: it is filled
    // from the peer.
    fs::create_dir(&root).unwrap();
    pair.one.stop();
    pair.one.start();
    let reason = pair.one.stopped_because(SOON);
    assert!(reason.contains("nothing is deleted"), "{reason}");
    pair.one.stop();
    fs::remove_file(pair.one.state_dir().join("shares/tree/index.redb")).unwrap();
    pair.one.start();
    pair.still_mirrors();
    pair.settle_equal(SOON);
    let mut now = files(&root);
    now.retain(|name, _| all.contains_key(name));
    assert_eq!(now, all);
}
