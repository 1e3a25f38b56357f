//! Writing the index, in transactions.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use redb::{
    Database, MultimapTable, ReadableMultimapTable, ReadableTable, ReadableTableMetadata, Table,
    WriteTransaction,
};
use rustc_hash::FxHashSet;
use serde::Serialize;

use super::runs::insert_in_order;
use super::{
    ALIKE, COMPARING, CONTENTS, FORMAT, FORMER, FORMER_KEPT, GAPS, GROUPS, HOME, Home, INODES, INTENTS,
    IndexError, LARGE_BYTES, LEAVES, META, MOVES, MOVES_KEPT, Meta, NAMES, PeerState, ROWS, SEQS, SKETCHES,
};
use super::{read, storage};
use crate::content::Leaves;
use crate::engine::is_conflict_path;
use crate::model::{Entry, Flags, Gap, Hash, Here, Moved, Record, RelPath, ReplicaId, Row, Sketch, StatSig};

/// Whether a commit must survive a crash before `write` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    Yes,
    /// A later durable commit makes it so; a crash before undoes it.
    Later,
}

/// The tables in a transaction; sees what it has itself written.
pub struct Writer<'txn> {
    path: PathBuf,
    meta: Meta,
    /// To be written with `meta`.
    home: Option<Home>,
    gaps: Option<Vec<Gap>>,
    comparing: Option<bool>,
    /// Rows of paths that had none, which go into the tables together.
    fresh: BTreeMap<RelPath, Fresh>,
    /// Their inodes, each with the path that was put last.
    fresh_inodes: BTreeMap<u64, RelPath>,
    /// What their keys and values take.
    fresh_bytes: usize,
    rows: Table<'txn, &'static [u8], &'static [u8]>,
    seqs: Table<'txn, u64, &'static [u8]>,
    inodes: Table<'txn, u64, &'static [u8]>,
    intents: Table<'txn, &'static [u8], &'static [u8]>,
    /// Large contents that a path has no more; perhaps none has.
    left: BTreeSet<Hash>,
    names: Seldom<'txn, MultimapTable<'txn, u64, &'static [u8]>>,
    groups: Seldom<'txn, MultimapTable<'txn, u64, &'static [u8]>>,
    contents: Seldom<'txn, MultimapTable<'txn, &'static [u8], &'static [u8]>>,
    sketches: Seldom<'txn, Table<'txn, &'static [u8], &'static [u8]>>,
    alike: Seldom<'txn, MultimapTable<'txn, u64, &'static [u8]>>,
    moves: Seldom<'txn, Table<'txn, u64, &'static [u8]>>,
    leaves: Seldom<'txn, Table<'txn, &'static [u8], &'static [u8]>>,
    former: Seldom<'txn, Table<'txn, u64, &'static [u8]>>,
}

/// So many rows go into the tables together,
const FRESH_MAX: usize = 4096;
/// or so many bytes: the rows of some files have attributes of 64 KiB and more.
const FRESH_BYTES_MAX: usize = 4 << 20;

/// A row that is not yet in the tables.
struct Fresh {
    seq: u64,
    /// The record, encoded.
    bytes: Vec<u8>,
}

/// A table that few transactions need: opened when it is asked for, since opening
/// takes longer than what is done to most rows.
struct Seldom<'txn, T> {
    txn: &'txn WriteTransaction,
    open: fn(&'txn WriteTransaction) -> Result<T, redb::TableError>,
    table: OnceCell<T>,
}

impl<'txn, T> Seldom<'txn, T> {
    fn new(
        txn: &'txn WriteTransaction,
        open: fn(&'txn WriteTransaction) -> Result<T, redb::TableError>,
    ) -> Seldom<'txn, T> {
        Seldom {
            txn,
            open,
            table: OnceCell::new(),
        }
    }

    fn get(&self, index: &Path) -> Result<&T, IndexError> {
        if let Some(table) = self.table.get() {
            return Ok(table);
        }
        let table = (self.open)(self.txn).map_err(|error| storage(index, error))?;
        Ok(self.table.get_or_init(|| table))
    }

    fn get_mut(&mut self, index: &Path) -> Result<&mut T, IndexError> {
        self.get(index)?;
        Ok(self.table.get_mut().expect("it was opened"))
    }
}

pub(super) fn transaction<T>(
    path: &Path,
    db: &Database,
    meta: Meta,
    work: impl FnOnce(&mut Writer<'_>) -> Result<(T, Durable), IndexError>,
) -> Result<(T, Durable, Meta), IndexError> {
    let path = path.to_owned();
    let mut txn = db.begin_write().map_err(|error| storage(&path, error))?;
    let (result, durable, meta) = {
        let mut writer = Writer {
            rows: txn.open_table(ROWS).map_err(|error| storage(&path, error))?,
            seqs: txn.open_table(SEQS).map_err(|error| storage(&path, error))?,
            inodes: txn.open_table(INODES).map_err(|error| storage(&path, error))?,
            intents: txn.open_table(INTENTS).map_err(|error| storage(&path, error))?,
            fresh: BTreeMap::new(),
            fresh_inodes: BTreeMap::new(),
            fresh_bytes: 0,
            left: BTreeSet::new(),
            names: Seldom::new(&txn, |txn| txn.open_multimap_table(NAMES)),
            groups: Seldom::new(&txn, |txn| txn.open_multimap_table(GROUPS)),
            contents: Seldom::new(&txn, |txn| txn.open_multimap_table(CONTENTS)),
            sketches: Seldom::new(&txn, |txn| txn.open_table(SKETCHES)),
            alike: Seldom::new(&txn, |txn| txn.open_multimap_table(ALIKE)),
            moves: Seldom::new(&txn, |txn| txn.open_table(MOVES)),
            leaves: Seldom::new(&txn, |txn| txn.open_table(LEAVES)),
            former: Seldom::new(&txn, |txn| txn.open_table(FORMER)),
            meta,
            home: None,
            gaps: None,
            comparing: None,
            path: path.clone(),
        };
        let (result, durable) = work(&mut writer)?;
        writer.write_fresh()?;
        writer.forget_sketches()?;
        let mut bytes = FORMAT.to_le_bytes().to_vec();
        bytes.extend(encode(&writer.meta));
        let mut table = txn.open_table(META).map_err(|error| storage(&path, error))?;
        table
            .insert("", &bytes[..])
            .map_err(|error| storage(&path, error))?;
        if let Some(home) = &writer.home {
            table
                .insert(HOME, &encode(home)[..])
                .map_err(|error| storage(&path, error))?;
        }
        if let Some(gaps) = &writer.gaps {
            table
                .insert(GAPS, &encode(gaps)[..])
                .map_err(|error| storage(&path, error))?;
        }
        match writer.comparing {
            Some(true) => drop(
                table
                    .insert(COMPARING, &[][..])
                    .map_err(|error| storage(&path, error))?,
            ),
            Some(false) => drop(table.remove(COMPARING).map_err(|error| storage(&path, error))?),
            None => {}
        }
        (result, durable, writer.meta)
    };
    if durable == Durable::Later {
        txn.set_durability(redb::Durability::None)
            .map_err(|error| storage(&path, error))?;
    }
    txn.commit().map_err(|error| storage(&path, error))?;
    Ok((result, durable, meta))
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    crate::wire::codec::to_bytes(value).expect("records have no types that cannot be encoded")
}

/// The hash of a record's content, if that is live and large.
fn large_content(record: &Record) -> Option<Hash> {
    let (size, hash) = record.row.live()?.content()?;
    (size > LARGE_BYTES).then_some(hash)
}

/// The inode of a record, if that had other names when it was last seen.
fn with_other_names(record: &Record) -> Option<u64> {
    let sig = record.sig.filter(|sig| sig.nlink > 1)?;
    record.row.live().filter(|entry| !entry.is_dir()).map(|_| sig.ino)
}

impl Writer<'_> {
    pub fn meta(&mut self) -> &mut Meta {
        &mut self.meta
    }

    /// From now on the index is at home here.
    pub fn set_home(&mut self, home: Home) {
        self.home = Some(home);
    }

    /// These numbers have been left out.
    pub fn set_gaps(&mut self, gaps: Vec<Gap>) {
        self.gaps = Some(gaps);
    }

    /// The first comparison with the tree begins, or has ended: everything that it
    /// found is in the index.
    pub fn set_comparing(&mut self, comparing: bool) {
        self.comparing = Some(comparing);
    }

    /// The next local sequence number, from now on in use.
    pub fn next_seq(&mut self) -> u64 {
        self.meta.head += 1;
        self.meta.head
    }

    pub fn get(&self, path: &RelPath) -> Result<Option<Record>, IndexError> {
        match self.fresh.get(path) {
            Some(row) => read::decode(&self.path, &row.bytes).map(Some),
            None => read::get(&self.path, &self.rows, path),
        }
    }

    /// Puts the rows of new paths into the tables.
    fn write_fresh(&mut self) -> Result<(), IndexError> {
        if self.fresh.is_empty() {
            return Ok(());
        }
        let fresh = std::mem::take(&mut self.fresh);
        let fresh_inodes = std::mem::take(&mut self.fresh_inodes);
        self.fresh_bytes = 0;
        let rows: Vec<_> = fresh
            .iter()
            .map(|(path, row)| (path.as_bytes(), &row.bytes))
            .collect();
        let mut seqs: Vec<_> = fresh
            .iter()
            .map(|(path, row)| (row.seq, path.as_bytes()))
            .collect();
        seqs.sort_unstable();
        let inodes: Vec<_> = fresh_inodes
            .iter()
            .map(|(ino, path)| (*ino, path.as_bytes()))
            .collect();
        insert_in_order(&mut self.rows, &rows)
            .and_then(|()| insert_in_order(&mut self.seqs, &seqs))
            .and_then(|()| insert_in_order(&mut self.inodes, &inodes))
            .map_err(|error| storage(&self.path, error))
    }

    /// Puts `record` in the place of the path's former one, in both orders.
    pub fn put(&mut self, path: &RelPath, record: &Record) -> Result<(), IndexError> {
        let old = self.get(path)?;
        self.put_over(old.as_ref(), path, record)
    }

    /// The same where the former one, `old`, has just been asked for.
    pub fn put_over(
        &mut self,
        old: Option<&Record>,
        path: &RelPath,
        record: &Record,
    ) -> Result<(), IndexError> {
        let index = self.path.clone();
        let fail = |error: redb::StorageError| storage(&index, error);
        let key = path.as_bytes();
        if self.fresh.len() >= FRESH_MAX
            || self.fresh_bytes >= FRESH_BYTES_MAX
            || self.fresh.contains_key(path)
        {
            self.write_fresh()?;
        }
        for (record, came) in old.map(|old| (old, false)).into_iter().chain([(record, true)]) {
            self.count(record, came);
        }
        if let Some(old) = old {
            if old.seq != record.seq {
                self.seqs.remove(old.seq).map_err(fail)?;
            }
            match old.row.deleted {
                true => self.meta.tombstones -= 1,
                false => {
                    self.meta.live -= 1;
                    self.meta.conflicts -= u64::from(is_conflict_path(path));
                }
            }
            let group = old.row.live().and_then(|entry| entry.link);
            if let Some(group) = group.filter(|&group| record.row.live().and_then(|e| e.link) != Some(group))
            {
                self.groups.get_mut(&index)?.remove(group.0, key).map_err(fail)?;
            }
            let ino = old.sig.map(|sig| sig.ino);
            if let Some(ino) = ino.filter(|&ino| record.sig.map(|sig| sig.ino) != Some(ino)) {
                let here = self
                    .inodes
                    .get(ino)
                    .map_err(fail)?
                    .is_some_and(|bytes| bytes.value() == key);
                if here {
                    self.inodes.remove(ino).map_err(fail)?;
                }
            }
        }
        match record.row.deleted {
            true => self.meta.tombstones += 1,
            false => {
                self.meta.live += 1;
                self.meta.conflicts += u64::from(is_conflict_path(path));
            }
        }
        if let Some(group) = record.row.live().and_then(|entry| entry.link) {
            self.groups.get_mut(&index)?.insert(group.0, key).map_err(fail)?;
        }
        let (was, is) = (old.and_then(with_other_names), with_other_names(record));
        if let Some(ino) = was.filter(|_| was != is) {
            self.names.get_mut(&index)?.remove(ino, key).map_err(fail)?;
        }
        if let Some(ino) = is.filter(|_| was != is) {
            self.names.get_mut(&index)?.insert(ino, key).map_err(fail)?;
        }
        let (was, is) = (old.and_then(large_content), large_content(record));
        if let Some(hash) = was.filter(|_| was != is) {
            self.contents
                .get_mut(&index)?
                .remove(&hash.0[..], key)
                .map_err(fail)?;
            self.left.insert(hash);
        }
        if let Some(hash) = is.filter(|_| was != is) {
            self.contents
                .get_mut(&index)?
                .insert(&hash.0[..], key)
                .map_err(fail)?;
        }
        self.meta.head = self.meta.head.max(record.seq);
        self.meta.stamp = self.meta.stamp.max(record.row.version.stamp);
        let Some(old) = old else {
            if let Some(sig) = record.sig {
                self.fresh_inodes.insert(sig.ino, path.clone());
            }
            let (seq, bytes) = (record.seq, encode(record));
            self.fresh_bytes += key.len() + bytes.len();
            self.fresh.insert(path.clone(), Fresh { seq, bytes });
            return Ok(());
        };
        if old.seq != record.seq {
            self.seqs.insert(record.seq, key).map_err(fail)?;
        }
        let old_ino = old.sig.map(|sig| sig.ino);
        if let Some(sig) = record.sig.filter(|sig| old_ino != Some(sig.ino)) {
            self.fresh_inodes.remove(&sig.ino);
            self.inodes.insert(sig.ino, key).map_err(fail)?;
        }
        self.rows.insert(key, &encode(record)[..]).map_err(fail)?;
        Ok(())
    }

    /// Notes what the content of `entry` is like, if a path has it. An empty
    /// sketch says nothing.
    pub fn put_sketch(&mut self, entry: &Entry, sketch: &Sketch) -> Result<(), IndexError> {
        let index = self.path.clone();
        let fail = |error: redb::StorageError| storage(&index, error);
        let Some((_, hash)) = entry.content().filter(|_| !sketch.is_empty()) else {
            return Ok(());
        };
        let key = &hash.0[..];
        let nobody_has_it = self.contents.get(&index)?.get(key).map_err(fail)?.is_empty();
        if nobody_has_it || self.sketches.get(&index)?.get(key).map_err(fail)?.is_some() {
            return Ok(());
        }
        self.sketches
            .get_mut(&index)?
            .insert(key, &encode(sketch)[..])
            .map_err(fail)?;
        for value in sketch.values() {
            self.alike.get_mut(&index)?.insert(*value, key).map_err(fail)?;
        }
        Ok(())
    }

    /// Notes the hashes of the leaves of the content of `entry`, if a path has it.
    pub fn put_leaves(&mut self, entry: &Entry, leaves: Option<&Leaves>) -> Result<(), IndexError> {
        let index = self.path.clone();
        let fail = |error: redb::StorageError| storage(&index, error);
        let (Some((_, hash)), Some(leaves)) = (entry.content(), leaves) else {
            return Ok(());
        };
        let key = &hash.0[..];
        let nobody_has_it = self.contents.get(&index)?.get(key).map_err(fail)?.is_empty();
        if !nobody_has_it && self.leaves.get(&index)?.get(key).map_err(fail)?.is_none() {
            self.leaves
                .get_mut(&index)?
                .insert(key, &leaves.to_bytes()[..])
                .map_err(fail)?;
        }
        Ok(())
    }

    /// Of a content that is nowhere any more: the list of its leaves is kept until
    /// as many others have gone.
    fn retire_leaves(&mut self, hash: &Hash) -> Result<(), IndexError> {
        let index = self.path.clone();
        let fail = |error: redb::StorageError| storage(&index, error);
        let key = &hash.0[..];
        if self.leaves.get(&index)?.get(key).map_err(fail)?.is_none() {
            return Ok(());
        }
        let last = self
            .former
            .get(&index)?
            .last()
            .map_err(fail)?
            .map_or(0, |(number, _)| number.value());
        self.former.get_mut(&index)?.insert(last + 1, key).map_err(fail)?;
        while self.former.get(&index)?.len().map_err(fail)? > FORMER_KEPT {
            let Some((_, oldest)) = self.former.get_mut(&index)?.pop_first().map_err(fail)? else {
                break;
            };
            // It may have come back.
            if self
                .contents
                .get(&index)?
                .get(oldest.value())
                .map_err(fail)?
                .is_empty()
            {
                self.leaves
                    .get_mut(&index)?
                    .remove(oldest.value())
                    .map_err(fail)?;
            }
        }
        Ok(())
    }

    /// Of contents that are nowhere any more.
    fn forget_sketches(&mut self) -> Result<(), IndexError> {
        let index = self.path.clone();
        let fail = |error: redb::StorageError| storage(&index, error);
        for hash in std::mem::take(&mut self.left) {
            let key = &hash.0[..];
            if !self.contents.get(&index)?.get(key).map_err(fail)?.is_empty() {
                continue;
            }
            self.retire_leaves(&hash)?;
            let known = match self.sketches.get_mut(&index)?.remove(key).map_err(fail)? {
                Some(bytes) => read::decode::<Sketch>(&index, bytes.value())?,
                None => continue,
            };
            for value in known.values() {
                self.alike.get_mut(&index)?.remove(*value, key).map_err(fail)?;
            }
        }
        Ok(())
    }

    /// Counts what is locked and what is lacking.
    fn count(&mut self, record: &Record, came: bool) {
        let Some(entry) = record.row.live() else { return };
        let add = |count: &mut u64| match came {
            true => *count += 1,
            false => *count = count.saturating_sub(1),
        };
        if !(entry.flags & Flags::LOCKS).is_empty() {
            add(&mut self.meta.locked);
        }
        for why in record.here.iter().flat_map(|here| &here.lacks) {
            let lacks = &mut self.meta.lacks;
            let place = lacks.iter().position(|(known, _)| known == why);
            let place = place.unwrap_or_else(|| {
                lacks.push((why.clone(), 0));
                lacks.len() - 1
            });
            add(&mut lacks[place].1);
            if lacks[place].1 == 0 {
                lacks.remove(place);
            }
        }
    }

    /// Notes what the disk has of a path's row, if that is live.
    pub fn set_here(&mut self, path: &RelPath, here: Option<Box<Here>>) -> Result<(), IndexError> {
        match self.get(path)? {
            Some(old) if !old.row.deleted && old.here != here => {
                self.put_over(Some(&old), path, &Record { here, ..old.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Notes what `stat` says of a path now, if it has a live row and says
    /// something else.
    pub fn set_sig(&mut self, path: &RelPath, sig: Option<StatSig>) -> Result<(), IndexError> {
        match self.get(path)? {
            Some(old) if !old.row.deleted && old.sig != sig => {
                self.put_over(Some(&old), path, &Record { sig, ..old.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Forgets a path altogether, as if nothing had ever been known of it: what is
    /// made there next need not win over what was.
    pub fn disown(&mut self, path: &RelPath) -> Result<(), IndexError> {
        let Some(mut old) = self.get(path)? else {
            return Ok(());
        };
        // By way of a tombstone, which takes it out of all other tables.
        old.row.deleted = true;
        old.sig = None;
        self.put(path, &old)?;
        self.take_out(path, &old)
    }

    /// Forgets a tombstone that every peer has.
    pub fn forget(&mut self, path: &RelPath) -> Result<(), IndexError> {
        let Some(old) = self.get(path)? else { return Ok(()) };
        assert!(old.row.deleted, "only tombstones are forgotten");
        self.meta.forgotten = self.meta.forgotten.max(Some(old.row.version.stamp));
        self.take_out(path, &old)
    }

    fn take_out(&mut self, path: &RelPath, old: &Record) -> Result<(), IndexError> {
        self.write_fresh()?;
        self.meta.tombstones -= 1;
        self.seqs
            .remove(old.seq)
            .map_err(|error| storage(&self.path, error))?;
        self.rows
            .remove(path.as_bytes())
            .map_err(|error| storage(&self.path, error))?;
        Ok(())
    }

    /// Remembers that these rows are about to be applied at these paths.
    pub fn intend<'r>(
        &mut self,
        rows: impl IntoIterator<Item = (&'r RelPath, &'r Row)>,
    ) -> Result<(), IndexError> {
        let mut intents: Vec<_> = rows
            .into_iter()
            .map(|(path, row)| (path.as_bytes(), encode(row)))
            .collect();
        // Of two for one path the later one counts.
        intents.sort_by_key(|(path, _)| *path);
        insert_in_order(&mut self.intents, &intents).map_err(|error| storage(&self.path, error))
    }

    /// Forgets what was about to be applied at these paths.
    pub fn settle<'p>(&mut self, paths: impl IntoIterator<Item = &'p RelPath>) -> Result<(), IndexError> {
        let settled: FxHashSet<&[u8]> = paths.into_iter().map(RelPath::as_bytes).collect();
        // Nearly always these are all that there are.
        self.intents
            .retain(|path, _| !settled.contains(path))
            .map_err(|error| storage(&self.path, error))
    }

    /// Remembers moves whose rows have just been put, by the last of their
    /// numbers, and forgets the oldest where there are too many.
    pub fn put_moves(&mut self, moves: Vec<(u64, Moved)>) -> Result<(), IndexError> {
        let index = self.path.clone();
        let fail = |error: redb::StorageError| storage(&index, error);
        if moves.is_empty() {
            return Ok(());
        }
        for (last, moved) in moves {
            self.moves
                .get_mut(&index)?
                .insert(last, &encode(&moved)[..])
                .map_err(fail)?;
        }
        while self.moves.get(&index)?.len().map_err(fail)? > MOVES_KEPT {
            self.moves.get_mut(&index)?.pop_first().map_err(fail)?;
        }
        Ok(())
    }

    /// The place of the peer with this key, made if it has none.
    pub fn peer_place(&mut self, key: &[u8; 32]) -> u32 {
        let place = self
            .meta
            .peers
            .iter()
            .position(|peer| peer.key == *key)
            .unwrap_or_else(|| {
                self.meta.peers.push(PeerState {
                    key: *key,
                    replica: ReplicaId(0),
                    cursor: 0,
                });
                self.meta.peers.len() - 1
            });
        u32::try_from(place).expect("a configuration has fewer than 2^32 peers")
    }
}
