//! From what was seen or received to the rows that go into the index.
//!
//! In: observations of this node's disk, or rows of a peer, and the index as it
//! is. Out: decided rows, in the order in which they are to be numbered and
//! sent. The keeper observes what has changed before it decides on a peer's
//! rows, so that the index says what is on disk as nearly as can be known.
//!
//! The invariant that is kept here: a live path's parents are live directories.
//! Where a peer's rows break it, the directory comes back as a change of this
//! node, and a file that took the directory's name moves aside. A directory
//! that comes back keeps its name, even against a newer file: moving it aside
//! would rename everything beneath it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::{
    Entry, Flags, Kind, Origin, RelPath, Relation, ReplicaId, Row, Stamp, Time, TreeMove, Version,
};

use super::change::{Seen, differs};
use super::clock::Author;
use super::merge::{Loser, Policy, Verdict, remote_row};
use super::rows::{Decided, Overlay, Rows, Standing, Work};
use super::trees;

/// A path that was looked at.
#[derive(Clone, Debug)]
pub struct Observed {
    pub path: RelPath,
    pub seen: Seen,
    /// When it changed, as in [`super::clock::Clock::stamp_for`].
    pub when_ms: Option<u64>,
    /// Where the inode was before, if it was elsewhere.
    pub moved_from: Option<RelPath>,
    /// Who changed it, if that is known.
    pub origin: Option<Arc<Origin>>,
}

/// A row that a peer sent.
#[derive(Clone, Debug)]
pub struct Arrived {
    pub path: RelPath,
    pub row: Row,
    pub moved_from: Option<RelPath>,
    /// With it, all rows of the directory's move stand right before this one:
    /// see `trees`.
    pub moved_tree: Option<TreeMove>,
}

/// What all decisions need beside the rows.
pub struct Context<'a> {
    pub now_ms: u64,
    pub policy: Policy,
    /// The node's name behind a replica, for conflict copies.
    pub names: &'a dyn Fn(ReplicaId) -> String,
}

/// The rows for what was observed on this node's disk. The observations must
/// be closed under [`super::observe_also`].
pub fn decide_local<R: Rows>(
    rows: &R,
    observed: Vec<Observed>,
    author: &mut Author,
    now_ms: u64,
) -> Result<Vec<Decided>, R::Error> {
    let mut observed: BTreeMap<RelPath, Observed> = observed
        .into_iter()
        .map(|seen| (seen.path.clone(), seen))
        .collect();
    let mut overlay = Overlay::new(rows);
    let mut decided = decide_trees(&mut overlay, &observed, author, now_ms)?;
    let mut changed = Vec::new();
    while let Some((path, seen)) = observed.pop_first() {
        let old = overlay.row(&path)?;
        if differs(old.as_ref(), &seen.seen) {
            changed.push((seen, old));
        }
    }
    // Numbered so that whoever has the rows up to any number has a whole tree:
    // what lies beneath a directory goes before it does.
    let files: BTreeSet<RelPath> = changed
        .iter()
        .filter(|(seen, old)| {
            matches!(&seen.seen, Seen::Present(entry) if !entry.is_dir())
                && old.as_ref().is_some_and(Row::is_live_dir)
        })
        .map(|(seen, _)| seen.path.clone())
        .collect();
    changed.sort_by_cached_key(|(seen, _)| match seen.seen {
        Seen::Present(_) => (1, Reverse(0), seen.path.clone()),
        Seen::Absent if is_beneath_any(&seen.path, &files) => {
            (0, Reverse(seen.path.depth()), seen.path.clone())
        }
        Seen::Absent => (2, Reverse(seen.path.depth()), seen.path.clone()),
    });
    // A rename is one change, with one stamp: what is there now is newer than what
    // the former name had, and that name's end is no newer than it. Else the end
    // of a conflict copy that was renamed back would pass for the removal of a
    // copy of the very version that it has become.
    let mut left: BTreeMap<RelPath, Stamp> = BTreeMap::new();
    for (seen, old) in changed {
        let old_stamp = old.as_ref().map(|row| row.version.stamp);
        let stamp = match (&seen.seen, &seen.moved_from) {
            (Seen::Present(_), Some(from)) => {
                let before = overlay.row(from)?.map(|row| row.version.stamp);
                let here = old_stamp.or(author.forgotten());
                let stamp = author.stamp_for(now_ms, seen.when_ms, here.max(before).as_ref());
                left.insert(from.clone(), stamp);
                Some(stamp)
            }
            (Seen::Present(_), None) => None,
            (Seen::Absent, _) => {
                let stamp = left.get(&seen.path).copied();
                stamp.filter(|stamp| Some(*stamp) > old_stamp)
            }
        };
        decided.extend(own_row(seen, old.as_ref(), stamp, author, now_ms));
    }
    Ok(decided)
}

/// The row for what was observed at a path, with this stamp if one is given; none
/// if nothing differs.
fn own_row(
    seen: Observed,
    old: Option<&Row>,
    stamp: Option<Stamp>,
    author: &mut Author,
    now_ms: u64,
) -> Option<Decided> {
    let (seq, mut row) = match stamp {
        Some(stamp) => author.observe_at(old, &seen.seen, stamp)?,
        None => author.observe(old, &seen.seen, now_ms, seen.when_ms)?,
    };
    row.origin = seen.origin;
    Some(Decided {
        path: seen.path,
        seq,
        row,
        via: None,
        moved_from: seen.moved_from,
        moved_tree: None,
        work: Work::Nothing,
    })
}

/// The rows of all directories that were renamed, and of the new directories in
/// which they are now. What has changed in them besides is decided after it.
fn decide_trees<R: Rows>(
    overlay: &mut Overlay<'_, R>,
    observed: &BTreeMap<RelPath, Observed>,
    author: &mut Author,
    now_ms: u64,
) -> Result<Vec<Decided>, R::Error> {
    let mut decided = Vec::new();
    let mut moves: Vec<(RelPath, RelPath)> = Vec::new();
    for (to, from) in trees::candidates(observed) {
        // One that moved out of another that moved was carried along by that.
        let carried = |from: RelPath, one: &(RelPath, RelPath)| from.rebase(&one.0, &one.1).unwrap_or(from);
        let from = moves.iter().fold(from, carried);
        let mut above: Vec<RelPath> = std::iter::successors(to.parent(), RelPath::parent).collect();
        above.retain(|dir| !dir.is_root());
        let mut parents = Vec::new();
        let mut rows = None;
        // Tried on a copy of the author: nothing is numbered in vain.
        let mut trial = author.clone();
        for dir in above.into_iter().rev() {
            let Some(seen) = observed.get(&dir) else { continue };
            let old = overlay.row(&dir)?;
            if !old.as_ref().is_some_and(Row::is_live_dir) {
                parents.extend(own_row(seen.clone(), old.as_ref(), None, &mut trial, now_ms));
            }
        }
        if from != to {
            rows = trees::decide(overlay, observed, &from, &to, &mut trial, now_ms)?;
        }
        let Some(rows) = rows else { continue };
        *author = trial;
        for one in parents.into_iter().chain(rows) {
            overlay.decided.insert(one.path.clone(), one.clone());
            decided.push(one);
        }
        moves.push((from, to));
    }
    Ok(decided)
}

/// Whether one of `tops` is a true ancestor of `path`.
pub(super) fn is_beneath_any(path: &RelPath, tops: &BTreeSet<RelPath>) -> bool {
    if tops.is_empty() {
        return false;
    }
    let mut at = path.parent();
    while let Some(dir) = at {
        if tops.contains(&dir) {
            return true;
        }
        at = dir.parent();
    }
    false
}

/// What to do with rows that peer `via` sent, in path order.
pub fn decide_remote<R: Rows>(
    rows: &R,
    arrived: Vec<Arrived>,
    via: u32,
    author: &mut Author,
    context: &Context<'_>,
) -> Result<Vec<Decided>, R::Error> {
    let mut overlay = Overlay::new(rows);
    let mut losers = Vec::new();
    let mut lost_dirs = BTreeMap::new();
    for Arrived {
        path,
        row,
        moved_from,
        moved_tree,
    } in arrived
    {
        author.witness(row.version.stamp);
        let local = overlay.row(&path)?;
        let work = match remote_row(&path, local.as_ref(), &row, context.policy) {
            Verdict::Known => {
                if let Some(local) = local.filter(|local| local.deleted && !row.deleted) {
                    // Whoever sent it has forgotten the deletion, or does not
                    // know of it yet; all hear of it again.
                    overlay.tell_again(&path, local, author);
                }
                if row.is_live_dir() {
                    lost_dirs.insert(path, row.entry);
                }
                continue;
            }
            Verdict::Adopt => Work::Nothing,
            Verdict::Take(loser) => {
                if loser == Loser::KeptAside {
                    losers.push(path.clone());
                }
                Work::Apply
            }
        };
        let seq = author.next_seq();
        // The peer may have taken from here what its own deletion wins over, if
        // it has forgotten that by now: it is told, too.
        let meets = local.filter(|local| row.deleted && !local.deleted);
        let crosses =
            meets.is_some_and(|local| row.version.vector.relation(&local.version.vector) != Relation::After);
        overlay.decided.insert(
            path.clone(),
            Decided {
                path,
                seq,
                row,
                via: (!crosses).then_some(via),
                moved_from,
                moved_tree,
                work,
            },
        );
    }
    let mut changed: BTreeSet<RelPath> = overlay.decided.keys().cloned().collect();
    for path in losers {
        changed.extend(keep_aside(&mut overlay, &path, author, context)?);
    }
    repair(&mut overlay, changed, &lost_dirs, author, context)?;
    let mut decided: Vec<Decided> = overlay.decided.into_values().collect();
    // Rows of one batch can follow one another at a path only by way of the
    // peer's mistake; what counts is the disk before and the row after.
    for one in &mut decided {
        if one.work == Work::Apply {
            let base = rows.row(&one.path)?;
            if base.as_ref().and_then(Row::live) == one.row.live() {
                one.work = Work::Nothing;
            }
        }
    }
    Ok(decided)
}

/// Gives what the index has at `path`, and the disk with it, a second name.
fn keep_aside<R: Rows>(
    overlay: &mut Overlay<'_, R>,
    path: &RelPath,
    author: &mut Author,
    context: &Context<'_>,
) -> Result<Option<RelPath>, R::Error> {
    let Some(base) = overlay.base.row(path)? else {
        return Ok(None);
    };
    let Some(entry) = base.live().filter(|entry| !entry.is_dir()) else {
        return Ok(None);
    };
    let Some((to, old)) = overlay.aside_path(path, entry, &base.version, context.names)? else {
        return Ok(None);
    };
    let seen = Seen::Present(entry.clone());
    if let Some((seq, mut row)) = author.observe(old.as_ref(), &seen, context.now_ms, None) {
        row.origin = Some(Arc::new(Origin::daemon()));
        let work = Work::KeepAside { from: path.clone() };
        let made = Decided {
            path: to.clone(),
            seq,
            row,
            via: None,
            moved_from: Some(path.clone()),
            moved_tree: None,
            work,
        };
        overlay.decided.insert(to.clone(), made);
    }
    Ok(Some(to))
}

/// Makes the parents of every live path live directories again.
fn repair<R: Rows>(
    overlay: &mut Overlay<'_, R>,
    mut changed: BTreeSet<RelPath>,
    lost_dirs: &BTreeMap<RelPath, Entry>,
    author: &mut Author,
    context: &Context<'_>,
) -> Result<(), R::Error> {
    while let Some(path) = changed.pop_first() {
        let mut standing = overlay.standing(&path)?;
        if standing == Standing::Unknown {
            continue;
        }
        if standing != Standing::Directory && overlay.has_live_beneath(&path)? {
            changed.extend(revive(overlay, &path, lost_dirs.get(&path), author, context)?);
            standing = overlay.standing(&path)?;
        }
        if standing == Standing::Deleted {
            continue;
        }
        let mut above = path.parent();
        while let Some(dir) = above {
            if dir.is_root() || overlay.standing(&dir)? == Standing::Directory {
                break;
            }
            changed.extend(revive(overlay, &dir, lost_dirs.get(&dir), author, context)?);
            above = dir.parent();
        }
    }
    Ok(())
}

/// Makes `path` a directory again, as a change of this node; returns the paths
/// whose rows changed. `lost` is how the peer had it, if it said so.
fn revive<R: Rows>(
    overlay: &mut Overlay<'_, R>,
    path: &RelPath,
    lost: Option<&Entry>,
    author: &mut Author,
    context: &Context<'_>,
) -> Result<Vec<RelPath>, R::Error> {
    let base = overlay.base.row(path)?;
    let now = overlay.row(path)?;
    let mut changed = vec![path.clone()];
    if base == now {
        // The file in the way is on this node's disk. One that never was is
        // kept by the nodes that have it, since the new row does not descend
        // from theirs.
        changed.extend(keep_aside(overlay, path, author, context)?);
    }
    let directory = |row: &Option<Row>| {
        row.as_ref()
            .map(|row| &row.entry)
            .filter(|entry| entry.is_dir())
            .cloned()
    };
    let here = base.as_ref().filter(|row| !row.deleted).cloned();
    let known = directory(&here)
        .or_else(|| directory(&now))
        .or_else(|| lost.cloned())
        .or_else(|| directory(&base));
    let seq = author.next_seq();
    let (entry, stamp) = match known {
        Some(entry) => (entry, author.tick(context.now_ms)),
        // Just enough to win over the row that is there, so that a node which
        // knows the directory, and brings it back likewise, wins over this.
        None => {
            let old = now.as_ref().map(|row| &row.version.stamp);
            (
                closed_directory(context.now_ms),
                author.stamp_for(context.now_ms, Some(0), old),
            )
        }
    };
    let mut vector = base.map(|row| row.version.vector).unwrap_or_default();
    vector.raise(author.replica(), seq);
    let row = Row {
        entry,
        deleted: false,
        version: Version { vector, stamp },
        origin: Some(Arc::new(Origin::daemon())),
    };
    let made = Decided {
        path: path.clone(),
        seq,
        row,
        via: None,
        moved_from: None,
        moved_tree: None,
        work: Work::Apply,
    };
    overlay.decided.insert(path.clone(), made);
    Ok(changed)
}

/// A directory of which nothing is known here: nobody gets in who perhaps must
/// not.
fn closed_directory(now_ms: u64) -> Entry {
    let secs = i64::try_from(now_ms / 1000).unwrap_or(0);
    let mtime = Time { secs, nanos: 0 };
    Entry {
        kind: Kind::Directory,
        mode: 0o700,
        uid: 0,
        gid: 0,
        mtime,
        xattrs: Vec::new(),
        flags: Flags::NONE,
        user: None,
        group: None,
        link: None,
    }
}
