//! `omirr check`: whether the configuration is right.

use std::{
    io::{self, Write},
    path::Path,
};

use clap::Args;
use serde::Serialize;

use super::{ConfigFile, Silent, print_json};
use crate::config::{Config, Mistake};

/// Say whether the configuration is right: every mistake at once, with its line
///
/// Reads the file, and looks at the key, the state directory and the shares'
/// paths; changes nothing and asks no peer. Exits with 1 if there is a mistake.
#[derive(Clone, Debug, Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// Print the verdict as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Verdict<'c> {
    file: &'c Path,
    ok: bool,
    mistakes: &'c [Mistake],
}

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let file = &args.config.config;
    let loaded = Config::load(file);
    if args.json {
        let mistakes = loaded.as_ref().err().map_or(&[][..], |errors| &errors.mistakes);
        print_json(&Verdict {
            file,
            ok: loaded.is_ok(),
            mistakes,
        })?;
        return if loaded.is_ok() {
            Ok(())
        } else {
            Err(Silent.into())
        };
    }
    let config = loaded?;
    let mut out = io::stdout().lock();
    let counted = |count: usize, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
    writeln!(
        out,
        "{} is right: node {}, {}, {}",
        file.display(),
        config.node.name,
        counted(config.shares.len(), "share"),
        counted(config.peers.len(), "peer"),
    )?;
    Ok(())
}
