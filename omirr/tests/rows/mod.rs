//! Paths and entries from next to nothing, for tests of single decisions.

use omirr::model::{Entry, Flags, Hash, Kind, RelPath, Time};

pub(crate) fn at(path: &str) -> RelPath {
    RelPath::new(path.as_bytes()).unwrap()
}

pub(crate) fn entry(kind: Kind) -> Entry {
    Entry {
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Time { secs: 1, nanos: 0 },
        xattrs: Vec::new(),
        flags: Flags::NONE,
        user: None,
        group: None,
        link: None,
    }
}

pub(crate) fn file(content: u8) -> Entry {
    entry(Kind::File {
        size: 100,
        hash: Hash([content; 32]),
    })
}

pub(crate) fn dir() -> Entry {
    entry(Kind::Directory)
}
