//! `omirr conflicts`: the copies of versions that lost.
//!
//! In: what a daemon has in its index, or the path of a copy. Out: what there is;
//! or names exchanged or removed in the tree itself, which the daemon sees and
//! replicates as it does any user's change. The index is never written.

mod contents;
mod copy;
mod discard;
mod list;
mod restore;
mod show;

use clap::Subcommand;

#[derive(Clone, Debug, Subcommand)]
pub enum ConflictsCommand {
    List(list::ListArgs),
    Show(show::ShowArgs),
    Restore(restore::RestoreArgs),
    Discard(discard::DiscardArgs),
}

pub fn run(command: &ConflictsCommand) -> anyhow::Result<()> {
    match command {
        ConflictsCommand::List(args) => list::run(args),
        ConflictsCommand::Show(args) => show::run(args),
        ConflictsCommand::Restore(args) => restore::run(args),
        ConflictsCommand::Discard(args) => discard::run(args),
    }
}
