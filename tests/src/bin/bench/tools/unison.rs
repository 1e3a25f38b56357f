//! Unison, called once for each comparison, with a server at B's side.
//!
//! Debian's package has no `unison-fsmonitor`, so it cannot follow changes.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use omirr_tests::net::Side;

use super::{Nature, Place, Session, Tool, program, text, until_listening};
use crate::process::{self, Process};
use crate::wire::Wire;

const PORT: u16 = 7777;
const OPTIONS: &[&str] = &["-batch", "-auto", "-ui", "text", "-times", "-confirmbigdel=false"];

pub struct Unison;

impl Tool for Unison {
    fn name(&self) -> &'static str {
        "unison"
    }

    fn nature(&self) -> Nature {
        Nature::Once
    }

    fn program(&self) -> &'static str {
        "unison"
    }

    fn version_of(&self) -> &'static [&'static str] {
        &["unison", "-version"]
    }

    fn how(&self) -> String {
        let b = Side::Two.address();
        format!(
            "`unison A socket://{b}:{PORT}/B {} -force A`; at B `unison -socket {PORT} -listen {b}`, which runs before",
            OPTIONS.join(" ")
        )
    }

    fn open<'wire>(&self, wire: &'wire Wire, place: Place) -> Result<Box<dyn Session + 'wire>> {
        for side in ["a", "b"] {
            fs::create_dir_all(place.home.join(side))?;
        }
        Ok(Box::new(Running {
            wire,
            place,
            server: None,
            most: 0,
        }))
    }
}

struct Running<'wire> {
    wire: &'wire Wire,
    place: Place,
    server: Option<Process>,
    /// The most memory that the last run had resident.
    most: u64,
}

impl Running<'_> {
    fn command(&self, side: Side, archive: &str) -> Command {
        let mut command = self.wire.cable.command(side, program("unison"));
        command
            .env("UNISON", self.place.home.join(archive))
            .env("HOME", &self.place.home);
        command
    }
}

impl Session for Running<'_> {
    fn start(&mut self) -> Result<()> {
        let mut command = self.command(Side::Two, "b");
        command.args(["-socket", &PORT.to_string(), "-listen", Side::Two.address()]);
        let mut server = Process::start(command, &self.place.home.join("server.log"))?;
        until_listening(&mut server, PORT)?;
        self.server = Some(server);
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.server = None;
        Ok(())
    }

    fn run_once(&mut self, end: Instant) -> Result<()> {
        let mut command = self.command(Side::One, "a");
        command
            .arg(&self.place.a)
            .arg(format!(
                "socket://{}:{PORT}/{}",
                Side::Two.address(),
                text(&self.place.b)
            ))
            .args(OPTIONS)
            .arg("-force")
            .arg(&self.place.a)
            .arg("-logfile")
            .arg(self.place.home.join("unison.log"));
        let ended = Process::start(command, &self.place.home.join("log"))?.finish(end, &[0])?;
        self.most = ended.most_resident;
        Ok(())
    }

    fn sync(&mut self, _there: &mut dyn FnMut() -> bool, end: Instant) -> Result<()> {
        self.run_once(end)
    }

    fn resident(&self) -> [u64; 2] {
        let server = self
            .server
            .as_ref()
            .map_or(0, |server| process::most_resident(server.pid()));
        [self.most, server]
    }
}
