//! An index and a journal that a broken disk has left.
//!
//! In: the first byte says what: 0, the bytes are the journal's; 1, they are the
//! whole index; else they are patches of a good index, each three bytes of place,
//! one of length, and the new bytes; 3 cuts the file at the last patch as well.
//! Out: an error, or an index that can be read and written, as far as it can be.
//! Never a panic on opening that nobody catches, and never an endless loop, which libFuzzer's own timeout finds.
#![no_main]

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use omirr::engine::Rows as _;
use omirr::index::{Durable, Index};
use omirr::model::{
    Entry, Flags, Kind, LinkGroup, Record, RelPath, ReplicaId, Row, Stamp, StatSig, Time, Vector, Version,
};

struct Place {
    folder: tempfile::TempDir,
    /// A good index with a few rows of every sort.
    good: Vec<u8>,
}

impl Place {
    fn file(&self) -> PathBuf {
        self.folder.path().join("index.redb")
    }
}

fn place() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(|| {
        // libFuzzer ends at every panic; one that the daemon's code catches is
        // an error like others.
        std::panic::set_hook(Box::new(|_| ()));
        // In memory where there is such a place.
        let folder = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .expect("a folder can be made");
        let file = folder.path().join("index.redb");
        let index = Index::open(&file, "one").expect("an index can be made");
        index.write(fill).expect("an index can be written");
        drop(index);
        let good = std::fs::read(&file).expect("the index is there");
        Place { folder, good }
    })
}

fn record(seq: u64) -> Record {
    let time = Time { secs: 1, nanos: 2 };
    let row = Row {
        entry: Entry {
            kind: if seq.is_multiple_of(5) {
                Kind::Directory
            } else {
                Kind::Fifo
            },
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: time,
            xattrs: Vec::new(),
            link: seq.is_multiple_of(3).then_some(LinkGroup(7)),
            user: None,
            group: None,
            flags: Flags::default(),
        },
        deleted: seq.is_multiple_of(7),
        version: Version {
            vector: Vector::from_iter([(ReplicaId(1), seq)]),
            stamp: Stamp {
                wall_ms: seq,
                count: 0,
                replica: ReplicaId(1),
            },
        },
        origin: None,
    };
    Record {
        sig: (!row.deleted).then_some(StatSig {
            ino: seq,
            btime: time,
            mtime: time,
            ctime: time,
            size: 0,
            mode: 0o10644,
            uid: 0,
            gid: 0,
            nlink: 2,
            racy: false,
        }),
        row,
        seq,
        via: None,
        here: None,
        moved_from: None,
    }
}

fn fill(w: &mut omirr::index::Writer<'_>) -> Result<((), Durable), omirr::index::IndexError> {
    for n in 0..60 {
        let path = RelPath::new(format!("d{}/{n}", n % 4).as_bytes()).expect("a path");
        let record = record(w.next_seq());
        w.put(&path, &record)?;
        w.intend([(&path, &record.row)])?;
    }
    Ok(((), Durable::Yes))
}

/// The good index as far as the first three bytes of `data` say. Pages in its
/// midst are not damaged here: redb aborts on some, see docs/INDEX.md at its end.
fn cut(data: &[u8], good: &[u8]) -> Vec<u8> {
    let at = data
        .iter()
        .take(3)
        .fold(0, |at, byte| at << 8 | usize::from(*byte));
    good[..at % (good.len() + 1)].to_vec()
}

fn use_it(index: &Index, damaged: bool) -> Result<(), omirr::index::IndexError> {
    let reader = index.read()?;
    reader.rows_after(0, 1000)?;
    for pair in reader.beneath(&RelPath::root())? {
        let (path, _) = pair?;
        reader.get(&path)?;
    }
    reader.live_beneath(&RelPath::root(), &mut |_| ControlFlow::Continue(()))?;
    reader.intents()?;
    reader.group(LinkGroup(7))?;
    for ino in 0..60 {
        reader.path_of_ino(ino)?;
        reader.paths_of_ino(ino)?;
    }
    // Unwinding out of a transaction that writes, the store meets the damage again
    // and aborts: docs/INDEX.md, at its end.
    match damaged {
        true => Ok(()),
        false => index.write(fill),
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&what, data)) = data.split_first() else {
        return;
    };
    let place = place();
    if what == 0 {
        for name in ["changes-a", "changes-b"] {
            std::fs::write(place.folder.path().join(name), data).expect("it can be written");
        }
        let noted = omirr::daemon::noted_changes(place.folder.path()).expect("any bytes are records");
        assert!(noted <= data.len());
        return;
    }
    let bytes = match what {
        1 => data.to_vec(),
        _ => cut(data, &place.good),
    };
    std::fs::write(place.file(), bytes).expect("it can be written");
    match Index::open(&place.file(), "one") {
        // The store trusts pages that it has not written in this run. A panic ends
        // the keeper, which stops its share; see `run_keeper`.
        Ok(index) => {
            let used = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| use_it(&index, what != 1)));
            if let Ok(Err(error)) = used {
                assert!(error.to_string().contains("index.redb"), "{error}");
            }
        }
        Err(error) => assert!(error.to_string().contains("index.redb"), "{error}"),
    }
});
