//! The tasks that join the rooms.
//!
//! In: a configuration. Out: a running mirror, until SIGTERM. For each share
//! there is one keeper thread (`keeper`), which alone writes its index and its
//! tree; a scanner (`scanner`), which compares tree and index; for each of its
//! peers a sender (`sender`), and for each connection a peer has made a
//! receiver (`receiver`). One event source serves all shares (`events`).
//! Decisions are the engine's; here is only who talks to whom, and when to end.

mod again;
mod bases;
mod belt;
mod budget;
mod claim;
mod conflicts;
pub mod control;
mod differences;
mod dirty;
mod doubt;
mod events;
mod journal;
mod keeper;
mod last_change;
mod listener;
mod local;
mod locks;
mod look;
mod memory;
mod overflow;
mod patches;
mod receiver;
mod recent;
mod recover;
mod recovered;
mod remote;
mod renamed;
mod report;
mod scanner;
mod sender;
mod service;
mod share;
mod state_dir;
mod steps;
mod sweep;
mod trust;
mod unchanged;
mod unread;
mod unsynced;
mod until;
mod who;

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::apply::{Redos, ShareRoot};
use crate::config::Config;
use crate::crash::{self, Point};
use crate::engine::{self, AtStart, Opening, Start};
use crate::index::{Durable, Home, Index};
use crate::net::{Identity, Listener, PublicKey};
use crate::source::ebpf::pins;
use budget::{Budget, PEER_BYTES_MAX};
use keeper::Keeper;
use share::{Link, Parts, Share};

pub use state_dir::{StateDir, StateError};

/// How long the tasks may take to end before they are named and left.
const END_WITHIN: Duration = Duration::from_secs(10);

/// `omirr 0.1.0`, as it is told to peers.
pub(crate) fn software() -> String {
    concat!("omirr ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// The wall clock, milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Why a run has ended.
enum End {
    Stop,
    Reload(Box<Config>),
    /// A share that had stopped for now can go on.
    Again,
}

/// Has the kernel end the waits of all threads that are started from now on when
/// they are to end, and not up to 50 µs later (`PR_SET_TIMERSLACK` in prctl(2)):
/// changes wait for their companions hardly longer than that.
fn be_punctual() {
    const SLACK_NS: NonZeroU64 = NonZeroU64::new(1000).expect("not zero");
    if let Err(why) = rustix::thread::set_current_timer_slack(Some(SLACK_NS)) {
        tracing::debug!("waits end later than asked for: {why}");
    }
}

/// Runs the mirror in the foreground until SIGTERM or SIGINT.
pub fn run(config_path: &Path) -> anyhow::Result<()> {
    let mut config = Config::load(config_path)?;
    let state = StateDir::open(&config.node.state_dir)?;
    be_punctual();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("omirr")
        .max_blocking_threads(64)
        .build()
        .context("cannot start the worker threads")?;
    raise_file_limit();
    let mut pause = None;
    loop {
        let started = Instant::now();
        let ended = runtime.block_on(run_once(
            &config,
            config_path,
            &state,
            pause.unwrap_or(again::PAUSE_MIN),
        ));
        if started.elapsed() > again::PAUSE_MAX {
            pause = None;
        }
        let end = match (ended, pause) {
            (Err(error), Some(pause)) => {
                // It ran before, and other than a user's first start nobody is
                // there to read why it has ended.
                tracing::error!("cannot start again, trying on: {error:#}");
                runtime.block_on(async {
                    match tokio::time::timeout(pause, wait_for_end(config_path)).await {
                        Ok(end) => end,
                        Err(_elapsed) => Ok(End::Again),
                    }
                })?
            }
            (ended, _) => ended?,
        };
        match end {
            End::Stop => break,
            End::Reload(new) => config = *new,
            End::Again => {
                let next = pause.map_or(again::PAUSE_MIN, |pause| pause * 2);
                pause = Some(next.min(again::PAUSE_MAX));
            }
        }
    }
    service::stopping();
    runtime.shutdown_timeout(END_WITHIN);
    Ok(())
}

/// Detaches what a daemon with this configuration has left in the kernel; false
/// if there was nothing. Refuses while one runs.
pub fn unpin(config_path: &Path) -> anyhow::Result<bool> {
    let config = Config::load(config_path)?;
    let state = StateDir::open(&config.node.state_dir)?;
    let base = pins::base_of(state.path());
    pins::remove(&base).with_context(|| format!("{} cannot be removed; it takes root", base.display()))
}

/// How many inodes and directories the journal in `folder` names.
pub fn noted_changes(folder: &Path) -> std::io::Result<usize> {
    let (_, left) = journal::Journal::open(folder)?;
    Ok(left.inodes.len() + left.dirs.len())
}

/// The mirror with one configuration.
async fn run_once(
    config: &Config,
    config_path: &Path,
    state: &StateDir,
    pause: Duration,
) -> anyhow::Result<End> {
    let identity = Arc::new(Identity::load(&config.node.key)?);
    let (stop, stopped) = watch::channel(false);
    let mut shares = Vec::new();
    let mut keepers = BTreeMap::new();
    for (name, settings) in &config.shares {
        let (share, inputs) = open_share(config, identity.public_key(), name, settings, state.path())
            .with_context(|| format!("share {name} cannot be served"))?;
        if share.stopped().is_none() {
            let path = index_path(state.path(), name);
            if let Err(error) = recover::recover(&share, path.parent().unwrap_or(&path)) {
                if !share::is_passing(&error) {
                    return Err(error.context(format!("share {name} cannot be served")));
                }
                share.stop_because(&error.context("what the last run has left cannot be put in order"));
            }
        }
        let keeper = Keeper::new(
            Arc::clone(&share),
            inputs,
            stopped.clone(),
            tokio::runtime::Handle::current(),
        );
        let thread = std::thread::Builder::new()
            .name(format!("keep-{name}"))
            .spawn(move || run_keeper(keeper))
            .context("cannot start a thread")?;
        keepers.insert(name.clone(), thread);
        shares.push(share);
    }
    let shares: Arc<[Arc<Share>]> = shares.into();

    // Attach first, scan second: what changes during the scan is an event.
    let source = events::open(config, state.path(), &shares)?;
    tracing::info!(kind = source.about().kind, "{}", source.about().reason);
    let mut tasks = tokio::task::JoinSet::new();
    for share in shares.iter() {
        tasks.spawn(scanner::run(Arc::clone(share), stopped.clone()));
        tasks.spawn(belt::run(Arc::clone(share), stopped.clone()));
        for link in share.links.iter().filter(|link| link.mode.sends()) {
            tasks.spawn(sender::run(
                Arc::clone(share),
                Arc::clone(link),
                Arc::clone(&identity),
                stopped.clone(),
            ));
        }
    }
    let listener = Listener::bind(&config.node.listen).await?;
    tasks.spawn(listener::run(
        listener,
        Arc::clone(&identity),
        Arc::clone(&shares),
        stopped.clone(),
    ));
    let report = Arc::new(report::Report::new(
        &config.node.name,
        Arc::clone(&shares),
        Arc::clone(&source),
    ));
    let socket = control::bind(state)?;
    let mut ending = stopped.clone();
    tasks.spawn(control::serve(
        socket,
        Arc::clone(&report) as Arc<dyn control::ControlHandler>,
        async move {
            // Not being told any more is being told to end.
            let _ = ending.wait_for(|stop| *stop).await;
        },
    ));
    tasks.spawn(service::watchdog(report, stopped.clone()));
    service::ready();
    tracing::info!(node = %config.node.name, key = %identity.public_key(), listen = ?config.node.listen, "running");

    let folder = |name: &str| state.path().join("shares").join(name);
    let end = tokio::select! {
        end = wait_for_end(config_path) => end?,
        () = again::worth_it(Arc::clone(&shares), folder, pause) => End::Again,
    };
    stop.send_replace(true);
    drop(source);
    for share in shares.iter() {
        share.wake.notify_one();
    }
    let ended = tokio::time::timeout(END_WITHIN, async { while tasks.join_next().await.is_some() {} }).await;
    if ended.is_err() {
        tracing::warn!("some connections did not end within {} s", END_WITHIN.as_secs());
    }
    for (name, thread) in keepers {
        let joined =
            tokio::time::timeout(END_WITHIN, tokio::task::spawn_blocking(move || thread.join())).await;
        if joined.is_err() {
            tracing::warn!(share = %name, "the share's keeper did not end within {} s", END_WITHIN.as_secs());
        }
    }
    Ok(end)
}

/// Runs a keeper to its end. A panic in it, a damaged index say, stops its share
/// like any other error; the panic's own words are in the log.
fn run_keeper(keeper: Keeper) {
    let share = keeper.share();
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| keeper.run())).is_err() {
        share.index.freeze();
        share.stop(
            "its keeper met something impossible, which the log tells: restart omirr; if that does not help, the \
             index is damaged: remove it, and the share is compared anew"
                .to_owned(),
        );
    }
}

/// Waits for SIGTERM or SIGINT, or for SIGHUP with a configuration that is right.
async fn wait_for_end(config_path: &Path) -> anyhow::Result<End> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(End::Stop),
            _ = interrupt.recv() => return Ok(End::Stop),
            _ = hangup.recv() => {
                service::reloading();
                match Config::load(config_path) {
                    Ok(config) => {
                        tracing::info!("the configuration is read again");
                        return Ok(End::Reload(Box::new(config)));
                    }
                    Err(errors) => {
                        tracing::error!("the configuration is not taken, the old one stays: {errors}");
                        service::ready();
                    }
                }
            }
        }
    }
}

fn open_share(
    config: &Config,
    key: PublicKey,
    name: &str,
    settings: &crate::config::Share,
    state_dir: &Path,
) -> anyhow::Result<(Arc<Share>, tokio::sync::mpsc::Receiver<share::Input>)> {
    let root = ShareRoot::open(&settings.path)?.with_owners(settings.owners);
    let index = Index::open(&index_path(state_dir, name), &config.node.name)?;
    let identity = root.identity()?;
    let mut places = Vec::new();
    let known = index.meta();
    let opening = Opening::of(known.replica, known.head, index.gaps().to_vec(), now_ms());
    let path = index_path(state_dir, name);
    let home = Home::of(&path, *key.as_bytes())?;
    let copied = index.home().and_then(|known| home.differs_from(known));
    // Or again, if it had not ended: what it had not come to is as little known.
    let first_contact = known.head == 0 || index.is_comparing() || copied.is_some();
    index.write(|w| {
        for (peer, _) in &settings.peers {
            places.push(w.peer_place(config.peers[peer].key.as_bytes()));
        }
        let replica = w.meta().replica;
        for known in w.meta().names.iter_mut().filter(|known| known.0 == replica) {
            known.1.clone_from(&config.node.name);
        }
        w.set_gaps(opening.gaps.clone());
        if first_contact {
            w.set_comparing(true);
        }
        Ok(((), Durable::Yes))
    })?;
    crash::here(Point::PeersNoted);
    let meta = index.meta();
    let start = engine::start(AtStart {
        live: meta.live,
        index_is_copy: copied.is_some(),
        other_root: meta.root.is_some_and(|known| known != identity),
        root_is_empty: !root.has_entries(),
    });
    let mut stopped = None;
    match start {
        Start::GoOn => {
            index.write(|w| {
                w.meta().root = Some(identity);
                if index.home() != Some(&home) {
                    w.set_home(home);
                }
                Ok(((), Durable::Yes))
            })?;
            crash::here(Point::RootNoted);
        }
        Start::Doubt => {
            let doubted = doubt::doubt(&index, &root, &settings.excludes, home, &config.node.name)?;
            tracing::warn!(
                share = %name,
                "{} is a copy of an index: {}; it takes a new identity, and {} of its {} entries, which are not on \
                 disk as it has them, are compared with the peers as if they were new; nothing counts as deleted",
                path.display(),
                copied.unwrap_or_default(),
                doubted.forgotten,
                doubted.rows,
            );
        }
        // Another inode, or the same number on another filesystem: most likely
        // the share's filesystem is not mounted. Were it taken for the share,
        // everything in it would count as deleted.
        Start::OtherRoot => {
            stopped = Some(format!(
                "{} is not the directory that was mirrored before (is its filesystem mounted?); if it was replaced \
                 on purpose, stop omirr, remove {} and start it again: it will be compared anew and nothing is deleted",
                settings.path.display(),
                path.display()
            ));
        }
        Start::Emptied => {
            stopped = Some(format!(
                "{} is empty, and had {} entries when it was last mirrored (is its filesystem mounted?); to have it \
                 filled from the peers, stop omirr, remove {} and start it again; if it was emptied on purpose, make \
                 a file in it and start omirr again",
                settings.path.display(),
                meta.live - 1,
                path.display()
            ));
        }
    }
    let links = settings
        .peers
        .iter()
        .zip(places)
        .map(|((peer, mode), place)| {
            let settings = &config.peers[peer];
            Arc::new(Link {
                peer: peer.clone(),
                address: settings.address.clone(),
                key: *settings.key.as_bytes(),
                place,
                mode: *mode,
                reached: watch::Sender::default(),
                marks: Default::default(),
                alive: tokio::sync::Notify::new(),
                claims: Default::default(),
                budget: Budget::new(PEER_BYTES_MAX),
                state: Default::default(),
                clock: Default::default(),
            })
        })
        .collect();
    let opening = Opening {
        // It may have taken another.
        replica: index.replica(),
        ..opening
    };
    let (share, inputs) = Share::new(Parts {
        name: name.to_owned(),
        node: config.node.name.clone(),
        root,
        index,
        excludes: settings.excludes.clone(),
        policy: settings.conflicts,
        links,
        first_contact,
        opening,
        redos: Redos::new(state_dir.join("shares").join(name).join("redo")),
    });
    if let Some(reason) = stopped {
        share.stop(reason);
    }
    Ok((share, inputs))
}

fn index_path(state_dir: &Path, share: &str) -> PathBuf {
    state_dir.join("shares").join(share).join("index.redb")
}

/// A mirror holds many connections and directories open.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Not being allowed to is no reason to stop; opening a file may be.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    );
}
