//! Dialling a peer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::{TlsConnector, TlsStream};

use super::handshake::{Side, check_greeting, handshake_error, read_greeting, tune, write_greeting};
use super::{Connection, Identity, NetError, PublicKey, tls};

/// Connects to the peer at `address` (`host:port`) that holds `peer_key`. Every
/// address that the name has is tried; `timeout` is for all of them together.
///
/// Cancel-safe: dropping it closes what was opened.
pub async fn dial(
    address: &str,
    local: &Identity,
    peer_key: &PublicKey,
    timeout: Duration,
) -> Result<Connection, NetError> {
    let deadline = Instant::now() + timeout;
    let addresses = resolve(address, deadline, timeout).await?;
    let mut why: Option<NetError> = None;
    for (tried, &at) in addresses.iter().enumerate() {
        let peer = if at.to_string() == address {
            address.to_owned()
        } else {
            format!("{address} ({})", at.ip())
        };
        // The last one gets all the time that is left, the others their share.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (addresses.len() - tried) as u32;
        match dial_one(at, &peer, local, peer_key, share).await {
            Ok(connection) => return Ok(connection),
            Err(error) => {
                if why
                    .as_ref()
                    .is_none_or(|why| error.is_telling() || !why.is_telling())
                {
                    why = Some(error);
                }
            }
        }
    }
    Err(why.expect("resolving yields an address or an error"))
}

async fn resolve(address: &str, deadline: Instant, timeout: Duration) -> Result<Vec<SocketAddr>, NetError> {
    let wrong = |why: String| NetError::Address {
        address: address.to_owned(),
        why,
    };
    let port = address
        .rsplit_once(':')
        .filter(|(host, _)| !host.is_empty() && !is_bare_v6(address, host));
    let Some((_, port)) = port else {
        return Err(wrong(
            "it needs a host and a port, as in web2.example.org:808 or [fd00::2]:808".into(),
        ));
    };
    if port.parse::<u16>().is_err() {
        return Err(wrong(format!(
            "{port:?} is no port, write a number from 1 to 65535"
        )));
    }
    let found = tokio::time::timeout_at(deadline, tokio::net::lookup_host(address)).await;
    let peer = address.to_owned();
    let found = found
        .map_err(|_elapsed| NetError::Timeout {
            peer: peer.clone(),
            doing: "while its name was resolved",
            after: timeout,
        })?
        .map_err(|why| NetError::Resolve {
            peer: peer.clone(),
            why,
        })?;
    let found: Vec<SocketAddr> = found.collect();
    if found.is_empty() {
        return Err(NetError::Resolve {
            peer,
            why: io::Error::other("it has no address"),
        });
    }
    Ok(found)
}

/// `fd00::2` has colons, but no port.
fn is_bare_v6(address: &str, host: &str) -> bool {
    host.contains(':') && !address.starts_with('[')
}

async fn dial_one(
    at: SocketAddr,
    peer: &str,
    local: &Identity,
    peer_key: &PublicKey,
    timeout: Duration,
) -> Result<Connection, NetError> {
    let timed_out = |doing| NetError::Timeout {
        peer: peer.to_owned(),
        doing,
        after: timeout,
    };
    let deadline = Instant::now() + timeout;
    let tcp = tokio::time::timeout_at(deadline, TcpStream::connect(at))
        .await
        .map_err(|_elapsed| timed_out("when it was dialled"))?
        .map_err(|why| match why.kind() {
            io::ErrorKind::ConnectionRefused => NetError::ConnectionRefused {
                peer: peer.to_owned(),
            },
            io::ErrorKind::TimedOut => timed_out("when it was dialled"),
            _ => NetError::Unreachable {
                peer: peer.to_owned(),
                why,
            },
        })?;
    tokio::time::timeout_at(deadline, shake_hands(tcp, at, peer, local, peer_key))
        .await
        .map_err(|_elapsed| timed_out("during the handshake"))?
}

async fn shake_hands(
    tcp: TcpStream,
    at: SocketAddr,
    peer: &str,
    local: &Identity,
    peer_key: &PublicKey,
) -> Result<Connection, NetError> {
    tune(&tcp).map_err(|why| NetError::Unreachable {
        peer: peer.to_owned(),
        why,
    })?;
    let (config, gate) = tls::client(local, *peer_key).map_err(|why| NetError::Tls {
        peer: peer.to_owned(),
        why: why.to_string(),
    })?;
    let connector = TlsConnector::from(Arc::new(config));
    let failed = |error: io::Error| match gate.seen() {
        Some(actual) if actual != *peer_key => NetError::WrongKey {
            peer: peer.to_owned(),
            actual,
            expected: *peer_key,
        },
        _ => handshake_error(&error, peer, Side::Dialling(local.public_key())),
    };
    let stream = connector.connect(tls::server_name(), tcp).await.map_err(failed)?;
    let mut stream = TlsStream::from(stream);
    let greeting = read_greeting(&mut stream).await.map_err(failed)?;
    // Answered in any case: the other side, too, wants to know what is wrong.
    write_greeting(&mut stream).await.map_err(failed)?;
    check_greeting(greeting, peer)?;
    Ok(Connection::new(stream, peer.to_owned(), at))
}
