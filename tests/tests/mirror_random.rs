//! Two nodes natively, random changes on both sides at once in few names, so
//! that they meet; nodes are killed and restarted meanwhile. In the end both
//! trees are the same, by a walk that shares no code with the daemon.
//!
//! `OMIRR_RANDOM_SEED` runs one history, `OMIRR_RANDOM_RUNS` so many from there.
//! A history depends on timing as well: a seed makes the same changes again, not
//! always the same meeting.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use omirr_tests::nodes::{Pair, may_mirror};
use omirr_tests::users::{Rng, user};

const SOON: Duration = Duration::from_secs(120);
/// How long users are at it, in each of a history's phases.
const BUSY: Duration = Duration::from_millis(1500);
/// How long users pause now and then, at most.
const PAUSE: Duration = Duration::from_millis(30);

fn history(seed: u64) {
    let mut rng = Rng(seed);
    let mut pair = Pair::new();
    pair.start();
    pair.settle(SOON);
    for phase in 0..3 {
        let stop = AtomicBool::new(false);
        let (one, two) = (pair.one.share.clone(), pair.two.share.clone());
        let seeds = [rng.next(), rng.next()];
        std::thread::scope(|scope| {
            scope.spawn(|| user(seeds[0], &one, "one", PAUSE, &stop));
            scope.spawn(|| user(seeds[1], &two, "two", PAUSE, &stop));
            let end = Instant::now() + BUSY;
            while Instant::now() < end {
                std::thread::sleep(Duration::from_millis(100 + rng.below(400)));
                let node = if rng.below(2) == 0 {
                    &mut pair.one
                } else {
                    &mut pair.two
                };
                // The first phase is without accidents.
                match rng.below(3) {
                    0 if phase > 0 => {
                        node.kill();
                        std::thread::sleep(Duration::from_millis(rng.below(300)));
                        node.start();
                    }
                    1 if phase > 0 => {
                        node.stop_reading();
                        std::thread::sleep(Duration::from_millis(rng.below(300)));
                        node.go_on();
                    }
                    _ => {}
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        settle(&mut pair);
        pair.assert_equal();
    }
}

/// Waits until nothing is on its way. Conflicts that are found on one side may
/// lead to others on the other side, but not for ever.
fn settle(pair: &mut Pair) {
    let rows = |pair: &Pair| {
        [&pair.one, &pair.two].map(|node| {
            let stats = node.stats();
            ["rows_made", "rows_applied"].map(|figure| stats["shares"][0][figure].as_u64())
        })
    };
    pair.settle(SOON);
    for _ in 0..20 {
        let before = rows(pair);
        pair.settle(SOON);
        if rows(pair) == before {
            return;
        }
    }
    panic!(
        "rows are made though nobody changes anything\n{}\n{}",
        pair.one.log_tail(),
        pair.two.log_tail()
    );
}

#[test]
fn random_changes_on_both_sides_end_in_equal_trees() {
    if !may_mirror(module_path!()) {
        return;
    }
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse().expect("a number"))
    };
    let seed = number("OMIRR_RANDOM_SEED");
    let first = seed.unwrap_or(1);
    let runs = number("OMIRR_RANDOM_RUNS").unwrap_or(if seed.is_some() { 1 } else { 3 });
    for seed in first..first + runs {
        println!("OMIRR_RANDOM_SEED={seed}");
        history(seed);
    }
}
