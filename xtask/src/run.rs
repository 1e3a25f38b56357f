//! `cargo xtask run`: omirr at work, with nothing prepared.
//!
//! Without arguments it makes two nodes on loopback over two fresh folders, and
//! shows what they log until Ctrl-C; everything that it made is then removed.
//! With arguments it becomes omirr itself.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::build;
use crate::shell::{capture, describe, output, run, say};
use crate::workspace::{Profile, is_root, which};

const NAMES: [&str; 2] = ["one", "two"];
/// How long two empty nodes may take to meet.
const MEETING: Duration = Duration::from_secs(60);
/// How long a node may take to stop before it is killed.
const STOPPING: Duration = Duration::from_secs(15);

/// Run omirr.
#[derive(Args)]
pub struct Options {
    /// Build with optimisation
    #[arg(long)]
    release: bool,
    /// Run omirr with these arguments instead of showing two nodes
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// # Errors
/// omirr does not build, or a node does not start or dies.
pub fn main(options: &Options) -> Result<ExitCode> {
    let omirr = build::omirr(Profile::from_release_flag(options.release))?;
    if !options.arguments.is_empty() {
        let mut command = privileged(&omirr)?;
        command.args(&options.arguments);
        // Returns only when it does not work.
        let error = command.exec();
        return Err(error).with_context(|| format!("`{}` cannot be started", describe(&command)));
    }
    catch_signals()?;
    let place = Place::make()?;
    let nodes = prepare(&omirr, &place.0)?;
    show(&omirr, &place.0, &nodes)
}

/// A command with the privileges that watching whole file systems takes.
fn privileged(program: &Path) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let sudo = which("sudo").with_context(|| {
        format!(
            "omirr needs root's privileges to watch file systems, and there is no sudo; run {} as root",
            program.display()
        )
    })?;
    let mut command = Command::new(sudo);
    command.arg("--").arg(program);
    Ok(command)
}

/// One of the two nodes.
struct Node {
    name: &'static str,
    folder: PathBuf,
    config: PathBuf,
}

fn prepare(omirr: &Path, place: &Path) -> Result<Vec<Node>> {
    // Both are held until both are known, so that they differ.
    let listeners = [listener()?, listener()?];
    let mut keys = Vec::new();
    let mut nodes = Vec::new();
    for name in NAMES {
        let folder = place.join(name);
        fs::create_dir(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        let key = place.join(format!("{name}.key"));
        let printed = capture(Command::new(omirr).args(["key", "generate"]).arg(&key))?;
        let public = printed
            .split_whitespace()
            .last()
            .context("`omirr key generate` printed no public key")?;
        keys.push(public.to_owned());
        nodes.push(Node {
            name,
            folder,
            config: place.join(format!("{name}.toml")),
        });
    }
    for (own, node) in nodes.iter().enumerate() {
        let other = 1 - own;
        let text = format!(
            "[node]\nname = \"{name}\"\nlisten = [\"{address}\"]\nkey = \"{place}/{name}.key\"\n\
             state_dir = \"{place}/{name}.state\"\n\n\
             [peers.{peer}]\naddress = \"{peer_address}\"\nkey = \"{peer_key}\"\n\n\
             [shares.shared]\npath = \"{folder}\"\n",
            name = node.name,
            address = listeners[own].local_addr()?,
            place = place.display(),
            peer = NAMES[other],
            peer_address = listeners[other].local_addr()?,
            peer_key = keys[other],
            folder = node.folder.display(),
        );
        fs::write(&node.config, text)
            .with_context(|| format!("{} cannot be written", node.config.display()))?;
    }
    Ok(nodes)
}

fn listener() -> Result<TcpListener> {
    TcpListener::bind(("127.0.0.1", 0)).context("no port can be opened on loopback")
}

fn show(omirr: &Path, place: &Path, nodes: &[Node]) -> Result<ExitCode> {
    if !is_root() {
        say("omirr needs root's privileges to watch file systems; sudo may ask for your password");
        run(Command::new("sudo").arg("--validate"))?;
    }
    println!();
    println!("Two nodes on this machine, each with a folder of its own:");
    for node in nodes {
        println!("    {}   {}", node.name, node.folder.display());
    }
    println!("Change anything in either folder from another terminal, for example");
    println!(
        "    echo hello > {}/greeting; cat {}/greeting",
        nodes[0].folder.display(),
        nodes[1].folder.display()
    );
    println!(
        "Below is what the nodes say. Ctrl-C stops both and removes {}.",
        place.display()
    );
    println!();

    let (sender, lines) = mpsc::channel();
    let mut running = Vec::new();
    for node in nodes {
        running.push(Running::start(omirr, node, &sender)?);
    }
    drop(sender);
    let meeting = meet(omirr, nodes);
    let end = follow(&mut running, &lines, &meeting);
    for node in &mut running {
        node.ask_to_stop();
    }
    for node in &mut running {
        node.stop();
    }
    // What they said while stopping.
    for (name, line) in lines.try_iter() {
        println!("{name} | {line}");
    }
    end.map(|()| {
        say("both nodes are stopped");
        ExitCode::SUCCESS
    })
}

/// Waits, aside, until both nodes say that the other has everything.
fn meet(omirr: &Path, nodes: &[Node]) -> Receiver<Result<()>> {
    let (sender, meeting) = mpsc::channel();
    let omirr = omirr.to_owned();
    let configs: Vec<PathBuf> = nodes.iter().map(|node| node.config.clone()).collect();
    thread::spawn(move || {
        let deadline = Instant::now() + MEETING;
        let _ = sender.send(
            configs
                .iter()
                .try_for_each(|config| wait_for(&omirr, config, deadline)),
        );
    });
    meeting
}

fn wait_for(omirr: &Path, config: &Path, deadline: Instant) -> Result<()> {
    loop {
        let mut command = privileged(omirr)?;
        command
            .args(["wait", "-c"])
            .arg(config)
            .args(["--timeout", "5s"])
            .process_group(0);
        let result = output(&mut command)?;
        if result.status.success() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let words = String::from_utf8_lossy(&result.stderr).into_owned();
            bail!(
                "the nodes did not meet within {} s: {}",
                MEETING.as_secs(),
                words.trim()
            );
        }
        // The daemon may not have its socket yet.
        thread::sleep(Duration::from_millis(100));
    }
}

/// Prints what the nodes say, until a signal or until one ends.
fn follow(
    running: &mut [Running],
    lines: &Receiver<(&'static str, String)>,
    meeting: &Receiver<Result<()>>,
) -> Result<()> {
    loop {
        if STOP.load(Ordering::Relaxed) {
            println!();
            return Ok(());
        }
        match lines.recv_timeout(Duration::from_millis(50)) {
            Ok((name, line)) => {
                println!("{name} | {line}");
                if let Some(node) = running.iter_mut().find(|node| node.name == name) {
                    node.remember(line);
                }
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {}
            // Both have closed their output: they are ending.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(50)),
        }
        for node in running.iter_mut() {
            if let Some(status) = node.child.try_wait().context("a node cannot be waited for")? {
                bail!("{}", node.last_words(&status.to_string()));
            }
        }
        if let Ok(result) = meeting.try_recv() {
            result?;
            println!("two nodes are mirroring each other");
        }
    }
}

struct Running {
    name: &'static str,
    child: Child,
    last: VecDeque<String>,
}

impl Running {
    fn start(omirr: &Path, node: &Node, lines: &Sender<(&'static str, String)>) -> Result<Self> {
        let mut command = privileged(omirr)?;
        command
            .args(["daemon", "-c"])
            .arg(&node.config)
            .env("NO_COLOR", "1")
            // A group of its own, so that Ctrl-C reaches it through us, as SIGTERM.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if std::env::var_os("OMIRR_LOG").is_none() {
            // A line for every entry that arrives.
            command.env("OMIRR_LOG", "info,omirr::applied=debug");
        }
        let mut child = command
            .spawn()
            .with_context(|| format!("`{}` cannot be started", describe(&command)))?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let stderr = child.stderr.take().context("stderr is piped")?;
        send_lines(node.name, stdout, lines.clone());
        send_lines(node.name, stderr, lines.clone());
        Ok(Self {
            name: node.name,
            child,
            last: VecDeque::new(),
        })
    }

    fn remember(&mut self, line: String) {
        self.last.push_back(line);
        if self.last.len() > 20 {
            self.last.pop_front();
        }
    }

    fn last_words(&self, status: &str) -> String {
        let mut text = format!("node {} ended by itself ({status})", self.name);
        if self.last.is_empty() {
            text.push_str(" without a word");
        } else {
            text.push_str("; its last words:");
            for line in &self.last {
                let _ = write!(text, "\n    {line}");
            }
        }
        text
    }

    fn signal(&self, signal: libc::c_int) {
        if let Ok(pid) = libc::pid_t::try_from(self.child.id()) {
            // SAFETY: the child has not been waited for, so the number is its own.
            unsafe { libc::kill(pid, signal) };
        }
    }

    fn ask_to_stop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(libc::SIGTERM);
        }
    }

    fn stop(&mut self) {
        let deadline = Instant::now() + STOPPING;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                say(format!(
                    "node {} did not stop within {} s and is killed",
                    self.name,
                    STOPPING.as_secs()
                ));
                self.signal(libc::SIGKILL);
                let _ = self.child.wait();
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    /// Nothing is left running when an error ends the show early.
    fn drop(&mut self) {
        self.ask_to_stop();
        self.stop();
    }
}

fn send_lines(name: &'static str, stream: impl Read + Send + 'static, lines: Sender<(&'static str, String)>) {
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n') {
            let Ok(line) = line else { break };
            if lines
                .send((name, String::from_utf8_lossy(&line).into_owned()))
                .is_err()
            {
                break;
            }
        }
    });
}

static STOP: AtomicBool = AtomicBool::new(false);

fn catch_signals() -> Result<()> {
    extern "C" fn stop(_: libc::c_int) {
        STOP.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which a handler may do;
        // the action is zeroed, which is an empty mask and no flags.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = stop as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(std::io::Error::last_os_error()).context("signals cannot be caught");
        }
    }
    Ok(())
}

/// A fresh folder for all that the two nodes have, removed at the end.
struct Place(PathBuf);

impl Place {
    fn make() -> Result<Self> {
        let parent = std::env::temp_dir();
        let mut number = std::process::id();
        loop {
            let path = parent.join(format!("omirr-run-{number:04}"));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => {
                    return Err(error).with_context(|| format!("{} cannot be made", path.display()));
                }
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if fs::remove_dir_all(&self.0).is_ok() {
            return;
        }
        // What a privileged node wrote belongs to root.
        let removed =
            !is_root() && run(Command::new("sudo").args(["--", "rm", "-rf", "--"]).arg(&self.0)).is_ok();
        if !removed {
            say(format!("{} could not be removed", self.0.display()));
        }
    }
}
