//! Where an index is at home: what tells it from a copy of itself.
//!
//! In: the index' file, the machine, the node's key. Out: a value that the index
//! keeps, and how it differs from what is found at the next start. An index that
//! was copied, restored or cloned would give numbers to its rows that another
//! has given to others; nothing here decides what follows from that.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::IndexError;

/// Where systemd and D-Bus keep the machine's number.
const MACHINE_ID: &str = "/etc/machine-id";

/// What is the same at every start, until the index is copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// Contents of `/etc/machine-id`; empty where there is none.
    machine: String,
    /// The index file's inode and birth time, ns (0 where the filesystem keeps
    /// none). A copy has others.
    file: (u64, u64),
    /// The node's public key. Peers know the node by it alone.
    key: [u8; 32],
}

impl Home {
    /// Of the index file at `path`, which is there, on this machine.
    pub fn of(path: &Path, key: [u8; 32]) -> Result<Home, IndexError> {
        let fail = |why| IndexError::Io {
            path: path.into(),
            why,
        };
        let found = std::fs::metadata(path).map_err(fail)?;
        let born = found.created().ok();
        let born = born.and_then(|born| born.duration_since(std::time::UNIX_EPOCH).ok());
        let born = born.map_or(0, |born| u64::try_from(born.as_nanos()).unwrap_or(0));
        let machine = std::fs::read_to_string(MACHINE_ID).unwrap_or_default();
        Ok(Home {
            machine: machine.trim().to_owned(),
            file: (found.ino(), born),
            key,
        })
    }

    /// In words, how `self`, as it is now, differs from what the index had.
    pub fn differs_from(&self, known: &Home) -> Option<&'static str> {
        if self.machine != known.machine && !known.machine.is_empty() {
            Some("it was last used on another machine")
        } else if self.file != known.file {
            Some("it was last used in another file")
        } else if self.key != known.key {
            Some("it was last used with another key")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_told_from_the_index_and_a_restart_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (file, copy) = (folder.path().join("index"), folder.path().join("copy"));
        std::fs::write(&file, "rows").unwrap();
        let home = Home::of(&file, [1; 32]).unwrap();
        assert_eq!(Home::of(&file, [1; 32]).unwrap().differs_from(&home), None);
        std::fs::copy(&file, &copy).unwrap();
        let copied = Home::of(&copy, [1; 32]).unwrap();
        assert_eq!(
            copied.differs_from(&home),
            Some("it was last used in another file")
        );
        let other = Home {
            machine: "another".to_owned(),
            ..home.clone()
        };
        let of_other = Home {
            machine: "this".to_owned(),
            ..home.clone()
        };
        assert_eq!(
            of_other.differs_from(&other),
            Some("it was last used on another machine")
        );
        let new_key = Home::of(&file, [2; 32]).unwrap();
        assert_eq!(
            new_key.differs_from(&home),
            Some("it was last used with another key")
        );
    }
}
