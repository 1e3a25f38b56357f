//! Forgetting tombstones that nobody needs any more.
//!
//! In: how far each peer is. Out: an index without them. It is the keeper's, and
//! done in portions while that has nothing else to do. Which tombstones may go is
//! the engine's to say (`engine::may_forget`).

use super::keeper::Keeper;
use crate::engine::{Past, Sequence, may_forget, past_all};
use crate::index::Durable;
use crate::model::Mode;

/// Rows that are looked at in one portion.
const PORTION: usize = 4096;

impl Keeper {
    /// Looks at the next rows that all peers have; false if there are none. Not before
    /// the tree was compared: what is found until then is as old as it says, though
    /// deletions that were later are forgotten.
    pub(super) fn sweep(&mut self) -> anyhow::Result<bool> {
        if !self.compared {
            return Ok(false);
        }
        let meta = self.share.index.meta();
        let mut peers = Vec::new();
        let mut digest = blake3::Hasher::new();
        for link in &self.share.links {
            digest.update(&link.key).update(link.mode.name().as_bytes());
            peers.push(match link.mode {
                Mode::Both => {
                    let known = &meta.peers[link.place as usize];
                    let mut marks = link.marks.lock();
                    marks.received(known.replica, known.cursor);
                    Past::Upto(marks.confirmed())
                }
                Mode::Send => Past::Upto(link.marks.lock().acked()),
                Mode::Receive => Past::Own(link.place),
            });
        }
        let mut for_whom = [0; 8];
        digest.finalize_xof().fill(&mut for_whom);
        let for_whom = u64::from_le_bytes(for_whom);
        let from = if meta.swept_for == for_whom { meta.swept } else { 0 };
        let upto = past_all(&peers).min(*self.share.head.borrow());
        if upto <= from {
            return Ok(false);
        }
        let rows = self.share.index.read()?.after(from, PORTION)?;
        let mut swept = upto;
        if rows.len() == PORTION
            && let Some((_, last)) = rows.last()
        {
            swept = last.seq.min(upto);
        }
        let forgettable = rows
            .iter()
            .take_while(|(_, record)| record.seq <= upto)
            .filter(|(_, record)| may_forget(record, &peers));
        self.share.index.write(|w| {
            for (path, _) in forgettable {
                w.forget(path)?;
            }
            let meta = w.meta();
            (meta.swept, meta.swept_for) = (swept, for_whom);
            // A crash before the next durable commit brings them back, and the
            // place from which to look with them.
            Ok(((), Durable::Later))
        })?;
        if let Some(stamp) = self.share.index.meta().forgotten {
            self.author.forgets(stamp);
        }
        Ok(swept < upto)
    }
}
