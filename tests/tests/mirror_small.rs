//! Two nodes on this machine, one behaviour each.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use omirr_tests::nodes::{Pair, may_mirror};
use omirr_tests::ways::Mapped;

const SOON: Duration = Duration::from_secs(60);

fn pair() -> Option<Pair> {
    Pair::running(module_path!(), |_| ())
}

/// Waits until `done` says so.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_file_arrives_without_being_asked_for() {
    let Some(pair) = pair() else { return };
    fs::write(pair.one.share.join("hello"), "world").unwrap();
    let there = pair.two.share.join("hello");
    until("the file is there", || {
        fs::read_to_string(&there).is_ok_and(|text| text == "world")
    });
}

#[test]
fn every_kind_of_entry_is_the_same_on_the_other_side() {
    let Some(mut pair) = pair() else { return };
    let here = &pair.one.share;
    fs::create_dir(here.join("dir")).unwrap();
    fs::write(here.join("dir/file"), "x").unwrap();
    fs::write(here.join("empty"), "").unwrap();
    symlink("nowhere", here.join("dangling")).unwrap();
    fs::hard_link(here.join("dir/file"), here.join("second-name")).unwrap();
    let odd = here.join(std::ffi::OsStr::from_bytes(b"not \xff utf8\n"));
    fs::write(odd, "odd").unwrap();
    fs::write(here.join("n".repeat(255)), "long").unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        here.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o640),
        0,
    )
    .unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        here.join("null"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::from_raw_mode(0o600),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(here.join("socket")).unwrap();
    fs::set_permissions(here.join("dir/file"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(here.join("dir"), fs::Permissions::from_mode(0o1770)).unwrap();
    let sparse = fs::File::create(here.join("sparse")).unwrap();
    sparse.write_all_at(b"end", 64 << 20).unwrap();
    drop(sparse);
    pair.settle_equal(SOON);
    let blocks = fs::metadata(pair.two.share.join("sparse")).unwrap().blocks();
    assert!(
        blocks < 2048,
        "the sparse file takes {blocks} blocks of 512 bytes"
    );
}

#[test]
fn a_renamed_file_sends_no_content() {
    let Some(mut pair) = pair() else { return };
    let content = vec![7u8; 3 << 20];
    fs::write(pair.one.share.join("big"), &content).unwrap();
    fs::create_dir(pair.one.share.join("old")).unwrap();
    for n in 0..200 {
        fs::write(pair.one.share.join(format!("old/{n}")), format!("small {n}")).unwrap();
    }
    pair.settle_equal(SOON);
    let sent = |pair: &Pair| {
        pair.one.stats()["shares"][0]["content_sent_bytes"]
            .as_u64()
            .unwrap()
    };
    let before = sent(&pair);
    fs::rename(pair.one.share.join("big"), pair.one.share.join("renamed")).unwrap();
    fs::rename(pair.one.share.join("old"), pair.one.share.join("new")).unwrap();
    fs::hard_link(pair.one.share.join("renamed"), pair.one.share.join("linked")).unwrap();
    pair.settle_equal(SOON);
    assert_eq!(sent(&pair) - before, 0, "bytes of content were sent again");
}

#[test]
fn other_attributes_alone_send_no_content() {
    let Some(mut pair) = pair() else { return };
    let here = pair.one.share.clone();
    let file = |n: usize| here.join(format!("{n}"));
    for n in 0..100u8 {
        fs::write(file(n.into()), vec![n; 4096]).unwrap();
    }
    let chmod = |n: usize, mode| fs::set_permissions(file(n), fs::Permissions::from_mode(mode)).unwrap();
    pair.settle(SOON);
    let sent = |pair: &Pair| {
        pair.one.stats()["shares"][0]["content_sent_bytes"]
            .as_u64()
            .unwrap()
    };
    let before = sent(&pair);
    (0..100).for_each(|n| chmod(n, 0o600));
    pair.settle(SOON);
    (0..100).for_each(|n| chmod(n, 0o640));
    pair.settle(SOON);
    assert_eq!(sent(&pair) - before, 0, "bytes of content were sent again");
    // A content that the peer has not been told of comes, whatever followed it.
    fs::write(file(100), "new").unwrap();
    chmod(100, 0o600);
    pair.settle_equal(SOON);
}

#[test]
fn a_small_change_in_a_big_file_sends_little() {
    let Some(mut pair) = pair() else { return };
    let mut state = 1u64;
    let content: Vec<u8> = (0..24 << 20)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        })
        .collect();
    fs::write(pair.one.share.join("image"), &content).unwrap();
    pair.settle_equal(SOON);
    let sent = |pair: &Pair| {
        pair.one.stats()["shares"][0]["content_sent_bytes"]
            .as_u64()
            .unwrap()
    };
    let before = sent(&pair);
    let file = fs::File::options()
        .write(true)
        .open(pair.one.share.join("image"))
        .unwrap();
    file.write_all_at(b"a few other bytes", 9 << 20).unwrap();
    drop(file);
    pair.settle_equal(SOON);
    let more = sent(&pair) - before;
    assert!(more > 0 && more < 2 << 20, "{more} bytes were sent for 17");
}

#[test]
fn changes_on_both_sides_meet() {
    let Some(mut pair) = pair() else { return };
    std::thread::scope(|scope| {
        for node in [&pair.one, &pair.two] {
            scope.spawn(move || {
                for n in 0..300 {
                    let folder = node.share.join(format!("shared-{}", n % 7));
                    fs::create_dir_all(&folder).unwrap();
                    fs::write(folder.join(format!("{}-{n}", node.name)), format!("{n}")).unwrap();
                }
            });
        }
    });
    pair.settle_equal(SOON);
    let files: usize = (0..7)
        .map(|n| {
            fs::read_dir(pair.two.share.join(format!("shared-{n}")))
                .unwrap()
                .count()
        })
        .sum();
    assert_eq!(files, 600);
}

#[test]
fn the_loser_of_a_conflict_is_kept() {
    let Some(mut pair) = pair() else { return };
    fs::write(pair.one.share.join("page.html"), "first").unwrap();
    pair.settle_equal(SOON);
    pair.two.stop();
    fs::write(pair.one.share.join("page.html"), "from one").unwrap();
    // Times of files are no finer than the kernel's tick.
    std::thread::sleep(Duration::from_millis(20));
    fs::write(pair.two.share.join("page.html"), "from two, later").unwrap();
    pair.two.start();
    pair.settle_equal(SOON);
    let names: Vec<_> = fs::read_dir(&pair.one.share)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let copy = names
        .iter()
        .find(|name| name.contains(".omirr-conflict-"))
        .expect("a conflict copy");
    assert!(copy.starts_with("page.") && copy.ends_with(".html"), "{copy}");
    assert_eq!(
        fs::read_to_string(pair.two.share.join("page.html")).unwrap(),
        "from two, later"
    );
    assert_eq!(fs::read_to_string(pair.two.share.join(copy)).unwrap(), "from one");
}

#[test]
fn a_deletion_while_the_other_is_down_arrives_and_nothing_comes_back() {
    let Some(mut pair) = pair() else { return };
    for n in 0..100 {
        fs::write(pair.one.share.join(format!("{n}")), format!("{n}")).unwrap();
    }
    pair.settle_equal(SOON);
    pair.two.kill();
    for n in 0..50 {
        fs::remove_file(pair.one.share.join(format!("{n}"))).unwrap();
    }
    pair.two.start();
    pair.settle_equal(SOON);
    assert_eq!(fs::read_dir(&pair.two.share).unwrap().count(), 50);
}

#[test]
fn a_dead_peer_delays_nobody() {
    let Some(mut pair) = pair() else { return };
    // A third node that never answers is known to both.
    pair.one.stop();
    let dead = omirr_tests::nodes::Node::new(pair.base(), "dead");
    pair.one.knows(&dead);
    pair.one.start();
    fs::write(pair.one.share.join("hello"), "world").unwrap();
    let there = pair.two.share.join("hello");
    until("the file is there", || there.exists());
    let waited = pair.one.wait("200ms");
    assert_eq!(waited.status.code(), Some(1));
    let text = String::from_utf8(waited.stderr).unwrap();
    assert!(text.contains("dead"), "{text}");
}

#[test]
fn rows_travel_through_a_node_in_the_middle() {
    if !may_mirror(module_path!()) {
        return;
    }
    let mut pair = Pair::new();
    let mut three = omirr_tests::nodes::Node::new(pair.base(), "three");
    three.knows(&pair.two);
    pair.two.knows(&three);
    pair.start();
    three.start();
    fs::write(pair.one.share.join("far"), "travelled").unwrap();
    let there = three.share.join("far");
    until("the file has come through", || {
        fs::read_to_string(&there).is_ok_and(|text| text == "travelled")
    });
    fs::remove_file(&there).unwrap();
    let here = pair.one.share.join("far");
    until("the deletion has come back", || !here.exists());
}

#[test]
fn what_is_excluded_stays_here() {
    if !may_mirror(module_path!()) {
        return;
    }
    let mut pair = Pair::new();
    for node in [&mut pair.one, &mut pair.two] {
        node.share_options = "exclude = [\"*.tmp\", \"/cache/\"]".to_owned();
    }
    pair.start();
    fs::create_dir_all(pair.one.share.join("cache/x")).unwrap();
    fs::create_dir_all(pair.one.share.join("a/cache")).unwrap();
    fs::write(pair.one.share.join("a/b.tmp"), "").unwrap();
    fs::write(pair.one.share.join("a/b.txt"), "").unwrap();
    pair.settle(SOON);
    let two = &pair.two.share;
    assert!(two.join("a/b.txt").exists() && two.join("a/cache").exists());
    assert!(!two.join("a/b.tmp").exists() && !two.join("cache").exists());
}

#[test]
fn wait_returns_though_a_user_never_pauses() {
    let Some(pair) = pair() else { return };
    let share = pair.one.share.clone();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut nth = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                fs::write(share.join(format!("busy-{}", nth % 64)), nth.to_string()).unwrap();
                nth += 1;
            }
        });
        until("the user is at work", || share.join("busy-63").exists());
        fs::write(share.join("before"), "the call").unwrap();
        let done = pair.one.wait("60s");
        stop.store(true, Ordering::Relaxed);
        let there = fs::read_to_string(pair.two.share.join("before"));
        assert!(
            done.status.success(),
            "{}{}",
            String::from_utf8_lossy(&done.stderr),
            pair.one.log_tail()
        );
        assert!(there.is_ok_and(|text| text == "the call"));
    });
}

/// Fanotify tells of a store through a mapping when that is closed, and not before.
#[test]
fn what_no_event_tells_of_is_found_once_the_file_is_quiet() {
    if omirr_tests::binary().iter().any(|folder| folder == "release") {
        return omirr_tests::skip(module_path!(), "a release build waits ten minutes");
    }
    let Some(mut pair) = Pair::running(module_path!(), |pair| {
        pair.one.tracer = "source = \"fanotify\"".to_owned();
        pair.one.launcher = Some(Box::new(|binary| {
            let mut daemon = Command::new(binary);
            daemon.env("OMIRR_QUIET_MS", "1000");
            daemon
        }));
    }) else {
        return;
    };
    for (name, size) in [("little", 10_000), ("large", 6 << 20)] {
        let path = pair.one.share.join(name);
        let there = pair.two.share.join(name);
        let file = fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.write_all_at(&vec![7; size], 0).unwrap();
        let mapped = Mapped::at(&file, 0);
        // What was looked at so late that `stat` can be believed is not looked at again.
        let found = (1..=5).any(|attempt| {
            mapped.store(0, attempt);
            file.write_all_at(&[attempt], 5000).unwrap();
            pair.settle(SOON);
            mapped.store(1, attempt);
            let deadline = Instant::now() + Duration::from_secs(8);
            let arrived = || fs::read(&there).unwrap()[1] == attempt;
            while !arrived() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
            arrived()
        });
        assert!(found, "{name}: {}", pair.one.log_tail());
        pair.settle_equal(SOON);
    }
}
