//! An index that was copied, restored from a backup, or cloned with its node.
//!
//! In: the index and the tree beside which it is found. Out: an index with a
//! replica number of its own, in which every row is one that the tree bears out.
//! What it does not is forgotten, as if it had never been known: the index may
//! be older than the tree, or newer, or of another one, and a row that is gone
//! says nothing, while one that is wrong would count as a deletion or a change
//! that nobody has made. Peers send their rows from the first on, and what both
//! have is compared. Runs before anything else of the share does.

use crate::apply::ShareRoot;
use crate::config::Excludes;
use crate::engine::{self, Groups};
use crate::index::{Durable, Home, Index, IndexError};
use crate::model::{Entry, Record, RelPath, ReplicaId, StatSig};
use crate::observe;

/// Rows that are written in one transaction.
const PORTION: usize = 8192;

/// How many rows there were, and how many of them were forgotten.
pub(super) struct Doubted {
    pub(super) rows: u64,
    pub(super) forgotten: u64,
}

/// What is found of a row's path.
enum Stands {
    /// It is as the row says, or cannot be looked at.
    As(Option<StatSig>),
    Not,
}

/// Makes `index` one that can be used for `root`, by the node `node`.
///
/// The last commit makes it so. If the daemon is killed before, the index is
/// still a copy at the next start, with fewer rows.
pub(super) fn doubt(
    index: &Index,
    root: &ShareRoot,
    excludes: &Excludes,
    home: Home,
    node: &str,
) -> anyhow::Result<Doubted> {
    let identity = root.identity()?;
    let dirs = root.batch();
    let reader = index.read()?;
    let mut doubted = Doubted {
        rows: 0,
        forgotten: 0,
    };
    // What cannot be looked at, because something is mounted there for instance, is
    // left to the comparison, which leaves it alone as well.
    let look = |path: &RelPath, entry: &Entry| match observe::stat(&dirs, path) {
        Ok(sig) if engine::bears_out(entry, sig.as_ref()) => Stands::As(sig),
        Ok(_) => Stands::Not,
        Err(_) => Stands::As(None),
    };
    let mut groups = Groups::default();
    for pair in reader.beneath(&RelPath::root())? {
        let (path, record) = pair?;
        let Some(entry) = record.row.live() else { continue };
        if let Some(group) = entry.link
            && let Stands::As(Some(sig)) = look(&path, entry)
        {
            groups.found(group, sig.ino);
        }
    }
    let mut portion: Vec<(RelPath, Option<Record>)> = Vec::new();
    for pair in reader.beneath(&RelPath::root())? {
        let (path, record) = pair?;
        let Some(entry) = record.row.live() else { continue };
        if excludes.is_excluded(&path, entry.is_dir()) {
            continue;
        }
        doubted.rows += 1;
        let linked = entry.link.is_some_and(|group| groups.is_one(group));
        let stands = match look(&path, entry) {
            Stands::Not => None,
            // The inodes that the index has are of another tree, perhaps. Which
            // names are one inode now is known; what is in it is to be read.
            Stands::As(sig) => {
                let sig = sig.filter(|_| linked).map(|sig| StatSig { racy: true, ..sig });
                Some(Record { sig, ..record })
            }
        };
        doubted.forgotten += u64::from(stands.is_none());
        portion.push((path, stands));
        if portion.len() >= PORTION {
            write(index, &mut portion)?;
        }
    }
    write(index, &mut portion)?;
    let replica = ReplicaId(crate::index::random_u64());
    index.write(|w| {
        w.set_home(home);
        let meta = w.meta();
        meta.replica = replica;
        meta.names.push((replica, node.to_owned()));
        meta.root = Some(identity);
        for peer in &mut meta.peers {
            peer.replica = ReplicaId(0);
            peer.cursor = 0;
        }
        Ok(((), Durable::Yes))
    })?;
    Ok(doubted)
}

fn write(index: &Index, portion: &mut Vec<(RelPath, Option<Record>)>) -> Result<(), IndexError> {
    index.write(|w| {
        for (path, record) in portion.drain(..) {
            match record {
                Some(record) => w.put(&path, &record)?,
                None => w.disown(&path)?,
            }
        }
        Ok(((), Durable::Later))
    })
}
