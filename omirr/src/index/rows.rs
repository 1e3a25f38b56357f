//! The index as the engine reads it.

use std::ops::ControlFlow;

use super::{IndexError, Reader};
use crate::engine::{Rows, Sequence};
use crate::model::{Hash, LinkGroup, Moved, Record, RelPath, Row};

impl Rows for Reader {
    type Error = IndexError;

    fn row(&self, path: &RelPath) -> Result<Option<Row>, IndexError> {
        Ok(self.get(path)?.map(|record| record.row))
    }

    fn live_beneath(
        &self,
        path: &RelPath,
        each: &mut dyn FnMut(&RelPath) -> ControlFlow<()>,
    ) -> Result<(), IndexError> {
        for pair in self.beneath(path)? {
            let (path, record) = pair?;
            if !record.row.deleted && each(&path).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn linked(&self, group: LinkGroup) -> Result<Vec<RelPath>, IndexError> {
        self.group(group)
    }

    /// Of large contents alone.
    fn holder(&self, hash: &Hash) -> Result<Option<RelPath>, IndexError> {
        self.with_content(hash)
    }
}

impl Sequence for Reader {
    type Error = IndexError;

    fn record(&self, path: &RelPath) -> Result<Option<Record>, IndexError> {
        self.get(path)
    }

    fn after(&self, seq: u64, limit: usize) -> Result<Vec<(RelPath, Record)>, IndexError> {
        let rows = self.rows_after(seq, limit)?;
        Ok(rows.into_iter().map(|(_, path, record)| (path, record)).collect())
    }

    fn changed_beneath(&self, path: &RelPath, seq: u64) -> Result<bool, IndexError> {
        for pair in self.beneath(path)? {
            if pair?.1.seq > seq {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn move_over(&self, seq: u64) -> Result<Option<(u64, Moved)>, IndexError> {
        Reader::move_over(self, seq)
    }
}
