//! Messages over one connection.
//!
//! In: a TLS stream whose other end has been checked. Out: messages, checked by
//! `wire`. The reading half keeps what has arrived of a message, and the writing
//! half what is still to go, so that neither loses its place when a task that
//! waits for it is cancelled.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::NetError;
use super::error::{is_hang_up, tls_error};
use super::link::{Link, Pace};
use crate::wire::frame::{self, Progress};
use crate::wire::{Decoder, Encoder, Message, Pack};

/// What is read at once while nothing is known to be coming.
const READ_BYTES: usize = 64 << 10;
/// What `feed` gathers before it writes of its own accord.
const WRITE_BYTES: usize = 256 << 10;
/// Buffers above are given back once they are empty.
const KEEP_BYTES: usize = 2 << 20;

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
        let link = Link::of(self.stream.get_ref().0);
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
            link,
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
            let received = |why| NetError::Received {
                peer: self.peer.to_string(),
                why,
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
    link: Link,
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
        let pack = if message.is_bulky() {
            match self.link.pace() {
                Pace::Slow => Pack::Thoroughly,
                Pace::Fast if !message.is_of_small_files() => Pack::Never,
                Pace::Fast | Pace::Usual => Pack::IfSmaller,
            }
        } else {
            Pack::Never
        };
        self.encoder
            .encode(message, pack, &mut self.buffer)
            .map_err(|why| NetError::Unsendable {
                peer: self.peer.to_string(),
                why,
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
