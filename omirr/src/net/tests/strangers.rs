//! Whoever is not the peer that was meant.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::*;
use crate::net::listener::{MAX_HANDSHAKES, MAX_HANDSHAKES_EACH};
use crate::wire::{MAGIC, Message};

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
    let mut node = Node::with_timeout(Duration::from_secs(2)).await;
    let hello = client_hello(&node);
    let mut tcp = TcpStream::connect(node.at).await.unwrap();
    tcp.write_all(&hello[..20]).await.unwrap();
    let error = node.error().await;
    assert!(
        error.ends_with("did not answer within 2 s during the handshake"),
        "{error}"
    );
    assert_eq!(
        tcp.read(&mut [0]).await.unwrap_or(0),
        0,
        "the connection is closed"
    );
    node.assert_serves().await;
}

/// A connection from another of loopback's addresses.
async fn connect_from(host: usize, to: SocketAddr) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    let host = u8::try_from(host).unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, host], 0))).unwrap();
    socket.connect(to).await.unwrap()
}

#[tokio::test]
async fn strangers_who_dawdle_do_not_keep_peers_out() {
    let mut node = Node::start().await;
    let mut idle = Vec::new();
    // Of the addresses of this machine, each has as many as it may.
    for host in 1..=MAX_HANDSHAKES / MAX_HANDSHAKES_EACH {
        for _ in 0..MAX_HANDSHAKES_EACH {
            idle.push(connect_from(host, node.at).await);
        }
    }
    // No further one can be told from no error at all, so one is awaited that
    // must come: one more from the first address, then one more altogether.
    idle.push(connect_from(1, node.at).await);
    let error = node.error().await;
    assert!(
        error.ends_with(
            "had to give way: more than 16 connections were being set up at once from its address"
        ),
        "{error}"
    );
    assert!(error.starts_with("127.0.0.1:"), "{error}");
    for _ in 0..MAX_HANDSHAKES_EACH {
        idle.push(connect_from(100, node.at).await);
        let error = node.error().await;
        assert!(
            error.ends_with("had to give way: more than 64 connections were being set up at once"),
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

/// A server in TLS that greets with `greeting`, and what it is answered.
async fn greeter(local: Identity, greeting: [u8; 8]) -> (SocketAddr, JoinHandle<[u8; 8]>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let answer = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let (config, _) = tls::server(&local, |_| true).unwrap();
        let mut stream = tokio_rustls::TlsAcceptor::from(Arc::new(config))
            .accept(tcp)
            .await
            .unwrap();
        stream.write_all(&greeting).await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).await.unwrap();
        answer
    });
    (at, answer)
}

#[tokio::test]
async fn another_version_is_named_on_both_sides() {
    let (local, peer) = (identity(), identity());
    let mut second = MAGIC;
    second[7] = 9;
    let (at, answer) = greeter(peer.clone(), second).await;
    let error = dial(&at.to_string(), &local, &peer.public_key(), SOON)
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        format!("{at} speaks omirr protocol 9, this node speaks 6: update the older one")
    );

    assert_eq!(answer.await.unwrap(), MAGIC);

    let (at, _) = greeter(peer.clone(), *b"220 smtp").await;
    let error = dial(&at.to_string(), &local, &peer.public_key(), SOON)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("not as an omirr node does: it greets with \"220 smtp\""),
        "{error}"
    );

    assert!(check_protocol("web2 (10.0.0.2:808)", 6).is_ok());
    let error = check_protocol("web2 (10.0.0.2:808)", 9).unwrap_err().to_string();
    assert_eq!(
        error,
        "web2 (10.0.0.2:808) speaks omirr protocol 9, this node speaks 6: update the older one"
    );

    let mut node = Node::start().await;
    for (greeting, expected) in [
        (second, "speaks omirr protocol 9"),
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
