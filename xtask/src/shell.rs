//! Running other programs, and talking while doing so.
//!
//! Everything that xtask itself says goes to stderr, so that stdout is left to
//! the command that the user asked for. A failure carries the command line that
//! failed. Nothing here goes through a shell.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{env, io, thread};

use anyhow::{Context, Result, bail};

/// One line about what is being done and why.
pub fn say(text: impl AsRef<str>) {
    let text = text.as_ref();
    if colour() {
        eprintln!("\x1b[1;36mxtask:\x1b[0m {text}");
    } else {
        eprintln!("xtask: {text}");
    }
}

/// The last word about an error: its whole chain on one line.
pub fn complain(error: &anyhow::Error) {
    if colour() {
        eprintln!("\x1b[1;31merror:\x1b[0m {error:#}");
    } else {
        eprintln!("error: {error:#}");
    }
}

/// Whether stderr is a terminal that wants colour.
#[must_use]
pub fn colour() -> bool {
    env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && io::stderr().is_terminal()
}

/// The command as a person would type it.
#[must_use]
pub fn describe(command: &Command) -> String {
    let mut line = String::new();
    for word in std::iter::once(command.get_program()).chain(command.get_args()) {
        let word = word.to_string_lossy();
        let plain = !word.is_empty()
            && word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_./:=+,@%^~".contains(c));
        let gap = if line.is_empty() { "" } else { " " };
        if plain {
            let _ = write!(line, "{gap}{word}");
        } else {
            let _ = write!(line, "{gap}'{}'", word.replace('\'', r"'\''"));
        }
    }
    line
}

/// Runs the command with this process's own input and output.
///
/// # Errors
/// The program cannot be started, or says that it failed.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("`{}` cannot be started", describe(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", describe(command));
    }
    Ok(())
}

/// Runs the command quietly and returns what it printed. A line says that it
/// still runs when it takes long.
///
/// # Errors
/// The program cannot be started, or says that it failed; then with what it
/// printed on stderr.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let errors = errors.trim();
        let gap = if errors.is_empty() { "" } else { ": " };
        bail!("`{}` failed ({}){gap}{errors}", describe(command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs the command quietly and returns all about its end.
///
/// # Errors
/// The program cannot be started.
pub fn output(command: &mut Command) -> Result<Output> {
    let line = describe(command);
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("`{line}` cannot be started"))?;
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    let started = Instant::now();
    let ticker = thread::spawn(move || {
        // Wakes at once when the sender is dropped.
        while waiting.recv_timeout(Duration::from_secs(10)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            say(format!(
                "still running after {} s: {line}",
                started.elapsed().as_secs()
            ));
        }
    });
    let output = child.wait_with_output();
    drop(done);
    let _ = ticker.join();
    output.with_context(|| format!("`{}` cannot be waited for", describe(command)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_described_as_it_would_be_typed() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo it's", "", "a=b/c"]);
        assert_eq!(describe(&command), r"sh -c 'echo it'\''s' '' a=b/c");
    }

    #[test]
    fn a_failure_names_the_command_and_repeats_its_words() {
        let error = capture(Command::new("sh").args(["-c", "echo gone >&2; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("sh -c") && error.contains("gone") && error.contains('3'),
            "{error}"
        );
    }
}
