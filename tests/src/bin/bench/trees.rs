//! The trees that are copied, and the ground they stand on.
//!
//! In: numbers. Out: folders with files whose content follows from a seed: even
//! ones are text, which can be compressed, odd ones random bytes. And whether
//! one tree is as another.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use omirr_tests::treewalk::{self, Tree};
use omirr_tests::users::Rng;
use xtask::shell::capture;

use crate::stop;

/// Bytes of a small file.
pub const SMALL: usize = 4096;

const WORDS: [&str; 32] = [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu",
    "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "error", "warning",
    "info", "request", "response", "server", "client", "started", "stopped",
];

/// What the nth file holds.
pub fn content(nth: u64, bytes: usize, seed: u64) -> Vec<u8> {
    let mut rng = Rng(seed.wrapping_mul(1_000_003).wrapping_add(nth));
    let mut out = Vec::with_capacity(bytes + 16);
    if nth.is_multiple_of(2) {
        while out.len() < bytes {
            out.extend(WORDS[rng.below(32) as usize].bytes());
            out.push(b' ');
        }
    } else {
        while out.len() < bytes {
            out.extend(rng.next().to_le_bytes());
        }
    }
    out.truncate(bytes);
    out
}

/// Makes so many files in folders of `in_each`.
///
/// # Errors
/// The folder cannot be written, or the user wants to end.
pub fn make(root: &Path, files: u64, in_each: u64, bytes: usize, seed: u64) -> Result<()> {
    for nth in 0..files {
        let folder = root.join(format!("d{:04}", nth / in_each));
        if nth % in_each == 0 {
            stop::check()?;
            fs::create_dir_all(&folder)?;
        }
        let mut file = File::create(folder.join(format!("f{nth:07}")))?;
        if bytes > 0 {
            file.write_all(&content(nth, bytes, seed))?;
        }
    }
    Ok(())
}

/// One file of random bytes.
///
/// # Errors
/// It cannot be written, or the user wants to end.
pub fn make_file(path: &Path, bytes: u64, seed: u64) -> Result<()> {
    const BLOCK: u64 = 1 << 20;
    let mut file = File::create(path)?;
    for nth in 0..bytes.div_ceil(BLOCK) {
        stop::check()?;
        let length = BLOCK.min(bytes - nth * BLOCK);
        file.write_all(&content(2 * nth + 1, length as usize, seed))?;
    }
    Ok(())
}

/// So many folders, a hundred in each.
///
/// # Errors
/// The folder cannot be written, or the user wants to end.
pub fn make_folders(root: &Path, folders: u64) -> Result<()> {
    for outer in 0..folders.div_ceil(101) {
        stop::check()?;
        let folder = root.join(format!("d{outer:05}"));
        fs::create_dir_all(&folder)?;
        let inner = 100.min(folders - outer * 101 - 1);
        for nth in 0..inner {
            fs::create_dir(folder.join(format!("s{nth:03}")))?;
        }
    }
    Ok(())
}

/// How many files are in a tree of folders that hold files.
pub fn files_in(root: &Path) -> u64 {
    let mut found = 0;
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                // What is still being written has a name with a dot.
                Ok(_) if !entry.file_name().as_encoded_bytes().starts_with(b".") => found += 1,
                _ => {}
            }
        }
    }
    found
}

/// How exactly a copy must be like its original.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exactness {
    /// Names, kinds and contents: what each tool promises.
    Content,
    /// All that omirr keeps.
    Everything,
}

/// What is wrong with B, in one sentence; nothing if it is as A.
///
/// # Errors
/// B cannot be walked.
pub fn compare(a: &Tree, b: &Path, exactness: Exactness) -> Result<Option<String>> {
    let mut b = treewalk::walk(b)?;
    let mut a = a.clone();
    for tree in [&mut a, &mut b] {
        // Syncthing's mark; and the time of the root, in which marks are made.
        tree.retain(|path, _| !path.starts_with(".stfolder"));
        if let Some(root) = tree.get_mut(Path::new("")) {
            root.mtime_ns = 0;
        }
    }
    if exactness == Exactness::Content {
        for (path, node) in &mut b {
            if let Some(original) = a.get(path) {
                let what = node.what.clone();
                *node = original.clone();
                node.what = what;
            }
        }
    }
    let differences = treewalk::diff(&a, &b);
    Ok((!differences.is_empty()).then(|| {
        format!(
            "{} paths in A, {} in B: {}",
            a.len(),
            b.len(),
            differences[..differences.len().min(3)].join("; ")
        )
    }))
}

/// A place for trees; a filesystem of its own goes with it.
pub struct Ground {
    pub path: PathBuf,
    mounted: bool,
    /// In which the filesystem lies.
    image: Option<PathBuf>,
}

impl Ground {
    /// A fresh folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn folder(path: PathBuf) -> Result<Ground> {
        fs::create_dir_all(&path).with_context(|| format!("{} cannot be made", path.display()))?;
        Ok(Ground {
            path,
            mounted: false,
            image: None,
        })
    }

    /// A tmpfs of its own, so that memory is given back when it goes.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub fn tmpfs(path: PathBuf) -> Result<Ground> {
        let mut ground = Ground::folder(path)?;
        capture(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=80%,nr_inodes=0", "bench"])
                .arg(&ground.path),
        )
        .context("no tmpfs can be mounted")?;
        ground.mounted = true;
        Ok(ground)
    }

    /// An ext4 of its own with room for so many small files.
    ///
    /// # Errors
    /// There is not enough room, or it cannot be made or mounted.
    pub fn image(path: PathBuf, files: u64) -> Result<Ground> {
        // An inode, its part of a directory and of the index, and a fourth more.
        const EACH_BYTES: u64 = 1000;
        let wanted = files * EACH_BYTES;
        let mut ground = Ground::folder(path)?;
        let there = rustix::fs::statvfs(&ground.path)?;
        let free = there.f_bavail * there.f_frsize;
        if free < wanted {
            bail!(
                "{files} files take about {} GB of disk, and {} GB are free",
                wanted >> 30,
                free >> 30
            );
        }
        let image = ground.path.with_extension("ext4");
        File::create(&image)?.set_len(2 * wanted)?;
        ground.image = Some(image.clone());
        let inodes = files + files / 8;
        capture(
            Command::new("mkfs.ext4")
                .args(["-q", "-N", &inodes.to_string()])
                .arg(&image),
        )?;
        capture(
            Command::new("mount")
                .args(["-o", "loop"])
                .args([&image, &ground.path]),
        )?;
        ground.mounted = true;
        Ok(ground)
    }

    /// A folder on it.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn fresh(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if self.mounted {
            // Whatever still holds it open does not keep it in sight.
            let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
        }
        if let Some(image) = &self.image {
            // Its blocks are free once the filesystem is let go.
            let _ = fs::remove_file(image);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_files_are_text() {
        let text = content(0, SMALL, 1);
        let noise = content(1, SMALL, 1);
        assert_eq!((text.len(), noise.len()), (SMALL, SMALL));
        assert!(text.is_ascii());
        assert!(!noise.is_ascii());
        assert_eq!(text, content(0, SMALL, 1));
        assert_ne!(text, content(0, SMALL, 2));
    }

    #[test]
    fn a_copy_with_another_byte_is_wrong_and_one_with_another_time_only_for_omirr() {
        let base = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| base.path().join(name));
        for root in [&a, &b] {
            make(root, 4, 2, 10, 1).unwrap();
        }
        fs::create_dir(b.join(".stfolder")).unwrap();
        let file = File::options()
            .write(true)
            .open(b.join("d0000/f0000000"))
            .unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        let tree = treewalk::walk(&a).unwrap();
        let wrong = |exactness| compare(&tree, &b, exactness).unwrap();
        assert_eq!(wrong(Exactness::Content), None);
        assert!(wrong(Exactness::Everything).is_some());
        fs::write(b.join("d0001/f0000003"), "another").unwrap();
        assert!(wrong(Exactness::Content).unwrap().contains("f0000003"));
    }

    #[test]
    fn as_many_files_and_folders_are_made_as_were_asked_for() {
        let base = tempfile::tempdir().unwrap();
        make(base.path(), 25, 10, 0, 1).unwrap();
        assert_eq!(files_in(base.path()), 25);
        let folders = base.path().join("folders");
        make_folders(&folders, 250).unwrap();
        assert_eq!(treewalk::walk(&folders).unwrap().len(), 251);
    }
}
