//! What can go wrong between nodes, in words for the person who must act.

use std::io;
use std::time::Duration;

use super::{Limit, PublicKey};
use crate::wire::{PROTOCOL, WireError};

/// `peer` is the other side as the message shows it: the address from the
/// configuration, `web2 (10.0.0.2:808)`, or the address a stranger came from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    #[error("cannot listen on {address}: {why}")]
    Listen { address: String, why: String },
    #[error("connections cannot be taken: {why}")]
    Accept { why: io::Error },
    #[error("{address:?} is no address to dial: {why}")]
    Address { address: String, why: String },
    #[error("the name in {peer} cannot be resolved: {why}: correct the peer's address, or the name service")]
    Resolve { peer: String, why: io::Error },
    #[error(
        "{peer} refused the connection: nothing listens there; is omirr running on that node, at that port?"
    )]
    ConnectionRefused { peer: String },
    #[error("{peer} cannot be reached: {why}")]
    Unreachable { peer: String, why: io::Error },
    #[error("{peer} did not answer within {} s {doing}", tenths(*after))]
    Timeout {
        peer: String,
        doing: &'static str,
        after: Duration,
    },

    #[error("{peer} does not accept this node's key: add {key} to its [peers]")]
    NotAccepted { peer: String, key: PublicKey },
    #[error(
        "{peer} answered with key {actual}, but the configuration says {expected}: if that node has a new key, \
         put it into [peers], if not, another host has its address"
    )]
    WrongKey {
        peer: String,
        actual: PublicKey,
        expected: PublicKey,
    },
    #[error(
        "a stranger with key {key} from {peer} was refused: if it is a peer, add the key to the configuration"
    )]
    Stranger { peer: String, key: PublicKey },
    #[error("{peer} expects another key than this node's: correct it to {key} in its [peers]")]
    OtherKeyExpected { peer: String, key: PublicKey },

    #[error("{peer} does not speak omirr's protocol: it sent {shown}")]
    NotTls { peer: String, shown: String },
    #[error("{peer} speaks TLS, but not as an omirr node does: {why}")]
    NotOmirr { peer: String, why: String },
    #[error("the secure connection with {peer} failed: {why}")]
    Tls { peer: String, why: String },
    #[error("{peer} speaks omirr protocol {theirs}, this node speaks {ours}: update the older one", ours = PROTOCOL)]
    Protocol { peer: String, theirs: u32 },
    #[error("{peer} hung up {doing}")]
    HungUp { peer: String, doing: &'static str },
    #[error("{peer} had to give way: {}", match .limit {
        Limit::All(all) => format!("more than {all} connections were being set up at once"),
        Limit::Each(each) => format!("more than {each} connections were being set up at once from its address"),
    })]
    Crowded { peer: String, limit: Limit },

    #[error("{peer} sent {why}")]
    Received { peer: String, why: WireError },
    #[error("a message for {peer} cannot be sent: {why}")]
    Unsendable { peer: String, why: WireError },
    /// The peer ended the connection in order, between two messages.
    #[error("{peer} closed the connection")]
    Closed { peer: String },
    #[error("the connection to {peer} was lost: {why}")]
    Lost { peer: String, why: String },
}

impl NetError {
    /// Whether the other side ended the connection as it should.
    pub fn is_closed(&self) -> bool {
        matches!(self, NetError::Closed { .. })
    }

    /// Whether the other side was there and spoke: such an error says more than
    /// that another of its addresses could not be reached.
    pub(super) fn is_telling(&self) -> bool {
        !matches!(
            self,
            NetError::ConnectionRefused { .. } | NetError::Unreachable { .. } | NetError::Timeout { .. }
        )
    }
}

/// Seconds as people say them: a share of a timeout is never round.
fn tenths(after: Duration) -> f32 {
    (after.as_secs_f32() * 10.0).round() / 10.0
}

/// The TLS error inside an I/O error, if that is what it is.
pub(super) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Whether the other side ended the connection without a word.
pub(super) fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// Bytes that should have been something else, for a message.
pub(super) fn shown(bytes: &[u8]) -> String {
    let line = bytes
        .split(|&b| b == b'\r' || b == b'\n')
        .next()
        .unwrap_or_default();
    let printable = !line.is_empty() && line.iter().all(|b| (b' '..=b'~').contains(b));
    if printable {
        return format!("\"{}\"", String::from_utf8_lossy(line));
    }
    let hex: Vec<String> = bytes.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!("the bytes {}", hex.join(" "))
}
