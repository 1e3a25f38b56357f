//! `omirr log` on two nodes: both say who changed a path, when and where.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use omirr_tests::nodes::{Node, Pair, omirr};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

fn pair(options: &str) -> Option<Pair> {
    Pair::running(module_path!(), |pair| {
        for node in [&mut pair.one, &mut pair.two] {
            node.share_options = options.to_owned();
        }
    })
}

fn arguments<'a>(config: &'a Path, path: &'a Path) -> [&'a str; 4] {
    [
        "log",
        path.to_str().expect("test paths are UTF-8"),
        "-c",
        config.to_str().expect("test paths are UTF-8"),
    ]
}

fn log(node: &Node, name: &str) -> Value {
    let (config, path) = (node.config(), node.share.join(name));
    let mut args = arguments(&config, &path).to_vec();
    args.push("--json");
    let out = omirr(&args);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{name} on {}: {said}", node.name);
    serde_json::from_slice(&out.stdout).expect("log --json prints JSON")
}

/// What `omirr log` prints for people, on standard output or standard error.
fn said(node: &Node, path: &Path, code: i32) -> String {
    let out = omirr(&arguments(&node.config(), path));
    let text = String::from_utf8([out.stdout, out.stderr].concat()).expect("omirr prints UTF-8");
    assert_eq!(out.status.code(), Some(code), "{text}");
    text
}

/// What is the same on all nodes.
fn told(mut answer: Value) -> Value {
    let object = answer.as_object_mut().expect("an object");
    assert_eq!(object.remove("missing"), Some(Value::Null), "{object:?}");
    answer
}

#[test]
fn both_nodes_say_who_changed_a_file_and_who_deleted_it() {
    let Some(mut pair) = pair("") else { return };
    fs::create_dir(pair.two.share.join("dir")).unwrap();
    fs::write(pair.two.share.join("dir/file"), "1234").unwrap();
    pair.settle_equal(SOON);
    let (here, there) = (log(&pair.one, "dir/file"), log(&pair.two, "dir/file"));
    assert_eq!(told(here.clone()), told(there));
    assert_eq!(
        (
            &here["node"],
            &here["share"],
            &here["path"],
            &here["deleted"],
            &here["size"]
        ),
        (
            &"two".into(),
            &"tree".into(),
            &"dir/file".into(),
            &false.into(),
            &4.into()
        )
    );
    // When is when the file says that it was.
    let written = fs::metadata(pair.two.share.join("dir/file")).unwrap();
    let written_ms = u128::try_from(written.ctime()).unwrap() * 1000
        + u128::try_from(written.ctime_nsec() / 1_000_000).unwrap();
    let changed: jiff::Timestamp = here["changed"].as_str().expect("a time").parse().unwrap();
    assert_eq!(u128::try_from(changed.as_millisecond()).unwrap(), written_ms);
    assert_who_is_this_test(&here);
    let text = said(&pair.one, &pair.one.share.join("dir/file"), 0);
    for part in [
        "(file, 4 bytes; share tree)",
        "on node two",
        &format!("pid {}", std::process::id()),
    ] {
        assert!(text.contains(part), "{text}");
    }

    fs::remove_dir_all(pair.one.share.join("dir")).unwrap();
    pair.settle_equal(SOON);
    for name in ["dir/file", "dir"] {
        let (here, there) = (log(&pair.one, name), log(&pair.two, name));
        assert_eq!(told(here.clone()), told(there));
        assert_eq!((&here["node"], &here["deleted"]), (&"one".into(), &true.into()));
        assert_who_is_this_test(&here);
    }
    assert!(said(&pair.two, &pair.two.share.join("dir/file"), 0).contains("deleted  20"));
}

/// This process lives while it is asked for, so its name is known, too.
fn assert_who_is_this_test(answer: &Value) {
    let who = &answer["who"];
    assert_eq!(who["pid"], u64::from(std::process::id()), "{answer}");
    assert_eq!(who["uid"], 0, "{answer}");
    assert_eq!(who["user"], "root", "{answer}");
    assert!(
        who["command"].as_str().is_some_and(|name| !name.is_empty()),
        "{answer}"
    );
    assert_eq!(who["omirr"], false, "{answer}");
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let is_mounted = |place: &&str| Path::new(place).join("cgroup.procs").exists();
    if ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .iter()
        .any(is_mounted)
    {
        assert_eq!(who["cgroup"].as_str(), group, "{answer}");
    }
}

#[test]
fn what_changed_while_nobody_watched_has_a_node_and_a_time_but_no_process() {
    let Some(mut pair) = pair("") else { return };
    fs::write(pair.one.share.join("a"), "seen").unwrap();
    pair.settle_equal(SOON);
    assert_who_is_this_test(&log(&pair.two, "a"));
    pair.one.stop();
    fs::write(pair.one.share.join("a"), "not seen").unwrap();
    pair.one.start();
    pair.settle_equal(SOON);
    for node in [&pair.one, &pair.two] {
        let answer = log(node, "a");
        assert_eq!((&answer["node"], &answer["who"]), (&"one".into(), &Value::Null));
        let text = said(node, &node.share.join("a"), 0);
        assert!(text.contains("not known: the source did not tell"), "{text}");
    }
}

#[test]
fn an_answer_comes_at_once_and_through_links_and_odd_names() {
    let Some(pair) = pair("") else { return };
    // No settling: what was changed before the question is in the answer.
    for n in 0..20 {
        let name = format!("file-{n}");
        fs::write(pair.one.share.join(&name), name.as_bytes()).unwrap();
        assert_eq!(log(&pair.one, &name)["size"], name.len());
    }
    let link = pair.one.folder.join("link");
    std::os::unix::fs::symlink(&pair.one.share, &link).unwrap();
    assert!(said(&pair.one, &link.join("file-1"), 0).contains("file-1  (file"));
    let odd = std::ffi::OsStr::from_bytes(b"not \xff utf8");
    fs::write(pair.one.share.join(odd), "").unwrap();
    let out = std::process::Command::new(omirr_tests::binary())
        .args(["log", "--json", "-c"])
        .arg(pair.one.config())
        .arg(odd)
        .current_dir(&pair.one.share)
        .output()
        .unwrap();
    let answer: Value = serde_json::from_slice(&out.stdout).expect("log --json prints JSON");
    assert_eq!(answer["path"], "not \\xff utf8");
}

#[test]
fn paths_without_an_answer_are_told_apart() {
    let Some(pair) = pair("exclude = [\"*.tmp\"]") else {
        return;
    };
    let node = &pair.one;
    fs::write(node.share.join("a.tmp"), "").unwrap();
    for (path, expected) in [
        (
            node.folder.join("node.key"),
            "is in no share of this node: it has tree at ",
        ),
        (node.share.join("a.tmp"), "is excluded from the share tree"),
        (node.share.join("never"), "the share tree knows of no "),
        (node.share.join("x/../../node.key"), "is in no share of this node"),
    ] {
        let text = said(node, &path, 1);
        assert!(text.starts_with("omirr: ") && text.contains(expected), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}
