//! Two network namespaces joined by a cable, so that two nodes on one kernel
//! talk as two machines do. Needs root and `ip`; works natively and in guests.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// One end of the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Has the address 10.77.0.1.
    One,
    /// Has the address 10.77.0.2.
    Two,
}

impl Side {
    /// Its address on the cable.
    #[must_use]
    pub fn address(self) -> &'static str {
        match self {
            Self::One => "10.77.0.1",
            Self::Two => "10.77.0.2",
        }
    }
}

/// The two namespaces; taken away when this is dropped.
#[derive(Debug)]
pub struct Cable {
    names: [String; 2],
}

impl Cable {
    /// Makes two namespaces and lays the cable.
    ///
    /// # Panics
    /// `ip` fails: no root, or a kernel without network namespaces or veth.
    #[must_use]
    pub fn lay() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Tests of one machine do not meet: a namespace per process and call.
        let cable = Self {
            names: ["one", "two"].map(|side| format!("omirr-{}-{number}-{side}", std::process::id())),
        };
        for name in &cable.names {
            ip(&["netns", "add", name]);
        }
        let [one, two] = &cable.names;
        ip(&[
            "link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two,
        ]);
        for side in [Side::One, Side::Two] {
            let name = cable.name(side);
            ip(&[
                "-n",
                name,
                "address",
                "add",
                &format!("{}/24", side.address()),
                "dev",
                "cable",
            ]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        cable.plug();
        cable
    }

    /// Cuts the cable: what is sent is lost, connections do not notice.
    pub fn unplug(&self) {
        self.set("down");
    }

    /// Joins it again.
    pub fn plug(&self) {
        self.set("up");
    }

    fn set(&self, state: &str) {
        for name in &self.names {
            ip(&["-n", name, "link", "set", "cable", state]);
        }
    }

    /// The namespace's name for `ip -n NAME` and `tc -n NAME`; the interface in
    /// it is called `cable`.
    #[must_use]
    pub fn name(&self, side: Side) -> &str {
        match side {
            Side::One => &self.names[0],
            Side::Two => &self.names[1],
        }
    }

    /// A command that runs on that side. Only its network is another: mounts
    /// stay those of the test, unlike with `ip netns exec`.
    ///
    /// # Panics
    /// The namespace is gone.
    #[must_use]
    pub fn command(&self, side: Side, program: impl AsRef<Path>) -> Command {
        command_in(self.name(side), program.as_ref())
    }
}

/// A command with the network of that namespace, and else as if run here.
///
/// # Panics
/// The namespace is gone.
#[must_use]
pub fn command_in(namespace: &str, program: &Path) -> Command {
    let path: PathBuf = Path::new("/run/netns").join(namespace);
    let namespace = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut command = Command::new(program);
    // SAFETY: setns is a plain system call, allowed after fork; the closure
    // owns the descriptor, so it is open.
    unsafe {
        command.pre_exec(move || {
            if libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
    command
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in &self.names {
            // A test that failed half-way may have lost one.
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

pub(crate) fn ip(arguments: &[&str]) {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .expect("`ip` of iproute2 can be started");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "`ip {}` failed: {}",
        arguments.join(" "),
        words.trim()
    );
}
