//! `lsyncd`, which calls rsync to a daemon at B's side.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use omirr_tests::net::Side;

use super::{Nature, Place, Session, Tool, program, rsync, text};
use crate::process::{self, Process};
use crate::stop;
use crate::wire::Wire;

pub struct Lsyncd {
    name: &'static str,
    delay: u32,
}

pub const AT_ONCE: Lsyncd = Lsyncd {
    name: "lsyncd delay 0",
    delay: 0,
};

pub const AFTER_A_SECOND: Lsyncd = Lsyncd {
    name: "lsyncd",
    delay: 1,
};

fn config(log: &str, a: &str, delay: u32) -> String {
    format!(
        "settings {{ logfile = \"{log}\", nodaemon = true }}\n\
         sync {{ default.rsync, source = \"{a}\", target = \"{}\", delay = {delay}, rsync = {{ archive = true, _extra = {{ \"--modify-window=-1\" }} }} }}\n",
        rsync::address()
    )
}

impl Tool for Lsyncd {
    fn name(&self) -> &'static str {
        self.name
    }

    fn nature(&self) -> Nature {
        Nature::Continuous
    }

    fn program(&self) -> &'static str {
        "lsyncd"
    }

    fn version_of(&self) -> &'static [&'static str] {
        &["lsyncd", "--version"]
    }

    fn how(&self) -> String {
        let text = config("LOG", "A", self.delay);
        format!(
            "`lsyncd -nodaemon FILE`, with `{}`; at B the rsync daemon",
            text.trim().replace('\n', " ")
        )
    }

    fn open<'wire>(&self, wire: &'wire Wire, place: Place) -> Result<Box<dyn Session + 'wire>> {
        Ok(Box::new(Running {
            wire,
            delay: self.delay,
            place,
            starts: 0,
            daemon: None,
            lsyncd: None,
        }))
    }
}

struct Running<'wire> {
    wire: &'wire Wire,
    delay: u32,
    place: Place,
    /// Each start has a log of its own.
    starts: usize,
    daemon: Option<Process>,
    lsyncd: Option<Process>,
}

impl Running<'_> {
    fn log(&self) -> std::path::PathBuf {
        self.place.home.join(format!("lsyncd-{}.log", self.starts))
    }
}

impl Session for Running<'_> {
    fn start(&mut self) -> Result<()> {
        let home = &self.place.home;
        self.starts += 1;
        let file = home.join("lsyncd.lua");
        fs::write(
            &file,
            config(&text(&self.log()), &text(&self.place.a), self.delay),
        )?;
        self.daemon = Some(rsync::daemon(self.wire, &self.place.b, home)?);
        let mut command = self.wire.cable.command(Side::One, program("lsyncd"));
        command.arg("-nodaemon").arg(&file);
        self.lsyncd = Some(Process::start(command, &home.join("out"))?);
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.lsyncd = None;
        self.daemon = None;
        Ok(())
    }

    fn sync(&mut self, there: &mut dyn FnMut() -> bool, end: Instant) -> Result<()> {
        let log = self.log();
        let mut started = false;
        stop::until(end, Duration::from_millis(2), Duration::from_millis(200), || {
            // Its own first run must be over; later ones are not told of.
            started = started
                || fs::read_to_string(&log).is_ok_and(|text| {
                    text.lines()
                        .any(|line| line.contains("Startup of") && line.contains("finished"))
                });
            started && there()
        })?;
        match &mut self.lsyncd {
            Some(lsyncd) => lsyncd.must_run(),
            None => Ok(()),
        }
    }

    fn resident(&self) -> [u64; 2] {
        [&self.lsyncd, &self.daemon].map(|process| {
            process
                .as_ref()
                .map_or(0, |process| process::resident(process.pid()))
        })
    }
}
