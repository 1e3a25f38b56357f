//! `omirr conflicts list`: every conflict copy in a running daemon's index.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    time::Duration,
};

use clap::Args;

use super::super::{
    ConfigFile, ask, print_json,
    terminal::{Paint, Table, Tone, colours, number, plain},
};
use crate::daemon::control::{ConflictReport, ConflictsReport, ConflictsRequest, Request};

/// Indexes are read whole for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// List the conflict copies
///
/// LOST is when the version was made that lost, NODE where; both are told by the
/// copy's name. WINNER is what stands under the name that the copy had before.
/// Of very many copies the first are listed, and how many more there are is said.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    /// List those of this share only [default: every share]
    #[arg(long, value_name = "NAME")]
    share: Option<String>,
    #[command(flatten)]
    config: ConfigFile,
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ListArgs) -> anyhow::Result<()> {
    let client = ask::client(&args.config.config)?;
    let request = Request::Conflicts(ConflictsRequest {
        share: args.share.clone(),
    });
    let report: ConflictsReport = ask::block_on(async { Ok(client.call(&request, PATIENCE).await?) })?;
    if args.json {
        return print_json(&report);
    }
    let mut out = io::stdout().lock();
    let paint = Paint {
        on: colours(out.is_terminal()),
    };
    Ok(out.write_all(render(&report, paint).as_bytes())?)
}

fn render(report: &ConflictsReport, paint: Paint) -> String {
    let mut out = String::new();
    if report.conflicts.is_empty() && report.more == 0 {
        out.push_str("no conflicts\n");
    } else {
        let mut table = Table::new(&["SHARE", "LOST", "NODE", "SIZE", "WINNER", "COPY"]);
        for copy in &report.conflicts {
            table.row(row(copy));
        }
        table.render(0, paint, &mut out);
    }
    // Writing to a string cannot fail.
    if report.more > 0 {
        let _ = writeln!(out, "and {} more, which are not listed", number(report.more));
    }
    for missing in &report.missing {
        let _ = writeln!(
            out,
            "{}: changes of the last moments may be missing: {}",
            paint.word(Tone::Busy, &plain(&missing.share)),
            plain(&missing.reason)
        );
    }
    out
}

fn row(copy: &ConflictReport) -> Vec<(Tone, String)> {
    let size = match copy.size {
        Some(size) => number(size),
        None => copy.kind.clone(),
    };
    let node = match &copy.nodes[..] {
        [] => "-".to_owned(),
        nodes => nodes.join(" or "),
    };
    let winner = match (&copy.winner, &copy.originals[..]) {
        (Some(winner), _) => (Tone::Plain, name(winner)),
        (None, [one]) => (Tone::Busy, format!("{} (gone)", name(one))),
        (None, []) => (Tone::Busy, "not known".to_owned()),
        (None, several) => {
            let names: Vec<_> = several.iter().map(|one| name(one)).collect();
            (Tone::Busy, names.join(" or "))
        }
    };
    vec![
        (Tone::Plain, copy.share.clone()),
        (Tone::Plain, copy.made.clone().unwrap_or_else(|| "-".to_owned())),
        (Tone::Plain, node),
        (Tone::Plain, size),
        winner,
        (Tone::Plain, copy.file.clone()),
    ]
}

/// The last name: the directory is the copy's.
fn name(path: &str) -> String {
    path.rsplit('/').next().unwrap_or(path).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::control::MissingReport;

    fn copy() -> ConflictReport {
        ConflictReport {
            share: "www".into(),
            path: "a/report.omirr-conflict-20260921-141320-web1.txt".into(),
            file: "/srv/www/a/report.omirr-conflict-20260921-141320-web1.txt".into(),
            kind: "file".into(),
            size: Some(1234),
            winner: Some("a/report.txt".into()),
            originals: vec!["a/report.txt".into()],
            made: Some("2026-09-21T14:13:20Z".into()),
            node: Some("web1".into()),
            nodes: vec!["web1".into()],
        }
    }

    #[test]
    fn a_person_sees_what_lost_against_what() {
        let gone = ConflictReport {
            winner: None,
            ..copy()
        };
        let doubtful = ConflictReport {
            size: None,
            kind: "symlink".into(),
            winner: None,
            originals: vec!["a/x.org".into(), "a/x".into()],
            node: None,
            nodes: vec!["web1".into(), "web1.org".into()],
            file: "/srv/www/a/x.omirr-conflict-20260921-141320-web1.org".into(),
            ..copy()
        };
        let silent = ConflictReport {
            winner: None,
            originals: Vec::new(),
            made: None,
            node: None,
            nodes: Vec::new(),
            file: "/srv/www/a.omirr-conflict-\u{1b}".into(),
            ..copy()
        };
        let report = ConflictsReport {
            conflicts: vec![copy(), gone, doubtful, silent],
            more: 1200,
            missing: vec![MissingReport {
                share: "www".into(),
                reason: "the tree is still being compared".into(),
            }],
        };
        assert_eq!(
            render(&report, Paint { on: false }),
            "\
SHARE  LOST                  NODE              SIZE     WINNER             COPY
www    2026-09-21T14:13:20Z  web1              1,234    report.txt         /srv/www/a/report.omirr-conflict-20260921-141320-web1.txt
www    2026-09-21T14:13:20Z  web1              1,234    report.txt (gone)  /srv/www/a/report.omirr-conflict-20260921-141320-web1.txt
www    2026-09-21T14:13:20Z  web1 or web1.org  symlink  x.org or x         /srv/www/a/x.omirr-conflict-20260921-141320-web1.org
www    -                     -                 1,234    not known          /srv/www/a.omirr-conflict-\\x1b
and 1,200 more, which are not listed
www: changes of the last moments may be missing: the tree is still being compared
"
        );
        assert_eq!(
            render(&ConflictsReport::default(), Paint { on: false }),
            "no conflicts\n"
        );
    }
}
