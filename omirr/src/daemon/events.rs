//! From the source's events to dirty paths.
//!
//! In: events, on the source's own thread. Out: paths in the shares' dirty
//! sets, and a request to rescan where events were lost. Nothing here looks at
//! a file, but for the rare directory that the resolver does not know.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::dirty::Hint;
use super::share::{Figures, Share};
use super::who::Who;
use crate::config::Tracer;
use crate::model::{RelPath, is_temp_name};
use crate::resolve::fallback::{Located, Locator};
use crate::resolve::{Change, Unknown};
use crate::source::choice::SourceConfig;
use crate::source::{Event, Signal, Sink, Source, Watch, auto};

/// Attaches the source for all shares that take part.
pub(super) fn open(tracer: &Tracer, shares: &Arc<[Arc<Share>]>) -> anyhow::Result<Arc<dyn Source>> {
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
    let config = SourceConfig {
        source: tracer.source,
        attach: tracer.attach,
        transport: tracer.transport,
        ring_bytes: tracer.ring_bytes,
        ..SourceConfig::default()
    };
    let locators = taking_part
        .iter()
        .zip(&watches)
        .map(|(share, watch)| Ok((Arc::clone(share), Arc::new(Locator::open(watch)?))))
        .collect::<std::io::Result<Vec<_>>>()?;
    let source = auto::open(
        &config,
        &watches,
        || sink(locators.clone()),
        Some(std::process::id()),
    )?;
    Ok(source.into())
}

fn sink(shares: Vec<(Arc<Share>, Arc<Locator>)>) -> Sink {
    let alone: Vec<bool> = shares
        .iter()
        .map(|(share, _)| {
            shares
                .iter()
                .filter(|(other, _)| other.root.dev() == share.root.dev())
                .count()
                == 1
        })
        .collect();
    Box::new(move |signals| {
        for ((share, locator), alone) in shares.iter().zip(&alone) {
            take(share, locator, *alone, &signals);
        }
    })
}

/// Marks what a batch of signals says of one share. Unless it is `alone` on its
/// filesystem, events that it does not know may be another's.
fn take(share: &Share, locator: &Locator, alone: bool, signals: &[Signal]) {
    let dev = share.root.dev();
    let mut touched = Vec::new();
    let mut unknown = Vec::new();
    let mut displaced = Vec::new();
    let mut resolved = 0;
    {
        let mut resolver = share.resolver.lock();
        for signal in signals {
            match signal {
                Signal::Lost { dev: lost, count } if lost.is_none_or(|lost| lost == dev) => {
                    Figures::add(&share.figures.lost, (*count).max(1));
                    share.figures.lost_at_ms.store(super::now_ms(), Ordering::Relaxed);
                    tracing::warn!(share = %share.name, "events were lost: the tree is compared with the index");
                    share.rescan.notify_one();
                }
                Signal::Compare => share.routine.notify_one(),
                Signal::Event(event)
                    if event.dev == dev && (alone || resolver.knows(event) || event.at.is_none()) =>
                {
                    displaced.extend(of_displaced(event));
                    let first = touched.len();
                    for change in resolver.apply(event) {
                        resolved += 1;
                        note(change, event, &mut touched, &mut unknown);
                    }
                    for (_, hint) in &mut touched[first..] {
                        hint.who = Who::of(event);
                    }
                }
                _ => {}
            }
        }
    }
    Figures::add(&share.figures.resolved, resolved);
    for (unknown, who) in unknown {
        find(share, locator, &unknown, who, &mut touched);
    }
    for ino in displaced {
        // Most often it has lost its last name.
        let hint = Hint {
            content: true,
            ..Hint::default()
        };
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

/// The inode of an event that names one of the daemon's temporary names: a user
/// has it open, and goes on with it although the daemon has taken its name away.
/// It may have been kept under another.
fn of_displaced(event: &Event) -> Option<u64> {
    let at = event.at.as_ref()?;
    (event.ino != 0 && is_temp_name(&at.name)).then_some(event.ino)
}

fn note(
    change: Change,
    event: &Event,
    touched: &mut Vec<(RelPath, Hint)>,
    unknown: &mut Vec<(Unknown, Option<Who>)>,
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
                    subtree: false,
                    who: None,
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
                subtree: event.is_dir,
                content: true,
                who: None,
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
        Change::Unknown(what) => unknown.push((what, Who::of(event))),
    }
}

/// What can be found out of a change in a directory that the resolver does not
/// know: from the kernel, by its handle; from the index, by its inode; else the
/// tree is compared.
fn find(
    share: &Share,
    locator: &Locator,
    unknown: &Unknown,
    who: Option<Who>,
    touched: &mut Vec<(RelPath, Hint)>,
) {
    Figures::add(&share.figures.unresolved, 1);
    let hint = Hint {
        content: unknown.content,
        subtree: false,
        at_rest: false,
        who,
    };
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
                _ => share.rescan.notify_one(),
            }
        }
        Located::Rescan(beneath) if beneath.is_root() => share.rescan.notify_one(),
        Located::Rescan(beneath) => touched.push((
            beneath,
            Hint {
                subtree: true,
                ..hint
            },
        )),
    }
}
