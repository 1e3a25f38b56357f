//! Users: they change trees at random, and remember what they wrote.

use omirr::model::{Entry, Flags, Hash, Kind, RelPath, Time};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::disk::{Disk, Refused};
use crate::random::Rng;

pub(crate) struct Users {
    /// Real time, ns since 1970; every look at it moves it on.
    pub(crate) now_ns: u64,
    next_content: u64,
    /// Where a user of which node wrote what.
    pub(crate) written: FxHashMap<Kind, String>,
    /// What a user has overwritten or removed somewhere.
    pub(crate) removed: FxHashSet<Kind>,
    /// Which node's users have moved what since all trees were equal.
    pub(crate) moved: FxHashMap<Kind, String>,
}

impl Users {
    pub(crate) fn new() -> Users {
        Users {
            now_ns: 1_790_000_000_000_000_000,
            next_content: 1,
            written: FxHashMap::default(),
            removed: FxHashSet::default(),
            moved: FxHashMap::default(),
        }
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.now_ns / 1_000_000
    }

    pub(crate) fn time(&mut self, skew_ms: i64) -> Time {
        self.now_ns += 1;
        let ns = self.now_ns.saturating_add_signed(skew_ms * 1_000_000);
        Time {
            secs: (ns / 1_000_000_000) as i64,
            nanos: (ns % 1_000_000_000) as u32,
        }
    }

    /// Changes the tree somehow beneath `home`; returns what was done and the
    /// paths that a tracer would name.
    pub(crate) fn act(
        &mut self,
        rng: &mut Rng,
        disk: &mut Disk,
        node: &str,
        home: &RelPath,
    ) -> (String, Vec<RelPath>) {
        let before = disk.clone();
        let mut said = String::new();
        for _ in 0..6 {
            if let Ok(what) = self.try_act(rng, disk, home) {
                said = what;
                break;
            }
            // Half of it may be done.
            disk.clone_from(&before);
        }
        let contents = before.contents();
        let after = disk.contents();
        for (path, kind) in &contents {
            if after.get(path) != Some(kind) {
                let gained = after
                    .iter()
                    .any(|(at, now)| now == kind && contents.get(at) != Some(kind));
                // Two who carry one content to different places each take away what
                // the other has left: then nobody has it, as both have said.
                let mover = self.moved.entry(kind.clone()).or_insert_with(|| node.to_owned());
                if !gained || mover != node {
                    self.removed.insert(kind.clone());
                }
            }
        }
        for (path, kind) in &after {
            self.written
                .entry(kind.clone())
                .or_insert_with(|| format!("{path} on {node}: {said}"));
        }
        let changed =
            |path: &&RelPath| before.ino(path) != disk.ino(path) || before.entry(path) != disk.entry(path);
        let both = before.names.keys().chain(disk.names.keys());
        let mut paths: Vec<RelPath> = both.filter(changed).cloned().collect();
        paths.sort();
        paths.dedup();
        (said, paths)
    }

    fn try_act(&mut self, rng: &mut Rng, disk: &mut Disk, home: &RelPath) -> Result<String, Refused> {
        let clock = disk.clock;
        let (some, place) = (existing(rng, disk, home)?, place(rng, disk, home)?);
        let old = disk.entry(&some).cloned().ok_or(Refused)?;
        match rng.below(23) {
            0..=3 => {
                let file = self.file(rng, clock);
                self.write(rng, disk, &place, &file)?;
                Ok(format!("write {place}"))
            }
            4..=5 if !old.is_dir() => {
                let file = self.file(rng, clock);
                self.write(rng, disk, &some, &file)?;
                Ok(format!("write {some}"))
            }
            6 => {
                let dir = directory(rng, clock);
                if disk.entry(&place).is_some() {
                    return Err(Refused);
                }
                let ino = disk.make(&dir);
                disk.put(&place, ino)?;
                Ok(format!("mkdir {place}"))
            }
            7..=8 if !some.is_root() && some != *home => {
                remove_all(disk, &some)?;
                Ok(format!("rm -r {some}"))
            }
            9..=11 if some != *home => {
                disk.rename(&some, &place)?;
                Ok(format!("mv {some} {place}"))
            }
            12 => {
                disk.set(
                    &some,
                    &Entry {
                        mode: mode(rng, &old),
                        ..old
                    },
                )?;
                Ok(format!("chmod {some}"))
            }
            13 => {
                disk.set(&some, &Entry { mtime: clock, ..old })?;
                Ok(format!("touch {some}"))
            }
            14 => {
                let target = format!("to{}", self.fresh()).into_bytes().into();
                let link = Entry {
                    kind: Kind::Symlink { target },
                    mode: 0o777,
                    ..self.file(rng, clock)
                };
                if disk.is_dir(&place) {
                    return Err(Refused);
                }
                let ino = disk.make(&link);
                disk.put(&place, ino)?;
                Ok(format!("ln -s {place}"))
            }
            15..=16 if !old.is_dir() => {
                let ino = disk.ino(&some).ok_or(Refused)?;
                if disk.is_dir(&place) || disk.ino(&place) == Some(ino) {
                    return Err(Refused);
                }
                disk.put(&place, ino)?;
                Ok(format!("ln -f {some} {place}"))
            }
            17 => {
                if some == *home || place.is_within(&some) || some.is_within(&place) {
                    return Err(Refused);
                }
                swap(disk, &some, &place)?;
                Ok(format!("swap {some} {place}"))
            }
            18 => {
                if some.is_root() || some == *home {
                    return Err(Refused);
                }
                remove_all(disk, &some)?;
                let new = if old.is_dir() {
                    self.file(rng, clock)
                } else {
                    directory(rng, clock)
                };
                let ino = disk.make(&new);
                disk.put(&some, ino)?;
                Ok(format!("replace {some} by a {}", new.kind_name()))
            }
            19 if old.content().is_some() => {
                if disk.is_dir(&place) || disk.ino(&place) == disk.ino(&some) {
                    return Err(Refused);
                }
                let ino = disk.make(&old);
                disk.put(&place, ino)?;
                Ok(format!("cp -p {some} {place}"))
            }
            20..=22 => {
                let dirs: Vec<&RelPath> = disk
                    .names
                    .keys()
                    .filter(|path| path.is_within(home) && *path != home && disk.is_dir(path))
                    .collect();
                let dir = rng.pick(&dirs).map(|dir| (*dir).clone()).ok_or(Refused)?;
                disk.rename(&dir, &place)?;
                Ok(format!("mv {dir} {place}"))
            }
            _ => Err(Refused),
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next_content += 1;
        self.next_content
    }

    fn file(&mut self, rng: &mut Rng, mtime: Time) -> Entry {
        let mut hash = [0; 32];
        hash[24..].copy_from_slice(&self.fresh().to_be_bytes());
        hash[..8].copy_from_slice(&self.next_content.to_le_bytes());
        let kind = Kind::File {
            size: 1 + rng.below(3) * 40_000,
            hash: Hash(hash),
        };
        Entry {
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime,
            xattrs: Vec::new(),
            flags: Flags::NONE,
            user: None,
            group: None,
            link: None,
        }
    }

    /// Into the inode that is there, or by a rename.
    fn write(&mut self, rng: &mut Rng, disk: &mut Disk, path: &RelPath, file: &Entry) -> Result<(), Refused> {
        match disk.entry(path) {
            Some(entry) if entry.is_dir() => Err(Refused),
            Some(entry) if entry.content().is_some() && rng.chance(60) => {
                let file = Entry {
                    mode: entry.mode,
                    ..file.clone()
                };
                disk.set(path, &file)
            }
            _ => {
                let ino = disk.make(file);
                disk.put(path, ino)
            }
        }
    }
}

fn mode(rng: &mut Rng, old: &Entry) -> u32 {
    if matches!(old.kind, Kind::Symlink { .. }) {
        0o777
    } else {
        0o600 | (rng.below(64) as u32)
    }
}

fn directory(rng: &mut Rng, mtime: Time) -> Entry {
    let mode = 0o700 | rng.below(64) as u32;
    Entry {
        kind: Kind::Directory,
        mode,
        uid: 0,
        gid: 0,
        mtime,
        xattrs: Vec::new(),
        flags: Flags::NONE,
        user: None,
        group: None,
        link: None,
    }
}

fn existing(rng: &mut Rng, disk: &Disk, home: &RelPath) -> Result<RelPath, Refused> {
    let all: Vec<&RelPath> = disk.names.keys().filter(|path| path.is_within(home)).collect();
    rng.pick(&all).map(|path| (*path).clone()).ok_or(Refused)
}

fn place(rng: &mut Rng, disk: &Disk, home: &RelPath) -> Result<RelPath, Refused> {
    let dirs: Vec<&RelPath> = disk
        .names
        .keys()
        .filter(|path| path.is_within(home) && disk.is_dir(path) && path.depth() < home.depth() + 3)
        .collect();
    let dir = rng.pick(&dirs).ok_or(Refused)?;
    let name = rng.pick(&["a", "b", "c", "x.txt", "y"]).ok_or(Refused)?;
    dir.join(name.as_bytes()).map_err(|_| Refused)
}

fn remove_all(disk: &mut Disk, path: &RelPath) -> Result<(), Refused> {
    for at in disk.beneath(path).iter().rev() {
        disk.remove(at)?;
    }
    disk.remove(path)
}

fn swap(disk: &mut Disk, a: &RelPath, b: &RelPath) -> Result<(), Refused> {
    let aside = a.parent().ok_or(Refused)?.join(b"swap").map_err(|_| Refused)?;
    if disk.entry(b).is_none() {
        return Err(Refused);
    }
    disk.rename(a, &aside)?;
    disk.rename(b, a)?;
    disk.rename(&aside, b)
}
