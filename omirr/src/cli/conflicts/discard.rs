//! `omirr conflicts discard`: removes conflict copies.
//!
//! In: paths. Out: those are gone, if each of them has a conflict copy's name;
//! else nothing is. Winners are never touched.

use std::{
    io::{self, Write as _},
    path::PathBuf,
};

use anyhow::bail;
use clap::Args;
use rustix::fs::AtFlags;

use super::copy::{Copy, is_dir};

/// Remove conflict copies
///
/// All of them must have conflict copies' names: else nothing is removed. Of a
/// directory that is a conflict copy all that is in it goes as well. It is done
/// in the tree itself, whether the daemon runs or not: that replicates it like
/// any other change.
#[derive(Clone, Debug, Args)]
pub struct DiscardArgs {
    /// The conflict copies
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
}

pub(super) fn run(args: &DiscardArgs) -> anyhow::Result<()> {
    let mut copies = Vec::new();
    let mut wrong = Vec::new();
    for path in &args.paths {
        match Copy::open(path) {
            Ok(copy) => copies.push(copy),
            Err(why) => wrong.push(format!("{why:#}")),
        }
    }
    if !wrong.is_empty() {
        bail!("nothing is removed: {}", wrong.join("; "));
    }
    let mut out = io::stdout().lock();
    let mut failed = Vec::new();
    for copy in &copies {
        match remove(copy) {
            Ok(what) => writeln!(out, "removed {}{what}", copy.shown(&copy.name))?,
            Err(why) => failed.push(format!("cannot remove {}: {why}", copy.shown(&copy.name))),
        }
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}

/// Removes one; says what else went with it.
fn remove(copy: &Copy) -> io::Result<&'static str> {
    if is_dir(&copy.stat) {
        // Follows no link in it, not even one that is put there meanwhile.
        std::fs::remove_dir_all(copy.path_of(&copy.name))?;
        return Ok(" and all that was in it");
    }
    match rustix::fs::unlinkat(copy.dir(), &copy.name, AtFlags::empty()) {
        // Named twice, or gone by itself meanwhile.
        Err(rustix::io::Errno::NOENT) | Ok(()) => Ok(""),
        Err(why) => Err(why.into()),
    }
}
