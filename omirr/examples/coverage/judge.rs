//! From what a source saw to a verdict.
//!
//! A change is seen if an event names the right path and operation, with the
//! right bytes, and came when the change was complete: its time is not before
//! the mark that the changer set, and whoever looked at the file when the event
//! arrived found the new content. An event before that does not count: a daemon
//! that reads then keeps the old content.

use std::path::PathBuf;

use omirr::source::Op;
use serde_json::json;

use crate::place::Place;
use crate::rows::{Expect, Row, Stage};
use crate::watchers::{Seen, Watcher};

/// What happens, one after another, until the change was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The change itself; descriptors and mappings stay.
    Change,
    /// The kernel writes its dirty pages back, as it does on its own every
    /// half minute.
    WriteBack,
    /// Descriptors are closed, mappings are let go.
    Close,
}

impl Phase {
    pub const ALL: [Phase; 3] = [Phase::Change, Phase::WriteBack, Phase::Close];

    pub fn order(self) -> &'static str {
        match self {
            Phase::Change => "act",
            Phase::WriteBack => "write-back",
            Phase::Close => "release",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Seen,
    /// Seen at the next write-back.
    AtWriteBack,
    /// Seen when the last descriptor and mapping went.
    AtClose,
    /// Only an event that came before the change was complete.
    Early,
    No,
    /// One or the other, by chance.
    Varies,
    /// There is no such change here, and why.
    NotThere(String),
    /// The source cannot watch here, and why.
    NoSource(String),
}

impl Verdict {
    fn word(&self) -> &'static str {
        match self {
            Verdict::Seen => "yes",
            Verdict::AtWriteBack => "at write-back",
            Verdict::AtClose => "at close",
            Verdict::Early => "early",
            Verdict::No => "no",
            Verdict::Varies => "varies",
            Verdict::NotThere(_) => "n/a",
            Verdict::NoSource(_) => "no source",
        }
    }

    fn reason(&self) -> &str {
        match self {
            Verdict::NotThere(reason) | Verdict::NoSource(reason) => reason,
            _ => "",
        }
    }
}

/// The verdict after a phase, if it is in.
pub fn judge(row: &Row, stage: &Stage, watcher: &Watcher, mark: u64, phase: Phase) -> Option<Verdict> {
    if let Some(reason) = watcher.cannot_watch(&stage.place) {
        return Some(Verdict::NoSource(reason));
    }
    let good = |s: &&Seen| s.time_ns >= mark && s.fresh;
    let after: Vec<&Seen> = watcher.seen.iter().filter(good).collect();
    if phase == Phase::Change {
        let exact = watcher.is_exact();
        let all = row.expect.iter().all(|e| is_seen(e, stage, &after, exact));
        return all.then_some(Verdict::Seen);
    }
    // Later, any new event of the same path makes the daemon look at it.
    let after: Vec<&Seen> = watcher.seen[watcher.before..].iter().filter(good).collect();
    let all = row.expect.iter().all(|e| names(e, stage, &after));
    match phase {
        _ if !all => None,
        Phase::WriteBack => Some(Verdict::AtWriteBack),
        _ => Some(Verdict::AtClose),
    }
}

/// The verdict when all phases are over.
pub fn never(row: &Row, stage: &Stage, watcher: &Watcher) -> Verdict {
    let all: Vec<&Seen> = watcher.seen.iter().collect();
    if row.expect.iter().all(|e| names(e, stage, &all)) {
        Verdict::Early
    } else {
        Verdict::No
    }
}

fn path(stage: &Stage, name: Option<&str>) -> Option<PathBuf> {
    name.map(|name| stage.full(name))
}

fn names(expect: &Expect, stage: &Stage, seen: &[&Seen]) -> bool {
    let (at, to) = (path(stage, expect.at), path(stage, expect.to));
    let target = to.or(at);
    target.is_some_and(|path| seen.iter().any(|s| s.at.contains(&path) || s.to.contains(&path)))
}

fn is_seen(expect: &Expect, stage: &Stage, seen: &[&Seen], exact: bool) -> bool {
    let (at, to) = (path(stage, expect.at), path(stage, expect.to));
    // Where no name is asked for, a wrong one is worse than none.
    let right_name = stage.full("n");
    let nameless = at.is_none() && to.is_none();
    let named = |s: &&&Seen| !nameless || s.at.is_empty() || s.at.contains(&right_name);
    if !exact {
        // Other sources tell less; the kind of change and the paths must be right.
        let kind: Vec<&&Seen> = seen
            .iter()
            .filter(|s| kind(s.op) == kind(expect.op))
            .filter(named)
            .collect();
        let told = |path: &PathBuf| kind.iter().any(|s| s.at.contains(path) || s.to.contains(path));
        if nameless {
            return !kind.is_empty();
        }
        // A link is told as a new name.
        let from = at.as_ref().is_none_or(|path| expect.op == Op::Link || told(path));
        return from && to.as_ref().is_none_or(told);
    }
    let right: Vec<&&Seen> = seen
        .iter()
        .filter(|s| s.op == expect.op)
        .filter(named)
        .filter(|s| at.as_ref().is_none_or(|path| s.at.contains(path)))
        .filter(|s| to.as_ref().is_none_or(|path| s.to.contains(path)))
        .collect();
    let Some((start, end)) = expect.range else {
        return !right.is_empty();
    };
    // A long copy may be told in pieces.
    let from = right.iter().filter_map(|s| Some(s.range?.0)).min();
    let to = right.iter().filter_map(|s| Some(s.range?.1)).max();
    (from, to) == (Some(start), Some(end))
}

/// Operations that a source without detail cannot tell apart.
fn kind(op: Op) -> u8 {
    match op {
        Op::Write | Op::Truncate | Op::Fallocate | Op::Close => 0,
        Op::Create | Op::Mkdir | Op::Mknod | Op::Symlink | Op::Link => 1,
        Op::Unlink | Op::Rmdir => 2,
        Op::Rename | Op::Exchange => 3,
        Op::Attr | Op::Xattr => 4,
    }
}

/// What was seen, for a person who wonders about a verdict.
pub fn describe(seen: &[Seen], mark: u64) -> String {
    let one = |s: &Seen| {
        let name = |paths: &[PathBuf]| {
            let name = paths.first().and_then(|p| p.file_name());
            name.map_or_else(|| "?".into(), |n| n.to_string_lossy().into_owned())
        };
        let to = if s.to.is_empty() {
            String::new()
        } else {
            format!(" to {}", name(&s.to))
        };
        let range = s.range.map_or_else(String::new, |(a, b)| format!(" [{a},{b})"));
        let early = if s.time_ns < mark { " early" } else { "" };
        let stale = if s.fresh { "" } else { " stale" };
        format!("{} {}{to}{range}{early}{stale}", s.op.name(), name(&s.at))
    };
    seen.iter().take(12).map(one).collect::<Vec<_>>().join("; ")
}

pub fn say(row: &Row, place: &Place, source: &str, verdict: &Verdict, seen: &str) {
    let line = json!({
        "group": row.group,
        "row": row.name,
        "filesystem": place.name,
        "source": source,
        "verdict": verdict.word(),
        "reason": verdict.reason(),
        "seen": seen,
    });
    println!("{line}");
}
