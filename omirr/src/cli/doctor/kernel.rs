//! What tracing by eBPF needs of the kernel.

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{is_map_supported, is_program_supported},
};

use super::Check;
use crate::source::ebpf::probe::probe;

/// The kernel's own types, without which no offset in it is known.
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// Bits of `CapEff`, from include/uapi/linux/capability.h.
const CAPABILITIES: [(u32, &str); 4] = [
    (2, "CAP_DAC_READ_SEARCH"),
    (21, "CAP_SYS_ADMIN"),
    (38, "CAP_PERFMON"),
    (39, "CAP_BPF"),
];

const PRIVILEGES: &str = "run omirr as root, or give its service CAP_BPF, CAP_PERFMON, CAP_DAC_READ_SEARCH and CAP_SYS_ADMIN, as the packaged unit does";
const LOCKED: &str =
    "boot without kernel lockdown if this host's policy allows that; fanotify needs nothing of it";

/// What to do about a way that is closed while another is open.
const OTHERWISE: &str =
    "nothing, as long as another way works: the last line names the one that would be used, and why";

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![capabilities(), lockdown(), btf(), kprobes()];
    checks.extend(programs());
    checks.extend(maps());
    // The source's own trials, of which the ones above say the reasons.
    let known = ["privileges", "lockdown", "kprobes"];
    checks.extend(
        probe()
            .into_iter()
            .filter(|it| !known.contains(&it.name))
            .map(|it| {
                if it.ok {
                    Check::yes(it.name, it.detail)
                } else {
                    Check::refused(it.name, &it.detail)
                }
            }),
    );
    for check in checks.iter_mut().filter(|check| !check.ok) {
        check.remedy.get_or_insert_with(|| OTHERWISE.to_owned());
    }
    checks
}

/// Whether this process has the capability with this number.
pub(super) fn has_capability(bit: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    effective(&status) >> bit & 1 == 1
}

fn effective(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0)
}

fn capabilities() -> Check {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    judge_capabilities(&status)
}

fn judge_capabilities(status: &str) -> Check {
    let effective = effective(status);
    let (has, lacks): (Vec<_>, Vec<_>) = CAPABILITIES
        .iter()
        .partition(|(bit, _)| effective >> bit & 1 == 1);
    let names =
        |list: &[&(u32, &'static str)]| list.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
    if lacks.is_empty() {
        Check::yes("capabilities", names(&has))
    } else {
        let detail = format!(
            "{} missing: the kernel may refuse eBPF, fanotify or file handles",
            names(&lacks)
        );
        Check::no("capabilities", detail, Some(PRIVILEGES))
    }
}

fn lockdown() -> Check {
    match std::fs::read_to_string("/sys/kernel/security/lockdown")
        .as_deref()
        .map(mode_in_brackets)
    {
        Ok(Some("none")) => Check::yes("unlocked kernel", "the kernel is not locked down"),
        Ok(Some("confidentiality")) => {
            let detail =
                "the kernel is locked down for confidentiality: eBPF programs may not read its memory";
            Check::no("unlocked kernel", detail, Some(LOCKED))
        }
        Ok(Some(mode)) => Check::yes(
            "unlocked kernel",
            format!("locked down for {mode}, which leaves tracing alone"),
        ),
        // A kernel that does not tell is judged by what it does.
        Ok(None) | Err(_) if capabilities().ok && is_tracing_refused() => {
            let detail = "the kernel does not tell, but refuses tracing programs to the privileged, as a locked down one does";
            Check::no("unlocked kernel", detail, Some(LOCKED))
        }
        Ok(None) | Err(_) => Check::yes(
            "unlocked kernel",
            "the kernel does not tell, and nothing points to it",
        ),
    }
}

fn is_tracing_refused() -> bool {
    is_program_supported(ProgramType::Tracing).is_err_and(|error| is_refusal(&chain(&error)))
}

/// Whether an error's text is of "not permitted" or "permission denied".
fn is_refusal(text: &str) -> bool {
    text.contains("os error 1)") || text.contains("os error 13)")
}

/// The chosen word in a list such as `none [integrity] confidentiality`.
fn mode_in_brackets(modes: &str) -> Option<&str> {
    let (_, rest) = modes.split_once('[')?;
    Some(rest.split_once(']')?.0)
}

fn btf() -> Check {
    match std::fs::metadata(BTF) {
        Ok(_) => Check::yes("BTF", "the kernel tells the layout of its types"),
        Err(error) => Check::no(
            "BTF",
            format!("{BTF}: {error}; eBPF programs cannot know where the kernel keeps what they read"),
            Some("boot a kernel with CONFIG_DEBUG_INFO_BTF, as the large distributions' are"),
        ),
    }
}

fn kprobes() -> Check {
    if std::path::Path::new("/sys/bus/event_source/devices/kprobe").exists() {
        Check::yes("kprobes", "programs can be attached by kprobe")
    } else {
        let detail = "the kernel has none: programs can only be attached by fentry";
        Check::no(
            "kprobes",
            detail,
            Some("boot a kernel with CONFIG_KPROBES, if fentry does not work either"),
        )
    }
}

/// Loads a program of each type that does nothing.
fn programs() -> Vec<Check> {
    let kinds = [
        ("kprobe programs", ProgramType::KProbe),
        ("fentry programs", ProgramType::Tracing),
    ];
    kinds
        .into_iter()
        .map(|(name, kind)| match is_program_supported(kind) {
            Ok(true) => Check::yes(name, "the kernel loads them"),
            Ok(false) => Check::no(name, "the kernel does not know them", None),
            Err(error) => {
                let text = chain(&error);
                let detail = format!("the kernel refuses to load them: {text}");
                Check::no(name, detail, refusal_remedy(&text))
            }
        })
        .collect()
}

fn maps() -> Vec<Check> {
    let kinds = [
        ("BPF ring buffer", MapType::RingBuf),
        ("perf ring buffer", MapType::PerfEventArray),
    ];
    kinds
        .into_iter()
        .map(|(name, kind)| match is_map_supported(kind) {
            Ok(true) => Check::yes(name, "the kernel makes one"),
            Ok(false) => Check::no(name, "the kernel does not know it; the other one is used", None),
            Err(error) => {
                let text = chain(&error);
                Check::no(
                    name,
                    format!("the kernel refuses to make one: {text}"),
                    refusal_remedy(&text),
                )
            }
        })
        .collect()
}

/// A refusal although all privileges are there is the host's policy.
fn refusal_remedy(text: &str) -> Option<&'static str> {
    match (is_refusal(text), capabilities().ok) {
        (true, true) => Some(
            "this host's policy forbids it (a locked down or hardened kernel, or a container); ask its owner, or leave it: fanotify is used instead",
        ),
        (true, false) => Some(PRIVILEGES),
        (false, _) => None,
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let check = |bits: u64| judge_capabilities(&format!("Name:\tomirr\nCapEff:\t{bits:016x}\n"));
        assert!(check(u64::MAX).ok);
        let without_bpf = check(!(1 << 39));
        assert!(
            !without_bpf.ok && without_bpf.detail.starts_with("CAP_BPF missing"),
            "{without_bpf:?}"
        );
        assert!(without_bpf.remedy.is_some());
        assert!(!check(0).ok && !judge_capabilities("").ok);
    }

    #[test]
    fn the_chosen_mode_is_in_brackets() {
        assert_eq!(
            mode_in_brackets("none [integrity] confidentiality\n"),
            Some("integrity")
        );
        assert_eq!(mode_in_brackets("none"), None);
    }
}
