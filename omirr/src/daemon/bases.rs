//! What a content that must be fetched can be built upon.
//!
//! In: a peer's row. Out: the files of this node that most likely have part of
//! its content, wherever in the share they lie. Nothing is read here; whether
//! they have it, the transfer tells.

use crate::index::{IndexError, Reader};
use crate::model::{RelPath, Sketch};
use crate::wire::WireRow;

/// A file elsewhere is read to save its transfer if its sketch has so many values
/// in common with what is wanted: about as many eighths of it are the same.
const ALIKE_MIN: usize = 2;

/// Files of this node that a row's content is to be made from, as far as they
/// have it.
pub(super) fn bases(reader: &Reader, row: &WireRow) -> Result<Vec<RelPath>, IndexError> {
    let mut bases = Vec::new();
    let mut in_common = 0;
    // A conflict copy is most like what it was kept from.
    for path in [Some(&row.path), row.moved_from.as_ref()].into_iter().flatten() {
        let record = reader.get(path)?;
        let content = record.as_ref().and_then(|record| record.row.live()?.content());
        if let Some((_, hash)) = content {
            in_common = reader.sketch_of(&hash)?.in_common(&row.sketch);
            bases.push(path.clone());
            break;
        }
    }
    let (_, hash) = row.row.entry.content().unzip();
    let same = hash.map(|hash| reader.with_content(&hash)).transpose()?.flatten();
    let alike = match same {
        // It could not be copied, but most of it may still be there.
        Some(same) => Some((same, Sketch::VALUES_MAX)),
        None => reader.most_alike(&row.sketch)?,
    };
    if let Some((path, _)) = alike.filter(|(_, count)| *count >= ALIKE_MIN.max(in_common + 1))
        && !bases.contains(&path)
    {
        bases.push(path);
    }
    Ok(bases)
}
