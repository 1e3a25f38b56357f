//! `inotifywait`, which only watches: what being ready costs with a watch for
//! each folder.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{Nature, Place, Session, Tool, program};
use crate::process::{self, Process};
use crate::stop;
use crate::wire::Wire;

const EVENTS: &str = "modify,create,delete,move,close_write,attrib";

pub struct Inotifywait;

impl Tool for Inotifywait {
    fn name(&self) -> &'static str {
        "inotifywait"
    }

    fn nature(&self) -> Nature {
        Nature::Watcher
    }

    fn program(&self) -> &'static str {
        "inotifywait"
    }

    fn version_of(&self) -> &'static [&'static str] {
        &["inotifywait", "--help"]
    }

    fn how(&self) -> String {
        format!("`inotifywait -m -r -e {EVENTS} A`, until it says that its watches are established")
    }

    fn open<'wire>(&self, _wire: &'wire Wire, place: Place) -> Result<Box<dyn Session + 'wire>> {
        Ok(Box::new(Running { place, process: None }))
    }
}

struct Running {
    place: Place,
    process: Option<Process>,
}

impl Session for Running {
    fn start(&mut self) -> Result<()> {
        let mut command = Command::new(program("inotifywait"));
        command.args(["-m", "-r", "-e", EVENTS]).arg(&self.place.a);
        self.process = Some(Process::start(command, &self.place.home.join("log"))?);
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.process = None;
        Ok(())
    }

    fn sync(&mut self, _there: &mut dyn FnMut() -> bool, end: Instant) -> Result<()> {
        let log = self.place.home.join("log");
        let Some(process) = &mut self.process else {
            bail!("it was not started");
        };
        let mut died = None;
        stop::until(end, Duration::from_micros(200), Duration::from_millis(10), || {
            died = process.must_run().err();
            died.is_some() || fs::read_to_string(&log).is_ok_and(|text| text.contains("established"))
        })?;
        died.map_or(Ok(()), Err)
    }

    fn resident(&self) -> [u64; 2] {
        let own = self
            .process
            .as_ref()
            .map_or(0, |process| process::resident(process.pid()));
        [own, 0]
    }
}
