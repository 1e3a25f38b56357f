//! What `omirr log` is told: the last change of a path, and who made it.
//!
//! In: a path as a person writes it, the shares and their indexes. Out: what the
//! path's row says, or in words why there is none. Only the index and, where
//! that has nothing, the path itself are looked at; nothing is changed.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::control::{LogReport, LogRequest, WhoReport};
use super::share::Share;
use crate::engine::is_conflict_path;
use crate::model::{Origin, Record, RelPath};

/// The share in which a path lies, and where in it.
pub(super) fn find(shares: &[Arc<Share>], request: &LogRequest) -> Result<(Arc<Share>, RelPath), String> {
    let asked: Vec<PathBuf> = [Some(&request.path), request.resolved.as_ref()]
        .into_iter()
        .flatten()
        .map(|path| path.as_path().to_owned())
        .collect();
    // Of shares within one another the inner one has the path.
    let found = shares
        .iter()
        .filter_map(|share| Some((share, beneath(share, &asked)?)))
        .min_by_key(|(_, rest)| rest.as_os_str().len());
    let shown = asked[0].display();
    let Some((share, rest)) = found else {
        let known: Vec<_> = shares
            .iter()
            .map(|share| format!("{} at {}", share.name, share.root.path().display()))
            .collect();
        return Err(format!(
            "{shown} is in no share of this node: it has {}",
            known.join(", ")
        ));
    };
    let path = RelPath::new(rest.as_os_str().as_bytes())
        .map_err(|why| format!("{shown} is no path that a share can have: {why}"))?;
    Ok((Arc::clone(share), path))
}

/// The rest of the path beneath a share's root, by the root's name in the
/// configuration or by where that leads.
fn beneath(share: &Share, asked: &[PathBuf]) -> Option<PathBuf> {
    let root = share.root.path();
    let real = root.canonicalize().ok();
    let roots = [Some(root), real.as_deref()];
    let rest = |root: &Path| asked.iter().find_map(|path| path.strip_prefix(root).ok());
    roots.into_iter().flatten().find_map(rest).map(Path::to_owned)
}

/// What the index says of a path. `missing` is why the changes of the last
/// moments may not be in it yet, if so.
pub(super) fn report(share: &Share, path: &RelPath, missing: Option<String>) -> Result<LogReport, String> {
    let full = share.root.path().join(path.as_os());
    let shown = full.display();
    let on_disk = full.symlink_metadata().ok();
    let record = share
        .index
        .read()
        .and_then(|reader| reader.get(path))
        .map_err(|why| why.to_string())?;
    let is_dir = match (&on_disk, &record) {
        (Some(found), _) => found.is_dir(),
        (None, Some(record)) => record.row.entry.is_dir(),
        (None, None) => false,
    };
    if share.is_excluded(path, is_dir) {
        return Err(format!(
            "{shown} is excluded from the share {}: its changes are not followed",
            share.name
        ));
    }
    match (record, on_disk, missing) {
        (Some(record), _, missing) => Ok(of_record(share, path, &record, missing)),
        (None, Some(_), Some(why)) => Err(format!(
            "{shown} is there, but has not been looked at yet ({why}): ask again"
        )),
        (None, Some(_), None) => Err(format!(
            "{shown} is there, but not mirrored by the share {}: it lies on another filesystem or cannot be read; \
             see the daemon's log",
            share.name
        )),
        (None, None, Some(why)) => Err(format!(
            "the share {} knows nothing of {shown} so far ({why}): ask again",
            share.name
        )),
        (None, None, None) => Err(format!(
            "the share {} knows of no {shown}: is it spelled right? A deletion is forgotten once every peer knows of it",
            share.name
        )),
    }
}

fn of_record(share: &Share, path: &RelPath, record: &Record, missing: Option<String>) -> LogReport {
    let row = &record.row;
    let stamp = row.version.stamp;
    let names = share.index.meta().names;
    let node = names.into_iter().find(|(replica, _)| *replica == stamp.replica);
    let changed = i64::try_from(stamp.wall_ms).ok();
    let changed = changed.and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    LogReport {
        share: share.name.clone(),
        path: path.to_string(),
        deleted: row.deleted,
        kind: row.entry.kind_name().to_owned(),
        size: row.entry.content().map(|(size, _)| size),
        changed: changed.map(|at| at.to_string()),
        node: node.map(|(_, name)| name),
        replica: format!("{:016x}", stamp.replica.0),
        who: row.origin.as_deref().map(who),
        conflict_copy: is_conflict_path(path),
        missing,
    }
}

fn who(origin: &Origin) -> WhoReport {
    let known = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    WhoReport {
        pid: (origin.pid != 0).then_some(origin.pid),
        uid: origin.uid,
        user: None,
        command: known(&origin.command),
        cgroup: known(&origin.cgroup),
        omirr: origin.is_daemon(),
    }
}
