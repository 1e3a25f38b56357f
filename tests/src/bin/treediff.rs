//! `treediff A B`: whether two trees are the same in everything that a mirror
//! keeps. Exits with 0 if so, with 1 and the differences on stdout if not, with
//! 2 if one could not be walked.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use omirr_tests::treewalk;

/// Compares two trees in kind, content, mode, owner, time, extended attributes
/// and hard links.
#[derive(Parser)]
struct Options {
    first: PathBuf,
    second: PathBuf,
    /// Leaves out the modification times of the two root directories.
    #[arg(long)]
    ignore_root_times: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match compare(&options) {
        Ok((paths, differences)) if differences.is_empty() => {
            println!("the same: {paths} paths");
            ExitCode::SUCCESS
        }
        Ok((_, differences)) => {
            for difference in differences {
                println!("{difference}");
            }
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("treediff: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn compare(options: &Options) -> anyhow::Result<(usize, Vec<String>)> {
    let walk =
        |root: &Path| treewalk::walk(root).with_context(|| format!("cannot walk '{}'", root.display()));
    let (first, mut second) = (walk(&options.first)?, walk(&options.second)?);
    if options.ignore_root_times
        && let (Some(a), Some(b)) = (first.get(Path::new("")), second.get_mut(Path::new("")))
    {
        b.mtime_ns = a.mtime_ns;
    }
    Ok((first.len(), treewalk::diff(&first, &second)))
}
