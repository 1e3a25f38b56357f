//! What the engine needs to read of the index, and decisions laid over it.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use crate::model::{Entry, Hash, LinkGroup, RelPath, ReplicaId, Row, TreeMove, Version};

use super::clock::Author;
use super::conflict::conflict_path;
use super::merge::same_content;

/// The index as the engine reads it. All answers are of one moment.
pub trait Rows {
    /// Why a read can go wrong; `Infallible` for an index in memory.
    type Error;

    fn row(&self, path: &RelPath) -> Result<Option<Row>, Self::Error>;

    /// What the row at `path` says is there; cheaper than the row, where an index
    /// can tell without it.
    fn standing(&self, path: &RelPath) -> Result<Standing, Self::Error> {
        Ok(Standing::of(self.row(path)?.as_ref()))
    }

    /// Calls `each` with the live rows strictly beneath `path`, in any order,
    /// until it breaks.
    fn live_beneath(
        &self,
        path: &RelPath,
        each: &mut dyn FnMut(&RelPath) -> ControlFlow<()>,
    ) -> Result<(), Self::Error>;

    /// The paths of live rows in a hard-link group.
    fn linked(&self, group: LinkGroup) -> Result<Vec<RelPath>, Self::Error>;

    /// The path of a live file with this content, if one is known. None is
    /// always a right answer; a path costs a copy instead of a transfer.
    fn holder(&self, hash: &Hash) -> Result<Option<RelPath>, Self::Error>;
}

/// What a row says of its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// There is no row.
    Unknown,
    Deleted,
    Directory,
    /// Anything else that is there.
    Other,
}

impl Standing {
    /// Of the row at a path, if there is one.
    pub fn of(row: Option<&Row>) -> Standing {
        match row {
            None => Standing::Unknown,
            Some(row) if row.deleted => Standing::Deleted,
            Some(row) if row.entry.is_dir() => Standing::Directory,
            Some(_) => Standing::Other,
        }
    }
}

/// A row that is to be written to the index, and what the disk needs for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    pub path: RelPath,
    /// The sequence number under which it goes into the index.
    pub seq: u64,
    pub row: Row,
    /// The peer it came from; none if it was made here.
    pub via: Option<u32>,
    pub moved_from: Option<RelPath>,
    /// Set for the last row of a directory's move: see `trees`.
    pub moved_tree: Option<TreeMove>,
    pub work: Work,
}

/// What the disk needs for a decided row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing: it is as the row says.
    Nothing,
    /// To be brought from what the index had to what the row says.
    Apply,
    /// The content at `from` loses that name and must keep this one.
    KeepAside { from: RelPath },
}

/// Rows with decisions laid over them: the index as it will be.
pub(super) struct Overlay<'a, R: Rows> {
    pub(super) base: &'a R,
    pub(super) decided: BTreeMap<RelPath, Decided>,
}

impl<'a, R: Rows> Overlay<'a, R> {
    pub(super) fn new(base: &'a R) -> Self {
        Overlay {
            base,
            decided: BTreeMap::new(),
        }
    }

    pub(super) fn row(&self, path: &RelPath) -> Result<Option<Row>, R::Error> {
        match self.decided.get(path) {
            Some(decided) => Ok(Some(decided.row.clone())),
            None => self.base.row(path),
        }
    }

    pub(super) fn standing(&self, path: &RelPath) -> Result<Standing, R::Error> {
        match self.decided.get(path) {
            Some(decided) => Ok(Standing::of(Some(&decided.row))),
            None => self.base.standing(path),
        }
    }

    /// Gives `row`, which stands at `path`, a new number, so that it is sent
    /// again.
    pub(super) fn tell_again(&mut self, path: &RelPath, row: Row, author: &mut Author) {
        let again = Decided {
            path: path.clone(),
            seq: author.next_seq(),
            row,
            via: None,
            moved_from: None,
            moved_tree: None,
            work: Work::Nothing,
        };
        self.decided.insert(path.clone(), again);
    }

    /// The decided rows strictly beneath `path`, in path order.
    pub(super) fn decided_beneath<'s>(&'s self, path: &'s RelPath) -> impl Iterator<Item = &'s Decided> {
        let range = (Bound::Excluded(path), Bound::Unbounded);
        // `a-b` sorts between `a` and `a/b`, hence the filter on both sides.
        let end = path.beneath_range().1;
        self.decided
            .range::<RelPath, _>(range)
            .take_while(move |(at, _)| end.as_ref().is_none_or(|end| at.as_bytes() < &end[..]))
            .filter(|(at, _)| at.is_within(path))
            .map(|(_, decided)| decided)
    }

    pub(super) fn has_live_beneath(&self, path: &RelPath) -> Result<bool, R::Error> {
        if self.decided_beneath(path).any(|decided| !decided.row.deleted) {
            return Ok(true);
        }
        let mut found = false;
        self.base.live_beneath(path, &mut |at| {
            if self.decided.contains_key(at) {
                return ControlFlow::Continue(());
            }
            found = true;
            ControlFlow::Break(())
        })?;
        Ok(found)
    }

    /// The path under which `loser`, now at `path`, is to be kept; none if it
    /// is there already, or was and has been deleted since. A version that was
    /// made after that deletion is another one, though it may have the same
    /// content and, within a second, the same name.
    pub(super) fn aside_path(
        &self,
        path: &RelPath,
        loser: &Entry,
        version: &Version,
        names: &dyn Fn(ReplicaId) -> String,
    ) -> Result<Option<(RelPath, Option<Row>)>, R::Error> {
        let stamp = &version.stamp;
        let node = names(stamp.replica);
        let mut nth = 1;
        loop {
            let to = conflict_path(path, stamp, &node, nth);
            match self.row(&to)? {
                None => return Ok(Some((to, None))),
                Some(row)
                    if same_content(&row.entry, loser) && (!row.deleted || ends(&row.version, version)) =>
                {
                    return Ok(None);
                }
                // What is on disk there must have gone before the name is free.
                Some(row) if row.deleted && self.base.row(&to)?.is_none_or(|row| row.deleted) => {
                    return Ok(Some((to, Some(row))));
                }
                Some(_) => nth += 1,
            }
        }
    }
}

/// Whether a copy's removal is later than the version of which it was one. What
/// one node has made is told by its numbers: where the clocks of others run ahead,
/// stamps of different paths do not.
fn ends(removal: &Version, version: &Version) -> bool {
    let author = version.stamp.replica;
    if removal.stamp.replica == author {
        let made = |version: &Version| version.vector.get(author);
        return made(removal) > made(version) && removal.stamp != version.stamp;
    }
    removal.stamp > version.stamp
}
