//! What `omirr status`, `stats`, `wait`, `log` and `conflicts` are told.
//!
//! In: requests from the control socket. Out: the state of the shares as their
//! tasks show it; for `wait`, an answer once everything changed before it is
//! durable on the peers. Changes nothing but for the barrier that `wait`, `log` and
//! `conflicts` send through the event source.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::control::{
    Answer, ConflictsReport, ConflictsRequest, ControlHandler, Lacking, Lag, LogReport, LogRequest,
    MissingReport, PeerReport, PeerState, PendingItem, Percentiles, Progress, ShareFigures, ShareReport,
    ShareState, StatsReport, StatusReport, WaitReply, WaitRequest,
};
use super::overflow::{self, Losses};
use super::share::{Input, Link, Share};
use super::{conflicts, last_change};
use crate::source::Source;

/// Rows are counted up to here for `behind`; more is more.
const COUNTED_MAX: usize = 10_000_000;
/// How long `log` and `conflicts` wait for what has just been changed to be in the index.
const PATIENCE: Duration = Duration::from_secs(3);

pub struct Report {
    node: String,
    shares: Arc<[Arc<Share>]>,
    source: Arc<dyn Source>,
    started: Instant,
}

impl Report {
    pub fn new(node: &str, shares: Arc<[Arc<Share>]>, source: Arc<dyn Source>) -> Report {
        Report {
            node: node.to_owned(),
            shares,
            source,
            started: Instant::now(),
        }
    }

    /// The state in one line, for the service manager.
    pub fn line(&self) -> String {
        let states = self.shares.iter().map(|share| {
            let report = share_report(share);
            let behind: u64 = report.peers.iter().map(|peer| peer.behind).sum();
            match behind + report.pending {
                0 => format!("{} {}", report.name, report.state.name()),
                waiting => format!("{} {} ({waiting} to go)", report.name, report.state.name()),
            }
        });
        states.collect::<Vec<_>>().join(", ")
    }

    fn status_now(&self) -> StatusReport {
        StatusReport {
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            source: self.source.about().into(),
            shares: self.shares.iter().map(|share| share_report(share)).collect(),
        }
    }

    fn stats_now(&self) -> StatsReport {
        let mut report = StatsReport {
            uptime_s: self.started.elapsed().as_secs(),
            ..StatsReport::default()
        };
        let counted = self.source.stats();
        report.set_source(self.source.about(), &counted);
        let mut delays = Vec::new();
        let (mut lost, mut lost_at_ms) = (0, 0);
        for share in self.shares.iter() {
            let figures = &share.figures;
            let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            report.resolver.hits += get(&figures.resolved);
            report.resolver.misses += get(&figures.unresolved);
            report.resolver.fallbacks += get(&figures.unresolved);
            lost += get(&figures.lost);
            lost_at_ms = lost_at_ms.max(get(&figures.lost_at_ms));
            delays.extend(figures.row_delays.lock().iter().copied());
            report.shares.push(ShareFigures {
                name: share.name.clone(),
                rows_made: get(&figures.rows_made),
                rows_applied: get(&figures.rows_applied),
                content_sent_bytes: get(&figures.content_sent_bytes),
                content_received_bytes: get(&figures.content_received_bytes),
                rescans: get(&figures.rescans),
            });
        }
        delays.sort_unstable();
        let at = |part: f64| {
            let place = ((delays.len().checked_sub(1)?) as f64 * part).round() as usize;
            delays.get(place).map(|micros| f64::from(*micros) / 1000.0)
        };
        report.event_to_row_ms = Percentiles {
            p50: at(0.5),
            p99: at(0.99),
        };
        let losses = Losses {
            count: lost,
            at_ms: lost_at_ms,
        };
        report.overflow = overflow::report(self.source.about(), &counted, losses);
        report
    }

    async fn last_change_of(&self, request: LogRequest) -> Result<LogReport, String> {
        let (share, path) = last_change::find(&self.shares, &request)?;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let missing = caught_up(&share, Arc::clone(&self.source), PATIENCE, deadline).await;
        tokio::task::spawn_blocking(move || last_change::report(&share, &path, missing.err()))
            .await
            .map_err(|_| "the index could not be asked: see the daemon's log".to_owned())?
    }

    async fn conflicts_in(&self, request: ConflictsRequest) -> Result<ConflictsReport, String> {
        let asked = |share: &&Arc<Share>| request.share.as_ref().is_none_or(|name| share.name == *name);
        let shares: Vec<_> = self.shares.iter().filter(asked).cloned().collect();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let waits = shares.iter().map(|share| {
            let (share, source) = (Arc::clone(share), Arc::clone(&self.source));
            async move {
                let reason = caught_up(&share, source, PATIENCE, deadline).await.err()?;
                let share = share.name.clone();
                Some(MissingReport { share, reason })
            }
        });
        let missing = futures_in_order(waits).await.into_iter().flatten().collect();
        let found = tokio::task::spawn_blocking(move || conflicts::report(&shares))
            .await
            .map_err(|_| "the index could not be asked: see the daemon's log".to_owned())??;
        Ok(ConflictsReport { missing, ..found })
    }

    async fn wait_for(&self, request: WaitRequest) -> WaitReply {
        let timeout = Duration::from_millis(request.timeout_ms);
        let deadline = tokio::time::Instant::now() + timeout;
        let asked =
            |wanted: &Option<String>, name: &str| wanted.as_deref().is_none_or(|wanted| wanted == name);
        let shares: Vec<_> = self
            .shares
            .iter()
            .filter(|share| asked(&request.share, &share.name))
            .collect();
        let waits = shares.iter().map(|share| {
            let source = Arc::clone(&self.source);
            let links: Vec<_> = share
                .links
                .iter()
                .filter(|link| asked(&request.peer, &link.peer))
                .cloned()
                .collect();
            wait_for_share(Arc::clone(share), source, links, timeout, deadline)
        });
        let mut behind = Vec::new();
        for share in futures_in_order(waits).await {
            behind.extend(share);
        }
        WaitReply {
            done: behind.is_empty(),
            behind,
        }
    }
}

/// Runs them all at once and gives their results in order.
async fn futures_in_order<T: Send + 'static>(
    waits: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let tasks: Vec<_> = waits.map(tokio::spawn).collect();
    let mut results = Vec::with_capacity(tasks.len());
    for task in tasks {
        if let Ok(result) = task.await {
            results.push(result);
        }
    }
    results
}

/// Who has not everything of a share at the deadline.
async fn wait_for_share(
    share: Arc<Share>,
    source: Arc<dyn Source>,
    links: Vec<Arc<Link>>,
    timeout: Duration,
    deadline: tokio::time::Instant,
) -> Vec<Lag> {
    let everyone = |reason: &str| {
        let lag = |link: &Arc<Link>| Lag {
            share: share.name.clone(),
            peer: link.peer.clone(),
            behind: 0,
            reason: Some(reason.to_owned()),
        };
        links.iter().map(lag).collect::<Vec<_>>()
    };
    let head = match caught_up(&share, source, timeout, deadline).await {
        Ok(head) => head,
        Err(reason) => return everyone(&reason),
    };
    let mut behind = Vec::new();
    for link in links.iter().filter(|link| link.mode.sends()) {
        let mut reached = link.reached.subscribe();
        let reached = reached.wait_for(|reached| reached.upto() >= head);
        let reached = tokio::time::timeout_at(deadline, reached).await;
        if !matches!(reached, Ok(Ok(_))) {
            behind.push(Lag {
                share: share.name.clone(),
                peer: link.peer.clone(),
                behind: behind_of(&share, link),
                reason: lag_reason(link),
            });
        }
    }
    behind
}

/// Waits until everything changed before is in the index; says up to which row,
/// or why that is not so at the deadline.
async fn caught_up(
    share: &Share,
    source: Arc<dyn Source>,
    timeout: Duration,
    deadline: tokio::time::Instant,
) -> Result<u64, String> {
    if let Some(reason) = share.stopped() {
        return Err(format!("the share is stopped: {reason}"));
    }
    let barrier = tokio::task::spawn_blocking(move || source.barrier(timeout));
    match tokio::time::timeout_at(deadline, barrier).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => return Err(format!("the event source does not answer: {error:#}")),
        _ => return Err("the event source has not caught up".to_owned()),
    }
    let (done, looked) = oneshot::channel();
    if share.inputs.send(Input::Barrier(done)).await.is_err() {
        return Err("the share is stopped".to_owned());
    }
    share.wake.notify_one();
    let Ok(Ok(head)) = tokio::time::timeout_at(deadline, looked).await else {
        let left = share.dirty().len();
        let progress = share.progress.lock();
        return Err(match (progress.scanned, &progress.unread) {
            (false, _) => "the tree is still being compared with the index".to_owned(),
            (true, Some((1, why))) => format!("1 path cannot be looked at: {why}"),
            (true, Some((more, why))) => format!("{more} paths cannot be looked at, one because: {why}"),
            (true, None) => format!("{left} changed paths are still to be looked at"),
        });
    };
    Ok(head)
}

fn lag_reason(link: &Link) -> Option<String> {
    let state = link.state.lock();
    match (&state.last_error, state.connected) {
        (Some(error), _) => Some(error.clone()),
        (None, false) => Some("not connected".to_owned()),
        (None, true) => None,
    }
}

/// Rows that the peer has not acknowledged.
fn behind_of(share: &Share, link: &Link) -> u64 {
    if !link.mode.sends() {
        return 0;
    }
    let acked = link.reached.borrow().acked();
    if acked >= *share.head.borrow() {
        return 0;
    }
    share
        .index
        .read()
        .and_then(|reader| reader.count_after(acked, COUNTED_MAX))
        .unwrap_or(0)
}

fn share_report(share: &Share) -> ShareReport {
    let progress = share.progress.lock().clone();
    let meta = share.index.meta();
    let dirty = {
        let dirty = share.dirty();
        dirty.len() + dirty.in_hand()
    };
    let peers: Vec<PeerReport> = share
        .links
        .iter()
        .map(|link| {
            let state = link.state.lock().clone();
            let clock = *link.clock.lock();
            let connected = match link.mode.sends() {
                true => state.connected,
                false => link.claims.is_held(),
            };
            PeerReport {
                name: link.peer.clone(),
                address: link.address.clone(),
                mode: link.mode,
                state: match (&progress.stopped, connected) {
                    (Some(_), _) => PeerState::Stopped,
                    (None, true) => PeerState::Connected,
                    (None, false) => PeerState::Connecting,
                },
                behind: behind_of(share, link),
                last_error: state.last_error,
                clock_ahead_ms: clock.map(|offset| offset.ahead_ms),
                clock_warning: clock
                    .filter(|offset| offset.is_far())
                    .map(|offset| offset.sentence(&link.peer)),
            }
        })
        .collect();
    let at_rest = dirty == 0 && progress.pending == 0 && !progress.unsettled && !progress.recovering;
    let all_there = peers
        .iter()
        .all(|peer| peer.state == PeerState::Connected && peer.behind == 0);
    let state = match () {
        () if progress.stopped.is_some() => ShareState::Stopped,
        () if !progress.scanned => ShareState::Scanning,
        () if at_rest && all_there => ShareState::InSync,
        () => ShareState::Syncing,
    };
    ShareReport {
        name: share.name.clone(),
        path: share.root.path().display().to_string(),
        state,
        reason: progress.stopped,
        entries: meta.live,
        pending: progress.pending,
        conflicts: meta.conflicts,
        tombstones: meta.tombstones,
        lacking: lacking(meta.lacks),
        pending_items: progress
            .waiting
            .into_iter()
            .map(|waiting| PendingItem {
                path: waiting.path,
                peer: waiting.peer,
                reason: waiting.reason,
            })
            .collect(),
        progress: (!progress.scanned).then_some(Progress {
            done: progress.scan_seen,
            total: meta.live,
        }),
        peers,
    }
}

/// What this node cannot have, the most frequent first.
fn lacking(lacks: Vec<(Box<str>, u64)>) -> Vec<Lacking> {
    let mut lacking: Vec<Lacking> = lacks
        .into_iter()
        .map(|(reason, entries)| Lacking {
            reason: reason.into(),
            entries,
        })
        .collect();
    lacking.sort_by(|a, b| b.entries.cmp(&a.entries).then_with(|| a.reason.cmp(&b.reason)));
    lacking
}

impl ControlHandler for Report {
    fn status(&self) -> Answer<'_, StatusReport> {
        Box::pin(async { self.status_now() })
    }

    fn stats(&self) -> Answer<'_, StatsReport> {
        Box::pin(async { self.stats_now() })
    }

    fn wait(&self, request: WaitRequest) -> Answer<'_, WaitReply> {
        Box::pin(self.wait_for(request))
    }

    fn log(&self, request: LogRequest) -> Answer<'_, Result<LogReport, String>> {
        Box::pin(self.last_change_of(request))
    }

    fn conflicts(&self, request: ConflictsRequest) -> Answer<'_, Result<ConflictsReport, String>> {
        Box::pin(self.conflicts_in(request))
    }
}
