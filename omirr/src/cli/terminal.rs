//! What can be shown on a terminal: colour if it is wanted, tables, and text
//! from elsewhere made harmless.

use std::{env, fmt::Write as _, os::unix::ffi::OsStrExt, path::Path};

/// Whether to colour what goes to a stream.
pub(super) fn colours(is_terminal: bool) -> bool {
    let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = env::var_os("TERM").is_some_and(|value| value == "dumb");
    is_terminal && !no_color && !dumb
}

/// Text from a peer, a file name or an error, without what would move the
/// cursor or break a line.
pub(super) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => plain.push(' '),
            c if c.is_control() => {
                // Writing to a string cannot fail.
                let _ = write!(plain, "\\x{:02x}", c as u32);
            }
            c => plain.push(c),
        }
    }
    plain
}

/// A path in one line: bytes that are not UTF-8 or would move the cursor are
/// shown as `\xNN`.
pub(super) fn shown(path: &Path) -> String {
    let mut shown = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            // Writing to a string cannot fail.
            let _ = match c.is_control() {
                true => write!(shown, "\\x{:02x}", c as u32),
                false => write!(shown, "{c}"),
            };
        }
        for byte in chunk.invalid() {
            let _ = write!(shown, "\\x{byte:02x}");
        }
    }
    shown
}

/// What a word means, which decides its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Head,
    Good,
    Busy,
    Bad,
}

/// Colours words, or leaves them alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint {
    pub(super) on: bool,
}

impl Paint {
    pub(super) fn word(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Head => "1",
            Tone::Good => "32",
            Tone::Busy => "33",
            Tone::Bad => "31",
        };
        if self.on {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Rows of cells, of which the columns line up.
#[derive(Debug, Default)]
pub(super) struct Table {
    rows: Vec<Vec<(Tone, String)>>,
}

impl Table {
    /// A table with a line of column names.
    pub(super) fn new(head: &[&str]) -> Table {
        Table {
            rows: vec![head.iter().map(|name| (Tone::Head, (*name).to_owned())).collect()],
        }
    }

    pub(super) fn row(&mut self, cells: Vec<(Tone, String)>) {
        self.rows.push(
            cells
                .into_iter()
                .map(|(tone, text)| (tone, plain(&text)))
                .collect(),
        );
    }

    /// The lines, each indented by `indent` spaces.
    pub(super) fn render(&self, indent: usize, paint: Paint, out: &mut String) {
        let mut widths: Vec<usize> = Vec::new();
        for row in &self.rows {
            widths.resize(widths.len().max(row.len()), 0);
            for (width, (_, text)) in widths.iter_mut().zip(row) {
                *width = (*width).max(text.chars().count());
            }
        }
        for row in &self.rows {
            out.push_str(&" ".repeat(indent));
            for (place, (tone, text)) in row.iter().enumerate() {
                out.push_str(&paint.word(*tone, text));
                if place + 1 < row.len() {
                    // Padded by hand: colour codes have no width.
                    out.push_str(&" ".repeat(widths[place] - text.chars().count() + 2));
                }
            }
            out.push('\n');
        }
    }
}

/// A number for people: `81,234`.
pub(super) fn number(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Bytes for people: `8.0 MiB`.
pub(super) fn bytes(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_elsewhere_cannot_move_the_cursor() {
        assert_eq!(plain("a\x1b[2Jb\nc\u{9b}d"), "a\\x1b[2Jb c\\x9bd");
        assert_eq!(plain("café"), "café");
        let path = Path::new(std::ffi::OsStr::from_bytes(b"/a\n\xc3\xa9\xff"));
        assert_eq!(shown(path), "/a\\x0aé\\xff");
    }

    #[test]
    fn columns_line_up_with_and_without_colour() {
        let mut table = Table::new(&["NAME", "N"]);
        table.row(vec![(Tone::Good, "é".into()), (Tone::Plain, "1".into())]);
        let mut out = String::new();
        table.render(2, Paint { on: false }, &mut out);
        assert_eq!(out, "  NAME  N\n  é     1\n");
        out.clear();
        table.render(0, Paint { on: true }, &mut out);
        assert_eq!(
            out,
            "\x1b[1mNAME\x1b[0m  \x1b[1mN\x1b[0m\n\x1b[32mé\x1b[0m     1\n"
        );
    }

    #[test]
    fn numbers_are_grouped() {
        for (n, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (81234, "81,234"),
            (1234567, "1,234,567"),
        ] {
            assert_eq!(number(n), text);
        }
    }
}
