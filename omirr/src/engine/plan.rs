//! From decided rows to steps on disk, in an order that is right.
//!
//! In: the index as it is before them, which says what is on disk, and the
//! decided rows. Out: steps. The applier does one after another; before it
//! replaces or removes what is at a path it makes sure that it is what the index
//! says, or what an earlier step has left there. Once a step for a path has
//! failed, [`super::Progress`] says which others must be left out.
//!
//! The order: all content is staged, and what loses gets its second name, while
//! every name still means what it meant; then what must make way goes; then
//! names appear, parents first; then the rest goes, deepest first; then
//! directories get their times back, deepest first.
//!
//! Hard links follow from the rows alone: live files with the same group and
//! the same entry are one inode; all others are inodes of their own.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::ControlFlow;

use crate::model::{Entry, Hash, LinkGroup, RelPath, Row};

use super::decide::is_beneath_any;
use super::rows::{Decided, Rows, Work};

/// Where staged content comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A local file that should have it; to be verified by its hash, and
    /// fetched after all if it has not.
    Copy { from: RelPath },
    /// It came with the row, or is to be asked for.
    Transfer,
}

/// How a name comes to be as its row says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Install {
    /// The staged content, in place of what is there.
    Staged,
    /// A second name for the inode at `existing`, in place of what is there.
    Link { existing: RelPath },
    /// The inode at `from`, renamed, in place of what is there; its attributes
    /// are right.
    Moved { from: RelPath },
    /// The directory at `from` with all that is in it, renamed; nothing is at the
    /// path. It serves the rows of everything in it, too, at both places.
    MovedTree { from: RelPath },
    /// A directory, symlink, fifo, socket or device, in place of what is there.
    Fresh,
    /// What is there, with the row's attributes.
    Attributes,
}

/// One thing to do on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make content with `entry`'s attributes ready for `path`, under no name.
    Stage {
        path: RelPath,
        entry: Entry,
        content: Content,
    },
    /// Give what is at `path` the name `to` as well, which must be free.
    Aside { path: RelPath, to: RelPath },
    /// Bring `path` to `entry`; `how` says from what.
    Install {
        path: RelPath,
        entry: Entry,
        how: Install,
    },
    /// Remove what is at `path`; a directory only if nothing is in it.
    Remove { path: RelPath },
    /// Set a directory's times, after everything within it.
    Times { path: RelPath, entry: Entry },
    /// If there is still a directory at `path`, because it could not be removed
    /// or replaced, give it back the times that it had: else the removals
    /// within it would look like a change that a user has made to it.
    Restore { path: RelPath, entry: Entry },
}

impl Step {
    /// The path whose row the step serves.
    pub fn path(&self) -> &RelPath {
        match self {
            Step::Stage { path, .. }
            | Step::Aside { path, .. }
            | Step::Install { path, .. }
            | Step::Remove { path }
            | Step::Times { path, .. }
            | Step::Restore { path, .. } => path,
        }
    }
}

/// The steps that bring the disk from `rows` to `decided`.
pub fn plan<R: Rows>(rows: &R, decided: &[Decided]) -> Result<Vec<Step>, R::Error> {
    let mut planner = Planner::new(rows, decided)?;
    planner.find_trees()?;
    planner.run()
}

/// The same, but no directory is renamed with what is in it, and no content is
/// looked for in files that have nothing to do with these rows: for when that
/// has failed.
pub fn plan_one_by_one<R: Rows>(rows: &R, decided: &[Decided]) -> Result<Vec<Step>, R::Error> {
    let mut planner = Planner::new(rows, decided)?;
    planner.anywhere = false;
    planner.run()
}

struct Planner<'a, R: Rows> {
    rows: &'a R,
    decided: &'a [Decided],
    /// Contents may be copied from any file.
    anywhere: bool,
    /// The decided rows by path.
    after: HashMap<&'a RelPath, &'a Row>,
    /// What the index has at the decided paths.
    before: HashMap<&'a RelPath, Option<Row>>,
    /// Content at decided paths before the steps.
    holders: HashMap<Hash, Vec<&'a RelPath>>,
    /// Paths that get a second name first: their inode must not be moved.
    kept: BTreeSet<&'a RelPath>,
    /// Tombstones' paths whose inode has been renamed.
    moved: BTreeSet<RelPath>,
    /// Directories that are renamed with what is in them: where they go, and
    /// where they were.
    trees: BTreeMap<RelPath, RelPath>,
    /// The paths of what is in them and goes along, before and after.
    carried: HashSet<RelPath>,
    /// Paths at which the final inode will be by the time it is looked at, and
    /// whether it is another than before.
    done: HashMap<RelPath, Renewed>,
    /// The decided live paths of each hard-link group.
    groups: HashMap<LinkGroup, Vec<&'a RelPath>>,
    /// Directories in which names came or went.
    touched: BTreeSet<RelPath>,
    stage: Vec<Step>,
    install: Vec<Step>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Renewed {
    SameInode,
    NewInode,
}

impl<'a, R: Rows> Planner<'a, R> {
    fn new(rows: &'a R, decided: &'a [Decided]) -> Result<Self, R::Error> {
        let mut before = HashMap::new();
        let mut holders: HashMap<Hash, Vec<&RelPath>> = HashMap::new();
        let mut groups: HashMap<LinkGroup, Vec<&RelPath>> = HashMap::new();
        for one in decided {
            if let Some(group) = one.row.live().and_then(|entry| entry.link) {
                groups.entry(group).or_default().push(&one.path);
            }
            let row = rows.row(&one.path)?;
            if let Some((_, hash)) = row.as_ref().and_then(Row::live).and_then(Entry::content) {
                holders.entry(hash).or_default().push(&one.path);
            }
            before.insert(&one.path, row);
        }
        let kept = decided.iter().filter_map(|one| match &one.work {
            Work::KeepAside { from } => Some(from),
            _ => None,
        });
        Ok(Planner {
            rows,
            decided,
            anywhere: true,
            after: decided.iter().map(|one| (&one.path, &one.row)).collect(),
            before,
            holders,
            kept: kept.collect(),
            moved: BTreeSet::new(),
            trees: BTreeMap::new(),
            carried: HashSet::new(),
            done: HashMap::new(),
            groups,
            touched: BTreeSet::new(),
            stage: Vec::new(),
            install: Vec::new(),
        })
    }

    /// Finds the directories that can be renamed as they are: all that the index
    /// has in one goes where the directory goes, and stays what it is; and
    /// nothing is in its place.
    fn find_trees(&mut self) -> Result<(), R::Error> {
        let files: BTreeSet<RelPath> = self
            .decided
            .iter()
            .filter(|one| !one.row.deleted && !one.row.entry.is_dir())
            .map(|one| one.path.clone())
            .collect();
        let works: HashMap<&RelPath, &Work> = self.decided.iter().map(|one| (&one.path, &one.work)).collect();
        let applied = |path: &RelPath| works.get(path) == Some(&&Work::Apply);
        let mut dirs: Vec<(&RelPath, &RelPath)> = self
            .decided
            .iter()
            .filter(|one| one.row.is_live_dir())
            .filter_map(|one| Some((&one.path, one.moved_from.as_ref()?)))
            .collect();
        dirs.sort_unstable();
        for (to, from) in dirs {
            // What another carries along is there already.
            if self.carried.contains(to) || self.carried.contains(from) || is_beneath_any(from, &files) {
                continue;
            }
            let apart = !from.is_within(to) && !to.is_within(from);
            if !apart || !self.base(from).is_some_and(Entry::is_dir) || !self.is_free(to)? {
                continue;
            }
            let mut paths = vec![from.clone()];
            self.rows.live_beneath(from, &mut |path| {
                paths.push(path.clone());
                ControlFlow::Continue(())
            })?;
            let goes = |path: &RelPath| {
                let to = path.rebase(from, to)?;
                let gone = applied(path) && self.after.get(path).is_some_and(|row| row.deleted);
                let there = self.after.get(&to)?.live().filter(|_| applied(&to))?;
                let same = self.base(path) == Some(there);
                (gone && same && !self.kept.contains(path)).then_some(to)
            };
            let Some(new) = paths.iter().map(goes).collect::<Option<Vec<RelPath>>>() else {
                continue;
            };
            self.trees.insert(to.clone(), from.clone());
            self.moved.extend(paths.iter().cloned());
            self.carried.extend(paths);
            self.carried.extend(new);
        }
        Ok(())
    }

    /// Whether the index has nothing live at `path` and beneath it.
    fn is_free(&self, path: &RelPath) -> Result<bool, R::Error> {
        if self.base(path).is_some() {
            return Ok(false);
        }
        let mut free = true;
        self.rows.live_beneath(path, &mut |_| {
            free = false;
            ControlFlow::Break(())
        })?;
        Ok(free)
    }

    fn run(mut self) -> Result<Vec<Step>, R::Error> {
        let mut live: Vec<&Decided> = Vec::new();
        let mut gone: Vec<&Decided> = Vec::new();
        let mut asides = Vec::new();
        for one in self.decided {
            match &one.work {
                Work::Nothing => {
                    self.done.insert(one.path.clone(), Renewed::SameInode);
                }
                Work::KeepAside { from } => {
                    asides.push(Step::Aside {
                        path: from.clone(),
                        to: one.path.clone(),
                    });
                    self.done.insert(one.path.clone(), Renewed::NewInode);
                    self.touch(&one.path);
                }
                Work::Apply if one.row.deleted => gone.push(one),
                Work::Apply => live.push(one),
            }
        }
        live.sort_by(|a, b| a.path.cmp(&b.path));
        gone.sort_by_cached_key(|one| (Reverse(one.path.depth()), one.path.clone()));

        // What lies beneath a directory that becomes something else goes first.
        let files: BTreeSet<RelPath> = live
            .iter()
            .filter(|one| !one.row.entry.is_dir() && self.base(&one.path).is_some_and(Entry::is_dir))
            .map(|one| one.path.clone())
            .collect();
        let (first, last): (Vec<&Decided>, Vec<&Decided>) = gone
            .into_iter()
            .partition(|one| is_beneath_any(&one.path, &files));
        let early: BTreeSet<&RelPath> = first.iter().map(|one| &one.path).collect();

        for one in &live {
            self.bring_up(one, &early)?;
        }
        let mut steps = std::mem::take(&mut self.stage);
        steps.append(&mut asides);
        for one in first {
            self.take_down(one, &mut steps);
        }
        let mut install = std::mem::take(&mut self.install);
        steps.append(&mut install);
        for one in last {
            self.take_down(one, &mut steps);
        }
        self.times(&live, &mut steps)?;
        Ok(steps)
    }

    /// What is live on disk at a decided path before the steps.
    fn base(&self, path: &RelPath) -> Option<&Entry> {
        self.before.get(path).and_then(Option::as_ref).and_then(Row::live)
    }

    fn touch(&mut self, path: &RelPath) {
        self.touched.extend(path.parent());
    }

    fn take_down(&mut self, one: &Decided, steps: &mut Vec<Step>) {
        let in_tree = |path: RelPath| self.carried.contains(&path);
        if self.carried.contains(&one.path) && one.path.parent().is_some_and(in_tree) {
            return;
        }
        if self.base(&one.path).is_some() && !self.moved.contains(&one.path) {
            steps.push(Step::Remove {
                path: one.path.clone(),
            });
        }
        self.touch(&one.path);
    }

    fn bring_up(&mut self, one: &'a Decided, early: &BTreeSet<&RelPath>) -> Result<(), R::Error> {
        let (path, entry) = (&one.path, &one.row.entry);
        if self.carried.contains(path) && !self.trees.contains_key(path) {
            self.done.insert(path.clone(), Renewed::NewInode);
            return Ok(());
        }
        let (how, renewed) = if let Some(from) = self.trees.get(path).cloned() {
            (Install::MovedTree { from }, Renewed::NewInode)
        } else if !entry.is_dir() {
            self.bring_up_inode(one, early)?
        } else if self.base(path).is_some_and(|base| base.kind == entry.kind) {
            (Install::Attributes, Renewed::SameInode)
        } else {
            (Install::Fresh, Renewed::NewInode)
        };
        if how != Install::Attributes {
            self.touch(path);
        }
        self.done.insert(path.clone(), renewed);
        self.install.push(Step::Install {
            path: path.clone(),
            entry: entry.clone(),
            how,
        });
        Ok(())
    }

    /// Anything but a directory: it may have other names.
    fn bring_up_inode(
        &mut self,
        one: &'a Decided,
        early: &BTreeSet<&RelPath>,
    ) -> Result<(Install, Renewed), R::Error> {
        let (path, entry) = (&one.path, &one.row.entry);
        let same = self.sharing(path)?;
        if let Some(existing) = self.finished_link(path, entry, &same)? {
            return Ok((Install::Link { existing }, Renewed::NewInode));
        }
        let own_content = self.base(path).is_some_and(|base| base.kind == entry.kind);
        if own_content {
            // In place, if that is right for every name of the inode. Names
            // that leave it earlier in the plan count, too: they may fail to.
            let together = |at: &RelPath| {
                self.after.get(at).is_some_and(|row| row.live() == Some(entry))
                    && self.done.get(at) != Some(&Renewed::NewInode)
            };
            if same.is_empty() || (entry.link.is_some() && same.iter().all(together)) {
                return Ok((Install::Attributes, Renewed::SameInode));
            }
        }
        if entry.content().is_none() {
            return Ok((Install::Fresh, Renewed::NewInode));
        }
        let mut content = Content::Transfer;
        for from in self.sources(one, own_content)? {
            if let Some(moved) = self.movable(&from, path, entry, early)? {
                self.touch(&moved);
                self.moved.insert(moved.clone());
                return Ok((Install::Moved { from: moved }, Renewed::NewInode));
            }
            if content == Content::Transfer {
                content = Content::Copy { from };
            }
        }
        self.stage.push(Step::Stage {
            path: path.clone(),
            entry: entry.clone(),
            content,
        });
        Ok((Install::Staged, Renewed::NewInode))
    }

    /// The other names of the inode at `path`.
    fn sharing(&self, path: &RelPath) -> Result<Vec<RelPath>, R::Error> {
        let Some(base) = self.base(path) else {
            return Ok(Vec::new());
        };
        let Some(group) = base.link else {
            return Ok(Vec::new());
        };
        let mut same = Vec::new();
        for at in self.rows.linked(group)? {
            if at != *path && self.rows.row(&at)?.as_ref().and_then(Row::live) == Some(base) {
                same.push(at);
            }
        }
        Ok(same)
    }

    /// A path that has the inode which `path` is to have, and another than
    /// `path` has now.
    fn finished_link(
        &self,
        path: &RelPath,
        entry: &Entry,
        same: &[RelPath],
    ) -> Result<Option<RelPath>, R::Error> {
        let Some(group) = entry.link else { return Ok(None) };
        let mut members = self.rows.linked(group)?;
        members.extend(
            self.groups
                .get(&group)
                .into_iter()
                .flatten()
                .map(|&at| at.clone()),
        );
        members.sort();
        members.dedup();
        for at in members {
            if at == *path {
                continue;
            }
            let (finished, renewed) = match self.after.get(&at) {
                Some(row) => match self.done.get(&at) {
                    Some(renewed) => (row.live() == Some(entry), *renewed),
                    None => (false, Renewed::SameInode),
                },
                None => (
                    self.rows.row(&at)?.as_ref().and_then(Row::live) == Some(entry),
                    Renewed::SameInode,
                ),
            };
            if finished && (renewed == Renewed::NewInode || !same.contains(&at)) {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// Local paths that should have a file's content, best first.
    fn sources(&self, one: &Decided, own_content: bool) -> Result<Vec<RelPath>, R::Error> {
        let mut sources = Vec::new();
        let Some((size, hash)) = one.row.entry.content() else {
            return Ok(sources);
        };
        if size == 0 {
            // Nothing to transfer, hence nothing to be gained.
            return Ok(sources);
        }
        if own_content {
            sources.push(one.path.clone());
        }
        if let Some(from) = &one.moved_from {
            let row = self.rows.row(from)?;
            if row.as_ref().and_then(Row::live).and_then(Entry::content) == Some((size, hash)) {
                sources.push(from.clone());
            }
        }
        if let Some(here) = self.holders.get(&hash) {
            sources.extend(here.iter().map(|&path| path.clone()));
        }
        if sources.is_empty() && self.anywhere {
            sources.extend(self.rows.holder(&hash)?);
        }
        Ok(sources)
    }

    /// `from`, if its inode can simply be renamed to `path`: its own name goes
    /// in this batch, nobody else needs it, and every other name that it has
    /// is one that `path` is to be linked with.
    fn movable(
        &self,
        from: &RelPath,
        path: &RelPath,
        entry: &Entry,
        early: &BTreeSet<&RelPath>,
    ) -> Result<Option<RelPath>, R::Error> {
        let goes = self.after.get(from).is_some_and(|row| row.deleted);
        if !goes || early.contains(from) || self.kept.contains(from) || self.moved.contains(from) {
            return Ok(None);
        }
        let Some(base) = self.base(from) else {
            return Ok(None);
        };
        let alike = base.link == entry.link || base.link.is_none();
        let same_attributes = Entry {
            link: None,
            ..base.clone()
        } == Entry {
            link: None,
            ..entry.clone()
        };
        let free = self.base(path).is_none_or(|here| !here.is_dir());
        if !alike || !same_attributes || !free {
            return Ok(None);
        }
        // The other names must end up linked with `path`, too; and renaming one
        // name of an inode onto another does nothing.
        for other in self.sharing(from)? {
            if other == *path {
                return Ok(None);
            }
            let stays = match self.after.get(&other) {
                Some(row) => row.live(),
                None => Some(base),
            };
            if stays.is_some_and(|stays| stays != entry) {
                return Ok(None);
            }
        }
        Ok(Some(from.clone()))
    }

    /// Directories whose contents or rows changed.
    fn times(&mut self, live: &[&Decided], steps: &mut Vec<Step>) -> Result<(), R::Error> {
        for one in live {
            let carried = self.carried.contains(&one.path) && !self.trees.contains_key(&one.path);
            if one.row.entry.is_dir() && !carried {
                self.touched.insert(one.path.clone());
            }
        }
        let mut touched: Vec<RelPath> = std::mem::take(&mut self.touched).into_iter().collect();
        touched.sort_by_cached_key(|path| (Reverse(path.depth()), path.clone()));
        for path in touched {
            let row = match self.after.get(&path) {
                Some(&row) => Some(row.clone()),
                None => self.rows.row(&path)?,
            };
            if let Some(row) = row.filter(Row::is_live_dir) {
                steps.push(Step::Times {
                    path,
                    entry: row.entry,
                });
            } else if let Some(entry) = self.base(&path).filter(|entry| entry.is_dir()) {
                steps.push(Step::Restore {
                    path: path.clone(),
                    entry: entry.clone(),
                });
            }
        }
        Ok(())
    }
}
