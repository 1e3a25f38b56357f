//! Many small files that are created as fast as one program can.

use std::fs;
use std::time::Instant;

use anyhow::Result;
use omirr_tests::treewalk;

use super::{Case, Found, Goal, Row, Table};
use crate::bench::{Bench, On};
use crate::figures::{self, Unit};
use crate::process::Used;
use crate::tools::{Nature, Tool};
use crate::trees;

const FOLDERS: u64 = 20;
const BYTES: usize = 1024;

pub const BURST: Row = Row {
    name: "burst",
    also: &[],
    tools: &["omirr", "rsync", "lsyncd", "unison", "csync2", "syncthing"],
    cases: |scale| {
        let files = scale.pick(5_000, 10_000);
        vec![Case::new(format!("{} files", figures::count(files)), files).heavy()]
    },
    measure: |bench, case, tool| measure(bench, case, tool, "burst", false),
    tables: &[
        Table {
            row: "burst",
            title: "Files of 1 KiB created in a tight loop: after the last, until all are on B",
            cases: "",
            measure: "after",
            unit: Unit::Seconds,
            goals: &[Goal::AtMost(0.5)],
            note: "A tool that works once is called after the last. omirr is done when all is durable.",
        },
        Table {
            row: "burst",
            title: "Files created in a tight loop: processor time of all processes on both sides",
            cases: "",
            measure: "cpu",
            unit: Unit::Seconds,
            goals: &[],
            note: "",
        },
    ],
};

pub const FLOOD: Row = Row {
    name: "flood",
    also: &[],
    tools: &["omirr", "rsync", "lsyncd", "unison", "syncthing"],
    cases: |scale| {
        let files = scale.pick(40_000, 200_000);
        let slow: &[&str] = &["unison", "syncthing"];
        let case = Case::new(format!("{} files", figures::count(files)), files);
        vec![scale.pick(case.clone().without(slow), case.heavy())]
    },
    measure: |bench, case, tool| measure(bench, case, tool, "flood", true),
    tables: &[
        Table {
            row: "flood",
            title: "More files than inotify's queue holds: from the first create until all are on B",
            cases: "",
            measure: "all",
            unit: Unit::Seconds,
            goals: &[Goal::TimesOwn("fresh", 1.2)],
            note: "Files of 1 KiB in a tight loop. The goal is a multiple of the next table.",
        },
        Table {
            row: "flood",
            title: "A fresh copy of the same files",
            cases: "",
            measure: "fresh",
            unit: Unit::Seconds,
            goals: &[],
            note: "",
        },
    ],
};

fn measure(
    bench: &Bench,
    case: &Case,
    tool: &dyn Tool,
    row: &'static str,
    copy_again: bool,
) -> Result<Vec<Found>> {
    let ground = bench.ground(On::Disk)?;
    let a = ground.fresh("a")?;
    for folder in 0..FOLDERS {
        fs::create_dir(a.join(format!("d{folder}")))?;
    }
    fs::write(a.join("first"), "first")?;
    let (mut session, b) = bench.open(tool, &ground, &a)?;
    session.start()?;
    session.sync(&mut || trees::files_in(&b) == 1, bench.end())?;
    let contents: Vec<Vec<u8>> = (0..64).map(|nth| trees::content(nth, BYTES, 3)).collect();
    let used = Used::now();
    let started = Instant::now();
    for nth in 0..case.size {
        let path = a.join(format!("d{}/n{nth}", nth % FOLDERS));
        fs::write(path, &contents[(nth % 64) as usize])?;
    }
    let last = Instant::now();
    session.sync(&mut || trees::files_in(&b) > case.size, bench.end())?;
    let done = Instant::now();
    let used = Used::now().since(used);
    let wrong = bench.judge(tool, &treewalk::walk(&a)?, &b)?;
    session.stop()?;
    drop(session);
    let mut found = Found::new(row, wrong)
        .with("after", (done - last).as_secs_f64())
        .with("all", (done - started).as_secs_f64())
        .with("create", (last - started).as_secs_f64())
        .with("cpu", used.cpu_s);
    if copy_again {
        let ground = bench.ground(On::Disk)?;
        let (mut session, b) = bench.open(tool, &ground, &a)?;
        if tool.nature() == Nature::Once {
            session.start()?;
        }
        let started = Instant::now();
        if tool.nature() == Nature::Continuous {
            session.start()?;
        }
        session.sync(&mut || trees::files_in(&b) > case.size, bench.end())?;
        found = found.with("fresh", started.elapsed().as_secs_f64());
    }
    Ok(vec![found])
}
