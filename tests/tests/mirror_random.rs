//! Two nodes natively, random changes on both sides at once in few names, so
//! that they meet; nodes are killed and restarted meanwhile. In the end both
//! trees are the same, by a walk that shares no code with the daemon.
//!
//! `OMIRR_RANDOM_SEED` runs one history, `OMIRR_RANDOM_RUNS` so many from there.
//! A history depends on timing as well: a seed makes the same changes again, not
//! always the same meeting.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use omirr_tests::nodes::{Pair, may_mirror};
use rustix::fs::{CWD, RenameFlags, renameat_with};

const SOON: Duration = Duration::from_secs(120);
/// How long users are at it, in each of a history's phases.
const BUSY: Duration = Duration::from_millis(1500);

/// Steele, Lea and Flood's SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A name, up to three deep, out of few.
    fn path(&mut self, share: &Path) -> PathBuf {
        const NAMES: [&[u8]; 6] = [b"a", b"b", b"c", b"d-d", b"\xff\xfe", b"e e"];
        let mut path = share.to_owned();
        for _ in 0..=self.below(3) {
            path.push(OsStr::from_bytes(NAMES[self.below(6) as usize]));
        }
        path
    }
}

/// One change, which may well be impossible: then nothing happens.
fn change(rng: &mut Rng, share: &Path, who: &str, nth: u64) {
    let path = rng.path(share);
    let other = rng.path(share);
    let _ = match rng.below(22) {
        0..=4 => fs::write(&path, format!("{who} {nth}\n")),
        5 => fs::write(&path, vec![nth as u8; rng.below(400_000) as usize]),
        6 => File::options()
            .append(true)
            .open(&path)
            .and_then(|mut f| f.write_all(b"more\n")),
        7 => File::options()
            .write(true)
            .open(&path)
            .and_then(|f| f.write_all_at(who.as_bytes(), 3)),
        8 => File::options()
            .write(true)
            .open(&path)
            .and_then(|f| f.set_len(rng.below(100_000))),
        9 | 10 => fs::create_dir(&path),
        11 => fs::create_dir_all(path.join("x/y")).and_then(|()| fs::write(path.join("x/y/z"), who)),
        12 => fs::remove_file(&path),
        13 => fs::remove_dir_all(&path),
        14 | 15 => fs::rename(&path, &other),
        16 => renameat_with(CWD, &path, CWD, &other, RenameFlags::EXCHANGE).map_err(Into::into),
        17 => fs::hard_link(&path, &other),
        18 => symlink(format!("to-{who}-{nth}"), &path),
        19 => fs::set_permissions(&path, fs::Permissions::from_mode(0o600 + rng.below(64) as u32)),
        20 => {
            let when = UNIX_EPOCH + Duration::from_nanos(rng.below(1 << 60));
            File::open(&path).and_then(|f| f.set_times(fs::FileTimes::new().set_modified(when)))
        }
        _ => rustix::fs::setxattr(
            &path,
            c"user.who",
            who.as_bytes(),
            rustix::fs::XattrFlags::empty(),
        )
        .map_err(Into::into),
    };
}

/// Changes as fast as may be, with pauses, until told to stop.
fn user(seed: u64, share: &Path, who: &str, stop: &AtomicBool) {
    let mut rng = Rng(seed);
    let mut nth = 0;
    while !stop.load(Ordering::Relaxed) {
        change(&mut rng, share, who, nth);
        nth += 1;
        if rng.below(20) == 0 {
            std::thread::sleep(Duration::from_micros(rng.below(30_000)));
        }
    }
}

fn history(seed: u64) {
    let mut rng = Rng(seed);
    let mut pair = Pair::new();
    pair.start();
    pair.settle(SOON);
    for phase in 0..3 {
        let stop = AtomicBool::new(false);
        let (one, two) = (pair.one.share.clone(), pair.two.share.clone());
        let seeds = [rng.next(), rng.next()];
        std::thread::scope(|scope| {
            scope.spawn(|| user(seeds[0], &one, "one", &stop));
            scope.spawn(|| user(seeds[1], &two, "two", &stop));
            let end = Instant::now() + BUSY;
            while Instant::now() < end {
                std::thread::sleep(Duration::from_millis(100 + rng.below(400)));
                let node = if rng.below(2) == 0 {
                    &mut pair.one
                } else {
                    &mut pair.two
                };
                // The first phase is without accidents.
                match rng.below(3) {
                    0 if phase > 0 => {
                        node.kill();
                        std::thread::sleep(Duration::from_millis(rng.below(300)));
                        node.start();
                    }
                    1 if phase > 0 => {
                        node.stop_reading();
                        std::thread::sleep(Duration::from_millis(rng.below(300)));
                        node.go_on();
                    }
                    _ => {}
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        settle(&mut pair);
        pair.assert_equal();
    }
}

/// Waits until nothing is on its way. Conflicts that are found on one side may
/// lead to others on the other side, but not for ever.
fn settle(pair: &mut Pair) {
    let rows = |pair: &Pair| {
        [&pair.one, &pair.two].map(|node| {
            let stats = node.stats();
            ["rows_made", "rows_applied"].map(|figure| stats["shares"][0][figure].as_u64())
        })
    };
    pair.settle(SOON);
    for _ in 0..20 {
        let before = rows(pair);
        pair.settle(SOON);
        if rows(pair) == before {
            return;
        }
    }
    panic!(
        "rows are made though nobody changes anything\n{}\n{}",
        pair.one.log_tail(),
        pair.two.log_tail()
    );
}

#[test]
fn random_changes_on_both_sides_end_in_equal_trees() {
    if !may_mirror(module_path!()) {
        return;
    }
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse().expect("a number"))
    };
    let seed = number("OMIRR_RANDOM_SEED");
    let first = seed.unwrap_or(1);
    let runs = number("OMIRR_RANDOM_RUNS").unwrap_or(if seed.is_some() { 1 } else { 3 });
    for seed in first..first + runs {
        println!("OMIRR_RANDOM_SEED={seed}");
        history(seed);
    }
}
