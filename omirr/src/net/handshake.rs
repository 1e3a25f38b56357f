//! What both sides of a new connection do: settings, greeting, and what an error
//! on the way means.
//!
//! Once TLS stands, the accepting side sends [`MAGIC`], and the dialling side
//! answers with it. In TLS 1.3 a dialler learns only from what it reads next
//! whether its key was accepted; the greeting is what it reads, so that dialling
//! tells all that can go wrong before the first message.

use std::io;
use std::time::Duration;

use rustls::AlertDescription;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::error::{is_hang_up, shown, tls_error};
use super::{NetError, PublicKey};
use crate::wire::{MAGIC, PROTOCOL};

/// A dead host is noticed after this long, whether data is under way or not.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_COUNT: u32 = 3;
const USER_TIMEOUT_MS: u32 = 60_000;

/// Which side of the handshake this node is on, and this node's key.
#[derive(Clone, Copy)]
pub(super) enum Side {
    Dialling(PublicKey),
    Accepting(PublicKey),
}

/// What an error during the handshake means.
pub(super) fn handshake_error(error: &io::Error, peer: &str, side: Side) -> NetError {
    let peer = peer.to_owned();
    match (tls_error(error), side) {
        (Some(rustls::Error::AlertReceived(AlertDescription::AccessDenied)), Side::Dialling(key)) => {
            NetError::NotAccepted { peer, key }
        }
        (Some(rustls::Error::AlertReceived(AlertDescription::AccessDenied)), Side::Accepting(key)) => {
            NetError::OtherKeyExpected { peer, key }
        }
        (Some(rustls::Error::InvalidMessage(_)), _) => NetError::NotTls {
            peer,
            shown: "something that is not TLS".into(),
        },
        (
            Some(
                why @ (rustls::Error::PeerIncompatible(_)
                | rustls::Error::PeerMisbehaved(_)
                | rustls::Error::NoCertificatesPresented
                | rustls::Error::NoApplicationProtocol
                | rustls::Error::InvalidCertificate(_)
                | rustls::Error::AlertReceived(_)),
            ),
            _,
        ) => NetError::NotOmirr {
            peer,
            why: why.to_string(),
        },
        (Some(why), _) => NetError::Tls {
            peer,
            why: why.to_string(),
        },
        (None, _) if is_hang_up(error) => NetError::HungUp {
            peer,
            doing: "during the handshake",
        },
        (None, _) => NetError::Lost {
            peer,
            why: error.to_string(),
        },
    }
}

pub(super) async fn write_greeting(stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    stream.write_all(&MAGIC).await?;
    stream.flush().await
}

pub(super) async fn read_greeting(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<[u8; MAGIC.len()]> {
    let mut greeting = [0; MAGIC.len()];
    stream.read_exact(&mut greeting).await?;
    Ok(greeting)
}

/// The last byte is the protocol's number, so that two nodes whose messages have
/// nothing in common can still tell each other why.
pub(super) fn check_greeting(greeting: [u8; MAGIC.len()], peer: &str) -> Result<(), NetError> {
    if greeting == MAGIC {
        return Ok(());
    }
    let (name, version) = greeting.split_at(MAGIC.len() - 1);
    if *name == MAGIC[..MAGIC.len() - 1] {
        return check_protocol(peer, version[0].into());
    }
    Err(NetError::NotOmirr {
        peer: peer.to_owned(),
        why: format!("it greets with {}", shown(&greeting)),
    })
}

/// Whether the protocol number that `peer` names in `Hello` or `Welcome` is this
/// node's.
pub fn check_protocol(peer: &str, theirs: u32) -> Result<(), NetError> {
    if theirs == PROTOCOL {
        Ok(())
    } else {
        Err(NetError::Protocol {
            peer: peer.to_owned(),
            theirs,
        })
    }
}

/// Messages are sent when they are ready, and a host that is gone is noticed.
pub(super) fn tune(tcp: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(tcp, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(tcp, KEEPALIVE_COUNT)?;
    sockopt::set_tcp_user_timeout(tcp, USER_TIMEOUT_MS)?;
    Ok(())
}
