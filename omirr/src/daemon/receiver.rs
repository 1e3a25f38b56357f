//! Receiving a peer's rows of one share.
//!
//! In: an accepted connection. Out: batches and contents for the share's
//! keeper, and on the wire what the keeper has to say: acknowledgements and
//! requests for content. Nothing here decides or writes the tree, but for
//! contents that are staged in files without a name.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::bail;
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use tokio::sync::{mpsc, watch};

use super::budget::Held;
use super::share::{Arrival, Command, Figures, Inbound, Input, Share, Tries};
use crate::apply::{self, Ahead, ApplyError, DirFd, Ready, Staged};
use crate::content::{self, Assembler, ChunkSize, OwnChunks};
use crate::engine::{self, Verdict};
use crate::index::{IndexError, Reader};
use crate::model::{Entry, RelPath, Row};
use crate::net::{Connection, NetError, PublicKey, Turns};
use crate::wire::{Message, PROTOCOL, Part, WireRow};

/// Files that are asked for and not complete.
const FETCHES_MAX: usize = 16;
/// From this size on a file that is here in an older version is asked for by
/// the chunks that it lacks, bytes.
const DELTA_MIN: u64 = 256 << 10;
/// So many chunks are named in a request.
const HAVE_MAX: usize = 1 << 18;
/// Connections that one peer may have open for one share. It needs one; another
/// may still be there whose end this node has not heard of.
pub const INBOUND_MAX: usize = 2;
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that says nothing for so long is taken for gone; it pings.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Serves one accepted connection to its end.
pub async fn serve(
    mut connection: Connection,
    key: PublicKey,
    shares: &[Arc<Share>],
    mut stop: watch::Receiver<bool>,
) {
    let address = connection.peer_addr();
    if let Some(link) = shares.iter().find_map(|share| share.link_of(key.as_bytes())) {
        connection.set_peer_name(&link.peer);
    }
    let result = tokio::select! {
        _ = stop.wait_for(|stop| *stop) => return,
        result = session(connection, key, shares) => result,
    };
    if let Err(error) = result {
        tracing::warn!(from = %address, "a connection has ended: {error:#}");
    }
}

async fn session(connection: Connection, key: PublicKey, shares: &[Arc<Share>]) -> anyhow::Result<()> {
    let address = connection.peer_addr();
    let (mut reader, mut writer) = connection.split();
    let hello = match tokio::time::timeout(HELLO_TIMEOUT, reader.recv()).await {
        Ok(message) => message?,
        Err(_elapsed) => bail!("{address} does not say what it wants"),
    };
    let Message::Hello {
        protocol,
        software,
        node,
        share,
        replica,
        names,
        ..
    } = hello
    else {
        bail!(
            "{address} begins with a message of kind {}, not with hello",
            hello.name()
        );
    };
    let refuse = |reason: String| Message::Refuse { reason };
    if let Err(error) = crate::net::check_protocol(&format!("{node} ({address}, {software})"), protocol) {
        writer.send(&refuse(error.to_string())).await?;
        return Err(error.into());
    }
    let Some(share) = shares.iter().find(|candidate| candidate.name == share) else {
        let known: Vec<_> = shares.iter().map(|share| share.name.as_str()).collect();
        let reason = format!("there is no share {share:?} here, only {}", known.join(", "));
        writer.send(&refuse(reason.clone())).await?;
        bail!("{node} ({address}): {reason}");
    };
    let Some(link) = share.link_of(key.as_bytes()) else {
        let reason = format!(
            "share {} is not configured for you here: add your node to its peers",
            share.name
        );
        writer.send(&refuse(reason.clone())).await?;
        bail!("{node} ({address}): {reason}");
    };
    if let Some(reason) = share.stopped() {
        writer
            .send(&refuse(format!("share {} is stopped here: {reason}", share.name)))
            .await?;
        return Ok(());
    }
    let meta = share.index.meta();
    let known = &meta.peers[link.place as usize];
    let cursor = if known.replica == replica { known.cursor } else { 0 };
    let _ = share.inputs.send(Input::Names(names)).await;
    writer
        .send(&Message::Welcome {
            protocol: PROTOCOL,
            software: super::software(),
            node: share.node.clone(),
            replica: meta.replica,
            cursor,
            names: meta.names,
        })
        .await?;
    link.alive.notify_waiters();
    let turn = Turns::begin(&link.inbounds, ());
    tracing::info!(share = %share.name, peer = %link.peer, "receiving, from row {cursor} on");

    let (commands, mut orders) = mpsc::unbounded_channel();
    let inbound = Arc::new(Inbound {
        peer: link.peer.clone(),
        place: link.place,
        replica,
        commands,
        closed: AtomicBool::new(false),
    });
    let _closing = Closing {
        share: Arc::clone(share),
        inbound: Arc::clone(&inbound),
    };
    let mut fetches = Fetches::new(share, &inbound);
    // What is said goes by a task of its own: reading must not wait for writing,
    // or two nodes could wait for one another.
    let (say, mut to_say) = mpsc::unbounded_channel::<Message>();
    let mut writing = tokio::spawn(async move {
        while let Some(message) = to_say.recv().await {
            writer.send(&message).await?;
        }
        Ok::<(), NetError>(())
    });
    let mut last_upto = cursor;
    loop {
        tokio::select! {
            _ = turn.is_over() => bail!(
                "{} has dialled {INBOUND_MAX} times more since: only so many of its connections are served for share {}",
                link.peer, share.name
            ),
            ended = &mut writing => {
                ended??;
                bail!("the share is stopped here");
            }
            message = tokio::time::timeout(SILENCE_MAX, reader.recv()) => {
                let Ok(message) = message else { bail!("{} has said nothing for {} s", link.peer, SILENCE_MAX.as_secs()) };
                let message = message?;
                let held = link.budget.take(message.weight()).await;
                match message {
                    Message::Batch { upto, rows } => {
                        if upto < last_upto {
                            bail!("{} sends rows up to {upto} after row {last_upto}", link.peer);
                        }
                        last_upto = upto;
                        let bytes = rows.iter().filter_map(|row| row.inline.as_ref()).map(|inline| inline.len() as u64).sum();
                        Figures::add(&share.figures.content_received_bytes, bytes);
                        let rows = prepare(share, rows).await?;
                        let input = Input::Batch { inbound: Arc::clone(&inbound), upto, rows, held };
                        if share.inputs.send(input).await.is_err() {
                            bail!("the share is stopped here");
                        }
                    }
                    Message::Content { id, parts, last } => fetches.answer(id, Piece::Parts { parts, last, held }).await?,
                    Message::Gone { id, reason } => fetches.answer(id, Piece::Gone(reason)).await?,
                    Message::Ping => drop(say.send(Message::Pong { clock_ms: super::now_ms() })),
                    other => bail!("{} sends a message of kind {}, which is not for this node to receive", link.peer, other.name()),
                }
            }
            Some(order) = orders.recv() => match order {
                Command::Ack { durable, pending, reason } => {
                    drop(say.send(Message::Ack { durable, pending, reason }));
                }
                Command::Want { path, seq, entry } => fetches.queue.push_back(Wanted { path, seq, entry }),
            },
            else => bail!("the share is stopped here"),
        }
        fetches.start(&say);
    }
}

/// So many rows are prepared on the spot: another thread would cost more.
const PREPARED_HERE: usize = 4;

/// Stages the contents that came with rows, while the keeper is at work on
/// earlier ones.
async fn prepare(share: &Arc<Share>, rows: Vec<WireRow>) -> anyhow::Result<Vec<Arrival>> {
    if rows.len() <= PREPARED_HERE {
        return Ok(stage_ahead(share, rows)?);
    }
    let share = Arc::clone(share);
    Ok(tokio::task::spawn_blocking(move || stage_ahead(&share, rows)).await??)
}

/// Stages what will most likely be asked for. Whether it is, the keeper
/// decides; what went wrong here, it meets again and tells.
fn stage_ahead(share: &Share, rows: Vec<WireRow>) -> Result<Vec<Arrival>, IndexError> {
    let reader = share.index.read()?;
    let dirs = share.root.batch();
    let mut ahead = Ahead::new(&dirs);
    let mut jobs = Vec::with_capacity(rows.len());
    for row in rows {
        let place = match wants_content(share, &reader, &row)? {
            true => ahead.place(&row.path).ok(),
            false => None,
        };
        jobs.push((row, place));
    }
    let stage = |(mut row, place): (WireRow, Option<DirFd>)| {
        let ready = place.and_then(|place| stage_inline(&ahead, &place, &row).ok().flatten());
        if ready.is_some() {
            row.inline = None;
        }
        Arrival {
            row,
            ready,
            tries: Tries::default(),
        }
    };
    Ok(if jobs.len() <= PREPARED_HERE {
        jobs.into_iter().map(stage).collect()
    } else {
        jobs.into_par_iter().with_min_len(4).map(stage).collect()
    })
}

/// Whether the row's content came with it and is to become a file of its own.
fn wants_content(share: &Share, reader: &Reader, row: &WireRow) -> Result<bool, IndexError> {
    let entry = &row.row.entry;
    if row.inline.is_none() || entry.link.is_some() || share.is_excluded(&row.path, false) {
        return Ok(false);
    }
    let local = reader.get(&row.path)?.map(|record| record.row);
    let here = local.as_ref().and_then(Row::live);
    let verdict = engine::remote_row(&row.path, local.as_ref(), &row.row, share.policy);
    Ok(matches!(verdict, Verdict::Take(_)) && here.is_none_or(|here| here.kind != entry.kind))
}

fn stage_inline(ahead: &Ahead<'_, '_>, place: &DirFd, row: &WireRow) -> Result<Option<Ready>, ApplyError> {
    let Some(inline) = &row.inline else {
        return Ok(None);
    };
    let Some(mut staged) = ahead.stage(place, &row.path)? else {
        return Ok(None);
    };
    staged.append(inline)?;
    staged.finish(&row.row.entry).map(Some)
}

/// Tells the keeper when the connection ends, however it ends.
struct Closing {
    share: Arc<Share>,
    inbound: Arc<Inbound>,
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.inbound.closed.store(true, Ordering::Release);
        let (share, inbound) = (Arc::clone(&self.share), Arc::clone(&self.inbound));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let _ = share.inputs.send(Input::Closed { inbound }).await;
            });
        }
    }
}

/// A file that is to be fetched.
struct Wanted {
    path: RelPath,
    seq: u64,
    entry: Entry,
}

/// What the sender answers to a request, in order.
enum Piece {
    Parts {
        parts: Vec<Part>,
        last: bool,
        /// Given back when they are written.
        held: Held,
    },
    Gone(String),
}

/// The contents that are on their way.
struct Fetches {
    share: Arc<Share>,
    inbound: Arc<Inbound>,
    next_id: u64,
    queue: VecDeque<Wanted>,
    /// By id: where the answer goes.
    open: FxHashMap<u64, mpsc::Sender<Piece>>,
}

impl Fetches {
    fn new(share: &Arc<Share>, inbound: &Arc<Inbound>) -> Fetches {
        Fetches {
            share: Arc::clone(share),
            inbound: Arc::clone(inbound),
            next_id: 0,
            queue: VecDeque::new(),
            open: FxHashMap::default(),
        }
    }

    /// Begins fetching what is queued, as far as the limit allows.
    fn start(&mut self, asked: &mpsc::UnboundedSender<Message>) {
        // One that has given up, on a full disk say, makes room.
        self.open.retain(|_, pieces| !pieces.is_closed());
        while self.open.len() < FETCHES_MAX {
            let Some(wanted) = self.queue.pop_front() else {
                return;
            };
            let id = self.next_id;
            self.next_id += 1;
            let (pieces, incoming) = mpsc::channel(4);
            self.open.insert(id, pieces);
            let (share, inbound, asked) = (Arc::clone(&self.share), Arc::clone(&self.inbound), asked.clone());
            tokio::task::spawn_blocking(move || {
                let outcome =
                    fetch(&share, id, &wanted, &asked, incoming).map_err(|error| format!("{error:#}"));
                let Wanted { path, seq, .. } = wanted;
                if !inbound.closed.load(Ordering::Acquire) {
                    // The keeper has ended if this fails; nothing waits then.
                    let _ = share.inputs.blocking_send(Input::Content {
                        inbound,
                        path,
                        seq,
                        outcome,
                    });
                }
            });
        }
    }

    async fn answer(&mut self, id: u64, piece: Piece) -> anyhow::Result<()> {
        let last = !matches!(piece, Piece::Parts { last: false, .. });
        let Some(pieces) = self.open.get(&id) else {
            if id < self.next_id {
                // For one that has given up.
                return Ok(());
            }
            bail!("{} sends content that was not asked for", self.inbound.peer);
        };
        // It may give up at this moment.
        let _ = pieces.send(piece).await;
        if last {
            self.open.remove(&id);
        }
        Ok(())
    }
}

/// Asks for one file and stages it; returns when it is complete and as the row
/// says.
fn fetch(
    share: &Share,
    id: u64,
    wanted: &Wanted,
    asked: &mpsc::UnboundedSender<Message>,
    mut incoming: mpsc::Receiver<Piece>,
) -> anyhow::Result<Ready> {
    let Some((size, hash)) = wanted.entry.content() else {
        bail!("{} has no content to be fetched", wanted.path);
    };
    let dirs = share.root.batch();
    let staged = apply::stage_file(&dirs, &wanted.path)?;
    let mut own = None;
    if size >= DELTA_MIN
        && let Ok(base) = apply::open_file(&dirs, &wanted.path)
    {
        let chunks = content::chunk_list(&base, ChunkSize::for_file(size), HAVE_MAX)?;
        own = Some(OwnChunks::new(base, chunks));
    }
    let have = own.as_ref().map(OwnChunks::ids).unwrap_or_default();
    asked.send(Message::Want {
        id,
        path: wanted.path.clone(),
        size,
        hash,
        have,
    })?;
    let mut assembler = Assembler::new(InOrder(staged), size, hash, own)?;
    loop {
        let (parts, last, _held) = match incoming.blocking_recv() {
            Some(Piece::Parts { parts, last, held }) => (parts, last, held),
            Some(Piece::Gone(reason)) => bail!("{reason}"),
            None => bail!("the connection has ended"),
        };
        let bytes = parts.iter().map(Part::data_bytes).sum();
        Figures::add(&share.figures.content_received_bytes, bytes);
        assembler.take(&parts)?;
        if last {
            let InOrder(mut staged) = assembler.finish()?;
            if staged.len() < size {
                staged.hole(size - staged.len())?;
            }
            return Ok(staged.finish(&wanted.entry)?);
        }
    }
}

/// A staged file as the assembler fills it: front to back.
struct InOrder(Staged);

impl content::Sink for InOrder {
    fn write_at(&mut self, bytes: &[u8], at: u64) -> std::io::Result<()> {
        if at > self.0.len() {
            self.0.hole(at - self.0.len()).map_err(std::io::Error::other)?;
        }
        self.0.append(bytes).map_err(std::io::Error::other)
    }

    /// The file gets its length when it is finished, holes at its end included.
    fn set_len(&mut self, _bytes: u64) -> std::io::Result<()> {
        Ok(())
    }
}
