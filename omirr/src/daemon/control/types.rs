//! What is said over the control socket, and printed by `--json`: plain values.
//! Fields are added, never renamed: scripts read them.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::model::Mode;
use crate::source::{About, SourceStats};

/// A request, one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
pub enum Request {
    Status,
    Stats,
    Wait(WaitRequest),
    Log(LogRequest),
    Conflicts(ConflictsRequest),
}

/// The answer to a request, one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply<T> {
    Ok(T),
    Error(String),
}

/// A barrier: until everything that changed before it is durable on the peers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitRequest {
    /// None: every share.
    #[serde(default)]
    pub share: Option<String>,
    /// None: every peer of the share.
    #[serde(default)]
    pub peer: Option<String>,
    pub timeout_ms: u64,
}

/// How a barrier ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitReply {
    /// Whether everything is durable on the peers that were asked for.
    pub done: bool,
    /// Who was behind at the timeout; empty if `done`.
    pub behind: Vec<Lag>,
}

/// One share that one peer does not have in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    pub share: String,
    pub peer: String,
    /// Entries; 0 if it is not known yet how many (the share is being scanned).
    pub behind: u64,
    /// Why, in a few words.
    pub reason: Option<String>,
}

/// A path as bytes: text if it is, for JSON has no other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AnyPath {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<PathBuf> for AnyPath {
    fn from(path: PathBuf) -> AnyPath {
        match path.into_os_string().into_string() {
            Ok(text) => AnyPath::Text(text),
            Err(other) => AnyPath::Bytes(other.as_bytes().to_vec()),
        }
    }
}

impl AnyPath {
    pub fn as_path(&self) -> &Path {
        match self {
            AnyPath::Text(text) => Path::new(text),
            AnyPath::Bytes(bytes) => Path::new(OsStr::from_bytes(bytes)),
        }
    }
}

/// Which path's last change is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRequest {
    /// Absolute, without `.` and `..`.
    pub path: AnyPath,
    /// The same with the links on the way to it resolved.
    #[serde(default)]
    pub resolved: Option<AnyPath>,
}

/// The last change of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogReport {
    pub share: String,
    /// Beneath the share, as `RelPath` shows it.
    pub path: String,
    /// Whether that change deleted it; kind and size are of before then.
    pub deleted: bool,
    pub kind: String,
    /// Of a file.
    pub size: Option<u64>,
    /// When, RFC 3339, by the clock of the node where it was changed.
    pub changed: Option<String>,
    /// The node where it was changed, if its name is known here.
    pub node: Option<String>,
    /// That node's index.
    pub replica: String,
    /// None if the source did not tell.
    pub who: Option<WhoReport>,
    /// Whether the path is the name of a conflict copy.
    pub conflict_copy: bool,
    /// Why changes of the last moments may be missing, if so.
    pub missing: Option<String>,
}

/// Whose conflict copies are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictsRequest {
    /// None: every share's.
    #[serde(default)]
    pub share: Option<String>,
}

/// How many conflict copies a report names; it names fewer if their paths are
/// long.
pub const CONFLICTS_MAX: usize = 10_000;

/// The conflict copies that there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictsReport {
    pub conflicts: Vec<ConflictReport>,
    /// How many there are beyond those.
    pub more: u64,
    /// The shares of which the last moments may be missing.
    pub missing: Vec<MissingReport>,
}

/// A share in which not everything may have been looked at, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingReport {
    pub share: String,
    pub reason: String,
}

/// One conflict copy. What its name does not tell is none, or empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictReport {
    pub share: String,
    /// Beneath the share, as `RelPath` shows it.
    pub path: String,
    /// The same from the filesystem's root.
    pub file: String,
    pub kind: String,
    /// Of a file.
    pub size: Option<u64>,
    /// What stands under the name that the copy had before, if anything does
    /// and it is known which name that was.
    pub winner: Option<String>,
    /// The paths that the copy may have had before: one, if that is known, else
    /// a few.
    pub originals: Vec<String>,
    /// When the version was made that lost, RFC 3339.
    pub made: Option<String>,
    /// The node where it was made, if only one fits the name.
    pub node: Option<String>,
    /// All nodes that fit the name, the likeliest first.
    pub nodes: Vec<String>,
}

/// A process, on the node where it made the change; what is not known is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhoReport {
    pub pid: Option<u32>,
    pub uid: Option<u32>,
    /// That user's name where it is asked, by whoever asks.
    #[serde(default)]
    pub user: Option<String>,
    pub command: Option<String>,
    /// Its path beneath the root of version 2 of cgroups.
    pub cgroup: Option<String>,
    /// omirr did it of its own accord.
    pub omirr: bool,
}

/// What `omirr status` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    pub node: String,
    pub version: String,
    pub pid: u32,
    pub uptime_s: u64,
    pub source: SourceReport,
    pub shares: Vec<ShareReport>,
}

/// Which event source runs, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// `ebpf`, `fanotify` or `scan`.
    pub kind: String,
    pub attach: Option<String>,
    pub transport: Option<String>,
    pub reason: String,
}

impl From<&About> for SourceReport {
    fn from(about: &About) -> SourceReport {
        SourceReport {
            kind: about.kind.to_owned(),
            attach: about.attach.map(str::to_owned),
            transport: about.transport.map(str::to_owned),
            reason: about.reason.clone(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShareState {
    /// The tree is being compared with the index.
    Scanning,
    /// Changes are on their way, in or out.
    Syncing,
    /// Every peer that can be reached has everything, and nothing waits here.
    InSync,
    /// Nothing is done with the tree until a person has looked; see `reason`.
    Stopped,
}

impl ShareState {
    /// The word that people and scripts see.
    pub fn name(self) -> &'static str {
        match self {
            ShareState::Scanning => "scanning",
            ShareState::Syncing => "syncing",
            ShareState::InSync => "in-sync",
            ShareState::Stopped => "stopped",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareReport {
    pub name: String,
    pub path: String,
    pub state: ShareState,
    /// Why it is stopped, or what else a person should know.
    pub reason: Option<String>,
    /// Living entries in the index.
    pub entries: u64,
    /// Entries that came from peers and could not be applied yet.
    pub pending: u64,
    /// Conflict copies that are in the share.
    pub conflicts: u64,
    /// Deleted paths that are remembered, until every peer knows of them.
    #[serde(default)]
    pub tombstones: u64,
    /// What this node cannot have of the entries, and why.
    #[serde(default)]
    pub lacking: Vec<Lacking>,
    /// The first of what is pending.
    pub pending_items: Vec<PendingItem>,
    /// How far a scan is, if one runs.
    pub progress: Option<Progress>,
    pub peers: Vec<PeerReport>,
}

/// How many pending items a report names.
pub const PENDING_ITEMS_MAX: usize = 20;

/// Something that entries have on other nodes and this one cannot have: its
/// filesystem does not keep it, or the daemon may not set it. All else of these
/// entries is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lacking {
    /// In a sentence, the same for all of them.
    pub reason: String,
    /// How many entries lack it.
    pub entries: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingItem {
    /// Beneath the share, as `RelPath` shows it.
    pub path: String,
    /// Whose row it is.
    pub peer: String,
    pub reason: String,
}

/// Work done of work to do, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub done: u64,
    /// As far as is known; the index' size, for a scan.
    pub total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerState {
    Connected,
    Connecting,
    Stopped,
}

impl PeerState {
    pub fn name(self) -> &'static str {
        match self {
            PeerState::Connected => "connected",
            PeerState::Connecting => "connecting",
            PeerState::Stopped => "stopped",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    pub name: String,
    pub address: String,
    pub state: PeerState,
    /// Which way changes go between it and this node.
    #[serde(default)]
    pub mode: Mode,
    /// Entries that this node has and the peer has not acknowledged.
    pub behind: u64,
    pub last_error: Option<String>,
    /// How far the peer's clock is ahead of this node's, ms; below zero if it is
    /// behind. None before it was asked.
    #[serde(default)]
    pub clock_ahead_ms: Option<i64>,
    /// What that means, if it is more than a second.
    #[serde(default)]
    pub clock_warning: Option<String>,
}

/// What `omirr stats` shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatsReport {
    pub source: Option<SourceReport>,
    pub uptime_s: u64,
    /// Events that reached the daemon, since it started.
    pub events: u64,
    pub dropped: u64,
    /// The kernel's buffer; 0 where there is none.
    pub buffer_bytes: u64,
    pub high_water_bytes: u64,
    pub per_cpu: Vec<CpuReport>,
    pub hooks: Vec<HookReport>,
    pub resolver: ResolverReport,
    pub event_to_row_ms: Percentiles,
    pub overflow: OverflowReport,
    #[serde(default)]
    pub shares: Vec<ShareFigures>,
    /// Changes merged into one that was already waiting.
    #[serde(default)]
    pub coalesced: u64,
    /// The kernel's map of changes; 0 where there is none.
    #[serde(default)]
    pub map_entries: u64,
    #[serde(default)]
    pub map_capacity: u64,
    /// As in [`SourceStats`].
    #[serde(default)]
    pub overflows: u64,
    #[serde(default)]
    pub recovered: u64,
    #[serde(default)]
    pub dirs_compared: u64,
    #[serde(default)]
    pub lost: u64,
    #[serde(default)]
    pub taken_over: u64,
}

/// What a share's tasks have done since the daemon started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareFigures {
    pub name: String,
    /// Rows for changes made on this node.
    pub rows_made: u64,
    /// Rows of peers that were applied.
    pub rows_applied: u64,
    /// Contents, without what is around them and before compression.
    pub content_sent_bytes: u64,
    pub content_received_bytes: u64,
    /// Times the tree was compared with the index, the one at start included.
    pub rescans: u64,
}

impl StatsReport {
    /// Takes over what the source counts.
    pub fn set_source(&mut self, about: &About, stats: &SourceStats) {
        self.source = Some(about.into());
        self.events = stats.events;
        self.dropped = stats.dropped;
        self.buffer_bytes = stats.buffer_bytes;
        self.high_water_bytes = stats.high_water_bytes;
        let cpu = |c: &crate::source::CpuStats| CpuReport {
            cpu: c.cpu,
            submitted: c.submitted,
            dropped: c.dropped,
            coalesced: c.coalesced,
        };
        self.per_cpu = stats.per_cpu.iter().map(cpu).collect();
        let hook = |h: &crate::source::HookStats| HookReport {
            hook: h.hook.clone(),
            attached: h.attached,
            note: h.note.clone(),
            hits: h.hits,
        };
        self.hooks = stats.hooks.iter().map(hook).collect();
        self.coalesced = stats.coalesced;
        self.map_entries = stats.map_entries;
        self.map_capacity = stats.map_capacity;
        self.overflows = stats.overflows;
        self.recovered = stats.recovered;
        self.dirs_compared = stats.dirs_compared;
        self.lost = stats.lost;
        self.taken_over = stats.taken_over;
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuReport {
    pub cpu: u32,
    pub submitted: u64,
    pub dropped: u64,
    #[serde(default)]
    pub coalesced: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookReport {
    pub hook: String,
    pub attached: bool,
    pub note: Option<String>,
    pub hits: u64,
}

/// How events' inodes were turned into paths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolverReport {
    pub hits: u64,
    pub misses: u64,
    /// Misses that cost a lookup by handle or a scan of a subtree.
    pub fallbacks: u64,
}

/// None until there is anything to measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    pub p50: Option<f64>,
    pub p99: Option<f64>,
}

/// What the source lost, and what was done about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverflowReport {
    /// How often events were lost.
    pub count: u64,
    /// When last, RFC 3339.
    pub last: Option<String>,
    /// What happened, in a sentence.
    #[serde(default)]
    pub happened: Option<String>,
    /// What brought the lost changes back.
    pub recovered_how: Option<String>,
    /// Which setting to change, if that would help.
    pub advice: Option<String>,
}
