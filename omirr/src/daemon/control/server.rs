//! The daemon's side of the control socket.
//!
//! In: lines from whoever may open the socket. Out: the handler's answers. A
//! request can be slow, wrong or abandoned; it never holds up another
//! connection, and nothing that a client sends ends the daemon.

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags};
use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream, unix::OwnedReadHalf},
    sync::Semaphore,
    task::JoinSet,
};

use super::{
    ConflictsReport, ConflictsRequest, LogReport, LogRequest, REQUEST_BYTES_MAX, Reply, Request, ShareReport,
    StatsReport, StatusReport, WaitReply, WaitRequest, socket_path,
};
use crate::crash::{self, Point};
use crate::daemon::StateDir;

/// Connections at once; further ones wait for a free place.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may say nothing, and how long it may leave an answer
/// lying.
const IDLE: Duration = Duration::from_secs(60);
/// The longest barrier; whoever wants more asks again.
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// What a handler gets beyond a barrier's own timeout, to find out who is
/// behind.
const WAIT_GRACE: Duration = Duration::from_secs(5);
/// How often it is looked whether a waiting client is still there.
const GONE_INTERVAL: Duration = Duration::from_millis(500);

/// An answer that takes its time.
pub type Answer<'h, T> = Pin<Box<dyn Future<Output = T> + Send + 'h>>;

/// Whoever knows the answers. An answer may be dropped before it is complete,
/// when the client goes away.
pub trait ControlHandler: Send + Sync {
    fn status(&self) -> Answer<'_, StatusReport>;
    fn stats(&self) -> Answer<'_, StatsReport>;
    /// Returns when everything is durable, or at the request's timeout with who
    /// is behind. The names in the request exist, and the peer is one of the
    /// share's.
    fn wait(&self, request: WaitRequest) -> Answer<'_, WaitReply>;
    /// An error says in words why there is no answer.
    fn log(&self, request: LogRequest) -> Answer<'_, Result<LogReport, String>>;
    /// The share in the request exists. The report fits into a reply.
    fn conflicts(&self, request: ConflictsRequest) -> Answer<'_, Result<ConflictsReport, String>>;
}

/// Why there is no control socket; ends the daemon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    #[error("another daemon answers at {path}: stop it first, or give this one its own state_dir")]
    Live { path: PathBuf },
    #[error("{path} is in the way of the control socket and is no socket: move it away")]
    NotASocket { path: PathBuf },
    #[error("cannot {action} the control socket {path}: {why}")]
    Io {
        action: &'static str,
        path: PathBuf,
        why: io::Error,
    },
}

/// Opens the control socket in `state`, in place of one that a dead daemon
/// left. To be called within a tokio runtime.
pub fn bind(state: &StateDir) -> Result<UnixListener, ControlError> {
    let path = socket_path(state.path());
    let failed = |action, why| ControlError::Io {
        action,
        path: path.clone(),
        why,
    };
    match fs::symlink_metadata(&path) {
        Err(why) if why.kind() == io::ErrorKind::NotFound => {}
        Err(why) => return Err(failed("look at", why)),
        Ok(found) => {
            use std::os::unix::fs::FileTypeExt;
            if !found.file_type().is_socket() {
                return Err(ControlError::NotASocket { path });
            }
            // The state directory's lock says that nobody can be there. It may
            // lie on a filesystem whose locks do not reach the other daemon.
            if std::os::unix::net::UnixStream::connect(&path).is_ok() {
                return Err(ControlError::Live { path });
            }
            fs::remove_file(&path).map_err(|why| failed("remove", why))?;
            crash::here(Point::SocketRemoved);
        }
    }
    // Between these two calls the directory's own mode, 0700, keeps others out.
    let listener = UnixListener::bind(&path).map_err(|why| failed("open", why))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
        .map_err(|why| failed("close to others", why))?;
    crash::here(Point::SocketBound);
    Ok(listener)
}

/// Answers until `shutdown` completes; then drops what is being answered and
/// removes the socket. Not to be dropped before, or the socket stays (the next
/// [`bind`] replaces it).
pub async fn serve(
    listener: UnixListener,
    handler: Arc<dyn ControlHandler>,
    shutdown: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            (place, accepted) = next => match accepted {
                Ok((stream, _)) => {
                    let handler = Arc::clone(&handler);
                    connections.spawn(async move {
                        let _place = place;
                        if let Err(why) = converse(stream, handler.as_ref()).await {
                            tracing::debug!(%why, "a control connection ended");
                        }
                    });
                }
                Err(why) => {
                    // Out of descriptors, most likely: others must end first.
                    tracing::warn!(%why, "cannot accept a control connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    connections.shutdown().await;
    if let Some(path) = listener.local_addr().ok().as_ref().and_then(|a| a.as_pathname())
        && let Err(why) = fs::remove_file(path)
    {
        tracing::debug!(%why, "the control socket stays behind");
    }
}

/// One connection: request, answer, request, answer.
async fn converse(stream: UnixStream, handler: &dyn ControlHandler) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let limit = REQUEST_BYTES_MAX as u64 + 1;
        let reading = async { (&mut read).take(limit).read_until(b'\n', &mut line).await };
        let Ok(count) = tokio::time::timeout(IDLE, reading).await else {
            return Ok(());
        };
        if count? == 0 {
            return Ok(());
        }
        let too_long = line.len() > REQUEST_BYTES_MAX;
        let answer = if too_long {
            refuse(format!(
                "a request is one line of at most {REQUEST_BYTES_MAX} bytes"
            ))
        } else {
            let answer = answer(&line, handler);
            tokio::select! {
                answer = answer => answer,
                () = gone(read.get_ref()) => return Ok(()),
            }
        };
        let Ok(written) = tokio::time::timeout(IDLE, write.write_all(&answer)).await else {
            return Ok(());
        };
        written?;
        if too_long {
            // What follows is the rest of that line, not a request.
            return Ok(());
        }
    }
}

async fn answer(line: &[u8], handler: &dyn ControlHandler) -> Vec<u8> {
    match serde_json::from_slice(line) {
        Ok(Request::Status) => encode(&Reply::Ok(handler.status().await)),
        Ok(Request::Stats) => encode(&Reply::Ok(handler.stats().await)),
        Ok(Request::Wait(request)) => match wait(request, handler).await {
            Ok(reply) => encode(&Reply::Ok(reply)),
            Err(why) => refuse(why),
        },
        Ok(Request::Log(request)) => match handler.log(request).await {
            Ok(report) => encode(&Reply::Ok(report)),
            Err(why) => refuse(why),
        },
        Ok(Request::Conflicts(request)) => match conflicts(request, handler).await {
            Ok(report) => encode(&Reply::Ok(report)),
            Err(why) => refuse(why),
        },
        Err(why) => refuse(format!("not a request that this daemon knows: {why}")),
    }
}

async fn wait(mut request: WaitRequest, handler: &dyn ControlHandler) -> Result<WaitReply, String> {
    let (share, peer) = (request.share.as_deref(), request.peer.as_deref());
    check_names(share, peer, &handler.status().await.shares)?;
    let timeout = Duration::from_millis(request.timeout_ms).min(WAIT_MAX);
    request.timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    tokio::time::timeout(timeout + WAIT_GRACE, handler.wait(request))
        .await
        .map_err(|_| "the daemon is too busy to say who is behind: ask again".to_owned())
}

async fn conflicts(
    request: ConflictsRequest,
    handler: &dyn ControlHandler,
) -> Result<ConflictsReport, String> {
    check_names(request.share.as_deref(), None, &handler.status().await.shares)?;
    handler.conflicts(request).await
}

/// Whether the share and the peer that are asked for exist and belong together;
/// an error names those that do.
fn check_names(share: Option<&str>, peer: Option<&str>, shares: &[ShareReport]) -> Result<(), String> {
    let mut asked = shares.to_vec();
    if let Some(name) = share {
        asked.retain(|share| share.name == name);
        if asked.is_empty() {
            let known = listed(shares.iter().map(|share| share.name.as_str()));
            return Err(format!("there is no share {name:?}: known are {known}"));
        }
    }
    let Some(name) = peer else { return Ok(()) };
    let peers = || {
        asked
            .iter()
            .flat_map(|share| &share.peers)
            .map(|peer| peer.name.as_str())
    };
    if peers().any(|peer| peer == name) {
        return Ok(());
    }
    let known = listed(peers());
    Err(match share {
        Some(share) => format!("the share {share:?} has no peer {name:?}: its peers are {known}"),
        None => format!("no share has a peer {name:?}: known are {known}"),
    })
}

fn listed<'n>(names: impl Iterator<Item = &'n str>) -> String {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

fn refuse(why: String) -> Vec<u8> {
    encode(&Reply::<()>::Error(why))
}

fn encode<T: Serialize>(reply: &Reply<T>) -> Vec<u8> {
    let mut line = serde_json::to_vec(reply)
        .unwrap_or_else(|_| br#"{"error":"the answer cannot be put in JSON"}"#.to_vec());
    line.push(b'\n');
    line
}

/// Completes when the client has closed its whole socket. One that has closed
/// only its sending half (`echo … | socat`) still wants its answer, so an end of
/// input says nothing; the kernel tells the two apart by `POLLHUP`.
async fn gone(read: &OwnedReadHalf) {
    loop {
        tokio::time::sleep(GONE_INTERVAL).await;
        let stream: &UnixStream = read.as_ref();
        let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match rustix::event::poll(&mut fds, Some(&now)) {
            Ok(0) | Err(_) => {}
            Ok(_) => return,
        }
    }
}
