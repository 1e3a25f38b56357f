//! Thousands of random histories of several nodes, with the real engine in
//! each: partitions, crashes, lost events, wrong clocks. At the end all trees
//! and all indexes must be equal and nobody's work gone.
//!
//! `OMIRR_SIM_RUNS` sets how many; `OMIRR_SIM_SEED` runs one and prints it all.

mod disk;
mod index;
mod node;
mod random;
mod users;
mod world;

use world::World;

const RUNS: u64 = 3000;

#[test]
fn all_trees_are_equal_in_the_end_and_nothing_is_lost() {
    if let Ok(seed) = std::env::var("OMIRR_SIM_SEED") {
        let seed: u64 = seed.parse().expect("OMIRR_SIM_SEED is a number");
        let mut world = World::new(seed);
        let result = world.run();
        println!("{}", world.trace.join("\n"));
        assert_eq!(result, Ok(()), "seed {seed}");
        return;
    }
    let runs = match std::env::var("OMIRR_SIM_RUNS") {
        Ok(runs) => runs.parse().expect("OMIRR_SIM_RUNS is a number"),
        Err(_) => RUNS,
    };
    let mut failed = Vec::new();
    for seed in 0..runs {
        let mut world = World::new(seed);
        if let Err(why) = world.run() {
            if failed.is_empty() {
                println!("{}", world.trace.join("\n"));
            }
            failed.push(format!("seed {seed}: {why}"));
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {runs} histories failed; OMIRR_SIM_SEED=n runs one again:\n{}",
        failed.len(),
        failed[..failed.len().min(20)].join("\n")
    );
}
