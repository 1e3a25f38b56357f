//! `omirr log` in a guest, by eBPF: processes that are gone as soon as they have
//! made their change are named, with user and cgroup, on both nodes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use omirr_tests::guest::{self, Guest};
use omirr_tests::nodes::{Node, Pair, omirr};
use serde_json::Value;

/// Emulated processors are slow; only a hang takes so long.
const LONG: Duration = Duration::from_secs(300);
const CGROUP: &str = "/sys/fs/cgroup/made";

fn fit(guest: Guest) -> Guest {
    guest
        .memory_mib(1536)
        .timeout(Duration::from_secs(600))
        .env("OMIRR_TEST_DIR", "/mnt")
}

fn sh(script: &str, argument: &str) {
    let out = Command::new("sh")
        .args(["-ec", script, argument])
        .output()
        .expect("there is a shell");
    assert!(
        out.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

fn log(node: &Node, name: &str) -> Value {
    let (config, path) = (node.config(), node.share.join(name));
    let text = |path: &std::path::Path| path.to_str().expect("test paths are UTF-8").to_owned();
    let out = omirr(&["log", &text(&path), "--json", "-c", &text(&config)]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{name} on {}: {said}", node.name);
    serde_json::from_slice(&out.stdout).expect("log --json prints JSON")
}

/// What both nodes say of a path changed on the first: command, cgroup, and
/// whether it was deleted.
fn of(pair: &Pair, name: &str) -> (String, String, bool) {
    let (here, there) = (log(&pair.one, name), log(&pair.two, name));
    assert_eq!(here, there);
    assert_eq!(here["node"], "one", "{here}");
    let text = |key: &str| here["who"][key].as_str().unwrap_or_default().to_owned();
    (text("command"), text("cgroup"), here["deleted"] == true)
}

fn names_who_is_gone(attach: &str, transport: &str) {
    fs::create_dir(CGROUP).expect("version 2 of cgroups is mounted in guests");
    let doctor = omirr(&["doctor", "--path", "/mnt"]);
    println!("{}", String::from_utf8_lossy(&doctor.stdout));
    let mut pair = Pair::new();
    for node in [&mut pair.one, &mut pair.two] {
        node.tracer = format!("source = \"ebpf\"\nattach = \"{attach}\"\ntransport = \"{transport}\"");
    }
    pair.start();
    pair.settle(LONG);
    fs::set_permissions(&pair.one.share, fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(pair.base(), fs::Permissions::from_mode(0o755)).unwrap();
    let share = pair.one.share.display().to_string();
    sh(
        "echo $$ > /sys/fs/cgroup/made/cgroup.procs; /bin/touch \"$0/file\"; /bin/mkdir -p \"$0/dir/sub\"; echo x > \"$0/dir/sub/x\"",
        &share,
    );
    pair.settle_equal(LONG);
    let made = "/made".to_owned();
    for (name, command) in [
        ("file", "touch"),
        ("dir/sub/x", "sh"),
        ("dir/sub", "sh"),
        ("dir", "mkdir"),
    ] {
        let (found, cgroup, deleted) = of(&pair, name);
        // A folder's time is its last entry's, and its row that one's.
        assert!(found == command || name.starts_with("dir"), "{name}: {found}");
        assert_eq!((cgroup, deleted), (made.clone(), false), "{name}");
    }
    // A deletion is forgotten once both know of it and have nothing else to do, which
    // may be before a slow guest has asked.
    let asked = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !asked.load(Ordering::Relaxed) {
                fs::write(pair.one.share.join("busy"), "").unwrap();
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        let _asked = Set(&asked);
        knows_what_is_gone(&pair, &share);
    });
    pair.settle_equal(LONG);
    pair.one.stop();
    pair.two.stop();
}

/// Sets it when it goes, after a failure, too.
struct Set<'a>(&'a AtomicBool);

impl Drop for Set<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn knows_what_is_gone(pair: &Pair, share: &str) {
    sh("/bin/rm -r \"$0/dir\"; /bin/mv \"$0/file\" \"$0/moved\"", share);
    for node in [&pair.one, &pair.two] {
        let waited = node.wait("10m");
        assert!(
            waited.status.success(),
            "{}",
            String::from_utf8_lossy(&waited.stderr)
        );
    }
    let root = "/".to_owned();
    assert_eq!(of(pair, "dir/sub/x"), ("rm".to_owned(), root.clone(), true));
    assert_eq!(of(pair, "dir"), ("rm".to_owned(), root.clone(), true));
    assert_eq!(of(pair, "moved"), ("mv".to_owned(), root.clone(), false));
    assert_eq!(of(pair, "file"), ("mv".to_owned(), root, true));
}

#[test]
fn kprobe_and_perf_on_5_10() {
    guest::inside("5.10", fit, || names_who_is_gone("kprobe", "perf"));
}

#[test]
fn fentry_and_ring_on_6_12() {
    guest::inside("6.12", fit, || names_who_is_gone("fentry", "ring"));
}
