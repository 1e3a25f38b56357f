//! Two nodes in two network namespaces of a guest mirror the kernel's own
//! modules folder, or a part of it, on ext4, with changes coming from eBPF: by
//! fentry through the ring buffer, and by kprobe through the perf buffer.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use omirr_tests::guest::{self, Disk, Guest, Kernel};
use omirr_tests::net::Cable;
use omirr_tests::nodes::Pair;

/// Emulated processors are slow; only a hang takes so long.
const LONG: Duration = Duration::from_secs(400);
const TREE: &str = "/modules";
/// Some four hundred of the modules: by kprobe each takes its time.
const A_PART: &str = "kernel/net";

/// A guest with the kernel's modules on a disk of their own.
fn fit(guest: Guest, kernel: &str) -> Guest {
    let modules = Kernel::find(kernel).ok().and_then(|kernel| kernel.modules);
    let tree = Disk {
        content: modules,
        ..Disk::ext4(768, TREE)
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
    // One look at each tree, at the start, and no other: nothing was lost, or
    // what was lost is told.
    for node in [&pair.one, &pair.two] {
        let stats = node.stats();
        let (events, lost) = (stats["events"].as_u64(), stats["dropped"].as_u64());
        assert!(events > Some(100), "{stats:#}");
        println!("{}: {events:?} events, {lost:?} dropped", node.name);
    }
    pair.one.stop();
    pair.two.stop();
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
        || mirrors("fentry", "ring", ""),
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
        || mirrors("kprobe", "perf", A_PART),
    );
}
