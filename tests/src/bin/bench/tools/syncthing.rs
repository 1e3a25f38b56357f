//! Syncthing on both sides; A sends, B receives.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use omirr_tests::net::Side;
use serde_json::Value;

use super::{Nature, Place, Session, Tool, program, text};
use crate::process::{self, Process};
use crate::stop;
use crate::wire::Wire;

/// Seconds: the shortest of whole ones, of which older versions take no parts.
const DELAY: u32 = 1;
/// By which it knows that a folder is the one that was meant.
const MARKER: &str = ".stfolder";
const SIDES: [(Side, &str, &str); 2] = [(Side::One, "a", "sendonly"), (Side::Two, "b", "receiveonly")];

pub struct Syncthing;

impl Tool for Syncthing {
    fn name(&self) -> &'static str {
        "syncthing"
    }

    fn nature(&self) -> Nature {
        Nature::Continuous
    }

    fn program(&self) -> &'static str {
        "syncthing"
    }

    fn version_of(&self) -> &'static [&'static str] {
        &["syncthing", "--version"]
    }

    fn how(&self) -> String {
        format!(
            "`syncthing serve --no-browser --no-restart --no-upgrade` on both sides; the folder with \
             `fsWatcherDelayS=\"{DELAY}\"`, `rescanIntervalS=\"3600\"`, `sendonly` at A and `receiveonly` at B; \
             discovery, relays and NAT traversal are off"
        )
    }

    fn open<'wire>(&self, wire: &'wire Wire, place: Place) -> Result<Box<dyn Session + 'wire>> {
        let mut ids = Vec::new();
        for (_, name, _) in SIDES {
            let home = place.home.join(name);
            omirr_tests::run(
                Command::new(program("syncthing"))
                    .args(["generate", "--skip-port-probing", "--no-default-folder"])
                    .arg(format!("--home={}", text(&home)))
                    .env("HOME", &place.home),
            );
            let made = fs::read_to_string(home.join("config.xml"))?;
            ids.push(Identity::read(&made).context("syncthing's own configuration has no device in it")?);
        }
        for ((side, name, kind), folder) in SIDES.into_iter().zip([&place.a, &place.b]) {
            let home = place.home.join(name);
            fs::write(
                home.join("config.xml"),
                config(&ids, side, kind, &text(folder), &text(&home)),
            )?;
        }
        for folder in [&place.a, &place.b] {
            fs::create_dir_all(folder.join(MARKER))?;
        }
        Ok(Box::new(Running {
            wire,
            place,
            other: ids.remove(1).id,
            processes: Vec::new(),
        }))
    }
}

struct Identity {
    /// Of the configuration's format.
    version: String,
    id: String,
}

impl Identity {
    fn read(config: &str) -> Option<Identity> {
        let after = |mark: &str| {
            let (_, rest) = config.split_once(mark)?;
            Some(rest.split_once('"')?.0.to_owned())
        };
        Some(Identity {
            version: after("<configuration version=\"")?,
            id: after("<device id=\"")?,
        })
    }
}

fn config(ids: &[Identity], side: Side, kind: &str, folder: &str, home: &str) -> String {
    let mut devices = String::new();
    let mut members = String::new();
    for (id, (side, name, _)) in ids.iter().zip(SIDES) {
        let id = &id.id;
        devices += &format!(
            "<device id=\"{id}\" name=\"{name}\" compression=\"metadata\"><address>tcp://{}:22000</address></device>\n",
            side.address()
        );
        members += &format!("<device id=\"{id}\"></device>");
    }
    format!(
        r#"<configuration version="{version}">
<folder id="f" label="f" path="{folder}" type="{kind}" rescanIntervalS="3600" fsWatcherEnabled="true" fsWatcherDelayS="{DELAY}" ignorePerms="false" autoNormalize="true">
<filesystemType>basic</filesystemType>{members}</folder>
{devices}<gui enabled="true" tls="false"><address>{home}/socket</address><unixSocketPermissions>0700</unixSocketPermissions><apikey>bench</apikey></gui>
<options><listenAddress>tcp://{address}:22000</listenAddress><globalAnnounceEnabled>false</globalAnnounceEnabled><localAnnounceEnabled>false</localAnnounceEnabled><relaysEnabled>false</relaysEnabled><natEnabled>false</natEnabled><startBrowser>false</startBrowser><urAccepted>-1</urAccepted><autoUpgradeIntervalH>0</autoUpgradeIntervalH><crashReportingEnabled>false</crashReportingEnabled><setLowPriority>false</setLowPriority><reconnectionIntervalS>5</reconnectionIntervalS></options>
</configuration>
"#,
        version = ids[0].version,
        address = side.address(),
    )
}

struct Running<'wire> {
    wire: &'wire Wire,
    place: Place,
    /// The device at B.
    other: String,
    processes: Vec<Process>,
}

impl Running<'_> {
    fn socket(&self, side: &str) -> PathBuf {
        self.place.home.join(side).join("socket")
    }

    fn get(&self, side: &str, path: &str) -> Result<Value> {
        let mut stream = UnixStream::connect(self.socket(side))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        write!(
            stream,
            "GET {path} HTTP/1.0\r\nHost: localhost\r\nX-API-Key: bench\r\n\r\n"
        )?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let Some((head, body)) = answer.split_once("\r\n\r\n") else {
            bail!("half an answer");
        };
        if !head.lines().next().is_some_and(|line| line.contains(" 200")) {
            bail!("{head}");
        }
        Ok(serde_json::from_str(body)?)
    }

    /// Whether both say that they have nothing to do and the same files.
    fn agree(&self) -> Result<bool> {
        let a = self.get("a", "/rest/db/status?folder=f")?;
        let b = self.get("b", "/rest/db/status?folder=f")?;
        if a["state"] != "idle"
            || b["state"] != "idle"
            || b["needTotalItems"] != 0
            || a["localFiles"] != b["localFiles"]
            || a["localDirectories"] != b["localDirectories"]
        {
            return Ok(false);
        }
        let connected = &self.get("a", "/rest/system/connections")?["connections"][&self.other]["connected"];
        let other = &self.other;
        let done = &self.get("a", &format!("/rest/db/completion?folder=f&device={other}"))?["completion"];
        Ok(*connected == true && done.as_f64() == Some(100.0))
    }
}

impl Session for Running<'_> {
    fn start(&mut self) -> Result<()> {
        for (side, name, _) in SIDES.into_iter().rev() {
            // The socket of an earlier start, if any.
            let _ = fs::remove_file(self.socket(name));
            let home = self.place.home.join(name);
            let mut command = self.wire.cable.command(side, program("syncthing"));
            command
                .args([
                    "serve",
                    "--no-browser",
                    "--no-restart",
                    "--no-upgrade",
                    "--logflags=3",
                ])
                .arg(format!("--home={}", text(&home)))
                .env("HOME", &self.place.home)
                .env("STNODEFAULTFOLDER", "1");
            self.processes.push(Process::start(command, &home.join("log"))?);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.processes.clear();
        Ok(())
    }

    fn sync(&mut self, there: &mut dyn FnMut() -> bool, end: Instant) -> Result<()> {
        let mut died = None;
        let pause = (Duration::from_millis(10), Duration::from_millis(300));
        let mut processes = std::mem::take(&mut self.processes);
        let waited = stop::until(end, pause.0, pause.1, || {
            died = processes.iter_mut().find_map(|process| process.must_run().err());
            // Until it listens it does not answer.
            died.is_some() || (self.agree().unwrap_or(false) && there())
        });
        self.processes = processes;
        match died {
            Some(error) => Err(error),
            None => waited.map(drop),
        }
    }

    fn resident(&self) -> [u64; 2] {
        // B's is started first.
        let of = |place: usize| {
            self.processes
                .get(place)
                .map_or(0, |process| process::resident(process.pid()))
        };
        [of(1), of(0)]
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.processes.clear();
        // A may be another tool's next. What is not there need not go.
        let _ = fs::remove_dir(self.place.a.join(MARKER));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_configuration_names_its_device() {
        let text = "<configuration version=\"35\">\n  <device id=\"ABC-D\" name=\"x\">";
        let found = Identity::read(text).expect("both are there");
        assert_eq!((found.version.as_str(), found.id.as_str()), ("35", "ABC-D"));
    }
}
