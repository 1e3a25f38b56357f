//! The first copy of a tree of small files, and a restart after which nothing
//! has changed.

use std::time::Instant;

use anyhow::Result;

use super::{Case, Found, Goal, MEGA, Row, Table, bytes};
use crate::bench::{Bench, On, Scale};
use crate::figures::{self, Unit};
use crate::process::Used;
use crate::tools::{Nature, Tool};
use crate::trees;

const IN_EACH: u64 = 100;
/// What cases over one are called.
const SLOW_WIRE: &str = "100 Mbit/s";
const NOT_OVER_IT: &[&str] = &["cp", "tar", "lsyncd", "unison", "csync2", "syncthing"];

pub const ROW: Row = Row {
    name: "first-copy",
    also: &["restart"],
    tools: &[
        "omirr",
        "cp",
        "tar",
        "rsync",
        "rsync -z",
        "lsyncd",
        "unison",
        "csync2",
        "syncthing",
    ],
    cases,
    measure,
    tables: &[
        Table {
            row: "first-copy",
            title: "First copy of files of 4 KiB, half of them text, in memory",
            cases: "memory",
            measure: "seconds",
            unit: Unit::Seconds,
            goals: &[Goal::Times("rsync", 0.5), Goal::Times("tar", 1.3)],
            note: "For a tool that runs all the time from its start on both sides, with nothing known, until it is \
                   done; for one that works once, the call. `cp` and `tar` copy on one machine and sync nothing.",
        },
        Table {
            row: "first-copy",
            title: "First copy of files of 4 KiB, half of them text, on disk",
            cases: "disk",
            measure: "seconds",
            unit: Unit::Seconds,
            goals: &[Goal::Times("rsync", 0.5)],
            note: "As above. Of these, omirr and Syncthing sync files before they count as there.",
        },
        Table {
            row: "first-copy",
            title: "First copy of files of 4 KiB, half of them text, on disk, over a slow wire",
            cases: SLOW_WIRE,
            measure: "seconds",
            unit: Unit::Seconds,
            goals: &[Goal::TimesBest(1.0)],
            note: "As above, with `tc qdisc add dev cable root tbf rate 100mbit burst 256kb latency 50ms` on both \
                   sides.",
        },
        Table {
            row: "first-copy",
            title: "First copy of files of 4 KiB, half of them text: bytes on the wire",
            cases: "",
            measure: "wire",
            unit: Unit::Megabytes,
            goals: &[Goal::Times("rsync -z", 0.85)],
            note: "In both directions, Ethernet, IP and TCP included.",
        },
        Table {
            row: "first-copy",
            title: "First copy: processor time of all processes on both sides",
            cases: "",
            measure: "cpu",
            unit: Unit::Seconds,
            goals: &[],
            note: "",
        },
        Table {
            row: "restart",
            title: "Restart of both sides with nothing changed",
            cases: "",
            measure: "seconds",
            unit: Unit::Seconds,
            goals: &[Goal::AtMost(0.25)],
            note: "For a tool that works once, another call.",
        },
        Table {
            row: "restart",
            title: "Restart with nothing changed: bytes on the wire",
            cases: "",
            measure: "wire",
            unit: Unit::Megabytes,
            goals: &[Goal::AtMost(0.01)],
            note: "",
        },
    ],
};

fn cases(scale: Scale) -> Vec<Case> {
    let case = |on: &str, files: u64| Case::new(format!("{on}, {} files", figures::count(files)), files);
    match scale {
        Scale::Quick => vec![
            case("memory", 20_000).without(&["csync2", "syncthing", "unison"]),
            case(SLOW_WIRE, 5_000).without(NOT_OVER_IT),
            case("disk", 1_000).heavy(),
            case("disk", 10_000).without(&["csync2", "syncthing"]).heavy(),
        ],
        Scale::Full => vec![
            case("memory", 100_000).without(&["csync2", "syncthing", "unison"]),
            case(SLOW_WIRE, 20_000).without(NOT_OVER_IT),
            case("disk", 1_000).heavy(),
            case("disk", 10_000).heavy(),
            case("disk", 100_000).heavy(),
        ],
    }
}

fn measure(bench: &Bench, case: &Case, tool: &dyn Tool) -> Result<Vec<Found>> {
    let on = if case.name.starts_with("memory") {
        On::Memory
    } else {
        On::Disk
    };
    let files = case.size;
    let whose = match tool.changes_source() {
        true => tool.name(),
        false => "all",
    };
    let original = bench.original(&format!("{files} files for {whose}"), on, |root| {
        trees::make(root, files, IN_EACH, trees::SMALL, 1)
    })?;
    let ground = bench.ground(on)?;
    let slow = case.name.starts_with(SLOW_WIRE);
    let _narrow = slow.then(|| bench.wire.narrow()).transpose()?;
    let (mut session, b) = bench.open(tool, &ground, &original.path)?;
    let continuous = tool.nature() == Nature::Continuous;
    let copies = |found: Found, timed: f64, used: Used, wire: f64| {
        found
            .with("seconds", timed)
            .with("cpu", used.cpu_s)
            .with("wire", wire / MEGA)
    };

    // A daemon that only waits for calls is there beforehand.
    if !continuous {
        session.start()?;
    }
    let (before, used) = (bench.wire.carried()?, Used::now());
    let started = Instant::now();
    if continuous {
        session.start()?;
    }
    session.sync(&mut || trees::files_in(&b) >= files, bench.end())?;
    let took = started.elapsed().as_secs_f64();
    let (used, carried) = (Used::now().since(used), bench.carried_since(before)?);
    let wrong = bench.judge(tool, &original.tree, &b)?;
    let copy = copies(
        Found::new("first-copy", wrong),
        took,
        used,
        bytes(carried.there + carried.back),
    );
    if tool.nature() == Nature::Local {
        return Ok(vec![copy]);
    }

    if continuous {
        session.stop()?;
    }
    let (before, used) = (bench.wire.carried()?, Used::now());
    let started = Instant::now();
    if continuous {
        session.start()?;
    }
    session.sync(&mut || true, bench.end())?;
    let took = started.elapsed().as_secs_f64();
    let (used, carried) = (Used::now().since(used), bench.carried_since(before)?);
    let wrong = bench.judge(tool, &original.tree, &b)?;
    let restart = copies(
        Found::new("restart", wrong),
        took,
        used,
        bytes(carried.there + carried.back),
    );
    Ok(vec![copy, restart])
}
