//! `cargo xtask lint`: formatting and clippy, a warning being an error.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::shell::{run, say};
use crate::{fuzz, workspace};

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
    let targets = fuzz::manifest();
    for apart in [&bpf, &targets] {
        run(workspace::cargo()
            .args(["fmt", "--manifest-path"])
            .arg(apart)
            .arg("--")
            .args(check))?;
    }
    say("clippy");
    let deny = ["--", "-D", "warnings"];
    run(workspace::cargo()
        .args(["clippy", "--workspace", "--all-targets"])
        .args(deny))?;
    // `cargo xtask fuzz` compiles them otherwise, so they would go stale unseen.
    run(workspace::cargo()
        .args(["clippy", "--bins", "--manifest-path"])
        .arg(&targets)
        .arg("--target-dir")
        .arg(workspace::target())
        .args(deny))?;
    Ok(ExitCode::SUCCESS)
}
