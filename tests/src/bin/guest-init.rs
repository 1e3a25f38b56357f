//! The first process of a guest.
//!
//! In: the folder `/guest` of the first file system, written by
//! `xtask::guest`:
//!
//! - `command`: the words of the command, each ended by a NUL byte;
//! - `environment`: `NAME=VALUE`, each ended by a NUL byte;
//! - `modules`: paths of kernel modules, one per line, in loading order;
//! - `mounts`: `DEVICE TYPE FOLDER`, one per line;
//! - `terminal`: exists when the second serial line is a person's terminal.
//!
//! Out: the command's output on the second serial line, and exactly one last
//! line on the console, `init: success` or `init: failure CODE`, after an
//! `init: started` when all is ready for the command; then the machine is off. 125 stands for a command that could not be started.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

const CONSOLE: &str = "/dev/console";
const OUTPUT: &str = "/dev/ttyS1";
const NOT_STARTED: i32 = 125;

fn main() {
    // On a developer's machine this program would power off the host.
    if std::process::id() != 1 {
        eprintln!("guest-init is the first process of a guest and does nothing elsewhere");
        std::process::exit(2);
    }
    let code = prepare().and_then(|()| run_command()).unwrap_or_else(|error| {
        let text = format!("guest-init: {error:#}\n");
        let _ = on_console(&text);
        let _ = OpenOptions::new()
            .write(true)
            .open(OUTPUT)
            .and_then(|mut line| line.write_all(text.as_bytes()));
        NOT_STARTED
    });
    if code != 0 {
        repeat_kernel_log();
    }
    finish(code)
}

fn prepare() -> Result<()> {
    // From here on only the kernel's warnings matter: 8 sets the console's level.
    // SAFETY: a plain system call that takes no memory.
    unsafe { libc::klogctl(8, std::ptr::null_mut(), 5) };
    for (kind, folder) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/dev/shm"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
        ("securityfs", "/sys/kernel/security"),
    ] {
        let result = mount(kind, kind, folder);
        // The rest is optional: a kernel may lack it.
        if ["proc", "sysfs", "devtmpfs", "tmpfs"].contains(&kind) {
            result?;
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "fd/0"),
        ("/dev/stdout", "fd/1"),
        ("/dev/stderr", "fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(target, link);
    }
    let _ = fs::write("/proc/sys/kernel/hostname", "guest");
    loopback_up().context("the loopback interface cannot be brought up")?;
    for path in orders("modules")?.lines() {
        load_module(path).with_context(|| format!("the module {path} cannot be loaded"))?;
    }
    for line in orders("mounts")?.lines() {
        let [device, kind, folder] = line.split(' ').collect::<Vec<_>>()[..] else {
            bail!("`{line}` in /guest/mounts is not DEVICE TYPE FOLDER");
        };
        mount(device, kind, folder)?;
    }
    on_console("init: started\n").context("the console cannot be written")
}

fn orders(name: &str) -> Result<String> {
    let path = Path::new("/guest").join(name);
    fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))
}

fn mount(device: &str, kind: &str, folder: &str) -> Result<()> {
    // It may exist already, in sysfs for example.
    let _ = fs::create_dir_all(folder);
    let (source, target, file_system) = (CString::new(device)?, CString::new(folder)?, CString::new(kind)?);
    // SAFETY: all three are NUL-terminated and outlive the call; no data is passed.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            file_system.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        return Err(error).with_context(|| format!("{device} cannot be mounted on {folder} as {kind}"));
    }
    Ok(())
}

fn load_module(path: &str) -> Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open, the parameters an empty NUL-terminated string.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result != 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EEXIST) {
            return Err(error.into());
        }
    }
    Ok(())
}

fn loopback_up() -> io::Result<()> {
    // SAFETY: plain system calls on a descriptor that is closed below; the
    // request is zeroed, names `lo` with room for its NUL, and outlives the call.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let result = libc::ioctl(socket, libc::SIOCSIFFLAGS as _, &request);
        let error = io::Error::last_os_error();
        libc::close(socket);
        if result == 0 { Ok(()) } else { Err(error) }
    }
}

fn run_command() -> Result<i32> {
    let words = nul_separated("command")?;
    let (program, arguments) = words.split_first().context("/guest/command is empty")?;
    let line = OpenOptions::new()
        .read(true)
        .write(true)
        .open(OUTPUT)
        .with_context(|| format!("{OUTPUT} cannot be opened"))?;
    let interactive = Path::new("/guest/terminal").exists();
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", "/root")
        .env("TERM", if interactive { "linux" } else { "dumb" })
        .current_dir("/root")
        .stdin(if interactive {
            Stdio::from(line.try_clone()?)
        } else {
            Stdio::null()
        })
        .stdout(line.try_clone()?)
        .stderr(line.try_clone()?);
    for variable in nul_separated("environment")? {
        let bytes = variable.as_bytes();
        let equals = bytes
            .iter()
            .position(|byte| *byte == b'=')
            .context("/guest/environment holds no NAME=VALUE")?;
        command.env(
            OsStr::from_bytes(&bytes[..equals]),
            OsStr::from_bytes(&bytes[equals + 1..]),
        );
    }
    if interactive {
        // SAFETY: setsid and ioctl are plain system calls, allowed after fork.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
    } else {
        make_raw(&line)?;
    }
    let child = command
        .spawn()
        .with_context(|| format!("`{}` cannot be started", program.display()))?;
    let status = wait_for(child.id())?;
    // SAFETY: the descriptor is open. Waits until all output has left.
    unsafe { libc::tcdrain(line.as_raw_fd()) };
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

fn nul_separated(name: &str) -> Result<Vec<OsString>> {
    let path = Path::new("/guest").join(name);
    let bytes = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(bytes
        .split_inclusive(|byte| *byte == 0)
        .map(|word| OsString::from_vec(word[..word.len() - 1].to_vec()))
        .collect())
}

/// Bytes pass as they are: no carriage returns, no echo.
fn make_raw(line: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open and `settings` is filled before it is used.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(line.as_raw_fd(), &raw mut settings) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::cfmakeraw(&raw mut settings);
        libc::cfsetspeed(&raw mut settings, libc::B115200);
        if libc::tcsetattr(line.as_raw_fd(), libc::TCSANOW, &raw const settings) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Waits for the command, and for every orphan that ends before it.
fn wait_for(command: u32) -> Result<ExitStatus> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if u32::try_from(pid) == Ok(command) {
            return Ok(ExitStatus::from_raw(status));
        }
        if pid < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error).context("the command cannot be waited for");
            }
        }
    }
}

/// Most kernel messages do not reach the console; after a failure they matter.
fn repeat_kernel_log() {
    let mut buffer = vec![0_u8; 256 * 1024];
    let length = i32::try_from(buffer.len()).unwrap_or(i32::MAX);
    // SAFETY: 3 is "read all", into a buffer of the given length.
    let count = unsafe { libc::klogctl(3, buffer.as_mut_ptr().cast(), length) };
    let text = String::from_utf8_lossy(&buffer[..usize::try_from(count).unwrap_or(0)]).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(80)..];
    let _ = on_console(&format!("the kernel's last messages:\n{}\n", tail.join("\n")));
}

fn on_console(text: &str) -> io::Result<()> {
    let mut console = OpenOptions::new().write(true).open(CONSOLE)?;
    console.write_all(text.as_bytes())?;
    // SAFETY: the descriptor is open.
    unsafe { libc::tcdrain(console.as_raw_fd()) };
    Ok(())
}

fn finish(code: i32) -> ! {
    // SAFETY: plain system calls without memory arguments. 6 keeps the kernel's
    // own messages from cutting the last line in two.
    unsafe {
        libc::klogctl(6, std::ptr::null_mut(), 0);
        libc::sync();
    }
    let last = if code == 0 {
        "init: success\n".to_owned()
    } else {
        format!("init: failure {code}\n")
    };
    let _ = on_console(&last);
    // SAFETY: this is the first process of a guest, whose end this is.
    unsafe {
        libc::reboot(libc::RB_POWER_OFF);
        libc::_exit(code);
    }
}
