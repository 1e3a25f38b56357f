//! omirr itself, with its defaults on both sides.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use omirr_tests::net::Side;
use omirr_tests::nodes::Node;

use super::{Nature, Place, Session, Tool};
use crate::process::{alone, resident};
use crate::stop::{self, TimedOut};
use crate::wire::Wire;

/// How long one call of `omirr wait` may take, so that Ctrl-C is heard.
const SLICE: Duration = Duration::from_secs(5);

pub struct Omirr;

impl Tool for Omirr {
    fn name(&self) -> &'static str {
        "omirr"
    }

    fn nature(&self) -> Nature {
        Nature::Continuous
    }

    fn program(&self) -> &'static str {
        "omirr"
    }

    fn version_of(&self) -> &'static [&'static str] {
        &["omirr", "--version"]
    }

    fn how(&self) -> String {
        "`omirr daemon -c FILE` on both sides, every setting at its default; done is when `omirr wait` returns, \
         that is when all is durable at B and in both indexes"
            .to_owned()
    }

    fn open<'wire>(&self, wire: &'wire Wire, place: Place) -> Result<Box<dyn Session + 'wire>> {
        let mut nodes = [("a", Side::One, place.a), ("b", Side::Two, place.b)].map(|(name, side, share)| {
            let mut node = Node::new(&place.home, name);
            node.share = share;
            node.host = side.address().to_owned();
            let cable = Arc::clone(&wire.cable);
            node.launcher = Some(Box::new(move |binary| {
                let mut command = cable.command(side, binary);
                alone(&mut command);
                command
            }));
            node
        });
        let [a, b] = &mut nodes;
        a.knows(b);
        b.knows(a);
        Ok(Box::new(Running {
            nodes,
            running: false,
        }))
    }
}

struct Running {
    nodes: [Node; 2],
    running: bool,
}

impl Session for Running {
    fn start(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            node.start();
        }
        self.running = true;
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.running = false;
        for node in &mut self.nodes {
            node.stop();
        }
        Ok(())
    }

    fn sync(&mut self, _there: &mut dyn FnMut() -> bool, end: Instant) -> Result<()> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let slice = left.min(SLICE).as_millis().max(1);
            let done = self.nodes[0].wait(&format!("{slice}ms"));
            if done.status.success() {
                return Ok(());
            }
            stop::check()?;
            for node in &mut self.nodes {
                if !node.is_running() {
                    bail!("omirr has ended: {}", node.log_tail());
                }
            }
            if left.is_zero() {
                let said = String::from_utf8_lossy(&done.stderr).into_owned();
                return Err(anyhow::Error::new(TimedOut).context(said.trim().to_owned()));
            }
            // It does not answer before it listens.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn resident(&self) -> [u64; 2] {
        if !self.running {
            return [0, 0];
        }
        [0, 1].map(|side: usize| resident(self.nodes[side].pid().unsigned_abs()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if self.running && node.is_running() {
                node.kill();
            }
            // Programs that stay in the kernel would slow down whoever is next.
            // Without eBPF there are none, which is as well.
            let _ = Command::new(omirr_tests::binary())
                .args(["daemon", "--unpin", "-c"])
                .arg(node.config())
                .output();
        }
    }
}
