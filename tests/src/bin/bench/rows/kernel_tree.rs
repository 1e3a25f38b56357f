//! The source tree of Linux: what real files are like.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};

use super::{Case, Found, Goal, MEGA, Row, Table, bytes};
use crate::bench::{Bench, On};
use crate::figures::Unit;
use crate::tools::{Nature, Tool};
use crate::trees;

/// From Debian's package of that name.
const ARCHIVE: &str = "/usr/src/linux-source-6.1.tar.xz";

pub const ROW: Row = Row {
    name: "kernel-tree",
    also: &[],
    tools: &["omirr", "cp", "tar", "rsync", "rsync -z"],
    cases: |scale| scale.pick(Vec::new(), vec![Case::new("Linux 6.1", 0)]),
    measure,
    tables: &[
        Table {
            row: "kernel-tree",
            title: "First copy of the source tree of Linux 6.1",
            cases: "",
            measure: "seconds",
            unit: Unit::Seconds,
            goals: &[Goal::Times("rsync", 0.5)],
            note: "",
        },
        Table {
            row: "kernel-tree",
            title: "First copy of Linux 6.1: bytes on the wire",
            cases: "",
            measure: "wire",
            unit: Unit::Megabytes,
            goals: &[Goal::Times("rsync -z", 0.85)],
            note: "",
        },
    ],
};

fn unpack(root: &Path) -> Result<()> {
    if !Path::new(ARCHIVE).exists() {
        bail!("{ARCHIVE} is not there; `apt-get install linux-source-6.1` brings it");
    }
    omirr_tests::run(Command::new("tar").args(["-xJf", ARCHIVE, "-C"]).arg(root));
    Ok(())
}

fn measure(bench: &Bench, _case: &Case, tool: &dyn Tool) -> Result<Vec<Found>> {
    let original = bench.original("Linux", On::Disk, unpack)?;
    let files = trees::files_in(&original.path);
    let ground = bench.ground(On::Disk)?;
    let (mut session, b) = bench.open(tool, &ground, &original.path)?;
    let continuous = tool.nature() == Nature::Continuous;
    if !continuous {
        session.start()?;
    }
    let before = bench.wire.carried()?;
    let started = Instant::now();
    if continuous {
        session.start()?;
    }
    session.sync(&mut || trees::files_in(&b) >= files, bench.end())?;
    let took = started.elapsed().as_secs_f64();
    let carried = bench.carried_since(before)?;
    let wrong = bench.judge(tool, &original.tree, &b)?;
    drop(session);
    // It is there at all, whatever else it is.
    fs::metadata(&b)?;
    Ok(vec![
        Found::new("kernel-tree", wrong)
            .with("seconds", took)
            .with("wire", bytes(carried.there + carried.back) / MEGA),
    ])
}
