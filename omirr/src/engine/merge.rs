//! Which of two rows of one path stays, and whether the other's content must
//! be kept.
//!
//! The row with the greater stamp stays, whole: entry, vector and stamp. The
//! greatest of a set does not depend on the order in which it is looked
//! through, so all nodes end with the same row.
//!
//! The vector says what was on the disk of the node that made the row, and is
//! never joined with that of a row that lost: a joined vector would claim that
//! the winner's author had known the loser, and the next node that has the
//! loser on disk would overwrite it without keeping it.

use std::cmp::Ordering;

use crate::model::{Entry, RelPath, Relation, Row};

/// What happens to content that loses against a concurrent version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// It is kept beside the winner as a conflict copy.
    #[default]
    KeepBoth,
    /// It goes.
    NewestWins,
}

/// Whether the content on this node's disk must be kept before it is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loser {
    /// The new row's author had it, or nothing is lost.
    Superseded,
    /// The new row's author never had it.
    KeptAside,
}

/// What to do with a row that came from a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing: this node has this row or a winner over it.
    Known,
    /// Take the row into the index; the disk is as it says already.
    Adopt,
    /// Take the row and bring the disk to it.
    Take(Loser),
}

/// The order in which rows of one path win.
pub fn precedence(a: &Row, b: &Row) -> Ordering {
    // Different rows of one path never have the same stamp; should a peer break
    // that, every node must still choose alike.
    a.version
        .stamp
        .cmp(&b.version.stamp)
        .then_with(|| a.version.vector.pairs().cmp(b.version.vector.pairs()))
        .then_with(|| a.deleted.cmp(&b.deleted))
}

/// What to do at `path` with `remote` where the index has `local`.
pub fn remote_row(path: &RelPath, local: Option<&Row>, remote: &Row, policy: Policy) -> Verdict {
    if path.is_root() && !remote.is_live_dir() {
        // The root is a directory on every node; whatever says otherwise is not
        // about this tree.
        return Verdict::Known;
    }
    let Some(local) = local else {
        return if remote.deleted {
            Verdict::Adopt
        } else {
            Verdict::Take(Loser::Superseded)
        };
    };
    if precedence(remote, local) != Ordering::Greater {
        return Verdict::Known;
    }
    match (local.live(), remote.live()) {
        (None, None) => Verdict::Adopt,
        (Some(here), Some(there)) if here == there => Verdict::Adopt,
        (None, Some(_)) => Verdict::Take(Loser::Superseded),
        (Some(here), there) => {
            let concurrent = remote.version.vector.relation(&local.version.vector) != Relation::After;
            let lost = there.is_none_or(|there| !same_content(here, there)) && !here.is_dir();
            if concurrent && lost && policy == Policy::KeepBoth {
                Verdict::Take(Loser::KeptAside)
            } else {
                Verdict::Take(Loser::Superseded)
            }
        }
    }
}

/// Whether both are the same but for their attributes.
pub(super) fn same_content(a: &Entry, b: &Entry) -> bool {
    a.kind == b.kind
}
