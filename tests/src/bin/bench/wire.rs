//! The cable between the two sides, and what it has carried.
//!
//! In: nothing. Out: bytes in each direction, Ethernet, IP and TCP included.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use omirr_tests::net::{Cable, Side};

/// In the words of `tc`.
const NARROW: &str = "100mbit";

pub struct Wire {
    pub cable: Arc<Cable>,
    /// `net/dev` as side one sees it: a namespace's file stays that of the
    /// namespace in which it was opened.
    counters: File,
}

/// Bytes so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// From A to B.
    pub there: u64,
    /// From B to A.
    pub back: u64,
}

impl Carried {
    pub fn since(self, before: Carried) -> Carried {
        Carried {
            there: self.there - before.there,
            back: self.back - before.back,
        }
    }
}

impl Wire {
    /// # Errors
    /// The counters cannot be opened.
    ///
    /// # Panics
    /// No root, or a kernel without network namespaces or veth.
    pub fn lay() -> Result<Wire> {
        let cable = Arc::new(Cable::lay());
        let namespace = File::open(Path::new("/run/netns").join(cable.name(Side::One)))?;
        // A thread of its own, since it does not come back from there.
        let opened = std::thread::spawn(move || {
            // SAFETY: setns is a plain system call on a descriptor that is open.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
            File::open("/proc/thread-self/net/dev")
        });
        let counters = opened
            .join()
            .expect("opening a file does not panic")
            .context("the cable's counters cannot be opened")?;
        Ok(Wire { cable, counters })
    }

    /// Until the value goes, each direction carries no more than [`NARROW`].
    ///
    /// # Errors
    /// `tc` or the kernel cannot do it.
    pub fn narrow(&self) -> Result<Narrow<'_>> {
        let narrow = Narrow(self);
        let limit = format!("root tbf rate {NARROW} burst 256kb latency 50ms");
        for side in [Side::One, Side::Two] {
            let out = self.shape(side, "add", &limit)?;
            if !out.status.success() {
                bail!("tc: {}", String::from_utf8_lossy(&out.stderr).trim());
            }
        }
        Ok(narrow)
    }

    fn shape(&self, side: Side, verb: &str, what: &str) -> Result<Output> {
        let tc = xtask::workspace::which("tc").context("there is no tc")?;
        Command::new(tc)
            .args(["-n", self.cable.name(side), "qdisc", verb, "dev", "cable"])
            .args(what.split(' '))
            .output()
            .context("tc cannot be started")
    }

    /// # Errors
    /// The counters cannot be read.
    pub fn carried(&self) -> Result<Carried> {
        let mut text = String::new();
        let mut counters = &self.counters;
        counters.rewind()?;
        counters.read_to_string(&mut text)?;
        parse(&text, "cable").context("the cable's counters cannot be understood")
    }
}

/// A wire that is slow for now.
pub struct Narrow<'wire>(&'wire Wire);

impl Drop for Narrow<'_> {
    fn drop(&mut self) {
        for side in [Side::One, Side::Two] {
            // Where it was not made narrow there is nothing to undo.
            let _ = self.0.shape(side, "del", "root");
        }
    }
}

fn parse(text: &str, device: &str) -> Option<Carried> {
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|n| n.parse().ok()).collect();
    Some(Carried {
        there: *fields.get(8)?,
        back: *fields.first()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn received_is_first_and_sent_is_ninth() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 0 0 0 0 0 0 0 1 0\n cable:  12 1 0 0 0 0 0 0 345 2 0 0 0 0 0 0\n";
        let carried = parse(text, "cable").expect("the line is there");
        assert_eq!(carried, Carried { there: 345, back: 12 });
    }
}
