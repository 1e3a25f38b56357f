//! The index as the engine reads it.

use std::ops::ControlFlow;

use super::{IndexError, Reader};
use crate::engine::Rows;
use crate::model::{Hash, LinkGroup, RelPath, Row};

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

    /// Rows are not kept by content: a table by hash would cost every row a
    /// write in a random place. What was moved is found by `moved_from`.
    fn holder(&self, _hash: &Hash) -> Result<Option<RelPath>, IndexError> {
        Ok(None)
    }
}
