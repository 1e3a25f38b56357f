//! The event source of last resort: no events at all.
//!
//! In: the clock. Out: every few seconds, and whenever someone asks for a
//! barrier, the word that everything may have changed, upon which the listener
//! compares the tree with its index by stat. It never reads the tree itself.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::{About, Signal, Sink, Source, SourceStats};

/// Ticks until it is dropped.
pub struct ScanSource {
    about: About,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stop: bool,
    /// Barriers asked for and answered, as counts.
    asked: u64,
    answered: u64,
    ticks: u64,
}

impl ScanSource {
    /// Starts to tell `sink` every `interval` that everything may have changed.
    /// `reason` says why nothing better runs.
    pub fn open(interval: Duration, reason: String, sink: Sink) -> std::io::Result<ScanSource> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("omirr-scan".into())
            .spawn(move || tick(&theirs, interval, sink))?;
        let about = About {
            kind: "scan",
            attach: None,
            transport: None,
            reason,
        };
        Ok(ScanSource {
            about,
            shared,
            thread: Some(thread),
        })
    }
}

fn tick(shared: &Shared, interval: Duration, mut sink: Sink) {
    let mut next = Instant::now() + interval;
    let mut state = shared.state.lock();
    while !state.stop {
        if state.asked == state.answered && !shared.changed.wait_until(&mut state, next).timed_out() {
            continue;
        }
        let asked = state.asked;
        drop(state);
        sink.tell(vec![Signal::Compare], None);
        next = Instant::now() + interval;
        state = shared.state.lock();
        state.answered = asked;
        state.ticks += 1;
        shared.changed.notify_all();
    }
}

impl Source for ScanSource {
    fn about(&self) -> &About {
        &self.about
    }

    fn stats(&self) -> SourceStats {
        SourceStats {
            events: self.shared.state.lock().ticks,
            ..SourceStats::default()
        }
    }

    /// Asks for a comparison at once; that one sees every change made before.
    fn barrier(&self, timeout: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        state.asked += 1;
        let ticket = state.asked;
        self.shared.changed.notify_all();
        while state.answered < ticket {
            if self.shared.changed.wait_until(&mut state, deadline).timed_out() && state.answered < ticket {
                anyhow::bail!("the scan did not begin within {timeout:?}");
            }
        }
        Ok(())
    }
}

impl Drop for ScanSource {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been printed; there is nothing
            // left of it to clean up.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn ticks_by_itself_and_at_once_for_a_barrier() {
        let (tell, told) = mpsc::channel();
        let sink: Sink = Box::new(move |batch| tell.send(batch).expect("the test listens"));
        let source = ScanSource::open(Duration::from_millis(20), "test".into(), sink).expect("a thread");
        for _ in 0..2 {
            let batch = told.recv_timeout(Duration::from_secs(10)).expect("a tick");
            assert_eq!(batch, vec![Signal::Compare]);
        }
        drop(source);
        assert!(told.recv_timeout(Duration::from_secs(10)).is_ok() || told.recv().is_err());

        let (tell, told) = mpsc::channel();
        let sink: Sink = Box::new(move |batch| tell.send(batch).expect("the test listens"));
        let source = ScanSource::open(Duration::from_secs(3600), "test".into(), sink).expect("a thread");
        source.barrier(Duration::from_secs(10)).expect("a barrier");
        assert!(
            told.try_recv().is_ok(),
            "the barrier came back before its scan was asked for"
        );
        assert_eq!(source.stats().events, 1);
    }
}
