//! Taking connections from peers.
//!
//! In: TCP connections. Out: a receiver for each that proves to be a configured
//! peer. Strangers, garbage and slow callers end in one line of the log.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use super::receiver;
use super::share::Share;
use crate::net::{self, Identity, Listener, PublicKey};

/// Callers that have not proved who they are, at once.
const HANDSHAKES_MAX: usize = 64;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn run(
    listener: Listener,
    identity: Arc<Identity>,
    shares: Arc<[Arc<Share>]>,
    mut stop: watch::Receiver<bool>,
) {
    let known: BTreeSet<[u8; 32]> =
        shares.iter().flat_map(|share| share.links.iter().map(|link| link.key)).collect();
    let known = Arc::new(move |key: &PublicKey| known.contains(&key.0));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let mut sessions = tokio::task::JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&handshakes).acquire_owned().await else { return };
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            accepted = listener.accept() => accepted,
        };
        while sessions.try_join_next().is_some() {}
        let tcp = match accepted {
            Ok(tcp) => tcp,
            Err(error) => {
                tracing::warn!("cannot take a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (identity, shares, known, stop) =
            (Arc::clone(&identity), Arc::clone(&shares), Arc::clone(&known), stop.clone());
        sessions.spawn(async move {
            match net::accept(tcp, &identity, known, HANDSHAKE_TIMEOUT).await {
                Ok((connection, key)) => {
                    drop(place);
                    receiver::serve(connection, key, &shares, stop).await;
                }
                Err(error) => tracing::warn!("a connection was refused: {error}"),
            }
        });
    }
    while sessions.join_next().await.is_some() {}
}
