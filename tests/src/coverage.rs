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
        let column = SOURCES
            .iter()
            .position(|s| *s == source)
            .with_context(|| text.to_owned())?;
        let known = lines
            .iter()
            .position(|l| l.row == row && l.filesystem == filesystem);
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
        let fields = fields
            .iter()
            .map(|(name, value)| format!("\"{name}\": {}", Value::from(value.as_str())));
        format!("  {{{}}}", fields.collect::<Vec<_>>().join(", "))
    };
    format!(
        "[\n{}\n]\n",
        lines.iter().map(one).collect::<Vec<_>>().join(",\n")
    )
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

/// Why an eBPF cell is not a plain yes, and what closes the gap.
struct Note {
    verdict: &'static str,
    /// What the names of its rows begin with.
    rows: &'static str,
    text: &'static str,
}

const NOTES: [Note; 2] = [
    Note {
        verdict: "at write-back",
        rows: "mmap store",
        text: "The page fault is reported when it happens, but it comes before the store, and later stores to the \
            same page do not fault. As long as a file is mapped to write, each write-back of it is reported when \
            its pages have been written (`do_writepages`): after `msync` and `fsync`, else when the kernel's \
            flusher takes them, by default within half a minute. From then on the next store faults again. The \
            last close (`__fput`) ends it.",
    },
    Note {
        verdict: "at close",
        rows: "mmap store",
        text: "tmpfs has no write-back. A store after the page fault is seen when the last mapping and descriptor \
            of the file are gone (`__fput`). Until then nothing in the kernel tells of it, and the file's times \
            do not change, so that a comparison by `stat` does not find it either.",
    },
];

fn note(row: &str, verdict: &str) -> Option<usize> {
    NOTES
        .iter()
        .position(|note| note.verdict == verdict && row.starts_with(note.rows))
}

/// The eBPF cells that are not a yes, and for which nobody says why.
#[must_use]
pub fn unexplained(kernel: &str, lines: &[Line]) -> Vec<String> {
    let explained = |line: &Line, verdict: &str| match verdict {
        "yes" => true,
        "n/a" => !line.reason.is_empty(),
        verdict => note(&line.row, verdict).is_some(),
    };
    let mut out = Vec::new();
    for line in lines {
        for (source, verdict) in SOURCES.iter().zip(&line.cells).take(2) {
            if !explained(line, verdict) {
                out.push(format!(
                    "{kernel}, {}, {source}: {}: {verdict}",
                    line.filesystem, line.row
                ));
            }
        }
    }
    out
}

/// What differs between the lines that were measured and those of the file.
#[must_use]
pub fn differences(measured: &[Line], known: &[Line]) -> Vec<String> {
    let missing = |here: &[Line], there: &[Line], what: &str| -> Vec<String> {
        here.iter()
            .filter(|line| !there.contains(line))
            .map(|line| format!("{what}: {line:?}"))
            .collect()
    };
    let mut out = missing(measured, known, "measured");
    out.extend(missing(known, measured, "in the file"));
    out
}

/// Where something is so: filesystems with the kernels.
type Places<'a> = BTreeMap<&'a str, Vec<&'a str>>;

/// `docs/KERNEL-SUPPORT.md`, made of every kernel's lines.
#[must_use]
pub fn table(kernels: &[(&str, Vec<Line>)]) -> String {
    let mut text = String::from(HEAD);
    let Some((_, first)) = kernels.first() else {
        return text;
    };
    let mut group = "";
    let mut done: Vec<&str> = Vec::new();
    for line in first {
        if done.contains(&line.row.as_str()) {
            continue;
        }
        done.push(&line.row);
        if line.group != group {
            group = &line.group;
            let _ = write!(
                text,
                "\n## {group}\n\n| change | {} | not on |\n| --- |{}\n",
                SOURCES.join(" | "),
                " --- |".repeat(SOURCES.len() + 1)
            );
        }
        let cells: Vec<String> = (0..SOURCES.len())
            .map(|column| cell(kernels, &line.row, column))
            .collect();
        let _ = writeln!(
            text,
            "| {} | {} | {} |",
            line.row,
            cells.join(" | "),
            not_on(kernels, &line.row)
        );
    }
    text.push_str("\n## Notes\n\n");
    for (number, note) in NOTES.iter().enumerate() {
        let words: Vec<&str> = note.text.split_whitespace().collect();
        let _ = writeln!(text, "{}. {}", number + 1, words.join(" "));
    }
    text
}

const HEAD: &str = "\
<!-- Made by `cargo xtask coverage` of docs/kernel-support. Do not edit. -->

# What is seen of each change

Every row was done by system call in a guest with each of the kernels 5.10, 6.1, 6.12 and 7.2, on ext4, xfs, btrfs, \
tmpfs, and through an overlayfs whose upper directory is the share (on ext4); by both ways of attaching eBPF \
programs, and, for comparison, by fanotify and by plain inotify with a watch on each directory. \
A change counts as seen only by an event that comes when the change is complete, so that whoever looks at the file \
then finds the new content. The eBPF sources must also name the right operation and, where there is one, the right \
range of bytes.

| word | means |
| --- | --- |
| yes | while descriptors and mappings are still open |
| at write-back | when the kernel has written the file's pages to its disk |
| at close | when the last descriptor and mapping are gone |
| early | by an event that comes before the change is complete, and by none after it |
| no | by no event |
| varies | one or another of these, by chance |
| cannot watch | the source does not work on this filesystem |

What stands first in a cell holds wherever nothing else is said. *Not on* names the filesystems and kernels that \
have no such change, with the kernel's reason. Numbers are notes at the end.
";

fn words(verdict: &str) -> &str {
    match verdict {
        "no source" => "cannot watch",
        other => other,
    }
}

fn lines_of<'a>(kernels: &'a [(&str, Vec<Line>)], row: &'a str) -> impl Iterator<Item = (&'a str, &'a Line)> {
    kernels.iter().flat_map(move |(kernel, lines)| {
        lines
            .iter()
            .filter(move |line| line.row == row)
            .map(move |line| (*kernel, line))
    })
}

fn cell(kernels: &[(&str, Vec<Line>)], row: &str, column: usize) -> String {
    let mut verdicts: BTreeMap<&str, Places<'_>> = BTreeMap::new();
    let mut whole: Places<'_> = Places::new();
    for (kernel, line) in lines_of(kernels, row).filter(|(_, line)| line.cells[column] != "n/a") {
        let places = verdicts.entry(&line.cells[column]).or_default();
        places.entry(&line.filesystem).or_default().push(kernel);
        whole.entry(&line.filesystem).or_default().push(kernel);
    }
    let count = |places: &Places<'_>| places.values().map(Vec::len).sum::<usize>();
    let mut verdicts: Vec<(&str, Places<'_>)> = verdicts.into_iter().collect();
    verdicts.sort_by_key(|(_, places)| std::cmp::Reverse(count(places)));
    let one = |(number, (verdict, places)): (usize, &(&str, Places<'_>))| {
        // Only what the eBPF sources do is explained.
        let note = note(row, verdict).filter(|_| column < 2);
        let note = note.map_or_else(String::new, |note| format!(" ({})", note + 1));
        match number {
            0 => format!("{}{note}", words(verdict)),
            _ => format!("{}: {}{note}", where_it_is(places, &whole), words(verdict)),
        }
    };
    if verdicts.is_empty() {
        return "–".to_owned();
    }
    verdicts
        .iter()
        .enumerate()
        .map(one)
        .collect::<Vec<_>>()
        .join("; ")
}

fn not_on(kernels: &[(&str, Vec<Line>)], row: &str) -> String {
    let mut reasons: BTreeMap<&str, Places<'_>> = BTreeMap::new();
    let mut whole: Places<'_> = Places::new();
    for (kernel, line) in lines_of(kernels, row) {
        whole.entry(&line.filesystem).or_default().push(kernel);
        if line.cells[0] == "n/a" {
            let places = reasons.entry(&line.reason).or_default();
            places.entry(&line.filesystem).or_default().push(kernel);
        }
    }
    let one = |(reason, places): (&&str, &Places<'_>)| format!("{} ({reason})", where_it_is(places, &whole));
    reasons.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// `xfs, btrfs`, or `tmpfs on 5.10, 6.1` where other kernels do otherwise.
fn where_it_is(places: &Places<'_>, whole: &Places<'_>) -> String {
    let mut by_kernels: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (filesystem, kernels) in places {
        let on = match whole.get(filesystem) {
            Some(all) if all == kernels => String::new(),
            _ => format!(" on {}", kernels.join(", ")),
        };
        by_kernels.entry(on).or_default().push(filesystem);
    }
    let one = |(on, filesystems): (&String, &Vec<&str>)| format!("{}{on}", filesystems.join(", "));
    by_kernels.iter().map(one).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(filesystem: &str, verdict: &str, reason: &str) -> Line {
        Line {
            group: "data".to_owned(),
            row: "write".to_owned(),
            filesystem: filesystem.to_owned(),
            cells: std::array::from_fn(|_| verdict.to_owned()),
            reason: reason.to_owned(),
        }
    }

    #[test]
    fn a_file_holds_what_was_written_to_it() {
        let lines = vec![line("ext4", "yes", ""), line("tmpfs", "n/a", "a \"reason\"")];
        assert_eq!(from_json(&to_json(&lines)).unwrap(), lines);
    }

    #[test]
    fn a_cell_without_a_reason_is_unexplained() {
        let lines = [
            line("ext4", "yes", ""),
            line("xfs", "no", ""),
            line("tmpfs", "n/a", ""),
        ];
        assert_eq!(unexplained("6.1", &lines).len(), 4);
        assert!(unexplained("6.1", &[line("tmpfs", "n/a", "why")]).is_empty());
    }

    #[test]
    fn a_table_says_the_rule_and_where_it_does_not_hold() {
        let old = vec![
            line("ext4", "yes", ""),
            line("tmpfs", "no", ""),
            line("xfs", "n/a", "why"),
        ];
        let new = vec![
            line("ext4", "yes", ""),
            line("tmpfs", "yes", ""),
            line("xfs", "n/a", "why"),
        ];
        let text = table(&[("5.10", old), ("6.1", new)]);
        let cell = "yes; tmpfs on 5.10: no";
        assert!(
            text.contains(&format!(
                "| write | {cell} | {cell} | {cell} | {cell} | xfs (why) |"
            )),
            "{text}"
        );
    }

    #[test]
    fn a_source_without_a_verdict_is_an_error() {
        let output =
            r#"{"group":"data","row":"write","filesystem":"ext4","source":"fentry","verdict":"yes"}"#;
        assert!(parse_output(output).is_err());
    }
}
