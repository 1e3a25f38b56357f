//! How much memory one peer may take up.
//!
//! In: messages that have been decoded, with what they weigh. Out: leave to pass
//! them on, as soon as what the same peer has sent before is used up, over
//! whichever connection it came. A peer that sends faster than this node can
//! work waits; nothing is refused. What a connection reads into before that is
//! bounded by `wire::LIMITS`.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Messages of one peer that wait for the keeper or for a disk, bytes.
pub const PEER_BYTES_MAX: usize = 128 << 20;

/// What one peer may still send.
#[derive(Clone, Debug)]
pub struct Budget {
    left: Arc<Semaphore>,
    all: usize,
}

/// What a message has taken of it, until it is dropped.
#[derive(Debug)]
pub struct Held {
    _permit: OwnedSemaphorePermit,
}

impl Budget {
    pub fn new(bytes: usize) -> Budget {
        Budget {
            left: Arc::new(Semaphore::new(bytes)),
            all: bytes,
        }
    }

    /// Waits until there is room for so many bytes. One message that alone is more
    /// than there is at all gets everything. Cancel-safe.
    pub async fn take(&self, bytes: usize) -> Held {
        let wanted = u32::try_from(bytes.min(self.all)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.left).acquire_many_owned(wanted).await;
        Held {
            _permit: permit.expect("the semaphore is never closed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn poll<T>(future: impl Future<Output = T>) -> Option<T> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn what_fits_exactly_passes_and_one_byte_more_waits_for_room() {
        let budget = Budget::new(PEER_BYTES_MAX);
        let first = poll(budget.take(PEER_BYTES_MAX - 10)).expect("it fits");
        let second = poll(budget.clone().take(10)).expect("it fits exactly");
        assert!(poll(budget.take(1)).is_none(), "one byte more");
        drop(second);
        assert!(poll(budget.take(11)).is_none(), "one byte more");
        assert!(poll(budget.take(10)).is_some());
        drop(first);
        assert!(poll(budget.take(PEER_BYTES_MAX + 1)).is_some(), "alone");
    }
}
