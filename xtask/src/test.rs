//! `cargo xtask test`: sets up, builds, runs every test and counts.
//!
//! All tests are cargo's: unit and simulation beside the code, several real
//! nodes and the guests in `tests/tests`. A test that cannot run here says why
//! through the file named by `OMIRR_SKIPS`; where guests cannot be had,
//! `OMIRR_SKIP_GUESTS` carries the reason to them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use crate::shell::{describe, say};
use crate::workspace::{self, Profile};
use crate::{build, kernel, setup, vm};

/// Run every test.
#[derive(Args)]
pub struct Options {
    /// Leave out the tests that boot guests
    #[arg(long)]
    no_guests: bool,
    /// Each at its full size, with a release build: takes hours
    #[arg(long)]
    long: bool,
    /// Only tests whose names contain this
    filter: Option<String>,
}

/// What the tests are asked for by `--long`, unless the environment says
/// otherwise.
const LONG: [(&str, &str); 8] = [
    ("OMIRR_EXACT_ENTRIES", "1000000"),
    ("OMIRR_FIVE_RUNS", "20"),
    ("OMIRR_FIVE_SECONDS", "60"),
    ("OMIRR_FLOOD_FILES", "100000"),
    ("OMIRR_POWER_CUTS", "20"),
    ("OMIRR_RANDOM_RUNS", "100"),
    ("OMIRR_SIM_RUNS", "1000000"),
    ("OMIRR_TREE_ENTRIES", "100000"),
];

impl Options {
    /// Every test; `long` as `--long`.
    #[must_use]
    pub fn all(long: bool) -> Self {
        Self {
            no_guests: false,
            long,
            filter: None,
        }
    }
}

/// # Errors
/// Something cannot be set up or built.
pub fn main(options: &Options) -> Result<ExitCode> {
    let started = Instant::now();
    let no_guests = if options.no_guests {
        Some("left out by --no-guests".to_owned())
    } else {
        setup::guests(&kernel::NAMES).err()
    };
    if let Some(reason) = &no_guests {
        say(format!("guest tests are skipped: {reason}"));
    }
    setup::test_tools();
    let omirr = build::omirr(Profile::from_release_flag(options.long))?;
    vm::build_init()?;

    let skips = workspace::target().join("skips");
    fs::write(&skips, "").with_context(|| format!("{} cannot be written", skips.display()))?;
    let mut command = workspace::cargo();
    command
        .args(["test", "--workspace", "--no-fail-fast", "--target-dir"])
        .arg(workspace::target())
        .env("OMIRR_BIN", &omirr)
        .env("OMIRR_SKIPS", &skips)
        .stdout(Stdio::piped());
    if let Some(reason) = &no_guests {
        command.env("OMIRR_SKIP_GUESTS", reason);
    }
    for (name, value) in LONG {
        if options.long && std::env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
    command.arg("--");
    if options.long {
        // A release build cannot be made to die; the shorter run tries that.
        command.args(["--skip", "a_daemon_may_die_after_any_write"]);
    }
    if let Some(filter) = &options.filter {
        command.arg(filter);
    }
    say(format!("running {}", describe(&command)));
    let mut child = command.spawn().context("cargo cannot be started")?;
    let mut count = Count::default();
    let mut stdout = std::io::stdout();
    for line in BufReader::new(child.stdout.take().context("stdout is piped")?).split(b'\n') {
        let mut line = line.context("the tests' output cannot be read")?;
        count.add(&String::from_utf8_lossy(&line));
        line.push(b'\n');
        // Whoever closed our stdout still wants the tests to end.
        let _ = stdout.write_all(&line);
    }
    let status = child.wait().context("cargo cannot be waited for")?;

    let reasons = fs::read_to_string(&skips).unwrap_or_default();
    for reason in reasons.lines() {
        say(format!("skipped {reason}"));
    }
    for name in &count.failures {
        say(format!("failed {name}"));
    }
    // To libtest a skipped test is one that passed.
    let skipped = reasons.lines().count();
    println!(
        "{} passed, {} failed, {} skipped, in {} s",
        count.passed.saturating_sub(skipped),
        count.failed,
        skipped + count.ignored,
        started.elapsed().as_secs()
    );
    if !status.success() && count.failed == 0 {
        say(format!("`{}` failed ({status})", describe(&command)));
    }
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What libtest's own lines add up to.
#[derive(Default)]
struct Count {
    passed: usize,
    failed: usize,
    ignored: usize,
    failures: Vec<String>,
}

impl Count {
    fn add(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            let number = |what: &str| -> usize {
                let before = result
                    .split([';', '.'])
                    .find_map(|part| part.trim().strip_suffix(what));
                before.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
            };
            self.passed += number("passed");
            self.failed += number("failed");
            self.ignored += number("ignored");
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtests_lines_are_added_up() {
        let mut count = Count::default();
        for line in [
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 7 filtered out; finished in 0.00s",
        ] {
            count.add(line);
        }
        assert_eq!((count.passed, count.failed, count.ignored), (17, 1, 2));
        assert_eq!(count.failures, ["a::c"]);
    }
}
