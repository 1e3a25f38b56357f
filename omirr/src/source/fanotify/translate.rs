//! From fanotify's records to the source's events.
//!
//! Three things make this more than a table. The kernel merges what happens to
//! one name while its event waits, so that one record may stand for several
//! operations, out of order with records in between. A rename that is merged
//! into an earlier one is not visible at all; hence a directory that was
//! renamed more than once within one drain is looked up at its end. And the
//! whole filesystem is reported, so that records are dropped as early as
//! possible unless one of their directories is watched.

use std::time::Duration;

use rustc_hash::FxHashMap;

use super::filesystem::{Filesystem, Place, Whereabouts};
use super::handle::{Handle, HandleRef, Id};
use super::record::{self, Entry, Record, RecordError};
use super::who::{LEAN_MOMENT, Who};
use crate::source::choice::Detail;
use crate::source::{Dirent, Event, Op, OpSet, Signal, Written, now_ns};

/// Renamed directories that are kept apart before they are looked up early.
const MOVED_LIMIT: usize = 4096;

/// Which records the kernel gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Renames in one record, with the inode that was renamed.
    Rename,
    /// Renames as two records; entries of directories without their inode.
    MovedFromTo,
}

/// What is filtered and what is added.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filter {
    /// The process whose changes are not reported.
    pub(crate) own_pid: Option<u32>,
    pub(crate) detail: Detail,
}

/// The directory of one end of a change, judged.
struct End {
    dir: u64,
    place: Place,
}

impl End {
    /// The entry in this directory, as events name it.
    fn dirent(&self, entry: Entry<'_>) -> Dirent {
        // The kernel calls the directory itself ".".
        let name = if entry.name == b"." { &b""[..] } else { entry.name };
        Dirent {
            dir: self.dir,
            name: name.into(),
        }
    }
}

/// A directory that was renamed in this drain.
struct Moved {
    times: u32,
    handle: Handle,
    pid: u32,
    last: Option<Dirent>,
}

/// Turns buffers of records into signals.
pub(crate) struct Translator {
    filesystems: Vec<Filesystem>,
    format: Format,
    filter: Filter,
    who: Who,
    moved: FxHashMap<(usize, u64), Moved>,
    /// Removals that the kernel merged into the creation of the same
    /// directory: told last, since what happened in the directory comes after.
    late: Vec<Signal>,
    /// A lone `FAN_MOVED_FROM`, until it is known whether its other half is
    /// next.
    half: Option<(Event, i32)>,
    /// When the records were read that are translated now; the kernel does not say when
    /// what they tell of happened.
    read_ns: u64,
    /// Overflows seen.
    pub(crate) overflows: u64,
}

impl Translator {
    pub(crate) fn new(filesystems: Vec<Filesystem>, format: Format, filter: Filter) -> Translator {
        let moment = match filter.detail {
            Detail::Full => Duration::ZERO,
            Detail::Lean => LEAN_MOMENT,
        };
        Translator {
            filesystems,
            format,
            filter,
            who: Who::new(moment),
            moved: FxHashMap::default(),
            late: Vec::new(),
            half: None,
            read_ns: 0,
            overflows: 0,
        }
    }

    /// Takes what one read gave.
    pub(crate) fn take(&mut self, mut buffer: &[u8], out: &mut Vec<Signal>) -> Result<(), RecordError> {
        self.read_ns = now_ns();
        while let Some(record) = record::next(&mut buffer)? {
            self.take_record(&record, out);
        }
        join_exchanges(out);
        if self.moved.len() > MOVED_LIMIT {
            self.look_up_moved(out);
        }
        Ok(())
    }

    /// The queue is empty: tells what waited for that.
    pub(crate) fn end_of_drain(&mut self, out: &mut Vec<Signal>) {
        self.flush_half(out);
        self.look_up_moved(out);
        out.append(&mut self.late);
        self.who.next_drain();
    }

    fn take_record(&mut self, record: &Record<'_>, out: &mut Vec<Signal>) {
        if record.has(libc::FAN_Q_OVERFLOW) {
            self.overflows += 1;
            out.push(Signal::Lost { dev: None, count: 0 });
            return;
        }
        let is_dir = record.has(libc::FAN_ONDIR);
        let own = u32::try_from(record.pid).ok() == self.filter.own_pid && self.filter.own_pid.is_some();
        // What one's own process does to directories still moves the borders.
        if own && !is_dir {
            return;
        }
        let Some(fs) = self.filesystem_of(record) else {
            return;
        };
        let mut told = Vec::new();
        match (record.at, self.format) {
            (None, _) => self.nameless(fs, record, &mut told),
            (Some(at), Format::Rename) if record.has(libc::FAN_RENAME) => {
                self.rename(fs, record, at, &mut told)
            }
            (Some(at), Format::Rename) => self.at_name(fs, record, at, &mut told),
            (Some(at), Format::MovedFromTo) => self.at_name_without_target(fs, record, at, &mut told),
        }
        let half_of_rename = record.mask & !libc::FAN_ONDIR == libc::FAN_MOVED_FROM;
        if self.half.is_some() && !told.is_empty() {
            self.join_half(record, &mut told, out);
        }
        if own {
            return;
        }
        if half_of_rename && told.len() == 1 {
            self.half = told.pop().map(|event| (event, record.pid));
            return;
        }
        out.extend(told.into_iter().map(Signal::Event));
    }

    fn filesystem_of(&self, record: &Record<'_>) -> Option<usize> {
        let fsid = record.fsid?;
        self.filesystems.iter().position(|fs| fs.has_fsid(fsid))
    }

    /// Judges the directory of an entry.
    fn judge(&mut self, fs: usize, entry: Entry<'_>) -> End {
        let fs = &mut self.filesystems[fs];
        let id = fs.id_of(entry.dir);
        // Where it is now need not be where it was: to those who want
        // everything everything is told, and their resolver judges.
        let place = match self.filter.detail {
            Detail::Full => Place::Inside,
            Detail::Lean => fs.place_of(id, entry.dir),
        };
        End { dir: id.ino, place }
    }

    fn event(&mut self, fs: usize, record: &Record<'_>, op: Op, id: Id, at: Option<Dirent>) -> Event {
        let pid = u32::try_from(record.pid).unwrap_or_default();
        let who = if pid == 0 {
            Default::default()
        } else {
            self.who.of(pid)
        };
        Event {
            time_ns: self.read_ns,
            op,
            dev: self.filesystems[fs].dev,
            ino: id.ino,
            generation: id.generation,
            is_dir: record.has(libc::FAN_ONDIR),
            at,
            to: None,
            range: None,
            written: Written::Anywhere,
            unmapped: false,
            pid,
            uid: who.uid,
            also: OpSet::default(),
            mapped: false,
            stale: false,
            cgroup: who.cgroup,
            comm: who.comm,
        }
    }

    /// A record that names directory, name and inode.
    fn at_name(&mut self, fs: usize, record: &Record<'_>, at: Entry<'_>, told: &mut Vec<Event>) {
        let is_dir = record.has(libc::FAN_ONDIR);
        let end = self.judge(fs, at);
        if is_dir && let Some(target) = record.target {
            let id = self.filesystems[fs].id_of(target);
            if record.has(libc::FAN_CREATE) {
                self.filesystems[fs].remember(id.ino, end.place);
            } else if record.has(libc::FAN_DELETE) {
                self.filesystems[fs].forget(id.ino);
            }
        }
        if end.place != Place::Inside {
            return;
        }
        let dirent = end.dirent(at);
        let id = self.target_of(fs, record, &dirent);
        for &(bit, file, dir) in ORDER {
            if !record.has(bit) {
                continue;
            }
            let op = if is_dir { dir } else { file };
            if told.last().is_some_and(|event| event.op == op) {
                continue;
            }
            let event = self.event(fs, record, op, id, Some(dirent.clone()));
            if op == Op::Rmdir && record.has(libc::FAN_CREATE) {
                self.late.push(Signal::Event(event));
            } else {
                told.push(event);
            }
        }
    }

    /// The inode that a record is about.
    fn target_of(&mut self, fs: usize, record: &Record<'_>, at: &Dirent) -> Id {
        match record.target {
            Some(target) => self.filesystems[fs].id_of(target),
            None if at.name.is_empty() => Id {
                ino: at.dir,
                ..Id::default()
            },
            None => Id::default(),
        }
    }

    fn rename(&mut self, fs: usize, record: &Record<'_>, at: Entry<'_>, told: &mut Vec<Event>) {
        let Some(to) = record.to else { return };
        let is_dir = record.has(libc::FAN_ONDIR);
        let (from_end, to_end) = (self.judge(fs, at), self.judge(fs, to));
        if is_dir && let Some(target) = record.target {
            let ino = self.filesystems[fs].id_of(target).ino;
            self.moved_borders(fs, ino, from_end.place, to_end.place);
        }
        // A directory that is gone needs no word: its removal is told elsewhere.
        let (told_from, told_to) = (from_end.place == Place::Inside, to_end.place == Place::Inside);
        if !told_from && !told_to {
            return;
        }
        let from = from_end.dirent(at);
        let id = self.target_of(fs, record, &from);
        let to = told_to.then(|| to_end.dirent(to));
        if is_dir && let Some(target) = record.target {
            self.note_moved(fs, id.ino, target, record.pid, to.clone());
        }
        let mut event = self.event(fs, record, Op::Rename, id, told_from.then_some(from));
        event.to = to;
        told.push(event);
    }

    /// Keeps the judgements right when a directory moves.
    fn moved_borders(&mut self, fs: usize, ino: u64, from: Place, to: Place) {
        let fs = &mut self.filesystems[fs];
        if from != to || from == Place::Gone {
            fs.forget_all();
        }
        fs.remember(ino, to);
    }

    fn note_moved(&mut self, fs: usize, ino: u64, target: HandleRef<'_>, pid: i32, to: Option<Dirent>) {
        let pid = u32::try_from(pid).unwrap_or_default();
        let moved = self.moved.entry((fs, ino)).or_insert_with(|| Moved {
            times: 0,
            handle: target.to_owned(),
            pid,
            last: None,
        });
        moved.times += 1;
        moved.last = to;
    }

    /// Finds where directories are that were renamed more than once, and tells
    /// where the records did not end there.
    fn look_up_moved(&mut self, out: &mut Vec<Signal>) {
        for ((fs, ino), moved) in std::mem::take(&mut self.moved) {
            if moved.times < 2 {
                continue;
            }
            let now = self.filesystems[fs].whereabouts(moved.handle.as_ref());
            let Some(Whereabouts::Named { dir, name, place }) = now else {
                continue;
            };
            let is_told = place == Place::Inside || self.filter.detail == Detail::Full;
            let now = is_told.then_some(Dirent { dir, name });
            if now == moved.last {
                continue;
            }
            self.filesystems[fs].forget_all();
            let record = Record {
                mask: libc::FAN_ONDIR,
                pid: moved.pid as i32,
                ..Record::default()
            };
            let mut event = self.event(fs, &record, Op::Rename, Id { ino, ..Id::default() }, moved.last);
            event.to = now;
            out.push(Signal::Event(event));
        }
    }

    /// A record without a directory: a change through a file handle (nfsd), or
    /// one link less of a file that has others.
    fn nameless(&mut self, fs: usize, record: &Record<'_>, told: &mut Vec<Event>) {
        let Some(target) = record.target else { return };
        let id = self.filesystems[fs].id_of(target);
        if record.has(libc::FAN_ONDIR) {
            let place = self.filesystems[fs].place_of(id, target);
            if place == Place::Inside && record.has(libc::FAN_ATTRIB) {
                let at = Dirent {
                    dir: id.ino,
                    name: Box::default(),
                };
                told.push(self.event(fs, record, Op::Attr, id, Some(at)));
            }
            return;
        }
        let at = match self.filesystems[fs].whereabouts(target) {
            None => return,
            Some(Whereabouts::Named {
                place: Place::Outside | Place::Gone,
                ..
            }) => return,
            Some(Whereabouts::Named { dir, name, .. }) => Some(Dirent { dir, name }),
            Some(Whereabouts::Unnamed) => None,
        };
        for &(bit, op, _) in ORDER {
            if record.has(bit) {
                told.push(self.event(fs, record, op, id, at.clone()));
            }
        }
    }

    /// A record of a kernel that does not name the inode of an entry. What
    /// happened to a directory's name is settled by what is there now: the last
    /// record of that name is always read after its last change.
    fn at_name_without_target(
        &mut self,
        fs: usize,
        record: &Record<'_>,
        at: Entry<'_>,
        told: &mut Vec<Event>,
    ) {
        const ENTRY: u64 = libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_MOVE;
        let is_dir = record.has(libc::FAN_ONDIR);
        let end = self.judge(fs, at);
        let dirent = end.dirent(at);
        let mut id = self.target_of(fs, record, &dirent);
        let mut bits = record.mask;
        if is_dir && record.has(ENTRY) {
            let filesystem = &mut self.filesystems[fs];
            if let Some(ino) = filesystem.subdirectory(at.dir, at.name) {
                id = Id { ino, ..Id::default() };
                // A rename's two halves may have different parents: whether it
                // crossed a border is only seen from what was known.
                if filesystem
                    .remembered(ino)
                    .is_none_or(|before| before != end.place)
                {
                    filesystem.forget_all();
                }
                filesystem.remember(ino, end.place);
                if record.has(libc::FAN_CREATE | libc::FAN_MOVED_TO) {
                    bits &= !(libc::FAN_DELETE | libc::FAN_MOVED_FROM);
                }
            } else if record.has(libc::FAN_MOVED_FROM | libc::FAN_DELETE) && end.place != Place::Outside {
                filesystem.forget_all();
            }
        }
        if end.place != Place::Inside {
            return;
        }
        for &(bit, file, dir) in ORDER_WITHOUT_TARGET {
            if bits & bit == 0 {
                continue;
            }
            let op = if is_dir { dir } else { file };
            let dirent = Some(dirent.clone());
            let leaves = bit == libc::FAN_MOVED_FROM;
            let arrives = bit == libc::FAN_MOVED_TO;
            let id = if leaves { Id::default() } else { id };
            let mut event = self.event(fs, record, op, id, if arrives { None } else { dirent.clone() });
            if arrives {
                event.to = dirent;
            }
            told.push(event);
        }
    }

    /// Puts the two halves of a rename together if they follow each other.
    fn join_half(&mut self, record: &Record<'_>, told: &mut [Event], out: &mut Vec<Signal>) {
        let is_other_half = record.mask & !libc::FAN_ONDIR == libc::FAN_MOVED_TO;
        if is_other_half
            && let [event] = told
            && let Some((half, _)) = self
                .half
                .take_if(|(half, pid)| *pid == record.pid && half.is_dir == event.is_dir)
        {
            event.at = half.at;
        }
        self.flush_half(out);
    }

    fn flush_half(&mut self, out: &mut Vec<Signal>) {
        out.extend(self.half.take().map(|(event, _)| Signal::Event(event)));
    }
}

/// Makes one event of the two renames as which fanotify reports an exchange.
/// A pair that two reads tore apart stays two renames, which come to the same.
fn join_exchanges(signals: &mut Vec<Signal>) {
    let is_rename = |event: &Event| event.op == Op::Rename && event.at.is_some() && event.to.is_some();
    signals.dedup_by(|second, first| {
        let (Signal::Event(first), Signal::Event(second)) = (first, second) else {
            return false;
        };
        let is_pair = is_rename(first)
            && is_rename(second)
            && (first.at == second.to && first.to == second.at)
            && (first.ino != second.ino && first.is_dir == second.is_dir)
            && first.pid == second.pid;
        if is_pair {
            first.op = Op::Exchange;
        }
        is_pair
    });
}

/// The bits of a merged record in the order in which they make sense, with
/// their operation for files and for directories.
const ORDER: &[(u64, Op, Op)] = &[
    (libc::FAN_CREATE, Op::Create, Op::Mkdir),
    // A directory whose time is set is reported as modified.
    (libc::FAN_MODIFY, Op::Write, Op::Attr),
    (libc::FAN_ATTRIB, Op::Attr, Op::Attr),
    (libc::FAN_CLOSE_WRITE, Op::Close, Op::Close),
    (libc::FAN_DELETE, Op::Unlink, Op::Rmdir),
];

/// The same where renames come in halves.
const ORDER_WITHOUT_TARGET: &[(u64, Op, Op)] = &[
    (libc::FAN_CREATE, Op::Create, Op::Mkdir),
    (libc::FAN_MOVED_TO, Op::Rename, Op::Rename),
    (libc::FAN_MODIFY, Op::Write, Op::Attr),
    (libc::FAN_ATTRIB, Op::Attr, Op::Attr),
    (libc::FAN_CLOSE_WRITE, Op::Close, Op::Close),
    (libc::FAN_MOVED_FROM, Op::Rename, Op::Rename),
    (libc::FAN_DELETE, Op::Unlink, Op::Rmdir),
];
