//! Changes found by comparing a folder with what it was: for hosts that allow
//! no events. Two changes of one file between two looks are one.

use std::collections::BTreeMap;

use rustix::fs::Stat;

use super::tree::{Tree, is_dir};
use crate::{model::RelPath, source::Op};

/// What is compared of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    ino: u64,
    is_dir: bool,
    /// Size and time of the content; of a directory they tell nothing that its
    /// entries do not.
    content: (i64, i64, i64),
    /// Mode, owner, group, and the time of the last change of anything.
    attributes: (u32, u32, u32, i64, i64),
}

impl Mark {
    fn of(stat: &Stat) -> Mark {
        let is_dir = is_dir(stat);
        let time = (stat.st_ctime, stat.st_ctime_nsec as i64);
        let (changed, changed_ns) = if is_dir { (0, 0) } else { time };
        Mark {
            ino: stat.st_ino,
            is_dir,
            content: if is_dir {
                (0, 0, 0)
            } else {
                (stat.st_size, stat.st_mtime, stat.st_mtime_nsec as i64)
            },
            attributes: (stat.st_mode, stat.st_uid, stat.st_gid, changed, changed_ns),
        }
    }
}

/// Everything beneath a folder at one time.
pub(super) struct Snapshot(BTreeMap<RelPath, Mark>);

impl Snapshot {
    pub(super) fn take(tree: &Tree) -> Snapshot {
        let mut marks = BTreeMap::new();
        tree.walk(|path, stat| {
            marks.insert(path, Mark::of(stat));
        });
        Snapshot(marks)
    }

    /// What must have happened to make `now` of this: removals first, children
    /// before parents; then the rest, parents before children.
    pub(super) fn differences(&self, now: &Snapshot) -> Vec<(Op, RelPath, bool)> {
        let mut found = Vec::new();
        for (path, before) in self.0.iter().rev() {
            if now
                .0
                .get(path)
                .is_none_or(|now| now.ino != before.ino || now.is_dir != before.is_dir)
            {
                found.push((
                    if before.is_dir { Op::Rmdir } else { Op::Unlink },
                    path.clone(),
                    before.is_dir,
                ));
            }
        }
        for (path, now) in &now.0 {
            let before = self
                .0
                .get(path)
                .filter(|before| before.ino == now.ino && before.is_dir == now.is_dir);
            let op = match before {
                None if now.is_dir => Op::Mkdir,
                None => Op::Create,
                Some(before) if before.content != now.content => Op::Write,
                Some(before) if before.attributes != now.attributes => Op::Attr,
                Some(_) => continue,
            };
            found.push((op, path.clone(), now.is_dir));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(ino: u64, is_dir: bool, size: i64, mode: u32) -> Mark {
        Mark {
            ino,
            is_dir,
            content: (size, 0, 0),
            attributes: (mode, 0, 0, 0, 0),
        }
    }

    fn snapshot(entries: &[(&str, Mark)]) -> Snapshot {
        Snapshot(
            entries
                .iter()
                .map(|(path, mark)| (RelPath::new(path.as_bytes()).expect("a path"), *mark))
                .collect(),
        )
    }

    #[test]
    fn tells_what_came_changed_and_went() {
        let before = snapshot(&[
            ("d", mark(1, true, 0, 0o755)),
            ("d/gone", mark(2, false, 1, 0o644)),
            ("same", mark(3, false, 1, 0o644)),
            ("written", mark(4, false, 1, 0o644)),
            ("chmod", mark(5, false, 1, 0o644)),
            ("replaced", mark(6, false, 1, 0o644)),
        ]);
        let now = snapshot(&[
            ("same", mark(3, false, 1, 0o644)),
            ("written", mark(4, false, 2, 0o644)),
            ("chmod", mark(5, false, 1, 0o600)),
            ("replaced", mark(7, false, 1, 0o644)),
            ("new", mark(8, true, 0, 0o755)),
            ("new/file", mark(9, false, 0, 0o644)),
        ]);
        let found: Vec<_> = before
            .differences(&now)
            .into_iter()
            .map(|(op, path, _)| format!("{} {path}", op.name()))
            .collect();
        assert_eq!(
            found,
            [
                "unlink replaced",
                "unlink d/gone",
                "rmdir d",
                "attr chmod",
                "mkdir new",
                "create new/file",
                "create replaced",
                "write written"
            ]
        );
        assert_eq!(before.differences(&before), []);
    }
}
