//! Mode, owner, times, extended attributes, access lists, flags; by path and by
//! a descriptor that is open to read, so that closing it tells nothing.

use std::fs::{File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::Result;
use rustix::fs::{AtFlags, CWD, IFlags, Timespec, Timestamps, XattrFlags};

use crate::data::{self, lacking};
use crate::rows::{Held, Stage};
use crate::sys::check;

const XATTR: &str = "trusted.omirr-coverage";
const ACL: &str = "system.posix_acl_access";

fn path(stage: &Stage) -> PathBuf {
    stage.dir.join("f")
}

pub fn opened(stage: &Stage, held: &mut Held) -> Result<()> {
    data::file(stage, held)?;
    held.files.push(File::open(path(stage))?);
    Ok(())
}

pub fn chmod(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::set_permissions(
        path(stage),
        Permissions::from_mode(0o600),
    )?)
}

pub fn fchmod(_: &Stage, held: &mut Held) -> Result<()> {
    Ok(held.files[0].set_permissions(Permissions::from_mode(0o600))?)
}

pub fn chmod_folder(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::fs::set_permissions(
        stage.dir.join("a"),
        Permissions::from_mode(0o700),
    )?)
}

pub fn chown(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(std::os::unix::fs::chown(path(stage), Some(1), Some(1))?)
}

pub fn fchown(_: &Stage, held: &mut Held) -> Result<()> {
    Ok(std::os::unix::fs::fchown(&held.files[0], Some(1), Some(1))?)
}

const TIMES: Timestamps = Timestamps {
    last_access: Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    },
    last_modification: Timespec {
        tv_sec: 1,
        tv_nsec: 5,
    },
};

pub fn utimens(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(rustix::fs::utimensat(CWD, path(stage), &TIMES, AtFlags::empty())?)
}

pub fn futimens(_: &Stage, held: &mut Held) -> Result<()> {
    Ok(rustix::fs::futimens(&held.files[0], &TIMES)?)
}

fn set(stage: &Stage, name: &str, value: &[u8]) -> Result<()> {
    let result = rustix::fs::setxattr(path(stage), name, value, XattrFlags::empty());
    lacking(result.map_err(Into::into))
}

fn fset(held: &Held, name: &str, value: &[u8]) -> Result<()> {
    let result = rustix::fs::fsetxattr(&held.files[0], name, value, XattrFlags::empty());
    lacking(result.map_err(Into::into))
}

pub fn setxattr(stage: &Stage, _: &mut Held) -> Result<()> {
    set(stage, XATTR, b"1")
}

pub fn fsetxattr(_: &Stage, held: &mut Held) -> Result<()> {
    fset(held, XATTR, b"1")
}

pub fn with_xattr(stage: &Stage, held: &mut Held) -> Result<()> {
    opened(stage, held)?;
    set(stage, XATTR, b"1")
}

pub fn removexattr(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(rustix::fs::removexattr(path(stage), XATTR)?)
}

pub fn fremovexattr(_: &Stage, held: &mut Held) -> Result<()> {
    Ok(rustix::fs::fremovexattr(&held.files[0], XATTR)?)
}

/// An access list as the kernel takes it: version 2, then owner, one named user,
/// group, mask, others, each as tag, permissions, number.
fn acl() -> Vec<u8> {
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1_u16, 6_u16, u32::MAX),
        (2, 4, 1000),
        (4, 4, u32::MAX),
        (16, 6, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&permissions.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    }
    acl
}

pub fn set_acl(stage: &Stage, _: &mut Held) -> Result<()> {
    set(stage, ACL, &acl())
}

pub fn fset_acl(_: &Stage, held: &mut Held) -> Result<()> {
    fset(held, ACL, &acl())
}

pub fn with_acl(stage: &Stage, held: &mut Held) -> Result<()> {
    opened(stage, held)?;
    set(stage, ACL, &acl())
}

pub fn remove_acl(stage: &Stage, _: &mut Held) -> Result<()> {
    Ok(rustix::fs::removexattr(path(stage), ACL)?)
}

pub fn fremove_acl(_: &Stage, held: &mut Held) -> Result<()> {
    Ok(rustix::fs::fremovexattr(&held.files[0], ACL)?)
}

pub fn setflags(_: &Stage, held: &mut Held) -> Result<()> {
    let file = &held.files[0];
    let flags = lacking(rustix::fs::ioctl_getflags(file).map_err(Into::into))?;
    lacking(rustix::fs::ioctl_setflags(file, flags | IFlags::NODUMP).map_err(Into::into))
}

pub fn fssetxattr(_: &Stage, held: &mut Held) -> Result<()> {
    const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f;
    const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820;
    const FS_XFLAG_NODUMP: u32 = 0x80;
    let file = held.files[0].as_raw_fd();
    let mut attributes = [0_u32; 7];
    // SAFETY: the structure `fsxattr` has 28 bytes and outlives the calls.
    unsafe {
        lacking(check(libc::ioctl(
            file,
            FS_IOC_FSGETXATTR,
            attributes.as_mut_ptr(),
        )))?;
        attributes[0] |= FS_XFLAG_NODUMP;
        lacking(check(libc::ioctl(file, FS_IOC_FSSETXATTR, attributes.as_ptr())))?;
    }
    Ok(())
}
