//! The tools that are compared: one adapter a file.
//!
//! In: two folders and a home for a tool's own files. Out: sessions, which bring
//! what is in the one to the other by the tool's own means, and the exact
//! commands and configurations. Nothing is measured or judged here.

mod csync2;
mod local;
mod lsyncd;
pub mod omirr;
mod rsync;
mod syncthing;
mod unison;
mod watch;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::stop;
use crate::wire::Wire;

/// How a tool works, and so what can be asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nature {
    /// Copies between folders of one machine, and knows nothing of others.
    Local,
    /// Does its work once, when it is called.
    Once,
    /// Runs, and follows changes by itself.
    Continuous,
    /// Watches, and copies nothing.
    Watcher,
}

pub trait Tool {
    fn name(&self) -> &'static str;
    fn nature(&self) -> Nature;
    /// Whether it leaves the source with other times, so that it needs one of its own.
    fn changes_source(&self) -> bool {
        false
    }
    /// The program that must be there.
    fn program(&self) -> &'static str;
    /// What is asked for the version; the first line with one is the answer.
    fn version_of(&self) -> &'static [&'static str];
    /// The exact command or configuration, with A and B for the folders.
    fn how(&self) -> String;
    /// # Errors
    /// Something cannot be prepared.
    fn open<'wire>(&self, wire: &'wire Wire, place: Place) -> Result<Box<dyn Session + 'wire>>;
}

/// Where a session works. The folders exist.
#[derive(Clone, Debug)]
pub struct Place {
    /// What is changed.
    pub a: PathBuf,
    /// Where it goes.
    pub b: PathBuf,
    /// For the tool's own files.
    pub home: PathBuf,
}

/// A tool between two folders. All that it runs ends with the value.
pub trait Session {
    /// Starts whatever runs all the time, and does not wait for it to be ready
    /// unless [`Session::sync`] needs that.
    ///
    /// # Errors
    /// It cannot be started.
    fn start(&mut self) -> Result<()>;

    /// Ends that again.
    ///
    /// # Errors
    /// It does not end as it should.
    fn stop(&mut self) -> Result<()>;

    /// One run of a tool that works once; nothing for others.
    ///
    /// # Errors
    /// The tool fails or takes too long.
    fn run_once(&mut self, _end: Instant) -> Result<()> {
        Ok(())
    }

    /// Returns when all that has changed in A is in B: as the tool itself tells
    /// where it can tell, else when `there` finds it so.
    ///
    /// # Errors
    /// The tool fails or takes too long.
    fn sync(&mut self, there: &mut dyn FnMut() -> bool, end: Instant) -> Result<()>;

    /// Memory that each side has resident now; of a tool that works once, the
    /// most that its last run had.
    fn resident(&self) -> [u64; 2] {
        [0, 0]
    }
}

/// Every tool, in the order of the tables.
pub fn all() -> Vec<Box<dyn Tool>> {
    vec![
        Box::new(omirr::Omirr),
        Box::new(local::CP),
        Box::new(local::TAR),
        Box::new(rsync::PLAIN),
        Box::new(rsync::COMPRESSED),
        Box::new(rsync::IN_PLACE),
        Box::new(lsyncd::AT_ONCE),
        Box::new(lsyncd::AFTER_A_SECOND),
        Box::new(unison::Unison),
        Box::new(csync2::Csync2),
        Box::new(syncthing::Syncthing),
        Box::new(watch::Inotifywait),
    ]
}

/// What the tool says about its version; none if it is not here.
pub fn version(tool: &dyn Tool) -> Option<String> {
    let (program, args) = tool.version_of().split_first()?;
    let program = if *program == "omirr" {
        omirr_tests::binary()
    } else {
        xtask::workspace::which(tool.program())?;
        xtask::workspace::which(program)?
    };
    let out = Command::new(program).args(args).output().ok()?;
    let said = [out.stdout, out.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    let line = said.lines().find(|line| has_version(line))?;
    Some(line.trim().to_owned())
}

/// Whether there is a dot between digits in it.
fn has_version(line: &str) -> bool {
    line.as_bytes()
        .windows(3)
        .any(|three| three[0].is_ascii_digit() && three[1] == b'.' && three[2].is_ascii_digit())
}

/// A program by its full path, since a user's `PATH` leaves some folders out.
fn program(name: &str) -> PathBuf {
    xtask::workspace::which(name).unwrap_or_else(|| PathBuf::from(name))
}

/// Waits until something listens, by the namespace's own list of sockets.
///
/// # Errors
/// Nothing does within ten seconds.
fn until_listening(process: &mut crate::process::Process, port: u16) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    // `ADDRESS:PORT REMOTE STATE`, all in hexadecimal; 0A is listening.
    let local = format!(":{port:04X}");
    let files = ["tcp", "tcp6"].map(|kind| format!("/proc/{}/net/{kind}", process.pid()));
    stop::until(end, Duration::from_millis(2), Duration::from_millis(20), || {
        files.iter().any(|file| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            text.lines().any(|line| {
                let mut fields = line.split_whitespace().skip(1);
                fields.next().is_some_and(|address| address.ends_with(&local)) && fields.nth(1) == Some("0A")
            })
        })
    })?;
    process.must_run()
}

/// Puts a path into a command line or configuration.
fn text(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_told_from_a_name_with_a_number() {
        assert!(has_version("csync2 2.1-0rc1 - cluster synchronization tool"));
        assert!(!has_version("csync2: invalid option -- 'V'"));
    }
}
