//! Five nodes, each in a network namespace of its own, in a chain, a ring, a
//! star or a mesh; users change few names on all of them at once, so that they
//! meet, while daemons are killed or stopped and wires cut, slowed, delayed, and
//! lose, double and reorder packets. In the end all trees are the same, by two
//! walks that share no code with the daemon; what only one user wrote is whole
//! everywhere; and what `omirr wait` said was on the peers was there.
//!
//! `OMIRR_FIVE_SEED` runs one history, `OMIRR_FIVE_RUNS` so many from there,
//! `OMIRR_FIVE_SECONDS` says for how long the users are at it. A history depends
//! on timing as well: a seed makes the same changes again, not always the same
//! meeting.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use omirr_tests::crowd::{Crowd, Topology};
use omirr_tests::ends::Ends;
use omirr_tests::nodes::may_mirror;
use omirr_tests::users::{Diary, Rng, user};
use omirr_tests::wires::{self, Quality};

const NODES: usize = 5;
/// Only a hang takes longer, for what users do in 10 s; see [`soon`].
const SOON: Duration = Duration::from_secs(300);
/// How long users pause now and then, at most: five of them share this machine
/// with five daemons.
const PAUSE: Duration = Duration::from_millis(200);

/// The longer users are at it, the more rows are on their way afterwards: one
/// minute leaves up to 50,000 for each node.
fn soon(busy: Duration) -> Duration {
    SOON + busy * 10
}

fn history(seed: u64, busy: Duration) {
    let started = Instant::now();
    let mut rng = Rng(seed);
    let topology = Topology::random(&mut rng);
    let mut crowd = Crowd::new(NODES, topology, rng.next());
    crowd.start();
    crowd.settle(SOON);
    let diaries: Vec<Diary> = crowd.nodes.iter().map(|node| Diary::of(&node.name)).collect();
    let shares: Vec<_> = crowd.nodes.iter().map(|node| node.share.clone()).collect();
    let names: Vec<_> = crowd.nodes.iter().map(|node| node.name.clone()).collect();
    let stop = AtomicBool::new(false);
    let mut told = Told::default();
    std::thread::scope(|scope| {
        // The users end even if what follows panics.
        let _ends = Ends(&stop);
        for node in 0..NODES {
            let (seed, mut pauses) = (rng.next(), Rng(rng.next()));
            let (share, name, diary, stop) = (&shares[node], &names[node], &diaries[node], &stop);
            scope.spawn(move || user(seed, share, name, PAUSE, stop));
            scope.spawn(move || diary.keep(share, stop, || pauses.millis_below(100)));
        }
        let end = Instant::now() + busy;
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50) + rng.millis_below(300));
            accident(&mut crowd, &diaries, &mut rng, &mut told);
        }
    });
    crowd.wires.heal();
    let quiet = Instant::now();
    crowd.settle(soon(busy));
    let settled = quiet.elapsed();
    crowd.assert_equal();
    for (node, share) in crowd.nodes.iter().zip(&shares) {
        let wrong: Vec<_> = diaries.iter().flat_map(|diary| diary.missing_in(share)).collect();
        assert!(
            wrong.is_empty(),
            "on {}:\n{}\n{}",
            node.name,
            wrong.join("\n"),
            crowd.tails()
        );
    }
    let (carried, lost) = crowd.wires.figures();
    let entries: u64 = diaries.iter().map(Diary::written).sum();
    println!(
        "seed {seed}: {topology:?}, {told:?}, {carried} packets, {lost} lost, {entries} entries in diaries, settled after {:.1} s, {:.1} s in all",
        settled.as_secs_f32(),
        started.elapsed().as_secs_f32()
    );
}

/// What happened, for those who read along.
#[derive(Debug, Default)]
struct Told {
    kills: u32,
    stops: u32,
    troubles: u32,
    barriers: u32,
    passed: u32,
    /// Why the others did not.
    held_up: Vec<String>,
}

fn accident(crowd: &mut Crowd, diaries: &[Diary], rng: &mut Rng, told: &mut Told) {
    let node = rng.below(NODES as u64) as usize;
    match rng.below(8) {
        0 => {
            told.kills += 1;
            crowd.nodes[node].kill();
            std::thread::sleep(rng.millis_below(500));
            crowd.nodes[node].start();
        }
        1 => {
            told.stops += 1;
            crowd.nodes[node].stop_reading();
            std::thread::sleep(rng.millis_below(700));
            crowd.nodes[node].go_on();
        }
        2 => {
            told.barriers += 1;
            match waited_for_is_there(crowd, diaries, node) {
                Ok(()) => told.passed += 1,
                Err(why) => told.held_up.push(why),
            }
        }
        _ => {
            told.troubles += 1;
            let pair = crowd.pairs[rng.below(crowd.pairs.len() as u64) as usize];
            crowd.wires.set(pair.0, pair.1, Quality::random(rng));
        }
    }
}

/// If `omirr wait` succeeds in a moment, what the node's user wrote
/// before must be in the peers' trees.
fn waited_for_is_there(crowd: &Crowd, diaries: &[Diary], node: usize) -> Result<(), String> {
    let before = diaries[node].written();
    let done = crowd.nodes[node].wait("3s");
    if !done.status.success() {
        return Err(String::from_utf8_lossy(&done.stderr).trim().to_owned());
    }
    for peer in crowd.peers_of(node) {
        let there = diaries[node].entries_in(&crowd.nodes[peer].share);
        assert!(
            there.is_some_and(|there| there >= before),
            "{} said that {} has {before} entries of the diary, which has {there:?}\n{}",
            crowd.nodes[node].name,
            crowd.nodes[peer].name,
            crowd.tails()
        );
    }
    Ok(())
}

#[test]
fn five_nodes_with_bad_wires_and_killed_daemons_end_in_equal_trees() {
    if !may_mirror(module_path!()) {
        return;
    }
    if let Some(reason) = wires::unavailable() {
        return omirr_tests::skip(module_path!(), &reason);
    }
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse().expect("a number"))
    };
    let seed = number("OMIRR_FIVE_SEED");
    let first = seed.unwrap_or(1);
    let runs = number("OMIRR_FIVE_RUNS").unwrap_or(if seed.is_some() { 1 } else { 2 });
    let busy = Duration::from_secs(number("OMIRR_FIVE_SECONDS").unwrap_or(10));
    for seed in first..first + runs {
        println!("OMIRR_FIVE_SEED={seed}");
        history(seed, busy);
    }
}
