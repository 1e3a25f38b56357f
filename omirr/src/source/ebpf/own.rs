//! How the programs tell the daemon's own changes.
//!
//! In: a process number of this process number space. Out: what goes into the
//! programs' control map.

/// The number of the first process number space, the same on every Linux.
const FIRST_PID_SPACE: u64 = 0xEFFF_FFFC;

/// A process, as the programs tell it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// 0: none.
    pub tgid: u64,
    /// In hundredths of a second since boot; 0: unknown.
    pub start: u64,
    /// (device, inode) of its number space; zeros in the first one.
    pub space: (u64, u64),
}

impl Own {
    pub fn of(pid: Option<u32>) -> Own {
        let Some(pid) = pid else {
            return Own::default();
        };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        Own {
            tgid: pid.into(),
            start: start_of(&stat).unwrap_or(0),
            space: pid_space(),
        }
    }
}

/// Field 22 of `/proc/PID/stat`; the second one is a name in brackets that may
/// hold anything.
fn start_of(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

/// The process number space of this process, as the helper wants it; zeros in
/// the first one, where the plain number is right.
fn pid_space() -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata("/proc/self/ns/pid") {
        Ok(space) if space.ino() != FIRST_PID_SPACE => {
            let dev = space.dev();
            let dev = u64::from(rustix::fs::major(dev)) << 20 | u64::from(rustix::fs::minor(dev));
            (dev, space.ino())
        }
        _ => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_is_found_behind_any_name() {
        let stat = format!("7 (a) b) S {} 4711 8 9", vec!["0"; 18].join(" "));
        assert_eq!(start_of(&stat), Some(4711));
        assert_eq!(start_of(""), None);
        assert!(Own::of(Some(std::process::id())).start > 0);
    }
}
