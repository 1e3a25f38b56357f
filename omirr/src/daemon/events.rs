//! From the source's events to dirty paths.
//!
//! In: events, on the source's own thread. Out: paths in the shares' dirty
//! sets, and a request to rescan where events were lost. Nothing here looks at
//! a file, but for the rare directory that the resolver does not know.

use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustc_hash::FxHasher;

use super::dirty::Hint;
use super::journal::Journal;
use super::recovered::Recovering;
use super::share::{Figures, Keeping, Share};
use super::who::Who;
use crate::config::Config;
use crate::model::{RelPath, is_temp_name};
use crate::resolve::fallback::{Located, Locator};
use crate::resolve::{Change, Resolver, Unknown};
use crate::source::choice::SourceConfig;
use crate::source::ebpf::pins;
use crate::source::{Event, Listener, Op, Signal, Source, Watch, auto};

/// Attaches the source for all shares that take part, or takes over one that has
/// gone on since the daemon ended.
pub(super) fn open(
    config: &Config,
    state_dir: &Path,
    shares: &Arc<[Arc<Share>]>,
) -> anyhow::Result<Arc<dyn Source>> {
    let tracer = &config.tracer;
    let taking_part: Vec<_> = shares
        .iter()
        .filter(|share| share.stopped().is_none())
        .cloned()
        .collect();
    let watches: Vec<Watch> = taking_part
        .iter()
        .map(|share| Watch {
            path: share.root.path().to_owned(),
            dev: share.root.dev(),
            ino: share.root.ino(),
        })
        .collect();
    let keep = pins::base_of(state_dir);
    let goes_on = keep.exists();
    let config = SourceConfig {
        source: tracer.source,
        attach: tracer.attach,
        transport: tracer.transport,
        ring_bytes: tracer.ring_bytes,
        keep: Some(keep),
        ..SourceConfig::default()
    };
    let mut left = Vec::new();
    for (share, watch) in taking_part.iter().zip(&watches) {
        // Opened once for each run of the daemon's tasks.
        let _ = share.locator.set(Arc::new(Locator::open(watch)?));
        let folder = super::index_path(state_dir, &share.name);
        let (journal, noted) = Journal::open(folder.parent().unwrap_or(&folder))?;
        *share.journal.lock() = Some(journal);
        left.push(noted);
        if goes_on {
            // Events come in before anything is compared.
            learn_dirs(share)?;
        }
    }
    let source: Arc<dyn Source> = auto::open(
        &config,
        &watches,
        || Box::new(Ear::new(&taking_part)),
        Some(std::process::id()),
    )?
    .into();
    if goes_on && !source.keeps() {
        // Another source was chosen since: nobody would ever ask them again.
        let base = pins::base_of(state_dir);
        match pins::remove(&base) {
            Ok(_) => tracing::info!("the tracing programs of an earlier run are detached"),
            Err(error) => tracing::warn!("{}: cannot be removed: {error}", base.display()),
        }
    }
    for (watch, (share, noted)) in taking_part.iter().zip(left).enumerate() {
        take_over(share, &source, watch, noted);
    }
    Ok(source)
}

/// Goes on where the daemon ended, if the source has gone on and the index is
/// the one that had kept up with it; else the tree will be compared.
fn take_over(share: &Share, source: &Arc<dyn Source>, watch: usize, noted: Recovering) {
    let _ = share.source.set(Arc::downgrade(source));
    if !source.keeps() {
        *share.journal.lock() = None;
        return;
    }
    let meta = share.index.meta();
    let mut hasher = FxHasher::default();
    (meta.replica.0, share.excludes.patterns()).hash(&mut hasher);
    let identity = hasher.finish();
    let kept_up = source
        .kept_up(watch)
        .filter(|kept_up| kept_up.replica == identity && kept_up.head <= meta.head);
    let keeping = Keeping {
        watch,
        identity,
        told: parking_lot::Mutex::new(kept_up.map(|kept_up| kept_up.head)),
    };
    let _ = share.keeping.set(keeping);
    // A loss may have been told already.
    let kept_up = kept_up.filter(|_| !share.progress.lock().scan_asked);
    if kept_up.is_some() {
        let (inodes, directories) = (noted.inodes.len(), noted.dirs.len());
        tracing::info!(share = %share.name, inodes, directories,
            "the event source has gone on: only what changed meanwhile is compared");
        share.belt.go_through_index();
        // First: what is neither noted nor found must not count as compared.
        share.ask_recovery(|recovering| {
            recovering.inodes.extend(noted.inodes);
            recovering.dirs.extend(noted.dirs);
        });
        share.progress.lock().scanned = true;
    } else if let Err(error) = source.set_kept_up(watch, None) {
        tracing::error!(share = %share.name, "{error:#}");
    }
}

/// Tells the resolver the directories as the index has them.
fn learn_dirs(share: &Share) -> anyhow::Result<()> {
    let reader = share.index.read()?;
    let mut resolver = share.resolver.lock();
    for pair in reader.beneath(&RelPath::root())? {
        let (path, record) = pair?;
        let (Some(sig), Some(parent), Some(name)) = (record.sig, path.parent(), path.names().last()) else {
            continue;
        };
        if record.row.is_live_dir()
            && let Some(parent) = resolver.dir_at(&parent)
        {
            resolver.learn_dir(sig.ino, parent, name);
        }
    }
    Ok(())
}

/// The daemon's ear.
struct Ear {
    /// Each with whether it is alone on its filesystem.
    shares: Vec<(Arc<Share>, bool)>,
}

/// What is known of an event's places.
#[derive(Default)]
struct Asked {
    /// A share knows all directories that it is about.
    known: bool,
    /// The shares that know one of two, by their number: they were told.
    half: Vec<usize>,
}

/// What a share knows of the directories that an event is about.
enum Knows {
    Nothing,
    /// The one, or the other.
    Half,
    All,
}

impl Ear {
    fn new(shares: &[Arc<Share>]) -> Ear {
        let on = |dev| shares.iter().filter(|share| share.root.dev() == dev).count();
        let shares = shares
            .iter()
            .map(|share| (Arc::clone(share), on(share.root.dev()) == 1));
        Ear {
            shares: shares.collect(),
        }
    }
}

impl Listener for Ear {
    fn note(&mut self, signals: &[Signal]) {
        for (share, _) in &self.shares {
            if let Some(journal) = share.journal.lock().as_mut()
                && let Err(error) = journal.note(share.root.dev(), signals)
            {
                tracing::error!(share = %share.name,
                    "changes cannot be noted ({error}); should the daemon be killed, the tree will be compared");
                share.ask_rescan();
            }
        }
    }

    fn tell(&mut self, batch: Vec<Signal>, in_hand: Option<u64>) {
        // What lies in a directory that no share knows may be in any of those
        // on its filesystem.
        let mut asked: Vec<Asked> = batch.iter().map(|_| Asked::default()).collect();
        for everyone in [false, true] {
            for nth in 0..self.shares.len() {
                self.take(nth, everyone, &batch, &mut asked);
            }
            let events = batch.iter().zip(&asked);
            if events
                .into_iter()
                .all(|(signal, asked)| asked.known || !matches!(signal, Signal::Event(_)))
            {
                break;
            }
        }
        // Only now: whoever empties the journal must not come in between.
        for (share, _) in &self.shares {
            if let Some(journal) = share.journal.lock().as_mut() {
                journal.told(in_hand);
            }
        }
    }
}

/// What a share knows of the places of an event on its filesystem; if it is
/// `alone` there, nobody else need be asked.
fn knows(share: &Share, alone: bool, resolver: &Resolver, event: &Event) -> Knows {
    if alone {
        return Knows::All;
    }
    if event.at.is_none() {
        // It names no directory; only the index can know its inode.
        let path = share
            .index
            .read()
            .and_then(|reader| reader.path_of_ino(event.ino));
        return match path {
            Ok(Some(_)) => Knows::All,
            _ => Knows::Nothing,
        };
    }
    if !resolver.knows(event) {
        return Knows::Nothing;
    }
    let half =
        |at: &Option<crate::source::Dirent>| at.as_ref().is_none_or(|at| resolver.path_of(at.dir).is_some());
    if half(&event.at) && half(&event.to) {
        Knows::All
    } else {
        Knows::Half
    }
}

impl Ear {
    /// Marks what a batch of signals says of the share with this number: events that
    /// are known to lie in it, or those that `everyone` is asked about.
    fn take(&self, nth: usize, everyone: bool, signals: &[Signal], asked: &mut [Asked]) {
        let (share, alone) = &self.shares[nth];
        let Some(locator) = share.locator.get() else {
            return;
        };
        let dev = share.root.dev();
        let mut touched = Vec::new();
        let mut unknown = Vec::new();
        let mut displaced = Vec::new();
        let mut resolved = 0;
        let beneath = share.sees_to_what_lies_beneath();
        {
            let mut resolver = share.resolver.lock();
            for (signal, asked) in signals.iter().zip(asked) {
                if let Signal::Event(event) = signal
                    && event.dev == dev
                {
                    if everyone {
                        if asked.known || asked.half.contains(&nth) {
                            continue;
                        }
                    } else {
                        match knows(share, *alone, &resolver, event) {
                            Knows::Nothing => continue,
                            Knows::Half => asked.half.push(nth),
                            Knows::All => asked.known = true,
                        }
                    }
                } else if everyone {
                    continue;
                }
                match signal {
                    Signal::Lost { dev: lost, count } if lost.is_none_or(|lost| lost == dev) => {
                        Figures::add(&share.figures.lost, (*count).max(1));
                        share.figures.lost_at_ms.store(super::now_ms(), Ordering::Relaxed);
                        tracing::warn!(share = %share.name, "events were lost: the tree is compared with the index");
                        share.trust.lock().doubt_all();
                        share.ask_rescan();
                    }
                    Signal::Recovered(recovered) if recovered.dev == dev => {
                        share.trust.lock().recovered(recovered);
                        share.ask_recovery(|recovering| recovering.add_recovered(recovered));
                    }
                    Signal::Compare => share.routine.notify_one(),
                    Signal::Event(event) if event.dev == dev => {
                        tracing::debug!(target: "omirr::event", share = %share.name, op = ?event.op, also = ?event.also,
                        ino = event.ino, at = ?event.at, to = ?event.to, pid = event.pid);
                        displaced.extend(of_displaced(event));
                        let (first, first_unknown) = (touched.len(), unknown.len());
                        let mut stays = true;
                        for change in resolver.apply(event) {
                            resolved += 1;
                            stays &= matches!(change, Change::Moved { .. } | Change::Exchanged { .. });
                            note(change, event, &mut touched, &mut unknown);
                        }
                        let heard = share.trust.lock().hear(event);
                        if came_whole(event) && !stays {
                            // What lies in it may be mapped out there, which nobody tells.
                            share.trust.lock().doubt_all();
                        }
                        let touched = touched[first..].iter_mut().map(|(_, hint)| hint);
                        let unknown = unknown[first_unknown..].iter_mut().map(|(_, hint)| hint);
                        for hint in touched.chain(unknown) {
                            hint.who = Who::of(event);
                            hint.read = heard.must_be_read;
                            hint.unmapped = heard.unmapped;
                            hint.beneath = beneath;
                        }
                    }
                    Signal::Doubt => {
                        share.trust.lock().doubt_all();
                        share.belt.hurry(Instant::now());
                    }
                    _ => {}
                }
            }
        }
        Figures::add(&share.figures.resolved, resolved);
        for (unknown, hint) in unknown {
            find(share, locator, &unknown, hint, &mut touched);
        }
        for ino in displaced {
            // Most often it has lost its last name.
            let hint = Hint::default();
            if let Ok(paths) = share.index.read().and_then(|reader| reader.paths_of_ino(ino)) {
                touched.extend(paths.into_iter().map(|path| (path, hint)));
            }
        }
        for (path, hint) in &touched {
            tracing::debug!(target: "omirr::touched", share = %share.name, ?hint, "{path}");
        }
        if !touched.is_empty() {
            share.touch(touched);
        }
    }
}

/// The inode of an event that names one of the daemon's temporary names: a user
/// has it open, and goes on with it although the daemon has taken its name away.
/// It may have been kept under another.
fn of_displaced(event: &Event) -> Option<u64> {
    let at = event.at.as_ref()?;
    (event.ino != 0 && is_temp_name(&at.name)).then_some(event.ino)
}

/// Whether a directory came to where the event says by being renamed: what is in it
/// came along, and is nobody else's to tell.
fn came_whole(event: &Event) -> bool {
    match event.op {
        Op::Rename => event.is_dir,
        // It tells of one of the two.
        Op::Exchange => true,
        _ => false,
    }
}

fn note(
    change: Change,
    event: &Event,
    touched: &mut Vec<(RelPath, Hint)>,
    unknown: &mut Vec<(Unknown, Hint)>,
) {
    match change {
        Change::Touched {
            path,
            content,
            at_rest,
        } => {
            touched.push((
                path,
                Hint {
                    content,
                    at_rest,
                    written: event.written,
                    subtree: came_whole(event),
                    ..Hint::default()
                },
            ));
        }
        Change::Moved { from, to, is_dir } => {
            touched.push((
                from,
                Hint {
                    at_rest: true,
                    ..Hint::default()
                },
            ));
            touched.push((
                to,
                Hint {
                    at_rest: true,
                    subtree: is_dir,
                    ..Hint::default()
                },
            ));
        }
        Change::Exchanged { a, b } => {
            let hint = Hint {
                at_rest: true,
                subtree: came_whole(event),
                ..Hint::default()
            };
            touched.extend([(a, hint), (b, hint)]);
        }
        Change::Gone { path } => touched.push((
            path,
            Hint {
                at_rest: true,
                ..Hint::default()
            },
        )),
        Change::Unknown(what) => {
            let hint = Hint {
                content: what.content,
                subtree: came_whole(event),
                ..Hint::default()
            };
            unknown.push((what, hint));
        }
    }
}

/// What can be found out of a change in a directory that the resolver does not
/// know: from the kernel, by its handle; from the index, by its inode; else the
/// tree is compared.
fn find(share: &Share, locator: &Locator, unknown: &Unknown, hint: Hint, touched: &mut Vec<(RelPath, Hint)>) {
    Figures::add(&share.figures.unresolved, 1);
    let located = locator.locate(unknown, &mut share.resolver.lock());
    match located {
        Located::Path(path) => touched.push((path, hint)),
        Located::Outside | Located::Gone => {}
        Located::Nameless => {
            let known = share
                .index
                .read()
                .and_then(|reader| reader.path_of_ino(unknown.ino));
            match known {
                Ok(Some(path)) => touched.push((path, hint)),
                _ => share.ask_rescan(),
            }
        }
        Located::Rescan(beneath) if beneath.is_root() => share.ask_rescan(),
        Located::Rescan(beneath) => touched.push((
            beneath,
            Hint {
                subtree: true,
                ..hint
            },
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Dirent;

    /// What is said of the paths of a directory's event, the share's root being 1 and
    /// the directory 5 in it being known.
    fn subtrees(op: Op, at: u64, to: Option<u64>) -> Vec<(String, bool)> {
        let mut resolver = Resolver::new(1);
        resolver.learn_dir(5, 1, b"dir");
        let dirent = |dir, name: &[u8]| Dirent {
            dir,
            name: name.into(),
        };
        let event = Event {
            ino: 7,
            is_dir: true,
            at: Some(dirent(at, b"a")),
            to: to.map(|to| dirent(to, b"b")),
            ..Event::told_by(op, 1, 0, b"mv")
        };
        let (mut touched, mut unknown) = (Vec::new(), Vec::new());
        for change in resolver.apply(&event) {
            note(change, &event, &mut touched, &mut unknown);
        }
        let touched = touched
            .into_iter()
            .map(|(path, hint)| (path.to_string(), hint.subtree));
        touched
            .chain(unknown.into_iter().map(|(_, hint)| (String::new(), hint.subtree)))
            .collect()
    }

    #[test]
    fn what_is_in_a_directory_that_was_renamed_is_looked_at_wherever_it_comes_from() {
        let outside = 99;
        assert_eq!(subtrees(Op::Mkdir, 5, None), [("dir/a".to_owned(), false)]);
        let both = [("dir/a".to_owned(), false), ("dir/b".to_owned(), true)];
        assert_eq!(subtrees(Op::Rename, 5, Some(5)), both);
        let from_outside = subtrees(Op::Rename, outside, Some(5));
        assert!(
            from_outside.contains(&("dir/b".to_owned(), true)),
            "{from_outside:?}"
        );
        let to_outside = subtrees(Op::Rename, 5, Some(outside));
        assert!(
            to_outside.contains(&("dir/a".to_owned(), false)),
            "{to_outside:?}"
        );
        for (at, to) in [(5, 5), (outside, 5), (5, outside)] {
            let exchanged = subtrees(Op::Exchange, at, Some(to));
            let here = exchanged.iter().filter(|(path, _)| !path.is_empty());
            assert!(here.into_iter().all(|(_, subtree)| *subtree), "{exchanged:?}");
        }
        // In directories that are not known yet.
        assert_eq!(subtrees(Op::Rename, outside, Some(98)), [(String::new(), true)]);
    }
}
