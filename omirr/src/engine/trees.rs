//! A renamed directory: many rows, made in a way that any node can repeat.
//!
//! In: the rows as they are and what was observed, or what a peer says of a move.
//! Out: the move's rows in their fixed order, or that they cannot be made here.
//! Rows stay what they are, one per path with a version of its own; only that a
//! peer which has the same rows need not be sent them.
//!
//! The rows of a move from `d` to `e`, in the order of their numbers: those at
//! `e` and beneath, live, in path order, with the entries that `d`'s had; then
//! the tombstones of `d`'s, deepest first, `d`'s own last. All have one stamp,
//! above every older one at these paths, and one origin. Each one's vector is
//! that of the row before at its path, raised by the author to the row's number.
//! So the last row tells the stamp, the origin and the author's numbers, and
//! [`TreeMove`] the rest. Its digest is over the rows before: where anything else
//! is, be it a change that one of the two nodes does not know of, it is another,
//! and the rows are sent one by one.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::model::{Entry, Hash, Moved, Origin, RelPath, ReplicaId, Row, Stamp, TreeMove, Version};

use super::change::Seen;
use super::clock::Author;
use super::decide::{Arrived, Observed};
use super::rows::{Decided, Overlay, Rows, Standing, Work};

/// So many live rows go along in one move; a greater directory's rows go one by
/// one. A peer has to hold twice as many in memory.
pub const TREE_ROWS_MAX: u32 = 131_072;

/// A path that moves.
pub(super) struct Part {
    from: RelPath,
    to: RelPath,
    /// The live row at `from`.
    row: Row,
    /// The tombstone at `to`, if there was something before.
    old: Option<Row>,
}

/// What moves if the directory `from` becomes `to`, in path order; none if that
/// cannot be one move, for something live would be in its place.
pub(super) fn survey<R: Rows>(
    overlay: &Overlay<'_, R>,
    from: &RelPath,
    to: &RelPath,
) -> Result<Option<Vec<Part>>, R::Error> {
    let apart = !from.is_within(to) && !to.is_within(from);
    let top = overlay.row(from)?.filter(Row::is_live_dir);
    let Some(top) = top.filter(|_| apart) else {
        return Ok(None);
    };
    if matches!(overlay.standing(to)?, Standing::Directory | Standing::Other)
        || overlay.has_live_beneath(to)?
    {
        return Ok(None);
    }
    let mut live = BTreeMap::from([(from.clone(), top)]);
    for one in overlay.decided_beneath(from).filter(|one| !one.row.deleted) {
        live.insert(one.path.clone(), one.row.clone());
    }
    let mut paths = Vec::new();
    overlay.base.live_beneath(from, &mut |path| {
        if !overlay.decided.contains_key(path) {
            paths.push(path.clone());
        }
        match paths.len() < TREE_ROWS_MAX as usize {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    })?;
    for path in paths {
        if let Some(row) = overlay.base.row(&path)? {
            live.insert(path, row);
        }
    }
    if live.len() > TREE_ROWS_MAX as usize {
        return Ok(None);
    }
    let mut parts = Vec::with_capacity(live.len());
    for (path, row) in live {
        let Some(to) = path.rebase(from, to) else {
            return Ok(None);
        };
        let old = overlay.row(&to)?;
        parts.push(Part {
            from: path,
            to,
            row,
            old,
        });
    }
    Ok(Some(parts))
}

/// The digest of [`TreeMove`]: relative path, version, and the version that was
/// at the new path. A version names one row.
fn digest(from: &RelPath, parts: &[Part]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    let mut number = |n: u64| {
        hasher.update(&n.to_le_bytes());
    };
    let version = |number: &mut dyn FnMut(u64), version: &Version| {
        let Stamp {
            wall_ms,
            count,
            replica,
        } = version.stamp;
        for n in [wall_ms, u64::from(count), replica.0] {
            number(n);
        }
        let pairs = version.vector.pairs();
        number(pairs.len() as u64);
        for (replica, counter) in pairs {
            number(replica.0);
            number(*counter);
        }
    };
    for part in parts {
        let relative = &part.from.as_bytes()[from.as_bytes().len()..];
        number(relative.len() as u64);
        // Bytes as numbers, so that one closure feeds the hasher.
        for chunk in relative.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            number(u64::from_le_bytes(word));
        }
        version(&mut number, &part.row.version);
        match &part.old {
            Some(old) => {
                number(1);
                version(&mut number, &old.version);
            }
            None => number(0),
        }
    }
    Hash(*hasher.finalize().as_bytes())
}

/// A row of a move.
struct Made {
    path: RelPath,
    row: Row,
    moved_from: Option<RelPath>,
}

/// The rows of a move, in their order; the author's counter of the first is
/// `counter`.
fn make(parts: Vec<Part>, mut counter: u64, stamp: Stamp, origin: Option<&Arc<Origin>>) -> Vec<Made> {
    let mut row = |entry: Entry, deleted: bool, before: Option<&Row>| {
        let mut vector = before.map(|row| row.version.vector.clone()).unwrap_or_default();
        vector.raise(stamp.replica, counter);
        counter += 1;
        Row {
            entry,
            deleted,
            version: Version { vector, stamp },
            origin: origin.cloned(),
        }
    };
    let mut made = Vec::with_capacity(parts.len() * 2);
    for part in &parts {
        made.push(Made {
            path: part.to.clone(),
            row: row(part.row.entry.clone(), false, part.old.as_ref()),
            moved_from: Some(part.from.clone()),
        });
    }
    let mut parts = parts;
    parts.sort_by_cached_key(|part| (Reverse(part.from.depth()), part.from.clone()));
    for part in parts {
        let gone = row(part.row.entry.clone(), true, Some(&part.row));
        made.push(Made {
            path: part.from,
            row: gone,
            moved_from: None,
        });
    }
    made
}

/// The directories that were found under another name than before, parents
/// first, and where each was.
pub(super) fn candidates(observed: &BTreeMap<RelPath, Observed>) -> Vec<(RelPath, RelPath)> {
    let moved = observed.values().filter_map(|seen| match &seen.seen {
        Seen::Present(entry) if entry.is_dir() => Some((seen.path.clone(), seen.moved_from.clone()?)),
        _ => None,
    });
    moved.collect()
}

/// The rows of the move from `from` to `to`, as this node's own; none if what was
/// observed is no such move: all of the directory must have gone from `from`, and
/// all of it must have been looked for at `to`.
pub(super) fn decide<R: Rows>(
    overlay: &Overlay<'_, R>,
    observed: &BTreeMap<RelPath, Observed>,
    from: &RelPath,
    to: &RelPath,
    author: &mut Author,
    now_ms: u64,
) -> Result<Option<Vec<Decided>>, R::Error> {
    let Some(top) = observed.get(to) else {
        return Ok(None);
    };
    let gone = |path: &RelPath| observed.get(path).is_some_and(|seen| seen.seen == Seen::Absent);
    if !gone(from) {
        return Ok(None);
    }
    let Some(parts) = survey(overlay, from, to)? else {
        return Ok(None);
    };
    if !parts
        .iter()
        .all(|part| gone(&part.from) && observed.contains_key(&part.to))
    {
        return Ok(None);
    }
    let olds = parts
        .iter()
        .flat_map(|part| [Some(&part.row), part.old.as_ref()])
        .flatten();
    // Most of the new names have no row.
    let newest = olds.map(|row| row.version.stamp).max().max(author.forgotten());
    let stamp = author.stamp_for(now_ms, top.when_ms, newest.as_ref());
    let Ok(count) = u32::try_from(parts.len()) else {
        return Ok(None);
    };
    let tree = TreeMove {
        to: to.clone(),
        count,
        digest: digest(from, &parts),
    };
    let made = make(parts, author.seq() + 1, stamp, top.origin.as_ref());
    let mut decided: Vec<Decided> = made
        .into_iter()
        .map(|made| Decided {
            path: made.path,
            seq: author.next_seq(),
            row: made.row,
            via: None,
            moved_from: made.moved_from,
            moved_tree: None,
            work: Work::Nothing,
        })
        .collect();
    if let Some(last) = decided.last_mut() {
        last.moved_tree = Some(tree);
    }
    Ok(Some(decided))
}

/// What a peer's word of a move comes to on this node.
#[derive(Clone, Debug)]
pub enum Expansion {
    /// All its rows were taken before.
    Known,
    /// These are its rows, in their order.
    Rows(Vec<Arrived>),
    /// The rows before the move are others here: the peer must send those after
    /// it.
    Unlike,
}

/// The rows of which a peer has sent only the last, `row` at `from`. `taken` are
/// the moves that the index has.
pub fn expand<R: Rows>(
    rows: &R,
    taken: &[Moved],
    from: &RelPath,
    row: &Row,
    tree: &TreeMove,
) -> Result<Expansion, R::Error> {
    let stamp = row.version.stamp;
    if taken
        .iter()
        .any(|moved| moved.from == *from && moved.stamp == stamp && moved.tree == *tree)
    {
        return Ok(Expansion::Known);
    }
    let Some(parts) = survey(&Overlay::new(rows), from, &tree.to)? else {
        return Ok(Expansion::Unlike);
    };
    if parts.len() != tree.count as usize || digest(from, &parts) != tree.digest {
        return Ok(Expansion::Unlike);
    }
    let Some(first) = counter(row, stamp.replica).checked_sub(tree.span()) else {
        return Ok(Expansion::Unlike);
    };
    let mut arrived: Vec<Arrived> = make(parts, first, stamp, row.origin.as_ref())
        .into_iter()
        .map(|made| Arrived {
            path: made.path,
            row: made.row,
            moved_from: made.moved_from,
            moved_tree: None,
        })
        .collect();
    match arrived.last_mut() {
        Some(last) if last.row == *row => last.moved_tree = Some(tree.clone()),
        _ => return Ok(Expansion::Unlike),
    }
    Ok(Expansion::Rows(arrived))
}

/// The number that the author gave to a row.
fn counter(row: &Row, author: ReplicaId) -> u64 {
    row.version.vector.get(author)
}

/// The moves among `decided` whose rows are all `done`, with their last numbers:
/// they can travel on as moves.
pub fn whole_moves(decided: &[Decided], done: &dyn Fn(&RelPath) -> bool) -> Vec<(u64, Moved)> {
    if decided.iter().all(|one| one.moved_tree.is_none()) {
        return Vec::new();
    }
    // A path may have two rows in one pass; both have their numbers.
    let mut numbers: Vec<u64> = decided
        .iter()
        .filter(|one| done(&one.path))
        .map(|one| one.seq)
        .collect();
    numbers.sort_unstable();
    let upto = |seq: u64| numbers.partition_point(|number| *number <= seq) as u64;
    let mut whole = Vec::new();
    for one in decided {
        let Some(tree) = &one.moved_tree else { continue };
        let Some(first) = one.seq.checked_sub(tree.span()) else {
            continue;
        };
        if upto(one.seq) - upto(first.saturating_sub(1)) == tree.span() + 1 {
            let moved = Moved {
                from: one.path.clone(),
                stamp: one.row.version.stamp,
                tree: tree.clone(),
            };
            whole.push((one.seq, moved));
        }
    }
    whole
}
