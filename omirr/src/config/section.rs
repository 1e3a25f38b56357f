//! Typed reading of one TOML table: each accessor either gives a value with its
//! line, or notes what is wrong and goes on. Knows no key and no default.

use std::path::PathBuf;

use clap::ValueEnum;
use toml::de::{DeTable, DeValue};

use super::mistake::{Mistakes, listed, nearest};

/// A value and the line that it stands on.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) line: Option<usize>,
}

/// What a key holds.
pub(super) enum Field<T> {
    Absent,
    /// It is there and of no use; that has been noted.
    Wrong,
    Given(At<T>),
}

impl<T> Field<T> {
    /// The value, or the default if there is none. None for a wrong value, so
    /// that no follow-on mistake is made of the default.
    pub(super) fn or_default(self, line: Option<usize>, default: impl FnOnce() -> T) -> Option<At<T>> {
        match self {
            Field::Absent => Some(At {
                value: default(),
                line,
            }),
            Field::Wrong => None,
            Field::Given(at) => Some(at),
        }
    }

    /// The value; that there is none is noted as `text`.
    pub(super) fn or_missing(
        self,
        line: Option<usize>,
        mistakes: &mut Mistakes<'_>,
        text: impl FnOnce() -> String,
    ) -> Option<At<T>> {
        match self {
            Field::Absent => {
                mistakes.missing(line, text());
                None
            }
            Field::Wrong => None,
            Field::Given(at) => Some(at),
        }
    }

    /// Goes on with the value, if there is one.
    fn and_then<U>(self, next: impl FnOnce(At<T>) -> Option<At<U>>) -> Field<U> {
        match self {
            Field::Absent => Field::Absent,
            Field::Wrong => Field::Wrong,
            Field::Given(at) => next(at).map_or(Field::Wrong, Field::Given),
        }
    }
}

/// A table of the file.
pub(super) struct Section<'a> {
    /// As people write it: `[node]`, `[peers.web2]`; empty for the file itself.
    pub(super) label: String,
    pub(super) line: Option<usize>,
    /// None for a section that the file does not have.
    table: Option<&'a DeTable<'a>>,
}

impl<'a> Section<'a> {
    /// The file as a whole.
    pub(super) fn top(table: &'a DeTable<'a>) -> Section<'a> {
        Section {
            label: String::new(),
            line: None,
            table: Some(table),
        }
    }

    /// The table at `key`; an empty one if the file has none.
    pub(super) fn section(&self, key: &str, mistakes: &mut Mistakes<'_>) -> Section<'a> {
        let label = if self.label.is_empty() {
            format!("[{key}]")
        } else {
            self.path_of(key)
        };
        let Some((name, value)) = self.table.and_then(|table| table.get_key_value(key)) else {
            return Section {
                label,
                line: None,
                table: None,
            };
        };
        let line = Some(mistakes.line(&name.span()));
        if let DeValue::Table(table) = value.get_ref() {
            return Section {
                label,
                line,
                table: Some(table),
            };
        }
        mistakes.at(
            line,
            format!(
                "{key} is {}, not a section: write {label}",
                article(value.get_ref())
            ),
        );
        Section {
            label,
            line,
            table: None,
        }
    }

    /// The tables in this one, with their names, in the order of the file.
    pub(super) fn children(&self, mistakes: &mut Mistakes<'_>) -> Vec<(String, Section<'a>)> {
        let child = |name: String| {
            let section = self.section(&name, mistakes);
            (name, section)
        };
        self.keys().into_iter().map(child).collect()
    }

    /// The keys, in the order of the file.
    pub(super) fn keys(&self) -> Vec<String> {
        let Some(table) = self.table else {
            return Vec::new();
        };
        let mut keys: Vec<_> = table
            .keys()
            .map(|key| (key.span().start, key.get_ref().as_ref()))
            .collect();
        keys.sort_unstable();
        keys.into_iter().map(|(_, key)| key.to_owned()).collect()
    }

    /// Notes each key that is not in `known`, with the one that was meant.
    pub(super) fn refuse_unknown(&self, known: &[&str], mistakes: &mut Mistakes<'_>) {
        let Some(table) = self.table else { return };
        for key in table.keys() {
            let name: &str = key.get_ref();
            if known.contains(&name) {
                continue;
            }
            let place = if self.label.is_empty() {
                String::new()
            } else {
                format!(" in {}", self.label)
            };
            let hint = match nearest(name, known.iter().copied()) {
                Some(meant) => format!("did you mean {meant:?}?"),
                None => format!("known are {}", listed(known.iter().copied(), "and")),
            };
            mistakes.at(
                Some(mistakes.line(&key.span())),
                format!("unknown key {name:?}{place}: {hint}"),
            );
        }
    }

    pub(super) fn string(&self, key: &str, mistakes: &mut Mistakes<'_>) -> Field<String> {
        match self.value(key, mistakes) {
            None => Field::Absent,
            Some((DeValue::String(text), line)) => Field::Given(At {
                value: text.clone().into_owned(),
                line: Some(line),
            }),
            Some((other, line)) => {
                let label = self.path(key);
                mistakes.at(
                    Some(line),
                    format!("{label} is {}: it must be a string", article(other)),
                );
                Field::Wrong
            }
        }
    }

    /// An absolute path, without what does not matter in it (`//`, `/./`, a
    /// slash at the end).
    pub(super) fn absolute_path(&self, key: &str, mistakes: &mut Mistakes<'_>) -> Field<PathBuf> {
        self.string(key, mistakes).and_then(|At { value, line }| {
            let why = if value.contains('\0') {
                "has a NUL byte in it"
            } else if !value.starts_with('/') {
                "is not absolute: write the whole path, from / on"
            } else {
                let path = PathBuf::from(value).components().collect();
                return Some(At { value: path, line });
            };
            mistakes.at(line, format!("{} {value:?} {why}", self.path(key)));
            None
        })
    }

    /// One of an enum's words.
    pub(super) fn choice<T: ValueEnum>(&self, key: &str, mistakes: &mut Mistakes<'_>) -> Field<T> {
        self.string(key, mistakes)
            .and_then(|At { value, line }| match T::from_str(&value, false) {
                Ok(choice) => Some(At { value: choice, line }),
                Err(_) => {
                    let words: Vec<_> = T::value_variants()
                        .iter()
                        .filter_map(ValueEnum::to_possible_value)
                        .collect();
                    let valid = listed(words.iter().map(|word| word.get_name()), "or");
                    mistakes.at(
                        line,
                        format!("{} cannot be {value:?}: use {valid}", self.path(key)),
                    );
                    None
                }
            })
    }

    /// A number of bytes: `"8MiB"`, or a plain number.
    pub(super) fn size(&self, key: &str, mistakes: &mut Mistakes<'_>) -> Field<u64> {
        let (text, line) = match self.value(key, mistakes) {
            None => return Field::Absent,
            Some((DeValue::String(text), line)) => (text.clone().into_owned(), line),
            Some((DeValue::Integer(number), line)) if number.radix() == 10 => {
                (number.as_str().to_owned(), line)
            }
            Some((other, line)) => {
                let label = self.path(key);
                let what = article(other);
                mistakes.at(
                    Some(line),
                    format!("{label} is {what}: it must be a size, like \"8MiB\""),
                );
                return Field::Wrong;
            }
        };
        match text.parse::<bytesize::ByteSize>() {
            Ok(size) => Field::Given(At {
                value: size.as_u64(),
                line: Some(line),
            }),
            // The parser's own words name its types; they help nobody here.
            Err(_) => {
                let label = self.path(key);
                mistakes.at(
                    Some(line),
                    format!("{label} {text:?} is not a size: write it like \"8MiB\""),
                );
                Field::Wrong
            }
        }
    }

    /// A list of strings, each with its line. `example` shows what is meant.
    pub(super) fn strings(
        &self,
        key: &str,
        example: &str,
        mistakes: &mut Mistakes<'_>,
    ) -> Field<Vec<At<String>>> {
        let label = self.path(key);
        let (array, line) = match self.value(key, mistakes) {
            None => return Field::Absent,
            Some((DeValue::Array(array), line)) => (array, line),
            Some((other, line)) => {
                let what = article(other);
                mistakes.at(
                    Some(line),
                    format!("{label} is {what}: it must be a list of strings, like {example}"),
                );
                return Field::Wrong;
            }
        };
        let mut strings = Vec::new();
        let mut wrong = false;
        for value in array.iter() {
            let line = Some(mistakes.line(&value.span()));
            match value.get_ref() {
                DeValue::String(text) => strings.push(At {
                    value: text.clone().into_owned(),
                    line,
                }),
                other => {
                    let what = article(other);
                    mistakes.at(line, format!("{label} has {what} in it: it must be strings only"));
                    wrong = true;
                }
            }
        }
        if wrong {
            Field::Wrong
        } else {
            Field::Given(At {
                value: strings,
                line: Some(line),
            })
        }
    }

    /// The key as people name it in a sentence: `[node] listen`.
    pub(super) fn path(&self, key: &str) -> String {
        format!("{} {key}", self.label)
    }

    /// `[peers.web2]`, from `[peers]`.
    fn path_of(&self, key: &str) -> String {
        let parent = self.label.trim_matches(['[', ']']);
        let bare = !key.is_empty()
            && key
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if bare {
            format!("[{parent}.{key}]")
        } else {
            format!("[{parent}.{key:?}]")
        }
    }

    fn value(&self, key: &str, mistakes: &Mistakes<'_>) -> Option<(&'a DeValue<'a>, usize)> {
        let (name, value) = self.table?.get_key_value(key)?;
        Some((value.get_ref(), mistakes.line(&name.span())))
    }
}

/// The type of a value, in a sentence.
fn article(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a section",
    }
}
