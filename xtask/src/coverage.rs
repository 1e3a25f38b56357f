//! `cargo xtask coverage`: makes every change in guests with each kernel, and
//! writes what was seen to `docs/kernel-support` and `docs/KERNEL-SUPPORT.md`.
//!
//! The tests in `tests/tests/guest_coverage.rs` do it; here they are told to
//! write instead of to compare.

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::shell::run;
use crate::workspace::{self, Profile};
use crate::{build, kernel, setup, vm};

/// # Errors
/// A guest cannot be booted, or a change is not seen and nobody says why.
pub fn main() -> Result<ExitCode> {
    if let Err(reason) = setup::guests(&kernel::NAMES) {
        bail!("guests cannot be booted here: {reason}");
    }
    build::omirr(Profile::Debug)?;
    vm::build_init()?;
    build::cargo_build(Profile::Debug, &["--package", "omirr", "--example", "coverage"])?;
    // The table is made of what the kernels' tests write.
    for tests in ["linux_", "the_table_is_made_of_the_data"] {
        let mut command = workspace::cargo();
        command
            .args([
                "test",
                "--package",
                "omirr-tests",
                "--test",
                "guest_coverage",
                "--target-dir",
            ])
            .arg(workspace::target())
            .args(["--", tests])
            .env("OMIRR_BLESS", "1");
        run(&mut command)?;
    }
    Ok(ExitCode::SUCCESS)
}
