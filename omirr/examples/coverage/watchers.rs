//! The sources, and what they saw.
//!
//! In: a source's name and the places to watch. Out: for one row at a time, what
//! the source reported, its names made into paths, and whether whoever looked
//! at the file at that moment found the new content. Changes are made by
//! another process, since a source passes over its own.

use std::collections::HashMap;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use omirr::source::choice::Detail;
use omirr::source::ebpf::{Attach, EbpfSource, Options};
use omirr::source::fanotify::FanotifySource;
use omirr::source::{Dirent, Event, Op, Signal, Sink, Source, Watch};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use crate::judge::Verdict;
use crate::place::Place;
use crate::rows::Stage;
use crate::sys;

const PATIENCE: Duration = Duration::from_secs(30);

/// What a file is like when its row's change is complete.
#[derive(Clone, Debug)]
pub struct Look {
    path: PathBuf,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Bytes(u64, &'static [u8]),
    Size(u64),
}

impl Look {
    pub fn bytes(path: &Path, at: u64, bytes: &'static [u8]) -> Self {
        let path = path.to_owned();
        Self {
            path,
            what: What::Bytes(at, bytes),
        }
    }

    pub fn size(path: &Path, size: u64) -> Self {
        let path = path.to_owned();
        Self {
            path,
            what: What::Size(size),
        }
    }

    pub fn beneath(mut self, folder: &Path) -> Self {
        self.path = folder.join(self.path);
        self
    }

    fn is_there(&self) -> bool {
        let Ok(file) = File::open(&self.path) else {
            return false;
        };
        match self.what {
            What::Size(size) => file.metadata().is_ok_and(|m| m.len() == size),
            What::Bytes(at, bytes) => {
                let mut found = vec![0; bytes.len()];
                file.read_exact_at(&mut found, at).is_ok() && found == bytes
            }
        }
    }
}

/// What a source reported is not all.
#[derive(Debug, thiserror::Error)]
#[error("{0} lost {1} events")]
pub struct Lost(&'static str, u64);

/// One event, its names made into paths; more than one where a directory moved.
#[derive(Clone, Debug)]
pub struct Seen {
    pub op: Op,
    pub at: Vec<PathBuf>,
    pub to: Vec<PathBuf>,
    pub range: Option<(u64, u64)>,
    pub time_ns: u64,
    /// Who looked at the file when the event arrived found the new content.
    pub fresh: bool,
}

/// What the source's thread leaves for the row.
#[derive(Default)]
struct Inbox {
    look: Option<Look>,
    events: Vec<(Event, bool)>,
    lost: u64,
}

type Shared = Arc<Mutex<Inbox>>;

enum Kind {
    Ebpf(Box<EbpfSource>),
    /// One per place, since some filesystems refuse.
    Fanotify(Vec<FanotifySource>),
    Inotify(Inotify),
}

pub struct Watcher {
    pub name: &'static str,
    pub seen: Vec<Seen>,
    /// How many were seen before the present phase.
    pub before: usize,
    pub verdict: Option<Verdict>,
    kind: Kind,
    inbox: Shared,
    refused: HashMap<String, String>,
    folders: HashMap<u64, Vec<PathBuf>>,
}

impl Watcher {
    pub fn open(name: &'static str, places: &[Place]) -> Result<Self> {
        let inbox = Shared::default();
        let mut refused = HashMap::new();
        let watches = places.iter().map(Place::watch).collect::<Result<Vec<Watch>>>()?;
        let own = Some(std::process::id());
        let kind = match name {
            "inotify" => Kind::Inotify(Inotify::new()?),
            "fanotify" => {
                let mut sources = Vec::new();
                for (watch, place) in watches.into_iter().zip(places) {
                    match FanotifySource::open(&[watch], own, Detail::Lean, sink(&inbox)) {
                        Ok(source) => sources.push(source),
                        Err(error) => drop(refused.insert(place.name.clone(), error.to_string())),
                    }
                }
                Kind::Fanotify(sources)
            }
            _ => {
                let attach = if name == "kprobe" {
                    Attach::Kprobe
                } else {
                    Attach::Fentry
                };
                let options = Options {
                    attach,
                    ..Options::default()
                };
                Kind::Ebpf(Box::new(EbpfSource::open(&watches, options, own, sink(&inbox))?))
            }
        };
        let (seen, verdict, folders) = (Vec::new(), None, HashMap::new());
        Ok(Self {
            name,
            seen,
            before: 0,
            verdict,
            kind,
            inbox,
            refused,
            folders,
        })
    }

    /// Whether it tells operations and bytes.
    pub fn is_exact(&self) -> bool {
        matches!(self.kind, Kind::Ebpf(_))
    }

    pub fn cannot_watch(&self, place: &Place) -> Option<String> {
        self.refused.get(&place.name).cloned()
    }

    /// One line about how it went.
    pub fn about(&self) -> String {
        let Kind::Ebpf(source) = &self.kind else {
            return format!("refused on {:?}", self.refused);
        };
        let stats = source.stats();
        let off = stats.hooks.iter().filter(|h| !h.attached || h.note.is_some());
        let off: Vec<String> = off
            .map(|h| format!("{} ({})", h.hook, h.note.as_deref().unwrap_or("off")))
            .collect();
        format!(
            "{} events, {} lost; {}",
            stats.events,
            stats.dropped,
            off.join("; ")
        )
    }

    /// Forgets what was before the row's change, and learns its folders.
    pub fn begin(&mut self, stage: &Stage, look: Option<Look>) -> Result<()> {
        self.folders.clear();
        self.learn(stage)?;
        self.barrier()?;
        if let Kind::Inotify(inotify) = &mut self.kind {
            inotify.watch(self.folders.values().flatten());
            inotify.read(None)?;
        }
        let mut inbox = lock(&self.inbox);
        inbox.events.clear();
        inbox.lost = 0;
        inbox.look = look;
        drop(inbox);
        self.seen.clear();
        self.verdict = None;
        Ok(())
    }

    /// Takes all that was reported up to now.
    pub fn collect(&mut self, stage: &Stage) -> Result<()> {
        self.barrier()?;
        self.learn(stage)?;
        self.before = self.seen.len();
        let mut inbox = lock(&self.inbox);
        let lost = std::mem::take(&mut inbox.lost);
        if lost > 0 {
            return Err(Lost(self.name, lost).into());
        }
        if let Kind::Inotify(inotify) = &mut self.kind {
            self.seen.extend(inotify.read(inbox.look.as_ref())?);
        }
        let events = std::mem::take(&mut inbox.events);
        drop(inbox);
        for (event, fresh) in events {
            let (at, to) = (self.paths(event.at.as_ref()), self.paths(event.to.as_ref()));
            let (op, range, time_ns) = (event.op, event.range, event.time_ns);
            self.seen.push(Seen {
                op,
                at,
                to,
                range,
                time_ns,
                fresh,
            });
        }
        Ok(())
    }

    /// The row is over: nobody looks any more.
    pub fn end(&mut self) -> Result<()> {
        lock(&self.inbox).look = None;
        self.verdict = None;
        if let Kind::Inotify(inotify) = &mut self.kind {
            inotify.forget();
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        match &self.kind {
            Kind::Ebpf(source) => source.barrier(PATIENCE),
            Kind::Fanotify(sources) => sources.iter().try_for_each(|source| source.barrier(PATIENCE)),
            Kind::Inotify(_) => Ok(()),
        }
    }

    fn learn(&mut self, stage: &Stage) -> Result<()> {
        let mut add = |path: &Path| -> Result<()> {
            let paths = self.folders.entry(path.metadata()?.ino()).or_default();
            if !paths.iter().any(|known| known == path) {
                paths.push(path.to_owned());
            }
            Ok(())
        };
        add(&stage.place.share)?;
        let own = stage.seen_as();
        if !own.exists() {
            return Ok(());
        }
        add(&own)?;
        for entry in own.read_dir()? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                add(&entry.path())?;
            }
        }
        Ok(())
    }

    fn paths(&self, name: Option<&Dirent>) -> Vec<PathBuf> {
        use std::os::unix::ffi::OsStrExt;
        let Some(name) = name else {
            return Vec::new();
        };
        let last = std::ffi::OsStr::from_bytes(&name.name);
        let folders = self.folders.get(&name.dir).into_iter().flatten();
        folders
            .map(|folder| {
                if last.is_empty() {
                    folder.clone()
                } else {
                    folder.join(last)
                }
            })
            .collect()
    }
}

fn lock(inbox: &Shared) -> MutexGuard<'_, Inbox> {
    inbox.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at the file at once, as a daemon does at its earliest.
fn sink(inbox: &Shared) -> Sink {
    let inbox = Arc::clone(inbox);
    Box::new(move |signals| {
        let mut inbox = lock(&inbox);
        for signal in signals {
            match signal {
                Signal::Event(mut event) => {
                    let fresh = inbox.look.as_ref().is_none_or(Look::is_there);
                    if event.time_ns == 0 {
                        event.time_ns = sys::now();
                    }
                    inbox.events.push((event, fresh));
                }
                Signal::Lost { count, .. } => inbox.lost += count.max(1),
                Signal::Compare | Signal::Recovered(_) | Signal::Doubt => {}
            }
        }
    })
}

/// Plain inotify: a watch on each folder of the row, to compare with.
struct Inotify {
    queue: OwnedFd,
    watched: HashMap<i32, PathBuf>,
}

impl Inotify {
    fn new() -> Result<Self> {
        let queue = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).context("inotify")?;
        Ok(Self {
            queue,
            watched: HashMap::new(),
        })
    }

    fn watch<'a>(&mut self, folders: impl Iterator<Item = &'a PathBuf>) {
        let what = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVE;
        for folder in folders {
            if let Ok(watch) = inotify::add_watch(&self.queue, folder, what) {
                self.watched.insert(watch, folder.clone());
            }
        }
    }

    fn forget(&mut self) {
        for (watch, _) in self.watched.drain() {
            // The folder may be gone, and its watch with it.
            let _ = inotify::remove_watch(&self.queue, watch);
        }
    }

    fn read(&mut self, look: Option<&Look>) -> Result<Vec<Seen>> {
        let mut buffer = [MaybeUninit::uninit(); 64 << 10];
        let mut reader = inotify::Reader::new(&self.queue, &mut buffer);
        let mut out = Vec::new();
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(out),
                Err(error) => return Err(error).context("inotify"),
            };
            let Some(folder) = self.watched.get(&event.wd()) else {
                continue;
            };
            let name = event
                .file_name()
                .and_then(|name| name.to_str().ok())
                .unwrap_or("");
            let path = if name.is_empty() {
                folder.clone()
            } else {
                folder.join(name)
            };
            let Some(op) = operation(event.events()) else {
                continue;
            };
            out.push(Seen {
                op,
                at: vec![path],
                to: Vec::new(),
                range: None,
                time_ns: sys::now(),
                fresh: look.is_none_or(Look::is_there),
            });
        }
    }
}

/// The nearest operation.
fn operation(events: ReadFlags) -> Option<Op> {
    [
        (ReadFlags::CREATE, Op::Create),
        (ReadFlags::DELETE, Op::Unlink),
        (ReadFlags::MODIFY, Op::Write),
        (ReadFlags::ATTRIB, Op::Attr),
        (ReadFlags::CLOSE_WRITE, Op::Close),
        (ReadFlags::MOVED_FROM, Op::Rename),
        (ReadFlags::MOVED_TO, Op::Rename),
    ]
    .into_iter()
    .find(|(flag, _)| events.contains(*flag))
    .map(|(_, op)| op)
}
