//! Ways to change a file's content that the standard library does not have.
//!
//! Each is one system call, or as few as it takes; what fails panics.

use std::alloc::Layout;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// What a direct write and a mapping go by.
pub const PAGE: usize = 4096;

/// A page of memory at a multiple of its size, as direct writes want it.
struct Aligned(*mut u8);

impl Aligned {
    const LAYOUT: Layout = match Layout::from_size_align(PAGE, PAGE) {
        Ok(layout) => layout,
        Err(_) => panic!("a page is aligned to itself"),
    };

    fn full_of(byte: u8) -> Aligned {
        // SAFETY: the layout is not empty.
        let start = unsafe { std::alloc::alloc(Aligned::LAYOUT) };
        assert!(!start.is_null(), "there is no memory");
        // SAFETY: so many bytes were just allocated.
        unsafe { start.write_bytes(byte, PAGE) };
        Aligned(start)
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and freed once.
        unsafe { std::alloc::dealloc(self.0, Aligned::LAYOUT) };
    }
}

fn check(result: i64, what: &str) -> i64 {
    assert!(result >= 0, "{what}: {}", std::io::Error::last_os_error());
    result
}

/// A page of a file, mapped to be shared and written.
pub struct Mapped(*mut u8);

impl Mapped {
    /// The page from `at` on. The mapping holds the file; the descriptor need not stay.
    ///
    /// # Panics
    /// It cannot be mapped.
    #[must_use]
    pub fn at(file: &File, at: u64) -> Mapped {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                at.cast_signed(),
            )
        };
        assert!(
            start != libc::MAP_FAILED,
            "mmap: {}",
            std::io::Error::last_os_error()
        );
        Mapped(start.cast())
    }

    /// Stores a byte.
    pub fn store(&self, at: usize, byte: u8) {
        assert!(at < PAGE);
        // SAFETY: within the mapping, which lives and may be written to.
        unsafe { self.0.add(at).write_volatile(byte) };
    }

    /// Reads one, so that the page is there.
    #[must_use]
    pub fn load(&self, at: usize) -> u8 {
        assert!(at < PAGE);
        // SAFETY: as above.
        unsafe { self.0.add(at).read_volatile() }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, and unmapped once.
        unsafe { libc::munmap(self.0.cast(), PAGE) };
    }
}

/// A file open for direct writes.
///
/// # Panics
/// It cannot be opened so.
#[must_use]
pub fn direct(path: &Path) -> File {
    File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .expect("a file can be opened for direct writes")
}

/// Writes a page full of `byte`, from memory that a direct write takes.
///
/// # Panics
/// Not all of it is written.
pub fn write_page(file: &File, at: u64, byte: u8) {
    let page = Aligned::full_of(byte);
    // SAFETY: the page lives and has so many bytes.
    let wrote = unsafe { libc::pwrite(file.as_raw_fd(), page.0.cast(), PAGE, at.cast_signed()) };
    assert_eq!(check(wrote as i64, "pwrite"), PAGE as i64);
}

/// The same through an io_uring of its own; false if the kernel offers none.
///
/// # Panics
/// Not all of it is written.
#[must_use]
pub fn uring_write_page(file: &File, at: u64, byte: u8) -> bool {
    let page = Aligned::full_of(byte);
    let mut params = [0_u32; 30];
    // SAFETY: the kernel fills the parameters (120 bytes).
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) };
    if ring < 0 {
        return false;
    }
    // SAFETY: a fresh descriptor that nothing else owns.
    let owner = unsafe { File::from_raw_fd(i32::try_from(ring).expect("a descriptor")) };
    // Of the ring, and of its entries.
    let (queue, entries) = (Mapped::at(&owner, 0), Mapped::at(&owner, 0x1000_0000));
    // SAFETY: both areas are mapped, and the offsets are those that the kernel gave
    // (sq_off at word 10: tail 1, array 6; cq_off at word 20: cqes 5).
    let result = unsafe {
        let entry = entries.0.cast::<u64>();
        // Opcode 23 (write) and descriptor; offset; buffer; length.
        entry.write(23 | (u64::from(file.as_raw_fd().cast_unsigned()) << 32));
        entry.add(1).write(at);
        entry.add(2).write(page.0 as u64);
        entry.add(3).write(PAGE as u64);
        queue.0.add(params[10 + 6] as usize).cast::<u32>().write(0);
        queue
            .0
            .add(params[10 + 1] as usize)
            .cast::<u32>()
            .write_volatile(1);
        let entered = libc::syscall(libc::SYS_io_uring_enter, ring, 1, 1, 1, 0, 0);
        assert_eq!(check(entered, "io_uring_enter"), 1);
        queue
            .0
            .add(params[20 + 5] as usize + 8)
            .cast::<i32>()
            .read_volatile()
    };
    assert_eq!(result, PAGE as i32, "what io_uring wrote");
    true
}

/// Writes a page full of `byte` to where the disk has this page of the file, behind
/// the filesystem's back: no event, and no other time. `node` is a free path on a
/// filesystem that takes devices.
///
/// # Panics
/// The filesystem does not say where it is, or it cannot be written.
pub fn write_page_beneath(file: &File, at: u64, byte: u8, node: &Path) {
    const FIBMAP: libc::Ioctl = 1;
    file.sync_all().expect("a file can be synced");
    let block_bytes = rustix::fs::fstatvfs(file).expect("it is on a filesystem").f_bsize;
    let mut block = libc::c_int::try_from(at / block_bytes).expect("a small file");
    // SAFETY: the kernel replaces the integer, which outlives the call.
    let asked = unsafe { libc::ioctl(file.as_raw_fd(), FIBMAP, &raw mut block) };
    check(asked.into(), "FIBMAP");
    assert!(block > 0, "there is a hole");
    let device = file.metadata().expect("it is there").dev();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        node,
        rustix::fs::FileType::BlockDevice,
        mode,
        device,
    )
    .expect("a device can be made");
    let disk = File::options()
        .write(true)
        .open(node)
        .expect("a disk can be opened");
    let place = u64::from(block.cast_unsigned()) * block_bytes;
    disk.write_all_at(&[byte; PAGE], place).expect("a disk takes it");
    disk.sync_all().expect("a disk can be synced");
    // What the page cache has of the file is of before.
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).expect("advice is taken");
    let mut read = [0];
    file.read_exact_at(&mut read, at).expect("it can be read");
    assert_eq!(read, [byte], "what the file has now");
}
