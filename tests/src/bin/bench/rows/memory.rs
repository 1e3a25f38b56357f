//! Memory at rest against the number of entries.

use anyhow::Result;

use super::{Case, Found, Goal, MEGA, REST, Row, Table, bytes};
use crate::bench::{Bench, On, Scale};
use crate::figures::{self, Unit};
use crate::tools::{Nature, Tool};
use crate::trees;

/// What a daemon may have whatever it mirrors.
const BASE: f64 = 30e6;

pub const ROW: Row = Row {
    name: "memory",
    also: &[],
    tools: &["omirr", "rsync", "lsyncd", "unison", "syncthing"],
    cases,
    measure,
    tables: &[
        Table {
            row: "memory",
            title: "Memory at rest for each entry, above 30 MB",
            cases: "",
            measure: "each",
            unit: Unit::Bytes,
            goals: &[Goal::AtMost(120.0)],
            note: "Of the side that has more, after a restart and six seconds; files are empty, in folders of a \
                   thousand. Of a tool that works once, the most while it runs.",
        },
        Table {
            row: "memory",
            title: "Memory at rest",
            cases: "",
            measure: "resident",
            unit: Unit::Megabytes,
            goals: &[],
            note: "",
        },
        Table {
            row: "memory",
            title: "Memory six seconds after the first copy",
            cases: "",
            measure: "after copy",
            unit: Unit::Megabytes,
            goals: &[],
            note: "",
        },
    ],
};

fn cases(scale: Scale) -> Vec<Case> {
    let case = |entries: u64| Case::new(format!("{} entries", figures::count(entries)), entries);
    let slow: &[&str] = &["unison", "syncthing"];
    match scale {
        Scale::Quick => vec![case(2_000).without(slow), case(20_000).without(slow)],
        Scale::Full => vec![
            case(1_000),
            case(10_000).heavy(),
            case(100_000).without(&["syncthing"]).heavy(),
            case(1_000_000).without(slow),
        ],
    }
}

fn measure(bench: &Bench, case: &Case, tool: &dyn Tool) -> Result<Vec<Found>> {
    // Folders are entries, too.
    let files = case.size - case.size.div_ceil(1001);
    let original = bench.original(&format!("{files} empty files"), On::Memory, |root| {
        trees::make(root, files, 1000, 0, 1)
    })?;
    let ground = bench.ground(On::Memory)?;
    let (mut session, b) = bench.open(tool, &ground, &original.path)?;
    let rest = || {
        if tool.nature() == Nature::Continuous {
            std::thread::sleep(REST);
        }
    };
    session.start()?;
    session.sync(&mut || trees::files_in(&b) >= files, bench.end())?;
    rest();
    let most = |sides: [u64; 2]| bytes(sides[0].max(sides[1]));
    let after_copy = most(session.resident());
    session.stop()?;
    session.start()?;
    session.sync(&mut || true, bench.end())?;
    rest();
    let resident = most(session.resident());
    let wrong = bench.judge(tool, &original.tree, &b)?;
    Ok(vec![
        Found::new("memory", wrong)
            .with("resident", resident / MEGA)
            .with("after copy", after_copy / MEGA)
            .with("each", (resident - BASE).max(0.0) / bytes(case.size)),
    ])
}
