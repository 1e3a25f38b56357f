//! A path beneath a share's root, as bytes: Linux names need not be UTF-8.
//!
//! A `RelPath` that exists is safe to name: no `..`, no absolute path, no NUL,
//! no name over 255 bytes. Whether symlinks lie on the way is not its business;
//! `apply/beneath.rs` sees to that when it opens the path.

use std::fmt;
use std::os::unix::ffi::OsStrExt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest path that is taken, in bytes. Linux has no limit on how deep a
/// tree is, only one (4095 bytes) on what a single system call is given: longer
/// paths are walked in pieces. This one keeps a peer from sending paths that
/// cost memory and are no use to anybody.
pub const PATH_MAX: usize = 32 << 10;
/// The longest name, in bytes, as Linux' `NAME_MAX`.
const NAME_MAX: usize = 255;
/// How names begin that the daemon itself uses while a step is under way. They
/// are never replicated; after a crash they are leftovers.
pub const TEMP_PREFIX: &str = ".omirr-tmp-";

/// Whether `name` is one of the daemon's own temporary names.
pub fn is_temp_name(name: &[u8]) -> bool {
    name.starts_with(TEMP_PREFIX.as_bytes())
}

/// Why bytes are not a path beneath a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("it is absolute")]
    Absolute,
    #[error("it has an empty name in it")]
    EmptyName,
    #[error("it has '.' or '..' in it")]
    Dots,
    #[error("it has a NUL byte in it")]
    Nul,
    #[error("it has '/' in a name")]
    Slash,
    #[error("it has a name over {NAME_MAX} bytes in it")]
    NameTooLong,
    #[error("it is over {PATH_MAX} bytes long")]
    TooLong,
}

/// A path beneath a share's root. The root itself is the empty path.
///
/// Orders by bytes, so that a parent comes before what is beneath it. A clone is
/// another reference: paths are keys of many maps at once.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelPath(std::sync::Arc<[u8]>);

fn check_name(name: &[u8]) -> Result<(), PathError> {
    if name.is_empty() {
        return Err(PathError::EmptyName);
    }
    if name == b"." || name == b".." {
        return Err(PathError::Dots);
    }
    if name.len() > NAME_MAX {
        return Err(PathError::NameTooLong);
    }
    if name.contains(&0) {
        return Err(PathError::Nul);
    }
    if name.contains(&b'/') {
        return Err(PathError::Slash);
    }
    Ok(())
}

impl RelPath {
    /// Takes `bytes` as a path beneath a share, or says why they are none.
    pub fn new(bytes: &[u8]) -> Result<RelPath, PathError> {
        if bytes.is_empty() {
            return Ok(RelPath::root());
        }
        if bytes[0] == b'/' {
            return Err(PathError::Absolute);
        }
        if bytes.len() > PATH_MAX {
            return Err(PathError::TooLong);
        }
        for name in bytes.split(|&b| b == b'/') {
            check_name(name)?;
        }
        Ok(RelPath(bytes.into()))
    }

    /// The share's root.
    pub fn root() -> RelPath {
        RelPath(std::sync::Arc::from([]))
    }

    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The same path for `std::fs` and `rustix`; `.` for the root.
    pub fn as_os(&self) -> &std::path::Path {
        if self.is_root() {
            return std::path::Path::new(".");
        }
        std::path::Path::new(std::ffi::OsStr::from_bytes(&self.0))
    }

    /// The last name; empty for the root.
    pub fn name(&self) -> &[u8] {
        match self.0.iter().rposition(|&b| b == b'/') {
            Some(slash) => &self.0[slash + 1..],
            None => &self.0,
        }
    }

    /// The directory that holds this path; none for the root.
    pub fn parent(&self) -> Option<RelPath> {
        if self.is_root() {
            return None;
        }
        Some(match self.0.iter().rposition(|&b| b == b'/') {
            Some(slash) => RelPath(self.0[..slash].into()),
            None => RelPath::root(),
        })
    }

    /// The path of `name` in this directory.
    pub fn join(&self, name: &[u8]) -> Result<RelPath, PathError> {
        check_name(name)?;
        if self.is_root() {
            return Ok(RelPath(name.into()));
        }
        if self.0.len() + 1 + name.len() > PATH_MAX {
            return Err(PathError::TooLong);
        }
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.len());
        bytes.extend_from_slice(&self.0);
        bytes.push(b'/');
        bytes.extend_from_slice(name);
        Ok(RelPath(bytes.into()))
    }

    /// Whether this is `ancestor` or lies beneath it.
    pub fn is_within(&self, ancestor: &RelPath) -> bool {
        ancestor.is_root()
            || (self.0.starts_with(&ancestor.0)
                && (self.0.len() == ancestor.0.len() || self.0[ancestor.0.len()] == b'/'))
    }

    /// This path with its leading `from` replaced by `to`, or none if it does
    /// not lie within `from` or would become too long.
    pub fn rebase(&self, from: &RelPath, to: &RelPath) -> Option<RelPath> {
        if !self.is_within(from) {
            return None;
        }
        let rest = &self.0[from.0.len()..];
        let rest = rest.strip_prefix(b"/").unwrap_or(rest);
        if rest.is_empty() {
            return Some(to.clone());
        }
        let mut bytes = to.0.to_vec();
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(rest);
        RelPath::new(&bytes).ok()
    }

    /// How many names the path has; 0 for the root.
    pub fn depth(&self) -> usize {
        if self.is_root() {
            0
        } else {
            self.0.iter().filter(|&&b| b == b'/').count() + 1
        }
    }

    /// The first `depth` names of the path; all of it if it has no more.
    pub fn ancestor(&self, depth: usize) -> RelPath {
        let mut slashes = self.0.iter().enumerate().filter(|&(_, &b)| b == b'/');
        match depth.checked_sub(1).map(|n| slashes.nth(n)) {
            None => RelPath::root(),
            Some(None) => self.clone(),
            Some(Some((end, _))) => RelPath(self.0[..end].into()),
        }
    }

    /// The names from the root down.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|&b| b == b'/').filter(|name| !name.is_empty())
    }

    /// The half-open range of bytes in which everything strictly beneath this
    /// path lies, for ordered tables: `path/` up to `path0`. The root's range
    /// has no end.
    pub fn beneath_range(&self) -> (Vec<u8>, Option<Vec<u8>>) {
        if self.is_root() {
            return (vec![1], None);
        }
        let mut start = self.0.to_vec();
        let mut end = self.0.to_vec();
        start.push(b'/');
        end.push(b'/' + 1);
        (start, Some(end))
    }
}

impl fmt::Display for RelPath {
    /// For people: bytes that are not UTF-8 or would disturb a terminal are
    /// shown as `\xNN`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() {
            return f.write_str(".");
        }
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_control() {
                    write!(f, "\\x{:02x}", c as u32)?;
                } else {
                    write!(f, "{c}")?;
                }
            }
            for b in chunk.invalid() {
                write!(f, "\\x{b:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl Serialize for RelPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for RelPath {
    /// Refuses what [`RelPath::new`] refuses: no bad path gets past decoding.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RelPath, D::Error> {
        struct Bytes;
        impl<'de> serde::de::Visitor<'de> for Bytes {
            type Value = RelPath;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the bytes of a path")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<RelPath, E> {
                RelPath::new(bytes).map_err(|why| {
                    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(256)]).into_owned();
                    E::custom(format!("{shown:?} is not a path beneath the share: {why}"))
                })
            }
            fn visit_byte_buf<E: serde::de::Error>(self, bytes: Vec<u8>) -> Result<RelPath, E> {
                self.visit_bytes(&bytes)
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_could_leave_the_share() {
        for (bytes, why) in [
            (&b"/etc/x"[..], PathError::Absolute),
            (b"../x", PathError::Dots),
            (b"a/../../x", PathError::Dots),
            (b"a/./b", PathError::Dots),
            (b"a//b", PathError::EmptyName),
            (b"a/", PathError::EmptyName),
            (b"a\0b", PathError::Nul),
            (&[b'x'; 256], PathError::NameTooLong),
        ] {
            assert_eq!(RelPath::new(bytes), Err(why), "{bytes:?}");
        }
        assert_eq!(RelPath::root().join(b"a/b"), Err(PathError::Slash));
    }

    #[test]
    fn a_path_may_be_as_long_and_as_deep_as_the_limit_and_no_more() {
        // One letter and one slash each: the bytes limit the depth, too.
        let deepest = [&b"a/".repeat(PATH_MAX / 2 - 1)[..], b"aa"].concat();
        assert_eq!(deepest.len(), PATH_MAX);
        assert_eq!(RelPath::new(&deepest).unwrap().depth(), PATH_MAX / 2);
        let deeper = [&deepest[..PATH_MAX - 1], b"/a"].concat();
        assert_eq!(RelPath::new(&deeper), Err(PathError::TooLong));
        let one_more = [&deepest[..], b"a"].concat();
        assert_eq!(RelPath::new(&one_more), Err(PathError::TooLong));
        assert!(RelPath::new(&[b'x'; NAME_MAX]).is_ok());
        assert_eq!(RelPath::new(&[b'x'; NAME_MAX + 1]), Err(PathError::NameTooLong));
    }

    #[test]
    fn knows_what_lies_within() {
        let a = RelPath::new(b"a").unwrap();
        let ab = RelPath::new(b"a/b").unwrap();
        let a_b = RelPath::new(b"a-b").unwrap();
        assert!(ab.is_within(&a) && ab.is_within(&ab) && ab.is_within(&RelPath::root()));
        assert!(!a_b.is_within(&a) && !a.is_within(&ab));
        let (start, end) = a.beneath_range();
        let beneath = |p: &RelPath| p.as_bytes() >= &start[..] && p.as_bytes() < &end.as_ref().unwrap()[..];
        assert!(beneath(&ab) && !beneath(&a) && !beneath(&a_b));
        assert_eq!(ab.rebase(&a, &a_b).unwrap().as_bytes(), b"a-b/b");
        assert_eq!(ab.rebase(&a, &RelPath::root()).unwrap().as_bytes(), b"b");
    }

    #[test]
    fn shows_names_that_are_not_utf8() {
        assert_eq!(
            RelPath::new(b"caf\xe9/\x1b[1m").unwrap().to_string(),
            "caf\\xe9/\\x1b[1m"
        );
    }
}
