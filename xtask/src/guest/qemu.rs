//! One run of QEMU: starts it, reads both serial lines, ends it.
//!
//! The first serial line is the kernel's console, where `init` says its last
//! word; the second carries what the command in the guest prints. The machine is
//! always emulated: stock kernels hang on some hosts' KVM, and a hang costs more
//! than emulation.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::shell::describe;
use crate::workspace::which;

/// How long a kernel may take to reach `init`, which is ten times what it takes
/// on an idle machine.
const BOOTING: Duration = Duration::from_secs(60);

/// All that QEMU can emulate but for two things. `cx16`: QEMU 7.2 leaves garbage
/// in the flags after CMPXCHG16B; an interrupt at that very point then returns
/// into another processor mode, and the guest dies of a double fault, about once
/// in ten boots. Without it the kernel's allocator takes another way. `la57`: a
/// fifth level of page tables makes every emulated page walk longer.
const CPU: &str = "max,cx16=off,la57=off";

/// What the console shows when the kernel is beyond help.
const PANIC_MARKS: [&str; 7] = [
    "Kernel panic",
    "Oops: ",
    "BUG: unable to handle",
    "BUG: kernel NULL pointer",
    "general protection fault",
    "kernel BUG at",
    "Attempted to kill init",
];

/// The machine to start.
pub struct Machine<'a> {
    /// The kernel's image.
    pub image: &'a Path,
    /// The archive with the first file system.
    pub initramfs: &'a Path,
    /// Disk images, in the order of their names in the guest.
    pub disks: &'a [PathBuf],
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Time is a count of instructions, a nanosecond each: see
    /// [`super::Guest::counted`].
    pub counted: bool,
    /// More of the kernel's command line.
    pub kernel_arguments: &'a str,
    /// When to cut the power, if at all.
    pub power_off: Option<&'a PowerOff>,
}

/// When a machine loses its power.
#[derive(Clone, Debug)]
pub struct PowerOff {
    /// After the command has printed this.
    pub after: String,
    /// So much later.
    pub delay: Duration,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// `init` said how the command ended.
    Said(i32),
    /// The kernel panicked, with this line.
    Panic(String),
    /// The time was up.
    Timeout(Duration),
    /// `init` was not reached: the emulator or the kernel hung, or it panicked
    /// with this line.
    NotBooted(String),
    /// The power was cut, as wanted.
    PoweredOff,
    /// The machine stopped with no word of `init`.
    Silent,
}

enum Piece {
    Console(Vec<u8>),
    Output(Vec<u8>),
}

impl Machine<'_> {
    fn command(&self) -> Command {
        let qemu = which("qemu-system-x86_64").unwrap_or_else(|| PathBuf::from("qemu-system-x86_64"));
        let mut command = Command::new(qemu);
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
                "-nic",
                "none",
            ])
            .args(["-machine", "pc", "-cpu", CPU])
            .args([
                "-smp",
                &self.cpus.to_string(),
                "-m",
                &self.memory_mib.to_string(),
            ])
            .arg("-kernel")
            .arg(self.image)
            .arg("-initrd")
            .arg(self.initramfs)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 panic=-1 oops=panic mitigations=off nokaslr {}",
                self.kernel_arguments
            ))
            // QEMU opens its own stderr anew: a pipe to this process.
            .args([
                "-chardev",
                "file,id=console,path=/dev/stderr",
                "-serial",
                "chardev:console",
            ])
            .args([
                "-chardev",
                "stdio,id=output,signal=off",
                "-serial",
                "chardev:output",
            ]);
        if self.counted {
            command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]);
        } else {
            command.args(["-accel", "tcg,thread=multi"]);
        }
        for disk in self.disks {
            command.arg("-drive").arg(format!(
                "file={},format=raw,if=virtio,cache=unsafe",
                disk.display()
            ));
        }
        command
    }

    /// Runs the machine until it stops, panics or the time is up. `output`
    /// gets every piece that the command prints; the log gets both lines.
    ///
    /// # Errors
    /// QEMU cannot be started, or the log not be written.
    pub fn run(
        &self,
        stdin: Stdio,
        timeout: Duration,
        log: &mut File,
        mut output: impl FnMut(&[u8]),
    ) -> Result<End> {
        let mut command = self.command();
        writeln!(log, "# {}", describe(&command))?;
        let child = command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut running = Running(child.context("QEMU cannot be started; run `cargo xtask setup`")?);
        let (sender, pieces) = mpsc::channel();
        let console = running.0.stderr.take().context("stderr is piped")?;
        let command_output = running.0.stdout.take().context("stdout is piped")?;
        for_each_piece(console, sender.clone(), Piece::Console);
        for_each_piece(command_output, sender, Piece::Output);

        let started = Instant::now();
        let mut deadline = started + timeout.min(BOOTING);
        let mut booted = false;
        let mut lines = LogLines {
            log,
            console: Vec::new(),
            output: Vec::new(),
        };
        let mut end = End::Silent;
        let mut printed = String::new();
        let mut cut_at = None;
        loop {
            if cut_at.is_some_and(|at| Instant::now() >= at) {
                // At once: nothing in the guest hears of it.
                running.0.kill().context("QEMU cannot be killed")?;
                lines.flush()?;
                return Ok(End::PoweredOff);
            }
            let until = cut_at.map_or(deadline, |at| deadline.min(at));
            match pieces.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Piece::Output(bytes)) => {
                    // Only a command prints there; init's word on the console may
                    // have been cut in two by the kernel's.
                    booted = true;
                    deadline = started + timeout;
                    output(&bytes);
                    lines.output(&bytes)?;
                    if let Some(power_off) = self.power_off.filter(|_| cut_at.is_none()) {
                        printed.push_str(&String::from_utf8_lossy(&bytes));
                        cut_at =
                            (printed.contains(&power_off.after)).then(|| Instant::now() + power_off.delay);
                    }
                }
                Ok(Piece::Console(bytes)) => {
                    for line in lines.console(&bytes)? {
                        if line.trim() == "init: started" {
                            booted = true;
                            deadline = started + timeout;
                        } else if let Some(code) = last_word(&line) {
                            end = End::Said(code);
                        } else if end == End::Silent && PANIC_MARKS.iter().any(|mark| line.contains(mark)) {
                            // A moment for the lines that tell where.
                            drain(&pieces, Duration::from_millis(500), &mut lines)?;
                            return Ok(if booted {
                                End::Panic(line)
                            } else {
                                End::NotBooted(line)
                            });
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) if cut_at.is_some_and(|at| Instant::now() >= at) => {}
                Err(RecvTimeoutError::Timeout) => {
                    lines.flush()?;
                    let hung = || format!("no sign of life from its init within {} s", BOOTING.as_secs());
                    return Ok(if booted {
                        End::Timeout(timeout)
                    } else {
                        End::NotBooted(hung())
                    });
                }
                // Both lines are closed: QEMU is gone.
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        lines.flush()?;
        Ok(end)
    }
}

fn drain(pieces: &mpsc::Receiver<Piece>, time: Duration, lines: &mut LogLines<'_>) -> Result<()> {
    let deadline = Instant::now() + time;
    while let Ok(piece) = pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        match piece {
            Piece::Console(bytes) => drop(lines.console(&bytes)?),
            Piece::Output(bytes) => lines.output(&bytes)?,
        }
    }
    lines.flush()
}

/// The exit code in `init`'s last line, if this is it.
fn last_word(line: &str) -> Option<i32> {
    match line.trim().strip_prefix("init: ")? {
        "success" => Some(0),
        other => other.strip_prefix("failure ")?.parse().ok(),
    }
}

fn for_each_piece(
    mut stream: impl Read + Send + 'static,
    sender: mpsc::Sender<Piece>,
    wrap: impl Fn(Vec<u8>) -> Piece + Send + 'static,
) {
    thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if sender.send(wrap(buffer[..count].to_vec())).is_err() {
                break;
            }
        }
    });
}

/// Both lines in one log, whole lines only, so that neither cuts the other.
struct LogLines<'a> {
    log: &'a mut File,
    console: Vec<u8>,
    output: Vec<u8>,
}

impl LogLines<'_> {
    fn console(&mut self, bytes: &[u8]) -> Result<Vec<String>> {
        self.console.extend_from_slice(bytes);
        let mut lines = Vec::new();
        while let Some(end) = self.console.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.console.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            writeln!(self.log, "[console] {line}").context("the guest's log cannot be written")?;
            lines.push(line);
        }
        Ok(lines)
    }

    fn output(&mut self, bytes: &[u8]) -> Result<()> {
        self.output.extend_from_slice(bytes);
        if let Some(end) = self.output.iter().rposition(|byte| *byte == b'\n') {
            self.log
                .write_all(&self.output[..=end])
                .context("the guest's log cannot be written")?;
            self.output.drain(..=end);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        for rest in [&mut self.output, &mut self.console] {
            if !rest.is_empty() {
                rest.push(b'\n');
                self.log
                    .write_all(rest)
                    .context("the guest's log cannot be written")?;
                rest.clear();
            }
        }
        Ok(())
    }
}

/// QEMU, ended when this is dropped, whatever the reason.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // SIGTERM first: QEMU gives a terminal back the way it found it.
        if let Ok(pid) = libc::pid_t::try_from(self.0.id()) {
            // SAFETY: the child has not been waited for, so the number is still its own.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.0.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _: io::Result<()> = self.0.kill();
                let _ = self.0.wait();
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_init_is_understood() {
        assert_eq!(last_word("init: success"), Some(0));
        assert_eq!(last_word(" init: failure 3\r"), Some(3));
        assert_eq!(last_word("init: failure many"), None);
        assert_eq!(last_word("the init: success of it"), None);
    }
}
