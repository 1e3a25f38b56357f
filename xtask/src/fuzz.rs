//! `cargo xtask fuzz`: hostile input for everything that reads bytes from
//! elsewhere, mutated by libFuzzer.
//!
//! The targets are in `tests/fuzz`, a workspace of its own. They and the daemon's
//! code are compiled with the compiler's coverage counters, which any rustc can
//! do; the libraries are those of every other build. What libFuzzer learns is kept in the cache and is the start of the next run; what is in the
//! repository is only what the real code writes. A crash's input is kept in
//! `target/fuzz/artifacts`, with the command that shows it again.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::shell::{run, say};
use crate::workspace;

/// Everything that has a target, the slowest first.
const TARGETS: [&str; 6] = ["index", "rows", "message", "config", "btf", "frame"];
/// One input may take so long, seconds; more counts as endless.
const INPUT_SECONDS: u32 = 20;
/// One target may take so much memory, MiB: decoding may claim 48, twice over.
const MEMORY_MIB: u32 = 1024;

/// Feed hostile input to everything that reads bytes from elsewhere.
#[derive(Args)]
pub struct Options {
    /// Only this one: frame, message, rows, index, config or btf
    target: Option<String>,
    /// How long each of them runs; two run at a time
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Make anew what the targets begin with, from the code that writes it
    #[arg(long)]
    seeds: bool,
}

impl Options {
    /// All of them, for so long each.
    #[must_use]
    pub fn all(seconds: u32) -> Self {
        Self {
            target: None,
            seconds,
            seeds: false,
        }
    }
}

/// # Errors
/// Something cannot be built, or an input was found that breaks a target.
pub fn main(options: &Options) -> Result<ExitCode> {
    let wanted: Vec<&str> = match &options.target {
        None => TARGETS.to_vec(),
        Some(name) => match TARGETS.iter().find(|known| *known == name) {
            Some(known) => vec![*known],
            None => bail!("there is no target {name}, only {}", TARGETS.join(", ")),
        },
    };
    if options.seeds || !fuzz().join("seeds").exists() {
        make_seeds()?;
    }
    if workspace::which("c++").is_none() {
        crate::apt::install(&["g++"], "compiling libFuzzer")?;
    }
    build()?;
    let mut waiting = wanted.into_iter();
    let mut running: Vec<Running> = Vec::new();
    let mut failed = Vec::new();
    loop {
        while running.len() < 2
            && let Some(target) = waiting.next()
        {
            running.push(Running::start(target, options.seconds)?);
        }
        if running.is_empty() {
            break;
        }
        let mut left = Vec::new();
        for mut one in running {
            match one.child.try_wait().context("a target cannot be waited for")? {
                None => left.push(one),
                Some(status) if status.success() => one.report(),
                Some(_) => {
                    one.complain();
                    failed.push(one.target);
                }
            }
        }
        running = left;
        std::thread::sleep(Duration::from_millis(200));
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    bail!("broken by some input: {}", failed.join(", "))
}

fn fuzz() -> PathBuf {
    workspace::root().join("tests/fuzz")
}

/// Of the workspace of the targets.
pub fn manifest() -> PathBuf {
    fuzz().join("Cargo.toml")
}

/// Logs, and inputs that broke something.
fn built() -> PathBuf {
    workspace::target().join("fuzz")
}

fn program(target: &str) -> PathBuf {
    workspace::binaries(workspace::Profile::Debug).join(format!("fuzz-{target}"))
}

fn make_seeds() -> Result<()> {
    run(workspace::cargo()
        .args([
            "run",
            "-q",
            "-p",
            "omirr",
            "--example",
            "fuzz_seeds",
            "--target-dir",
        ])
        .arg(workspace::target())
        .arg(fuzz().join("seeds")))
}

fn build() -> Result<()> {
    run(workspace::cargo()
        .args(["build", "--bins", "--manifest-path"])
        .arg(manifest())
        .arg("--target-dir")
        .arg(workspace::target())
        .env("RUSTC_WRAPPER", fuzz().join("rustc-with-counters")))
}

struct Running {
    target: &'static str,
    child: Child,
    log: PathBuf,
    artifacts: PathBuf,
    /// In case libFuzzer itself does not look at the clock any more.
    started: Instant,
}

impl Running {
    fn start(target: &'static str, seconds: u32) -> Result<Running> {
        let corpus = workspace::cache().join("fuzz").join(target);
        let artifacts = built().join("artifacts").join(target);
        for folder in [&corpus, &artifacts] {
            fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        }
        let log = built().join(format!("{target}.log"));
        let file = File::create(&log).with_context(|| format!("{} cannot be made", log.display()))?;
        let mut command = Command::new(program(target));
        command
            .arg(&corpus)
            .arg(fuzz().join("seeds").join(target))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-timeout={INPUT_SECONDS}"))
            .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .args(["-print_final_stats=1", "-max_len=65536"])
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("a descriptor cannot be copied")?)
            .stderr(file);
        let child = command.spawn().context("a target cannot be started")?;
        say(format!("fuzzing {target} for {seconds} s"));
        Ok(Running {
            target,
            child,
            log,
            artifacts,
            started: Instant::now(),
        })
    }

    fn report(&self) {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let runs = log
            .lines()
            .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
            .unwrap_or(" ?");
        say(format!(
            "{}:{runs} inputs in {} s, none breaks it",
            self.target,
            self.started.elapsed().as_secs()
        ));
    }

    fn complain(&self) {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        println!("{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        say(format!(
            "{}: the input is in {}; to see it again: {} INPUT",
            self.target,
            self.artifacts.display(),
            program(self.target).display()
        ));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It is this process's own, and most often it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
