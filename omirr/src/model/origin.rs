//! Who made a change, as a row carries it to every node.
//!
//! For people who ask (`omirr log`): no decision looks at it, and of two rows
//! that are the same but for it neither is newer. Which node it was and when
//! stand in the row's stamp.

use serde::{Deserialize, Serialize};

/// The longest command that is kept, bytes: what the kernel keeps.
pub const COMMAND_BYTES_MAX: usize = 16;
/// The longest path of a cgroup that is kept, bytes.
pub const CGROUP_BYTES_MAX: usize = 255;
/// The command of what the daemon itself changes.
const DAEMON: &str = "omirr";

/// A process, as the node saw it on which it made the change.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// 0 for omirr itself, and where it is not known.
    pub pid: u32,
    /// On the node of the change; users have other names elsewhere.
    pub uid: Option<u32>,
    /// As `ps -o comm` shows it; empty where it is not known.
    pub command: Box<str>,
    /// Its cgroup's path (version 2), `/system.slice/nginx.service` say; empty
    /// where it is not known. Of a longer one the end.
    pub cgroup: Box<str>,
}

impl Origin {
    /// Takes what the kernel says, and makes it fit to be sent and shown.
    pub fn new(pid: u32, uid: Option<u32>, command: &[u8], cgroup: &str) -> Origin {
        let mut command = shown(&String::from_utf8_lossy(command));
        command.truncate(command.floor_char_boundary(COMMAND_BYTES_MAX));
        let mut cgroup = shown(cgroup);
        if cgroup.len() > CGROUP_BYTES_MAX {
            // The end says most: the unit, the container.
            let start = cgroup.ceil_char_boundary(cgroup.len() - CGROUP_BYTES_MAX);
            cgroup.drain(..start);
        }
        Origin {
            pid,
            uid,
            command: command.into(),
            cgroup: cgroup.into(),
        }
    }

    /// Of what the daemon changes of its own accord: conflict copies, and
    /// directories that come back because something lives in them.
    pub fn daemon() -> Origin {
        Origin::new(0, None, DAEMON.as_bytes(), "")
    }

    /// Whether it is what [`Origin::daemon`] gives.
    pub fn is_daemon(&self) -> bool {
        self.pid == 0 && &*self.command == DAEMON
    }
}

/// Commands are any bytes that a process chooses.
fn shown(text: &str) -> String {
    text.replace(char::is_control, "?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_calls_itself_is_made_fit_to_be_shown() {
        let long = format!("/kubepods.slice/{}/crio-1.scope", "ä".repeat(150));
        let origin = Origin::new(7, Some(33), b"a\x1b[2J\xff\xff\xff\xff\xff", &long);
        assert_eq!(&*origin.command, "a?[2J\u{fffd}\u{fffd}\u{fffd}");
        assert!(origin.command.len() <= COMMAND_BYTES_MAX);
        assert!(origin.cgroup.len() <= CGROUP_BYTES_MAX && origin.cgroup.len() > CGROUP_BYTES_MAX - 3);
        assert!(origin.cgroup.ends_with("/crio-1.scope"));
        assert!(!origin.is_daemon() && Origin::daemon().is_daemon());
    }
}
