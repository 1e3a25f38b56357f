//! From the source's events to dirty paths.
//!
//! In: events, on the source's own thread. Out: paths in the shares' dirty
//! sets, and a request to rescan where events were lost. Nothing here looks at
//! a file, but for the rare directory that the resolver does not know.

use std::sync::Arc;

use super::dirty::Hint;
use super::share::{Figures, Share};
use crate::config::Tracer;
use crate::model::RelPath;
use crate::resolve::{Change, Unknown};
use crate::source::{Event, Signal, Sink, Source, Watch};

/// Attaches the source for all shares that take part.
pub(super) fn open(tracer: &Tracer, shares: &Arc<[Arc<Share>]>) -> anyhow::Result<Arc<dyn Source>> {
    let watches: Vec<Watch> = shares
        .iter()
        .filter(|share| share.stopped().is_none())
        .map(|share| Watch { path: share.root.path().to_owned(), dev: share.root.dev(), ino: share.root.ino() })
        .collect();
    let shares = Arc::clone(shares);
    let _ = tracer;
    let sink = sink(Arc::clone(&shares));
    Ok(Arc::new(crate::source::fanotify::FanotifySource::open(
        &watches,
        Some(std::process::id()),
        crate::source::choice::Detail::Lean,
        sink,
    )?))
}

fn sink(shares: Arc<[Arc<Share>]>) -> Sink {
    Box::new(move |signals| {
        for share in shares.iter() {
            take(share, &signals);
        }
    })
}

/// Marks what a batch of signals says of one share.
fn take(share: &Share, signals: &[Signal]) {
    let dev = share.root.dev();
    let mut touched = Vec::new();
    let mut unknown = Vec::new();
    let mut resolved = 0;
    {
        let mut resolver = share.resolver.lock();
        for signal in signals {
            match signal {
                Signal::Lost { dev: lost, count } if lost.is_none_or(|lost| lost == dev) => {
                    Figures::add(&share.figures.lost, (*count).max(1));
                    tracing::warn!(share = %share.name, "events were lost: the tree is compared with the index");
                    share.rescan.notify_one();
                }
                Signal::Event(event) if event.dev == dev => {
                    for change in resolver.apply(event) {
                        resolved += 1;
                        note(change, event, &mut touched, &mut unknown);
                    }
                }
                _ => {}
            }
        }
    }
    Figures::add(&share.figures.resolved, resolved);
    for unknown in unknown {
        find(share, &unknown, &mut touched);
    }
    if !touched.is_empty() {
        share.touch(touched);
    }
}

fn note(change: Change, event: &Event, touched: &mut Vec<(RelPath, Hint)>, unknown: &mut Vec<Unknown>) {
    match change {
        Change::Touched { path, content, at_rest } => {
            touched.push((path, Hint { content, at_rest, subtree: false }));
        }
        Change::Moved { from, to, is_dir } => {
            touched.push((from, Hint { at_rest: true, ..Hint::default() }));
            touched.push((to, Hint { at_rest: true, subtree: is_dir, ..Hint::default() }));
        }
        Change::Exchanged { a, b } => {
            let hint = Hint { at_rest: true, subtree: event.is_dir, content: true };
            touched.extend([(a, hint), (b, hint)]);
        }
        Change::Gone { path } => touched.push((path, Hint { at_rest: true, ..Hint::default() })),
        Change::Unknown(what) => unknown.push(what),
    }
}

/// What can be found out of a change in a directory that the resolver does not
/// know: by the index, which knows inodes too; else the tree is compared.
fn find(share: &Share, unknown: &Unknown, touched: &mut Vec<(RelPath, Hint)>) {
    Figures::add(&share.figures.unresolved, 1);
    let by_index = |ino: u64| -> Option<RelPath> {
        let reader = share.index.read().ok()?;
        reader.path_of_ino(ino).ok().flatten()
    };
    let hint = Hint { content: unknown.content, subtree: true, at_rest: false };
    let dir = unknown.at.as_ref().and_then(|at| by_index(at.dir));
    if let Some(dir) = dir {
        touched.push((dir, hint));
    } else if let Some(path) = (unknown.ino != 0).then(|| by_index(unknown.ino)).flatten() {
        touched.push((path, hint));
    }
}
