//! The bytes of a batch's rows.
//!
//! In: rows, or the bytes of some. Out: the bytes, or the rows. One process
//! often makes many changes, so who made them is not in each row: a table comes
//! first, and a row has the place in it. What the fields may hold is for
//! `check` to say.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, Error};
use serde::ser::{Serialize, Serializer};

use super::WireRow;
use crate::model::{Entry, Origin, RelPath, Row, Sketch, TreeMove, Version};

/// A row as it is written.
#[derive(serde::Serialize)]
struct Written<'a> {
    seq: u64,
    path: &'a RelPath,
    entry: &'a Entry,
    deleted: bool,
    version: &'a Version,
    /// Whose place in the table it is, from 1; 0 if it is not known.
    origin: u32,
    moved_from: &'a Option<RelPath>,
    inline: &'a Option<Bytes>,
    moved_tree: &'a Option<TreeMove>,
    sketch: &'a Sketch,
}

/// A row as it is read: the same fields.
#[derive(serde::Deserialize)]
struct Read {
    seq: u64,
    path: RelPath,
    entry: Entry,
    deleted: bool,
    version: Version,
    origin: u32,
    moved_from: Option<RelPath>,
    inline: Option<Bytes>,
    moved_tree: Option<TreeMove>,
    sketch: Sketch,
}

/// Who made the changes of a batch, each once.
#[derive(Default)]
struct Table<'a> {
    origins: Vec<&'a Origin>,
    places: HashMap<&'a Origin, u32>,
}

impl<'a> Table<'a> {
    /// The origin's place, from 1.
    fn place(&mut self, origin: &'a Origin) -> u32 {
        let next = u32::try_from(self.origins.len()).unwrap_or(u32::MAX - 1) + 1;
        *self.places.entry(origin).or_insert_with(|| {
            self.origins.push(origin);
            next
        })
    }
}

pub(super) fn serialize<S: Serializer>(rows: &[WireRow], serializer: S) -> Result<S::Ok, S::Error> {
    let mut table = Table::default();
    let written: Vec<Written<'_>> = rows
        .iter()
        .map(|row| Written {
            seq: row.seq,
            path: &row.path,
            entry: &row.row.entry,
            deleted: row.row.deleted,
            version: &row.row.version,
            origin: row.row.origin.as_ref().map_or(0, |origin| table.place(origin)),
            moved_from: &row.moved_from,
            inline: &row.inline,
            moved_tree: &row.moved_tree,
            sketch: &row.sketch,
        })
        .collect();
    (table.origins, written).serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<WireRow>, D::Error> {
    let (table, read): (Vec<Arc<Origin>>, Vec<Read>) = Deserialize::deserialize(deserializer)?;
    if table.len() > read.len() {
        return Err(D::Error::custom(format!(
            "{} rows cannot have been made by {} processes",
            read.len(),
            table.len()
        )));
    }
    let whole = |row: Read| {
        let origin = match row.origin {
            0 => None,
            place => Some(Arc::clone(table.get(place as usize - 1).ok_or_else(|| {
                D::Error::custom(format!(
                    "the row of {} says that number {place} of {} processes made it",
                    row.path,
                    table.len()
                ))
            })?)),
        };
        Ok(WireRow {
            seq: row.seq,
            path: row.path,
            row: Row {
                entry: row.entry,
                deleted: row.deleted,
                version: row.version,
                origin,
            },
            moved_from: row.moved_from,
            inline: row.inline,
            moved_tree: row.moved_tree,
            sketch: row.sketch,
        })
    };
    read.into_iter().map(whole).collect()
}
