//! Thousands of random histories of several nodes, with the real engine in
//! each: partitions, crashes, lost events, wrong clocks. At the end all trees
//! and all indexes must be equal and nobody's work gone.
//!
//! `OMIRR_SIM_RUNS` sets how many, `OMIRR_SIM_FIRST` the first one's seed;
//! `OMIRR_SIM_SEED` runs one and prints all that happens in it.

mod applier;
mod disk;
mod index;
mod node;
mod random;
mod restores;
mod trace;
mod users;
mod world;

use std::collections::BTreeMap;

use omirr::model::RelPath;
use rayon::prelude::*;
use world::World;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const RUNS: u64 = 100_000;

/// What lies strictly beneath `top` in a map, in path order.
fn beneath<'a, T>(
    map: &'a BTreeMap<RelPath, T>,
    top: &'a RelPath,
) -> impl Iterator<Item = (&'a RelPath, &'a T)> {
    // No name is less than this one.
    let first = top.join(b"\x01").unwrap_or_else(|_| top.clone());
    map.range(first..).take_while(move |(at, _)| at.is_within(top))
}

/// The number in an environment variable.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is {text:?}, not a number")),
    )
}

#[test]
fn all_trees_are_equal_in_the_end_and_nothing_is_lost() {
    if let Some(seed) = number("OMIRR_SIM_SEED") {
        let mut world = World::new(seed, true);
        let result = world.run();
        println!("{}", world.trace.text());
        assert_eq!(result, Ok(()), "seed {seed}");
        return;
    }
    let runs = number("OMIRR_SIM_RUNS").unwrap_or(RUNS);
    let first = number("OMIRR_SIM_FIRST").unwrap_or(0);
    let mut failed: Vec<(u64, String)> = (first..first + runs)
        .into_par_iter()
        .filter_map(|seed| {
            // A panic is to be told with its history's seed as well.
            let run = std::panic::catch_unwind(|| World::new(seed, false).run());
            let why = run.unwrap_or_else(|_| Err("panicked".to_owned())).err()?;
            Some((seed, why))
        })
        .collect();
    failed.sort_unstable();
    if let Some((seed, _)) = failed.first() {
        let mut world = World::new(*seed, true);
        let run = std::panic::AssertUnwindSafe(|| world.run());
        let _same = std::panic::catch_unwind(run);
        println!("{}", world.trace.text());
    }
    let failed: Vec<String> = failed
        .iter()
        .map(|(seed, why)| format!("seed {seed}: {why}"))
        .collect();
    assert!(
        failed.is_empty(),
        "{} of {runs} histories failed; OMIRR_SIM_SEED=n runs one again:\n{}",
        failed.len(),
        failed[..failed.len().min(20)].join("\n")
    );
}
