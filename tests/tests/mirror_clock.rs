//! Two nodes of which one has a clock that is an hour slow: both say so, and no
//! change disappears because of it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use omirr_tests::nodes::{Node, Pair, omirr};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
const HOUR_MS: i64 = 3_600_000;
/// Debian's libfaketime: changes what the wall clock says, for one process.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

fn pair() -> Option<Pair> {
    if !Path::new(FAKETIME).exists() {
        omirr_tests::skip(
            module_path!(),
            "setting a clock back takes the package libfaketime",
        );
        return None;
    }
    Pair::running(module_path!(), |pair| {
        pair.two.launcher = Some(Box::new(|program| {
            let mut command = Command::new(program);
            command.env("LD_PRELOAD", FAKETIME).env("FAKETIME", "-3600s");
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            command
        }));
    })
}

fn status(node: &Node, json: bool) -> String {
    let config = node.config();
    let mut args = vec!["status", "-c", config.to_str().expect("test paths are UTF-8")];
    args.extend(json.then_some("--json"));
    let out = omirr(&args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("omirr prints UTF-8")
}

/// How far the peer's clock is said to be ahead, ms.
fn clock_ahead_ms(node: &Node) -> i64 {
    let began = Instant::now();
    loop {
        let status: Value = serde_json::from_str(&status(node, true)).expect("status --json prints JSON");
        if let Some(ahead) = status["shares"][0]["peers"][0]["clock_ahead_ms"].as_i64() {
            return ahead;
        }
        assert!(began.elapsed() < SOON, "{status:#}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_clock_that_is_an_hour_slow_is_named_on_both_nodes() {
    let Some(pair) = pair() else { return };
    let near = |ahead: i64, expected: i64| (ahead - expected).abs() < HOUR_MS / 10;
    let (of_two, of_one) = (clock_ahead_ms(&pair.one), clock_ahead_ms(&pair.two));
    assert!(near(of_two, -HOUR_MS), "{of_two} ms");
    assert!(near(of_one, HOUR_MS), "{of_one} ms");
    let said = status(&pair.one, false);
    assert!(said.contains("the clock of two is "), "{said}");
    assert!(said.contains(" behind this node's"), "{said}");
    let said = status(&pair.two, false);
    assert!(said.contains("the clock of one is "), "{said}");
    assert!(said.contains(" ahead of this node's"), "{said}");
    assert!(pair.one.log_text().contains("the clock of two is "));
}

#[test]
fn the_slow_nodes_changes_are_not_older_than_what_they_followed() {
    let Some(mut pair) = pair() else { return };
    fs::write(pair.one.share.join("file"), "of the right clock").unwrap();
    fs::write(pair.one.share.join("doomed"), "of the right clock").unwrap();
    pair.settle_equal(SOON);
    // Known to the slow node, and then changed there: newer, whatever its clock
    // says.
    fs::write(pair.two.share.join("file"), "of the slow clock").unwrap();
    fs::remove_file(pair.two.share.join("doomed")).unwrap();
    pair.settle_equal(SOON);
    let file = fs::read_to_string(pair.one.share.join("file")).unwrap();
    assert_eq!(file, "of the slow clock");
    assert!(!pair.one.share.join("doomed").exists());
    // And back again.
    fs::write(pair.one.share.join("file"), "of the right clock again").unwrap();
    pair.settle_equal(SOON);
    let file = fs::read_to_string(pair.two.share.join("file")).unwrap();
    assert_eq!(file, "of the right clock again");
}

#[test]
fn of_two_changes_at_once_none_is_lost() {
    let Some(mut pair) = pair() else { return };
    fs::write(pair.one.share.join("file"), "common").unwrap();
    pair.settle_equal(SOON);
    pair.one.stop();
    pair.two.stop();
    fs::write(pair.one.share.join("file"), "from one").unwrap();
    fs::write(pair.two.share.join("file"), "from two").unwrap();
    pair.start();
    pair.settle_equal(SOON);
    let mut contents: Vec<String> = fs::read_dir(&pair.one.share)
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    contents.sort();
    assert_eq!(contents, ["from one", "from two"]);
}
