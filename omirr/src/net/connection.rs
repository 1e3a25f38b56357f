//! Connections: TLS over TCP, greeted on both sides, then messages.
//!
//! Once TLS stands, the accepting side sends [`MAGIC`], and the dialling side
//! answers with it. In TLS 1.3 a dialler learns only from what it reads next
//! whether its key was accepted; the greeting is what it reads, so that
//! [`dial`] tells all that can go wrong before the first message.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use rustls::AlertDescription;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::{TlsConnector, TlsStream};

use super::error::{shown, tls_error};
use super::{Identity, NetError, PublicKey, tls};
use crate::wire::frame::{self, Progress};
use crate::wire::{Decoder, Encoder, MAGIC, Message, PROTOCOL};

/// What is read at once while nothing is known to be coming.
const READ_BYTES: usize = 64 << 10;
/// What `feed` gathers before it writes of its own accord.
const WRITE_BYTES: usize = 256 << 10;
/// Buffers above are given back once they are empty.
const KEEP_BYTES: usize = 1 << 20;
/// A dead host is noticed after this long, whether data is under way or not.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_COUNT: u32 = 3;
const USER_TIMEOUT_MS: u32 = 60_000;

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
    let mut worst: Option<NetError> = None;
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
                if worst
                    .as_ref()
                    .is_none_or(|worst| error.is_telling() || !worst.is_telling())
                {
                    worst = Some(error);
                }
            }
        }
    }
    Err(worst.expect("resolving yields an address or an error"))
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
        .map_err(|source| NetError::Resolve {
            peer: peer.clone(),
            source,
        })?;
    let found: Vec<SocketAddr> = found.collect();
    if found.is_empty() {
        return Err(NetError::Resolve {
            peer,
            source: io::Error::other("it has no address"),
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
        .map_err(|source| match source.kind() {
            io::ErrorKind::ConnectionRefused => NetError::ConnectionRefused {
                peer: peer.to_owned(),
            },
            io::ErrorKind::TimedOut => timed_out("when it was dialled"),
            _ => NetError::Unreachable {
                peer: peer.to_owned(),
                source,
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
    tune(&tcp).map_err(|source| NetError::Unreachable {
        peer: peer.to_owned(),
        source,
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
    read_greeting(&mut stream, peer).await?.map_err(failed)?;
    write_greeting(&mut stream).await.map_err(failed)?;
    Ok(Connection {
        stream,
        peer: peer.to_owned(),
        at,
    })
}

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

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

pub(super) async fn write_greeting(stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    stream.write_all(&MAGIC).await?;
    stream.flush().await
}

/// The outer error is about what was said, the inner one about the connection.
pub(super) async fn read_greeting(
    stream: &mut (impl AsyncRead + Unpin),
    peer: &str,
) -> Result<io::Result<()>, NetError> {
    let mut greeting = [0; MAGIC.len()];
    if let Err(error) = stream.read_exact(&mut greeting).await {
        return Ok(Err(error));
    }
    check_greeting(greeting, peer).map(Ok)
}

/// The last byte is the protocol's number, so that two nodes whose messages have
/// nothing in common can still tell each other why.
fn check_greeting(greeting: [u8; MAGIC.len()], peer: &str) -> Result<(), NetError> {
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

/// A connection to a peer whose key has been checked.
#[derive(Debug)]
pub struct Connection {
    pub(super) stream: TlsStream<TcpStream>,
    peer: String,
    at: SocketAddr,
}

impl Connection {
    pub(super) fn new(stream: TlsStream<TcpStream>, peer: String, at: SocketAddr) -> Connection {
        Connection { stream, peer, at }
    }

    /// The other side, as errors show it.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The other side's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.at
    }

    /// Shows the other side as `web2 (10.0.0.2:808)` from now on.
    pub fn set_peer_name(&mut self, name: &str) {
        self.peer = format!("{name} ({})", self.at);
    }

    /// The two halves, for two tasks: each message that one side sends may have
    /// to wait until the other side has read, so that a single task that sends
    /// without reading can hang.
    pub fn split(self) -> (Reader, Writer) {
        let peer: Arc<str> = self.peer.into();
        let (read, write) = tokio::io::split(self.stream);
        let reader = Reader {
            half: read,
            buffer: BytesMut::new(),
            decoder: Decoder::default(),
            peer: Arc::clone(&peer),
        };
        let writer = Writer {
            half: write,
            buffer: BytesMut::new(),
            encoder: Encoder::default(),
            peer,
        };
        (reader, writer)
    }
}

/// Receives messages.
pub struct Reader {
    half: ReadHalf<TlsStream<TcpStream>>,
    buffer: BytesMut,
    decoder: Decoder,
    peer: Arc<str>,
}

impl Reader {
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The next message, checked. After an error the connection is of no more use.
    ///
    /// Cancel-safe: what was read of a message stays in the buffer.
    pub async fn recv(&mut self) -> Result<Message, NetError> {
        loop {
            let received = |source| NetError::Received {
                peer: self.peer.to_string(),
                source,
            };
            let missing = match frame::take(&mut self.buffer).map_err(received)? {
                Progress::Whole(frame) => {
                    let message = self.decoder.decode(&frame).map_err(received);
                    if self.buffer.is_empty() && frame.body.capacity() > KEEP_BYTES {
                        self.buffer = BytesMut::new();
                    }
                    return message;
                }
                Progress::Missing(missing) => missing,
            };
            // Grows with what has arrived, not with what a header promises.
            self.buffer
                .reserve(missing.clamp(READ_BYTES, READ_BYTES.max(self.buffer.len())));
            match self.half.read_buf(&mut self.buffer).await {
                Ok(0) if self.buffer.is_empty() => {
                    return Err(NetError::Closed {
                        peer: self.peer.to_string(),
                    });
                }
                Ok(0) => return Err(self.lost("it ended in the middle of a message")),
                Ok(_) => {}
                Err(error) => return Err(self.read_error(&error)),
            }
        }
    }

    fn read_error(&self, error: &io::Error) -> NetError {
        let peer = || self.peer.to_string();
        match tls_error(error) {
            Some(why) => NetError::Tls {
                peer: peer(),
                why: why.to_string(),
            },
            None if error.kind() == io::ErrorKind::UnexpectedEof => self.lost("the other side is gone"),
            None => self.lost(&error.to_string()),
        }
    }

    fn lost(&self, why: &str) -> NetError {
        NetError::Lost {
            peer: self.peer.to_string(),
            why: why.to_owned(),
        }
    }
}

/// Sends messages.
pub struct Writer {
    half: WriteHalf<TlsStream<TcpStream>>,
    /// Frames that are not yet written.
    buffer: BytesMut,
    encoder: Encoder,
    peer: Arc<str>,
}

impl Writer {
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Sends `message` and whatever was fed before.
    ///
    /// If it is cancelled, the message counts as fed: the next call sends the
    /// rest of it.
    pub async fn send(&mut self, message: &Message) -> Result<(), NetError> {
        self.encode(message)?;
        self.flush().await
    }

    /// Takes `message` to be sent by the next [`Writer::flush`] at the latest.
    /// `Unsendable` is about this message alone; the connection goes on.
    ///
    /// If it is cancelled, the message counts as fed.
    pub async fn feed(&mut self, message: &Message) -> Result<(), NetError> {
        self.encode(message)?;
        if self.buffer.len() < WRITE_BYTES {
            Ok(())
        } else {
            self.write().await
        }
    }

    /// Sends what was fed. Cancel-safe.
    pub async fn flush(&mut self) -> Result<(), NetError> {
        self.write().await?;
        self.half.flush().await.map_err(|error| self.write_error(&error))
    }

    /// Sends what was fed and ends this direction in order; the other side's
    /// `recv` then says `Closed`.
    pub async fn close(mut self) -> Result<(), NetError> {
        self.flush().await?;
        self.half
            .shutdown()
            .await
            .map_err(|error| self.write_error(&error))
    }

    fn encode(&mut self, message: &Message) -> Result<(), NetError> {
        self.encoder
            .encode(message, &mut self.buffer)
            .map_err(|source| NetError::Unsendable {
                peer: self.peer.to_string(),
                source,
            })
    }

    async fn write(&mut self) -> Result<(), NetError> {
        while self.buffer.has_remaining() {
            match self.half.write_buf(&mut self.buffer).await {
                Ok(0) => return Err(self.write_error(&io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) => return Err(self.write_error(&error)),
            }
        }
        if self.buffer.capacity() > KEEP_BYTES {
            self.buffer = BytesMut::new();
        }
        Ok(())
    }

    fn write_error(&self, error: &io::Error) -> NetError {
        let why = if is_hang_up(error) {
            "the other side is gone".to_owned()
        } else {
            error.to_string()
        };
        NetError::Lost {
            peer: self.peer.to_string(),
            why,
        }
    }
}
