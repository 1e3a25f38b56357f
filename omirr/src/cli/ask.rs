//! What the commands have in common that ask the daemon and print the answer, as
//! JSON or for people, once or each second.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use serde::{Serialize, de::DeserializeOwned};

use super::{
    ConfigFile, print_json,
    terminal::{self, Paint},
};
use crate::{
    config,
    daemon::control::{CallError, Request, client::Client},
};

/// How long the daemon has to answer; it needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
const REPAINT: Duration = Duration::from_secs(1);
/// Cursor to the corner; after the text, clear what the last one left.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";
const CLEAR_ALL: &str = "\x1b[2J";

#[derive(Clone, Debug, Args)]
pub(super) struct ReportArgs {
    #[command(flatten)]
    pub(super) config: ConfigFile,
    /// Print JSON; with --watch, one object a line
    #[arg(long)]
    json: bool,
    /// Print again each second, until Ctrl-C
    #[arg(long)]
    watch: bool,
}

/// The way to the daemon that has this configuration.
pub(super) fn client(config: &Path) -> anyhow::Result<Client> {
    let state_dir = config::state_dir_of(config).map_err(anyhow::Error::msg)?;
    Ok(Client::new(&state_dir, config))
}

/// A runtime for one conversation.
pub(super) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?
        .block_on(work)
}

/// Asks `request` once.
pub(super) fn once<T: DeserializeOwned>(config: &ConfigFile, request: &Request) -> anyhow::Result<T> {
    let client = client(&config.config)?;
    block_on(async { Ok(client.call(request, PATIENCE).await?) })
}

/// Asks `request` and prints what comes, by `render` for people.
pub(super) fn print<T: Serialize + DeserializeOwned>(
    args: &ReportArgs,
    request: &Request,
    render: impl Fn(&T, Paint, &mut String),
) -> anyhow::Result<()> {
    let client = client(&args.config.config)?;
    block_on(async {
        // A daemon that is not there at the first question is a failure; one
        // that goes away while it is watched will come back.
        let mut answer: Result<T, CallError> = Ok(client.call(request, PATIENCE).await?);
        if !args.watch {
            return print_once(args, &answer?, &render);
        }
        let screen = !args.json && io::stdout().is_terminal();
        if screen {
            write_out(CLEAR_ALL)?;
        }
        let mut ticks = tokio::time::interval(REPAINT);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
        loop {
            tokio::select! {
                _ = &mut interrupt => return Ok(()),
                _ = ticks.tick() => {}
            }
            match &answer {
                Ok(report) if args.json => write_out(&format!("{}\n", serde_json::to_string(report)?))?,
                Ok(report) => {
                    let mut text = String::new();
                    render(report, paint(), &mut text);
                    repaint(&text, screen)?;
                }
                Err(why) if screen => repaint(&format!("{}\n", terminal::plain(&why.to_string())), screen)?,
                Err(why) => drop(writeln!(
                    io::stderr(),
                    "omirr: {}",
                    terminal::plain(&why.to_string())
                )),
            }
            answer = tokio::select! {
                _ = &mut interrupt => return Ok(()),
                answer = client.call(request, PATIENCE) => answer,
            };
        }
    })
}

fn print_once<T: Serialize>(
    args: &ReportArgs,
    report: &T,
    render: &impl Fn(&T, Paint, &mut String),
) -> anyhow::Result<()> {
    if args.json {
        return print_json(report);
    }
    let mut text = String::new();
    render(report, paint(), &mut text);
    write_out(&text)
}

fn paint() -> Paint {
    Paint {
        on: terminal::colours(io::stdout().is_terminal()),
    }
}

/// One report in place of the last one; one after the other where there is no
/// screen.
fn repaint(text: &str, screen: bool) -> anyhow::Result<()> {
    if !screen {
        return write_out(&format!("{text}\n"));
    }
    // Not cleared first: that would flicker.
    let lines = text.replace('\n', &format!("{CLEAR_LINE}\n"));
    write_out(&format!("{HOME}{lines}{CLEAR_BELOW}"))
}

fn write_out(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}
