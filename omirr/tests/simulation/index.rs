//! The index of a simulated node: maps in memory. What a crash leaves is a
//! clone of it made at the last durable commit.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;

use omirr::engine::{Past, Reserve, Rows, Sequence, Standing, may_forget};
use omirr::model::{Gap, Hash, LinkGroup, Moved, Record, RelPath, ReplicaId, Row, Stamp, StatSig};

use crate::beneath;

/// So many moves are kept: few, so that histories meet one that is forgotten.
const MOVES_KEPT: usize = 8;

/// A row that is about to be applied to the disk.
#[derive(Clone, Debug)]
pub(crate) struct Intent {
    pub(crate) row: Row,
    pub(crate) via: Option<u32>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    /// Shared with the clones that crashes leave, until one changes; so are the
    /// maps: most commits follow no change.
    pub(crate) records: Arc<BTreeMap<RelPath, Arc<Record>>>,
    pub(crate) by_seq: Arc<BTreeMap<u64, RelPath>>,
    /// Per peer: everything of this replica up to here is in `records`.
    pub(crate) cursors: BTreeMap<u32, (ReplicaId, u64)>,
    pub(crate) reserve: Reserve,
    /// Numbers that were left out.
    pub(crate) gaps: Vec<Gap>,
    pub(crate) intents: BTreeMap<RelPath, Intent>,
    /// The highest sequence number ever used.
    head: u64,
    /// The greatest stamp ever, and that of a tombstone that was forgotten.
    stamp: Option<Stamp>,
    pub(crate) forgotten: Option<Stamp>,
    /// Directories' moves by the last of their numbers.
    pub(crate) moves: BTreeMap<u64, Moved>,
}

impl Index {
    pub(crate) fn put(&mut self, path: RelPath, record: Record) {
        self.head = self.head.max(record.seq);
        self.stamp = self.stamp.max(Some(record.row.version.stamp));
        let by_seq = Arc::make_mut(&mut self.by_seq);
        by_seq.insert(record.seq, path.clone());
        let seq = record.seq;
        let old = Arc::make_mut(&mut self.records).insert(path, Arc::new(record));
        if let Some(old) = old.filter(|old| old.seq != seq) {
            by_seq.remove(&old.seq);
        }
    }

    /// What the inode at a path was when it was last looked at.
    pub(crate) fn set_sig(&mut self, path: &RelPath, sig: Option<StatSig>) {
        if self.get(path).is_some_and(|record| record.sig != sig)
            && let Some(record) = Arc::make_mut(&mut self.records).get_mut(path)
        {
            Arc::make_mut(record).sig = sig;
        }
    }

    /// Keeps the last few.
    pub(crate) fn note_moves(&mut self, moves: Vec<(u64, Moved)>) {
        self.moves.extend(moves);
        while self.moves.len() > MOVES_KEPT {
            self.moves.pop_first();
        }
    }

    pub(crate) fn live_at_and_beneath(&self, top: &RelPath) -> Vec<RelPath> {
        let own = self.records.get_key_value(top).into_iter();
        own.chain(self.beneath(top))
            .filter(|(_, record)| !record.row.deleted)
            .map(|(at, _)| at.clone())
            .collect()
    }

    /// What lies strictly beneath `top`, in path order.
    fn beneath<'a>(&'a self, top: &'a RelPath) -> impl Iterator<Item = (&'a RelPath, &'a Arc<Record>)> {
        beneath(&self.records, top)
    }

    pub(crate) fn head(&self) -> u64 {
        self.head
    }

    pub(crate) fn last_stamp(&self) -> Option<Stamp> {
        self.stamp
    }

    /// Forgets a path altogether, as if nothing had ever been known of it.
    pub(crate) fn disown(&mut self, path: &RelPath) {
        if let Some(record) = Arc::make_mut(&mut self.records).remove(path) {
            Arc::make_mut(&mut self.by_seq).remove(&record.seq);
        }
    }

    /// Forgets the tombstones that may be.
    pub(crate) fn sweep(&mut self, peers: &[Past]) -> Vec<RelPath> {
        let gone: Vec<RelPath> = self
            .records
            .iter()
            .filter(|(_, record)| may_forget(record, peers))
            .map(|(path, _)| path.clone())
            .collect();
        for path in &gone {
            if let Some(record) = Arc::make_mut(&mut self.records).remove(path) {
                Arc::make_mut(&mut self.by_seq).remove(&record.seq);
                self.forgotten = self.forgotten.max(Some(record.row.version.stamp));
            }
        }
        gone
    }

    /// The paths at which the inode was when they were last looked at.
    pub(crate) fn paths_of_ino(&self, ino: u64) -> Vec<RelPath> {
        let is = |record: &Record| record.sig.is_some_and(|sig| sig.ino == ino);
        let named = self
            .records
            .iter()
            .filter(|(_, record)| !record.row.deleted && is(record));
        named.map(|(path, _)| path.clone()).collect()
    }

    pub(crate) fn get(&self, path: &RelPath) -> Option<&Record> {
        self.records.get(path).map(Arc::as_ref)
    }
}

impl Rows for Index {
    type Error = Infallible;

    fn row(&self, path: &RelPath) -> Result<Option<Row>, Infallible> {
        Ok(self.get(path).map(|record| record.row.clone()))
    }

    fn standing(&self, path: &RelPath) -> Result<Standing, Infallible> {
        Ok(Standing::of(self.get(path).map(|record| &record.row)))
    }

    fn live_beneath(
        &self,
        path: &RelPath,
        each: &mut dyn FnMut(&RelPath) -> ControlFlow<()>,
    ) -> Result<(), Infallible> {
        for (at, record) in self.beneath(path) {
            if !record.row.deleted && each(at).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn linked(&self, group: LinkGroup) -> Result<Vec<RelPath>, Infallible> {
        let linked = self
            .records
            .iter()
            .filter(|(_, record)| record.row.live().is_some_and(|entry| entry.link == Some(group)));
        Ok(linked.map(|(path, _)| path.clone()).collect())
    }

    fn holder(&self, hash: &Hash) -> Result<Option<RelPath>, Infallible> {
        let holds = |record: &Record| {
            record
                .row
                .live()
                .and_then(|entry| entry.content())
                .is_some_and(|content| content.1 == *hash)
        };
        Ok(self
            .records
            .iter()
            .find(|(_, record)| holds(record))
            .map(|(path, _)| path.clone()))
    }
}

impl Sequence for Index {
    type Error = Infallible;

    fn record(&self, path: &RelPath) -> Result<Option<Record>, Infallible> {
        Ok(self.get(path).cloned())
    }

    fn after(&self, seq: u64, limit: usize) -> Result<Vec<(RelPath, Record)>, Infallible> {
        let after = self.by_seq.range(seq + 1..).take(limit);
        Ok(after
            .map(|(_, path)| (path.clone(), self.records[path].as_ref().clone()))
            .collect())
    }

    fn changed_beneath(&self, path: &RelPath, seq: u64) -> Result<bool, Infallible> {
        Ok(self.beneath(path).any(|(_, record)| record.seq > seq))
    }

    fn move_over(&self, seq: u64) -> Result<Option<(u64, Moved)>, Infallible> {
        let next = self.moves.range(seq..).next();
        let over = next.filter(|(last, moved)| seq >= **last - moved.tree.span());
        Ok(over.map(|(last, moved)| (*last, moved.clone())))
    }
}
