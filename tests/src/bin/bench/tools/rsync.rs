//! `rsync` from A to a daemon at B's side.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use omirr_tests::net::Side;

use super::{Nature, Place, Session, Tool, program, text, until_listening};
use crate::process::{self, Process};
use crate::wire::Wire;

const PORT: u16 = 8730;
/// Without it a file of the same size that is changed twice within a second is
/// taken for unchanged.
const EXACT_TIMES: &str = "--modify-window=-1";
/// 24: a file went away while it was looked at.
const GOOD: &[i32] = &[0, 24];

pub struct Rsync {
    name: &'static str,
    options: &'static [&'static str],
}

pub const PLAIN: Rsync = Rsync {
    name: "rsync",
    options: &[],
};

pub const COMPRESSED: Rsync = Rsync {
    name: "rsync -z",
    options: &["-z"],
};

pub const IN_PLACE: Rsync = Rsync {
    name: "rsync --inplace",
    options: &["--inplace"],
};

impl Tool for Rsync {
    fn name(&self) -> &'static str {
        self.name
    }

    fn nature(&self) -> Nature {
        Nature::Once
    }

    fn program(&self) -> &'static str {
        "rsync"
    }

    fn version_of(&self) -> &'static [&'static str] {
        &["rsync", "--version"]
    }

    fn how(&self) -> String {
        let options: String = self.options.iter().map(|option| format!(" {option}")).collect();
        format!(
            "`rsync -a --delete {EXACT_TIMES}{options} A/ rsync://{}:{PORT}/b/`; at B `rsync --daemon --no-detach`, which runs \
             before, with `use chroot = yes, uid = 0, gid = 0, reverse lookup = no, read only = no`",
            Side::Two.address()
        )
    }

    fn open<'wire>(&self, wire: &'wire Wire, place: Place) -> Result<Box<dyn Session + 'wire>> {
        Ok(Box::new(Running {
            wire,
            options: self.options,
            place,
            daemon: None,
            most: 0,
        }))
    }
}

/// Where the daemon at B's side is found.
pub fn address() -> String {
    format!("rsync://{}:{PORT}/b/", Side::Two.address())
}

/// The daemon at B's side, ready.
pub fn daemon(wire: &Wire, b: &Path, home: &Path) -> Result<Process> {
    let config = home.join("rsyncd.conf");
    fs::write(
        &config,
        format!(
            "use chroot = yes\nuid = 0\ngid = 0\nreverse lookup = no\n[b]\npath = {}\nread only = no\n",
            text(b)
        ),
    )?;
    let mut command = wire.cable.command(Side::Two, program("rsync"));
    command
        .args(["--daemon", "--no-detach"])
        .arg(format!("--address={}", Side::Two.address()))
        .arg(format!("--port={PORT}"))
        .arg(format!("--config={}", text(&config)));
    let mut daemon = Process::start(command, &home.join("rsyncd.log"))?;
    until_listening(&mut daemon, PORT)?;
    Ok(daemon)
}

struct Running<'wire> {
    wire: &'wire Wire,
    options: &'static [&'static str],
    place: Place,
    daemon: Option<Process>,
    /// The most memory that the last run had resident.
    most: u64,
}

impl Session for Running<'_> {
    fn start(&mut self) -> Result<()> {
        self.daemon = Some(daemon(self.wire, &self.place.b, &self.place.home)?);
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.daemon = None;
        Ok(())
    }

    fn run_once(&mut self, end: Instant) -> Result<()> {
        let mut command = self.wire.cable.command(Side::One, program("rsync"));
        command
            .args(["-a", "--delete", EXACT_TIMES])
            .args(self.options)
            .arg(format!("{}/", text(&self.place.a)))
            .arg(address());
        let ended = Process::start(command, &self.place.home.join("log"))?.finish(end, GOOD)?;
        self.most = ended.most_resident;
        Ok(())
    }

    fn sync(&mut self, _there: &mut dyn FnMut() -> bool, end: Instant) -> Result<()> {
        self.run_once(end)
    }

    fn resident(&self) -> [u64; 2] {
        let daemon = self
            .daemon
            .as_ref()
            .map_or(0, |daemon| process::most_resident(daemon.pid()));
        [self.most, daemon]
    }
}
