//! Programs, maps and links that outlive the daemon.
//!
//! In: what was attached, under names. Out: the same after a restart, as long
//! as the programs, the settings and the layout are the very same: all that is
//! told by the name of the folder on the BPF filesystem. Reading what the maps
//! hold is not done here.

use std::{
    io,
    path::{Path, PathBuf},
};

use aya::{
    maps::{Map, MapData},
    programs::{ProgramInfo, links::PinnedLink},
};

/// Where the kernel keeps names for BPF objects.
pub const BPF_FILESYSTEM: &str = "/sys/fs/bpf";
/// `f_type` of that filesystem.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// A folder that is not complete.
const UNDER_WAY: &str = "new-";

/// The layout of what both sides share: text, so that any change of it counts.
const LAYOUT: &[&str] = &[
    include_str!("../../../../omirr-common/src/counters.rs"),
    include_str!("../../../../omirr-common/src/dirty.rs"),
    include_str!("../../../../omirr-common/src/event.rs"),
    include_str!("../../../../omirr-common/src/hooks.rs"),
    include_str!("../../../../omirr-common/src/identity.rs"),
];

/// A name for everything that must be the same for a daemon to take over.
pub fn fingerprint(parts: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in LAYOUT
        .iter()
        .map(|text| text.as_bytes())
        .chain(parts.iter().copied())
    {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// The folder of one daemon, by its state directory.
pub fn base_of(state_dir: &Path) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let real = state_dir.canonicalize().unwrap_or_else(|_| state_dir.to_owned());
    let name = blake3::hash(real.as_os_str().as_bytes()).to_hex();
    Path::new(BPF_FILESYSTEM).join("omirr").join(&name[..16])
}

/// Why nothing can be kept there, or nothing if it can.
pub fn unusable() -> Option<String> {
    match rustix::fs::statfs(BPF_FILESYSTEM) {
        Ok(found) if found.f_type as u64 == BPF_FS_MAGIC => None,
        Ok(_) => Some(format!("no BPF filesystem is mounted on {BPF_FILESYSTEM}")),
        Err(error) => Some(format!("{BPF_FILESYSTEM} cannot be looked at: {error}")),
    }
}

/// Detaches everything that a daemon with this folder has left attached; false
/// if there was nothing.
pub fn remove(base: &Path) -> io::Result<bool> {
    let found = match std::fs::read_dir(base) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut any = false;
    for set in found {
        remove_set(&set?.path())?;
        any = true;
    }
    std::fs::remove_dir(base)?;
    Ok(any)
}

fn remove_set(folder: &Path) -> io::Result<()> {
    for pin in std::fs::read_dir(folder)? {
        std::fs::remove_file(pin?.path())?;
    }
    std::fs::remove_dir(folder)
}

/// A set of pins that is being made.
pub struct NewSet {
    folder: PathBuf,
    complete: PathBuf,
}

impl NewSet {
    /// Makes the folder; what an interrupted start has left goes.
    pub fn begin(base: &Path, fingerprint: &str) -> io::Result<NewSet> {
        std::fs::create_dir_all(base)?;
        let folder = base.join(format!("{UNDER_WAY}{fingerprint}"));
        if folder.exists() {
            remove_set(&folder)?;
        }
        std::fs::create_dir(&folder)?;
        Ok(NewSet {
            folder,
            complete: base.join(fingerprint),
        })
    }

    pub fn path(&self, kind: &str, name: &str) -> PathBuf {
        self.folder.join(format!("{kind}_{name}"))
    }

    /// From now on another daemon may take over; all other sets go.
    pub fn finish(self) -> io::Result<()> {
        std::fs::rename(&self.folder, &self.complete)?;
        let base = self.complete.parent().unwrap_or(&self.complete);
        for set in std::fs::read_dir(base)? {
            let set = set?.path();
            if set != self.complete {
                remove_set(&set)?;
            }
        }
        Ok(())
    }

    /// Nothing is kept after all.
    pub fn give_up(self) {
        if let Err(error) = remove_set(&self.folder) {
            tracing::warn!("{}: cannot be removed: {error}", self.folder.display());
        }
    }
}

/// A complete set that an earlier run has left.
pub struct OldSet {
    folder: PathBuf,
}

impl OldSet {
    pub fn find(base: &Path, fingerprint: &str) -> Option<OldSet> {
        let folder = base.join(fingerprint);
        folder.is_dir().then_some(OldSet { folder })
    }

    /// The names of a kind of pins.
    pub fn names(&self, kind: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for pin in std::fs::read_dir(&self.folder)? {
            let name = pin?.file_name();
            if let Some(name) = name
                .to_str()
                .and_then(|n| n.strip_prefix(kind)?.strip_prefix('_'))
            {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    fn path(&self, kind: &str, name: &str) -> PathBuf {
        self.folder.join(format!("{kind}_{name}"))
    }

    pub fn map(&self, name: &str) -> Result<Map, String> {
        MapData::from_pin(self.path("map", name))
            .and_then(Map::from_map_data)
            .map_err(|error| super::load::chain(&error))
    }

    /// Makes sure that a link is there.
    pub fn link(&self, name: &str) -> Result<PinnedLink, String> {
        PinnedLink::from_pin(self.path("link", name)).map_err(|error| super::load::chain(&error))
    }

    pub fn program(&self, name: &str) -> Result<aya::programs::ProgramFd, String> {
        ProgramInfo::from_pin(self.path("prog", name))
            .and_then(|info| info.fd())
            .map_err(|error| super::load::chain(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_difference_makes_another_name() {
        let one = fingerprint(&[b"ab", b"c"]);
        assert_eq!(one, fingerprint(&[b"ab", b"c"]));
        assert_ne!(one, fingerprint(&[b"a", b"bc"]));
        assert_eq!(one.len(), 16);
    }

    #[test]
    fn nothing_to_remove_is_no_error() {
        assert!(!remove(Path::new("/sys/fs/bpf/omirr/none-such")).unwrap());
    }
}
