//! File handles, and the inode number in them.
//!
//! fanotify names an inode by its file handle: bytes that only the filesystem
//! understands. The daemon thinks in inode numbers. Most filesystems put the
//! number plainly into the handle; reading it there costs nothing, and works
//! for directories that are already gone, where asking the kernel cannot.
//! Which layout a filesystem uses is not assumed but measured, on the root of
//! the share, whose number and handle are both known.

use rustc_hash::FxHashMap;

/// Handles that are remembered per filesystem whose layout is unknown.
const CACHE_LIMIT: usize = 1 << 16;
/// Set in made-up numbers; no filesystem known to us numbers that high.
const MADE_UP: u64 = 1 << 63;

/// A handle inside somebody else's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HandleRef<'a> {
    pub(crate) kind: i32,
    pub(crate) bytes: &'a [u8],
}

/// A handle of one's own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Handle {
    kind: i32,
    bytes: Box<[u8]>,
}

impl Handle {
    pub(crate) fn new(kind: i32, bytes: &[u8]) -> Handle {
        Handle {
            kind,
            bytes: bytes.into(),
        }
    }

    pub(crate) fn as_ref(&self) -> HandleRef<'_> {
        HandleRef {
            kind: self.kind,
            bytes: &self.bytes,
        }
    }
}

impl HandleRef<'_> {
    pub(crate) fn to_owned(self) -> Handle {
        Handle::new(self.kind, self.bytes)
    }
}

/// What a handle says about its inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Id {
    pub(crate) ino: u64,
    pub(crate) generation: u32,
    /// btrfs: the subvolume, whose inode numbers are its own. Else 0.
    pub(crate) subvolume: u64,
}

/// Where in its handles a filesystem puts the inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// The generic `FILEID_INO32_GEN`: ext4, f2fs, xfs with small numbers.
    Ino32,
    /// tmpfs: generation, then the number's low and high half; its type is the
    /// generic one although the content is not (mm/shmem.c, `shmem_encode_fh`).
    Shmem,
    /// xfs' `XFS_FILEID_TYPE_64FLAG`: a 64-bit number, the generation.
    Xfs64,
    /// btrfs' `FILEID_BTRFS_WITHOUT_PARENT`: object, subvolume, generation.
    Btrfs,
}

impl Layout {
    /// The layout in which `handle` holds `ino`, if it is one of these.
    pub(crate) fn detect(handle: HandleRef<'_>, ino: u64) -> Option<Layout> {
        [Layout::Ino32, Layout::Shmem, Layout::Xfs64, Layout::Btrfs]
            .into_iter()
            .find(|layout| layout.decode(handle).is_some_and(|id| id.ino == ino))
    }

    /// Reads the number, or nothing if the handle has another layout.
    pub(crate) fn decode(self, handle: HandleRef<'_>) -> Option<Id> {
        let u32_at = |at: usize| {
            let bytes = handle.bytes.get(at..at + 4)?;
            Some(u32::from_ne_bytes(bytes.try_into().ok()?))
        };
        let u64_at = |at: usize| {
            let bytes = handle.bytes.get(at..at + 8)?;
            Some(u64::from_ne_bytes(bytes.try_into().ok()?))
        };
        let (kind, len) = (handle.kind, handle.bytes.len());
        Some(match self {
            Layout::Ino32 if (kind, len) == (0x1, 8) => Id {
                ino: u32_at(0)?.into(),
                generation: u32_at(4)?,
                subvolume: 0,
            },
            Layout::Shmem if (kind, len) == (0x1, 12) => Id {
                ino: u64::from(u32_at(4)?) | u64::from(u32_at(8)?) << 32,
                generation: u32_at(0)?,
                subvolume: 0,
            },
            Layout::Xfs64 if (kind, len) == (0x81, 12) => Id {
                ino: u64_at(0)?,
                generation: u32_at(8)?,
                subvolume: 0,
            },
            Layout::Btrfs if (kind, len) == (0x4d, 20) => Id {
                ino: u64_at(0)?,
                generation: u32_at(16)?,
                subvolume: u64_at(8)?,
            },
            _ => return None,
        })
    }

    /// A handle for an inode whose number is known but whose handle is not, or
    /// none if this filesystem wants the true generation in it. `sample` is any
    /// handle of the same filesystem.
    ///
    /// ext4 and btrfs take a generation of zero for any.
    pub(crate) fn encode_any_generation(self, ino: u64, sample: Id, is_ext4: bool) -> Option<Handle> {
        match self {
            Layout::Ino32 if is_ext4 => {
                let mut bytes = [0; 8];
                bytes[..4].copy_from_slice(&u32::try_from(ino).ok()?.to_ne_bytes());
                Some(Handle::new(0x1, &bytes))
            }
            Layout::Btrfs => Some(Layout::Btrfs.encode(Id {
                ino,
                generation: 0,
                ..sample
            })?),
            _ => None,
        }
    }

    /// The handle of an inode whose number and generation are known.
    pub(crate) fn encode(self, id: Id) -> Option<Handle> {
        let generation = id.generation.to_ne_bytes();
        Some(match self {
            Layout::Ino32 => {
                let mut bytes = [0; 8];
                bytes[..4].copy_from_slice(&u32::try_from(id.ino).ok()?.to_ne_bytes());
                bytes[4..].copy_from_slice(&generation);
                Handle::new(0x1, &bytes)
            }
            Layout::Shmem => {
                let mut bytes = [0; 12];
                bytes[..4].copy_from_slice(&generation);
                bytes[4..8].copy_from_slice(&(id.ino as u32).to_ne_bytes());
                bytes[8..].copy_from_slice(&((id.ino >> 32) as u32).to_ne_bytes());
                Handle::new(0x1, &bytes)
            }
            Layout::Xfs64 => {
                let mut bytes = [0; 12];
                bytes[..8].copy_from_slice(&id.ino.to_ne_bytes());
                bytes[8..].copy_from_slice(&generation);
                Handle::new(0x81, &bytes)
            }
            Layout::Btrfs => {
                let mut bytes = [0; 20];
                bytes[..8].copy_from_slice(&id.ino.to_ne_bytes());
                bytes[8..16].copy_from_slice(&id.subvolume.to_ne_bytes());
                bytes[16..].copy_from_slice(&generation);
                Handle::new(0x4d, &bytes)
            }
        })
    }
}

/// From handles to inode numbers on one filesystem.
pub(crate) struct Numbers {
    layout: Option<Layout>,
    /// For layouts that are not known: what the kernel said.
    cache: FxHashMap<Handle, u64>,
}

impl Numbers {
    pub(crate) fn new(layout: Option<Layout>) -> Numbers {
        Numbers {
            layout,
            cache: FxHashMap::default(),
        }
    }

    /// The inode behind `handle`. `ask` asks the kernel for the number, and is
    /// only called where the handle does not tell.
    ///
    /// A handle that tells nothing and is dead gets a made-up number, always
    /// the same one: a directory can then still be told from others, by those
    /// events that come after its end.
    pub(crate) fn of(&mut self, handle: HandleRef<'_>, ask: impl FnOnce() -> Option<u64>) -> Id {
        if let Some(id) = self.layout.and_then(|layout| layout.decode(handle)) {
            return id;
        }
        let owned = handle.to_owned();
        let ino = match self.cache.get(&owned) {
            Some(&ino) => ino,
            None => {
                if self.cache.len() >= CACHE_LIMIT {
                    self.cache.clear();
                }
                let ino = ask().unwrap_or_else(|| made_up(&owned));
                self.cache.insert(owned, ino);
                ino
            }
        };
        Id { ino, ..Id::default() }
    }
}

fn made_up(handle: &Handle) -> u64 {
    use std::hash::{Hash, Hasher};
    let mut hasher = rustc_hash::FxHasher::default();
    handle.hash(&mut hasher);
    hasher.finish() | MADE_UP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_encodes_in_every_layout() {
        for (layout, ino) in [
            (Layout::Ino32, 5_464_378),
            (Layout::Shmem, 0x1_0000_0007),
            (Layout::Xfs64, 0x12_3456_7890),
            (Layout::Btrfs, 257),
        ] {
            let subvolume = if layout == Layout::Btrfs { 5 } else { 0 };
            let id = Id {
                ino,
                generation: 0xdead_beef,
                subvolume,
            };
            let handle = layout.encode(id).expect("the number fits");
            assert_eq!(layout.decode(handle.as_ref()), Some(id));
            assert_eq!(Layout::detect(handle.as_ref(), ino), Some(layout));
            assert_eq!(Layout::detect(handle.as_ref(), ino + 1), None);
        }
    }

    #[test]
    fn a_dead_handle_of_unknown_layout_keeps_one_number() {
        let mut numbers = Numbers::new(None);
        let handle = Handle::new(0xf8, b"whatever a filesystem puts here");
        let first = numbers.of(handle.as_ref(), || None);
        assert!(first.ino & MADE_UP != 0);
        assert_eq!(numbers.of(handle.as_ref(), || panic!("it is remembered")), first);
        let living = Handle::new(0xf8, b"another");
        assert_eq!(numbers.of(living.as_ref(), || Some(7)).ino, 7);
    }
}
