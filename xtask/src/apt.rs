//! Debian packages: installing them on this machine, and reading other
//! releases' lists without touching it.
//!
//! Installing never removes what the user has, with two exceptions that are
//! announced: a `qemu-*` package of another version, and the `busybox` that
//! `busybox-static` replaces. Which mirror to use is read
//! from the machine's own sources and never assumed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};

use crate::shell::{capture, output, run, say};
use crate::workspace::{is_root, which};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The command that the user would run to install the packages.
#[must_use]
pub fn by_hand(packages: &[&str]) -> String {
    format!(
        "sudo apt-get install --no-install-recommends {}",
        packages.join(" ")
    )
}

/// Installs the packages.
///
/// # Errors
/// This is no Debian, this is not root, a package is not known, or apt fails.
/// The text ends with what to do by hand.
pub fn install(packages: &[&str], why: &str) -> Result<()> {
    if !is_debian() {
        bail!(
            "needed for {why}: the programs that Debian packages as {}; install them by hand",
            packages.join(", ")
        );
    }
    if !is_root() {
        bail!(
            "needed for {why}: {}; run `{}`",
            packages.join(", "),
            by_hand(packages)
        );
    }
    say(format!("installing {} (for {why})", packages.join(", ")));
    if packages.iter().any(|package| candidate(package).is_none()) {
        update()?;
    }
    if let Some(package) = packages.iter().find(|package| candidate(package).is_none()) {
        bail!("apt knows no package {package}, needed for {why}; is bookworm-security among its sources?");
    }
    refuse_removals(packages)?;
    if run(&mut apt_install(packages)).is_err() {
        // Old lists name versions that have left the archive.
        update()?;
        run(&mut apt_install(packages)).with_context(|| format!("needed for {why}"))?;
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-o", "DPkg::Lock::Timeout=300"]);
    command
}

fn apt_install(packages: &[&str]) -> Command {
    let mut command = apt_get();
    command
        .args([
            "-o",
            "Dpkg::Use-Pty=0",
            "install",
            "--yes",
            "--no-install-recommends",
        ])
        .args(packages);
    command
}

/// Fetches the machine's own package lists, once per process.
fn update() -> Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    say("fetching apt's package lists, because those at hand are missing or old");
    run(apt_get().arg("update"))
}

fn refuse_removals(packages: &[&str]) -> Result<()> {
    let mut command = apt_install(packages);
    command.arg("--simulate");
    let plan = String::from_utf8_lossy(&output(&mut command)?.stdout).into_owned();
    let removed: Vec<&str> = plan
        .lines()
        .filter_map(|line| line.strip_prefix("Remv ")?.split_whitespace().next())
        .collect();
    // What busybox-static takes the place of, and what belongs to another QEMU.
    let replaced = |package: &&str| *package == "busybox" || package.starts_with("qemu-");
    let (ours, others): (Vec<&str>, Vec<&str>) = removed.iter().partition(|package| replaced(package));
    if !others.is_empty() {
        bail!(
            "installing {} would remove {}; decide that by hand",
            packages.join(", "),
            others.join(", ")
        );
    }
    if !ours.is_empty() {
        say(format!(
            "this removes {}, which does not go with them",
            ours.join(", ")
        ));
    }
    Ok(())
}

/// The version that apt would install.
#[must_use]
pub fn candidate(package: &str) -> Option<String> {
    let policy = capture(
        Command::new("apt-cache")
            .args(["policy", package])
            .env("LC_ALL", "C"),
    )
    .ok()?;
    let version = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))?
        .trim();
    (version != "(none)").then(|| version.to_owned())
}

/// Like [`candidate`], after fetching the lists when they know none that is at
/// least `minimum` and this may be done.
#[must_use]
pub fn candidate_at_least(package: &str, minimum: (u32, u32)) -> Option<String> {
    let good = || candidate(package).filter(|version| version_pair(version) >= Some(minimum));
    good().or_else(|| {
        if is_root() {
            update().ok()?;
        }
        good()
    })
}

/// Major and minor number of a version such as `1:22.1.8-1~deb12u1`.
#[must_use]
pub fn version_pair(version: &str) -> Option<(u32, u32)> {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    let mut numbers = version.split(['.', '-', '+', '~', ' ']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Whether apt here installs Debian's packages.
#[must_use]
pub fn is_debian() -> bool {
    os_release("ID").as_deref() == Some("debian") && which("apt-get").is_some()
}

fn os_release(key: &str) -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value.trim_matches('"').to_owned())
}

/// The Debian mirrors that this machine uses.
#[derive(Debug, PartialEq, Eq)]
pub struct Mirrors {
    /// Carries the releases themselves.
    pub main: String,
    /// Carries their security updates.
    pub security: String,
}

impl Mirrors {
    /// Read from apt's sources.
    ///
    /// # Errors
    /// No source names a Debian mirror.
    pub fn of_this_machine() -> Result<Self> {
        let codename = os_release("VERSION_CODENAME").unwrap_or_default();
        let mut texts = Vec::new();
        let parts = fs::read_dir("/etc/apt/sources.list.d")
            .into_iter()
            .flatten()
            .filter_map(Result::ok);
        for path in
            std::iter::once(PathBuf::from("/etc/apt/sources.list")).chain(parts.map(|entry| entry.path()))
        {
            if let Ok(text) = fs::read_to_string(&path) {
                texts.push((path, text));
            }
        }
        let sources = texts
            .iter()
            .flat_map(|(path, text)| match path.extension().and_then(|e| e.to_str()) {
                Some("list") => one_line_sources(text),
                Some("sources") => stanza_sources(text),
                _ => Vec::new(),
            });
        Self::among(sources, &codename)
            .context("apt's sources here name no Debian mirror to fetch kernels from; use `--kernel PATH`")
    }

    fn among(sources: impl Iterator<Item = Source>, codename: &str) -> Option<Self> {
        let (mut main, mut security) = (None, None);
        for source in sources.filter(|source| source.components.iter().any(|component| component == "main")) {
            for suite in &source.suites {
                if suite.ends_with("-security") || suite.ends_with("/updates") {
                    security.get_or_insert_with(|| source.uri.clone());
                } else if suite == codename
                    || ["stable", "testing", "unstable", "sid"].contains(&suite.as_str())
                {
                    main.get_or_insert_with(|| source.uri.clone());
                }
            }
        }
        let main = main?;
        // The two archives lie side by side on every full mirror.
        let security = security.unwrap_or_else(|| format!("{}-security", main.trim_end_matches('/')));
        Some(Self { main, security })
    }
}

#[derive(Debug)]
struct Source {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
}

/// `deb [options] URI SUITE COMPONENT…`
fn one_line_sources(text: &str) -> Vec<Source> {
    let parse = |line: &str| {
        let line = line.split('#').next()?.trim().strip_prefix("deb")?;
        let line = line.strip_prefix([' ', '\t'])?.trim_start();
        let line = if line.starts_with('[') {
            line.split_once(']')?.1
        } else {
            line
        };
        let mut words = line.split_whitespace().map(str::to_owned);
        Some(Source {
            uri: words.next()?,
            suites: vec![words.next()?],
            components: words.collect(),
        })
    };
    text.lines().filter_map(parse).collect()
}

/// The `Types:`, `URIs:`, … form.
fn stanza_sources(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |name: &str| -> Vec<String> {
            let mut words = Vec::new();
            let mut inside = false;
            for line in stanza {
                if !line.starts_with([' ', '\t']) {
                    inside = line
                        .split_once(':')
                        .is_some_and(|(key, _)| key.eq_ignore_ascii_case(name));
                }
                if inside {
                    let value = if line.starts_with([' ', '\t']) {
                        line
                    } else {
                        &line[name.len() + 1..]
                    };
                    words.extend(value.split_whitespace().map(str::to_owned));
                }
            }
            words
        };
        let off = field("Enabled")
            .iter()
            .any(|value| ["no", "false", "0", "off"].contains(&value.as_str()));
        if !off && field("Types").iter().any(|kind| kind == "deb") {
            for uri in field("URIs") {
                sources.push(Source {
                    uri,
                    suites: field("Suites"),
                    components: field("Components"),
                });
            }
        }
    }
    sources
}

/// Package lists of one suite, in a folder of their own.
#[derive(Debug)]
pub struct PrivateLists {
    folder: PathBuf,
}

impl PrivateLists {
    /// Fetches the suite's lists into the folder, checked against Debian's keys.
    ///
    /// # Errors
    /// The folder cannot be written, or apt cannot fetch or verify the lists.
    pub fn update(folder: &Path, mirror: &str, suite: &str) -> Result<Self> {
        for inner in ["lists/partial", "cache/archives/partial", "preferences.d"] {
            let inner = folder.join(inner);
            fs::create_dir_all(&inner).with_context(|| format!("{} cannot be made", inner.display()))?;
        }
        let signed = if Path::new(KEYRING).exists() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        fs::write(
            folder.join("sources.list"),
            format!("deb {signed}{mirror} {suite} main\n"),
        )?;
        fs::write(folder.join("status"), "")?;
        let lists = Self {
            folder: folder.to_owned(),
        };
        let result = output(lists.apt("apt-get").arg("update"))?;
        if !result.status.success() {
            let words = String::from_utf8_lossy(&result.stderr);
            let errors: Vec<&str> = words
                .lines()
                .filter_map(|line| line.strip_prefix("E: "))
                .collect();
            bail!(
                "apt cannot fetch or verify the package lists: {}",
                errors.join("; ")
            );
        }
        Ok(lists)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        let at = |inner: &str| self.folder.join(inner).display().to_string();
        for option in [
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            "Dir::Etc::sourceparts=-".to_owned(),
            // A pin meant for this machine says nothing about a guest's kernel.
            format!("Dir::Etc::preferences={}", at("preferences")),
            format!("Dir::Etc::preferencesparts={}", at("preferences.d")),
            format!("Dir::State::Lists={}", at("lists")),
            format!("Dir::State::status={}", at("status")),
            format!("Dir::Cache={}", at("cache")),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            // The cache belongs to the user who runs this, not to `_apt`.
            "APT::Sandbox::User=root".to_owned(),
            // A mirror may lag behind by weeks. The lists are still signed; that
            // they are not the newest harms no kernel that only a guest boots.
            "Acquire::Check-Valid-Until=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "APT::Get::List-Cleanup=false".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }

    /// Whether the suite has the package.
    #[must_use]
    pub fn knows(&self, package: &str) -> bool {
        self.field(package, "Version").is_ok()
    }

    /// A field of the package's newest version.
    ///
    /// # Errors
    /// There is no such package, or it has no such field.
    pub fn field(&self, package: &str, field: &str) -> Result<String> {
        let text = capture(self.apt("apt-cache").args(["show", "--no-all-versions", package]))?;
        text.lines()
            .filter_map(|line| line.split_once(": "))
            .find(|(name, _)| *name == field)
            .map(|(_, value)| value.to_owned())
            .with_context(|| format!("the package {package} has no field {field}"))
    }

    /// Downloads the packages' files into the folder.
    ///
    /// # Errors
    /// apt fails.
    pub fn download(&self, packages: &[String], into: &Path) -> Result<()> {
        run(self
            .apt("apt-get")
            .args(["-q", "download"])
            .args(packages)
            .current_dir(into)
            .stdout(std::io::stderr()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZAS: &str = "\
Types: deb
# a comment inside a stanza
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites:
 bookworm-security
Components: main contrib
";

    #[test]
    fn mirrors_are_read_from_stanzas() {
        let mirrors = Mirrors::among(stanza_sources(STANZAS).into_iter(), "bookworm").unwrap();
        assert_eq!(mirrors.main, "http://mirror.example/debian");
        assert_eq!(mirrors.security, "http://mirror.example/debian-security");
    }

    #[test]
    fn mirrors_are_read_from_lines_and_strangers_are_left_out() {
        let text = "\
# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] https://other.example/linux/debian bookworm stable
deb https://packages.example/apt tool-bookworm main
deb-src http://source.example/debian bookworm main
deb\t[arch=amd64] http://mirror.example/debian/ bookworm main contrib # the nearest
";
        let mirrors = Mirrors::among(one_line_sources(text).into_iter(), "bookworm").unwrap();
        assert_eq!(mirrors.main, "http://mirror.example/debian/");
        assert_eq!(mirrors.security, "http://mirror.example/debian-security");
    }

    #[test]
    fn a_disabled_stanza_counts_for_nothing() {
        let text = STANZAS.replace("Types: deb\n", "Types: deb\nEnabled: no\n");
        assert_eq!(
            Mirrors::among(stanza_sources(&text).into_iter(), "bookworm"),
            None
        );
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert_eq!(version_pair("1.96.0+dfsg1-1~deb12u2"), Some((1, 96)));
        assert_eq!(version_pair("1:22.1.8-1~deb12u1"), Some((22, 1)));
        assert_eq!(version_pair("unknown"), None);
    }
}
