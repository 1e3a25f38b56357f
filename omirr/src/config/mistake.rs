//! Mistakes in a configuration: collected, never stopped at, each with its line.

use std::{collections::BTreeSet, fmt, ops::Range, path::PathBuf};

use serde::Serialize;

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mistake {
    /// Where, counted from 1; none if it concerns the file as a whole.
    pub line: Option<usize>,
    /// What is wrong, and the way out.
    pub text: String,
}

/// Everything that is wrong with one configuration file; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConfigErrors {
    pub file: PathBuf,
    /// By line; what concerns the whole file comes first.
    pub mistakes: Vec<Mistake>,
}

impl ConfigErrors {
    /// The mistakes as `FILE:LINE: text`, one string each.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        self.mistakes.iter().map(|mistake| match mistake.line {
            Some(line) => format!("{}:{line}: {}", self.file.display(), mistake.text),
            None => format!("{}: {}", self.file.display(), mistake.text),
        })
    }
}

impl fmt::Display for ConfigErrors {
    /// One mistake a line, so that several do not run together in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, line) in self.lines().enumerate() {
            if number > 0 {
                f.write_str("\n")?;
            }
            f.write_str(&line)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Gathers mistakes while a file is read.
pub(super) struct Mistakes<'s> {
    source: &'s str,
    /// Lines that are not TOML. What the parser made of such a line is a guess,
    /// so nothing further is said about it.
    broken: BTreeSet<usize>,
    found: Vec<Mistake>,
}

impl<'s> Mistakes<'s> {
    pub(super) fn new(source: &'s str) -> Mistakes<'s> {
        Mistakes {
            source,
            broken: BTreeSet::new(),
            found: Vec::new(),
        }
    }

    /// The line on which `span` starts.
    pub(super) fn line(&self, span: &Range<usize>) -> usize {
        let before = &self.source.as_bytes()[..span.start.min(self.source.len())];
        before.iter().filter(|&&byte| byte == b'\n').count() + 1
    }

    /// A line that is not TOML.
    pub(super) fn syntax(&mut self, span: Option<Range<usize>>, text: String) {
        let line = span.map(|span| self.line(&span));
        self.broken.extend(line);
        self.found.push(Mistake { line, text });
    }

    /// A mistake in what a line says.
    pub(super) fn at(&mut self, line: Option<usize>, text: String) {
        if line.is_some_and(|line| self.broken.contains(&line)) {
            return;
        }
        self.found.push(Mistake { line, text });
    }

    /// Something that should be there and is not. Said only of a file that is
    /// all TOML: otherwise it may well be on a broken line.
    pub(super) fn missing(&mut self, line: Option<usize>, text: String) {
        if self.broken.is_empty() {
            self.at(line, text);
        }
    }

    /// All that was found, by line.
    pub(super) fn into_vec(self) -> Vec<Mistake> {
        let mut found = self.found;
        found.sort_by_key(|mistake| mistake.line);
        found.dedup();
        found
    }
}

/// The word of `known` that was most likely meant by `word`.
pub(super) fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    // A typing error touches a letter or two; more is another word.
    let limit = (word.chars().count() / 3).clamp(1, 3);
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, candidate)| candidate)
}

/// `"a", "b" or "c"`, with `word` for `or`.
pub(super) fn listed<'k>(words: impl IntoIterator<Item = &'k str>, word: &str) -> String {
    let quoted: Vec<String> = words.into_iter().map(|word| format!("{word:?}")).collect();
    match quoted.as_slice() {
        [] => "none".to_owned(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} {word} {last}", most.join(", ")),
    }
}
