//! What watching costs those who are watched: `overhead run FOLDER ROUNDS COUNT
//! [WATCHER...]` does two loops beneath a folder and beside it, with one watcher
//! after another, and says how much of the speed is left. It needs a kernel that
//! can be traced, so it runs in a guest; there the time is the writer's own
//! processor time, interrupts included, and with `-icount` it is a count of
//! instructions. A watcher that is not known by name is a bpftrace program: an
//! empty one says what a bare hook costs.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use omirr::source::{
    Sink, Source, Watch,
    choice::{DIRTY_ENTRIES, Detail, RING_BYTES},
    ebpf::{Attach, EbpfSource, Options, Transport},
    fanotify::FanotifySource,
};

/// Folders that inotify has to watch one by one.
const FOLDERS: usize = 100;

#[derive(Clone, PartialEq, Eq, Debug)]
enum Watcher {
    Nobody,
    Fentry,
    Kprobe,
    Inotify,
    Fanotify,
    Bpftrace(String),
}

impl Watcher {
    fn named(name: &str) -> Watcher {
        match name {
            "nobody" => Watcher::Nobody,
            "fentry" => Watcher::Fentry,
            "kprobe" => Watcher::Kprobe,
            "inotify" => Watcher::Inotify,
            "fanotify" => Watcher::Fanotify,
            "bpftrace" => Watcher::Bpftrace(BPFTRACE.to_owned()),
            program => Watcher::Bpftrace(program.to_owned()),
        }
    }
}

/// In the order of the table.
const ALL: [&str; 5] = ["fentry", "kprobe", "inotify", "fanotify", "bpftrace"];

/// The field's reference: who writes how much to which file, per inode, as
/// `filetop` and `vfsstat` do.
const BPFTRACE: &str = "kretfunc:vfs_write { @w[args->file->f_inode->i_ino, pid] = count(); } \
    kfunc:vfs_open { @o[pid] = count(); } kfunc:vfs_unlink { @u[pid] = count(); } \
    END { clear(@w); clear(@o); clear(@u); }";

/// What is running; ends when dropped.
enum Running {
    Nothing,
    Source(Box<dyn Source>),
    Process(Child),
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Running::Process(child) = self {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start(watcher: &Watcher, folder: &Path) -> Result<Option<Running>> {
    let meta = folder.metadata()?;
    let watch = Watch {
        path: folder.to_owned(),
        dev: meta.dev(),
        ino: meta.ino(),
    };
    let sink: Sink = Box::new(drop);
    let own = Some(std::process::id());
    let ebpf = |attach, sink| -> Result<Option<Running>> {
        let options = Options {
            attach,
            transport: Transport::Ring,
            ring_bytes: RING_BYTES,
            dirty_entries: Some(DIRTY_ENTRIES),
            ..Options::default()
        };
        let source = EbpfSource::open(std::slice::from_ref(&watch), options, own, sink)?;
        Ok(Some(Running::Source(Box::new(source))))
    };
    match watcher {
        Watcher::Nobody => Ok(Some(Running::Nothing)),
        Watcher::Fentry => ebpf(Attach::Fentry, sink),
        Watcher::Kprobe => ebpf(Attach::Kprobe, sink),
        Watcher::Fanotify => Ok(Some(Running::Source(Box::new(FanotifySource::open(
            std::slice::from_ref(&watch),
            own,
            Detail::Lean,
            sink,
        )?)))),
        // In a process of its own, with which its watches end.
        Watcher::Inotify => started(Command::new("/proc/self/exe").arg("inotify").arg(folder)),
        Watcher::Bpftrace(program) => bpftrace(program),
    }
}

/// Watches each folder, says so, and reads what comes.
fn inotify(folder: &Path) -> Result<()> {
    // SAFETY: a new descriptor, owned from here on.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::inotify_init1(libc::IN_CLOEXEC)) };
    let mask = libc::IN_ALL_EVENTS & !(libc::IN_ACCESS | libc::IN_OPEN | libc::IN_CLOSE_NOWRITE);
    let mut folders = vec![folder.to_owned()];
    folders.extend((0..FOLDERS).map(|n| folder.join(n.to_string())));
    for folder in folders {
        let path = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes())?;
        // SAFETY: an open descriptor and a string that ends.
        let watch = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) };
        ensure!(
            watch >= 0,
            "inotify_add_watch: {}",
            std::io::Error::last_os_error()
        );
    }
    println!("Attaching");
    let mut buffer = [0u8; 1 << 16];
    loop {
        rustix::io::read(&fd, &mut buffer)?;
    }
}

/// None where there is no bpftrace.
fn bpftrace(program: &str) -> Result<Option<Running>> {
    started(Command::new("bpftrace").args(["-e", program]))
}

/// A process that says when it has begun; none if there is no such program.
fn started(command: &mut Command) -> Result<Option<Running>> {
    let spawned = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let Ok(mut child) = spawned else { return Ok(None) };
    // bpftrace says "Attaching N probes..." and takes a moment.
    let mut first = [0; 9];
    let out = child.stdout.as_mut().context("its output")?;
    if std::io::Read::read_exact(out, &mut first).is_err() {
        child.wait()?;
        return Ok(None);
    }
    std::thread::sleep(Duration::from_secs(5));
    Ok(Some(Running::Process(child)))
}

/// Nanoseconds of processor time of this process.
fn spent() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// One loop, in a process of its own; prints what it took, ns.
fn work(what: &str, folder: &Path, count: usize) -> Result<()> {
    let path = folder.join("0").join(format!("loop-{what}"));
    let began;
    match what {
        "create" => {
            let block = [7; 4096];
            began = spent();
            for _ in 0..count {
                let mut file = File::create_new(&path)?;
                file.write_all(&block)?;
                drop(file);
                fs::remove_file(&path)?;
            }
        }
        "append" => {
            let step = [7; 64];
            let mut file = OpenOptions::new().append(true).create(true).open(&path)?;
            file.set_len(0)?;
            began = spent();
            for _ in 0..count {
                file.write_all(&step)?;
            }
        }
        _ => bail!("create or append"),
    }
    println!("{}", spent() - began);
    Ok(())
}

fn measure(what: &str, folder: &Path, count: usize) -> Result<u64> {
    let out = Command::new("/proc/self/exe")
        .args(["work", what])
        .arg(folder)
        .arg(count.to_string())
        .output()?;
    ensure!(
        out.status.success(),
        "{what}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8(out.stdout)?.trim().parse()?)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn run(base: &Path, rounds: usize, count: usize, watchers: &[String]) -> Result<()> {
    let mut names: Vec<&str> = vec!["nobody"];
    names.extend(watchers.iter().map(String::as_str));
    if watchers.is_empty() {
        names.extend(ALL);
    }
    let watchers: Vec<Watcher> = names.into_iter().map(Watcher::named).collect();
    let places: [(&str, PathBuf); 2] = [("inside", base.join("share")), ("outside", base.join("beside"))];
    for (_, folder) in &places {
        for n in 0..FOLDERS {
            fs::create_dir_all(folder.join(n.to_string()))?;
        }
    }
    let loops = ["create", "append"];
    // By watcher, place and loop: one value a round.
    let mut taken = vec![vec![Vec::new(); 4]; watchers.len()];
    let mut events = vec![vec![Vec::new(); 4]; watchers.len()];
    for round in 0..rounds {
        for (w, watcher) in watchers.iter().enumerate() {
            let began = Instant::now();
            let Some(running) = start(watcher, &places[0].1).with_context(|| format!("{watcher:?}"))? else {
                continue;
            };
            for (p, (_, folder)) in places.iter().enumerate() {
                for (l, what) in loops.iter().enumerate() {
                    let before = events_of(&running);
                    taken[w][p * 2 + l].push(measure(what, folder, count)? as f64);
                    if let Running::Source(source) = &running {
                        source.barrier(Duration::from_secs(30))?;
                    }
                    events[w][p * 2 + l].push(events_of(&running) - before);
                }
            }
            eprintln!("round {round}: {watcher:?} {:?}", began.elapsed());
        }
    }
    for (w, watcher) in watchers.iter().enumerate() {
        for (p, (place, _)) in places.iter().enumerate() {
            for (l, what) in loops.iter().enumerate() {
                let at = p * 2 + l;
                let mut kept: Vec<f64> = taken[0][at]
                    .iter()
                    .zip(&taken[w][at])
                    .map(|(without, with)| without / with)
                    .collect();
                if kept.is_empty() {
                    continue;
                }
                let mut each: Vec<f64> = taken[w][at].iter().map(|ns| ns / count as f64).collect();
                let middle = median(&mut kept);
                println!(
                    "{watcher:?} {place} {what}: keeps {middle:.3} ({:.3} to {:.3}), {:.0} ns each, {:?} events",
                    kept[0],
                    kept[kept.len() - 1],
                    median(&mut each),
                    events[w][at].last().copied().unwrap_or(0),
                );
            }
        }
    }
    Ok(())
}

fn events_of(running: &Running) -> u64 {
    match running {
        Running::Source(source) => source.stats().events,
        _ => 0,
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let arg = |n: usize| args.get(n).map_or("", String::as_str);
    match arg(1) {
        "run" => run(
            Path::new(arg(2)),
            arg(3).parse()?,
            arg(4).parse()?,
            args.get(5..).unwrap_or_default(),
        ),
        "inotify" => inotify(Path::new(arg(2))),
        "work" => work(arg(2), Path::new(arg(3)), arg(4).parse()?),
        _ => bail!("usage: overhead run FOLDER ROUNDS COUNT [WATCHER...]"),
    }
}
