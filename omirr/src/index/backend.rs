//! The file under the store, which can be told to take no more.
//!
//! In: the store's reads and writes. Out: the same to the file, until it is
//! frozen; from then on every write fails. redb makes its last commits durable
//! when it is closed, wanted or not. Rows whose names could not be brought to
//! the disk must not become durable: after a restart they would say that
//! something is there which is not, and that would pass for a deletion.

use std::io;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

#[derive(Debug)]
pub(super) struct Freezable {
    file: FileBackend,
    frozen: Arc<AtomicBool>,
}

impl Freezable {
    /// Frozen as soon as `frozen` is set.
    pub(super) fn new(file: FileBackend, frozen: Arc<AtomicBool>) -> Freezable {
        Freezable { file, frozen }
    }

    fn may_write(&self) -> io::Result<()> {
        match self.frozen.load(Ordering::Acquire) {
            true => Err(io::Error::other(
                "the index takes nothing more until it is opened again",
            )),
            false => Ok(()),
        }
    }
}

impl StorageBackend for Freezable {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.may_write()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.may_write()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.may_write()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
