//! Real nodes on this machine: folders, keys, configurations and daemons.
//!
//! Everything lives in a fresh folder that goes when the value goes, unless the
//! test fails: then it stays, and its place is printed with the logs.

use std::fmt::Write as _;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::net::{Cable, Side};

/// Runs `omirr` with these arguments to its end.
pub fn omirr(args: &[&str]) -> Output {
    Command::new(crate::binary())
        .args(args)
        .output()
        .expect("omirr can be started")
}

/// Starts a daemon that must refuse to run, with exit code 1; returns what it
/// says on standard error.
pub fn refused(config: &Path) -> String {
    let mut daemon = Command::new(crate::binary())
        .args(["daemon", "-c"])
        .arg(config)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("omirr can be started");
    let deadline = Instant::now() + Duration::from_secs(60);
    while daemon.try_wait().expect("the daemon can be waited for").is_none() {
        if Instant::now() > deadline {
            // It is this function's own process, and the test fails anyhow.
            let _ = daemon.kill();
            panic!("the daemon runs with {}", config.display());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = daemon.wait_with_output().expect("the daemon has ended");
    let said = String::from_utf8(ended.stderr).expect("omirr prints UTF-8");
    assert_eq!(ended.status.code(), Some(1), "{said}");
    said
}

/// Copies a file or a folder with everything that is in it, attributes, holes
/// and links included.
pub fn copy_all(from: &Path, to: &Path) {
    let copied = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .args([from, to])
        .output()
        .expect("cp can be started");
    assert!(
        copied.status.success(),
        "{}",
        String::from_utf8_lossy(&copied.stderr)
    );
}

/// The public key of the private one in `file`, which is made if it is not there.
fn key_of(file: &Path) -> String {
    let verb = if file.exists() { "show" } else { "generate" };
    let made = omirr(&["key", verb, file.to_str().expect("test paths are UTF-8")]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let printed = String::from_utf8(made.stdout).expect("omirr prints UTF-8");
    let key = printed.split_whitespace().last();
    key.expect("the key is the last word").to_owned()
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("loopback has free ports")
        .port()
}

/// Whether this process may use fanotify on a whole filesystem, as the daemon
/// needs natively; says why `test` is skipped if not.
pub fn may_mirror(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        crate::skip(test, "mirroring with owners and fanotify needs root");
    }
    root
}

/// Makes a command of a program.
pub type Launcher = Box<dyn Fn(&Path) -> Command + Send + Sync>;

pub struct Node {
    pub name: String,
    pub folder: PathBuf,
    pub share: PathBuf,
    /// Where it listens and is found.
    pub host: String,
    pub port: u16,
    pub key: String,
    /// `(name, address, key)`.
    pub peers: Vec<(String, String, String)>,
    /// Lines for the `[tracer]` table.
    pub tracer: String,
    /// Lines for the share's table.
    pub share_options: String,
    /// Shares beside `tree`: `(name, path)`.
    pub more_shares: Vec<(String, PathBuf)>,
    /// Whose process the daemon is, if not this one's user; see
    /// [`Node::without_privileges`].
    user: Option<u32>,
    /// Makes the daemon's command, in another network namespace say; the
    /// program itself if none.
    pub launcher: Option<Launcher>,
    child: Option<Child>,
}

impl Node {
    /// Makes folder and key of a node beneath `base`, unless they are there.
    pub fn new(base: &Path, name: &str) -> Node {
        let folder = base.join(name);
        let share = folder.join("share");
        std::fs::create_dir_all(&share).expect("the test's folder can be made");
        let key = key_of(&folder.join("node.key"));
        Node {
            name: name.to_owned(),
            folder,
            share,
            port: free_port(),
            key,
            peers: Vec::new(),
            tracer: String::new(),
            share_options: String::new(),
            more_shares: Vec::new(),
            user: None,
            host: "127.0.0.1".to_owned(),
            launcher: None,
            child: None,
        }
    }

    /// A copy of everything that a node is: key, state and tree, as a backup or a
    /// cloned machine has them. It has a port of its own, for want of a machine.
    pub fn cloned(&self, base: &Path, folder: &str) -> Node {
        let mut node = Node::new(base, folder);
        std::fs::remove_dir_all(&node.folder).expect("the fresh folder can go again");
        copy_all(&self.folder, &node.folder);
        node.name.clone_from(&self.name);
        node.key.clone_from(&self.key);
        node.peers.clone_from(&self.peers);
        node.tracer.clone_from(&self.tracer);
        node.share_options.clone_from(&self.share_options);
        node.more_shares.clone_from(&self.more_shares);
        node
    }

    /// Gives the node a new key, of which its peers know nothing yet.
    pub fn renew_key(&mut self) {
        let file = self.folder.join("node.key");
        std::fs::remove_file(&file).expect("the node has a key");
        self.key = key_of(&file);
    }

    pub fn knows(&mut self, other: &Node) {
        self.peers.push((
            other.name.clone(),
            format!("{}:{}", other.host, other.port),
            other.key.clone(),
        ));
    }

    pub fn config(&self) -> PathBuf {
        self.folder.join("omirr.toml")
    }

    pub fn state_dir(&self) -> PathBuf {
        self.folder.join("state")
    }

    pub fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    pub fn write_config(&self) {
        let mut text = String::new();
        let folder = self.folder.display();
        let Node {
            name,
            host,
            port,
            tracer,
            ..
        } = self;
        let _ = write!(
            text,
            "[node]\nname = {name:?}\nlisten = [\"{host}:{port}\"]\nkey = \"{folder}/node.key\"\nstate_dir = \"{folder}/state\"\n\n[tracer]\n{tracer}\n"
        );
        for (name, address, key) in &self.peers {
            let _ = write!(text, "\n[peers.{name}]\naddress = {address:?}\nkey = {key:?}\n");
        }
        let _ = write!(
            text,
            "\n[shares.tree]\npath = {:?}\n{}\n",
            self.share, self.share_options
        );
        for (name, path) in &self.more_shares {
            let _ = write!(text, "\n[shares.{name}]\npath = {path:?}\n");
        }
        std::fs::write(self.config(), text).expect("the configuration can be written");
    }

    /// Lets the daemon run as `user`, who gets the node's folder and all in it.
    pub fn without_privileges(&mut self, user: u32) {
        let chown =
            |path: &Path| std::os::unix::fs::lchown(path, Some(user), Some(user)).expect("root may chown");
        let mut folders = vec![self.folder.clone()];
        while let Some(folder) = folders.pop() {
            chown(&folder);
            for entry in std::fs::read_dir(&folder).expect("the node's folder can be read") {
                let path = entry.expect("the node's folder can be read").path();
                chown(&path);
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path);
                }
            }
        }
        self.user = Some(user);
    }

    /// Writes a file into the share in one step, as the daemon's user, so that
    /// a daemon without privileges may read it and give it to its own files.
    pub fn put(&self, name: &str, content: &str) {
        let made = self.folder.join("being-written");
        std::fs::write(&made, content).expect("the test may write");
        std::os::unix::fs::chown(&made, self.user, self.user).expect("root may chown");
        std::fs::rename(made, self.share.join(name)).expect("the share is on the folder's filesystem");
    }

    /// Waits until the share has this file with this content.
    pub fn wait_for_file(&self, name: &str, content: &str, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while !std::fs::read_to_string(self.share.join(name)).is_ok_and(|found| found == content) {
            assert!(
                Instant::now() < deadline,
                "{name} does not arrive on {}\n{}\n{}",
                self.name,
                self.status_text(),
                self.log_tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts the daemon; its log goes to [`Node::log`].
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "{} is running", self.name);
        self.write_config();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .expect("the log can be opened");
        let binary = crate::binary();
        let mut daemon = match &self.launcher {
            Some(launcher) => launcher(&binary),
            None => Command::new(&binary),
        };
        if let Some(user) = self.user {
            // Other groups than the user's own are dropped as well.
            daemon.uid(user).gid(user);
        }
        let child = daemon
            .args(["daemon", "-c"])
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor can be copied"))
            .stderr(log)
            .spawn()
            .expect("omirr can be started");
        self.child = Some(child);
    }

    /// What the daemon has read by system calls since it started, from files and
    /// from sockets, bytes.
    pub fn read_bytes(&self) -> u64 {
        self.io("rchar:")
    }

    /// What it has written likewise.
    pub fn written_bytes(&self) -> u64 {
        self.io("wchar:")
    }

    fn io(&self, name: &str) -> u64 {
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.pid())).expect("the daemon runs");
        let line = io.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|count| count.trim().parse().ok())
            .expect("the kernel counts what is read and written")
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().expect("the node runs").id()).expect("pids fit")
    }

    pub fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid()).expect("pids are positive");
        rustix::process::kill_process(pid, signal).expect("the daemon can be signalled");
    }

    /// Ends the daemon as systemd would; it must end cleanly.
    pub fn stop(&mut self) {
        self.signal(rustix::process::Signal::TERM);
        let mut child = self.child.take().expect("the node runs");
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = child.try_wait().expect("the daemon can be waited for") {
                assert!(
                    status.success(),
                    "{} ended with {status}\n{}",
                    self.name,
                    self.log_tail()
                );
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{} does not end\n{}",
                self.name,
                self.log_tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.signal(rustix::process::Signal::KILL);
        let mut child = self.child.take().expect("the node runs");
        child.wait().expect("the daemon can be waited for");
    }

    /// Whether the daemon has been killed, by itself or another; then it can be
    /// started again. It must not have ended in any other way.
    pub fn has_died(&mut self) -> bool {
        let child = self.child.as_mut().expect("the node was started");
        let Some(status) = child.try_wait().expect("the daemon can be waited for") else {
            return false;
        };
        self.child = None;
        let killed = status.signal() == Some(libc::SIGKILL);
        assert!(killed, "{} ended with {status}\n{}", self.name, self.log_tail());
        true
    }

    pub fn stop_reading(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    pub fn go_on(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    pub fn hang_up(&self) {
        self.signal(rustix::process::Signal::HUP);
    }

    /// `omirr wait` on this node.
    pub fn wait(&self, timeout: &str) -> Output {
        omirr(&[
            "wait",
            "-c",
            self.config().to_str().expect("test paths are UTF-8"),
            "--timeout",
            timeout,
        ])
    }

    /// Waits until the daemon answers and everything before has reached every peer.
    pub fn settle(&mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        loop {
            assert!(self.is_running(), "{} has ended\n{}", self.name, self.log_tail());
            let left = deadline.saturating_duration_since(Instant::now());
            let done = self.wait(&format!("{}ms", left.as_millis().max(1)));
            if done.status.success() {
                return;
            }
            let why = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(
                Instant::now() < deadline,
                "{}: {why}\n{}\n{}",
                self.name,
                self.status_text(),
                self.log_tail()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn status(&self) -> Option<serde_json::Value> {
        let out = omirr(&["status", "--json", "-c", self.config().to_str()?]);
        out.status
            .success()
            .then(|| serde_json::from_slice(&out.stdout).expect("status --json prints JSON"))
    }

    pub fn status_text(&self) -> String {
        let out = omirr(&[
            "status",
            "-c",
            self.config().to_str().expect("test paths are UTF-8"),
        ]);
        format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        )
    }

    pub fn stats(&self) -> serde_json::Value {
        let out = omirr(&[
            "stats",
            "--json",
            "-c",
            self.config().to_str().expect("test paths are UTF-8"),
        ]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).expect("stats --json prints JSON")
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// The last lines of the log, for messages.
    pub fn log_tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<_> = text.lines().collect();
        format!(
            "--- log of {}:\n{}",
            self.name,
            lines[lines.len().saturating_sub(30)..].join("\n")
        )
    }

    /// Waits until `done` says so, for `what`.
    pub fn until(&self, what: &str, timeout: Duration, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + timeout;
        while !done() {
            assert!(
                Instant::now() < deadline,
                "never: {what}\n{}\n{}",
                self.status_text(),
                self.log_tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the share is stopped; says why it is.
    pub fn stopped_because(&self, timeout: Duration) -> String {
        let mut reason = None;
        self.until("the share is stopped", timeout, || {
            let share = self.status().map(|status| status["shares"][0].clone());
            reason = share
                .filter(|share| share["state"] == "stopped")
                .map(|share| share["reason"].as_str().expect("a reason is text").to_owned());
            reason.is_some()
        });
        reason.expect("it was waited for")
    }

    /// Waits until the log has `text` in it.
    pub fn wait_for_log(&self, text: &str, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while !self.log_text().contains(text) {
            assert!(
                Instant::now() < deadline,
                "the log never says {text:?}\n{}",
                self.log_tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Resident memory of the daemon, bytes.
    pub fn resident_bytes(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid())).expect("the daemon runs");
        let pages: u64 = statm
            .split_whitespace()
            .nth(1)
            .and_then(|n| n.parse().ok())
            .expect("statm has two numbers");
        pages * 4096
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Nothing more can be done about a process that does not die.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Two nodes that know each other, not yet started.
pub struct Pair {
    pub one: Node,
    pub two: Node,
    base: Option<tempfile::TempDir>,
}

impl Pair {
    /// In a fresh folder in `OMIRR_TEST_DIR`, else the system's folder for
    /// temporary files.
    pub fn new() -> Pair {
        let base = match std::env::var_os("OMIRR_TEST_DIR") {
            Some(folder) => tempfile::tempdir_in(folder),
            None => tempfile::tempdir(),
        }
        .expect("a folder for the test can be made");
        let mut one = Node::new(base.path(), "one");
        let mut two = Node::new(base.path(), "two");
        one.knows(&two);
        two.knows(&one);
        Pair {
            one,
            two,
            base: Some(base),
        }
    }

    /// A pair that runs and has nothing to do, after `prepare`; none where
    /// mirroring cannot be tried, which is said for `test`.
    pub fn running(test: &str, prepare: impl FnOnce(&mut Pair)) -> Option<Pair> {
        if !may_mirror(test) {
            return None;
        }
        let mut pair = Pair::new();
        prepare(&mut pair);
        pair.start();
        pair.settle(Duration::from_secs(60));
        Some(pair)
    }

    /// Puts each node into a network namespace of its own, joined by `cable`.
    /// Before they are started.
    pub fn on_cable(&mut self, cable: &Arc<Cable>) {
        for (node, side) in [(&mut self.one, Side::One), (&mut self.two, Side::Two)] {
            node.host = side.address().to_owned();
            let cable = Arc::clone(cable);
            node.launcher = Some(Box::new(move |binary| cable.command(side, binary)));
        }
        self.one.peers.clear();
        self.two.peers.clear();
        self.one.knows(&self.two);
        self.two.knows(&self.one);
    }

    pub fn start(&mut self) {
        self.one.start();
        self.two.start();
    }

    /// Waits until what both have changed is on both.
    pub fn settle(&mut self, timeout: Duration) {
        self.one.settle(timeout);
        self.two.settle(timeout);
        // What two sent one may have made one change something of its own.
        self.one.settle(timeout);
    }

    /// Writes a file on each side and waits until it is on the other: what was
    /// done to the daemons before has not kept them from their work. Other
    /// peers than these two need not be there.
    pub fn still_mirrors(&self) {
        static TIMES: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let time = TIMES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        for (from, to) in [(&self.one, &self.two), (&self.two, &self.one)] {
            let name = format!("still-mirrors-{time}-from-{}", from.name);
            from.put(&name, &name);
            to.wait_for_file(&name, &name, Duration::from_secs(60));
        }
    }

    /// Waits for both, then compares the trees by an independent walk.
    pub fn settle_equal(&mut self, timeout: Duration) {
        self.settle(timeout);
        self.assert_equal();
    }

    pub fn assert_equal(&self) {
        let walk = |node: &Node| crate::treewalk::walk(&node.share).expect("a share can be walked");
        let differences = crate::treewalk::diff(&walk(&self.one), &walk(&self.two));
        assert!(
            differences.is_empty(),
            "the trees differ:\n{}\n{}\n{}",
            differences.join("\n"),
            self.one.log_tail(),
            self.two.log_tail()
        );
    }

    /// Lets others than root reach the nodes' folders.
    pub fn open_to_all(&self) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(self.base(), std::fs::Permissions::from_mode(0o755))
            .expect("the test's folder is its own");
    }

    pub fn base(&self) -> &Path {
        self.base
            .as_ref()
            .expect("the folder lives as long as the pair")
            .path()
    }
}

impl Default for Pair {
    fn default() -> Pair {
        Pair::new()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(base) = self.base.take()
        {
            println!("the nodes' folders stay in {}", base.keep().display());
        }
    }
}
