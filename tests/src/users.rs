//! Random users of a tree, out of a seed.
//!
//! In: a seed and a folder. Out: changes of every kind in few names, so that
//! users of several nodes meet; and [`Diary`], a folder that one user alone
//! writes, of which it is known to the byte what it must hold in the end.
//! Nothing here knows of daemons.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{CWD, RenameFlags, renameat_with};

/// Steele, Lea and Flood's SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// So many milliseconds, but fewer than `end`.
    pub fn millis_below(&mut self, end: u64) -> Duration {
        Duration::from_millis(self.below(end))
    }

    /// A name, up to three deep, out of few.
    fn path(&mut self, share: &Path) -> PathBuf {
        const NAMES: [&[u8]; 6] = [b"a", b"b", b"c", b"d-d", b"\xff\xfe", b"e e"];
        let mut path = share.to_owned();
        for _ in 0..=self.below(3) {
            path.push(OsStr::from_bytes(NAMES[self.below(6) as usize]));
        }
        path
    }
}

/// One change, which may well be impossible: then nothing happens.
pub fn change(rng: &mut Rng, share: &Path, who: &str, nth: u64) {
    let path = rng.path(share);
    let other = rng.path(share);
    let _ = match rng.below(22) {
        0..=4 => fs::write(&path, format!("{who} {nth}\n")),
        5 => fs::write(&path, vec![nth as u8; rng.below(400_000) as usize]),
        6 => File::options()
            .append(true)
            .open(&path)
            .and_then(|mut f| f.write_all(b"more\n")),
        7 => File::options()
            .write(true)
            .open(&path)
            .and_then(|f| f.write_all_at(who.as_bytes(), 3)),
        8 => File::options()
            .write(true)
            .open(&path)
            .and_then(|f| f.set_len(rng.below(100_000))),
        9 | 10 => fs::create_dir(&path),
        11 => fs::create_dir_all(path.join("x/y")).and_then(|()| fs::write(path.join("x/y/z"), who)),
        12 => fs::remove_file(&path),
        13 => fs::remove_dir_all(&path),
        14 | 15 => fs::rename(&path, &other),
        16 => renameat_with(CWD, &path, CWD, &other, RenameFlags::EXCHANGE).map_err(Into::into),
        17 => fs::hard_link(&path, &other),
        18 => symlink(format!("to-{who}-{nth}"), &path),
        19 => fs::set_permissions(&path, fs::Permissions::from_mode(0o600 + rng.below(64) as u32)),
        20 => {
            let when = UNIX_EPOCH + Duration::from_nanos(rng.below(1 << 60));
            File::open(&path).and_then(|f| f.set_times(fs::FileTimes::new().set_modified(when)))
        }
        _ => rustix::fs::setxattr(
            &path,
            c"user.who",
            who.as_bytes(),
            rustix::fs::XattrFlags::empty(),
        )
        .map_err(Into::into),
    };
}

/// Changes until told to stop, with a pause now and then of at most `pause`.
pub fn user(seed: u64, share: &Path, who: &str, pause: Duration, stop: &AtomicBool) {
    let mut rng = Rng(seed);
    let mut nth = 0;
    let pause = u64::try_from(pause.as_micros()).expect("pauses are short").max(1);
    while !stop.load(Ordering::Relaxed) {
        change(&mut rng, share, who, nth);
        nth += 1;
        if rng.below(20) == 0 {
            std::thread::sleep(Duration::from_micros(rng.below(pause)));
        }
    }
}

/// A folder of one user's own, which nobody else touches: whatever happens to
/// daemons and network, it must be everywhere in the end as it was written.
pub struct Diary {
    name: String,
    /// Entries that are wholly in the diary's file.
    written: AtomicU64,
}

impl Diary {
    #[must_use]
    pub fn of(who: &str) -> Diary {
        Diary {
            name: format!("diary-{who}"),
            written: AtomicU64::new(0),
        }
    }

    fn line(&self, nth: u64) -> String {
        format!("{} {nth:08}\n", self.name)
    }

    /// Writes until told to stop: every entry is appended to one file; every
    /// third begins a page of its own; every seventh replaces a file in one
    /// step, by its new name; every eleventh moves the folder that has the page
    /// before.
    pub fn keep(&self, share: &Path, stop: &AtomicBool, mut pause: impl FnMut() -> Duration) {
        let folder = share.join(&self.name);
        fs::create_dir_all(folder.join("pages-0")).expect("nobody else writes here");
        let mut pages = 0;
        let mut nth = self.written.load(Ordering::Relaxed);
        while !stop.load(Ordering::Relaxed) {
            let line = self.line(nth);
            File::options()
                .append(true)
                .create(true)
                .open(folder.join("all"))
                .and_then(|mut file| file.write_all(line.as_bytes()))
                .expect("nobody else writes here");
            self.written.store(nth + 1, Ordering::SeqCst);
            let mut step = || -> std::io::Result<()> {
                if nth.is_multiple_of(3) {
                    fs::write(folder.join(format!("pages-{pages}/{nth}")), &line)?;
                }
                if nth.is_multiple_of(7) {
                    fs::write(folder.join("being-written"), &line)?;
                    fs::rename(folder.join("being-written"), folder.join("latest"))?;
                }
                if nth.is_multiple_of(11) {
                    let (from, to) = (format!("pages-{pages}"), format!("pages-{}", pages + 1));
                    fs::rename(folder.join(from), folder.join(to))?;
                    pages += 1;
                }
                Ok(())
            };
            step().expect("nobody else writes here");
            nth += 1;
            std::thread::sleep(pause());
        }
    }

    /// How many entries have been written so far.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    /// How many whole entries a copy of the diary has; `None` if they are not
    /// those that were written, in their order.
    #[must_use]
    pub fn entries_in(&self, share: &Path) -> Option<u64> {
        let text = match fs::read(share.join(&self.name).join("all")) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Some(0),
            Err(error) => panic!("{} cannot be read: {error}", share.display()),
        };
        let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
        let all_right = lines
            .iter()
            .enumerate()
            .all(|(nth, line)| *line == self.line(nth as u64).as_bytes());
        all_right.then_some(lines.len() as u64)
    }

    /// What a copy lacks or has too much, in words; nothing if it is whole.
    #[must_use]
    pub fn missing_in(&self, share: &Path) -> Vec<String> {
        let written = self.written();
        let mut wrong = Vec::new();
        if self.entries_in(share) != Some(written) {
            wrong.push(format!(
                "{}/all has {:?} of {written} entries",
                self.name,
                self.entries_in(share)
            ));
        }
        let mut expected: BTreeMap<String, String> = BTreeMap::new();
        let mut pages = 0;
        for nth in 0..written {
            if nth.is_multiple_of(3) {
                expected.insert(nth.to_string(), self.line(nth));
            }
            pages += u64::from(nth.is_multiple_of(11));
        }
        let folder = share.join(&self.name);
        let mut found: BTreeMap<String, String> = BTreeMap::new();
        for entry in fs::read_dir(folder.join(format!("pages-{pages}")))
            .into_iter()
            .flatten()
        {
            let entry = entry.expect("a folder can be read");
            let name = entry.file_name().to_string_lossy().into_owned();
            found.insert(name, fs::read_to_string(entry.path()).unwrap_or_default());
        }
        for (page, text) in &expected {
            if found.get(page) != Some(text) {
                wrong.push(format!(
                    "{}/pages-{pages}/{page}: {:?}",
                    self.name,
                    found.get(page)
                ));
            }
        }
        for page in found.keys().filter(|page| !expected.contains_key(*page)) {
            wrong.push(format!("{}/pages-{pages}/{page} was never written", self.name));
        }
        if let Some(last) = written.checked_sub(1) {
            let latest = fs::read_to_string(folder.join("latest")).ok();
            let expected = self.line(last - last % 7);
            if latest.as_ref() != Some(&expected) {
                wrong.push(format!(
                    "{}/latest: {latest:?} instead of {expected:?}",
                    self.name
                ));
            }
        }
        let mut names: Vec<String> = fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .collect();
        names.sort();
        if written > 0 && names != ["all", "latest", &format!("pages-{pages}")] {
            wrong.push(format!("{} has {names:?}", self.name));
        }
        wrong
    }
}
