//! Settings into the programs, programs into the kernel.
//!
//! In: the object, the kernel's layout, the watched devices. Out: attached
//! programs, their maps, and for each hook how it is attached or why it is not.
//! One call tries one way of attaching and one ring; it never falls back by
//! itself, except that a single function which cannot be traced is probed.

use std::{
    collections::HashSet,
    error::Error as _,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, PerfEventArray, RingBuf},
    programs::{FEntry, FExit, KProbe, Program, ProgramError},
};
use omirr_common::{
    event::{Frame, FrameKey},
    hooks::{self as id, Timing},
    identity::{RootKey, device as bit},
    settings::{Settings, transport},
};

use super::{
    btf::KERNEL_BTF,
    counts::{Counts, passed_over},
    device::Device,
    hooks::{Layout, Need, SPECS, Spec, funnels, write_iter_slots},
};

/// The number of the first process number space, the same on every Linux.
const FIRST_PID_SPACE: u64 = 0xEFFF_FFFC;
/// The kernel's `ENOTSUPP`, which user space has no name for.
const ENOTSUPP: i32 = 524;
const PAGE: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attaching {
    Fentry,
    Kprobe,
}

impl Attaching {
    pub fn name(self) -> &'static str {
        match self {
            Attaching::Fentry => "fentry",
            Attaching::Kprobe => "kprobe",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    Ring,
    Perf,
}

impl Carrier {
    pub fn name(self) -> &'static str {
        match self {
            Carrier::Ring => "ring",
            Carrier::Perf => "perf",
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    #[error("{what}: {why}")]
    Refused { what: String, why: String },
    #[error("the {transport} buffer cannot be made: {why}")]
    Transport { transport: &'static str, why: String },
    #[error("{function} is needed and cannot be hooked: {why}")]
    Hook { function: &'static str, why: String },
    #[error("the eBPF object in this omirr lacks {0}; build it again with `cargo xtask build`")]
    Object(String),
}

impl LoadError {
    /// Whether another transport may do better.
    pub fn is_about_transport(&self) -> bool {
        matches!(self, LoadError::Transport { .. })
    }
}

/// A watched tree, as the programs need it.
#[derive(Clone, Debug)]
pub struct WatchedDevice {
    pub device: Device,
    pub stat_dev: u64,
    pub root_ino: u64,
}

pub struct Plan<'a> {
    pub object: &'a [u8],
    pub layout: &'a Layout,
    pub devices: &'a [WatchedDevice],
    pub attach: Attaching,
    pub transport: Carrier,
    pub ring_bytes: usize,
    pub own_pid: Option<u32>,
}

/// How one hook ended up.
#[derive(Clone, Debug)]
pub struct HookState {
    pub id: u8,
    pub function: &'static str,
    pub attached: bool,
    /// Why not, and what covers it; or what is unusual.
    pub note: Option<String>,
}

/// What stays readable while the programs run.
pub struct Maps {
    pub counts: Counts,
    /// Operations between entry and exit.
    frames: HashMap<MapData, FrameKey, Frame>,
    /// The attached programs.
    programs: Vec<OwnedFd>,
}

impl Maps {
    /// Operations that have begun and not ended.
    pub fn frames(&self) -> impl Iterator<Item = (FrameKey, Frame)> + '_ {
        self.frames.iter().filter_map(Result::ok)
    }

    /// How often the kernel passed over one of the programs.
    pub fn passed_over(&self) -> u64 {
        self.programs.iter().map(|p| passed_over(p.as_fd())).sum()
    }
}

/// Attached programs. Dropping it detaches them.
pub struct Loaded {
    pub attach: Attaching,
    pub transport: Carrier,
    pub hooks: Vec<HookState>,
    pub maps: Arc<Maps>,
    pub buffer_bytes: u64,
    /// Taken by the reader.
    pub ring: Option<RingBuf<MapData>>,
    pub perf: Option<PerfEventArray<MapData>>,
    _programs: Ebpf,
}

/// Loads and attaches as planned.
pub fn load(plan: &Plan<'_>) -> Result<Loaded, LoadError> {
    let types = Btf::from_sys_fs().map_err(|e| LoadError::Refused {
        what: KERNEL_BTF.to_owned(),
        why: e.to_string(),
    })?;
    // A filesystem's own write that turns out not to be attachable is given
    // up, and the hooks above it speak for that filesystem.
    let mut unusable: HashSet<u8> = HashSet::new();
    loop {
        match load_once(plan, &types, &unusable)? {
            Outcome::Loaded(loaded) => return Ok(*loaded),
            Outcome::Without(hook) => {
                unusable.insert(hook);
            }
        }
    }
}

enum Outcome {
    Loaded(Box<Loaded>),
    /// Try again without this hook.
    Without(u8),
}

fn load_once(plan: &Plan<'_>, types: &Btf, unusable: &HashSet<u8>) -> Result<Outcome, LoadError> {
    let modules = module_functions(plan);
    let usable = |hook: u8| {
        let index = usize::from(hook);
        !unusable.contains(&hook)
            && (plan.layout.missing[index].is_none() || modules.contains(id::HOOKS[index].0))
    };
    let funnel_of = |d: &WatchedDevice| funnels(&d.device.filesystem).iter().copied().find(|&h| usable(h));
    let used: HashSet<u8> = plan.devices.iter().filter_map(funnel_of).collect();
    let above = plan.devices.iter().any(|d| funnel_of(d).is_none());
    let bits = |d: &WatchedDevice| {
        let mut bits = bit::WATCHED;
        if d.device.whole {
            bits |= bit::WHOLE;
        }
        if funnel_of(d).is_some() {
            bits |= bit::FUNNEL;
        }
        bits
    };

    let (mut ebpf, buffer_bytes) = make_maps(plan, &modules, bits)?;
    {
        let roots = ebpf
            .map_mut("ROOTS")
            .ok_or_else(|| LoadError::Object("map ROOTS".into()))?;
        let mut roots = HashMap::<_, RootKey, u32>::try_from(roots).map_err(map_error)?;
        for d in plan.devices {
            let key = RootKey {
                dev: d.device.kernel_dev,
                reserved: 0,
                ino: d.root_ino,
            };
            roots.insert(key, 1, 0).map_err(map_error)?;
        }
    }
    {
        let devices = ebpf
            .map_mut("DEVICES")
            .ok_or_else(|| LoadError::Object("map DEVICES".into()))?;
        let mut devices = HashMap::<_, u32, u32>::try_from(devices).map_err(map_error)?;
        for d in plan.devices {
            // Two shares on one device: it is whole if one of them is.
            let so_far = devices.get(&d.device.kernel_dev, 0).unwrap_or(0);
            devices
                .insert(d.device.kernel_dev, so_far | bits(d), 0)
                .map_err(map_error)?;
        }
    }

    let mut states = Vec::with_capacity(SPECS.len());
    for spec in SPECS {
        let wanted = match spec.need {
            Need::Always | Need::Covered(_) => true,
            Need::Funnel => used.contains(&spec.id),
            Need::AboveFunnel => above,
        };
        if !wanted {
            states.push(HookState {
                id: spec.id,
                function: spec.function(),
                attached: false,
                note: Some(not_wanted(spec)),
            });
            continue;
        }
        match attach_hook(&mut ebpf, spec, plan, types, &modules) {
            Ok(note) => states.push(HookState {
                id: spec.id,
                function: spec.function(),
                attached: true,
                note,
            }),
            Err(why) => match spec.need {
                Need::Funnel => {
                    tracing::debug!(hook = spec.function(), why, "cannot be hooked");
                    return Ok(Outcome::Without(spec.id));
                }
                Need::Always => {
                    return Err(LoadError::Hook {
                        function: spec.function(),
                        why,
                    });
                }
                Need::Covered(cover) => states.push(HookState {
                    id: spec.id,
                    function: spec.function(),
                    attached: false,
                    note: Some(format!("{why}; covered by {cover}")),
                }),
                Need::AboveFunnel => states.push(HookState {
                    id: spec.id,
                    function: spec.function(),
                    attached: false,
                    note: Some(format!("{why}; covered by __fput: seen when the file is closed")),
                }),
            },
        }
    }
    if above && !states.iter().any(|s| s.attached && s.id == id::VFS_WRITE) {
        return Err(LoadError::Hook {
            function: "vfs_write",
            why: "and no filesystem's own write stands in for it".into(),
        });
    }

    let processors = possible_cpus();
    let (counters, hits) = (take(&mut ebpf, "COUNTERS")?, take(&mut ebpf, "HITS")?);
    let (Map::Array(counters), Map::Array(hits)) = (counters, hits) else {
        return Err(LoadError::Object("the counters' arrays".into()));
    };
    let counts = Counts::new(counters.fd().as_fd(), hits.fd().as_fd(), processors).map_err(|e| {
        LoadError::Refused {
            what: "the programs' counters".to_owned(),
            why: e.to_string(),
        }
    })?;
    let programs = ebpf
        .programs()
        .filter_map(|(_, program)| program.fd().ok()?.as_fd().try_clone_to_owned().ok())
        .collect();
    let maps = Arc::new(Maps {
        counts,
        frames: HashMap::try_from(take(&mut ebpf, "FRAMES")?).map_err(map_error)?,
        programs,
    });
    let (mut ring, mut perf) = (None, None);
    match plan.transport {
        Carrier::Ring => {
            ring = Some(RingBuf::try_from(take(&mut ebpf, "RING")?).map_err(|e| transport_error(plan, &e))?);
        }
        Carrier::Perf => {
            perf = Some(
                PerfEventArray::try_from(take(&mut ebpf, "PERF")?).map_err(|e| transport_error(plan, &e))?,
            );
        }
    }
    Ok(Outcome::Loaded(Box::new(Loaded {
        attach: plan.attach,
        transport: plan.transport,
        hooks: states,
        maps,
        buffer_bytes,
        ring,
        perf,
        _programs: ebpf,
    })))
}

/// Patches the settings in and creates the maps.
fn make_maps(
    plan: &Plan<'_>,
    modules: &HashSet<&'static str>,
    bits: impl Fn(&WatchedDevice) -> u32,
) -> Result<(Ebpf, u64), LoadError> {
    let mut kernel_devs: Vec<u32> = plan.devices.iter().map(|d| d.device.kernel_dev).collect();
    kernel_devs.dedup();
    let one = if let [one] = kernel_devs[..] { one } else { 0 };
    let (pid_space_dev, pid_space_ino) = pid_space();
    let settings = Settings {
        own_tgid: plan.own_pid.unwrap_or(0),
        transport: match plan.transport {
            Carrier::Ring => transport::RING,
            Carrier::Perf => transport::PERF,
        },
        one_dev: one,
        one_dev_flags: plan.devices.iter().fold(0, |all, d| all | bits(d)),
        pid_space_dev,
        pid_space_ino,
    };
    let mut slots = plan.layout.slots;
    for spec in SPECS.iter().filter(|s| modules.contains(s.function())) {
        slots.0[usize::from(spec.id)] = write_iter_slots();
    }
    let ring_bytes = plan.ring_bytes.max(PAGE).next_power_of_two();
    let buffer_bytes = match plan.transport {
        Carrier::Ring => ring_bytes,
        Carrier::Perf => perf_pages(plan.ring_bytes) * PAGE * online_cpus(),
    };
    let ring_map = match plan.transport {
        Carrier::Ring => u32::try_from(ring_bytes).unwrap_or(1 << 31),
        Carrier::Perf => PAGE as u32,
    };
    let processors = possible_cpus() as u32;
    let ebpf = EbpfLoader::new()
        .override_global("SETTINGS", &settings, true)
        .override_global("OFFSETS", &plan.layout.offsets, true)
        .override_global("SLOTS", &slots, true)
        .map_max_entries("RING", ring_map)
        .map_max_entries("COUNTERS", processors)
        .map_max_entries("HITS", processors * id::HOOK_COUNT as u32)
        .load(plan.object)
        .map_err(|e| {
            let what = "the kernel refuses the maps of the tracing programs".to_owned();
            let why = chain(&e);
            if plan.transport == Carrier::Ring && why.contains("RING") {
                LoadError::Transport {
                    transport: "ring",
                    why,
                }
            } else {
                LoadError::Refused { what, why }
            }
        })?;
    Ok((ebpf, buffer_bytes as u64))
}

/// Pages of one processor's perf buffer.
pub fn perf_pages(ring_bytes: usize) -> usize {
    let pages = ring_bytes / PAGE / online_cpus();
    // Rounded down to a power of two, and never less than holds some records.
    (pages.max(8) + 1).next_power_of_two() / 2
}

fn online_cpus() -> usize {
    aya::util::online_cpus().map_or(1, |cpus| cpus.len().max(1))
}

fn possible_cpus() -> usize {
    aya::util::nr_cpus().unwrap_or(1)
}

/// Loads and attaches one hook's programs; a note if it went another way.
fn attach_hook(
    ebpf: &mut Ebpf,
    spec: &Spec,
    plan: &Plan<'_>,
    types: &Btf,
    modules: &HashSet<&'static str>,
) -> Result<Option<String>, String> {
    let in_module = modules.contains(spec.function());
    if !in_module && let Some(why) = &plan.layout.missing[usize::from(spec.id)] {
        return Err(why.clone());
    }
    if plan.attach == Attaching::Kprobe {
        return probe_hook(ebpf, spec)
            .map(|()| None)
            .map_err(|e| program_error(&e));
    }
    if in_module {
        return probe_hook(ebpf, spec)
            .map(|()| Some("by kprobe, because it is in a module".to_owned()))
            .map_err(|e| program_error(&e));
    }
    match trace_hook(ebpf, spec, types) {
        Ok(()) => Ok(None),
        // If the plainest hook cannot be traced none can: this way is closed.
        Err(error) if spec.id == id::VFS_OPEN => Err(program_error(&error)),
        Err(error) => {
            let why = program_error(&error);
            probe_hook(ebpf, spec)
                .map(|()| Some(format!("by kprobe, because it cannot be traced: {why}")))
                .map_err(|e| format!("{why}; by kprobe: {}", program_error(&e)))
        }
    }
}

/// The exit before the entry, so that no entry is without its exit.
fn trace_hook(ebpf: &mut Ebpf, spec: &Spec, types: &Btf) -> Result<(), ProgramError> {
    let function = spec.function();
    if spec.timing() != Timing::Entry {
        let program: &mut FExit = program(ebpf, &spec.program("fexit"))?.try_into()?;
        program.load(function, types)?;
        program.attach()?;
    }
    if spec.timing() != Timing::Exit {
        let program: &mut FEntry = program(ebpf, &spec.program("fentry"))?.try_into()?;
        program.load(function, types)?;
        program.attach()?;
    }
    Ok(())
}

fn probe_hook(ebpf: &mut Ebpf, spec: &Spec) -> Result<(), ProgramError> {
    for flavour in ["kretprobe", "kprobe"] {
        if flavour == "kretprobe" && spec.timing() == Timing::Entry {
            continue;
        }
        let program: &mut KProbe = program(ebpf, &spec.program(flavour))?.try_into()?;
        program.load()?;
        program.attach(spec.function(), 0)?;
    }
    Ok(())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, ProgramError> {
    ebpf.program_mut(name).ok_or(ProgramError::UnexpectedProgramType)
}

/// Loads and attaches a single hook, to learn whether this way is open.
pub fn trial(plan: &Plan<'_>) -> Result<(), LoadError> {
    let types = Btf::from_sys_fs().map_err(|e| LoadError::Refused {
        what: KERNEL_BTF.to_owned(),
        why: e.to_string(),
    })?;
    let modules = HashSet::new();
    let (mut ebpf, _) = make_maps(plan, &modules, |_| 0)?;
    let spec = &SPECS[usize::from(id::VFS_OPEN)];
    attach_hook(&mut ebpf, spec, plan, &types, &modules)
        .map(drop)
        .map_err(|why| LoadError::Hook {
            function: spec.function(),
            why,
        })
}

/// Which filesystems' own writes are wanted and live in a module.
fn module_functions(plan: &Plan<'_>) -> HashSet<&'static str> {
    let wanted: Vec<&'static str> = plan
        .devices
        .iter()
        .flat_map(|d| funnels(&d.device.filesystem))
        .map(|&hook| usize::from(hook))
        .filter(|&hook| plan.layout.missing[hook].is_some())
        .map(|hook| id::HOOKS[hook].0)
        .collect();
    if wanted.is_empty() {
        return HashSet::new();
    }
    let symbols = std::fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    symbols
        .lines()
        .filter(|line| line.contains('['))
        .filter_map(|line| line.split_ascii_whitespace().nth(2))
        .filter_map(|name| wanted.iter().copied().find(|w| *w == name))
        .collect()
}

fn not_wanted(spec: &Spec) -> String {
    match spec.need {
        Need::Funnel => "no share lies on such a filesystem".to_owned(),
        _ => "not needed: the filesystems' own writes are hooked".to_owned(),
    }
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

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map, LoadError> {
    ebpf.take_map(name)
        .ok_or_else(|| LoadError::Object(format!("map {name}")))
}

fn map_error(error: aya::maps::MapError) -> LoadError {
    LoadError::Refused {
        what: "a map of the tracing programs".to_owned(),
        why: chain(&error),
    }
}

fn transport_error(plan: &Plan<'_>, error: &dyn std::error::Error) -> LoadError {
    LoadError::Transport {
        transport: plan.transport.name(),
        why: chain(error),
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// What the kernel meant, in plain words.
fn program_error(error: &ProgramError) -> String {
    if let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    {
        tracing::debug!(%verifier_log, "the verifier's log");
        if let Some(said) = io_error
            .raw_os_error()
            .and_then(|e| errno_words(io::Error::from_raw_os_error(e)))
        {
            return said;
        }
        let log = verifier_log.to_string();
        let figures = ["processed ", "verification time", "stack depth"];
        let last = log
            .lines()
            .rev()
            .find(|l| !l.is_empty() && !figures.iter().any(|f| l.starts_with(f)));
        return format!(
            "the verifier refuses the program ({io_error}): {}",
            last.unwrap_or("no log")
        );
    }
    let mut cause = error.source();
    while let Some(e) = cause {
        if let Some(said) = e
            .downcast_ref::<io::Error>()
            .and_then(|e| errno_words(io::Error::from_raw_os_error(e.raw_os_error()?)))
        {
            return said;
        }
        cause = e.source();
    }
    chain(error)
}

fn errno_words(error: io::Error) -> Option<String> {
    Some(match error.raw_os_error()? {
        libc::EPERM => {
            format!(
                "the kernel refuses to load tracing programs (EPERM): {}",
                super::probe::why_refused()
            )
        }
        ENOTSUPP => "this kernel cannot attach tracing programs to functions (ENOTSUPP)".to_owned(),
        libc::ENOENT => "the kernel does not know this function as a place to attach to (ENOENT)".to_owned(),
        _ => return None,
    })
}
