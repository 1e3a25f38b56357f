//! The name under which content that lost is kept, and what such a name tells.
//!
//! In: the path, the losing row's stamp and its author's node name. Out: a path
//! in the same directory, the same on every node that holds that content, so
//! that copies made on several nodes are one.
//!
//! The way back, [`CopyName`], is for people: no decision about mirroring is made
//! by it. A name can often be read in several ways; all of them are given, and
//! who can see what is there ([`CopyName::original`]) tells them apart.

use jiff::{Timestamp, civil, tz::TimeZone};

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
/// Stems are cut before a character: so much less than the room they may have.
const CUT_SHORT_MAX: usize = 3;

/// `name.omirr-conflict-YYYYMMDD-HHMMSS-node.ext`, in UTC. `nth` counts from 1;
/// from 2 on it is added, for when the name is taken by something else.
pub fn conflict_path(path: &RelPath, loser: &Stamp, node: &str, nth: u32) -> RelPath {
    let mut marker = format!("{MARKER}{}-{}", utc(loser.wall_ms), sanitise(node, loser));
    if nth > 1 {
        marker.push_str(&format!("-{nth}"));
    }
    let new = with_marker(path.name(), &marker);
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
    markers(path.name()) > 0
}

/// What the name of a conflict copy tells.
///
/// `README.omirr-conflict-…-web1.org` was `README.org` and comes from the node
/// `web1`, or it was `README` and comes from `web1.org`. A number at the end
/// counts copies, or belongs to the node's name. Of a name that was too long
/// only the beginning is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyName {
    whole: Box<[u8]>,
    /// How long what stands before the marker is, bytes.
    stem: usize,
    /// When the version was made that lost, to the second; none beyond the
    /// calendar.
    pub made: Option<Timestamp>,
    /// At least one.
    readings: Vec<Reading>,
}

/// One way to read a copy's name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reading {
    /// The name before; its beginning and its extension, if it was cut.
    original: Vec<u8>,
    node: String,
    /// Everything between the two parts of the original.
    marker: String,
}

/// Which name a copy had before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Original {
    Is(Vec<u8>),
    /// One of these, and nothing tells which.
    OneOf(Vec<Vec<u8>>),
    /// One that begins as the copy does and was too long to be kept whole.
    Cut,
}

impl CopyName {
    /// None if `name` is none that [`conflict_path`] gives.
    pub fn parse(name: &[u8]) -> Option<CopyName> {
        let mut end = name.len();
        // A copy of a copy has two markers, of which the last one is its own.
        while let Some(at) = name[..end].windows(MARKER.len()).rposition(is_marker) {
            let found = CopyName::parse_at(name, at);
            if found.is_some() {
                return found;
            }
            end = at + MARKER.len() - 1;
        }
        None
    }

    fn parse_at(name: &[u8], at: usize) -> Option<CopyName> {
        let (stem, rest) = (&name[..at], &name[at + MARKER.len()..]);
        let (moment, made, rest) = read_moment(rest)?;
        let rest = rest.strip_prefix(b"-")?;
        let mut copy = CopyName {
            whole: name.into(),
            stem: at,
            made,
            readings: Vec::new(),
        };
        // With an extension first: most files have one, few nodes have a dot.
        let dot = rest.iter().rposition(|&b| b == b'.');
        for split in [dot, Some(rest.len())].into_iter().flatten() {
            let (who, extension) = rest.split_at(split);
            for node in read_nodes(who) {
                let reading = Reading {
                    original: [stem, extension].concat(),
                    node: node.to_owned(),
                    marker: format!("{MARKER}{moment}-{}", String::from_utf8_lossy(who)),
                };
                if copy.can_be(&reading) {
                    copy.readings.push(reading);
                }
            }
        }
        (!copy.readings.is_empty()).then_some(copy)
    }

    fn can_be(&self, reading: &Reading) -> bool {
        let original = &reading.original;
        self.stem > 0
            && RelPath::root().join(original).is_ok()
            && (self.is_cut() || with_marker(original, &reading.marker) == *self.whole)
    }

    /// Whether the original's name may have been longer than what is left of it.
    pub fn is_cut(&self) -> bool {
        self.whole.len() >= NAME_MAX - CUT_SHORT_MAX
    }

    /// Leaves out what names other nodes than these, unless that is all.
    pub fn of_nodes<'n>(mut self, nodes: impl IntoIterator<Item = &'n str>) -> CopyName {
        let known: Vec<String> = nodes.into_iter().map(plain_node).collect();
        let is_known = |reading: &Reading| known.contains(&reading.node);
        if self.readings.iter().any(is_known) {
            self.readings.retain(is_known);
        }
        self
    }

    /// Leaves out what this original would not be called, unless that is all.
    pub fn of_original(mut self, original: &[u8]) -> CopyName {
        let whole = self.whole.clone();
        let fits = |reading: &Reading| with_marker(original, &reading.marker) == *whole;
        if self.readings.iter().any(fits) {
            self.readings.retain(fits);
        }
        self
    }

    /// The nodes from which it may come, the likeliest first.
    pub fn nodes(&self) -> Vec<String> {
        without_doubles(self.readings.iter().map(|reading| reading.node.clone()))
    }

    /// The names that it may have had, the likeliest first; none are known of
    /// one that may be cut.
    pub fn originals(&self) -> Vec<Vec<u8>> {
        if self.is_cut() {
            return Vec::new();
        }
        without_doubles(self.readings.iter().map(|reading| reading.original.clone()))
    }

    /// With what any name begins that it may have had.
    pub fn beginning(&self) -> &[u8] {
        &self.whole[..self.stem]
    }

    /// Whether a version of `name` would be kept under this name.
    pub fn may_be_of(&self, name: &[u8]) -> bool {
        let fits = |reading: &Reading| with_marker(name, &reading.marker) == *self.whole;
        // Copies of one long name are not each other's.
        markers(name) < markers(&self.whole) && self.readings.iter().any(fits)
    }

    /// The name before, where `present` has those names beside the copy that it
    /// [may have had](CopyName::may_be_of).
    pub fn original(&self, mut present: Vec<Vec<u8>>) -> Original {
        let mut originals = self.originals();
        match (originals.len(), present.len()) {
            (1, _) => Original::Is(originals.remove(0)),
            (_, 1) => Original::Is(present.remove(0)),
            (0, 0) => Original::Cut,
            (_, 0) => Original::OneOf(originals),
            _ => Original::OneOf(present),
        }
    }
}

fn without_doubles<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut once = Vec::new();
    for one in all {
        if !once.contains(&one) {
            once.push(one);
        }
    }
    once
}

fn is_marker(part: &[u8]) -> bool {
    part == MARKER.as_bytes()
}

fn markers(name: &[u8]) -> usize {
    name.windows(MARKER.len()).filter(|part| is_marker(part)).count()
}

/// `name` with `marker` before its extension, short enough for a name.
fn with_marker(name: &[u8], marker: &str) -> Vec<u8> {
    let (stem, extension) = split_extension(name);
    let room = NAME_MAX - marker.len() - extension.len();
    [shorten(stem, room), marker.as_bytes(), extension].concat()
}

/// The moment at the start of `rest` as [`utc`] writes it: its text, what it
/// is, and what follows.
fn read_moment(rest: &[u8]) -> Option<(&str, Option<Timestamp>, &[u8])> {
    let is_digit = |b: &u8| b.is_ascii_digit();
    let digits = rest.iter().take_while(|b| is_digit(b)).count();
    let end = if digits == 8 { 15 } else { digits };
    let text = std::str::from_utf8(rest.get(..end)?).ok()?;
    let rest = &rest[end..];
    if digits != 8 {
        // A number, but none that the calendar would have taken.
        let wall_ms = text.parse().ok()?;
        return (utc(wall_ms) == text).then_some((text, None, rest));
    }
    let part = |range: std::ops::Range<usize>| text.get(range)?.parse::<i16>().ok();
    let small = |at: usize| i8::try_from(part(at..at + 2)?).ok();
    let at = civil::DateTime::new(
        part(0..4)?,
        small(4)?,
        small(6)?,
        small(9)?,
        small(11)?,
        small(13)?,
        0,
    );
    let made = at.ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp();
    // Written again it must be the same: `+1` is a number as well.
    let wall_ms = u64::try_from(made.as_millisecond()).ok()?;
    (utc(wall_ms) == text).then_some((text, Some(made), rest))
}

/// The nodes of which `who` may be the name, or the name and a number.
fn read_nodes(who: &[u8]) -> Vec<&str> {
    let whole = std::str::from_utf8(who).ok();
    let counted = whole.and_then(|who| who.rsplit_once('-'));
    let counted = counted.and_then(|(node, nth)| {
        let number = nth.parse::<u32>().ok()?;
        (number > 1 && number.to_string() == nth).then_some(node)
    });
    let is_node = |node: &&str| !node.is_empty() && plain_node(node) == **node;
    [whole, counted].into_iter().flatten().filter(is_node).collect()
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
        .and_then(|ms| Timestamp::from_millisecond(ms).ok());
    // Beyond the calendar, the number itself still names the moment.
    time.map_or_else(
        || wall_ms.to_string(),
        |time| time.strftime("%Y%m%d-%H%M%S").to_string(),
    )
}

fn sanitise(node: &str, stamp: &Stamp) -> String {
    let node = plain_node(node);
    if node.is_empty() {
        format!("{:016x}", stamp.replica.0)
    } else {
        node
    }
}

/// A node's name as it stands in conflict names.
fn plain_node(node: &str) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '-'
        }
    };
    node.chars().map(plain).take(NODE_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PATH_MAX;
    use crate::model::ReplicaId;

    fn stamp() -> Stamp {
        Stamp {
            wall_ms: 1_790_000_000_123,
            count: 0,
            replica: ReplicaId(0xab),
        }
    }

    fn named(path: &[u8], node: &str, nth: u32) -> RelPath {
        conflict_path(&RelPath::new(path).unwrap(), &stamp(), node, nth)
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
        let deep = format!("{}/{}", ["d".repeat(200).as_str(); PATH_MAX / 201].join("/"), "x");
        let kept = named(deep.as_bytes(), "web1", 1);
        assert!(kept.depth() < RelPath::new(deep.as_bytes()).unwrap().depth());
    }

    fn parsed(name: &str) -> CopyName {
        CopyName::parse(name.as_bytes()).expect(name)
    }

    fn texts(names: Vec<Vec<u8>>) -> Vec<String> {
        let text = |name: Vec<u8>| String::from_utf8(name).unwrap();
        names.into_iter().map(text).collect()
    }

    #[test]
    fn a_name_tells_what_it_was_made_of() {
        let copy = parsed("report.omirr-conflict-20260921-141320-web1.txt").of_nodes(["web1", "web2"]);
        assert_eq!(copy.made.unwrap().to_string(), "2026-09-21T14:13:20Z");
        assert_eq!(copy.nodes(), ["web1"]);
        assert_eq!(texts(copy.originals()), ["report.txt"]);
        // Beyond the calendar there is a number.
        let copy = parsed("x.omirr-conflict-18446744073709551615-web1");
        assert_eq!((copy.made, texts(copy.originals())), (None, vec!["x".to_owned()]));
        // A copy of a copy was that copy.
        let once = "a.omirr-conflict-20260921-141320-web1.c";
        let twice = conflict_path(&RelPath::new(once.as_bytes()).unwrap(), &stamp(), "web2", 1);
        let copy = CopyName::parse(twice.name()).unwrap().of_nodes(["web2"]);
        assert_eq!(texts(copy.originals()), [once]);
    }

    #[test]
    fn every_name_that_is_given_can_be_read() {
        for original in [
            "report.txt",
            "report",
            ".bashrc",
            "x.",
            "..x",
            "a.b.c",
            "a-2",
            "a b.\u{e9}",
            "a.\u{e9}-2.d",
            "a.with-quite-a-long-extension-of-32b",
            "a.with-quite-a-long-extension-over-the-limit",
            "a.omirr-conflict-20260921-141320-web1",
        ] {
            for node in [
                "web1",
                "web-2",
                "w.example.org",
                "w/b \u{e9}",
                "",
                "-",
                "2",
                "-2",
                "1.2-3",
            ] {
                for nth in [1, 2, 77] {
                    let path = RelPath::new(original.as_bytes()).unwrap();
                    let kept = conflict_path(&path, &stamp(), node, nth);
                    let copy = CopyName::parse(kept.name()).unwrap_or_else(|| panic!("{kept}"));
                    let originals = texts(copy.originals());
                    assert!(originals.contains(&original.to_owned()), "{kept}: {originals:?}");
                    assert!(copy.may_be_of(original.as_bytes()), "{kept}");
                    let known = sanitise(node, &stamp());
                    assert!(copy.nodes().contains(&known), "{kept}: {:?}", copy.nodes());
                    assert!(original.starts_with(std::str::from_utf8(copy.beginning()).unwrap()));
                    let copy = copy.of_original(original.as_bytes()).of_nodes([known.as_str()]);
                    assert_eq!(copy.nodes(), [known], "{kept}");
                    assert_eq!(texts(copy.originals()), [original], "{kept}");
                }
            }
        }
    }

    #[test]
    fn names_that_can_be_read_in_two_ways_are_told_apart_by_what_is_known() {
        let copy = parsed("README.omirr-conflict-20260921-141320-web1.org");
        assert_eq!(texts(copy.originals()), ["README.org", "README"]);
        assert_eq!(copy.nodes(), ["web1", "web1.org"]);
        let of = |copy: &CopyName, present: &[&str]| {
            copy.original(present.iter().map(|name| name.as_bytes().to_vec()).collect())
        };
        let is = |name: &str| Original::Is(name.into());
        assert_eq!(of(&copy, &["README"]), is("README"));
        assert_eq!(copy.clone().of_original(b"README").nodes(), ["web1.org"]);
        let both = Original::OneOf(vec!["README.org".into(), "README".into()]);
        assert_eq!(of(&copy, &["README.org", "README"]), both);
        assert_eq!(of(&copy, &[]), both, "what is not there is not guessed");
        // Who knows the nodes needs to see nothing.
        assert_eq!(
            of(&copy.clone().of_nodes(["web1", "web2"]), &["README"]),
            is("README.org")
        );
        assert_eq!(of(&copy.clone().of_nodes(["web3"]), &[]), both);
        // A node's name may end with a number.
        let copy = parsed("a.omirr-conflict-20260921-141320-web-2");
        assert_eq!(
            (copy.nodes(), texts(copy.originals())),
            (vec!["web-2".into(), "web".into()], vec!["a".into()])
        );
        assert_eq!(copy.clone().of_nodes(["web"]).nodes(), ["web"]);
        assert_eq!(copy.of_nodes(["web", "web-2"]).nodes(), ["web-2", "web"]);
        for one in ["web-1", "web-02", "web-4294967296", "-2"] {
            assert_eq!(
                parsed(&format!("a.omirr-conflict-20260921-141320-{one}")).nodes(),
                [one]
            );
        }
    }

    #[test]
    fn the_original_of_a_name_that_was_cut_is_found_among_what_is_there() {
        let long = format!("{}.tar.gz", "\u{e4}".repeat(120));
        let other = format!("{}-other.gz", "\u{e4}".repeat(119));
        let kept = named(long.as_bytes(), "web1", 1);
        let copy = CopyName::parse(kept.name()).unwrap();
        assert!(copy.is_cut() && copy.originals().is_empty());
        assert!(long.as_bytes().starts_with(copy.beginning()));
        assert_eq!(copy.original(Vec::new()), Original::Cut);
        assert!(copy.may_be_of(long.as_bytes()) && copy.may_be_of(other.as_bytes()));
        for not in [
            "\u{e4}.gz",
            "x",
            &long.replace(".gz", ".xz"),
            &format!("{}.gz", "\u{e4}".repeat(20)),
        ] {
            assert!(!copy.may_be_of(not.as_bytes()), "{not}");
        }
        let sibling = named(long.as_bytes(), "web1", 2);
        assert!(
            !copy.may_be_of(sibling.name()),
            "another copy is not its original"
        );
        let present = vec![long.clone().into_bytes()];
        assert_eq!(copy.original(present), Original::Is(long.into_bytes()));
    }

    #[test]
    fn what_is_no_copy_has_no_such_name() {
        for name in [
            "",
            "report.txt",
            "a.omirr-conflict-",
            "a.omirr-conflict-notes.txt",
            "a.omirr-conflict-20260921-141320",
            "a.omirr-conflict-20260921-141320-",
            "a.omirr-conflict-20261321-141320-web1",
            "a.omirr-conflict-20260921-146020-web1",
            "a.omirr-conflict-2026092+-141320-web1",
            "a.omirr-conflict-12-web1",
            "a.omirr-conflict-20260921-141320-w b",
            ".omirr-conflict-20260921-141320-web1",
            "..omirr-conflict-20260921-141320-web1",
            &format!("a.omirr-conflict-20260921-141320-{}", "n".repeat(64)),
        ] {
            assert_eq!(CopyName::parse(name.as_bytes()), None, "{name}");
        }
        assert!(CopyName::parse(b"a\xff.omirr-conflict-20260921-141320-web1.\xfe").is_some());
        assert!(CopyName::parse(b"a.omirr-conflict-20260921-141320-w\xff").is_none());
    }
}
