//! Where log lines go: standard error, as much as `OMIRR_LOG` asks for.

use std::{
    env,
    io::{self, IsTerminal, Write},
    os::{fd::AsFd, unix::ffi::OsStrExt},
};

use tracing_subscriber::EnvFilter;

/// What is logged unless `OMIRR_LOG` says other.
const DEFAULT: &str = "info";

/// Starts logging. A wrong `OMIRR_LOG` is told and does not keep the daemon
/// from running: a log is not worth a mirror.
pub(super) fn start() {
    let asked = env::var("OMIRR_LOG")
        .ok()
        .filter(|value| !value.trim().is_empty());
    let filter = match asked.as_deref().map(EnvFilter::try_new) {
        None => EnvFilter::new(DEFAULT),
        Some(Ok(filter)) => filter,
        Some(Err(why)) => {
            let text = format!("omirr: OMIRR_LOG is not understood ({why}): {DEFAULT} is used\n");
            drop(io::stderr().write_all(text.as_bytes()));
            EnvFilter::new(DEFAULT)
        }
    };
    let ansi = super::terminal::colours(io::stderr().is_terminal());
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(ansi);
    if to_journal() {
        lines.without_time().init();
    } else {
        lines.init();
    }
}

/// Whether standard error is systemd's journal, which has its own times.
/// `JOURNAL_STREAM` alone does not say so: it is inherited by a shell that sends
/// the log elsewhere.
fn to_journal() -> bool {
    let Some(stream) = env::var_os("JOURNAL_STREAM") else {
        return false;
    };
    match rustix::fs::fstat(io::stderr().as_fd()) {
        Ok(found) => stream.as_bytes() == format!("{}:{}", found.st_dev, found.st_ino).as_bytes(),
        Err(_) => false,
    }
}
