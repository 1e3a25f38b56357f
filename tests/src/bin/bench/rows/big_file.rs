//! The first copy of one file, and 1 MiB that is changed in its middle.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::Result;
use omirr_tests::treewalk;

use super::{Case, Found, Goal, MEGA, Row, Table, bytes};
use crate::bench::{Bench, On, Scale};
use crate::figures::Unit;
use crate::process::Used;
use crate::tools::{Nature, Tool};
use crate::trees;

const MIB: u64 = 1 << 20;
/// Below that the change is most of the file.
const WORTH_A_CHANGE: u64 = 64 * MIB;

pub const ROW: Row = Row {
    name: "big-file",
    also: &["big-change"],
    tools: &[
        "omirr",
        "cp",
        "rsync",
        "rsync --inplace",
        "unison",
        "csync2",
        "syncthing",
    ],
    cases,
    measure,
    tables: &[
        Table {
            row: "big-file",
            title: "First copy of one file of random bytes",
            cases: "",
            measure: "seconds",
            unit: Unit::Seconds,
            goals: &[Goal::Times("cp", 1.05)],
            note: "From the start of both sides, as with the first copy of a tree.",
        },
        Table {
            row: "big-change",
            title: "1 MiB is changed in place in its middle",
            cases: "",
            measure: "seconds",
            unit: Unit::Seconds,
            goals: &[Goal::Times("rsync --inplace", 0.4)],
            note: "From the return of the write until the tool is done.",
        },
        Table {
            row: "big-change",
            title: "1 MiB is changed: bytes on the wire",
            cases: "",
            measure: "wire",
            unit: Unit::Megabytes,
            goals: &[],
            note: "",
        },
        Table {
            row: "big-change",
            title: "1 MiB is changed: bytes read on both sides",
            cases: "",
            measure: "read",
            unit: Unit::Megabytes,
            goals: &[],
            note: "`rchar` of `/proc/PID/io`: through read calls, from sockets and pipes as well.",
        },
    ],
};

fn cases(scale: Scale) -> Vec<Case> {
    let mib = |mib: u64| Case::new(format!("{mib} MiB"), mib * MIB).heavy();
    match scale {
        Scale::Quick => vec![mib(1), mib(256).without(&["csync2", "syncthing", "unison"])],
        Scale::Full => vec![
            mib(1),
            mib(16),
            mib(256),
            mib(1024),
            mib(4096).without(&["csync2", "syncthing"]),
        ],
    }
}

fn measure(bench: &Bench, case: &Case, tool: &dyn Tool) -> Result<Vec<Found>> {
    let size = case.size;
    let original = bench.original(&format!("a file of {size}"), On::Disk, |root| {
        trees::make_file(&root.join("file"), size, 1)
    })?;
    let ground = bench.ground(On::Disk)?;
    let (mut session, b) = bench.open(tool, &ground, &original.path)?;
    let continuous = tool.nature() == Nature::Continuous;
    let arrived = |b: &std::path::Path| b.join("file").metadata().is_ok_and(|meta| meta.len() == size);
    if !continuous {
        session.start()?;
    }
    let started = Instant::now();
    if continuous {
        session.start()?;
    }
    session.sync(&mut || arrived(&b), bench.end())?;
    let took = started.elapsed().as_secs_f64();
    // An earlier round has changed the original.
    let wrong = bench.judge(tool, &treewalk::walk(&original.path)?, &b)?;
    let mut found = vec![Found::new("big-file", wrong).with("seconds", took)];

    if size >= WORTH_A_CHANGE && tool.nature() != Nature::Local {
        rustix::fs::sync();
        // What was read for the comparison, and Syncthing's next look, are over.
        std::thread::sleep(Duration::from_secs(2));
        let seed = u64::from(started.elapsed().subsec_nanos());
        let news = trees::content(1, MIB as usize, seed);
        let file = File::options().write(true).open(original.path.join("file"))?;
        let copy = b.join("file");
        let mut there = || {
            let mut read = vec![0; news.len()];
            File::open(&copy)
                .is_ok_and(|copy| copy.read_exact_at(&mut read, size / 2).is_ok() && read == news)
        };
        let (before, used) = (bench.wire.carried()?, Used::now());
        let started = Instant::now();
        file.write_all_at(&news, size / 2)?;
        drop(file);
        session.sync(&mut there, bench.end())?;
        let took = started.elapsed().as_secs_f64();
        let (used, carried) = (Used::now().since(used), bench.carried_since(before)?);
        let wrong = bench.judge(tool, &treewalk::walk(&original.path)?, &b)?;
        found.push(
            Found::new("big-change", wrong)
                .with("seconds", took)
                .with("wire", bytes(carried.there + carried.back) / MEGA)
                .with("read", used.read_bytes / MEGA),
        );
    }
    drop(session);
    // Room for the next; a single inode is no burden to ext4.
    std::fs::remove_file(b.join("file"))?;
    Ok(found)
}
