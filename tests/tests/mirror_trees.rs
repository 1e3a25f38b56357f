//! Real nodes, and directories that are renamed with everything in them: one row
//! on the wire, one rename on the other side's disk.
//!
//! `OMIRR_TREE_ENTRIES` says how many entries the great directory has.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use omirr_tests::nodes::{Node, Pair, may_mirror};
use omirr_tests::treewalk;

const SOON: Duration = Duration::from_secs(120);
/// For a hundred thousand entries on a machine with other things to do.
const LONG: Duration = Duration::from_secs(1200);
/// What one rename may take on the wire, both ways and TLS included.
const RENAME_BYTES_MAX: u64 = 20_000;

/// Lets connections through to a port and counts what passes, both ways.
struct Relay {
    port: u16,
    bytes: Arc<AtomicU64>,
}

impl Relay {
    fn to(target: u16) -> Relay {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let bytes = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&bytes);
        thread::spawn(move || {
            for here in socket.incoming().flatten() {
                let Ok(there) = TcpStream::connect(("127.0.0.1", target)) else {
                    continue;
                };
                for (from, to) in [(&here, &there), (&there, &here)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let counter = Arc::clone(&counter);
                    thread::spawn(move || pass(from, to, &counter));
                }
            }
        });
        Relay { port, bytes }
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, counter: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    // The other end may be gone already.
    let _ = to.shutdown(Shutdown::Write);
}

/// Lets `from` dial `to` through a relay, and `to` dial back directly.
fn join(from: &mut Node, to: &mut Node) -> Relay {
    let relay = Relay::to(to.port);
    from.peers.push((
        to.name.clone(),
        format!("127.0.0.1:{}", relay.port),
        to.key.clone(),
    ));
    to.knows(from);
    relay
}

fn ino(path: &Path) -> u64 {
    fs::symlink_metadata(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .ino()
}

/// A directory with `count` files in folders of a hundred.
fn fill(dir: &Path, count: usize) {
    for n in 0..count {
        let folder = dir.join(format!("folder {}", n / 100));
        if n % 100 == 0 {
            fs::create_dir_all(&folder).unwrap();
        }
        fs::write(folder.join(format!("file {n}")), format!("content {n}\n")).unwrap();
    }
}

fn assert_same(nodes: &[&Node]) {
    let walks: Vec<_> = nodes
        .iter()
        .map(|node| treewalk::walk(&node.share).unwrap())
        .collect();
    for (node, walk) in nodes.iter().zip(&walks).skip(1) {
        let differences = treewalk::diff(&walks[0], walk);
        let logs: Vec<_> = nodes.iter().map(|node| node.log_tail()).collect();
        assert!(
            differences.is_empty(),
            "{} differs:\n{}\n{}",
            node.name,
            differences.join("\n"),
            logs.join("\n")
        );
    }
}

#[test]
fn a_directory_with_ten_thousand_entries_is_renamed_in_one_row_along_a_chain() {
    if !may_mirror(module_path!()) {
        return;
    }
    let count = std::env::var("OMIRR_TREE_ENTRIES").map_or(10_000, |count| {
        count.parse().expect("OMIRR_TREE_ENTRIES is a number")
    });
    let base = match std::env::var_os("OMIRR_TEST_DIR") {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    }
    .unwrap();
    let [mut one, mut two, mut three] = ["one", "two", "three"].map(|name| Node::new(base.path(), name));
    let relays = [join(&mut one, &mut two), join(&mut two, &mut three)];
    fill(&one.share.join("d"), count);
    fs::create_dir(one.share.join("else")).unwrap();
    for node in [&mut one, &mut two, &mut three] {
        node.start();
    }
    let settle = |one: &mut Node, two: &mut Node, three: &mut Node| {
        one.settle(LONG);
        two.settle(LONG);
        three.settle(LONG);
        assert_same(&[one, two, three]);
    };
    settle(&mut one, &mut two, &mut three);

    let places = ["d", "d/folder 0", "d/folder 7/file 742"];
    let before: Vec<_> = [&two, &three]
        .map(|node| places.map(|place| ino(&node.share.join(place))))
        .into();
    let sent: Vec<_> = relays.iter().map(Relay::bytes).collect();
    let started = Instant::now();
    fs::rename(one.share.join("d"), one.share.join("else/e")).unwrap();
    one.settle(LONG);
    let first = started.elapsed();
    two.settle(LONG);
    let second = started.elapsed();
    let sent: Vec<_> = relays
        .iter()
        .zip(sent)
        .map(|(relay, before)| relay.bytes() - before)
        .collect();
    println!(
        "{count} entries renamed: {sent:?} bytes, on the second node after {first:?}, the third {second:?}"
    );
    settle(&mut one, &mut two, &mut three);
    for (node, before) in [&two, &three].into_iter().zip(before) {
        let after =
            places.map(|place| ino(&node.share.join("else/e").join(place[1..].trim_start_matches('/'))));
        assert_eq!(
            after,
            before,
            "{} made other inodes\n{}",
            node.name,
            node.log_tail()
        );
    }
    for bytes in sent {
        assert!(bytes < RENAME_BYTES_MAX, "{bytes} bytes for one rename");
    }
    // What users do in it afterwards is found: the resolver knows where it is.
    three.put("else/e/folder 3/new", "made on three");
    one.wait_for_file("else/e/folder 3/new", "made on three", SOON);
}

#[test]
fn a_rename_made_while_a_node_was_down_moves_the_inodes_on_the_other() {
    let Some(mut pair) = Pair::running(module_path!(), |_| ()) else {
        return;
    };
    fill(&pair.one.share.join("d"), 1000);
    pair.settle_equal(SOON);
    let at = |pair: &Pair, place: &str| ino(&pair.two.share.join(place));
    let known = (at(&pair, "d"), at(&pair, "d/folder 3/file 333"));
    // The receiver is away, then the node itself on which it happens.
    pair.two.stop();
    fs::rename(pair.one.share.join("d"), pair.one.share.join("e")).unwrap();
    pair.two.start();
    pair.settle_equal(SOON);
    assert_eq!(
        (at(&pair, "e"), at(&pair, "e/folder 3/file 333")),
        known,
        "{}",
        pair.two.log_tail()
    );
    pair.one.stop();
    fs::rename(pair.one.share.join("e"), pair.one.share.join("a")).unwrap();
    fs::remove_file(pair.one.share.join("a/folder 5/file 555")).unwrap();
    fs::write(pair.one.share.join("a/folder 5/file 556"), "changed").unwrap();
    fs::write(pair.one.share.join("a/folder 5/new"), "new").unwrap();
    pair.one.start();
    pair.settle_equal(SOON);
    assert_eq!(
        (at(&pair, "a"), at(&pair, "a/folder 3/file 333")),
        known,
        "{}",
        pair.two.log_tail()
    );
    // And there and back again.
    fs::rename(pair.one.share.join("a"), pair.one.share.join("d")).unwrap();
    pair.settle_equal(SOON);
    assert_eq!(at(&pair, "d"), known.0, "{}", pair.two.log_tail());
}

#[test]
fn nothing_that_is_made_in_a_directory_while_it_is_renamed_is_lost() {
    let Some(mut pair) = Pair::running(module_path!(), |_| ()) else {
        return;
    };
    fill(&pair.one.share.join("d"), 300);
    pair.settle_equal(SOON);
    let done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = [&pair.one, &pair.two]
        .map(|node| {
            let (share, name, done) = (node.share.clone(), node.name.clone(), Arc::clone(&done));
            thread::spawn(move || {
                let mut made = BTreeSet::new();
                let mut nth = 0;
                while !done.load(Ordering::Relaxed) {
                    nth += 1;
                    let file = format!("{name}-{nth}");
                    for dir in ["d/folder 0", "e/folder 0"] {
                        if fs::write(share.join(dir).join(&file), &file).is_ok() {
                            made.insert(file);
                            break;
                        }
                    }
                    thread::sleep(Duration::from_millis(3));
                }
                made
            })
        })
        .into_iter()
        .collect();
    for round in 0..8 {
        let (from, to) = [("d", "e"), ("e", "d")][round % 2];
        // It may be that the other node's writer has brought the old one back.
        let _ = fs::rename(pair.one.share.join(from), pair.one.share.join(to));
        thread::sleep(Duration::from_millis(150));
    }
    done.store(true, Ordering::Relaxed);
    let mut made = BTreeSet::new();
    for writer in writers {
        made.extend(writer.join().unwrap());
    }
    pair.settle_equal(SOON);
    for node in [&pair.one, &pair.two] {
        let mut found = BTreeSet::new();
        for dir in ["d/folder 0", "e/folder 0"] {
            let entries = fs::read_dir(node.share.join(dir)).into_iter().flatten();
            found.extend(entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()));
        }
        let lost: Vec<_> = made.difference(&found).collect();
        assert!(
            lost.is_empty(),
            "{lost:?} of {} files are not on {}\n{}\n{}",
            made.len(),
            node.name,
            pair.one.log_tail(),
            pair.two.log_tail()
        );
    }
}
