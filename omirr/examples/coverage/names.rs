//! Names that come, go and move.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};

use crate::data::{self, lacking};
use crate::rows::{Held, Stage};

/// Files in the directory that is renamed.
const FULL: usize = 10_000;

pub fn create(stage: &Stage, held: &mut Held) -> Result<()> {
    held.files.push(File::create_new(stage.dir.join("n"))?);
    Ok(())
}

fn mknod(stage: &Stage, kind: FileType, device: u64) -> Result<()> {
    Ok(rustix::fs::mknodat(
        CWD,
        stage.dir.join("n"),
        kind,
        Mode::RUSR,
        device,
    )?)
}

pub fn mknod_file(stage: &Stage, _: &mut Held) -> Result<()> {
    mknod(stage, FileType::RegularFile, 0)
}

pub fn mknod_fifo(stage: &Stage, _: &mut Held) -> Result<()> {
    mknod(stage, FileType::Fifo, 0)
}

pub fn mknod_socket(stage: &Stage, _: &mut Held) -> Result<()> {
    mknod(stage, FileType::Socket, 0)
}

pub fn mknod_device(stage: &Stage, _: &mut Held) -> Result<()> {
    mknod(stage, FileType::CharacterDevice, rustix::fs::makedev(1, 3))
}

pub fn bind(stage: &Stage, held: &mut Held) -> Result<()> {
    let listener = std::os::unix::net::UnixListener::bind(stage.dir.join("n"))?;
    held.others.push(Box::new(listener));
    Ok(())
}

pub fn mkdir(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::create_dir(stage.dir.join("n"))?)
}

pub fn symlink(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::os::unix::fs::symlink("f", stage.dir.join("n"))?)
}

pub fn link(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::hard_link(stage.dir.join("f"), stage.dir.join("n"))?)
}

pub fn tmpfile(stage: &Stage, held: &mut Held) -> Result<()> {
    let opened = rustix::fs::open(&stage.dir, OFlags::TMPFILE | OFlags::WRONLY, Mode::RUSR);
    let file = lacking(opened.map_err(Into::into))?;
    rustix::io::write(&file, b"unnamed")?;
    held.files.push(file.into());
    Ok(())
}

pub fn link_tmpfile(stage: &Stage, held: &mut Held) -> Result<()> {
    let name = format!("/proc/self/fd/{}", held.files[0].as_raw_fd());
    Ok(rustix::fs::linkat(
        CWD,
        name,
        CWD,
        stage.dir.join("n"),
        AtFlags::SYMLINK_FOLLOW,
    )?)
}

pub fn tmpfile_linked(stage: &Stage, held: &mut Held) -> Result<()> {
    tmpfile(stage, held)?;
    link_tmpfile(stage, held)
}

/// The kernel forgets names that nobody uses; the open one is no name.
pub fn tmpfile_forgotten(stage: &Stage, held: &mut Held) -> Result<()> {
    tmpfile_linked(stage, held)?;
    // What was used lately goes in the second round.
    for _ in 0..3 {
        std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
    }
    Ok(())
}

/// `n`, open by its former name `f`.
pub fn two_names(stage: &Stage, held: &mut Held) -> Result<()> {
    data::file(stage, held)?;
    held.files.push(data::open(&stage.dir.join("f"))?);
    link(stage, held)?;
    unlink(stage, held)
}

pub fn write_held(_: &Stage, held: &mut Held) -> Result<()> {
    Ok(held.files[0].write_all(b"hello")?)
}

pub fn unlink(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::remove_file(stage.dir.join("f"))?)
}

/// `f`, `over`, and the directories `a` and `b`.
pub fn folders(stage: &Stage, held: &mut Held) -> Result<()> {
    data::file(stage, held)?;
    std::fs::write(stage.dir.join("over"), b"there before")?;
    std::fs::create_dir(stage.dir.join("a"))?;
    Ok(std::fs::create_dir(stage.dir.join("b"))?)
}

pub fn rmdir(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::remove_dir(stage.dir.join("a"))?)
}

fn to(stage: &Stage, flags: RenameFlags, from: &str, name: &str) -> Result<()> {
    let result = rustix::fs::renameat_with(CWD, stage.dir.join(from), CWD, stage.dir.join(name), flags);
    lacking(result.map_err(Into::into))
}

pub fn rename(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::rename(stage.dir.join("f"), stage.dir.join("n"))?)
}

pub fn rename_across(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::rename(stage.dir.join("f"), stage.dir.join("b/n"))?)
}

pub fn rename_over(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::rename(stage.dir.join("f"), stage.dir.join("over"))?)
}

pub fn rename_noreplace(stage: &Stage, _: &mut Held) -> Result<()> {
    to(stage, RenameFlags::NOREPLACE, "f", "n")
}

pub fn exchange(stage: &Stage, _: &mut Held) -> Result<()> {
    to(stage, RenameFlags::EXCHANGE, "f", "a")
}

/// A name beside the share that no other row uses.
fn beside(stage: &Stage) -> Result<PathBuf> {
    let outside = stage
        .place
        .outside
        .as_ref()
        .context("there is a folder beside the share")?;
    Ok(outside.join(stage.name()))
}

pub fn rename_out(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::rename(stage.dir.join("f"), beside(stage)?)?)
}

pub fn outside(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::write(beside(stage)?, b"from outside")?)
}

pub fn rename_in(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::rename(beside(stage)?, stage.dir.join("n"))?)
}

pub fn full_folder(stage: &Stage, _: &mut Held) -> Result<()> {
    let full = stage.dir.join("full");
    std::fs::create_dir(&full)?;
    for number in 0..FULL {
        rustix::fs::mknodat(
            CWD,
            full.join(number.to_string()),
            FileType::RegularFile,
            Mode::RUSR,
            0,
        )?;
    }
    Ok(())
}

pub fn rename_folder(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::rename(stage.dir.join("full"), stage.dir.join("n"))?)
}
