//! Whether a way of attaching is closed altogether, asked in a millisecond.
//!
//! In: a way. Out: why it cannot be had here, if one question to the kernel tells.
//! Loading the real programs would tell the same after its types have been read
//! and the maps been made, which a host without tracing need not pay for at each
//! start. What this does not rule out is tried in full; kernel versions are not
//! looked at.

use std::io;

use super::load::{Attaching, errno_words};

/// Why `attach` cannot work on this host; none if it must be tried.
pub(super) fn why(attach: Attaching) -> Option<String> {
    match attach {
        Attaching::Fentry => is_forbidden().and_then(errno_words),
        Attaching::Kprobe => {
            (!super::probe::kprobes()).then(|| "this kernel was built without kprobes".to_owned())
        }
    }
}

/// The kernel's EPERM, if it is about tracing. It may also say that too much memory
/// is locked: kernels before 5.11 count each program (`bpf_charge_memlock`), those of
/// a killed daemon, which are freed some time later, among them. Then it refuses a
/// program as small that traces nothing, too.
fn is_forbidden() -> Option<io::Error> {
    let unlimited = locks_without_limit();
    let refused = load_empty(TRACING, FEXIT).err()?;
    let is_eperm = refused.raw_os_error() == Some(libc::EPERM);
    (is_eperm && (unlimited || load_empty(SOCKET_FILTER, 0).is_ok())).then_some(refused)
}

/// Lets this process lock as much memory as it likes, as the real loading does;
/// false if it may not.
fn locks_without_limit() -> bool {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    setrlimit(Resource::Memlock, unlimited).is_ok()
}

/// `union bpf_attr` of include/uapi/linux/bpf.h as `BPF_PROG_LOAD` reads it, up to
/// `attach_btf_id`, 112 bytes; the kernel takes what is missing for zero.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

const _: () = assert!(size_of::<ProgLoad>() == 112);

/// `enum bpf_prog_type` and `bpf_attach_type` of include/uapi/linux/bpf.h.
const SOCKET_FILTER: u32 = 1;
const TRACING: u32 = 26;
const FEXIT: u32 = 25;

/// Tries to load `return 0`. As a program at a function's return it is of no function,
/// so it never loads: EPERM says that none would, EINVAL that this one does not.
fn load_empty(prog_type: u32, expected_attach_type: u32) -> io::Result<()> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    /// `r0 = 0; exit`, in the machine's byte order.
    const RETURN_0: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 0, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    let attr = ProgLoad {
        prog_type,
        insn_cnt: 2,
        insns: RETURN_0.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type,
        ..ProgLoad::default()
    };
    // SAFETY: `attr` and what it points to are live and unchanged for the call,
    // and as long as it says; the kernel writes to none of them. A descriptor, if
    // one came back against all expectation, is closed below.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attr,
            size_of::<ProgLoad>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor to us alone.
    drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd as i32) });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_tracer_of_no_function_never_loads() {
        let error = load_empty(TRACING, FEXIT).unwrap_err();
        let told = [libc::EPERM, libc::EINVAL, libc::ENOSYS];
        assert!(told.contains(&error.raw_os_error().unwrap()), "{error}");
        let refuses_all = load_empty(SOCKET_FILTER, 0).is_err() && !locks_without_limit();
        let forbidden = error.raw_os_error() == Some(libc::EPERM) && !refuses_all;
        assert_eq!(why(Attaching::Fentry).is_some(), forbidden);
    }
}
