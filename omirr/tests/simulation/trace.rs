//! What happens in a history, line by line: written down only where somebody
//! reads it, since that takes longer than the history itself.

#[derive(Debug, Default)]
pub(crate) struct Trace {
    wanted: bool,
    lines: Vec<String>,
}

impl Trace {
    pub(crate) fn new(wanted: bool) -> Trace {
        Trace {
            wanted,
            lines: Vec::new(),
        }
    }

    /// Adds a line, which is made only if it is wanted.
    pub(crate) fn say(&mut self, line: impl FnOnce() -> String) {
        if self.wanted {
            self.lines.push(line());
        }
    }

    /// Takes the lines of another one, each set in for a node.
    pub(crate) fn take(&mut self, node: usize, other: &mut Trace) {
        let lines = other.lines.drain(..);
        self.lines.extend(lines.map(|line| format!("  n{node} {line}")));
    }

    pub(crate) fn text(&self) -> String {
        self.lines.join("\n")
    }
}
