//! `cargo xtask ci`: the one gate. `.ci/run` calls it.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::{fuzz, lint, test};

/// How long each target is fuzzed.
const FUZZ_SECONDS: u32 = 60;

/// All that must hold before a change is taken.
#[derive(Args)]
pub struct Options {
    /// The longer job: each test at its full size, with a release build, and ten
    /// minutes of fuzzing each; takes hours
    #[arg(long)]
    long: bool,
}

/// # Errors
/// As soon as one part fails.
pub fn main(options: &Options) -> Result<ExitCode> {
    // The eBPF object first, so that clippy and the tests see one and the same
    // set of sources and nothing is compiled twice.
    crate::build::prepare_bpf()?;
    lint::main(&lint::Options::check())?;
    let tested = test::main(&test::Options::all(options.long))?;
    // After everything else is built: the libraries are taken from there.
    let seconds = if options.long {
        10 * FUZZ_SECONDS
    } else {
        FUZZ_SECONDS
    };
    fuzz::main(&fuzz::Options::all(seconds))?;
    Ok(tested)
}
