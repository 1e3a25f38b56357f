//! Who a process is: its user, command and cgroup, out of `/proc`, for people
//! who watch or ask later. fanotify tells the process id only.
//!
//! The answer is looked up once per process and moment: one drain of the queue
//! for people who watch, [`LEAN_MOMENT`] for the daemon, which must not spend
//! time on it. A process that has ended by then keeps what was known of it a
//! moment ago; after that its number may be another's.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;

use crate::source::cgroup::{Cgroups, read_whole};

/// Processes that are remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// How long an answer counts for the daemon: a process that writes all the time
/// costs twenty looks into `/proc` each second, of thirty microseconds each. One
/// that executes another program meanwhile goes by its old name.
pub(crate) const LEAN_MOMENT: Duration = Duration::from_millis(50);
/// Numbers of processes are not given again so soon.
const STALE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) comm: [u8; 16],
    /// As in an event.
    pub(crate) cgroup: u64,
}

pub(crate) struct Who {
    seen: LruCache<u32, (Instant, Identity)>,
    /// When the drain began.
    now: Instant,
    /// How long an answer counts; zero for the drain in which it was given.
    moment: Duration,
    cgroups: Cgroups,
}

impl Who {
    pub(crate) fn new(moment: Duration) -> Who {
        Who {
            seen: LruCache::new(REMEMBERED),
            now: Instant::now(),
            moment,
            cgroups: Cgroups::open(),
        }
    }

    /// What was looked up so far may have changed: a process may have executed
    /// another program.
    pub(crate) fn next_drain(&mut self) {
        self.now = Instant::now();
    }

    pub(crate) fn of(&mut self, pid: u32) -> Identity {
        let before = self.seen.get(&pid).copied();
        let age = before.map(|(at, _)| self.now.saturating_duration_since(at));
        if let (Some((_, identity)), Some(age)) = (before, age)
            && age <= self.moment
        {
            return identity;
        }
        let (at, identity) = match (self.look_up(pid), before, age) {
            (Some(found), ..) => (self.now, found),
            // It has ended.
            (None, Some((at, known)), Some(age)) if age < STALE => (at, known),
            (None, ..) => (self.now, Identity::default()),
        };
        self.seen.put(pid, (at, identity));
        identity
    }

    fn look_up(&self, pid: u32) -> Option<Identity> {
        let status = read_whole(&format!("/proc/{pid}/status")).ok()?;
        Some(Identity {
            cgroup: self.cgroups.of_process(pid),
            ..parse(&status)?
        })
    }
}

/// Name and real user out of `/proc/PID/status`.
fn parse(status: &[u8]) -> Option<Identity> {
    let mut identity = Identity::default();
    for line in status.split(|&byte| byte == b'\n') {
        if let Some(name) = line.strip_prefix(b"Name:\t") {
            let len = name.len().min(identity.comm.len() - 1);
            identity.comm[..len].copy_from_slice(&name[..len]);
        } else if let Some(uids) = line.strip_prefix(b"Uid:\t") {
            let uid = uids.split(|&byte| byte == b'\t').next()?;
            identity.uid = std::str::from_utf8(uid).ok()?.parse().ok()?;
            return Some(identity);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_name_and_user_of_a_process() {
        let identity = parse(b"Name:\tgit-remote-https\nUmask:\t0022\nUid:\t33\t33\t33\t33\n").expect("both");
        assert_eq!(identity.uid, 33);
        assert_eq!(&identity.comm, b"git-remote-http\0");
        assert_eq!(parse(b"Name:\tx\n"), None);
    }

    #[test]
    fn remembers_a_process_that_has_ended() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep starts");
        let mut who = Who::new(Duration::ZERO);
        let alive = who.of(child.id());
        child.kill().expect("it can be ended");
        child.wait().expect("it ends");
        who.next_drain();
        assert_eq!(who.of(child.id()), alive);
        assert!(alive != Identity::default());
    }
}
