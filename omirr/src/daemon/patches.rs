//! Getting a content of which most is here already.
//!
//! In: a row whose content is to be fetched, and the file at its path. Out: the
//! new content, ready for its name, of which only what differs was asked for and
//! nothing but that was read here; or nothing, where that is not to be had, and
//! then the content is asked for in the ordinary way. Where the filesystem shares
//! blocks it is a file of its own, else a record of what is to be written over
//! the file (`apply::stage_patch`). Nothing is written in the tree here.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::bail;
use tokio::sync::mpsc;

use super::dirty::Hint;
use super::receiver::Piece;
use super::share::{Figures, Share};
use crate::apply::{self, Ready, RedoHead, RedoWriter, Staged};
use crate::content::leaves::LEAVES_MIN_BYTES;
use crate::content::patch::{Edit, Patcher, block_names};
use crate::content::{self, Leaves};
use crate::model::{Entry, Hash, RelPath, StatSig};
use crate::observe::{is_racy, sig_of, statx_fd};
use crate::wire::{Message, Part};

/// What is here of a content.
struct Base {
    file: File,
    /// As `stat` said it before anything was read.
    sig: StatSig,
    hash: Hash,
    leaves: Leaves,
}

/// Where what differs goes.
enum Draft {
    /// A file that shares all else with the old one.
    Shared(Staged),
    Noted(Box<RedoWriter>),
}

/// Asks for what differs from the file at `path`. None if the content must be
/// asked for in another way; nothing more is to come for `id` then.
pub(super) fn fetch(
    share: &Share,
    id: u64,
    path: &RelPath,
    entry: &Entry,
    asked: &mpsc::UnboundedSender<Message>,
    incoming: &mut mpsc::Receiver<Piece>,
) -> anyhow::Result<Option<Ready>> {
    let Some((size, hash)) = entry.content().filter(|(size, _)| *size >= LEAVES_MIN_BYTES) else {
        return Ok(None);
    };
    let Some(base) = base_of(share, path, &hash)? else {
        return Ok(None);
    };
    let compare = |leaves| Message::Compare {
        id,
        path: path.clone(),
        size,
        hash,
        base: base.hash,
        base_size: base.leaves.size(),
        leaves,
    };
    asked.send(compare(Vec::new()))?;
    let mut differing = answer(incoming)?;
    if differing.is_none() {
        // The peer has forgotten what this node has, or never knew it.
        asked.send(compare(base.leaves.names()))?;
        differing = answer(incoming)?;
    }
    let Some(differing) = differing else {
        return Ok(None);
    };
    if differing
        .last()
        .is_some_and(|&leaf| Leaves::place(leaf, size).is_empty())
    {
        bail!("'{path}' is said to differ where it has nothing");
    }
    let Some(blocks) = block_names(&base.file, &base.leaves, &differing)? else {
        // It is not what the index says.
        let hint = Hint {
            content: true,
            read: true,
            ..Hint::default()
        };
        share.touch([(path.clone(), hint)]);
        return Ok(None);
    };
    asked.send(Message::Blocks { id, blocks })?;
    receive(share, path, entry, base, differing, incoming)
}

/// The file at `path`, if it has a large content, of which the index knows what
/// it is.
fn base_of(share: &Share, path: &RelPath, wanted: &Hash) -> anyhow::Result<Option<Base>> {
    let reader = share.index.read()?;
    let Some(record) = reader.get(path)? else {
        return Ok(None);
    };
    let content = record.row.live().and_then(Entry::content);
    let (Some((size, hash)), Some(known)) = (content, record.sig) else {
        return Ok(None);
    };
    if size < LEAVES_MIN_BYTES || hash == *wanted {
        return Ok(None);
    }
    let Ok(file) = apply::open_file(&share.root.batch(), path) else {
        return Ok(None);
    };
    let sig = sig_of(&statx_fd(file.as_fd())?);
    // Stores through a mapping leave no trace for a while.
    if !known.same_content(&sig) || share.trust.lock().is_mapped(sig.ino) {
        return Ok(None);
    }
    let listed = match known.racy {
        true => None,
        false => reader.leaves_of(&hash)?,
    };
    drop(reader);
    let leaves = match listed {
        Some(leaves) => leaves,
        None => {
            let hashed = content::hash_while(file.as_fd(), |_| Ok(true))?;
            let still = sig_of(&statx_fd(file.as_fd())?).same_as(&sig);
            match hashed.leaves {
                Some(leaves) if still && hashed.hash == hash && !is_racy(&[sig.mtime]) => leaves,
                _ => return Ok(None),
            }
        }
    };
    Ok(Some(Base {
        file,
        sig,
        hash,
        leaves,
    }))
}

/// Which leaves differ, if the peer can tell.
fn answer(incoming: &mut mpsc::Receiver<Piece>) -> anyhow::Result<Option<Vec<u64>>> {
    match incoming.blocking_recv() {
        Some(Piece::Differs(leaves)) => Ok(leaves),
        Some(Piece::Gone(reason)) => bail!("{reason}"),
        Some(Piece::Parts { .. }) => bail!("content came before it was told what differs"),
        None => bail!("the connection has ended"),
    }
}

/// Takes what differs, and makes the content ready.
fn receive(
    share: &Share,
    path: &RelPath,
    entry: &Entry,
    base: Base,
    differing: Vec<u64>,
    incoming: &mut mpsc::Receiver<Piece>,
) -> anyhow::Result<Option<Ready>> {
    let Some((size, hash)) = entry.content() else {
        bail!("'{path}' has no content to be fetched");
    };
    let dirs = share.root.batch();
    let mut draft = match apply::reflink(&dirs, path, &base.sig, entry)? {
        Some(staged) => Draft::Shared(staged),
        None => Draft::Noted(Box::new(share.redos.begin(RedoHead {
            path: path.clone(),
            ino: base.sig.ino,
            btime: base.sig.btime,
            old_size: base.leaves.size(),
            old_hash: base.hash,
            size,
            hash,
        })?)),
    };
    let mut patcher = Patcher::new(&base.file, base.leaves, differing, size, hash)?;
    loop {
        let (parts, last, _held) = match incoming.blocking_recv() {
            Some(Piece::Parts { parts, last, held }) => (parts, last, held),
            Some(Piece::Gone(reason)) => bail!("{reason}"),
            // Too much, now that the blocks are known.
            Some(Piece::Differs(None)) => return Ok(None),
            Some(Piece::Differs(Some(_))) => bail!("it was told already what differs"),
            None => bail!("the connection has ended"),
        };
        let bytes = parts.iter().map(Part::data_bytes).sum();
        Figures::add(&share.figures.content_received_bytes, bytes);
        patcher.take(&parts, &mut |edit| draft.edit(edit))?;
        if last {
            break;
        }
    }
    let leaves = patcher.finish()?;
    // Nobody is alone with a file that is open twice.
    drop(base.file);
    Ok(Some(match draft {
        Draft::Shared(mut staged) => {
            staged.resize(size, Some(leaves));
            staged.finish(entry)?
        }
        Draft::Noted(writer) => apply::stage_patch(&dirs, writer.seal()?, base.sig, entry, leaves)?,
    }))
}

impl Draft {
    fn edit(&mut self, edit: Edit<'_>) -> std::io::Result<()> {
        match self {
            Draft::Shared(staged) => match edit.bytes {
                Some(bytes) => staged.write_at(edit.at, bytes),
                None => staged.zero_at(edit.at, edit.len),
            }
            .map_err(std::io::Error::other),
            Draft::Noted(writer) => writer.edit(edit),
        }
    }
}
