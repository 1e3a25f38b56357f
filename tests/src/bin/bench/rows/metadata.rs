//! What changes of metadata alone cost on the wire.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::Result;
use omirr_tests::treewalk;

use super::{Case, Found, Goal, Row, Table, bytes};
use crate::bench::{Bench, On};
use crate::figures::Unit;
use crate::tools::Tool;
use crate::trees;

const FILES: u64 = 1000;
const GOALS: &[Goal] = &[Goal::AtMost(40.0)];

pub const ROW: Row = Row {
    name: "metadata",
    also: &[],
    tools: &["omirr", "rsync", "lsyncd", "unison", "syncthing"],
    cases: |_| vec![Case::new("1,000 files", FILES)],
    measure,
    tables: &[
        Table {
            row: "metadata",
            title: "Bytes on the wire for each `chmod`, a thousand at once",
            cases: "",
            measure: "chmod",
            unit: Unit::Bytes,
            goals: GOALS,
            note: "In both directions, Ethernet, IP and TCP included.",
        },
        Table {
            row: "metadata",
            title: "Bytes on the wire for each change of a file's time, a thousand at once",
            cases: "",
            measure: "utimes",
            unit: Unit::Bytes,
            goals: GOALS,
            note: "",
        },
        Table {
            row: "metadata",
            title: "A thousand `chmod`, until all are on B",
            cases: "",
            measure: "seconds",
            unit: Unit::Seconds,
            goals: &[],
            note: "From the first of them.",
        },
    ],
};

fn measure(bench: &Bench, _case: &Case, tool: &dyn Tool) -> Result<Vec<Found>> {
    let ground = bench.ground(On::Disk)?;
    let a = ground.fresh("a")?;
    trees::make(&a, FILES, 100, trees::SMALL, 1)?;
    let files: Vec<PathBuf> = (0..FILES)
        .map(|nth| PathBuf::from(format!("d{:04}/f{:07}", nth / 100, nth)))
        .collect();
    let (mut session, b) = bench.open(tool, &ground, &a)?;
    session.start()?;
    session.sync(&mut || trees::files_in(&b) >= FILES, bench.end())?;

    let mut found = Found::new("metadata", None);
    let mut batch = |measure: &str, change: &dyn Fn(&Path) -> std::io::Result<()>| -> Result<f64> {
        std::thread::sleep(Duration::from_secs(2));
        let before = bench.wire.carried()?;
        let started = Instant::now();
        for file in &files {
            change(&a.join(file))?;
        }
        let mut there = || {
            files.iter().all(|file| {
                let meta = |root: &Path| root.join(file).metadata().ok();
                let both = meta(&a).zip(meta(&b));
                both.is_some_and(|(a, b)| a.mode() == b.mode() && a.mtime() == b.mtime())
            })
        };
        session.sync(&mut there, bench.end())?;
        let took = started.elapsed().as_secs_f64();
        // Acknowledgements may still be on their way.
        std::thread::sleep(Duration::from_millis(300));
        let carried = bench.carried_since(before)?;
        let each = bytes(carried.there + carried.back) / bytes(FILES);
        found.values.insert(measure.to_owned(), vec![each]);
        Ok(took)
    };
    let took = batch("chmod", &|path| {
        fs::set_permissions(path, Permissions::from_mode(0o640))
    })?;
    batch("utimes", &|path| {
        File::options()
            .write(true)
            .open(path)?
            .set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000_000))
    })?;
    found = found.with("seconds", took);
    found.wrong = bench.judge(tool, &treewalk::walk(&a)?, &b)?;
    Ok(vec![found])
}
