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
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, PerfEventArray, RingBuf},
    programs::{FEntry, FExit, KProbe, Program, ProgramError, links::FdLink},
};
use omirr_common::{
    dirty::{Call, Dirty, DirtyKey},
    event::{Frame, FrameKey},
    hooks::{self as id, Timing},
    identity::{Mark, RootKey, device as bit},
    settings::{Settings, transport},
};

use super::{
    btf::KERNEL_BTF,
    counts::{Control, Counts, passed_over},
    device::Device,
    hooks::{CONTENT, EXACT_FILESYSTEMS, Layout, Need, SPECS, Spec, fallocate_of, funnels, module_slots},
    pins::{NewSet, OldSet, fingerprint},
    probe,
    take::{Taker, Undisturbed},
};

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
    /// Changes of an inode are merged until they are taken.
    pub merge: bool,
    /// Inodes that can wait to be taken.
    pub dirty_entries: u32,
    /// Where to keep everything beyond this process, and to look for what an
    /// earlier one has kept.
    pub keep: Option<&'a Path>,
}

/// Directories that can wait to be compared.
const DIRS_ENTRIES: u32 = 16_384;

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
    pub control: Control,
    /// What changed and was not taken.
    dirty: Mutex<Taker>,
    dirs: Mutex<Taker>,
    /// Renames, and other operations, between entry and exit.
    frames: HashMap<MapData, FrameKey, Frame>,
    calls: HashMap<MapData, FrameKey, Call>,
    marks: Mutex<HashMap<MapData, RootKey, Mark>>,
    /// The attached programs.
    programs: Vec<OwnedFd>,
    pub dirty_capacity: u64,
    /// Kprobe programs on a kernel that preempts itself: see [`Undisturbed`].
    pub careful: bool,
}

impl Maps {
    /// Renames that have begun and not ended.
    pub fn frames(&self) -> impl Iterator<Item = (FrameKey, Frame)> + '_ {
        self.frames.iter().filter_map(Result::ok)
    }

    /// Other operations that have begun and not ended.
    pub fn calls(&self) -> impl Iterator<Item = (FrameKey, Call)> + '_ {
        self.calls.iter().filter_map(Result::ok)
    }

    /// Takes what is known of a changed inode.
    pub fn take(&self, key: &DirtyKey) -> io::Result<Option<Dirty>> {
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        let taking = self.control.taking();
        let mut taken: Option<Dirty> = dirty.take(key)?;
        drop(taking);
        if let Some(taken) = &mut taken
            && !dirty.is_atomic()
        {
            taken.range_unknown = 1;
        }
        Ok(taken)
    }

    /// Whether what is taken is all that was known of it, bytes and all.
    pub fn takes_all(&self) -> bool {
        self.dirty
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_atomic()
    }

    /// Every changed inode that is known.
    pub fn all(&self) -> io::Result<Vec<(DirtyKey, Dirty)>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner).all()
    }

    /// The directories that are to be compared.
    pub fn dirs(&self) -> io::Result<Vec<DirtyKey>> {
        let dirs = self.dirs.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(dirs.all::<u32>()?.into_iter().map(|(key, _)| key).collect())
    }

    /// Takes one of them; false if it is not there any more.
    pub fn take_dir(&self, key: &DirtyKey) -> io::Result<bool> {
        let mut dirs = self.dirs.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(dirs.take::<u32>(key)?.is_some())
    }

    /// Entries that wait.
    pub fn waiting(&self) -> u64 {
        let dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        dirty.count(self.dirty_capacity).unwrap_or(0)
    }

    /// How often the kernel passed over one of the programs.
    pub fn passed_over(&self) -> u64 {
        self.programs.iter().map(|p| passed_over(p.as_fd())).sum()
    }

    pub fn mark(&self, root: &RootKey) -> Option<Mark> {
        let _undisturbed = self.careful.then(Undisturbed::begin);
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.get(root, 0).ok()
    }

    /// Sets a mark, or takes it away. Not for a thread that is undisturbed already.
    pub fn set_mark(&self, root: &RootKey, mark: Option<Mark>) -> Result<(), LoadError> {
        let _undisturbed = self.careful.then(Undisturbed::begin);
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        match mark {
            Some(mark) => marks.insert(root, mark, 0).map_err(map_error),
            // There may be none.
            None if marks.get(root, 0).is_err() => Ok(()),
            None => marks.remove(root).map_err(map_error),
        }
    }
}

/// Attached programs. Dropping it detaches them, unless they are kept.
pub struct Loaded {
    pub attach: Attaching,
    pub transport: Carrier,
    pub hooks: Vec<HookState>,
    pub maps: Arc<Maps>,
    pub buffer_bytes: u64,
    /// Taken by the reader.
    pub ring: Option<RingBuf<MapData>>,
    pub perf: Option<PerfEventArray<MapData>>,
    /// They stay when this process ends.
    pub kept: bool,
    /// Why they do not, where it was asked for.
    pub not_kept: Option<String>,
    /// They were there when this process came.
    pub taken_over: bool,
    _programs: Option<Ebpf>,
    _links: Vec<FdLink>,
}

impl Loaded {
    /// Whether each change of a content on this filesystem is told with its bytes.
    /// Not on processors on which what the programs add to an entry need not be
    /// there for whoever takes it (`barrier` in `omirr-ebpf/src/count.rs`).
    pub fn tells_ranges(&self, device: &Device) -> bool {
        let attached = |id: &u8| self.hooks.iter().any(|hook| hook.id == *id && hook.attached);
        cfg!(target_arch = "x86_64")
            && fallocate_of(&device.filesystem).as_ref().is_some_and(attached)
            && EXACT_FILESYSTEMS.contains(&device.filesystem.as_str())
            && CONTENT.iter().all(attached)
            && funnels(&device.filesystem).iter().any(attached)
    }
}

/// Loads and attaches as planned, or takes over what an earlier process has
/// left just so.
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

/// Takes over what an earlier process has left, if it is just what would be
/// loaded now.
fn take_over(plan: &Plan<'_>, set: &OldSet, buffer_bytes: u64) -> Result<Loaded, String> {
    let mut links = Vec::new();
    let mut hooks: Vec<HookState> = Vec::new();
    let names = set.names("link").map_err(|e| e.to_string())?;
    for name in &names {
        links.push(FdLink::from(set.link(name)?));
    }
    for spec in SPECS {
        let by = |flavours: &[&str]| flavours.iter().any(|f| names.contains(&spec.program(f)));
        let traced = by(&["fentry", "fexit"]);
        let probed = by(&["kprobe", "kretprobe"]);
        hooks.push(HookState {
            id: spec.id,
            function: spec.function(),
            attached: traced || probed,
            note: match (plan.attach, traced, probed) {
                (_, false, false) => Some("was not attached when the programs were loaded".to_owned()),
                (Attaching::Fentry, false, true) => Some("by kprobe".to_owned()),
                _ => None,
            },
        });
    }
    let programs = set
        .names("prog")
        .map_err(|e| e.to_string())?
        .iter()
        .map(|name| {
            let fd = set.program(name)?;
            fd.as_fd().try_clone_to_owned().map_err(|e| e.to_string())
        })
        .collect::<Result<_, String>>()?;
    let mut get = |name: &str| {
        set.map(name).map_err(|why| LoadError::Refused {
            what: name.to_owned(),
            why,
        })
    };
    let maps = open_maps(&mut get, programs, plan).map_err(|e| e.to_string())?;
    let (ring, perf) = open_transport(&mut get, plan).map_err(|e| e.to_string())?;
    Ok(Loaded {
        attach: plan.attach,
        transport: plan.transport,
        hooks,
        maps: Arc::new(maps),
        buffer_bytes,
        ring,
        perf,
        kept: true,
        not_kept: None,
        taken_over: true,
        _programs: None,
        _links: links,
    })
}

fn open_maps(
    get: &mut impl FnMut(&str) -> Result<Map, LoadError>,
    programs: Vec<OwnedFd>,
    plan: &Plan<'_>,
) -> Result<Maps, LoadError> {
    let careful = plan.attach == Attaching::Kprobe && probe::preemption().is_some();
    let refused = |what: &str| {
        let what = what.to_owned();
        move |e: io::Error| LoadError::Refused {
            what,
            why: e.to_string(),
        }
    };
    let (Map::Array(counters), Map::Array(control)) = (get("COUNTERS")?, get("CONTROL")?) else {
        return Err(LoadError::Object("the counters' arrays".into()));
    };
    let (Map::HashMap(dirty), Map::HashMap(dirs)) = (get("DIRTY")?, get("DIRS")?) else {
        return Err(LoadError::Object("the maps of what changed".into()));
    };
    let counts =
        Counts::new(counters.fd().as_fd(), possible_cpus()).map_err(refused("the programs' counters"))?;
    let control = Control::new(control.fd().as_fd()).map_err(refused("the programs' control"))?;
    control.nobody_takes();
    Ok(Maps {
        counts,
        control,
        dirty: Mutex::new(Taker::new(dirty.fd().as_fd()).map_err(refused("the map of what changed"))?),
        dirs: Mutex::new(Taker::new(dirs.fd().as_fd()).map_err(refused("the map of directories"))?),
        frames: HashMap::try_from(get("FRAMES")?).map_err(map_error)?,
        calls: HashMap::try_from(get("CALLS")?).map_err(map_error)?,
        marks: Mutex::new(HashMap::try_from(get("MARKS")?).map_err(map_error)?),
        programs,
        dirty_capacity: plan.dirty_entries.into(),
        careful,
    })
}

type Transports = (Option<RingBuf<MapData>>, Option<PerfEventArray<MapData>>);

fn open_transport(
    get: &mut impl FnMut(&str) -> Result<Map, LoadError>,
    plan: &Plan<'_>,
) -> Result<Transports, LoadError> {
    Ok(match plan.transport {
        Carrier::Ring => (
            Some(RingBuf::try_from(get("RING")?).map_err(|e| transport_error(plan, &e))?),
            None,
        ),
        Carrier::Perf => (
            None,
            Some(PerfEventArray::try_from(get("PERF")?).map_err(|e| transport_error(plan, &e))?),
        ),
    })
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
    let fallocate_of = |d: &WatchedDevice| fallocate_of(&d.device.filesystem).filter(|&h| usable(h));
    let used: HashSet<u8> = plan
        .devices
        .iter()
        .flat_map(|d| [funnel_of(d), fallocate_of(d)])
        .flatten()
        .collect();
    let above = plan.devices.iter().any(|d| funnel_of(d).is_none());
    let bits = |d: &WatchedDevice| {
        let mut bits = bit::WATCHED;
        if d.device.whole {
            bits |= bit::WHOLE;
        }
        if funnel_of(d).is_some() {
            bits |= bit::FUNNEL;
        }
        if fallocate_of(d).is_some() {
            bits |= bit::FALLOCATE;
        }
        bits
    };

    let settings = settings(plan, &modules, bits);
    let mut set = None;
    let mut not_kept = None;
    if let Some(base) = plan.keep {
        let name = settings.fingerprint(plan, bits);
        if let Some(old) = OldSet::find(base, &name) {
            match take_over(plan, &old, settings.buffer_bytes) {
                Ok(loaded) => return Ok(Outcome::Loaded(Box::new(loaded))),
                Err(why) => tracing::warn!(
                    "the programs that were left attached cannot be taken over ({why}): they are replaced"
                ),
            }
            // Its name is needed.
            super::pins::remove(base).map_err(|e| LoadError::Refused {
                what: format!("removing {}", base.display()),
                why: e.to_string(),
            })?;
        }
        match NewSet::begin(base, &name) {
            Ok(new) => set = Some(new),
            Err(error) => not_kept = Some(format!("{}: {error}", base.display())),
        }
    }
    let mut keeping = Keeping {
        set,
        links: Vec::new(),
        not_kept,
    };
    let mut ebpf = make_maps(plan, &settings)?;
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
            Need::Funnel | Need::Fallocate => used.contains(&spec.id),
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
        match attach_hook(&mut ebpf, spec, plan, types, &modules, &mut keeping) {
            Ok(note) => states.push(HookState {
                id: spec.id,
                function: spec.function(),
                attached: true,
                note,
            }),
            Err(why) => match spec.need {
                Need::Funnel | Need::Fallocate => {
                    tracing::debug!(hook = spec.function(), why, "cannot be hooked");
                    keeping.give_up();
                    return Ok(Outcome::Without(spec.id));
                }
                Need::Always => {
                    keeping.give_up();
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

    keeping.keep_maps_and_programs(&mut ebpf);
    let programs = ebpf
        .programs()
        .filter_map(|(_, program)| program.fd().ok()?.as_fd().try_clone_to_owned().ok())
        .collect();
    let mut get = |name: &str| take(&mut ebpf, name);
    let maps = open_maps(&mut get, programs, plan)?;
    let (ring, perf) = open_transport(&mut get, plan)?;
    let (kept, not_kept, links) = keeping.finish();
    Ok(Outcome::Loaded(Box::new(Loaded {
        attach: plan.attach,
        transport: plan.transport,
        hooks: states,
        maps: Arc::new(maps),
        buffer_bytes: settings.buffer_bytes,
        ring,
        perf,
        kept,
        not_kept,
        taken_over: false,
        _programs: Some(ebpf),
        _links: links,
    })))
}

/// Keeps what is attached beyond the life of this process, if that is wanted
/// and possible.
struct Keeping {
    set: Option<NewSet>,
    links: Vec<FdLink>,
    not_kept: Option<String>,
}

impl Keeping {
    fn wanted(&self) -> bool {
        self.set.is_some()
    }

    fn link(&mut self, name: &str, link: FdLink) {
        let Some(set) = &self.set else {
            self.links.push(link);
            return;
        };
        match link.pin(set.path("link", name)) {
            Ok(pinned) => self.links.push(pinned.into()),
            Err(error) => self.fail(chain(&error)),
        }
    }

    fn fail(&mut self, why: String) {
        self.give_up();
        self.not_kept.get_or_insert(why);
    }

    fn give_up(&mut self) {
        if let Some(set) = self.set.take() {
            set.give_up();
        }
    }

    fn keep_maps_and_programs(&mut self, ebpf: &mut Ebpf) {
        let Some(set) = &self.set else { return };
        let mut failed = None;
        for (name, map) in ebpf.maps() {
            if KEPT_MAPS.contains(&name)
                && let Err(error) = map.pin(set.path("map", name))
            {
                failed = Some(chain(&error));
            }
        }
        for (name, program) in ebpf.programs_mut() {
            if program.fd().is_ok()
                && let Err(error) = program.pin(set.path("prog", name))
            {
                failed = Some(chain(&error));
            }
        }
        if let Some(why) = failed {
            self.fail(why);
        }
    }

    fn finish(mut self) -> (bool, Option<String>, Vec<FdLink>) {
        let mut kept = false;
        if let Some(set) = self.set.take() {
            match set.finish() {
                Ok(()) => kept = true,
                Err(error) => self.not_kept = Some(error.to_string()),
            }
        }
        (kept, self.not_kept, self.links)
    }
}

/// What another process needs to take over.
const KEPT_MAPS: [&str; 9] = [
    "COUNTERS", "CONTROL", "DIRTY", "DIRS", "FRAMES", "CALLS", "MARKS", "RING", "PERF",
];

/// What is patched into the programs, and the maps' sizes.
struct Patches {
    settings: Settings,
    slots: omirr_common::settings::AllSlots,
    ring_entries: u32,
    buffer_bytes: u64,
}

impl Patches {
    /// A name for exactly these programs with exactly these settings, watching
    /// exactly these trees.
    fn fingerprint(&self, plan: &Plan<'_>, bits: impl Fn(&WatchedDevice) -> u32) -> String {
        let devices: Vec<_> = plan
            .devices
            .iter()
            .map(|d| (d.device.kernel_dev, d.root_ino, bits(d)))
            .collect();
        let settings = format!(
            "{:?} {:?} {:?} {devices:?} {:?} {} {}",
            self.settings,
            plan.layout.offsets,
            self.slots,
            plan.attach,
            self.ring_entries,
            plan.dirty_entries
        );
        fingerprint(&[plan.object, settings.as_bytes()])
    }
}

fn settings(
    plan: &Plan<'_>,
    modules: &HashSet<&'static str>,
    bits: impl Fn(&WatchedDevice) -> u32,
) -> Patches {
    let mut kernel_devs: Vec<u32> = plan.devices.iter().map(|d| d.device.kernel_dev).collect();
    kernel_devs.dedup();
    let one = if let [one] = kernel_devs[..] { one } else { 0 };
    let settings = Settings {
        transport: match plan.transport {
            Carrier::Ring => transport::RING,
            Carrier::Perf => transport::PERF,
        },
        one_dev: one,
        one_dev_flags: plan.devices.iter().fold(0, |all, d| all | bits(d)),
        merge: plan.merge.into(),
    };
    let mut slots = plan.layout.slots;
    for spec in SPECS.iter().filter(|s| modules.contains(s.function())) {
        slots.0[usize::from(spec.id)] = module_slots(spec.need);
    }
    let ring_bytes = plan.ring_bytes.max(PAGE).next_power_of_two();
    let (buffer_bytes, ring_bytes) = match plan.transport {
        Carrier::Ring => (ring_bytes, ring_bytes),
        Carrier::Perf => (perf_pages(plan.ring_bytes) * PAGE * online_cpus(), PAGE),
    };
    Patches {
        settings,
        slots,
        ring_entries: u32::try_from(ring_bytes).unwrap_or(1 << 31),
        buffer_bytes: buffer_bytes as u64,
    }
}

/// Patches the settings in and creates the maps.
fn make_maps(plan: &Plan<'_>, patches: &Patches) -> Result<Ebpf, LoadError> {
    let dirs = if plan.merge { DIRS_ENTRIES } else { 1 };
    EbpfLoader::new()
        .override_global("SETTINGS", &patches.settings, true)
        .override_global("OFFSETS", &plan.layout.offsets, true)
        .override_global("SLOTS", &patches.slots, true)
        .map_max_entries("RING", patches.ring_entries)
        .map_max_entries("COUNTERS", possible_cpus() as u32)
        .map_max_entries("DIRTY", if plan.merge { plan.dirty_entries.max(1) } else { 1 })
        .map_max_entries("DIRS", dirs)
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
        })
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
    keeping: &mut Keeping,
) -> Result<Option<String>, String> {
    let in_module = modules.contains(spec.function());
    if !in_module && let Some(why) = &plan.layout.missing[usize::from(spec.id)] {
        return Err(why.clone());
    }
    if plan.attach == Attaching::Kprobe {
        return probe_hook(ebpf, spec, keeping)
            .map(|()| None)
            .map_err(|e| program_error(&e));
    }
    if in_module {
        return probe_hook(ebpf, spec, keeping)
            .map(|()| Some("by kprobe, because it is in a module".to_owned()))
            .map_err(|e| program_error(&e));
    }
    match trace_hook(ebpf, spec, types, keeping) {
        Ok(()) => Ok(None),
        // If the plainest hook cannot be traced none can: this way is closed.
        Err(error) if spec.id == id::VFS_OPEN => Err(program_error(&error)),
        Err(error) => {
            let why = program_error(&error);
            probe_hook(ebpf, spec, keeping)
                .map(|()| Some(format!("by kprobe, because it cannot be traced: {why}")))
                .map_err(|e| format!("{why}; by kprobe: {}", program_error(&e)))
        }
    }
}

const KPROBES_GO: &str = "this kernel detaches kprobes when their process ends (before 5.15)";

/// The exit before the entry, so that no entry is without its exit.
fn trace_hook(ebpf: &mut Ebpf, spec: &Spec, types: &Btf, keeping: &mut Keeping) -> Result<(), ProgramError> {
    let function = spec.function();
    if spec.timing() != Timing::Entry {
        let name = spec.program("fexit");
        let program: &mut FExit = program(ebpf, &name)?.try_into()?;
        program.load(function, types)?;
        let link = program.attach()?;
        keeping.link(&name, program.take_link(link)?.into());
    }
    if spec.timing() != Timing::Exit {
        let name = spec.program("fentry");
        let program: &mut FEntry = program(ebpf, &name)?.try_into()?;
        program.load(function, types)?;
        let link = program.attach()?;
        keeping.link(&name, program.take_link(link)?.into());
    }
    Ok(())
}

fn probe_hook(ebpf: &mut Ebpf, spec: &Spec, keeping: &mut Keeping) -> Result<(), ProgramError> {
    for flavour in ["kretprobe", "kprobe"] {
        if flavour == "kretprobe" && spec.timing() == Timing::Entry {
            continue;
        }
        let name = spec.program(flavour);
        let program: &mut KProbe = program(ebpf, &name)?.try_into()?;
        program.load()?;
        let link = program.attach(spec.function(), 0)?;
        if !keeping.wanted() {
            continue;
        }
        match FdLink::try_from(program.take_link(link)?) {
            Ok(link) => keeping.link(&name, link),
            // What is no descriptor is detached by having been looked at.
            Err(_) => {
                keeping.fail(KPROBES_GO.to_owned());
                program.attach(spec.function(), 0)?;
            }
        }
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
    let mut ebpf = make_maps(plan, &settings(plan, &modules, |_| 0))?;
    let spec = &SPECS[usize::from(id::VFS_OPEN)];
    let mut keeping = Keeping {
        set: None,
        links: Vec::new(),
        not_kept: None,
    };
    attach_hook(&mut ebpf, spec, plan, &types, &modules, &mut keeping)
        .map(drop)
        .map_err(|why| LoadError::Hook {
            function: spec.function(),
            why,
        })
}

/// Which filesystems' own functions are wanted and live in a module.
fn module_functions(plan: &Plan<'_>) -> HashSet<&'static str> {
    let wanted: Vec<&'static str> = plan
        .devices
        .iter()
        .flat_map(|d| {
            let own = funnels(&d.device.filesystem).iter().copied();
            own.chain(fallocate_of(&d.device.filesystem))
        })
        .map(usize::from)
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
        Need::Funnel | Need::Fallocate => "no share lies on such a filesystem".to_owned(),
        _ => "not needed: the filesystems' own writes are hooked".to_owned(),
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

pub(super) fn errno_words(error: io::Error) -> Option<String> {
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

#[cfg(test)]
mod tests {
    /// Calls of functions inside the object (`R_BPF_64_32`), by section.
    fn inner_calls(object: &[u8]) -> Vec<(String, usize)> {
        let u16_at = |at: usize| usize::from(u16::from_le_bytes(object[at..at + 2].try_into().unwrap()));
        let u32_at = |at: usize| u32::from_le_bytes(object[at..at + 4].try_into().unwrap()) as usize;
        let u64_at = |at: usize| u64::from_le_bytes(object[at..at + 8].try_into().unwrap()) as usize;
        let (table, entry, count, names) = (u64_at(0x28), u16_at(0x3a), u16_at(0x3c), u16_at(0x3e));
        let section = |n: usize| table + n * entry;
        let strings = u64_at(section(names) + 0x18);
        let mut out = Vec::new();
        for n in 0..count {
            let at = section(n);
            let name = &object[strings + u32_at(at)..];
            let name =
                String::from_utf8_lossy(&name[..name.iter().position(|&b| b == 0).unwrap()]).into_owned();
            let (offset, size) = (u64_at(at + 0x18), u64_at(at + 0x20));
            // 9: relocations without addends, 16 bytes each, the type in the
            // low half of the second word.
            let calls = |kind: usize| {
                (0..size / 16)
                    .filter(|r| u32_at(offset + r * 16 + 8) == kind)
                    .count()
            };
            if u32_at(at + 4) == 9 && (name.contains("fentry") || name.contains("fexit")) {
                out.push((name, calls(10)));
            }
        }
        out
    }

    /// A tracing program that has functions of its own crashes Linux 5.10 when
    /// it loads from a bad address, so everything must be folded into one.
    #[test]
    fn tracing_programs_have_no_inner_functions() {
        let Some(object) = super::super::EMBEDDED else {
            println!("skipped: built without the eBPF object");
            return;
        };
        let sections = inner_calls(object);
        assert_eq!(sections.len(), 2, "{sections:?}");
        for (section, calls) in sections {
            assert_eq!(calls, 0, "{section}");
        }
    }
}
