//! Limits and places of this host that omirr meets while it runs: memory for
//! eBPF's maps, open files, where programs can be left for the next run.

use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit};

use super::Check;
use crate::{cli::terminal, source::ebpf::btf::KernelTypes};

/// Below this many open files contents are staged in small portions.
const FILES_ENOUGH: u64 = 4096;
/// About what the maps and the ring of the default size take, bytes.
const MAPS_BYTES: u64 = 64 << 20;
/// Bit of `CapEff`, from include/uapi/linux/capability.h: raises hard limits.
const CAP_SYS_RESOURCE: u32 = 24;
const BPF_FS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
const INOTIFY: &str = "/proc/sys/fs/inotify";

pub(super) fn checks() -> Vec<Check> {
    let may_raise = super::kernel::has_capability(CAP_SYS_RESOURCE);
    vec![
        judge_memlock(&getrlimit(Resource::Memlock), may_raise, maps_are_locked_memory()),
        judge_files(&getrlimit(Resource::Nofile)),
        pinning(Path::new(BPF_FS)),
        inotify(Path::new(INOTIFY)),
    ]
}

/// Whether this kernel counts eBPF's maps as locked memory: then it has the
/// function that does so. None if it does not describe itself.
fn maps_are_locked_memory() -> Option<bool> {
    let types = KernelTypes::of_this_kernel().ok()?;
    Some(types.prototype("bpf_map_charge_init").is_ok())
}

fn judge_memlock(limit: &Rlimit, may_raise: bool, counted: Option<bool>) -> Check {
    let name = "locked memory";
    let amount = |limit: Option<u64>| limit.map_or("without limit".to_owned(), terminal::bytes);
    let now = amount(limit.current);
    if counted == Some(false) {
        return Check::yes(
            name,
            format!("{now}; this kernel does not count eBPF's maps as such"),
        );
    }
    if limit.current.is_none_or(|bytes| bytes >= MAPS_BYTES) {
        return Check::yes(name, format!("{now}, enough for eBPF's maps"));
    }
    if may_raise || limit.maximum.is_none_or(|bytes| bytes >= MAPS_BYTES) {
        return Check::yes(
            name,
            format!("{now}; omirr may raise it, and does where eBPF's maps need it"),
        );
    }
    let detail = format!(
        "{now}, which omirr may not raise: Linux up to 5.10 counts eBPF's maps as locked memory and refuses to make them"
    );
    Check::no(
        name,
        detail,
        Some(
            "set LimitMEMLOCK=infinity for the service, as the packaged unit does, or `ulimit -l unlimited`",
        ),
    )
}

fn judge_files(limit: &Rlimit) -> Check {
    let name = "open files";
    match limit.maximum {
        Some(files) if files < FILES_ENOUGH => {
            let detail = format!(
                "at most {}: contents are received in small portions, which is slower, and many peers may be too many",
                terminal::number(files)
            );
            let remedy =
                "set LimitNOFILE=65536 for the service, as the packaged unit does, or `ulimit -Hn 65536`";
            Check::no(name, detail, Some(remedy))
        }
        Some(files) => Check::yes(name, format!("up to {}", terminal::number(files))),
        None => Check::yes(name, "without limit"),
    }
}

/// Makes a folder where programs and maps are pinned, and removes it.
fn pinning(mount: &Path) -> Check {
    let name = "pinning";
    let shown = mount.display();
    let no = |what: String, remedy: &str| {
        let detail = format!(
            "{what}: nothing watches while the daemon is stopped, and each start compares the trees with the index"
        );
        Check::no(name, detail, Some(remedy))
    };
    let is_bpf = rustix::fs::statfs(mount).is_ok_and(|found| found.f_type as u64 == BPF_FS_MAGIC);
    if !is_bpf {
        return no(
            format!("no BPF filesystem is mounted at {shown}"),
            "mount -t bpf bpf /sys/fs/bpf",
        );
    }
    let trial = mount.join(format!("omirr-doctor-{}", std::process::id()));
    match std::fs::create_dir(&trial).and_then(|()| std::fs::remove_dir(&trial)) {
        Ok(()) => Check::yes(
            name,
            format!("programs and maps can be kept in {shown} from one run to the next"),
        ),
        Err(why) => no(
            format!("{shown} cannot be written to ({why})"),
            "run omirr as root, and do not let its service have /sys read-only (ProtectKernelTunables)",
        ),
    }
}

/// For those who compare: omirr has no use for inotify.
fn inotify(folder: &Path) -> Check {
    let limit = |name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).ok()?;
        text.trim().parse().ok().map(terminal::number)
    };
    let told = match (limit("max_user_watches"), limit("max_queued_events")) {
        (Some(watches), Some(events)) => {
            format!("{watches} watches and {events} waiting events for each user; omirr uses none of them")
        }
        _ => "the kernel does not tell; omirr does not use it".to_owned(),
    };
    Check::yes("inotify limits", told)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(current: Option<u64>, maximum: Option<u64>) -> Rlimit {
        Rlimit { current, maximum }
    }

    #[test]
    fn little_locked_memory_matters_only_where_it_is_counted_and_cannot_be_raised() {
        let small = limit(Some(64 << 10), Some(64 << 10));
        for (limit, may_raise, counted, ok) in [
            (small, false, Some(true), false),
            (small, false, None, false),
            (small, false, Some(false), true),
            (small, true, Some(true), true),
            (limit(Some(64 << 10), None), false, Some(true), true),
            (limit(None, None), false, Some(true), true),
        ] {
            let check = judge_memlock(&limit, may_raise, counted);
            assert_eq!((check.ok, check.remedy.is_none()), (ok, ok), "{check:?}");
        }
    }

    #[test]
    fn few_open_files_are_told() {
        assert!(judge_files(&limit(Some(1024), Some(65_536))).ok);
        let few = judge_files(&limit(Some(1024), Some(1024)));
        assert!(!few.ok && few.detail.starts_with("at most 1,024: "), "{few:?}");
    }

    #[test]
    fn a_folder_that_is_no_bpf_filesystem_cannot_keep_programs() {
        let folder = tempfile::tempdir().expect("a folder");
        let check = pinning(folder.path());
        assert!(
            !check.ok && check.detail.contains("each start compares the trees"),
            "{check:?}"
        );
        assert_eq!(std::fs::read_dir(folder.path()).expect("it is there").count(), 0);
    }

    #[test]
    fn inotify_is_for_information_only() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(inotify(folder.path()).ok);
        for (name, text) in [("max_user_watches", "8192\n"), ("max_queued_events", "16384\n")] {
            std::fs::write(folder.path().join(name), text).expect("write");
        }
        let check = inotify(folder.path());
        assert!(
            check
                .detail
                .starts_with("8,192 watches and 16,384 waiting events"),
            "{check:?}"
        );
    }
}
