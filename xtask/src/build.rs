//! `cargo xtask build`: the eBPF object first, then the binary that embeds it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::bpf::{Toolchain, scrub};
use crate::setup;
use crate::shell::{run, say};
use crate::workspace::{self, Profile};

/// Build the omirr binary.
#[derive(Args)]
pub struct Options {
    /// Optimise; the binary is then target/release/omirr
    #[arg(long)]
    release: bool,
}

/// # Errors
/// A part does not compile.
pub fn main(options: &Options) -> Result<ExitCode> {
    let binary = omirr(Profile::from_release_flag(options.release))?;
    say(format!("built {}", binary.display()));
    Ok(ExitCode::SUCCESS)
}

/// Sets up what building needs, builds, and returns the binary's path.
///
/// # Errors
/// A part does not compile.
pub fn omirr(profile: Profile) -> Result<PathBuf> {
    prepare_bpf()?;
    say("building omirr");
    cargo_build(profile, &["--package", "omirr", "--bin", "omirr"])?;
    Ok(workspace::binaries(profile).join("omirr"))
}

/// Runs `cargo build` for the profile.
///
/// # Errors
/// cargo fails.
pub fn cargo_build(profile: Profile, arguments: &[&str]) -> Result<()> {
    let mut command = workspace::cargo();
    command
        .arg("build")
        .args(arguments)
        .arg("--target-dir")
        .arg(workspace::target());
    if profile == Profile::Release {
        command.arg("--release");
    }
    run(&mut command)
}

/// Makes the eBPF object be what the next build of omirr should embed: the
/// object of the sources as they are, or none.
///
/// # Errors
/// The C compiler is missing, or the eBPF program does not compile.
pub fn prepare_bpf() -> Result<()> {
    let source = workspace::root().join("omirr-ebpf");
    let object = workspace::bpf_object();
    if !source.join("Cargo.toml").exists() {
        say(setup::without_bpf(&format!(
            "{} does not exist",
            source.display()
        )));
        return remove(&object);
    }
    match setup::bpf_toolchain()? {
        Ok(chain) => compile(&chain, &source, &object),
        Err(reason) => {
            say(setup::without_bpf(&reason));
            // An object of older sources must not slip in.
            remove(&object)
        }
    }
}

fn compile(chain: &Toolchain, source: &Path, object: &Path) -> Result<()> {
    say(format!(
        "building the eBPF program with rustc {}",
        chain.compiler.release
    ));
    let mut command = Command::new(&chain.compiler.cargo);
    scrub(&mut command);
    command
        .current_dir(source)
        .env("RUSTC", &chain.compiler.rustc)
        // `-Z build-std` on a rustc that is no nightly.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &chain.linker)
        .args([
            "build",
            "--release",
            "--target",
            "bpfel-unknown-none",
            "-Z",
            "build-std=core",
        ])
        .arg("--target-dir")
        .arg(source.join("target"));
    run(&mut command).context("the eBPF program does not build")?;
    let built = source.join("target/bpfel-unknown-none/release/omirr-ebpf");
    copy_if_changed(&built, object)
}

/// A new modification time would make cargo build omirr again.
fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("{} cannot be read", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let folder = to.parent().context("the object has a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    // By rename, so that a build that runs now reads the old or the new object.
    let part = to.with_extension("part");
    fs::write(&part, new).with_context(|| format!("{} cannot be written", part.display()))?;
    fs::rename(&part, to).with_context(|| format!("{} cannot be written", to.display()))
}

fn remove(object: &Path) -> Result<()> {
    match fs::remove_file(object) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", object.display()))
        }
        _ => Ok(()),
    }
}

/// Whether the eBPF object would be embedded by a build now.
#[must_use]
pub fn has_bpf() -> bool {
    workspace::bpf_object().exists()
}
