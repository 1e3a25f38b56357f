//! A node's Ed25519 key pair: the only thing that makes a node that node.
//!
//! The private key is a PKCS#8 PEM file that nobody but its owner may read. The
//! public key is 32 bytes, shown as base64.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustix::fs::{AtFlags, CWD, OFlags, linkat};
use rustix::io::Errno;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

use crate::crash::{self, Point};

/// What stands before the 32 bytes of an Ed25519 key in a SubjectPublicKeyInfo
/// (RFC 8410): a sequence of the algorithm 1.3.101.112 and a bit string.
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
/// A key file has some 120 bytes; whatever is larger is something else.
const KEY_FILE_BYTES: u64 = 16 << 10;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    #[error(
        "{path} exists already, and a key is never overwritten: choose another file, or move that one away"
    )]
    Exists { path: PathBuf },
    #[error("the key cannot be written to {path}: {why}")]
    Write { path: PathBuf, why: io::Error },
    #[error("there is no key file {path}: make one with `omirr key generate {path}`")]
    Missing { path: PathBuf },
    #[error("the key file {path} cannot be read: {why}")]
    Read { path: PathBuf, why: io::Error },
    #[error("others may read the key file {path} (its mode is {mode:04o}): run `chmod 600 {path}`")]
    Exposed { path: PathBuf, mode: u32 },
    #[error(
        "{path} holds no Ed25519 private key in PKCS#8 PEM ({why}): make one with `omirr key generate FILE`"
    )]
    NotAKey { path: PathBuf, why: String },
    #[error("the system's random numbers cannot be had")]
    Random,
    #[error("{text:?} is no public key ({why}): `omirr key show FILE` on that node prints it, 44 characters")]
    NotAPublicKey { text: String, why: String },
}

/// A node's public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key as TLS carries it.
    pub(super) fn to_spki(self) -> Vec<u8> {
        [&SPKI_PREFIX[..], &self.0].concat()
    }

    /// The key that TLS brought; none if it is of another kind.
    pub(super) fn from_spki(spki: &[u8]) -> Option<PublicKey> {
        spki.strip_prefix(&SPKI_PREFIX)
            .and_then(|key| key.try_into().ok())
            .map(PublicKey)
    }
}

/// Any 32 bytes; whether somebody holds the private half shows in the handshake.
impl From<[u8; 32]> for PublicKey {
    fn from(bytes: [u8; 32]) -> PublicKey {
        PublicKey(bytes)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<PublicKey, KeyError> {
        let wrong = |why: String| KeyError::NotAPublicKey {
            text: text.chars().take(64).collect(),
            why,
        };
        if text.contains("PRIVATE KEY") {
            // Not shown: it ends up in a log.
            return Err(KeyError::NotAPublicKey {
                text: "-----BEGIN PRIVATE KEY-----…".into(),
                why: "it is a private one, which never leaves its node".into(),
            });
        }
        let bytes = STANDARD
            .decode(text.trim())
            .map_err(|why| wrong(format!("not base64: {why}")))?;
        let count = bytes.len();
        let key = bytes
            .try_into()
            .map_err(|_: Vec<u8>| wrong(format!("{count} bytes instead of 32")))?;
        Ok(PublicKey(key))
    }
}

/// This node's key pair.
#[derive(Clone)]
pub struct Identity {
    public: PublicKey,
    certified: Arc<CertifiedKey>,
}

impl Identity {
    /// Makes a key pair and writes it to `path`, which must not exist.
    pub fn generate(path: &Path) -> Result<Identity, KeyError> {
        let (identity, pem) = Identity::random()?;
        let write = |why| KeyError::Write {
            path: path.to_owned(),
            why,
        };
        write_new(path, pem.as_bytes()).map_err(|why| match why.kind() {
            io::ErrorKind::AlreadyExists => KeyError::Exists {
                path: path.to_owned(),
            },
            io::ErrorKind::NotFound => {
                write(io::Error::other("its directory does not exist, make that first"))
            }
            _ => write(why),
        })?;
        Ok(identity)
    }

    /// Reads the key pair that [`Identity::generate`] or another tool wrote.
    pub fn load(path: &Path) -> Result<Identity, KeyError> {
        let read = |why: io::Error| match why.kind() {
            io::ErrorKind::NotFound => KeyError::Missing {
                path: path.to_owned(),
            },
            _ => KeyError::Read {
                path: path.to_owned(),
                why,
            },
        };
        let not_a_key = |why: String| KeyError::NotAKey {
            path: path.to_owned(),
            why,
        };
        let file = File::open(path).map_err(read)?;
        let there = file.metadata().map_err(read)?;
        if !there.is_file() {
            return Err(not_a_key("it is no regular file".into()));
        }
        let mode = there.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        if there.len() > KEY_FILE_BYTES {
            return Err(not_a_key(format!("it has {} bytes", there.len())));
        }
        let mut pem = Vec::new();
        file.take(KEY_FILE_BYTES).read_to_end(&mut pem).map_err(read)?;
        let der = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|why| {
            not_a_key(match why {
                rustls::pki_types::pem::Error::NoItemsFound => "it has no section PRIVATE KEY".into(),
                other => other.to_string(),
            })
        })?;
        Identity::from_pkcs8(&der).map_err(not_a_key)
    }

    pub fn public_key(&self) -> PublicKey {
        self.public
    }

    /// A new key pair, and its file's content.
    pub(super) fn random() -> Result<(Identity, String), KeyError> {
        let random = ring::rand::SystemRandom::new();
        let der =
            Ed25519KeyPair::generate_pkcs8(&random).map_err(|ring::error::Unspecified| KeyError::Random)?;
        let identity =
            Identity::from_pkcs8(&PrivatePkcs8KeyDer::from(der.as_ref())).expect("a key that was just made");
        let text = STANDARD.encode(der.as_ref());
        let mut pem = String::from("-----BEGIN PRIVATE KEY-----\n");
        for line in text.as_bytes().chunks(64) {
            pem.push_str(str::from_utf8(line).expect("base64 is ASCII"));
            pem.push('\n');
        }
        pem.push_str("-----END PRIVATE KEY-----\n");
        Ok((identity, pem))
    }

    fn from_pkcs8(der: &PrivatePkcs8KeyDer<'_>) -> Result<Identity, String> {
        // With or without the public key in it: other tools write the short form.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|why| format!("not an Ed25519 key: {why}"))?;
        let public = PublicKey(
            pair.public_key()
                .as_ref()
                .try_into()
                .expect("an Ed25519 public key has 32 bytes"),
        );
        let signer = rustls::crypto::ring::sign::any_eddsa_type(der).map_err(|why| why.to_string())?;
        let certified = CertifiedKey::new(vec![CertificateDer::from(public.to_spki())], signer);
        Ok(Identity {
            public,
            certified: Arc::new(certified),
        })
    }

    pub(super) fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("public", &self.public)
            .finish_non_exhaustive()
    }
}

/// Writes a file that must not exist yet: it is there whole and on the disk, or
/// not at all. Half a key would be of no use and in the way of the next try.
fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    let nameless = options
        .clone()
        .custom_flags(OFlags::TMPFILE.bits().cast_signed())
        .open(folder);
    match nameless {
        Ok(mut file) => {
            file.write_all(bytes)?;
            file.sync_all()?;
            crash::here(Point::KeyWritten);
            let inode = format!("/proc/self/fd/{}", file.as_raw_fd());
            linkat(CWD, inode, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
        }
        // A filesystem without files that have no name.
        Err(why)
            if matches!(
                Errno::from_io_error(&why),
                Some(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL)
            ) =>
        {
            let mut file = options.create_new(true).open(path)?;
            if let Err(why) = file.write_all(bytes).and_then(|()| file.sync_all()) {
                return Err(match std::fs::remove_file(path) {
                    Ok(()) => why,
                    Err(too) => io::Error::other(format!("{why}, and it cannot be removed: {too}")),
                });
            }
        }
        Err(why) => return Err(why),
    }
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_read_as_it_was_written_and_is_its_owners_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        let made = Identity::generate(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(Identity::load(&path).unwrap().public_key(), made.public_key());
        assert_eq!(made.public_key().to_string().len(), 44);
        assert_eq!(
            made.public_key().to_string().parse::<PublicKey>().unwrap(),
            made.public_key()
        );
        assert_eq!(
            PublicKey::from_spki(&made.public_key().to_spki()),
            Some(made.public_key())
        );
        let secret = std::fs::read_to_string(&path).unwrap();
        assert!(!format!("{made:?}").contains(secret.lines().nth(1).unwrap()));
    }

    #[test]
    fn a_key_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        std::fs::write(&path, "precious").unwrap();
        let said = Identity::generate(&path).unwrap_err().to_string();
        assert!(
            said.contains("exists already") && said.contains("node.key"),
            "{said}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        let said = Identity::generate(&folder.path().join("none/node.key"))
            .unwrap_err()
            .to_string();
        assert!(said.contains("its directory does not exist"), "{said}");
    }

    #[test]
    fn files_that_are_no_good_are_refused_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        let said = |path: &Path| Identity::load(path).unwrap_err().to_string();
        assert!(said(&path).contains("omirr key generate"), "{}", said(&path));
        Identity::generate(&path).unwrap();
        for mode in [0o640, 0o604, 0o700 | 0o010] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(
                said(&path).ends_with(&format!("run `chmod 600 {}`", path.display())),
                "{}",
                said(&path)
            );
        }
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let rsa = "-----BEGIN PRIVATE KEY-----\nMAAA\n-----END PRIVATE KEY-----\n";
        let certificate = "-----BEGIN CERTIFICATE-----\nMAAA\n-----END CERTIFICATE-----\n";
        for wrong in ["", "hello", rsa, certificate, &"x".repeat(20_000)] {
            std::fs::write(&path, wrong).unwrap();
            assert!(
                said(&path).contains("holds no Ed25519 private key"),
                "{}",
                said(&path)
            );
        }
        assert!(said(folder.path()).contains("no regular file"));
    }

    #[test]
    fn a_key_without_its_public_half_is_taken() {
        // RFC 8410, section 10.3.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        let pem = "-----BEGIN PRIVATE KEY-----\n\
                   MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
                   -----END PRIVATE KEY-----\n";
        std::fs::write(&path, pem).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let public = Identity::load(&path).unwrap().public_key().to_string();
        assert_eq!(public, "Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=");
    }

    #[test]
    fn public_keys_with_mistakes_are_told_apart() {
        let said = |text: &str| text.parse::<PublicKey>().unwrap_err().to_string();
        assert!(said("GB9 ECW").contains("not base64"));
        assert!(said("AAAA").contains("3 bytes instead of 32"));
        assert!(said("").contains("0 bytes instead of 32"));
        assert!(said("-----BEGIN PRIVATE KEY-----\nsecret").contains("never leaves its node"));
        assert!(!said("-----BEGIN PRIVATE KEY-----\nsecret").contains("secret"));
    }
}
