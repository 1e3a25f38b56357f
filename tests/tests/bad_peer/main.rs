//! What comes in by the network and should not: wrong keys, wrong protocols,
//! strangers, damaged frames, and rows that would reach outside the share. Each
//! ends in a sentence of the log that says who and what; the mirror goes on.

mod hostile;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink as make_symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hostile::{Hostile, batch, directory, file, hello, patched, symlink};
use omirr::model::Origin;
use omirr::wire::{LIMITS, MAGIC, Message, PROTOCOL};
use omirr_tests::nodes::{Node, Pair, may_mirror, omirr};

const SOON: Duration = Duration::from_secs(60);

/// Two nodes that mirror each other, and a third key that the first one takes
/// for a peer's. Nothing listens at that peer's address.
struct Trio {
    pair: Pair,
    mallory: Node,
}

impl Trio {
    fn start(test: &str) -> Option<Trio> {
        if !may_mirror(test) {
            return None;
        }
        let mut pair = Pair::new();
        let mallory = Node::new(pair.base(), "mallory");
        pair.one.knows(&mallory);
        pair.start();
        pair.still_mirrors();
        Some(Trio { pair, mallory })
    }

    fn connect(&self) -> Hostile {
        self.greet_with(MAGIC).expect("one takes mallory for a peer")
    }

    fn greet_with(&self, greeting: [u8; 8]) -> std::io::Result<Hostile> {
        let key_file = self.mallory.folder.join("node.key");
        Hostile::connect(self.pair.one.port, &key_file, &self.mallory.key, greeting)
    }

    /// A connection on which rows are welcome.
    fn welcomed(&self) -> Hostile {
        let mut hostile = self.connect();
        hostile.say(&hello());
        let answer = hostile.hear();
        assert!(matches!(answer, Some(Message::Welcome { .. })), "{answer:?}");
        hostile
    }

    /// The line of one's log in which `text` comes, once it is there.
    fn line(&self, text: &str) -> String {
        self.pair.one.wait_for_log(text, SOON);
        let log = self.pair.one.log_text();
        let line = log
            .lines()
            .find(|line| line.contains(text))
            .expect("it was just there");
        println!("{line}");
        line.to_owned()
    }

    /// The mirror works, and the share has nothing that it should not have.
    fn goes_on(&mut self) {
        assert!(self.pair.one.is_running(), "{}", self.pair.one.log_tail());
        assert!(
            !self.pair.one.log_text().contains("panicked"),
            "{}",
            self.pair.one.log_tail()
        );
        self.pair.still_mirrors();
        self.welcomed();
    }

    /// Waits until one's log tells of so many connections that ended for
    /// `text`, and gives the last such line.
    fn says_so_often(&self, text: &str, times: usize) {
        let deadline = Instant::now() + SOON;
        while self.pair.one.log_text().matches(text).count() < times {
            assert!(
                Instant::now() < deadline,
                "not {times} times {text:?}\n{}",
                self.pair.one.log_tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_peer_with_another_key_is_told_on_both_sides_and_with_the_right_key_it_mirrors() {
    if !may_mirror("a_peer_with_another_key_is_told_on_both_sides_and_with_the_right_key_it_mirrors") {
        return;
    }
    let mut pair = Pair::new();
    let other = Node::new(pair.base(), "other");
    let (one, two) = (&mut pair.one, &mut pair.two);
    let right = std::mem::replace(&mut one.peers[0].2, other.key.clone());
    one.start();
    two.start();
    let (one_port, two_port) = (one.port, two.port);
    one.wait_for_log(
        &format!(
            "cannot send: 127.0.0.1:{two_port} answered with key {right}, but the configuration says {}: if that \
             node has a new key, put it into [peers], if not, another host has its address",
            other.key
        ),
        SOON,
    );
    one.wait_for_log(&format!("a stranger with key {right} from 127.0.0.1:"), SOON);
    one.wait_for_log(
        "was refused: if it is a peer, add the key to the configuration",
        SOON,
    );
    two.wait_for_log(
        &format!(
            "cannot send: 127.0.0.1:{one_port} does not accept this node's key: add {right} to its [peers]"
        ),
        SOON,
    );
    two.wait_for_log(
        &format!("expects another key than this node's: correct it to {right} in its [peers]"),
        SOON,
    );
    one.put("early", "early");
    let status = one.status().expect("the daemon answers");
    let peer = &status["shares"][0]["peers"][0];
    assert_eq!(peer["state"], "connecting", "{status}");
    assert!(
        peer["last_error"]
            .as_str()
            .is_some_and(|why| why.contains("answered with key")),
        "{status}"
    );
    assert!(!two.share.join("early").exists());

    one.peers[0].2 = right;
    one.write_config();
    one.hang_up();
    two.wait_for_file("early", "early", SOON);
    pair.still_mirrors();
    pair.settle_equal(SOON);
}

#[test]
fn another_protocol_is_told_from_the_greeting() {
    let Some(mut trio) = Trio::start("another_protocol_is_told_from_the_greeting") else {
        return;
    };
    let mut newer = MAGIC;
    newer[7] = 9;
    let mut hostile = trio.greet_with(newer).unwrap();
    hostile.say(&hello());
    assert_eq!(hostile.hear_out(), []);
    let line = trio.line("speaks omirr protocol 9, this node speaks 6: update the older one");
    assert!(line.contains("a connection was refused: 127.0.0.1:"), "{line}");
    trio.goes_on();
    let hostile = trio.greet_with(*b"SSH-2.0-").unwrap();
    assert_eq!(hostile.hear_out(), []);
    trio.line("speaks TLS, but not as an omirr node does: it greets with \"SSH-2.0-\"");
    trio.goes_on();
}

#[test]
fn another_protocol_is_told_from_hello() {
    let Some(mut trio) = Trio::start("another_protocol_is_told_from_hello") else {
        return;
    };
    let mut hostile = trio.connect();
    let Message::Hello {
        software,
        node,
        share,
        replica,
        head,
        names,
        ..
    } = hello()
    else {
        unreachable!()
    };
    let software = software.replace("0.1.0", "9.0.0");
    hostile.say(&Message::Hello {
        protocol: PROTOCOL + 1,
        software,
        node,
        share,
        replica,
        head,
        names,
    });
    let heard = hostile.hear_out();
    let [Message::Refuse { reason }] = &heard[..] else {
        panic!("{heard:?}")
    };
    assert!(
        reason.starts_with("mallory (127.0.0.1:")
            && reason.ends_with(
                ", omirr 9.0.0) speaks omirr protocol 7, this node speaks 6: update the older one"
            ),
        "{reason}"
    );
    let line = trio.line("speaks omirr protocol 7");
    assert!(
        line.contains(&format!("a connection has ended: {reason}")),
        "{line}"
    );
    trio.goes_on();
}

#[test]
fn whoever_begins_wrong_is_refused_with_the_reason() {
    let Some(mut trio) = Trio::start("whoever_begins_wrong_is_refused_with_the_reason") else {
        return;
    };
    let mut hostile = trio.connect();
    hostile.say(&batch(vec![file("x", 1, "x")]));
    assert_eq!(hostile.hear_out(), []);
    trio.line("begins with a message of kind batch, not with hello");

    let Message::Hello {
        protocol,
        software,
        node,
        replica,
        head,
        names,
        ..
    } = hello()
    else {
        unreachable!()
    };
    let mut hostile = trio.connect();
    let share = "secrets".to_owned();
    hostile.say(&Message::Hello {
        protocol,
        software,
        node,
        share,
        replica,
        head,
        names,
    });
    let heard = hostile.hear_out();
    let reason = "there is no share \"secrets\" here, only tree".to_owned();
    assert_eq!(
        heard,
        [Message::Refuse {
            reason: reason.clone()
        }]
    );
    trio.line(&reason);

    // A message that only a receiver sends.
    let mut hostile = trio.welcomed();
    hostile.say(&Message::Ack {
        durable: 1,
        pending: 0,
        reason: None,
        head: 0,
    });
    hostile.hear_out();
    trio.line("mallory sends a message of kind acknowledgement, which is not for this node to receive");
    let mut hostile = trio.welcomed();
    hostile.say(&Message::Content {
        id: 7,
        parts: Vec::new(),
        last: true,
    });
    hostile.hear_out();
    trio.line("mallory sends content that was not asked for");
    assert!(!trio.pair.one.share.join("x").exists());
    trio.goes_on();
}

/// What a stranger gets to read before the connection ends.
fn read_out(mut tcp: TcpStream) -> Vec<u8> {
    tcp.set_read_timeout(Some(SOON)).unwrap();
    let mut heard = Vec::new();
    match tcp.read_to_end(&mut heard) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the node does not hang up: {error}"),
    }
    heard
}

#[test]
fn a_stranger_on_the_port_gets_nothing_and_holds_up_nobody() {
    let Some(mut trio) = Trio::start("a_stranger_on_the_port_gets_nothing_and_holds_up_nobody") else {
        return;
    };
    let dial = || TcpStream::connect(("127.0.0.1", trio.pair.one.port)).unwrap();

    let mut tcp = dial();
    tcp.write_all(b"GET / HTTP/1.1\r\nHost: one\r\n\r\n").unwrap();
    assert_eq!(read_out(tcp), b"", "a stranger gets an answer");
    trio.line("does not speak omirr's protocol: it sent \"GET / HTTP/1.1\"");

    drop(dial());
    trio.line("hung up without a word");

    // The beginning of a TLS record, and then something else.
    let mut tcp = dial();
    tcp.write_all(&[[22, 3, 1, 0, 200].as_slice(), &[0xff; 200]].concat())
        .unwrap();
    read_out(tcp);
    trio.line("does not speak omirr's protocol: it sent something that is not TLS");

    // Somebody with a key of their own, which is nobody's here.
    let stranger = Node::new(trio.pair.base(), "stranger");
    let key_file = stranger.folder.join("node.key");
    let refused = Hostile::connect(trio.pair.one.port, &key_file, &stranger.key, MAGIC);
    let alert = refused.err().expect("a stranger is not let in").to_string();
    assert!(alert.contains("AccessDenied"), "{alert}");
    let line = trio.line(&format!("a stranger with key {}", stranger.key));
    assert!(
        line.contains("was refused: if it is a peer, add the key to the configuration"),
        "{line}"
    );

    // More than are let in at once connect and say nothing. A peer that has to
    // dial anew gets through.
    let dawdlers: Vec<_> = (0..200).map(|_| dial()).collect();
    trio.line("had to give way: more than 16 connections were being set up at once from its address");
    trio.pair.two.stop();
    trio.pair.two.start();
    trio.goes_on();
    drop(dawdlers);
    trio.goes_on();
}

#[test]
fn a_damaged_frame_ends_the_connection_and_nothing_else() {
    let Some(mut trio) = Trio::start("a_damaged_frame_ends_the_connection_and_nothing_else") else {
        return;
    };
    let whole = omirr::wire::encode(&batch(vec![file("damaged", 1, "damaged")]))
        .unwrap()
        .to_vec();
    let flagged = |flags: u8| {
        let mut bytes = whole.clone();
        bytes[4] = flags;
        bytes
    };
    let announced = |length: u32| length.to_le_bytes().to_vec();
    let limit = LIMITS.frame_bytes;
    // Zstd's header of a frame that says it will have 4 GiB.
    let bomb: &[u8] = &[1, 0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0];
    let framed = |body: &[u8]| [&announced(body.len() as u32)[..], body].concat();
    let cases = [
        (
            "longer than any frame",
            announced(u32::MAX),
            format!("a frame of 4294967299 bytes, the limit is {limit}"),
        ),
        (
            "one byte too long",
            announced(limit as u32 - 3),
            format!("a frame of {} bytes, the limit is {limit}", limit + 1),
        ),
        ("empty", announced(0), "a frame without a body".to_owned()),
        (
            "unknown flags",
            flagged(0x42),
            "a frame with unknown flags 0b01000010".to_owned(),
        ),
        (
            "not zstd",
            flagged(1),
            "a frame whose compressed body is damaged: it is not zstd's".to_owned(),
        ),
        (
            "a bomb",
            framed(bomb),
            format!(
                "a message of 4294967296 bytes, the limit is {}",
                LIMITS.body_bytes
            ),
        ),
        (
            "no such message",
            framed(&[0, 200]),
            "a frame that holds no message: something in it is of an unknown kind (number 200)".to_owned(),
        ),
        (
            "cut short",
            framed(&whole[4..whole.len() - 3]),
            "a frame that holds no message: it ends too early".to_owned(),
        ),
        (
            "too much in it",
            framed(&[&whole[4..], b"more"].concat()),
            "a message followed by 4 bytes that do not belong to it".to_owned(),
        ),
    ];
    for (what, bytes, sentence) in cases {
        println!("{what}:");
        let mut hostile = trio.welcomed();
        hostile.say_bytes(&bytes);
        hostile.hear_out();
        let line = trio.line(&format!("sent {sentence}"));
        assert!(
            line.contains("a connection has ended: mallory (127.0.0.1:"),
            "{line}"
        );
        assert_eq!(line.matches(sentence.as_str()).count(), 1, "said twice: {line}");
    }
    // A frame of which the rest never comes, however the connection ends.
    let mut hostile = trio.welcomed();
    hostile.say_bytes(&whole[..whole.len() / 2]);
    hostile.cut();
    trio.says_so_often("was lost: ", 1);
    assert!(!trio.pair.one.share.join("damaged").exists());
    trio.goes_on();
    // Noise of all lengths: whatever it is taken for, the daemon lives.
    let mut state = 1u64;
    for length in 1..60 {
        let mut hostile = trio.welcomed();
        let noise: Vec<u8> = (0..length * 7)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        hostile.say_bytes(&framed(&[&[0, 3], &noise[..]].concat()));
        hostile.hear_out();
    }
    trio.goes_on();
}

/// Names and contents of everything in a folder, at any depth, as lines.
fn listing(folder: &std::path::Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if kind.is_dir() {
                folders.push(path.clone());
            }
            let content = if kind.is_file() {
                fs::read_to_string(&path).unwrap()
            } else {
                String::new()
            };
            lines.push(format!("{}: {content}", path.display()));
        }
    }
    lines.sort();
    lines
}

/// A folder beside the shares, which no row may reach.
fn outside(trio: &Trio) -> PathBuf {
    let folder = trio.pair.one.folder.join("outside");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("precious"), "precious").unwrap();
    folder
}

#[test]
fn a_name_that_leads_out_of_the_share_is_refused() {
    let Some(mut trio) = Trio::start("a_name_that_leads_out_of_the_share_is_refused") else {
        return;
    };
    let cases: [(&[u8], &str); 10] = [
        (b"../escaped", "it has '.' or '..' in it"),
        (b"..", "it has '.' or '..' in it"),
        (b"a/../../escaped", "it has '.' or '..' in it"),
        (b"./escaped", "it has '.' or '..' in it"),
        (b"/etc/omirr-escaped", "it is absolute"),
        (b"//escaped", "it is absolute"),
        (b"a//escaped", "it has an empty name in it"),
        (b"escaped/", "it has an empty name in it"),
        (b"escaped\0.txt", "it has a NUL byte in it"),
        (b"\0", "it has a NUL byte in it"),
    ];
    for (times, (path, sentence)) in cases.into_iter().enumerate() {
        println!("{}:", path.escape_ascii());
        let legal = "Q".repeat(path.len());
        let right = batch(vec![
            file("in-the-same-batch", 1, "x"),
            file(&legal, 2, "escaped"),
        ]);
        let mut hostile = trio.welcomed();
        hostile.say_bytes(&patched(&right, legal.as_bytes(), path));
        hostile.hear_out();
        trio.says_so_often("is not a path beneath the share: ", times + 1);
        let log = trio.pair.one.log_text();
        let line = log
            .lines()
            .rfind(|line| line.contains("is not a path beneath the share"))
            .unwrap();
        println!("{line}");
        assert!(line.contains(sentence), "{line}");
        assert!(
            line.contains("a connection has ended: mallory (127.0.0.1:"),
            "{line}"
        );
    }
    // The place where a file was before is a path, too.
    let mut moved = file("moved", 1, "moved");
    moved.moved_from = Some(omirr::model::RelPath::new(b"QQQQQQQQQQQQ").unwrap());
    let mut hostile = trio.welcomed();
    hostile.say_bytes(&patched(&batch(vec![moved]), b"QQQQQQQQQQQQ", b"/etc/passwd\0"));
    hostile.hear_out();
    trio.says_so_often("is not a path beneath the share: ", cases.len() + 1);
    for name in ["in-the-same-batch", "moved", "escaped", "a"] {
        assert!(!trio.pair.one.share.join(name).exists(), "{name}");
    }
    assert!(!trio.pair.one.folder.join("escaped").exists());
    assert!(!std::path::Path::new("/etc/omirr-escaped").exists());
    // Nor are such paths written down: a right batch afterwards is taken.
    let mut hostile = trio.welcomed();
    hostile.say(&batch(vec![
        directory("legal", 1),
        file("legal/file", 2, "legal"),
    ]));
    trio.pair.two.wait_for_file("legal/file", "legal", SOON);
    trio.goes_on();
}

#[test]
fn names_that_would_become_file_names_have_no_slash_in_them() {
    let Some(mut trio) = Trio::start("names_that_would_become_file_names_have_no_slash_in_them") else {
        return;
    };
    // A node's name becomes part of a conflict copy's; and no peer may name
    // what the daemon takes for its own unfinished work.
    let Message::Hello {
        protocol,
        software,
        node,
        share,
        replica,
        head,
        ..
    } = hello()
    else {
        unreachable!()
    };
    let names = vec![(replica, "../../escaped".to_owned())];
    let mut hostile = trio.connect();
    hostile.say(&Message::Hello {
        protocol,
        software,
        node,
        share,
        replica,
        head,
        names,
    });
    assert_eq!(hostile.hear_out(), []);
    trio.line("a hello that cannot be: a node's name \"../../escaped\" has '/' or a control character in it");
    let mut hostile = trio.connect();
    let slashed = patched(&hello(), b"\x07mallory\x04tree", b"\x07mal/ory\x04tree");
    hostile.say_bytes(&slashed);
    assert_eq!(hostile.hear_out(), []);
    trio.line("the node's name \"mal/ory\" has '/' or a control character in it");
    let mut hostile = trio.welcomed();
    hostile.say(&batch(vec![file(".omirr-tmp-0123", 1, "x")]));
    hostile.hear_out();
    trio.line("a batch with an impossible row for .omirr-tmp-0123");
    trio.goes_on();
}

#[test]
fn who_made_a_row_is_believed_but_must_fit_on_a_terminal() {
    let Some(mut trio) = Trio::start("who_made_a_row_is_believed_but_must_fit_on_a_terminal") else {
        return;
    };
    let made_by = |name: &str, command: &str| {
        let mut row = file(name, 1, "x");
        row.row.origin = Some(Arc::new(Origin {
            pid: u32::MAX,
            uid: Some(u32::MAX),
            command: command.into(),
            cgroup: "/a".into(),
        }));
        row
    };
    for (command, why) in [
        (
            "17-bytes-too-long",
            "the command that is said to have changed it has 17 bytes, the limit is 16",
        ),
        ("a\u{1b}[2J", "has a control character in it"),
    ] {
        let mut hostile = trio.welcomed();
        hostile.say(&batch(vec![made_by("made", command)]));
        hostile.hear_out();
        let line = trio.line(why);
        assert!(line.contains("a batch with an impossible row for made"), "{line}");
        assert!(!trio.pair.one.share.join("made").exists());
    }
    let mut hostile = trio.welcomed();
    hostile.say(&batch(vec![made_by("made", "sixteen-bytes-ok")]));
    trio.pair.one.wait_for_file("made", "x", SOON);
    let (path, config) = (trio.pair.one.share.join("made"), trio.pair.one.config());
    let text = |path: &Path| path.to_str().expect("test paths are UTF-8").to_owned();
    let out = omirr(&["log", &text(&path), "-c", &text(&config)]);
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(
        said.contains("on node mallory\n")
            && said.contains("by       sixteen-bytes-ok, pid 4294967295, user 4294967295, in /a\n"),
        "{said}"
    );
    drop(hostile);
    fs::remove_file(path).unwrap();
    trio.goes_on();
}

#[test]
fn rows_beneath_a_symlink_do_not_follow_it() {
    let Some(mut trio) = Trio::start("rows_beneath_a_symlink_do_not_follow_it") else {
        return;
    };
    let outside = outside(&trio);
    let before = listing(&outside);
    make_symlink(&outside, trio.pair.one.share.join("link")).unwrap();
    // Known to both, so that it is in one's index.
    let there = trio.pair.two.share.join("link");
    let deadline = Instant::now() + SOON;
    while !there.is_symlink() {
        assert!(Instant::now() < deadline, "{}", trio.pair.two.log_tail());
        std::thread::sleep(Duration::from_millis(5));
    }

    let mut hostile = trio.welcomed();
    let mut gone = file("link/precious", 3, "");
    gone.row.deleted = true;
    gone.inline = None;
    hostile.say(&batch(vec![
        file("link/escaped", 1, "escaped"),
        directory("link/dir", 2),
        gone,
        symlink("link/to", 4, "/etc"),
        file("beside", 5, "beside"),
    ]));
    trio.line("conflict: 'link' was changed here, too; that version is kept as 'link.omirr-conflict-");
    // Everywhere the symlink gives way to a directory of that name and keeps
    // its target under another: what was sent is beneath the share, all of it.
    for node in [&trio.pair.one, &trio.pair.two] {
        node.wait_for_file("beside", "beside", SOON);
        node.wait_for_file("link/escaped", "escaped", SOON);
        let link = fs::symlink_metadata(node.share.join("link")).unwrap();
        assert!(link.is_dir(), "{link:?}");
        let kept: Vec<_> = fs::read_dir(&node.share)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| {
                entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with("link.omirr-conflict-")
            })
            .collect();
        let [kept] = &kept[..] else { panic!("{kept:?}") };
        assert_eq!(fs::read_link(kept.path()).unwrap(), outside);
    }
    assert_eq!(listing(&outside), before);
    trio.goes_on();
    assert_eq!(listing(&outside), before);
}

#[test]
fn a_directory_that_becomes_a_symlink_while_rows_arrive_is_not_followed() {
    let Some(mut trio) = Trio::start("a_directory_that_becomes_a_symlink_while_rows_arrive_is_not_followed")
    else {
        return;
    };
    let outside = outside(&trio);
    let before = listing(&outside);
    let share = trio.pair.one.share.clone();
    let mut hostile = trio.welcomed();
    hostile.say(&batch(vec![
        directory("dir", 1),
        file("dir/precious", 2, "mirrored"),
    ]));
    trio.pair.two.wait_for_file("dir/precious", "mirrored", SOON);
    // Directory and symlink change places all the time, while rows for what is
    // in the directory keep coming.
    make_symlink(&outside, share.join("swap")).unwrap();
    let end = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        let swapping = scope.spawn(|| {
            let (dir, swap) = (share.join("dir"), share.join("swap"));
            let mut times = 0u32;
            while Instant::now() < end {
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                // The daemon may have either name in its hands at this moment.
                let swapped =
                    rustix::fs::renameat_with(rustix::fs::CWD, &dir, rustix::fs::CWD, &swap, exchange);
                times += u32::from(swapped.is_ok());
                std::thread::sleep(Duration::from_micros(300));
            }
            times
        });
        let mut seq = 10;
        while Instant::now() < end {
            let rows = vec![
                file(&format!("dir/{seq}"), seq, "escaped"),
                file("dir/precious", seq + 1, &format!("{seq}")),
            ];
            hostile.say(&batch(rows));
            seq += 2;
            std::thread::sleep(Duration::from_millis(10));
        }
        let times = swapping.join().unwrap();
        println!("changed places {times} times, {seq} rows");
        assert!(times > 100, "only {times} times");
        hostile.say(&batch(vec![file("last", seq, "last")]));
    });
    trio.pair.two.wait_for_file("last", "last", SOON);
    assert_eq!(listing(&outside), before);
    drop(hostile);
    trio.goes_on();
    assert_eq!(listing(&outside), before);
}

/// What a peer that is dialled may ask for: takes connections with mallory's
/// key, as one expects, and answers the hello, which the test gets, with what
/// the test says.
fn as_receiver(
    trio: &Trio,
    times: usize,
    mut session: impl AsyncFnMut(usize, Message, &mut omirr::net::Reader, &mut omirr::net::Writer),
) {
    let identity = omirr::net::Identity::load(&trio.mallory.folder.join("node.key")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let all = async {
        let listener = omirr::net::Listener::bind(&[format!("127.0.0.1:{}", trio.mallory.port)])
            .await
            .unwrap();
        for time in 0..times {
            let incoming = listener.accept().await.unwrap();
            let known: omirr::net::Known = std::sync::Arc::new(|_| true);
            let (connection, _) = omirr::net::accept(incoming, &identity, known, SOON)
                .await
                .unwrap();
            let (mut reader, mut writer) = connection.split();
            let hello = reader.recv().await.unwrap();
            assert!(matches!(hello, Message::Hello { .. }), "{hello:?}");
            session(time, hello, &mut reader, &mut writer).await;
        }
    };
    runtime
        .block_on(async { tokio::time::timeout(SOON, all).await })
        .expect("one dials mallory again and again");
}

fn welcome() -> Message {
    welcome_from(0)
}

/// A welcome of a peer that says to have the rows up to `cursor`.
fn welcome_from(cursor: u64) -> Message {
    Message::Welcome {
        protocol: PROTOCOL,
        software: "omirr 0.1.0".to_owned(),
        node: "mallory".to_owned(),
        replica: hostile::REPLICA,
        cursor,
        bare: false,
        names: Vec::new(),
        head: 0,
    }
}

#[test]
fn a_peer_that_claims_rows_it_cannot_have_makes_the_index_new_once() {
    let Some(mut trio) = Trio::start("a_peer_that_claims_rows_it_cannot_have_makes_the_index_new_once")
    else {
        return;
    };
    let mut hellos = Vec::new();
    as_receiver(&trio, 4, async |_, hello, reader, writer| {
        let Message::Hello { replica, names, .. } = hello else {
            unreachable!()
        };
        hellos.push((replica, names.len()));
        writer.send(&welcome_from(1 << 40)).await.unwrap();
        // Until it hangs up.
        while reader.recv().await.is_ok() {}
    });
    println!("{hellos:?}");
    let (first, names) = hellos[0];
    let (second, _) = hellos[3];
    assert_ne!(first, second, "an index may indeed be restored from a copy");
    hellos.dedup();
    assert_eq!(hellos, [(first, names), (second, names + 1)]);
    trio.line("mallory has rows up to 1099511627776 of this node's index");
    trio.line(
        "mallory claims rows up to 1099511627776 of an index that this node has begun since it started",
    );
    trio.goes_on();
}

#[test]
fn a_peer_cannot_ask_for_what_is_outside_the_share() {
    let Some(mut trio) = Trio::start("a_peer_cannot_ask_for_what_is_outside_the_share") else {
        return;
    };
    let outside = outside(&trio);
    let share = trio.pair.one.share.clone();
    make_symlink(&outside, share.join("link")).unwrap();
    make_symlink(outside.join("precious"), share.join("to-precious")).unwrap();
    fs::write(share.join("in-the-share"), "precious").unwrap();
    let content = b"precious";
    let hash = omirr::model::Hash(*blake3::hash(content).as_bytes());
    let mut answers = Vec::new();
    as_receiver(&trio, 1, async |_, _, reader, writer| {
        writer.send(&welcome()).await.unwrap();
        for (id, path) in ["link/precious", "to-precious", "not-there", "in-the-share"]
            .into_iter()
            .enumerate()
        {
            let path = omirr::model::RelPath::new(path.as_bytes()).unwrap();
            let want = Message::Want {
                id: id as u64,
                path,
                size: content.len() as u64,
                hash,
                have: Vec::new(),
            };
            writer.send(&want).await.unwrap();
        }
        while answers.len() < 4 {
            match reader.recv().await.unwrap() {
                answer @ (Message::Gone { .. } | Message::Content { .. }) => answers.push(answer),
                Message::Batch { .. } | Message::Ping => {}
                other => panic!("{other:?}"),
            }
        }
    });
    for answer in answers {
        println!("{answer:?}");
        match answer {
            Message::Gone { id: 0..=2, .. } => {}
            Message::Content {
                id: 3, last: true, ..
            } => {}
            other => panic!("{other:?}"),
        }
    }
    trio.goes_on();
}

#[test]
fn a_peer_that_answers_wrong_is_named_and_tried_again() {
    let Some(mut trio) = Trio::start("a_peer_that_answers_wrong_is_named_and_tried_again") else {
        return;
    };
    as_receiver(&trio, 4, async |time, _, reader, writer| {
        match time {
            0 => {
                let reason = "mallory is not in the mood\x1b[2J".to_owned();
                writer.send(&Message::Refuse { reason }).await.unwrap();
            }
            1 => {
                let Message::Welcome {
                    software,
                    node,
                    replica,
                    cursor,
                    bare,
                    names,
                    head,
                    ..
                } = welcome()
                else {
                    unreachable!()
                };
                let newer = Message::Welcome {
                    protocol: PROTOCOL + 1,
                    software,
                    node,
                    replica,
                    cursor,
                    bare,
                    names,
                    head,
                };
                writer.send(&newer).await.unwrap();
            }
            2 => {
                writer.send(&welcome()).await.unwrap();
                writer
                    .send(&Message::Ack {
                        durable: 1 << 61,
                        pending: 0,
                        reason: None,
                        head: 0,
                    })
                    .await
                    .unwrap();
            }
            _ => {
                writer.send(&welcome()).await.unwrap();
                writer
                    .send(&batch(vec![file("pushed", 1, "pushed")]))
                    .await
                    .unwrap();
            }
        }
        // Until it hangs up.
        while reader.recv().await.is_ok() {}
    });
    trio.line("cannot send: mallory refuses: mallory is not in the mood [2J; trying again");
    trio.line("cannot send: mallory speaks omirr protocol 7, this node speaks 6: update the older one; trying again");
    trio.line(
        "cannot send: mallory acknowledges row 2305843009213693952, which it was never sent; trying again",
    );
    trio.line("cannot send: mallory sends a message of kind batch, which is not for this node to receive; trying again");
    assert!(!trio.pair.one.share.join("pushed").exists());
    trio.goes_on();
}
