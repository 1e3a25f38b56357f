//! Sending a share's rows to one peer.
//!
//! In: the durable head of the index, and what the peer asks for. Out: batches
//! in sequence order from the peer's cursor on, contents, and the peer's
//! acknowledgements in its [`Link`]. Nothing here writes the index or the tree.
//! One task per peer and share: a peer that is slow or gone delays nobody.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use lru::LruCache;
use tokio::sync::{mpsc, watch};

use super::differences::{self, CompareJob, Compared, Comparisons};
use super::share::{Figures, Input, Link, Share};
use crate::apply::{self, Dirs};
use crate::content::{self, ChunkId};
use crate::engine::{Claim, Offset, Outgoing, Reached};
use crate::index::IndexError;
use crate::model::{Entry, Hash, Record, RelPath, Sketch};
use crate::net::{self, Identity, NetError, PublicKey};
use crate::parallel;
use crate::wire::{Message, PROTOCOL, Part, WireRow};

/// Contents up to this many bytes travel with their row.
pub const INLINE_MAX: u64 = 128 << 10;
/// A batch is closed at so many rows or bytes of content.
const BATCH_ROWS: usize = 1024;
const BATCH_BYTES: usize = 1 << 20;
/// So many rows are made a batch on the spot: another thread would cost more.
const BUILT_HERE: u64 = 4;
/// What a row takes without its content, paths and attributes, about, bytes.
const ROW_BYTES: usize = 200;
/// Rows to be sent are counted up to this.
const COUNTED_MAX: usize = 1_000_000;
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
const PING_EVERY: Duration = Duration::from_secs(5);
/// A peer that says nothing for so long is taken for gone.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Sends until `stop` turns true; reconnects for ever.
pub async fn run(
    share: Arc<Share>,
    link: Arc<Link>,
    identity: Arc<Identity>,
    mut stop: watch::Receiver<bool>,
) {
    let mut pause = RETRY_MIN;
    loop {
        let started = std::time::Instant::now();
        let error = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            result = session(&share, &link, &identity) => match result {
                Ok(never) => match never {},
                Err(error) => error,
            },
        };
        if started.elapsed() > Duration::from_secs(10) {
            pause = RETRY_MIN;
        }
        let text = format!("{error:#}");
        {
            let mut state = link.state.lock();
            if state.last_error.as_ref() != Some(&text) {
                tracing::warn!(share = %share.name, peer = %link.peer, "cannot send: {text}; trying again");
            }
            state.connected = false;
            state.last_error = Some(text);
        }
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(RETRY_MAX),
            () = link.alive.notified() => pause = RETRY_MIN,
        }
    }
}

enum Never {}

/// One connection, from dialling to its end.
async fn session(share: &Arc<Share>, link: &Arc<Link>, identity: &Identity) -> anyhow::Result<Never> {
    let mut connection = net::dial(&link.address, identity, &PublicKey::from(link.key), DIAL_TIMEOUT).await?;
    connection.set_peer_name(&link.peer);
    let (mut reader, mut writer) = connection.split();
    let meta = share.index.meta();
    let durable = share.index.durable_head();
    writer
        .send(&Message::Hello {
            protocol: PROTOCOL,
            software: super::software(),
            node: share.node.clone(),
            share: share.name.clone(),
            replica: meta.replica,
            head: durable,
            names: meta.names,
        })
        .await?;
    let answer = tokio::time::timeout(DIAL_TIMEOUT, reader.recv())
        .await
        .context("the peer does not answer")??;
    let (cursor, bare) = match answer {
        Message::Welcome {
            protocol,
            cursor,
            bare,
            names,
            replica,
            head,
            ..
        } => {
            net::check_protocol(&link.peer, protocol)?;
            link.marks.lock().connected(replica, cursor, head);
            let _ = share.inputs.send(Input::Names(names)).await;
            (cursor, bare)
        }
        Message::Refuse { reason } => bail!("{} refuses: {reason}", link.peer),
        other => bail!(
            "{} answers hello with a message of kind {}",
            link.peer,
            other.name()
        ),
    };
    match share.opening.claim(meta.replica, cursor, durable) {
        Claim::Fits => {}
        Claim::Impossible => bail!(
            "{} claims rows up to {cursor} of an index that this node has begun since it started and that ends at \
             {durable}: it cannot have them",
            link.peer
        ),
        Claim::SetBack(gap) => {
            let _ = share.inputs.send(Input::Renew(gap)).await;
            bail!(
                "{} has rows up to {cursor} of this node's index, which ended at {}: the index was restored from a copy; it \
                 gets a new identity and everything is compared again",
                link.peer,
                gap.after
            );
        }
    }
    {
        let mut state = link.state.lock();
        let to_send = share.index.read_durable()?.1.count_after(cursor, COUNTED_MAX)?;
        tracing::info!(share = %share.name, peer = %link.peer, "connected; {to_send} to send");
        *state = super::share::LinkState {
            connected: true,
            ..Default::default()
        };
    }
    link.reached.send_modify(|reached| reached.connected(cursor));

    // One task prepares batches, one prepares contents, one reads what the peer
    // says, and this one writes: small changes before big contents. Reading
    // must not wait for writing, or two nodes could wait for one another.
    let (batches, mut ready) = mpsc::channel::<Message>(2);
    let (wants, wanted) = mpsc::channel::<Job>(1024);
    let (pieces, mut content) = mpsc::channel::<Message>(4);
    let (plains, plain) = mpsc::channel::<(u64, u64)>(16);
    let (said, mut heard_of) = mpsc::channel::<Result<Message, NetError>>(1024);
    // Of what is already here the peer gets its own rows, too: it lacks them if
    // it has lost its index, or if that was restored from a copy.
    let outgoing = Outgoing::new(link.place, cursor, durable);
    // What changes from now on the peer cannot have; what is found by comparing
    // it may.
    let bare_upto = bare.then_some(durable);
    let _tasks = Tasks(vec![
        tokio::spawn(prepare_batches(
            Arc::clone(share),
            Arc::clone(link),
            outgoing,
            cursor,
            bare_upto,
            batches,
            plain,
        )),
        tokio::spawn(prepare_contents(Arc::clone(share), wanted, pieces)),
        tokio::spawn(async move {
            loop {
                let message = reader.recv().await;
                let last = message.is_err();
                if said.send(message).await.is_err() || last {
                    return;
                }
            }
        }),
    ]);
    let mut ping = tokio::time::interval(PING_EVERY);
    let mut heard = tokio::time::Instant::now();
    // When the pings were sent that are still to be answered, ms since 1970.
    let mut asked = std::collections::VecDeque::new();
    loop {
        tokio::select! {
            biased;
            Some(message) = heard_of.recv() => {
                heard = tokio::time::Instant::now();
                match message? {
                    Message::Ack { durable, pending, reason, head } => {
                        if durable > share.index.durable_head() {
                            bail!("{} acknowledges row {durable}, which it was never sent", link.peer);
                        }
                        let mut state = link.state.lock();
                        state.pending = pending;
                        state.last_error = reason;
                        drop(state);
                        link.marks.lock().acknowledged(durable, head);
                        link.reached.send_modify(|reached| reached.acknowledged(durable));
                    }
                    Message::Want { id, path, size, hash, have } => {
                        wants
                            .try_send(Job::Want(WantJob { id, path, size, hash, have }))
                            .map_err(|_full| anyhow!("{} asks for too much at once", link.peer))?;
                    }
                    Message::Compare { id, path, size, hash, base, base_size, leaves } => {
                        wants
                            .try_send(Job::Compare(CompareJob { id, path, size, hash, base, base_size, leaves }))
                            .map_err(|_full| anyhow!("{} asks for too much at once", link.peer))?;
                    }
                    Message::Blocks { id, blocks } => {
                        wants
                            .try_send(Job::Blocks { id, blocks })
                            .map_err(|_full| anyhow!("{} asks for too much at once", link.peer))?;
                    }
                    Message::Plain { after, upto } => {
                        if upto > share.index.durable_head() {
                            bail!("{} asks for the rows up to {upto}, of which it was never sent the last", link.peer);
                        }
                        plains
                            .try_send((after, upto))
                            .map_err(|_full| anyhow!("{} asks for too much at once", link.peer))?;
                    }
                    Message::Pong { clock_ms } => {
                        if let Some(asked_ms) = asked.pop_front() {
                            note_clock(link, Offset::measured(asked_ms, clock_ms, super::now_ms()));
                        }
                    }
                    Message::Ping => writer.send(&Message::Pong { clock_ms: super::now_ms() }).await?,
                    other => bail!("{} sends a message of kind {}, which is not for this node to receive", link.peer, other.name()),
                }
            }
            // No limit on what is not acknowledged: a row that cannot be applied
            // yet may have to wait for one that comes after it. A peer that
            // cannot keep up stops reading, and the connection holds back.
            Some(batch) = ready.recv() => writer.send(&batch).await?,
            Some(piece) = content.recv() => writer.send(&piece).await?,
            _ = ping.tick() => {
                if heard.elapsed() > SILENCE_MAX {
                    bail!("{} has not answered for {} s", link.peer, SILENCE_MAX.as_secs());
                }
                if let Some(reason) = share.stopped() {
                    bail!("the share is stopped here: {reason}");
                }
                asked.push_back(super::now_ms());
                writer.send(&Message::Ping).await?;
            }
            else => bail!("the tasks that prepare batches have ended"),
        }
    }
}

/// Keeps what is known of the peer's clock, and says so if it is far off, once.
fn note_clock(link: &Link, offset: Offset) {
    let mut state = link.clock.lock();
    let was_far = state.is_some_and(Offset::is_far);
    if offset.is_far() && !was_far {
        tracing::warn!(peer = %link.peer, "{}", offset.sentence(&link.peer));
    } else if was_far && !offset.is_far() {
        tracing::info!(peer = %link.peer, "the clock of {} is right again", link.peer);
    }
    *state = Some(offset);
}

/// Ends its tasks when the session ends, however it ends.
struct Tasks(Vec<tokio::task::JoinHandle<()>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Follows the durable head and makes batches of what comes after `cursor`; begins
/// again where the peer asks for it.
async fn prepare_batches(
    share: Arc<Share>,
    link: Arc<Link>,
    mut outgoing: Outgoing,
    cursor: u64,
    bare: Option<u64>,
    batches: mpsc::Sender<Message>,
    mut plain: mpsc::Receiver<(u64, u64)>,
) {
    let mut head = share.head.subscribe();
    // What the peer was told; `sent` may be further, where nothing is due. At first
    // it is to be found out whether anything is.
    let (mut told, mut sent) = (cursor, None);
    loop {
        // The guard of the watched number must not be held while waiting.
        let further = async {
            head.wait_for(|durable| sent.is_none_or(|sent| *durable > sent))
                .await
                .map(|durable| *durable)
        };
        let durable = tokio::select! {
            biased;
            Some((after, upto)) = plain.recv() => {
                told = outgoing.rewind(after, upto);
                sent = Some(told);
                link.reached.send_modify(Reached::begins_again);
                if batches.send(Message::Again { after: told }).await.is_err() {
                    return;
                }
                continue;
            }
            durable = further => match durable {
                Ok(durable) => durable,
                Err(_ended) => return,
            },
        };
        let bare_upto = bare.map_or(0, |upto| upto.max(share.compared_at.load(Ordering::Acquire)));
        let built = if durable.saturating_sub(sent.unwrap_or(cursor)) <= BUILT_HERE {
            build_batches(&share, &mut outgoing, told, bare_upto)
        } else {
            let task_share = Arc::clone(&share);
            let built = tokio::task::spawn_blocking(move || {
                let built = build_batches(&task_share, &mut outgoing, told, bare_upto);
                (outgoing, built)
            });
            let Ok((returned, built)) = built.await else {
                return;
            };
            outgoing = returned;
            built
        };
        match built {
            Ok(built) => {
                told = built.upto;
                sent = Some(if built.is_all { built.head } else { built.upto });
                for batch in built.batches {
                    if batches.send(batch).await.is_err() {
                        return;
                    }
                }
                if built.is_all {
                    link.reached
                        .send_modify(|reached| reached.sent_all(built.upto, built.head));
                }
            }
            Err(error) => {
                share.stop_because(&error);
                return;
            }
        }
    }
}

/// What the last durable snapshot has for a peer.
struct Built {
    /// There are several where the contents are too much for one; only the last one
    /// moves the peer's cursor. None if nothing is due.
    batches: Vec<Message>,
    /// Up to which row the last of them, or what was sent before, tells everything.
    upto: u64,
    /// Where the snapshot ends.
    head: u64,
    /// After these batches the peer has been sent all of it.
    is_all: bool,
}

/// The next batches for a peer that was sent everything up to `sent`.
fn build_batches(share: &Share, outgoing: &mut Outgoing, sent: u64, bare_upto: u64) -> anyhow::Result<Built> {
    let (head, reader) = share.index.read_durable()?;
    let Some(outbound) = outgoing.next_batch(&reader, BATCH_ROWS)? else {
        return Ok(Built {
            batches: Vec::new(),
            upto: sent,
            head,
            is_all: true,
        });
    };
    let dirs = share.root.batch();
    let upto = outbound.upto.max(sent);
    let mut batches = Vec::new();
    let moves = outbound.moves;
    let mut left = outbound.rows;
    loop {
        let mut bytes = 0;
        let fits = |(path, record): &(RelPath, Record)| {
            bytes += inline_size(share, record, sent, bare_upto).unwrap_or(0) + row_bytes(path, record);
            bytes <= BATCH_BYTES
        };
        let count = left
            .iter()
            .map(fits)
            .take_while(|fits| *fits)
            .count()
            .max(1)
            .min(left.len());
        let rest = left.split_off(count);
        let wire_row = |(path, record): (RelPath, Record)| {
            let inline = inline_content(share, &dirs, &path, &record, (sent, bare_upto));
            let large = record.row.live().and_then(Entry::content);
            let sketch = match large.filter(|_| inline.is_none()) {
                Some((_, hash)) => reader.sketch_of(&hash)?,
                None => Sketch::default(),
            };
            Ok(WireRow {
                seq: record.seq,
                path,
                row: record.row,
                moved_from: record.moved_from,
                inline,
                moved_tree: moves.get(&record.seq).cloned(),
                sketch,
            })
        };
        let rows = parallel::map::<_, _, Result<Vec<WireRow>, IndexError>>(left, 16, wire_row)?;
        let content: usize = rows
            .iter()
            .filter_map(|row| row.inline.as_ref())
            .map(Bytes::len)
            .sum();
        Figures::add(&share.figures.content_sent_bytes, content as u64);
        let upto = if rest.is_empty() { upto } else { sent };
        batches.push(Message::Batch { upto, rows });
        if rest.is_empty() {
            return Ok(Built {
                batches,
                upto,
                head,
                // It need not have been looked whether there is more.
                is_all: outbound.is_all || upto >= head,
            });
        }
        left = rest;
    }
}

/// About what a row takes without its content: a thousand long paths, or large
/// attributes, would be more than a message may hold.
fn row_bytes(path: &RelPath, record: &Record) -> usize {
    let xattrs = record.row.entry.xattrs.iter();
    let xattrs: usize = xattrs.map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    let from = record.moved_from.as_ref().map_or(0, |from| from.as_bytes().len());
    ROW_BYTES + path.as_bytes().len() + from + xattrs
}

/// How many bytes of content go with a row. The peer has been told of all rows up
/// to `told`, and has asked for rows alone up to `bare_upto`.
fn inline_size(share: &Share, record: &Record, told: u64, bare_upto: u64) -> Option<usize> {
    let (size, _) = record.row.live()?.content()?;
    (size <= INLINE_MAX
        && record.moved_from.is_none()
        && record.seq > bare_upto
        && share.unchanged.since(record.seq) > told)
        .then_some(usize::try_from(size).ok()?)
}

/// The content to send with a row: none if it is big, or most likely there
/// already, or no longer what the row says. The peer asks for what it lacks.
fn inline_content(
    share: &Share,
    dirs: &Dirs<'_>,
    path: &RelPath,
    record: &Record,
    (told, bare_upto): (u64, u64),
) -> Option<Bytes> {
    let size = inline_size(share, record, told, bare_upto)?;
    let (_, hash) = record.row.entry.content()?;
    if size == 0 {
        return Some(Bytes::new());
    }
    if let Some(content) = share.recent.get(&hash) {
        return Some(content);
    }
    let file = apply::open_file(dirs, path).ok()?;
    let mut content = vec![0; size];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 0).ok()?;
    (content::hash_bytes(&content) == hash).then(|| Bytes::from(content))
}

struct WantJob {
    id: u64,
    path: RelPath,
    size: u64,
    hash: Hash,
    have: Vec<[u8; 16]>,
}

/// What the peer asks for.
enum Job {
    Want(WantJob),
    Compare(CompareJob),
    /// Follows a comparison.
    Blocks {
        id: u64,
        blocks: Vec<ChunkId>,
    },
}

/// So many contents are remembered as sent.
const ASKED_REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Answers what the peer asks for, one file after another.
///
/// The peer hashes what it gets, so this node does not, unless it is small. What is
/// asked for once more was perhaps another content than its row says, though no event told so
/// and `stat` does not: then this node must find that out, and look again.
async fn prepare_contents(share: Arc<Share>, mut wanted: mpsc::Receiver<Job>, pieces: mpsc::Sender<Message>) {
    let mut comparisons = Comparisons::default();
    let mut asked = LruCache::new(ASKED_REMEMBERED);
    while let Some(job) = wanted.recv().await {
        let (task_share, task_pieces) = (Arc::clone(&share), pieces.clone());
        let (id, path, sent) = match job {
            Job::Want(job) => {
                let (id, path) = (job.id, job.path.clone());
                let is_small = job.size <= INLINE_MAX;
                let again = is_small || asked.put((path.clone(), job.hash), ()).is_some();
                let send = move || send_content(&task_share, &job, again, &task_pieces);
                (id, path, tokio::task::spawn_blocking(send).await)
            }
            Job::Compare(job) => {
                let id = job.id;
                let compared =
                    tokio::task::spawn_blocking(move || differences::compare(&task_share, job)).await;
                let Ok(compared) = compared else { return };
                let leaves = compared.as_ref().map(Compared::leaves);
                if let Some(compared) = compared {
                    comparisons.add(id, compared);
                }
                if pieces.send(Message::Differs { id, leaves }).await.is_err() {
                    return;
                }
                continue;
            }
            Job::Blocks { id, blocks } => match comparisons.take(id) {
                Some(compared) => {
                    let path = compared.path.clone();
                    let send = move || compared.send(&task_share, id, &blocks, &task_pieces);
                    (id, path, tokio::task::spawn_blocking(send).await)
                }
                None => {
                    let reason = differences::NOT_COMPARED.to_owned();
                    if pieces.send(Message::Gone { id, reason }).await.is_err() {
                        return;
                    }
                    continue;
                }
            },
        };
        let Ok(sent) = sent else { return };
        if let Err(error) = sent {
            // What was announced is no longer there: look again; a newer row
            // follows if it is so.
            share.touch([(
                path,
                super::dirty::Hint {
                    content: true,
                    ..Default::default()
                },
            )]);
            if pieces
                .send(Message::Gone {
                    id,
                    reason: format!("{error:#}"),
                })
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

fn send_content(
    share: &Share,
    job: &WantJob,
    again: bool,
    pieces: &mpsc::Sender<Message>,
) -> anyhow::Result<()> {
    let file = apply::open_file(&share.root.batch(), &job.path)?;
    let emit = |parts: Vec<Part>, last| {
        let bytes = parts.iter().map(Part::data_bytes).sum();
        Figures::add(&share.figures.content_sent_bytes, bytes);
        match pieces.blocking_send(Message::Content {
            id: job.id,
            parts,
            last,
        }) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_closed) => ControlFlow::Break(()),
        }
    };
    let to_check = again.then_some(job.hash);
    content::send_content(&file, job.size, to_check, &job.have, emit)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Flags, Kind, ReplicaId, Row, Stamp, Time, Vector, Version, Xattr};

    #[test]
    fn a_batch_is_closed_for_long_paths_and_large_attributes_too() {
        let value = vec![0; 60_000].into();
        let name = (*b"user.large").into();
        let record = |xattrs| Record {
            row: Row {
                entry: Entry {
                    kind: Kind::Fifo,
                    mode: 0o644,
                    uid: 0,
                    gid: 0,
                    user: None,
                    group: None,
                    mtime: Time { secs: 0, nanos: 0 },
                    xattrs,
                    flags: Flags::NONE,
                    link: None,
                },
                deleted: false,
                version: Version {
                    vector: Vector::default(),
                    stamp: Stamp {
                        wall_ms: 0,
                        count: 0,
                        replica: ReplicaId(1),
                    },
                },
                origin: None,
            },
            seq: 1,
            sig: None,
            via: None,
            moved_from: None,
            here: None,
        };
        let long = RelPath::new(["d".repeat(250).as_str(); 100].join("/").as_bytes()).unwrap();
        let plain = row_bytes(&RelPath::root(), &record(Vec::new()));
        assert!(plain <= BATCH_BYTES / BATCH_ROWS);
        assert!(row_bytes(&long, &record(Vec::new())) > 25_000);
        assert!(row_bytes(&RelPath::root(), &record(vec![Xattr { name, value }])) > 60_000);
    }
}
