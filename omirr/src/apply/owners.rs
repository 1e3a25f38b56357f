//! Owners' names and numbers on this machine.
//!
//! In: a number, or an entry with numbers and names. Out: the name here, or the
//! numbers here. What the machine's own databases say (`/etc/passwd`, a
//! directory service) is remembered: no file costs a question of its own. It is
//! asked anew when those files change, and after a while in any case.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use rustix::fs::stat;
use uzers::{get_group_by_gid, get_group_by_name, get_user_by_name, get_user_by_uid};

use crate::model::Entry;

/// The files that name users and groups are looked at this often.
const LOOKED_AFTER: Duration = Duration::from_secs(1);
/// What a directory service says is believed for so long.
const ASKED_AFTER: Duration = Duration::from_secs(60);
/// Names are no longer on the wire, bytes.
const NAME_MAX: usize = 255;

/// By what owners are told from one another across nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum OwnersBy {
    /// By name where both nodes know it, else by number.
    #[default]
    Names,
    /// By number.
    Numbers,
}

/// The owners of one share's files.
#[derive(Debug)]
pub struct Owners {
    by: OwnersBy,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    users: Side,
    groups: Side,
    /// What the files' times and inodes were.
    files: Vec<Option<(u64, i64, i64)>>,
    looked: Option<Instant>,
    asked: Option<Instant>,
}

#[derive(Debug, Default)]
struct Side {
    names: FxHashMap<u32, Option<Arc<str>>>,
    numbers: FxHashMap<Arc<str>, Option<u32>>,
}

impl Owners {
    pub fn new(by: OwnersBy) -> Owners {
        Owners {
            by,
            known: Mutex::default(),
        }
    }

    /// The names of owner and group, as far as they are to travel.
    pub fn names(&self, uid: u32, gid: u32) -> (Option<Arc<str>>, Option<Arc<str>>) {
        if self.by == OwnersBy::Numbers {
            return (None, None);
        }
        let mut known = self.fresh();
        (
            known
                .users
                .name(uid, |uid| get_user_by_uid(uid).map(|user| user.name().to_owned())),
            known.groups.name(gid, |gid| {
                get_group_by_gid(gid).map(|group| group.name().to_owned())
            }),
        )
    }

    /// The numbers that the entry's owner and group have here.
    pub fn numbers(&self, entry: &Entry) -> (u32, u32) {
        if self.by == OwnersBy::Numbers || (entry.user.is_none() && entry.group.is_none()) {
            return (entry.uid, entry.gid);
        }
        let mut known = self.fresh();
        (
            known.users.number(entry.uid, entry.user.as_ref(), |name| {
                get_user_by_name(name).map(|user| user.uid())
            }),
            known.groups.number(entry.gid, entry.group.as_ref(), |name| {
                get_group_by_name(name).map(|group| group.gid())
            }),
        )
    }

    fn fresh(&self) -> parking_lot::MutexGuard<'_, Known> {
        let mut known = self.known.lock();
        let now = Instant::now();
        let older = |since: Option<Instant>, than| since.is_none_or(|since| now - since > than);
        if older(known.looked, LOOKED_AFTER) {
            let look = |file: &&str| {
                stat(*file)
                    .ok()
                    .map(|it| (it.st_ino, it.st_mtime, it.st_mtime_nsec as i64))
            };
            let files: Vec<_> = ["/etc/passwd", "/etc/group"].iter().map(look).collect();
            if files != known.files || older(known.asked, ASKED_AFTER) {
                *known = Known {
                    files,
                    asked: Some(now),
                    ..Known::default()
                };
            }
            known.looked = Some(now);
        }
        known
    }
}

impl Side {
    /// Root is root by its number, on every machine.
    fn name(&mut self, number: u32, ask: impl Fn(u32) -> Option<std::ffi::OsString>) -> Option<Arc<str>> {
        if number == 0 {
            return None;
        }
        let known = self.names.entry(number).or_insert_with(|| {
            let name = ask(number)?.into_string().ok()?;
            (!name.is_empty() && name.len() <= NAME_MAX && !name.chars().any(char::is_control))
                .then(|| name.into())
        });
        known.clone()
    }

    /// Nobody becomes root by a name.
    fn number(&mut self, number: u32, name: Option<&Arc<str>>, ask: impl Fn(&str) -> Option<u32>) -> u32 {
        let Some(name) = name.filter(|_| number != 0) else {
            return number;
        };
        let found = match self.numbers.get(name) {
            Some(found) => *found,
            None => {
                let found = ask(name).filter(|&found| found != 0);
                self.numbers.insert(Arc::clone(name), found);
                found
            }
        };
        found.unwrap_or(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(asked: &std::cell::Cell<u32>) -> impl Fn(&str) -> Option<u32> + '_ {
        |name| {
            asked.set(asked.get() + 1);
            match name {
                "anna" => Some(7),
                "root" | "toor" => Some(0),
                _ => None,
            }
        }
    }

    #[test]
    fn a_name_becomes_its_number_here_and_is_asked_for_once() {
        let asked = std::cell::Cell::new(0);
        let mut users = Side::default();
        let mut number = |number, name: &str| users.number(number, Some(&name.into()), side(&asked));
        assert_eq!((number(1000, "anna"), number(1001, "anna")), (7, 7));
        assert_eq!((number(1000, "nobody-here"), number(5, "nobody-here")), (1000, 5));
        assert_eq!(asked.get(), 2);
    }

    #[test]
    fn root_is_a_number_and_never_a_name() {
        let asked = std::cell::Cell::new(0);
        let mut users = Side::default();
        assert_eq!(users.number(0, Some(&"anna".into()), side(&asked)), 0);
        assert_eq!(users.number(1000, Some(&"toor".into()), side(&asked)), 1000);
        assert_eq!(users.name(0, |_| Some("root".into())), None);
    }
}
