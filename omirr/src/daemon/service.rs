//! What systemd is told: that the daemon is ready, well, and what it does.
//!
//! Without a service manager (`NOTIFY_SOCKET` unset) all of it is silent.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;

use super::report::Report;

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("the service manager cannot be told: {error}");
    }
}

pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_no_clock) => notify(&[NotifyState::Reloading]),
    }
}

pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Tells the state in a line every few seconds, and that the daemon still
/// answers, as often as the service manager wants to hear it.
pub(super) async fn watchdog(report: Arc<Report>, mut stop: watch::Receiver<bool>) {
    let wanted = sd_notify::watchdog_enabled();
    let every = wanted.map_or(Duration::from_secs(5), |timeout| {
        (timeout / 3).min(Duration::from_secs(5))
    });
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            () = tokio::time::sleep(every) => {}
        }
        let line = report.line();
        let mut states = vec![NotifyState::Status(&line)];
        if wanted.is_some() {
            states.push(NotifyState::Watchdog);
        }
        notify(&states);
    }
}
