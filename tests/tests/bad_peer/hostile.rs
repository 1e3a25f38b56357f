//! A peer that keeps to no rule: TLS by hand, and then any bytes.
//!
//! In: a node's port and the key to show it. Out: a connection on which a test
//! says what it likes, and hears what the node answers.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use omirr::model::{Entry, Flags, Hash, Kind, RelPath, ReplicaId, Row, Sketch, Stamp, Time, Vector, Version};
use omirr::net::PublicKey;
use omirr::wire::frame::{self, Progress};
use omirr::wire::{Decoder, MAGIC, Message, PROTOCOL, WireRow};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme, StreamOwned};

/// An Ed25519 key's SubjectPublicKeyInfo up to the key itself (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
/// The index that the hostile peer claims to have.
pub(crate) const REPLICA: ReplicaId = ReplicaId(0xbad);
/// Nothing that a node has to say takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Hostile {
    stream: StreamOwned<ClientConnection, TcpStream>,
    buffer: BytesMut,
}

impl Hostile {
    /// Connects with the key in `key_file`, whose public half is `public`, and
    /// answers the greeting with `greeting`.
    pub(crate) fn connect(
        port: u16,
        key_file: &Path,
        public: &str,
        greeting: [u8; 8],
    ) -> std::io::Result<Hostile> {
        let key = PrivatePkcs8KeyDer::from_pem_file(key_file).expect("omirr's keys are PKCS#8 PEM");
        let signer = ring::sign::any_eddsa_type(&key).expect("omirr's keys are Ed25519");
        let public: PublicKey = public.parse().expect("omirr prints its keys as it reads them");
        let spki = [&SPKI_PREFIX[..], public.as_bytes()].concat();
        let certified = Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki)], signer));
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("ring has TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody))
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified)));
        config.alpn_protocols = vec![b"omirr/1".to_vec()];
        config.resumption = Resumption::disabled();
        let name = ServerName::try_from("127.0.0.1").expect("an address is a name");
        let tls = ClientConnection::new(Arc::new(config), name).map_err(std::io::Error::other)?;
        let tcp = TcpStream::connect(("127.0.0.1", port))?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_write_timeout(Some(PATIENCE))?;
        tcp.set_nodelay(true)?;
        let mut stream = StreamOwned::new(tls, tcp);
        let mut theirs = [0; 8];
        stream.read_exact(&mut theirs)?;
        assert_eq!(theirs, MAGIC);
        stream.write_all(&greeting)?;
        stream.flush()?;
        Ok(Hostile {
            stream,
            buffer: BytesMut::new(),
        })
    }

    /// Says any bytes; the node may have hung up before it has read them.
    pub(crate) fn say_bytes(&mut self, bytes: &[u8]) {
        // What came of it is for the test to find out, from the node.
        let _ = self.stream.write_all(bytes).and_then(|()| self.stream.flush());
    }

    pub(crate) fn say(&mut self, message: &Message) {
        self.say_bytes(&omirr::wire::encode(message).expect("the message can be encoded"));
    }

    /// The node's next message; none if it has hung up.
    pub(crate) fn hear(&mut self) -> Option<Message> {
        loop {
            if let Progress::Whole(frame) = frame::take(&mut self.buffer).expect("a node sends whole frames")
            {
                return Some(
                    Decoder::default()
                        .decode(&frame)
                        .expect("a node sends right messages"),
                );
            }
            let mut some = [0; 4096];
            match self.stream.read(&mut some) {
                Ok(0) => return None,
                Ok(count) => self.buffer.extend_from_slice(&some[..count]),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                    ) =>
                {
                    return None;
                }
                Err(error) => panic!("the node neither answers nor hangs up: {error}"),
            }
        }
    }

    /// Hears the node out; it must hang up.
    pub(crate) fn hear_out(mut self) -> Vec<Message> {
        let mut heard = Vec::new();
        while let Some(message) = self.hear() {
            heard.push(message);
        }
        heard
    }

    /// Ends the connection without the end that TLS has.
    pub(crate) fn cut(self) {
        self.stream
            .sock
            .shutdown(std::net::Shutdown::Both)
            .expect("a connection can be shut down");
    }
}

/// Takes whoever answers for the right one.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        unreachable!("only TLS 1.3 is offered")
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// A right hello for the share `tree`.
pub(crate) fn hello() -> Message {
    Message::Hello {
        protocol: PROTOCOL,
        software: "omirr 0.1.0".to_owned(),
        node: "mallory".to_owned(),
        share: "tree".to_owned(),
        replica: REPLICA,
        head: 1000,
        names: vec![(REPLICA, "mallory".to_owned())],
    }
}

fn row(path: &str, seq: u64, kind: Kind, inline: Option<&str>) -> WireRow {
    let time = Time {
        secs: 1_700_000_000,
        nanos: 5,
    };
    let mode = if matches!(kind, Kind::Directory) {
        0o755
    } else {
        0o644
    };
    WireRow {
        seq,
        path: RelPath::new(path.as_bytes()).expect("a path that can be written down"),
        row: Row {
            entry: Entry {
                kind,
                mode,
                uid: 0,
                gid: 0,
                mtime: time,
                xattrs: Vec::new(),
                flags: Flags::NONE,
                user: None,
                group: None,
                link: None,
            },
            deleted: false,
            version: Version {
                vector: Vector::from_iter([(REPLICA, seq)]),
                stamp: Stamp {
                    wall_ms: 1_700_000_000_000 + seq,
                    count: 0,
                    replica: REPLICA,
                },
            },
            origin: None,
        },
        moved_from: None,
        inline: inline.map(|text| text.to_owned().into()),
        moved_tree: None,
        sketch: Sketch::default(),
    }
}

/// The row of a file that comes with its content.
pub(crate) fn file(path: &str, seq: u64, content: &str) -> WireRow {
    let kind = Kind::File {
        size: content.len() as u64,
        hash: Hash(*blake3::hash(content.as_bytes()).as_bytes()),
    };
    row(path, seq, kind, Some(content))
}

pub(crate) fn directory(path: &str, seq: u64) -> WireRow {
    row(path, seq, Kind::Directory, None)
}

pub(crate) fn symlink(path: &str, seq: u64, target: &str) -> WireRow {
    let mut row = row(
        path,
        seq,
        Kind::Symlink {
            target: target.as_bytes().into(),
        },
        None,
    );
    row.row.entry.mode = 0o777;
    row
}

pub(crate) fn batch(rows: Vec<WireRow>) -> Message {
    Message::Batch {
        upto: rows.iter().map(|row| row.seq).max().unwrap_or(0),
        rows,
    }
}

/// A frame of `message` in which `old`, found exactly once, is overwritten by
/// `new` of the same length: what [`RelPath`] does not let anyone write down.
pub(crate) fn patched(message: &Message, old: &[u8], new: &[u8]) -> Vec<u8> {
    assert_eq!(old.len(), new.len());
    let mut bytes = omirr::wire::encode(message)
        .expect("the message can be encoded")
        .to_vec();
    assert_eq!(bytes[4], 0, "a compressed frame cannot be patched");
    let places: Vec<_> = (0..bytes.len() - old.len())
        .filter(|&at| bytes[at..].starts_with(old))
        .collect();
    let [at] = places[..] else {
        panic!("{old:?} is there {} times", places.len())
    };
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}
