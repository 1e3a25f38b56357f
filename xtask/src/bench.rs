//! `cargo xtask bench`: omirr beside rsync on this machine, in one run.
//!
//! The work is done by the `bench` program of `omirr-tests`; this command sets
//! up what it needs and builds both for release.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::shell::{run, say};
use crate::workspace::{self, Profile};
use crate::{build, setup};

/// Measure omirr beside rsync.
#[derive(Args)]
pub struct Options {
    /// What is handed to the bench program; `--help` tells
    #[arg(last = true)]
    args: Vec<String>,
}

/// # Errors
/// Something cannot be set up, built or run.
pub fn main(options: &Options) -> Result<ExitCode> {
    setup::test_tools();
    let omirr = build::omirr(Profile::Release)?;
    say("measuring; nothing else should run meanwhile");
    run(workspace::cargo()
        .args([
            "run",
            "--quiet",
            "--release",
            "--package",
            "omirr-tests",
            "--bin",
            "bench",
            "--",
        ])
        .args(&options.args)
        .env("OMIRR_BIN", omirr))?;
    Ok(ExitCode::SUCCESS)
}
