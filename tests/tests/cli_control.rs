//! `status`, `stats` and `wait` against a daemon that gives set answers on its
//! control socket: what is printed, where, and with which exit code.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::mpsc,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The binary under test: `OMIRR_BIN`, or the last debug build.
fn omirr() -> Command {
    let binary = std::env::var_os("OMIRR_BIN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/omirr"),
        PathBuf::from,
    );
    assert!(
        binary.is_file(),
        "{} is not there: run `cargo xtask build` first",
        binary.display()
    );
    let mut command = Command::new(binary);
    command.env_remove("OMIRR_LOG");
    command
}

const STATUS: &str = r#"{"ok":{"node":"web1","version":"0.1.0","pid":7,"uptime_s":3,
"source":{"kind":"fanotify","attach":null,"transport":null,"reason":"eBPF is refused here"},
"shares":[{"name":"www","path":"/srv/www","state":"in-sync","reason":null,"entries":81234,"pending":0,
"conflicts":0,"pending_items":[],"progress":null,"peers":[{"name":"web2","address":"web2:808",
"state":"connected","behind":0,"last_error":null}]}]}}"#;

/// A daemon that says `answer` to whatever it is asked, and hands on the
/// questions.
struct Daemon {
    dir: TempDir,
    questions: mpsc::Receiver<String>,
}

impl Daemon {
    fn start(answer: &str) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("omirr.toml");
        fs::write(
            &config,
            format!("[node]\nstate_dir = \"{}\"\n", dir.path().display()),
        )
        .unwrap();
        fs::set_permissions(&config, fs::Permissions::from_mode(0o644)).unwrap();
        let listener = UnixListener::bind(dir.path().join("control.sock")).unwrap();
        let (asked, questions) = mpsc::channel();
        let answer = answer.replace('\n', "") + "\n";
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let mut line = String::new();
                stream.read_line(&mut line).unwrap();
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
                if asked.send(line).is_err() {
                    return;
                }
            }
        });
        Daemon { dir, questions }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = omirr();
        command
            .args(arguments)
            .arg("-c")
            .arg(self.dir.path().join("omirr.toml"));
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn status_is_shown_to_people_without_colour_in_a_pipe() {
    let daemon = Daemon::start(STATUS);
    let output = daemon.run(&["status"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(
        text(&output.stdout),
        "\
web1  omirr 0.1.0, pid 7, up 3s
source: fanotify: eBPF is refused here

SHARE  STATE    ENTRIES  PENDING  CONFLICTS  PATH
www    in-sync  81,234   0        0          /srv/www

SHARE  PEER  STATE      BEHIND  ADDRESS   LAST ERROR
www    web2  connected  0       web2:808  -
"
    );
    assert_eq!(daemon.questions.recv().unwrap(), "{\"cmd\":\"status\"}\n");
}

#[test]
fn status_as_json_has_the_fields_that_scripts_use() {
    let output = Daemon::start(STATUS).run(&["status", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["node"], "web1");
    assert_eq!(status["version"], "0.1.0");
    assert_eq!(status["source"]["kind"], "fanotify");
    assert!(status["source"]["attach"].is_null());
    let share = &status["shares"][0];
    assert_eq!(
        (share["state"].as_str(), share["entries"].as_u64()),
        (Some("in-sync"), Some(81234))
    );
    assert_eq!(share["peers"][0]["behind"], 0);
    assert!(share["peers"][0]["last_error"].is_null());
}

#[test]
fn watching_ends_with_success_on_an_interrupt() {
    let daemon = Daemon::start(STATUS);
    let mut child = daemon
        .command(&["status", "--watch", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let status: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(status["node"], "web1", "one object a line");
    }
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_barrier_that_is_reached_says_nothing() {
    let daemon = Daemon::start(r#"{"ok":{"done":true,"behind":[]}}"#);
    let output = daemon.run(&["wait", "--share", "www", "--peer", "web2", "--timeout", "1m"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(
        daemon.questions.recv().unwrap(),
        "{\"cmd\":\"wait\",\"share\":\"www\",\"peer\":\"web2\",\"timeout_ms\":60000}\n"
    );
}

#[test]
fn a_barrier_that_is_missed_names_who_is_behind() {
    let daemon = Daemon::start(
        r#"{"ok":{"done":false,"behind":[{"share":"www","peer":"web2","behind":12,"reason":"connection refused"}]}}"#,
    );
    let output = daemon.run(&["wait"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(
        text(&output.stderr),
        "omirr: timed out after 30s: peer web2 of the share www is 12 entries behind (connection refused): \
         see `omirr status`\n"
    );
    let output = daemon.run(&["wait", "--json"]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), ""));
    let reply: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(reply["behind"][0]["behind"], 12);
}

#[test]
fn what_the_daemon_refuses_is_passed_on() {
    let daemon = Daemon::start(r#"{"error":"there is no share \"x\": known are www"}"#);
    let output = daemon.run(&["wait", "--share", "x"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(
        text(&output.stderr),
        "omirr: there is no share \"x\": known are www\n"
    );
}

#[test]
fn an_answer_that_is_not_understood_is_a_failure_with_a_remedy() {
    for answer in ["hello", "{\"ok\":5}"] {
        let output = Daemon::start(answer).run(&["stats"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(
            text(&output.stderr).contains("may be of another version; restart it"),
            "{output:?}"
        );
    }
}

#[test]
fn figures_are_shown_to_people_and_to_collectors() {
    // As a daemon answers that does not count everything yet.
    let answer = r#"{"ok":{"source":null,"uptime_s":60,"events":42,"dropped":2,"buffer_bytes":8388608,
"high_water_bytes":8388608,"per_cpu":[{"cpu":0,"submitted":40,"dropped":2}],"hooks":[],
"resolver":{"hits":42,"misses":0,"fallbacks":0},"event_to_row_ms":{"p50":1.5,"p99":3.0},
"overflow":{"count":2,"last":null,"happened":"the ring was full","recovered_how":"a walk","advice":"raise it"}}}"#;
    let daemon = Daemon::start(answer);
    let people = daemon.run(&["stats"]);
    let shown = text(&people.stdout);
    for part in [
        "  what happened: the ring was full\n",
        "CPU  SUBMITTED  COALESCED  DROPPED\n0    40         0          2\n",
    ] {
        assert!(shown.contains(part), "{shown}");
    }
    let collectors = daemon.run(&["stats", "--metrics"]);
    assert!(collectors.status.success(), "{collectors:?}");
    let lines: Vec<_> = text(&collectors.stdout).lines().collect();
    for line in [
        "omirr_events_total 42",
        "omirr_cpu_dropped_total{cpu=\"0\"} 2",
        "omirr_overflows_total 0",
    ] {
        assert!(lines.contains(&line), "{line} is not in {lines:#?}");
    }
    assert_eq!(lines.last(), Some(&"# EOF"));
    assert_eq!(
        daemon.run(&["stats", "--metrics", "--json"]).status.code(),
        Some(2)
    );
}

#[test]
fn terminal_codes_from_elsewhere_are_not_passed_on() {
    let daemon = Daemon::start(&STATUS.replace("\"last_error\":null", "\"last_error\":\"\\u001b[2Jgone\""));
    let mut child = daemon
        .command(&["status"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = String::new();
    child.stdout.take().unwrap().read_to_string(&mut shown).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(
        shown.contains("\\x1b[2Jgone") && !shown.contains('\x1b'),
        "{shown:?}"
    );
}
