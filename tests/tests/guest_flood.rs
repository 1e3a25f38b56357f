//! More changes than any queue holds: the ring is one page, and the daemon is
//! stopped, or killed, while they are made. Afterwards both nodes hold the same
//! trees, no tree was compared as a whole, and the figures account for every
//! change.
//!
//! `OMIRR_FLOOD_FILES` sets how many files there are; ten changes each.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use omirr_tests::ends::Ends;
use omirr_tests::guest::{self, Disk, Guest};
use omirr_tests::net::Cable;
use omirr_tests::nodes::Pair;

/// Emulated processors are slow; only a hang takes so long, for two thousand
/// files. It ends before the guest's time does, so that the daemons' logs are
/// shown.
const LONG: Duration = Duration::from_secs(600);
const GUEST: Duration = Duration::from_secs(1200);
const FILES: usize = 2_000;
const PER_FOLDER: usize = 500;
const WRITERS: usize = 2;
const KILLS: usize = 10;

fn files() -> usize {
    std::env::var("OMIRR_FLOOD_FILES").map_or(FILES, |files| files.parse().expect("a number"))
}

/// [`LONG`] or [`GUEST`], for as many files as there are.
fn for_all_files(time: Duration) -> Duration {
    time * u32::try_from(files().div_ceil(FILES))
        .expect("a number of files")
        .min(50)
}

fn fit(guest: Guest, cpus: u32) -> Guest {
    let guest = guest
        .memory_mib(3072)
        .cpus(cpus)
        .timeout(for_all_files(GUEST))
        .disk(Disk::ext4(8192, "/flood"))
        .env("OMIRR_TEST_DIR", "/flood");
    match std::env::var("OMIRR_FLOOD_FILES") {
        Ok(files) => guest.env("OMIRR_FLOOD_FILES", &files),
        Err(_) => guest,
    }
}

/// Creates, appends in 64-byte steps, renames, unlinks: about ten changes for
/// each file.
fn flood(root: &Path, files: usize, writer: &str, pause: Duration) {
    let folder = |n: usize| root.join(format!("{writer}-{}", n / PER_FOLDER));
    let step = [b'x'; 64];
    for n in 0..files {
        thread::sleep(pause);
        if n % PER_FOLDER == 0 {
            fs::create_dir(folder(n)).unwrap();
        }
        let path = folder(n).join(format!("f{n}"));
        let mut file = File::create_new(&path).unwrap();
        for _ in 0..6 {
            file.write_all(&step).unwrap();
        }
        drop(file);
        match n % 4 {
            0 => fs::rename(&path, folder(n).join(format!("g{n}"))).unwrap(),
            1 => fs::remove_file(&path).unwrap(),
            2 => fs::rename(&path, folder(n / 2).join(format!("h{n}"))).unwrap(),
            _ => {}
        }
        // One that was made long before.
        if n % 8 == 7 {
            let old = folder(n / 2).join(format!("f{}", n / 2));
            if let Ok(mut file) = OpenOptions::new().append(true).open(old) {
                file.write_all(&step).unwrap();
            }
        }
    }
}

fn pair(attach: &str, transport: &str) -> Pair {
    let cable = Arc::new(Cable::lay());
    let mut pair = Pair::new();
    pair.on_cable(&cable);
    pair.one.tracer = format!(
        "source = \"ebpf\"\nattach = \"{attach}\"\ntransport = \"{transport}\"\nring_size = \"4KiB\""
    );
    pair.two.tracer = "source = \"ebpf\"".to_owned();
    pair.start();
    pair.settle(for_all_files(LONG));
    pair
}

/// Runs the flood, once and then until `meanwhile`, which is called over and
/// over, says that it may end.
fn while_flooded(pair: &mut Pair, mut meanwhile: impl FnMut(&mut Pair) -> bool) {
    let (may_end, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let root = pair.one.share.clone();
    let began = Instant::now();
    thread::scope(|scope| {
        let (may_end, ended, root) = (&may_end, &ended, &root);
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                scope.spawn(move || {
                    // As fast as it goes; then only so that something goes on.
                    let mut rounds = 0;
                    let mut pause = Duration::ZERO;
                    while rounds == 0 || !may_end.load(Ordering::Acquire) {
                        flood(root, files() / WRITERS, &format!("{writer}-{rounds}"), pause);
                        rounds += 1;
                        pause = Duration::from_millis(20);
                    }
                    rounds * files() / WRITERS
                })
            })
            .collect();
        scope.spawn(move || {
            let files: usize = writers.into_iter().map(|w| w.join().unwrap()).sum();
            ended.store(true, Ordering::Release);
            println!("{files} files flooded in {:?}", began.elapsed());
        });
        let _ends = Ends(may_end);
        while !ended.load(Ordering::Acquire) {
            may_end.store(meanwhile(pair), Ordering::Release);
        }
    });
}

/// How often the tree was compared as a whole.
fn comparisons(pair: &Pair) -> usize {
    pair.one
        .log_text()
        .matches("the tree is compared with the index")
        .count()
}

/// Both are the same, and the tree was compared no more than the `before` times
/// that the first start took: the other daemon, which tries itself on the same
/// filesystem then, may have been one of the reasons.
fn check(mut pair: Pair, before: usize) {
    let began = Instant::now();
    pair.settle_equal(for_all_files(LONG));
    println!("settled after {:?}", began.elapsed());
    assert_eq!(comparisons(&pair), before, "{}", pair.one.log_text());
    let stats = pair.one.stats();
    let all = |list: &str, figure: &str| -> u64 {
        let list = stats[list].as_array().expect("a list");
        list.iter()
            .map(|one| one[figure].as_u64().expect("a number"))
            .sum()
    };
    let (seen, submitted) = (all("hooks", "hits"), all("per_cpu", "submitted"));
    let (coalesced, dropped) = (all("per_cpu", "coalesced"), all("per_cpu", "dropped"));
    println!("{seen} changes seen: {submitted} submitted, {coalesced} coalesced, {dropped} dropped");
    println!("{}", stats["overflow"]);
    assert_eq!(seen, submitted + coalesced + dropped, "{stats:#}");
    assert!(dropped > 0, "the ring was never full: {stats:#}");
    assert_eq!(stats["lost"], 0, "{stats:#}");
    pair.one.stop();
    pair.two.stop();
}

fn stopped_for_half_of_the_time(attach: &str, transport: &str) {
    let mut pair = pair(attach, transport);
    let before = comparisons(&pair);
    while_flooded(&mut pair, |pair| {
        let pause = Duration::from_millis(400);
        pair.one.stop_reading();
        thread::sleep(pause);
        pair.one.go_on();
        thread::sleep(pause);
        true
    });
    check(pair, before);
}

fn killed_again_and_again(attach: &str, transport: &str) {
    let mut pair = pair(attach, transport);
    let before = comparisons(&pair);
    let mut kills = 0;
    while_flooded(&mut pair, |pair| {
        thread::sleep(Duration::from_millis(300));
        if kills < KILLS {
            pair.one.kill();
            thread::sleep(Duration::from_millis(300));
            kills += 1;
            pair.one.start();
            let took_over = |log: String| log.matches("the event source has gone on").count();
            let deadline = Instant::now() + for_all_files(LONG) / 2;
            while took_over(pair.one.log_text()) < kills {
                assert!(pair.one.is_running(), "{}", pair.one.log_tail());
                assert!(
                    Instant::now() < deadline,
                    "no take-over after kill {kills}:\n{}",
                    pair.one.log_tail()
                );
                thread::sleep(Duration::from_millis(20));
            }
        }
        kills == KILLS
    });
    println!("killed {kills} times");
    check(pair, before);
}

#[test]
fn stopped_on_5_10_with_perf() {
    guest::inside(
        "5.10",
        |guest| fit(guest, 2),
        || stopped_for_half_of_the_time("fentry", "perf"),
    );
}

#[test]
fn stopped_on_6_1() {
    guest::inside(
        "6.1",
        |guest| fit(guest, 2),
        || stopped_for_half_of_the_time("fentry", "ring"),
    );
}

#[test]
fn stopped_on_one_processor() {
    guest::inside(
        "6.12",
        |guest| fit(guest, 1),
        || stopped_for_half_of_the_time("fentry", "ring"),
    );
}

#[test]
fn killed_on_6_1() {
    guest::inside(
        "6.1",
        |guest| fit(guest, 2),
        || killed_again_and_again("fentry", "ring"),
    );
}

#[test]
fn killed_on_5_10() {
    guest::inside(
        "5.10",
        |guest| fit(guest, 2),
        || killed_again_and_again("fentry", "ring"),
    );
}

#[test]
fn killed_on_7_2_with_kprobe() {
    guest::inside(
        "7.2",
        |guest| fit(guest, 2),
        || killed_again_and_again("kprobe", "ring"),
    );
}
