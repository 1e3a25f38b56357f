//! `omirr log`: the last change of a path, and who made it.
//!
//! In: a path in a share, and what the daemon says of it. Out: the answer, for
//! people or as JSON. What is not known is said to be so.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use anyhow::Context;
use clap::Args;

use super::{
    ConfigFile, ask, print_json,
    terminal::{Paint, Tone, colours, number, plain},
    users,
};
use crate::daemon::control::{LogReport, LogRequest, Request, WhoReport};

/// Say who changed a path last: when, on which node, by which process
///
/// Every node of the share gives the same answer, for deleted paths as well.
/// The process is known for changes that an event source saw as they happened;
/// what a comparison of the trees found has a node and a time.
#[derive(Clone, Debug, Args)]
pub(super) struct LogArgs {
    /// A path in a share; it need not exist any more
    #[arg(value_name = "PATH")]
    path: PathBuf,
    #[command(flatten)]
    config: ConfigFile,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &LogArgs) -> anyhow::Result<()> {
    let (path, report) = last_change(&args.config, &args.path)?;
    if args.json {
        return print_json(&report);
    }
    let mut out = io::stdout().lock();
    let paint = Paint {
        on: colours(out.is_terminal()),
    };
    Ok(out.write_all(render(&path, &report, paint).as_bytes())?)
}

/// What the daemon says of a path, and the path as it was asked for.
pub(super) fn last_change(config: &ConfigFile, path: &Path) -> anyhow::Result<(PathBuf, LogReport)> {
    let path =
        std::path::absolute(path).with_context(|| format!("cannot tell where {} is", path.display()))?;
    let path = without_dots(&path);
    let request = Request::Log(LogRequest {
        resolved: resolved(&path).map(Into::into),
        path: path.clone().into(),
    });
    let mut report: LogReport = ask::once(config, &request)?;
    if let Some(who) = &mut report.who {
        who.user = who.uid.and_then(users::name_of);
    }
    Ok((path, report))
}

/// The path without `..`, each of which takes the name before it away.
fn without_dots(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(out.pop()),
            part => out.push(part),
        }
    }
    out
}

/// Where the links on the way to the path lead, as far as that exists. The last
/// name stays: a share has the link, not what it leads to.
fn resolved(path: &Path) -> Option<PathBuf> {
    let mut rest = Vec::new();
    let mut at = path;
    loop {
        rest.push(at.file_name()?);
        at = at.parent()?;
        if let Ok(real) = at.canonicalize() {
            let names: Vec<&OsStr> = rest.into_iter().rev().collect();
            return Some(real.join(names.join(OsStr::from_bytes(b"/"))));
        }
    }
}

fn render(path: &Path, report: &LogReport, paint: Paint) -> String {
    let mut out = String::new();
    let size = report.size.map(|size| format!(", {} bytes", number(size)));
    let (tone, verb) = if report.deleted {
        (Tone::Bad, "deleted")
    } else {
        (Tone::Good, "changed")
    };
    let was = if report.deleted { "was a " } else { "" };
    let _ = writeln!(
        out,
        "{}  ({was}{}{}; share {})",
        plain(&path.display().to_string()),
        report.kind,
        size.unwrap_or_default(),
        plain(&report.share)
    );
    let _ = writeln!(out, "  {}  {}", paint.word(tone, verb), when_and_where(report));
    let _ = writeln!(out, "  by       {}", plain(&by(report)));
    if let Some(why) = &report.missing {
        let _ = writeln!(
            out,
            "  note     changes of the last moments may be missing: {}",
            plain(why)
        );
    }
    out
}

/// The moment and the node of a change.
pub(super) fn when_and_where(report: &LogReport) -> String {
    let node = match &report.node {
        Some(node) => format!("node {}", plain(node)),
        None => format!("a node whose name is not known here (replica {})", report.replica),
    };
    let changed = report.changed.as_deref().unwrap_or("at an unknown time");
    format!("{changed} on {node}")
}

/// Who made a change, or why that is not known.
pub(super) fn by(report: &LogReport) -> String {
    match &report.who {
        None => {
            "not known: the source did not tell; it was changed while omirr was not watching, or found by a \
                 comparison of the tree with the index"
                .to_owned()
        }
        Some(who) if who.omirr && report.conflict_copy => {
            "omirr itself, which kept a version here that lost against a newer one".to_owned()
        }
        Some(who) if who.omirr => {
            "omirr itself, which brought the directory back because something lives in it".to_owned()
        }
        Some(who) => process(who),
    }
}

fn process(who: &WhoReport) -> String {
    let mut parts = vec![match &who.command {
        Some(command) => command.clone(),
        None => "a process that ended before its name could be read".to_owned(),
    }];
    parts.extend(who.pid.map(|pid| format!("pid {pid}")));
    parts.extend(who.uid.map(|uid| match &who.user {
        Some(user) => format!("user {user} ({uid})"),
        None => format!("user {uid}"),
    }));
    parts.extend(who.cgroup.as_ref().map(|cgroup| format!("in {cgroup}")));
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> LogReport {
        LogReport {
            share: "www".into(),
            path: "a".into(),
            deleted: false,
            kind: "file".into(),
            size: Some(1234),
            changed: Some("2026-01-02T03:04:05.006Z".into()),
            node: Some("web1".into()),
            replica: "00000000000000ab".into(),
            who: Some(WhoReport {
                pid: Some(7),
                uid: Some(33),
                user: Some("www-data".into()),
                command: Some("ng\x1binx".into()),
                cgroup: Some("/system.slice/nginx.service".into()),
                omirr: false,
            }),
            conflict_copy: false,
            missing: None,
        }
    }

    fn text(report: &LogReport) -> String {
        render(Path::new("/srv/www/a"), report, Paint { on: false })
    }

    #[test]
    fn the_answer_names_node_time_and_process() {
        assert_eq!(
            text(&report()),
            "\
/srv/www/a  (file, 1,234 bytes; share www)
  changed  2026-01-02T03:04:05.006Z on node web1
  by       ng\\x1binx, pid 7, user www-data (33), in /system.slice/nginx.service
"
        );
    }

    #[test]
    fn what_is_not_known_is_said_plainly() {
        let gone = LogReport {
            deleted: true,
            node: None,
            who: None,
            missing: Some("the tree is still being compared".into()),
            ..report()
        };
        let said = text(&gone);
        for part in [
            "(was a file, 1,234 bytes; share www)",
            "deleted  2026-01-02T03:04:05.006Z on a node whose name is not known here (replica 00000000000000ab)",
            "not known: the source did not tell; it was changed while omirr was not watching",
            "changes of the last moments may be missing: the tree is still being compared",
        ] {
            assert!(said.contains(part), "{said}");
        }
        let ended = LogReport {
            who: Some(WhoReport {
                pid: Some(7),
                ..WhoReport::default()
            }),
            ..report()
        };
        assert!(text(&ended).contains("a process that ended before its name could be read, pid 7\n"));
        let own = LogReport {
            who: Some(WhoReport {
                omirr: true,
                ..WhoReport::default()
            }),
            conflict_copy: true,
            ..report()
        };
        assert!(text(&own).contains("omirr itself, which kept a version"));
    }

    #[test]
    fn a_path_is_found_through_links_and_dots_but_not_through_its_own_link() {
        let folder = tempfile::tempdir().expect("a folder");
        let base = folder.path().canonicalize().expect("it is there");
        std::fs::create_dir(base.join("real")).expect("mkdir");
        std::os::unix::fs::symlink("real", base.join("link")).expect("symlink");
        assert_eq!(without_dots(Path::new("/a/b/../../../c")), Path::new("/c"));
        assert_eq!(
            resolved(&base.join("link/gone/file")),
            Some(base.join("real/gone/file"))
        );
        assert_eq!(resolved(&base.join("link")), Some(base.join("link")));
    }
}
