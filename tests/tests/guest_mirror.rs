//! Two nodes in two network namespaces of a guest mirror the kernel's own
//! modules folder, or a part of it, on ext4, with changes coming from eBPF: by
//! fentry through the ring buffer, and by kprobe through the perf buffer.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use omirr_tests::guest::{self, Disk, Guest, Kernel};
use omirr_tests::net::{Cable, Side};
use omirr_tests::nodes::Pair;
use omirr_tests::ways::{self, Mapped};

/// Emulated processors are slow; only a hang takes so long.
const LONG: Duration = Duration::from_secs(400);
const TREE: &str = "/modules";
/// Some four hundred of the modules: by kprobe each takes its time.
const A_PART: &str = "kernel/net";
const MIB: u64 = 1 << 20;
/// Of the file of which little changes; `OMIRR_LARGE_MIB` for another.
const LARGE_MIB: u64 = 24;
/// So often a page is stored into while the daemon looks at it.
const ROUNDS: u8 = 8;

/// A guest with the kernel's modules on a disk of their own.
fn fit(guest: Guest, kernel: &str) -> Guest {
    let modules = Kernel::find(kernel).ok().and_then(|kernel| kernel.modules);
    let tree = Disk {
        content: modules,
        ..Disk::ext4(768, TREE)
    };
    let guest = match std::env::var("OMIRR_LARGE_MIB") {
        Ok(mib) => guest.env("OMIRR_LARGE_MIB", &mib),
        Err(_) => guest,
    };
    guest
        .memory_mib(2048)
        .timeout(Duration::from_secs(900))
        .env("OMIRR_TEST_DIR", "/mnt")
        .disk(tree)
}

fn run(command: &mut Command) {
    let out = command.output().expect("the command can be started");
    assert!(
        out.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![folder.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => todo.push(entry.path()),
                kind if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

/// Mirrors what lies at `part` of the modules' folder.
fn mirrors(attach: &str, transport: &str, part: &str) {
    let (mut pair, _cable) = mirrored(attach, transport, part);
    pair.one.stop();
    pair.two.stop();
}

/// The same, and then a large file that is changed in every way.
fn mirrors_bytes(attach: &str, transport: &str, part: &str) {
    let (mut pair, cable) = mirrored(attach, transport, part);
    finds_what_was_changed_in_whatever_way(&mut pair);
    finds_later_what_nothing_tells_of(&mut pair, &cable);
    pair.one.stop();
    pair.two.stop();
}

fn mirrored(attach: &str, transport: &str, part: &str) -> (Pair, Arc<Cable>) {
    let cable = Arc::new(Cable::lay());
    let mut pair = Pair::new();
    pair.on_cable(&cable);
    for node in [&mut pair.one, &mut pair.two] {
        node.tracer = format!("source = \"ebpf\"\nattach = \"{attach}\"\ntransport = \"{transport}\"");
    }
    pair.start();
    pair.settle(LONG);
    for node in [&pair.one, &pair.two] {
        let source = &node.status().expect("the daemon answers")["source"];
        assert_eq!(
            (&source["kind"], &source["attach"], &source["transport"]),
            (&"ebpf".into(), &attach.into(), &transport.into()),
            "{source}"
        );
    }

    run(Command::new("cp")
        .arg("-a")
        .arg(Path::new(TREE).join(part))
        .arg(pair.one.share.join("tree")));
    pair.settle_equal(LONG);
    let all = files(&pair.two.share);
    assert!(all.len() > 300, "only {} files have arrived", all.len());

    // Both sides at once, each in files of its own.
    std::thread::scope(|scope| {
        for (node, own) in [(&pair.one, 0), (&pair.two, 1)] {
            scope.spawn(move || {
                for (n, file) in files(&node.share)
                    .into_iter()
                    .enumerate()
                    .filter(|(n, _)| n % 2 == own)
                {
                    match n / 2 % 12 {
                        0 => fs::write(&file, format!("changed on {}\n", node.name)).unwrap(),
                        1 => fs::remove_file(&file).unwrap(),
                        2 => fs::rename(&file, file.with_extension("moved")).unwrap(),
                        3 => fs::hard_link(&file, file.with_extension("linked")).unwrap(),
                        _ => {}
                    }
                }
                let new = node.share.join(format!("made-on-{}", node.name));
                fs::create_dir_all(new.join("a/b")).unwrap();
                fs::write(new.join("a/b/c"), "deep").unwrap();
                fs::rename(new.join("a"), new.join("renamed")).unwrap();
            });
        }
    });
    pair.settle_equal(LONG);
    assert!(pair.two.share.join("made-on-one/renamed/b/c").exists());

    fs::remove_dir_all(pair.two.share.join("tree")).unwrap();
    pair.settle_equal(LONG);
    assert!(!pair.one.share.join("tree").exists());
    reads_what_was_written(&mut pair);
    // One look at each tree, at the start, and no other: nothing was lost, or
    // what was lost is told.
    for node in [&pair.one, &pair.two] {
        let stats = node.stats();
        let (events, lost) = (stats["events"].as_u64(), stats["dropped"].as_u64());
        assert!(events > Some(100), "{stats:#}");
        println!("{}: {events:?} events, {lost:?} dropped", node.name);
        // What the verifier refuses goes by kprobe, which costs more and, before 5.15,
        // does not outlive the daemon.
        for hook in stats["hooks"].as_array().expect("a list") {
            let note = hook["note"].as_str().unwrap_or_default();
            assert!(!note.contains("cannot be traced"), "{hook}");
        }
    }
    (pair, cable)
}

/// Before Linux 5.14 an entry cannot be read and removed in one step, and what is told
/// of bytes is not believed.
fn is_old() -> bool {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap()
        .starts_with("5.10.")
}

/// What a node has read, and what it has received or sent as content.
fn figures(pair: &Pair) -> [u64; 3] {
    let sent = pair.one.stats()["shares"][0]["content_sent_bytes"].as_u64();
    [pair.one.read_bytes(), pair.two.read_bytes(), sent.unwrap_or(0)]
}

/// Waits until the peer's file has this byte there.
fn has_byte(path: &Path, at: u64, byte: u8, pair: &Pair) {
    let deadline = Instant::now() + LONG;
    let has = || {
        let mut read = [0];
        let found = File::open(path).and_then(|file| file.read_exact_at(&mut read, at));
        found.is_ok() && read == [byte]
    };
    while !has() {
        assert!(
            Instant::now() < deadline,
            "{byte} at {at}: {}",
            pair.one.log_tail()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Where the kernel tells which bytes were written, no others are read.
fn reads_what_was_written(pair: &mut Pair) {
    let mib = std::env::var("OMIRR_LARGE_MIB").map_or(LARGE_MIB, |mib| mib.parse().expect("a number"));
    let path = pair.one.share.join("large");
    let since = pair.one.log_text().len();
    {
        let file = File::create(&path).unwrap();
        for part in 0..mib {
            let noise: Vec<u8> = (part * MIB..(part + 1) * MIB)
                .map(|at| (at ^ at >> 7 ^ at >> 13 ^ at >> 21) as u8)
                .collect();
            file.write_all_at(&noise, part * MIB).unwrap();
        }
    }
    pair.settle_equal(LONG);
    let file = File::options().write(true).open(&path).unwrap();
    type Change = (&'static str, fn(&File, u64));
    let changes: [Change; 5] = [
        ("written to in the middle", |file, mib| {
            file.write_all_at(&[1; 5000], mib / 2 * MIB + 5).unwrap();
        }),
        ("written to in two places", |file, mib| {
            file.write_all_at(b"first", 0).unwrap();
            file.write_all_at(b"last", (mib - 1) * MIB).unwrap();
        }),
        ("changed by a MiB", |file, mib| {
            file.write_all_at(&[2; MIB as usize], mib / 3 * MIB).unwrap();
        }),
        ("appended to", |file, mib| {
            file.write_all_at(b"end", mib * MIB).unwrap()
        }),
        ("given another mode", |file, _| {
            file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
        }),
    ];
    for (what, change) in changes {
        let before = figures(pair);
        // All of it is one change for the daemon: one that comes while the last is
        // being sent is a reason to look at the whole file.
        pair.one.stop_reading();
        change(&file, mib);
        let began = Instant::now();
        pair.one.go_on();
        pair.settle(LONG);
        let took = began.elapsed();
        let after = figures(pair);
        pair.assert_equal();
        let [one, two, sent] = [0, 1, 2].map(|n| after[n] - before[n]);
        println!(
            "{mib} MiB {what}: {one} and {two} bytes read, {sent} of content sent, on the peer after {took:?}"
        );
        // A kernel that preempts itself may pass over a program, again and again; then
        // all is compared, and the file is read in full until a change is told in full.
        let compared = pair.one.log_text()[since..].contains("events were lost");
        // Two leaves to hash and two to send, and what settling reads.
        assert!(
            is_old() || compared || one < 8 * MIB,
            "{what}: {one}\n{}",
            pair.one.log_tail()
        );
    }
    drop(file);
    pair.settle_equal(LONG);
}

/// However a large file is changed of which only what was told is read, the peer gets
/// it.
fn finds_what_was_changed_in_whatever_way(pair: &mut Pair) {
    let path = pair.one.share.join("large");
    let open = || File::options().read(true).write(true).open(&path).unwrap();
    let told = |pair: &mut Pair| {
        open().write_all_at(b"told", 3 * MIB).unwrap();
        pair.settle_equal(LONG);
    };
    let store = |mapped: &Mapped, at| mapped.store(at, !mapped.load(at));

    told(pair);
    println!("a page is stored into, looked at, and stored into again without a fault");
    let mapped = Mapped::at(&open(), 7 * MIB);
    store(&mapped, 1);
    pair.settle(LONG);
    store(&mapped, 2);
    drop(mapped);
    pair.settle_equal(LONG);

    told(pair);
    println!("a page that a read has mapped is stored into beside writes");
    let file = open();
    let mapped = Mapped::at(&file, 9 * MIB);
    let _ = mapped.load(0);
    file.write_all_at(b"beside it", MIB).unwrap();
    pair.settle(LONG);
    store(&mapped, 0);
    file.write_all_at(b"and again", 2 * MIB).unwrap();
    pair.settle(LONG);
    store(&mapped, 3);
    file.write_all_at(b"and once more", 2 * MIB).unwrap();
    drop(file);
    drop(mapped);
    pair.settle_equal(LONG);

    told(pair);
    println!("a page is stored into while the daemon writes it back, and stays mapped");
    let mapped = Mapped::at(&open(), 8 * MIB);
    let there = pair.two.share.join("large");
    for round in 1..=ROUNDS {
        for stored in 0..round * 4 {
            mapped.store(0, stored);
            std::thread::sleep(Duration::from_millis(1));
        }
        mapped.store(0, 100 + round);
        has_byte(&there, 8 * MIB, 100 + round, pair);
    }
    drop(mapped);
    pair.settle_equal(LONG);

    type Change = (&'static str, fn(&Path, &File));
    let changes: [Change; 9] = [
        ("is truncated and written to", |_, file| {
            file.set_len(20 * MIB + 7).unwrap();
            file.write_all_at(b"after", 22 * MIB).unwrap();
        }),
        (
            "is written to and truncated to the same length again",
            |_, file| {
                let len = file.metadata().unwrap().len();
                file.set_len(len - 5000).unwrap();
                file.set_len(len).unwrap();
            },
        ),
        ("gets a hole", |_, file| {
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, 5 * MIB + 5, 20_000).unwrap();
        }),
        ("gets a hole that moves the rest", |_, file| {
            rustix::fs::fallocate(file, rustix::fs::FallocateFlags::INSERT_RANGE, 4 * MIB, MIB).unwrap();
        }),
        ("is written to past the page cache", |path, _| {
            ways::write_page(&ways::direct(path), 11 * MIB, 0xd1);
        }),
        ("is written to by io_uring", |_, file| {
            assert!(ways::uring_write_page(file, 12 * MIB, 0xe1));
        }),
        ("is written to by io_uring past the page cache", |path, _| {
            assert!(ways::uring_write_page(&ways::direct(path), 13 * MIB, 0xe2));
        }),
        ("is copied into", |path, file| {
            let from = File::open(path).unwrap();
            let (mut at, mut to) = (MIB, 14 * MIB + 99);
            let copied = rustix::fs::copy_file_range(&from, Some(&mut at), file, Some(&mut to), 300_000);
            assert!(copied.unwrap() > 0);
        }),
        (
            "is written to by a descriptor whose name is gone",
            |path, file| {
                let second = path.with_extension("second");
                fs::hard_link(path, &second).unwrap();
                let old = File::options().write(true).open(&second).unwrap();
                file.write_all_at(b"by the first", 15 * MIB).unwrap();
                fs::remove_file(&second).unwrap();
                old.write_all_at(b"by the second", 16 * MIB).unwrap();
            },
        ),
    ];
    for (what, change) in changes {
        told(pair);
        println!("a file {what}");
        change(&path, &open());
        pair.settle_equal(LONG);
    }

    println!("two processes write at once, while the daemon takes what they change");
    let mut writers = [0, 10].map(|place| {
        Command::new("dd")
            .args(["if=/dev/urandom", "bs=512", "count=3000", "conv=notrunc"])
            .arg(format!("of={}", path.display()))
            .arg(format!("seek={}", place * 2048))
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("dd can be started")
    });
    let mut looked = 0;
    while writers
        .iter_mut()
        .any(|writer| writer.try_wait().expect("it is a child").is_none())
    {
        open().write_all_at(&[looked], 9 * MIB).unwrap();
        looked = looked.wrapping_add(1);
        std::thread::sleep(Duration::from_millis(20));
    }
    for mut writer in writers {
        assert!(writer.wait().unwrap().success());
    }
    pair.settle_equal(LONG);
    fs::remove_file(&path).unwrap();
    pair.settle_equal(LONG);
}

/// A file that was read in part is read in full when it has been quiet, by the next
/// daemon as well, to which the programs tell what changed meanwhile, and which
/// compares nothing.
fn finds_later_what_nothing_tells_of(pair: &mut Pair, cable: &Arc<Cable>) {
    let path = pair.one.share.join("large");
    let noise: Vec<u8> = (0..8 * MIB).map(|at| (at ^ at >> 5 ^ at >> 11) as u8).collect();
    fs::write(&path, noise).unwrap();
    pair.settle_equal(LONG);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(b"told", 3 * MIB).unwrap();
    pair.settle_equal(LONG);
    pair.one.stop();
    let logged = pair.one.log_text().len();
    ways::write_page_beneath(&file, 6 * MIB, 0x5a, &pair.one.folder.join("disk"));
    let wires = Arc::clone(cable);
    pair.one.launcher = Some(Box::new(move |binary| {
        let mut daemon = wires.command(Side::One, binary);
        daemon.env("OMIRR_QUIET_MS", "1000");
        daemon
    }));
    pair.one.start();
    has_byte(&pair.two.share.join("large"), 6 * MIB, 0x5a, pair);
    let log = pair.one.log_text();
    assert!(log[logged..].contains("the event source has gone on"), "{log}");
    assert!(
        !log[logged..].contains("the tree is compared with the index"),
        "{log}"
    );
    pair.settle_equal(LONG);
}

#[test]
fn fentry_and_ring_on_5_10() {
    guest::inside(
        "5.10",
        |guest| fit(guest, "5.10"),
        || mirrors("fentry", "ring", ""),
    );
}

#[test]
fn fentry_and_ring_on_6_1() {
    guest::inside("6.1", |guest| fit(guest, "6.1"), || mirrors("fentry", "ring", ""));
}

#[test]
fn fentry_and_ring_on_6_12() {
    guest::inside(
        "6.12",
        |guest| fit(guest, "6.12"),
        || mirrors_bytes("fentry", "ring", ""),
    );
}

#[test]
fn fentry_and_ring_on_7_2() {
    guest::inside("7.2", |guest| fit(guest, "7.2"), || mirrors("fentry", "ring", ""));
}

#[test]
fn kprobe_and_perf_on_5_10() {
    guest::inside(
        "5.10",
        |guest| fit(guest, "5.10"),
        || mirrors("kprobe", "perf", A_PART),
    );
}

#[test]
fn kprobe_and_perf_on_6_1() {
    guest::inside(
        "6.1",
        |guest| fit(guest, "6.1"),
        || mirrors("kprobe", "perf", A_PART),
    );
}

#[test]
fn kprobe_and_perf_on_6_12() {
    guest::inside(
        "6.12",
        |guest| fit(guest, "6.12"),
        || mirrors("kprobe", "perf", A_PART),
    );
}

#[test]
fn kprobe_and_perf_on_7_2() {
    guest::inside(
        "7.2",
        |guest| fit(guest, "7.2"),
        || mirrors_bytes("kprobe", "perf", A_PART),
    );
}
