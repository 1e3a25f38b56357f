//! `cargo xtask ci`: the one gate. `.ci/run` calls it.

use std::process::ExitCode;

use anyhow::Result;

use crate::{lint, test};

/// # Errors
/// As soon as one part fails.
pub fn main() -> Result<ExitCode> {
    // The eBPF object first, so that clippy and the tests see one and the same
    // set of sources and nothing is compiled twice.
    crate::build::prepare_bpf()?;
    lint::main(&lint::Options::check())?;
    test::main(&test::Options::all())
}
