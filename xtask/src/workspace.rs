//! Where things are: the repository, what is built from it, and what is kept
//! between builds. Nothing here creates or changes a file.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies inside the workspace")
        .to_owned()
}

/// The folder for all that is built. Fixed, because `target/debug/omirr` is a
/// promise to scripts; every cargo call here names it.
#[must_use]
pub fn target() -> PathBuf {
    root().join("target")
}

/// The eBPF object that omirr's build script embeds when it exists.
#[must_use]
pub fn bpf_object() -> PathBuf {
    target().join("bpf/omirr-ebpf.o")
}

/// Where the profile's binaries are.
#[must_use]
pub fn binaries(profile: Profile) -> PathBuf {
    target().join(profile.folder())
}

/// Logs of guests, and what is made for booting them.
#[must_use]
pub fn guests() -> PathBuf {
    target().join("vm")
}

/// Kept across clones and cleans, because fetching it again takes a network:
/// kernels and the eBPF linker. `OMIRR_CACHE`, or `omirr` in the user's cache.
#[must_use]
pub fn cache() -> PathBuf {
    let named = |variable: &str| {
        env::var_os(variable)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    named("OMIRR_CACHE")
        .or_else(|| named("XDG_CACHE_HOME").map(|folder| folder.join("omirr")))
        .unwrap_or_else(|| home().join(".cache/omirr"))
}

/// The user's home folder; the root when there is none.
#[must_use]
pub fn home() -> PathBuf {
    env::var_os("HOME").map_or_else(|| PathBuf::from("/"), PathBuf::from)
}

/// The cargo that runs this, in the repository's root.
#[must_use]
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(root());
    // What `cargo run` tells xtask about itself is not meant for the packages
    // that xtask builds.
    for (name, _) in env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            command.env_remove(name);
        }
    }
    command.env_remove("CARGO_TARGET_DIR");
    command
}

/// Which of cargo's two profiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Quick to build.
    Debug,
    /// Quick to run.
    Release,
}

impl Profile {
    /// From a command's `--release`.
    #[must_use]
    pub fn from_release_flag(release: bool) -> Self {
        if release { Self::Release } else { Self::Debug }
    }

    fn folder(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Release => "release",
        }
    }
}

/// The program's path, looked for in `PATH` and in the system folders that an
/// ordinary user's `PATH` leaves out.
#[must_use]
pub fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// Whether this process may do what only root may.
#[must_use]
pub fn is_root() -> bool {
    // SAFETY: geteuid takes nothing, changes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}
