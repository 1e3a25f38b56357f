//! `omirr trace`: prints the changes beneath a folder as they happen.
//!
//! In: a folder, and the events of a source. Out: one line per change. Needs no
//! configuration and no daemon, keeps nothing, and never opens a file.
//!
//! - `tree`: the folder's directories, for the resolver. `line`: a change as
//!   text or JSON. `filter`: which changes are printed. `compare`: changes found
//!   by comparing, where a host allows no events.

mod compare;
mod filter;
mod line;
mod tree;

use std::{
    io::{self, BufWriter, ErrorKind, Write},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use rustc_hash::FxHashSet;

use self::{
    compare::Snapshot,
    filter::{Filter, FilterArgs},
    line::{Border, Change, Clock, Printer},
    tree::Tree,
};
use crate::{
    model::RelPath,
    resolve::{
        self, Resolver, Unknown,
        fallback::{Located, Locator},
    },
    source::{
        Event, Op, Signal, Sink, Source, Watch, auto,
        cgroup::Cgroups,
        choice::{Attach, Detail, SourceConfig, SourceKind, Transport},
    },
};

/// How often a folder is compared where there are no events.
const COMPARE_EVERY: Duration = Duration::from_secs(1);
/// Directories of others that are remembered.
const OUTSIDE_LIMIT: usize = 1 << 16;
/// How long the end waits for changes that are still queued.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Print changes beneath a folder as they happen
///
/// Each line has the time (UTC), the operation, the path, the bytes that were
/// written where the source knows them, and who did it. Ctrl-C ends it. Needs
/// no configuration; where the kernel allows no events, the folder is compared
/// every second instead. Of the options that choose what is printed each may be
/// given several times; all kinds that are given must agree.
#[derive(Clone, Debug, Args)]
pub(super) struct TraceArgs {
    /// The folder to watch; mounts beneath it are not entered
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filter: FilterArgs,
    /// Where changes come from
    #[arg(long, value_enum, default_value_t)]
    source: SourceKind,
    /// How eBPF programs are attached
    #[arg(long, value_enum, default_value_t)]
    attach: Attach,
    /// How eBPF programs hand events over
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,
}

/// What reaches the printing thread.
enum Message {
    Signals(Vec<Signal>),
    /// Somebody wants it to end: Ctrl-C, or nobody reads any more.
    End,
}

pub(super) fn run(args: &TraceArgs) -> anyhow::Result<()> {
    let watch = watch_of(&args.path)?;
    let filter = Filter::new(&args.filter)?;
    let (tell, told) = channel();
    end_on_signals(tell.clone())?;
    end_when_nobody_reads(tell.clone())?;
    let config = SourceConfig {
        source: args.source,
        attach: args.attach,
        transport: args.transport,
        scan_interval: COMPARE_EVERY,
        detail: Detail::Full,
        ..SourceConfig::default()
    };
    let sink_factory = || {
        let tell = tell.clone();
        let sink: Sink = Box::new(move |signals| {
            // Nobody listens once the printing thread has ended.
            tell.send(Message::Signals(signals)).ok();
        });
        sink
    };
    let source = auto::open(
        &config,
        std::slice::from_ref(&watch),
        sink_factory,
        Some(std::process::id()),
    )?;
    match trace(&watch, source.as_ref(), &told, filter, args.json) {
        Err(error) if is_closed_pipe(&error) => Ok(()),
        result => result,
    }
}

fn watch_of(path: &Path) -> anyhow::Result<Watch> {
    let path = path
        .canonicalize()
        .with_context(|| format!("cannot watch {}", path.display()))?;
    let stat = path
        .metadata()
        .with_context(|| format!("cannot watch {}", path.display()))?;
    anyhow::ensure!(
        stat.is_dir(),
        "cannot watch {}: it is not a folder; name the folder that holds it",
        path.display()
    );
    Ok(Watch {
        path,
        dev: stat.dev(),
        ino: stat.ino(),
    })
}

/// Prints until the end is asked for.
fn trace(
    watch: &Watch,
    source: &dyn Source,
    told: &Receiver<Message>,
    filter: Filter,
    json: bool,
) -> anyhow::Result<()> {
    anyhow::ensure!(
        source.about().kind != "scan" || !filter.asks_who(),
        "a comparison of the folder cannot tell who made a change: leave --comm, --pid and --uid out, or have omirr \
         use ebpf or fanotify ({})",
        source.about().reason
    );
    let out = BufWriter::with_capacity(1 << 16, io::stdout());
    let mut view = View::open(watch, source, Printer::new(out, &watch.path, json), filter)?;
    let about = source.about();
    let header = format!(
        "omirr: tracing {} with {}: {}",
        watch.path.display(),
        about.kind,
        about.reason
    );
    // Without a header the changes are still worth printing.
    io::stderr()
        .write_all(format!("{}\n", super::terminal::plain(&header)).as_bytes())
        .ok();
    while let Ok(message) = told.recv() {
        let Message::Signals(signals) = message else { break };
        view.take(signals)?;
        // What is waiting already goes out with one write.
        let mut ended = false;
        for message in told.try_iter() {
            match message {
                Message::Signals(signals) => view.take(signals)?,
                Message::End => {
                    ended = true;
                    break;
                }
            }
        }
        view.printer.flush()?;
        if ended {
            break;
        }
    }
    if source.barrier(LAST_WORDS).is_ok() {
        for message in told.try_iter() {
            if let Message::Signals(signals) = message {
                view.take(signals)?;
            }
        }
    }
    Ok(view.printer.flush()?)
}

/// From signals to lines.
struct View {
    dev: u64,
    tree: Tree,
    resolver: Resolver,
    locator: Locator,
    printer: Printer<BufWriter<io::Stdout>>,
    filter: Filter,
    cgroups: Cgroups,
    clock: Clock,
    /// The source tells of the whole filesystem.
    is_unfiltered: bool,
    /// Directories that are not beneath the folder.
    outside: FxHashSet<u64>,
    /// Directories that came from outside and have not been looked at.
    unread: FxHashSet<u64>,
    /// The last comparison, if the source knows no events.
    snapshot: Option<Snapshot>,
}

impl View {
    /// The source must be attached already: what the scan misses comes as
    /// events.
    fn open(
        watch: &Watch,
        source: &dyn Source,
        printer: Printer<BufWriter<io::Stdout>>,
        filter: Filter,
    ) -> anyhow::Result<View> {
        let tree = Tree::open(watch).with_context(|| format!("cannot open {}", watch.path.display()))?;
        let locator =
            Locator::open(watch).with_context(|| format!("cannot open {}", watch.path.display()))?;
        let mut resolver = Resolver::new(watch.ino);
        let mut snapshot = None;
        if source.about().kind == "scan" {
            snapshot = Some(Snapshot::take(&tree));
        } else {
            tree.learn(&RelPath::root(), &mut resolver);
        }
        Ok(View {
            dev: watch.dev,
            tree,
            resolver,
            locator,
            printer,
            filter,
            cgroups: Cgroups::open(),
            clock: Clock::new(),
            is_unfiltered: source.about().kind == "fanotify",
            outside: FxHashSet::default(),
            unread: FxHashSet::default(),
            snapshot,
        })
    }

    fn take(&mut self, signals: Vec<Signal>) -> io::Result<()> {
        for signal in signals {
            match signal {
                Signal::Event(event) if event.dev == self.dev => self.event(&event)?,
                Signal::Event(_) => {}
                Signal::Compare | Signal::Recovered(_) => self.lost()?,
                Signal::Lost { dev, .. } if dev.is_none_or(|dev| dev == self.dev) => self.lost()?,
                Signal::Lost { .. } | Signal::Doubt => {}
            }
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> io::Result<()> {
        if event.is_dir {
            // A new directory may have the number of one that is gone, and one
            // that crosses the border takes others along.
            self.outside.remove(&event.ino);
            if matches!(event.op, Op::Rename | Op::Exchange) && self.resolver.knows(event) {
                self.outside.clear();
            }
        }
        let changes = self.resolver.apply(event);
        let Some((path, to)) = self.paths(event, &changes) else {
            return Ok(());
        };
        if event.is_dir && matches!(event.op, Op::Rename | Op::Exchange) {
            self.learn_arrival(event, &path, to.as_ref(), &changes);
        }
        if !self.filter.wants_event(event) || !self.filter.wants_path(&path, to.as_ref(), event.is_dir) {
            return Ok(());
        }
        let moved = match (event.op, &to, changes.first()) {
            (Op::Rename | Op::Exchange, None, Some(resolve::Change::Gone { .. })) => Some(Border::Out),
            (Op::Rename | Op::Exchange, None, _) => Some(Border::In),
            _ => None,
        };
        self.printer.print(&Change {
            time: self.clock.time_of(event.time_ns),
            moved,
            op: event.op.name(),
            path,
            to,
            range: event.range,
            pid: event.pid,
            uid: event.uid,
            comm: event.comm(),
            cgroup: self.cgroups.path_of(event.cgroup).to_owned(),
            is_dir: event.is_dir,
        })
    }

    /// The event's path and its new one. None if it is not beneath the folder,
    /// or is gone and nothing tells where it was.
    fn paths(&mut self, event: &Event, changes: &[resolve::Change]) -> Option<(RelPath, Option<RelPath>)> {
        use resolve::Change;
        Some(match changes.first()? {
            Change::Moved { from, to, .. } => (from.clone(), Some(to.clone())),
            Change::Exchanged { a, b } => (a.clone(), Some(b.clone())),
            Change::Touched { path, .. } => match changes.get(1) {
                // A link: the new name, then the old one.
                Some(Change::Touched { path: old, .. }) if event.op == Op::Link => {
                    (old.clone(), Some(path.clone()))
                }
                _ => (path.clone(), None),
            },
            Change::Gone { path } => (path.clone(), None),
            Change::Unknown(unknown) => (self.locate(unknown)?, None),
        })
    }

    /// A directory that came from outside brings others with it. If it has moved
    /// on before it could be looked at, that is done where it is next.
    fn learn_arrival(
        &mut self,
        event: &Event,
        path: &RelPath,
        to: Option<&RelPath>,
        changes: &[resolve::Change],
    ) {
        let came = matches!(changes.first(), Some(resolve::Change::Touched { .. }));
        if (came || self.unread.contains(&event.ino))
            && self.tree.learn(to.unwrap_or(path), &mut self.resolver)
        {
            self.unread.remove(&event.ino);
        } else if came {
            self.unread.insert(event.ino);
        }
    }

    /// Where an unknown change is, unless its directory is known to be none of
    /// this folder's.
    fn locate(&mut self, unknown: &Unknown) -> Option<RelPath> {
        let dir = unknown.at.as_ref().map_or(0, |at| at.dir);
        // The scan and the events have told every directory of the folder, but
        // for those that came from outside and moved on at once. So where the
        // source tells of the whole filesystem, this one is another's; to ask
        // for its number could only find a directory that took it over.
        let is_foreign = self.is_unfiltered && dir != 0 && self.unread.is_empty();
        if is_foreign || self.outside.contains(&dir) {
            return None;
        }
        if let Located::Path(path) = self.locator.locate(unknown, &mut self.resolver) {
            return Some(path);
        }
        if dir != 0 {
            if self.outside.len() >= OUTSIDE_LIMIT {
                self.outside.clear();
            }
            self.outside.insert(dir);
        }
        None
    }

    /// Events were lost; with the scan source that is all it ever says.
    fn lost(&mut self) -> io::Result<()> {
        let Some(before) = self.snapshot.take() else {
            io::stderr()
                .write_all(b"omirr: events were lost here, some changes are not shown\n")
                .ok();
            self.tree.learn(&RelPath::root(), &mut self.resolver);
            return Ok(());
        };
        let now = Snapshot::take(&self.tree);
        let time = self.clock.time_of(0);
        for (op, path, is_dir) in before.differences(&now) {
            if !self.filter.wants_op(op) || !self.filter.wants_path(&path, None, is_dir) {
                continue;
            }
            self.printer.print(&Change {
                time,
                op: op.name(),
                path,
                is_dir,
                ..Change::by_nobody()
            })?;
        }
        self.snapshot = Some(now);
        Ok(())
    }
}

/// Turns Ctrl-C and SIGTERM into an orderly end.
fn end_on_signals(tell: Sender<Message>) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new()
        .name("omirr-signals".into())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
            });
            tell.send(Message::End).ok();
        })?;
    Ok(())
}

/// A pipe that nobody reads is found out about only by the next write, which
/// may be long in coming: `omirr trace /srv | head -1`.
fn end_when_nobody_reads(tell: Sender<Message>) -> anyhow::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    let out = io::stdout().as_fd().try_clone_to_owned()?;
    let kind = rustix::fs::fstat(&out)?.st_mode & libc::S_IFMT;
    if kind != libc::S_IFIFO && kind != libc::S_IFSOCK {
        return Ok(());
    }
    std::thread::Builder::new()
        .name("omirr-stdout".into())
        .spawn(move || {
            loop {
                let mut fds = [PollFd::new(&out, PollFlags::empty())];
                match poll(&mut fds, None) {
                    Err(rustix::io::Errno::INTR) => {}
                    Err(_) => return,
                    Ok(_) => break,
                }
            }
            tell.send(Message::End).ok();
        })?;
    Ok(())
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}
