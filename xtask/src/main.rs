//! `cargo xtask`: one command for each thing that is done to this repository.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::{bench, build, ci, coverage, fuzz, lint, run, setup, shell, test, vm};

/// Set up, build, run and test omirr.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or install all that building and testing need
    Setup(setup::Options),
    /// Build the omirr binary with the eBPF program inside
    Build(build::Options),
    /// Without arguments: two nodes mirroring each other on this machine; with arguments: omirr itself
    Run(run::Options),
    /// Set up, build and run every test: unit, simulation, several nodes, guests
    Test(test::Options),
    /// Boot a distribution kernel under QEMU and run a command inside
    ///
    /// The guest has omirr, busybox, ip and tc in its PATH and an empty ext4 file
    /// system on /mnt. Its shell, busybox's, prefers its own commands to those in
    /// PATH: write /sbin/ip for the full one. The exit code is the command's.
    Vm(vm::Options),
    /// Measure omirr beside what one would use instead, in one run
    Bench(bench::Options),
    /// Make every change in guests with each kernel, and write what is seen to docs
    Coverage,
    /// Feed hostile input to everything that reads bytes from elsewhere
    Fuzz(fuzz::Options),
    /// Check formatting and clippy, warnings being errors
    Lint(lint::Options),
    /// All that must hold before a change is taken: lint, test, fuzz
    Ci(ci::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup(options) => setup::main(&options),
        Command::Build(options) => build::main(&options),
        Command::Run(options) => run::main(&options),
        Command::Test(options) => test::main(&options),
        Command::Vm(options) => vm::main(&options),
        Command::Bench(options) => bench::main(&options),
        Command::Coverage => coverage::main(),
        Command::Fuzz(options) => fuzz::main(&options),
        Command::Lint(options) => lint::main(&options),
        Command::Ci(options) => ci::main(&options),
    };
    result.unwrap_or_else(|error| {
        shell::complain(&error);
        ExitCode::FAILURE
    })
}
