//! `cargo xtask lint`: formatting and clippy, a warning being an error.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::shell::{run, say};
use crate::workspace;

/// Check formatting and clippy.
#[derive(Args)]
pub struct Options {
    /// Format the sources instead of complaining
    #[arg(long)]
    fix: bool,
}

impl Options {
    /// Change nothing.
    #[must_use]
    pub fn check() -> Self {
        Self { fix: false }
    }
}

/// # Errors
/// A source is not formatted, or clippy warns.
pub fn main(options: &Options) -> Result<ExitCode> {
    let check: &[&str] = if options.fix { &[] } else { &["--check"] };
    say("formatting");
    run(workspace::cargo().args(["fmt", "--all", "--"]).args(check))?;
    let bpf = workspace::root().join("omirr-ebpf/Cargo.toml");
    if bpf.exists() {
        run(workspace::cargo()
            .args(["fmt", "--manifest-path"])
            .arg(&bpf)
            .arg("--")
            .args(check))?;
    }
    say("clippy");
    run(workspace::cargo()
        .args(["clippy", "--workspace", "--all-targets"])
        .args(["--", "-D", "warnings"]))?;
    Ok(ExitCode::SUCCESS)
}
