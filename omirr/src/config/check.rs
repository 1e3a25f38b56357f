//! Whether the parts of a configuration fit one another and this machine:
//! peers that shares name, keys, and what is at the paths. Looks at the disk,
//! changes nothing on it.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{
    mistake::{Mistakes, listed, nearest},
    read::{Draft, DraftShare},
    section::{At, Field},
};
use crate::net::Identity;

/// The longest state directory, bytes: the control socket's path beneath it
/// must fit the 107 bytes that a Unix socket's address has.
const STATE_DIR_MAX: usize = 107 - "/control.sock".len();

/// Notes everything that does not fit.
pub(super) fn check(draft: &Draft, mistakes: &mut Mistakes<'_>) {
    check_peers(draft, mistakes);
    check_own_key(draft, mistakes);
    check_state_dir(draft, mistakes);
    for share in &draft.shares {
        check_share_peers(share, draft, mistakes);
    }
    check_share_paths(draft, mistakes);
}

fn check_peers(draft: &Draft, mistakes: &mut Mistakes<'_>) {
    if draft.peers.is_empty() {
        let text = "there is no peer: add a section [peers.NAME] with its address and key";
        mistakes.missing(draft.peers_line, text.to_owned());
    }
    for (place, peer) in draft.peers.iter().enumerate() {
        if draft.name.as_ref().is_some_and(|name| name.value == peer.name) {
            let text = format!(
                "[peers.{}] has the name of this node itself: name the other one",
                peer.name
            );
            mistakes.at(peer.line, text);
        }
        let Some(key) = &peer.key else { continue };
        let same = draft.peers[..place]
            .iter()
            .find(|other| other.key.as_ref().is_some_and(|k| k.value == key.value));
        if let Some(other) = same {
            let text = format!(
                "[peers.{}] key is the key of {} too: each node has its own",
                peer.name, other.name
            );
            mistakes.at(key.line, text);
        }
    }
}

/// The private key must be there, nobody else's to read, and no peer's.
fn check_own_key(draft: &Draft, mistakes: &mut Mistakes<'_>) {
    let Some(At { value: path, line }) = &draft.key else {
        return;
    };
    let own = match Identity::load(path) {
        Ok(identity) => identity.public_key(),
        Err(why) => return mistakes.at(*line, format!("[node] key: {why}")),
    };
    for peer in &draft.peers {
        if let Some(key) = peer.key.as_ref().filter(|key| key.value == own) {
            let name = &peer.name;
            let text = format!("[peers.{name}] key is this node's own");
            mistakes.at(
                key.line,
                format!("{text}: write what `omirr key show FILE` prints on {name}"),
            );
        }
    }
}

fn check_state_dir(draft: &Draft, mistakes: &mut Mistakes<'_>) {
    let Some(At { value: path, line }) = &draft.state_dir else {
        return;
    };
    let shown = path.display();
    if path.as_os_str().len() > STATE_DIR_MAX {
        let text = format!(
            "[node] state_dir is {} bytes long: a socket goes there, which allows {STATE_DIR_MAX}",
            path.as_os_str().len()
        );
        mistakes.at(*line, text);
    }
    if let Ok(found) = fs::metadata(path)
        && !found.is_dir()
    {
        mistakes.at(
            *line,
            format!("[node] state_dir {shown} is {}, not a directory", kind_of(&found)),
        );
    }
}

fn check_share_peers(share: &DraftShare, draft: &Draft, mistakes: &mut Mistakes<'_>) {
    check_share_modes(share, draft, mistakes);
    let Field::Given(given) = &share.peers else { return };
    let known = || draft.peers.iter().map(|peer| peer.name.as_str());
    for (place, At { value, line }) in given.value.iter().enumerate() {
        if given.value[..place].iter().any(|other| other.value == *value) {
            mistakes.at(
                *line,
                format!("{} names the peer {value:?} twice: take one out", share.label),
            );
        } else if !known().any(|name| name == value) {
            let hint = match nearest(value, known()) {
                Some(meant) => format!("did you mean {meant:?}?"),
                None if draft.peers.is_empty() => format!("add a section [peers.{value}]"),
                None => format!(
                    "known are {}; or add a section [peers.{value}]",
                    listed(known(), "and")
                ),
            };
            mistakes.at(
                *line,
                format!(
                    "{} names the peer {value:?}, which does not exist: {hint}",
                    share.label
                ),
            );
        }
    }
}

/// Each peer must be allowed something, and `modes` must name peers of the share.
fn check_share_modes(share: &DraftShare, draft: &Draft, mistakes: &mut Mistakes<'_>) {
    let has = |peer: &str| match &share.peers {
        Field::Given(given) => given.value.iter().any(|at| at.value == peer),
        Field::Absent => draft.peers.iter().any(|known| known.name == peer),
        Field::Wrong => true,
    };
    for (peer, given) in &share.modes {
        if !has(peer) {
            let line = given.as_ref().and_then(|at| at.line);
            let text = format!(
                "{} modes names {peer:?}, which is no peer of the share: take it out, or add it to the peers",
                share.label
            );
            mistakes.at(line, text);
        }
    }
    for peer in draft.peers.iter().filter(|peer| has(&peer.name)) {
        let own = share.modes.iter().any(|(name, _)| *name == peer.name);
        if !own
            && let (Some(ours), Some(theirs)) = (share.mode, peer.mode)
            && ours.and(theirs).is_none()
        {
            let name = &peer.name;
            let text = format!(
                "{} has mode {:?} and [peers.{name}] mode {:?}, so nothing would go either way: take {name} out of the \
                 share's peers, or say under modes what is meant",
                share.label,
                ours.name(),
                theirs.name()
            );
            mistakes.at(peer.line, text);
        }
    }
}

/// A share's root as it is on disk.
struct Root<'d> {
    share: &'d DraftShare,
    line: Option<usize>,
    /// Without symlinks.
    real: PathBuf,
    /// Device and inode: two paths to one directory (a bind mount) have the
    /// same.
    id: (u64, u64),
}

fn check_share_paths(draft: &Draft, mistakes: &mut Mistakes<'_>) {
    if draft.shares.is_empty() {
        let text = "there is no share: add a section [shares.NAME] with the path of the directory to mirror";
        mistakes.missing(draft.shares_line, text.to_owned());
    }
    let mut roots: Vec<Root<'_>> = Vec::new();
    for share in &draft.shares {
        let Some(At { value: path, line }) = &share.path else {
            continue;
        };
        match find_root(path) {
            Ok((real, id)) => roots.push(Root {
                share,
                line: *line,
                real,
                id,
            }),
            Err(why) => mistakes.at(*line, format!("{} path {} {why}", share.label, path.display())),
        }
    }
    check_overlap(&roots, mistakes);
    for (key, own) in [("key", &draft.key), ("state_dir", &draft.state_dir)] {
        let Some(At { value: path, line }) = own else {
            continue;
        };
        let real = real_path(path);
        for root in roots.iter().filter(|root| real.starts_with(&root.real)) {
            let text = format!(
                "[node] {key} {} lies inside the share {:?} and would be mirrored: move it out",
                path.display(),
                root.share.name
            );
            mistakes.at(*line, text);
        }
    }
}

/// The directory at `path`; an error is the end of a sentence about it.
fn find_root(path: &Path) -> Result<(PathBuf, (u64, u64)), String> {
    let found = fs::metadata(path).map_err(|why| match why.kind() {
        io::ErrorKind::NotFound => {
            "does not exist: make the directory, or mount what belongs there".to_owned()
        }
        io::ErrorKind::PermissionDenied => {
            "cannot be looked at: permission denied: run this as root".to_owned()
        }
        io::ErrorKind::NotADirectory => {
            "does not exist: a name in the middle of it is not a directory".to_owned()
        }
        _ => format!("cannot be looked at: {why}"),
    })?;
    if !found.is_dir() {
        return Err(format!("is {}: a share is a directory", kind_of(&found)));
    }
    let real = fs::canonicalize(path).map_err(|why| format!("cannot be looked at: {why}"))?;
    Ok((real, (found.dev(), found.ino())))
}

/// No change may belong to two shares.
fn check_overlap(roots: &[Root<'_>], mistakes: &mut Mistakes<'_>) {
    for (place, root) in roots.iter().enumerate() {
        let label = &root.share.label;
        let shown = root.real.display();
        if let Some(twin) = roots[..place].iter().find(|other| other.id == root.id) {
            let text = format!(
                "{label} path {shown} is the same directory as the share {:?}",
                twin.share.name
            );
            mistakes.at(
                root.line,
                format!("{text}: a directory belongs to one share only"),
            );
            continue;
        }
        let above: Vec<(u64, u64)> = root
            .real
            .ancestors()
            .skip(1)
            .filter_map(|ancestor| fs::metadata(ancestor).ok())
            .map(|found| (found.dev(), found.ino()))
            .collect();
        // A twin of the outer one says the same thing again.
        if let Some(outer) = roots.iter().find(|other| above.contains(&other.id)) {
            let text = format!(
                "{label} path {shown} lies inside the share {:?}",
                outer.share.name
            );
            mistakes.at(
                root.line,
                format!(
                    "{text} ({}): a directory belongs to one share only",
                    outer.real.display()
                ),
            );
        }
    }
}

/// `path` without symlinks, as far as it exists.
fn real_path(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let (Ok(real), Ok(rest)) = (fs::canonicalize(ancestor), path.strip_prefix(ancestor)) {
            return real.join(rest);
        }
    }
    path.to_owned()
}

fn kind_of(found: &fs::Metadata) -> &'static str {
    if found.is_dir() {
        "a directory"
    } else if found.is_file() {
        "a file"
    } else {
        "a special file"
    }
}
