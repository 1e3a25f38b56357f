//! What this node's disk has of an entry where it is not what the row says.
//!
//! A receiver may be unable to give a file all that its row says: the
//! filesystem keeps no such attribute, a privilege is missing, the owner's name
//! has another number here. What it gave instead is noted beside the row, so
//! that the next look does not take the difference for a user's change.

use serde::{Deserialize, Serialize};

use super::{Entry, Flags, Time, Xattr};

/// The attributes on disk, where they are not the row's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Here {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    pub xattrs: Vec<Xattr>,
    pub flags: Flags,
    /// What could not be had, and why, one sentence per reason; empty where
    /// nothing is missing, as for an owner that has another number here.
    pub lacks: Vec<Box<str>>,
}

impl Here {
    /// What is on disk as `seen` beside a row that says `row`; none if the row
    /// says it all. `lacks` is why.
    pub fn of(seen: &Entry, row: &Entry, lacks: &[Box<str>]) -> Option<Box<Here>> {
        let is = (
            seen.mode,
            seen.uid,
            seen.gid,
            seen.mtime,
            seen.flags,
            &seen.xattrs,
        ) == (row.mode, row.uid, row.gid, row.mtime, row.flags, &row.xattrs);
        (!is).then(|| {
            Box::new(Here {
                mode: seen.mode,
                uid: seen.uid,
                gid: seen.gid,
                mtime: seen.mtime,
                xattrs: seen.xattrs.clone(),
                flags: seen.flags,
                lacks: lacks.to_vec(),
            })
        })
    }

    /// The row's entry as the disk shows it.
    pub fn shown(row: &Entry, here: Option<&Here>) -> Entry {
        let Some(here) = here else { return row.clone() };
        Entry {
            mode: here.mode,
            uid: here.uid,
            gid: here.gid,
            mtime: here.mtime,
            xattrs: here.xattrs.clone(),
            flags: here.flags,
            ..row.clone()
        }
    }

    /// What the entry is for the index, if the disk shows `seen` where the row
    /// was `row`: what is on disk as it was stands as in the row, all else is as
    /// seen.
    pub fn read(row: &Entry, here: Option<&Here>, seen: &Entry) -> Entry {
        let was = Here::shown(row, here);
        let mut entry = seen.clone();
        if seen.uid == was.uid {
            (entry.uid, entry.user) = (row.uid, row.user.clone());
        }
        if seen.gid == was.gid {
            (entry.gid, entry.group) = (row.gid, row.group.clone());
        }
        let same_kind = std::mem::discriminant(&seen.kind) == std::mem::discriminant(&row.kind);
        if here.is_none() || !same_kind {
            return entry;
        }
        if seen.mode == was.mode {
            entry.mode = row.mode;
        }
        if seen.mtime == was.mtime {
            entry.mtime = row.mtime;
        }
        let stands = !(seen.flags ^ was.flags);
        entry.flags = (row.flags & stands) | (seen.flags & !stands);
        let in_set = |set: &[Xattr], name: &[u8]| set.iter().find(|xattr| *xattr.name == *name).cloned();
        let names = row.xattrs.iter().chain(&was.xattrs).map(|xattr| &xattr.name);
        for name in names {
            if in_set(&was.xattrs, name) != in_set(&seen.xattrs, name) {
                continue;
            }
            entry.xattrs.retain(|xattr| xattr.name != *name);
            entry.xattrs.extend(in_set(&row.xattrs, name));
        }
        entry.xattrs.sort_unstable();
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    fn xattr(name: &str) -> Xattr {
        Xattr {
            name: name.as_bytes().into(),
            value: b"value"[..].into(),
        }
    }

    fn row() -> Entry {
        Entry {
            kind: Kind::Fifo,
            mode: 0o6755,
            uid: 1000,
            gid: 1000,
            user: Some("anna".into()),
            group: Some("users".into()),
            mtime: Time { secs: 7, nanos: 9 },
            xattrs: vec![xattr("trusted.a"), xattr("user.b")],
            flags: Flags::NODUMP | Flags::IMMUTABLE,
            link: None,
        }
    }

    /// What a node made of it that could have nearly nothing.
    fn seen() -> Entry {
        Entry {
            mode: 0o755,
            uid: 5,
            gid: 6,
            user: None,
            group: None,
            mtime: Time { secs: 7, nanos: 0 },
            xattrs: vec![xattr("security.selinux"), xattr("user.b")],
            flags: Flags::NODUMP,
            ..row()
        }
    }

    #[test]
    fn what_could_not_be_had_is_no_change() {
        let here = Here::of(&seen(), &row(), &[]).unwrap();
        assert_eq!(Here::read(&row(), Some(&here), &seen()), row());
        assert_eq!(
            Here::shown(&row(), Some(&here)),
            Entry {
                user: row().user,
                group: row().group,
                ..seen()
            }
        );
    }

    #[test]
    fn what_a_user_changes_is_a_change_and_the_rest_stands() {
        let here = Here::of(&seen(), &row(), &[]).unwrap();
        let changed = Entry {
            mode: 0o700,
            gid: 8,
            xattrs: vec![xattr("security.selinux"), xattr("user.c")],
            flags: Flags::NOATIME,
            ..seen()
        };
        let expected = Entry {
            mode: 0o700,
            gid: 8,
            group: None,
            xattrs: vec![xattr("trusted.a"), xattr("user.c")],
            flags: Flags::IMMUTABLE | Flags::NOATIME,
            ..row()
        };
        assert_eq!(Here::read(&row(), Some(&here), &changed), expected);
    }

    #[test]
    fn without_a_difference_only_the_owners_names_stand() {
        let seen = Entry {
            user: None,
            group: None,
            mode: 0o600,
            ..row()
        };
        assert_eq!(Here::of(&seen, &Entry { mode: 0o600, ..row() }, &[]), None);
        assert_eq!(Here::read(&row(), None, &seen), Entry { mode: 0o600, ..row() });
    }
}
