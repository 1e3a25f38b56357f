//! `omirr trace` in a guest, by eBPF: what everyday tools do beneath a folder
//! comes out under the right paths.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use omirr_tests::guest::{self, Guest};
use serde_json::Value;

fn fit(guest: Guest) -> Guest {
    guest.memory_mib(1536).timeout(Duration::from_secs(400))
}

fn sh(folder: &Path, script: &str) {
    let out = Command::new("sh")
        .args(["-ec", script])
        .current_dir(folder)
        .output()
        .expect("there is a shell");
    assert!(
        out.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// Runs `script` in a traced folder; returns `(operation, path, new path)` of
/// every printed line, paths beneath the folder.
fn traced(attach: &str, transport: &str, prepare: &str, script: &str) -> BTreeSet<(String, String, String)> {
    let folder = tempfile::tempdir_in("/mnt").expect("the disk takes a folder");
    let inside = folder.path().join("in");
    std::fs::create_dir(&inside).expect("the disk takes a folder");
    sh(&inside, prepare);
    let mut trace = Command::new(omirr_tests::binary())
        .args([
            "trace",
            "--json",
            "--source",
            "ebpf",
            "--attach",
            attach,
            "--transport",
            transport,
        ])
        .arg(&inside)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("omirr starts");
    let mut errors = BufReader::new(trace.stderr.take().expect("a pipe"));
    let mut header = String::new();
    errors.read_line(&mut header).expect("text");
    assert!(header.contains(attach), "{header}");
    std::thread::spawn(move || std::io::copy(&mut errors, &mut std::io::sink()));
    let mut out = trace.stdout.take().expect("a pipe");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        out.read_to_string(&mut text).expect("text");
        text
    });
    sh(&inside, script);
    let pid = rustix::process::Pid::from_child(&trace);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
    assert!(trace.wait().expect("it ends").success(), "{header}");
    let beneath = |value: &Value| {
        let path = Path::new(value.as_str().unwrap_or_default());
        path.strip_prefix(&inside).unwrap_or(path).display().to_string()
    };
    let text = reader.join().expect("the reader ends");
    text.lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap_or_else(|why| panic!("{line}: {why}"));
            let op = line["op"].as_str().expect("an operation").to_owned();
            (op, beneath(&line["path"]), beneath(&line["to"]))
        })
        .collect()
}

fn everyday_tools(attach: &str, transport: &str) {
    let has = |lines: &BTreeSet<(String, String, String)>, op: &str, path: &str, to: &str| {
        let line = (op.to_owned(), path.to_owned(), to.to_owned());
        assert!(
            lines.contains(&line),
            "{attach}, {transport}: {op} {path:?} {to:?} is not among {lines:#?}"
        );
    };
    let make =
        "mkdir -p ../src/a/b; echo 1 > ../src/a/one; echo 2 > ../src/a/b/two; tar -C ../src -cf ../t.tar a";
    let lines = traced(attach, transport, make, "tar xf ../t.tar");
    for (op, path) in [
        ("mkdir", "a"),
        ("mkdir", "a/b"),
        ("create", "a/one"),
        ("write", "a/one"),
        ("write", "a/b/two"),
    ] {
        has(&lines, op, path, "");
    }
    let there = "mkdir -p a/b; echo 1 > a/one; echo 2 > a/b/two";
    let lines = traced(
        attach,
        transport,
        there,
        "mv a moved; echo 3 > moved/b/three; mv moved/one moved/b/uno",
    );
    has(&lines, "rename", "a", "moved");
    has(&lines, "create", "moved/b/three", "");
    has(&lines, "rename", "moved/one", "moved/b/uno");
    let lines = traced(attach, transport, there, "chmod -R 700 a");
    for path in ["a", "a/b", "a/one", "a/b/two"] {
        has(&lines, "attr", path, "");
    }
    let lines = traced(attach, transport, there, "rm -rf a");
    for (op, path) in [
        ("unlink", "a/one"),
        ("unlink", "a/b/two"),
        ("rmdir", "a/b"),
        ("rmdir", "a"),
    ] {
        has(&lines, op, path, "");
    }
}

#[test]
fn fentry_and_ring_trace_on_6_1() {
    guest::inside("6.1", fit, || everyday_tools("fentry", "ring"));
}

#[test]
fn kprobe_and_perf_trace_on_5_10() {
    guest::inside("5.10", fit, || everyday_tools("kprobe", "perf"));
}
