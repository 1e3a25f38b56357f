//! Which hard-link group a file belongs to.
//!
//! In: the names under which an inode was found, with their records. Out: the
//! group, the same for all of them. A group stands for one inode; a file that
//! has left its inode leaves the group. Directories have no groups.

use std::collections::BTreeSet;

use crate::model::{Entry, LinkGroup, Record, RelPath, Row};

use super::plan::{Install, Step};
use super::rows::Rows;

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
    if seen.is_dir() {
        return None;
    }
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

/// The steps that make one inode of those `members` of one group that are to be
/// one and are not. That happens where a part of a plan had to be left out, so
/// it is to be looked for in the groups of rows that have just been applied.
pub fn relink<R: Rows>(rows: &R, members: &[(RelPath, Record)]) -> Result<Vec<Step>, R::Error> {
    let mut steps = Vec::new();
    let mut touched = BTreeSet::new();
    for (nth, (path, record)) in members.iter().enumerate() {
        let Some(entry) = record.row.live() else { continue };
        let like = members[..nth]
            .iter()
            .find(|(_, other)| other.row.live() == Some(entry));
        let Some((existing, other)) = like else { continue };
        let (Some(here), Some(there)) = (record.sig, other.sig) else {
            continue;
        };
        if here.ino != there.ino {
            let how = Install::Link {
                existing: existing.clone(),
            };
            steps.push(Step::Install {
                path: path.clone(),
                entry: entry.clone(),
                how,
            });
            touched.extend(path.parent());
        }
    }
    for path in touched {
        if let Some(row) = rows.row(&path)?.filter(Row::is_live_dir) {
            steps.push(Step::Times {
                path,
                entry: row.entry,
            });
        }
    }
    Ok(steps)
}
