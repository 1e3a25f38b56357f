//! Which hard-link group a file belongs to.
//!
//! In: the names under which an inode was found, with their records. Out: the
//! group, the same for all of them. A group stands for one inode; a file that
//! has left its inode leaves the group. Only regular files have groups.

use crate::model::{Entry, LinkGroup, Record};

/// One of the names of an inode.
pub struct Name<'a> {
    /// The record of the path, if there is one.
    pub record: Option<&'a Record>,
    /// The record of the path from which the inode came, if it did.
    pub moved: Option<&'a Record>,
}

/// What the group of inode `ino` is, which was just found to be as `seen` says
/// (whose own group is not looked at) under all of `names`. `strangers` says
/// whether live records of a group name another inode; `fresh` draws a group.
pub fn link_group(
    ino: u64,
    seen: &Entry,
    names: &[Name<'_>],
    strangers: &mut dyn FnMut(LinkGroup) -> bool,
    fresh: &mut dyn FnMut() -> LinkGroup,
) -> Option<LinkGroup> {
    seen.content()?;
    let of_inode = |record: &&Record| record.sig.is_some_and(|sig| sig.ino == ino);
    // Where nothing changed, nothing changes: a look alone makes no row.
    let known = names
        .first()
        .and_then(|name| name.record)
        .map(|record| record.row.entry.link);
    if let Some(link) = known
        && (link.is_some() || names.len() == 1)
        && names.iter().all(|name| {
            let entry = Entry { link, ..seen.clone() };
            name.record
                .is_some_and(|record| of_inode(&record) && record.row.live() == Some(&entry))
        })
    {
        return link;
    }
    let here = names
        .iter()
        .filter_map(|name| name.record)
        .filter(|record| !record.row.deleted);
    let mine = here
        .chain(names.iter().filter_map(|name| name.moved))
        .filter(of_inode)
        .filter_map(|record| record.row.entry.link)
        .min();
    match mine {
        Some(group) if !strangers(group) => Some(group),
        _ if names.len() > 1 => Some(fresh()),
        _ => None,
    }
}
