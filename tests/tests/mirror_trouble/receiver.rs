//! A receiver whose disk is full, read-only or broken.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use omirr_tests::disk::{self, Disk};
use omirr_tests::nodes::Pair;

use crate::{SOON, heals, noise, on_disk, put_rest, rest_goes_on, running_on, waits};

const FULL: &str = "the disk is full";

#[test]
fn on_a_full_disk_the_big_file_waits_and_the_rest_goes_on() {
    let Some((mut pair, disk)) = on_disk("a full disk", 48, &[]) else {
        return;
    };
    put_rest(&mut pair);
    disk.fill(2048);
    fs::write(pair.one.share.join("big"), noise(8 << 20)).unwrap();
    waits(&pair.two, &pair.one, "big", FULL);
    rest_goes_on(&pair);
    // What waits was not acknowledged, so it is sent again.
    let behind = |pair: &Pair| pair.one.status().unwrap()["shares"][0]["peers"][0]["behind"].as_u64();
    assert!(behind(&pair) > Some(0), "{}", pair.one.status_text());
    pair.two.kill();
    pair.two.start();
    waits(&pair.two, &pair.one, "big", FULL);
    assert_eq!(fs::read(pair.two.share.join("small")).unwrap(), b"small");
    disk.free();
    heals(&mut pair);
}

#[test]
fn what_is_acknowledged_survives_a_power_cut() {
    let Some((mut pair, mut disk)) = on_disk("a power cut", 48, &[]) else {
        return;
    };
    for n in 0..40 {
        pair.one.put(&format!("f{n}"), &format!("content {n}"));
    }
    fs::create_dir_all(pair.one.share.join("d/e")).unwrap();
    fs::write(pair.one.share.join("d/e/big"), noise(3 << 20)).unwrap();
    fs::rename(pair.one.share.join("f0"), pair.one.share.join("d/f0")).unwrap();
    pair.one.settle(SOON);
    // At this moment, not after the kernel has had its time.
    pair.two.stop_reading();
    pair.two.kill();
    disk.cut_power();
    pair.assert_equal();
    pair.two.start();
    heals(&mut pair);
    fs::write(pair.two.share.join("later"), "later").unwrap();
    heals(&mut pair);
}

#[test]
fn when_inodes_run_out_new_files_wait_and_changes_of_old_ones_go_on() {
    let Some((mut pair, disk)) = on_disk("no inodes", 16, &["-N", "64"]) else {
        return;
    };
    put_rest(&mut pair);
    let mut more = 0;
    while fs::write(disk.path().join(format!("filler{more}")), "").is_ok() {
        more += 1;
    }
    pair.one.put("new", "new");
    waits(&pair.two, &pair.one, "new", "no inodes left");
    fs::rename(pair.one.share.join("to-rename"), pair.one.share.join("renamed")).unwrap();
    pair.two.wait_for_file("renamed", "rest", SOON);
    for n in 0..more {
        fs::remove_file(disk.path().join(format!("filler{n}"))).unwrap();
    }
    heals(&mut pair);
}

#[test]
fn what_comes_while_the_disk_is_mounted_read_only_waits() {
    let Some((mut pair, disk)) = on_disk("mounted read-only", 16, &[]) else {
        return;
    };
    put_rest(&mut pair);
    disk.remount("ro");
    pair.one.put("new", "new");
    fs::rename(pair.one.share.join("to-rename"), pair.one.share.join("renamed")).unwrap();
    fs::remove_file(pair.one.share.join("to-remove")).unwrap();
    for path in ["new", "renamed", "to-remove"] {
        waits(&pair.two, &pair.one, path, "read-only");
    }
    assert!(pair.two.share.join("to-remove").exists());
    // It ends and starts with such a disk, too.
    pair.two.stop();
    pair.two.start();
    waits(&pair.two, &pair.one, "new", "read-only");
    disk.remount("rw");
    heals(&mut pair);
}

#[test]
fn what_the_disk_fails_to_write_is_not_acknowledged() {
    const TEST: &str = "a disk that fails to write";
    // A disk that promises more than there is beneath it.
    let Some(beneath) = Disk::ext4(TEST, 48, &["-J", "size=4"], "") else {
        return;
    };
    let Some(mut disk) = Disk::thin(TEST, &beneath.path().join("image"), 32) else {
        return;
    };
    let Some(mut pair) = running_on(TEST, &disk, |_| ()) else {
        return;
    };
    put_rest(&mut pair);
    disk::fill(&beneath.path().join("filler"), 256);
    // More than is beneath, wherever the filesystem puts it.
    let content = noise(20 << 20);
    // In one step: half of it may well find room.
    fs::write(pair.one.folder.join("big"), &content).unwrap();
    fs::rename(pair.one.folder.join("big"), pair.one.share.join("big")).unwrap();
    // The kernel calls it full or an input/output error, by version.
    waits(&pair.two, &pair.one, "big", "cannot sync 'big'");
    assert!(!pair.two.share.join("big").exists());
    rest_goes_on(&pair);
    fs::remove_file(beneath.path().join("filler")).unwrap();
    heals(&mut pair);
    pair.two.stop_reading();
    pair.two.kill();
    disk.cut_power();
    assert!(
        fs::read(pair.two.share.join("big")).unwrap() == content,
        "acknowledged and not on the disk"
    );
}

#[test]
fn what_a_quota_does_not_allow_waits() {
    const TEST: &str = "a quota";
    /// A user with a quota.
    const SMALL: u32 = 4242;
    let make = ["-O", "quota", "-E", "quotatype=usrquota"];
    let Some(disk) = Disk::ext4(TEST, 48, &make, "usrquota") else {
        return;
    };
    // The kernel holds nobody with this capability to a quota.
    let prepare = |pair: &mut Pair| {
        pair.two.launcher = Some(Box::new(|binary| {
            let mut daemon = Command::new("setpriv");
            daemon.args(["--bounding-set=-sys_resource"]).arg(binary);
            daemon
        }));
    };
    if let Err(why) = set_quota(&disk, SMALL, 1024) {
        omirr_tests::skip(TEST, &format!("this kernel has no quotas: {why}"));
        return;
    }
    let Some(mut pair) = running_on(TEST, &disk, prepare) else {
        return;
    };
    put_rest(&mut pair);
    let made = pair.one.folder.join("big");
    fs::write(&made, noise(4 << 20)).unwrap();
    std::os::unix::fs::chown(&made, Some(SMALL), Some(SMALL)).unwrap();
    fs::set_permissions(&made, fs::Permissions::from_mode(0o640)).unwrap();
    fs::rename(&made, pair.one.share.join("big")).unwrap();
    waits(&pair.two, &pair.one, "big", "quota");
    rest_goes_on(&pair);
    set_quota(&disk, SMALL, 0).unwrap();
    heals(&mut pair);
}

/// Lets a user have so many KiB, 0 for any number.
fn set_quota(disk: &Disk, user: u32, kib: u64) -> std::io::Result<()> {
    let device = std::ffi::CString::new(disk.device()).unwrap();
    let command = (libc::Q_SETQUOTA << 8) | libc::USRQUOTA;
    // SAFETY: numbers only, for which all zeros are values.
    let mut limits: libc::dqblk = unsafe { std::mem::zeroed() };
    limits.dqb_bhardlimit = kib;
    limits.dqb_bsoftlimit = kib;
    limits.dqb_valid = 1; // QIF_BLIMITS
    // SAFETY: the device's name and the limits live until the call returns.
    let result = unsafe {
        libc::quotactl(
            command,
            device.as_ptr(),
            user.cast_signed(),
            std::ptr::from_mut(&mut limits).cast(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
