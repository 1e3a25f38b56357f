//! The name under which content that lost is kept.
//!
//! In: the path, the losing row's stamp and its author's node name. Out: a path
//! in the same directory, the same on every node that holds that content, so
//! that copies made on several nodes are one.

use crate::model::{RelPath, Stamp};

/// Linux' limit on a name, bytes.
const NAME_MAX: usize = 255;
/// What follows a name's last dot counts as its extension up to this length,
/// dot included.
const EXTENSION_MAX: usize = 32;
/// Node names are cut to this in conflict names.
const NODE_MAX: usize = 63;
/// What tells a conflict copy's name from any other.
const MARKER: &str = ".omirr-conflict-";

/// `name.omirr-conflict-YYYYMMDD-HHMMSS-node.ext`, in UTC. `nth` counts from 1;
/// from 2 on it is added, for when the name is taken by something else.
pub fn conflict_path(path: &RelPath, loser: &Stamp, node: &str, nth: u32) -> RelPath {
    let name = path.name();
    let (stem, extension) = split_extension(name);
    let mut marker = format!("{MARKER}{}-{}", utc(loser.wall_ms), sanitise(node, loser));
    if nth > 1 {
        marker.push_str(&format!("-{nth}"));
    }
    let room = NAME_MAX - marker.len() - extension.len();
    let mut new = shorten(stem, room).to_vec();
    new.extend_from_slice(marker.as_bytes());
    new.extend_from_slice(extension);
    // Where the longer name makes the path too long, a directory further up
    // takes it; beneath the root it always fits.
    let mut dir = path.parent();
    while let Some(at) = dir {
        if let Ok(kept) = at.join(&new) {
            return kept;
        }
        dir = at.parent();
    }
    path.clone()
}

/// Whether a path has a name that [`conflict_path`] gives.
pub fn is_conflict_path(path: &RelPath) -> bool {
    path.name()
        .windows(MARKER.len())
        .any(|part| part == MARKER.as_bytes())
}

fn split_extension(name: &[u8]) -> (&[u8], &[u8]) {
    match name.iter().rposition(|&b| b == b'.') {
        Some(dot) if dot > 0 && dot + 1 < name.len() && name.len() - dot <= EXTENSION_MAX => {
            name.split_at(dot)
        }
        _ => (name, b""),
    }
}

/// The first `room` bytes, less so that no UTF-8 character is cut.
fn shorten(stem: &[u8], room: usize) -> &[u8] {
    if stem.len() <= room {
        return stem;
    }
    let mut end = room;
    while end > 0 && room - end < 4 && stem[end] & 0xc0 == 0x80 {
        end -= 1;
    }
    &stem[..end]
}

fn utc(wall_ms: u64) -> String {
    let time = i64::try_from(wall_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    // Beyond the calendar, the number itself still names the moment.
    time.map_or_else(
        || wall_ms.to_string(),
        |time| time.strftime("%Y%m%d-%H%M%S").to_string(),
    )
}

fn sanitise(node: &str, stamp: &Stamp) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '-'
        }
    };
    let node: String = node.chars().map(plain).take(NODE_MAX).collect();
    if node.is_empty() {
        format!("{:016x}", stamp.replica.0)
    } else {
        node
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ReplicaId;

    fn named(path: &[u8], node: &str, nth: u32) -> RelPath {
        let stamp = Stamp {
            wall_ms: 1_790_000_000_123,
            count: 0,
            replica: ReplicaId(0xab),
        };
        conflict_path(&RelPath::new(path).unwrap(), &stamp, node, nth)
    }

    #[test]
    fn names_say_when_and_who() {
        for (path, node, nth, expected) in [
            (
                "a/report.txt",
                "web1",
                1,
                "a/report.omirr-conflict-20260921-141320-web1.txt",
            ),
            (
                "report",
                "web1",
                2,
                "report.omirr-conflict-20260921-141320-web1-2",
            ),
            (
                ".bashrc",
                "w/b é",
                1,
                ".bashrc.omirr-conflict-20260921-141320-w-b--",
            ),
            ("x.", "", 1, "x..omirr-conflict-20260921-141320-00000000000000ab"),
        ] {
            assert_eq!(named(path.as_bytes(), node, nth).to_string(), expected);
        }
    }

    #[test]
    fn long_names_are_cut_but_keep_their_extension() {
        let long = format!("{}.tar.gz", "ä".repeat(120));
        let kept = named(long.as_bytes(), &"n".repeat(300), 12);
        assert!(kept.name().len() <= 255 && kept.name().ends_with(b"-12.gz"));
        assert!(std::str::from_utf8(kept.name()).is_ok(), "no character is cut");
        let deep = format!("{}/{}", ["d".repeat(200).as_str(); 20].join("/"), "x".repeat(70));
        let kept = named(deep.as_bytes(), "web1", 1);
        assert!(kept.depth() < RelPath::new(deep.as_bytes()).unwrap().depth());
    }
}
