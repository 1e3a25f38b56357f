//! A change as a line: for people, or as one JSON object.

use std::{
    io::{self, Write},
    path::Path,
};

use jiff::{Timestamp, tz::TimeZone};
use serde::Serialize;

use crate::model::RelPath;

/// The width of the longest operation.
const OP_WIDTH: usize = 9;

/// What is printed of a change. Paths are relative to the traced folder.
pub(super) struct Change {
    pub(super) time: Timestamp,
    pub(super) op: &'static str,
    pub(super) path: RelPath,
    pub(super) to: Option<RelPath>,
    /// A rename over the folder's border; `path` is the end that lies within.
    pub(super) moved: Option<Border>,
    /// The bytes written, from and up to.
    pub(super) range: Option<(u64, u64)>,
    /// 0 if it is not known who it was.
    pub(super) pid: u32,
    pub(super) uid: u32,
    /// Empty if it is not known; then neither is the user.
    pub(super) comm: String,
    /// The cgroup's path; empty if it is not known.
    pub(super) cgroup: String,
    pub(super) is_dir: bool,
}

/// Which way something went over the border of the traced folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Border {
    In,
    Out,
}

impl Change {
    /// A change of which only the path is known, to be filled in.
    pub(super) fn by_nobody() -> Change {
        Change {
            time: Timestamp::UNIX_EPOCH,
            op: "",
            path: RelPath::root(),
            to: None,
            moved: None,
            range: None,
            pid: 0,
            uid: 0,
            comm: String::new(),
            cgroup: String::new(),
            is_dir: false,
        }
    }
}

/// The JSON form. Unknown is null. A path that is not UTF-8 has the replacement
/// character in it.
#[derive(Serialize)]
struct Json<'a> {
    time: String,
    op: &'a str,
    path: String,
    to: Option<String>,
    moved: Option<Border>,
    range: Option<(u64, u64)>,
    pid: Option<u32>,
    uid: Option<u32>,
    comm: Option<&'a str>,
    cgroup: Option<&'a str>,
    dir: bool,
}

/// From the kernel's monotonic clock to the time of day.
pub(super) struct Clock {
    /// How far the time of day is ahead, in nanoseconds, when this began. A
    /// clock that is set later does not move the times of one trace.
    ahead_ns: i128,
}

impl Clock {
    pub(super) fn new() -> Clock {
        let monotonic = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let monotonic_ns = i128::from(monotonic.tv_sec) * 1_000_000_000 + i128::from(monotonic.tv_nsec);
        Clock {
            ahead_ns: Timestamp::now().as_nanosecond() - monotonic_ns,
        }
    }

    /// The time of day of an event; now, where the event has no time.
    pub(super) fn time_of(&self, monotonic_ns: u64) -> Timestamp {
        let at = (monotonic_ns != 0).then(|| i128::from(monotonic_ns) + self.ahead_ns);
        at.and_then(|ns| Timestamp::from_nanosecond(ns).ok())
            .unwrap_or_else(Timestamp::now)
    }
}

/// Writes lines.
pub(super) struct Printer<W> {
    out: W,
    /// The traced folder, for people and for JSON, without a slash at its end.
    folder: String,
    json_folder: String,
    json: bool,
}

impl<W: Write> Printer<W> {
    pub(super) fn new(out: W, folder: &Path, json: bool) -> Printer<W> {
        use std::os::unix::ffi::OsStrExt;
        let bytes = folder.as_os_str().as_bytes();
        let bytes = bytes.strip_suffix(b"/").unwrap_or(bytes);
        let json_folder = String::from_utf8_lossy(bytes).into_owned();
        Printer {
            out,
            folder: crate::cli::terminal::plain(&json_folder),
            json_folder,
            json,
        }
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    pub(super) fn print(&mut self, change: &Change) -> io::Result<()> {
        if self.json {
            self.print_json(change)
        } else {
            self.print_text(change)
        }
    }

    fn print_json(&mut self, change: &Change) -> io::Result<()> {
        let folder = &self.json_folder;
        let path = |path: &RelPath| join(folder, path.is_root(), &String::from_utf8_lossy(path.as_bytes()));
        let known = change.pid != 0;
        let named = known && !change.comm.is_empty();
        let object = Json {
            time: format!("{:.6}", change.time),
            op: change.op,
            path: path(&change.path),
            to: change.to.as_ref().map(path),
            moved: change.moved,
            range: change.range,
            pid: known.then_some(change.pid),
            uid: named.then_some(change.uid),
            comm: named.then_some(&change.comm),
            cgroup: (!change.cgroup.is_empty()).then_some(&change.cgroup),
            dir: change.is_dir,
        };
        serde_json::to_writer(&mut self.out, &object)?;
        self.out.write_all(b"\n")
    }

    fn print_text(&mut self, change: &Change) -> io::Result<()> {
        let folder = &self.folder;
        let path = |path: &RelPath| join(folder, path.is_root(), &path.to_string());
        let time = change
            .time
            .to_zoned(TimeZone::UTC)
            .strftime("%H:%M:%S%.6f")
            .to_string();
        let from = if change.moved == Some(Border::In) {
            "(outside) -> "
        } else {
            ""
        };
        let mut line = format!("{time}  {:OP_WIDTH$} {from}{}", change.op, path(&change.path));
        if change.is_dir && !change.path.is_root() {
            line.push('/');
        }
        if change.moved == Some(Border::Out) {
            line.push_str(" -> (outside)");
        }
        if let Some(to) = &change.to {
            line.push_str(" -> ");
            line.push_str(&path(to));
        }
        if let Some((from, upto)) = change.range {
            line.push_str(&format!("  bytes {from}..{upto}"));
        }
        if change.pid != 0 {
            let comm = crate::cli::terminal::plain(&change.comm);
            line.push_str(&format!(
                "  {}[{}]",
                if comm.is_empty() { "?" } else { &comm },
                change.pid
            ));
        }
        if let Some(unit) = short_cgroup(&change.cgroup) {
            line.push_str(&format!(" in {}", crate::cli::terminal::plain(&unit)));
        }
        line.push('\n');
        self.out.write_all(line.as_bytes())
    }
}

/// How many digits of a container's number tell it from others.
const DIGITS: usize = 12;

/// The last name of a cgroup's path, `nginx.service` say, with long numbers cut
/// as the tools for containers cut them. None for the root.
fn short_cgroup(path: &str) -> Option<String> {
    let name = path.rsplit('/').next().filter(|name| !name.is_empty())?;
    let mut out = String::new();
    let mut digits = 0;
    for (at, c) in name.char_indices() {
        digits = if c.is_ascii_hexdigit() { digits + 1 } else { 0 };
        let rest = &name[at..];
        let run = digits + rest.chars().skip(1).take_while(char::is_ascii_hexdigit).count();
        if digits <= DIGITS || run < 32 {
            out.push(c);
        }
    }
    Some(out)
}

fn join(folder: &str, is_root: bool, path: &str) -> String {
    match (folder, is_root) {
        ("", true) => "/".to_owned(),
        (_, true) => folder.to_owned(),
        _ => format!("{folder}/{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(folder: &str, json: bool, change: &Change) -> String {
        let mut out = Vec::new();
        Printer::new(&mut out, Path::new(folder), json)
            .print(change)
            .expect("it writes");
        String::from_utf8(out).expect("text")
    }

    fn change(path: &[u8], to: Option<&[u8]>) -> Change {
        let path_of = |bytes| RelPath::new(bytes).expect("a path");
        Change {
            time: Timestamp::from_nanosecond(1_700_000_000_123_456_789).expect("a time"),
            op: "rename",
            path: path_of(path),
            to: to.map(path_of),
            moved: None,
            range: Some((0, 4096)),
            pid: 7,
            uid: 33,
            comm: "m\x1bv".into(),
            cgroup: String::new(),
            is_dir: false,
        }
    }

    #[test]
    fn a_line_for_people_cannot_harm_a_terminal() {
        assert_eq!(
            printed("/srv/www", false, &change(b"a\x1b[2J", Some(b"caf\xe9"))),
            "22:13:20.123456  rename    /srv/www/a\\x1b[2J -> /srv/www/caf\\xe9  bytes 0..4096  m\\x1bv[7]\n"
        );
    }

    #[test]
    fn a_rename_over_the_border_says_which_way() {
        let out = Change {
            moved: Some(Border::Out),
            is_dir: true,
            range: None,
            pid: 0,
            ..change(b"a", None)
        };
        assert_eq!(
            printed("/s", false, &out),
            "22:13:20.123456  rename    /s/a/ -> (outside)\n"
        );
        let came = Change {
            moved: Some(Border::In),
            ..out
        };
        assert_eq!(
            printed("/s", false, &came),
            "22:13:20.123456  rename    (outside) -> /s/a/\n"
        );
        assert!(printed("/s", true, &came).contains(r#""to":null,"moved":"in""#));
    }

    #[test]
    fn json_says_null_for_what_is_not_known() {
        let object: serde_json::Value = serde_json::from_str(&printed(
            "/",
            true,
            &Change {
                pid: 0,
                range: None,
                ..change(b"a/b", None)
            },
        ))
        .expect("JSON");
        assert_eq!(
            object,
            serde_json::json!({
                "time": "2023-11-14T22:13:20.123456Z", "op": "rename", "path": "/a/b", "to": null,
                "moved": null, "range": null, "pid": null, "uid": null, "comm": null, "cgroup": null, "dir": false
            })
        );
        let object: serde_json::Value =
            serde_json::from_str(&printed("/srv", true, &change(b"", None))).expect("JSON");
        assert_eq!(
            (&object["path"], &object["range"]),
            (&"/srv".into(), &serde_json::json!([0, 4096]))
        );
    }

    #[test]
    fn the_cgroup_is_whole_in_json_and_short_for_people() {
        let id = "0123456789abcdef".repeat(4);
        let within = |cgroup: String| Change {
            cgroup,
            ..change(b"a", None)
        };
        for (cgroup, short) in [
            ("/system.slice/nginx.service".to_owned(), Some("nginx.service")),
            (
                format!("/system.slice/docker-{id}.scope"),
                Some("docker-0123456789ab.scope"),
            ),
            (format!("/docker/{id}"), Some("0123456789ab")),
            ("/user.slice/deadbeef".to_owned(), Some("deadbeef")),
            ("/".to_owned(), None),
        ] {
            let text = printed("/s", false, &within(cgroup.clone()));
            let expected = short.map_or("m\\x1bv[7]\n".to_owned(), |short| {
                format!("m\\x1bv[7] in {short}\n")
            });
            assert!(text.ends_with(&expected), "{text}");
            let object: serde_json::Value =
                serde_json::from_str(&printed("/s", true, &within(cgroup.clone()))).expect("JSON");
            assert_eq!(object["cgroup"], cgroup);
        }
    }

    #[test]
    fn an_events_time_becomes_the_time_of_day() {
        let clock = Clock::new();
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        let apart = Timestamp::now().as_second() - clock.time_of(now_ns).as_second();
        assert!(apart.abs() <= 1, "{apart} s apart");
    }
}
