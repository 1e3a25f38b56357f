//! What keeps a daemon from running, or from running with all it could have:
//! the sentence that it says, and that the mirror goes on once it is put right.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use omirr_tests::nodes::{Node, Pair, may_mirror, omirr, refused};

const SOON: Duration = Duration::from_secs(60);
/// `nobody`.
const NOBODY: u32 = 65534;

fn pair(test: &str) -> Option<Pair> {
    may_mirror(test).then(Pair::new)
}

/// What `omirr check` says of the node's configuration; it must refuse.
fn checked(node: &Node) -> String {
    let out = omirr(&["check", "-c", node.config().to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    String::from_utf8(out.stderr).unwrap()
}

#[test]
fn a_share_path_that_cannot_be_one_keeps_the_daemon_from_starting() {
    let Some(mut pair) = pair("a_share_path_that_cannot_be_one_keeps_the_daemon_from_starting") else {
        return;
    };
    let good = pair.one.share.clone();
    let file = pair.one.folder.join("file");
    fs::write(&file, "").unwrap();
    let inner = good.join("inner");
    fs::create_dir(&inner).unwrap();
    let inside = format!("[shares.inner]\npath = {inner:?}\n");
    let cases = [
        (
            good.with_file_name("none"),
            String::new(),
            "does not exist: make the directory, or mount what belongs there",
        ),
        (file, String::new(), "is a file: a share is a directory"),
        (good.clone(), inside, "lies inside the share \"tree\""),
    ];
    for (path, more, sentence) in cases {
        pair.one.share = path;
        pair.one.share_options = more;
        pair.one.write_config();
        let said = refused(&pair.one.config());
        assert!(said.contains(sentence), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert_eq!(said, checked(&pair.one), "check and daemon say the same");
    }
    pair.one.share = good;
    pair.one.share_options = String::new();
    pair.start();
    pair.still_mirrors();
}

#[test]
fn three_mistakes_keep_the_daemon_from_starting_and_a_running_one_keeps_the_old_configuration() {
    let Some(mut pair) = pair("three_mistakes") else {
        return;
    };
    pair.start();
    pair.still_mirrors();
    let right = fs::read_to_string(pair.one.config()).unwrap();
    let wrong = right
        .replace("name =", "nmae =")
        .replace("address = \"127.0.0.1:", "address = \"127.0.0.1 ");
    let wrong = wrong + "conflicts = \"oldest-wins\"\n";
    fs::write(pair.one.config(), &wrong).unwrap();
    let said = refused(&pair.one.config());
    let sentences = [
        "did you mean \"name\"?",
        "has no port",
        "use \"keep-both\" or \"newest-wins\"",
    ];
    for sentence in sentences {
        assert!(said.contains(sentence), "{said}");
    }
    assert_eq!(said, checked(&pair.one), "check and daemon say the same");
    pair.one.hang_up();
    pair.one
        .wait_for_log("the configuration is not taken, the old one stays", SOON);
    for sentence in sentences {
        pair.one.wait_for_log(sentence, SOON);
    }
    assert!(pair.one.is_running());
    pair.still_mirrors();
}

#[test]
fn a_second_daemon_on_one_state_directory_is_told_of_the_first() {
    let Some(mut pair) = pair("a_second_daemon_on_one_state_directory_is_told_of_the_first") else {
        return;
    };
    pair.start();
    pair.still_mirrors();
    let said = refused(&pair.one.config());
    let pid = pair.one.pid();
    let state = pair.one.state_dir();
    assert_eq!(
        said,
        format!(
            "omirr: another omirr daemon (pid {pid}) uses {}: stop it first, or give this one its own state_dir\n",
            state.display()
        )
    );
    pair.still_mirrors();
    // One that was killed has left its lock file and its socket behind.
    pair.one.kill();
    assert!(state.join("control.sock").exists() && state.join("lock").exists());
    pair.one.start();
    pair.still_mirrors();
    assert!(pair.one.wait("60s").status.success());
}

#[test]
fn a_port_that_is_taken_is_named() {
    let Some(mut pair) = pair("a_port_that_is_taken_is_named") else {
        return;
    };
    let taken = std::net::TcpListener::bind(("127.0.0.1", pair.one.port)).unwrap();
    pair.one.write_config();
    let said = refused(&pair.one.config());
    let port = pair.one.port;
    assert!(
        said.contains(&format!("cannot listen on 127.0.0.1:{port}: another program"))
            && said.contains("ss -ltnp"),
        "{said}"
    );
    drop(taken);
    pair.start();
    pair.still_mirrors();
}

/// The sentence with which the daemon refuses `index` as its index; whoever
/// follows its advice and removes the file has a mirror that deletes nothing.
fn with_index(test: &str, spoil: impl FnOnce(&Path)) -> Option<String> {
    let mut pair = pair(test)?;
    pair.start();
    pair.still_mirrors();
    pair.settle(SOON);
    let there = fs::read_dir(&pair.two.share).unwrap().count();
    assert_eq!(there, 2);
    pair.one.stop();
    let index = pair.one.state_dir().join("shares/tree/index.redb");
    spoil(&index);
    let said = refused(&pair.one.config());
    println!("{said}");
    assert!(said.starts_with("omirr: ") && said.lines().count() == 1, "{said}");
    assert!(said.contains(&format!("the index {}", index.display())), "{said}");
    assert!(said.contains("remove the file"), "{said}");
    fs::remove_file(index).unwrap();
    pair.one.start();
    pair.still_mirrors();
    pair.settle_equal(SOON);
    assert_eq!(fs::read_dir(&pair.two.share).unwrap().count(), there + 2);
    Some(said)
}

#[test]
fn an_index_of_another_format_is_refused() {
    let said = with_index("an_index_of_another_format_is_refused", |file| {
        let db = redb::Database::create(file).unwrap();
        let change = db.begin_write().unwrap();
        let meta = redb::TableDefinition::<&str, &[u8]>::new("meta");
        change
            .open_table(meta)
            .unwrap()
            .insert("", &[9u8, 0, 0, 0][..])
            .unwrap();
        change.commit().unwrap();
    });
    if let Some(said) = said {
        assert!(
            said.contains("has format 9, this omirr reads format 4: use the omirr that wrote it"),
            "{said}"
        );
    }
}

#[test]
fn a_file_that_is_no_index_is_refused() {
    with_index("a_file_that_is_no_index_is_refused", |file| {
        fs::write(file, "This is somebody's shopping list. ".repeat(1000)).unwrap();
    });
}

#[test]
fn a_truncated_index_is_refused() {
    with_index("a_truncated_index_is_refused", |file| {
        let index = fs::File::options().write(true).open(file).unwrap();
        let length = index.metadata().unwrap().len();
        index.set_len(length / 3).unwrap();
    });
}

#[test]
fn without_privileges_the_tree_is_compared_at_intervals() {
    let Some(mut pair) = pair("without_privileges_the_tree_is_compared_at_intervals") else {
        return;
    };
    pair.open_to_all();
    pair.one.without_privileges(NOBODY);
    pair.two.without_privileges(NOBODY);
    pair.start();
    pair.one.wait_for_log("so the tree is compared every 10s", SOON);
    pair.still_mirrors();
    let status = pair.one.status().unwrap();
    assert_eq!(status["source"]["kind"], "scan", "{status}");
    let reason = status["source"]["reason"].as_str().unwrap();
    assert!(reason.contains("so the tree is compared every 10s"), "{reason}");
    println!("{reason}");
    // It misses nothing, so it must not complain at every comparison.
    assert!(
        !pair.one.log_text().contains("events were lost"),
        "{}",
        pair.one.log_tail()
    );
    assert_eq!(pair.one.stats()["overflow"]["count"], 0);
    // A source that is asked for by name is not replaced by a worse one.
    pair.one.stop();
    pair.one.tracer = "source = \"fanotify\"".to_owned();
    pair.one.start();
    pair.one
        .wait_for_log("omirr: the source \"fanotify\" cannot run here: ", SOON);
    let deadline = Instant::now() + SOON;
    while pair.one.is_running() {
        assert!(Instant::now() < deadline, "{}", pair.one.log_tail());
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("{}", pair.one.log_tail());
}

#[test]
fn what_a_daemon_without_privileges_may_not_make_waits_with_its_reason() {
    let Some(mut pair) = pair("what_a_daemon_without_privileges_may_not_make_waits_with_its_reason") else {
        return;
    };
    pair.open_to_all();
    pair.two.without_privileges(NOBODY);
    pair.start();
    let device = pair.one.share.join("device");
    let made = Command::new("mknod").arg(&device).args(["c", "1", "3"]).status();
    assert!(made.unwrap().success());
    let deadline = Instant::now() + SOON;
    let reason = loop {
        let item = pair
            .two
            .status()
            .map(|status| status["shares"][0]["pending_items"][0].clone());
        match item {
            Some(item) if item["path"] == "device" => break item["reason"].as_str().unwrap().to_owned(),
            _ => {}
        }
        assert!(
            Instant::now() < deadline,
            "{}\n{}",
            pair.two.status_text(),
            pair.two.log_tail()
        );
        std::thread::sleep(Duration::from_millis(20));
    };
    println!("{reason}");
    assert!(
        reason.contains("device") && reason.contains("CAP_MKNOD"),
        "{reason}"
    );
    pair.two
        .wait_for_log(&format!("cannot apply yet: {reason}"), SOON);
    // What it may do, it does, before and after.
    let may = pair.one.folder.join("may");
    fs::write(&may, "nobody's").unwrap();
    chown(&may, Some(NOBODY), Some(NOBODY)).unwrap();
    fs::rename(&may, pair.one.share.join("may")).unwrap();
    pair.two.wait_for_file("may", "nobody's", SOON);
    // A file is there, though it cannot have its owner.
    pair.one.put("roots", "root's");
    pair.two.wait_for_file("roots", "root's", SOON);
    pair.two.put("back", "back");
    pair.one.wait_for_file("back", "back", SOON);
}

#[test]
fn whoever_may_not_ask_the_daemon_is_told_who_may() {
    let Some(mut pair) = pair("whoever_may_not_ask_the_daemon_is_told_who_may") else {
        return;
    };
    pair.open_to_all();
    pair.start();
    pair.still_mirrors();
    for arguments in [&["status"][..], &["stats"], &["wait", "--timeout", "1s"]] {
        let out = Command::new(omirr_tests::binary())
            .args(arguments)
            .arg("-c")
            .arg(pair.one.config())
            .uid(NOBODY)
            .gid(NOBODY)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1), "{out:?}");
        assert!(out.stdout.is_empty(), "{out:?}");
        assert_eq!(
            String::from_utf8(out.stderr).unwrap(),
            format!(
                "omirr: permission denied at {}: run this as the daemon's user, most likely root\n",
                pair.one.state_dir().join("control.sock").display()
            )
        );
    }
    // Nor may it take the daemon's place.
    let out = Command::new(omirr_tests::binary())
        .args(["daemon", "-c"])
        .arg(pair.one.config())
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(
        said.contains("node.key") && said.contains("ermission denied"),
        "{said}"
    );
    pair.still_mirrors();
}
