//! A sender that cannot read what it should send.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use omirr_tests::disk::{Disk, run};
use omirr_tests::nodes::Pair;

use crate::refusals::lease;
use crate::{SOON, heals, noise, put_rest, rest_goes_on, waits};

/// The user that Debian calls nobody.
const NOBODY: u32 = 65534;

#[test]
fn what_the_sender_may_not_read_waits_there() {
    let prepare = |pair: &mut Pair| {
        pair.open_to_all();
        pair.one.without_privileges(NOBODY);
        pair.two.without_privileges(NOBODY);
    };
    let Some(mut pair) = Pair::running("what may not be read", prepare) else {
        return;
    };
    put_rest(&mut pair);
    let root = |name: &str, mode: u32| {
        let path = pair.one.share.join(name);
        std::os::unix::fs::chown(&path, Some(0), Some(0)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    fs::create_dir(pair.one.share.join("closed")).unwrap();
    fs::write(pair.one.share.join("closed/file"), "in a closed one").unwrap();
    root("closed", 0o700);
    fs::write(pair.one.share.join("secret"), "secret").unwrap();
    root("secret", 0o600);
    waits(&pair.one, &pair.one, "secret", "permission denied");
    waits(&pair.one, &pair.one, "closed", "permission denied");
    pair.one.put("small", "small");
    pair.two.wait_for_file("small", "small", SOON);
    for name in ["closed", "closed/file", "secret"] {
        std::os::unix::fs::chown(pair.one.share.join(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    heals(&mut pair);
}

#[test]
fn what_the_senders_disk_cannot_read_waits_there() {
    const TEST: &str = "a disk that fails to read";
    // Without a journal, so that nothing but the file lies behind the place at
    // which the disk ends.
    let make = ["-O", "^has_journal", "-E", "packed_meta_blocks=1"];
    let Some(disk) = Disk::ext4(TEST, 32, &make, "") else {
        return;
    };
    let prepare = |pair: &mut Pair| {
        pair.one.share = disk.path().join("share");
        fs::create_dir(&pair.one.share).unwrap();
    };
    let Some(mut pair) = Pair::running(TEST, prepare) else {
        return;
    };
    let content = noise(2 << 20);
    let unread = disk.path().join("unread");
    fs::write(&unread, &content).unwrap();
    run("sync", &["-f", unread.to_str().unwrap()]);
    let extents = run("filefrag", &["-e", "-b4096", unread.to_str().unwrap()]);
    // `0:  0..  511:  4096..  4607:  512:`
    let extent = extents
        .lines()
        .find(|line| line.trim_start().starts_with("0:"))
        .unwrap_or_else(|| panic!("{extents}"));
    let first: u64 = extent
        .split(':')
        .nth(2)
        .and_then(|range| range.split("..").next())
        .and_then(|first| first.trim().parse().ok())
        .unwrap_or_else(|| panic!("{extents}"));
    let tail = disk.cut_off(first * 4096);
    // Nothing of it may be in memory.
    let file = fs::File::open(&unread).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    drop(file);
    fs::rename(&unread, pair.one.share.join("unread")).unwrap();
    waits(&pair.one, &pair.one, "unread", "input/output error");
    fs::write(pair.one.share.join("small"), "small").unwrap();
    pair.two.wait_for_file("small", "small", SOON);
    disk.put_back(first * 4096, &tail);
    heals(&mut pair);
    assert!(fs::read(pair.two.share.join("unread")).unwrap() == content);
}

#[test]
fn what_another_program_has_leased_on_the_sender_waits_there() {
    let Some(mut pair) = Pair::running("a leased file", |_| ()) else {
        return;
    };
    put_rest(&mut pair);
    let made = pair.one.folder.join("leased");
    fs::write(&made, "leased").unwrap();
    let leased = lease(&pair, &made, libc::F_WRLCK);
    fs::rename(&made, pair.one.share.join("leased")).unwrap();
    waits(&pair.one, &pair.one, "leased", "lease");
    rest_goes_on(&pair);
    drop(leased);
    heals(&mut pair);
}
