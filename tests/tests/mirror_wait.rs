//! What `omirr wait` promises while the same files change again and again: when it
//! returns, what was written before it was asked is at the peers, or something
//! newer; being past its number is not enough.

use std::fs;
use std::time::Duration;

use omirr_tests::crowd::{Crowd, Topology};
use omirr_tests::nodes::{Pair, may_mirror};
use omirr_tests::users::Rng;
use omirr_tests::wires::{self, Quality};

const SOON: Duration = Duration::from_secs(120);
/// More rows than a batch has, of contents that take the peer some time.
const OTHERS: usize = 4000;
const OTHERS_BYTES: usize = 30_000;

/// A file whose row has gone on behind all others by the time the peer comes.
#[test]
fn what_has_changed_since_must_be_there_too() {
    let Some(mut pair) = Pair::running(module_path!(), |pair| {
        fs::write(pair.one.share.join("diary"), "").unwrap();
    }) else {
        return;
    };
    pair.two.stop();
    let (share, copy) = (pair.one.share.clone(), pair.two.share.clone());
    fs::write(share.join("diary"), "first entry\n").unwrap();
    std::thread::scope(|scope| {
        let one = &pair.one;
        let waited = scope.spawn(move || {
            let done = one.wait("120s");
            (done, fs::read_to_string(copy.join("diary")).unwrap())
        });
        std::thread::sleep(Duration::from_secs(1));
        for n in 0..OTHERS {
            fs::write(share.join(format!("other-{n}")), vec![n as u8; OTHERS_BYTES]).unwrap();
        }
        fs::write(share.join("diary"), "first entry\nsecond entry\n").unwrap();
        // Until these are rows, too.
        let rows_made = || one.stats()["shares"][0]["rows_made"].as_u64().unwrap();
        one.until("all are rows", SOON, || rows_made() > OTHERS as u64);
        pair.two.start();
        let (done, there) = waited.join().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(there.starts_with("first entry\n"), "the peer has {there:?}");
    });
    pair.settle_equal(SOON);
}

/// A file that changes while its content is on its way.
#[test]
fn a_content_that_changes_on_its_way_must_arrive_all_the_same() {
    if !may_mirror(module_path!()) {
        return;
    }
    if let Some(reason) = wires::unavailable() {
        return omirr_tests::skip(module_path!(), &reason);
    }
    let mut crowd = Crowd::new(2, Topology::Mesh, 1);
    crowd.start();
    crowd.settle(SOON);
    let slow = Quality {
        bytes_per_second: Some(400_000),
        ..Quality::GOOD
    };
    crowd.wires.set(0, 1, slow);
    let (file, copy) = (
        crowd.nodes[0].share.join("large"),
        crowd.nodes[1].share.join("large"),
    );
    let mut rng = Rng(1);
    let noise: Vec<u8> = (0..1_500_000).map(|_| rng.next() as u8).collect();
    fs::write(&file, &noise).unwrap();
    std::thread::scope(|scope| {
        let one = &crowd.nodes[0];
        let waited = scope.spawn(move || (one.wait("120s"), copy.exists()));
        for n in 0..4u8 {
            std::thread::sleep(Duration::from_millis(700));
            // Replaced: what was sent of the old one is of no use.
            let new: Vec<u8> = noise.iter().map(|byte| byte ^ (n + 1)).collect();
            fs::write(file.with_extension("new"), &new).unwrap();
            fs::rename(file.with_extension("new"), &file).unwrap();
        }
        let (done, there) = waited.join().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(there, "the peer has no file");
    });
    crowd.wires.heal();
    crowd.settle(SOON);
    crowd.assert_equal();
}
