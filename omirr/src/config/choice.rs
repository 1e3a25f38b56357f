//! The words with which a user chooses an event source, on the command line
//! and in the configuration.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

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
