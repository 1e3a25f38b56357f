//! The rows of the table: what is measured, with whom, and what the goal is.
//!
//! In: the bench and a tool. Out: what was found. A row times nothing but what
//! its title says; setting up and judging are outside.

mod big_file;
mod burst;
mod changes;
mod first_copy;
mod kernel_tree;
mod latency;
mod memory;
mod metadata;
mod scale;
mod watch;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;

use crate::bench::{Bench, Scale};
use crate::figures::Unit;
use crate::tools::Tool;

/// Every row, in the order of the report.
pub const ALL: &[&Row] = &[
    &latency::ROW,
    &first_copy::ROW,
    &big_file::ROW,
    &burst::BURST,
    &burst::FLOOD,
    &watch::ROW,
    &changes::ROW,
    &memory::ROW,
    &metadata::ROW,
    &kernel_tree::ROW,
    &scale::ROW,
];

/// Those who take minutes where others take seconds.
pub const SLOW: [&str; 3] = ["unison", "csync2", "syncthing"];

/// One measurement, or several that are made in one go.
pub struct Row {
    pub name: &'static str,
    /// Other rows that it measures by the way.
    pub also: &'static [&'static str],
    /// With whom it makes sense.
    pub tools: &'static [&'static str],
    pub cases: fn(Scale) -> Vec<Case>,
    pub measure: fn(&Bench, &Case, &dyn Tool) -> Result<Vec<Found>>,
    pub tables: &'static [Table],
}

impl Row {
    /// Its own name, and those of the rows that come with it.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.also.iter().copied())
    }
}

/// A row in one size.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub size: u64,
    /// Who is left out of it, since it would take hours.
    pub without: &'static [&'static str],
    /// Whether those of [`SLOW`] get one round only.
    pub heavy: bool,
    /// Whether everyone gets one round only.
    pub once: bool,
}

impl Case {
    pub fn new(name: impl Into<String>, size: u64) -> Case {
        Case {
            name: name.into(),
            size,
            without: &[],
            heavy: false,
            once: false,
        }
    }

    pub fn without(mut self, tools: &'static [&'static str]) -> Case {
        self.without = tools;
        self
    }

    pub fn heavy(mut self) -> Case {
        self.heavy = true;
        self
    }

    pub fn once(mut self) -> Case {
        self.once = true;
        self
    }

    pub fn rounds(&self, tool: &str, rounds: usize) -> usize {
        if self.once || self.heavy && SLOW.contains(&tool) {
            rounds.min(1)
        } else {
            rounds
        }
    }
}

/// What one measurement found.
#[derive(Clone, Debug)]
pub struct Found {
    pub row: &'static str,
    pub values: BTreeMap<String, Vec<f64>>,
    /// What is wrong with the copy.
    pub wrong: Option<String>,
}

impl Found {
    pub fn new(row: &'static str, wrong: Option<String>) -> Found {
        Found {
            row,
            values: BTreeMap::new(),
            wrong,
        }
    }

    pub fn with(mut self, measure: &str, value: f64) -> Found {
        self.values.entry(measure.to_owned()).or_default().push(value);
        self
    }
}

/// How one measure of a row is told.
pub struct Table {
    pub row: &'static str,
    pub title: &'static str,
    /// What the names of its cases begin with.
    pub cases: &'static str,
    pub measure: &'static str,
    pub unit: Unit,
    pub goals: &'static [Goal],
    pub note: &'static str,
}

/// What omirr is meant to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// The median.
    AtMost(f64),
    /// The 99th percentile.
    Percentile99(f64),
    /// So many times that tool's median.
    Times(&'static str, f64),
    /// So many times the best median of the others that mirror.
    TimesBest(f64),
    /// So many times omirr's own median of another measure.
    TimesOwn(&'static str, f64),
}

/// Bytes as a number.
fn bytes(count: u64) -> f64 {
    count as f64
}

const MEGA: f64 = 1e6;

/// How long after the last change a daemon counts as at rest.
const REST: Duration = Duration::from_secs(6);
