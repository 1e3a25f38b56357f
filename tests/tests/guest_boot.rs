//! Each kernel boots, has what tests need, and passes on how a command ended.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use omirr_tests::guest::{self, Disk};
use omirr_tests::net::{Cable, Side};
use omirr_tests::skip;

fn kernel_is_fit_for_tests(version: &str) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(release.starts_with(&format!("{version}.")), "{release}");
    assert!(fs::metadata("/sys/kernel/btf/vmlinux").unwrap().len() > 1_000_000);
    assert!(fs::exists("/sys/kernel/tracing/kprobe_events").unwrap());
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    for mount in [
        "/dev/vda /mnt ext4 rw",
        " /sys/fs/bpf bpf rw",
        "cgroup2 /sys/fs/cgroup cgroup2 rw",
    ] {
        assert!(mounts.contains(mount), "{mounts}");
    }
    fs::write("/mnt/file", "content").unwrap();
    assert_eq!(fs::read_to_string("/mnt/file").unwrap(), "content");
    bytes_pass_the_cable();
}

fn bytes_pass_the_cable() {
    let cable = Cable::lay();
    let mut server = cable
        .command(Side::Two, "nc")
        .args(["-l", "-p", "8080", "-e", "/bin/cat"])
        .spawn()
        .unwrap();
    let ask = format!("echo over the cable | nc -w 5 {} 8080", Side::Two.address());
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let answer = cable
            .command(Side::One, "sh")
            .args(["-c", &ask])
            .output()
            .unwrap();
        if answer.stdout == b"over the cable\n" {
            break;
        }
        assert!(Instant::now() < deadline, "{answer:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    server.kill().unwrap();
    server.wait().unwrap();
    // The first namespace, this process's own, has no such address.
    assert!(
        TcpStream::connect_timeout(&"10.77.0.2:8080".parse().unwrap(), Duration::from_millis(500)).is_err()
    );
}

#[test]
fn boots_5_10() {
    guest::inside("5.10", |guest| guest, || kernel_is_fit_for_tests("5.10"));
}

#[test]
fn boots_6_1() {
    guest::inside("6.1", |guest| guest, || kernel_is_fit_for_tests("6.1"));
}

#[test]
fn boots_6_12() {
    guest::inside("6.12", |guest| guest, || kernel_is_fit_for_tests("6.12"));
}

#[test]
fn boots_7_2() {
    guest::inside("7.2", |guest| guest, || kernel_is_fit_for_tests("7.2"));
}

#[test]
fn loopback_is_up_in_a_guest() {
    guest::inside(
        "6.1",
        |guest| guest,
        || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            client.write_all(b"x").unwrap();
            let mut byte = [0];
            listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
            assert_eq!(&byte, b"x");
        },
    );
}

#[test]
fn a_failure_comes_out_with_its_code_and_its_words() {
    if let Some(reason) = guest::unavailable() {
        return skip("a_failure_comes_out_with_its_code_and_its_words", &reason);
    }
    let guest = guest::new("6.1").name("guest_boot-failure");
    let outcome = guest::run(guest, &["sh", "-c", "echo to stdout; echo to stderr >&2; exit 7"]);
    assert_eq!(outcome.code(), Some(7), "{}", outcome.describe());
    assert_eq!(outcome.output, "to stdout\nto stderr\n");
    assert!(
        outcome.describe().contains("init: failure 7"),
        "{}",
        outcome.describe()
    );
}

#[test]
fn a_panic_of_the_kernel_ends_the_guest_at_once() {
    if let Some(reason) = guest::unavailable() {
        return skip("a_panic_of_the_kernel_ends_the_guest_at_once", &reason);
    }
    let guest = guest::new("6.1")
        .name("guest_boot-panic")
        .kernel_arguments("panic=0");
    let outcome = guest::run(guest, &["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 100"]);
    assert_eq!(outcome.code(), None);
    assert!(outcome.time < Duration::from_secs(60), "{:?}", outcome.time);
    assert!(
        outcome.describe().contains("kernel panicked"),
        "{}",
        outcome.describe()
    );
}

#[test]
fn modules_disks_and_files_are_there_on_request() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    guest::inside(
        "6.12",
        |guest| {
            guest
                .module("xfs")
                .module("sch_netem")
                .disk(Disk {
                    content: Some(sources.clone()),
                    ..Disk::ext4(64, "/sources")
                })
                .tree(&sources, "/in-memory")
        },
        || {
            let known = fs::read_to_string("/proc/filesystems").unwrap();
            assert!(known.contains("\txfs\n"), "{known}");
            let delay = Command::new("tc")
                .args("qdisc add dev lo root netem delay 1ms".split(' '))
                .output()
                .unwrap();
            assert!(delay.status.success(), "{delay:?}");
            let on_disk = fs::read("/sources/bin/guest-init.rs").unwrap();
            assert!(on_disk.starts_with(b"//! The first process of a guest."));
            assert_eq!(fs::read("/in-memory/bin/guest-init.rs").unwrap(), on_disk);
        },
    );
}
