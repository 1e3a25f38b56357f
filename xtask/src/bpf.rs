//! The tool chain for the eBPF program: a rustc with its library's sources, and
//! bpf-linker on an LLVM that reads what this rustc writes.
//!
//! A rustup toolchain with `rust-src` is preferred, a nightly first. Debian's
//! own rustc stands in where rustup has none. Nothing is installed here; that
//! is `setup`'s, which asks [`find`] what is missing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, bail};

use crate::shell::{capture, say};
use crate::{apt, workspace};

/// The release of bpf-linker that the build is tested with.
pub const LINKER_VERSION: &str = "0.13.0";

/// The oldest rustc that the eBPF program's libraries accept.
pub const OLDEST_RUSTC: (u32, u32) = (1, 95);

/// The majors of LLVM that this bpf-linker can be built on.
const LINKER_LLVMS: std::ops::RangeInclusive<u32> = 21..=23;

/// A compiler that can build the eBPF program.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// Its rustc, not a proxy.
    pub rustc: PathBuf,
    /// The cargo beside it.
    pub cargo: PathBuf,
    /// Its release.
    pub release: String,
    /// Its LLVM's major version.
    pub llvm: u32,
}

/// All that is needed.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// Compiles.
    pub compiler: Compiler,
    /// bpf-linker's path.
    pub linker: PathBuf,
}

/// The best tool chain that is installed.
#[must_use]
pub fn find() -> Option<Toolchain> {
    let linkers = linkers();
    compilers().into_iter().find_map(|compiler| {
        let linker = linkers.iter().find(|linker| linker.reads(compiler.llvm))?;
        Some(Toolchain {
            compiler,
            linker: linker.path.clone(),
        })
    })
}

/// The compilers with library sources, the preferred first.
#[must_use]
pub fn compilers() -> Vec<Compiler> {
    let rustup = env::var_os("RUSTUP_HOME").map_or_else(|| workspace::home().join(".rustup"), PathBuf::from);
    let mut roots: Vec<PathBuf> = fs::read_dir(rustup.join("toolchains"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    let is_nightly = |root: &PathBuf| {
        root.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("nightly"))
    };
    roots.sort_by_key(|root| (!is_nightly(root), root.clone()));
    roots.push(PathBuf::from("/usr"));
    roots.iter().filter_map(|root| compiler_in(root)).collect()
}

fn compiler_in(root: &Path) -> Option<Compiler> {
    let (rustc, cargo) = (root.join("bin/rustc"), root.join("bin/cargo"));
    if !root.join("lib/rustlib/src/rust/library/Cargo.lock").exists() || !cargo.exists() {
        return None;
    }
    let mut ask = Command::new(&rustc);
    scrub(&mut ask);
    let text = capture(ask.arg("-vV")).ok()?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    let release = field("release:")?.to_owned();
    if apt::version_pair(&release) < Some(OLDEST_RUSTC) {
        return None;
    }
    let llvm = apt::version_pair(field("LLVM version:")?)?.0;
    Some(Compiler {
        rustc,
        cargo,
        release,
        llvm,
    })
}

/// Takes away what rustup and cargo tell their children, which would send
/// another toolchain's tools to this one's libraries.
pub fn scrub(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        // CARGO_HOME and CARGO_HTTP_… etc. are the user's settings for any cargo.
        let kept = [
            "CARGO_HOME",
            "CARGO_HTTP_",
            "CARGO_NET_",
            "CARGO_REGISTRIES_",
            "CARGO_REGISTRY_",
            "CARGO_SOURCE_",
        ];
        let cargo = text == "CARGO" || text.starts_with("CARGO_");
        let foreign = text.starts_with("RUSTUP_TOOLCHAIN")
            || text.starts_with("RUSTC")
            || text.ends_with("RUSTFLAGS")
            || text == "LD_LIBRARY_PATH";
        if foreign || (cargo && !kept.iter().any(|kept| text.starts_with(kept))) {
            command.env_remove(&name);
        }
    }
}

struct Linker {
    path: PathBuf,
    /// The major of the LLVM it is linked with; none if that is part of it.
    llvm: Option<u32>,
}

impl Linker {
    /// An older LLVM cannot read a newer one's bitcode.
    fn reads(&self, llvm: u32) -> bool {
        self.llvm.is_none_or(|own| own >= llvm)
    }
}

fn linkers() -> Vec<Linker> {
    let home = env::var_os("CARGO_HOME").map_or_else(|| workspace::home().join(".cargo"), PathBuf::from);
    let mut paths = vec![home.join("bin/bpf-linker"), own_linker()];
    paths.extend(workspace::which("bpf-linker"));
    paths.into_iter().filter_map(linker_at).collect()
}

fn own_linker() -> PathBuf {
    workspace::cache().join("tools/bin/bpf-linker")
}

/// The linker at the path, if it runs and is of the pinned version's series.
fn linker_at(path: PathBuf) -> Option<Linker> {
    if !path.exists() {
        return None;
    }
    let version = capture(Command::new(&path).arg("--version")).ok()?;
    let version = version.trim().strip_prefix("bpf-linker ")?;
    if apt::version_pair(version) != apt::version_pair(LINKER_VERSION) {
        return None;
    }
    let libraries = capture(Command::new("ldd").arg(&path)).unwrap_or_default();
    let llvm = libraries.split_whitespace().find_map(|word| {
        word.strip_prefix("libLLVM")?
            .trim_start_matches(['-', '.', 's', 'o'])
            .split('.')
            .next()?
            .parse()
            .ok()
    });
    Some(Linker { path, llvm })
}

/// Builds bpf-linker on the LLVM of that major version, into the cache.
///
/// # Errors
/// There is no such LLVM here, or the build fails.
pub fn install_linker(llvm: u32) -> Result<()> {
    if !LINKER_LLVMS.contains(&llvm) {
        bail!("bpf-linker {LINKER_VERSION} cannot be built on LLVM {llvm}, which this rustc uses");
    }
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if !Path::new(&prefix).join("bin/llvm-config").exists() {
        apt::install(
            &[&format!("llvm-{llvm}-dev")],
            "bpf-linker, which turns the eBPF program into one object",
        )?;
    }
    say(format!(
        "building bpf-linker {LINKER_VERSION} on LLVM {llvm} (about a minute)"
    ));
    let root = workspace::cache().join("tools");
    let mut command = workspace::cargo();
    command
        .env("LLVM_PREFIX", &prefix)
        .current_dir("/")
        .args([
            "install",
            "bpf-linker",
            "--version",
            LINKER_VERSION,
            "--locked",
            "--force",
        ])
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{llvm}"),
            "--root",
        ])
        .arg(&root);
    // `cargo install` is about another package than the one around us.
    command.env_remove("RUSTFLAGS").stdout(std::io::stderr());
    crate::shell::run(&mut command)?;
    linker_at(own_linker()).with_context(|| format!("{} does not run", own_linker().display()))?;
    Ok(())
}
