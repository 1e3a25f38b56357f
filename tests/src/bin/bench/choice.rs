//! The command line, and what follows from it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;

use crate::bench::Scale;
use crate::rows::{self, Row};
use crate::tools::{self, Tool};

/// Measure omirr beside what one would use instead
///
/// Runs each chosen row for each chosen tool, all tools in each round, in two
/// network namespaces, and writes RESULTS.md, plots and raw.jsonl. Rows that are
/// not chosen keep what an earlier run found. Needs root, and an idle machine.
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
pub struct Options {
    /// Rows, by name or the beginning of one [default: all]
    rows: Vec<String>,
    /// Tools, with commas between them; omirr is always among them [default: all]
    #[arg(long, value_delimiter = ',')]
    tools: Vec<String>,
    /// Of those rows only the cases in whose names this is, as in "64 shares"
    #[arg(long)]
    case: Option<String>,
    /// Rounds of each measurement [default: 5, or 1 with --quick]
    #[arg(long)]
    rounds: Option<usize>,
    /// A first look within minutes: smaller sizes, fewer rounds, without the slow tools
    #[arg(long)]
    quick: bool,
    /// Seconds that one wait may take [default: 600, or 60 with --quick]
    #[arg(long)]
    limit: Option<u64>,
    /// Where the report goes [default: bench, or target/bench-quick with --quick]
    #[arg(long)]
    into: Option<PathBuf>,
    /// On whose filesystem trees are made [default: target/bench]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Leave the trees where they are; removing many files makes ext4 slow for minutes
    #[arg(long)]
    keep: bool,
    /// Measure nothing, and write the report of what was measured before
    #[arg(long)]
    report_only: bool,
    /// Print the names of all rows and tools
    #[arg(long)]
    list: bool,
}

/// What is to be done.
pub struct Choice {
    pub rows: Vec<&'static Row>,
    /// What must be in a case's name.
    pub case: String,
    pub tools: Vec<Box<dyn Tool>>,
    pub rounds: usize,
    pub scale: Scale,
    pub limit: Duration,
    pub into: PathBuf,
    pub dir: PathBuf,
    pub keep: bool,
    pub report_only: bool,
}

impl Options {
    /// # Errors
    /// A row or tool of that name does not exist.
    pub fn choose(self) -> Result<Choice> {
        if self.list {
            let rows: Vec<&str> = rows::ALL.iter().flat_map(|row| row.names()).collect();
            let tools: Vec<&str> = tools::all().iter().map(|tool| tool.name()).collect();
            println!("rows: {}\ntools: {}", rows.join(", "), tools.join(", "));
            std::process::exit(0);
        }
        let scale = if self.quick { Scale::Quick } else { Scale::Full };
        let target = xtask::workspace::target();
        Ok(Choice {
            rows: choose_rows(&self.rows)?,
            case: self.case.unwrap_or_default(),
            tools: choose_tools(&self.tools, scale)?,
            rounds: self.rounds.unwrap_or(scale.pick(1, 5)).max(1),
            scale,
            limit: Duration::from_secs(self.limit.unwrap_or(scale.pick(60, 600))),
            into: self.into.unwrap_or_else(|| {
                let full = xtask::workspace::root().join("bench");
                scale.pick(target.join("bench-quick"), full)
            }),
            dir: self.dir.unwrap_or_else(|| target.join("bench")),
            keep: self.keep,
            report_only: self.report_only,
        })
    }
}

fn choose_rows(wanted: &[String]) -> Result<Vec<&'static Row>> {
    let matches = |row: &Row, wanted: &String| row.names().any(|name| name.starts_with(wanted.as_str()));
    if let Some(unknown) = wanted
        .iter()
        .find(|wanted| !rows::ALL.iter().any(|row| matches(row, wanted)))
    {
        bail!("there is no row {unknown}; --list names all");
    }
    let chosen = |row: &&&Row| wanted.is_empty() || wanted.iter().any(|wanted| matches(row, wanted));
    Ok(rows::ALL.iter().filter(chosen).copied().collect())
}

fn choose_tools(wanted: &[String], scale: Scale) -> Result<Vec<Box<dyn Tool>>> {
    let all = tools::all();
    if let Some(unknown) = wanted
        .iter()
        .find(|wanted| !all.iter().any(|tool| tool.name() == wanted.as_str()))
    {
        bail!("there is no tool {unknown}; --list names all");
    }
    let slow = |name: &str| scale == Scale::Quick && rows::SLOW.contains(&name);
    let chosen = |name: &str| match wanted {
        [] => !slow(name),
        wanted => name == "omirr" || wanted.iter().any(|wanted| wanted == name),
    };
    Ok(all.into_iter().filter(|tool| chosen(tool.name())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(rows: &[&str]) -> Vec<&'static str> {
        let rows: Vec<String> = rows.iter().map(|&row| row.to_owned()).collect();
        let chosen = choose_rows(&rows).unwrap();
        chosen.iter().map(|row| row.name).collect()
    }

    #[test]
    fn rows_are_chosen_by_their_beginning_and_by_what_comes_with_them() {
        assert_eq!(names(&["lat"]), ["latency"]);
        assert_eq!(names(&["restart"]), ["first-copy"]);
        assert_eq!(names(&[]).len(), rows::ALL.len());
        assert!(choose_rows(&["nothing".to_owned()]).is_err());
    }

    #[test]
    fn omirr_is_always_there_and_the_slow_only_when_asked_for() {
        let of = |wanted: &[&str], scale| -> Vec<&'static str> {
            let wanted: Vec<String> = wanted.iter().map(|&tool| tool.to_owned()).collect();
            let tools = choose_tools(&wanted, scale).unwrap();
            tools.iter().map(|tool| tool.name()).collect()
        };
        assert_eq!(of(&["rsync"], Scale::Quick), ["omirr", "rsync"]);
        assert_eq!(of(&["unison"], Scale::Quick), ["omirr", "unison"]);
        assert!(!of(&[], Scale::Quick).contains(&"unison"));
        assert!(of(&[], Scale::Full).contains(&"unison"));
    }

    #[test]
    fn every_row_names_tools_that_exist_and_has_a_case() {
        let tools = tools::all();
        for row in rows::ALL {
            for name in row.tools {
                assert!(tools.iter().any(|tool| tool.name() == *name), "{name}");
            }
            assert!(!(row.cases)(Scale::Full).is_empty(), "{}", row.name);
            let names: Vec<&str> = row.names().collect();
            assert!(row.tables.iter().all(|table| names.contains(&table.row)));
        }
    }
}
