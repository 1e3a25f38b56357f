//! The sockets that peers dial, and how they are let in.
//!
//! Anybody can connect, so what a stranger can take up is bounded: a handshake
//! has a time limit, and only so many are under way at once, fewer still from one
//! address. When one more arrives the oldest gives way: a peer's handshake takes milliseconds and is
//! hardly ever the oldest, so that strangers who dawdle do not keep peers out.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsStream};

use super::error::shown;
use super::handshake::{Side, check_greeting, handshake_error, read_greeting, tune, write_greeting};
use super::turns::{Turn, Turns};
use super::{Connection, Identity, NetError, PublicKey, tls};

/// Handshakes under way at once.
pub const MAX_HANDSHAKES: usize = 64;
/// Of those, from one address.
pub const MAX_HANDSHAKES_EACH: usize = 16;
const BACKLOG: u32 = 256;
/// The type of the TLS record that a handshake begins with.
const TLS_HANDSHAKE: u8 = 22;
/// After a refusal: so long the other side may take to read why.
const LINGER: Duration = Duration::from_millis(500);
/// When the process has no descriptors left, they do not come back at once.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Says whether a key is a peer's.
pub type Known = Arc<dyn Fn(&PublicKey) -> bool + Send + Sync>;

/// The sockets of this node.
#[derive(Debug)]
pub struct Listener {
    sockets: Vec<TcpListener>,
    handshakes: Arc<Turns<IpAddr>>,
}

impl Listener {
    /// Listens on every address that `addresses` (`host:port`) name.
    pub async fn bind(addresses: &[String]) -> Result<Listener, NetError> {
        let failed = |address: &str, why: String| NetError::Listen {
            address: address.to_owned(),
            why,
        };
        let mut wanted = Vec::new();
        for address in addresses {
            let found = tokio::net::lookup_host(address).await;
            let found = found.map_err(|why| {
                failed(
                    address,
                    format!("{why}: write an address of this host and a port, as in 0.0.0.0:808"),
                )
            })?;
            wanted.extend(found.map(|at| (address, at)));
        }
        let every_v4 = wanted
            .iter()
            .map(|(_, at)| *at)
            .filter(|at| at.ip() == Ipv4Addr::UNSPECIFIED);
        let every_v4: Vec<u16> = every_v4.map(|at| at.port()).collect();
        let mut sockets = Vec::new();
        for (address, at) in wanted {
            // [::] takes IPv4 in as well, unless 0.0.0.0 is asked for too.
            let only_v6 = every_v4.contains(&at.port());
            sockets.push(listen(at, only_v6).map_err(|error| failed(address, explain(&error, at)))?);
        }
        if sockets.is_empty() {
            return Err(failed(
                "nothing",
                "no address is configured: set `listen` under [node]".into(),
            ));
        }
        Ok(Listener {
            sockets,
            handshakes: Turns::new(MAX_HANDSHAKES, MAX_HANDSHAKES_EACH),
        })
    }

    /// Where this node listens; tells the ports if 0 was asked for.
    pub fn local_addrs(&self) -> Vec<SocketAddr> {
        self.sockets
            .iter()
            .filter_map(|socket| socket.local_addr().ok())
            .collect()
    }

    /// The next connection, to be handed to [`accept`] in a task of its own.
    /// An error ends listening; passing shortages are waited out.
    ///
    /// Cancel-safe.
    pub async fn accept(&self) -> Result<Incoming, NetError> {
        loop {
            let accepted = poll_fn(|context| {
                for socket in &self.sockets {
                    if let Poll::Ready(accepted) = socket.poll_accept(context) {
                        return Poll::Ready(accepted);
                    }
                }
                Poll::Pending
            });
            match accepted.await {
                Ok((tcp, from)) => {
                    let turn = Turns::begin(&self.handshakes, from.ip().to_canonical());
                    return Ok(Incoming { tcp, from, turn });
                }
                Err(error) if is_passing(&error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(EXHAUSTED_PAUSE).await;
                }
                Err(why) => return Err(NetError::Accept { why }),
            }
        }
    }
}

fn listen(at: SocketAddr, only_v6: bool) -> io::Result<TcpListener> {
    let socket = if at.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    if at.is_ipv6() {
        rustix::net::sockopt::set_ipv6_v6only(&socket, only_v6)?;
    }
    // A daemon that restarts finds its port free, though old connections linger.
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

pub(super) fn explain(error: &io::Error, at: SocketAddr) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another program, or another omirr, listens on port {port} already: \
             `ss -ltnp sport = :{port}` shows which; stop it, or change `listen` under [node]",
            port = at.port()
        ),
        io::ErrorKind::PermissionDenied => format!(
            "ports below 1024 need a privilege: start omirr by its systemd unit or as root, \
             or take a port above {} in `listen` under [node]",
            at.port().max(1023)
        ),
        io::ErrorKind::AddrNotAvailable => {
            format!(
                "this host does not have the address {}: correct `listen` under [node]",
                at.ip()
            )
        }
        _ => error.to_string(),
    }
}

/// What `accept` says about one connection, or about a shortage that passes.
fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let passing = [
        Errno::CONNABORTED,
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOBUFS,
        Errno::NOMEM,
        Errno::PERM,
        Errno::PROTO,
        Errno::NETDOWN,
        Errno::NETUNREACH,
        Errno::HOSTUNREACH,
        Errno::INTR,
    ];
    Errno::from_io_error(error).is_some_and(|errno| passing.contains(&errno))
}

/// A connection from anybody, before the handshake.
#[derive(Debug)]
pub struct Incoming {
    tcp: TcpStream,
    from: SocketAddr,
    turn: Turn<IpAddr>,
}

impl Incoming {
    pub fn peer_addr(&self) -> SocketAddr {
        self.from
    }
}

/// Lets a peer in: one whose key is `known`. `timeout` is for all of it.
///
/// Cancel-safe: dropping it closes the connection.
pub async fn accept(
    incoming: Incoming,
    local: &Identity,
    known: Known,
    timeout: Duration,
) -> Result<(Connection, PublicKey), NetError> {
    let Incoming { tcp, from, turn } = incoming;
    let peer = from.to_string();
    tokio::select! {
        outcome = tokio::time::timeout(timeout, let_in(tcp, from, local, known)) => outcome.unwrap_or_else(|_elapsed| {
            Err(NetError::Timeout { peer, doing: "during the handshake", after: timeout })
        }),
        limit = turn.is_over() => Err(NetError::Crowded { peer, limit }),
    }
}

async fn let_in(
    tcp: TcpStream,
    from: SocketAddr,
    local: &Identity,
    known: Known,
) -> Result<(Connection, PublicKey), NetError> {
    let peer = from.to_string();
    let side = Side::Accepting(local.public_key());
    let lost = |why: io::Error| handshake_error(&why, &peer, side);
    tune(&tcp).map_err(lost)?;

    // Something that is not TLS at all is told from its first bytes, which TLS
    // itself would not show.
    let mut first = [0; 48];
    let got = tcp.peek(&mut first).await.map_err(lost)?;
    match first[..got] {
        [] => {
            return Err(NetError::HungUp {
                peer,
                doing: "without a word",
            });
        }
        [TLS_HANDSHAKE, ..] => {}
        _ => {
            return Err(NetError::NotTls {
                peer,
                shown: shown(&first[..got]),
            });
        }
    }

    let is_known = Arc::clone(&known);
    let (config, gate) = tls::server(local, move |key| is_known(key)).map_err(|why| NetError::Tls {
        peer: peer.clone(),
        why: why.to_string(),
    })?;
    let failed = |error: &io::Error| match gate.seen() {
        Some(key) if !known(&key) => NetError::Stranger {
            peer: peer.clone(),
            key,
        },
        _ => handshake_error(error, &peer, side),
    };
    let stream = match TlsAcceptor::from(Arc::new(config))
        .accept(tcp)
        .into_fallible()
        .await
    {
        Ok(stream) => stream,
        Err((error, tcp)) => {
            let error = failed(&error);
            linger(tcp).await;
            return Err(error);
        }
    };
    let mut stream = TlsStream::from(stream);
    write_greeting(&mut stream)
        .await
        .map_err(|error| failed(&error))?;
    let greeting = read_greeting(&mut stream).await.map_err(|error| failed(&error))?;
    check_greeting(greeting, &peer)?;
    let key = gate.seen().expect("the handshake demands a key");
    Ok((Connection::new(stream, peer, from), key))
}

/// Reads what is still arriving before the socket is closed. Closing with unread
/// data resets the connection, and a reset overtakes the alert that tells the
/// other side why it was refused.
async fn linger(mut tcp: TcpStream) {
    let mut rest = [0; 4096];
    let drain = async {
        tcp.shutdown().await?;
        while tcp.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // However it ends, the connection is over.
    if let Ok(Err(error)) = tokio::time::timeout(LINGER, drain).await {
        tracing::trace!(%error, "a refused connection ended early");
    }
}
