//! Booting a kernel under QEMU and running one command inside.
//!
//! What goes in: a kernel, programs and files of this machine, a command. What
//! comes out: the command's exit code, what it printed, and a log with the
//! kernel's console in `target/vm`. The host's own state is never touched.
//!
//! The guest has busybox, `ip` and `tc`, the programs that were asked for with
//! their libraries, and `guest-init` as its first process, which reads its orders
//! from `/guest`; the layout of that folder is described there. busybox's shell
//! prefers its own applets to programs in `PATH`: name those by their path.

pub mod initramfs;
pub mod modules;
pub mod qemu;

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use crate::kernel::Kernel;
use crate::shell::{capture, say};
use crate::workspace::{self, which};
use initramfs::Archive;
use modules::Modules;
use qemu::{End, Machine, PowerOff};

/// How many guests run at once, in all processes together. Each keeps about two
/// processors busy; more at once only makes every one of them slower than its
/// deadlines allow for.
const GUESTS_AT_ONCE: usize = 2;

/// How often a guest is booted before its kernel counts as one that does not.
const BOOT_ATTEMPTS: u32 = 3;

/// A guest that is being put together.
#[derive(Clone, Debug)]
pub struct Guest {
    kernel: Kernel,
    init: PathBuf,
    name: String,
    memory_mib: u32,
    cpus: u32,
    counted: bool,
    timeout: Duration,
    programs: Vec<(PathBuf, String)>,
    files: Vec<(PathBuf, String)>,
    trees: Vec<(PathBuf, String)>,
    environment: Vec<(OsString, OsString)>,
    modules: Vec<String>,
    disks: Vec<Disk>,
    /// Images of disks that stay, by their places among the disks.
    images: Vec<(usize, PathBuf)>,
    power_off: Option<PowerOff>,
    kernel_arguments: String,
    streams: Streams,
}

/// An empty file system on a disk of its own, or one filled from a folder.
#[derive(Clone, Debug)]
pub struct Disk {
    /// As in `mkfs.ext4`.
    pub file_system: String,
    /// The image is sparse: only what is written takes space.
    pub size_mib: u64,
    /// Where it is mounted in the guest.
    pub mount: String,
    /// With ext4: the folder of the host whose content it starts with.
    pub content: Option<PathBuf>,
}

impl Disk {
    /// An empty ext4 file system.
    #[must_use]
    pub fn ext4(size_mib: u64, mount: &str) -> Self {
        Self {
            file_system: "ext4".to_owned(),
            size_mib,
            mount: mount.to_owned(),
            content: None,
        }
    }
}

/// Where the command's output goes while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// Only into the outcome.
    Keep,
    /// To this process's stdout too.
    PassOn,
    /// This process's terminal is the command's.
    Interactive,
}

/// How a guest ended.
#[derive(Debug)]
pub struct Outcome {
    /// How the run came to its end.
    pub end: End,
    /// All that the command printed, stdout and stderr.
    pub output: String,
    /// The log of console and output.
    pub log: PathBuf,
    /// From QEMU's start to its end.
    pub time: Duration,
}

impl Outcome {
    /// The command's exit code; none if the guest did not live to tell.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        match self.end {
            End::Said(code) => Some(code),
            _ => None,
        }
    }

    /// What happened, in words, with the end of the log when it was no success.
    #[must_use]
    pub fn describe(&self) -> String {
        let seconds = self.time.as_secs_f32();
        let mut text = match &self.end {
            End::Said(0) => return format!("succeeded after {seconds:.1} s"),
            End::Said(code) => {
                format!("the command failed with exit code {code} after {seconds:.1} s")
            }
            End::Panic(line) => format!("the guest's kernel panicked: {line}"),
            End::NotBooted(why) => format!("the guest did not boot: {why}"),
            End::Timeout(limit) => format!("the guest did not end within {} s", limit.as_secs()),
            End::PoweredOff => format!("the power was cut after {seconds:.1} s, as wanted"),
            End::Silent => {
                format!("the guest stopped after {seconds:.1} s without a word from its init")
            }
        };
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        // What the kernel says while it boots is of interest only if it did not.
        let booted = lines.iter().position(|line| line.ends_with("init: started"));
        let from = booted.unwrap_or(0).max(lines.len().saturating_sub(300));
        let tail = &lines[from..];
        let _ = write!(
            text,
            "\n--- the end of {}:\n{}\n---",
            self.log.display(),
            tail.join("\n")
        );
        text
    }
}

impl Guest {
    /// A guest with that kernel, whose first process is the `guest-init` at the
    /// given path.
    #[must_use]
    pub fn new(kernel: Kernel, init: &Path) -> Self {
        Self {
            name: format!("guest-{}", kernel.name),
            kernel,
            init: init.to_owned(),
            memory_mib: 1024,
            cpus: 2,
            counted: false,
            timeout: Duration::from_secs(180),
            programs: Vec::new(),
            files: Vec::new(),
            trees: Vec::new(),
            environment: Vec::new(),
            modules: Vec::new(),
            disks: Vec::new(),
            images: Vec::new(),
            power_off: None,
            kernel_arguments: String::new(),
            streams: Streams::Keep,
        }
    }

    /// What the log is called.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.name = name
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || "-._".contains(c) {
                    c
                } else {
                    '-'
                }
            })
            .collect();
        self
    }

    /// Memory, 1024 MiB unless told. Everything that is put in takes some.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Processors, 2 unless told.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Lets the guest's clock count instructions, a nanosecond each, on one
    /// processor: what takes no time in reality takes none there, and two runs of
    /// the same work take the same.
    #[must_use]
    pub fn counted(mut self) -> Self {
        self.counted = true;
        self.cpus = 1;
        self
    }

    /// How long the whole run may take, 180 s unless told.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// A program of the host with its libraries, at the given path.
    #[must_use]
    pub fn program_at(mut self, host: &Path, path: &str) -> Self {
        self.programs.push((host.to_owned(), path.to_owned()));
        self
    }

    /// A program that lies in the host's `PATH`, at the same path.
    ///
    /// # Errors
    /// There is no such program.
    pub fn program(self, name: &str) -> Result<Self> {
        let path = which(name).with_context(|| format!("there is no program {name} here"))?;
        let at = path
            .to_str()
            .context("the path of a program is UTF-8")?
            .to_owned();
        Ok(self.program_at(&path, &at))
    }

    /// A file of the host at the given path.
    #[must_use]
    pub fn file(mut self, host: &Path, path: &str) -> Self {
        self.files.push((host.to_owned(), path.to_owned()));
        self
    }

    /// A folder of the host at the given path, in memory. A large one is better
    /// off on a [`Disk`].
    #[must_use]
    pub fn tree(mut self, host: &Path, path: &str) -> Self {
        self.trees.push((host.to_owned(), path.to_owned()));
        self
    }

    /// A variable for the command.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// A kernel module to load at the start, with those that it needs.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// A disk with a file system, mounted before the command starts.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// A disk whose image stays when the guest is gone; it is made if it is not
    /// there, and else taken as another guest has left it.
    #[must_use]
    pub fn disk_in(mut self, disk: Disk, image: &Path) -> Self {
        self.images.push((self.disks.len(), image.to_owned()));
        self.disk(disk)
    }

    /// Cuts the power so long after the command has printed that text: what the
    /// guest's kernel has not written to its disks by then is gone.
    #[must_use]
    pub fn power_off(mut self, after: &str, delay: Duration) -> Self {
        self.power_off = Some(PowerOff {
            after: after.to_owned(),
            delay,
        });
        self
    }

    /// More of the kernel's command line.
    #[must_use]
    pub fn kernel_arguments(mut self, arguments: &str) -> Self {
        self.kernel_arguments.push_str(arguments);
        self.kernel_arguments.push(' ');
        self
    }

    /// Where the command's output goes.
    #[must_use]
    pub fn streams(mut self, streams: Streams) -> Self {
        self.streams = streams;
        self
    }

    /// Boots, runs the command and powers off.
    ///
    /// # Errors
    /// The guest cannot be put together or QEMU not be started. That the command
    /// failed is no error but an outcome.
    pub fn run<S: AsRef<OsStr>>(&self, command: &[S]) -> Result<Outcome> {
        let folder = workspace::guests();
        fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        let _slot = Slot::take(&folder)?;
        let scratch = Scratch::make(&folder, &self.name)?;
        let initramfs = scratch.0.join("initramfs");
        fs::write(&initramfs, self.archive(command)?)
            .with_context(|| format!("{} cannot be written", initramfs.display()))?;
        let mut disks = Vec::new();
        for (number, disk) in self.disks.iter().enumerate() {
            let kept = self.images.iter().find(|(place, _)| *place == number);
            disks.push(match kept {
                Some((_, image)) if image.exists() => image.clone(),
                Some((_, image)) => make_disk(disk, image)?,
                None => make_disk(disk, &scratch.0.join(format!("disk{number}")))?,
            });
        }
        let log_path = folder.join(format!("{}.log", self.name));
        let machine = Machine {
            image: &self.kernel.image,
            initramfs: &initramfs,
            disks: &disks,
            memory_mib: self.memory_mib,
            cpus: self.cpus,
            counted: self.counted,
            kernel_arguments: &self.kernel_arguments,
            power_off: self.power_off.as_ref(),
        };
        let mut outcome = self.boot(&machine, &log_path)?;
        for _ in 1..BOOT_ATTEMPTS {
            // Before `init`, nothing of ours has run: emulated processors now and
            // then hang there. A kernel that cannot boot at all still fails.
            let End::NotBooted(why) = &outcome.end else {
                break;
            };
            say(format!("booting {} again: {why}", self.name));
            outcome = self.boot(&machine, &log_path)?;
        }
        Ok(outcome)
    }

    fn boot(&self, machine: &Machine<'_>, log_path: &Path) -> Result<Outcome> {
        let mut log =
            File::create(log_path).with_context(|| format!("{} cannot be made", log_path.display()))?;
        let stdin = if self.streams == Streams::Interactive {
            Stdio::inherit()
        } else {
            Stdio::null()
        };
        let started = Instant::now();
        let mut output = Vec::new();
        let end = machine.run(stdin, self.timeout, &mut log, |bytes| {
            output.extend_from_slice(bytes);
            if self.streams != Streams::Keep {
                let mut stdout = std::io::stdout().lock();
                // Whoever closed our stdout does not want the rest.
                let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
            }
        })?;
        let output = String::from_utf8_lossy(&output).into_owned();
        Ok(Outcome {
            end,
            output,
            log: log_path.to_owned(),
            time: started.elapsed(),
        })
    }

    fn archive<S: AsRef<OsStr>>(&self, command: &[S]) -> Result<Vec<u8>> {
        let mut archive = Archive::new();
        archive.program(&stripped(&self.init)?, "/init")?;
        for (host, path) in &self.programs {
            archive.program(&stripped(host)?, path)?;
        }
        // busybox has an `ip` too, but one without network namespaces.
        for name in ["ip", "tc"] {
            if let Some(host) = which(name) {
                archive.program(&host, &format!("/sbin/{name}"))?;
            }
        }
        for (host, path) in &self.files {
            archive.host_file(host, path)?;
        }
        for (host, path) in &self.trees {
            archive.host_tree(host, path)?;
        }
        archive.busybox(&which("busybox").context("there is no busybox here; run `cargo xtask setup`")?)?;
        archive.file(
            "/etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        );
        archive.file("/etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n");
        archive.file("/etc/hosts", 0o644, b"127.0.0.1 localhost\n");
        self.add_orders(&mut archive, command)?;
        Ok(archive.finish())
    }

    /// The folder `/guest`, which tells init what to do.
    fn add_orders<S: AsRef<OsStr>>(&self, archive: &mut Archive, command: &[S]) -> Result<()> {
        let mut arguments = Vec::new();
        for word in command {
            arguments.extend_from_slice(word.as_ref().as_bytes());
            arguments.push(0);
        }
        archive.file("/guest/command", 0o644, &arguments);
        let mut environment = Vec::new();
        for (name, value) in &self.environment {
            environment.extend_from_slice(name.as_bytes());
            environment.push(b'=');
            environment.extend_from_slice(value.as_bytes());
            environment.push(0);
        }
        archive.file("/guest/environment", 0o644, &environment);
        if self.streams == Streams::Interactive {
            archive.file("/guest/terminal", 0o644, b"");
        }

        let mut wanted: Vec<String> = Vec::new();
        let mut mounts = String::new();
        if !self.disks.is_empty() {
            wanted.extend(["virtio_pci", "virtio_blk"].map(str::to_owned));
        }
        for (disk, letter) in self.disks.iter().zip('a'..='z') {
            wanted.push(disk.file_system.clone());
            let _ = writeln!(mounts, "/dev/vd{letter} {} {}", disk.file_system, disk.mount);
        }
        wanted.extend(self.modules.iter().cloned());
        archive.file("/guest/mounts", 0o644, mounts.as_bytes());

        let mut order = String::new();
        if let Some(folder) = self.kernel.modules.as_ref().filter(|_| !wanted.is_empty()) {
            let release = self.kernel.release().unwrap_or_default();
            // For modprobe, and for the kernel's own calls of it.
            let mut table = String::new();
            for module in Modules::open(folder)?.with_dependencies(&wanted)? {
                let path = format!("/lib/modules/{release}/{}.ko", module.name);
                archive.file(&path, 0o644, &module.object);
                let _ = writeln!(order, "{path}");
                let needs: Vec<String> = module.depends.iter().map(|name| format!("{name}.ko")).collect();
                let _ = writeln!(table, "{}.ko: {}", module.name, needs.join(" "));
            }
            archive.file(
                &format!("/lib/modules/{release}/modules.dep"),
                0o644,
                table.as_bytes(),
            );
        }
        archive.file("/guest/modules", 0o644, order.as_bytes());
        Ok(())
    }
}

fn make_disk(disk: &Disk, image: &Path) -> Result<PathBuf> {
    let file = File::create(image).with_context(|| format!("{} cannot be made", image.display()))?;
    file.set_len(disk.size_mib * 1024 * 1024)
        .with_context(|| format!("{} cannot be made", image.display()))?;
    let program = format!("mkfs.{}", disk.file_system);
    let mut command = Command::new(which(&program).with_context(|| format!("there is no {program} here"))?);
    match (disk.file_system.as_str(), &disk.content) {
        ("ext4", content) => {
            command.args(["-q", "-F"]);
            if let Some(content) = content {
                command.arg("-d").arg(content);
            }
        }
        // Newer tools switch on by default what the oldest kernel cannot mount.
        ("xfs", None) => {
            command.args(["-q", "-i", "nrext64=0"]);
        }
        (other, Some(_)) => bail!("only ext4 can start with content, not {other}"),
        _ => {}
    }
    capture(command.arg(image))?;
    Ok(image.to_owned())
}

/// The program without its debugging symbols, which are most of its size and
/// of no use in a guest. Kept, because the same one goes into many guests.
fn stripped(program: &Path) -> Result<PathBuf> {
    let Some(strip) = which("strip") else {
        return Ok(program.to_owned());
    };
    let data = fs::metadata(program).with_context(|| format!("{} cannot be read", program.display()))?;
    let changed = data
        .modified()?
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    let folder = workspace::guests().join("stripped");
    fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    let name = program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let ready = folder.join(format!("{name}-{}-{changed}", data.len()));
    if ready.exists() {
        return Ok(ready);
    }
    let part = folder.join(format!(".{name}-{}-{}", std::process::id(), next_number()));
    if capture(
        Command::new(strip)
            .arg("--strip-debug")
            .arg("-o")
            .arg(&part)
            .arg(program),
    )
    .is_err()
    {
        // A script, for example.
        return Ok(program.to_owned());
    }
    // Only the last few states of a program are worth keeping.
    let mut older: Vec<(SystemTime, PathBuf)> = fs::read_dir(&folder)?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let own = entry
                .file_name()
                .to_string_lossy()
                .strip_prefix(&name)?
                .starts_with('-');
            own.then_some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    older.sort();
    for (_, path) in older.iter().rev().skip(3) {
        let _ = fs::remove_file(path);
    }
    fs::rename(&part, &ready).with_context(|| format!("{} cannot be written", ready.display()))?;
    Ok(ready)
}

fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A folder for one run, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn make(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(format!(".run-{name}-{}-{}", std::process::id(), next_number()));
        fs::create_dir_all(&path).with_context(|| format!("{} cannot be made", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The right to run one of [`GUESTS_AT_ONCE`] guests; given back when dropped.
struct Slot(#[expect(dead_code, reason = "the lock lives as long as the file is open")] File);

impl Slot {
    fn take(folder: &Path) -> Result<Self> {
        loop {
            for number in 0..GUESTS_AT_ONCE {
                let path = folder.join(format!(".slot-{number}"));
                let file =
                    File::create(&path).with_context(|| format!("{} cannot be made", path.display()))?;
                // SAFETY: the descriptor is open for as long as `file` lives.
                if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
                    return Ok(Self(file));
                }
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}
