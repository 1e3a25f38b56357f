//! Several real nodes on this machine, in any topology, over [`Wires`].
//!
//! In: how many, and who knows whom. Out: nodes that are not yet started, in a
//! fresh folder that stays if the test fails. What two nodes need is in
//! [`crate::nodes`].

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::nodes::Node;
use crate::treewalk;
use crate::users::Rng;
use crate::wires::Wires;

const NAMES: [&str; 9] = [
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
];
/// After so many rounds without rest, rows are being made for nothing.
const ROUNDS: u32 = 60;

/// Who is configured as whose peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    Chain,
    Ring,
    /// The first one knows all, the others know the first.
    Star,
    Mesh,
}

impl Topology {
    pub fn random(rng: &mut Rng) -> Topology {
        [Self::Chain, Self::Ring, Self::Star, Self::Mesh][rng.below(4) as usize]
    }

    /// The pairs that know each other, of so many nodes.
    #[must_use]
    pub fn pairs(self, nodes: usize) -> Vec<(usize, usize)> {
        let all = (0..nodes).flat_map(|one| (one + 1..nodes).map(move |two| (one, two)));
        all.filter(|&(one, two)| match self {
            Self::Chain => two == one + 1,
            Self::Ring => two == one + 1 || (one == 0 && two == nodes - 1),
            Self::Star => one == 0,
            Self::Mesh => true,
        })
        .collect()
    }
}

pub struct Crowd {
    pub nodes: Vec<Node>,
    pub pairs: Vec<(usize, usize)>,
    pub wires: Arc<Wires>,
    base: Option<tempfile::TempDir>,
}

impl Crowd {
    /// So many nodes, not yet started.
    ///
    /// # Panics
    /// The network or the folder cannot be made.
    #[must_use]
    pub fn new(nodes: usize, topology: Topology, seed: u64) -> Crowd {
        let base = match std::env::var_os("OMIRR_TEST_DIR") {
            Some(folder) => tempfile::tempdir_in(folder),
            None => tempfile::tempdir(),
        }
        .expect("a folder for the test can be made");
        let wires = Arc::new(Wires::lay(nodes, seed));
        let mut made: Vec<Node> = (0..nodes)
            .map(|number| {
                let mut node = Node::new(base.path(), NAMES[number]);
                node.host = Wires::address(number);
                let wires = Arc::clone(&wires);
                node.launcher = Some(Box::new(move |binary| wires.command(number, binary)));
                node
            })
            .collect();
        let pairs = topology.pairs(nodes);
        for &(one, two) in &pairs {
            let (left, right) = made.split_at_mut(two);
            left[one].knows(&right[0]);
            right[0].knows(&left[one]);
        }
        Crowd {
            nodes: made,
            pairs,
            wires,
            base: Some(base),
        }
    }

    pub fn start(&mut self) {
        for node in &mut self.nodes {
            node.start();
        }
    }

    /// The places of a node's peers.
    pub fn peers_of(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        self.pairs.iter().filter_map(move |&(one, two)| match node {
            node if node == one => Some(two),
            node if node == two => Some(one),
            _ => None,
        })
    }

    /// Waits until nothing is on its way anywhere. In a round every node says
    /// that its peers have all that it has; if no node made or took a row
    /// meanwhile, nothing can have been on its way behind the round's back.
    ///
    /// # Panics
    /// A daemon has ended, or it takes too long.
    pub fn settle(&mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        for _ in 0..ROUNDS {
            let before = self.rows();
            for node in &mut self.nodes {
                node.settle(deadline.saturating_duration_since(Instant::now()));
            }
            if before.is_some() && self.rows() == before {
                return;
            }
        }
        panic!("rows are made though nobody changes anything\n{}", self.tails());
    }

    /// Rows made and taken, by node; none while a daemon does not answer.
    fn rows(&self) -> Option<Vec<(u64, u64)>> {
        self.nodes
            .iter()
            .map(|node| {
                node.status()?;
                let stats = node.stats();
                let figure = |name| stats["shares"][0][name].as_u64();
                Some((figure("rows_made")?, figure("rows_applied")?))
            })
            .collect()
    }

    /// All trees are the same, by the independent walk and by rsync.
    ///
    /// # Panics
    /// They are not; the text has the differences and the logs.
    pub fn assert_equal(&self) {
        let first = &self.nodes[0];
        let tree = treewalk::walk(&first.share).expect("a share can be walked");
        for node in &self.nodes[1..] {
            let other = treewalk::walk(&node.share).expect("a share can be walked");
            let differences = treewalk::diff(&tree, &other);
            assert!(
                differences.is_empty(),
                "the trees of {} and {} differ:\n{}\n{}",
                first.name,
                node.name,
                differences.join("\n"),
                self.tails()
            );
            let found = rsync_differences(&first.share, &node.share);
            assert!(
                found.is_empty(),
                "rsync finds that {} and {} differ:\n{found}\n{}",
                first.name,
                node.name,
                self.tails()
            );
        }
    }

    /// The ends of all logs.
    #[must_use]
    pub fn tails(&self) -> String {
        self.nodes.iter().map(|node| node.log_tail() + "\n").collect()
    }
}

/// What rsync would have to do to make `copy` the same as `tree`.
fn rsync_differences(tree: &Path, copy: &Path) -> String {
    // The slash makes it the folder's content.
    let source = tree.join("");
    let out = Command::new("rsync")
        .args(["-aHAXSn", "--delete", "--itemize-changes"])
        .arg(source)
        .arg(copy)
        .output()
        .expect("rsync can be started");
    let words = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "rsync fails: {words}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

impl Drop for Crowd {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(base) = self.base.take()
        {
            println!("the nodes' folders stay in {}", base.keep().display());
        }
    }
}
