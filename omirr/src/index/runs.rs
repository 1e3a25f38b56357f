//! Putting many entries into a table at once.
//!
//! In: entries in the order of their keys. Out: they are in the table, in the place of
//! what was there under the same keys. What they mean is nobody's business here.

use std::ops::Bound;

use redb::{CursorError, Key, Table};

/// Puts `entries` into `table`. Those between which the table has nothing go in with one
/// descent, and into full pages: one by one they would split each page in halves and
/// leave the first of them (redb 4.4, `CursorMut`). Of several with one key the last
/// counts.
pub(super) fn insert_in_order<'k, K: Key + 'static>(
    table: &mut Table<'_, K, &'static [u8]>,
    entries: &[(K::SelfType<'k>, impl AsRef<[u8]>)],
) -> Result<(), redb::Error> {
    let mut at = 0;
    while let Some((first, bytes)) = entries.get(at) {
        let before = at;
        if entries.len() - at > 1 {
            let mut cursor = table.lower_bound_mut(Bound::Included(first))?;
            while let Some((key, bytes)) = entries.get(at) {
                match cursor.insert_before(key, bytes.as_ref()) {
                    Ok(()) => at += 1,
                    Err(CursorError::UnorderedKey) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            cursor.close()?;
        }
        if at == before {
            table.insert(first, bytes.as_ref())?;
            at += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};

    use super::*;

    const TABLE: TableDefinition<u64, &[u8]> = TableDefinition::new("table");

    fn in_memory() -> Database {
        let backend = redb::backends::InMemoryBackend::new();
        Database::builder().create_with_backend(backend).unwrap()
    }

    fn put(db: &Database, entries: &[(u64, Vec<u8>)]) {
        let txn = db.begin_write().unwrap();
        insert_in_order(&mut txn.open_table(TABLE).unwrap(), entries).unwrap();
        txn.commit().unwrap();
    }

    #[test]
    fn what_was_put_is_there_whatever_was_there_before() {
        let db = in_memory();
        let mut model = BTreeMap::new();
        let mut random = 1u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % below
        };
        for round in 0..300u64 {
            let (from, width) = (next(10_000), 1 + next(2_000));
            let mut entries: Vec<_> = (0..next(200))
                .map(|nth| {
                    (
                        from + next(width),
                        [round.to_ne_bytes(), nth.to_ne_bytes()].concat(),
                    )
                })
                .collect();
            entries.sort_by_key(|(key, _)| *key);
            put(&db, &entries);
            model.extend(entries);
        }
        let txn = db.begin_read().unwrap();
        let table = txn.open_table(TABLE).unwrap();
        let found: Vec<_> = table.iter().unwrap().map(Result::unwrap).collect();
        let found = found.iter().map(|(key, bytes)| (key.value(), bytes.value()));
        assert!(found.eq(model.iter().map(|(key, bytes)| (*key, &bytes[..]))));
    }

    #[test]
    fn entries_that_come_by_turns_at_many_places_leave_full_pages() {
        let db = in_memory();
        // As a comparison finds them that reads many directories at once.
        const PLACES: u64 = 64;
        for portion in 0..16 {
            for place in 0..PLACES {
                let first = place * 1_000_000 + portion * 64;
                let entries: Vec<_> = (first..first + 64).map(|key| (key, vec![0; 150])).collect();
                put(&db, &entries);
            }
        }
        let txn = db.begin_read().unwrap();
        let stats = txn.open_table(TABLE).unwrap().stats().unwrap();
        let wasted = stats.fragmented_bytes() as f64 / stats.stored_bytes() as f64;
        assert!(wasted < 0.35, "{wasted}");
    }
}
