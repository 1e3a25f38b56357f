//! From TOML to a draft: which keys there are, of which type, and which values
//! are right by themselves. Looks at nothing but the text.

use std::{net::SocketAddr, ops::Range, path::PathBuf};

use toml::de::DeTable;

use super::{
    Attach, Config, Excludes, Mode, Node, OwnersBy, Peer, Policy, Share, SourceKind, Tracer, Transport,
    defaults,
    mistake::Mistakes,
    section::{At, Field, Section},
};
use crate::net::PublicKey;

/// The longest name of a node, peer or share. Names become file names in the
/// state directory and parts of conflict copies' names.
const NAME_MAX: usize = 64;

/// The smallest ring that holds a burst worth the name, and the largest that
/// the kernel can count.
const RING_BYTES: Range<u64> = 4 << 10..(1 << 30) + 1;

/// What could be read. A part is none if it is missing or wrong; that has been
/// noted then.
pub(super) struct Draft {
    pub(super) name: Option<At<String>>,
    pub(super) listen: Option<Vec<String>>,
    pub(super) key: Option<At<PathBuf>>,
    pub(super) state_dir: Option<At<PathBuf>>,
    tracer: Option<Tracer>,
    pub(super) peers: Vec<DraftPeer>,
    pub(super) shares: Vec<DraftShare>,
    /// Where `[peers]` and `[shares]` stand, if they do.
    pub(super) peers_line: Option<usize>,
    pub(super) shares_line: Option<usize>,
}

pub(super) struct DraftPeer {
    pub(super) name: String,
    pub(super) line: Option<usize>,
    address: Option<String>,
    pub(super) key: Option<At<PublicKey>>,
    pub(super) mode: Option<Mode>,
}

pub(super) struct DraftShare {
    pub(super) name: String,
    pub(super) label: String,
    pub(super) path: Option<At<PathBuf>>,
    /// What the key `peers` says; `Absent` means every peer.
    pub(super) peers: Field<Vec<At<String>>>,
    excludes: Option<Excludes>,
    conflicts: Option<Policy>,
    owners: Option<OwnersBy>,
    pub(super) mode: Option<Mode>,
    /// What stands in the share's `modes`, by peer, in the order of the file.
    pub(super) modes: Vec<(String, Option<At<Mode>>)>,
}

impl DraftShare {
    /// What the share and its peer allow; none if that is nothing, or wrong.
    pub(super) fn mode_with(&self, peer: &DraftPeer) -> Option<Mode> {
        match self.modes.iter().find(|(name, _)| *name == peer.name) {
            Some((_, own)) => own.as_ref().map(|at| at.value),
            None => self.mode?.and(peer.mode?),
        }
    }
}

/// Reads `text`, noting what is wrong in it.
pub(super) fn read(text: &str, mistakes: &mut Mistakes<'_>) -> Draft {
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        mistakes.syntax(error.span(), error.message().to_owned());
    }
    let top = Section::top(table.get_ref());
    top.refuse_unknown(&["node", "tracer", "peers", "shares"], mistakes);

    let node = top.section("node", mistakes);
    node.refuse_unknown(&["name", "listen", "key", "state_dir"], mistakes);
    let peers = top.section("peers", mistakes);
    let shares = top.section("shares", mistakes);
    Draft {
        name: read_node_name(&node, mistakes),
        listen: read_listen(&node, mistakes),
        key: node
            .absolute_path("key", mistakes)
            .or_default(node.line, defaults::key),
        state_dir: node
            .absolute_path("state_dir", mistakes)
            .or_default(node.line, defaults::state_dir),
        tracer: read_tracer(&top.section("tracer", mistakes), mistakes),
        peers: peers
            .children(mistakes)
            .into_iter()
            .map(|(n, s)| read_peer(n, &s, mistakes))
            .collect(),
        shares: shares
            .children(mistakes)
            .into_iter()
            .map(|(n, s)| read_share(n, &s, mistakes))
            .collect(),
        peers_line: peers.line,
        shares_line: shares.line,
    }
}

/// `node.state_dir` of a text in which anything else may be wrong.
pub(super) fn state_dir(text: &str) -> PathBuf {
    let (table, _) = DeTable::parse_recoverable(text);
    let mut ignored = Mistakes::new(text);
    let node = Section::top(table.get_ref()).section("node", &mut ignored);
    let given = node
        .absolute_path("state_dir", &mut ignored)
        .or_default(None, defaults::state_dir);
    given.map_or_else(defaults::state_dir, |at| at.value)
}

impl Draft {
    /// The configuration, if every part is there. Whether the parts fit one
    /// another is `check`'s to say.
    pub(super) fn finish(self) -> Option<Config> {
        let every_peer: Vec<String> = self.peers.iter().map(|peer| peer.name.clone()).collect();
        let modes: Vec<Vec<Option<Mode>>> = self
            .shares
            .iter()
            .map(|share| self.peers.iter().map(|peer| share.mode_with(peer)).collect())
            .collect();
        let peers = self.peers.into_iter();
        let shares = self.shares.into_iter().zip(modes);
        Some(Config {
            node: Node {
                name: self.name?.value,
                listen: self.listen?,
                key: self.key?.value,
                state_dir: self.state_dir?.value,
            },
            tracer: self.tracer?,
            peers: peers
                .map(|peer| {
                    Some((
                        peer.name,
                        Peer {
                            address: peer.address?,
                            key: peer.key?.value,
                        },
                    ))
                })
                .collect::<Option<_>>()?,
            shares: shares
                .map(|(share, modes)| {
                    let peers = share.peers.or_default(None, || {
                        every_peer
                            .iter()
                            .map(|name| At {
                                value: name.clone(),
                                line: None,
                            })
                            .collect()
                    });
                    let peers: Vec<String> = peers?.value.into_iter().map(|at| at.value).collect();
                    let of = |peer: &String| modes[every_peer.iter().position(|name| name == peer)?];
                    let modes = peers.iter().map(of).collect::<Option<Vec<Mode>>>()?;
                    let peers = peers.into_iter().zip(modes).collect();
                    Some((
                        share.name,
                        Share {
                            path: share.path?.value,
                            peers,
                            excludes: share.excludes?,
                            conflicts: share.conflicts?,
                            owners: share.owners?,
                        },
                    ))
                })
                .collect::<Option<_>>()?,
        })
    }
}

fn read_node_name(node: &Section<'_>, mistakes: &mut Mistakes<'_>) -> Option<At<String>> {
    let name = node
        .string("name", mistakes)
        .or_default(node.line, defaults::node_name)?;
    if let Err(why) = check_name(&name.value) {
        mistakes.at(name.line, format!("[node] name {:?} {why}", name.value));
    }
    Some(name)
}

fn read_listen(node: &Section<'_>, mistakes: &mut Mistakes<'_>) -> Option<Vec<String>> {
    let given = match node.strings("listen", "[\"0.0.0.0:808\"]", mistakes) {
        Field::Absent => return Some(defaults::listen()),
        Field::Wrong => return None,
        Field::Given(given) => given,
    };
    if given.value.is_empty() {
        let text =
            "[node] listen is empty, so no peer could reach this node: name an address, like \"0.0.0.0:808\"";
        mistakes.at(given.line, text.to_owned());
    }
    let mut seen: Vec<SocketAddr> = Vec::new();
    for At { value, line } in &given.value {
        match value.parse::<SocketAddr>() {
            Ok(address) if address.port() == 0 => {
                mistakes.at(
                    *line,
                    format!("[node] listen {value:?} has port 0: peers must know the port"),
                );
            }
            Ok(address) if seen.contains(&address) => {
                mistakes.at(
                    *line,
                    format!("[node] listen names {value:?} twice: take one out"),
                );
            }
            Ok(address) => seen.push(address),
            Err(_) => mistakes.at(
                *line,
                format!(
                    "[node] listen {value:?} is not an address with a port: write it like \
                     \"0.0.0.0:{port}\" or \"[::]:{port}\"",
                    port = defaults::PORT
                ),
            ),
        }
    }
    Some(given.value.into_iter().map(|at| at.value).collect())
}

fn read_tracer(tracer: &Section<'_>, mistakes: &mut Mistakes<'_>) -> Option<Tracer> {
    tracer.refuse_unknown(&["source", "attach", "transport", "ring_size"], mistakes);
    let source = tracer
        .choice("source", mistakes)
        .or_default(None, SourceKind::default);
    let attach = tracer
        .choice("attach", mistakes)
        .or_default(None, Attach::default);
    let transport = tracer
        .choice("transport", mistakes)
        .or_default(None, Transport::default);
    let ring_bytes = tracer
        .size("ring_size", mistakes)
        .or_default(None, || defaults::RING_BYTES as u64)?;
    if !RING_BYTES.contains(&ring_bytes.value) {
        let text = format!(
            "[tracer] ring_size is {}: it must be from 4 KiB to 1 GiB",
            bytesize::ByteSize(ring_bytes.value).display().iec()
        );
        mistakes.at(ring_bytes.line, text);
        return None;
    }
    Some(Tracer {
        source: source?.value,
        attach: attach?.value,
        transport: transport?.value,
        ring_bytes: usize::try_from(ring_bytes.value).ok()?,
    })
}

fn read_peer(name: String, section: &Section<'_>, mistakes: &mut Mistakes<'_>) -> DraftPeer {
    if let Err(why) = check_name(&name) {
        mistakes.at(
            section.line,
            format!("{}: the name {name:?} {why}", section.label),
        );
    }
    section.refuse_unknown(&["address", "key", "mode"], mistakes);
    let label = &section.label;
    let address = section
        .string("address", mistakes)
        .or_missing(section.line, mistakes, || {
            format!(
                "{label} has no address: write where it listens, like \"{name}.example.org:{}\"",
                defaults::PORT
            )
        });
    if let Some(At { value, line }) = &address
        && let Err(why) = check_address(value)
    {
        mistakes.at(*line, format!("{label} address {value:?} {why}"));
    }
    let key = section
        .string("key", mistakes)
        .or_missing(section.line, mistakes, || {
            format!("{label} has no key: write what `omirr key show FILE` prints on {name}")
        });
    let key = key.and_then(|At { value, line }| match value.parse::<PublicKey>() {
        Ok(key) => Some(At { value: key, line }),
        Err(why) => {
            mistakes.at(line, format!("{label} key: {why}"));
            None
        }
    });
    DraftPeer {
        line: section.line,
        address: address.map(|at| at.value),
        key,
        mode: read_mode(section, mistakes),
        name,
    }
}

fn read_share(name: String, section: &Section<'_>, mistakes: &mut Mistakes<'_>) -> DraftShare {
    if let Err(why) = check_name(&name) {
        mistakes.at(
            section.line,
            format!("{}: the name {name:?} {why}", section.label),
        );
    }
    section.refuse_unknown(
        &["path", "peers", "exclude", "conflicts", "owners", "mode", "modes"],
        mistakes,
    );
    let label = section.label.clone();
    let path = section
        .absolute_path("path", mistakes)
        .or_missing(section.line, mistakes, || {
            format!("{label} has no path: name the directory to mirror")
        });
    let peers = section.strings("peers", "[\"web2\"]", mistakes);
    if let Field::Given(At { value, line }) = &peers
        && value.is_empty()
    {
        let text = format!("{label} peers is empty: name a peer, or leave the key out for every peer");
        mistakes.at(*line, text);
    }
    let excludes = match section.strings("exclude", "[\"*.tmp\"]", mistakes) {
        Field::Absent => Some(Excludes::default()),
        Field::Wrong => None,
        Field::Given(given) => read_excludes(&label, given.value, mistakes),
    };
    let conflicts = section
        .choice("conflicts", mistakes)
        .or_default(None, Policy::default);
    let modes = section.section("modes", mistakes);
    let owners = section
        .choice("owners", mistakes)
        .or_default(None, OwnersBy::default);
    DraftShare {
        mode: read_mode(section, mistakes),
        modes: modes
            .keys()
            .into_iter()
            .map(|peer| {
                let given = modes.choice(&peer, mistakes).or_default(None, Mode::default);
                (peer, given)
            })
            .collect(),
        name,
        owners: owners.map(|at| at.value),
        label,
        path,
        peers,
        excludes,
        conflicts: conflicts.map(|at| at.value),
    }
}

fn read_mode(section: &Section<'_>, mistakes: &mut Mistakes<'_>) -> Option<Mode> {
    let given = section.choice("mode", mistakes).or_default(None, Mode::default);
    given.map(|at| at.value)
}

fn read_excludes(label: &str, given: Vec<At<String>>, mistakes: &mut Mistakes<'_>) -> Option<Excludes> {
    let patterns: Vec<String> = given.iter().map(|at| at.value.clone()).collect();
    match Excludes::new(patterns) {
        Ok(excludes) => Some(excludes),
        Err(errors) => {
            for (place, why) in errors {
                if let Some(At { value, line }) = given.get(place) {
                    mistakes.at(*line, format!("{label} exclude {value:?} {why}"));
                }
            }
            None
        }
    }
}

/// Whether `name` can be a node's, peer's or share's: it appears in file names,
/// in messages between nodes and in scripts.
fn check_name(name: &str) -> Result<(), String> {
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if name.is_empty() {
        Err("is empty".to_owned())
    } else if !name.bytes().all(valid) {
        Err("may only have letters, digits, '.', '_' and '-' in it".to_owned())
    } else if name.starts_with(['.', '-']) {
        Err("may not start with '.' or '-'".to_owned())
    } else if name.len() > NAME_MAX {
        Err(format!("is over {NAME_MAX} characters long"))
    } else {
        Ok(())
    }
}

/// Whether `address` is `HOST:PORT`; whether HOST exists only shows when it is
/// dialled.
fn check_address(address: &str) -> Result<(), String> {
    let default = defaults::PORT;
    if let Ok(address) = address.parse::<SocketAddr>() {
        return if address.port() == 0 {
            Err("has port 0".to_owned())
        } else {
            Ok(())
        };
    }
    if address.parse::<std::net::Ipv6Addr>().is_ok() {
        return Err(format!("has no port: write \"[{address}]:{default}\""));
    }
    let Some((host, port)) = address.rsplit_once(':') else {
        return Err(format!("has no port: write \"{address}:{default}\""));
    };
    if host.is_empty()
        || host.len() > 253
        || !host
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"[]:/@".contains(&b))
    {
        return Err(format!(
            "is not HOST:PORT: write it like \"web2.example.org:{default}\""
        ));
    }
    match port.parse::<u16>() {
        Ok(0) => Err("has port 0".to_owned()),
        Ok(_) => Ok(()),
        Err(_) => Err(format!(
            "has {port:?} for a port: it must be a number from 1 to 65535"
        )),
    }
}
