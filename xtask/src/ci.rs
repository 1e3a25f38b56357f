//! `cargo xtask ci`: the one gate. `.ci/run` calls it.

use std::process::ExitCode;

use anyhow::Result;

use crate::{fuzz, lint, test};

/// How long each target is fuzzed. More is for a machine that has the time.
const FUZZ_SECONDS: u32 = 60;

/// # Errors
/// As soon as one part fails.
pub fn main() -> Result<ExitCode> {
    // The eBPF object first, so that clippy and the tests see one and the same
    // set of sources and nothing is compiled twice.
    crate::build::prepare_bpf()?;
    lint::main(&lint::Options::check())?;
    let tested = test::main(&test::Options::all())?;
    // After everything else is built: the libraries are taken from there.
    fuzz::main(&fuzz::Options::all(FUZZ_SECONDS))?;
    Ok(tested)
}
