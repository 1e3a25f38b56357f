//! Real sockets on loopback. After whatever a stranger does, the node at the
//! other end still serves its peer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::*;
use crate::wire::{Message, Part};

mod addresses;
mod messages;
mod strangers;

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
