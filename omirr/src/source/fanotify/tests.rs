//! The source against the running kernel, on the filesystems of the target
//! folder and of `/dev/shm`. Where fanotify is not permitted, that is printed
//! and nothing is tested.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::source::{Dirent, Event, Op};

const LEAN: Filter = Filter {
    own_pid: None,
    detail: Detail::Lean,
};
const FULL: Filter = Filter {
    own_pid: None,
    detail: Detail::Full,
};
const TIMEOUT: Duration = Duration::from_secs(20);

struct Running {
    source: FanotifySource,
    /// How often the reader has come to its sink.
    waiting: Arc<AtomicU64>,
    events: Receiver<Vec<Signal>>,
}

impl Running {
    /// Everything that happened until now.
    fn events(&self) -> Vec<Event> {
        self.source.barrier(TIMEOUT).expect("a barrier");
        let signals = self.events.try_iter().flatten();
        signals
            .map(|signal| match signal {
                Signal::Event(event) => event,
                Signal::Recovered(_) => unreachable!("fanotify keeps nothing"),
                Signal::Lost { .. } | Signal::Doubt | Signal::Compare => panic!("events were lost"),
            })
            .collect()
    }
}

fn watch(path: &Path) -> Watch {
    let stat = fs::metadata(path).expect("the folder is there");
    Watch {
        path: path.into(),
        dev: stat.dev(),
        ino: stat.ino(),
    }
}

/// Watches `root`; none, with the reason printed, where that is not permitted.
fn start(root: &Path, format: Format, own_pid: Option<u32>) -> Option<Running> {
    start_gated(
        root,
        format,
        Filter {
            own_pid,
            detail: Detail::Lean,
        },
        Arc::default(),
    )
}

/// The same with a sink that waits while somebody holds `gate`.
fn start_gated(root: &Path, format: Format, filter: Filter, gate: Arc<Mutex<()>>) -> Option<Running> {
    let (tell, events) = channel();
    let waiting = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&waiting);
    let sink: Sink = Box::new(move |batch| {
        counter.fetch_add(1, Relaxed);
        drop(gate.lock());
        // The test may have ended.
        drop(tell.send(batch));
    });
    let source = FanotifySource::open_as(format, &[watch(root)], filter)
        .and_then(|(group, translator)| FanotifySource::start(group, translator, format, sink));
    match source {
        Ok(source) => Some(Running {
            source,
            waiting,
            events,
        }),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// A fresh folder on each filesystem that is tested.
fn folders() -> Vec<tempfile::TempDir> {
    [concat!(env!("CARGO_MANIFEST_DIR"), "/../target"), "/dev/shm"]
        .into_iter()
        .filter_map(
            |base| match tempfile::Builder::new().prefix("omirr-fan-").tempdir_in(base) {
                Ok(dir) => Some(dir),
                Err(error) => {
                    println!("skipped {base}: {error}");
                    None
                }
            },
        )
        .collect()
}

fn ino(path: &Path) -> u64 {
    fs::symlink_metadata(path).expect("it is there").ino()
}

fn dirent(dir: &Path, name: &str) -> Option<Dirent> {
    Some(Dirent {
        dir: ino(dir),
        name: name.as_bytes().into(),
    })
}

/// The operations on one entry, in order.
fn ops(events: &[Event], at: &Option<Dirent>) -> Vec<Op> {
    events
        .iter()
        .filter(|event| event.at == *at)
        .map(|event| event.op)
        .collect()
}

/// Lets each step's events out of the queue before the next, so that none merge.
fn step(running: &Running, all: &mut Vec<Event>, act: impl FnOnce()) {
    act();
    all.extend(running.events());
}

#[test]
fn names_directory_name_and_inode_of_each_change() {
    for folder in folders() {
        let root = folder.path();
        let Some(running) = start(root, Format::Rename, None) else {
            return;
        };
        let mut all = Vec::new();
        let dir = root.join("dir");
        step(&running, &mut all, || fs::create_dir(&dir).expect("mkdir"));
        step(&running, &mut all, || {
            fs::write(dir.join("file"), b"content").expect("write")
        });
        let file = ino(&dir.join("file"));
        step(&running, &mut all, || {
            fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("chmod");
        });
        step(&running, &mut all, || {
            fs::rename(dir.join("file"), root.join("moved")).expect("rename")
        });
        step(&running, &mut all, || {
            fs::remove_file(root.join("moved")).expect("unlink")
        });
        assert_eq!(ops(&all, &dirent(root, "dir")), [Op::Mkdir]);
        assert_eq!(ops(&all, &dirent(&dir, "")), [Op::Attr], "{all:?}");
        assert_eq!(
            ops(&all, &dirent(&dir, "file")),
            [Op::Create, Op::Write, Op::Close, Op::Rename]
        );
        assert_eq!(ops(&all, &dirent(root, "moved")), [Op::Unlink]);
        let rename = all.iter().find(|event| event.op == Op::Rename).expect("a rename");
        assert_eq!(
            (rename.to.clone(), rename.ino, rename.is_dir),
            (dirent(root, "moved"), file, false)
        );
        assert_eq!(rename.pid, std::process::id());
        let mkdir = &all[0];
        assert_eq!(
            (mkdir.ino, mkdir.is_dir, mkdir.dev),
            (ino(&dir), true, watch(root).dev)
        );
    }
}

#[test]
fn a_neighbour_on_the_same_filesystem_is_not_reported() {
    for folder in folders() {
        let (root, neighbour) = (folder.path().join("share"), folder.path().join("neighbour"));
        fs::create_dir_all(neighbour.join("deep/er")).expect("mkdir");
        fs::create_dir_all(root.join("deep")).expect("mkdir");
        let Some(running) = start(&root, Format::Rename, None) else {
            return;
        };
        fs::write(neighbour.join("deep/er/file"), b"x").expect("write");
        fs::create_dir(neighbour.join("new")).expect("mkdir");
        fs::write(neighbour.join("new/file"), b"x").expect("write");
        assert_eq!(running.events(), []);
        // Out of the neighbour into the share: from then on it is reported.
        let moved = root.join("deep/new");
        fs::rename(neighbour.join("deep"), &moved).expect("rename");
        let events = running.events();
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!(
            (events[0].op, &events[0].at, &events[0].to),
            (Op::Rename, &None, &dirent(&root.join("deep"), "new"))
        );
        fs::write(moved.join("er/file"), b"y").expect("write");
        assert!(ops(&running.events(), &dirent(&moved.join("er"), "file")).contains(&Op::Write));
        // And back out: reported once, then no more.
        fs::rename(&moved, neighbour.join("back")).expect("rename");
        let events = running.events();
        assert_eq!((events.len(), &events[0].to), (1, &None), "{events:?}");
        fs::write(neighbour.join("back/er/file"), b"z").expect("write");
        assert_eq!(running.events(), []);
    }
}

#[test]
fn ones_own_changes_are_not_reported_but_their_folders_are_known() {
    for folder in folders() {
        let root = folder.path();
        let Some(running) = start(root, Format::Rename, Some(std::process::id())) else {
            return;
        };
        fs::create_dir(root.join("own")).expect("mkdir");
        fs::write(root.join("own/file"), b"x").expect("write");
        assert_eq!(running.events(), []);
        let touched = std::process::Command::new("touch")
            .arg(root.join("own/file"))
            .status()
            .expect("touch runs");
        assert!(touched.success());
        let events = running.events();
        assert!(
            ops(&events, &dirent(&root.join("own"), "file")).contains(&Op::Attr),
            "{events:?}"
        );
        assert!(events.iter().all(|event| event.pid != std::process::id()));
    }
}

#[test]
fn renames_that_the_kernel_merged_still_end_at_the_right_name() {
    for folder in folders() {
        let root = folder.path();
        let (a, b) = (root.join("a"), root.join("b"));
        fs::create_dir(&a).expect("mkdir");
        let dir = ino(&a);
        // The reader stands still in its sink while the renames pile up.
        let gate = Arc::new(Mutex::new(()));
        let Some(running) = start_gated(root, Format::Rename, LEAN, Arc::clone(&gate)) else {
            return;
        };
        let closed = gate.lock();
        fs::write(root.join("first"), b"x").expect("write");
        while running.waiting.load(Relaxed) == 0 {
            std::thread::yield_now();
        }
        for _ in 0..3 {
            fs::rename(&a, &b).expect("rename");
            fs::rename(&b, &a).expect("rename");
        }
        fs::rename(&a, &b).expect("rename");
        drop(closed);
        let events = running.events();
        let renames: Vec<_> = events.iter().filter(|event| event.op == Op::Rename).collect();
        // Seven renames came as two records; the third event corrects them.
        assert_eq!(renames.len(), 3, "{events:?}");
        assert!(renames.iter().all(|event| event.ino == dir && event.is_dir));
        assert_eq!(renames[1].to, dirent(root, "a"));
        assert_eq!(
            (&renames[2].at, &renames[2].to),
            (&dirent(root, "a"), &dirent(root, "b"))
        );
    }
}

#[test]
fn an_exchange_is_one_event() {
    for folder in folders() {
        let root = folder.path();
        fs::create_dir(root.join("a")).expect("mkdir");
        fs::create_dir(root.join("b")).expect("mkdir");
        let a = ino(&root.join("a"));
        let Some(running) = start(root, Format::Rename, None) else {
            return;
        };
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        rustix::fs::renameat_with(
            rustix::fs::CWD,
            root.join("a"),
            rustix::fs::CWD,
            root.join("b"),
            flags,
        )
        .expect("exchange");
        let events = running.events();
        // Two renames, where a read tore the pair apart.
        let exchange = &events[0];
        assert_eq!(
            (exchange.ino, &exchange.at, &exchange.to),
            (a, &dirent(root, "a"), &dirent(root, "b"))
        );
        assert!(events.len() == 2 || exchange.op == Op::Exchange, "{events:?}");
    }
}

#[test]
fn removing_a_whole_tree_names_every_entry() {
    for folder in folders() {
        let root = folder.path();
        let Some(running) = start_gated(root, Format::Rename, FULL, Arc::default()) else {
            return;
        };
        let mut expected = vec![dirent(root, "t")];
        let mut path = root.join("t");
        fs::create_dir(&path).expect("mkdir");
        for level in 0..20 {
            let name = format!("d{level}");
            expected.push(dirent(&path, &name));
            path = path.join(name);
            fs::create_dir(&path).expect("mkdir");
        }
        fs::remove_dir_all(root.join("t")).expect("rm -rf");
        let events = running.events();
        for at in expected {
            assert_eq!(ops(&events, &at), [Op::Mkdir, Op::Rmdir], "{at:?}");
        }
    }
}

#[test]
fn the_older_format_tells_the_same_story() {
    for folder in folders() {
        let root = folder.path();
        let Some(running) = start(root, Format::MovedFromTo, None) else {
            return;
        };
        let (a, b) = (root.join("a"), root.join("b"));
        let mut all = Vec::new();
        step(&running, &mut all, || fs::create_dir(&a).expect("mkdir"));
        let dir = ino(&a);
        step(&running, &mut all, || {
            fs::write(a.join("file"), b"x").expect("write")
        });
        step(&running, &mut all, || fs::rename(&a, &b).expect("rename"));
        step(&running, &mut all, || {
            fs::rename(b.join("file"), root.join("file")).expect("rename")
        });
        step(&running, &mut all, || fs::remove_dir(&b).expect("rmdir"));
        assert_eq!((all[0].op, all[0].ino), (Op::Mkdir, dir));
        let renames: Vec<_> = all.iter().filter(|event| event.op == Op::Rename).collect();
        assert_eq!(renames.len(), 2, "{all:?}");
        assert_eq!((renames[0].ino, &renames[0].to), (dir, &dirent(root, "b")));
        assert_eq!((&renames[0].at, renames[0].is_dir), (&dirent(root, "a"), true));
        assert_eq!(
            (&renames[1].to, renames[1].is_dir),
            (&dirent(root, "file"), false)
        );
        assert_eq!(
            all.last().map(|event| (event.op, event.at.clone())),
            Some((Op::Rmdir, dirent(root, "b")))
        );
    }
}

#[test]
fn a_missing_folder_is_an_error_that_names_it() {
    let watch = Watch {
        path: "/nonexistent/omirr".into(),
        dev: 1,
        ino: 1,
    };
    let error = FanotifySource::open(&[watch], None, Detail::Lean, Box::new(|_| ()))
        .err()
        .expect("an error");
    let text = error.to_string();
    assert!(
        text.contains("/nonexistent/omirr") || text.contains("fanotify cannot be opened"),
        "{text}"
    );
}

#[test]
fn ten_thousand_files_arrive_complete() {
    for folder in folders() {
        let root = folder.path();
        let Some(running) = start(root, Format::Rename, None) else {
            return;
        };
        for n in 0..10_000 {
            fs::File::create(root.join(format!("f{n}"))).expect("create");
        }
        let created = running
            .events()
            .iter()
            .filter(|event| event.op == Op::Create)
            .count();
        assert_eq!(created, 10_000);
        assert!(running.source.stats().events >= 10_000);
        assert_eq!(running.source.stats().dropped, 0);
    }
}
