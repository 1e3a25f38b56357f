//! `omirr trace` in a guest, by eBPF: what everyday tools do beneath a folder
//! comes out under the right paths.
//!
//! Besides the lines that each must give, all lines together, applied to the
//! paths that were there before, must give those that are there in the end.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use omirr_tests::guest::{self, Guest};
use omirr_tests::treewalk;
use serde_json::Value;
use xtask::workspace::which;

/// Operation, path and new path of a printed line, paths beneath the folder.
type Line = (String, String, String);

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

/// Every path beneath `folder`, itself being the empty one.
fn paths(folder: &Path) -> BTreeSet<String> {
    let tree = treewalk::walk(folder).expect("the folder can be walked");
    tree.keys().map(|path| path.display().to_string()).collect()
}

/// What the lines make of a folder in which the paths of `tree` were.
fn replay(mut tree: BTreeSet<String>, lines: &[Line]) -> BTreeSet<String> {
    for (op, path, to) in lines {
        match op.as_str() {
            "create" | "mkdir" | "mknod" | "symlink" => drop(tree.insert(path.clone())),
            // Without a new path, the old one is outside the folder.
            "link" if to.is_empty() => drop(tree.insert(path.clone())),
            "link" => drop(tree.insert(to.clone())),
            "unlink" | "rmdir" => drop(tree.remove(path)),
            "rename" => {
                let is_moved = |old: &String| Path::new(old).starts_with(path);
                let moved: Vec<String> = tree.extract_if(.., is_moved).collect();
                tree.extend(moved.iter().map(|old| format!("{to}{}", &old[path.len()..])));
            }
            _ => {}
        }
    }
    tree
}

/// Runs `script` in a traced folder; returns every printed line.
fn traced(attach: &str, transport: &str, prepare: &str, script: &str) -> Vec<Line> {
    let folder = tempfile::tempdir_in("/mnt").expect("the disk takes a folder");
    let inside = folder.path().join("in");
    std::fs::create_dir(&inside).expect("the disk takes a folder");
    sh(&inside, prepare);
    let before = paths(&inside);
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
    let lines: Vec<Line> = text
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap_or_else(|why| panic!("{line}: {why}"));
            let op = line["op"].as_str().expect("an operation").to_owned();
            (op, beneath(&line["path"]), beneath(&line["to"]))
        })
        .collect();
    assert_eq!(replay(before, &lines), paths(&inside), "{script}: {lines:#?}");
    lines
}

fn has(lines: &[Line], op: &str, path: &str, to: &str) {
    let line = (op.to_owned(), path.to_owned(), to.to_owned());
    assert!(
        lines.contains(&line),
        "{op} {path:?} {to:?} is not among {lines:#?}"
    );
}

fn everyday_tools(attach: &str, transport: &str) {
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

/// A guest with the programs that `git clone` of a folder takes; none, with the
/// reason printed, where there is no git.
fn fit_with_git(test: &str) -> Option<impl FnOnce(Guest) -> Guest> {
    let exec_path = Command::new("git").arg("--exec-path").output();
    let (Some(git), Ok(exec_path)) = (which("git"), exec_path) else {
        omirr_tests::skip(test, "there is no git here");
        return None;
    };
    let exec_path = String::from_utf8(exec_path.stdout).expect("git prints UTF-8");
    Some(move |guest: Guest| {
        // The same program, which does what its name says.
        let upload_pack = format!("{}/git-upload-pack", exec_path.trim_end());
        fit(guest)
            .program_at(&git, "/usr/bin/git")
            .program_at(&git, &upload_pack)
    })
}

fn git_clone(attach: &str, transport: &str) {
    let make = "git init -q -b main ../origin; cd ../origin; mkdir -p src/deep; echo 1 > one; echo 2 > src/deep/two; \
        git add .; git -c user.name=t -c user.email=t@example.org commit -qm all";
    let lines = traced(
        attach,
        transport,
        make,
        "git clone -q --template= ../origin clone",
    );
    for path in ["clone", "clone/.git", "clone/.git/refs/heads", "clone/src/deep"] {
        has(&lines, "mkdir", path, "");
    }
    for path in [
        "clone/.git/config.lock",
        "clone/.git/index.lock",
        "clone/one",
        "clone/src/deep/two",
    ] {
        has(&lines, "create", path, "");
        has(&lines, "write", path, "");
    }
    for name in ["HEAD", "config", "index", "refs/heads/main"] {
        let path = format!("clone/.git/{name}");
        has(&lines, "rename", &format!("{path}.lock"), &path);
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

#[test]
fn fentry_and_ring_trace_git_clone_on_6_1() {
    if let Some(fit) = fit_with_git("fentry_and_ring_trace_git_clone_on_6_1") {
        guest::inside("6.1", fit, || git_clone("fentry", "ring"));
    }
}

#[test]
fn kprobe_and_perf_trace_git_clone_on_5_10() {
    if let Some(fit) = fit_with_git("kprobe_and_perf_trace_git_clone_on_5_10") {
        guest::inside("5.10", fit, || git_clone("kprobe", "perf"));
    }
}
