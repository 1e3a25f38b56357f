//! Small filesystems of a test's own, for what can go wrong with disks.
//!
//! Each is a file behind a loop device, in a fresh folder; all of it goes when
//! the value goes. Daemons that use it must have ended by then, so a test
//! declares its nodes before its disks.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a program that must succeed.
///
/// # Panics
/// It does not.
pub fn run(program: &str, args: &[&str]) -> String {
    crate::run(&mut command(program, args))
}

fn command(program: &str, args: &[&str]) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.args(args).env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

fn attempt(program: &str, args: &[&str]) -> Output {
    command(program, args)
        .output()
        .unwrap_or_else(|error| panic!("{program} cannot be started: {error}"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// A mounted ext4 filesystem.
pub struct Disk {
    // Unmounted before it is removed, by `drop`.
    folder: tempfile::TempDir,
    image: PathBuf,
    options: String,
}

impl Disk {
    /// An ext4 filesystem of so many MiB; `make` are further options of
    /// `mkfs.ext4`, `options` those of `mount`. None where nothing can be
    /// mounted, which is said for `test`.
    pub fn ext4(test: &str, mib: u64, make: &[&str], options: &str) -> Option<Disk> {
        let folder = tempfile::tempdir().expect("a folder for the test can be made");
        let image = folder.path().join("image");
        Disk::ext4_in(test, folder, image, mib, make, options)
    }

    /// The same, in the file `image`, of which only the first half is sure to have
    /// room where it lies.
    pub fn thin(test: &str, image: &Path, mib: u64) -> Option<Disk> {
        let folder = tempfile::tempdir().expect("a folder for the test can be made");
        // All that the filesystem needs for itself is in that half.
        let make = ["-J", "size=4", "-E", "packed_meta_blocks=1,nodiscard"];
        let disk = Disk::ext4_in(test, folder, image.to_owned(), mib, &make, "");
        if disk.is_some() {
            run("fallocate", &["-l", &format!("{}M", mib / 2), text(image)]);
        }
        disk
    }

    fn ext4_in(
        test: &str,
        folder: tempfile::TempDir,
        image: PathBuf,
        mib: u64,
        make: &[&str],
        options: &str,
    ) -> Option<Disk> {
        let file = File::create(&image).expect("the image can be made");
        file.set_len(mib << 20).expect("the image can be made");
        drop(file);
        let mut args = vec!["-q", "-F", "-m", "0"];
        args.extend(make);
        args.push(text(&image));
        run("mkfs.ext4", &args);
        let disk = Disk {
            image,
            options: options.to_owned(),
            folder,
        };
        std::fs::create_dir(disk.path()).expect("the mount point can be made");
        let mounted = disk.try_mount();
        if !mounted.status.success() {
            let why = String::from_utf8_lossy(&mounted.stderr);
            crate::skip(
                test,
                &format!("no filesystem can be mounted here: {}", why.trim()),
            );
            return None;
        }
        Some(disk)
    }

    fn try_mount(&self) -> Output {
        let options = match self.options.as_str() {
            "" => "loop".to_owned(),
            options => format!("loop,{options}"),
        };
        attempt("mount", &["-o", &options, text(&self.image), text(&self.path())])
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }

    /// The block device beneath.
    pub fn device(&self) -> String {
        let found = run("findmnt", &["-no", "SOURCE", text(&self.path())]);
        found.trim().to_owned()
    }

    /// Mounts it with other options.
    pub fn remount(&self, options: &str) {
        run(
            "mount",
            &["-o", &format!("remount,{options}"), text(&self.path())],
        );
    }

    /// Writes until nothing more fits, but for so many KiB.
    pub fn fill(&self, leave_kib: u64) {
        fill(&self.path().join("filler"), leave_kib);
    }

    /// Takes back what [`Disk::fill`] has used.
    pub fn free(&self) {
        std::fs::remove_file(self.path().join("filler")).expect("the filler is there");
    }

    /// Lets the disk end before byte `at`: what lies behind cannot be read any
    /// more. Returns it.
    pub fn cut_off(&self, at: u64) -> Vec<u8> {
        let mut tail = Vec::new();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.image)
            .expect("the image is there");
        file.seek(SeekFrom::Start(at)).expect("the image is longer");
        file.read_to_end(&mut tail).expect("the image can be read");
        file.set_len(at).expect("the image can be cut");
        tail
    }

    /// Gives back what [`Disk::cut_off`] has taken.
    pub fn put_back(&self, at: u64, tail: &[u8]) {
        let mut file = OpenOptions::new()
            .write(true)
            .open(&self.image)
            .expect("the image is there");
        file.seek(SeekFrom::Start(at)).expect("the image is as long");
        file.write_all(tail).expect("the image can be written");
    }

    /// What a power cut at this moment would leave: the disk without what is only
    /// in memory. Nobody may use it meanwhile. Then it is mounted again.
    pub fn cut_power(&mut self) {
        let snapshot = self.folder.path().join("snapshot");
        std::fs::copy(&self.image, &snapshot).expect("the image can be copied");
        run("umount", &[text(&self.path())]);
        self.image = snapshot;
        let mounted = self.try_mount();
        assert!(
            mounted.status.success(),
            "{}",
            String::from_utf8_lossy(&mounted.stderr)
        );
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a test that fails may still have something open.
        attempt("umount", &["-l", text(&self.path())]);
    }
}

/// Fills the filesystem of `filler` with it, but for so many KiB.
///
/// # Panics
/// It cannot be written for another reason than that nothing more fits.
pub fn fill(filler: &Path, leave_kib: u64) {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(filler)
        .expect("the filler can be made");
    for block in [1 << 20, 64 << 10, 4 << 10, 1 << 10] {
        let block = vec![7u8; block];
        while file.write_all(&block).is_ok() {}
    }
    // Blocks that were promised to a file are given only now.
    let synced = file.sync_all();
    assert!(
        synced.as_ref().map_err(std::io::Error::raw_os_error).err() != Some(Some(libc::EIO)),
        "{synced:?}"
    );
    let length = file.metadata().expect("the filler has a size").len();
    file.set_len(length.saturating_sub(leave_kib << 10))
        .expect("a file can be cut");
    file.sync_all().expect("a file can be synced");
}
