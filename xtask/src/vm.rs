//! `cargo xtask vm`: boots a kernel and runs one command inside.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::guest::{Disk, Guest, Streams};
use crate::kernel::{self, Kernel};
use crate::shell::say;
use crate::workspace::{self, Profile};
use crate::{build, setup};

/// What to boot, with what inside.
#[derive(Args)]
pub struct Options {
    /// 5.10, 6.1, 6.12, 7.2, all of them (`all`), a kernel image, or a folder with vmlinuz and modules/RELEASE
    #[arg(long, value_name = "VERSION|PATH", default_value = "6.1")]
    kernel: String,
    /// Build omirr with optimisation
    #[arg(long)]
    release: bool,
    /// Memory in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Size of the file system on /mnt in MiB; 0 for none
    #[arg(long, default_value_t = 1024)]
    disk: u64,
    /// One processor, and a clock that counts its instructions: for measuring
    #[arg(long)]
    counted: bool,
    /// Load this kernel module at the start; may be repeated
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
    /// Put this program of the host, with its libraries, into the guest; may be repeated
    #[arg(long, value_name = "NAME")]
    program: Vec<String>,
    /// Put this file or folder of the host into the guest; may be repeated
    #[arg(long, value_name = "HOST:GUEST")]
    copy: Vec<String>,
    /// End the guest after so many seconds
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Give the command this terminal
    #[arg(short, long)]
    interactive: bool,
    /// The command; a single word with spaces in it goes through the guest's shell
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// # Errors
/// A guest cannot be put together or started.
pub fn main(options: &Options) -> Result<ExitCode> {
    let names: Vec<&str> = if options.kernel == "all" {
        kernel::NAMES.to_vec()
    } else {
        vec![options.kernel.as_str()]
    };
    if let Err(reason) = setup::guests(&names) {
        bail!("guests cannot be booted here: {reason}");
    }
    let profile = Profile::from_release_flag(options.release);
    let omirr = build::omirr(profile)?;
    let init = build_init()?;
    let mut code = 0;
    for name in names {
        let kernel = Kernel::find(name)?;
        say(format!(
            "booting {}",
            kernel.release().unwrap_or_else(|| name.to_owned())
        ));
        let outcome = guest(options, kernel, &init, &omirr)?.run(&words(&options.command))?;
        if outcome.code().is_none() {
            bail!("{}", outcome.describe());
        }
        let seconds = outcome.time.as_secs_f32();
        say(format!(
            "the guest ended after {seconds:.1} s; its log is {}",
            outcome.log.display()
        ));
        // All kernels have their turn; the first failure is what counts.
        if code == 0 {
            code = outcome.code().unwrap_or(1);
        }
    }
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// Builds the guest's first process.
///
/// # Errors
/// It does not compile.
pub fn build_init() -> Result<PathBuf> {
    build::cargo_build(
        Profile::Debug,
        &["--quiet", "--package", "omirr-tests", "--bin", "guest-init"],
    )?;
    Ok(workspace::binaries(Profile::Debug).join("guest-init"))
}

fn guest(options: &Options, kernel: Kernel, init: &Path, omirr: &Path) -> Result<Guest> {
    let log = format!("vm-{}", kernel.name);
    let mut guest = Guest::new(kernel, init)
        .name(&log)
        .memory_mib(options.memory)
        .timeout(Duration::from_secs(options.timeout))
        .streams(if options.interactive {
            Streams::Interactive
        } else {
            Streams::PassOn
        })
        .program_at(omirr, "/usr/local/bin/omirr")
        .env("OMIRR_BIN", "/usr/local/bin/omirr")
        .module("veth");
    if options.counted {
        guest = guest.counted();
    }
    if options.disk > 0 {
        guest = guest.disk(Disk::ext4(options.disk, "/mnt"));
    }
    for module in &options.module {
        guest = guest.module(module);
    }
    for program in &options.program {
        guest = guest.program(program)?;
    }
    for pair in &options.copy {
        let (host, path) = pair
            .rsplit_once(':')
            .with_context(|| format!("`--copy {pair}` is not HOST:GUEST"))?;
        let host = Path::new(host);
        guest = if host.is_dir() {
            guest.tree(host, path)
        } else {
            guest.file(host, path)
        };
    }
    Ok(guest)
}

fn words(command: &[String]) -> Vec<String> {
    match command {
        [line] if line.contains(char::is_whitespace) => ["sh", "-c", line].map(str::to_owned).to_vec(),
        words => words.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_single_word_with_spaces_goes_through_the_shell() {
        let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(words(&own(&["uname"])), ["uname"]);
        assert_eq!(words(&own(&["echo", "a b"])), ["echo", "a b"]);
        assert_eq!(words(&own(&["uname -r; id"])), ["sh", "-c", "uname -r; id"]);
    }
}
