use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    sync::oneshot,
    task::JoinHandle,
};

use super::{client::Client, *};
use crate::daemon::StateDir;
use crate::model::Mode;

/// A daemon with two shares, in which `mail` never gets to `web3`.
#[derive(Default)]
struct Handler {
    waiting: Arc<AtomicUsize>,
}

fn share(name: &str, peers: &[&str]) -> ShareReport {
    let peer = |name: &&str| PeerReport {
        name: (*name).to_owned(),
        address: format!("{name}:808"),
        state: PeerState::Connected,
        mode: Mode::Both,
        behind: 0,
        last_error: None,
        clock_ahead_ms: Some(-3),
        clock_warning: None,
    };
    ShareReport {
        name: name.to_owned(),
        path: format!("/srv/{name}"),
        state: ShareState::InSync,
        reason: None,
        entries: 7,
        pending: 0,
        conflicts: 0,
        tombstones: 0,
        lacking: Vec::new(),
        pending_items: Vec::new(),
        progress: None,
        peers: peers.iter().map(peer).collect(),
    }
}

impl ControlHandler for Handler {
    fn status(&self) -> Answer<'_, StatusReport> {
        Box::pin(async {
            StatusReport {
                node: "web1".into(),
                version: "0.1.0".into(),
                pid: 1,
                uptime_s: 5,
                source: SourceReport {
                    kind: "fanotify".into(),
                    attach: None,
                    transport: None,
                    reason: "eBPF is not allowed here".into(),
                },
                shares: vec![share("mail", &["web2", "web3"]), share("www", &["web2"])],
            }
        })
    }

    fn stats(&self) -> Answer<'_, StatsReport> {
        Box::pin(async {
            StatsReport {
                events: 42,
                ..StatsReport::default()
            }
        })
    }

    fn log(&self, request: LogRequest) -> Answer<'_, Result<LogReport, String>> {
        let path = request.path.as_path().display().to_string();
        Box::pin(async move { Err(format!("{path} is in no share")) })
    }

    fn conflicts(&self, request: ConflictsRequest) -> Answer<'_, Result<ConflictsReport, String>> {
        let more = u64::from(request.share.is_none());
        Box::pin(async move {
            Ok(ConflictsReport {
                more,
                ..ConflictsReport::default()
            })
        })
    }

    fn wait(&self, request: WaitRequest) -> Answer<'_, WaitReply> {
        /// Counts itself while it is there.
        struct Present(Arc<AtomicUsize>);
        impl Drop for Present {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let present = Present(Arc::clone(&self.waiting));
        Box::pin(async move {
            let _present = present;
            if request.share.as_deref() == Some("www") {
                return WaitReply {
                    done: true,
                    behind: Vec::new(),
                };
            }
            tokio::time::sleep(Duration::from_millis(request.timeout_ms)).await;
            let lag = Lag {
                share: "mail".into(),
                peer: "web3".into(),
                behind: 3,
                reason: None,
            };
            WaitReply {
                done: false,
                behind: vec![lag],
            }
        })
    }
}

struct Served {
    state: TempDir,
    waiting: Arc<AtomicUsize>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

fn start() -> Served {
    let state = tempfile::tempdir().unwrap();
    let opened = StateDir::open(state.path()).unwrap();
    let listener = bind(&opened).unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let handler = Handler::default();
    let waiting = Arc::clone(&handler.waiting);
    let task = tokio::spawn(async move {
        serve(listener, Arc::new(handler), async { stopped.await.unwrap_or(()) }).await;
        drop(opened);
    });
    Served {
        state,
        waiting,
        stop,
        task,
    }
}

impl Served {
    fn client(&self) -> Client {
        Client::new(self.state.path(), Path::new("/etc/omirr/omirr.toml"))
    }

    async fn raw(&self) -> BufReader<UnixStream> {
        BufReader::new(UnixStream::connect(socket_path(self.state.path())).await.unwrap())
    }
}

/// Sends bytes as they are and gives the line that comes back.
async fn exchange(connection: &mut BufReader<UnixStream>, request: &[u8]) -> String {
    connection.get_mut().write_all(request).await.unwrap();
    let mut line = String::new();
    connection.read_line(&mut line).await.unwrap();
    line
}

const SECOND: Duration = Duration::from_secs(1);

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + 10 * SECOND;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn questions_are_answered() {
    let served = start();
    let status: StatusReport = served.client().call(&Request::Status, SECOND).await.unwrap();
    assert_eq!(status, Handler::default().status().await);
    let stats: StatsReport = served.client().call(&Request::Stats, SECOND).await.unwrap();
    assert_eq!(stats.events, 42);
    let mode = fs::metadata(socket_path(served.state.path())).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn the_words_on_the_wire_are_the_documented_ones() {
    let served = start();
    let mut connection = served.raw().await;
    let line = exchange(&mut connection, b"{\"cmd\":\"status\"}\n").await;
    let status: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(status["ok"]["source"]["kind"], "fanotify");
    assert_eq!(status["ok"]["shares"][1]["state"], "in-sync");
    assert_eq!(status["ok"]["shares"][1]["peers"][0]["state"], "connected");
    let line = exchange(
        &mut connection,
        b"{\"cmd\":\"wait\",\"share\":\"www\",\"timeout_ms\":9}\n",
    )
    .await;
    assert_eq!(line, "{\"ok\":{\"done\":true,\"behind\":[]}}\n");
    for (request, expected) in [
        (
            "{\"cmd\":\"conflicts\"}\n",
            "{\"ok\":{\"conflicts\":[],\"more\":1,\"missing\":[]}}\n",
        ),
        (
            "{\"cmd\":\"conflicts\",\"share\":\"www\"}\n",
            "{\"ok\":{\"conflicts\":[],\"more\":0,\"missing\":[]}}\n",
        ),
        (
            "{\"cmd\":\"conflicts\",\"share\":\"x\"}\n",
            "{\"error\":\"there is no share \\\"x\\\": known are mail, www\"}\n",
        ),
    ] {
        assert_eq!(exchange(&mut connection, request.as_bytes()).await, expected);
    }
}

#[tokio::test]
async fn a_barrier_tells_who_is_behind() {
    let served = start();
    let request = Request::Wait(WaitRequest {
        timeout_ms: 10,
        ..WaitRequest::default()
    });
    let reply: WaitReply = served.client().call(&request, SECOND).await.unwrap();
    assert!(!reply.done);
    assert_eq!(
        (reply.behind[0].peer.as_str(), reply.behind[0].behind),
        ("web3", 3)
    );
}

#[tokio::test]
async fn unknown_names_are_refused_with_the_known_ones() {
    let served = start();
    for (share, peer, expected) in [
        (
            Some("wwww"),
            None,
            "there is no share \"wwww\": known are mail, www",
        ),
        (
            None,
            Some("web4"),
            "no share has a peer \"web4\": known are web2, web3",
        ),
        (
            Some("www"),
            Some("web3"),
            "the share \"www\" has no peer \"web3\": its peers are web2",
        ),
    ] {
        let request = WaitRequest {
            share: share.map(str::to_owned),
            peer: peer.map(str::to_owned),
            timeout_ms: 10,
        };
        let why = served
            .client()
            .call::<WaitReply>(&Request::Wait(request), SECOND)
            .await
            .unwrap_err();
        assert_eq!(why.to_string(), expected);
    }
    assert_eq!(
        served.waiting.load(Ordering::SeqCst),
        0,
        "none of these came to the handler"
    );
}

#[tokio::test]
async fn nonsense_gets_an_answer_and_the_next_request_too() {
    let served = start();
    let mut connection = served.raw().await;
    for nonsense in [
        &b"\n"[..],
        b"hello\n",
        b"{}\n",
        b"{\"cmd\":\"halt\"}\n",
        b"\xff\xfe\n",
        b"{\"cmd\":\"wait\"}\n",
    ] {
        let line = exchange(&mut connection, nonsense).await;
        assert!(
            line.starts_with("{\"error\":\"not a request that this daemon knows: "),
            "{line}"
        );
    }
    let line = exchange(&mut connection, b"{\"cmd\":\"stats\"}\n").await;
    assert!(line.starts_with("{\"ok\":{"), "{line}");
}

#[tokio::test]
async fn an_endless_line_is_cut_off() {
    let served = start();
    let mut connection = served.raw().await;
    let line = exchange(&mut connection, &vec![b'x'; REQUEST_BYTES_MAX + 1]).await;
    assert_eq!(
        line,
        "{\"error\":\"a request is one line of at most 65536 bytes\"}\n"
    );
    let mut rest = Vec::new();
    connection.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
    served
        .client()
        .call::<StatsReport>(&Request::Stats, SECOND)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_client_that_closed_only_its_sending_half_gets_its_answer() {
    let served = start();
    let mut connection = served.raw().await;
    connection
        .get_mut()
        .write_all(b"{\"cmd\":\"wait\",\"timeout_ms\":1500}\n")
        .await
        .unwrap();
    connection.get_mut().shutdown().await.unwrap();
    let mut line = String::new();
    connection.read_line(&mut line).await.unwrap();
    assert!(line.starts_with("{\"ok\":{\"done\":false"), "{line:?}");
}

#[tokio::test]
async fn nobody_waits_for_a_client_that_is_gone() {
    let served = start();
    let mut connection = served.raw().await;
    connection
        .get_mut()
        .write_all(b"{\"cmd\":\"wait\",\"timeout_ms\":3600000}\n")
        .await
        .unwrap();
    until("the barrier is asked", || {
        served.waiting.load(Ordering::SeqCst) == 1
    })
    .await;
    drop(connection);
    until("the barrier is dropped", || {
        served.waiting.load(Ordering::SeqCst) == 0
    })
    .await;
}

#[tokio::test]
async fn shutdown_ends_what_is_being_answered_and_removes_the_socket() {
    let served = start();
    let (client, socket) = (served.client(), socket_path(served.state.path()));
    let request = Request::Wait(WaitRequest {
        timeout_ms: 3_600_000,
        ..WaitRequest::default()
    });
    let call = tokio::spawn(async move { client.call::<WaitReply>(&request, 3600 * SECOND).await });
    until("the barrier is asked", || {
        served.waiting.load(Ordering::SeqCst) == 1
    })
    .await;
    served.stop.send(()).unwrap();
    tokio::time::timeout(5 * SECOND, served.task)
        .await
        .expect("serve ends at once")
        .unwrap();
    assert!(matches!(call.await.unwrap(), Err(CallError::Ended { .. })));
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_daemon_that_does_not_run_is_said_so() {
    let state = tempfile::tempdir().unwrap();
    let client = Client::new(state.path(), Path::new("/etc/omirr/omirr.toml"));
    let expected = format!(
        "no daemon answers at {}/control.sock: start it with `systemctl start omirr`, \
         or `omirr daemon -c /etc/omirr/omirr.toml`",
        state.path().display()
    );
    let why = client
        .call::<StatsReport>(&Request::Stats, SECOND)
        .await
        .unwrap_err();
    assert_eq!(why.to_string(), expected);
    // One that was killed leaves its socket.
    drop(std::os::unix::net::UnixListener::bind(socket_path(state.path())).unwrap());
    let why = client
        .call::<StatsReport>(&Request::Stats, SECOND)
        .await
        .unwrap_err();
    assert_eq!(why.to_string(), expected);
}

#[tokio::test]
async fn a_daemon_that_says_nothing_is_not_waited_for() {
    let state = tempfile::tempdir().unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(socket_path(state.path())).unwrap();
    let client = Client::new(state.path(), Path::new("x"));
    let why = client
        .call::<StatsReport>(&Request::Stats, Duration::from_millis(50))
        .await
        .unwrap_err();
    assert!(why.to_string().contains("did not answer within 50ms"), "{why}");
}

#[tokio::test]
async fn a_dead_daemons_socket_is_replaced_and_a_live_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let path = socket_path(dir.path());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let live = bind(&state).unwrap();
    assert!(matches!(bind(&state), Err(ControlError::Live { .. })));
    drop(live);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let why = bind(&state).unwrap_err().to_string();
    assert!(why.contains("is no socket: move it away"), "{why}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}
