//! Which paths must be looked at together, and which looks do not fit together.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use crate::model::RelPath;

use super::change::Seen;
use super::rows::{Rows, Standing};

/// What else must be observed once `path` has been seen, so that the rows made
/// of it leave a whole tree: a path that is there needs its parents' rows; one
/// that is no directory now leaves nothing beneath it. (What lies beneath a
/// directory that is new must be looked for on disk, which is the caller's.)
pub fn observe_also<R: Rows>(rows: &R, path: &RelPath, seen: &Seen) -> Result<BTreeSet<RelPath>, R::Error> {
    let mut also = BTreeSet::new();
    if let Seen::Present(_) = seen {
        let mut above = path.parent();
        while let Some(dir) = above {
            if dir.is_root() || rows.standing(&dir)? == Standing::Directory {
                break;
            }
            above = dir.parent();
            also.insert(dir);
        }
    }
    let gone = !matches!(seen, Seen::Present(entry) if entry.is_dir());
    if gone && rows.standing(path)? == Standing::Directory {
        rows.live_beneath(path, &mut |beneath| {
            also.insert(beneath.clone());
            ControlFlow::Continue(())
        })?;
    }
    Ok(also)
}

/// The paths among `seen` of which nothing can be said yet, because the tree
/// changed while it was looked at: names in a directory that was found gone a
/// moment before or after, a directory without names that it still has. They
/// are to be looked at again; rows of all others leave a whole tree. `seen` has
/// what was found by path, none where it is as the row says, and is closed under
/// [`observe_also`] but for looks that came to nothing.
pub fn incoherent<R: Rows>(
    rows: &R,
    seen: &BTreeMap<&RelPath, Option<&Seen>>,
) -> Result<BTreeSet<RelPath>, R::Error> {
    let mut out = BTreeSet::new();
    loop {
        let before = out.len();
        let gone = no_directories(rows, seen, &mut out)?;
        // Directories that are known to be so, all the way up.
        let mut firm = BTreeSet::new();
        for (&path, found) in seen {
            if matches!(found, Some(Seen::Absent)) || out.contains(path) {
                continue;
            }
            let mut above = Vec::new();
            let mut stands = true;
            for dir in std::iter::successors(path.parent(), RelPath::parent) {
                if dir.is_root() || firm.contains(&dir) {
                    break;
                }
                if gone.contains(&dir) {
                    leave_out(&dir, seen, &mut out);
                    stands = false;
                    continue;
                }
                let is_dir = match seen.get(&dir) {
                    Some(Some(Seen::Present(entry))) if !out.contains(&dir) => entry.is_dir(),
                    _ => rows.standing(&dir)? == Standing::Directory,
                };
                if !is_dir {
                    out.insert(path.clone());
                    stands = false;
                }
                above.push(dir);
            }
            if stands {
                firm.extend(above);
            }
        }
        if out.len() == before {
            return Ok(out);
        }
    }
}

/// The paths that were found to be no directories; those among them that have
/// names beneath them which are not known to be gone go to `out` instead.
fn no_directories<R: Rows>(
    rows: &R,
    seen: &BTreeMap<&RelPath, Option<&Seen>>,
    out: &mut BTreeSet<RelPath>,
) -> Result<BTreeSet<RelPath>, R::Error> {
    let mut gone = BTreeSet::new();
    for (&path, found) in seen {
        let Some(found) = found else { continue };
        let is_dir = matches!(found, Seen::Present(entry) if entry.is_dir());
        if is_dir || out.contains(path) {
            continue;
        }
        let mut whole = true;
        if rows.standing(path)? == Standing::Directory {
            rows.live_beneath(path, &mut |beneath| {
                whole = matches!(seen.get(beneath), Some(Some(Seen::Absent))) && !out.contains(beneath);
                match whole {
                    true => ControlFlow::Continue(()),
                    false => ControlFlow::Break(()),
                }
            })?;
        }
        match whole {
            true => drop(gone.insert(path.clone())),
            false => leave_out(path, seen, out),
        }
    }
    Ok(gone)
}

/// Leaves out `top` and all that was seen beneath it.
fn leave_out(top: &RelPath, seen: &BTreeMap<&RelPath, Option<&Seen>>, out: &mut BTreeSet<RelPath>) {
    out.insert(top.clone());
    out.extend(
        seen.keys()
            .filter(|path| path.is_within(top))
            .map(|&path| path.clone()),
    );
}
