//! The command line: which subcommands there are, how they fail, where they
//! print. One file per subcommand; none decides anything about mirroring.
//!
//! Exit codes: 0 success, 1 failure (one sentence on standard error, which
//! starts with `omirr:`), 2 wrong usage.

mod ask;
mod check;
mod conflicts;
mod daemon;
mod doctor;
mod key;
mod log;
mod logging;
mod stats;
mod status;
mod terminal;
mod trace;
mod users;
mod wait;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};

use crate::config::{ConfigErrors, defaults::CONFIG_FILE};

/// Keeps directory trees identical on several Linux servers, continuously
#[derive(Debug, Parser)]
#[command(name = "omirr", version, arg_required_else_help = true)]
#[command(after_help = "Exit codes: 0 success, 1 failure, 2 wrong usage.\n\
    OMIRR_LOG sets what is logged: error, warn, info (default), debug, trace, or by module (info,omirr::net=debug).")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Daemon(daemon::DaemonArgs),
    Check(check::CheckArgs),
    /// Make this node's private key, or show its public key
    Key {
        #[command(subcommand)]
        command: key::KeyCommand,
    },
    Status(status::StatusArgs),
    Stats(stats::StatsArgs),
    Wait(wait::WaitArgs),
    Log(log::LogArgs),
    /// List, look at, restore or discard the copies that conflicts left
    ///
    /// When a file is changed on two nodes at once, the newer version keeps the
    /// name on all nodes. The other one is kept beside it, as
    /// NAME.omirr-conflict-DATE-TIME-NODE.EXTENSION, until somebody decides.
    Conflicts {
        #[command(subcommand)]
        command: conflicts::ConflictsCommand,
    },
    Trace(trace::TraceArgs),
    Doctor(doctor::DoctorArgs),
}

/// `-c FILE`, the same for every subcommand that has it.
#[derive(Clone, Debug, Args)]
struct ConfigFile {
    /// The configuration file
    #[arg(short, long = "config", value_name = "FILE", default_value = CONFIG_FILE)]
    config: PathBuf,
}

/// Runs what the command line says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::start();
    let result = match &cli.command {
        Command::Daemon(args) => daemon::run(args),
        Command::Check(args) => check::run(args),
        Command::Key { command } => key::run(command),
        Command::Status(args) => status::run(args),
        Command::Stats(args) => stats::run(args),
        Command::Wait(args) => wait::run(args),
        Command::Log(args) => log::run(args),
        Command::Conflicts { command } => conflicts::run(command),
        Command::Trace(args) => trace::run(args),
        Command::Doctor(args) => doctor::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => report(&why),
    }
}

/// Prints why a command failed, once, at the top.
fn report(why: &anyhow::Error) -> ExitCode {
    // `omirr status | head`: whoever read has had enough.
    let closed = |why: &io::Error| why.kind() == io::ErrorKind::BrokenPipe;
    if why.downcast_ref::<io::Error>().is_some_and(closed) {
        return ExitCode::SUCCESS;
    }
    let mut text = String::new();
    if let Some(errors) = why.downcast_ref::<ConfigErrors>() {
        for line in errors.lines() {
            text.push_str(&format!("omirr: {}\n", terminal::plain(&line)));
        }
    } else if !why.is::<Silent>() {
        text = format!("omirr: {}\n", terminal::plain(&format!("{why:#}")));
    }
    // Nothing is left to be done if even standard error is closed.
    drop(io::stderr().write_all(text.as_bytes()));
    ExitCode::FAILURE
}

/// A failure of which everything has been said on standard output, as JSON.
#[derive(Debug, thiserror::Error)]
#[error("the failure is on standard output")]
struct Silent;

/// Prints `value` as JSON, for people's eyes too.
fn print_json<T: serde::Serialize>(value: &T) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(serde_json::to_string_pretty(value)?.as_bytes())?;
    out.write_all(b"\n")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_put_together_right() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_has_its_help() {
        let cli = Cli::command();
        let beneath = cli.get_subcommands().flat_map(clap::Command::get_subcommands);
        for command in cli.get_subcommands().chain(beneath) {
            assert!(
                command.get_about().is_some(),
                "{} says nothing",
                command.get_name()
            );
            for argument in command.get_arguments() {
                let name = argument.get_id();
                assert!(
                    argument.get_help().is_some(),
                    "{} {name} says nothing",
                    command.get_name()
                );
            }
        }
    }
}
