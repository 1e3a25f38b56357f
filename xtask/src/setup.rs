//! `cargo xtask setup`: finds or installs what is missing, and says what and why.
//!
//! Every command that builds or boots calls [`ensure`] first, with what it
//! needs, so that nobody has to run this by hand. When all is there it is done
//! well within a second.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use crate::kernel::{self, Kernel};
use crate::shell::say;
use crate::{apt, bpf, workspace};

/// Find or install what building and testing need.
#[derive(Args)]
pub struct Options {
    /// Only what building needs, not what booting guests needs
    #[arg(long)]
    build_only: bool,
}

/// # Errors
/// Something that is required is missing and cannot be installed.
pub fn main(options: &Options) -> Result<ExitCode> {
    match bpf_toolchain()? {
        Ok(chain) => say(format!(
            "eBPF: {} {} with {}",
            chain.compiler.rustc.display(),
            chain.compiler.release,
            chain.linker.display()
        )),
        Err(reason) => say(without_bpf(&reason)),
    }
    if !options.build_only {
        test_tools();
        match guests(&kernel::NAMES) {
            Ok(()) => say(format!(
                "guests: QEMU and kernels {} are ready",
                kernel::NAMES.join(", ")
            )),
            Err(reason) => bail!("guests cannot be booted here: {reason}"),
        }
    }
    say("all that is needed is here");
    Ok(ExitCode::SUCCESS)
}

/// What to say when the daemon is built without eBPF.
#[must_use]
pub fn without_bpf(reason: &str) -> String {
    format!("building without eBPF, so that omirr will watch with fanotify: {reason}")
}

/// The C compiler, which is required, and the eBPF tool chain, or the reason why
/// there is none.
///
/// # Errors
/// There is no C compiler.
pub fn bpf_toolchain() -> Result<Result<bpf::Toolchain, String>> {
    if workspace::which("cc").is_none() {
        apt::install(
            &["gcc", "libc6-dev"],
            "the C and assembler parts of ring, blake3 and zstd",
        )?;
    }
    if let Some(chain) = bpf::find() {
        return Ok(Ok(chain));
    }
    Ok(install_bpf().map_err(|error| format!("{error:#}")))
}

fn install_bpf() -> Result<bpf::Toolchain> {
    let compiler = match bpf::compilers().into_iter().next() {
        Some(compiler) => compiler,
        None => install_compiler()?,
    };
    say(format!(
        "the eBPF program is compiled by {} {}",
        compiler.rustc.display(),
        compiler.release
    ));
    if let Some(chain) = bpf::find() {
        return Ok(chain);
    }
    bpf::install_linker(compiler.llvm)?;
    match bpf::find() {
        Some(chain) => Ok(chain),
        None => bail!(
            "bpf-linker is installed, but does not read what {} writes",
            compiler.rustc.display()
        ),
    }
}

fn install_compiler() -> Result<bpf::Compiler> {
    const BY_HAND: &str = "no rustc here has its library's sources; \
        run `rustup toolchain install nightly --component rust-src`, then `cargo xtask setup`";
    if !apt::is_debian() {
        bail!("{BY_HAND}");
    }
    let (major, minor) = bpf::OLDEST_RUSTC;
    if apt::candidate_at_least("rustc-web", bpf::OLDEST_RUSTC).is_none() {
        bail!("{BY_HAND} (Debian's rustc-web would do from {major}.{minor} on, but apt knows none)");
    }
    apt::install(
        &["rustc-web", "cargo-web", "rust-web-src"],
        "compiling the eBPF program",
    )?;
    match bpf::compilers().into_iter().next() {
        Some(compiler) => Ok(compiler),
        None => bail!("Debian's rustc is installed, but has no library sources; {BY_HAND}"),
    }
}

/// What booting a guest takes: the program or file that shows it, and its package.
const GUEST_TOOLS: [(&str, &str); 8] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("ip", "iproute2"),
    ("xz", "xz-utils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("strip", "binutils"),
];

/// What the tests of nodes on this machine take: the program or file that shows
/// it, its package, and what for.
const TEST_TOOLS: [(&str, &str); 10] = [
    ("/usr/src/linux-source-6.1.tar.xz", "linux-source-6.1"),
    ("setfattr", "attr"),
    ("setfacl", "acl"),
    ("git", "git"),
    ("xz", "xz-utils"),
    ("ip", "iproute2"),
    ("rsync", "rsync"),
    ("sqlite3", "sqlite3"),
    ("mkfs.ext4", "e2fsprogs"),
    (
        "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
        "libfaketime",
    ),
];

/// What `cargo xtask bench` compares omirr with, and what it takes to do so: the
/// program or file that shows it, and its package.
const BENCH_TOOLS: [(&str, &str); 8] = [
    ("ip", "iproute2"),
    ("rsync", "rsync"),
    ("lsyncd", "lsyncd"),
    ("syncthing", "syncthing"),
    ("unison", "unison"),
    ("csync2", "csync2"),
    ("inotifywait", "inotify-tools"),
    ("/usr/src/linux-source-6.1.tar.xz", "linux-source-6.1"),
];

/// The tools that omirr is compared with, as far as they can be had here.
pub fn bench_tools() {
    // One by one, so that each that cannot be had is left out alone.
    for (shown_by, package) in BENCH_TOOLS {
        if !is_there(shown_by)
            && let Err(error) = apt::install(&[package], "comparing omirr with it")
        {
            say(format!("{package} is left out: {error:#}"));
        }
    }
}

/// Whether a program, or a file by its full path, is on this machine.
fn is_there(what: &str) -> bool {
    match what.starts_with('/') {
        true => Path::new(what).exists(),
        false => workspace::which(what).is_some(),
    }
}

/// A real tree and the everyday tools that the tests use, as far as they can be
/// had here; a test that lacks its own says so.
pub fn test_tools() {
    let missing: Vec<&str> = TEST_TOOLS
        .iter()
        .filter(|(shown_by, _)| !is_there(shown_by))
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty()
        && let Err(error) = apt::install(&missing, "mirroring a real tree in the tests")
    {
        say(format!("some tests will be skipped: {error:#}"));
    }
}

/// QEMU, what goes into a guest, and those kernels; or the reason why guests
/// cannot be had here.
///
/// # Errors
/// The reason, in words; building needs none of this.
pub fn guests(kernels: &[&str]) -> Result<(), String> {
    if !cfg!(target_arch = "x86_64") {
        return Err(format!(
            "the kernels are x86-64, this machine is {}",
            std::env::consts::ARCH
        ));
    }
    let mut missing: Vec<&str> = GUEST_TOOLS
        .iter()
        .filter(|(program, _)| workspace::which(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    // A busybox that needs libraries is of no use as a guest's only userland.
    if !missing.contains(&"busybox-static")
        && workspace::which("busybox").is_some_and(|path| !is_static(&path))
    {
        missing.push("busybox-static");
    }
    if !missing.is_empty()
        && let Err(error) = apt::install(&missing, "booting guests")
    {
        return Err(format!("{error:#}"));
    }
    for name in kernels {
        if Kernel::find(name).is_err()
            && let Err(error) = kernel::fetch(name)
        {
            return Err(format!("{error:#}"));
        }
    }
    Ok(())
}

/// A program without an interpreter segment needs nobody to load its libraries.
fn is_static(program: &Path) -> bool {
    std::process::Command::new("ldd")
        .arg(program)
        .output()
        .is_ok_and(|output| !output.status.success())
}
