//! `omirr conflicts show`: one copy beside what won against it.
//!
//! In: the path of a copy. Out: both versions as they are on disk, who changed
//! them last as the daemon tells, and whether their contents differ. A daemon
//! that does not answer leaves out what only it knows.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    path::PathBuf,
};

use clap::Args;
use rustix::fs::Stat;
use serde::Serialize;

use super::{
    super::{
        ConfigFile, log, print_json,
        terminal::{Paint, Tone, colours, number, plain},
    },
    contents::{self, Contents, Version},
    copy::{Copy, OriginalArgs, kind},
};
use crate::daemon::control::LogReport;

/// Show a conflict copy and what won against it
///
/// Says size, times and who changed each version last, and whether they have the
/// same content. Of texts of up to 1 MiB it prints what to change in the winner
/// to get the copy, as `diff -u` does.
#[derive(Clone, Debug, Args)]
pub struct ShowArgs {
    /// The conflict copy
    #[arg(value_name = "PATH")]
    path: PathBuf,
    #[command(flatten)]
    original: OriginalArgs,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

/// A copy and what won against it.
#[derive(Clone, Debug, Serialize)]
struct Report {
    /// None if nothing has the original name, or it is not known.
    winner: Option<Side>,
    copy: Side,
    /// The name that the copy had before, if it is known.
    original: Option<String>,
    /// Why it is not known.
    doubt: Option<String>,
    /// When and where the version was made that lost, by the copy's name.
    made: Option<String>,
    nodes: Vec<String>,
    /// None without a winner.
    #[serde(flatten)]
    contents: Option<Contents>,
}

/// One version.
#[derive(Clone, Debug, Serialize)]
struct Side {
    path: String,
    kind: &'static str,
    size: u64,
    modified: Option<String>,
    /// The last change, as `omirr log` has it.
    last: Option<LogReport>,
    /// Why that is not known.
    unknown: Option<String>,
}

pub(super) fn run(args: &ShowArgs) -> anyhow::Result<()> {
    let mut copy = Copy::open(&args.path)?;
    let report = look(&mut copy, &args.original)?;
    if args.json {
        return print_json(&report);
    }
    let mut out = io::stdout().lock();
    let is_terminal = out.is_terminal();
    let paint = Paint {
        on: colours(is_terminal),
    };
    let mut text = render(&report, paint);
    if let Some(Contents::Differ { diff: Some(diff) }) = &report.contents {
        // To a file or a program it goes as it is, so that `patch` can use it.
        match is_terminal {
            true => text.push_str(&paint_diff(diff, paint)),
            false => text.push_str(diff),
        }
    }
    Ok(out.write_all(text.as_bytes())?)
}

fn look(copy: &mut Copy, args: &OriginalArgs) -> anyhow::Result<Report> {
    let name = copy.name.clone();
    let original = copy.original(args);
    let mut winner = None;
    if let Ok(original) = &original
        && let Some(stat) = copy.stat(original)?
    {
        winner = Some((original.as_os_str(), stat));
    }
    let shown_copy = copy.shown(&name);
    let contents = winner.as_ref().map(|(original, stat)| {
        let winner = Version {
            name: original,
            mode: stat.st_mode,
            shown: &copy.shown(original),
        };
        let loser = Version {
            name: &name,
            mode: copy.stat.st_mode,
            shown: &shown_copy,
        };
        contents::compare(copy.dir(), &winner, &loser)
    });
    Ok(Report {
        winner: winner.map(|(original, stat)| side(copy, original, &stat, &args.config)),
        copy: side(copy, &name, &copy.stat, &args.config),
        original: original.as_ref().ok().map(|name| copy.shown(name)),
        doubt: original.as_ref().err().map(ToString::to_string),
        made: copy.says.made.map(|at| at.to_string()),
        nodes: copy.says.nodes(),
        contents,
    })
}

fn side(copy: &Copy, name: &OsStr, stat: &Stat, config: &ConfigFile) -> Side {
    let last = log::last_change(config, &copy.path_of(name)).map(|(_, last)| last);
    let nanos = i32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    let modified = jiff::Timestamp::new(stat.st_mtime, nanos).ok();
    Side {
        path: copy.shown(name),
        kind: kind(stat),
        size: u64::try_from(stat.st_size).unwrap_or(0),
        modified: modified.map(|at| at.to_string()),
        unknown: last.as_ref().err().map(|why| format!("{why:#}")),
        last: last.ok(),
    }
}

fn render(report: &Report, paint: Paint) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    match (&report.winner, &report.original) {
        (Some(winner), _) => render_side("winner", winner, paint, &mut out),
        (None, Some(original)) => {
            let _ = writeln!(
                out,
                "{}  {original} is not there (any more)",
                paint.word(Tone::Head, "winner")
            );
        }
        (None, None) => {
            let why = report.doubt.as_deref().unwrap_or("not known");
            let _ = writeln!(
                out,
                "{}  not known: {}",
                paint.word(Tone::Head, "winner"),
                plain(why)
            );
        }
    }
    render_side("copy", &report.copy, paint, &mut out);
    let _ = writeln!(
        out,
        "  lost      the version of {} from node {}",
        report.made.as_deref().unwrap_or("an unknown time"),
        plain(&report.nodes.join(" or "))
    );
    let verdict = match &report.contents {
        None => return out,
        Some(Contents::Same) => "the same content".to_owned(),
        Some(Contents::Differ { diff: Some(_) }) => "different contents:".to_owned(),
        Some(Contents::Differ { diff: None }) => {
            "different contents, which are not shown: they are no texts of at most 1 MiB".to_owned()
        }
        Some(Contents::NotCompared { why }) => format!("not compared: {}", plain(why)),
    };
    let _ = writeln!(out, "{verdict}");
    out
}

fn render_side(role: &str, side: &Side, paint: Paint, out: &mut String) {
    let size = match side.kind {
        "file" => format!(", {} bytes", number(side.size)),
        _ => String::new(),
    };
    let _ = writeln!(
        out,
        "{}{}{}  ({}{size})",
        paint.word(Tone::Head, role),
        " ".repeat(8 - role.len()),
        side.path,
        side.kind,
    );
    if let Some(modified) = &side.modified {
        let _ = writeln!(out, "  modified  {modified}");
    }
    match (&side.last, &side.unknown) {
        (Some(last), _) => {
            let _ = writeln!(out, "  changed   {}", log::when_and_where(last));
            let _ = writeln!(out, "  by        {}", plain(&log::by(last)));
        }
        (None, why) => {
            let why = why.as_deref().unwrap_or_default();
            let _ = writeln!(out, "  by        not known: {}", plain(why));
        }
    }
}

/// A diff for a terminal: in colour, and without what would move the cursor.
fn paint_diff(diff: &str, paint: Paint) -> String {
    let mut out = String::new();
    for line in diff.lines() {
        let tone = match line.as_bytes().first() {
            Some(b'+') => Tone::Good,
            Some(b'-') => Tone::Bad,
            Some(b'@') => Tone::Head,
            _ => Tone::Plain,
        };
        let harmless: Vec<_> = line.split('\t').map(plain).collect();
        let _ = writeln!(out, "{}", paint.word(tone, &harmless.join("\t")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(path: &str) -> Side {
        Side {
            path: path.into(),
            kind: "file",
            size: 1234,
            modified: Some("2026-09-21T14:13:25Z".into()),
            last: None,
            unknown: Some("no daemon answers".into()),
        }
    }

    fn report() -> Report {
        Report {
            winner: Some(side("a.txt")),
            copy: side("a.omirr-conflict-20260921-141320-web1.txt"),
            original: Some("a.txt".into()),
            doubt: None,
            made: Some("2026-09-21T14:13:20Z".into()),
            nodes: vec!["web1".into()],
            contents: Some(Contents::Same),
        }
    }

    #[test]
    fn both_versions_are_described_even_without_a_daemon() {
        assert_eq!(
            render(&report(), Paint { on: false }),
            "\
winner  a.txt  (file, 1,234 bytes)
  modified  2026-09-21T14:13:25Z
  by        not known: no daemon answers
copy    a.omirr-conflict-20260921-141320-web1.txt  (file, 1,234 bytes)
  modified  2026-09-21T14:13:25Z
  by        not known: no daemon answers
  lost      the version of 2026-09-21T14:13:20Z from node web1
the same content
"
        );
    }

    #[test]
    fn a_winner_that_is_gone_or_not_known_is_said_so() {
        let gone = Report {
            winner: None,
            contents: None,
            ..report()
        };
        assert!(
            render(&gone, Paint { on: false }).starts_with("winner  a.txt is not there (any more)\ncopy ")
        );
        let unknown = Report {
            original: None,
            doubt: Some("it may be x or y".into()),
            ..gone
        };
        assert!(render(&unknown, Paint { on: false }).starts_with("winner  not known: it may be x or y\n"));
    }

    #[test]
    fn json_has_the_verdict_beside_the_rest() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(
            (&json["contents"], &json["winner"]["size"]),
            (&"same".into(), &1234.into())
        );
        let differ = Report {
            contents: Some(Contents::Differ { diff: None }),
            ..report()
        };
        let json = serde_json::to_value(differ).unwrap();
        assert_eq!(
            (&json["contents"], &json["diff"]),
            (&"differ".into(), &serde_json::Value::Null)
        );
    }

    #[test]
    fn a_diff_cannot_move_the_cursor_but_keeps_its_tabs() {
        assert_eq!(
            paint_diff("+a\tb\x1b[2J\n", Paint { on: false }),
            "+a\tb\\x1b[2J\n"
        );
    }
}
