//! omirr itself, with its defaults on both sides.

use std::path::Path;
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
            let mut node = node(wire, side, &place.home, name);
            node.share = share;
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

/// A node on that side of the wire.
pub fn node(wire: &Wire, side: Side, home: &Path, name: &str) -> Node {
    let mut node = Node::new(home, name);
    side.address().clone_into(&mut node.host);
    let cable = Arc::clone(&wire.cable);
    node.launcher = Some(Box::new(move |binary| {
        let mut command = cable.command(side, binary);
        alone(&mut command);
        command
    }));
    node
}

/// Returns when all that has changed on the nth node is durable on its peers.
///
/// # Errors
/// A node has ended, or it takes too long.
pub fn settle(nodes: &mut [Node], nth: usize, end: Instant) -> Result<()> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let slice = left.min(SLICE).as_millis().max(1);
        let done = nodes[nth].wait(&format!("{slice}ms"));
        if done.status.success() {
            return Ok(());
        }
        stop::check()?;
        for node in &mut *nodes {
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

/// Ends what runs, and takes the programs out of the kernel.
pub fn let_go(nodes: &mut [Node]) {
    for node in nodes {
        if node.is_running() {
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
        settle(&mut self.nodes, 0, end)
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
        let_go(&mut self.nodes);
    }
}
