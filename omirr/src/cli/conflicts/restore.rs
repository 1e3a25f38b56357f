//! `omirr conflicts restore`: a copy takes the winner's name again.
//!
//! In: the path of a copy. Out: one rename in the tree, which exchanges the two
//! names unless it is told otherwise, so that nothing is lost.

use std::{
    ffi::OsStr,
    io::{self, Write as _},
    path::PathBuf,
};

use anyhow::bail;
use clap::Args;
use rustix::{
    fs::{RenameFlags, Stat},
    io::Errno,
};

use super::copy::{Copy, OriginalArgs, is_dir, kind, same_inode};

/// Give a conflict copy the name back that it had before
///
/// The two versions exchange their names in one step: what the copy has is again
/// what the original name has, and what was there is kept under the copy's name.
/// So nothing is lost, the same command again undoes it, and `omirr conflicts
/// discard` ends it. (The copy's name then goes on naming the node and the time
/// of the version that it had at first.) With --replace the copy takes the name
/// and what was there is gone. Where nothing has the name any more, the copy just
/// takes it.
///
/// It is done in the tree itself, whether the daemon runs or not: that replicates
/// it like any other change. Refused where the other version is of another kind,
/// a directory instead of a file, say.
#[derive(Clone, Debug, Args)]
pub struct RestoreArgs {
    /// The conflict copy
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Let the version go that has the name now, instead of keeping it under the
    /// copy's
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    original: OriginalArgs,
}

pub(super) fn run(args: &RestoreArgs) -> anyhow::Result<()> {
    let mut copy = Copy::open(&args.path)?;
    let original = copy.original(&args.original)?;
    let winner = copy.stat(&original)?;
    if let Some(winner) = &winner {
        check(&copy, &original, winner)?;
    }
    let way = match (&winner, args.replace) {
        (None, _) => RenameFlags::NOREPLACE,
        (Some(_), false) => RenameFlags::EXCHANGE,
        (Some(_), true) => RenameFlags::empty(),
    };
    if let Err(why) = rustix::fs::renameat_with(copy.dir(), &copy.name, copy.dir(), &original, way) {
        bail!(cannot(&copy, &original, way, why));
    }
    let (name, kept) = (copy.shown(&original), copy.shown(&copy.name));
    let said = match (&winner, args.replace) {
        (None, _) => format!("{name} is there again, and the copy of that name is gone\n"),
        (Some(_), true) => format!("{name} is restored, and the version that was there is gone\n"),
        (Some(_), false) => format!(
            "{name} is restored; the version that was there is now {kept}: \
             `omirr conflicts discard` removes it, the same command again undoes this\n"
        ),
    };
    Ok(io::stdout().lock().write_all(said.as_bytes())?)
}

/// Whether the two may change places; nothing has been done if not.
fn check(copy: &Copy, original: &OsStr, winner: &Stat) -> anyhow::Result<()> {
    let (name, kept) = (copy.shown(original), copy.shown(&copy.name));
    let (is, was) = (kind(winner), kind(&copy.stat));
    if is != was {
        bail!("{name} is a {is} and the copy is a {was}: move {name} away first, then restore again");
    }
    if same_inode(winner, &copy.stat) && !is_dir(winner) {
        bail!(
            "{name} and {kept} are two names of one {is}: there is nothing to restore; \
             `omirr conflicts discard` removes the second name"
        );
    }
    Ok(())
}

/// Why the rename failed, and what to do.
fn cannot(copy: &Copy, original: &OsStr, way: RenameFlags, why: Errno) -> String {
    let (name, kept) = (copy.shown(original), copy.shown(&copy.name));
    let advice = match why {
        Errno::NOTEMPTY | Errno::EXIST if way.is_empty() => {
            "it is a directory that is not empty: without --replace the two exchange their names"
        }
        Errno::EXIST => "something has taken the name meanwhile: try again",
        Errno::NOENT => "one of the two has gone meanwhile: try again",
        Errno::INVAL if way == RenameFlags::EXCHANGE => {
            "this filesystem cannot exchange two names; with --replace the other version goes"
        }
        Errno::XDEV | Errno::BUSY => "one of the two is a mount point: unmount it first",
        _ => return format!("cannot give {kept} the name {name}: {}", io::Error::from(why)),
    };
    format!("cannot give {kept} the name {name}: {advice}")
}
