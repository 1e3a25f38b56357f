//! Content that changes by system call. The file is `f`, of three pages of `a`;
//! what is copied comes from `g`, of four pages of `g`.

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::FallocateFlags;

use crate::rows::{BEFORE, Held, Lacking, Stage};
use crate::sys::{self, Aligned, PAGE, check};

static BLOCK: Aligned = Aligned([b'd'; PAGE]);
/// How long the late bytes of a write take.
const LATE: std::time::Duration = std::time::Duration::from_millis(50);

pub fn nothing(_: &Stage, _: &mut Held) -> Result<()> {
    Ok(())
}

/// Makes the file.
pub fn file(stage: &Stage, _: &mut Held) -> Result<()> {
    std::fs::write(stage.dir.join("f"), BEFORE)?;
    Ok(std::fs::write(stage.dir.join("g"), [b'g'; 4 * PAGE])?)
}

pub fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| path.display().to_string())
}

/// Opens `f` to write, and keeps it open.
fn writing(stage: &Stage, held: &mut Held) -> Result<File> {
    let file = open(&stage.dir.join("f"))?;
    held.files.push(file.try_clone()?);
    Ok(file)
}

fn writing_direct(stage: &Stage, held: &mut Held) -> Result<File> {
    let path = stage.dir.join("f");
    let file = lacking(
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path),
    )?;
    held.files.push(file.try_clone()?);
    Ok(file)
}

/// What a kernel or filesystem does not have is no failure.
pub fn lacking<T>(result: std::io::Result<T>) -> Result<T> {
    let lacks = [libc::EOPNOTSUPP, libc::ENOTTY, libc::EINVAL, libc::ENOSYS];
    result.map_err(|error| match error.raw_os_error() {
        Some(code) if lacks.contains(&code) => Lacking(refusal(&error)).into(),
        _ => error.into(),
    })
}

/// The kernel's word without its number.
fn refusal(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error")
        .map_or(text.as_str(), |(word, _)| word)
        .to_lowercase()
}

pub fn write(stage: &Stage, held: &mut Held) -> Result<()> {
    Ok(writing(stage, held)?.write_all(b"hello")?)
}

pub fn pwrite(stage: &Stage, held: &mut Held) -> Result<()> {
    Ok(writing(stage, held)?.write_all_at(b"there", 100)?)
}

pub fn writev(stage: &Stage, held: &mut Held) -> Result<()> {
    let both = [IoSlice::new(b"ab"), IoSlice::new(b"cd")];
    ensure!(writing(stage, held)?.write_vectored(&both)? == 4);
    Ok(())
}

pub fn pwritev2(stage: &Stage, held: &mut Held) -> Result<()> {
    let file = writing(stage, held)?;
    let both = [IoSlice::new(b"ab"), IoSlice::new(b"cd")];
    // SAFETY: an `IoSlice` is laid out as an `iovec`; both outlive the call.
    let wrote = check(unsafe { libc::pwritev2(file.as_raw_fd(), both.as_ptr().cast(), 2, 4096, 0) })?;
    ensure!(wrote == 4);
    Ok(())
}

pub fn append(stage: &Stage, held: &mut Held) -> Result<()> {
    let mut file = OpenOptions::new().append(true).open(stage.dir.join("f"))?;
    file.write_all(b"end")?;
    held.files.push(file);
    Ok(())
}

pub fn direct(stage: &Stage, held: &mut Held) -> Result<()> {
    Ok(writing_direct(stage, held)?.write_all_at(&BLOCK.0, 4096)?)
}

pub fn write_late(stage: &Stage, held: &mut Held) -> Result<()> {
    let file = writing(stage, held)?;
    late(&file, held)
}

pub fn direct_late(stage: &Stage, held: &mut Held) -> Result<()> {
    let file = writing_direct(stage, held)?;
    late(&file, held)
}

/// Writes two pages, the second of which is not there until a while after the
/// call began: an event from before that cannot be about written bytes.
fn late(file: &File, held: &mut Held) -> Result<()> {
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
    const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
    const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
    let (null, anonymous) = (std::ptr::null_mut(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping of two pages that only this function uses. The
    // structures are laid out as the kernel's: `uffdio_api` 3 words,
    // `uffdio_register` 4, `uffdio_copy` 5; all outlive their calls. The page is
    // unmapped after the thread that fills it has ended.
    unsafe {
        let pages = libc::mmap(
            null,
            2 * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            anonymous,
            -1,
            0,
        );
        ensure!(pages != libc::MAP_FAILED, "mmap");
        pages.cast::<u8>().write_bytes(b'l', PAGE);
        let faults = lacking(check(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC)))? as i32;
        let mut api = [0xaa_u64, 0, 0];
        check(libc::ioctl(faults, UFFDIO_API, api.as_mut_ptr())).context("UFFDIO_API")?;
        let second = pages as u64 + PAGE as u64;
        let mut register = [second, PAGE as u64, 1, 0];
        check(libc::ioctl(faults, UFFDIO_REGISTER, register.as_mut_ptr())).context("UFFDIO_REGISTER")?;
        let filler = std::thread::spawn(move || {
            let mut message = [0_u64; 4];
            let got = libc::read(faults, message.as_mut_ptr().cast(), 32);
            std::thread::sleep(LATE);
            let mark = sys::now();
            let mut copy = [second, BLOCK.0.as_ptr() as u64, PAGE as u64, 0, 0];
            let done = libc::ioctl(faults, UFFDIO_COPY, copy.as_mut_ptr());
            (got, done, mark)
        });
        let both = std::slice::from_raw_parts(pages.cast::<u8>(), 2 * PAGE);
        let wrote = file.write_all_at(both, 0);
        let (got, done, mark) = filler
            .join()
            .map_err(|_| anyhow::anyhow!("the filler panicked"))?;
        libc::munmap(pages, 2 * PAGE);
        libc::close(faults);
        wrote?;
        ensure!(got == 32 && done == 0, "userfaultfd: {got} {done}");
        held.mark = Some(mark);
    }
    Ok(())
}

pub fn aio(stage: &Stage, held: &mut Held) -> Result<()> {
    let file = writing(stage, held)?;
    aio_write(&file)
}

pub fn aio_direct(stage: &Stage, held: &mut Held) -> Result<()> {
    let file = writing_direct(stage, held)?;
    aio_write(&file)
}

fn aio_write(file: &File) -> Result<()> {
    let mut context: u64 = 0;
    // struct iocb: data, key and flags, opcode 1 (pwrite) and descriptor,
    // buffer, length, offset.
    let mut iocb = [0_u64; 8];
    iocb[2] = 1 | (u64::try_from(file.as_raw_fd())? << 32);
    iocb[3] = BLOCK.0.as_ptr() as u64;
    iocb[4] = PAGE as u64;
    let mut list = [iocb.as_mut_ptr()];
    let mut events = [0_u64; 4];
    let null = std::ptr::null::<libc::timespec>();
    // SAFETY: the structures are laid out as the kernel's and outlive the calls.
    unsafe {
        lacking(check(libc::syscall(libc::SYS_io_setup, 8, &raw mut context)))?;
        check(libc::syscall(libc::SYS_io_submit, context, 1, list.as_mut_ptr())).context("io_submit")?;
        let got = libc::syscall(libc::SYS_io_getevents, context, 1, 1, events.as_mut_ptr(), null);
        libc::syscall(libc::SYS_io_destroy, context);
        ensure!(got == 1, "io_getevents");
    }
    ensure!(events[2] == PAGE as u64, "aio wrote {}", events[2].cast_signed());
    Ok(())
}

pub fn uring(stage: &Stage, held: &mut Held) -> Result<()> {
    let file = writing(stage, held)?;
    uring_write(&file, held)
}

pub fn uring_direct(stage: &Stage, held: &mut Held) -> Result<()> {
    let file = writing_direct(stage, held)?;
    uring_write(&file, held)
}

/// One write through a ring of its own, by the plain system calls.
fn uring_write(file: &File, held: &mut Held) -> Result<()> {
    use std::os::fd::FromRawFd;
    let mut params = [0_u32; 30];
    // SAFETY: the kernel fills the parameters (120 bytes).
    let ring = lacking(check(unsafe {
        libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr())
    }))?;
    // SAFETY: a fresh descriptor that nothing else owns.
    let owner = unsafe { File::from_raw_fd(i32::try_from(ring)?) };
    let ring = owner.as_raw_fd();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let area = |offset| {
        // SAFETY: a fresh mapping of the ring.
        let area = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                protection,
                libc::MAP_SHARED,
                ring,
                offset,
            )
        };
        ensure!(area != libc::MAP_FAILED, "mmap of the ring");
        Ok(area.cast::<u8>())
    };
    let (queue, entries) = (area(0)?, area(0x1000_0000)?);
    // SAFETY: both areas are mapped, and the offsets are those that the kernel
    // gave (sq_off at word 10: tail 1, array 6; cq_off at word 20: cqes 5).
    unsafe {
        let entry = entries.cast::<u64>();
        // Opcode 23 (write) and descriptor; offset; buffer; length.
        entry.write(23 | (u64::try_from(file.as_raw_fd())? << 32));
        entry.add(1).write(0);
        entry.add(2).write(BLOCK.0.as_ptr() as u64);
        entry.add(3).write(PAGE as u64);
        queue.add(params[10 + 6] as usize).cast::<u32>().write(0);
        queue.add(params[10 + 1] as usize).cast::<u32>().write_volatile(1);
        let entered = check(libc::syscall(libc::SYS_io_uring_enter, ring, 1, 1, 1, 0, 0))?;
        ensure!(entered == 1, "io_uring_enter");
        let result = queue
            .add(params[20 + 5] as usize + 8)
            .cast::<i32>()
            .read_volatile();
        libc::munmap(queue.cast(), PAGE);
        libc::munmap(entries.cast(), PAGE);
        ensure!(result == PAGE as i32, "io_uring wrote {result}");
    }
    held.files.push(owner);
    Ok(())
}

fn source(stage: &Stage) -> Result<File> {
    Ok(File::open(stage.dir.join("g"))?)
}

pub fn sendfile(stage: &Stage, held: &mut Held) -> Result<()> {
    let sent = rustix::fs::sendfile(&writing(stage, held)?, &source(stage)?, None, 10_000)?;
    ensure!(sent == 10_000, "sendfile sent {sent}");
    Ok(())
}

pub fn splice(stage: &Stage, held: &mut Held) -> Result<()> {
    let (read, mut write) = std::io::pipe()?;
    write.write_all(b"through a pipe")?;
    let (to, null) = (writing(stage, held)?, std::ptr::null_mut());
    // SAFETY: plain descriptors, no offsets.
    let moved = check(unsafe { libc::splice(read.as_raw_fd(), null, to.as_raw_fd(), null, 14, 0) })?;
    ensure!(moved == 14, "splice moved {moved}");
    Ok(())
}

pub fn copy_file_range(stage: &Stage, held: &mut Held) -> Result<()> {
    let (from, to) = (source(stage)?, writing(stage, held)?);
    // xfs shares whole blocks first, and copies the rest in a second call.
    let mut left = 5000;
    while left > 0 {
        let copied = rustix::fs::copy_file_range(&from, None, &to, None, left)?;
        ensure!(copied > 0, "copy_file_range copies nothing");
        left -= copied;
    }
    Ok(())
}

pub fn clone_all(stage: &Stage, held: &mut Held) -> Result<()> {
    let result = rustix::fs::ioctl_ficlone(&writing(stage, held)?, &source(stage)?);
    lacking(result.map_err(Into::into))
}

pub fn clone_range(stage: &Stage, held: &mut Held) -> Result<()> {
    const FICLONERANGE: libc::Ioctl = 0x4020_940d;
    let (from, to) = (source(stage)?, writing(stage, held)?);
    // struct file_clone_range: source, offset there, length, offset here.
    let range = [u64::try_from(from.as_raw_fd())?, 4096, 4096, 4096];
    // SAFETY: the structure is laid out as the kernel's and outlives the call.
    lacking(check(unsafe {
        libc::ioctl(to.as_raw_fd(), FICLONERANGE, range.as_ptr())
    }))?;
    Ok(())
}

pub fn truncate(stage: &Stage, _: &mut Held) -> Result<()> {
    let path = std::ffi::CString::new(stage.dir.join("f").into_os_string().into_encoded_bytes())?;
    // SAFETY: NUL-terminated, and outlives the call.
    check(unsafe { libc::truncate(path.as_ptr(), 50) })?;
    Ok(())
}

pub fn ftruncate(stage: &Stage, held: &mut Held) -> Result<()> {
    Ok(writing(stage, held)?.set_len(20_000)?)
}

pub fn o_trunc(stage: &Stage, held: &mut Held) -> Result<()> {
    held.files.push(File::create(stage.dir.join("f"))?);
    Ok(())
}

fn fallocate(stage: &Stage, held: &mut Held, flags: FallocateFlags, len: u64) -> Result<()> {
    let result = rustix::fs::fallocate(writing(stage, held)?, flags, 0, len);
    lacking(result.map_err(Into::into))
}

pub fn allocate(stage: &Stage, held: &mut Held) -> Result<()> {
    fallocate(stage, held, FallocateFlags::empty(), 16384)
}

pub fn punch(stage: &Stage, held: &mut Held) -> Result<()> {
    fallocate(
        stage,
        held,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        4096,
    )
}

pub fn zero(stage: &Stage, held: &mut Held) -> Result<()> {
    fallocate(stage, held, FallocateFlags::ZERO_RANGE, 4096)
}

pub fn collapse(stage: &Stage, held: &mut Held) -> Result<()> {
    fallocate(stage, held, FallocateFlags::COLLAPSE_RANGE, 4096)
}

pub fn insert(stage: &Stage, held: &mut Held) -> Result<()> {
    fallocate(stage, held, FallocateFlags::INSERT_RANGE, 4096)
}
