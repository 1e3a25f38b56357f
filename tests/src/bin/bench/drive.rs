//! A run: all rows, round by round, tool by tool.
//!
//! In: the choice. Out: a line of JSON for each measurement, and one on stderr.
//! A measurement that fails, panics or takes too long is noted, and the run goes
//! on; only Ctrl-C ends it, and a disk that is nearly full.

use std::collections::HashSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::bench::Bench;
use crate::choice::Choice;
use crate::raw::{Outcome, Raw, Run, Sample, ToolLine};
use crate::rows::{Case, Found, Row};
use crate::stop::{self, Interrupted, TimedOut};
use crate::tools::{self, Tool};
use crate::wire::Wire;
use crate::{figures, machine};

/// # Errors
/// Nothing can be measured here, the files cannot be written, or the user wants
/// to end.
pub fn run(choice: &Choice) -> Result<()> {
    if !xtask::workspace::is_root() {
        bail!("measuring needs root: for network namespaces, tmpfs and fanotify");
    }
    stop::listen();
    for folder in [&choice.dir, &choice.into] {
        fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    }
    let filesystem = machine::filesystem(&choice.dir);
    // Before older results of these rows go.
    let cases = choice.rows.iter().flat_map(|row| (row.cases)(choice.scale));
    let cases: Vec<String> = cases.map(|case| case_name(&case, &filesystem)).collect();
    if !cases.iter().any(|case| case.contains(&choice.case)) {
        bail!(
            "no case has \"{}\" in its name; there are: {}",
            choice.case,
            cases.join("; ")
        );
    }
    let (tools, missing): (Vec<&dyn Tool>, Vec<&dyn Tool>) = choice
        .tools
        .iter()
        .map(|tool| &**tool)
        .partition(|tool| tools::version(*tool).is_some());
    for tool in &missing {
        eprintln!("left out: {}, which is not here", tool.name());
    }
    let run = describe(&tools, &missing, &filesystem);
    let names: Vec<&str> = choice.rows.iter().flat_map(|row| row.names()).collect();
    let raw = Raw::begin(&choice.into.join("raw.jsonl"), &run, |sample| {
        names.contains(&sample.row.as_str()) && sample.case.contains(&choice.case)
    })?;
    let folder = tempfile::Builder::new().prefix("").tempdir_in(&choice.dir)?;
    let bench = Bench::new(
        Wire::lay()?,
        choice.scale,
        choice.limit,
        folder.path().to_owned(),
        filesystem,
    );
    let mut driver = Driver {
        bench,
        raw,
        run: run.id,
        rounds: choice.rounds,
        case: choice.case.clone(),
    };
    let result = choice.rows.iter().try_for_each(|row| driver.row(row, &tools));
    drop(driver);
    if choice.keep {
        eprintln!("the trees stay in {}", folder.keep().display());
    }
    match result {
        // What was measured until then is worth a report.
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("interrupted; the report has what was measured until now");
            Ok(())
        }
        result => result,
    }
}

fn describe(tools: &[&dyn Tool], missing: &[&dyn Tool], filesystem: &str) -> Run {
    let words: Vec<String> = std::env::args().skip(1).collect();
    Run {
        id: jiff::Timestamp::now()
            .strftime("%Y-%m-%d %H:%M:%S UTC")
            .to_string(),
        command: ["cargo xtask bench", &words.join(" ")]
            .join(" ")
            .trim()
            .to_owned(),
        commit: machine::commit(),
        machine: machine::describe(filesystem),
        tools: tools
            .iter()
            .map(|tool| ToolLine {
                name: tool.name().to_owned(),
                version: tools::version(*tool).unwrap_or_default(),
                how: tool.how(),
            })
            .collect(),
        missing: missing.iter().map(|tool| tool.name().to_owned()).collect(),
    }
}

struct Driver {
    bench: Bench,
    raw: Raw,
    run: String,
    rounds: usize,
    /// What must be in a case's name.
    case: String,
}

impl Driver {
    fn row(&mut self, row: &Row, tools: &[&dyn Tool]) -> Result<()> {
        for case in (row.cases)(self.bench.scale) {
            if !case_name(&case, &self.bench.filesystem).contains(&self.case) {
                continue;
            }
            let tools: Vec<&dyn Tool> = tools
                .iter()
                .filter(|tool| row.tools.contains(&tool.name()) && !case.without.contains(&tool.name()))
                .copied()
                .collect();
            // Who fails or takes too long is not tried again.
            let mut given_up = HashSet::new();
            for round in 1..=self.rounds {
                for place in 0..tools.len() {
                    // Each round begins with another one.
                    let tool = tools[(place + round - 1) % tools.len()];
                    if round > case.rounds(tool.name(), self.rounds) || given_up.contains(tool.name()) {
                        continue;
                    }
                    let outcome = self.measure(row, &case, tool, round)?;
                    if matches!(outcome, Outcome::Failed(_) | Outcome::TimedOut(_)) {
                        given_up.insert(tool.name());
                    }
                }
            }
            self.bench.forget_originals();
        }
        Ok(())
    }

    fn measure(&mut self, row: &Row, case: &Case, tool: &dyn Tool, round: usize) -> Result<Outcome> {
        stop::check()?;
        self.bench.ensure_room()?;
        let started = Instant::now();
        let tried = catch_unwind(AssertUnwindSafe(|| (row.measure)(&self.bench, case, tool)));
        let result = tried.unwrap_or_else(|panic| {
            let said = panic.downcast_ref::<String>().cloned();
            bail!("{}", said.unwrap_or_else(|| "it panicked".to_owned()))
        });
        // A tool that fails because of Ctrl-C has not failed.
        stop::check()?;
        let (found, outcome) = match result {
            Ok(found) => (found, Outcome::Right),
            Err(error) if error.is::<TimedOut>() => {
                let limit = Outcome::TimedOut(self.bench.limit.as_secs());
                (vec![Found::new(row.name, None)], limit)
            }
            Err(error) => {
                let said = self
                    .bench
                    .without_folder(&format!("{error:#}"))
                    .replace('\n', " ");
                let said: String = said.chars().take(600).collect();
                (vec![Found::new(row.name, None)], Outcome::Failed(said))
            }
        };
        let mut shown = Vec::new();
        for found in found {
            let outcome = match found.wrong {
                Some(wrong) => Outcome::Wrong(wrong.chars().take(600).collect()),
                None => outcome.clone(),
            };
            shown.push(line(row, found.row, &found.values, &outcome));
            self.raw.add(&Sample {
                run: self.run.clone(),
                row: found.row.to_owned(),
                case: case_name(case, &self.bench.filesystem),
                size: case.size,
                tool: tool.name().to_owned(),
                round,
                outcome,
                values: found.values,
            })?;
        }
        eprintln!(
            "{}, {}, round {round} of {}: {}: {} ({:.1} s in all)",
            row.name,
            case.name,
            case.rounds(tool.name(), self.rounds),
            tool.name(),
            shown.join("; "),
            started.elapsed().as_secs_f64()
        );
        Ok(outcome)
    }
}

/// As it is shown and chosen by.
fn case_name(case: &Case, filesystem: &str) -> String {
    match case.name.strip_prefix("disk") {
        Some(rest) => format!("disk ({filesystem}){rest}"),
        None => case.name.clone(),
    }
}

/// What is shown of a measurement while the run goes on.
fn line(
    row: &Row,
    name: &str,
    values: &std::collections::BTreeMap<String, Vec<f64>>,
    outcome: &Outcome,
) -> String {
    let mut parts = Vec::new();
    let mut seen = HashSet::new();
    for table in row.tables.iter().filter(|table| table.row == name) {
        let figures = values
            .get(table.measure)
            .and_then(|values| figures::Figures::of(values.iter().copied()));
        if let Some(figures) = figures
            && seen.insert(table.measure)
        {
            parts.push(format!(
                "{} {}",
                table.measure,
                table.unit.write(figures.median())
            ));
        }
    }
    let figures = format!("{name} {}", parts.join(", "));
    match outcome {
        Outcome::Right => figures,
        Outcome::Wrong(how) => format!("{figures}: WRONG: {how}"),
        Outcome::TimedOut(seconds) => format!("{name}: not done after {seconds} s"),
        Outcome::Failed(why) => format!("{name}: failed: {why}"),
    }
}
