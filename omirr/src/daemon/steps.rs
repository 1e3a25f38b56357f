//! A plan's steps on disk.
//!
//! In: steps in the plan's order, and contents. Out: what has become of each, in
//! an [`Outcome`]. A step is done only where the disk is as the index says, or
//! as an earlier step has left it; what is not is left alone, and everything
//! that depends on it with it. The index is not written here.

use rustc_hash::FxHashMap;

use super::share::Arrival;
use crate::apply::{self, Applied, ApplyError, DirRemoval, Dirs, Expect, Ready};
use crate::engine::{Content, Install, Progress, Step};
use crate::index::{IndexError, Reader};
use crate::model::{Entry, Here, Kind, Record, RelPath, StatSig};
use crate::parallel;

/// What has become of steps.
pub(super) struct Outcome {
    pub(super) progress: Progress,
    /// By path: what `stat` says after the last step; none if it is gone.
    pub(super) sigs: FxHashMap<RelPath, Option<StatSig>>,
    /// By path that was brought to its row: what this node has of it, where that
    /// is not the row's.
    pub(super) here: FxHashMap<RelPath, Option<Box<Here>>>,
    /// Why steps failed, by path.
    pub(super) errors: FxHashMap<RelPath, ApplyError>,
    /// Someone has written to these since.
    pub(super) touched: Vec<RelPath>,
    /// The resolver's moment before the first step.
    pub(super) since: u64,
    /// Names that an inode got which has, or had, another: what users did to it
    /// by that one a moment ago has an event that leads there.
    pub(super) renamed: Vec<RelPath>,
    /// Directories that were renamed with what is in them: where they were, and
    /// where they are.
    pub(super) carried: Vec<(RelPath, RelPath)>,
}

/// Makes all contents ready, several at a time.
pub(super) fn stage(
    dirs: &Dirs<'_>,
    reader: &Reader,
    steps: &[Step],
    arrivals: &mut [Arrival],
    outcome: &mut Outcome,
) -> FxHashMap<RelPath, Ready> {
    let mut sources: FxHashMap<RelPath, &mut Arrival> = arrivals
        .iter_mut()
        .map(|arrival| (arrival.row.path.clone(), arrival))
        .collect();
    let jobs: Vec<_> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Stage { path, entry, content } => Some((step, path, entry, content, sources.remove(path))),
            _ => None,
        })
        .collect();
    let results: Vec<_> = parallel::map(jobs, 16, |(step, path, entry, content, source)| {
        (step, stage_one(dirs, reader, path, entry, content, source))
    });
    let mut staged = FxHashMap::default();
    for (step, result) in results {
        match result {
            Ok(ready) => {
                staged.insert(step.path().clone(), ready);
            }
            Err(error) => outcome.fail(step, error),
        }
    }
    staged
}

fn stage_one(
    dirs: &Dirs<'_>,
    reader: &Reader,
    path: &RelPath,
    entry: &Entry,
    content: &Content,
    source: Option<&mut Arrival>,
) -> Result<Ready, ApplyError> {
    // What came is of use only as long as it is what was decided.
    let source = source.filter(|arrival| arrival.row.row.entry == *entry);
    let (ready, inline) = match source {
        Some(arrival) => (arrival.ready.take(), arrival.row.inline.clone()),
        None => (None, None),
    };
    let staged = match (content, ready, inline) {
        (_, Some(ready), _) => return Ok(ready),
        (_, None, Some(inline)) => {
            let mut staged = apply::stage_file(dirs, path, entry)?;
            staged.append(&inline)?;
            staged
        }
        (Content::Copy { from }, None, None) => {
            let Ok(Some(Record { sig: Some(sig), .. })) = reader.get(from) else {
                return Err(ApplyError::Changed { path: from.clone() });
            };
            apply::clone_local(dirs, from, &sig, path, entry)?
        }
        (Content::Transfer, None, None) => apply::stage_file(dirs, path, entry)?,
    };
    staged.finish(entry)
}

/// Does the steps in order; runs of independent new files at once.
pub(super) fn execute(
    dirs: &Dirs<'_>,
    reader: &Reader,
    steps: &[Step],
    mut staged: FxHashMap<RelPath, Ready>,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let mut at = 0;
    while at < steps.len() {
        // A run of staged files, each under a name of its own.
        let run = steps[at..]
            .iter()
            .take_while(|step| {
                matches!(
                    step,
                    Step::Install {
                        how: Install::Staged,
                        ..
                    }
                )
            })
            .count();
        if run == 0 {
            if outcome.progress.admits(&steps[at]) {
                let done = step_once(dirs, reader, &steps[at], outcome)?;
                outcome.note(reader, &steps[at], done)?;
            }
            at += 1;
            continue;
        }
        let mut jobs: Vec<_> = steps[at..at + run]
            .iter()
            .filter(|step| outcome.progress.admits(step))
            .filter_map(|step| Some((step, staged.remove(step.path())?)))
            .collect();
        for (step, ready) in jobs.iter_mut().filter(|(_, ready)| ready.is_patch()) {
            ready.shared_by(1 + joined_to(reader, steps, step.path())?);
        }
        let install = |(step, ready)| match outcome.expected(reader, Step::path(step))? {
            Ok(expect) => Ok((step, apply::install(dirs, ready, &expect).map(Some))),
            Err(error) => Ok((step, Err(error))),
        };
        let results = parallel::map::<_, _, anyhow::Result<Vec<_>>>(jobs, 32, install)?;
        for (step, done) in results {
            if let Err(error @ ApplyError::Torn { .. }) = done {
                // Nothing may look at it before it is complete.
                return Err(error.into());
            }
            outcome.note(reader, step, done)?;
        }
        at += run;
    }
    Ok(())
}

/// How many other names of the file at `path` get what it gets.
fn joined_to(reader: &Reader, steps: &[Step], path: &RelPath) -> Result<u32, IndexError> {
    let ino = |path: &RelPath| Ok(reader.get(path)?.and_then(|record| record.sig).map(|sig| sig.ino));
    let Some(own) = ino(path)? else { return Ok(0) };
    let mut names = 0;
    for step in steps {
        if let Step::Install {
            path: other,
            how: Install::Link { existing },
            ..
        } = step
            && existing == path
        {
            names += u32::from(ino(other)? == Some(own));
        }
    }
    Ok(names)
}

impl Outcome {
    /// Of no step yet; `since` is the resolver's moment.
    pub(super) fn new(progress: Progress, since: u64) -> Outcome {
        Outcome {
            progress,
            sigs: FxHashMap::default(),
            here: FxHashMap::default(),
            errors: FxHashMap::default(),
            touched: Vec::new(),
            renamed: Vec::new(),
            carried: Vec::new(),
            since,
        }
    }

    pub(super) fn note(
        &mut self,
        reader: &Reader,
        step: &Step,
        done: Result<Option<Applied>, ApplyError>,
    ) -> Result<(), IndexError> {
        let path = match step {
            Step::Aside { to, .. } => to,
            step => step.path(),
        };
        match done {
            Ok(Some(applied)) => {
                if applied == Applied::ChangedSince {
                    self.touched.push(path.clone());
                }
                self.sigs.insert(path.clone(), applied.sig());
                let here = match step {
                    Step::Times { .. } | Step::Restore { .. } => None,
                    // The same inode as there.
                    Step::Aside { path: other, .. }
                    | Step::Install {
                        how: Install::Link { existing: other } | Install::Moved { from: other },
                        ..
                    } => Some(self.here_of(reader, other)?),
                    _ => Some(match &applied {
                        Applied::Short { here, .. } => Some(here.clone()),
                        _ => None,
                    }),
                };
                if let Some(here) = here {
                    self.here.insert(path.clone(), here);
                }
                // The inode's other name has seen the same; a moved one is gone.
                match step {
                    Step::Aside { path: other, .. }
                    | Step::Install {
                        how: Install::Link { existing: other },
                        ..
                    } => {
                        self.renamed.push(path.clone());
                        self.sigs.insert(other.clone(), applied.sig());
                    }
                    Step::Install {
                        how: Install::Moved { from },
                        ..
                    } => {
                        self.renamed.push(path.clone());
                        self.sigs.insert(from.clone(), None);
                    }
                    Step::Install {
                        how: Install::MovedTree { from },
                        ..
                    } => {
                        self.renamed.push(path.clone());
                        self.sigs.insert(from.clone(), None);
                        self.carried.push((from.clone(), path.clone()));
                    }
                    Step::Install {
                        how: Install::Staged, ..
                    } => self.note_other_names(reader, path, applied.sig())?,
                    _ => {}
                }
            }
            Ok(None) if matches!(step, Step::Remove { .. }) => {
                self.sigs.insert(path.clone(), None);
            }
            Ok(None) => {}
            Err(error) => self.fail(step, error),
        }
        Ok(())
    }

    /// What was written over has changed under all its names.
    fn note_other_names(
        &mut self,
        reader: &Reader,
        path: &RelPath,
        sig: Option<StatSig>,
    ) -> Result<(), IndexError> {
        let was = reader.get(path)?.and_then(|record| record.sig);
        let Some(ino) = was.filter(|was| was.nlink > 1).map(|was| was.ino) else {
            return Ok(());
        };
        if sig.is_none_or(|sig| sig.ino == ino) {
            for other in reader.paths_of_ino(ino)? {
                if other != *path && sig.is_some() {
                    self.sigs.insert(other, sig);
                }
            }
        }
        Ok(())
    }

    pub(super) fn here_of(&self, reader: &Reader, path: &RelPath) -> Result<Option<Box<Here>>, IndexError> {
        Ok(match self.here.get(path) {
            Some(here) => here.clone(),
            None => reader.get(path)?.and_then(|record| record.here),
        })
    }

    /// Where something was that its directory has carried along to `path`.
    pub(super) fn carried_from(&self, path: &RelPath) -> Option<RelPath> {
        self.carried.iter().find_map(|(from, to)| path.rebase(to, from))
    }

    /// What must be at a path: what the last step left there, else what the
    /// index says.
    fn expected(&self, reader: &Reader, path: &RelPath) -> anyhow::Result<Result<Expect, ApplyError>> {
        let changed = || ApplyError::Changed { path: path.clone() };
        let expect = match (self.sigs.get(path), self.touched.contains(path)) {
            (_, true) => return Ok(Err(changed())),
            (Some(Some(sig)), false) => Expect::Sig(*sig),
            (Some(None), false) => Expect::Absent,
            (None, false) if self.carried.iter().any(|(from, _)| path.is_within(from)) => Expect::Absent,
            (None, false) => match reader.get(&self.carried_from(path).unwrap_or_else(|| path.clone()))? {
                Some(record) if !record.row.deleted => match record.sig {
                    Some(sig) => Expect::Sig(sig),
                    None => return Ok(Err(changed())),
                },
                // Always there: without a row, it has not been looked at yet.
                _ if path.is_root() => return Ok(Err(changed())),
                _ => Expect::Absent,
            },
        };
        Ok(Ok(expect))
    }

    pub(super) fn fail(&mut self, step: &Step, error: ApplyError) {
        self.progress.fail(step);
        self.errors.insert(step.path().clone(), error);
    }
}

/// Does one step other than installing staged content.
pub(super) fn step_once(
    dirs: &Dirs<'_>,
    reader: &Reader,
    step: &Step,
    outcome: &Outcome,
) -> anyhow::Result<Result<Option<Applied>, ApplyError>> {
    let expect = match outcome.expected(reader, step.path())? {
        Ok(expect) => expect,
        Err(error) => return Ok(Err(error)),
    };
    let changed = |path: &RelPath| Err(ApplyError::Changed { path: path.clone() });
    let sig_of = |path: &RelPath| -> anyhow::Result<Option<StatSig>> {
        Ok(match outcome.expected(reader, path)? {
            Ok(Expect::Sig(sig)) => Some(sig),
            _ => None,
        })
    };
    Ok(match step {
        Step::Stage { .. }
        | Step::Install {
            how: Install::Staged, ..
        } => Ok(None),
        Step::Aside { path, to } => match sig_of(path)? {
            Some(sig) => apply::link_existing(dirs, path, &sig, to, &Expect::Absent).map(Some),
            None => changed(path),
        },
        Step::Install {
            path,
            how: Install::Link { existing },
            ..
        } => match sig_of(existing)? {
            Some(sig) => apply::link_existing(dirs, existing, &sig, path, &expect).map(Some),
            None => changed(existing),
        },
        Step::Install {
            path,
            how: Install::Moved { from } | Install::MovedTree { from },
            ..
        } => match sig_of(from)? {
            Some(sig) => apply::move_entry(dirs, from, &sig, path, &expect).map(Some),
            None => changed(from),
        },
        Step::Install {
            path,
            entry,
            how: Install::Fresh,
        } => match entry.kind {
            Kind::Directory => apply::make_dir(dirs, path, entry, &expect).map(Some),
            Kind::Symlink { .. } => apply::make_symlink(dirs, path, entry, &expect).map(Some),
            _ => apply::make_node(dirs, path, entry, &expect).map(Some),
        },
        Step::Install {
            path,
            entry,
            how: Install::Attributes,
        } => match expect {
            Expect::Sig(sig) => apply::set_attrs(dirs, path, entry, &sig).map(Some),
            Expect::Absent => changed(path),
        },
        Step::Remove { path } => match expect {
            Expect::Sig(sig) if sig.is_dir() => match apply::remove_dir(dirs, path) {
                Ok(DirRemoval::NotEmpty) => Err(ApplyError::NotEmpty { path: path.clone() }),
                Ok(DirRemoval::Removed | DirRemoval::Absent) => Ok(None),
                Err(error) => Err(error),
            },
            Expect::Sig(sig) => apply::remove_file(dirs, path, &sig).map(|()| None),
            Expect::Absent => Ok(None),
        },
        Step::Times { path, entry } => match expect {
            Expect::Sig(sig) => apply::set_dir_time(dirs, path, entry.mtime, &sig)
                .map(Applied::AsWritten)
                .map(Some),
            Expect::Absent => changed(path),
        },
        // Another one that a user has put there is not this step's business.
        Step::Restore { path, entry } => match reader.get(path)?.and_then(|record| record.sig) {
            Some(sig) if sig.is_dir() => match apply::set_dir_time(dirs, path, entry.mtime, &sig) {
                Ok(sig) => Ok(Some(Applied::AsWritten(sig))),
                Err(_gone) => Ok(None),
            },
            _ => Ok(None),
        },
    })
}
