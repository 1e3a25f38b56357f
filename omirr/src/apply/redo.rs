//! What is about to be written over a file, noted where a crash leaves it.
//!
//! In: the edits that make a new content of an old one. Out: a [`Redo`], a file
//! beside the index, whole and on the disk before the first byte of the tree is
//! written, and gone when the row that says so is durable. After a crash it
//! tells sector by sector what of the file is old, what is new and what neither:
//! that a user has changed since. A record that is not whole was never acted on.
//! `docs/INDEX.md` has its layout. The tree is not touched here.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::content::patch::Edit;
use crate::crash::{self, Point};
use crate::model::{Hash, RelPath, Time};
use crate::wire::codec;

/// First bytes, with the number of the layout.
const MAGIC: [u8; 8] = *b"omirrdo\x01";
/// What a disk writes wholly or not at all, bytes.
pub(super) const SECTOR_BYTES: usize = 512;
/// Kinds of records.
const END: u8 = 0;
const DATA: u8 = 1;
const HOLE: u8 = 2;
/// No edit is longer than a leaf, and no head than this.
const EDIT_MAX: u32 = 1 << 20;
const HEAD_MAX: u32 = 64 << 10;
/// The digest of all that comes before it, at the end.
const DIGEST_BYTES: u64 = 32;

/// Whose content is to change into which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedoHead {
    pub path: RelPath,
    /// The file's inode and its birth time.
    pub ino: u64,
    pub btime: Time,
    pub old_size: u64,
    pub old_hash: Hash,
    pub size: u64,
    pub hash: Hash,
}

/// What a record says of one run of bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Noted {
    pub(super) at: u64,
    pub(super) len: u64,
    /// None for a hole.
    pub(super) bytes: Option<Vec<u8>>,
    /// By sector: the name of what was there.
    pub(super) old: Vec<u64>,
}

/// Eight bytes of the hash of a sector, which is filled up with zeros: it tells
/// what was there from what a user wrote, and nobody gains by deceiving it.
pub(super) fn sector_name(bytes: &[u8]) -> u64 {
    let mut sector = [0; SECTOR_BYTES];
    sector[..bytes.len()].copy_from_slice(bytes);
    let hash: [u8; 32] = blake3::hash(&sector).into();
    u64::from_le_bytes(*hash.first_chunk().expect("8 of 32 bytes"))
}

/// The records of one share, in a folder of their own.
pub struct Redos {
    folder: PathBuf,
    /// Acted on; needed until the rows that say so are durable.
    used: Mutex<Vec<PathBuf>>,
}

impl Redos {
    /// Those in `folder`, which is made when it is needed.
    pub fn new(folder: PathBuf) -> Arc<Redos> {
        Arc::new(Redos {
            folder,
            used: Mutex::default(),
        })
    }

    /// Begins a record.
    pub fn begin(self: &Arc<Redos>, head: RedoHead) -> io::Result<RedoWriter> {
        fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(super::temp_name());
        let file = File::create_new(&path)?;
        let bytes = codec::to_bytes(&head).map_err(io::Error::other)?;
        let mut writer = RedoWriter {
            file: BufWriter::with_capacity(256 << 10, file),
            digest: blake3::Hasher::new(),
            redo: Redo {
                path,
                head,
                redos: Arc::clone(self),
                keep: false,
            },
        };
        writer.put(&MAGIC)?;
        writer.put(&(bytes.len() as u32).to_le_bytes())?;
        writer.put(&bytes)?;
        Ok(writer)
    }

    /// Removes those whose rows are durable. For the keeper, after a durable
    /// commit of everything that was applied.
    pub fn forget_used(&self) {
        for path in std::mem::take(&mut *self.used.lock()) {
            // One that stays is found to be of no use at the next start.
            let _ = fs::remove_file(path);
            crash::here(Point::RedoRemoved);
        }
    }

    /// The whole ones that the last run has left. They stay until [`clear`](Redos::clear).
    pub(super) fn left(self: &Arc<Redos>) -> io::Result<Vec<Redo>> {
        let mut left = Vec::new();
        for path in self.files()? {
            if let Some(head) = read_whole(&path)? {
                left.push(Redo {
                    path,
                    head,
                    redos: Arc::clone(self),
                    keep: true,
                });
            }
        }
        Ok(left)
    }

    /// Removes everything that the last run has left.
    pub fn clear(&self) -> io::Result<()> {
        for path in self.files()? {
            fs::remove_file(path)?;
            crash::here(Point::RedoRemoved);
        }
        Ok(())
    }

    fn files(&self) -> io::Result<Vec<PathBuf>> {
        match fs::read_dir(&self.folder) {
            Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
            Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(why) => Err(why),
        }
    }
}

/// A record that is being written; dropped before it is sealed, it is gone.
pub struct RedoWriter {
    file: BufWriter<File>,
    digest: blake3::Hasher,
    redo: Redo,
}

impl RedoWriter {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.digest.update(bytes);
        self.file.write_all(bytes)
    }

    /// Notes one edit.
    pub fn edit(&mut self, edit: Edit<'_>) -> io::Result<()> {
        let kind = if edit.bytes.is_some() { DATA } else { HOLE };
        let len = u32::try_from(edit.len).ok().filter(|len| *len <= EDIT_MAX);
        let len = len.ok_or(io::ErrorKind::FileTooLarge)?;
        self.put(&[kind])?;
        self.put(&edit.at.to_le_bytes())?;
        self.put(&len.to_le_bytes())?;
        for sector in 0..(len as usize).div_ceil(SECTOR_BYTES) {
            let old = edit.old.get(sector * SECTOR_BYTES..).unwrap_or_default();
            let name = sector_name(&old[..old.len().min(SECTOR_BYTES)]);
            self.put(&name.to_le_bytes())?;
        }
        self.put(edit.bytes.unwrap_or_default())
    }

    /// Returns once the record is whole and on the disk.
    pub fn seal(mut self) -> io::Result<Redo> {
        self.put(&[END])?;
        let digest: [u8; 32] = self.digest.finalize().into();
        self.file.write_all(&digest)?;
        self.file.flush()?;
        crash::here(Point::RedoWritten);
        self.file.get_ref().sync_data()?;
        File::open(&self.redo.redos.folder)?.sync_data()?;
        crash::here(Point::RedoSealed);
        Ok(self.redo)
    }
}

/// A record that is whole. Dropped without having been used, it is removed.
pub struct Redo {
    path: PathBuf,
    pub(super) head: RedoHead,
    redos: Arc<Redos>,
    keep: bool,
}

impl Redo {
    /// From now on the file in the tree may be neither old nor new: the record
    /// stays until its row is durable.
    pub(super) fn using(&mut self) {
        if !self.keep {
            self.keep = true;
            self.redos.used.lock().push(self.path.clone());
        }
    }

    /// The edits, one after the other.
    pub(super) fn each<E: From<io::Error>>(
        &self,
        mut with: impl FnMut(Noted) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut file = io::BufReader::with_capacity(256 << 10, File::open(&self.path)?);
        read_head(&mut file)?;
        while let Some(noted) = read_edit(&mut file)? {
            with(noted)?;
        }
        Ok(())
    }
}

impl Drop for Redo {
    fn drop(&mut self) {
        if !self.keep {
            // One that stays is found to be of no use at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn read_array<const N: usize>(file: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_head(file: &mut impl Read) -> io::Result<RedoHead> {
    if read_array::<8>(file)? != MAGIC {
        return Err(invalid("another layout"));
    }
    let len = u32::from_le_bytes(read_array(file)?);
    if len > HEAD_MAX {
        return Err(invalid("too long a head"));
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact(&mut bytes)?;
    codec::from_bytes(&bytes).map_err(io::Error::other)
}

fn read_edit(file: &mut impl Read) -> io::Result<Option<Noted>> {
    let [kind] = read_array(file)?;
    if kind == END {
        return Ok(None);
    }
    let at = u64::from_le_bytes(read_array(file)?);
    let len = u32::from_le_bytes(read_array(file)?);
    if len > EDIT_MAX || kind > HOLE {
        return Err(invalid("no such edit"));
    }
    let mut old = Vec::with_capacity((len as usize).div_ceil(SECTOR_BYTES));
    while old.len() < old.capacity() {
        old.push(u64::from_le_bytes(read_array(file)?));
    }
    let bytes = match kind {
        DATA => {
            let mut bytes = vec![0; len as usize];
            file.read_exact(&mut bytes)?;
            Some(bytes)
        }
        _ => None,
    };
    Ok(Some(Noted {
        at,
        len: u64::from(len),
        bytes,
        old,
    }))
}

/// The head of a record that is whole.
fn read_whole(path: &Path) -> io::Result<Option<RedoHead>> {
    let mut file = File::open(path)?;
    let Some(len) = file.metadata()?.len().checked_sub(DIGEST_BYTES) else {
        return Ok(None);
    };
    let mut digest = blake3::Hasher::new();
    io::copy(&mut (&mut file).take(len), &mut digest)?;
    if read_array::<32>(&mut file)? != *digest.finalize().as_bytes() {
        return Ok(None);
    }
    Ok(read_head(&mut io::BufReader::new(File::open(path)?)).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> RedoHead {
        RedoHead {
            path: RelPath::new(b"a/b").unwrap(),
            ino: 7,
            btime: Time { secs: 1, nanos: 2 },
            old_size: 5000,
            old_hash: Hash([8; 32]),
            size: 6000,
            hash: Hash([9; 32]),
        }
    }

    fn write(redos: &Arc<Redos>) -> Redo {
        let mut writer = redos.begin(head()).unwrap();
        let (old, new) = ([1; 600], [2; 1000]);
        let data = Edit {
            at: 4400,
            len: 1000,
            bytes: Some(&new),
            old: &old,
        };
        writer.edit(data).unwrap();
        let hole = Edit {
            at: 0,
            len: 4096,
            bytes: None,
            old: &[3; 4096],
        };
        writer.edit(hole).unwrap();
        writer.seal().unwrap()
    }

    #[test]
    fn what_was_noted_is_read_back_and_goes_when_it_is_of_no_more_use() {
        let folder = tempfile::tempdir().unwrap();
        let redos = Redos::new(folder.path().join("redo"));
        let count = || fs::read_dir(folder.path().join("redo")).unwrap().count();
        let mut redo = write(&redos);
        let mut noted = Vec::new();
        redo.each(|edit| {
            noted.push(edit);
            Ok::<_, io::Error>(())
        })
        .unwrap();
        assert_eq!((noted[0].at, noted[0].len), (4400, 1000));
        assert_eq!(noted[0].bytes.as_deref(), Some(&[2; 1000][..]));
        let half = [&[1; 88][..], &[0; 424]].concat();
        assert_eq!(noted[0].old, [sector_name(&[1; 512]), sector_name(&half)]);
        assert_eq!(noted[1].bytes, None);
        assert_eq!(noted[1].old, [sector_name(&[3; 512]); 8]);
        drop(write(&redos));
        assert_eq!(count(), 1, "one that was not used is gone");
        redo.using();
        drop(redo);
        assert_eq!(redos.left().unwrap()[0].head, head());
        redos.forget_used();
        assert_eq!(count(), 0);
    }

    #[test]
    fn a_record_that_is_not_whole_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let redos = Redos::new(folder.path().to_owned());
        let redo = write(&redos);
        let bytes = fs::read(&redo.path).unwrap();
        for cut in (0..bytes.len()).step_by(37) {
            fs::write(&redo.path, &bytes[..cut]).unwrap();
            assert!(redos.left().unwrap().is_empty(), "cut at {cut}");
            let mut bad = bytes.clone();
            bad[cut] ^= 1;
            fs::write(&redo.path, &bad).unwrap();
            assert!(redos.left().unwrap().is_empty(), "flipped at {cut}");
        }
        redos.clear().unwrap();
        assert!(!redo.path.exists());
    }
}
