//! Waiting on a thread of one's own for what tasks of the runtime do.
//!
//! In: a future and a moment. Out: what the future gives, if it does so before.
//! The thread sleeps in the kernel until the one or the other. The runtime's own
//! timer is not asked: it counts whole milliseconds, and telling it of a moment
//! wakes one of its threads.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Instant;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Unpark>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Unpark>) {
        self.0.unpark();
    }
}

/// What `future` gives; none if it has given nothing at the moment `until`.
pub(super) fn done_or<T>(until: Instant, future: impl Future<Output = T>) -> Option<T> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return Some(value);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        // It may return early, and returns at once if it was woken since the poll.
        std::thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ends_with_the_future_or_at_the_moment() {
        let now = Instant::now();
        assert_eq!(done_or(now, async { 1 }), Some(1));
        let moment = now + Duration::from_millis(20);
        assert_eq!(done_or(moment, std::future::pending::<()>()), None);
        assert!(Instant::now() >= moment);
        let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            sender.blocking_send(7)
        });
        let far = now + Duration::from_secs(600);
        assert_eq!(done_or(far, receiver.recv()), Some(Some(7)));
        other.join().expect("it ends").expect("somebody waits");
    }
}
