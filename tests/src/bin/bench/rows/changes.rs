//! What a steady stream of changes costs.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use omirr_tests::treewalk;

use super::{Case, Found, Goal, Row, Table, bytes};
use crate::bench::{Bench, On};
use crate::figures::Unit;
use crate::process::Used;
use crate::tools::{Nature, Tool};
use crate::trees;

const FILES: u64 = 1000;
const RATE: u64 = 1000;

pub const ROW: Row = Row {
    name: "changes",
    also: &[],
    tools: &["omirr", "rsync", "lsyncd", "unison", "csync2", "syncthing"],
    cases: |scale| {
        let changes = RATE * scale.pick(3, 20);
        vec![Case::new("1,000 changes a second", changes)]
    },
    measure,
    tables: &[
        Table {
            row: "changes",
            title: "Processor time of both sides for each changed file of 4 KiB",
            cases: "",
            measure: "cpu",
            unit: Unit::Microseconds,
            goals: &[Goal::AtMost(150.0), Goal::TimesBest(1.0)],
            note: "A thousand files are written anew in turn, a thousand times a second. A tool that works once is \
                   called again and again meanwhile. Who works seldom carries few of these changes: the next tables \
                   show how many bytes, and how far behind B was in the end.",
        },
        Table {
            row: "changes",
            title: "1,000 changes a second: bytes on the wire for each",
            cases: "",
            measure: "wire",
            unit: Unit::Bytes,
            goals: &[],
            note: "",
        },
        Table {
            row: "changes",
            title: "1,000 changes a second: after the last, until all is on B",
            cases: "",
            measure: "after",
            unit: Unit::Seconds,
            goals: &[],
            note: "",
        },
    ],
};

fn name(nth: u64) -> String {
    format!("d{:04}/f{:07}", nth / 100, nth)
}

/// Writes at an even pace; where it falls behind, it hurries.
fn write(a: &Path, changes: u64) -> std::io::Result<()> {
    let started = Instant::now();
    for nth in 0..changes {
        let due = Duration::from_micros(nth * 1_000_000 / RATE);
        if let Some(early) = due.checked_sub(started.elapsed()) {
            std::thread::sleep(early);
        }
        fs::write(a.join(name(nth % FILES)), trees::content(nth, trees::SMALL, 5))?;
    }
    Ok(())
}

fn measure(bench: &Bench, case: &Case, tool: &dyn Tool) -> Result<Vec<Found>> {
    let ground = bench.ground(On::Disk)?;
    let a = ground.fresh("a")?;
    trees::make(&a, FILES, 100, trees::SMALL, 1)?;
    let (mut session, b) = bench.open(tool, &ground, &a)?;
    session.start()?;
    session.sync(&mut || trees::files_in(&b) >= FILES, bench.end())?;
    std::thread::sleep(Duration::from_secs(1));
    let (before, used) = (bench.wire.carried()?, Used::now());
    let writing = AtomicBool::new(true);
    let (written, ran, last) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let written = write(&a, case.size);
            writing.store(false, Ordering::Relaxed);
            (written, Instant::now())
        });
        let mut ran = Ok(());
        while ran.is_ok() && tool.nature() == Nature::Once && writing.load(Ordering::Relaxed) {
            ran = session.run_once(bench.end());
        }
        let (written, last) = writer.join().expect("writing does not panic");
        (written, ran, last)
    });
    written?;
    ran?;
    let mut there = || (0..FILES).all(|nth| same(&a.join(name(nth)), &b.join(name(nth))));
    session.sync(&mut there, bench.end())?;
    let after = last.elapsed().as_secs_f64();
    let (used, carried) = (Used::now().since(used), bench.carried_since(before)?);
    let wrong = bench.judge(tool, &treewalk::walk(&a)?, &b)?;
    let changes = bytes(case.size);
    Ok(vec![
        Found::new("changes", wrong)
            .with("cpu", used.cpu_s * 1e6 / changes)
            .with("wire", bytes(carried.there + carried.back) / changes)
            .with("after", after),
    ])
}

fn same(a: &Path, b: &Path) -> bool {
    fs::read(a).is_ok_and(|a| fs::read(b).is_ok_and(|b| a == b))
}
