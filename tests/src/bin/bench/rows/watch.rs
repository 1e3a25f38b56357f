//! How long it takes to be ready to watch many folders.

use std::fs::{self, File};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

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
    tables: &[Table {
        row: "watch",
        title: "Until a tree of folders is watched",
        cases: "",
        measure: "ready",
        unit: Unit::Milliseconds,
        goals: &[Goal::AtMost(5.0)],
        note: "Start of the process included, folders in the cache. omirr: `omirr trace A`, until it shows a change \
               of a file at the top that is changed every millisecond.",
    }],
};

fn measure(bench: &Bench, case: &Case, tool: &dyn Tool) -> Result<Vec<Found>> {
    let folders = case.size;
    let original = bench.original(&format!("{folders} folders"), On::Disk, |root| {
        trees::make_folders(root, folders)
    })?;
    let ground = bench.ground(On::Disk)?;
    let took = if tool.name() == "omirr" {
        first_change(bench, &ground, &original.path)?
    } else {
        let (mut session, _) = bench.open(tool, &ground, &original.path)?;
        let started = Instant::now();
        session.start()?;
        session.sync(&mut || true, bench.end())?;
        started.elapsed()
    };
    Ok(vec![
        Found::new("watch", None).with("ready", took.as_secs_f64() * 1e3),
    ])
}

fn first_change(bench: &Bench, ground: &Ground, a: &std::path::Path) -> Result<Duration> {
    let log = ground.path.join("log");
    let file = a.join("changed");
    File::create(&file)?;
    let mut command = Command::new(omirr_tests::binary());
    command.args(["trace", "--json"]).arg(a);
    let started = Instant::now();
    let mut trace = Process::start(command, &log)?;
    let mut died = None;
    let pause = Duration::from_millis(1);
    let ready = stop::until(bench.end(), pause, pause, || {
        died = trace.must_run().err();
        let changed = fs::write(&file, "changed");
        died.is_some()
            || changed.is_err()
            || fs::read_to_string(&log).is_ok_and(|text| text.contains("/changed\""))
    })?;
    died.map_or(Ok(ready - started), Err)
}
