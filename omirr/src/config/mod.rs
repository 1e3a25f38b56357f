//! The configuration: what the file says, checked against what can be.
//!
//! In: a TOML file. Out: a [`Config`] of plain values that are known to be
//! right, or every mistake in it at once, each with its line and the way out.
//! Nothing here is changed on the machine, and no peer is asked for anything: a
//! name that does not resolve yet is the network's business.
//!
//! Three steps, each of which goes on after a mistake: [`read`] takes the TOML
//! apart (types, words, unknown keys), [`check`] compares values with one
//! another and with the machine (peers, keys, paths), and only a file without a
//! mistake becomes a [`Config`].

mod check;
pub mod defaults;
mod excludes;
mod mistake;
mod read;
mod section;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use self::mistake::Mistakes;
pub use crate::apply::OwnersBy;
pub use crate::engine::Policy;
pub use crate::model::Mode;

pub use self::{
    excludes::{Excludes, PatternError},
    mistake::{ConfigErrors, Mistake},
};
use crate::net::PublicKey;
pub use crate::source::choice::{Attach, SourceKind, Transport};

/// The most that a configuration file may hold, bytes: far above any real one,
/// and a bound for `-c /dev/zero`.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A node's whole configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub node: Node,
    pub tracer: Tracer,
    /// The other nodes, by the name that this one gives them.
    pub peers: BTreeMap<String, Peer>,
    /// The trees that are mirrored, by the name that all nodes give them.
    pub shares: BTreeMap<String, Share>,
}

/// This node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    /// `ADDRESS:PORT`, each a valid socket address; at least one.
    pub listen: Vec<String>,
    /// The private key's file; readable by its owner only.
    pub key: PathBuf,
    /// Holds the index, the lock and the control socket; need not exist yet.
    pub state_dir: PathBuf,
}

/// How changes are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracer {
    pub source: SourceKind,
    pub attach: Attach,
    pub transport: Transport,
    pub ring_bytes: usize,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// `HOST:PORT`, where HOST is a name or an address.
    pub address: String,
    /// Its public key: the only thing that makes it this peer.
    pub key: PublicKey,
}

/// A tree that is mirrored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Absolute; was a directory when the configuration was read.
    pub path: PathBuf,
    /// Names in [`Config::peers`], and which way changes go; at least one.
    pub peers: Vec<(String, Mode)>,
    pub excludes: Excludes,
    pub conflicts: Policy,
    /// How owners are told from one another across nodes.
    pub owners: OwnersBy,
}

impl Config {
    /// Reads and checks the configuration at `path`.
    pub fn load(path: &Path) -> Result<Config, ConfigErrors> {
        let whole_file = |text: String| ConfigErrors {
            file: path.to_owned(),
            mistakes: vec![Mistake { line: None, text }],
        };
        let bytes = read_file(path).map_err(whole_file)?;
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            Err(why) => {
                let line = bytes[..why.valid_up_to()]
                    .iter()
                    .filter(|&&byte| byte == b'\n')
                    .count()
                    + 1;
                let text = "is not UTF-8, which TOML requires: write other bytes as escapes".to_owned();
                return Err(ConfigErrors {
                    file: path.to_owned(),
                    mistakes: vec![Mistake {
                        line: Some(line),
                        text,
                    }],
                });
            }
        };
        Config::parse(text).map_err(|mistakes| ConfigErrors {
            file: path.to_owned(),
            mistakes,
        })
    }

    /// Checks `text` as the content of a configuration file.
    pub fn parse(text: &str) -> Result<Config, Vec<Mistake>> {
        let mut mistakes = Mistakes::new(text);
        let draft = read::read(text, &mut mistakes);
        check::check(&draft, &mut mistakes);
        let config = draft.finish();
        let found = mistakes.into_vec();
        match config {
            Some(config) if found.is_empty() => Ok(config),
            _ => Err(found),
        }
    }
}

/// The state directory that the configuration at `path` names, and nothing
/// else of it: `omirr status` must reach a daemon whose configuration has a
/// mistake by now.
pub fn state_dir_of(path: &Path) -> Result<PathBuf, String> {
    let bytes = read_file(path).map_err(|why| format!("{}: {why}", path.display()))?;
    Ok(read::state_dir(&String::from_utf8_lossy(&bytes)))
}

/// The file's bytes; an error is a sentence without the file's name.
fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let cannot = |why: io::Error| match why.kind() {
        io::ErrorKind::NotFound => "there is no such file: write one, or name yours with -c FILE".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied: run this as root".to_owned(),
        _ => format!("cannot be read: {why}"),
    };
    let file = File::open(path).map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    if metadata.is_dir() {
        return Err("is a directory, not a configuration file".to_owned());
    }
    // Who can write here can have root write any file. Pipes carry no such
    // rights worth a check.
    if metadata.is_file() && metadata.mode() & 0o022 != 0 {
        return Err(format!(
            "can be written by others than its owner (mode {:04o}): run `chmod go-w {}`",
            metadata.mode() & 0o7777,
            path.display()
        ));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(cannot)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err("is over 1 MiB long: it is no configuration of omirr".to_owned());
    }
    Ok(bytes)
}
