//! Real sockets on loopback. After whatever a stranger does, the node at the
//! other end still serves its peer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;

use super::listener::MAX_HANDSHAKES;
use super::*;
use crate::wire::{LIMITS, MAGIC, Message, Part, encode};

const SOON: Duration = Duration::from_secs(10);

fn identity() -> Identity {
    Identity::random().unwrap().0
}

/// A node that echoes its peer's messages and reports every error.
struct Node {
    at: SocketAddr,
    key: PublicKey,
    peer: Identity,
    errors: mpsc::UnboundedReceiver<NetError>,
    /// Whether the peer's key is still in the configuration.
    known: Arc<AtomicBool>,
}

impl Node {
    async fn start() -> Node {
        Node::with_timeout(SOON).await
    }

    async fn with_timeout(timeout: Duration) -> Node {
        let (local, peer) = (identity(), identity());
        let (report, errors) = mpsc::unbounded_channel();
        let listener = Listener::bind(&["127.0.0.1:0".to_owned()]).await.unwrap();
        let (at, key, peer_key) = (listener.local_addrs()[0], local.public_key(), peer.public_key());
        let known = Arc::new(AtomicBool::new(true));
        let still = Arc::clone(&known);
        let is_known: Known = Arc::new(move |key| *key == peer_key && still.load(Ordering::Relaxed));
        tokio::spawn(async move {
            loop {
                let incoming = listener.accept().await.unwrap();
                let (local, is_known, report) = (local.clone(), Arc::clone(&is_known), report.clone());
                tokio::spawn(async move {
                    let error = serve(incoming, &local, is_known, timeout, peer_key)
                        .await
                        .unwrap_err();
                    // The test may be over by now.
                    drop(report.send(error));
                });
            }
        });
        Node {
            at,
            key,
            peer,
            errors,
            known,
        }
    }

    async fn dial(&self) -> Result<Connection, NetError> {
        dial(&self.at.to_string(), &self.peer, &self.key, SOON).await
    }

    /// The next error that a connection ended with, as text.
    async fn error(&mut self) -> String {
        tokio::time::timeout(SOON, self.errors.recv())
            .await
            .expect("an error")
            .unwrap()
            .to_string()
    }

    /// A good peer is served.
    async fn assert_serves(&mut self) {
        let (mut reader, mut writer) = self.dial().await.unwrap().split();
        writer.send(&Message::Ping).await.unwrap();
        assert_eq!(reader.recv().await.unwrap(), Message::Ping);
        writer.close().await.unwrap();
        assert!(self.error().await.ends_with("closed the connection"));
        assert!(reader.recv().await.unwrap_err().is_closed());
    }
}

async fn serve(
    incoming: Incoming,
    local: &Identity,
    known: Known,
    timeout: Duration,
    expected: PublicKey,
) -> Result<std::convert::Infallible, NetError> {
    let (mut connection, key) = accept(incoming, local, known, timeout).await?;
    assert_eq!(key, expected);
    connection.set_peer_name("web2");
    let (mut reader, mut writer) = connection.split();
    loop {
        match reader.recv().await {
            Ok(message) => writer.send(&message).await?,
            Err(error) => {
                if error.is_closed() {
                    writer.close().await?;
                }
                return Err(error);
            }
        }
    }
}

fn content(bytes: Vec<u8>) -> Message {
    Message::Content {
        id: 1,
        parts: vec![Part::Data(Bytes::from(bytes))],
        last: false,
    }
}

#[tokio::test]
async fn peers_exchange_messages_of_every_size() {
    let mut node = Node::start().await;
    let mut connection = node.dial().await.unwrap();
    assert_eq!(connection.peer(), node.at.to_string());
    connection.set_peer_name("web1");
    assert_eq!(connection.peer(), format!("web1 ({})", node.at));
    let (mut reader, mut writer) = connection.split();
    for size in [1, 1000, 100_000, 1 << 20, 15 << 20] {
        let mut bytes = vec![0; size];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        let message = content(bytes);
        writer.send(&message).await.unwrap();
        assert!(reader.recv().await.unwrap() == message, "{size} bytes");
    }
    for _ in 0..1000 {
        writer.feed(&Message::Ping).await.unwrap();
    }
    writer.flush().await.unwrap();
    for _ in 0..1000 {
        assert_eq!(reader.recv().await.unwrap(), Message::Ping);
    }
    // A message that is too long concerns itself alone.
    let error = writer
        .send(&content(vec![0; LIMITS.body_bytes]))
        .await
        .unwrap_err();
    assert!(matches!(error, NetError::Unsendable { .. }), "{error}");
    writer.send(&Message::Pong).await.unwrap();
    assert_eq!(reader.recv().await.unwrap(), Message::Pong);
    drop((reader, writer));
    node.error().await;
    node.assert_serves().await;
}

#[tokio::test]
async fn a_peer_with_another_key_is_not_taken_for_the_one_meant() {
    let mut node = Node::start().await;
    let expected = identity().public_key();
    let error = dial(&node.at.to_string(), &node.peer, &expected, SOON)
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        format!(
            "{} answered with key {}, but the configuration says {expected}: if that node has a new key, \
             put it into [peers], if not, another host has its address",
            node.at, node.key
        )
    );
    let error = node.error().await;
    assert!(error.contains("expects another key than this node's"), "{error}");
    assert!(
        error.contains(&format!("correct it to {} in its [peers]", node.key)),
        "{error}"
    );
    node.assert_serves().await;
}

#[tokio::test]
async fn a_stranger_is_told_so_and_the_log_has_its_key() {
    let mut node = Node::start().await;
    let stranger = identity();
    for _ in 0..20 {
        // Every time: the reason must not be overtaken by the connection's end.
        let error = dial(&node.at.to_string(), &stranger, &node.key, SOON)
            .await
            .unwrap_err()
            .to_string();
        let key = stranger.public_key();
        assert_eq!(
            error,
            format!(
                "{} does not accept this node's key: add {key} to its [peers]",
                node.at
            )
        );
        let error = node.error().await;
        assert!(
            error.starts_with(&format!("a stranger with key {key} from 127.0.0.1:")),
            "{error}"
        );
        assert!(
            error.ends_with("if it is a peer, add the key to the configuration"),
            "{error}"
        );
    }
    node.assert_serves().await;
}

#[tokio::test]
async fn a_key_that_is_taken_out_is_refused_from_then_on() {
    let mut node = Node::start().await;
    node.assert_serves().await;
    node.known.store(false, Ordering::Relaxed);
    assert!(matches!(
        node.dial().await.unwrap_err(),
        NetError::NotAccepted { .. }
    ));
    assert!(node.error().await.contains("stranger"));
    node.known.store(true, Ordering::Relaxed);
    node.assert_serves().await;
}

#[tokio::test]
async fn what_is_not_tls_is_shown() {
    let mut node = Node::start().await;
    for (sent, shown) in [
        (
            &b"GET / HTTP/1.1\r\nHost: web1\r\n\r\n"[..],
            "it sent \"GET / HTTP/1.1\"",
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it sent \"SSH-2.0-OpenSSH_9.2\""),
        (
            b"\0\x01\xfe\xff\0\0\0\0\0\0\0\0",
            "it sent the bytes 00 01 fe ff 00 00 00 00",
        ),
        (
            b"\x16\x03\x01\xff\xff garbage that begins as TLS does",
            "it sent something that is not TLS",
        ),
    ] {
        let mut tcp = TcpStream::connect(node.at).await.unwrap();
        tcp.write_all(sent).await.unwrap();
        let error = node.error().await;
        assert!(
            error.starts_with("127.0.0.1:") && error.contains("does not speak omirr's protocol"),
            "{error}"
        );
        assert!(error.ends_with(shown), "{error}");
        node.assert_serves().await;
    }
}

/// The first bytes that a dialling node sends.
fn client_hello(node: &Node) -> Vec<u8> {
    let (config, _) = tls::client(&node.peer, node.key).unwrap();
    let mut client = ClientConnection::new(Arc::new(config), tls::server_name()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn a_truncated_handshake_ends_one_connection() {
    let mut node = Node::start().await;
    let hello = client_hello(&node);
    for sent in [0, 1, 5, hello.len() / 2, hello.len() - 1] {
        let mut tcp = TcpStream::connect(node.at).await.unwrap();
        tcp.write_all(&hello[..sent]).await.unwrap();
        drop(tcp);
        let error = node.error().await;
        let expected = if sent == 0 {
            "hung up without a word"
        } else {
            "hung up during the handshake"
        };
        assert!(error.ends_with(expected), "after {sent} bytes: {error}");
    }
    node.assert_serves().await;
}

#[tokio::test]
async fn a_handshake_that_dawdles_is_ended() {
    let mut node = Node::with_timeout(Duration::from_millis(300)).await;
    let hello = client_hello(&node);
    let mut tcp = TcpStream::connect(node.at).await.unwrap();
    tcp.write_all(&hello[..20]).await.unwrap();
    let error = node.error().await;
    assert!(
        error.ends_with("did not answer within 0.3 s during the handshake"),
        "{error}"
    );
    assert_eq!(
        tcp.read(&mut [0]).await.unwrap_or(0),
        0,
        "the connection is closed"
    );
    node.assert_serves().await;
}

#[tokio::test]
async fn strangers_who_dawdle_do_not_keep_peers_out() {
    let mut node = Node::start().await;
    let mut idle = Vec::new();
    for _ in 0..MAX_HANDSHAKES * 2 {
        idle.push(TcpStream::connect(node.at).await.unwrap());
    }
    for _ in 0..MAX_HANDSHAKES {
        let error = node.error().await;
        assert!(
            error.contains("had to give way: more than 64 connections"),
            "{error}"
        );
    }
    let (mut reader, mut writer) = node.dial().await.unwrap().split();
    writer.send(&Message::Ping).await.unwrap();
    assert_eq!(reader.recv().await.unwrap(), Message::Ping);
    // The eldest were closed, the youngest are still waited for.
    assert_eq!(idle[0].read(&mut [0]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn other_tls_clients_are_told_from_peers() {
    let mut node = Node::start().await;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let browser = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let tcp = TcpStream::connect(node.at).await.unwrap();
    TlsConnector::from(Arc::new(browser))
        .connect(tls::server_name(), tcp)
        .await
        .unwrap_err();
    let error = node.error().await;
    assert!(
        error.contains("speaks TLS, but not as an omirr node does"),
        "{error}"
    );
    node.assert_serves().await;
}

#[tokio::test]
async fn bad_frames_end_one_connection() {
    let mut node = Node::start().await;
    let good = encode(&Message::Refuse {
        reason: "some text".into(),
    })
    .unwrap();
    let mut unknown = good.clone();
    unknown[4] = 0x80;
    let mut corrupt = good.clone();
    corrupt[5] = 77;
    let mut longer = BytesMut::from(&good[..]);
    longer.extend_from_slice(b"xy");
    longer[0] += 2;
    for (sent, expected) in [
        (
            &[0xff, 0xff, 0xff, 0xff, 0][..],
            "sent a frame of 4294967299 bytes, the limit is 16777216",
        ),
        (&[1, 0, 0, 0, 0], "sent a frame without a body"),
        (&unknown, "sent a frame with unknown flags 0b10000000"),
        (&corrupt, "sent a frame that holds no message: "),
        (
            &longer,
            "sent a message followed by 2 bytes that do not belong to it",
        ),
        (
            &[3, 0, 0, 0, 1, 5, 5],
            "sent a frame whose compressed body is damaged: it is not zstd's",
        ),
    ] {
        let mut connection = node.dial().await.unwrap();
        connection.stream.write_all(sent).await.unwrap();
        connection.stream.flush().await.unwrap();
        let error = node.error().await;
        assert!(
            error.starts_with("web2 (127.0.0.1:") && error.contains(expected),
            "{error}"
        );
        node.assert_serves().await;
    }
}

#[tokio::test]
async fn a_connection_that_breaks_off_is_not_closed_in_order() {
    let mut node = Node::start().await;
    let mut connection = node.dial().await.unwrap();
    connection.stream.write_all(&[9, 0, 0, 0, 0, 1]).await.unwrap();
    connection.stream.shutdown().await.unwrap();
    let error = node.error().await;
    assert!(
        error.ends_with("was lost: it ended in the middle of a message"),
        "{error}"
    );

    // As after kill -9: TCP ends, TLS does not.
    let connection = node.dial().await.unwrap();
    let (tcp, _) = connection.stream.into_inner_client();
    drop(tcp);
    let error = node.error().await;
    assert!(error.ends_with("was lost: the other side is gone"), "{error}");
    node.assert_serves().await;
}

trait IntoClient {
    fn into_inner_client(self) -> (TcpStream, ClientConnection);
}

impl IntoClient for tokio_rustls::TlsStream<TcpStream> {
    fn into_inner_client(self) -> (TcpStream, ClientConnection) {
        match self {
            tokio_rustls::TlsStream::Client(client) => client.into_inner(),
            tokio_rustls::TlsStream::Server(_) => panic!("not a client"),
        }
    }
}

#[tokio::test]
async fn receiving_can_be_interrupted_anywhere() {
    let node = Node::start().await;
    let connection = node.dial().await.unwrap();
    let (mut reader, mut writer) = connection.split();
    let message = content((0..300_000u32).flat_map(u32::to_le_bytes).collect());
    let echo = tokio::spawn(async move {
        for _ in 0..5 {
            writer
                .send(&content((0..300_000u32).flat_map(u32::to_le_bytes).collect()))
                .await
                .unwrap();
        }
        writer
    });
    let mut received = 0;
    let mut interrupted = 0;
    while received < 5 {
        tokio::select! {
            biased;
            got = reader.recv() => {
                assert!(got.unwrap() == message);
                received += 1;
            }
            () = tokio::task::yield_now() => interrupted += 1,
        }
    }
    assert!(interrupted > 0);
    echo.await.unwrap();
}

/// A server in TLS that greets with `greeting` and then waits.
async fn greeter(local: Identity, greeting: [u8; 8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let (config, _) = tls::server(&local, |_| true).unwrap();
        let mut stream = tokio_rustls::TlsAcceptor::from(Arc::new(config))
            .accept(tcp)
            .await
            .unwrap();
        stream.write_all(&greeting).await.unwrap();
        stream.flush().await.unwrap();
        drop(stream.read(&mut [0]).await);
    });
    at
}

#[tokio::test]
async fn another_version_is_named_on_both_sides() {
    let (local, peer) = (identity(), identity());
    let mut second = MAGIC;
    second[7] = 2;
    let at = greeter(peer.clone(), second).await;
    let error = dial(&at.to_string(), &local, &peer.public_key(), SOON)
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        format!("{at} speaks omirr protocol 2, this node speaks 1: update the older one")
    );

    let at = greeter(peer.clone(), *b"220 smtp").await;
    let error = dial(&at.to_string(), &local, &peer.public_key(), SOON)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("not as an omirr node does: it greets with \"220 smtp\""),
        "{error}"
    );

    assert!(check_protocol("web2 (10.0.0.2:808)", 1).is_ok());
    let error = check_protocol("web2 (10.0.0.2:808)", 2).unwrap_err().to_string();
    assert_eq!(
        error,
        "web2 (10.0.0.2:808) speaks omirr protocol 2, this node speaks 1: update the older one"
    );

    let mut node = Node::start().await;
    for (greeting, expected) in [
        (second, "speaks omirr protocol 2"),
        (*b"whatever", "greets with \"whatever\""),
    ] {
        let (config, _) = tls::client(&node.peer, node.key).unwrap();
        let tcp = TcpStream::connect(node.at).await.unwrap();
        let mut stream = TlsConnector::from(Arc::new(config))
            .connect(tls::server_name(), tcp)
            .await
            .unwrap();
        stream.write_all(&greeting).await.unwrap();
        stream.flush().await.unwrap();
        let error = node.error().await;
        assert!(error.contains(expected), "{error}");
        node.assert_serves().await;
    }
}

/// A TCP server that answers each connection with `answer`; nothing means that
/// it hangs up.
async fn answering(answer: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            drop(tcp.read(&mut [0; 4096]).await);
            drop(tcp.write_all(answer).await);
        }
    });
    at
}

#[tokio::test]
async fn dialling_says_why_it_failed() {
    let (local, key) = (identity(), identity().public_key());
    let said = async |address: &str, timeout| {
        dial(address, &local, &key, timeout)
            .await
            .unwrap_err()
            .to_string()
    };

    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    assert_eq!(
        said(&closed, SOON).await,
        format!(
            "{closed} refused the connection: nothing listens there; is omirr running on that node, at that port?"
        )
    );
    let http = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.to_string();
    assert!(
        said(&http, SOON)
            .await
            .starts_with(&format!("{http} does not speak omirr's protocol"))
    );
    let rude = answering(b"").await.to_string();
    assert_eq!(
        said(&rude, SOON).await,
        format!("{rude} hung up during the handshake")
    );

    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_at = silent.local_addr().unwrap().to_string();
    assert_eq!(
        said(&silent_at, Duration::from_millis(200)).await,
        format!("{silent_at} did not answer within 0.2 s during the handshake")
    );
    for (wrong, why) in [
        ("web2", "it needs a host and a port"),
        (":808", "it needs a host and a port"),
        ("fd00::2", "it needs a host and a port"),
        ("web2:http", "\"http\" is no port"),
        ("web2:70000", "\"70000\" is no port"),
    ] {
        let error = said(wrong, SOON).await;
        assert!(
            error.starts_with(&format!("{wrong:?} is no address to dial: {why}")),
            "{error}"
        );
    }
    let error = said("no-such-host.invalid:808", SOON).await;
    assert!(
        error.starts_with("the name in no-such-host.invalid:808 cannot be resolved"),
        "{error}"
    );
}

#[tokio::test]
async fn listening_says_why_it_failed() {
    let said = async |address: &str| {
        Listener::bind(&[address.to_owned()])
            .await
            .unwrap_err()
            .to_string()
    };
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = taken.local_addr().unwrap();
    let error = said(&at.to_string()).await;
    assert!(
        error.starts_with(&format!(
            "cannot listen on {at}: another program, or another omirr"
        )),
        "{error}"
    );
    assert!(
        error.contains(&format!("ss -ltnp sport = :{}", at.port())),
        "{error}"
    );
    let error = said("192.0.2.1:8080").await;
    assert!(
        error.contains("this host does not have the address 192.0.2.1"),
        "{error}"
    );
    let error = said("nonsense").await;
    assert!(
        error.starts_with("cannot listen on nonsense: ") && error.contains("0.0.0.0:808"),
        "{error}"
    );
    let error = Listener::bind(&[]).await.unwrap_err().to_string();
    assert!(error.contains("set `listen` under [node]"), "{error}");
    let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    let error = super::listener::explain(&denied, "0.0.0.0:808".parse().unwrap());
    assert!(error.contains("ports below 1024 need a privilege"), "{error}");
}
