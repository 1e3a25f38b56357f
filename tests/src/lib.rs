//! What the tests of whole nodes share.
//!
//! - [`binary`]: the omirr under test.
//! - [`coverage`]: the table of what each source sees on each kernel.
//! - [`disk`]: small filesystems, for what goes wrong with disks.
//! - [`ends`]: ending threads even if their test panics.
//! - [`guest`]: booting kernels and running a test's own code inside.
//! - [`net`]: two network namespaces joined by a cable.
//! - [`nodes`]: real nodes on this machine; [`crowd`]: more than two.
//! - [`run`]: other programs that must succeed.
//! - [`skip`]: saying aloud that a test cannot run here.
//! - [`treewalk`]: an independent walk of a tree, and what differs between two.
//! - [`users`]: random users of a tree.
//! - [`ways`]: ways to change a file that the standard library lacks.
//! - [`wires`]: a network of several nodes, as bad as wanted.

pub mod coverage;
pub mod crowd;
pub mod disk;
pub mod ends;
pub mod guest;
pub mod net;
pub mod nodes;
pub mod treewalk;
pub mod users;
pub mod ways;
pub mod wires;

use std::env;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Runs a command that must succeed; returns what it says.
///
/// # Panics
/// It does not succeed.
pub fn run(command: &mut Command) -> String {
    let out = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        out.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The omirr under test: `OMIRR_BIN`, or the one that was built beside the
/// running test.
///
/// # Panics
/// There is none.
#[must_use]
pub fn binary() -> PathBuf {
    let path = env::var_os("OMIRR_BIN").map_or_else(|| beside_this_test("omirr"), PathBuf::from);
    assert!(
        path.exists(),
        "{} does not exist; run `cargo xtask build`",
        path.display()
    );
    path
}

/// A binary in the folder that holds this test's `deps`.
fn beside_this_test(name: &str) -> PathBuf {
    let test = env::current_exe().expect("a running program has a path");
    let folder = test
        .parent()
        .and_then(|deps| deps.parent())
        .expect("tests lie in PROFILE/deps");
    folder.join(name)
}

/// An example of the daemon's package.
///
/// # Panics
/// It was not built.
#[must_use]
pub fn example(name: &str) -> PathBuf {
    let path = beside_this_test("examples").join(name);
    assert!(
        path.exists(),
        "{} does not exist; run `cargo build -p omirr --example {name}`",
        path.display()
    );
    path
}

/// Says that a test does not run here and why; `cargo xtask test` counts these.
/// The test then returns.
pub fn skip(test: &str, reason: &str) {
    eprintln!("skipped {test}: {reason}");
    if let Some(path) = env::var_os("OMIRR_SKIPS") {
        let line = format!("{test}: {}\n", reason.replace('\n', " "));
        let file = OpenOptions::new().append(true).create(true).open(&path);
        // One write, so that tests in parallel do not cut each other's lines.
        if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
            panic!("{} cannot be written: {error}", path.display());
        }
    }
}
