//! The messages of protocol 6. `docs/PROTOCOL.md` tells how they follow one
//! another.
//!
//! Each node dials each of its peers, once per share, and sends its own rows
//! over that connection; the other direction is another connection that the
//! peer dials. "Sender" is the node that dialled.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::model::{Hash, Kind, RelPath, ReplicaId, Row, Sketch, TreeMove};

/// First bytes of every connection, before the first frame, in both directions.
pub const MAGIC: [u8; 8] = *b"omirr\0\0\x06";
/// Both sides must speak the same one.
pub const PROTOCOL: u32 = 6;

/// The contents of a batch are small if they have no more bytes on the average.
const SMALL_BYTES: u64 = 16 << 10;

/// What a frame may hold, so that a peer cannot make this node allocate.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A frame as it is on the wire, bytes.
    pub frame_bytes: usize,
    /// A frame's body after decompression, bytes.
    pub body_bytes: usize,
    /// Rows in a batch.
    pub batch_rows: usize,
}

pub const LIMITS: Limits = Limits {
    frame_bytes: 16 << 20,
    body_bytes: 32 << 20,
    batch_rows: 16_384,
};

/// A row on its way, with its place in the sender's order. Its bytes are those
/// of `wire/rows.rs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireRow {
    /// The sender's local sequence number.
    pub seq: u64,
    pub path: RelPath,
    pub row: Row,
    /// Where the content was before; the receiver most likely has it there.
    pub moved_from: Option<RelPath>,
    /// The whole content, if it is small.
    pub inline: Option<Bytes>,
    /// The row stands for all rows of a directory's move; the receiver makes the
    /// others, or asks for them by `Plain`.
    pub moved_tree: Option<TreeMove>,
    /// What the content is like, if it is large and does not come along: the
    /// receiver may have something like it.
    pub sketch: Sketch,
}

/// A piece of a file that is being sent, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    Data(Bytes),
    /// The receiver's own chunk, by its place in `Want::have`.
    Have(u32),
    /// So many zero bytes that need no blocks.
    Hole(u64),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Sender's first message.
    Hello {
        protocol: u32,
        /// `omirr 0.1.0`, for messages.
        software: String,
        /// The sender's node name, for messages.
        node: String,
        share: String,
        replica: ReplicaId,
        /// The sender's highest sequence number.
        head: u64,
        /// Names of the nodes behind replicas, for the names of conflict copies.
        names: Vec<(ReplicaId, String)>,
    },
    /// Receiver's answer: send what comes after `cursor`.
    Welcome {
        protocol: u32,
        software: String,
        node: String,
        replica: ReplicaId,
        /// The sequence number of `Hello`'s replica up to which the receiver
        /// has durably applied everything.
        cursor: u64,
        /// The receiver has a tree of its own and none of these rows: what the
        /// sender has already comes without contents, and the receiver asks for
        /// those that it lacks.
        bare: bool,
        names: Vec<(ReplicaId, String)>,
        /// The receiver's own highest sequence number.
        head: u64,
    },
    /// Receiver's other answer; the connection ends.
    Refuse { reason: String },
    /// Rows, in an order in which they can be applied: mostly that of their
    /// sequence numbers, but parents come before what is in them. Of everything
    /// up to `upto` the receiver now knows all that it need know.
    Batch {
        upto: u64,
        #[serde(with = "super::rows")]
        rows: Vec<WireRow>,
    },
    /// Receiver asks for content that it lacks. `have` names the chunks of what
    /// it has, by the first 16 bytes of their BLAKE3 hash; see `content`.
    Want {
        id: u64,
        path: RelPath,
        size: u64,
        hash: Hash,
        have: Vec<[u8; 16]>,
    },
    /// Sender's answer, in pieces, in order.
    Content { id: u64, parts: Vec<Part>, last: bool },
    /// Sender's other answer: the path has changed since; a newer row follows.
    Gone { id: u64, reason: String },
    /// Everything up to `durable` is on the receiver's disk. `pending` rows
    /// after it wait, for the reason given.
    Ack {
        durable: u64,
        pending: u64,
        reason: Option<String>,
        /// The receiver's own highest sequence number: what it sends up to there
        /// may have been made before it had the rows up to `durable`.
        head: u64,
    },
    /// Are you there? Answered by `Pong`.
    Ping,
    /// Yes, and my clock says so: ms since 1970.
    Pong { clock_ms: u64 },
    /// Receiver cannot make the rows of a move: begin again after number `after`,
    /// and send the rows of moves up to number `upto` one by one. It does not look
    /// at batches that come before the answer.
    Plain { after: u64, upto: u64 },
    /// Sender's answer to `Plain`: what follows begins after this number.
    Again { after: u64 },
    /// Receiver asks for a content of which it has most: in the place of `Want`.
    /// It has one with the hash `base`, of `base_size` bytes; `leaves` names its
    /// leaves as `Want` names chunks, or is empty if the sender may know them.
    Compare {
        id: u64,
        path: RelPath,
        size: u64,
        hash: Hash,
        base: Hash,
        base_size: u64,
        leaves: Vec<[u8; 16]>,
    },
    /// Sender's answer: which leaves of the two differ. None if it cannot tell, or
    /// if they are too many: then the receiver asks in another way.
    Differs { id: u64, leaves: Option<Vec<u64>> },
    /// Receiver's answer to that: the names of all blocks that it has in these
    /// leaves, in order. `Content` with what they lack follows, or `Gone`.
    Blocks { id: u64, blocks: Vec<[u8; 16]> },
}

impl WireRow {
    /// About what it takes up in memory, bytes.
    fn weight(&self) -> usize {
        let entry = &self.row.entry;
        let xattrs: usize = entry
            .xattrs
            .iter()
            .map(|xattr| size_of_val(xattr) + xattr.name.len() + xattr.value.len())
            .sum();
        let target = match &entry.kind {
            Kind::Symlink { target } => target.len(),
            _ => 0,
        };
        let pairs = size_of_val(self.row.version.vector.pairs());
        let moved_from = self.moved_from.as_ref().map_or(0, |from| from.as_bytes().len());
        let inline = self.inline.as_ref().map_or(0, Bytes::len);
        size_of::<WireRow>() + self.path.as_bytes().len() + moved_from + xattrs + target + pairs + inline
    }
}

impl Part {
    /// Bytes of data that it carries.
    pub fn data_bytes(&self) -> u64 {
        match self {
            Part::Data(data) => data.len() as u64,
            Part::Have(_) | Part::Hole(_) => 0,
        }
    }
}

impl Message {
    /// Whether it carries content, and may thus be worth compressing.
    pub fn is_bulky(&self) -> bool {
        matches!(self, Message::Batch { .. } | Message::Content { .. })
    }

    /// Whether it carries rows whose contents, if there are any, are small: what the
    /// receiver does for each such file takes several times as long as compressing it,
    /// however fast the connection is.
    pub fn is_of_small_files(&self) -> bool {
        match self {
            Message::Batch { rows, .. } => self.content_bytes() <= SMALL_BYTES * rows.len() as u64,
            _ => false,
        }
    }

    /// How much content it carries, bytes.
    pub fn content_bytes(&self) -> u64 {
        match self {
            Message::Batch { rows, .. } => {
                let inline = rows.iter().filter_map(|row| row.inline.as_ref());
                inline.map(|content| content.len() as u64).sum()
            }
            Message::Content { parts, .. } => parts.iter().map(Part::data_bytes).sum(),
            _ => 0,
        }
    }

    /// About what it takes up in memory, bytes: what a peer may let this node
    /// hold is counted in these.
    pub fn weight(&self) -> usize {
        let own = match self {
            Message::Batch { rows, .. } => rows.iter().map(WireRow::weight).sum(),
            Message::Content { parts, .. } => {
                usize::try_from(self.content_bytes()).unwrap_or(usize::MAX) + size_of_val(&parts[..])
            }
            Message::Want { have: names, .. }
            | Message::Compare { leaves: names, .. }
            | Message::Blocks { blocks: names, .. } => size_of_val(&names[..]),
            Message::Differs {
                leaves: Some(leaves), ..
            } => size_of_val(&leaves[..]),
            _ => 0,
        };
        size_of::<Message>() + own
    }

    /// What it is, for error messages.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello { .. } => "hello",
            Message::Welcome { .. } => "welcome",
            Message::Refuse { .. } => "refusal",
            Message::Batch { .. } => "batch",
            Message::Want { .. } => "want",
            Message::Content { .. } => "content",
            Message::Gone { .. } => "gone",
            Message::Ack { .. } => "acknowledgement",
            Message::Ping => "ping",
            Message::Pong { .. } => "pong",
            Message::Plain { .. } => "request for plain rows",
            Message::Again { .. } => "new beginning",
            Message::Compare { .. } => "comparison",
            Message::Differs { .. } => "difference",
            Message::Blocks { .. } => "list of blocks",
        }
    }
}
