//! Whether two versions have the same content, and where they differ.
//!
//! In: two names in one directory. Out: a verdict, with a unified diff of small
//! texts. What is read may change meanwhile; then the verdict is about what was
//! read.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek},
    os::fd::BorrowedFd,
    time::Duration,
};

use rustix::fs::{FileType, Mode, OFlags};
use serde::Serialize;

/// Beyond this, files are not compared line by line, bytes.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// How long is looked for a short diff; after that a longer one must do.
const DIFF_TIME: Duration = Duration::from_secs(2);
/// What is read at once, bytes.
const CHUNK_BYTES: usize = 64 << 10;

/// How two contents compare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "contents", rename_all = "kebab-case")]
pub(super) enum Contents {
    Same,
    /// Texts: what must change in the first to become the second.
    Differ {
        diff: Option<String>,
    },
    /// They are no two files or links; or one cannot be read.
    NotCompared {
        why: String,
    },
}

/// A name, what it is, and what a diff calls it.
pub(super) struct Version<'n> {
    pub(super) name: &'n OsStr,
    pub(super) mode: u32,
    pub(super) shown: &'n str,
}

/// Compares two names in `dir`.
pub(super) fn compare(dir: BorrowedFd<'_>, one: &Version<'_>, other: &Version<'_>) -> Contents {
    let kinds = (
        FileType::from_raw_mode(one.mode),
        FileType::from_raw_mode(other.mode),
    );
    let compared = match kinds {
        (FileType::RegularFile, FileType::RegularFile) => files(dir, one, other),
        (FileType::Symlink, FileType::Symlink) => links(dir, one, other),
        (FileType::Directory, FileType::Directory) => {
            return Contents::NotCompared {
                why: "they are directories: `diff -r` compares them".to_owned(),
            };
        }
        (here, there) if here != there => {
            return Contents::NotCompared {
                why: "they are of different kinds".to_owned(),
            };
        }
        _ => {
            return Contents::NotCompared {
                why: "they are no files".to_owned(),
            };
        }
    };
    compared.unwrap_or_else(|why| Contents::NotCompared {
        why: format!("they cannot be read: {why}"),
    })
}

fn links(dir: BorrowedFd<'_>, one: &Version<'_>, other: &Version<'_>) -> io::Result<Contents> {
    let target = |version: &Version<'_>| rustix::fs::readlinkat(dir, version.name, Vec::new());
    Ok(match target(one)? == target(other)? {
        true => Contents::Same,
        false => Contents::Differ { diff: None },
    })
}

fn files(dir: BorrowedFd<'_>, one: &Version<'_>, other: &Version<'_>) -> io::Result<Contents> {
    let (mut here, mut there) = (open(dir, one.name)?, open(dir, other.name)?);
    let sizes = (here.metadata()?.len(), there.metadata()?.len());
    if sizes.0 == sizes.1 && same(&here, &there)? {
        return Ok(Contents::Same);
    }
    let small = sizes.0.max(sizes.1) <= TEXT_BYTES_MAX;
    let texts = match small {
        true => text(&mut here)?.zip(text(&mut there)?),
        false => None,
    };
    let diff = texts.map(|(here, there)| {
        similar::TextDiff::configure()
            .timeout(DIFF_TIME)
            .diff_lines(&here, &there)
            .unified_diff()
            .header(one.shown, other.shown)
            .to_string()
    });
    Ok(Contents::Differ { diff })
}

/// Opens a regular file, and nothing that has taken its name meanwhile.
fn open(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no file any more")),
    }
}

fn same(here: &File, there: &File) -> io::Result<bool> {
    let mut here = BufReader::with_capacity(CHUNK_BYTES, here);
    let mut there = BufReader::with_capacity(CHUNK_BYTES, there);
    loop {
        let (a, b) = (here.fill_buf()?, there.fill_buf()?);
        let count = a.len().min(b.len());
        if count == 0 {
            return Ok(a.len() == b.len());
        }
        if a[..count] != b[..count] {
            return Ok(false);
        }
        here.consume(count);
        there.consume(count);
    }
}

/// All of a file, if it is text and has not grown beyond the limit.
fn text(file: &mut File) -> io::Result<Option<String>> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    let text = String::from_utf8(bytes).ok();
    Ok(text.filter(|text| text.len() as u64 <= TEXT_BYTES_MAX && !text.contains('\0')))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsFd};

    use super::*;

    fn compared(one: &[u8], other: &[u8]) -> Contents {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("one"), one).unwrap();
        fs::write(folder.path().join("other"), other).unwrap();
        let dir = File::open(folder.path()).unwrap();
        let version = |name: &'static str| Version {
            name: OsStr::new(name),
            mode: 0o100_644,
            shown: name,
        };
        compare(dir.as_fd(), &version("one"), &version("other"))
    }

    #[test]
    fn texts_are_compared_line_by_line() {
        let Contents::Differ { diff: Some(diff) } = compared(b"a\nb\nc\n", b"a\nB\nc") else {
            panic!("they are texts");
        };
        assert_eq!(
            diff,
            "--- one\n+++ other\n@@ -1,3 +1,3 @@\n a\n-b\n-c\n+B\n+c\n\\ No newline at end of file\n"
        );
    }

    #[test]
    fn what_is_no_small_text_is_only_told_apart() {
        let big = vec![b'x'; (TEXT_BYTES_MAX + 1) as usize];
        let mut bigger = big.clone();
        bigger[70_000] = b'y';
        assert_eq!(compared(&big, &big), Contents::Same);
        assert_eq!(compared(b"", b""), Contents::Same);
        let differ = Contents::Differ { diff: None };
        assert_eq!(compared(&big, &bigger), differ);
        assert_eq!(compared(&big, b"x"), differ);
        assert_eq!(compared(b"caf\xe9", b"cafe"), differ);
        assert_eq!(compared(b"a\0", b"a"), differ);
    }
}
