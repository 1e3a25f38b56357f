//! How long a change in an idle tree takes from A to B.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use omirr_tests::treewalk;
use omirr_tests::users::Rng;

use super::{Case, Found, Goal, Row, Table};
use crate::bench::{Bench, On};
use crate::figures::Unit;
use crate::stop;
use crate::tools::{Nature, Session, Tool};
use crate::trees;

const FILES: u64 = 1000;
const NOTE: &str = "From the return of the call that makes the change until B shows it. A tool that works once is \
                    called right after the change.";

const fn table(title: &'static str, measure: &'static str) -> Table {
    Table {
        row: "latency",
        title,
        cases: "",
        measure,
        unit: Unit::Milliseconds,
        goals: &[
            Goal::AtMost(0.5),
            Goal::Percentile99(3.0),
            Goal::TimesBest(1.0 / 8.0),
        ],
        note: NOTE,
    }
}

pub const ROW: Row = Row {
    name: "latency",
    also: &[],
    tools: &[
        "omirr",
        "rsync",
        "lsyncd delay 0",
        "lsyncd",
        "unison",
        "csync2",
        "syncthing",
    ],
    cases: |_| vec![Case::new("idle tree of 1,000 files", FILES)],
    measure,
    tables: &[
        table("A 4 KiB file is created", "create"),
        table("64 bytes are appended to it", "append"),
        table("It is renamed", "rename"),
        table("It is deleted", "delete"),
    ],
};

fn measure(bench: &Bench, _case: &Case, tool: &dyn Tool) -> Result<Vec<Found>> {
    let ground = bench.ground(On::Disk)?;
    let a = ground.fresh("a")?;
    trees::make(&a, FILES, 100, trees::SMALL, 1)?;
    let (mut session, b) = bench.open(tool, &ground, &a)?;
    session.start()?;
    session.sync(&mut || trees::files_in(&b) >= FILES, bench.end())?;
    let mut rng = Rng(7);
    let mut found = Found::new("latency", None);
    // Slow ones get as many changes as fit.
    let most = bench.scale.pick(25, 50);
    let enough = Instant::now() + bench.scale.pick(Duration::from_secs(5), Duration::from_secs(12));
    let mut once = Once {
        bench,
        session: &mut *session,
        continuous: tool.nature() == Nature::Continuous,
        rng: &mut rng,
    };
    for nth in 0..=most {
        let folder = format!("d{:04}", once.rng.below(FILES / 100));
        let name = format!("{folder}/new{nth}");
        let moved = format!("{folder}/moved{nth}");
        let mut content = trees::content(2 * nth + 1, trees::SMALL, 99);
        let create = once.change(
            || fs::write(a.join(&name), &content),
            || holds(&b.join(&name), &content),
        )?;
        let more = [b'+'; 64];
        content.extend(more);
        let append = once.change(
            || File::options().append(true).open(a.join(&name))?.write_all(&more),
            || holds(&b.join(&name), &content),
        )?;
        let rename = once.change(
            || fs::rename(a.join(&name), a.join(&moved)),
            || b.join(&moved).exists() && !b.join(&name).exists(),
        )?;
        let delete = once.change(|| fs::remove_file(a.join(&moved)), || !b.join(&moved).exists())?;
        // The first wakes everything up.
        if nth > 0 {
            found = found
                .with("create", create)
                .with("append", append)
                .with("rename", rename)
                .with("delete", delete);
        }
        if nth > 0 && Instant::now() > enough {
            break;
        }
    }
    session.sync(&mut || true, bench.end())?;
    found.wrong = bench.judge(tool, &treewalk::walk(&a)?, &b)?;
    Ok(vec![found])
}

fn holds(path: &Path, content: &[u8]) -> bool {
    // Cheap until the size is right.
    path.metadata()
        .is_ok_and(|meta| meta.len() == content.len() as u64)
        && fs::read(path).is_ok_and(|found| found == content)
}

struct Once<'bench> {
    bench: &'bench Bench,
    session: &'bench mut dyn Session,
    continuous: bool,
    rng: &'bench mut Rng,
}

impl Once<'_> {
    /// Milliseconds from the end of the change until it is there.
    fn change(
        &mut self,
        change: impl FnOnce() -> std::io::Result<()>,
        there: impl FnMut() -> bool,
    ) -> Result<f64> {
        // At rest, and not in step with anything.
        if self.continuous {
            std::thread::sleep(Duration::from_millis(30) + self.rng.millis_below(50));
        }
        change()?;
        let changed = Instant::now();
        self.session.run_once(self.bench.end())?;
        let pause = (Duration::from_micros(20), Duration::from_millis(2));
        let arrived = stop::until(self.bench.end(), pause.0, pause.1, there)?;
        Ok((arrived - changed).as_secs_f64() * 1e3)
    }
}
