//! The words with which a user chooses an event source, on the command line
//! and in the configuration. What they come to on a given host is `auto.rs`'
//! business.

use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How often the tree is compared when nothing better than a scan works.
pub const SCAN_INTERVAL: Duration = Duration::from_secs(10);
/// The size of the kernel's event ring unless the configuration says other.
pub const RING_BYTES: usize = 8 << 20;

/// Changed inodes that can wait in the kernel to be taken.
pub const DIRTY_ENTRIES: u32 = 65_536;

/// Where changes shall come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// The best one that works here: ebpf, else fanotify, else scan.
    #[default]
    Auto,
    /// Programs in the kernel: byte ranges, stores through mmap, little cost.
    Ebpf,
    /// The kernel's notification queue: whole files, no byte ranges.
    Fanotify,
    /// No events: compare the tree every few seconds.
    Scan,
}

/// How eBPF programs are attached to kernel functions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attach {
    /// fentry where it loads, else kprobe.
    #[default]
    Auto,
    /// Trampolines: cheap, need the kernel's type information (BTF).
    Fentry,
    /// Probes: every kernel that has kprobes.
    Kprobe,
}

/// How eBPF programs hand their events over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// The ring buffer where the kernel has it, else perf.
    #[default]
    Auto,
    /// The BPF ring buffer, one for all CPUs.
    Ring,
    /// The perf ring buffer, one per CPU.
    Perf,
}

/// How much a source goes out of its way to tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// What mirroring needs and nothing more.
    #[default]
    Lean,
    /// For a person who watches: also who did it, and changes in directories
    /// that have left or are gone by the time their event is read. fanotify then
    /// tells of the whole filesystem, and the listener picks what it knows.
    Full,
}

/// What was asked for.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    pub source: SourceKind,
    pub attach: Attach,
    pub transport: Transport,
    pub ring_bytes: usize,
    pub scan_interval: Duration,
    pub detail: Detail,
    /// Where a source keeps what it needs to go on without the daemon; none: it
    /// ends with it.
    pub keep: Option<std::path::PathBuf>,
}

impl Default for SourceConfig {
    fn default() -> SourceConfig {
        SourceConfig {
            source: SourceKind::Auto,
            attach: Attach::Auto,
            transport: Transport::Auto,
            ring_bytes: RING_BYTES,
            scan_interval: SCAN_INTERVAL,
            detail: Detail::Lean,
            keep: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_words_work_in_configuration_and_on_the_command_line() {
        for kind in SourceKind::value_variants() {
            let word = kind
                .to_possible_value()
                .expect("no variant is hidden")
                .get_name()
                .to_owned();
            let read: SourceKind = serde_json::from_value(word.clone().into()).expect("word");
            assert_eq!(read, *kind);
            assert_eq!(
                serde_json::to_value(kind).expect("word"),
                serde_json::Value::String(word)
            );
        }
        assert!(serde_json::from_str::<SourceKind>("\"inotify\"").is_err());
    }
}
