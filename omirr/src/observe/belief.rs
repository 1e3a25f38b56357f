//! Whether what was told of a file's bytes is all that changed in it.
//!
//! In: what is known of the file, what was told, and what `stat` says now. Out: that
//! its content is as it was, or which part of it is to be read; or why all of it is
//! to be read. One of these reasons is enough, and whoever thinks of another adds it.
//! Pure.

use crate::content::Leaves;
use crate::model::{Entry, Kind, StatSig};
use crate::source::{Ranges, Written};

/// What an event told of a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told<'a> {
    pub written: Written,
    /// It was about the content, and not of attributes alone.
    pub touched: bool,
    /// This daemon has read all of it once while nobody had it mapped to write, and
    /// would have been told of a mapping since.
    pub whole: bool,
    /// Of the content that is known, if it is large: of a smaller one all is read.
    pub leaves: Option<&'a Leaves>,
}

/// A file that is looked at because of that.
pub(super) struct Case<'a> {
    pub(super) told: Told<'a>,
    /// What the index has.
    pub(super) known: Option<(&'a Entry, &'a StatSig)>,
    pub(super) now: &'a StatSig,
    /// It lies in memory that is written to without the page cache.
    pub(super) dax: bool,
}

/// What may be believed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Believed<'a> {
    /// The content is as it is known.
    Same(Kind),
    /// Only this of it need be read.
    Part(&'a Leaves, Ranges),
}

/// Why all is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    /// Something was told without its bytes, or by nobody.
    Untold,
    /// There may have been a mapping that nobody told of.
    NotWhole,
    Dax,
    /// Nothing is known of it, or not as a file of this size.
    Unknown,
    OtherInode,
    /// By another of its names it may have been written to as well.
    Linked,
    /// No list of leaves, or that of another content.
    NoLeaves,
    /// Size or time of modification are others, though nothing was written.
    Changed,
    /// It is smaller, or larger than by what was written.
    Size,
}

pub(super) fn believed<'a>(case: &Case<'a>) -> Result<Believed<'a>, Doubt> {
    let Case {
        told,
        known,
        now,
        dax,
    } = case;
    if told.written == Written::Anywhere {
        return Err(Doubt::Untold);
    }
    if !told.whole {
        return Err(Doubt::NotWhole);
    }
    if *dax {
        return Err(Doubt::Dax);
    }
    let (entry, sig) = known.ok_or(Doubt::Unknown)?;
    let (size, hash) = entry.content().ok_or(Doubt::Unknown)?;
    if sig.size != size {
        return Err(Doubt::Unknown);
    }
    if !sig.same_inode(now) {
        return Err(Doubt::OtherInode);
    }
    if now.nlink != 1 || sig.nlink != 1 || entry.link.is_some() {
        return Err(Doubt::Linked);
    }
    let Written::Within(ranges) = told.written else {
        return match sig.same_content(now) {
            true => Ok(Believed::Same(entry.kind.clone())),
            false => Err(Doubt::Changed),
        };
    };
    let leaves = told.leaves.ok_or(Doubt::NoLeaves)?;
    if leaves.size() != size || leaves.hash() != hash {
        return Err(Doubt::NoLeaves);
    }
    let end = ranges.bytes().map(|range| range.end).max();
    if now.size < size || (now.size > size && end.is_none_or(|end| end < now.size)) {
        return Err(Doubt::Size);
    }
    Ok(Believed::Part(leaves, ranges))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::leaves::LEAVES_MIN_BYTES;
    use crate::model::{Flags, Hash, LinkGroup, Time};

    const MIB: u64 = 1 << 20;
    const SIZE: u64 = 2 * LEAVES_MIN_BYTES;

    struct Large {
        entry: Entry,
        sig: StatSig,
        leaves: Leaves,
    }

    impl Large {
        fn new() -> Large {
            let leaves = Leaves::new(SIZE, vec![[7; 32]; (SIZE / MIB) as usize]).unwrap();
            let time = Time { secs: 5, nanos: 6 };
            Large {
                entry: Entry {
                    kind: Kind::File {
                        size: SIZE,
                        hash: leaves.hash(),
                    },
                    mode: 0o644,
                    uid: 0,
                    gid: 0,
                    user: None,
                    group: None,
                    mtime: time,
                    xattrs: Default::default(),
                    flags: Flags::NONE,
                    link: None,
                },
                sig: StatSig {
                    ino: 1,
                    btime: time,
                    mtime: time,
                    ctime: time,
                    size: SIZE,
                    mode: 0o100_644,
                    uid: 0,
                    gid: 0,
                    nlink: 1,
                    racy: true,
                },
                leaves,
            }
        }

        /// The verdict on what `change` makes of the ordinary case.
        fn judge(
            &self,
            written: Written,
            change: impl FnOnce(&mut Case<'_>, &mut StatSig),
        ) -> Result<bool, Doubt> {
            let mut now = self.sig;
            let mut case = Case {
                told: Told {
                    written,
                    touched: true,
                    whole: true,
                    leaves: Some(&self.leaves),
                },
                known: Some((&self.entry, &self.sig)),
                now: &self.sig,
                dax: false,
            };
            change(&mut case, &mut now);
            let case = Case { now: &now, ..case };
            believed(&case).map(|believed| matches!(believed, Believed::Part(..)))
        }
    }

    #[test]
    fn what_is_told_in_full_is_believed() {
        let large = Large::new();
        let within = Written::within(MIB, MIB + 1);
        assert_eq!(large.judge(within, |_, now| now.mtime.secs += 1), Ok(true));
        assert_eq!(
            large.judge(Written::Nowhere, |_, now| now.ctime.secs += 1),
            Ok(false)
        );
        // Appended to, as was told.
        let end = Written::within(SIZE, SIZE + 5);
        assert_eq!(large.judge(end, |_, now| now.size = SIZE + 5), Ok(true));
    }

    #[test]
    fn each_doubt_is_enough() {
        let within = Written::within(MIB, MIB + 1);
        for written in [within, Written::Nowhere] {
            let large = Large::new();
            assert_eq!(large.judge(Written::Anywhere, |_, _| {}), Err(Doubt::Untold));
            assert_eq!(
                large.judge(written, |case, _| case.told.whole = false),
                Err(Doubt::NotWhole)
            );
            assert_eq!(large.judge(written, |case, _| case.dax = true), Err(Doubt::Dax));
            assert_eq!(
                large.judge(written, |case, _| case.known = None),
                Err(Doubt::Unknown)
            );
            assert_eq!(large.judge(written, |_, now| now.ino = 2), Err(Doubt::OtherInode));
            assert_eq!(
                large.judge(written, |_, now| now.btime.secs += 1),
                Err(Doubt::OtherInode)
            );
            assert_eq!(large.judge(written, |_, now| now.nlink = 2), Err(Doubt::Linked));
            let mut linked = Large::new();
            linked.entry.link = Some(LinkGroup(1));
            assert_eq!(linked.judge(written, |_, _| {}), Err(Doubt::Linked));
            let mut was_linked = Large::new();
            was_linked.sig.nlink = 2;
            assert_eq!(
                was_linked.judge(written, |_, now| now.nlink = 1),
                Err(Doubt::Linked)
            );
            let mut other = Large::new();
            other.sig.size -= 1;
            assert_eq!(other.judge(written, |_, _| {}), Err(Doubt::Unknown));
        }
        let mut large = Large::new();
        assert_eq!(
            large.judge(within, |case, _| case.told.leaves = None),
            Err(Doubt::NoLeaves)
        );
        assert_eq!(large.judge(within, |_, now| now.size -= 1), Err(Doubt::Size));
        assert_eq!(large.judge(within, |_, now| now.size += 1), Err(Doubt::Size));
        assert_eq!(
            large.judge(Written::Nowhere, |_, now| now.size += 1),
            Err(Doubt::Changed)
        );
        assert_eq!(
            large.judge(Written::Nowhere, |_, now| now.mtime.nanos += 1),
            Err(Doubt::Changed)
        );
        large.entry.kind = Kind::File {
            size: SIZE,
            hash: Hash([1; 32]),
        };
        assert_eq!(large.judge(within, |_, _| {}), Err(Doubt::NoLeaves));
    }
}
