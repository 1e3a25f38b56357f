//! A node: a disk, an index, and the loop that a keeper runs, with the real
//! engine making every decision.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::Arc;

use omirr::engine::{
    Arrived, Author, Context, Decided, Expansion, Found, Install, Marks, Name, Observed, Opening, Outgoing,
    Past, Policy, Progress, Reserve, Rows, Seen, Step, Work, decide_local, decide_remote, expand,
    goes_inline, incoherent, link_group, observe_also, plan, plan_one_by_one, recover, relink, whole_moves,
};
use omirr::model::{
    Entry, Hash, LinkGroup, Origin, Record, RelPath, ReplicaId, Row, StatSig, Time, TreeMove,
};

use crate::applier::Applier;
use crate::disk::Disk;
use crate::index::{Index, Intent};
use crate::random::Rng;
use crate::trace::Trace;

/// Content up to this size goes with its row.
const INLINE: u64 = 1000;

/// What comes between two steps: users, or a crash.
pub(crate) type Between<'a> = &'a mut dyn FnMut(&mut Disk) -> Event;

pub(crate) enum Event {
    Nothing,
    /// A user changed these paths; the tracer may have seen it.
    Changed(Vec<RelPath>),
    Crash,
}

#[derive(Debug)]
pub(crate) struct Crashed;

/// What was found at a path, when it was looked at.
struct Look {
    seen: Seen,
    ino: Option<u64>,
    sig: Option<StatSig>,
    came_from: Option<RelPath>,
    changed_at: Option<u64>,
}

/// Index, disk and messages when rows were tried, as numbers that any change
/// raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment {
    head: u64,
    disk: u64,
    news: u64,
}

/// A row as it travels.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) seq: u64,
    pub(crate) path: RelPath,
    pub(crate) row: Row,
    pub(crate) moved_from: Option<RelPath>,
    pub(crate) moved_tree: Option<TreeMove>,
    pub(crate) inline: bool,
    /// It could not be applied when it was tried.
    pub(crate) tried: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Want {
    pub(crate) path: RelPath,
    pub(crate) hash: Hash,
}

pub(crate) struct Node {
    pub(crate) replica: ReplicaId,
    pub(crate) disk: Disk,
    pub(crate) index: Index,
    /// What a crash leaves of `index`.
    pub(crate) durable: Index,
    pub(crate) author: Author,
    pub(crate) policy: Policy,
    /// Rows are sent before they are durable.
    pub(crate) hasty: bool,
    pub(crate) rng: Rng,
    /// Paths to look at.
    pub(crate) dirty: BTreeSet<RelPath>,
    /// Changes of long ago are being looked for: their own times count.
    pub(crate) scanning: bool,
    /// Rows received and not yet in the index, by peer and path.
    pub(crate) pending: BTreeMap<(u32, RelPath), Sent>,
    /// Per peer: up to where its rows have been received.
    pub(crate) received: BTreeMap<u32, u64>,
    pub(crate) fetched: HashSet<Hash>,
    /// Per peer: how often it has said something, and what all was when its rows
    /// were last tried. Trying them again then would do the same again.
    news: BTreeMap<u32, u64>,
    tried_at: BTreeMap<u32, Moment>,
    pub(crate) wants: Vec<(u32, Want)>,
    /// Per peer: rows that came after the first of them, a move, and wait for it.
    pub(crate) behind: BTreeMap<u32, VecDeque<Sent>>,
    /// Per peer: up to where its rows had been received before those.
    before: BTreeMap<u32, u64>,
    /// Peers that were asked to begin again: what comes until they do is nothing.
    pub(crate) deaf: BTreeSet<u32>,
    /// Peers to ask, after which number to begin, and up to which without moves.
    pub(crate) plains: Vec<(u32, u64, u64)>,
    /// Directories that this node has renamed for a peer. Events that tell of the
    /// old place may still be on their way.
    renamed: Vec<(RelPath, RelPath)>,
    /// Per peer: how far it is past this node's tombstones.
    pub(crate) marks: BTreeMap<u32, Marks>,
    /// The index is not the file that was last used.
    pub(crate) copied: bool,
    /// The index was put back in its own file, and has not noticed.
    pub(crate) set_back: bool,
    /// How many indexes this node has had.
    pub(crate) lives: u64,
    /// What the index was when this run began.
    pub(crate) opening: Opening,
    /// What is found without a row is dated by its content.
    pub(crate) first_contact: bool,
    pub(crate) log: Trace,
}

impl Node {
    pub(crate) fn new(id: u64, disk: Disk, policy: Policy, hasty: bool, seed: u64, traced: bool) -> Node {
        let replica = ReplicaId(id + 1);
        Node {
            replica,
            disk,
            index: Index::default(),
            durable: Index::default(),
            author: Author::new(replica, 0, None, None),
            policy,
            hasty,
            rng: Rng::new(seed),
            dirty: BTreeSet::new(),
            scanning: false,
            pending: BTreeMap::new(),
            received: BTreeMap::new(),
            fetched: HashSet::new(),
            news: BTreeMap::new(),
            tried_at: BTreeMap::new(),
            wants: Vec::new(),
            behind: BTreeMap::new(),
            before: BTreeMap::new(),
            deaf: BTreeSet::new(),
            plains: Vec::new(),
            renamed: Vec::new(),
            marks: BTreeMap::new(),
            copied: false,
            set_back: false,
            lives: 1,
            opening: Opening::of(replica, 0, Vec::new(), 0),
            first_contact: false,
            log: Trace::new(traced),
        }
    }

    /// Comes up after a clean stop or a crash, and compares all of the tree
    /// with the index. `now_ms` is by a clock that is right: numbers of rows begin
    /// there, and a clock that is put back as well would hide that an index was.
    pub(crate) fn start(&mut self, clean: bool, now_ms: u64) {
        self.index = self.durable.clone();
        self.first_contact = self.index.head() == 0 || self.copied;
        if std::mem::take(&mut self.copied) {
            self.doubt();
        }
        let gaps = std::mem::take(&mut self.index.gaps);
        self.opening = Opening::of(self.replica, self.index.head(), gaps, now_ms);
        self.index.gaps.clone_from(&self.opening.gaps);
        // Only what is sent before it is durable can be lost by a crash.
        let reserve = (!clean && self.hasty).then_some(self.index.reserve);
        self.author = self.author_after(self.opening.began_at, reserve);
        self.marks.clear();
        self.dirty.clear();
        self.pending.clear();
        self.received.clear();
        self.fetched.clear();
        self.tried_at.clear();
        self.wants.clear();
        self.behind.clear();
        self.deaf.clear();
        self.plains.clear();
        self.renamed.clear();
        self.recover_intents();
        self.rescan();
        self.local_pass(&mut |_| Event::Nothing).expect("nothing crashes");
        self.first_contact = false;
        if let Some(stamp) = self.index.forgotten {
            self.author.forgets(stamp);
        }
        self.commit();
    }

    /// Goes on where the index ends, or after the number `at_least`.
    pub(crate) fn author_after(&self, at_least: u64, reserve: Option<Reserve>) -> Author {
        let head = self.index.head().max(at_least);
        let mut author = Author::new(self.replica, head, self.index.last_stamp(), reserve);
        if let Some(stamp) = self.index.forgotten.filter(|_| !self.first_contact) {
            author.forgets(stamp);
        }
        author
    }

    fn recover_intents(&mut self) {
        let intents = std::mem::take(&mut self.index.intents);
        let found = intents.iter().map(|(path, intent)| {
            let base = self.index.get(path).map(|record| &record.row);
            let seen = self.disk.entry(path).cloned().map_or(Seen::Absent, Seen::Present);
            (path.clone(), recover(base, &intent.row, &seen))
        });
        let found: BTreeMap<RelPath, Found> = found.collect();
        // Content that has its second name and still its first: the second goes
        // and is given again when the row comes again. Otherwise the two would
        // pass for hard links.
        let untouched = found.iter().filter(|(_, found)| **found == Found::Untouched);
        let kept: BTreeSet<u64> = untouched.filter_map(|(path, _)| self.disk.ino(path)).collect();
        // Deepest first, so that directories get their times last.
        for (path, found) in found.into_iter().rev() {
            self.log.say(|| format!("intent at {path}: {found:?}"));
            let Some(intent) = intents.get(&path) else {
                continue;
            };
            let base = self.index.get(&path).map(|record| record.row.clone());
            match found {
                Found::Changed => {}
                Found::Untouched => {
                    if let Some(base) = base.filter(Row::is_live_dir) {
                        self.disk.set(&path, &base.entry).expect("it is there");
                    }
                }
                Found::Done
                    if base.as_ref().and_then(Row::live).is_none()
                        && self.disk.ino(&path).is_some_and(|ino| kept.contains(&ino)) =>
                {
                    self.disk.remove(&path).expect("it is a file");
                }
                Found::Done | Found::Halfway => {
                    if !intent.row.deleted {
                        self.disk.set(&path, &intent.row.entry).expect("it is there");
                    }
                    if base.as_ref() != Some(&intent.row) {
                        let seq = self.author.next_seq();
                        self.put(&path, seq, intent.row.clone(), intent.via, None);
                    }
                }
            }
        }
        self.relink(
            intents
                .values()
                .filter_map(|intent| intent.row.live()?.link)
                .collect(),
        );
    }

    /// Everything is to be looked at: events may have been lost.
    pub(crate) fn rescan(&mut self) {
        self.scanning = true;
        self.dirty.extend(self.disk.names.keys().cloned());
        let live = self
            .index
            .records
            .iter()
            .filter(|(_, record)| !record.row.deleted);
        self.dirty.extend(live.map(|(path, _)| path.clone()));
    }

    /// Makes everything so far survive a crash.
    pub(crate) fn commit(&mut self) {
        self.index.reserve = self.author.reserve(self.disk.clock.millis());
        self.durable = self.index.clone();
    }

    /// Forgets the tombstones that all of `peers` are past.
    pub(crate) fn sweep(&mut self, peers: &[u32]) {
        let past = peers.iter().map(|peer| {
            let marks = self.marks.entry(*peer).or_default();
            if let Some((replica, cursor)) = self.durable.cursors.get(peer) {
                marks.received(*replica, *cursor);
            }
            Past::Upto(marks.confirmed())
        });
        let past: Vec<Past> = past.collect();
        for path in self.index.sweep(&past) {
            self.log.say(|| format!("forgets {path}"));
        }
        if let Some(stamp) = self.index.forgotten {
            self.author.forgets(stamp);
        }
        // What is forgotten is not sent any more, as the daemon's senders read it:
        // it would be taken for known here.
        self.commit();
    }

    /// What was changed on this node's disk gets rows; users go on meanwhile.
    pub(crate) fn local_pass(&mut self, between: Between<'_>) -> Result<(), Crashed> {
        let now_ms = self.disk.clock.millis();
        let scanning = std::mem::take(&mut self.scanning);
        let mut found = self.look(between)?;
        if found.is_empty() {
            self.reserve();
            return Ok(());
        }
        let seen = found
            .iter()
            .map(|(path, look)| (path, Some(&look.seen)))
            .collect();
        for path in sure(incoherent(&self.index, &seen)) {
            self.log.say(|| format!("incoherent: {path}"));
            found.remove(&path);
            self.dirty.insert(path);
        }
        self.link(&mut found);
        // Another one each time, so that a row which does not travel with the
        // one that made it shows.
        let origin = Origin::new(now_ms as u32, Some(self.replica.0 as u32), b"user", "");
        let observed: Vec<Observed> = found
            .iter()
            .map(|(path, look)| Observed {
                path: path.clone(),
                seen: look.seen.clone(),
                when_ms: if scanning { look.changed_at } else { None },
                moved_from: look.came_from.clone(),
                origin: Some(Arc::new(origin.clone())),
            })
            .collect();
        let decided = sure(decide_local(&self.index, observed, &mut self.author, now_ms));
        self.index.note_moves(whole_moves(&decided, &|_| true));
        for one in decided {
            self.log.say(|| {
                format!(
                    "own {:?} {:?}",
                    shown(&one.path, &one.row),
                    one.moved_tree.as_ref().map(|tree| tree.count)
                )
            });
            self.put(&one.path, one.seq, one.row, None, one.moved_from);
        }
        for (path, look) in &found {
            self.index.set_sig(path, look.sig);
        }
        self.reserve();
        Ok(())
    }

    /// What is at the dirty paths and those that must be seen with them.
    fn look(&mut self, between: Between<'_>) -> Result<BTreeMap<RelPath, Look>, Crashed> {
        let mut todo = std::mem::take(&mut self.dirty);
        let mut found: BTreeMap<RelPath, Look> = BTreeMap::new();
        for (from, to) in &self.renamed {
            let beneath: Vec<RelPath> = todo.iter().filter_map(|path| path.rebase(from, to)).collect();
            todo.extend(beneath);
        }
        while let Some(path) = todo.pop_first() {
            if found.contains_key(&path) {
                continue;
            }
            match between(&mut self.disk) {
                Event::Nothing => {}
                // The pass that is under way need not see it.
                Event::Changed(paths) => self.dirty.extend(paths),
                Event::Crash => return Err(Crashed),
            }
            let seen = match self.disk.entry(&path) {
                Some(entry) => Seen::Present(entry.clone()),
                None => Seen::Absent,
            };
            let ino = self.disk.ino(&path);
            todo.extend(sure(observe_also(&self.index, &path, &seen)));
            let record = self.index.get(&path);
            if self.disk.is_dir(&path) && !record.is_some_and(|record| record.row.is_live_dir()) {
                todo.extend(self.disk.beneath(&path));
            }
            let came_from = self.came_from(&path);
            if let Some(from) = came_from.as_ref().filter(|_| self.disk.is_dir(&path)) {
                // All that was in it is looked for at both places.
                sure(self.index.live_beneath(from, &mut |at| {
                    todo.extend(at.rebase(from, &path));
                    ControlFlow::Continue(())
                }));
                todo.insert(from.clone());
            }
            let several = ino.is_some_and(|ino| self.disk.has_several_names(ino));
            if let Some(ino) = ino.filter(|_| several) {
                let group = record.and_then(|record| record.row.live()?.link);
                todo.extend(group.into_iter().flat_map(|group| sure(self.index.linked(group))));
                todo.extend(self.index.paths_of_ino(ino));
            }
            let look = Look {
                ino,
                sig: self.sig(&path),
                came_from,
                changed_at: self.changed_at(&path),
                seen,
            };
            found.insert(path, look);
        }
        Ok(found)
    }

    /// Gives the files that were found their hard-link groups.
    fn link(&mut self, found: &mut BTreeMap<RelPath, Look>) {
        let mut inodes: BTreeMap<u64, Vec<RelPath>> = BTreeMap::new();
        for (path, look) in &*found {
            if let Some(ino) = look.ino {
                inodes.entry(ino).or_default().push(path.clone());
            }
        }
        for (ino, paths) in inodes {
            let group = self.group_of(ino, &paths, found);
            for path in paths {
                if let Some(Look {
                    seen: Seen::Present(entry),
                    ..
                }) = found.get_mut(&path)
                {
                    entry.link = group;
                }
            }
        }
    }

    fn group_of(
        &mut self,
        ino: u64,
        paths: &[RelPath],
        found: &BTreeMap<RelPath, Look>,
    ) -> Option<LinkGroup> {
        let index = &self.index;
        let names: Vec<Name<'_>> = paths
            .iter()
            .map(|path| Name {
                record: index.get(path),
                moved: found[path].came_from.as_ref().and_then(|from| index.get(from)),
            })
            .collect();
        let Seen::Present(entry) = &found[&paths[0]].seen else {
            return None;
        };
        let mut strangers = |group| {
            let members = sure(index.linked(group));
            let sigs = members.iter().filter_map(|path| index.get(path)?.sig);
            sigs.into_iter().any(|sig| sig.ino != ino)
        };
        let rng = &mut self.rng;
        link_group(ino, entry, &names, &mut strangers, &mut || LinkGroup(rng.next()))
    }

    /// Where the inode at `path` was, if it is not there any more.
    fn came_from(&self, path: &RelPath) -> Option<RelPath> {
        let ino = self.disk.ino(path)?;
        let is = |record: &Record| record.sig.is_some_and(|sig| sig.ino == ino);
        if self.index.get(path).is_some_and(is) {
            return None;
        }
        let mut from = self
            .index
            .records
            .iter()
            .filter(|(at, record)| is(record) && self.disk.ino(at) != Some(ino));
        from.next().map(|(at, _)| at.clone())
    }

    fn changed_at(&self, path: &RelPath) -> Option<u64> {
        if let Some(entry) = self.disk.entry(path)
            && self.first_contact
            && self.index.get(path).is_none()
        {
            let changed = self.disk.ctime_ms(path);
            return changed.map(|changed| changed.min(entry.mtime.millis()));
        }
        let parent = path.parent().and_then(|dir| self.disk.ctime_ms(&dir));
        self.disk.ctime_ms(path).or(parent)
    }

    /// The next rows for a peer.
    pub(crate) fn next_batch(&mut self, outgoing: &mut Outgoing, limit: usize) -> Option<(u64, Vec<Sent>)> {
        let index = if self.hasty { &self.index } else { &self.durable };
        let batch = sure(outgoing.next_batch(index, limit))?;
        let mut moves = batch.moves;
        let rows = batch.rows.into_iter().map(|(path, record)| {
            let here = self
                .disk
                .entry(&path)
                .is_some_and(|entry| entry.kind == record.row.entry.kind);
            let inline = here && goes_inline(&record.row.entry, INLINE);
            Sent {
                seq: record.seq,
                path,
                row: record.row,
                moved_from: record.moved_from,
                moved_tree: moves.remove(&record.seq),
                inline,
                tried: false,
            }
        });
        Some((batch.upto, rows.collect()))
    }

    /// Whether this node has what a peer asks for.
    pub(crate) fn has(&self, want: &Want) -> bool {
        let has = |entry: &Entry| entry.content().is_some_and(|content| content.1 == want.hash);
        self.disk.entry(&want.path).is_some_and(has)
    }

    /// Rows came from a peer.
    pub(crate) fn receive(&mut self, peer: u32, upto: u64, rows: Vec<Sent>) {
        if self.deaf.contains(&peer) {
            return;
        }
        *self.news.entry(peer).or_default() += 1;
        let before = self.received.get(&peer).copied().unwrap_or(0);
        for sent in rows {
            let behind = self.behind.entry(peer).or_default();
            if behind.is_empty() {
                self.before.insert(peer, before);
            }
            if sent.moved_tree.is_some() || !behind.is_empty() {
                behind.push_back(sent);
            } else {
                self.pending.insert((peer, sent.path.clone()), sent);
            }
        }
        let received = self.received.entry(peer).or_default();
        *received = upto.max(*received);
    }

    /// A peer has begun again.
    pub(crate) fn again(&mut self, peer: u32) {
        self.deaf.remove(&peer);
    }

    /// Content came. If it did not, its row goes on waiting: most often a newer
    /// one follows, but the sender's file may also become again what it was.
    pub(crate) fn content(&mut self, peer: u32, want: &Want, have: bool) {
        *self.news.entry(peer).or_default() += 1;
        if have {
            self.fetched.insert(want.hash);
        }
    }

    /// Deals with everything that waits.
    pub(crate) fn settle(&mut self, between: Between<'_>) -> Result<(), Crashed> {
        self.local_pass(between)?;
        let peers: BTreeSet<u32> = self
            .received
            .keys()
            .chain(self.pending.keys().map(|key| &key.0))
            .copied()
            .collect();
        for peer in peers {
            self.apply_rows(peer, between)?;
        }
        self.fetched.clear();
        Ok(())
    }

    fn apply_rows(&mut self, peer: u32, between: Between<'_>) -> Result<(), Crashed> {
        let now = Moment {
            head: self.index.head(),
            disk: self.disk.changes,
            news: self.news.get(&peer).copied().unwrap_or(0),
        };
        if self.tried_at.insert(peer, now) == Some(now) && self.fetched.is_empty() {
            return Ok(());
        }
        let all = |_: &Sent| true;
        self.apply_pending(peer, &all, between)?;
        while let Some(sent) = self.behind.entry(peer).or_default().pop_front() {
            let Some(tree) = &sent.moved_tree else {
                self.pending.insert((peer, sent.path.clone()), sent);
                continue;
            };
            // What came before it first, and then the move by itself.
            self.apply_pending(peer, &all, between)?;
            let taken: Vec<_> = self.index.moves.values().cloned().collect();
            let first = sent.seq - tree.span();
            match sure(expand(&self.index, &taken, &sent.path, &sent.row, tree)) {
                Expansion::Known => self.log.say(|| format!("knows the move to {}", tree.to)),
                Expansion::Rows(rows) => {
                    self.log.say(|| format!("expands the move to {}", tree.to));
                    for (seq, row) in (first..).zip(rows) {
                        let sent = Sent {
                            seq,
                            path: row.path,
                            row: row.row,
                            moved_from: row.moved_from,
                            moved_tree: row.moved_tree,
                            inline: false,
                            tried: false,
                        };
                        self.pending.insert((peer, sent.path.clone()), sent);
                    }
                    self.apply_pending(peer, &|one| (first..=sent.seq).contains(&one.seq), between)?;
                }
                Expansion::Unlike => {
                    self.log.say(|| format!("cannot expand the move to {}", tree.to));
                    self.behind.remove(&peer);
                    self.deaf.insert(peer);
                    let before = self.before.get(&peer).copied().unwrap_or(0);
                    let after = before.min(first - 1);
                    self.plains.push((peer, after, sent.seq));
                    self.received.insert(peer, after);
                    break;
                }
            }
        }
        self.apply_pending(peer, &all, between)?;
        // The cursor goes up to the first row that waits.
        let waiting = self
            .pending
            .iter()
            .filter(|(key, _)| key.0 == peer)
            .map(|(_, sent)| sent.seq)
            .min();
        let upto = self.received.get(&peer).copied().unwrap_or(0);
        if let Some((_, cursor)) = self.index.cursors.get_mut(&peer) {
            *cursor = upto.min(waiting.map_or(u64::MAX, |seq| seq - 1)).max(*cursor);
        }
        self.reserve();
        Ok(())
    }

    /// Applies those of a peer's waiting rows that are `due`.
    fn apply_pending(
        &mut self,
        peer: u32,
        due: &dyn Fn(&Sent) -> bool,
        between: Between<'_>,
    ) -> Result<(), Crashed> {
        let mut sent: Vec<&Sent> = self
            .pending
            .range((peer, RelPath::root())..(peer + 1, RelPath::root()))
            .map(|(_, sent)| sent)
            .filter(|sent| due(sent))
            .collect();
        if sent.is_empty() {
            return Ok(());
        }
        // A move's rows in the order of their numbers.
        sent.sort_by_key(|sent| sent.seq);
        let tried = sent.iter().any(|sent| sent.tried);
        let inline = sent
            .iter()
            .filter(|sent| sent.inline)
            .filter_map(|sent| Some(sent.row.entry.content()?.1));
        let content: HashSet<Hash> = inline.chain(self.fetched.iter().copied()).collect();
        let arrived: Vec<Arrived> = sent
            .iter()
            .map(|sent| Arrived {
                path: sent.path.clone(),
                row: sent.row.clone(),
                moved_from: sent.moved_from.clone(),
                moved_tree: sent.moved_tree.clone().filter(|_| !sent.tried),
            })
            .collect();
        let paths: Vec<RelPath> = sent.iter().map(|sent| sent.path.clone()).collect();
        let names = |replica: ReplicaId| name_of(replica);
        let context = Context {
            now_ms: self.disk.clock.millis(),
            policy: self.policy,
            names: &names,
        };
        let decided = sure(decide_remote(
            &self.index,
            arrived,
            peer,
            &mut self.author,
            &context,
        ));
        let steps = match tried {
            true => sure(plan_one_by_one(&self.index, &decided)),
            false => sure(plan(&self.index, &decided)),
        };
        let progress = self.carry_out(peer, content, &decided, &steps, between)?;
        for path in paths {
            let key = (peer, path);
            if progress.is_done(&key.1) {
                self.pending.remove(&key);
            } else if let Some(sent) = self.pending.get_mut(&key) {
                sent.tried = true;
            }
        }
        Ok(())
    }

    /// Brings disk and index to the decided rows, as far as that works, with the
    /// contents that are at hand.
    fn carry_out(
        &mut self,
        peer: u32,
        content: HashSet<Hash>,
        decided: &[Decided],
        steps: &[Step],
        between: Between<'_>,
    ) -> Result<Progress, Crashed> {
        for one in decided {
            self.log.say(|| {
                format!(
                    "decided {:?} via {:?}: {:?}",
                    shown(&one.path, &one.row),
                    one.via,
                    one.work
                )
            });
            if one.work != Work::Nothing {
                self.index.intents.insert(
                    one.path.clone(),
                    Intent {
                        row: one.row.clone(),
                        via: one.via,
                    },
                );
            }
        }
        for step in steps {
            if let Step::Times { path, .. } = step
                && let Some(record) = self.index.get(path)
                && !self.index.intents.contains_key(path)
            {
                let intent = Intent {
                    row: record.row.clone(),
                    via: record.via,
                };
                self.index.intents.insert(path.clone(), intent);
            }
        }
        if !self.index.intents.is_empty() {
            self.commit();
        }
        let mut progress = sure(Progress::new(&self.index, decided));
        let mut applier = Applier {
            content,
            expected: HashMap::new(),
            wants: Vec::new(),
        };
        for step in steps {
            match between(&mut self.disk) {
                Event::Nothing => {}
                Event::Changed(paths) => self.dirty.extend(paths),
                Event::Crash => return Err(Crashed),
            }
            if !progress.admits(step) {
                continue;
            }
            let done = applier.step(&mut self.disk, &self.index, step);
            self.log
                .say(|| format!("{} {step:?}", if done { "done" } else { "FAIL" }));
            if let Step::Install {
                path,
                how: Install::MovedTree { from },
                ..
            } = step
                && done
            {
                self.renamed.push((from.clone(), path.clone()));
            }
            if !done {
                progress.fail(step);
                if let Step::Install {
                    how: Install::MovedTree { from },
                    ..
                } = step
                {
                    self.dirty.insert(from.clone());
                    self.dirty.extend(self.disk.beneath(from));
                }
                self.dirty.insert(step.path().clone());
                self.dirty.extend(self.disk.beneath(step.path()));
            }
        }
        self.index.intents.clear();
        self.index
            .note_moves(whole_moves(decided, &|path| progress.is_done(path)));
        for one in decided {
            if progress.is_done(&one.path) {
                self.put(
                    &one.path,
                    one.seq,
                    one.row.clone(),
                    one.via,
                    one.moved_from.clone(),
                );
            }
        }
        for step in sure(progress.take_back(&self.index)) {
            let done = applier.step(&mut self.disk, &self.index, &step);
            self.log
                .say(|| format!("{} back {step:?}", if done { "done" } else { "FAIL" }));
            if !done {
                self.dirty.insert(step.path().clone());
            }
        }
        for want in applier.wants {
            self.wants.push((peer, want));
        }
        self.relink(decided.iter().filter_map(|one| one.row.live()?.link).collect());
        Ok(progress)
    }

    /// Joins what the rows say is one inode and is not.
    fn relink(&mut self, groups: BTreeSet<LinkGroup>) {
        for group in groups {
            let members = sure(self.index.linked(group)).into_iter();
            let members: Vec<(RelPath, Record)> = members
                .filter_map(|path| Some((path.clone(), self.index.get(&path)?.clone())))
                .collect();
            let mut applier = Applier {
                content: HashSet::new(),
                expected: HashMap::new(),
                wants: Vec::new(),
            };
            for step in sure(relink(&self.index, &members)) {
                let done = applier.step(&mut self.disk, &self.index, &step);
                self.log
                    .say(|| format!("{} again {step:?}", if done { "done" } else { "FAIL" }));
                let path = step.path();
                let sig = self.sig(path);
                if done && self.index.get(path).is_some() {
                    self.index.set_sig(path, sig);
                } else {
                    self.dirty.insert(path.clone());
                }
            }
        }
    }

    pub(crate) fn put(
        &mut self,
        path: &RelPath,
        seq: u64,
        row: Row,
        via: Option<u32>,
        moved_from: Option<RelPath>,
    ) {
        let sig = if row.deleted { None } else { self.sig(path) };
        self.index.put(
            path.clone(),
            Record {
                row,
                seq,
                sig,
                via,
                moved_from,
                here: None,
            },
        );
    }

    pub(crate) fn sig(&self, path: &RelPath) -> Option<StatSig> {
        let ino = self.disk.ino(path)?;
        let inode = &self.disk.inodes[&ino];
        let none = Time { secs: 0, nanos: 0 };
        Some(StatSig {
            ino,
            btime: none,
            mtime: inode.entry.mtime,
            ctime: none,
            size: 0,
            mode: inode.entry.mode,
            uid: 0,
            gid: 0,
            nlink: 1,
            racy: false,
        })
    }

    /// No peer may see a number or stamp that is not reserved.
    fn reserve(&mut self) {
        if self.author.exceeds(&self.durable.reserve) {
            self.commit();
        }
    }
}

/// The node behind a replica: every hundredth is another life of its index.
pub(crate) fn name_of(replica: ReplicaId) -> String {
    format!("n{}", replica.0 % 100 - 1)
}

/// A row in a line.
pub(crate) fn shown(path: &RelPath, row: &Row) -> String {
    let what = if row.deleted {
        "tombstone"
    } else {
        row.entry.kind_name()
    };
    let hash = row
        .entry
        .content()
        .map_or(String::new(), |content| format!(" {:?}", content.1));
    let (vector, stamp) = (row.version.vector.pairs(), row.version.stamp);
    let vector: Vec<String> = vector
        .iter()
        .map(|(replica, seq)| format!("{}:{seq}", name_of(*replica)))
        .collect();
    format!(
        "{path} {what}{hash} mode {:o} mtime {}.{} link {:?} [{}] @{}.{}",
        row.entry.mode,
        row.entry.mtime.secs % 100_000,
        row.entry.mtime.nanos,
        row.entry.link.map(|group| group.0 % 1000),
        vector.join(" "),
        stamp.wall_ms % 10_000_000,
        stamp.count
    )
}

pub(crate) fn sure<T>(result: Result<T, std::convert::Infallible>) -> T {
    match result {
        Ok(value) => value,
    }
}
