//! One node, one connection: two at once under one key are two nodes.
//!
//! In: a connection that says to be of a peer. Out: whether it may be, while
//! another one is there. A node that was cloned with its key would go on with
//! the same numbers for other rows, and each of the two would lose what the peer
//! has from the other. Nothing here reads or writes a connection: who reads the
//! first one is asked to make it show that it is alive.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

/// A connection that is alive answers within this; one that the network or the
/// peer's machine has left behind does not.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Who is connected as a peer, for one share.
#[derive(Default)]
pub struct Claims {
    current: Mutex<Option<Arc<Claim>>>,
}

/// A connection in the peer's name, until it is dropped.
pub struct Held {
    claims: Arc<Claims>,
    claim: Arc<Claim>,
}

pub struct Claim {
    /// Where it comes from, for messages.
    address: String,
    /// It is to show that it is alive.
    asked: Notify,
    /// How often it has.
    shown: AtomicU64,
    shown_again: watch::Sender<()>,
    /// It has been given up for another.
    given_up: Notify,
    ended: watch::Sender<bool>,
}

impl Claims {
    /// Whether the peer is connected.
    pub fn is_held(&self) -> bool {
        self.current.lock().is_some()
    }

    /// Takes the peer's place for a connection from `address`; the address of the
    /// other one if that is alive.
    pub async fn take(self: &Arc<Claims>, address: String) -> Result<Held, String> {
        let claim = Arc::new(Claim {
            address,
            asked: Notify::new(),
            shown: AtomicU64::new(0),
            shown_again: watch::Sender::new(()),
            given_up: Notify::new(),
            ended: watch::Sender::new(false),
        });
        loop {
            let other = {
                let mut current = self.current.lock();
                match &*current {
                    Some(other) => Arc::clone(other),
                    None => {
                        *current = Some(Arc::clone(&claim));
                        break;
                    }
                }
            };
            if other.is_alive().await {
                return Err(other.address.clone());
            }
            let mut current = self.current.lock();
            if current.as_ref().is_some_and(|now| Arc::ptr_eq(now, &other)) {
                other.given_up.notify_one();
                *current = None;
            }
        }
        Ok(Held {
            claims: Arc::clone(self),
            claim,
        })
    }
}

impl Claim {
    async fn is_alive(&self) -> bool {
        let mut shown_again = self.shown_again.subscribe();
        let mut ended = self.ended.subscribe();
        let before = self.shown.load(Ordering::Acquire);
        self.asked.notify_one();
        let shows = async {
            while self.shown.load(Ordering::Acquire) == before {
                if shown_again.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        tokio::select! {
            shows = shows => shows,
            _ = ended.wait_for(|ended| *ended) => false,
            () = tokio::time::sleep(ANSWERS_WITHIN) => false,
        }
    }
}

impl Held {
    /// Returns when the peer is to be asked whether it is there. Cancel-safe.
    pub async fn asked(&self) {
        self.claim.asked.notified().await;
    }

    /// The peer has answered such a question.
    pub fn is_alive(&self) {
        self.claim.shown.fetch_add(1, Ordering::Release);
        self.claim.shown_again.send_replace(());
    }

    /// Returns when another connection has the peer's place. Cancel-safe.
    pub async fn given_up(&self) {
        self.claim.given_up.notified().await;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.claim.ended.send_replace(true);
        let mut current = self.claims.current.lock();
        if current.as_ref().is_some_and(|now| Arc::ptr_eq(now, &self.claim)) {
            *current = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_second_one_is_refused_only_while_the_first_answers() {
        let claims = Arc::new(Claims::default());
        let first = Arc::new(claims.take("first".to_owned()).await.ok().unwrap());
        let answering = Arc::clone(&first);
        let answers = tokio::spawn(async move {
            loop {
                answering.asked().await;
                answering.is_alive();
            }
        });
        assert_eq!(claims.take("second".to_owned()).await.err().unwrap(), "first");
        answers.abort();
        drop(answers.await);
        // It is silent now, as after a power cut.
        let third = claims.take("third".to_owned()).await.ok().unwrap();
        first.given_up().await;
        drop(first);
        // The one that left has not taken the place of the other with it.
        let waiting = tokio::spawn({
            let claims = Arc::clone(&claims);
            async move { claims.take("fourth".to_owned()).await.is_ok() }
        });
        tokio::task::yield_now().await;
        drop(third);
        assert!(waiting.await.unwrap(), "what has ended holds no place");
    }
}
