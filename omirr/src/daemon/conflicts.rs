//! What `omirr conflicts list` is told: the conflict copies that there are.
//!
//! In: the shares' indexes. Out: each live path with a conflict copy's name, and
//! what that name tells; as many as a reply holds, and how many more there are.
//! The trees are not looked at; nothing is changed.

use std::sync::Arc;

use super::control::{CONFLICTS_MAX, ConflictReport, ConflictsReport, REPLY_BYTES_MAX};
use super::share::Share;
use crate::engine::{CopyName, Original, is_conflict_path};
use crate::index::{IndexError, Reader};
use crate::model::{Record, RelPath};

/// What the listed copies may take in the reply, bytes; the rest of it is small.
const LISTED_BYTES_MAX: usize = REPLY_BYTES_MAX / 2;
/// What a copy takes beyond its texts: the fields' names.
const FIELDS_BYTES: usize = 300;
/// So many rows are looked through for the original of a name that was cut.
const LOOKED_THROUGH_MAX: usize = 1000;
/// So many paths are named of those that a copy may have had.
const ORIGINALS_MAX: usize = 4;

/// The copies in these shares. Reads whole indexes: not for an async task.
pub(super) fn report(shares: &[Arc<Share>]) -> Result<ConflictsReport, String> {
    let mut report = ConflictsReport::default();
    let mut bytes = 0;
    for share in shares {
        list(share, &mut report, &mut bytes)
            .map_err(|why| format!("the index of the share {} cannot be read: {why}", share.name))?;
    }
    Ok(report)
}

fn list(share: &Share, report: &mut ConflictsReport, bytes: &mut usize) -> Result<(), IndexError> {
    let names = share.index.meta().names;
    let nodes: Vec<&str> = names.iter().map(|(_, node)| node.as_str()).collect();
    let reader = share.index.read()?;
    for row in reader.live_where(is_conflict_path)? {
        let (path, record) = row?;
        if report.more > 0 || report.conflicts.len() >= CONFLICTS_MAX {
            report.more += 1;
            continue;
        }
        let copy = of_row(share, &reader, &nodes, &path, &record)?;
        *bytes += size_in_reply(&copy);
        if *bytes > LISTED_BYTES_MAX {
            report.more += 1;
            continue;
        }
        report.conflicts.push(copy);
    }
    Ok(())
}

fn of_row(
    share: &Share,
    reader: &Reader,
    nodes: &[&str],
    path: &RelPath,
    record: &Record,
) -> Result<ConflictReport, IndexError> {
    let mut report = ConflictReport {
        share: share.name.clone(),
        path: path.to_string(),
        file: format!("{}/{path}", share.root.path().display()),
        kind: record.row.entry.kind_name().to_owned(),
        size: record.row.entry.content().map(|(size, _)| size),
        winner: None,
        originals: Vec::new(),
        made: None,
        node: None,
        nodes: Vec::new(),
    };
    let dir = path.parent().unwrap_or_else(RelPath::root);
    let Some(mut name) = CopyName::parse(path.name()).map(|name| name.of_nodes(nodes.iter().copied())) else {
        // A user's file that happens to be called so.
        return Ok(report);
    };
    let beside = |name: &[u8]| dir.join(name).ok().map(|path| path.to_string());
    let present = present(reader, &dir, &name)?;
    match name.original(present.clone()) {
        Original::Is(original) => {
            name = name.of_original(&original);
            report.originals.extend(beside(&original));
            report.winner = report
                .originals
                .first()
                .filter(|_| present.contains(&original))
                .cloned();
        }
        Original::OneOf(several) => {
            report.originals = several
                .iter()
                .take(ORIGINALS_MAX)
                .filter_map(|one| beside(one))
                .collect();
        }
        Original::Cut => {}
    }
    report.made = name.made.map(|at| at.to_string());
    report.nodes = name.nodes();
    report.node = match &report.nodes[..] {
        [one] => Some(one.clone()),
        _ => None,
    };
    Ok(report)
}

/// The live names beside the copy that it may have had before.
fn present(reader: &Reader, dir: &RelPath, name: &CopyName) -> Result<Vec<Vec<u8>>, IndexError> {
    if name.is_cut() {
        let mut all = reader.names_beginning(dir, name.beginning(), LOOKED_THROUGH_MAX)?;
        all.retain(|one| name.may_be_of(one));
        return Ok(all);
    }
    let mut found = Vec::new();
    for original in name.originals() {
        // A path that would be too long has no row.
        let Ok(path) = dir.join(&original) else { continue };
        if reader.get(&path)?.is_some_and(|record| !record.row.deleted) {
            found.push(original);
        }
    }
    Ok(found)
}

/// How many bytes a copy takes in the reply, at most: `"` and `\` are two each.
fn size_in_reply(copy: &ConflictReport) -> usize {
    let one = [&copy.share, &copy.path, &copy.file, &copy.kind];
    let maybe = [&copy.winner, &copy.made, &copy.node].into_iter().flatten();
    let many = copy.originals.iter().chain(&copy.nodes);
    let texts = one.into_iter().chain(maybe).chain(many);
    texts.map(|text| 2 * text.len() + 4).sum::<usize>() + FIELDS_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_takes_no_more_than_is_reckoned() {
        let odd = "\\\"".repeat(1000);
        let copy = ConflictReport {
            share: odd.clone(),
            path: odd.clone(),
            file: odd.clone(),
            kind: "character device".into(),
            size: Some(u64::MAX),
            winner: Some(odd.clone()),
            originals: vec![odd.clone(); 4],
            made: Some(odd.clone()),
            node: Some(odd.clone()),
            nodes: vec![odd; 4],
        };
        let real = serde_json::to_vec(&copy).unwrap().len();
        assert!(real <= size_in_reply(&copy), "{real}");
    }
}
