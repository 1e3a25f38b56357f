//! TLS 1.3 between nodes that know each other's public keys.
//!
//! There are no certificates, no authorities and no host names: each side sends
//! its Ed25519 key as it is (RFC 7250), proves that it holds it, and checks the
//! other's against the configuration. Sessions are never resumed: a resumed one
//! would not check the key again, so that a key taken out of the configuration
//! would go on being let in.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    ServerConfig, SignatureScheme,
};

use super::{Identity, PublicKey};

/// Named in the handshake (RFC 7301). The number is that of the framing.
const ALPN: &[u8] = b"omirr/1";

/// What both verifiers do: let in whom the caller wants, and remember whom they
/// saw, for the message if that was somebody else.
pub(super) struct Gate {
    wanted: Box<dyn Fn(&PublicKey) -> bool + Send + Sync>,
    seen: Mutex<Option<PublicKey>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Gate {
    fn new(
        provider: &CryptoProvider,
        wanted: impl Fn(&PublicKey) -> bool + Send + Sync + 'static,
    ) -> Arc<Gate> {
        Arc::new(Gate {
            wanted: Box::new(wanted),
            seen: Mutex::new(None),
            algorithms: provider.signature_verification_algorithms,
        })
    }

    /// The key that the other side showed. It has proved to hold it only if the
    /// handshake succeeded.
    pub(super) fn seen(&self) -> Option<PublicKey> {
        *self.seen.lock()
    }

    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), Error> {
        let Some(key) = PublicKey::from_spki(shown) else {
            return Err(Error::InvalidCertificate(CertificateError::BadEncoding));
        };
        *self.seen.lock() = Some(key);
        if (self.wanted)(&key) {
            return Ok(());
        }
        // Travels as the alert `access_denied`, by which the other side knows.
        Err(Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure,
        ))
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("seen", &self.seen())
            .finish_non_exhaustive()
    }
}

/// The methods that rustls' two traits have in common.
macro_rules! alike {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::PeerIncompatible(
                PeerIncompatible::Tls13RequiredForQuic,
            ))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let key = SubjectPublicKeyInfoDer::from(cert.as_ref());
            verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for Gate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    alike!();
}

impl ClientCertVerifier for Gate {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    alike!();
}

/// For one dialled connection, which must end at `peer`.
pub(super) fn client(local: &Identity, peer: PublicKey) -> Result<(ClientConfig, Arc<Gate>), Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let gate = Gate::new(&provider, move |key| *key == peer);
    let verifier: Arc<dyn ServerCertVerifier> = Arc::<Gate>::clone(&gate);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
            local.certified(),
        )));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok((config, gate))
}

/// For one accepted connection, from any peer that is `known`.
pub(super) fn server(
    local: &Identity,
    known: impl Fn(&PublicKey) -> bool + Send + Sync + 'static,
) -> Result<(ServerConfig, Arc<Gate>), Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let gate = Gate::new(&provider, known);
    let verifier: Arc<dyn ClientCertVerifier> = Arc::<Gate>::clone(&gate);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(
            local.certified(),
        )));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok((config, gate))
}

/// Never sent (SNI is off), but rustls wants one.
pub(super) fn server_name() -> ServerName<'static> {
    ServerName::try_from("omirr").expect("a valid name")
}
