//! How long it takes to be ready to watch many folders.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::Value;

use super::{Case, Found, Goal, Row, Table};
use crate::bench::{Bench, On};
use crate::figures::{self, Unit};
use crate::process::Process;
use crate::stop;
use crate::tools::Tool;
use crate::trees::{self, Ground};

pub const ROW: Row = Row {
    name: "watch",
    also: &[],
    tools: &["omirr", "inotifywait"],
    cases: |scale| {
        let folders = scale.pick(10_000, 100_000);
        [100, folders]
            .map(|folders| Case::new(format!("{} folders", figures::count(folders)), folders))
            .to_vec()
    },
    measure,
    tables: &[
        Table {
            row: "watch",
            title: "Until a tree of folders is watched",
            cases: "",
            measure: "ready",
            unit: Unit::Milliseconds,
            goals: &[Goal::AtMost(5.0)],
            note: "Start of the process included, folders in the cache. omirr: the time of the first change that \
                   `omirr trace A` reports of a file at the top that is changed every millisecond.",
        },
        Table {
            row: "watch",
            title: "Until changes in a tree of folders are shown with their paths",
            cases: "",
            measure: "shown",
            unit: Unit::Milliseconds,
            goals: &[],
            note: "omirr: until that line is printed. Of `inotifywait` it is the same as above.",
        },
    ],
};

fn measure(bench: &Bench, case: &Case, tool: &dyn Tool) -> Result<Vec<Found>> {
    let folders = case.size;
    let original = bench.original(&format!("{folders} folders"), On::Disk, |root| {
        trees::make_folders(root, folders)
    })?;
    let ground = bench.ground(On::Disk)?;
    let (ready, shown) = if tool.name() == "omirr" {
        first_change(bench, &ground, &original.path)?
    } else {
        let (mut session, _) = bench.open(tool, &ground, &original.path)?;
        let started = Instant::now();
        session.start()?;
        session.sync(&mut || true, bench.end())?;
        let took = started.elapsed();
        (took, took)
    };
    Ok(vec![
        Found::new("watch", None)
            .with("ready", ready.as_secs_f64() * 1e3)
            .with("shown", shown.as_secs_f64() * 1e3),
    ])
}

/// Until the first change that is reported, and until the report.
fn first_change(bench: &Bench, ground: &Ground, a: &Path) -> Result<(Duration, Duration)> {
    let log = ground.path.join("log");
    let file = a.join("changed");
    File::create(&file)?;
    let mut command = Command::new(omirr_tests::binary());
    command.args(["trace", "--json"]).arg(a);
    let (started, by_the_clock) = (Instant::now(), Timestamp::now());
    let mut trace = Process::start(command, &log)?;
    let mut died = None;
    let mut first = None;
    let pause = Duration::from_millis(1);
    let shown = stop::until(bench.end(), pause, pause, || {
        died = trace.must_run().err();
        let changed = fs::write(&file, "changed");
        first = fs::read_to_string(&log).ok().and_then(|text| time_of(&text));
        died.is_some() || changed.is_err() || first.is_some()
    })?;
    if let Some(error) = died {
        return Err(error);
    }
    let first = first.context("the file cannot be changed")?;
    let ready = Duration::try_from(first.duration_since(by_the_clock)).unwrap_or_default();
    Ok((ready, shown - started))
}

/// When the first change of the file was, of lines of JSON.
fn time_of(text: &str) -> Option<Timestamp> {
    let mut lines = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let line = lines.find(|line| {
        line["path"]
            .as_str()
            .is_some_and(|path| path.ends_with("/changed"))
    })?;
    line["time"].as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_change_of_the_file_tells_the_time() {
        let text = "omirr: tracing\n{\"time\":\"2026-01-01T00:00:00Z\",\"path\":\"/other\"}\n\
                    {\"time\":\"2026-01-01T00:00:01.5Z\",\"path\":\"/a/changed\"}\n{\"time\":\"20";
        let expected: Timestamp = "2026-01-01T00:00:01.5Z".parse().unwrap();
        assert_eq!(time_of(text), Some(expected));
        assert_eq!(time_of("omirr: tracing"), None);
    }
}
