//! Telling a peer in what a content differs from the one that it has.
//!
//! In: what a receiver says that it has. Out: which leaves differ, and then of
//! these what it lacks. Of the file only those leaves are read; the lists of
//! leaves are the index's. Where one of them is missing, or too much differs, the
//! receiver is told so and asks for the content in another way.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use tokio::sync::mpsc;

use super::share::{Figures, Share};
use crate::apply;
use crate::content::patch::{PATCH_LEAVES_MAX, is_too_much, send_patch};
use crate::content::{ChunkId, Leaves};
use crate::index::IndexError;
use crate::model::{Hash, RelPath};
use crate::wire::{Message, Part};

/// Comparisons that wait for the receiver's blocks: more than a receiver begins
/// at once. A greater number would be a peer's whim, paid with this node's memory.
const OPEN_MAX: usize = 32;

/// Why blocks are not answered that belong to nothing.
pub(super) const NOT_COMPARED: &str = "what these blocks are of was not compared, or too long ago";

/// What a receiver asks for by `Message::Compare`.
pub(super) struct CompareJob {
    pub(super) id: u64,
    pub(super) path: RelPath,
    pub(super) size: u64,
    pub(super) hash: Hash,
    pub(super) base: Hash,
    pub(super) base_size: u64,
    pub(super) leaves: Vec<ChunkId>,
}

/// A content that was compared.
pub(super) struct Compared {
    pub(super) path: RelPath,
    list: Leaves,
    leaves: Vec<u64>,
    base_size: u64,
}

/// Those of one connection that wait for blocks.
#[derive(Default)]
pub(super) struct Comparisons(VecDeque<(u64, Compared)>);

impl Comparisons {
    pub(super) fn add(&mut self, id: u64, compared: Compared) {
        self.0.retain(|(other, _)| *other != id);
        self.0.push_back((id, compared));
        if self.0.len() > OPEN_MAX {
            self.0.pop_front();
        }
    }

    pub(super) fn take(&mut self, id: u64) -> Option<Compared> {
        let place = self.0.iter().position(|(other, _)| *other == id)?;
        self.0.remove(place).map(|(_, compared)| compared)
    }
}

/// Compares what is wanted with what the receiver has; none if that cannot be
/// told, or if it is too much. What cannot be read of the index is as good as not
/// there.
pub(super) fn compare(share: &Share, job: CompareJob) -> Option<Compared> {
    match try_compare(share, job) {
        Ok(compared) => compared,
        Err(error) => {
            tracing::warn!(share = %share.name, "cannot compare a content: {error}");
            None
        }
    }
}

fn try_compare(share: &Share, job: CompareJob) -> Result<Option<Compared>, IndexError> {
    let reader = share.index.read()?;
    let Some(list) = reader
        .leaves_of(&job.hash)?
        .filter(|list| list.size() == job.size)
    else {
        return Ok(None);
    };
    let names = match job.leaves.is_empty() {
        true => match reader.leaves_of(&job.base)? {
            Some(base) if base.size() == job.base_size => base.names(),
            _ => return Ok(None),
        },
        false => job.leaves,
    };
    let leaves = list.differing(&names);
    Ok((leaves.len() <= PATCH_LEAVES_MAX).then_some(Compared {
        path: job.path,
        list,
        leaves,
        base_size: job.base_size,
    }))
}

impl Compared {
    /// What the receiver is told.
    pub(super) fn leaves(&self) -> Vec<u64> {
        self.leaves.clone()
    }

    /// Sends what the receiver lacks beside these blocks, or that it had better ask
    /// for chunks.
    pub(super) fn send(
        &self,
        share: &Share,
        id: u64,
        blocks: &[ChunkId],
        pieces: &mpsc::Sender<Message>,
    ) -> anyhow::Result<()> {
        let file = apply::open_file(&share.root.batch(), &self.path)?;
        if is_too_much(&file, &self.list, &self.leaves, blocks, self.base_size)? {
            pieces.blocking_send(Message::Differs { id, leaves: None })?;
            return Ok(());
        }
        let emit = |parts: Vec<Part>, last| {
            let bytes = parts.iter().map(Part::data_bytes).sum();
            Figures::add(&share.figures.content_sent_bytes, bytes);
            match pieces.blocking_send(Message::Content { id, parts, last }) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_closed) => ControlFlow::Break(()),
            }
        };
        send_patch(&file, &self.list, &self.leaves, blocks, self.base_size, emit)?;
        Ok(())
    }
}
