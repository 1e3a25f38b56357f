//! The distribution kernels that guests boot, kept in the cache as
//! `kernels/NAME/vmlinuz` and `kernels/NAME/modules/RELEASE/…`.
//!
//! They come from Debian's archive, from the mirror that this machine already
//! uses, checked against the archive's keys, by package lists of their own: the
//! machine's own sources, lists and packages are only read. The exact package
//! is resolved from the metapackage each time, because old versions leave the
//! archive.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Mirrors, PrivateLists};
use crate::shell::{capture, say};
use crate::workspace;

/// The kernels that tests run on.
pub const NAMES: [&str; 4] = ["5.10", "6.1", "6.12", "7.2"];

/// Which mirror carries a suite.
#[derive(Clone, Copy, Debug)]
enum Archive {
    Main,
    Security,
}

/// Where to look for a kernel, the likeliest first.
fn suites(name: &str) -> &'static [(Archive, &'static str)] {
    match name {
        "5.10" => &[
            (Archive::Security, "bullseye-security"),
            (Archive::Main, "bullseye"),
        ],
        "6.1" => &[
            (Archive::Security, "bookworm-security"),
            (Archive::Main, "bookworm"),
        ],
        "6.12" => &[
            (Archive::Main, "bookworm-backports"),
            (Archive::Security, "trixie-security"),
            (Archive::Main, "trixie"),
        ],
        "7.2" => &[(Archive::Main, "sid"), (Archive::Main, "forky")],
        _ => &[],
    }
}

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// How it was asked for.
    pub name: String,
    /// The compressed image.
    pub image: PathBuf,
    /// The modules of its release, if there are any.
    pub modules: Option<PathBuf>,
}

impl Kernel {
    /// A kernel by its name in [`NAMES`], which must be in the cache, or by the
    /// path of an image or of a folder laid out like the cache's.
    ///
    /// # Errors
    /// There is no such kernel; the text says what to do.
    pub fn find(name: &str) -> Result<Self> {
        if NAMES.contains(&name) {
            let folder = folder(name);
            return Self::in_folder(name, &folder).with_context(|| {
                format!(
                    "kernel {name} is not in {}; run `cargo xtask setup` to fetch it",
                    folder.display()
                )
            });
        }
        let path = Path::new(name);
        if path.is_dir() {
            return Self::in_folder(name, path);
        }
        if path.is_file() {
            let beside = path.parent().map(|folder| folder.join("modules"));
            return Ok(Self {
                name: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                image: path.to_owned(),
                modules: beside.and_then(|folder| only_release(&folder).ok()),
            });
        }
        bail!(
            "`{name}` is neither one of {} nor the path of a kernel image",
            NAMES.join(", ")
        )
    }

    fn in_folder(name: &str, folder: &Path) -> Result<Self> {
        let image = folder.join("vmlinuz");
        if !image.is_file() {
            bail!("{} does not exist", image.display());
        }
        let modules = only_release(&folder.join("modules"))?;
        Ok(Self {
            name: name.to_owned(),
            image,
            modules: Some(modules),
        })
    }

    /// The release as `uname -r` prints it, where the modules tell.
    #[must_use]
    pub fn release(&self) -> Option<String> {
        Some(self.modules.as_ref()?.file_name()?.to_string_lossy().into_owned())
    }
}

fn folder(name: &str) -> PathBuf {
    workspace::cache().join("kernels").join(name)
}

/// The one folder inside `modules`.
fn only_release(modules: &Path) -> Result<PathBuf> {
    let mut releases = fs::read_dir(modules)
        .with_context(|| format!("{} cannot be read", modules.display()))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    match (releases.next(), releases.next()) {
        (Some(release), None) => Ok(release),
        _ => bail!("{} does not hold exactly one release", modules.display()),
    }
}

/// The kernel from the cache, fetched first when it is not there.
///
/// # Errors
/// There is no such kernel, or none can be fetched.
pub fn fetch(name: &str) -> Result<Kernel> {
    if !NAMES.contains(&name) {
        return Kernel::find(name);
    }
    if let Ok(kernel) = Kernel::find(name) {
        return Ok(kernel);
    }
    let parent = workspace::cache().join("kernels");
    fs::create_dir_all(&parent).with_context(|| format!("{} cannot be made", parent.display()))?;
    let _alone = lock(&parent.join(".lock"))?;
    if let Ok(kernel) = Kernel::find(name) {
        return Ok(kernel);
    }
    fetch_missing(name, &parent).with_context(|| format!("kernel {name} cannot be fetched"))
}

/// One fetch at a time, across processes.
fn lock(path: &Path) -> Result<fs::File> {
    let file = fs::File::create(path).with_context(|| format!("{} cannot be made", path.display()))?;
    // SAFETY: the descriptor is open for as long as `file` lives.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("{} cannot be locked", path.display()));
    }
    Ok(file)
}

fn fetch_missing(name: &str, parent: &Path) -> Result<Kernel> {
    let mirrors = Mirrors::of_this_machine()?;
    let mut refusals = Vec::new();
    // Kept in case no suite has the wanted version any more.
    let mut newer = None;
    for &(archive, suite) in suites(name) {
        let mirror = match archive {
            Archive::Main => &mirrors.main,
            Archive::Security => &mirrors.security,
        };
        say(format!("looking for kernel {name} in {suite} at {mirror}"));
        let lists = workspace::cache().join("apt").join(suite);
        match PrivateLists::update(&lists, mirror, suite).and_then(|lists| Ok((release_in(&lists)?, lists))) {
            Ok((release, lists)) if is_version(&release, name) => {
                return install(name, parent, &lists, &release);
            }
            Ok((release, lists)) => {
                refusals.push(format!("{suite} has {release}"));
                newer.get_or_insert((release, lists));
            }
            Err(error) => refusals.push(format!("{suite}: {error:#}")),
        }
    }
    // Only the newest kernel stands for "the newest"; an older one is wanted
    // for its version.
    match newer {
        Some((release, lists)) if Some(&name) == NAMES.last() => {
            say(format!(
                "{name} has left the archive; {release} takes its place ({})",
                refusals.join("; ")
            ));
            install(name, parent, &lists, &release)
        }
        _ => bail!("no suite has it: {}", refusals.join("; ")),
    }
}

fn is_version(release: &str, name: &str) -> bool {
    release
        .strip_prefix(name)
        .is_some_and(|rest| rest.starts_with(['.', '-', '+']))
}

/// The release that the suite's metapackage stands for.
fn release_in(lists: &PrivateLists) -> Result<String> {
    let depends = lists.field("linux-image-cloud-amd64", "Depends")?;
    depends
        .split([',', '|'])
        .filter_map(|word| word.split_whitespace().next()?.strip_prefix("linux-image-"))
        .find(|release| release.ends_with("-cloud-amd64"))
        .map(str::to_owned)
        .with_context(|| format!("linux-image-cloud-amd64 depends on no image, only on `{depends}`"))
}

fn install(name: &str, parent: &Path, lists: &PrivateLists, release: &str) -> Result<Kernel> {
    // Newer packaging splits image and modules, and leaves `linux-image-*` an
    // empty shell.
    let binary = format!("linux-binary-{release}");
    let modules = format!("linux-modules-{release}");
    let mut packages = vec![if lists.knows(&binary) {
        binary
    } else {
        format!("linux-image-{release}")
    }];
    if lists.knows(&modules) {
        packages.push(modules);
    }
    let work = parent.join(format!(".partial-{name}-{}", std::process::id()));
    let result = unpack(name, parent, lists, release, &packages, &work);
    let _ = fs::remove_dir_all(&work);
    result
}

fn unpack(
    name: &str,
    parent: &Path,
    lists: &PrivateLists,
    release: &str,
    packages: &[String],
    work: &Path,
) -> Result<Kernel> {
    let (downloads, tree, ready) = (work.join("deb"), work.join("tree"), work.join("ready"));
    for folder in [&downloads, &tree, &ready.join("modules")] {
        fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    }
    say(format!("fetching kernel {name}: {}", packages.join(", ")));
    lists.download(packages, &downloads)?;
    say(format!("unpacking kernel {name}"));
    for file in fs::read_dir(&downloads)? {
        let file = file?.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            capture(Command::new("dpkg").arg("-x").arg(&file).arg(&tree))?;
        }
    }
    let modules = ["usr/lib/modules", "lib/modules"]
        .map(|folder| tree.join(folder).join(release))
        .into_iter()
        .find(|folder| folder.is_dir())
        .with_context(|| format!("{} hold no modules", packages.join(", ")))?;
    let image = [
        tree.join(format!("boot/vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ]
    .into_iter()
    .find(|image| image.is_file())
    .with_context(|| format!("{} hold no kernel image", packages.join(", ")))?;
    fs::copy(&image, ready.join("vmlinuz"))?;
    fs::rename(&modules, ready.join("modules").join(release))?;
    // A folder that an interrupted hand left there would block the rename.
    let _ = fs::remove_dir_all(parent.join(name));
    fs::rename(&ready, parent.join(name))
        .with_context(|| format!("kernel {name} cannot be moved into the cache"))?;
    Kernel::find(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_belongs_to_the_version_that_it_starts_with() {
        assert!(is_version("6.1.0-56-cloud-amd64", "6.1"));
        assert!(is_version("7.2.13+deb14-cloud-amd64", "7.2"));
        assert!(!is_version("6.12.95+deb12-cloud-amd64", "6.1"));
    }

    #[test]
    fn an_unknown_kernel_is_named_with_those_that_exist() {
        let error = Kernel::find("4.19").unwrap_err().to_string();
        assert!(error.contains("4.19") && error.contains("6.12"), "{error}");
    }

    #[test]
    fn every_kernel_has_a_suite_to_come_from() {
        assert!(NAMES.iter().all(|name| !suites(name).is_empty()));
    }
}
