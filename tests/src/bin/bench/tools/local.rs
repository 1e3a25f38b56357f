//! `cp` and `tar`: what copying costs on one machine, without a network and
//! without knowing what is there already.

use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use super::{Nature, Place, Session, Tool, text};
use crate::process::Process;
use crate::wire::Wire;

pub struct Local {
    name: &'static str,
    /// For a shell, with `{A}` and `{B}`.
    command: &'static str,
}

pub const CP: Local = Local {
    name: "cp",
    command: "cp -a {A}/. {B}/",
};

pub const TAR: Local = Local {
    name: "tar",
    command: "tar -C {A} -cf - . | tar -C {B} -xf -",
};

impl Tool for Local {
    fn name(&self) -> &'static str {
        self.name
    }

    fn nature(&self) -> Nature {
        Nature::Local
    }

    fn program(&self) -> &'static str {
        self.name
    }

    fn version_of(&self) -> &'static [&'static str] {
        match self.name {
            "cp" => &["cp", "--version"],
            _ => &["tar", "--version"],
        }
    }

    fn how(&self) -> String {
        format!("`{}`", self.command.replace("{A}", "A").replace("{B}", "B"))
    }

    fn open<'wire>(&self, _wire: &'wire Wire, place: Place) -> Result<Box<dyn Session + 'wire>> {
        let command = self
            .command
            .replace("{A}", &text(&place.a))
            .replace("{B}", &text(&place.b));
        Ok(Box::new(Running { command, place }))
    }
}

struct Running {
    command: String,
    place: Place,
}

impl Session for Running {
    fn start(&mut self) -> Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        Ok(())
    }

    fn run_once(&mut self, end: Instant) -> Result<()> {
        let mut shell = Command::new("sh");
        shell.args(["-c", &self.command]);
        Process::start(shell, &self.place.home.join("log"))?.finish(end, &[0])?;
        Ok(())
    }

    fn sync(&mut self, _there: &mut dyn FnMut() -> bool, end: Instant) -> Result<()> {
        self.run_once(end)
    }
}
