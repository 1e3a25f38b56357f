//! Which paths must be looked at together.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use crate::model::{RelPath, Row};

use super::change::Seen;
use super::rows::Rows;

/// What else must be observed once `path` has been seen, so that the rows made
/// of it leave a whole tree: a path that is there needs its parents' rows; one
/// that is no directory now leaves nothing beneath it. (What lies beneath a
/// directory that is new must be looked for on disk, which is the caller's.)
pub fn observe_also<R: Rows>(rows: &R, path: &RelPath, seen: &Seen) -> Result<BTreeSet<RelPath>, R::Error> {
    let mut also = BTreeSet::new();
    if let Seen::Present(_) = seen {
        let mut above = path.parent();
        while let Some(dir) = above {
            if dir.is_root() || rows.row(&dir)?.is_some_and(|row| row.is_live_dir()) {
                break;
            }
            above = dir.parent();
            also.insert(dir);
        }
    }
    let gone = !matches!(seen, Seen::Present(entry) if entry.is_dir());
    if gone && rows.row(path)?.as_ref().is_some_and(Row::is_live_dir) {
        rows.live_beneath(path, &mut |beneath| {
            also.insert(beneath.clone());
            ControlFlow::Continue(())
        })?;
    }
    Ok(also)
}
