//! Shares that have stopped because a disk could not be written.
//!
//! In: shares, some of which have stopped for now. Out: word that it is worth
//! starting again, because what they need can be written. Index and tree are
//! left alone here; a new start opens the index as its last durable commit left
//! it, and finds the rest as after a crash.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::share::Share;
use crate::apply;

/// The first pause before it is tried; each new start in vain doubles it.
pub(super) const PAUSE_MIN: Duration = Duration::from_secs(2);
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(60);
/// So much must fit beside an index. A commit writes less, unless it is one of
/// very many rows; then it is tried once more.
const ROOM_BYTES: usize = 4 << 20;
/// Written beside the index, and removed at once.
const PROBE: &str = "probe";

/// Returns when a share that has stopped for now could go on; `folder` is where
/// a share's index is. Cancel-safe.
pub(super) async fn worth_it(
    shares: Arc<[Arc<Share>]>,
    folder: impl Fn(&str) -> PathBuf,
    mut pause: Duration,
) {
    loop {
        tokio::time::sleep(pause).await;
        pause = PAUSE_MIN.max(pause / 2);
        let stopped = shares
            .iter()
            .filter(|share| share.progress.lock().stopped_for_now);
        for share in stopped {
            let (share, folder) = (Arc::clone(share), folder(&share.name));
            let name = share.name.clone();
            let tried = tokio::task::spawn_blocking(move || {
                has_room(&folder).map_err(|error| error.to_string())?;
                apply::sync_all(&share.root).map_err(|error| error.to_string())
            });
            match tried.await {
                Ok(Ok(())) => {
                    tracing::info!(share = %name, "what stopped the share has passed: it starts again");
                    return;
                }
                Ok(Err(why)) => tracing::debug!(share = %name, "still stopped: {why}"),
                Err(_cancelled) => {}
            }
        }
    }
}

fn has_room(folder: &Path) -> io::Result<()> {
    let path = folder.join(PROBE);
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(&vec![1; ROOM_BYTES])?;
        file.sync_all()
    });
    // Whether or not it could be written, nobody wants it.
    let removed = std::fs::remove_file(&path);
    written.and(removed)
}
