//! Who made a change: from what an event says to what a row keeps.
//!
//! In: events, and the last of what they said of a path. Out: an
//! [`Origin`] for the path's row, one value for the many rows of one process.
//! What the source did not tell stays unknown; nothing is guessed.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;

use crate::model::Origin;
use crate::source::Event;
use crate::source::cgroup::Cgroups;

/// Processes whose origins are shared.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// What an event says of who made the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Who {
    pid: u32,
    uid: u32,
    /// As in [`Event::cgroup`].
    cgroup: u64,
    comm: [u8; 16],
}

impl Who {
    /// None if the event says nothing of it, or that it was the daemon, upon which an
    /// interrupt came, or which wrote back what others had stored.
    pub(super) fn of(event: &Event) -> Option<Who> {
        let others = event.pid != std::process::id();
        let told = others && (event.pid != 0 || event.comm[0] != 0 || event.cgroup != 0);
        told.then_some(Who {
            pid: event.pid,
            uid: event.uid,
            cgroup: event.cgroup,
            comm: event.comm,
        })
    }

    fn command(&self) -> &[u8] {
        let end = self.comm.iter().position(|&byte| byte == 0);
        &self.comm[..end.unwrap_or(self.comm.len())]
    }
}

/// Makes origins, and remembers the last ones.
pub(super) struct Origins {
    made: LruCache<Who, Arc<Origin>>,
    cgroups: Cgroups,
}

impl Origins {
    pub(super) fn new() -> Origins {
        Origins {
            made: LruCache::new(REMEMBERED),
            cgroups: Cgroups::open(),
        }
    }

    pub(super) fn of(&mut self, who: Option<Who>) -> Option<Arc<Origin>> {
        let who = who?;
        let cgroups = &mut self.cgroups;
        let origin = self.made.get_or_insert(who, || {
            let command = who.command();
            // Where the command is not known the user is not either.
            let uid = (!command.is_empty()).then_some(who.uid);
            Arc::new(Origin::new(who.pid, uid, command, cgroups.path_of(who.cgroup)))
        });
        Some(Arc::clone(origin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Op;

    fn event(pid: u32, uid: u32, comm: &[u8]) -> Event {
        Event::told_by(Op::Write, pid, uid, comm)
    }

    #[test]
    fn what_is_not_told_stays_unknown() {
        let mut origins = Origins::new();
        assert_eq!(Who::of(&event(0, 0, b"")), None);
        let gone = origins
            .of(Who::of(&event(7, 0, b"")))
            .expect("the process is told");
        assert_eq!((gone.pid, gone.uid, &*gone.command), (7, None, ""));
        let known = origins
            .of(Who::of(&event(7, 0, b"0123456789abcdef")))
            .expect("all is told");
        assert_eq!((known.uid, &*known.command), (Some(0), "0123456789abcdef"));
        let again = origins.of(Who::of(&event(7, 0, b"0123456789abcdef")));
        assert!(again.is_some_and(|again| Arc::ptr_eq(&again, &known)));
    }
}
