//! Makes every change that omirr must see, and says which source saw it how:
//! `coverage run FILESYSTEM=FOLDER…`.
//!
//! In: folders on the filesystems to try, empty. Out: one JSON object a line,
//! one per row, filesystem and source. It needs a kernel that can be traced and
//! mounts what it likes, so it runs in a guest.
//!
//! - [`rows`]: the changes, and what must be reported of each; what they do is
//!   in [`data`], [`mapping`], [`names`], [`attrs`], [`elsewhere`].
//! - [`changer`]: the child process that makes them, since a source passes over
//!   its own process.
//! - [`watchers`]: the sources, and what they saw.
//! - [`judge`]: from what was seen to a verdict.
//! - [`place`]: the folders and mounts; [`nfs`]: a server and a client.

mod attrs;
mod changer;
mod data;
mod elsewhere;
mod judge;
mod mapping;
mod names;
mod nfs;
mod place;
mod rows;
mod sys;
mod watchers;

use anyhow::{Context, Result, bail};

use changer::{Answer, Changer};
use judge::{Phase, Verdict};
use place::Place;
use rows::{Row, Stage};
use watchers::{Lost, Watcher};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["changer"] => changer::serve(),
        ["run", ref folders @ ..] => run(folders),
        _ => bail!("usage: coverage run FILESYSTEM=FOLDER…"),
    }
}

/// Each filesystem twice: the two ways of attaching are not mixed, what is only
/// for comparison runs beside the first.
fn run(folders: &[&str]) -> Result<()> {
    let places = place::prepare(folders)?;
    let rows = rows::all();
    let only = std::env::var("COVERAGE_ROW").ok();
    for (pass, sources) in [&["fentry", "fanotify", "inotify"][..], &["kprobe"]]
        .iter()
        .enumerate()
    {
        let mut watchers = Vec::new();
        for source in *sources {
            let began = std::time::Instant::now();
            watchers.push(Watcher::open(source, &places).with_context(|| (*source).to_owned())?);
            eprintln!("{source}: opened in {:?}", began.elapsed());
        }
        let mut changer = Changer::start()?;
        for place in &places {
            for (number, row) in rows.iter().enumerate() {
                if only
                    .as_ref()
                    .is_some_and(|only| !row.name.contains(only.as_str()))
                {
                    continue;
                }
                again_if_lost(row, number, pass, place, &mut changer, &mut watchers)
                    .with_context(|| format!("{} on {}", row.name, place.name))?;
            }
        }
        for watcher in &watchers {
            eprintln!("{}: {}", watcher.name, watcher.about());
        }
    }
    Ok(())
}

/// A source that lost something has said so, and the daemon compares the trees
/// then; it says nothing about the row, which is done once more.
fn again_if_lost(
    row: &Row,
    number: usize,
    pass: usize,
    place: &Place,
    changer: &mut Changer,
    watchers: &mut [Watcher],
) -> Result<()> {
    for attempt in 0..place::ATTEMPTS {
        let stage = Stage::new(place, &place::row_folder(number, pass, attempt));
        match one(row, number, &stage, changer, watchers) {
            Err(error) if error.is::<Lost>() => {
                eprintln!("{} on {}: {error}", row.name, place.name);
                changer.ask("release", &stage)?;
                for watcher in &mut *watchers {
                    watcher.end()?;
                }
            }
            other => return other,
        }
    }
    bail!("events are lost each time");
}

/// One row in one place, for all sources at once.
fn one(
    row: &Row,
    number: usize,
    stage: &Stage,
    changer: &mut Changer,
    watchers: &mut [Watcher],
) -> Result<()> {
    let lacks = |reason: &str, watchers: &[Watcher]| {
        for watcher in watchers {
            judge::say(
                row,
                &stage.place,
                watcher.name,
                &Verdict::NotThere(reason.to_owned()),
                "",
            );
        }
    };
    if let Some(reason) = row.not_on(&stage.place) {
        lacks(&reason, watchers);
        return Ok(());
    }
    if let Answer::Lacking(reason) = changer.ask(&format!("prepare {number}"), stage)? {
        lacks(&reason, watchers);
        changer.ask("release", stage)?;
        return Ok(());
    }
    for watcher in &mut *watchers {
        watcher.begin(stage, row.look.clone().map(|look| look.beneath(&stage.seen_as())))?;
    }
    let mut mark = 0;
    for phase in Phase::ALL {
        if watchers.iter().all(|w| w.verdict.is_some()) {
            break;
        }
        match changer.ask(phase.order(), stage)? {
            Answer::Lacking(reason) => {
                lacks(&reason, watchers);
                for watcher in &mut *watchers {
                    watcher.end()?;
                }
                changer.ask("release", stage)?;
                return Ok(());
            }
            Answer::Done(at) if phase == Phase::Change => mark = at,
            Answer::Done(_) => {}
        }
        for watcher in &mut *watchers {
            watcher.collect(stage)?;
            if watcher.verdict.is_none() {
                watcher.verdict = judge::judge(row, stage, watcher, mark, phase);
            }
        }
    }
    changer.ask("release", stage)?;
    for watcher in &mut *watchers {
        let verdict = watcher
            .verdict
            .take()
            .unwrap_or_else(|| judge::never(row, stage, watcher));
        let verdict = match verdict {
            Verdict::NoSource(_) => verdict,
            _ if row.varies && !watcher.is_exact() => Verdict::Varies,
            _ => verdict,
        };
        let seen = judge::describe(&watcher.seen, mark);
        judge::say(row, &stage.place, watcher.name, &verdict, &seen);
        watcher.end()?;
    }
    Ok(())
}
