//! How omirr grows: with files, with the files of one directory, with shares and with
//! peers. It has no rival here, since most of them would not come to an end.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use omirr_tests::net::Side;
use omirr_tests::nodes::Node;
use omirr_tests::treewalk;

use super::{Case, Found, MEGA, REST, Row, Table, bytes};
use crate::bench::{Bench, On, Scale};
use crate::figures::{self, Unit};
use crate::machine;
use crate::process::resident;
use crate::stop;
use crate::tools::{Tool, omirr};
use crate::trees::{self, Ground};

/// So many changes are timed.
const CHANGES: u64 = 20;
/// What a wait may take for each file, beside the ordinary limit.
const EACH: Duration = Duration::from_micros(400);
/// More files than these lie on a disk, and their copies are counted, not compared.
const MANY: u64 = 2_000_000;
/// How cases begin in which the files are in one directory, in several shares, and
/// those with more than one peer.
const FLAT: &str = "one directory";
const SHARES: &str = "shares of 1,000 files";
const PEERS: &str = "peers, 1,000 files";

pub const ROW: Row = Row {
    name: "scale",
    also: &[],
    tools: &["omirr"],
    cases,
    measure,
    tables: &[
        table(
            "Growth: the first copy",
            "first copy",
            Unit::Seconds,
            "From the start of all daemons, with nothing known, until all of A is durable on every peer. Files are \
             empty, in folders of a thousand unless it says otherwise; up to a million in memory, more on disk.",
        ),
        table(
            "Growth: start with nothing changed",
            "start",
            Unit::Seconds,
            "From the start of all daemons until they are in sync.",
        ),
        table(
            "Growth: a new file, until it is on every peer",
            "change",
            Unit::Milliseconds,
            "",
        ),
        table(
            "Growth: memory of A at rest",
            "resident",
            Unit::Megabytes,
            "After a restart and six seconds.",
        ),
        table("Growth: index of A", "index", Unit::Megabytes, ""),
        table("Growth: index of A, for each file", "index each", Unit::Bytes, ""),
    ],
};

const fn table(title: &'static str, measure: &'static str, unit: Unit, note: &'static str) -> Table {
    Table {
        row: "scale",
        title,
        cases: "",
        measure,
        unit,
        goals: &[],
        note,
    }
}

fn cases(scale: Scale) -> Vec<Case> {
    let files = |count: u64| Case::new(format!("{} files", figures::count(count)), count);
    let flat = |count: u64| Case::new(format!("{FLAT} of {} files", figures::count(count)), count);
    let shares = |count: u64| Case::new(format!("{count} {SHARES}"), count);
    let peers = |count: u64| Case::new(format!("{count} {PEERS}"), count);
    match scale {
        Scale::Quick => vec![files(10_000), flat(10_000), shares(4), peers(4)],
        Scale::Full => vec![
            files(100_000),
            files(1_000_000).once(),
            files(10_000_000).once(),
            flat(1_000_000).once(),
            shares(1),
            shares(64),
            peers(1),
            peers(32),
        ],
    }
}

/// The node that has the files, and after it those that are to have them.
struct Star(Vec<Node>);

impl Star {
    /// Each on a filesystem of its own, as on a machine of its own.
    fn new(bench: &Bench, hub_at: &Ground, peers_at: &[Ground]) -> Star {
        let mut hub = omirr::node(&bench.wire, Side::One, &hub_at.path, "a");
        let mut peers = Vec::new();
        for (port, at) in (20_000..).zip(peers_at) {
            let mut peer = omirr::node(&bench.wire, Side::Two, &at.path, &format!("b{port}"));
            // One that was free a moment ago may be given twice.
            peer.port = port;
            hub.knows(&peer);
            peer.knows(&hub);
            peers.push(peer);
        }
        peers.insert(0, hub);
        Star(peers)
    }

    fn hub(&self) -> &Node {
        &self.0[0]
    }

    fn peers(&self) -> &[Node] {
        &self.0[1..]
    }

    fn start(&mut self) {
        self.0.iter_mut().for_each(Node::start);
    }

    fn stop(&mut self) {
        self.0.iter_mut().for_each(Node::stop);
    }

    /// Until all of A is on every peer.
    fn settle(&mut self, end: Instant) -> Result<()> {
        omirr::settle(&mut self.0, 0, end)
    }

    /// Until no node has anything to say to another.
    fn settle_all(&mut self, end: Instant) -> Result<()> {
        (0..self.0.len()).try_for_each(|nth| omirr::settle(&mut self.0, nth, end))
    }
}

impl Drop for Star {
    fn drop(&mut self) {
        omirr::let_go(&mut self.0);
    }
}

fn shares(of: &Node) -> Vec<PathBuf> {
    let more = of.more_shares.iter().map(|(_, path)| path.clone());
    std::iter::once(of.share.clone()).chain(more).collect()
}

fn measure(bench: &Bench, case: &Case, _tool: &dyn Tool) -> Result<Vec<Found>> {
    let (mut share_count, mut peers, mut files, mut in_each) = (1, 1, case.size, 1000);
    if case.name.starts_with(FLAT) {
        in_each = files;
    } else if case.name.ends_with(SHARES) {
        (share_count, files) = (case.size, 1000);
    } else if case.name.ends_with(PEERS) {
        (peers, files) = (case.size, 1000);
    }
    let on = match files > MANY {
        true => On::Image(files),
        false => On::Memory,
    };
    if files > MANY {
        enough_memory(files)?;
    }
    let here = bench.ground(on)?;
    let there = (0..peers).map(|_| bench.ground(on)).collect::<Result<Vec<_>>>()?;
    let mut star = Star::new(bench, &here, &there);
    for node in &mut star.0 {
        for nth in 1..share_count {
            let path = node.folder.join(format!("share{nth}"));
            fs::create_dir(&path)?;
            node.more_shares.push((format!("tree{nth}"), path));
        }
    }
    for share in shares(star.hub()) {
        trees::make(&share, files, in_each, 0, 1)?;
    }
    rustix::fs::sync();
    let entries = files * share_count;
    let end = || bench.end() + EACH * u32::try_from(entries * peers).unwrap_or(u32::MAX);

    let began = Instant::now();
    star.start();
    star.settle(end())?;
    let mut found = Found::new("scale", None).with("first copy", began.elapsed().as_secs_f64());
    star.settle_all(end())?;
    star.stop();
    let began = Instant::now();
    star.start();
    star.settle(end())?;
    found = found.with("start", began.elapsed().as_secs_f64());
    std::thread::sleep(REST);
    let at_rest = resident(star.hub().pid().unsigned_abs());
    for nth in 0..CHANGES {
        let name = format!("d0000/new{nth}");
        let copies: Vec<PathBuf> = star.peers().iter().map(|peer| peer.share.join(&name)).collect();
        std::thread::sleep(Duration::from_millis(50));
        fs::write(star.hub().share.join(&name), b"new")?;
        let changed = Instant::now();
        let pause = (Duration::from_micros(20), Duration::from_millis(2));
        let arrived = stop::until(end(), pause.0, pause.1, || {
            copies
                .iter()
                .all(|copy| fs::read(copy).is_ok_and(|read| read == b"new"))
        })?;
        found = found.with("change", (arrived - changed).as_secs_f64() * 1e3);
    }
    star.settle(end())?;
    star.stop();
    let index = size_of_all(&star.hub().state_dir())?;
    found.wrong = judge(&star, entries)?;
    Ok(vec![
        found
            .with("resident", bytes(at_rest) / MEGA)
            .with("index", bytes(index) / MEGA)
            .with("index each", bytes(index) / bytes(entries)),
    ])
}

/// A first start has a part of the tree in memory, a later one a number for each path.
fn enough_memory(files: u64) -> Result<()> {
    // Of both nodes at the later start, which takes more, as measured with 1,000,000
    // (bench/PROFILE.md).
    const EACH_BYTES: u64 = 260;
    let (wanted, free) = (files * EACH_BYTES, machine::available_memory());
    if free < wanted {
        bail!(
            "{files} files take about {} GB of memory, and {} GB are free",
            wanted >> 30,
            free >> 30
        );
    }
    Ok(())
}

/// What is wrong with the copies.
fn judge(star: &Star, entries: u64) -> Result<Option<String>> {
    for peer in star.peers() {
        for (a, b) in shares(star.hub()).iter().zip(shares(peer)) {
            let wrong = if entries > MANY {
                let (a, b) = (trees::files_in(a), trees::files_in(&b));
                (a != b).then(|| format!("{a} files in A, {b} in B"))
            } else {
                trees::compare(&treewalk::walk(a)?, &b, trees::Exactness::Everything)?
            };
            if wrong.is_some() {
                return Ok(wrong);
            }
        }
    }
    Ok(None)
}

/// What the files in a folder and its folders take up.
fn size_of_all(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += match meta.is_dir() {
            true => size_of_all(&entry.path())?,
            // A socket or a pipe has none.
            false => std::os::unix::fs::MetadataExt::blocks(&meta) * 512,
        };
    }
    Ok(bytes)
}
