//! csync2, which checks the whole tree once at each call.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use omirr_tests::net::Side;

use super::{Nature, Place, Session, Tool, program, text, until_listening};
use crate::process::{self, Process};
use crate::wire::Wire;

/// Its own; there is no option for another.
const PORT: u16 = 30865;

pub struct Csync2;

/// Hosts are called by their addresses: the namespaces have no names.
fn config(key: &str, a: &str, b: &str) -> String {
    let (one, two) = (Side::One.address(), Side::Two.address());
    format!(
        "nossl * *;\ngroup g {{ host {one} {two}; key {key}; include %d%; auto left; }}\n\
         prefix d {{ on {one}: {a}; on {two}: {b}; }}\n"
    )
}

impl Tool for Csync2 {
    fn name(&self) -> &'static str {
        "csync2"
    }

    fn nature(&self) -> Nature {
        Nature::Once
    }

    /// Folders have the time at which it looked into them.
    fn changes_source(&self) -> bool {
        true
    }

    fn program(&self) -> &'static str {
        "csync2"
    }

    fn version_of(&self) -> &'static [&'static str] {
        // It knows no such option, and introduces itself for that.
        &["csync2", "-V"]
    }

    fn how(&self) -> String {
        format!(
            "`csync2 -N {} -D STATE -x`; at B `csync2 -ii -N {} -D STATE`, which runs before; with `{}`",
            Side::One.address(),
            Side::Two.address(),
            config("KEY", "A", "B").trim().replace('\n', " ")
        )
    }

    fn open<'wire>(&self, wire: &'wire Wire, place: Place) -> Result<Box<dyn Session + 'wire>> {
        for folder in ["etc", "a", "b"] {
            fs::create_dir_all(place.home.join(folder))?;
        }
        let key = place.home.join("etc/key");
        fs::write(&key, "akeythatbothsideshaveandthatprotectsnothingatallhere\n")?;
        fs::write(
            place.home.join("etc/csync2.cfg"),
            config(&text(&key), &text(&place.a), &text(&place.b)),
        )?;
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
    fn command(&self, side: Side, state: &str) -> Command {
        let mut command = self.wire.cable.command(side, program("csync2"));
        command
            .env("CSYNC2_SYSTEM_DIR", self.place.home.join("etc"))
            .args(["-N", side.address(), "-D"])
            .arg(self.place.home.join(state));
        command
    }
}

impl Session for Running<'_> {
    fn start(&mut self) -> Result<()> {
        let mut command = self.command(Side::Two, "b");
        command.arg("-ii");
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
        command.arg("-x");
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
