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
use bytes::Bytes;
use rustc_hash::FxHashMap;
use tokio::sync::{mpsc, watch};

use super::budget::Held;
use super::patches;
use super::sender::INLINE_MAX;
use super::share::{Arrival, Command, Fetched, Figures, Inbound, Input, Share, Tries};
use crate::apply::{self, Ahead, ApplyError, DirFd, Ready, Staged};
use crate::content::{self, Assembler, ChunkSize, OwnChunks};
use crate::engine::{self, Verdict};
use crate::index::{IndexError, Reader};
use crate::model::{Entry, RelPath, Row};
use crate::net::{Connection, NetError, PublicKey};
use crate::parallel;
use crate::wire::{Message, PROTOCOL, Part, WireRow};

/// Files that are asked for and not complete.
const FETCHES_MAX: usize = 16;
/// As many that are small: together they take 16 MiB of memory at most, and a
/// sender takes twice as many requests at once.
const SMALL_MAX: usize = 512;
const SMALL_BYTES_MAX: u64 = 16 << 20;
/// From this size on a file that is here in an older version is asked for by
/// the chunks that it lacks, bytes.
const DELTA_MIN: u64 = 256 << 10;
/// So many chunks are named in a request.
const HAVE_MAX: usize = 1 << 18;
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
    if !link.mode.receives() {
        // The peer tells its operator, who sees to it; it will go on asking.
        let reason = format!(
            "{} only sends share {} and takes no changes of yours (its mode is \"send\"): say mode = \"receive\" for it in \
             your configuration, or have it say \"both\"",
            share.node, share.name
        );
        writer.send(&refuse(reason)).await?;
        return Ok(());
    }
    if let Some(reason) = share.stopped() {
        writer
            .send(&refuse(format!("share {} is stopped here: {reason}", share.name)))
            .await?;
        return Ok(());
    }
    let claim = match link.claims.take(address.to_string()).await {
        Ok(claim) => claim,
        Err(other) => {
            let reason = format!(
                "{} is connected already, from {other}, and this is another node with its key: was it cloned? Give one \
                 of them a key of its own (omirr key generate) and add it to its peers' configurations",
                link.peer
            );
            writer.send(&refuse(reason.clone())).await?;
            bail!("{node} ({address}): {reason}");
        }
    };
    let meta = share.index.meta();
    let known = &meta.peers[link.place as usize];
    let cursor = if known.replica == replica { known.cursor } else { 0 };
    // Of two trees that meet for the first time most is the same, or all.
    let bare = cursor == 0 && (meta.live > 1 || share.root.has_entries());
    let _ = share.inputs.send(Input::Names(names)).await;
    writer
        .send(&Message::Welcome {
            protocol: PROTOCOL,
            software: super::software(),
            node: share.node.clone(),
            replica: meta.replica,
            cursor,
            bare,
            names: meta.names,
            head: meta.head,
        })
        .await?;
    link.alive.notify_waiters();
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
    // How often the sender was asked to begin again and has not done so yet.
    let mut plains = 0u32;
    loop {
        tokio::select! {
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
                    Message::Differs { id, leaves } => fetches.answer(id, Piece::Differs(leaves)).await?,
                    Message::Again { after } => {
                        if plains == 0 {
                            bail!("{} begins again after row {after} without being asked to", link.peer);
                        }
                        plains -= 1;
                        last_upto = after;
                        let input = Input::Again { inbound: Arc::clone(&inbound) };
                        if share.inputs.send(input).await.is_err() {
                            bail!("the share is stopped here");
                        }
                    }
                    // Only asked for on a second node's account.
                    Message::Pong { .. } => claim.is_alive(),
                    Message::Ping => drop(say.send(Message::Pong { clock_ms: super::now_ms() })),
                    other => bail!("{} sends a message of kind {}, which is not for this node to receive", link.peer, other.name()),
                }
            }
            () = claim.asked() => drop(say.send(Message::Ping)),
            () = claim.given_up() => bail!("{} has connected anew, and does not answer here", link.peer),
            Some(order) = orders.recv() => match order {
                Command::Ack { durable, pending, reason, head } => {
                    drop(say.send(Message::Ack { durable, pending, reason, head }));
                }
                Command::Plain { after, upto } => {
                    plains += 1;
                    drop(say.send(Message::Plain { after, upto }));
                }
                Command::Want { path, seq, entry, bases, compare } => fetches.add(Wanted { path, seq, entry, bases, compare }),
            },
            else => bail!("the share is stopped here"),
        }
        fetches.start(&say);
    }
}

/// So many rows are prepared on the spot: another thread would cost more.
const PREPARED_HERE: usize = 16;

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
    Ok(parallel::map(jobs, PREPARED_HERE, stage))
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
    let Some(mut staged) = ahead.stage(place, &row.path, &row.row.entry)? else {
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
    bases: Vec<RelPath>,
    compare: bool,
}

impl Wanted {
    /// Bytes of content.
    fn size(&self) -> u64 {
        self.entry.content().map_or(0, |(size, _)| size)
    }
}

/// What the sender answers to a request, in order.
pub(super) enum Piece {
    Parts {
        parts: Vec<Part>,
        last: bool,
        /// Given back when they are written.
        held: Held,
    },
    Gone(String),
    /// Which leaves differ from what is here, if that can be told.
    Differs(Option<Vec<u64>>),
}

/// The contents that are on their way.
///
/// What a batch could have carried is put together in memory, since a tree of
/// small files that is asked for must not cost a thread and a round trip each;
/// what is bigger goes to a file as it comes.
struct Fetches {
    share: Arc<Share>,
    inbound: Arc<Inbound>,
    next_id: u64,
    queue: VecDeque<Wanted>,
    small: VecDeque<Wanted>,
    /// By id: where the answer goes.
    open: FxHashMap<u64, mpsc::Sender<Piece>>,
    open_small: FxHashMap<u64, (Wanted, Vec<u8>)>,
    /// What those will be together, bytes.
    small_bytes: u64,
}

impl Fetches {
    fn new(share: &Arc<Share>, inbound: &Arc<Inbound>) -> Fetches {
        Fetches {
            share: Arc::clone(share),
            inbound: Arc::clone(inbound),
            next_id: 0,
            queue: VecDeque::new(),
            small: VecDeque::new(),
            open: FxHashMap::default(),
            open_small: FxHashMap::default(),
            small_bytes: 0,
        }
    }

    fn add(&mut self, wanted: Wanted) {
        match wanted.size() <= INLINE_MAX {
            true => self.small.push_back(wanted),
            false => self.queue.push_back(wanted),
        }
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Begins fetching what is queued, as far as the limits allow.
    fn start(&mut self, asked: &mpsc::UnboundedSender<Message>) {
        while self.open_small.len() < SMALL_MAX && self.small_bytes < SMALL_BYTES_MAX {
            let Some(wanted) = self.small.pop_front() else {
                break;
            };
            let Some((size, hash)) = wanted.entry.content() else {
                continue;
            };
            let id = self.next_id();
            let want = Message::Want {
                id,
                path: wanted.path.clone(),
                size,
                hash,
                have: Vec::new(),
            };
            // A connection that has ended delivers nothing, and all begins anew
            // with the next one.
            drop(asked.send(want));
            self.small_bytes += size;
            self.open_small.insert(id, (wanted, Vec::new()));
        }
        // One that has given up, on a full disk say, makes room.
        self.open.retain(|_, pieces| !pieces.is_closed());
        while self.open.len() < FETCHES_MAX {
            let Some(wanted) = self.queue.pop_front() else {
                return;
            };
            let id = self.next_id();
            let (pieces, incoming) = mpsc::channel(4);
            self.open.insert(id, pieces);
            let (share, inbound, asked) = (Arc::clone(&self.share), Arc::clone(&self.inbound), asked.clone());
            tokio::task::spawn_blocking(move || {
                let outcome = fetch(&share, id, &wanted, &asked, incoming)
                    .map(Fetched::Staged)
                    .map_err(|error| format!("{error:#}"));
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
        let last = !matches!(piece, Piece::Parts { last: false, .. } | Piece::Differs(_));
        if let Some((wanted, content)) = self.open_small.remove(&id) {
            return self.answer_small(id, wanted, content, piece).await;
        }
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

    async fn answer_small(
        &mut self,
        id: u64,
        wanted: Wanted,
        mut content: Vec<u8>,
        piece: Piece,
    ) -> anyhow::Result<()> {
        let outcome = match piece {
            Piece::Gone(reason) => Err(reason),
            Piece::Differs(_) => Err(format!("{} was not to be compared", wanted.path)),
            Piece::Parts { parts, last, held: _ } => {
                let bytes = parts.iter().map(Part::data_bytes).sum();
                Figures::add(&self.share.figures.content_received_bytes, bytes);
                match put_together(&wanted, &mut content, &parts, last) {
                    Err(reason) => Err(reason),
                    Ok(()) if last => Ok(Fetched::Whole(Bytes::from(content))),
                    Ok(()) => {
                        self.open_small.insert(id, (wanted, content));
                        return Ok(());
                    }
                }
            }
        };
        self.small_bytes -= wanted.size();
        let Wanted { path, seq, .. } = wanted;
        let inbound = Arc::clone(&self.inbound);
        let input = Input::Content {
            inbound,
            path,
            seq,
            outcome,
        };
        if self.share.inputs.send(input).await.is_err() {
            bail!("the share is stopped here");
        }
        Ok(())
    }
}

/// Adds parts to a small content; the last ones must complete it.
fn put_together(wanted: &Wanted, content: &mut Vec<u8>, parts: &[Part], last: bool) -> Result<(), String> {
    let Some((size, hash)) = wanted.entry.content() else {
        return Err(format!("{} has no content to be fetched", wanted.path));
    };
    for part in parts {
        let left = size - content.len() as u64;
        match part {
            Part::Data(data) if data.len() as u64 <= left => content.extend_from_slice(data),
            Part::Hole(bytes) if *bytes <= left => {
                content.resize(content.len() + usize::try_from(*bytes).unwrap_or(0), 0);
            }
            _ => {
                return Err(format!(
                    "{} was sent with other content than announced",
                    wanted.path
                ));
            }
        }
    }
    if last && (content.len() as u64 != size || content::hash_bytes(content) != hash) {
        return Err(format!(
            "{} was sent with other content than announced",
            wanted.path
        ));
    }
    Ok(())
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
    if wanted.compare
        && let Some(ready) = patches::fetch(share, id, &wanted.path, &wanted.entry, asked, &mut incoming)?
    {
        return Ok(ready);
    }
    let dirs = share.root.batch();
    let staged = apply::stage_file(&dirs, &wanted.path, &wanted.entry)?;
    let mut own = OwnChunks::default();
    // What is gone meanwhile only costs its transfer.
    let bases = wanted.bases.iter().filter(|_| size >= DELTA_MIN);
    for base in bases.filter_map(|base| apply::open_file(&dirs, base).ok()) {
        let chunks = content::chunk_list(&base, ChunkSize::for_file(size), HAVE_MAX - own.len())?;
        own.add(base, chunks);
    }
    let have = own.ids();
    asked.send(Message::Want {
        id,
        path: wanted.path.clone(),
        size,
        hash,
        have,
    })?;
    let mut assembler = Assembler::new(InOrder(staged), size, hash, Some(own))?;
    loop {
        let (parts, last, _held) = match incoming.blocking_recv() {
            Some(Piece::Parts { parts, last, held }) => (parts, last, held),
            Some(Piece::Gone(reason)) => bail!("{reason}"),
            Some(Piece::Differs(_)) => bail!("{} was not to be compared", wanted.path),
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

    /// By `Staged::finish`.
    fn is_checked_later(&self) -> bool {
        true
    }
}
