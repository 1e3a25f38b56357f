//! Reading the index, in a snapshot.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use redb::{ReadOnlyMultimapTable, ReadOnlyTable, ReadTransaction, ReadableMultimapTable, ReadableTable};

use super::{
    ALIKE, CONTENTS, GROUPS, INODES, INTENTS, IndexError, LEAVES, META, MOVES, Meta, NAMES, ROWS, SEQS,
    SKETCHES, storage,
};
use crate::content::Leaves;
use crate::model::{Hash, LinkGroup, Moved, Record, RelPath, Row, Sketch};

/// So many contents are looked at that have a value of a sketch.
const ALIKE_ASKED: usize = 64;

/// A snapshot of the index. Long-lived ones keep old pages from being reused:
/// take one, use it, drop it.
pub struct Reader {
    path: PathBuf,
    rows: ReadOnlyTable<&'static [u8], &'static [u8]>,
    /// The other tables are opened when they are asked: that takes as long as some
    /// look-ups, and most snapshots are taken for one change.
    txn: Arc<ReadTransaction>,
    seqs: OnceLock<ReadOnlyTable<u64, &'static [u8]>>,
    inodes: OnceLock<ReadOnlyTable<u64, &'static [u8]>>,
    names: OnceLock<ReadOnlyMultimapTable<u64, &'static [u8]>>,
    groups: OnceLock<ReadOnlyMultimapTable<u64, &'static [u8]>>,
    contents: OnceLock<ReadOnlyMultimapTable<&'static [u8], &'static [u8]>>,
    sketches: OnceLock<ReadOnlyTable<&'static [u8], &'static [u8]>>,
    alike: OnceLock<ReadOnlyMultimapTable<u64, &'static [u8]>>,
    moves: OnceLock<ReadOnlyTable<u64, &'static [u8]>>,
    leaves: OnceLock<ReadOnlyTable<&'static [u8], &'static [u8]>>,
}

/// Rows that are passed by on the way to a name's, what lies in the directory before it
/// say, before that is sought anew.
const STEPS_MAX: u32 = 6;

/// Decodes a record that this index wrote.
pub(super) fn decode<T: serde::de::DeserializeOwned>(index: &Path, bytes: &[u8]) -> Result<T, IndexError> {
    crate::wire::codec::from_bytes(bytes).map_err(|what| IndexError::Corrupt {
        path: index.to_owned(),
        what: what.to_string(),
    })
}

/// A path as a table holds it.
fn decode_path(index: &Path, bytes: &[u8]) -> Result<RelPath, IndexError> {
    RelPath::new(bytes).map_err(|why| IndexError::Corrupt {
        path: index.to_owned(),
        what: why.to_string(),
    })
}

/// Looks `path` up in any rows table.
pub(super) fn get(
    index: &Path,
    rows: &impl ReadableTable<&'static [u8], &'static [u8]>,
    path: &RelPath,
) -> Result<Option<Record>, IndexError> {
    match rows.get(path.as_bytes()).map_err(|error| storage(index, error))? {
        Some(bytes) => decode(index, bytes.value()).map(Some),
        None => Ok(None),
    }
}

/// Looks the paths under a number up in any table of names or groups.
fn paths(
    index: &Path,
    table: &impl ReadableMultimapTable<u64, &'static [u8]>,
    number: u64,
) -> Result<Vec<RelPath>, IndexError> {
    let paths = table.get(number).map_err(|error| storage(index, error))?;
    paths
        .map(|bytes| decode_path(index, bytes.map_err(|error| storage(index, error))?.value()))
        .collect()
}

impl Reader {
    pub(super) fn new(path: PathBuf, txn: Arc<ReadTransaction>) -> Result<Reader, IndexError> {
        Ok(Reader {
            rows: txn.open_table(ROWS).map_err(|error| storage(&path, error))?,
            txn,
            seqs: OnceLock::new(),
            inodes: OnceLock::new(),
            names: OnceLock::new(),
            groups: OnceLock::new(),
            contents: OnceLock::new(),
            sketches: OnceLock::new(),
            alike: OnceLock::new(),
            moves: OnceLock::new(),
            leaves: OnceLock::new(),
            path,
        })
    }

    /// A table of this snapshot, opened if it is asked for the first time.
    fn opened<'t, T>(
        &self,
        place: &'t OnceLock<T>,
        open: impl FnOnce(&ReadTransaction) -> Result<T, redb::TableError>,
    ) -> Result<&'t T, IndexError> {
        if let Some(table) = place.get() {
            return Ok(table);
        }
        let table = open(&self.txn).map_err(|error| storage(&self.path, error))?;
        Ok(place.get_or_init(|| table))
    }

    /// How many live rows the snapshot has, the root's included.
    pub fn live(&self) -> Result<u64, IndexError> {
        Ok(self.meta()?.live)
    }

    /// The snapshot's highest sequence number.
    pub fn head(&self) -> Result<u64, IndexError> {
        Ok(self.meta()?.head)
    }

    fn meta(&self) -> Result<Meta, IndexError> {
        let corrupt = || IndexError::Corrupt {
            path: self.path.clone(),
            what: "its figures are missing".to_owned(),
        };
        let meta = self.txn.open_table(META);
        let meta = meta.map_err(|error| storage(&self.path, error))?;
        let bytes = meta.get("").map_err(|error| storage(&self.path, error))?;
        let bytes = bytes.ok_or_else(corrupt)?;
        // After the number of the format.
        decode(&self.path, bytes.value().get(4..).ok_or_else(corrupt)?)
    }

    pub fn get(&self, path: &RelPath) -> Result<Option<Record>, IndexError> {
        get(&self.path, &self.rows, path)
    }

    /// Looks up the paths of all `items`, which lie in `dir` and are in the order of
    /// their names, and tells `found` what is there. Most lie side by side in the table,
    /// and not each needs a descent from its root.
    pub fn get_each<T>(
        &self,
        dir: &RelPath,
        items: &mut [T],
        name: impl Fn(&T) -> &[u8],
        mut found: impl FnMut(&mut T, Option<Record>),
    ) -> Result<(), IndexError> {
        let fail = |error| storage(&self.path, error);
        let mut key = dir.as_bytes().to_vec();
        if !dir.is_root() {
            key.push(b'/');
        }
        let names_at = key.len();
        let mut cursor = None;
        for item in items {
            key.truncate(names_at);
            key.extend_from_slice(name(item));
            let mut steps = 0;
            let record = loop {
                let at = match &mut cursor {
                    Some(at) if steps < STEPS_MAX => at,
                    _ => {
                        steps = 0;
                        let sought = self.rows.lower_bound(Bound::Included(&key[..]));
                        cursor.insert(sought.map_err(fail)?)
                    }
                };
                let Some((next, bytes)) = at.peek_next().map_err(fail)? else {
                    break None;
                };
                match next.value().cmp(&key) {
                    Ordering::Less => {
                        at.next().map_err(fail)?;
                        steps += 1;
                    }
                    Ordering::Equal => break Some(decode(&self.path, bytes.value())?),
                    Ordering::Greater => break None,
                }
            };
            found(item, record);
        }
        Ok(())
    }

    /// A live path with this content, if that is large.
    pub fn with_content(&self, hash: &Hash) -> Result<Option<RelPath>, IndexError> {
        let fail = |error| storage(&self.path, error);
        let contents = self.opened(&self.contents, |txn| txn.open_multimap_table(CONTENTS))?;
        let mut paths = contents.get(&hash.0[..]).map_err(fail)?;
        match paths.next() {
            Some(path) => decode_path(&self.path, path.map_err(fail)?.value()).map(Some),
            None => Ok(None),
        }
    }

    /// What a large content is like; empty if that is not known.
    pub fn sketch_of(&self, hash: &Hash) -> Result<Sketch, IndexError> {
        let bytes = self
            .opened(&self.sketches, |txn| txn.open_table(SKETCHES))?
            .get(&hash.0[..]);
        match bytes.map_err(|error| storage(&self.path, error))? {
            Some(bytes) => decode(&self.path, bytes.value()),
            None => Ok(Sketch::default()),
        }
    }

    /// The hashes of the leaves of a large content that is here or was a short
    /// while ago, if they are known.
    pub fn leaves_of(&self, hash: &Hash) -> Result<Option<Leaves>, IndexError> {
        let bytes = self
            .opened(&self.leaves, |txn| txn.open_table(LEAVES))?
            .get(&hash.0[..]);
        let bytes = bytes.map_err(|error| storage(&self.path, error))?;
        // A damaged list is as good as none.
        Ok(bytes.and_then(|bytes| Leaves::from_bytes(bytes.value(), hash)))
    }

    /// The live path whose content is most like a sketch, and how many values
    /// they have in common.
    pub fn most_alike(&self, sketch: &Sketch) -> Result<Option<(RelPath, usize)>, IndexError> {
        let fail = |error| storage(&self.path, error);
        let alike = self.opened(&self.alike, |txn| txn.open_multimap_table(ALIKE))?;
        let mut counts: BTreeMap<[u8; 32], usize> = BTreeMap::new();
        for value in sketch.values() {
            // What very many have in common tells nothing.
            for hash in alike.get(*value).map_err(fail)?.take(ALIKE_ASKED) {
                if let Ok(hash) = hash.map_err(fail)?.value().try_into() {
                    *counts.entry(hash).or_default() += 1;
                }
            }
        }
        let Some((hash, count)) = counts.into_iter().max_by_key(|(_, count)| *count) else {
            return Ok(None);
        };
        Ok(self.with_content(&Hash(hash))?.map(|path| (path, count)))
    }

    /// Everything strictly beneath `path`, tombstones included, in path order.
    pub fn beneath(
        &self,
        path: &RelPath,
    ) -> Result<impl Iterator<Item = Result<(RelPath, Record), IndexError>> + '_, IndexError> {
        let (start, end) = path.beneath_range();
        let range = match &end {
            Some(end) => self.rows.range::<&[u8]>(&start[..]..&end[..]),
            None => self.rows.range::<&[u8]>(&start[..]..),
        }
        .map_err(|error| storage(&self.path, error))?;
        Ok(range.map(|pair| {
            let (key, value) = pair.map_err(|error| storage(&self.path, error))?;
            Ok((
                decode_path(&self.path, key.value())?,
                decode(&self.path, value.value())?,
            ))
        }))
    }

    /// The live entries directly in a directory, in path order. What is beneath
    /// them is skipped, not read.
    pub fn children(&self, dir: &RelPath) -> Result<Vec<(RelPath, Record)>, IndexError> {
        let (mut start, end) = dir.beneath_range();
        let mut found = Vec::new();
        'next: loop {
            let range = match &end {
                Some(end) => self.rows.range::<&[u8]>(&start[..]..&end[..]),
                None => self.rows.range::<&[u8]>(&start[..]..),
            }
            .map_err(|error| storage(&self.path, error))?;
            for pair in range {
                let (key, value) = pair.map_err(|error| storage(&self.path, error))?;
                let path = decode_path(&self.path, key.value())?;
                if path.depth() > dir.depth() + 1 {
                    let child = path.ancestor(dir.depth() + 1);
                    match child.beneath_range().1 {
                        Some(after) => start = after,
                        None => return Ok(found),
                    }
                    continue 'next;
                }
                let record: Record = decode(&self.path, value.value())?;
                if !record.row.deleted {
                    found.push((path, record));
                }
            }
            return Ok(found);
        }
    }

    /// The live rows at the paths that `wanted` takes, in path order. Rows at
    /// other paths are not decoded.
    pub fn live_where(
        &self,
        wanted: impl Fn(&RelPath) -> bool,
    ) -> Result<impl Iterator<Item = Result<(RelPath, Record), IndexError>>, IndexError> {
        let all = self.rows.iter().map_err(|error| storage(&self.path, error))?;
        Ok(all.filter_map(move |pair| {
            let row = pair
                .map_err(|error| storage(&self.path, error))
                .and_then(|(key, value)| {
                    let path = decode_path(&self.path, key.value())?;
                    if !wanted(&path) {
                        return Ok(None);
                    }
                    let record: Record = decode(&self.path, value.value())?;
                    Ok((!record.row.deleted).then_some((path, record)))
                });
            row.transpose()
        }))
    }

    /// The names in a directory that begin with `beginning` and are live, in
    /// order, of the first `limit` rows that begin so.
    pub fn names_beginning(
        &self,
        dir: &RelPath,
        beginning: &[u8],
        limit: usize,
    ) -> Result<Vec<Vec<u8>>, IndexError> {
        let Ok(first) = dir.join(beginning) else {
            return Ok(Vec::new());
        };
        let range = self
            .rows
            .range::<&[u8]>(first.as_bytes()..)
            .map_err(|error| storage(&self.path, error))?;
        let mut found = Vec::new();
        for pair in range.take(limit) {
            let (key, value) = pair.map_err(|error| storage(&self.path, error))?;
            if !key.value().starts_with(first.as_bytes()) {
                break;
            }
            let path = decode_path(&self.path, key.value())?;
            if path.depth() == first.depth() && !decode::<Record>(&self.path, value.value())?.row.deleted {
                found.push(path.name().to_vec());
            }
        }
        Ok(found)
    }

    pub fn has_live_beneath(&self, path: &RelPath) -> Result<bool, IndexError> {
        for pair in self.beneath(path)? {
            if !pair?.1.row.deleted {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The rows whose sequence is after `seq`, in sequence order, at most
    /// `limit` of them.
    pub fn rows_after(&self, seq: u64, limit: usize) -> Result<Vec<(u64, RelPath, Record)>, IndexError> {
        if seq == u64::MAX {
            return Ok(Vec::new());
        }
        let range = self
            .opened(&self.seqs, |txn| txn.open_table(SEQS))?
            .range(seq + 1..)
            .map_err(|error| storage(&self.path, error))?;
        let mut found = Vec::new();
        for pair in range.take(limit) {
            let (key, value) = pair.map_err(|error| storage(&self.path, error))?;
            let path = decode_path(&self.path, value.value())?;
            let record = self.get(&path)?.ok_or_else(|| IndexError::Corrupt {
                path: self.path.clone(),
                what: format!("sequence {} leads to {path}, which has no row", key.value()),
            })?;
            found.push((key.value(), path, record));
        }
        Ok(found)
    }

    /// How many rows are after `seq`; counting stops at `limit`.
    pub fn count_after(&self, seq: u64, limit: usize) -> Result<u64, IndexError> {
        if seq == u64::MAX {
            return Ok(0);
        }
        let range = self
            .opened(&self.seqs, |txn| txn.open_table(SEQS))?
            .range(seq + 1..)
            .map_err(|error| storage(&self.path, error))?;
        Ok(range.take(limit).count() as u64)
    }

    /// A path of the inode, as last seen.
    pub fn path_of_ino(&self, ino: u64) -> Result<Option<RelPath>, IndexError> {
        let inodes = self.opened(&self.inodes, |txn| txn.open_table(INODES))?;
        match inodes.get(ino).map_err(|error| storage(&self.path, error))? {
            Some(bytes) => decode_path(&self.path, bytes.value()).map(Some),
            None => Ok(None),
        }
    }

    /// All paths of the inode, as last seen.
    pub fn paths_of_ino(&self, ino: u64) -> Result<Vec<RelPath>, IndexError> {
        let mut found = paths(
            &self.path,
            self.opened(&self.names, |txn| txn.open_multimap_table(NAMES))?,
            ino,
        )?;
        let last = self.path_of_ino(ino)?;
        found.extend(last.filter(|last| !found.contains(last)));
        Ok(found)
    }

    /// The live paths of a hard-link group.
    pub fn group(&self, group: LinkGroup) -> Result<Vec<RelPath>, IndexError> {
        paths(
            &self.path,
            self.opened(&self.groups, |txn| txn.open_multimap_table(GROUPS))?,
            group.0,
        )
    }

    /// The directories' moves that are kept, in the order of their numbers.
    pub fn moves(&self) -> Result<Vec<Moved>, IndexError> {
        let all = self
            .opened(&self.moves, |txn| txn.open_table(MOVES))?
            .iter()
            .map_err(|error| storage(&self.path, error))?;
        all.map(|pair| {
            let (_, value) = pair.map_err(|error| storage(&self.path, error))?;
            decode(&self.path, value.value())
        })
        .collect()
    }

    /// The move among whose rows' numbers `seq` is, and the last of these numbers.
    pub fn move_over(&self, seq: u64) -> Result<Option<(u64, Moved)>, IndexError> {
        let mut next = self
            .opened(&self.moves, |txn| txn.open_table(MOVES))?
            .range(seq..)
            .map_err(|error| storage(&self.path, error))?;
        let Some(pair) = next.next() else { return Ok(None) };
        let (last, value) = pair.map_err(|error| storage(&self.path, error))?;
        let (last, moved) = (last.value(), decode::<Moved>(&self.path, value.value())?);
        let over = last.saturating_sub(moved.tree.span()) <= seq;
        Ok(over.then_some((last, moved)))
    }

    /// The rows that were being applied, if the last run ended meanwhile.
    pub fn intents(&self) -> Result<Vec<(RelPath, Row)>, IndexError> {
        let intents = self.txn.open_table(INTENTS);
        let intents = intents.map_err(|error| storage(&self.path, error))?;
        let all = intents.iter().map_err(|error| storage(&self.path, error))?;
        all.map(|pair| {
            let (key, value) = pair.map_err(|error| storage(&self.path, error))?;
            Ok((
                decode_path(&self.path, key.value())?,
                decode(&self.path, value.value())?,
            ))
        })
        .collect()
    }
}
