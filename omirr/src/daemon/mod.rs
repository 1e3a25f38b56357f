//! The tasks that join the rooms.
//!
//! In: a configuration. Out: a running mirror, until SIGTERM. For each share
//! there is one keeper thread (`keeper`), which alone writes its index and its
//! tree; a scanner (`scanner`), which compares tree and index; for each of its
//! peers a sender (`sender`), and for each connection a peer has made a
//! receiver (`receiver`). One event source serves all shares (`events`).
//! Decisions are the engine's; here is only who talks to whom, and when to end.

mod conflicts;
pub mod control;
mod dirty;
mod events;
mod journal;
mod keeper;
mod last_change;
mod listener;
mod local;
mod look;
mod memory;
mod overflow;
mod receiver;
mod recent;
mod recover;
mod recovered;
mod remote;
mod report;
mod scanner;
mod sender;
mod service;
mod share;
mod state_dir;
mod steps;
mod who;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::apply::ShareRoot;
use crate::config::Config;
use crate::crash::{self, Point};
use crate::index::{Durable, Index};
use crate::net::{Identity, Listener};
use crate::source::ebpf::pins;
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
}

/// Runs the mirror in the foreground until SIGTERM or SIGINT.
pub fn run(config_path: &Path) -> anyhow::Result<()> {
    let mut config = Config::load(config_path)?;
    let state = StateDir::open(&config.node.state_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("omirr")
        .max_blocking_threads(64)
        .build()
        .context("cannot start the worker threads")?;
    raise_file_limit();
    loop {
        let end = runtime.block_on(run_once(&config, config_path, &state))?;
        match end {
            End::Stop => break,
            End::Reload(new) => config = *new,
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

/// The mirror with one configuration.
async fn run_once(config: &Config, config_path: &Path, state: &StateDir) -> anyhow::Result<End> {
    let identity = Arc::new(Identity::load(&config.node.key)?);
    let (stop, stopped) = watch::channel(false);
    let mut shares = Vec::new();
    let mut keepers = BTreeMap::new();
    for (name, settings) in &config.shares {
        let (share, inputs) = open_share(config, name, settings, state.path())
            .with_context(|| format!("share {name} cannot be served"))?;
        if share.stopped().is_none() {
            let path = index_path(state.path(), name);
            recover::recover(&share, path.parent().unwrap_or(&path))
                .with_context(|| format!("share {name} cannot be served"))?;
        }
        let keeper = Keeper::new(
            Arc::clone(&share),
            inputs,
            stopped.clone(),
            tokio::runtime::Handle::current(),
        );
        let thread = std::thread::Builder::new()
            .name(format!("keep-{name}"))
            .spawn(move || keeper.run())
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
        for link in &share.links {
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

    let end = wait_for_end(config_path).await?;
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
    name: &str,
    settings: &crate::config::Share,
    state_dir: &Path,
) -> anyhow::Result<(Arc<Share>, tokio::sync::mpsc::Receiver<share::Input>)> {
    let root = ShareRoot::open(&settings.path)?;
    let index = Index::open(&index_path(state_dir, name), &config.node.name)?;
    let identity = root.identity()?;
    let mut places = Vec::new();
    index.write(|w| {
        for peer in &settings.peers {
            places.push(w.peer_place(config.peers[peer].key.as_bytes()));
        }
        let replica = w.meta().replica;
        for known in w.meta().names.iter_mut().filter(|known| known.0 == replica) {
            known.1.clone_from(&config.node.name);
        }
        Ok(((), Durable::Yes))
    })?;
    crash::here(Point::PeersNoted);
    let meta = index.meta();
    let links = settings
        .peers
        .iter()
        .zip(places)
        .map(|(peer, place)| {
            let settings = &config.peers[peer];
            Arc::new(Link {
                peer: peer.clone(),
                address: settings.address.clone(),
                key: *settings.key.as_bytes(),
                place,
                acked: watch::Sender::new(0),
                alive: tokio::sync::Notify::new(),
                state: Default::default(),
                clock: Default::default(),
            })
        })
        .collect();
    let (share, inputs) = Share::new(Parts {
        name: name.to_owned(),
        node: config.node.name.clone(),
        root,
        index,
        excludes: settings.excludes.clone(),
        policy: settings.conflicts,
        links,
    });
    match meta.root {
        // Another inode, or the same number on another filesystem: most likely
        // the share's filesystem is not mounted. Were it taken for the share,
        // everything in it would count as deleted.
        Some(known) if known != identity && meta.live > 1 => share.stop(format!(
            "{} is not the directory that was mirrored before (is its filesystem mounted?); if it was replaced on \
             purpose, stop omirr, remove {} and start it again: it will be compared anew and nothing is deleted",
            settings.path.display(),
            index_path(state_dir, name).display()
        )),
        Some(known) if known == identity => {}
        _ => {
            share.index.write(|w| {
                w.meta().root = Some(identity);
                Ok(((), Durable::Yes))
            })?;
            crash::here(Point::RootNoted);
        }
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
