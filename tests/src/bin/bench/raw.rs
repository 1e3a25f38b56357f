//! What was measured, as it is kept: one JSON object a line.
//!
//! In: measurements as they are made, or a file. Out: the same. A report follows
//! from the file alone. A row that is measured again takes the place of what the
//! file had of it, since only figures of one run may be compared.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Line {
    Run(Run),
    Sample(Sample),
}

/// One call of the program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// When it began, UTC.
    pub id: String,
    /// As it would be typed.
    pub command: String,
    pub commit: String,
    /// `(what, value)`.
    pub machine: Vec<(String, String)>,
    pub tools: Vec<ToolLine>,
    /// Tools that could not be had.
    pub missing: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolLine {
    pub name: String,
    pub version: String,
    pub how: String,
}

/// What one tool did in one round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub run: String,
    pub row: String,
    pub case: String,
    /// How much there was of what the row is about: files, bytes, entries.
    pub size: u64,
    pub tool: String,
    pub round: usize,
    pub outcome: Outcome,
    /// Measure → values.
    pub values: BTreeMap<String, Vec<f64>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The tree at B was the right one.
    Right,
    /// It was not; how.
    Wrong(String),
    /// The tool did not finish within so many seconds.
    TimedOut(u64),
    /// The tool, or the measurement, failed.
    Failed(String),
}

/// The file, while a run adds to it.
pub struct Raw {
    path: PathBuf,
    file: File,
}

impl Raw {
    /// Opens the file for a run that measures anew what `again` says.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub fn begin(path: &Path, run: &Run, again: impl Fn(&Sample) -> bool) -> Result<Raw> {
        let mut lines = if path.exists() { read(path)? } else { Vec::new() };
        lines.retain(|line| !matches!(line, Line::Sample(sample) if again(sample)));
        let used: Vec<String> = samples(&lines).map(|sample| sample.run.clone()).collect();
        lines.retain(|line| !matches!(line, Line::Run(run) if !used.contains(&run.id)));
        lines.push(Line::Run(run.clone()));
        let mut text = String::new();
        for line in &lines {
            text += &serde_json::to_string(line)?;
            text.push('\n');
        }
        fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))?;
        let file = File::options().append(true).open(path)?;
        Ok(Raw {
            path: path.to_owned(),
            file,
        })
    }

    /// # Errors
    /// The file cannot be written.
    pub fn add(&mut self, sample: &Sample) -> Result<()> {
        let mut line = serde_json::to_string(&Line::Sample(sample.clone()))?;
        line.push('\n');
        self.file
            .write_all(line.as_bytes())
            .with_context(|| format!("{} cannot be written", self.path.display()))
    }
}

/// # Errors
/// The file cannot be read or is not such a file.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty());
    lines
        .map(|(number, line)| {
            serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), number + 1))
        })
        .collect()
}

pub fn samples(lines: &[Line]) -> impl Iterator<Item = &Sample> {
    lines.iter().filter_map(|line| match line {
        Line::Sample(sample) => Some(sample),
        Line::Run(_) => None,
    })
}

pub fn runs(lines: &[Line]) -> impl Iterator<Item = &Run> {
    lines.iter().filter_map(|line| match line {
        Line::Run(run) => Some(run),
        Line::Sample(_) => None,
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn run(id: &str) -> Run {
        Run {
            id: id.to_owned(),
            command: "cargo xtask bench".to_owned(),
            commit: "abc".to_owned(),
            machine: vec![("processor".to_owned(), "two of them".to_owned())],
            tools: Vec::new(),
            missing: Vec::new(),
        }
    }

    pub fn sample(run: &str, row: &str, tool: &str, measure: &str, values: &[f64]) -> Sample {
        Sample {
            run: run.to_owned(),
            row: row.to_owned(),
            case: "a case".to_owned(),
            size: 1000,
            tool: tool.to_owned(),
            round: 1,
            outcome: Outcome::Right,
            values: BTreeMap::from([(measure.to_owned(), values.to_vec())]),
        }
    }

    #[test]
    fn a_row_that_is_measured_again_takes_the_place_of_the_old() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("raw.jsonl");
        let mut raw = Raw::begin(&path, &run("1"), |_| true).unwrap();
        raw.add(&sample("1", "latency", "omirr", "ms", &[1.0])).unwrap();
        raw.add(&sample("1", "watch", "omirr", "ms", &[2.0])).unwrap();
        let mut raw = Raw::begin(&path, &run("2"), |sample| sample.row == "latency").unwrap();
        raw.add(&sample("2", "latency", "omirr", "ms", &[3.0])).unwrap();
        let lines = read(&path).unwrap();
        let kept: Vec<(&str, &str)> = samples(&lines)
            .map(|sample| (sample.run.as_str(), sample.row.as_str()))
            .collect();
        assert_eq!(kept, [("1", "watch"), ("2", "latency")]);
        assert_eq!(runs(&lines).count(), 2);
        // Of the first run nothing is left.
        Raw::begin(&path, &run("3"), |sample| sample.row == "watch").unwrap();
        let lines = read(&path).unwrap();
        assert!(runs(&lines).all(|run| run.id != "1"));
    }
}
