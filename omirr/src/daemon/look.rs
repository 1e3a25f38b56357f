//! Looking at a path: what is there, next to what the index has.
//!
//! In: paths that are due. Out: a [`Look`] each, or that it must be looked at
//! again. What follows from several looks together is `local`'s business.

use bytes::Bytes;

use super::dirty::Dirt;
use super::share::Share;
use super::trust::Unmapped;
use crate::apply::Dirs;
use crate::content::Leaves;
use crate::content::leaves::LEAVES_MIN_BYTES;
use crate::engine::Seen;
use crate::index::{IndexError, Reader};
use crate::model::{Entry, Here, LinkGroup, Record, RelPath, Sketch, StatSig};
use crate::observe::{self, Observed, Reading, Sight, Told};
use crate::parallel;
use crate::source::Written;

/// A path that was looked at, with its record as of before.
pub(super) struct Look {
    pub(super) dirt: Dirt,
    pub(super) record: Option<Record>,
    /// None if it is as the record says.
    pub(super) seen: Option<Seen>,
    /// As of now; none if nothing is there.
    pub(super) sig: Option<StatSig>,
    /// What the disk has of the entry where it is not the entry's.
    pub(super) here: Option<Box<Here>>,
    /// What was read of it, if that is little.
    pub(super) content: Option<Bytes>,
    /// Of the content only what was told was read, if anything.
    pub(super) in_part: bool,
    /// All of a large content was read, since nobody had it mapped to write.
    pub(super) in_full_since: Option<Unmapped>,
    /// What the content is like, if it was read and is large.
    pub(super) sketch: Sketch,
    /// The hashes of its leaves, likewise.
    pub(super) leaves: Option<Box<Leaves>>,
    /// The inode was under this path before, or is there as well.
    pub(super) elsewhere: Option<Elsewhere>,
}

/// What looking at a path came to.
pub(super) enum Looking {
    Done(Box<Look>),
    /// It changed while it was read; where the index has its inode, if that is at
    /// another name.
    Unstable(Dirt, Option<RelPath>),
    /// It could not be looked at, for this reason.
    Failed(Dirt, String),
}

impl Look {
    /// Whether it is a directory of whose names nothing is known, or not enough.
    pub(super) fn is_unknown_dir(&self) -> bool {
        let Some(sig) = self.sig.filter(StatSig::is_dir) else {
            return false;
        };
        let known = self.record.as_ref().filter(|record| record.row.is_live_dir());
        self.dirt.subtree
            || known
                .and_then(|known| known.sig)
                .is_none_or(|known| !known.same_inode(&sig))
    }

    /// The size of a content of which only what was told was read, bytes.
    pub(super) fn part_of(&self) -> Option<u64> {
        self.sig.filter(|_| self.in_part).map(|sig| sig.size)
    }

    /// Whether what lies beneath must be looked at as well, and does not come by
    /// itself. A directory that was moved goes as a whole.
    pub(super) fn is_to_be_walked(&self) -> bool {
        let comes = self
            .sig
            .is_some_and(|sig| self.dirt.beneath.comes_by_itself(&sig));
        self.is_unknown_dir() && (self.dirt.subtree || !comes || self.moved_from().is_some())
    }

    /// When what was found is to count as made. Of a tree that is met for the first
    /// time it is as old as it says: a restored one has new change times, and old
    /// contents that must not win over what peers did since. That its inode has one
    /// more name than was known is no change either.
    pub(super) fn when_made(&self, sig: &StatSig, is_first: bool) -> u64 {
        let ctime = sig.ctime.millis();
        match is_first && self.is_first_seen() {
            true => ctime.min(sig.mtime.millis()),
            false => ctime,
        }
    }

    /// Whether there is no row yet of what was found, or one that differs by nothing
    /// but the hard-link group.
    fn is_first_seen(&self) -> bool {
        let (Some(record), Some(Seen::Present(entry))) = (&self.record, &self.seen) else {
            return self.record.is_none();
        };
        let regrouped = |known: &Entry| {
            *entry
                == Entry {
                    link: entry.link,
                    ..known.clone()
                }
        };
        record.row.live().is_some_and(regrouped)
    }

    /// Whether its directory's times must have changed with it.
    pub(super) fn came_or_went(&self) -> bool {
        let was = self.record.as_ref().filter(|record| !record.row.deleted);
        match (&self.seen, self.sig) {
            (None, _) => false,
            // Even one that was not known may have come and gone.
            (Some(_), None) => true,
            (Some(_), Some(sig)) => was
                .and_then(|was| was.sig)
                .is_none_or(|was| !was.same_inode(&sig)),
        }
    }

    /// Whether the index has this name for another inode, or for none, or has
    /// never seen which.
    pub(super) fn name_changed(&self) -> bool {
        let was = self.record.as_ref().filter(|record| !record.row.deleted);
        match (was.and_then(|was| was.sig), self.sig) {
            (Some(was), Some(sig)) => !was.same_inode(&sig),
            _ => true,
        }
    }

    /// Where peers most likely have the content that was found.
    pub(super) fn moved_from(&self) -> Option<&RelPath> {
        let other = self.elsewhere.as_ref()?;
        // Read or not, it must be the same content for the peers to look there.
        match &self.seen {
            Some(Seen::Present(entry)) if entry.kind == other.record.row.entry.kind => Some(&other.path),
            _ => None,
        }
    }

    /// The inode with several names, or once with several, that it is.
    pub(super) fn inode(&self) -> Option<u64> {
        let sig = self.sig.filter(|sig| !sig.is_dir())?;
        let here = self.record.as_ref().and_then(|record| record.row.live());
        let there = self.elsewhere.as_ref().map(|other| &other.record.row.entry);
        let linked = here.into_iter().chain(there).any(|entry| entry.link.is_some());
        (sig.nlink > 1 || linked).then_some(sig.ino)
    }

    pub(super) fn set_group(&mut self, group: Option<LinkGroup>) {
        match &mut self.seen {
            Some(Seen::Present(entry)) => entry.link = group,
            Some(Seen::Absent) => {}
            // Nothing else has changed, but the group may have.
            None => {
                let entry = self.record.as_ref().and_then(|record| record.row.live());
                if let Some(entry) = entry.filter(|entry| entry.link != group) {
                    self.seen = Some(Seen::Present(Entry {
                        link: group,
                        ..entry.clone()
                    }));
                }
            }
        }
    }
}

pub(super) fn look_at(
    share: &Share,
    reader: &Reader,
    paths: Vec<(RelPath, Dirt)>,
) -> anyhow::Result<Vec<(RelPath, Looking)>> {
    let dirs = share.root.batch();
    let look = |(path, dirt): (RelPath, Dirt)| {
        let look = look_at_one(share, reader, &dirs, &path, dirt)?;
        Ok(look.map(|look| (path, look)))
    };
    let looks = parallel::map::<_, _, Result<Vec<_>, IndexError>>(paths, 16, look)?;
    Ok(looks.into_iter().flatten().collect())
}

/// Which looks at a part are perhaps not of one moment: a write whose event was still
/// under way is in one part and not in another that was not read; and of what was
/// doubted meanwhile nothing is sure. So everything that was under way is waited for,
/// once for all of them. A write that has not returned yet need not have an event; its
/// own comes after this and is looked at then. Within what was read a look is as good as
/// one at the whole file: `stat` said the same before and after.
pub(super) fn unsure<'a>(
    share: &Share,
    looks: impl Iterator<Item = (&'a RelPath, &'a Look)> + Clone,
) -> Vec<RelPath> {
    let looks = looks.filter(|(_, look)| look.in_part);
    if looks.clone().next().is_none() {
        return Vec::new();
    }
    let was_read = |look: &Look| look.leaves.is_some();
    let has_heard = !looks.clone().any(|(_, look)| was_read(look)) || share.hear_all();
    let trust = share.trust.lock();
    let dirty = share.dirty();
    let is_sure = |path: &RelPath, look: &Look| {
        let since = dirty.get(path).map_or(Written::Nowhere, |dirt| dirt.written);
        // Attributes alone are of one moment whatever was written.
        let is_one = !was_read(look) || (has_heard && look.dirt.written.covers(since));
        is_one && look.sig.is_some_and(|sig| trust.is_whole(sig.ino))
    };
    let unsure = looks.filter(|(path, look)| !is_sure(path, look));
    unsure.map(|(path, _)| path.clone()).collect()
}

/// None if the path is none of the share's business.
fn look_at_one(
    share: &Share,
    reader: &Reader,
    dirs: &Dirs<'_>,
    path: &RelPath,
    dirt: Dirt,
) -> Result<Option<Looking>, IndexError> {
    let record = reader.get(path)?;
    let mut elsewhere = None;
    // Of a large content of which only a part is to be read.
    let mut before = None;
    let found = match observe::sight(dirs, path) {
        Ok(Sight::Absent) => Ok(Observed::Absent),
        Ok(Sight::Foreign) => Ok(Observed::Foreign),
        Ok(Sight::Here(found)) => {
            let known = record
                .as_ref()
                .and_then(|record| Some((record.row.live()?, record.sig.as_ref()?)));
            if known.is_none() {
                // A file that has just got this name may be known under another.
                elsewhere = known_elsewhere(reader, path, &found.sig())?;
            }
            let known = known.or(elsewhere
                .as_ref()
                .map(|other| (&other.record.row.entry, &other.sig)));
            // The disk need not show what the row says.
            let shown = known.map(|(entry, sig)| (Here::shown(entry, here_of(&record, &elsewhere)), *sig));
            let known = shown.as_ref().map(|(entry, sig)| (entry, sig));
            let just_read = share.belt.has_read(path, &found.sig());
            // What was told of this name says nothing of what was known by another.
            let whole = elsewhere.is_none() && share.trust.lock().is_whole(found.sig().ino);
            if let (true, Written::Within(_), Some((entry, _))) = (whole && !dirt.read, dirt.written, known) {
                before = large_content(reader, entry)?;
            }
            let reading = match (dirt.read, dirt.written, dirt.content) {
                (true, _, _) => Reading::Always,
                (false, written, touched) if written != Written::Anywhere => Reading::Told(Told {
                    written,
                    touched,
                    whole,
                    leaves: before.as_ref().map(|(leaves, _)| leaves),
                }),
                (false, _, true) => Reading::IfTouched,
                (false, _, false) if just_read => Reading::JustRead,
                (false, _, false) => Reading::IfChanged,
            };
            found.read(known, reading)
        }
        Err(error) => Err(error),
    };
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            let known_dir = record.as_ref().is_some_and(|record| record.row.is_live_dir());
            let is_ours = !share.is_excluded(path, known_dir);
            return Ok(is_ours.then(|| Looking::Failed(dirt, error.to_string())));
        }
    };
    let here = here_of(&record, &elsewhere).cloned().map(Box::new);
    let (mut sketch, mut leaves, mut in_part) = (Sketch::default(), None, false);
    let mut in_full_since = None;
    let (seen, sig, content, here) = match found {
        Observed::Foreign => return Ok(None),
        Observed::Unstable { .. } => {
            return Ok(Some(Looking::Unstable(dirt, elsewhere.map(|other| other.path))));
        }
        Observed::Absent => (Some(Seen::Absent), None, None, None),
        // The same as under its other name.
        Observed::Unchanged { sig } => (
            elsewhere
                .as_ref()
                .map(|other| Seen::Present(other.record.row.entry.clone())),
            Some(sig),
            None,
            here,
        ),
        Observed::Present {
            entry: shown,
            sig,
            content,
            sketch: read,
            leaves: hashed,
            in_part: told,
        } => {
            (sketch, leaves, in_part) = (read, hashed, told);
            if let (Some((_, before)), true, true) = (before, in_part, leaves.is_some()) {
                // A part does not tell what the whole is like; about what it was.
                sketch = before;
            }
            let of_this = |unmapped: &Unmapped| unmapped.is_of(sig.ino) && leaves.is_some() && !in_part;
            in_full_since = dirt.unmapped.filter(of_this);
            let known = record.as_ref().filter(|record| !record.row.deleted);
            let known = known.or(elsewhere.as_ref().map(|other| &other.record));
            let kin = match known {
                None if sig.nlink > 1 => another_name(reader, &sig)?,
                _ => None,
            };
            let known = known.or(kin.as_ref());
            let entry = as_row(share, known, &shown);
            let here = known.and_then(|record| record.here.as_ref());
            let lacks = here.map(|here| here.lacks.clone()).unwrap_or_default();
            let here = Here::of(&shown, &entry, &lacks);
            (Some(Seen::Present(entry)), Some(sig), content, here)
        }
    };
    let as_dir = match &sig {
        Some(sig) => sig.is_dir(),
        None => record.as_ref().is_some_and(|record| record.row.is_live_dir()),
    };
    if share.is_excluded(path, as_dir) {
        // Rows of before it was excluded go with their directory, and only
        // with it.
        let went = sig.is_none() && record.as_ref().is_some_and(|record| !record.row.deleted);
        let in_dir = |parent| matches!(observe::stat(dirs, &parent), Ok(Some(sig)) if sig.is_dir());
        if !went || path.parent().is_some_and(in_dir) {
            return Ok(None);
        }
    }
    Ok(Some(Looking::Done(Box::new(Look {
        dirt,
        record,
        seen,
        sig,
        here,
        content,
        in_part,
        in_full_since,
        sketch,
        leaves,
        elsewhere,
    }))))
}

/// What the index has of a large content: its leaves and its sketch.
fn large_content(reader: &Reader, entry: &Entry) -> Result<Option<(Leaves, Sketch)>, IndexError> {
    let Some((size, hash)) = entry.content() else {
        return Ok(None);
    };
    if size < LEAVES_MIN_BYTES {
        return Ok(None);
    }
    let leaves = reader.leaves_of(&hash)?;
    leaves
        .map(|leaves| Ok((leaves, reader.sketch_of(&hash)?)))
        .transpose()
}

/// What the disk is known to have otherwise than the row says that is looked at.
fn here_of<'a>(record: &'a Option<Record>, elsewhere: &'a Option<Elsewhere>) -> Option<&'a Here> {
    let known = record.as_ref().filter(|record| !record.row.deleted);
    let known = known.or(elsewhere.as_ref().map(|other| &other.record));
    known.and_then(|record| record.here.as_deref())
}

/// The entry for a row of what the disk shows. What has not changed since it was
/// last looked at stands as it is in the row; an owner that has gets a name.
fn as_row(share: &Share, known: Option<&Record>, shown: &Entry) -> Entry {
    let owners = share.root.owners();
    let Some(known) = known else {
        let (user, group) = owners.names(shown.uid, shown.gid);
        return Entry {
            user,
            group,
            ..shown.clone()
        };
    };
    let was = Here::shown(&known.row.entry, known.here.as_deref());
    let mut entry = Here::read(&known.row.entry, known.here.as_deref(), shown);
    if (was.uid, was.gid) != (shown.uid, shown.gid) {
        let (user, group) = owners.names(shown.uid, shown.gid);
        if was.uid != shown.uid {
            entry.user = user;
        }
        if was.gid != shown.gid {
            entry.group = group;
        }
    }
    entry
}

/// The names under which the index has the inode that was found, if that has
/// several.
pub(super) fn other_names(reader: &Reader, look: &Look) -> Result<Vec<RelPath>, IndexError> {
    let (Some(ino), Some(Seen::Present(_))) = (look.inode(), &look.seen) else {
        return Ok(Vec::new());
    };
    let group = look.record.as_ref().and_then(|record| record.row.live()?.link);
    let mut names = group
        .map(|group| reader.group(group))
        .transpose()?
        .unwrap_or_default();
    names.extend(reader.paths_of_ino(ino)?);
    Ok(names)
}

/// The record of another name of an inode that has several: all of them have one
/// owner, whatever number that has here.
fn another_name(reader: &Reader, sig: &StatSig) -> Result<Option<Record>, IndexError> {
    for path in reader.paths_of_ino(sig.ino)? {
        let record = reader.get(&path)?.filter(|record| !record.row.deleted);
        let same = record.filter(|record| record.sig.is_some_and(|known| known.same_inode(sig)));
        if same.is_some() {
            return Ok(same);
        }
    }
    Ok(None)
}

/// An inode that the index knows under another path.
pub(super) struct Elsewhere {
    pub(super) path: RelPath,
    pub(super) record: Record,
    /// As the index has it.
    pub(super) sig: StatSig,
}

/// Where the index has the regular file or directory that `now` is found at
/// `path`. A directory's own times move with what is done in it.
pub(super) fn known_elsewhere(
    reader: &Reader,
    path: &RelPath,
    now: &StatSig,
) -> Result<Option<Elsewhere>, IndexError> {
    if !now.is_file() && !now.is_dir() {
        return Ok(None);
    }
    let Some(other) = reader.path_of_ino(now.ino)?.filter(|other| other != path) else {
        return Ok(None);
    };
    let Some(record) = reader.get(&other)? else {
        return Ok(None);
    };
    let same = |sig: &StatSig| match now.is_dir() {
        true => sig.same_inode(now) && sig.btime.secs != 0,
        false => sig.same_content(now),
    };
    let Some(sig) = record.sig.filter(same) else {
        return Ok(None);
    };
    Ok((!record.row.deleted).then_some(Elsewhere {
        path: other,
        record,
        sig,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::dirty::{Beneath, DirtySet, Hint};
    use crate::model::{Flags, Kind, ReplicaId, Row, Stamp, Time, Vector, Version};

    fn time(secs: i64) -> Time {
        Time { secs, nanos: 0 }
    }

    fn sig(ino: u64, is_dir: bool) -> StatSig {
        StatSig {
            ino,
            btime: time(1),
            mtime: time(1000),
            ctime: time(2000),
            size: 0,
            mode: if is_dir { 0o040_755 } else { 0o100_644 },
            uid: 0,
            gid: 0,
            nlink: 1,
            racy: false,
        }
    }

    fn entry(is_dir: bool, link: Option<u64>) -> Entry {
        Entry {
            kind: match is_dir {
                true => Kind::Directory,
                false => Kind::Fifo,
            },
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: time(1000),
            xattrs: Vec::new(),
            flags: Flags::NONE,
            user: None,
            group: None,
            link: link.map(LinkGroup),
        }
    }

    fn record(entry: Entry, sig: StatSig) -> Record {
        Record {
            row: Row {
                entry,
                deleted: false,
                version: Version {
                    vector: Vector::from_iter([(ReplicaId(1), 1)]),
                    stamp: Stamp {
                        wall_ms: 1,
                        count: 0,
                        replica: ReplicaId(1),
                    },
                },
                origin: None,
            },
            seq: 1,
            sig: Some(sig),
            via: None,
            moved_from: None,
            here: None,
        }
    }

    fn look(hint: Hint, entry: Entry, sig: StatSig, record: Option<Record>) -> Look {
        let (mut set, now) = (DirtySet::default(), std::time::Instant::now());
        set.add(RelPath::root(), hint, now);
        Look {
            dirt: set.remove(&RelPath::root()).unwrap(),
            record,
            seen: Some(Seen::Present(entry)),
            sig: Some(sig),
            here: None,
            content: None,
            in_part: false,
            in_full_since: None,
            sketch: Sketch::default(),
            leaves: None,
            elsewhere: None,
        }
    }

    fn found(hint: Hint, sig: StatSig, record: Option<Record>) -> Look {
        look(hint, entry(sig.is_dir(), None), sig, record)
    }

    #[test]
    fn a_new_directory_is_walked_unless_it_is_the_one_whose_content_comes() {
        let comes = Hint {
            beneath: Beneath::comes(&sig(5, true)),
            ..Hint::default()
        };
        assert!(found(Hint::default(), sig(5, true), None).is_to_be_walked());
        assert!(!found(comes, sig(5, true), None).is_to_be_walked());
        // Another one has been put in its place.
        assert!(found(comes, sig(6, true), None).is_to_be_walked());
        let reused = StatSig {
            btime: time(9),
            ..sig(5, true)
        };
        assert!(found(comes, reused, None).is_to_be_walked());
        // It is known, and was replaced.
        let other = record(entry(true, None), sig(5, true));
        assert!(found(comes, sig(6, true), Some(other.clone())).is_to_be_walked());
        assert!(!found(comes, sig(5, true), Some(other)).is_to_be_walked());
        assert!(!found(comes, sig(5, false), None).is_to_be_walked());
    }

    #[test]
    fn a_directory_that_came_by_a_rename_is_walked_in_any_case() {
        let moved = Hint {
            subtree: true,
            beneath: Beneath::comes(&sig(5, true)),
            ..Hint::default()
        };
        assert!(found(moved, sig(5, true), None).is_to_be_walked());
        let known = record(entry(true, None), sig(5, true));
        assert!(found(moved, sig(5, true), Some(known)).is_to_be_walked());
        let mut elsewhere = found(
            Hint {
                subtree: false,
                ..moved
            },
            sig(5, true),
            None,
        );
        elsewhere.elsewhere = Some(Elsewhere {
            path: RelPath::new(b"before").unwrap(),
            record: record(entry(true, None), sig(5, true)),
            sig: sig(5, true),
        });
        assert!(elsewhere.is_to_be_walked());
    }

    #[test]
    fn a_tree_that_is_met_first_is_as_old_as_it_says() {
        let sig = sig(5, false);
        let when = |record: Option<Record>, link, is_first| {
            look(Hint::default(), entry(false, link), sig, record).when_made(&sig, is_first)
        };
        let (changed, made) = (2_000_000, 1_000_000);
        assert_eq!(when(None, None, true), made);
        assert_eq!(when(None, None, false), changed);
        // One more name of the inode has been found.
        let known = record(entry(false, None), sig);
        assert_eq!(when(Some(known.clone()), Some(7), true), made);
        assert_eq!(when(Some(known.clone()), Some(7), false), changed);
        // A user has changed it meanwhile.
        let mut other = known;
        other.row.entry.mode = 0o600;
        assert_eq!(when(Some(other.clone()), None, true), changed);
        assert_eq!(when(Some(other), Some(7), true), changed);
    }
}
