//! The report: tables, goals and plots, of what was measured.
//!
//! In: the lines of `raw.jsonl`. Out: `RESULTS.md` and pictures beside it, and the
//! table of goals in the README if it is the repository's own report. What is
//! wrong, too slow or missing is said where its figure would stand.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::figures::{Figures, Unit, number};
use crate::machine;
use crate::plot::{self, Axes, Series};
use crate::raw::{self, Line, Outcome, Run, Sample};
use crate::rows::{self, Goal, Table};
use crate::tools;

/// Copy on one machine only, so they are no competitors.
const LOCAL: [&str; 2] = ["cp", "tar"];
const US: &str = "omirr";
/// Between these lines the README has the table of goals.
const SHOWN: [&str; 2] = [
    "<!-- bench: written by `cargo xtask bench` -->\n",
    "<!-- bench: end -->\n",
];

/// # Errors
/// Nothing was measured, or the folder cannot be read or written.
pub fn write(folder: &Path) -> Result<()> {
    let lines = raw::read(&folder.join("raw.jsonl"))?;
    let results = Results::of(&lines);
    let mut pictures = Vec::new();
    for (name, text) in results.plots()? {
        save(folder, &name, &text)?;
        pictures.push(name);
    }
    save(folder, "RESULTS.md", &results.render(&pictures))?;
    let root = xtask::workspace::root();
    if folder == root.join("bench") {
        let readme = fs::read_to_string(root.join("README.md")).context("README.md cannot be read")?;
        let mut table = String::new();
        results.render_summary(&mut table);
        let shown = show(&readme, table.trim_end());
        save(
            &root,
            "README.md",
            &shown.context("README.md has no place for the table")?,
        )?;
    }
    eprintln!("the report is {}", folder.join("RESULTS.md").display());
    Ok(())
}

/// The README with this table in its place; none if it has no such place.
fn show(readme: &str, table: &str) -> Option<String> {
    let (before, rest) = readme.split_once(SHOWN[0])?;
    let (_, after) = rest.split_once(SHOWN[1])?;
    Some(format!("{before}{}{table}\n{}{after}", SHOWN[0], SHOWN[1]))
}

fn save(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))
}

struct Results<'lines> {
    samples: Vec<&'lines Sample>,
    runs: Vec<&'lines Run>,
}

/// One table's figures in one case.
struct Case<'lines> {
    name: &'lines str,
    size: u64,
    /// In the order of [`tools::all`].
    tools: Vec<(&'lines str, Option<Figures>, String)>,
    own: Vec<(&'lines str, Figures)>,
}

impl<'lines> Results<'lines> {
    fn of(lines: &'lines [Line]) -> Results<'lines> {
        Results {
            samples: raw::samples(lines).collect(),
            runs: raw::runs(lines).collect(),
        }
    }

    /// By size.
    fn cases(&self, table: &Table) -> Vec<Case<'lines>> {
        let order: Vec<&str> = tools::all().iter().map(|tool| tool.name()).collect();
        let mut cases: BTreeMap<(u64, &str), Vec<&Sample>> = BTreeMap::new();
        for sample in &self.samples {
            if sample.row == table.row && sample.case.starts_with(table.cases) {
                cases.entry((sample.size, &sample.case)).or_default().push(sample);
            }
        }
        let case = |((size, name), samples): ((u64, &'lines str), Vec<&'lines Sample>)| {
            let mut tools: Vec<(&str, Option<Figures>, String)> = Vec::new();
            for sample in &samples {
                let tool = sample.tool.as_str();
                if !tools.iter().any(|(name, _, _)| *name == tool) {
                    let of_tool: Vec<&Sample> = samples
                        .iter()
                        .filter(|other| other.tool == tool)
                        .copied()
                        .collect();
                    tools.push((tool, figures(&of_tool, table.measure), remarks(&of_tool)));
                }
            }
            tools.sort_by_key(|(name, _, _)| order.iter().position(|tool| tool == name));
            let ours: Vec<&Sample> = samples
                .iter()
                .filter(|sample| sample.tool == US)
                .copied()
                .collect();
            let mut own = Vec::new();
            for measure in ours.iter().flat_map(|sample| sample.values.keys()) {
                if !own.iter().any(|(name, _)| *name == measure.as_str())
                    && let Some(figures) = figures(&ours, measure)
                {
                    own.push((measure.as_str(), figures));
                }
            }
            Case {
                name,
                size,
                tools,
                own,
            }
        };
        let mut cases: Vec<Case> = cases.into_iter().map(case).collect();
        // Other measures of the row may be of fewer cases.
        cases.retain(|case| {
            case.tools
                .iter()
                .any(|(_, figures, remark)| figures.is_some() || !remark.is_empty())
        });
        cases
    }

    fn render(&self, pictures: &[String]) -> String {
        let mut out = String::from("# omirr and what one would use instead\n\n");
        out += "Written by `cargo xtask bench`, from `raw.jsonl` beside it. Only ratios of figures of one run mean \
                anything elsewhere. All tools do one round before any does the next; each measurement has fresh \
                folders; nothing is removed before the end but single large files. Unison, csync2 and Syncthing do \
                one round where they take minutes, and are left out where they would take longer still, which is \
                said there. A and B are two network namespaces on one machine, joined by a veth pair. After each measurement B is compared with A.\n\n";
        self.render_runs(&mut out);
        self.render_summary(&mut out);
        for picture in pictures {
            let _ = writeln!(out, "![{}]({picture})\n", picture.trim_end_matches(".svg"));
        }
        let mut title = "";
        for table in rows::ALL.iter().flat_map(|row| row.tables) {
            let cases = self.cases(table);
            if cases.is_empty() {
                continue;
            }
            if title != table.row {
                title = table.row;
                let _ = writeln!(out, "## {title}\n");
            }
            let _ = writeln!(out, "### {}\n", table.title);
            if !table.note.is_empty() {
                let _ = writeln!(out, "{}\n", table.note);
            }
            for case in &cases {
                render_case(&mut out, table, case);
                render_left_out(&mut out, table, case);
            }
        }
        self.render_tools(&mut out);
        out
    }

    fn render_runs(&self, out: &mut String) {
        for run in &self.runs {
            let mut rows: Vec<&str> = Vec::new();
            let mut rounds = 0;
            for sample in self.samples.iter().filter(|sample| sample.run == run.id) {
                rounds = rounds.max(sample.round);
                if !rows.contains(&sample.row.as_str()) {
                    rows.push(&sample.row);
                }
            }
            if rows.is_empty() {
                continue;
            }
            let _ = writeln!(
                out,
                "**{}**, `{}`, omirr at {}: {}, up to {rounds} rounds.",
                run.id,
                run.command,
                run.commit,
                rows.join(", ")
            );
            let machine: Vec<String> = run
                .machine
                .iter()
                .map(|(what, value)| format!("{what}: {value}"))
                .collect();
            let _ = writeln!(out, "{}.", machine.join("; "));
            if machine::load_of(&run.machine).is_some_and(|load| load > 1.0) {
                let _ = writeln!(
                    out,
                    "**The machine was not idle**: times are longer than they need be, and spread wider."
                );
            }
            if !run.missing.is_empty() {
                let _ = writeln!(out, "Not to be had there: {}.", run.missing.join(", "));
            }
            out.push('\n');
        }
    }

    /// The largest case of each table that has goals.
    fn render_summary(&self, out: &mut String) {
        out.push_str(
            "| | omirr | best other | omirr / best | goal | met |\n| --- | --- | --- | --- | --- | --- |\n",
        );
        for table in rows::ALL.iter().flat_map(|row| row.tables) {
            let cases = self.cases(table);
            let Some(case) = cases.last().filter(|_| !table.goals.is_empty()) else {
                continue;
            };
            let ours = case.of(US);
            let best = case.best();
            let ratio = ours
                .zip(best.as_ref())
                .filter(|(_, (_, best))| *best > 0.0)
                .map(|(ours, (_, best))| number(ours.median() / best));
            let (goals, met): (Vec<String>, Vec<&str>) = table
                .goals
                .iter()
                .map(|goal| {
                    let met = match judge(*goal, case) {
                        Some((_, true)) => "yes",
                        Some((_, false)) => "no",
                        None => "–",
                    };
                    (goal.say(table.unit), met)
                })
                .unzip();
            let _ = writeln!(
                out,
                "| {}: {} | {} | {} | {} | {} | {} |",
                table.title,
                case.name,
                ours.map_or_else(|| "–".to_owned(), |ours| table.unit.write(ours.median())),
                best.map_or_else(
                    || "–".to_owned(),
                    |(tool, best)| format!("{tool} {}", table.unit.write(best))
                ),
                ratio.unwrap_or_else(|| "–".to_owned()),
                goals.join("; "),
                met.join("; ")
            );
        }
        out.push('\n');
    }

    fn render_tools(&self, out: &mut String) {
        out.push_str("## Versions, commands and configurations\n\n");
        let mut seen: Vec<(&str, &str, &str)> = Vec::new();
        for tool in self.runs.iter().flat_map(|run| &run.tools) {
            let line = (tool.name.as_str(), tool.version.as_str(), tool.how.as_str());
            if self.samples.iter().any(|sample| sample.tool == tool.name) && !seen.contains(&line) {
                seen.push(line);
            }
        }
        for (name, version, how) in seen {
            let _ = writeln!(out, "- **{name}**: {version}. {how}");
        }
    }

    fn plots(&self) -> Result<Vec<(String, String)>> {
        let latency = Axes {
            title: "A 4 KiB file, from A to B, in an idle tree",
            x: "milliseconds",
            y: "% of changes that were there by then",
        };
        let files = Axes {
            title: "First copy of files of 4 KiB on disk",
            x: "files",
            y: "seconds",
        };
        let size = Axes {
            title: "First copy of one file",
            x: "bytes",
            y: "seconds",
        };
        let memory = Axes {
            title: "Memory of the larger side",
            x: "entries",
            y: "MB",
        };
        let drawn = [
            (
                "latency.svg",
                plot::distribution(latency, &self.values("latency", "create"))?,
            ),
            (
                "files.svg",
                plot::powers(files, &self.medians("first-copy", "disk", "seconds"))?,
            ),
            (
                "size.svg",
                plot::powers(size, &self.medians("big-file", "", "seconds"))?,
            ),
            (
                "memory.svg",
                plot::powers(memory, &self.medians("memory", "", "resident"))?,
            ),
        ];
        Ok(drawn
            .into_iter()
            .filter_map(|(name, text)| Some((name.to_owned(), text?)))
            .collect())
    }

    /// Every value of each tool.
    fn values(&self, row: &str, measure: &str) -> Vec<Series> {
        let series = |tool: &str| {
            let samples = self.samples.iter().filter(|sample| {
                sample.row == row && sample.tool == tool && sample.outcome == Outcome::Right
            });
            let values = samples.flat_map(|sample| sample.values.get(measure)).flatten();
            let figures = Figures::of(values.copied())?;
            Some(Series {
                name: tool.to_owned(),
                points: figures.sorted().iter().map(|value| (*value, 1.0)).collect(),
            })
        };
        tools::all()
            .iter()
            .filter_map(|tool| series(tool.name()))
            .collect()
    }

    /// Each tool's median against the size.
    fn medians(&self, row: &'static str, cases: &'static str, measure: &'static str) -> Vec<Series> {
        let table = Table {
            row,
            title: "",
            cases,
            measure,
            unit: Unit::Seconds,
            goals: &[],
            note: "",
        };
        let cases = self.cases(&table);
        let series = |tool: &str| {
            let points: Vec<(f64, f64)> = cases
                .iter()
                .filter_map(|case| Some((case.size as f64, case.of(tool)?.median())))
                .collect();
            (!points.is_empty()).then(|| Series {
                name: tool.to_owned(),
                points,
            })
        };
        tools::all()
            .iter()
            .filter_map(|tool| series(tool.name()))
            .collect()
    }
}

impl Case<'_> {
    fn of(&self, tool: &str) -> Option<&Figures> {
        let (_, figures, _) = self.tools.iter().find(|(name, _, _)| *name == tool)?;
        figures.as_ref()
    }

    /// The best of those who mirror, and its median.
    fn best(&self) -> Option<(&str, f64)> {
        self.tools
            .iter()
            .filter(|(name, _, _)| *name != US && !LOCAL.contains(name))
            .filter_map(|(name, figures, _)| Some((*name, figures.as_ref()?.median())))
            .min_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// Only of right copies.
fn figures(samples: &[&Sample], measure: &str) -> Option<Figures> {
    let right = samples.iter().filter(|sample| sample.outcome == Outcome::Right);
    Figures::of(
        right
            .flat_map(|sample| sample.values.get(measure))
            .flatten()
            .copied(),
    )
}

fn remarks(samples: &[&Sample]) -> String {
    let remark = |sample: &&Sample| match &sample.outcome {
        Outcome::Right => None,
        Outcome::Wrong(how) => Some(format!("**wrong** in round {}: {how}", sample.round)),
        Outcome::TimedOut(seconds) => Some(format!("not done after {seconds} s in round {}", sample.round)),
        Outcome::Failed(why) => Some(format!("failed in round {}: {why}", sample.round)),
    };
    let remarks: Vec<String> = samples.iter().filter_map(remark).collect();
    remarks.join("; ").replace('|', "\\|").replace('\n', " ")
}

fn render_case(out: &mut String, table: &Table, case: &Case) {
    let unit = table.unit.name();
    let _ = writeln!(out, "{}:\n", case.name);
    let _ = writeln!(
        out,
        "| tool | n | median, {unit} | least – most | 99th percentile | times omirr | |\n| --- | --- | --- | --- | --- | --- | --- |"
    );
    let ours = case.of(US).map(Figures::median);
    for (tool, figures, remark) in &case.tools {
        let _ = match figures {
            Some(figures) => writeln!(
                out,
                "| {tool} | {} | {} | {} – {} | {} | {} | {remark} |",
                figures.count(),
                number(figures.median()),
                number(figures.least()),
                number(figures.most()),
                if figures.count() < 20 {
                    "–".to_owned()
                } else {
                    number(figures.percentile(99.0))
                },
                ours.filter(|ours| *ours > 0.0)
                    .map_or_else(|| "–".to_owned(), |ours| number(figures.median() / ours))
            ),
            None => writeln!(out, "| {tool} | 0 | – | – | – | – | {remark} |"),
        };
    }
    out.push('\n');
    for goal in table.goals {
        if let Some((value, met)) = judge(*goal, case) {
            let met = if met { "met" } else { "missed" };
            let _ = writeln!(out, "- Goal: {}. It is {value}: {met}.", goal.say(table.unit));
        }
    }
    if !table.goals.is_empty() {
        out.push('\n');
    }
}

/// Who belongs to the row, and was not asked to do this case.
fn render_left_out(out: &mut String, table: &Table, case: &Case) {
    let Some(row) = rows::ALL.iter().find(|row| row.name == table.row) else {
        return;
    };
    let measured = |name: &&str| case.tools.iter().any(|(tool, _, _)| tool == name);
    let left_out: Vec<&str> = row.tools.iter().copied().filter(|name| !measured(name)).collect();
    if !left_out.is_empty() {
        let _ = writeln!(out, "Not measured in this case: {}.\n", left_out.join(", "));
    }
}

/// What omirr reaches, and whether that will do; none where it cannot be told.
fn judge(goal: Goal, case: &Case) -> Option<(String, bool)> {
    let ours = case.of(US)?;
    let against = |other: f64, factor: f64| {
        let ratio = ours.median() / other;
        (number(ratio), ratio <= factor)
    };
    Some(match goal {
        Goal::AtMost(most) => (number(ours.median()), ours.median() <= most),
        Goal::Percentile99(most) => {
            let reached = ours.percentile(99.0);
            (number(reached), reached <= most)
        }
        Goal::Times(tool, factor) => against(case.of(tool)?.median(), factor),
        Goal::TimesBest(factor) => against(case.best()?.1, factor),
        Goal::TimesOwn(measure, factor) => {
            let (_, own) = case.own.iter().find(|(name, _)| *name == measure)?;
            against(own.median(), factor)
        }
    })
}

impl Goal {
    fn say(self, unit: Unit) -> String {
        match self {
            Goal::AtMost(most) => format!("at most {}", unit.write(most)),
            Goal::Percentile99(most) => format!("99th percentile at most {}", unit.write(most)),
            Goal::Times(tool, factor) => format!("at most {} of `{tool}`", number(factor)),
            Goal::TimesBest(factor) => format!("at most {} of the best other", number(factor)),
            Goal::TimesOwn(measure, factor) => {
                format!("at most {} of its own “{measure}”", number(factor))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::tests::{run, sample};

    fn lines() -> Vec<Line> {
        let mut lines = vec![Line::Run(run("today"))];
        let latency =
            |tool, measure, values: &[f64]| Line::Sample(sample("today", "latency", tool, measure, values));
        lines.push(latency("rsync", "create", &[100.0, 120.0]));
        lines.push(latency("omirr", "create", &[1.0, 2.0, 6.0]));
        lines
    }

    #[test]
    fn the_readme_has_its_table_in_its_place() {
        let [begin, end] = SHOWN;
        let readme = format!("a\n{begin}old\nolder\n{end}b\n");
        let shown = show(&readme, "| new |").unwrap();
        assert_eq!(shown, format!("a\n{begin}| new |\n{end}b\n"));
        assert_eq!(show(&shown, "| new |"), Some(shown.clone()));
        assert_eq!(show("a\nb\n", "| new |"), None);
    }

    #[test]
    fn a_table_has_median_spread_ratio_and_goals() {
        let lines = lines();
        let text = Results::of(&lines).render(&["latency.svg".to_owned()]);
        assert!(
            text.contains("| omirr | 3 | 2.00 | 1.00 – 6.00 | – | 1.00 |  |"),
            "{text}"
        );
        assert!(
            text.contains("| rsync | 2 | 110 | 100 – 120 | – | 55.0 |  |"),
            "{text}"
        );
        assert!(
            text.contains("- Goal: at most 0.500 ms. It is 2.00: missed."),
            "{text}"
        );
        assert!(
            text.contains("- Goal: at most 0.125 of the best other. It is 0.018: met."),
            "{text}"
        );
        assert!(text.contains("| 2.00 ms | rsync 110 ms | 0.018 |"), "{text}");
        assert!(text.contains("![latency](latency.svg)"), "{text}");
        assert!(!text.contains("## burst"), "{text}");
    }

    #[test]
    fn a_wrong_copy_has_no_figure_and_is_told() {
        let mut wrong = sample("today", "burst", "lsyncd", "after", &[0.1]);
        wrong.outcome = Outcome::Wrong("9 files | less".to_owned());
        let mut late = sample("today", "burst", "unison", "after", &[]);
        late.outcome = Outcome::TimedOut(60);
        let lines = [Line::Run(run("today")), Line::Sample(wrong), Line::Sample(late)];
        let text = Results::of(&lines).render(&[]);
        assert!(
            text.contains("| lsyncd | 0 | – | – | – | – | **wrong** in round 1: 9 files \\| less |"),
            "{text}"
        );
        assert!(
            text.contains("| unison | 0 | – | – | – | – | not done after 60 s in round 1 |"),
            "{text}"
        );
    }

    #[test]
    fn one_machine_s_copies_are_no_competitors() {
        let lines = [("cp", 1.0), ("rsync", 3.0), ("omirr", 2.0)]
            .map(|(tool, seconds)| Line::Sample(sample("today", "first-copy", tool, "seconds", &[seconds])));
        let results = Results::of(&lines);
        let mut table = Table {
            row: "first-copy",
            title: "",
            cases: "",
            measure: "seconds",
            unit: Unit::Seconds,
            goals: &[],
            note: "",
        };
        assert_eq!(results.cases(&table)[0].best(), Some(("rsync", 3.0)));
        let case = &results.cases(&table)[0];
        assert_eq!(
            judge(Goal::Times("cp", 1.3), case),
            Some(("2.00".to_owned(), false))
        );
        assert_eq!(judge(Goal::Times("tar", 1.3), case), None);
        table.cases = "another";
        assert!(results.cases(&table).is_empty());
    }

    #[test]
    fn plots_are_drawn_of_what_there_is() {
        let lines = lines();
        let plots = Results::of(&lines).plots().unwrap();
        let names: Vec<&str> = plots.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["latency.svg"]);
    }
}
