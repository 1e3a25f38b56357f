//! What goes wrong with disks: whatever cannot be done waits and says why, the
//! rest goes on, and it comes right by itself when the cause goes. Two real
//! nodes, and filesystems of the test's own.

mod index;
mod receiver;
mod refusals;
mod sender;

use std::fs;
use std::time::Duration;

use omirr_tests::disk::Disk;
use omirr_tests::nodes::{Node, Pair};

/// The machine may be busy with other tests.
const SOON: Duration = Duration::from_secs(90);

/// A running pair whose second node has its share on a disk of its own.
fn on_disk(test: &str, mib: u64, make: &[&str]) -> Option<(Pair, Disk)> {
    let disk = Disk::ext4(test, mib, make, "")?;
    let pair = running_on(test, &disk, |_| ())?;
    Some((pair, disk))
}

fn running_on(test: &str, disk: &Disk, prepare: impl FnOnce(&mut Pair)) -> Option<Pair> {
    Pair::running(test, |pair| {
        pair.two.share = disk.path().join("share");
        fs::create_dir(&pair.two.share).unwrap();
        prepare(pair);
    })
}

/// Waits until `node` says that `path` waits, for a reason with `why` in it, and
/// checks that a person is told the same, and by `omirr wait` on `asked`, which
/// is the node that `path` was changed on.
fn waits(node: &Node, asked: &Node, path: &str, why: &str) {
    node.until(&format!("'{path}' waits because '{why}'"), SOON, || {
        let Some(status) = node.status() else { return false };
        let share = &status["shares"][0];
        let items = share["pending_items"].as_array().cloned().unwrap_or_default();
        let said = items.iter().any(|item| {
            item["path"] == path
                && item["reason"]
                    .as_str()
                    .is_some_and(|reason| reason.contains(why) && reason.contains(path))
        });
        assert!(share["state"] != "stopped", "{}", node.status_text());
        said && share["pending"].as_u64() > Some(0)
    });
    let text = node.status_text();
    assert!(text.contains(path) && text.contains(why), "{text}");
    let waited = asked.wait("300ms");
    assert_eq!(waited.status.code(), Some(1), "{}", asked.status_text());
}

/// Waits until nothing waits on either node and both trees are the same.
fn heals(pair: &mut Pair) {
    pair.settle_equal(SOON);
    for node in [&pair.one, &pair.two] {
        node.until("nothing waits", SOON, || {
            node.status()
                .is_some_and(|status| status["shares"][0]["pending"] == 0)
        });
        assert_eq!(node.wait("30s").status.code(), Some(0));
    }
}

/// The rest goes on: a new file, a rename and a removal, of what was put by
/// [`put_rest`].
fn rest_goes_on(pair: &Pair) {
    let (one, two) = (&pair.one.share, &pair.two.share);
    fs::rename(one.join("to-rename"), one.join("renamed")).unwrap();
    fs::remove_file(one.join("to-remove")).unwrap();
    pair.one.put("small", "small");
    pair.two.wait_for_file("small", "small", SOON);
    pair.two.wait_for_file("renamed", "rest", SOON);
    pair.two.until("it is removed", SOON, || {
        !two.join("to-remove").exists() && !two.join("to-rename").exists()
    });
}

fn put_rest(pair: &mut Pair) {
    pair.one.put("to-rename", "rest");
    pair.one.put("to-remove", "rest");
    pair.settle(SOON);
}

/// Bytes that nothing makes smaller.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 1u64;
    (0..bytes)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        })
        .collect()
}
