//! `omirr conflicts` on two nodes: what one does with a copy arrives on the other.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use omirr::daemon::control::CONFLICTS_MAX;
use omirr_tests::nodes::{Node, Pair};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
/// Times of files are no finer than the kernel's tick.
const TICK: Duration = Duration::from_millis(20);

fn pair() -> Option<Pair> {
    Pair::running(module_path!(), |_| ())
}

/// Lets each file have one version on each side that the other never saw; those
/// of node one lose.
fn make_conflicts(pair: &mut Pair, files: &[&OsStr], lost: &str, won: &str) {
    for file in files {
        fs::write(pair.one.share.join(file), "both had this\n").unwrap();
    }
    pair.settle_equal(SOON);
    pair.one.stop();
    pair.two.stop();
    for (node, text) in [(&pair.one, lost), (&pair.two, won)] {
        for file in files {
            fs::write(node.share.join(file), text).unwrap();
        }
        std::thread::sleep(TICK);
    }
    pair.start();
    pair.settle_equal(SOON);
    let mut folders: Vec<PathBuf> = files
        .iter()
        .filter_map(|file| Some(pair.one.share.join(file).parent()?.to_owned()))
        .collect();
    folders.sort();
    folders.dedup();
    let copies: Vec<_> = folders.iter().flat_map(|folder| copies_in(folder)).collect();
    assert_eq!(
        copies.len(),
        files.len(),
        "{copies:?}\n{}\n{}",
        pair.one.log_tail(),
        pair.two.log_tail()
    );
}

/// The names of the copies in a folder.
fn copies_in(folder: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().contains(".omirr-conflict-"))
        .collect();
    names.sort();
    names
}

fn the_copy(folder: &Path) -> PathBuf {
    let copies = copies_in(folder);
    assert_eq!(copies.len(), 1, "{copies:?}");
    folder.join(&copies[0])
}

fn command(what: &str) -> Command {
    let mut command = Command::new(omirr_tests::binary());
    command.args(["conflicts", what]);
    command
}

fn text(out: &Output, code: i32) -> String {
    let text = [out.stdout.clone(), out.stderr.clone()].concat();
    let text = String::from_utf8(text).expect("omirr prints UTF-8");
    assert_eq!(out.status.code(), Some(code), "{text}");
    text
}

/// What a subcommand says about a path, by the configuration of a node.
fn said(node: &Node, what: &str, path: &Path, code: i32) -> String {
    let out = command(what)
        .arg(path)
        .arg("-c")
        .arg(node.config())
        .output()
        .unwrap();
    text(&out, code)
}

fn discard(paths: &[&Path], code: i32) -> String {
    text(&command("discard").args(paths).output().unwrap(), code)
}

fn list(node: &Node, more: &[&str]) -> String {
    text(
        &command("list")
            .args(more)
            .arg("-c")
            .arg(node.config())
            .output()
            .unwrap(),
        0,
    )
}

/// The list as JSON; status must have the same number.
fn listed(node: &Node) -> Vec<Value> {
    let report: Value = serde_json::from_str(&list(node, &["--json"])).expect("list --json prints JSON");
    assert_eq!(
        (&report["more"], &report["missing"]),
        (&0.into(), &Value::Array(Vec::new()))
    );
    let copies = report["conflicts"].as_array().expect("a list").clone();
    let status = node.status().expect("the daemon answers");
    assert_eq!(status["shares"][0]["conflicts"], copies.len(), "{report}");
    copies
}

#[test]
fn a_conflict_is_listed_shown_restored_and_discarded() {
    let Some(mut pair) = pair() else { return };
    assert_eq!(list(&pair.one, &[]), "no conflicts\n");
    fs::create_dir(pair.one.share.join("a")).unwrap();
    make_conflicts(
        &mut pair,
        &[OsStr::new("a/page.html")],
        "head\nfrom one\n",
        "head\nfrom two, later\n",
    );
    let copy = the_copy(&pair.one.share.join("a"));
    let name = copy.file_name().unwrap().to_str().unwrap();

    for node in [&pair.one, &pair.two] {
        let found = listed(node);
        assert_eq!(found.len(), 1);
        let fields: [(&str, Value); 9] = [
            ("share", "tree".into()),
            ("path", format!("a/{name}").into()),
            ("file", node.share.join("a").join(name).to_str().unwrap().into()),
            ("kind", "file".into()),
            ("size", 14.into()),
            ("winner", "a/page.html".into()),
            ("originals", vec!["a/page.html"].into()),
            ("node", "one".into()),
            ("nodes", vec!["one"].into()),
        ];
        for (field, expected) in fields {
            assert_eq!(found[0][field], expected, "{field} in {found:?}");
        }
        let made = found[0]["made"].as_str().expect("a time");
        let digits: String = made.chars().filter(char::is_ascii_digit).collect();
        assert!(name.replace('-', "").contains(&digits), "{made}");
        let table = list(node, &["--share", "tree"]);
        assert_eq!(table.lines().count(), 2, "{table}");
        assert!(
            table.contains(&format!(
                "page.html  {}",
                node.share.join("a").join(name).display()
            )),
            "{table}"
        );
        assert!(
            node.status_text()
                .contains("tree: 1 conflict copy: see `omirr conflicts list`")
        );
    }

    let shown = said(&pair.one, "show", &copy, 0);
    for part in [
        "a/page.html  (file, 21 bytes)",
        "(file, 14 bytes)",
        "on node two",
        "by        omirr itself, which kept a version here that lost against a newer one",
        "from node one\n",
        "@@ -1,2 +1,2 @@\n head\n-from two, later\n+from one\n",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let out = command("show")
        .arg(&copy)
        .arg("--json")
        .arg("-c")
        .arg(pair.one.config())
        .output()
        .unwrap();
    let json: Value = serde_json::from_str(&text(&out, 0)).expect("show --json prints JSON");
    assert_eq!(
        (&json["contents"], &json["winner"]["last"]["node"]),
        (&"differ".into(), &"two".into())
    );

    // Exchanged, nothing lost; and again, as it was.
    let there = pair.two.share.join("a");
    for (here, other) in [
        ("head\nfrom one\n", "head\nfrom two, later\n"),
        ("head\nfrom two, later\n", "head\nfrom one\n"),
    ] {
        let done = said(&pair.one, "restore", &copy, 0);
        assert!(
            done.contains("page.html is restored; the version that was there is now "),
            "{done}"
        );
        pair.settle_equal(SOON);
        assert_eq!(fs::read_to_string(there.join("page.html")).unwrap(), here);
        assert_eq!(fs::read_to_string(there.join(name)).unwrap(), other);
        assert_eq!(listed(&pair.two).len(), 1);
    }

    // The copy goes by discarding it on the other node.
    assert!(discard(&[&there.join(name)], 0).starts_with("removed "));
    pair.settle_equal(SOON);
    assert_eq!(copies_in(&pair.one.share.join("a")), Vec::<OsString>::new());
    assert_eq!(
        fs::read_to_string(pair.one.share.join("a/page.html")).unwrap(),
        "head\nfrom two, later\n"
    );
    for node in [&pair.one, &pair.two] {
        assert_eq!(list(node, &[]), "no conflicts\n");
        assert!(listed(node).is_empty());
    }
}

#[test]
fn a_restored_version_replaces_the_winner_only_if_asked_to() {
    let Some(mut pair) = pair() else { return };
    make_conflicts(&mut pair, &[OsStr::new("page.html")], "from one", "from two");
    let copy = the_copy(&pair.two.share);
    let out = command("restore")
        .arg("--replace")
        .arg(&copy)
        .arg("-c")
        .arg(pair.two.config())
        .output()
        .unwrap();
    assert!(text(&out, 0).contains("page.html is restored, and the version that was there is gone"));
    pair.settle_equal(SOON);
    assert_eq!(
        fs::read_to_string(pair.one.share.join("page.html")).unwrap(),
        "from one"
    );
    assert!(listed(&pair.one).is_empty());

    // Nothing to lose: what has won is a deletion.
    make_conflicts(&mut pair, &[OsStr::new("page.html")], "from one", "from two");
    fs::remove_file(pair.one.share.join("page.html")).unwrap();
    pair.settle_equal(SOON);
    let found = listed(&pair.two);
    assert_eq!(
        (&found[0]["winner"], &found[0]["originals"][0]),
        (&Value::Null, &"page.html".into())
    );
    assert!(list(&pair.two, &[]).contains("page.html (gone)"));
    let copy = the_copy(&pair.one.share);
    assert!(said(&pair.one, "show", &copy, 0).contains("page.html is not there (any more)"));
    assert!(said(&pair.one, "restore", &copy, 0).contains("page.html is there again"));
    pair.settle_equal(SOON);
    assert_eq!(
        fs::read_to_string(pair.two.share.join("page.html")).unwrap(),
        "from one"
    );
    assert!(listed(&pair.two).is_empty());
}

#[test]
fn names_that_are_not_utf8_or_were_cut_are_dealt_with_as_well() {
    let Some(mut pair) = pair() else { return };
    let odd = OsStr::from_bytes(b"not \xff utf8.txt");
    let long = format!("{}.txt", "n".repeat(250));
    make_conflicts(&mut pair, &[odd, OsStr::new(&long)], "from one", "from two");
    let found = listed(&pair.two);
    assert_eq!(found.len(), 2);
    let of = |winner: &str| found.iter().filter(|copy| copy["winner"] == winner).count();
    assert_eq!((of("not \\xff utf8.txt"), of(&long)), (1, 1), "{found:?}");
    for name in copies_in(&pair.two.share) {
        let copy = pair.two.share.join(&name);
        assert!(said(&pair.two, "show", &copy, 0).contains("-from two"));
        assert!(said(&pair.two, "restore", &copy, 0).contains(" is restored; "));
    }
    pair.settle_equal(SOON);
    for name in [odd, OsStr::new(&long)] {
        assert_eq!(fs::read_to_string(pair.one.share.join(name)).unwrap(), "from one");
    }
    let copies: Vec<PathBuf> = copies_in(&pair.one.share)
        .into_iter()
        .map(|name| pair.one.share.join(name))
        .collect();
    let paths: Vec<&Path> = copies.iter().map(PathBuf::as_path).collect();
    let said = discard(&paths, 0);
    assert!(
        said.contains("/not \\xff utf8.omirr-conflict-") && said.lines().count() == 2,
        "{said}"
    );
    pair.settle_equal(SOON);
    assert!(copies_in(&pair.two.share).is_empty() && listed(&pair.two).is_empty());
}

#[test]
fn of_very_many_copies_the_first_are_listed_and_the_others_counted() {
    let Some(mut pair) = pair() else { return };
    let more = 3;
    for n in 0..CONFLICTS_MAX + more {
        let name = format!("{n}.omirr-conflict-20260921-141320-one");
        fs::write(pair.one.share.join(name), "").unwrap();
    }
    pair.one.settle(SOON);
    let report: Value = serde_json::from_str(&list(&pair.one, &["--json"])).unwrap();
    assert_eq!(report["conflicts"].as_array().unwrap().len(), CONFLICTS_MAX);
    assert_eq!(report["more"], more);
    let table = list(&pair.one, &[]);
    assert!(
        table.ends_with("\nand 3 more, which are not listed\n"),
        "{}",
        table.len()
    );
    let status = pair.one.status().expect("the daemon answers");
    assert_eq!(status["shares"][0]["conflicts"], CONFLICTS_MAX + more);
}

/// A folder with files; the commands need no daemon for names on disk.
fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

fn restore(folder: &Path, name: &str, more: &[&str], code: i32) -> String {
    let config = ["-c", "/nonexistent/omirr.toml"];
    let out = command("restore")
        .arg(name)
        .args(more)
        .args(config)
        .current_dir(folder)
        .output()
        .unwrap();
    text(&out, code)
}

const OF_A: &str = "a.omirr-conflict-20260921-141320-web1.txt";

#[test]
fn what_cannot_be_restored_is_refused_and_stays_as_it_was() {
    let folder = folder_with(&[
        ("plain.txt", ""),
        (OF_A, "copy"),
        ("b.omirr-conflict-20260921-141320-web1", ""),
    ]);
    let at = folder.path();
    fs::create_dir(at.join("a.txt")).unwrap();
    fs::create_dir(at.join("d.omirr-conflict-20260921-141320-web1")).unwrap();
    fs::write(at.join("d.omirr-conflict-20260921-141320-web1/in it"), "").unwrap();
    fs::create_dir(at.join("d")).unwrap();
    fs::write(at.join("d/in it"), "").unwrap();
    fs::hard_link(at.join("b.omirr-conflict-20260921-141320-web1"), at.join("b")).unwrap();
    for (name, more, expected) in [
        (
            "plain.txt",
            &[][..],
            "plain.txt is not the name of a conflict copy",
        ),
        (
            "x.omirr-conflict-20260921-141320-web1",
            &[],
            "cannot look at x.omirr-conflict-",
        ),
        (
            OF_A,
            &[],
            "a.txt is a directory and the copy is a file: move a.txt away first",
        ),
        (
            OF_A,
            &["--replace"],
            "a.txt is a directory and the copy is a file",
        ),
        (
            OF_A,
            &["--original", "plain.txt"],
            "plain.txt cannot be what a.omirr-conflict-",
        ),
        (OF_A, &["--original", "../a.txt"], "cannot be what"),
        (
            "b.omirr-conflict-20260921-141320-web1",
            &["--replace"],
            "two names of one file: there is nothing to restore",
        ),
        (
            "d.omirr-conflict-20260921-141320-web1",
            &["--replace"],
            "it is a directory that is not empty",
        ),
    ] {
        let said = restore(at, name, more, 1);
        assert!(said.starts_with("omirr: ") && said.contains(expected), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert_eq!(fs::read_to_string(at.join(OF_A)).unwrap(), "copy");
    assert_eq!(copies_in(at).len(), 3);
    // Directories exchange their names as files do.
    assert!(restore(at, "d.omirr-conflict-20260921-141320-web1", &[], 0).starts_with("d is restored; "));
}

#[test]
fn a_name_that_can_be_read_in_two_ways_is_not_guessed() {
    let copy = "README.omirr-conflict-20260921-141320-web1.org";
    let folder = folder_with(&[(copy, "copy")]);
    let said = restore(folder.path(), copy, &[], 1);
    assert!(
        said.contains("may have been README.org or README before: say which with --original NAME"),
        "{said}"
    );
    assert!(folder.path().join(copy).exists());
    restore(folder.path(), copy, &["--original", "README"], 0);
    assert_eq!(fs::read_to_string(folder.path().join("README")).unwrap(), "copy");
    // What stands beside it tells.
    let folder = folder_with(&[(copy, "copy"), ("README.org", "winner")]);
    restore(folder.path(), copy, &[], 0);
    assert_eq!(
        fs::read_to_string(folder.path().join("README.org")).unwrap(),
        "copy"
    );
    assert_eq!(fs::read_to_string(folder.path().join(copy)).unwrap(), "winner");
}

#[test]
fn only_conflict_copies_are_discarded_and_all_of_them_or_none() {
    let folder = folder_with(&[
        (OF_A, "copy"),
        ("a.txt", "winner"),
        ("b.omirr-conflict-notes", "a user's own"),
    ]);
    let at = folder.path();
    let dir = "d.omirr-conflict-20260921-141320-web1-2";
    fs::create_dir_all(at.join(dir).join("deep")).unwrap();
    fs::write(at.join(dir).join("deep/file"), "").unwrap();
    std::os::unix::fs::symlink(at.join("a.txt"), at.join(dir).join("link")).unwrap();
    let copy = at.join(OF_A);
    for other in [
        "a.txt",
        "b.omirr-conflict-notes",
        &format!("{dir}/deep/file"),
        &format!("{dir}/.."),
        "gone",
    ] {
        let said = discard(&[&copy, &at.join(other)], 1);
        assert!(said.starts_with("omirr: nothing is removed: "), "{said}");
        assert!(copy.exists(), "{other}");
    }
    assert_eq!(command("discard").output().unwrap().status.code(), Some(2));
    let said = discard(&[&copy, &copy, &at.join(dir)], 0);
    assert!(said.ends_with("-web1-2 and all that was in it\n"), "{said}");
    assert!(copies_in(at).iter().eq([OsStr::new("b.omirr-conflict-notes")]));
    assert_eq!(
        fs::read_to_string(at.join("a.txt")).unwrap(),
        "winner",
        "links are not followed"
    );
}

#[test]
fn without_a_daemon_a_copy_is_shown_and_the_list_says_what_is_missing() {
    let folder = folder_with(&[(OF_A, "a\nb\n"), ("a.txt", "a\nc\n")]);
    fs::write(
        folder.path().join("omirr.toml"),
        format!("[node]\nstate_dir = {:?}\n", folder.path()),
    )
    .unwrap();
    let run = |args: &[&str]| {
        command(args[0])
            .args(&args[1..])
            .args(["-c", "omirr.toml"])
            .current_dir(folder.path())
            .output()
            .unwrap()
    };
    let shown = text(&run(&["show", OF_A]), 0);
    assert!(
        shown.contains("by        not known: no daemon answers at "),
        "{shown}"
    );
    assert!(shown.ends_with("@@ -1,2 +1,2 @@\n a\n-c\n+b\n"), "{shown}");
    assert!(text(&run(&["list"]), 1).starts_with("omirr: no daemon answers at "));
    let odd = OsString::from_vec(b"\xff.omirr-conflict-20260921-141320-web1".to_vec());
    fs::write(folder.path().join(&odd), "").unwrap();
    let out = command("show")
        .arg(&odd)
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(text(&out, 0).contains("winner  \\xff is not there (any more)"));
}
