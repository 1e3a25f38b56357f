//! Which hard-link group a file belongs to.
//!
//! In: the names under which an inode was found, with their records. Out: the
//! group, the same for all of them. A group stands for one inode; a file that
//! has left its inode leaves the group.

use crate::model::{LinkGroup, Record};

/// What the group of a file is that was just looked at: `ino` with `names`
/// names in the share, whose records (those that there are) are `records`;
/// `moved` is the record of the path from which the inode came, if it did.
/// `strangers` says whether live records of a group name another inode;
/// `fresh` draws a new group.
pub fn link_group(
    ino: u64,
    names: usize,
    records: &[&Record],
    moved: Option<&Record>,
    strangers: &dyn Fn(LinkGroup) -> bool,
    fresh: &mut dyn FnMut() -> LinkGroup,
) -> Option<LinkGroup> {
    let mine = records
        .iter()
        .copied()
        .chain(moved)
        .filter(|record| !record.row.deleted || moved.is_some_and(|moved| std::ptr::eq(moved, *record)))
        .filter(|record| record.sig.is_some_and(|sig| sig.ino == ino))
        .filter_map(|record| record.row.entry.link)
        .min();
    match mine {
        Some(group) if !strangers(group) => Some(group),
        _ if names > 1 => Some(fresh()),
        _ => None,
    }
}
