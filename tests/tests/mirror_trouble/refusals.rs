//! What users do on the receiver with files that peers change: locks, leases,
//! swap.

use std::fs;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use omirr_tests::disk::run;
use omirr_tests::nodes::Pair;

use crate::{SOON, heals, on_disk, put_rest, rest_goes_on, waits};

#[test]
fn locks_leases_and_running_programs_on_the_receiver_hinder_nothing() {
    let Some((mut pair, _disk)) = on_disk("locks", 48, &[]) else {
        return;
    };
    for name in ["locked", "leased"] {
        pair.one.put(name, "old");
    }
    fs::copy("/bin/sleep", pair.one.share.join("program")).unwrap();
    pair.settle(SOON);
    let locked = fs::File::open(pair.two.share.join("locked")).unwrap();
    locked.lock().unwrap();
    let leased = lease(&pair, &pair.two.share.join("leased"), libc::F_WRLCK);
    let mut program = Command::new(pair.two.share.join("program"))
        .arg("600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    for name in ["locked", "leased", "program"] {
        pair.one.put(name, "new");
        pair.two.wait_for_file(name, "new", SOON);
    }
    program.kill().unwrap();
    program.wait().unwrap();
    drop((locked, leased));
    heals(&mut pair);
}

#[test]
fn a_file_that_the_receiver_swaps_to_waits() {
    const TEST: &str = "a swap file";
    let Some((mut pair, _disk)) = on_disk(TEST, 48, &[]) else {
        return;
    };
    put_rest(&mut pair);
    // The same kind of file as with which a machine is set up.
    fs::write(pair.one.share.join("swap"), vec![0; 4 << 20]).unwrap();
    run("chmod", &["600", pair.one.share.join("swap").to_str().unwrap()]);
    run("mkswap", &[pair.one.share.join("swap").to_str().unwrap()]);
    pair.settle(SOON);
    let swap = pair.two.share.join("swap");
    // Without holes, as swapon wants it; the same content.
    let content = fs::read(&swap).unwrap();
    fs::write(&swap, content).unwrap();
    pair.settle(SOON);
    let on = Command::new("/usr/sbin/swapon").arg(&swap).output().unwrap();
    if !on.status.success() {
        let why = String::from_utf8_lossy(&on.stderr).trim().to_owned();
        omirr_tests::skip(TEST, &format!("nothing can be swapped to here: {why}"));
        return;
    }
    pair.one.put("swap", "no more swap");
    waits(&pair.two, &pair.one, "swap", "in use as swap");
    rest_goes_on(&pair);
    run("/usr/sbin/swapoff", &[swap.to_str().unwrap()]);
    heals(&mut pair);
}

/// Takes a lease on a file; its holder is asked to give it up by SIGIO, which
/// this process ignores from here on.
pub fn lease(pair: &Pair, path: &std::path::Path, kind: i32) -> fs::File {
    let file = fs::File::options()
        .read(true)
        .write(kind == libc::F_WRLCK)
        .open(path)
        .unwrap();
    // SAFETY: no handler is set.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    // A lease is given only while nobody else has the file open: the daemon may
    // be reading it.
    pair.two.until("a lease is given", SOON, || {
        // SAFETY: numbers only.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) == 0 }
    });
    file
}
