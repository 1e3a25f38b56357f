//! A daemon dies after each single write that it can make (`omirr::crash` has
//! the list) and is started again: both trees become the same, no file is torn,
//! no temporary name stays, what was acknowledged is there, the index fits the
//! tree, and nothing that a peer did passes for a change of this node's users.
//!
//! A point that is never reached fails the test. `OMIRR_CRASH_POINT` tries one
//! point alone, `OMIRR_CRASH_NTH` another occurrence than the first.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, UNIX_EPOCH};

use omirr::crash::Point;
use omirr::index::Index;
use omirr::model::RelPath;
use omirr_tests::nodes::{Node, Pair, may_mirror};
use omirr_tests::treewalk::{self, Tree, What};
use rustix::fs::{Mode, XattrFlags, mknodat, removexattr, setxattr};

const SOON: Duration = Duration::from_secs(120);

/// When a point is passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// By `omirr key generate`.
    Key,
    /// When a daemon starts that has no state yet.
    New,
    /// When a daemon starts after another was killed.
    Start,
    /// When a peer's users and its own change this and that.
    Work,
    /// At the start after a death at that other point.
    After(Point),
    /// Only where the source goes on without the daemon, which is eBPF.
    WithEbpf,
    /// Only where a step of a plan failed, or where names of one inode were
    /// found to be several after a crash: that hangs on timing.
    ByChance,
}

fn when(point: Point) -> When {
    match point {
        Point::KeyWritten => When::Key,
        Point::StateDirMade
        | Point::IndexMade
        | Point::IndexTables
        | Point::PeersNoted
        | Point::RootNoted
        | Point::Compared
        | Point::NamesNoted => When::New,
        Point::LockTaken | Point::IndexOpened | Point::SocketRemoved | Point::SocketBound => When::Start,
        Point::LeftoverRemoved => When::After(Point::Exchanged),
        Point::RecoveryCompleted => When::After(Point::OwnerSet),
        Point::RecoveryTakenBack => When::After(Point::SecondName),
        Point::RecoveryTimesSet => When::After(Point::FileRemoved),
        Point::RecoveryPatched => When::After(Point::PatchWritten),
        Point::JournalWritten | Point::RecoveryNoted | Point::RecoverySynced | Point::RecoveryDurable => {
            When::After(Point::Executed)
        }
        Point::JournalEmptied => When::WithEbpf,
        Point::TidiedUp => When::ByChance,
        _ => When::Work,
    }
}

/// What users do to a point's folder, and what it is called.
type Round = (&'static str, fn(&Path));

/// The changes of one point's folder, in rounds: each is there before the next
/// begins, if the daemon lives.
const ROUNDS: [Round; 10] = [
    ("attributes", |d| {
        let file = d.join("attributes");
        std::os::unix::fs::chown(&file, Some(1234), Some(4321)).unwrap();
        removexattr(&file, c"user.old").unwrap();
        setxattr(&file, c"user.new", b"new", XattrFlags::empty()).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o751)).unwrap();
        let when = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let times = fs::FileTimes::new().set_modified(when);
        File::open(&file).unwrap().set_times(times).unwrap();
    }),
    ("a folder deleted", |d| {
        fs::remove_dir_all(d.join("deleted-folder")).unwrap()
    }),
    ("files new and changed", |d| {
        write(d, "new", "new");
        write(d, "replaced", "replaced, the second");
        let big = File::options().write(true).open(d.join("big")).unwrap();
        big.write_all_at(b"changed in the middle", 200_000).unwrap();
        let sparse = File::create(d.join("sparse")).unwrap();
        sparse.write_all_at(b"begins", 0).unwrap();
        sparse.set_len(3 << 20).unwrap();
    }),
    ("a large file changed", |d| {
        if let Ok(large) = File::options().write(true).open(d.join(LARGE)) {
            large
                .write_all_at(&noise(d, 2, (3 << 19) + 5000), 7 << 19)
                .unwrap();
        }
    }),
    ("other kinds", |d| {
        fs::create_dir_all(d.join("folder/in/folder")).unwrap();
        write(d, "folder/in/file", "deep");
        symlink("nowhere", d.join("symlink")).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        mknodat(rustix::fs::CWD, d.join("fifo"), fifo, Mode::RUSR, 0).unwrap();
    }),
    ("hard links", |d| {
        fs::hard_link(d.join("linked"), d.join("linked-third")).unwrap();
        fs::hard_link(d.join("linked"), d.join("for-over")).unwrap();
        fs::rename(d.join("for-over"), d.join("linked-over")).unwrap();
    }),
    ("a file with two names changed", |d| {
        let file = File::options().write(true).open(d.join("linked")).unwrap();
        file.write_all_at(b"LINKED", 0).unwrap();
    }),
    ("renames", |d| {
        fs::rename(d.join("to-rename"), d.join("renamed")).unwrap();
        fs::rename(d.join("folder-to-rename"), d.join("folder-renamed")).unwrap();
        fs::rename(d.join("to-rename-over"), d.join("renamed-over")).unwrap();
    }),
    ("kinds exchanged", |d| {
        fs::remove_file(d.join("file-then-folder")).unwrap();
        fs::create_dir(d.join("file-then-folder")).unwrap();
        write(d, "file-then-folder/in", "in");
        fs::remove_dir_all(d.join("folder-then-file")).unwrap();
        write(d, "folder-then-file", "a file now");
    }),
    ("a file deleted", |d| fs::remove_file(d.join("deleted")).unwrap()),
];

/// A file that is written over rather than anew, in the folders of the points
/// that have to do with it.
const LARGE: &str = "large";

fn is_of_large(point: Point) -> bool {
    let name = point.name();
    name.starts_with("redo-") || name.starts_with("patch-") || point == Point::RecoveryPatched
}

/// Bytes that no other folder has: what is elsewhere is copied from there.
fn noise(d: &Path, seed: u64, bytes: usize) -> Vec<u8> {
    let name = d.file_name().expect("a point has a name").as_encoded_bytes();
    let mut state = name
        .iter()
        .fold(seed, |state, byte| state.wrapping_mul(31) + u64::from(*byte));
    let step = |_| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..bytes).map(step).collect()
}

fn write(d: &Path, name: &str, text: &str) {
    fs::write(
        d.join(name),
        format!(
            "{text} in {}\n",
            d.file_name().expect("a point has a name").display()
        ),
    )
    .unwrap();
}

/// What is there before a point is tried.
fn begin(d: &Path) {
    for folder in [
        "deleted-folder/in",
        "folder-to-rename/in",
        "folder-then-file",
        "apart",
    ] {
        fs::create_dir_all(d.join(folder)).unwrap();
    }
    for name in [
        "attributes",
        "deleted-folder/file",
        "deleted-folder/in/file",
        "replaced",
        "linked",
        "linked-over",
        "to-rename",
        "folder-to-rename/in/file",
        "to-rename-over",
        "renamed-over",
        "file-then-folder",
        "folder-then-file/in",
        "deleted",
        "kept",
        "of-both",
        "of-two",
        "apart/first",
    ] {
        write(d, name, name);
    }
    fs::hard_link(d.join("linked"), d.join("linked-second")).unwrap();
    fs::hard_link(d.join("apart/first"), d.join("apart/second")).unwrap();
    setxattr(d.join("attributes"), c"user.old", b"old", XattrFlags::empty()).unwrap();
    let mut big = Vec::new();
    for nth in 0_u32..100_000 {
        big.extend_from_slice(&nth.to_le_bytes());
    }
    fs::write(d.join("big"), big).unwrap();
}

/// What the dying node's own users change while it is down, at names where that
/// is known: rows of its own are for these alone.
fn own_changes(d: &Path) {
    let overwrite = |name: &str| {
        let file = File::options().write(true).open(d.join(name)).unwrap();
        file.write_all_at(b"two", 0).unwrap();
    };
    overwrite("of-both");
    overwrite("of-two");
    // Two names of one inode become two inodes.
    write(d, "apart/anew", "apart/first");
    fs::rename(d.join("apart/anew"), d.join("apart/second")).unwrap();
}

/// What users of the other node do at the same time, a little later by the
/// filesystem's clock: neither knows of the other's.
fn others_changes(d: &Path, theirs: &Path) {
    let theirs = changed_ms(&theirs.join("of-both"));
    let file = File::options().write(true).open(d.join("of-both")).unwrap();
    let deadline = Instant::now() + SOON;
    loop {
        file.write_all_at(b"one", 0).unwrap();
        if changed_ms(&d.join("of-both")) > theirs {
            break;
        }
        assert!(Instant::now() < deadline, "the filesystem's clock stands still");
    }
    fs::set_permissions(d.join("apart/first"), fs::Permissions::from_mode(0o640)).unwrap();
}

fn changed_ms(path: &Path) -> i64 {
    let meta = fs::symlink_metadata(path).unwrap();
    meta.ctime() * 1000 + meta.ctime_nsec() / 1_000_000
}

/// Names at which node two may have rows of its own.
const OWN: [&str; 5] = ["of-both", "of-two", "apart", "first", "second"];

fn dies_at(node: &mut Node, point: Point, nth: u64) {
    let at = format!("{}:{nth}", point.name());
    node.launcher = Some(Box::new(move |binary| {
        let mut command = Command::new(binary);
        command.env("OMIRR_CRASH_AT", &at);
        command
    }));
}

/// Whether the node dies before `done`.
fn dies_before(node: &mut Node, what: &str, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + SOON;
    loop {
        if node.has_died() {
            return true;
        }
        if done() {
            return false;
        }
        assert!(
            Instant::now() < deadline,
            "{what}: neither done nor dead\n{}\n{}",
            node.status_text(),
            node.log_tail()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

struct Trial {
    pair: Pair,
    /// Every content that a file may have.
    contents: HashSet<[u8; 32]>,
    /// At which passing of its point a daemon dies.
    nth: u64,
}

impl Trial {
    fn folders(&self, point: Point) -> [PathBuf; 2] {
        [&self.pair.one, &self.pair.two].map(|node| node.share.join(point.name()))
    }

    fn remember(&mut self, folder: &Path) {
        for node in walk(folder).values() {
            if let What::File { blake3, .. } = node.what {
                self.contents.insert(blake3);
            }
        }
    }

    /// What must hold at any moment, daemon or not; but that a file which is
    /// written over is `torn` while it is dead.
    fn assert_whole(&self, point: Point, torn: Option<&str>) {
        let [_, there] = self.folders(point);
        for (path, node) in walk(&there) {
            if let What::File { blake3, .. } = node.what {
                let temporary = path.to_string_lossy().contains(".omirr-tmp-");
                assert!(
                    temporary || torn == path.to_str() || self.contents.contains(&blake3),
                    "after a death at {}, {} is torn",
                    point.name(),
                    path.display()
                );
            }
        }
        let kept = fs::read_to_string(there.join("kept")).unwrap_or_default();
        assert!(kept.starts_with("kept in "), "'kept' was acknowledged: {kept:?}");
    }

    /// Node two is down. Lets it die at the points, one after the other, then
    /// live, and compares.
    fn try_points(&mut self, points: &[Point]) {
        let (&first, then) = points.split_first().expect("there is one at least");
        let name = points.last().expect("there is one at least").name();
        let of = points[points.len() - 1];
        let own_before = self.own_rows(of);
        let [here, there] = self.folders(of);
        own_changes(&there);
        others_changes(&here, &there);
        self.remember(&here);
        self.remember(&there);
        dies_at(&mut self.pair.two, first, self.nth);
        self.pair.two.start();
        let mut rounds = ROUNDS.iter();
        let mut died = false;
        let mut during = "the start";
        for (what, round) in rounds.by_ref() {
            // What was before has arrived, or will never.
            let one = &self.pair.one;
            died = dies_before(&mut self.pair.two, during, || one.wait("100ms").status.success());
            if died {
                round(&here);
                break;
            }
            during = what;
            round(&here);
        }
        if !died {
            let (one, two) = (&self.pair.one, &mut self.pair.two);
            // Acknowledged, and still alive: its own side too, and a moment of rest.
            died = dies_before(two, during, || one.wait("100ms").status.success()) || {
                let config = two.config();
                dies_before(two, "its own changes", || {
                    omirr_tests::nodes::omirr(&[
                        "wait",
                        "-c",
                        config.to_str().expect("test paths are UTF-8"),
                        "--timeout",
                        "100ms",
                    ])
                    .status
                    .success()
                })
            };
        }
        assert!(
            died,
            "the point {} is never reached, or no more than {} times\n{}",
            first.name(),
            self.nth - 1,
            self.pair.two.log_tail()
        );
        println!("{name}: died during {during}");
        self.remember(&here);
        self.assert_whole(of, Some(LARGE));
        for &next in then {
            dies_at(&mut self.pair.two, next, 1);
            self.pair.two.start();
            let one = &self.pair.one;
            let mut reached = dies_before(&mut self.pair.two, "the start after", || {
                one.wait("100ms").status.success()
            });
            let deadline = Instant::now() + Duration::from_secs(5);
            while !reached && Instant::now() < deadline {
                reached = self.pair.two.has_died();
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(
                reached,
                "the point {} is not reached after a death at {}\n{}",
                next.name(),
                first.name(),
                self.pair.two.log_tail()
            );
            self.assert_whole(of, Some(LARGE));
        }
        self.pair.two.launcher = None;
        self.pair.two.start();
        for (_, round) in rounds {
            round(&here);
        }
        self.remember(&here);
        let meant = walk(&here);
        self.pair.settle_equal(SOON);
        self.assert_whole(of, None);
        assert_as_meant(of, &meant, &walk(&here));
        self.pair.two.stop();
        self.assert_index_fits(of, &own_before);
    }

    /// Node two is down. Its index has what its tree has, nothing is under way,
    /// and what it made itself since is what its users did.
    fn assert_index_fits(&self, point: Point, own_before: &BTreeSet<(String, String)>) {
        let tree = walk(&self.pair.two.share);
        for path in tree.keys() {
            let temporary = path.to_string_lossy().contains(".omirr-tmp-");
            assert!(!temporary, "{} stays", path.display());
        }
        let index = Index::open(&self.index_file(), "two").expect("the index can be opened");
        let reader = index.read().expect("the index can be read");
        assert!(reader.intents().expect("intents can be read").is_empty());
        let meta = index.meta();
        let rows = reader.rows_after(0, usize::MAX).expect("rows can be read");
        assert_eq!(rows.len() as u64, meta.live + meta.tombstones);
        assert_eq!(meta.live, tree.len() as u64, "live rows and paths of the tree");
        drop(reader);
        drop(index);
        let new: Vec<String> = (self.own_rows(point).difference(own_before))
            .map(|(name, _)| name.clone())
            .filter(|name| !name.contains(".omirr-conflict-") && !OWN.contains(&&**name))
            .collect();
        assert!(
            new.is_empty(),
            "after a death at {}, these pass for changes of node two: {new:?}",
            point.name()
        );
    }

    /// Node two is down. The rows in a point's folder that it made itself: names
    /// and stamps.
    fn own_rows(&self, point: Point) -> BTreeSet<(String, String)> {
        let index = Index::open(&self.index_file(), "two").expect("the index can be opened");
        let replica = index.replica();
        let folder = RelPath::new(point.name().as_bytes()).expect("names of points are names");
        let reader = index.read().expect("the index can be read");
        let itself = reader
            .get(&folder)
            .expect("a row can be read")
            .map(|record| Ok((folder.clone(), record)));
        itself
            .into_iter()
            .chain(reader.beneath(&folder).expect("rows can be read"))
            .map(|pair| pair.expect("a row can be read"))
            .filter(|(_, record)| record.row.version.stamp.replica == replica)
            .map(|(path, record)| (path.to_string(), format!("{:?}", record.row.version.stamp)))
            .map(|(path, stamp)| (path.rsplit('/').next().unwrap_or_default().to_owned(), stamp))
            .collect()
    }

    fn index_file(&self) -> PathBuf {
        self.pair.two.state_dir().join("shares/tree/index.redb")
    }
}

/// Nothing that node one's users did is undone by the other's death.
fn assert_as_meant(point: Point, meant: &Tree, is: &Tree) {
    let others = |path: &Path| {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        OWN.contains(&&*name) || name.contains(".omirr-conflict-")
    };
    let only = |tree: &Tree| -> Tree {
        let ours = tree.iter().filter(|(path, _)| !others(path));
        ours.map(|(path, node)| (path.clone(), node.clone())).collect()
    };
    let mut differences = treewalk::diff(&only(meant), &only(is));
    // Conflict copies come and go in the folder.
    differences.retain(|difference| !difference.starts_with("the root: mtime"));
    assert!(
        differences.is_empty(),
        "after a death at {}, what the users meant and what is there differ:\n{}",
        point.name(),
        differences.join("\n")
    );
}

fn walk(folder: &Path) -> Tree {
    treewalk::walk(folder).expect("a folder can be walked")
}

#[test]
fn a_daemon_may_die_after_any_write() {
    if !may_mirror(module_path!()) {
        return;
    }
    let only = std::env::var("OMIRR_CRASH_POINT").ok();
    let nth = std::env::var("OMIRR_CRASH_NTH").map_or(1, |text| text.parse().expect("a number"));
    let points: Vec<Point> = Point::ALL
        .iter()
        .copied()
        .filter(|point| only.as_ref().is_none_or(|only| only == point.name()))
        .collect();
    assert!(!points.is_empty(), "there is no point {only:?}");
    let mut pair = Pair::new();
    pair.start();
    pair.settle(SOON);
    for point in &points {
        let folder = pair.one.share.join(point.name());
        fs::create_dir(&folder).unwrap();
        begin(&folder);
        if is_of_large(*point) {
            fs::write(folder.join(LARGE), noise(&folder, 1, (5 << 20) + 10)).unwrap();
        }
    }
    pair.settle_equal(SOON);
    pair.two.stop();
    let mut trial = Trial {
        pair,
        contents: HashSet::new(),
        nth,
    };
    for &point in &points {
        match when(point) {
            When::Work => trial.try_points(&[point]),
            When::After(first) => trial.try_points(&[first, point]),
            When::Start => starts_again(&mut trial, point),
            When::New => starts_anew(&mut trial, point),
            When::Key => generates(trial.pair.base(), point),
            left @ (When::WithEbpf | When::ByChance) => println!("{}: not tried, {left:?}", point.name()),
        }
    }
}

/// Node two is down. It dies at the point while it starts, and the next start
/// goes well.
fn starts_again(trial: &mut Trial, point: Point) {
    let own_before = trial.own_rows(point);
    let two = &mut trial.pair.two;
    // What a killed one leaves is in the way of the next.
    two.launcher = None;
    two.start();
    trial.pair.settle(SOON);
    let two = &mut trial.pair.two;
    two.kill();
    dies_at(two, point, 1);
    two.start();
    let died = dies_before(two, "the start", || false);
    assert!(died);
    println!("{}: died during the start", point.name());
    two.launcher = None;
    two.start();
    trial.pair.settle_equal(SOON);
    trial.pair.two.stop();
    trial.assert_index_fits(point, &own_before);
}

/// Node two is down. It loses its state, dies at the point, and the next start
/// finds that all is there.
fn starts_anew(trial: &mut Trial, point: Point) {
    fs::remove_dir_all(trial.pair.two.state_dir()).unwrap();
    let before = walk(&trial.pair.two.share);
    let two = &mut trial.pair.two;
    dies_at(two, point, 1);
    two.start();
    assert!(dies_before(two, "the start", || false));
    println!("{}: died during the first start", point.name());
    two.launcher = None;
    two.start();
    trial.pair.settle_equal(SOON);
    trial.pair.two.stop();
    let mut differences = treewalk::diff(&before, &walk(&trial.pair.two.share));
    // A node without its index names hard-link groups anew, which may split those
    // whose names its peers have got at different times: docs/INDEX.md, "Gone".
    differences.retain(|line| !line.contains("hard link to"));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// A key is there whole, or not at all, and then can be made.
fn generates(base: &Path, point: Point) {
    let file = base.join("new.key");
    let key = |at: Option<&str>| {
        let mut command = Command::new(omirr_tests::binary());
        command.args(["key", "generate"]).arg(&file);
        command.envs(at.map(|at| ("OMIRR_CRASH_AT", at)));
        command.output().expect("omirr can be started")
    };
    let died = key(Some(point.name()));
    assert!(
        !died.status.success(),
        "the point {} is never reached",
        point.name()
    );
    assert!(!file.exists(), "half a key is in the way");
    let made = key(None);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    println!("{}: died", point.name());
}
