//! Where a run takes place, for the report.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::figures::number;

/// `(what, value)`.
pub fn describe(disk: &str) -> Vec<(String, String)> {
    let cpu = first_value("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = memory_kib("MemTotal") as f64;
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let system = system
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .unwrap_or("unknown");
    [
        ("processor", format!("{cpu}, {cores} cores")),
        ("memory", format!("{} GiB", number(memory / f64::from(1 << 20)))),
        ("disk", disk.to_owned()),
        ("kernel", first_word("uname", &["-r"])),
        ("system", system.trim_matches('"').to_owned()),
        (LOAD, load()),
    ]
    .map(|(what, value)| (what.to_owned(), value))
    .to_vec()
}

/// What the load is called in a description.
const LOAD: &str = "load at the start";

/// The load that a description tells.
pub fn load_of(machine: &[(String, String)]) -> Option<f64> {
    let (_, load) = machine.iter().find(|(what, _)| what == LOAD)?;
    load.parse().ok()
}

/// What else ran: of the last minute.
fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}

/// Memory that a process can have without anybody being put out, bytes.
pub fn available_memory() -> u64 {
    memory_kib("MemAvailable") << 10
}

fn memory_kib(key: &str) -> u64 {
    first_value("/proc/meminfo", key)
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn first_value(file: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn first_word(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output();
    out.map_or_else(
        |_| "unknown".to_owned(),
        |out| String::from_utf8_lossy(&out.stdout).trim().to_owned(),
    )
}

/// The commit that is measured; `+` if files differ from it.
pub fn commit() -> String {
    let root = xtask::workspace::root();
    let git = |args: &[&str]| {
        let out = Command::new("git")
            .arg("-C")
            .arg(&root)
            .args(args)
            .output()
            .ok()?;
        out.status
            .success()
            .then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else {
        return "unknown".to_owned();
    };
    let changed = git(&[
        "status",
        "--porcelain",
        "--",
        "omirr",
        "omirr-common",
        "omirr-ebpf",
    ]);
    let mark = if changed.is_some_and(|files| !files.is_empty()) {
        "+"
    } else {
        ""
    };
    format!("{commit}{mark}")
}

/// The kind of filesystem that holds this folder.
pub fn filesystem(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    kind_of(&mounts, &folder).unwrap_or_else(|| "unknown".to_owned())
}

fn kind_of(mounts: &str, folder: &Path) -> Option<String> {
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let above = mounts.filter(|(place, _)| folder.starts_with(place));
    // Of two at one place the later is seen.
    let (_, kind) = above.max_by_key(|(place, _)| place.len())?;
    Some(kind.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_mount_holds_the_folder() {
        let mounts = "d / ext4 rw 0 0\nt /tmp tmpfs rw 0 0\nx /tmporary xfs rw 0 0\n";
        let kind = |folder: &str| kind_of(mounts, Path::new(folder)).unwrap();
        assert_eq!(kind("/tmp/a"), "tmpfs");
        assert_eq!(kind("/tmpfile"), "ext4");
        assert_eq!(kind("/tmporary"), "xfs");
    }
}
