//! The guest's first file system: an archive in cpio's "newc" form, written
//! here, so that no file on the host has to carry root's ownership or be a
//! device node.
//!
//! Paths are the guest's, absolute; `/bin`, `/sbin`, `/lib` and `/lib64` are
//! links into `/usr`, as on every distribution that the files come from. What is
//! added first stays; a second file of the same name is left out.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell::capture;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// The archive while it is being written.
pub struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
    inode: u32,
}

impl Default for Archive {
    fn default() -> Self {
        Self::new()
    }
}

impl Archive {
    /// The skeleton of a root file system.
    #[must_use]
    pub fn new() -> Self {
        let mut archive = Self {
            bytes: Vec::new(),
            names: BTreeSet::new(),
            inode: 0,
        };
        for folder in [
            "dev",
            "etc",
            "mnt",
            "proc",
            "root",
            "run",
            "sys",
            "tmp",
            "usr/bin",
            "usr/sbin",
            "usr/lib",
            "usr/lib64",
            "var/log",
        ] {
            archive.folder(folder, 0o755);
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            archive.link(&format!("/{name}"), &format!("usr/{name}"));
        }
        archive.link("/var/run", "../run");
        // The kernel opens init's standard streams before there is a devtmpfs.
        archive.entry("dev/console", CHARACTER_DEVICE | 0o600, 0, (5, 1), &[]);
        archive
    }

    /// A file with the given content.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.file_with_time(path, mode, 0, content);
    }

    fn file_with_time(&mut self, path: &str, mode: u32, seconds: u32, content: &[u8]) {
        let name = self.prepare(path);
        self.entry(&name, FILE | mode, seconds, (0, 0), content);
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        let name = self.prepare(path);
        self.entry(&name, LINK | 0o777, 0, (0, 0), target.as_bytes());
    }

    /// A folder, and those above it.
    pub fn folder(&mut self, path: &str, mode: u32) {
        let name = self.prepare(path);
        self.entry(&name, DIRECTORY | mode, 0, (0, 0), &[]);
    }

    /// A file of the host, with its mode and time.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn host_file(&mut self, host: &Path, path: &str) -> Result<()> {
        let read =
            || -> std::io::Result<(fs::Metadata, Vec<u8>)> { Ok((fs::metadata(host)?, fs::read(host)?)) };
        let (data, content) = read().with_context(|| format!("{} cannot be read", host.display()))?;
        self.file_with_time(path, data.permissions().mode() & 0o7777, seconds(&data), &content);
        Ok(())
    }

    /// A folder of the host with all that is in it: files, folders and links.
    ///
    /// # Errors
    /// Something cannot be read.
    pub fn host_tree(&mut self, host: &Path, path: &str) -> Result<()> {
        self.folder(path, 0o755);
        let entries = fs::read_dir(host).with_context(|| format!("{} cannot be read", host.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("{} cannot be read", host.display()))?;
            let name = entry.file_name();
            let name = name
                .to_str()
                .with_context(|| format!("{} is no UTF-8", entry.path().display()))?;
            let inner = format!("{path}/{name}");
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.host_tree(&entry.path(), &inner)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path())?;
                self.link(&inner, target.to_str().context("a link's target is no UTF-8")?);
            } else if kind.is_file() {
                self.host_file(&entry.path(), &inner)?;
            }
        }
        Ok(())
    }

    /// A program of the host under the given path, with the libraries that it
    /// is linked with under theirs.
    ///
    /// # Errors
    /// It, or a library, cannot be read.
    pub fn program(&mut self, host: &Path, path: &str) -> Result<()> {
        self.host_file(host, path)?;
        // ldd fails for a static program, which is as good as an empty list.
        let listed = Command::new("ldd")
            .arg(host)
            .env("LC_ALL", "C")
            .output()
            .context("`ldd` cannot be started")?;
        for line in String::from_utf8_lossy(&listed.stdout).lines() {
            if line.contains("not found") {
                bail!(
                    "{} needs a library that is not here: {}",
                    host.display(),
                    line.trim()
                );
            }
            let library = line.split_whitespace().find(|word| word.starts_with('/'));
            if let Some(library) = library {
                self.host_file(Path::new(library), library)?;
            }
        }
        Ok(())
    }

    /// busybox and a link for each of its applets.
    ///
    /// # Errors
    /// It cannot be read or run.
    pub fn busybox(&mut self, host: &Path) -> Result<()> {
        self.host_file(host, "/bin/busybox")?;
        for applet in capture(Command::new(host).arg("--list-full"))?.lines() {
            let path = format!("/{applet}");
            // Some builds list applets outside the skeleton.
            if path.starts_with("/bin/") || path.starts_with("/sbin/") || path.starts_with("/usr/") {
                self.link(&path, "/bin/busybox");
            }
        }
        Ok(())
    }

    /// The finished archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.names.clear();
        self.entry("TRAILER!!!", 0, 0, (0, 0), &[]);
        self.bytes
    }

    /// The archive's name for the path, its parent folders being there.
    fn prepare(&mut self, path: &str) -> String {
        let name = archive_name(path);
        let mut end = 0;
        while let Some(slash) = name[end..].find('/') {
            end += slash;
            let parent = name[..end].to_owned();
            self.entry(&parent, DIRECTORY | 0o755, 0, (0, 0), &[]);
            end += 1;
        }
        name
    }

    fn entry(&mut self, name: &str, mode: u32, seconds: u32, device: (u32, u32), content: &[u8]) {
        if !self.names.insert(name.to_owned()) {
            return;
        }
        self.inode += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let size = u32::try_from(content.len()).expect("no file for a guest reaches 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a path is short");
        // Magic, then: inode, mode, user, group, links, time, size, device,
        // device node, name's size, checksum; each eight hexadecimal digits.
        let fields = [
            self.inode, mode, 0, 0, links, seconds, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The path without its leading slash, and through no link of the skeleton.
fn archive_name(path: &str) -> String {
    let name = path.trim_start_matches('/');
    let first = name.split('/').next().unwrap_or_default();
    if ["bin", "sbin", "lib", "lib64"].contains(&first) && name != first {
        format!("usr/{name}")
    } else {
        name.to_owned()
    }
}

/// newc counts seconds in 32 bits.
fn seconds(data: &fs::Metadata) -> u32 {
    u32::try_from(data.mtime()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the archive back, by the format's description.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1) as u32, field(6), field(11));
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let start = (110 + name_size).next_multiple_of(4);
            let content = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push((name, mode, content));
        }
    }

    #[test]
    fn an_archive_reads_back_with_parents_before_children() {
        let mut archive = Archive::new();
        archive.file("/a/b/c", 0o640, b"hello");
        archive.file("/lib/x.so", 0o755, b"");
        archive.file("/a/b/c", 0o600, b"second");
        let entries = read(&archive.finish());
        let find = |name: &str| entries.iter().position(|entry| entry.0 == name).unwrap();
        assert!(find("a") < find("a/b") && find("a/b") < find("a/b/c"));
        assert_eq!(entries[find("a/b/c")].1, 0o100_640);
        assert_eq!(entries[find("a/b/c")].2, b"hello");
        assert_eq!(entries[find("lib")].2, b"usr/lib");
        assert_eq!(entries[find("usr/lib/x.so")].1, 0o100_755);
        assert_eq!(entries.iter().filter(|entry| entry.0 == "a/b/c").count(), 1);
    }
}
