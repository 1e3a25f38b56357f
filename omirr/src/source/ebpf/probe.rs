//! What this host allows, for `omirr doctor` and for error messages.
//!
//! In: the running kernel. Out: one line per capability. It tries rather than
//! compares versions: a trial loads and attaches one program for a moment.

use super::{
    EMBEDDED,
    btf::KernelTypes,
    hooks::{Layout, Need, SPECS},
    load::{Attaching, Carrier, Plan, trial},
};

/// One thing that the eBPF source needs or can use.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Capability {
    pub name: &'static str,
    pub ok: bool,
    pub detail: String,
}

/// Asks the host.
pub fn probe() -> Vec<Capability> {
    let mut out = Vec::new();
    let mut say = |name, ok, detail: String| out.push(Capability { name, ok, detail });
    say(
        "ebpf programs",
        EMBEDDED.is_some(),
        EMBEDDED.map_or(
            "this omirr was built without eBPF; build it with `cargo xtask build`".into(),
            |o| format!("in this binary, {} bytes", o.len()),
        ),
    );
    let privileges = privileges();
    say(
        "privileges",
        privileges.is_ok(),
        privileges.unwrap_or_else(|missing| {
            format!("{missing}; run as root, or give the service these capabilities")
        }),
    );
    let lockdown = lockdown();
    say(
        "lockdown",
        !matches!(lockdown.as_deref(), Some("confidentiality")),
        match lockdown.as_deref() {
            Some("none") => "off".into(),
            Some(mode) => format!("the kernel is locked down ({mode})"),
            None => "the kernel does not say".into(),
        },
    );
    let layout = KernelTypes::of_this_kernel().and_then(|types| Layout::resolve(&types));
    say(
        "kernel types (BTF)",
        layout.is_ok(),
        match &layout {
            Ok(_) => "every member that is needed is there".into(),
            Err(error) => error.to_string(),
        },
    );
    say(
        "preemption",
        preemption().is_none(),
        preemption().map_or("the kernel is not known to interrupt itself".into(), |how| {
            format!("{how}: fentry programs can be passed over, which costs a comparison of the trees; kprobe is used")
        }),
    );
    say(
        "kprobes",
        kprobes(),
        if kprobes() {
            "offered".into()
        } else {
            "this kernel was built without kprobes".into()
        },
    );
    let (Ok(layout), Some(object)) = (layout, EMBEDDED) else {
        return out;
    };
    let missing: Vec<String> = SPECS
        .iter()
        .filter(|s| s.need == Need::Always)
        .filter_map(|s| layout.missing[usize::from(s.id)].clone())
        .collect();
    say(
        "hooks",
        missing.is_empty(),
        if missing.is_empty() {
            "every function that is needed is there".into()
        } else {
            missing.join("; ")
        },
    );
    for (name, attach, transport) in [
        ("fentry with the ring buffer", Attaching::Fentry, Carrier::Ring),
        ("kprobe with the ring buffer", Attaching::Kprobe, Carrier::Ring),
        ("fentry with the perf buffer", Attaching::Fentry, Carrier::Perf),
        ("kprobe with the perf buffer", Attaching::Kprobe, Carrier::Perf),
    ] {
        let plan = Plan {
            object,
            layout: &layout,
            devices: &[],
            attach,
            transport,
            ring_bytes: 1 << 16,
            merge: false,
            dirty_entries: 0,
            keep: None,
        };
        let tried = trial(&plan);
        say(
            name,
            tried.is_ok(),
            tried.map_or_else(
                |e| e.to_string(),
                |()| "a trial program loads and attaches".into(),
            ),
        );
    }
    out
}

/// The most likely reason for an EPERM.
pub(super) fn why_refused() -> String {
    if let Err(missing) = privileges() {
        return missing;
    }
    match lockdown().as_deref() {
        Some(mode) if mode != "none" => format!("it is locked down ({mode})"),
        _ => "its owner's policy forbids it although the privileges are there".to_owned(),
    }
}

/// Whether the kernel may interrupt its own code to run another thread, as far
/// as it can be known: the word for how, or none. A tracing program that is
/// interrupted so is passed over in the other thread, while a kprobe program
/// cannot be interrupted.
pub(super) fn preemption() -> Option<&'static str> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let release = read("/proc/sys/kernel/osrelease");
    preemption_of(
        &read("/sys/kernel/debug/sched/preempt"),
        &read("/proc/cmdline"),
        &read(&format!("/boot/config-{}", release.trim())),
        &read("/proc/sys/kernel/version"),
    )
}

/// From the scheduler's own word, else the command line's, else the build's.
fn preemption_of(scheduler: &str, command_line: &str, config: &str, version: &str) -> Option<&'static str> {
    if version.contains("PREEMPT_RT") {
        return Some("real-time");
    }
    let now = scheduler
        .split_once('(')
        .and_then(|(_, from)| from.split_once(')'))
        .map(|(mode, _)| mode);
    let asked = command_line
        .split_ascii_whitespace()
        .filter_map(|w| w.strip_prefix("preempt="))
        .next_back();
    match now.or(asked) {
        Some("full") => return Some("full"),
        Some("lazy") => return Some("lazy"),
        Some(_) => return None,
        None => {}
    }
    let built = |option: &str| config.lines().any(|line| line == option);
    if built("CONFIG_PREEMPT_LAZY=y") {
        Some("lazy")
    } else if built("CONFIG_PREEMPT=y") || version.split(' ').any(|word| word == "PREEMPT") {
        Some("full")
    } else {
        None
    }
}

/// The kernel lists kprobes among its event sources if it has them.
pub(super) fn kprobes() -> bool {
    std::path::Path::new("/sys/bus/event_source/devices/kprobe").exists()
}

/// The word in brackets in the kernel's list of modes.
fn lockdown() -> Option<String> {
    let modes = std::fs::read_to_string("/sys/kernel/security/lockdown").ok()?;
    let (_, from) = modes.split_once('[')?;
    from.split_once(']').map(|(mode, _)| mode.to_owned())
}

/// The privileges for tracing; an error names what is missing.
fn privileges() -> Result<String, String> {
    let status =
        std::fs::read_to_string("/proc/self/status").map_err(|e| format!("/proc/self/status: {e}"))?;
    judge_privileges(&status)
}

fn judge_privileges(status: &str) -> Result<String, String> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| effective >> bit & 1 == 1;
    if has(21) {
        return Ok("CAP_SYS_ADMIN".to_owned());
    }
    match (has(39), has(38)) {
        (true, true) => Ok("CAP_BPF and CAP_PERFMON".to_owned()),
        (true, false) => Err("CAP_PERFMON is missing".to_owned()),
        (false, true) => Err("CAP_BPF is missing".to_owned()),
        (false, false) => Err("CAP_BPF and CAP_PERFMON are missing".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_privileges_are_named() {
        let with = |bits: u64| judge_privileges(&format!("Name:\tx\nCapEff:\t{bits:016x}\n"));
        assert_eq!(with(0), Err("CAP_BPF and CAP_PERFMON are missing".into()));
        assert_eq!(with(1 << 39), Err("CAP_PERFMON is missing".into()));
        assert_eq!(with(1 << 39 | 1 << 38), Ok("CAP_BPF and CAP_PERFMON".into()));
        assert_eq!(with(1 << 21), Ok("CAP_SYS_ADMIN".into()));
    }

    #[test]
    fn how_the_kernel_preempts_itself_is_taken_from_the_best_witness() {
        let dynamic = "#1 SMP PREEMPT_DYNAMIC Debian";
        assert_eq!(
            preemption_of("none (voluntary) full\n", "preempt=full", "", dynamic),
            None
        );
        assert_eq!(preemption_of("full (lazy) \n", "", "", dynamic), Some("lazy"));
        assert_eq!(preemption_of("", "quiet preempt=full", "", dynamic), Some("full"));
        assert_eq!(
            preemption_of("", "quiet", "CONFIG_PREEMPT_LAZY=y\n", dynamic),
            Some("lazy")
        );
        assert_eq!(
            preemption_of("", "quiet", "# CONFIG_PREEMPT is not set\n", dynamic),
            None
        );
        assert_eq!(preemption_of("", "", "", "#1 SMP PREEMPT Arch"), Some("full"));
        assert_eq!(preemption_of("", "", "", "#1 SMP PREEMPT_RT"), Some("real-time"));
    }

    #[test]
    fn every_answer_has_words() {
        for capability in probe() {
            assert!(!capability.detail.is_empty(), "{capability:?}");
        }
    }
}
