//! Who takes part: directions of a share, peers that come and go while daemons
//! run, deletions that everybody has.

use std::fs;
use std::time::Duration;

use omirr_tests::nodes::{Node, Pair, may_mirror};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// What `status --json` says of a node's peer.
fn peer(node: &Node, name: &str) -> Option<Value> {
    let status = node.status()?;
    let peers = status["shares"][0]["peers"].as_array()?;
    peers.iter().find(|peer| peer["name"] == name).cloned()
}

fn share(node: &Node) -> Value {
    node.status()
        .map_or(Value::Null, |status| status["shares"][0].clone())
}

#[test]
fn a_node_that_only_sends_takes_nothing_and_the_peer_is_told() {
    if !may_mirror(module_path!()) {
        return;
    }
    let mut pair = Pair::new();
    pair.one.share_options = "mode = \"send\"".to_owned();
    pair.one.start();
    pair.two.start();
    pair.one.put("from-one", "a");
    pair.two.wait_for_file("from-one", "a", SOON);
    pair.two.put("from-two", "b");
    pair.two.put("from-one", "changed on two");
    pair.two
        .until("two is told why nothing of it is taken", SOON, || {
            let error = peer(&pair.two, "one").map_or(Value::Null, |peer| peer["last_error"].clone());
            error
                .as_str()
                .is_some_and(|error| error.contains("one only sends share tree") && error.contains("mode"))
        });
    let waited = pair.two.wait("1s");
    assert_eq!(waited.status.code(), Some(1), "two has sent nothing");
    assert_eq!(peer(&pair.one, "two").unwrap()["mode"], "send");
    pair.one.settle(SOON);
    assert!(!pair.one.share.join("from-two").exists());
    assert_eq!(fs::read(pair.one.share.join("from-one")).unwrap(), b"a");
    // The next change on the sending side wins, and what two had is kept there.
    pair.one.put("from-one", "newer");
    pair.two.wait_for_file("from-one", "newer", SOON);
    let kept = fs::read_dir(&pair.two.share)
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().contains("omirr-conflict")
        })
        .count();
    assert_eq!(kept, 1, "what was changed on two is kept beside it");
}

#[test]
fn a_node_that_only_receives_sends_nothing_and_is_in_sync() {
    if !may_mirror(module_path!()) {
        return;
    }
    let mut pair = Pair::new();
    pair.two.share_options = "modes = { one = \"receive\" }".to_owned();
    pair.one.start();
    pair.two.start();
    pair.one.put("from-one", "a");
    pair.one.settle(SOON);
    assert_eq!(fs::read(pair.two.share.join("from-one")).unwrap(), b"a");
    pair.two.put("from-two", "b");
    pair.two.settle(SOON);
    pair.two
        .until("two is in sync", SOON, || share(&pair.two)["state"] == "in-sync");
    let one = peer(&pair.two, "one").unwrap();
    assert_eq!(
        (&one["mode"], &one["state"]),
        (&"receive".into(), &"connected".into())
    );
    assert!(pair.two.status_text().contains("connected, receive only"));
    // Had it sent anything, it would have come before this.
    pair.one.put("last", "c");
    pair.one.settle(SOON);
    assert!(!pair.one.share.join("from-two").exists());
}

/// A third node that knows the first one.
fn third(pair: &Pair) -> Node {
    let mut three = Node::new(pair.one.folder.parent().expect("nodes lie in a folder"), "three");
    three.knows(&pair.one);
    three
}

#[test]
fn a_peer_joins_and_leaves_while_the_daemon_runs() {
    let Some(mut pair) = Pair::running(module_path!(), |_| ()) else {
        return;
    };
    pair.one.put("before", "a");
    pair.two.put("on-two", "b");
    pair.settle(SOON);
    let mut three = third(&pair);
    three.start();
    three.until("three is told that nobody knows it", SOON, || {
        peer(&three, "one").is_some_and(|one| one["last_error"].is_string())
    });
    assert!(!three.share.join("before").exists());

    let pid = pair.one.pid();
    pair.one.knows(&three);
    pair.one.write_config();
    pair.one.hang_up();
    three.wait_for_file("before", "a", SOON);
    three.wait_for_file("on-two", "b", SOON);
    three.put("on-three", "c");
    // By way of the first, which alone knows both.
    pair.two.wait_for_file("on-three", "c", SOON);
    pair.one.settle(SOON);
    three.settle(SOON);

    pair.one.peers.retain(|(name, _, _)| name != "three");
    pair.one.write_config();
    pair.one.hang_up();
    pair.one.until("one has left three out", SOON, || {
        pair.one.status().is_some() && peer(&pair.one, "three").is_none()
    });
    pair.one.put("after", "d");
    pair.two.wait_for_file("after", "d", SOON);
    three.put("after-on-three", "e");
    three.until("three is told that it is no longer known", SOON, || {
        peer(&three, "one").is_some_and(|one| one["state"] == "connecting" && one["last_error"].is_string())
    });
    assert!(!three.share.join("after").exists());
    pair.settle(SOON);
    assert!(!pair.one.share.join("after-on-three").exists());
    assert!(
        three.share.join("before").exists(),
        "who leaves keeps what it has"
    );
    assert_eq!(pair.one.pid(), pid);
    assert!(pair.one.is_running());
}

/// Deleted paths that the node remembers.
fn tombstones(node: &Node) -> Option<u64> {
    share(node)["tombstones"].as_u64()
}

#[test]
fn a_deletion_is_remembered_until_every_peer_knows_of_it_and_no_longer() {
    let Some(mut pair) = Pair::running(module_path!(), |_| ()) else {
        return;
    };
    for number in 0..20 {
        pair.one.put(&format!("file-{number}"), "x");
    }
    pair.one.put("stays", "x");
    pair.settle(SOON);
    pair.two.stop();
    for number in 0..20 {
        fs::remove_file(pair.one.share.join(format!("file-{number}"))).unwrap();
    }
    pair.one.until("one has noticed what was deleted", SOON, || {
        tombstones(&pair.one) == Some(20)
    });
    // The peer is away: they stay, over a restart and for longer than it takes
    // until a node with nothing to do looks for what it may forget.
    pair.one.stop();
    pair.one.start();
    std::thread::sleep(Duration::from_secs(5));
    pair.one
        .until("one is up again", SOON, || tombstones(&pair.one).is_some());
    assert_eq!(tombstones(&pair.one), Some(20));
    pair.two.start();
    pair.settle(SOON);
    assert!(!pair.two.share.join("file-3").exists());
    for node in [&pair.one, &pair.two] {
        node.until("nobody needs them any more", SOON, || tombstones(node) == Some(0));
    }
    // What comes back under the same name is not taken for the deleted one, on
    // either side and whenever it was written.
    let old = pair.one.folder.join("old");
    fs::write(&old, "from long ago").unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(86_400);
    fs::File::options()
        .write(true)
        .open(&old)
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    pair.two.stop();
    fs::rename(&old, pair.two.share.join("file-3")).unwrap();
    pair.two.start();
    pair.one.wait_for_file("file-3", "from long ago", SOON);
    pair.settle(SOON);
}
