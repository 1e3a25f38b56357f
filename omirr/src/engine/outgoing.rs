//! Which rows go to a peer, in which order.
//!
//! Rows go in sequence order, with two exceptions, so that the peer has a whole
//! tree after every batch: a live row's parents go before it, even if they
//! changed later; and a row that leaves no directory at its path waits until
//! what lies beneath has gone before it. Without the first, a peer would have
//! to invent a directory; without the second, it would bring one back that
//! nobody wants.
//!
//! In: a snapshot of the index, a fresh one for every batch. Out: batches.

use std::collections::{BTreeMap, HashMap};

use crate::model::{Entry, Moved, Record, RelPath, TreeMove};

/// The index in sequence order.
pub trait Sequence {
    type Error;

    fn record(&self, path: &RelPath) -> Result<Option<Record>, Self::Error>;

    /// The first `limit` paths after `seq`, in sequence order.
    fn after(&self, seq: u64, limit: usize) -> Result<Vec<(RelPath, Record)>, Self::Error>;

    /// Whether a row strictly beneath `path`, tombstones included, has a
    /// sequence number greater than `seq`.
    fn changed_beneath(&self, path: &RelPath, seq: u64) -> Result<bool, Self::Error>;

    /// The directory's move among whose rows' numbers `seq` is, and the last of
    /// these numbers. None is always a right answer: the rows go one by one.
    fn move_over(&self, _seq: u64) -> Result<Option<(u64, Moved)>, Self::Error> {
        Ok(None)
    }
}

/// Rows for a peer. What is before `upto` and not among them it need not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outbound {
    pub upto: u64,
    pub rows: Vec<(RelPath, Record)>,
    /// By sequence number, for rows that stand for all of a directory's move:
    /// those of the move that have not been replaced since are not in `rows`.
    pub moves: BTreeMap<u64, TreeMove>,
    /// With these the peer has been sent everything that the snapshot has.
    pub is_all: bool,
}

/// Whether the content of `entry` goes with its row.
pub fn goes_inline(entry: &Entry, limit: u64) -> bool {
    entry.content().is_some_and(|(size, _)| size <= limit)
}

/// One peer's place in this node's rows, for the life of a connection.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The peer, as in [`Record::via`].
    peer: u32,
    /// Rows from the peer are not sent back if they came after this: earlier
    /// ones may be from a life of the peer's index that a crash has undone.
    fresh_after: u64,
    /// Everything up to here has been looked at.
    scanned: u64,
    /// Rows beyond `scanned` that have been sent, as their children's parents.
    early: HashMap<RelPath, u64>,
    /// Rows up to `scanned` that wait for what lies beneath them.
    held: BTreeMap<u64, RelPath>,
    /// Moves that end up to here go row by row.
    plain_upto: u64,
}

impl Outgoing {
    /// `cursor` is what the peer said; `fresh_after` this node's highest
    /// sequence number when the peer's present process was first heard of.
    pub fn new(peer: u32, cursor: u64, fresh_after: u64) -> Outgoing {
        Outgoing {
            peer,
            fresh_after,
            scanned: cursor,
            early: HashMap::new(),
            held: BTreeMap::new(),
            plain_upto: 0,
        }
    }

    /// Begins again after number `after`, and this time sends the rows of moves
    /// up to number `plain_upto` one by one: the peer cannot make them. Returns
    /// after which number it does begin.
    pub fn rewind(&mut self, after: u64, plain_upto: u64) -> u64 {
        self.plain_upto = self.plain_upto.max(plain_upto);
        // What waited was not sent; what was sent before its turn comes again.
        self.scanned = self.upto().min(after);
        self.early.clear();
        self.held.clear();
        self.scanned
    }

    /// The next rows, about `limit` of them; none if the peer has been sent
    /// everything.
    pub fn next_batch<S: Sequence>(&mut self, index: &S, limit: usize) -> Result<Option<Outbound>, S::Error> {
        let before = self.upto();
        let mut rows = Vec::new();
        let mut moves = BTreeMap::new();
        let mut more = true;
        while more && rows.len() < limit {
            let chunk = index.after(self.scanned, limit)?;
            more = !chunk.is_empty();
            for (path, record) in chunk {
                if record.seq <= self.scanned {
                    // It went with a move.
                    continue;
                }
                if let Some((from, last, tree)) = self.whole_move(index, &record)? {
                    self.parents(index, &tree.to, &mut rows)?;
                    self.scanned = last.seq;
                    moves.insert(last.seq, tree);
                    rows.push((from, last));
                    continue;
                }
                self.scanned = record.seq;
                if self.early.remove(&path) == Some(record.seq) || !self.wanted(&record) {
                    continue;
                }
                if !record.row.is_live_dir() && index.changed_beneath(&path, record.seq)? {
                    self.held.insert(record.seq, path);
                    continue;
                }
                if !record.row.deleted {
                    self.parents(index, &path, &mut rows)?;
                }
                rows.push((path, record));
            }
        }
        self.release(index, &mut rows)?;
        let upto = self.upto();
        let is_all = !more && self.held.is_empty();
        Ok((upto > before || !rows.is_empty()).then_some(Outbound {
            upto,
            rows,
            moves,
            is_all,
        }))
    }

    fn upto(&self) -> u64 {
        self.held
            .first_key_value()
            .map_or(self.scanned, |(seq, _)| seq - 1)
    }

    /// The move that `record` is of, with its last row, if that can stand for all
    /// of it: the peer has been sent what came before and nothing of the move.
    fn whole_move<S: Sequence>(
        &self,
        index: &S,
        record: &Record,
    ) -> Result<Option<(RelPath, Record, TreeMove)>, S::Error> {
        let Some((seq, moved)) = index.move_over(record.seq)? else {
            return Ok(None);
        };
        if self.scanned >= seq.saturating_sub(moved.tree.span()) || seq <= self.plain_upto {
            return Ok(None);
        }
        let Some(last) = index.record(&moved.from)?.filter(|last| last.seq == seq) else {
            return Ok(None);
        };
        if !self.wanted(&last) || index.changed_beneath(&moved.from, seq)? {
            return Ok(None);
        }
        // Where it went there must still be directories: the move would bring
        // others back.
        let mut above = moved.tree.to.parent();
        while let Some(dir) = above.filter(|dir| !dir.is_root()) {
            if !index.record(&dir)?.is_some_and(|dir| dir.row.is_live_dir()) {
                return Ok(None);
            }
            above = dir.parent();
        }
        Ok(Some((moved.from, last, moved.tree)))
    }

    fn wanted(&self, record: &Record) -> bool {
        record.via != Some(self.peer) || record.seq <= self.fresh_after
    }

    /// Adds the parents that come later in sequence, topmost first.
    fn parents<S: Sequence>(
        &mut self,
        index: &S,
        path: &RelPath,
        rows: &mut Vec<(RelPath, Record)>,
    ) -> Result<(), S::Error> {
        let mut above = Vec::new();
        let mut at = path.parent();
        while let Some(dir) = at {
            let Some(record) = index.record(&dir)? else { break };
            if record.seq <= self.scanned || self.early.get(&dir) == Some(&record.seq) {
                break;
            }
            at = dir.parent();
            above.push((dir, record));
        }
        for (dir, record) in above.into_iter().rev() {
            self.early.insert(dir.clone(), record.seq);
            // A row that came from the peer is there already.
            if self.wanted(&record) {
                rows.push((dir, record));
            }
        }
        Ok(())
    }

    /// Adds what has waited and need not any more, deepest first.
    fn release<S: Sequence>(&mut self, index: &S, rows: &mut Vec<(RelPath, Record)>) -> Result<(), S::Error> {
        let mut free = Vec::new();
        let held = std::mem::take(&mut self.held);
        for (seq, path) in held {
            match index.record(&path)? {
                Some(record) if record.seq == seq => {
                    if index.changed_beneath(&path, self.scanned)? {
                        self.held.insert(seq, path);
                    } else {
                        free.push((path, record));
                    }
                }
                // It has changed since, and comes again.
                _ => {}
            }
        }
        // A tombstone waits for tombstones beneath it that wait themselves.
        free.sort_by_cached_key(|(path, _)| std::cmp::Reverse(path.depth()));
        rows.extend(free);
        Ok(())
    }
}
