//! A machine with two nodes loses its power in the middle of its work, again and
//! again, on each filesystem. When it is back: what was acknowledged is there on
//! both, no file is torn, nothing that the loss did passes for a user's change,
//! and what has not changed is not sent again.
//!
//! QEMU is killed at a random moment, and the next guest has the same disk: all
//! that the first one's kernel had not written is lost, as with real machines.
//! A user works on node one, round by round; a round is acknowledged when
//! `omirr wait` says so, which the guest then prints.
//!
//! `OMIRR_POWER_CUTS` says how often per filesystem, `OMIRR_POWER_SEED` when.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use omirr::content::hash_bytes;
use omirr::index::Index;
use omirr_tests::guest::{self, Disk, End};
use omirr_tests::nodes::Node;
use omirr_tests::treewalk;
use omirr_tests::users::Rng;

/// Emulated processors are slow; only a hang takes so long.
const LONG: Duration = Duration::from_secs(300);
const KERNEL: &str = "6.1";
const TEST: &str = "/usr/local/bin/guest-test";
/// In the guest: which rounds have been acknowledged, `FIRST-LAST` each.
const ROUNDS: &str = "OMIRR_POWER_ROUNDS";
/// In the guest: whether to work after looking.
const WORKS: &str = "OMIRR_POWER_WORKS";
/// Each node has a disk of its own: what one's daemon writes must not carry the
/// other's along.
const DISKS: [&str; 2] = ["/power-one", "/power-two"];
/// Files of a round.
const FILES: u64 = 12;

/// One large file, of which each round changes three slots in place: the peer
/// writes over its copy, or shares the rest of it.
const LARGE: &str = "large";
const LARGE_BYTES: u64 = 5 << 20;
const SLOT_BYTES: u64 = 64 << 10;

/// Acknowledged rounds without a gap: after the last one the power was cut.
type Runs = Vec<(u64, u64)>;

/// What a file holds: its own name and version in every line, so that any part
/// of another, or of nothing, shows.
fn content(round: u64, file: u64, version: u64) -> Vec<u8> {
    let lines = if file == 0 { 20_000 } else { 1 + file * 40 };
    (0..lines)
        .flat_map(|line| format!("round {round} file {file} version {version} line {line}\n").into_bytes())
        .collect()
}

fn name(round: u64, file: u64) -> String {
    format!("round-{round}/file-{file}")
}

/// What a round writes into the large file, and where: nothing of the 25 rounds
/// before is overwritten.
fn slots(round: u64) -> [(u64, Vec<u8>); 3] {
    [0, 1, 2].map(|nth| {
        let slot = (3 * round + nth) % (LARGE_BYTES / SLOT_BYTES);
        (
            slot * SLOT_BYTES,
            format!("round {round} slot {nth}\n").repeat(400).into_bytes(),
        )
    })
}

fn change_large(share: &Path, round: u64) -> std::io::Result<()> {
    let path = share.join(LARGE);
    let is_whole = fs::metadata(&path).is_ok_and(|found| found.len() == LARGE_BYTES);
    if !is_whole {
        let line = |n: u64| format!("{n:015}\n").into_bytes();
        fs::write(&path, (0..LARGE_BYTES / 16).flat_map(line).collect::<Vec<u8>>())?;
    }
    let file = fs::OpenOptions::new().write(true).open(&path)?;
    for (offset, bytes) in slots(round) {
        file.write_all_at(&bytes, offset)?;
    }
    Ok(())
}

/// What a user does in a round: new files, and some of the large one changes; of
/// the round before, one file gets another name, one goes, one is replaced in one
/// step, one changes in its place.
fn work(share: &Path, round: u64, has_former: bool) {
    fs::create_dir_all(share.join(format!("round-{round}"))).expect("the disk has room");
    for file in 0..FILES {
        fs::write(share.join(name(round, file)), content(round, file, 1)).expect("the disk has room");
    }
    change_large(share, round).expect("the disk has room");
    if has_former {
        let former = |file| share.join(name(round - 1, file));
        let steps = || -> std::io::Result<()> {
            fs::rename(former(3), former(13))?;
            fs::remove_file(former(4))?;
            fs::write(former(14), content(round - 1, 5, 2))?;
            fs::rename(former(14), former(5))?;
            fs::write(former(6), content(round - 1, 6, 2))
        };
        steps().expect("nobody else is at it");
    }
}

/// What must be there of acknowledged rounds: path → the contents that it may
/// have; none at all if it must be gone. Of the last round of a run, what the
/// next one was about to change is left out.
fn expected(runs: &Runs) -> BTreeMap<String, Option<Vec<u8>>> {
    let mut expected = BTreeMap::new();
    for &(first, last) in runs {
        for round in first..=last {
            for file in 0..FILES {
                expected.insert(name(round, file), Some(content(round, file, 1)));
            }
            let changed_next = [3, 4, 5, 6, 13, 14];
            for file in changed_next {
                expected.remove(&name(round, file));
            }
            if round < last {
                expected.insert(name(round, 13), Some(content(round, 3, 1)));
                expected.insert(name(round, 3), None);
                expected.insert(name(round, 4), None);
                expected.insert(name(round, 5), Some(content(round, 5, 2)));
                expected.insert(name(round, 6), Some(content(round, 6, 2)));
                expected.insert(name(round, 14), None);
            }
        }
    }
    expected
}

fn missing(share: &Path, runs: &Runs) -> Vec<String> {
    let mut wrong = Vec::new();
    for (path, meant) in expected(runs) {
        let found = fs::read(share.join(&path)).ok();
        if found != meant {
            let bytes = |content: &Option<Vec<u8>>| content.as_ref().map(Vec::len);
            wrong.push(format!(
                "{path} has {:?} bytes, not {:?}",
                bytes(&found),
                bytes(&meant)
            ));
        }
    }
    if let Some(&(_, last)) = runs.last() {
        let large = fs::read(share.join(LARGE)).unwrap_or_default();
        for (offset, meant) in slots(last) {
            let there = large.get(offset as usize..).unwrap_or_default();
            if !there.starts_with(&meant) {
                wrong.push(format!("{LARGE} lacks round {last} at {offset}"));
            }
        }
    }
    wrong
}

/// Files that are not what a node's own index says, and are not being applied:
/// the index is on disk later than what it tells of. No daemon runs.
fn not_as_indexed(node: &Node) -> Vec<String> {
    let file = node.state_dir().join("shares/tree/index.redb");
    if !file.exists() {
        return Vec::new();
    }
    let index = Index::open(&file, &node.name).expect("the index is whole");
    let reader = index.read().expect("the index can be read");
    let intents = reader.intents().expect("intents can be read");
    let mut wrong = Vec::new();
    for (_, path, record) in reader.rows_after(0, usize::MAX).expect("rows can be read") {
        if intents.iter().any(|(under_way, _)| *under_way == path) {
            continue;
        }
        let on_disk = node.share.join(path.to_string());
        let found = fs::symlink_metadata(&on_disk).ok();
        let same = match (record.row.live(), &found) {
            (None, found) => found.is_none(),
            (Some(_), None) => false,
            (Some(entry), Some(_)) => entry.content().is_none_or(|(_, hash)| {
                let bytes = fs::read(&on_disk).expect("a file can be read");
                hash_bytes(&bytes) == hash
            }),
        };
        if !same {
            let size = found.map(|found| found.len());
            wrong.push(format!(
                "{path} (deleted {}, on disk {size:?} bytes)",
                record.row.deleted
            ));
        }
    }
    wrong
}

/// Everything that runs in the guest.
fn in_the_guest(runs: &Runs, works: bool) {
    let mut one = Node::new(Path::new(DISKS[0]), "one");
    let mut two = Node::new(Path::new(DISKS[1]), "two");
    one.knows(&two);
    two.knows(&one);
    for node in [&mut one, &mut two] {
        node.tracer = "source = \"fanotify\"".to_owned();
    }
    // Before any daemon has looked.
    let torn = not_as_indexed(&two);
    assert!(
        torn.is_empty(),
        "torn or missing on node two: {}",
        torn.join("; ")
    );
    let lost = not_as_indexed(&one);
    println!(
        "lost by node one's kernel though indexed: {} {lost:?}",
        lost.len()
    );
    let lost = missing(&two.share, runs);
    assert!(
        lost.is_empty(),
        "acknowledged, and not on node two: {}",
        lost.join("; ")
    );
    one.start();
    two.start();
    one.settle(LONG);
    two.settle(LONG);
    one.settle(LONG);
    for node in [&one, &two] {
        let lost = missing(&node.share, runs);
        assert!(
            lost.is_empty(),
            "acknowledged, and not on node {} after all: {}\n{}\n{}",
            node.name,
            lost.join("; "),
            one.log_tail(),
            two.log_tail()
        );
    }
    let walk = |node: &Node| treewalk::walk(&node.share).expect("a share can be walked");
    let differences = treewalk::diff(&walk(&one), &walk(&two));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    if !runs.is_empty() {
        // Node two has no users: nothing there is anybody's change.
        let stats = two.stats();
        let made = stats["shares"][0]["rows_made"].as_u64();
        assert_eq!(made, Some(0), "{stats:#}\n{}", two.log_tail());
        // Of what was sent again, no more than what the last moments made.
        let sent = one.stats()["shares"][0]["content_sent_bytes"]
            .as_u64()
            .unwrap_or(u64::MAX);
        let a_round: usize = (0..FILES).map(|file| content(0, file, 1).len()).sum();
        assert!(sent <= 3 * a_round as u64 + LARGE_BYTES, "{sent} bytes were sent");
    }
    println!("checked: {runs:?}");
    if works {
        let mut round = runs.last().map_or(0, |(_, last)| last + 2);
        let first = round;
        loop {
            work(&one.share, round, round > first);
            one.settle(LONG);
            println!("acknowledged {round}.");
            round += 1;
        }
    }
    one.stop();
    two.stop();
}

fn survives(file_system: &str, test: &str) {
    if let Ok(text) = std::env::var(ROUNDS) {
        let run = |run: &str| {
            let (first, last) = run.split_once('-').expect("FIRST-LAST");
            (first.parse().expect("a number"), last.parse().expect("a number"))
        };
        let runs = text.split_whitespace().map(run).collect();
        return in_the_guest(&runs, std::env::var_os(WORKS).is_some());
    }
    if let Some(reason) = guest::unavailable() {
        return omirr_tests::skip(test, &reason);
    }
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let cuts = number("OMIRR_POWER_CUTS", 1);
    let mut rng = Rng(number("OMIRR_POWER_SEED", 1));
    let folder = tempfile::tempdir().expect("a folder for the disk can be made");
    let mut runs = Runs::new();
    for cut in 0..=cuts {
        let last = cut == cuts;
        let next = runs.last().map_or(0, |(_, last)| last + 2);
        let after = next + rng.below(3);
        // At any time, and right after the word.
        let delay = if rng.below(2) == 0 {
            rng.millis_below(40)
        } else {
            rng.millis_below(2500)
        };
        let rounds: Vec<String> = runs
            .iter()
            .map(|(first, last)| format!("{first}-{last}"))
            .collect();
        let program = std::env::current_exe().expect("a running program has a path");
        let mut machine = guest::new(KERNEL)
            .name(&format!("guest_power-{file_system}-{cut}"))
            .timeout(Duration::from_secs(900))
            .program_at(&program, TEST)
            .env("RUST_BACKTRACE", "1")
            .env(ROUNDS, rounds.join(" "));
        for (number, mount) in DISKS.iter().enumerate() {
            let disk = Disk {
                file_system: file_system.to_owned(),
                ..Disk::ext4(512, mount)
            };
            machine = machine.disk_in(disk, &folder.path().join(format!("disk-{number}")));
        }
        if !last {
            machine = machine
                .env(WORKS, "1")
                .power_off(&format!("acknowledged {after}."), delay);
        }
        let outcome = guest::run(machine, &[TEST, "--exact", test, "--nocapture"]);
        let fine = match outcome.end {
            End::Said(0) => last && outcome.output.contains("checked"),
            End::PoweredOff => !last,
            _ => false,
        };
        if !fine {
            let kept = folder.keep();
            panic!(
                "{file_system}, after {runs:?}: {}\nthe disks stay in {}",
                outcome.describe(),
                kept.display()
            );
        }
        if !last {
            // What was printed just before the power went counts, too.
            let acked = outcome
                .output
                .lines()
                .filter_map(|line| {
                    line.strip_prefix("acknowledged ")?
                        .strip_suffix('.')?
                        .parse()
                        .ok()
                })
                .max()
                .expect("it was waited for");
            println!(
                "{file_system}: the power was cut {} ms after round {after}; {acked} was acknowledged",
                delay.as_millis()
            );
            runs.push((next, acked));
        }
    }
}

#[test]
fn a_power_cut_on_ext4_costs_nothing_that_was_acknowledged() {
    survives("ext4", "a_power_cut_on_ext4_costs_nothing_that_was_acknowledged");
}

#[test]
fn a_power_cut_on_xfs_costs_nothing_that_was_acknowledged() {
    survives("xfs", "a_power_cut_on_xfs_costs_nothing_that_was_acknowledged");
}

#[test]
fn a_power_cut_on_btrfs_costs_nothing_that_was_acknowledged() {
    survives(
        "btrfs",
        "a_power_cut_on_btrfs_costs_nothing_that_was_acknowledged",
    );
}
