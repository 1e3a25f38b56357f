//! The commands' side of the control socket: one request, one answer.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use super::{REPLY_BYTES_MAX, Reply, Request, socket_path};

/// Why there is no answer. Each says the way out, but for `Refused`, in which
/// the daemon says it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    #[error(
        "no daemon answers at {socket}: start it with `systemctl start omirr`, or `omirr daemon -c {config}`"
    )]
    NotRunning { socket: PathBuf, config: PathBuf },
    #[error("permission denied at {socket}: run this as the daemon's user, most likely root")]
    Denied { socket: PathBuf },
    #[error("the daemon at {socket} did not answer within {}: it may be stuck; look at its log", humantime::format_duration(*.timeout))]
    Silent { socket: PathBuf, timeout: Duration },
    #[error("the daemon at {socket} ended while it was asked: look at its log")]
    Ended { socket: PathBuf },
    #[error("{0}")]
    Refused(String),
    #[error(
        "the answer from {socket} is not understood ({why}): the daemon may be of another version; restart it"
    )]
    Garbled { socket: PathBuf, why: String },
    #[error("cannot talk to the daemon at {socket}: {why}")]
    Io { socket: PathBuf, why: io::Error },
}

/// Where a daemon is asked.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    /// For the message that it does not run.
    config: PathBuf,
}

impl Client {
    /// For the daemon that has `state_dir`, by the configuration `config`.
    pub fn new(state_dir: &Path, config: &Path) -> Client {
        Client {
            socket: socket_path(state_dir),
            config: config.to_owned(),
        }
    }

    /// Asks, and waits at most `timeout` for the answer. Cancel-safe: the
    /// daemon notices that nobody waits.
    pub async fn call<T: DeserializeOwned>(
        &self,
        request: &Request,
        timeout: Duration,
    ) -> Result<T, CallError> {
        let answer = tokio::time::timeout(timeout, self.exchange(request));
        let Ok(line) = answer.await else {
            return Err(CallError::Silent {
                socket: self.socket.clone(),
                timeout,
            });
        };
        let garbled = |why: String| CallError::Garbled {
            socket: self.socket.clone(),
            why,
        };
        match serde_json::from_slice::<Reply<T>>(&line?).map_err(|why| garbled(why.to_string()))? {
            Reply::Ok(answer) => Ok(answer),
            Reply::Error(why) => Err(CallError::Refused(why)),
        }
    }

    async fn exchange(&self, request: &Request) -> Result<Vec<u8>, CallError> {
        let mut stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|why| self.cannot(why))?;
        let mut line = serde_json::to_vec(request).map_err(|why| CallError::Garbled {
            socket: self.socket.clone(),
            why: why.to_string(),
        })?;
        line.push(b'\n');
        stream.write_all(&line).await.map_err(|why| self.cannot(why))?;
        let mut answer = Vec::new();
        BufReader::new(stream)
            .take(REPLY_BYTES_MAX as u64)
            .read_until(b'\n', &mut answer)
            .await
            .map_err(|why| self.cannot(why))?;
        if answer.last() != Some(&b'\n') {
            return Err(CallError::Ended {
                socket: self.socket.clone(),
            });
        }
        Ok(answer)
    }

    fn cannot(&self, why: io::Error) -> CallError {
        let socket = self.socket.clone();
        match why.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory => {
                CallError::NotRunning {
                    socket,
                    config: self.config.clone(),
                }
            }
            io::ErrorKind::PermissionDenied => CallError::Denied { socket },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => CallError::Ended { socket },
            _ => CallError::Io { socket, why },
        }
    }
}
