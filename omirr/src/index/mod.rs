//! The durable rows of one share: by path and by local sequence.
//!
//! In: records, from the keeper, in transactions. Out: records by path, by
//! sequence, by inode and by hard-link group, to the keeper and to every
//! sender, each in a snapshot of its own. Nothing here decides anything and
//! nothing here looks at the tree. `docs/INDEX.md` describes the tables, the
//! order of writes and what a crash between two of them leaves.
//!
//! One thread writes (the keeper); any number read. What a sender may ship ends
//! at the *durable head*: a row leaves this node only after it is on disk, so
//! that a sequence number is never used for two different rows.

mod backend;
mod home;
mod read;
mod rows;
mod runs;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use redb::backends::FileBackend;
use redb::{MultimapTableDefinition, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::crash::{self, Point};
use crate::model::{Gap, ReplicaId, Stamp};
use backend::Freezable;

pub use home::Home;
pub use read::Reader;
pub use write::{Durable, Writer};

/// Path → record.
const ROWS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("rows");
/// Local sequence → path; one per row, its latest.
const SEQS: TableDefinition<u64, &[u8]> = TableDefinition::new("seqs");
/// Inode → one of its paths.
const INODES: TableDefinition<u64, &[u8]> = TableDefinition::new("inodes");
/// Inode that had several names when it was last seen → the paths at which.
const NAMES: MultimapTableDefinition<u64, &[u8]> = MultimapTableDefinition::new("names");
/// Hard-link group → its live paths.
const GROUPS: MultimapTableDefinition<u64, &[u8]> = MultimapTableDefinition::new("groups");
/// Hash of a large content → its live paths.
const CONTENTS: MultimapTableDefinition<&[u8], &[u8]> = MultimapTableDefinition::new("contents");
/// Hash of a large content that is in `CONTENTS` → its sketch.
const SKETCHES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("sketches");
/// A value of a sketch → the hashes of contents that have it.
const ALIKE: MultimapTableDefinition<u64, &[u8]> = MultimapTableDefinition::new("alike");
/// Hash of a large content → the hashes of its leaves.
const LEAVES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("leaves");
/// In the order in which they went: hashes of contents that are nowhere any more
/// and are still in `LEAVES`.
const FORMER: TableDefinition<u64, &[u8]> = TableDefinition::new("former");
/// So many contents that are nowhere any more are remembered by their leaves: a
/// peer may still have them when it asks for what came after.
const FORMER_KEPT: u64 = 16;
/// A content is large above so many bytes: smaller ones go with their rows, and
/// a row in a random place of a table would cost more than it saves.
const LARGE_BYTES: u64 = 128 << 10;
/// Path → the row that is being applied there.
const INTENTS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("intents");
/// The last sequence number of a directory's move → the move.
const MOVES: TableDefinition<u64, &[u8]> = TableDefinition::new("moves");
/// So many moves are kept. Rows of older ones are sent one by one.
const MOVES_KEPT: u64 = 256;
/// One record, under the empty name: [`Meta`].
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");

/// Where in `META` the index' [`Home`] is.
const HOME: &str = "home";
/// Where in `META` the [`Gap`]s are, oldest first.
const GAPS: &str = "gaps";
/// Where in `META` it says that the first comparison with the tree has not ended;
/// nothing is there if it has.
const COMPARING: &str = "comparing";

/// The layout that this code reads and writes.
const FORMAT: u32 = 4;
/// What redb may keep of the file in memory, bytes.
const CACHE_BYTES: usize = 24 << 20;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    #[error("the index {path} cannot be used: {why}")]
    Storage { path: PathBuf, why: Box<redb::Error> },
    #[error(
        "the index {path} has format {found}, this omirr reads format {FORMAT}: use the omirr that wrote it, or remove the file and let the share be compared anew"
    )]
    Format { path: PathBuf, found: u32 },
    #[error("the index {path} cannot be read ({what}): remove the file and let the share be compared anew")]
    Corrupt { path: PathBuf, what: String },
    #[error("cannot make {path}: {why}")]
    Io { path: PathBuf, why: std::io::Error },
}

impl IndexError {
    /// Whether it may come right by itself: the disk was full, say. A damaged
    /// index, or one of another format, does not.
    pub fn is_passing(&self) -> bool {
        matches!(self, IndexError::Storage { .. } | IndexError::Io { .. })
    }
}

/// What is known of one peer of this share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerState {
    /// The peer's public key.
    pub key: [u8; 32],
    /// The peer's index, as it last said; a new one means starting over.
    pub replica: ReplicaId,
    /// The peer's sequence up to which everything is durably applied here.
    pub cursor: u64,
}

/// The figures and identities that belong to the index as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    pub format: u32,
    pub replica: ReplicaId,
    /// The highest sequence number in use.
    pub head: u64,
    /// Live rows, the root included.
    pub live: u64,
    pub tombstones: u64,
    /// Conflict copies among the live rows.
    pub conflicts: u64,
    /// Live rows of immutable and append-only inodes.
    pub locked: u64,
    /// What live rows say and this node's disk cannot have: why, and of how many
    /// paths.
    pub lacks: Vec<(Box<str>, u64)>,
    /// The greatest stamp given or witnessed.
    pub stamp: Stamp,
    /// The greatest stamp of a tombstone that was forgotten.
    pub forgotten: Option<Stamp>,
    /// Up to this sequence number tombstones were forgotten that may be, with
    /// the peers that `swept_for` is a digest of.
    pub swept: u64,
    pub swept_for: u64,
    /// The root's inode and birth time: an empty mount point has others.
    pub root: Option<(u64, u64)>,
    /// Node names behind replicas.
    pub names: Vec<(ReplicaId, String)>,
    /// By place; [`crate::model::Record::via`] refers to it. Never shrinks.
    pub peers: Vec<PeerState>,
}

/// The index of one share.
pub struct Index {
    path: PathBuf,
    db: redb::Database,
    /// See [`Index::freeze`].
    frozen: Arc<AtomicBool>,
    /// As of the last commit.
    meta: Mutex<Meta>,
    /// The last durable commit: its highest sequence number and its snapshot.
    durable: Mutex<(u64, Arc<redb::ReadTransaction>)>,
    /// As of the opening; none in an index that is new.
    home: Option<Home>,
    gaps: Vec<Gap>,
    comparing: bool,
}

impl Index {
    /// Opens the index at `path`, or makes an empty one for the node `node`.
    ///
    /// The store checks what it repairs and trusts what it finds closed in order,
    /// so damage can make it panic. That is one more word for damage.
    pub fn open(path: &Path, node: &str) -> Result<Index, IndexError> {
        std::panic::catch_unwind(|| Index::open_sound(path, node)).unwrap_or_else(|_panic| {
            Err(IndexError::Corrupt {
                path: path.into(),
                what: "its pages contradict one another".to_owned(),
            })
        })
    }

    fn open_sound(path: &Path, node: &str) -> Result<Index, IndexError> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|why| IndexError::Io {
                path: folder.into(),
                why,
            })?;
        }
        let fail = |error: redb::Error| storage(path, error);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|why| fail(redb::Error::Io(why)))?;
        let frozen = Arc::new(AtomicBool::new(false));
        let file = FileBackend::new(file).map_err(|error| fail(error.into()))?;
        let db = redb::Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(Freezable::new(file, Arc::clone(&frozen)))
            .map_err(|error| fail(error.into()))?;
        crash::here(Point::IndexMade);
        let txn = db.begin_write().map_err(|error| fail(error.into()))?;
        let (found, home, gaps, comparing) = {
            let table = txn.open_table(META).map_err(|error| fail(error.into()))?;
            let get = |name: &str| {
                let record = table.get(name).map_err(|error| fail(error.into()))?;
                Ok::<_, IndexError>(record.map(|record| record.value().to_vec()))
            };
            (get("")?, get(HOME)?, get(GAPS)?, get(COMPARING)?.is_some())
        };
        let corrupt = |what: String| IndexError::Corrupt {
            path: path.into(),
            what,
        };
        let home = home.map(|bytes| crate::wire::codec::from_bytes(&bytes));
        let home = home.transpose().map_err(|what| corrupt(what.to_string()))?;
        let gaps = gaps.map(|bytes| crate::wire::codec::from_bytes(&bytes));
        let gaps = gaps.transpose().map_err(|what| corrupt(what.to_string()))?;
        let meta = match found {
            Some(bytes) => {
                // The format number comes first, so that a layout of another
                // version is told from a damaged one.
                let format = bytes.first_chunk::<4>().map_or(0, |b| u32::from_le_bytes(*b));
                if format != FORMAT {
                    return Err(IndexError::Format {
                        path: path.into(),
                        found: format,
                    });
                }
                crate::wire::codec::from_bytes::<Meta>(&bytes[4..]).map_err(|what| IndexError::Corrupt {
                    path: path.into(),
                    what: what.to_string(),
                })?
            }
            None => {
                let replica = ReplicaId(random_u64());
                Meta {
                    format: FORMAT,
                    replica,
                    head: 0,
                    live: 0,
                    tombstones: 0,
                    conflicts: 0,
                    locked: 0,
                    lacks: Vec::new(),
                    stamp: Stamp {
                        wall_ms: 0,
                        count: 0,
                        replica,
                    },
                    forgotten: None,
                    swept: 0,
                    swept_for: 0,
                    root: None,
                    names: vec![(replica, node.to_owned())],
                    peers: Vec::new(),
                }
            }
        };
        // Every table exists from now on, so that a reader never meets none.
        txn.open_table(ROWS).map_err(|error| fail(error.into()))?;
        txn.open_table(SEQS).map_err(|error| fail(error.into()))?;
        txn.open_table(INODES).map_err(|error| fail(error.into()))?;
        for several in [NAMES, GROUPS, ALIKE] {
            txn.open_multimap_table(several)
                .map_err(|error| fail(error.into()))?;
        }
        txn.open_multimap_table(CONTENTS)
            .map_err(|error| fail(error.into()))?;
        txn.open_table(SKETCHES).map_err(|error| fail(error.into()))?;
        txn.open_table(INTENTS).map_err(|error| fail(error.into()))?;
        txn.open_table(MOVES).map_err(|error| fail(error.into()))?;
        txn.open_table(LEAVES).map_err(|error| fail(error.into()))?;
        txn.open_table(FORMER).map_err(|error| fail(error.into()))?;
        txn.commit().map_err(|error| fail(error.into()))?;
        crash::here(Point::IndexTables);
        let durable = db.begin_read().map_err(|error| fail(error.into()))?;
        let index = Index {
            path: path.into(),
            durable: Mutex::new((meta.head, Arc::new(durable))),
            db,
            frozen,
            meta: Mutex::new(meta),
            home,
            gaps: gaps.unwrap_or_default(),
            comparing,
        };
        index.write(|_| Ok(((), Durable::Yes)))?;
        crash::here(Point::IndexOpened);
        Ok(index)
    }

    pub fn meta(&self) -> Meta {
        self.meta.lock().clone()
    }

    /// Where the index was at home when it was opened; none if it is new.
    pub fn home(&self) -> Option<&Home> {
        self.home.as_ref()
    }

    /// The numbers that had been left out when the index was opened.
    pub fn gaps(&self) -> &[Gap] {
        &self.gaps
    }

    /// Whether the first comparison with the tree had begun when the index was opened,
    /// and not ended.
    pub fn is_comparing(&self) -> bool {
        self.comparing
    }

    pub fn replica(&self) -> ReplicaId {
        self.meta.lock().replica
    }

    /// A snapshot of everything that is committed.
    pub fn read(&self) -> Result<Reader, IndexError> {
        let txn = self.db.begin_read().map_err(|error| self.fail(error))?;
        Reader::new(self.path.clone(), Arc::new(txn))
    }

    /// The highest sequence number of the last durable commit.
    pub fn durable_head(&self) -> u64 {
        self.durable.lock().0
    }

    /// A snapshot of the last durable commit, with its highest sequence number: what
    /// may leave this node. A later snapshot would not do, not even up to that
    /// number: a row that was replaced since is not in it any more.
    pub fn read_durable(&self) -> Result<(u64, Reader), IndexError> {
        let (head, txn) = self.durable.lock().clone();
        Ok((head, Reader::new(self.path.clone(), txn)?))
    }

    /// Runs `work` in a transaction and commits it as durably as `work` says
    /// at its end; an error undoes it all.
    pub fn write<T>(
        &self,
        work: impl FnOnce(&mut Writer<'_>) -> Result<(T, Durable), IndexError>,
    ) -> Result<T, IndexError> {
        let before = self.meta();
        let (result, durable, after) = write::transaction(&self.path, &self.db, before, work)?;
        let head = after.head;
        *self.meta.lock() = after;
        if durable == Durable::Yes {
            // One thread writes: nothing has come in between.
            let txn = self.db.begin_read().map_err(|error| self.fail(error))?;
            *self.durable.lock() = (head, Arc::new(txn));
        }
        Ok(result)
    }

    /// Takes nothing more: what was committed `Later` and no durable commit has
    /// followed is as if it had never been, at the next opening. Without this,
    /// closing makes it durable.
    pub fn freeze(&self) {
        self.frozen.store(true, Ordering::Release);
    }

    fn fail(&self, error: impl Into<redb::Error>) -> IndexError {
        storage(&self.path, error)
    }
}

/// What an error of the store means: a file that is no index, or a damaged one,
/// is of no more use; a full disk or a missing permission will pass.
fn storage(path: &Path, error: impl Into<redb::Error>) -> IndexError {
    let corrupt = |what: String| IndexError::Corrupt {
        path: path.into(),
        what,
    };
    match error.into() {
        redb::Error::Io(why) if why.kind() == std::io::ErrorKind::InvalidData => corrupt(why.to_string()),
        why @ (redb::Error::Corrupted(_)
        | redb::Error::UpgradeRequired(_)
        | redb::Error::TableTypeMismatch { .. }
        | redb::Error::TypeDefinitionChanged { .. }
        | redb::Error::TableIsMultimap(_)
        | redb::Error::TableIsNotMultimap(_)) => corrupt(why.to_string()),
        why => IndexError::Storage {
            path: path.into(),
            why: Box::new(why),
        },
    }
}

/// A random number from the kernel.
pub fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes)
        .expect("getrandom(2) gives bytes once the kernel has booted");
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::Leaves;
    use crate::model::{
        Entry, Flags, Hash, Kind, LinkGroup, Moved, Record, RelPath, Row, Sketch, StatSig, Time, TreeMove,
        Vector, Version, Xattr,
    };

    fn record(seq: u64, ino: u64, deleted: bool, link: Option<u64>) -> Record {
        let time = Time { secs: 1, nanos: 2 };
        Record {
            row: Row {
                entry: Entry {
                    kind: Kind::Fifo,
                    mode: 0o644,
                    uid: 0,
                    gid: 0,
                    mtime: time,
                    xattrs: Vec::new(),
                    flags: Flags::NONE,
                    user: None,
                    group: None,
                    link: link.map(LinkGroup),
                },
                deleted,
                version: Version {
                    vector: Vector::from_iter([(ReplicaId(1), seq)]),
                    stamp: Stamp {
                        wall_ms: seq,
                        count: 0,
                        replica: ReplicaId(1),
                    },
                },
                origin: None,
            },
            seq,
            sig: (!deleted).then_some(StatSig {
                ino,
                btime: time,
                mtime: time,
                ctime: time,
                size: 0,
                mode: 0o10644,
                uid: 0,
                gid: 0,
                nlink: 1,
                racy: false,
            }),
            via: None,
            moved_from: None,
            here: None,
        }
    }

    fn path(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn rows_of_many_bytes_are_there_while_they_are_written_and_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(&folder.path().join("index.redb"), "one").unwrap();
        let large = |seq: u64| {
            let mut record = record(seq, 100 + seq, false, None);
            record.row.entry.xattrs = vec![Xattr {
                name: b"user.large"[..].into(),
                value: vec![seq as u8; 64 << 10].into(),
            }];
            record
        };
        let names: Vec<_> = (1..=200).rev().map(|nth| path(&format!("{nth}"))).collect();
        index
            .write(|w| {
                for name in &names {
                    let seq = w.next_seq();
                    w.put(name, &large(seq))?;
                    assert_eq!(w.get(name)?, Some(large(seq)));
                    assert_eq!(w.get(&names[0])?, Some(large(1)));
                }
                Ok(((), Durable::Yes))
            })
            .unwrap();
        let reader = index.read().unwrap();
        for (nth, name) in (1..).zip(&names) {
            assert_eq!(reader.get(name).unwrap(), Some(large(nth)));
            assert_eq!(reader.path_of_ino(100 + nth).unwrap().as_ref(), Some(name));
        }
    }

    #[test]
    fn keeps_each_path_once_in_sequence_order() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("index.redb");
        let index = Index::open(&file, "one").unwrap();
        index
            .write(|w| {
                for (name, ino) in [("a", 10), ("a/b", 11), ("a-b", 12)] {
                    let seq = w.next_seq();
                    w.put(&path(name), &record(seq, ino, false, Some(7)))?;
                }
                let seq = w.next_seq();
                Ok((w.put(&path("a"), &record(seq, 10, false, None))?, Durable::Yes))
            })
            .unwrap();
        drop(index);
        let index = Index::open(&file, "one").unwrap();
        let meta = index.meta();
        assert_eq!((meta.head, meta.live, meta.tombstones), (4, 3, 0));
        let read = index.read().unwrap();
        let order: Vec<_> = read
            .rows_after(0, 10)
            .unwrap()
            .into_iter()
            .map(|(s, p, _)| (s, p.to_string()))
            .collect();
        assert_eq!(
            order,
            [(2, "a/b".to_owned()), (3, "a-b".to_owned()), (4, "a".to_owned())]
        );
        let beneath: Vec<_> = read
            .beneath(&path("a"))
            .unwrap()
            .map(|r| r.unwrap().0.to_string())
            .collect();
        assert_eq!(beneath, ["a/b"]);
        assert_eq!(read.path_of_ino(12).unwrap(), Some(path("a-b")));
        assert_eq!(read.group(LinkGroup(7)).unwrap(), [path("a-b"), path("a/b")]);
        assert_eq!(read.paths_of_ino(12).unwrap(), [path("a-b")]);
        assert!(read.has_live_beneath(&path("a")).unwrap());
        index
            .write(|w| {
                let seq = w.next_seq();
                Ok((w.put(&path("a/b"), &record(seq, 0, true, None))?, Durable::Yes))
            })
            .unwrap();
        let read = index.read().unwrap();
        assert!(!read.has_live_beneath(&path("a")).unwrap());
        assert_eq!(read.path_of_ino(11).unwrap(), None);
        assert_eq!((index.meta().live, index.meta().tombstones), (2, 1));
    }

    #[test]
    fn finds_large_contents_and_what_is_like_them_as_long_as_a_path_has_them() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(&folder.path().join("index.redb"), "one").unwrap();
        let put = |name: &str, deleted: bool, size: u64, byte: u8, values: &[u64]| {
            index
                .write(|w| {
                    let mut record = record(w.next_seq(), 0, deleted, None);
                    let hash = Hash([byte; 32]);
                    record.row.entry.kind = Kind::File { size, hash };
                    w.put(&path(name), &record)?;
                    w.put_sketch(&record.row.entry, &Sketch::of_least(values.to_vec()))?;
                    Ok(((), Durable::Later))
                })
                .unwrap();
        };
        let with = |byte| index.read().unwrap().with_content(&Hash([byte; 32])).unwrap();
        let alike = |values: &[u64]| {
            let sketch = Sketch::of_least(values.to_vec());
            index.read().unwrap().most_alike(&sketch).unwrap()
        };
        put("small", false, LARGE_BYTES, 1, &[1, 2, 3]);
        assert_eq!((with(1), alike(&[1, 2, 3])), (None, None));
        put("a", false, LARGE_BYTES + 1, 2, &[1, 2, 3]);
        put("b", false, LARGE_BYTES + 1, 3, &[3, 4, 5]);
        assert_eq!((with(2), with(3)), (Some(path("a")), Some(path("b"))));
        assert_eq!(alike(&[1, 3, 5, 4]), Some((path("b"), 3)));
        assert_eq!(alike(&[1, 2, 9]), Some((path("a"), 2)));
        assert_eq!(alike(&[9]), None);
        // A rename, as two transactions and the other way round.
        put("c", false, LARGE_BYTES + 1, 2, &[]);
        put("a", true, LARGE_BYTES + 1, 2, &[]);
        assert_eq!(
            alike(&[1, 2]),
            Some((path("c"), 2)),
            "the sketch stays with its content"
        );
        put("c", false, LARGE_BYTES + 1, 4, &[7]);
        assert_eq!((with(2), alike(&[1, 2])), (None, None));
        assert_eq!(alike(&[7]), Some((path("c"), 1)));
        assert_eq!(alike(&[3]), Some((path("b"), 1)));
    }

    #[test]
    fn finds_all_names_of_an_inode() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(&folder.path().join("index.redb"), "one").unwrap();
        let put = |name: &str, ino: u64, nlink: u32, deleted: bool| {
            index
                .write(|w| {
                    let mut record = record(w.next_seq(), ino, deleted, None);
                    if let Some(sig) = &mut record.sig {
                        sig.nlink = nlink;
                    }
                    Ok((w.put(&path(name), &record)?, Durable::Later))
                })
                .unwrap();
        };
        let names = |ino| index.read().unwrap().paths_of_ino(ino).unwrap();
        put("a", 5, 1, false);
        put("b", 5, 2, false);
        // `a` was last seen when it was the only one.
        assert_eq!(names(5), [path("b")]);
        put("a", 5, 2, false);
        put("c", 5, 3, false);
        assert_eq!(names(5), [path("a"), path("b"), path("c")]);
        // One becomes another inode, one goes.
        put("a", 6, 1, false);
        put("b", 0, 0, true);
        assert_eq!(names(5), [path("c")]);
        assert_eq!(names(6), [path("a")]);
    }

    #[test]
    fn of_two_paths_of_an_inode_the_one_put_last_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(&folder.path().join("index.redb"), "one").unwrap();
        let put = |names: &[(&str, u64, bool)]| {
            index
                .write(|w| {
                    for (name, ino, deleted) in names {
                        let record = record(w.next_seq(), *ino, *deleted, None);
                        w.put(&path(name), &record)?;
                    }
                    Ok(((), Durable::Yes))
                })
                .unwrap();
        };
        let found = |ino| index.read().unwrap().path_of_ino(ino).unwrap();
        // Renamed between two looks of one pass, and the old name's end told later.
        put(&[(".f.tmp", 5, false), ("f", 5, false)]);
        assert_eq!(found(5), Some(path("f")));
        put(&[(".f.tmp", 0, true)]);
        assert_eq!(found(5), Some(path("f")));
        // Onto a name that was there.
        put(&[(".f.tmp2", 6, false), ("f", 6, false)]);
        assert_eq!((found(5), found(6)), (None, Some(path("f"))));
        put(&[("f", 7, false), ("g", 7, false)]);
        assert_eq!(found(7), Some(path("g")));
    }

    #[test]
    fn an_error_undoes_the_transaction() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(&folder.path().join("index.redb"), "one").unwrap();
        let failed: Result<(), _> = index.write(|w| {
            let seq = w.next_seq();
            w.put(&path("a"), &record(seq, 1, false, None))?;
            Err(IndexError::Corrupt {
                path: "x".into(),
                what: "test".to_owned(),
            })
        });
        assert!(failed.is_err());
        assert_eq!(index.meta().head, 0);
        assert!(index.read().unwrap().get(&path("a")).unwrap().is_none());
    }

    #[test]
    fn what_is_not_durable_when_it_is_frozen_is_not_there_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("index.redb");
        for (freeze, name) in [(false, "a"), (true, "b")] {
            let index = Index::open(&file, "one").unwrap();
            index
                .write(|w| {
                    let seq = w.next_seq();
                    Ok((
                        w.put(&path(name), &record(seq, seq, false, None))?,
                        Durable::Later,
                    ))
                })
                .unwrap();
            if freeze {
                index.freeze();
            }
        }
        let index = Index::open(&file, "one").unwrap();
        let reader = index.read().unwrap();
        assert!(reader.get(&path("a")).unwrap().is_some());
        assert!(reader.get(&path("b")).unwrap().is_none());
        assert_eq!(index.meta().head, 1);
    }

    #[test]
    fn a_row_that_is_disowned_outdates_nothing_and_numbers_left_out_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("index.redb");
        let gap = Gap { after: 5, upto: 9 };
        let index = Index::open(&at, "one").unwrap();
        index
            .write(|w| {
                w.put(&path("old"), &record(5, 7, false, Some(3)))?;
                w.disown(&path("old"))?;
                w.set_gaps(vec![gap]);
                Ok(((), Durable::Yes))
            })
            .unwrap();
        // A file that is found there is as old as it is, not newer than the row.
        assert_eq!((index.meta().forgotten, index.meta().live), (None, 0));
        assert!(index.read().unwrap().get(&path("old")).unwrap().is_none());
        drop(index);
        assert_eq!(Index::open(&at, "one").unwrap().gaps(), [gap]);
    }

    #[test]
    fn a_first_comparison_goes_on_until_its_end_is_durable() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("index.redb");
        let set = |comparing, durable, freeze: bool| {
            let index = Index::open(&file, "one").unwrap();
            index
                .write(|w| {
                    w.set_comparing(comparing);
                    Ok(((), durable))
                })
                .unwrap();
            if freeze {
                index.freeze();
            }
        };
        let is_comparing = || Index::open(&file, "one").unwrap().is_comparing();
        assert!(!is_comparing());
        set(true, Durable::Yes, true);
        assert!(is_comparing() && is_comparing());
        set(false, Durable::Later, true);
        assert!(is_comparing());
        set(false, Durable::Later, false);
        assert!(!is_comparing());
    }

    #[test]
    fn another_format_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("index.redb");
        drop(Index::open(&file, "one").unwrap());
        let db = redb::Database::create(&file).unwrap();
        let txn = db.begin_write().unwrap();
        txn.open_table(META)
            .unwrap()
            .insert("", &[9u8, 0, 0, 0][..])
            .unwrap();
        txn.commit().unwrap();
        drop(db);
        let error = Index::open(&file, "one").err().unwrap().to_string();
        let said = format!("format 9, this omirr reads format {FORMAT}");
        assert!(error.contains(&said), "{error}");
    }

    #[test]
    fn the_last_moves_are_kept_and_found_by_any_of_their_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(&folder.path().join("index.redb"), "one").unwrap();
        let moved = |nth: u64| Moved {
            from: path(&format!("d{nth}")),
            stamp: record(1, 1, true, None).row.version.stamp,
            tree: TreeMove {
                to: path("e"),
                count: 3,
                digest: Hash([0; 32]),
            },
        };
        for nth in 1..=MOVES_KEPT + 1 {
            let moves = vec![(nth * 10, moved(nth))];
            index.write(|w| Ok((w.put_moves(moves)?, Durable::Yes))).unwrap();
        }
        let read = index.read().unwrap();
        assert_eq!(read.moves().unwrap().len() as u64, MOVES_KEPT);
        // Numbers 15 to 20 are the second's; the first is forgotten.
        for (seq, found) in [
            (10, None),
            (14, None),
            (15, Some(2)),
            (20, Some(2)),
            (21, None),
            (25, Some(3)),
        ] {
            let expected = found.map(|nth| (nth * 10, moved(nth)));
            assert_eq!(read.move_over(seq).unwrap(), expected, "{seq}");
        }
    }

    #[test]
    fn rows_are_found_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(&folder.path().join("index.redb"), "one").unwrap();
        index
            .write(|w| {
                for (name, deleted) in [
                    ("a", false),
                    ("d", false),
                    ("d/long", false),
                    ("d/long-1", false),
                    ("d/long-1/long", false),
                    ("d/long-2", true),
                    ("d/lonely", false),
                ] {
                    let seq = w.next_seq();
                    w.put(&path(name), &record(seq, 10 + seq, deleted, None))?;
                }
                Ok(((), Durable::Yes))
            })
            .unwrap();
        let read = index.read().unwrap();
        let long = |path: &RelPath| path.name().starts_with(b"long");
        let found: Vec<_> = read
            .live_where(long)
            .unwrap()
            .map(|row| row.unwrap().0.to_string())
            .collect();
        assert_eq!(found, ["d/long", "d/long-1", "d/long-1/long"]);
        let beginning = |limit| read.names_beginning(&path("d"), b"long", limit).unwrap();
        assert_eq!(beginning(10), [b"long".to_vec(), b"long-1".to_vec()]);
        assert_eq!(beginning(1), [b"long".to_vec()]);
    }

    #[test]
    fn children_are_found_by_their_names_and_what_lies_beneath_them_is_passed_by() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(&folder.path().join("index.redb"), "one").unwrap();
        let mut known = vec!["a".to_owned(), "d".to_owned(), "d-".to_owned(), "e".to_owned()];
        for nth in 0..200 {
            known.push(format!("d/f{nth:03}"));
            // Much in one, little in others.
            known.extend((0..nth % 23).map(|deep| format!("d/f{nth:03}/{deep}")));
            known.push(format!("d/f{nth:03}-"));
        }
        index
            .write(|w| {
                for name in &known {
                    let seq = w.next_seq();
                    w.put(&path(name), &record(seq, 10 + seq, false, None))?;
                }
                Ok(((), Durable::Yes))
            })
            .unwrap();
        let read = index.read().unwrap();
        let ask = |dir: &RelPath, mut names: Vec<String>| {
            names.sort();
            let mut items: Vec<(String, Option<Record>)> =
                names.into_iter().map(|name| (name, None)).collect();
            read.get_each(
                dir,
                &mut items,
                |item| item.0.as_bytes(),
                |item, found| item.1 = found,
            )
            .unwrap();
            for (name, found) in &items {
                let at = dir.join(name.as_bytes()).unwrap();
                assert_eq!(*found, read.get(&at).unwrap(), "{at}");
            }
            items.iter().filter(|item| item.1.is_some()).count()
        };
        let every = (0..250).flat_map(|nth| ["", "-", "x"].map(|end| format!("f{nth:03}{end}")));
        assert_eq!(ask(&path("d"), every.collect()), 400);
        let few = [3, 77, 78, 150].map(|nth| format!("f{nth:03}"));
        assert_eq!(ask(&path("d"), few.to_vec()), 4);
        let top = ["a", "b", "d", "d-", "z"].map(str::to_owned);
        assert_eq!(ask(&RelPath::root(), top.to_vec()), 3);
        assert_eq!(ask(&path("e"), vec!["f".to_owned()]), 0);
    }

    #[test]
    fn leaves_are_known_while_a_content_is_here_and_for_a_while_after() {
        let folder = tempfile::tempdir().unwrap();
        let index = Index::open(&folder.path().join("index.redb"), "one").unwrap();
        // Versions of one file, one after the other.
        let list = |version: u8| Leaves::new(5 << 20, vec![[version; 32]; 5]).unwrap();
        let put = |version: u8| {
            let mut record = record(u64::from(version) + 1, 7, false, None);
            record.row.entry.kind = Kind::File {
                size: 5 << 20,
                hash: list(version).hash(),
            };
            index
                .write(|w| {
                    w.put(&path("f"), &record)?;
                    w.put_leaves(&record.row.entry, Some(&list(version)))?;
                    Ok(((), Durable::Later))
                })
                .unwrap();
        };
        let known = |version: u8| {
            let found = index.read().unwrap().leaves_of(&list(version).hash()).unwrap();
            assert!(found.as_ref().is_none_or(|found| *found == list(version)));
            found.is_some()
        };
        let last = FORMER_KEPT as u8 + 1;
        for version in 0..=last {
            put(version);
            assert!(known(version));
        }
        assert!(!known(0) && known(1), "one more than are kept has gone");
        // What comes back stays, however many go.
        put(1);
        (50..90).for_each(|version| {
            let mut record = record(1000 + u64::from(version), 8, false, None);
            record.row.entry.kind = Kind::File {
                size: 5 << 20,
                hash: list(version).hash(),
            };
            index
                .write(|w| {
                    w.put(&path("g"), &record)?;
                    w.put_leaves(&record.row.entry, Some(&list(version)))?;
                    Ok(((), Durable::Later))
                })
                .unwrap();
        });
        assert!(known(1) && known(89) && !known(50));
    }
}
