//! Messages, good and bad, between peers.

use bytes::BytesMut;
use rustls::ClientConnection;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::*;
use crate::wire::{LIMITS, Message, encode};

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
    writer.send(&Message::Pong { clock_ms: 7 }).await.unwrap();
    assert_eq!(reader.recv().await.unwrap(), Message::Pong { clock_ms: 7 });
    drop((reader, writer));
    node.error().await;
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
