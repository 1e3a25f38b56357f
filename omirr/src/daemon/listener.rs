//! Taking connections from peers.
//!
//! In: TCP connections. Out: a receiver for each that proves to be a configured
//! peer. Strangers, garbage and slow callers end in one line of the log.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::receiver;
use super::share::Share;
use crate::net::{self, Identity, Listener, PublicKey};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn run(
    listener: Listener,
    identity: Arc<Identity>,
    shares: Arc<[Arc<Share>]>,
    mut stop: watch::Receiver<bool>,
) {
    let known: BTreeSet<[u8; 32]> = shares
        .iter()
        .flat_map(|share| share.links.iter().map(|link| link.key))
        .collect();
    let known = Arc::new(move |key: &PublicKey| known.contains(key.as_bytes()));
    let mut sessions = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            accepted = listener.accept() => accepted,
        };
        while sessions.try_join_next().is_some() {}
        let incoming = match accepted {
            Ok(incoming) => incoming,
            Err(error) => {
                tracing::error!("no more connections are taken: {error}");
                return;
            }
        };
        let (identity, shares, known, stop) = (
            Arc::clone(&identity),
            Arc::clone(&shares),
            Arc::clone(&known),
            stop.clone(),
        );
        sessions.spawn(async move {
            match net::accept(incoming, &identity, known, HANDSHAKE_TIMEOUT).await {
                Ok((connection, key)) => {
                    receiver::serve(connection, key, &shares, stop).await;
                }
                Err(error) => tracing::warn!("a connection was refused: {error}"),
            }
        });
    }
    while sessions.join_next().await.is_some() {}
}
