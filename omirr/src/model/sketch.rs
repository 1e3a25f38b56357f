//! What is alike in contents, in a few numbers.

use serde::{Deserialize, Serialize};

/// A few numbers out of a large content, such that two contents which have much
/// in common most likely have some of these in common, too
/// (`content/sketch.rs`). A hint: nothing but time depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sketch(Box<[u64]>);

impl Sketch {
    /// More values would tell smaller likenesses.
    pub const VALUES_MAX: usize = 8;

    /// The least of these values, each once.
    pub fn of_least(mut values: Vec<u64>) -> Sketch {
        values.sort_unstable();
        values.dedup();
        values.truncate(Sketch::VALUES_MAX);
        Sketch(values.into_boxed_slice())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn values(&self) -> &[u64] {
        &self.0
    }

    /// How many values both have.
    pub fn in_common(&self, other: &Sketch) -> usize {
        self.0.iter().filter(|value| other.0.contains(value)).count()
    }
}
