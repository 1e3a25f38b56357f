//! The table of what each source sees of each change, on each filesystem and
//! kernel.
//!
//! In: the lines that the coverage program prints in a guest, or the files
//! `docs/kernel-support/KERNEL.json`, which hold the same. Out: those files, and
//! `docs/KERNEL-SUPPORT.md`, which is made of them and of the notes here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use xtask::workspace;

/// The columns.
pub const SOURCES: [&str; 4] = ["fentry", "kprobe", "fanotify", "inotify"];

/// What makes the files and the table anew.
pub const REMEDY: &str = "run `cargo xtask coverage`, and look at what changed";

/// One row on one filesystem of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub group: String,
    pub row: String,
    pub filesystem: String,
    /// By [`SOURCES`]: the verdict.
    pub cells: [String; 4],
    /// Why there is no such change, or why a source cannot watch.
    pub reason: String,
}

/// What the program printed, one line per source, put together.
///
/// # Errors
/// A line is not what it prints, or a source is missing.
pub fn parse_output(output: &str) -> Result<Vec<Line>> {
    let mut lines: Vec<Line> = Vec::new();
    for text in output.lines().filter(|line| line.starts_with('{')) {
        let value: Value = serde_json::from_str(text).with_context(|| text.to_owned())?;
        let field = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
        let (row, filesystem, source) = (field("row"), field("filesystem"), field("source"));
        let column = SOURCES.iter().position(|s| *s == source).with_context(|| text.to_owned())?;
        let known = lines.iter().position(|l| l.row == row && l.filesystem == filesystem);
        let index = known.unwrap_or_else(|| {
            lines.push(Line {
                group: field("group"),
                row,
                filesystem,
                cells: Default::default(),
                reason: String::new(),
            });
            lines.len() - 1
        });
        lines[index].cells[column] = field("verdict");
        if lines[index].reason.is_empty() {
            lines[index].reason = field("reason");
        }
    }
    match lines.iter().find(|line| line.cells.iter().any(String::is_empty)) {
        Some(line) => bail!("not every source has a verdict: {line:?}"),
        None => Ok(lines),
    }
}

fn data_file(kernel: &str) -> PathBuf {
    workspace::root().join(format!("docs/kernel-support/{kernel}.json"))
}

/// Where the table is.
#[must_use]
pub fn table_file() -> PathBuf {
    workspace::root().join("docs/KERNEL-SUPPORT.md")
}

/// A kernel's lines as they are in its file: an array, one line an element, so
/// that a difference shows in a review.
#[must_use]
pub fn to_json(lines: &[Line]) -> String {
    let one = |line: &Line| {
        let mut fields = vec![
            ("group", &line.group),
            ("row", &line.row),
            ("filesystem", &line.filesystem),
        ];
        fields.extend(SOURCES.into_iter().zip(&line.cells));
        if !line.reason.is_empty() {
            fields.push(("reason", &line.reason));
        }
        let fields = fields.iter().map(|(name, value)| format!("\"{name}\": {}", Value::from(value.as_str())));
        format!("  {{{}}}", fields.collect::<Vec<_>>().join(", "))
    };
    format!("[\n{}\n]\n", lines.iter().map(one).collect::<Vec<_>>().join(",\n"))
}

/// # Errors
/// The text is not such an array.
pub fn from_json(text: &str) -> Result<Vec<Line>> {
    let value: Value = serde_json::from_str(text)?;
    let elements = value.as_array().context("an array")?;
    let line = |value: &Value| {
        let field = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
        Line {
            group: field("group"),
            row: field("row"),
            filesystem: field("filesystem"),
            cells: SOURCES.map(field),
            reason: field("reason"),
        }
    };
    Ok(elements.iter().map(line).collect())
}

/// # Errors
/// There is no such file, or it is damaged.
pub fn read(kernel: &str) -> Result<Vec<Line>> {
    let path = data_file(kernel);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    from_json(&text).with_context(|| path.display().to_string())
}

/// # Errors
/// The file cannot be written.
pub fn write(kernel: &str, lines: &[Line]) -> Result<()> {
    let path = data_file(kernel);
    fs::create_dir_all(path.parent().context("it lies in a folder")?)?;
    fs::write(&path, to_json(lines)).with_context(|| path.display().to_string())
}
