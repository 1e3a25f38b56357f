//! The same changes by way of other mounts, other mount namespaces, and the
//! kernel's own threads.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use crate::data::{self, lacking};
use crate::rows::{Held, Lacking, Stage};
use crate::sys::{Aligned, PAGE, check};

/// The row whose file is in the lower directory before.
pub const COPIED_UP: &str = "write that copies a file up from the lower directory";

static BLOCK: Aligned = Aligned([b'd'; PAGE]);

struct Bound(PathBuf);

impl Drop for Bound {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.0, UnmountFlags::DETACH) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

fn bind_at(stage: &Stage) -> PathBuf {
    PathBuf::from("/run/coverage-bind")
        .join(&stage.place.name)
        .join(stage.name())
}

pub fn bound(stage: &Stage, held: &mut Held) -> Result<()> {
    data::file(stage, held)?;
    let at = bind_at(stage);
    fs::create_dir_all(&at)?;
    mount_bind(&stage.dir, &at).context("bind mount")?;
    held.others.push(Box::new(Bound(at)));
    Ok(())
}

pub fn write_bound(stage: &Stage, held: &mut Held) -> Result<()> {
    let mut file = data::open(&bind_at(stage).join("f"))?;
    file.write_all(b"hello")?;
    // Before the mount, which it would keep busy.
    held.files.push(file);
    Ok(())
}

pub fn create_bound(stage: &Stage, held: &mut Held) -> Result<()> {
    held.files.push(File::create_new(bind_at(stage).join("n"))?);
    Ok(())
}

/// Does something in a thread with a mount namespace of its own.
fn in_namespace<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: a plain system call; it concerns this thread only, which
            // is about to end.
            check(unsafe { libc::unshare(libc::CLONE_NEWNS) }).context("unshare")?;
            work()
        });
        thread.join().map_err(|_| anyhow!("the thread panicked"))?
    })
}

pub fn write_in_namespace(stage: &Stage, held: &mut Held) -> Result<()> {
    let path = stage.dir.join("f");
    let file = in_namespace(|| {
        let mut file = data::open(&path)?;
        file.write_all(b"hello")?;
        Ok(file)
    })?;
    held.files.push(file);
    Ok(())
}

pub fn rename_in_namespace(stage: &Stage, _: &mut Held) -> Result<()> {
    let (from, to) = (stage.dir.join("f"), stage.dir.join("n"));
    in_namespace(|| Ok(fs::rename(&from, &to)?))
}

pub fn lower(_: &Stage, _: &mut Held) -> Result<()> {
    Ok(())
}

pub fn copy_up(stage: &Stage, held: &mut Held) -> Result<()> {
    let mut file = data::open(&stage.dir.join("f"))?;
    file.write_all(b"hello")?;
    held.files.push(file);
    Ok(())
}

const LOOP_SET_FD: libc::Ioctl = 0x4c00;
const LOOP_CLR_FD: libc::Ioctl = 0x4c01;
const LOOP_SET_DIRECT_IO: libc::Ioctl = 0x4c08;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;

/// A loop device, without its file when it is dropped.
struct Looped(File);

impl Drop for Looped {
    fn drop(&mut self) {
        // SAFETY: a request without an argument.
        if let Err(error) = check(unsafe { libc::ioctl(self.0.as_raw_fd(), LOOP_CLR_FD) }) {
            eprintln!("LOOP_CLR_FD: {error}");
        }
    }
}

fn attach(stage: &Stage, held: &mut Held) -> Result<Looped> {
    data::file(stage, held)?;
    let image = data::open(&stage.dir.join("f"))?;
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")
        .context("loop-control")?;
    // SAFETY: requests whose argument, if any, is a descriptor.
    let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/dev/loop{number}"))?;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_FD, image.as_raw_fd()) })
        .context("LOOP_SET_FD")?;
    Ok(Looped(device))
}

pub fn looped(stage: &Stage, held: &mut Held) -> Result<()> {
    let device = attach(stage, held)?;
    held.files.push(device.0.try_clone()?);
    held.others.push(Box::new(device));
    Ok(())
}

pub fn looped_direct(stage: &Stage, held: &mut Held) -> Result<()> {
    let device = attach(stage, held)?;
    // SAFETY: a request whose argument is a number.
    lacking(check(unsafe {
        libc::ioctl(device.0.as_raw_fd(), LOOP_SET_DIRECT_IO, 1)
    }))?;
    held.files.push(device.0.try_clone()?);
    held.others.push(Box::new(device));
    Ok(())
}

pub fn write_looped(_: &Stage, held: &mut Held) -> Result<()> {
    held.files[0].write_all_at(&BLOCK.0, 0)?;
    // On the disk of the loop device is in the file.
    Ok(held.files[0].sync_data()?)
}

fn nfs(stage: &Stage) -> Result<PathBuf> {
    match &stage.place.nfs {
        Ok(mounted) => Ok(mounted.join(stage.name())),
        Err(reason) => Err(Lacking(reason.clone()).into()),
    }
}

pub fn exported(stage: &Stage, held: &mut Held) -> Result<()> {
    nfs(stage)?;
    data::file(stage, held)
}

pub fn nfs_write(stage: &Stage, held: &mut Held) -> Result<()> {
    let mut file = data::open(&nfs(stage)?.join("f"))?;
    file.write_all(b"hello")?;
    file.sync_data()?;
    held.files.push(file);
    Ok(())
}

pub fn nfs_create(stage: &Stage, held: &mut Held) -> Result<()> {
    held.files.push(File::create_new(nfs(stage)?.join("n"))?);
    Ok(())
}

pub fn nfs_rename(stage: &Stage, _: &mut Held) -> Result<()> {
    let folder = nfs(stage)?;
    Ok(fs::rename(folder.join("f"), folder.join("n"))?)
}

pub fn nfs_unlink(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(fs::remove_file(nfs(stage)?.join("f"))?)
}

pub fn nfs_chmod(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(fs::set_permissions(
        nfs(stage)?.join("f"),
        fs::Permissions::from_mode(0o600),
    )?)
}
