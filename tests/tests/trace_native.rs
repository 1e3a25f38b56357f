//! `omirr trace` on this machine's own kernel: what everyday tools do beneath a
//! folder comes out under the right paths.
//!
//! The oracle is a replay: the printed lines, applied to an empty model of the
//! folder, must give the tree that is there in the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(60);

/// A running `omirr trace --json`.
struct Trace {
    child: Child,
    lines: JoinHandle<Vec<Value>>,
    header: String,
    seen: Receiver<()>,
}

/// One line, as far as it is looked at here.
#[derive(Debug)]
struct Line {
    op: String,
    path: PathBuf,
    to: Option<PathBuf>,
    moved: Option<String>,
    dir: bool,
    comm: Option<String>,
    pid: Option<u64>,
}

impl Trace {
    /// Returns once changes are seen.
    fn start(folder: &Path, options: &[&str]) -> Trace {
        let mut child = Command::new(omirr_tests::binary())
            .args(["trace", "--json"])
            .args(options)
            .arg(folder)
            .env_remove("OMIRR_LOG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("omirr starts");
        let mut errors = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut header = String::new();
        errors.read_line(&mut header).expect("text");
        // Nobody may have to wait because this pipe is full.
        std::thread::spawn(move || std::io::copy(&mut errors, &mut std::io::sink()));
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        let (tell, seen) = channel();
        let lines = std::thread::spawn(move || {
            out.lines()
                .map(|line| {
                    let line = line.expect("text");
                    let value = serde_json::from_str(&line).unwrap_or_else(|why| panic!("{line}: {why}"));
                    tell.send(()).ok();
                    value
                })
                .collect()
        });
        Trace {
            child,
            lines,
            header,
            seen,
        }
    }

    /// Ends it as Ctrl-C does; everything that happened before is printed.
    fn end(mut self) -> Vec<Line> {
        interrupt(&self.child);
        let status = self.child.wait().expect("it ends");
        assert!(status.success(), "{status}: {}", self.header);
        let lines = self.lines.join().expect("every line is JSON");
        lines.iter().map(Line::of).collect()
    }
}

fn interrupt(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
}

impl Line {
    fn of(value: &Value) -> Line {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        for key in [
            "time", "op", "path", "to", "range", "pid", "uid", "comm", "cgroup", "dir",
        ] {
            assert!(value.get(key).is_some(), "{key} is missing in {value}");
        }
        Line {
            op: text("op").expect("an operation"),
            path: text("path").expect("a path").into(),
            to: text("to").map(PathBuf::from),
            moved: text("moved"),
            dir: value["dir"].as_bool().expect("yes or no"),
            comm: text("comm"),
            pid: value["pid"].as_u64(),
        }
    }
}

/// A fresh folder on each kind of filesystem, and in it the traced folder `in`
/// beside the folder `out`.
fn places() -> Vec<(TempDir, PathBuf, PathBuf)> {
    [concat!(env!("CARGO_MANIFEST_DIR"), "/../target"), "/dev/shm"]
        .into_iter()
        .map(|base| {
            let folder = tempfile::Builder::new()
                .prefix("omirr-trace-")
                .tempdir_in(base)
                .expect("a folder");
            let root = folder.path().canonicalize().expect("it is there");
            let (inside, outside) = (root.join("in"), root.join("out"));
            fs::create_dir(&inside).expect("mkdir");
            fs::create_dir(&outside).expect("mkdir");
            (folder, inside, outside)
        })
        .collect()
}

/// Starts a trace that sees events; none, with the reason printed, where this
/// host allows none.
fn start(test: &str, folder: &Path) -> Option<Trace> {
    start_with(test, folder, &[])
}

fn start_with(test: &str, folder: &Path, options: &[&str]) -> Option<Trace> {
    let trace = Trace::start(folder, options);
    if trace.header.contains("with scan") {
        omirr_tests::skip(test, trace.header.trim());
        trace.end();
        return None;
    }
    assert!(trace.header.starts_with("omirr: tracing "), "{}", trace.header);
    Some(trace)
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|why| panic!("{command:?}: {why}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn tar() -> Command {
    Command::new("tar")
}

fn rm_rf(path: &Path) {
    run(Command::new("rm").arg("-rf").arg(path));
}

/// Every entry beneath `top`, with whether it is a directory.
fn walk(top: &Path) -> BTreeMap<PathBuf, bool> {
    let mut found = BTreeMap::new();
    let mut pending = vec![top.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).expect("a folder") {
            let entry = entry.expect("an entry");
            let is_dir = entry.file_type().expect("a type").is_dir();
            if is_dir {
                pending.push(entry.path());
            }
            found.insert(entry.path(), is_dir);
        }
    }
    found
}

/// What the lines make of a folder in which `before` was.
fn replay(before: BTreeMap<PathBuf, bool>, lines: &[Line]) -> BTreeMap<PathBuf, bool> {
    let mut tree = before;
    for line in lines {
        match (line.op.as_str(), &line.to, line.moved.as_deref()) {
            ("create" | "mkdir" | "mknod" | "symlink", ..) => {
                tree.insert(line.path.clone(), line.dir);
            }
            // Without a new path, the old one is outside the folder.
            ("link", to, _) => {
                tree.insert(to.as_ref().unwrap_or(&line.path).clone(), false);
            }
            ("unlink" | "rmdir", ..) => {
                tree.remove(&line.path);
            }
            ("rename", Some(to), _) => rename(&mut tree, &line.path, Some(to)),
            ("rename", None, Some("out")) => rename(&mut tree, &line.path, None),
            ("rename", None, _) => {
                tree.insert(line.path.clone(), line.dir);
            }
            _ => {}
        }
    }
    tree
}

fn rename(tree: &mut BTreeMap<PathBuf, bool>, from: &Path, to: Option<&Path>) {
    let moved: Vec<_> = tree
        .iter()
        .filter(|(path, _)| path.starts_with(from))
        .map(|(p, d)| (p.clone(), *d))
        .collect();
    for (path, is_dir) in moved {
        tree.remove(&path);
        let rest = path.strip_prefix(from).expect("it starts with it");
        if let Some(to) = to {
            let new = if rest.as_os_str().is_empty() {
                to.to_owned()
            } else {
                to.join(rest)
            };
            tree.insert(new, is_dir);
        }
    }
}

/// A tree of some depth and width, packed.
fn archive(folder: &Path) -> PathBuf {
    let tree = folder.join("tree");
    for a in 0..6 {
        for b in 0..6 {
            let dir = tree.join(format!("a{a}/b{b}/c"));
            fs::create_dir_all(&dir).expect("mkdir");
            for f in 0..5 {
                fs::write(dir.join(format!("f{f}")), vec![b'x'; 100 * f]).expect("write");
            }
            std::os::unix::fs::symlink("c/f1", dir.join("../link")).expect("symlink");
        }
    }
    let packed = folder.join("tree.tar");
    run(tar().arg("-C").arg(folder).arg("-cf").arg(&packed).arg("tree"));
    rm_rf(&tree);
    packed
}

#[test]
fn tar_x_and_rm_rf_at_once() {
    for (_folder, inside, outside) in places() {
        let packed = archive(&outside);
        let Some(trace) = start("tar_x_and_rm_rf_at_once", &inside) else {
            return;
        };
        run(tar().arg("-C").arg(&inside).arg("-xf").arg(&packed));
        let unpacked = walk(&inside);
        // No pause: by the time that many of the events are read, their
        // directories are gone.
        rm_rf(&inside.join("tree"));
        let lines = trace.end();
        assert_eq!(unpacked.len(), 1 + 6 + 36 * (1 + 1 + 1 + 5));
        for (path, is_dir) in &unpacked {
            let ops: Vec<_> = lines
                .iter()
                .filter(|line| line.path == *path)
                .map(|line| line.op.as_str())
                .collect();
            let (made, gone) = if *is_dir {
                ("mkdir", "rmdir")
            } else {
                ("create", "unlink")
            };
            let made = ops
                .iter()
                .position(|op| *op == made || *op == "symlink" || *op == "mknod");
            let gone = ops.iter().rposition(|op| *op == gone);
            assert!(
                made.is_some() && gone.is_some() && made < gone,
                "{}: {ops:?}",
                path.display()
            );
        }
        let known: BTreeSet<_> = unpacked.keys().chain([&inside]).collect();
        for line in &lines {
            assert!(known.contains(&line.path), "a path that never was: {line:?}");
        }
        assert_eq!(replay(BTreeMap::new(), &lines), BTreeMap::new());
    }
}

#[test]
fn git_clone_of_a_local_repository() {
    if Command::new("git").arg("--version").output().is_err() {
        omirr_tests::skip("git_clone_of_a_local_repository", "there is no git here");
        return;
    }
    for (_folder, inside, outside) in places() {
        let origin = outside.join("origin");
        fs::create_dir(&origin).expect("mkdir");
        let git = |args: &[&str]| {
            let mut command = Command::new("git");
            command
                .arg("-C")
                .arg(&origin)
                .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
                .args(args);
            run(&mut command);
        };
        git(&["init", "-q"]);
        for n in 0..120 {
            let dir = origin.join(format!("src/m{}/deep", n % 12));
            fs::create_dir_all(&dir).expect("mkdir");
            fs::write(dir.join(format!("{n}.txt")), format!("content {n}")).expect("write");
        }
        git(&["add", "."]);
        git(&["commit", "-qm", "all"]);
        let Some(trace) = start("git_clone_of_a_local_repository", &inside) else {
            return;
        };
        run(Command::new("git")
            .args(["clone", "-q"])
            .arg(&origin)
            .arg(inside.join("clone")));
        let lines = trace.end();
        let there = walk(&inside);
        assert!(there.contains_key(&inside.join("clone/src/m3/deep/3.txt")));
        assert_eq!(replay(BTreeMap::new(), &lines), there);
    }
}

#[test]
fn mv_of_files_and_folders_within_and_across_the_border() {
    for (_folder, inside, outside) in places() {
        fs::create_dir_all(inside.join("old/sub/deep")).expect("mkdir");
        fs::write(inside.join("old/sub/deep/file"), b"x").expect("write");
        fs::write(inside.join("single"), b"x").expect("write");
        fs::create_dir_all(outside.join("foreign/inner")).expect("mkdir");
        let before = walk(&inside);
        let Some(trace) = start("mv_of_files_and_folders_within_and_across_the_border", &inside) else {
            return;
        };
        let mv = |from: &Path, to: &Path| run(Command::new("mv").arg("-T").arg(from).arg(to));
        // Each by a process of its own, so that the kernel merges none.
        let write = |path: &Path| run(Command::new("sh").args(["-c", "echo more >> \"$0\""]).arg(path));
        mv(&inside.join("single"), &inside.join("renamed"));
        mv(&inside.join("old"), &inside.join("new"));
        write(&inside.join("new/sub/deep/file"));
        mv(&inside.join("new/sub"), &inside.join("moved-sub"));
        write(&inside.join("moved-sub/deep/file"));
        mv(&outside.join("foreign"), &inside.join("new/came"));
        write(&inside.join("new/came/inner/file"));
        mv(&inside.join("moved-sub"), &outside.join("went"));
        write(&outside.join("went/deep/file"));
        mv(&inside.join("renamed"), &outside.join("renamed"));
        mv(&outside.join("renamed"), &inside.join("back"));
        let lines = trace.end();
        let all: Vec<_> = lines
            .iter()
            .filter(|line| line.op == "rename")
            .map(|line| {
                let short = |path: &Path| path.strip_prefix(&inside).expect("inside").display().to_string();
                (
                    short(&line.path),
                    line.to.as_deref().map(short),
                    line.moved.clone(),
                )
            })
            .collect();
        let to = |path: &str| Some(path.to_owned());
        assert_eq!(
            all,
            [
                ("single".into(), to("renamed"), None),
                ("old".into(), to("new"), None),
                ("new/sub".into(), to("moved-sub"), None),
                ("new/came".into(), None, to("in")),
                ("moved-sub".into(), None, to("out")),
                ("renamed".into(), None, to("out")),
                ("back".into(), None, to("in")),
            ]
        );
        for path in ["new/sub/deep/file", "moved-sub/deep/file", "new/came/inner/file"] {
            let path = inside.join(path);
            assert!(
                lines.iter().any(|line| line.op == "write" && line.path == path),
                "{}",
                path.display()
            );
        }
        let mut replayed = replay(before, &lines);
        // What came in with its folder was never printed by itself.
        replayed.insert(inside.join("new/came/inner"), true);
        assert_eq!(replayed, walk(&inside));
        assert!(lines.iter().all(|line| line.path.starts_with(&inside)));
    }
}

#[test]
fn chmod_r_names_every_entry_and_a_neighbour_none() {
    for (_folder, inside, outside) in places() {
        let packed = archive(&outside);
        run(tar().arg("-C").arg(&inside).arg("-xf").arg(&packed));
        run(tar().arg("-C").arg(&outside).arg("-xf").arg(&packed));
        let Some(trace) = start("chmod_r_names_every_entry_and_a_neighbour_none", &inside) else {
            return;
        };
        run(Command::new("chmod").args(["-R", "u+x,g-w"]).arg(&outside));
        run(Command::new("chmod").args(["-R", "o-rwx"]).arg(&inside));
        let lines = trace.end();
        let changed: BTreeSet<_> = lines
            .iter()
            .filter(|line| line.op == "attr")
            .map(|line| &line.path)
            .collect();
        let there = walk(&inside);
        let is_link = |path: &Path| fs::symlink_metadata(path).expect("it is there").is_symlink();
        let expected: BTreeSet<_> = there
            .keys()
            .chain([&inside])
            .filter(|path| !is_link(path))
            .collect();
        assert_eq!(changed, expected);
    }
}

#[test]
fn a_process_that_still_runs_is_named() {
    let (_folder, inside, _) = places().swap_remove(0);
    let Some(trace) = start("a_process_that_still_runs_is_named", &inside) else {
        return;
    };
    let mut shell = Command::new("sh")
        .args(["-c", "echo x > \"$0\"; read line"])
        .arg(inside.join("file"))
        .stdin(Stdio::piped())
        .spawn()
        .expect("sh starts");
    trace.seen.recv_timeout(DEADLINE).expect("a change");
    let pid = shell.id();
    drop(shell.stdin.take());
    shell.wait().expect("it ends");
    let lines = trace.end();
    let first = lines.first().expect("a line");
    assert_eq!(
        (first.op.as_str(), first.comm.as_deref(), first.pid),
        ("create", Some("sh"), Some(pid.into()))
    );
}

#[test]
fn without_events_the_folder_is_compared() {
    let (_folder, inside, _) = places().swap_remove(0);
    fs::create_dir(inside.join("d")).expect("mkdir");
    fs::write(inside.join("d/gone"), b"x").expect("write");
    let trace = Trace::start(&inside, &["--source", "scan"]);
    assert!(
        trace.header.contains("with scan: scan was asked for"),
        "{}",
        trace.header
    );
    fs::write(inside.join("d/new"), b"x").expect("write");
    fs::remove_file(inside.join("d/gone")).expect("unlink");
    trace.seen.recv_timeout(DEADLINE).expect("a comparison");
    let lines = trace.end();
    let found: BTreeSet<_> = lines
        .iter()
        .map(|line| (line.op.as_str(), line.path.clone()))
        .collect();
    assert_eq!(
        found,
        BTreeSet::from([
            ("create", inside.join("d/new")),
            ("unlink", inside.join("d/gone"))
        ])
    );
}

#[test]
fn it_ends_well_when_nobody_reads_any_more() {
    let (_folder, inside, _) = places().swap_remove(0);
    let mut child = Command::new(omirr_tests::binary())
        .arg("trace")
        .arg(&inside)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("omirr starts");
    let mut errors = BufReader::new(child.stderr.take().expect("a pipe"));
    errors.read_line(&mut String::new()).expect("a header");
    drop(child.stdout.take());
    fs::write(inside.join("file"), b"x").expect("write");
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        assert!(started.elapsed() < DEADLINE, "it does not end");
        std::thread::yield_now();
    };
    let mut rest = String::new();
    errors.read_to_string(&mut rest).expect("text");
    assert!(status.success() && rest.is_empty(), "{status}: {rest}");
}

#[test]
fn only_the_operations_and_paths_that_are_asked_for_are_printed() {
    let (_folder, inside, _) = places().swap_remove(0);
    let options = [
        "--op",
        "create,rename",
        "--op",
        "rmdir",
        "--path",
        "*.php",
        "--path",
        "/old/",
    ];
    let test = "only_the_operations_and_paths_that_are_asked_for_are_printed";
    let Some(trace) = start_with(test, &inside, &options) else {
        return;
    };
    fs::create_dir(inside.join("old")).expect("mkdir");
    fs::write(inside.join("old/a.php"), b"x").expect("write");
    fs::write(inside.join("b.txt"), b"x").expect("write");
    fs::rename(inside.join("b.txt"), inside.join("c.php")).expect("rename");
    fs::rename(inside.join("old/a.php"), inside.join("d.txt")).expect("rename");
    fs::remove_file(inside.join("c.php")).expect("unlink");
    fs::remove_dir(inside.join("old")).expect("rmdir");
    let lines: Vec<_> = trace.end().into_iter().map(|line| (line.op, line.path)).collect();
    let expected = [
        ("create", "old/a.php"),
        ("rename", "b.txt"),
        ("rename", "old/a.php"),
        ("rmdir", "old"),
    ];
    assert_eq!(
        lines,
        expected.map(|(op, path)| (op.to_owned(), inside.join(path)))
    );
}

#[test]
fn only_the_processes_that_are_asked_for_are_printed() {
    let (_folder, inside, _) = places().swap_remove(0);
    let test = "only_the_processes_that_are_asked_for_are_printed";
    let by = |options: &[&str]| -> Option<BTreeSet<PathBuf>> {
        let trace = start_with(test, &inside, options)?;
        fs::write(inside.join("by-the-test"), b"x").expect("write");
        let mut shell = Command::new("sh")
            .args(["-c", "echo x > \"$0\"; read line"])
            .arg(inside.join("by-the-shell"))
            .stdin(Stdio::piped())
            .spawn()
            .expect("sh starts");
        // Either is enough to know that its events have been asked about.
        let deadline = Instant::now() + DEADLINE;
        while !inside.join("by-the-shell").exists() {
            assert!(Instant::now() < deadline, "the shell does not write");
            std::thread::yield_now();
        }
        let lines = trace.end();
        drop(shell.stdin.take());
        shell.wait().expect("it ends");
        Some(lines.into_iter().map(|line| line.path).collect())
    };
    let own = std::process::id().to_string();
    for (options, expected) in [
        (&["--comm", "sh"][..], &["by-the-shell"][..]),
        (&["--comm", "s?", "--uid", "root"], &["by-the-shell"]),
        (&["--pid", &own], &["by-the-test"]),
        (&["--pid", &own, "--comm", "sh"], &[]),
        (&["--pid", &own, "--uid", "4294967294"], &[]),
    ] {
        let Some(paths) = by(options) else { return };
        assert_eq!(
            paths,
            expected.iter().map(|name| inside.join(name)).collect(),
            "{options:?}"
        );
        fs::remove_file(inside.join("by-the-shell")).expect("unlink");
    }
}

#[test]
fn filters_that_are_none_are_wrong_usage() {
    for (options, said) in [
        (&["--op", "writes"][..], "there are write, truncate, "),
        (&["--uid", "nobody-of-this-name"], "give the number"),
        (&["--pid", "0"], "0 is not in 1.."),
        (&["--path", "[a"], "unclosed"),
        (&["--comm", "[a"], "unclosed"),
    ] {
        let output = Command::new(omirr_tests::binary())
            .arg("trace")
            .args(options)
            .arg("/")
            .output()
            .expect("omirr starts");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{options:?}: {text}");
        assert!(text.contains(said), "{options:?}: {text}");
    }
    let output = Command::new(omirr_tests::binary())
        .args(["trace", "--source", "scan", "--comm", "sh", "/tmp"])
        .output()
        .expect("omirr starts");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.starts_with("omirr: a comparison of the folder cannot tell who"),
        "{text}"
    );
}

#[test]
fn a_pipe_to_head_ends_it_without_a_word() {
    let (_folder, inside, _) = places().swap_remove(0);
    let script = "\"$0\" trace \"$1\" | head -1; echo \"ended\"";
    let mut shell = Command::new("sh")
        .args(["-c", script])
        .arg(omirr_tests::binary())
        .arg(&inside)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("sh starts");
    let mut errors = BufReader::new(shell.stderr.take().expect("a pipe"));
    errors.read_line(&mut String::new()).expect("a header");
    let started = Instant::now();
    let mut time = 0;
    while shell.try_wait().expect("a child").is_none() {
        assert!(started.elapsed() < DEADLINE, "it does not end");
        time += 1;
        fs::write(inside.join(format!("file-{time}")), b"x").expect("write");
        std::thread::sleep(Duration::from_millis(5));
    }
    let (mut out, mut rest) = (String::new(), String::new());
    let mut printed = shell.stdout.take().expect("a pipe");
    printed.read_to_string(&mut out).expect("text");
    errors.read_to_string(&mut rest).expect("text");
    assert!(out.lines().count() == 2 && out.ends_with("ended\n"), "{out}");
    assert!(out.contains("file-1") && rest.is_empty(), "{out}{rest}");
}

#[test]
fn what_is_no_folder_is_refused_by_name() {
    for path in ["/nonexistent/omirr", "/proc/self/status"] {
        let output = Command::new(omirr_tests::binary())
            .arg("trace")
            .arg(path)
            .output()
            .expect("omirr starts");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        let is_sentence = text.starts_with("omirr: ") && text.lines().count() == 1;
        assert!(
            is_sentence && (text.contains("/nonexistent/omirr") || text.contains("status")),
            "{text}"
        );
    }
}
