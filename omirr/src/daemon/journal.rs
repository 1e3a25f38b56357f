//! What the source has handed over and the index does not yet have.
//!
//! In: signals, before the source gives them away. Out, after the daemon was
//! killed: the inodes and directories that they named. It is there for sources
//! that go on without the daemon: what was read from them is gone from them.
//! Written without a sync, because the page cache survives a killed process and
//! such a source does not survive the machine.
//!
//! There are two files. While one is written, the other waits until everything
//! that it names is in the index; with nothing left to look at, both are
//! emptied. Neither is while it names a change that the source has noted and not
//! yet told.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use super::{dirty::DirtySet, recovered::Recovering};
use crate::crash::{self, Point};
use crate::source::{Event, Op, Recovered, Signal, now_ns};

/// Bytes of a record: the inode, its directory, and two directories in which
/// names came or went; little-endian, 0 for none.
const RECORD: usize = 32;
/// A file is exchanged for the other one when it is so long.
const LONG: u64 = 1 << 20;

pub struct Journal {
    files: [File; 2],
    lengths: [u64; 2],
    /// The one that is written.
    current: usize,
    /// When it became that, ns on the monotonic clock.
    turned_ns: u64,
    /// Of the changes that were noted and not told, the oldest one's time; none
    /// if there are none.
    in_hand: Option<u64>,
    /// An earlier run's, of which it is not yet known when it is in the index: the
    /// dirty set has it with what has come since, and must tell them apart first.
    left_over: bool,
    buffer: Vec<u8>,
}

impl Journal {
    /// Opens the journal in `folder`, with what it holds.
    pub fn open(folder: &Path) -> io::Result<(Journal, Recovering)> {
        let mut left = Recovering::default();
        let mut open = |name: &str| -> io::Result<(File, u64)> {
            let mut file = OpenOptions::new()
                .read(true)
                .append(true)
                .create(true)
                .mode(0o600)
                .open(folder.join(name))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            // A torn last record is one whose signal was not handed on.
            for record in bytes.chunks_exact(RECORD) {
                let word = |n: usize| {
                    let bytes = record[n * 8..].first_chunk().expect("a record has four words");
                    u64::from_le_bytes(*bytes)
                };
                left.add(word(0), word(1), &[word(2), word(3)]);
            }
            Ok((file, bytes.len() as u64))
        };
        let (a, b) = (open("changes-a")?, open("changes-b")?);
        let journal = Journal {
            // The shorter one has more room.
            current: usize::from(a.1 > b.1),
            files: [a.0, b.0],
            lengths: [a.1, b.1],
            turned_ns: 0,
            in_hand: None,
            left_over: a.1 + b.1 > 0,
            buffer: Vec::new(),
        };
        Ok((journal, left))
    }

    /// Notes what is about to be told.
    pub fn note(&mut self, dev: u64, signals: &[Signal]) -> io::Result<()> {
        self.buffer.clear();
        for signal in signals {
            match signal {
                Signal::Event(event) if event.dev == dev => self.event(event),
                Signal::Recovered(recovered) if recovered.dev == dev => self.recovered(recovered),
                _ => {}
            }
        }
        if self.buffer.is_empty() {
            return Ok(());
        }
        // Whatever its time is: it may be the oldest.
        self.in_hand = Some(0);
        self.files[self.current].write_all(&self.buffer)?;
        self.lengths[self.current] += self.buffer.len() as u64;
        crash::here(Point::JournalWritten);
        Ok(())
    }

    fn record(&mut self, ino: u64, parent: u64, dirs: [u64; 2]) {
        for word in [ino, parent, dirs[0], dirs[1]] {
            self.buffer.extend_from_slice(&word.to_le_bytes());
        }
    }

    fn event(&mut self, event: &Event) {
        let dir = |half: &Option<crate::source::Dirent>| half.as_ref().map_or(0, |at| at.dir);
        let stays = [
            Op::Write,
            Op::Truncate,
            Op::Fallocate,
            Op::Attr,
            Op::Xattr,
            Op::Close,
        ];
        let named = !stays.contains(&event.op) || event.also.contains(Op::Unlink) || event.ino == 0;
        let at = dir(&event.at);
        self.record(event.ino, at, [if named { at } else { 0 }, dir(&event.to)]);
    }

    fn recovered(&mut self, recovered: &Recovered) {
        for inode in &recovered.inodes {
            let dir = if inode.named { inode.parent } else { 0 };
            self.record(inode.ino, inode.parent, [dir, 0]);
        }
        for &dir in &recovered.dirs {
            self.record(0, 0, [dir, 0]);
        }
    }

    /// What was noted has been told and can be looked at, but for what is not
    /// older than `in_hand`, ns on the monotonic clock.
    pub fn told(&mut self, in_hand: Option<u64>) {
        self.in_hand = in_hand;
    }

    /// Forgets what is in the index: all that was ever told and is not in `dirty`.
    /// What an earlier run has left must have been told.
    pub fn has_kept_up(&mut self, dirty: &mut DirtySet) -> io::Result<()> {
        if dirty.is_empty() {
            return self.clear();
        }
        if std::mem::take(&mut self.left_over) {
            // In the set, with the age of what has come since, lies perhaps all of it.
            dirty.turn();
        } else if self.has_older() && !dirty.has_older() {
            return self.clear_older();
        } else if self.turn() {
            dirty.turn();
        }
        Ok(())
    }

    /// Everything that was told is in the index.
    fn clear(&mut self) -> io::Result<()> {
        if self.in_hand.is_some() {
            return Ok(());
        }
        self.left_over = false;
        for n in 0..2 {
            self.empty(n)?;
        }
        Ok(())
    }

    /// Everything is, that was told before the last [`Journal::turn`].
    fn clear_older(&mut self) -> io::Result<()> {
        if self.in_hand.is_some_and(|since| since <= self.turned_ns) {
            return Ok(());
        }
        self.empty(1 - self.current)
    }

    fn empty(&mut self, n: usize) -> io::Result<()> {
        if self.lengths[n] > 0 {
            self.files[n].set_len(0)?;
            self.lengths[n] = 0;
            crash::here(Point::JournalEmptied);
        }
        Ok(())
    }

    fn has_older(&self) -> bool {
        self.lengths[1 - self.current] > 0
    }

    /// Goes on in the other file, if this one is long and the other is empty;
    /// whether it did.
    fn turn(&mut self) -> bool {
        let turns = self.lengths[self.current] >= LONG && !self.has_older();
        if turns {
            self.current = 1 - self.current;
            self.turned_ns = now_ns();
        }
        turns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::dirty::Hint;
    use crate::source::Recoverable;

    fn signal(ino: u64) -> Vec<Signal> {
        vec![Signal::Recovered(Recovered {
            dev: 1,
            inodes: vec![Recoverable {
                ino,
                parent: 2,
                named: true,
                mapped: false,
            }],
            dirs: vec![3],
            moved: false,
        })]
    }

    #[test]
    fn what_was_noted_is_there_after_a_kill_and_gone_after_a_clear() {
        let folder = tempfile::tempdir().unwrap();
        let (mut journal, left) = Journal::open(folder.path()).unwrap();
        assert!(left.is_empty());
        journal.note(1, &signal(7)).unwrap();
        journal.note(9, &signal(8)).unwrap();
        drop(journal);
        let (mut journal, left) = Journal::open(folder.path()).unwrap();
        assert_eq!(left.inodes.into_iter().collect::<Vec<_>>(), [(7, 2)]);
        let mut dirs: Vec<_> = left.dirs.into_iter().collect();
        dirs.sort_unstable();
        assert_eq!(dirs, [2, 3]);
        journal.note(1, &signal(8)).unwrap();
        journal.clear().unwrap();
        let left = Journal::open(folder.path()).unwrap().1;
        assert_eq!(left.inodes.len(), 2, "noted and not told");
        journal.told(None);
        journal.clear().unwrap();
        assert!(Journal::open(folder.path()).unwrap().1.is_empty());
    }

    #[test]
    fn a_long_file_turns_and_the_older_one_goes_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(folder.path()).unwrap();
        while !journal.turn() {
            journal.note(1, &signal(7)).unwrap();
        }
        journal.note(1, &signal(8)).unwrap();
        assert!(!journal.turn());
        journal.told(Some(0));
        journal.clear_older().unwrap();
        assert!(journal.has_older(), "one of before the turn is not told");
        journal.told(Some(now_ns()));
        journal.clear_older().unwrap();
        drop(journal);
        let left = Journal::open(folder.path()).unwrap().1;
        assert_eq!(left.inodes.into_iter().collect::<Vec<_>>(), [(8, 2)]);
    }

    #[test]
    fn what_an_earlier_run_left_stays_until_it_is_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(folder.path()).unwrap();
        journal.note(1, &signal(7)).unwrap();
        drop(journal);
        // It goes on with what was left, and with a change of its own.
        let (mut journal, left) = Journal::open(folder.path()).unwrap();
        assert_eq!(left.inodes.len(), 1);
        journal.note(1, &signal(8)).unwrap();
        journal.told(None);
        let path = |name: &str| crate::model::RelPath::new(name.as_bytes()).unwrap();
        let mut dirty = DirtySet::default();
        let now = std::time::Instant::now();
        dirty.arrive([(path("left"), Hint::default())], now);
        dirty.arrive([(path("own"), Hint::default())], now);
        for _ in 0..3 {
            journal.has_kept_up(&mut dirty).unwrap();
            assert_eq!(Journal::open(folder.path()).unwrap().1.inodes.len(), 2);
        }
        // There is always something new.
        dirty.arrive([(path("new"), Hint::default())], now);
        dirty.remove(&path("left"));
        journal.has_kept_up(&mut dirty).unwrap();
        assert_eq!(Journal::open(folder.path()).unwrap().1.inodes.len(), 2);
        dirty.remove(&path("own"));
        journal.has_kept_up(&mut dirty).unwrap();
        let left = Journal::open(folder.path()).unwrap().1;
        assert_eq!(left.inodes.into_keys().collect::<Vec<_>>(), [8]);
        dirty.remove(&path("new"));
        journal.has_kept_up(&mut dirty).unwrap();
        assert!(Journal::open(folder.path()).unwrap().1.is_empty());
    }

    #[test]
    fn a_torn_record_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("changes-a"), [1; RECORD + 5]).unwrap();
        let left = Journal::open(folder.path()).unwrap().1;
        assert_eq!(left.inodes.len(), 1);
    }
}
