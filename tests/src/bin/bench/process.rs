//! Processes of the tools, and what they use.
//!
//! In: commands. Out: how they ended, the processor time and the bytes read of
//! all that was ever started here, and resident memory. Each process leads a
//! group of its own, which ends with the value, and dies with this program.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::stop::{self, TimedOut};

/// How long a process may take to end when it is asked to.
const GRACE: Duration = Duration::from_secs(10);
/// How often a wait looks at the memory, and whether the user wants to end.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// A process and its group.
pub struct Process {
    child: Child,
    what: String,
    log: PathBuf,
    ended: Option<Ended>,
    most_resident: u64,
}

/// How a process ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    pub code: Option<i32>,
    /// The most memory that it had resident when last looked at, in bytes. What
    /// `wait4` tells begins with this program's own, of which it is a fork.
    pub most_resident: u64,
}

/// Makes the command lead a group of its own and die with this program.
pub fn alone(command: &mut Command) -> &mut Command {
    command.process_group(0);
    // SAFETY: prctl is a plain system call, allowed after fork.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command
}

impl Process {
    /// Starts it; what it says is appended to `log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(mut command: Command, log: &Path) -> Result<Process> {
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("{} cannot be written", log.display()))?;
        let what = xtask::shell::describe(&command);
        let child = alone(&mut command)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("`{what}` cannot be started"))?;
        Ok(Process {
            child,
            what,
            log: log.to_owned(),
            ended: None,
            most_resident: 0,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn group(&self) -> Pid {
        let number = i32::try_from(self.child.id()).expect("process numbers are small");
        Pid::from_raw(number).expect("process numbers are positive")
    }

    /// Fails if it has ended.
    pub fn must_run(&mut self) -> Result<()> {
        if self.collect()? {
            bail!("`{}` has ended: {}", self.what, self.last_words());
        }
        Ok(())
    }

    /// Waits for its end, which must be one of these codes.
    ///
    /// # Errors
    /// Another end, or none in time.
    pub fn finish(&mut self, end: Instant, good: &[i32]) -> Result<Ended> {
        let door = pidfd_open(self.group(), PidfdFlags::empty())?;
        while !self.collect()? {
            self.most_resident = self.most_resident.max(most_resident(self.pid()));
            stop::check()?;
            if Instant::now() > end {
                return Err(TimedOut.into());
            }
            let mut doors = [PollFd::new(&door, PollFlags::IN)];
            // An interrupted wait is a wait that looks again.
            let _ = poll(&mut doors, Some(&TICK));
        }
        let ended = self.ended.expect("it has just ended");
        if !ended.code.is_some_and(|code| good.contains(&code)) {
            bail!("`{}` failed: {}", self.what, self.last_words());
        }
        Ok(ended)
    }

    /// Whether it has ended.
    fn collect(&mut self) -> Result<bool> {
        if self.ended.is_some() {
            return Ok(true);
        }
        let status = self
            .child
            .try_wait()
            .with_context(|| format!("`{}` cannot be waited for", self.what))?;
        self.ended = status.map(|status| Ended {
            code: status.code(),
            most_resident: self.most_resident,
        });
        Ok(self.ended.is_some())
    }

    /// The end of what it said.
    pub fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(3)..].join("; ")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let end = Instant::now() + GRACE;
        // Each may fail because all have ended, which is what is wanted.
        let _ = kill_process_group(self.group(), Signal::TERM);
        while matches!(self.collect(), Ok(false)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = kill_process_group(self.group(), Signal::KILL);
        while matches!(self.collect(), Ok(false)) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What all processes that this program started have used so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    pub cpu_s: f64,
    /// Through read calls, from sockets and pipes as well.
    pub read_bytes: f64,
}

impl Used {
    pub fn now() -> Used {
        // SAFETY: all-zero is a valid rusage, which outlives the call.
        let ended = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
            usage
        };
        let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
        let mut used = Used {
            cpu_s: seconds(ended.ru_utime) + seconds(ended.ru_stime),
            read_bytes: read_by("/proc/self/io"),
        };
        // What this program's own threads read is not the tools'.
        for task in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            used.read_bytes -= read_by(task.path().join("io"));
        }
        for process in descendants(std::process::id()) {
            used.cpu_s += process.ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
            used.read_bytes += read_by(format!("/proc/{}/io", process.pid));
        }
        used
    }

    pub fn since(self, before: Used) -> Used {
        Used {
            cpu_s: (self.cpu_s - before.cpu_s).max(0.0),
            read_bytes: (self.read_bytes - before.read_bytes).max(0.0),
        }
    }
}

fn read_by(file: impl AsRef<Path>) -> f64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("rchar: "));
    line.and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

struct Living {
    pid: u32,
    parent: u32,
    /// Of itself and of its children that have ended.
    ticks: u64,
    resident: u64,
}

/// From `/proc/PID/stat`.
fn living(pid: u32, stat: &str) -> Option<Living> {
    // The name, in brackets, may hold anything.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 2..].split_whitespace().collect();
    let number = |field: usize| fields.get(field)?.parse::<u64>().ok();
    Some(Living {
        pid,
        parent: u32::try_from(number(1)?).ok()?,
        ticks: (11..15).map_while(number).sum(),
        resident: number(21)? * rustix::param::page_size() as u64,
    })
}

/// All processes beneath that one.
fn descendants(root: u32) -> Vec<Living> {
    let mut children: HashMap<u32, Vec<Living>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if let Some(process) = living(pid, &stat) {
            children.entry(process.parent).or_default().push(process);
        }
    }
    let mut found = Vec::new();
    let mut roots = vec![root];
    while let Some(root) = roots.pop() {
        for child in children.remove(&root).unwrap_or_default() {
            roots.push(child.pid);
            found.push(child);
        }
    }
    found
}

/// Resident memory of a process and all beneath it.
pub fn resident(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let own = living(pid, &stat).map_or(0, |process| process.resident);
    own + descendants(pid).iter().map(|child| child.resident).sum::<u64>()
}

/// The most memory that a process had resident so far.
pub fn most_resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    number.unwrap_or(0) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_confuse() {
        let stat = "7 (a) b) S 3 7 7 0 -1 0 0 0 0 0 10 20 1 2 20 0 1 0 100 4096 5 0";
        let process = living(7, stat).expect("it is a whole line");
        assert_eq!(process.parent, 3);
        assert_eq!(process.ticks, 33);
        assert_eq!(process.resident, 5 * rustix::param::page_size() as u64);
    }

    #[test]
    fn processor_time_of_a_child_is_counted() {
        let before = Used::now();
        let busy = Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"])
            .status();
        assert!(busy.expect("there is a shell").success());
        assert!(Used::now().since(before).cpu_s > 0.01);
    }

    #[test]
    fn a_process_that_fails_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo gone; exit 3"]);
        let mut process = Process::start(command, &folder.path().join("log")).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        let error = process.finish(end, &[0]).unwrap_err().to_string();
        assert!(error.contains("gone"), "{error}");
    }
}
