//! `omirr doctor`: what this host's kernel allows, what follows, what to do.
//!
//! In: the running kernel. Out: a list of checks, each with yes or no, and the
//! event source that would be used. Everything is found by trying; the trials
//! are taken back at once and nothing is changed.

mod kernel;
mod limits;
mod notify;

use std::{
    io::{self, IsTerminal, Write},
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::terminal::{Paint, Tone, colours, plain};
use crate::source::{About, Sink, Watch, auto, choice::SourceConfig};

/// Say what this host's kernel allows, and which event source would be used
///
/// Each line is one thing that omirr can use: whether it works, what follows,
/// and what to do where it does not. Changes nothing; always exits with 0. Run
/// it as the user as whom the daemon runs.
#[derive(Clone, Debug, Args)]
pub(super) struct DoctorArgs {
    /// A folder that is to be mirrored: the source is tried on its filesystem
    #[arg(long, value_name = "PATH", default_value = ".")]
    path: PathBuf,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: String,
    ok: bool,
    /// What was found, and what follows from it.
    detail: String,
    /// What to do, if something can be done.
    remedy: Option<String>,
}

impl Check {
    fn yes(name: impl Into<String>, detail: impl Into<String>) -> Check {
        Check {
            name: name.into(),
            ok: true,
            detail: detail.into(),
            remedy: None,
        }
    }

    fn no(name: impl Into<String>, detail: impl Into<String>, remedy: Option<&str>) -> Check {
        Check {
            name: name.into(),
            ok: false,
            detail: detail.into(),
            remedy: remedy.map(str::to_owned),
        }
    }

    /// A no from an error of ours, which says the way out after a semicolon.
    fn refused(name: impl Into<String>, error: &str) -> Check {
        match error.split_once("; ") {
            Some((what, remedy)) => Check::no(name, what, Some(remedy)),
            None => Check::no(name, error, None),
        }
    }
}

#[derive(Serialize)]
struct Findings {
    /// The kernel's release, for reports; nothing is decided by it.
    kernel: String,
    source: About,
    checks: Vec<Check>,
}

pub(super) fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let findings = examine(args)?;
    if args.json {
        return super::print_json(&findings);
    }
    let mut out = io::stdout().lock();
    let paint = Paint {
        on: colours(out.is_terminal()),
    };
    out.write_all(render(&findings, paint).as_bytes())?;
    Ok(())
}

fn examine(args: &DoctorArgs) -> anyhow::Result<Findings> {
    let path = args
        .path
        .canonicalize()
        .with_context(|| format!("cannot look at {}", args.path.display()))?;
    let stat = path
        .metadata()
        .with_context(|| format!("cannot look at {}", path.display()))?;
    anyhow::ensure!(
        stat.is_dir(),
        "cannot try a source on {}: it is not a folder; name the folder that holds it",
        path.display()
    );
    let watch = Watch {
        path,
        dev: stat.dev(),
        ino: stat.ino(),
    };
    let mut checks = kernel::checks();
    checks.extend(limits::checks());
    checks.extend(notify::checks(&watch));
    let no_sink = || -> Sink { Box::new(|_| ()) };
    let source = auto::open(&SourceConfig::default(), &[watch], no_sink, None)?;
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    Ok(Findings {
        kernel,
        source: source.about().clone(),
        checks,
    })
}

fn render(findings: &Findings, paint: Paint) -> String {
    let mut text = format!("kernel {}\n", plain(&findings.kernel));
    let width = findings
        .checks
        .iter()
        .map(|check| check.name.chars().count())
        .max()
        .unwrap_or(0);
    for check in &findings.checks {
        let (tone, word) = if check.ok {
            (Tone::Good, "yes")
        } else {
            (Tone::Bad, "no ")
        };
        let name = plain(&check.name);
        let pad = " ".repeat(width.saturating_sub(name.chars().count()));
        text.push_str(&format!(
            "{}  {name}{pad}  {}\n",
            paint.word(tone, word),
            plain(&check.detail)
        ));
        if let Some(remedy) = &check.remedy {
            text.push_str(&format!("     {}  to do: {}\n", " ".repeat(width), plain(remedy)));
        }
    }
    let about = &findings.source;
    let how: Vec<_> = [about.attach, about.transport].into_iter().flatten().collect();
    let how = if how.is_empty() {
        String::new()
    } else {
        format!(" ({})", how.join(", "))
    };
    text.push_str(&format!(
        "{}{how} would be used: {}\n",
        paint.word(Tone::Head, about.kind),
        plain(&about.reason)
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_no_says_what_follows_and_the_source_is_named_last() {
        let findings = examine(&DoctorArgs {
            path: "/".into(),
            json: true,
        })
        .expect("it looks");
        for name in [
            "BTF",
            "kprobes",
            "fentry programs",
            "BPF ring buffer",
            "perf ring buffer",
            "unlocked kernel",
            "capabilities",
            "locked memory",
            "open files",
            "pinning",
            "inotify limits",
            "fanotify",
            "fanotify queue",
            "fanotify renames",
        ] {
            let found = findings.checks.iter().filter(|check| check.name == name);
            assert_eq!(found.count(), 1, "{name}");
        }
        for check in &findings.checks {
            assert!(!check.detail.is_empty(), "{check:?}");
            assert_eq!(check.ok, check.remedy.is_none(), "{check:?}");
        }
        let text = render(&findings, Paint { on: false });
        let last = text.lines().last().expect("a last line");
        assert!(
            last.starts_with(findings.source.kind) && last.contains("would be used: "),
            "{last}"
        );
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn json_has_the_promised_shape() {
        let findings = Findings {
            kernel: "6.1".into(),
            source: About {
                kind: "scan",
                attach: None,
                transport: None,
                reason: "r".into(),
            },
            checks: vec![Check::no("n", "d", Some("r")), Check::yes("y", "d")],
        };
        assert_eq!(
            serde_json::to_value(&findings).expect("JSON"),
            serde_json::json!({
                "kernel": "6.1",
                "source": {"kind": "scan", "attach": null, "transport": null, "reason": "r"},
                "checks": [
                    {"name": "n", "ok": false, "detail": "d", "remedy": "r"},
                    {"name": "y", "ok": true, "detail": "d", "remedy": null},
                ],
            })
        );
    }
}
