//! `cargo xtask bench`: omirr beside what one would use instead, in one run.
//!
//! The work is done by the `bench` program of `omirr-tests`; this command sets
//! up what it needs and builds both for release.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::shell::{run, say};
use crate::workspace::{self, Profile};
use crate::{build, setup};

/// Measure omirr beside what one would use instead.
#[derive(Args)]
#[command(disable_help_flag = true)]
pub struct Options {
    /// What is handed to the bench program; `--help` tells
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Arguments with which nothing is measured.
const ONLY_WORDS: [&str; 4] = ["--help", "-h", "--list", "--report-only"];

/// # Errors
/// Something cannot be set up, built or run.
pub fn main(options: &Options) -> Result<ExitCode> {
    let mut command = workspace::cargo();
    command.args([
        "run",
        "--quiet",
        "--release",
        "--package",
        "omirr-tests",
        "--bin",
        "bench",
        "--",
    ]);
    command.args(&options.args);
    if !options
        .args
        .iter()
        .any(|word| ONLY_WORDS.contains(&word.as_str()))
    {
        setup::bench_tools();
        command.env("OMIRR_BIN", build::omirr(Profile::Release)?);
        say("measuring; nothing else should run meanwhile");
    }
    run(&mut command)?;
    Ok(ExitCode::SUCCESS)
}
