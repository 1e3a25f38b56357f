//! Does one operation after another beneath a folder and says which events the
//! eBPF source reported for each: `trace_probe run FOLDER ATTACH TRANSPORT`.
//! It needs a kernel that can be traced, so it runs in a guest. Each operation
//! is done by a child process, because the source passes over its own.

use std::{
    fs::{File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
    },
    path::Path,
    process::Command,
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use omirr::source::{
    Event, Op, Signal, Source, Watch,
    ebpf::{Attach, EbpfSource, Options, Transport},
};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, XattrFlags};

/// An operation: its name, what must be reported, and how it is done.
type Step = (&'static str, &'static [Op], fn(&Path) -> Result<()>);

const STEPS: &[Step] = &[
    ("create", &[Op::Create, Op::Close], |d| {
        drop(File::create_new(d.join("a"))?);
        Ok(())
    }),
    ("write", &[Op::Write, Op::Close], |d| {
        Ok(writing(d, "a")?.write_all(b"hello")?)
    }),
    ("pwrite", &[Op::Write], |d| {
        Ok(writing(d, "a")?.write_all_at(b"there", 100)?)
    }),
    ("writev", &[Op::Write], |d| {
        let both = [std::io::IoSlice::new(b"ab"), std::io::IoSlice::new(b"cd")];
        writing(d, "a")?
            .write_vectored(&both)
            .map(drop)
            .map_err(Into::into)
    }),
    ("append", &[Op::Write], |d| {
        Ok(OpenOptions::new()
            .append(true)
            .open(d.join("a"))?
            .write_all(b"end")?)
    }),
    ("direct write", &[Op::Write], |d| {
        let Ok(file) = OpenOptions::new()
            .write(true)
            .create(true)
            .custom_flags(libc::O_DIRECT)
            .open(d.join("direct"))
        else {
            return skip(d);
        };
        let block = Aligned([7; 4096]);
        Ok(file.write_all_at(&block.0, 0)?)
    }),
    ("truncate", &[Op::Truncate], |d| Ok(writing(d, "a")?.set_len(50)?)),
    ("O_TRUNC", &[Op::Truncate], |d| {
        drop(File::create(d.join("a"))?);
        Ok(())
    }),
    ("fallocate", &[Op::Fallocate], |d| {
        Ok(rustix::fs::fallocate(
            writing(d, "a")?,
            FallocateFlags::empty(),
            0,
            8192,
        )?)
    }),
    ("punch hole", &[Op::Fallocate], |d| {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(writing(d, "a")?, flags, 0, 4096)?)
    }),
    ("sendfile", &[Op::Write], |d| {
        std::fs::write(d.join("from"), vec![1; 10_000])?;
        let (from, to) = (File::open(d.join("from"))?, writing(d, "a")?);
        ensure!(rustix::fs::sendfile(&to, &from, None, 10_000)? == 10_000);
        Ok(())
    }),
    ("splice", &[Op::Write], |d| {
        let (read, mut write) = std::io::pipe()?;
        write.write_all(b"through a pipe")?;
        let to = writing(d, "a")?;
        let null = std::ptr::null_mut();
        // SAFETY: plain descriptors, no offsets.
        let moved = unsafe { libc::splice(read.as_raw_fd(), null, to.as_raw_fd(), null, 14, 0) };
        ensure!(moved == 14, "splice");
        Ok(())
    }),
    ("copy_file_range", &[Op::Write], |d| {
        let (from, to) = (File::open(d.join("from"))?, writing(d, "a")?);
        ensure!(rustix::fs::copy_file_range(&from, None, &to, None, 5000)? > 0);
        Ok(())
    }),
    ("reflink", &[Op::Write], |d| {
        let (from, to) = (File::open(d.join("from"))?, writing(d, "a")?);
        match rustix::fs::ioctl_ficlone(&to, &from) {
            Err(rustix::io::Errno::OPNOTSUPP) => skip(d),
            other => Ok(other?),
        }
    }),
    ("mmap store", &[Op::Write, Op::Close], mmap_store),
    ("aio write", &[Op::Write], aio_write),
    ("io_uring write", &[Op::Write], uring_write),
    ("mkdir", &[Op::Mkdir], |d| Ok(std::fs::create_dir(d.join("dir"))?)),
    ("mknod", &[Op::Mknod], |d| {
        Ok(rustix::fs::mknodat(
            CWD,
            d.join("fifo"),
            FileType::Fifo,
            Mode::RUSR,
            0,
        )?)
    }),
    ("mknod file", &[Op::Create], |d| {
        Ok(rustix::fs::mknodat(
            CWD,
            d.join("plain"),
            FileType::RegularFile,
            Mode::RUSR,
            0,
        )?)
    }),
    ("bind", &[Op::Mknod], |d| {
        drop(std::os::unix::net::UnixListener::bind(d.join("socket"))?);
        Ok(())
    }),
    ("symlink", &[Op::Symlink], |d| {
        Ok(symlink("a", d.join("symlink"))?)
    }),
    ("link", &[Op::Link], |d| {
        Ok(std::fs::hard_link(d.join("a"), d.join("hard"))?)
    }),
    ("O_TMPFILE", &[Op::Link], |d| {
        let file = rustix::fs::open(d, OFlags::TMPFILE | OFlags::WRONLY, Mode::RUSR)?;
        rustix::io::write(&file, b"unnamed")?;
        let name = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(rustix::fs::linkat(
            CWD,
            name,
            CWD,
            d.join("named"),
            AtFlags::SYMLINK_FOLLOW,
        )?)
    }),
    ("rename", &[Op::Rename], |d| {
        Ok(std::fs::rename(d.join("hard"), d.join("dir/moved"))?)
    }),
    ("rename over", &[Op::Rename], |d| {
        Ok(std::fs::rename(d.join("dir/moved"), d.join("named"))?)
    }),
    ("exchange", &[Op::Exchange], |d| {
        match rustix::fs::renameat_with(CWD, d.join("from"), CWD, d.join("dir"), RenameFlags::EXCHANGE) {
            Ok(()) => Ok(rustix::fs::renameat_with(
                CWD,
                d.join("from"),
                CWD,
                d.join("dir"),
                RenameFlags::EXCHANGE,
            )?),
            Err(e) => Err(e.into()),
        }
    }),
    ("rename out", &[Op::Rename], |d| {
        Ok(std::fs::rename(d.join("plain"), d.join("../elsewhere/plain"))?)
    }),
    ("rename in", &[Op::Rename], |d| {
        Ok(std::fs::rename(d.join("../elsewhere/plain"), d.join("plain"))?)
    }),
    ("chmod", &[Op::Attr], |d| {
        Ok(std::fs::set_permissions(
            d.join("a"),
            PermissionsExt::from_mode(0o600),
        )?)
    }),
    ("chown", &[Op::Attr], |d| {
        Ok(std::os::unix::fs::chown(d.join("a"), Some(1), Some(1))?)
    }),
    ("utimensat", &[Op::Attr], |d| {
        Ok(writing(d, "a")?.set_modified(std::time::SystemTime::UNIX_EPOCH)?)
    }),
    ("chmod of the root", &[Op::Attr], |d| {
        Ok(std::fs::set_permissions(d, PermissionsExt::from_mode(0o750))?)
    }),
    ("setxattr", &[Op::Xattr], |d| xattr(d, "trusted.x", b"1")),
    ("removexattr", &[Op::Xattr], |d| {
        match rustix::fs::removexattr(d.join("a"), "trusted.x") {
            Err(rustix::io::Errno::OPNOTSUPP) => skip(d),
            other => Ok(other?),
        }
    }),
    ("set acl", &[Op::Xattr], |d| {
        // Version 2; owner, one named user, group, mask, others.
        let mut acl = 2u32.to_le_bytes().to_vec();
        for (tag, perm, id) in [
            (1u16, 6u16, u32::MAX),
            (2, 4, 1000),
            (4, 4, u32::MAX),
            (16, 6, u32::MAX),
            (32, 0, u32::MAX),
        ] {
            acl.extend_from_slice(&tag.to_le_bytes());
            acl.extend_from_slice(&perm.to_le_bytes());
            acl.extend_from_slice(&id.to_le_bytes());
        }
        xattr(d, "system.posix_acl_access", &acl)
    }),
    ("remove acl", &[Op::Xattr], |d| {
        match rustix::fs::removexattr(d.join("a"), "system.posix_acl_access") {
            Err(rustix::io::Errno::OPNOTSUPP) => skip(d),
            other => Ok(other?),
        }
    }),
    ("chattr", &[Op::Attr], |d| {
        let file = File::open(d.join("a"))?;
        match rustix::fs::ioctl_getflags(&file)
            .and_then(|f| rustix::fs::ioctl_setflags(&file, f | rustix::fs::IFlags::NODUMP))
        {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOTTY) => skip(d),
            other => Ok(other?),
        }
    }),
    ("unlink", &[Op::Unlink], |d| {
        Ok(std::fs::remove_file(d.join("a"))?)
    }),
    ("rmdir", &[Op::Rmdir], |d| Ok(std::fs::remove_dir(d.join("dir"))?)),
    ("failures", &[], |d| {
        ensure!(std::fs::create_dir(d.join("from")).is_err());
        ensure!(std::fs::remove_file(d.join("nothing")).is_err());
        ensure!(std::fs::remove_dir(d).is_err());
        ensure!(File::create_new(d.join("from")).is_err());
        ensure!(std::fs::rename(d.join("nothing"), d.join("from")).is_err());
        ensure!(std::fs::hard_link(d.join("from"), d.join("named")).is_err());
        Ok(())
    }),
    ("neighbour", &[], |d| {
        let other = d.join("../elsewhere");
        std::fs::write(other.join("x"), b"x")?;
        std::fs::rename(other.join("x"), other.join("y"))?;
        std::fs::create_dir(other.join("sub"))?;
        std::fs::remove_dir(other.join("sub"))?;
        Ok(std::fs::remove_file(other.join("y"))?)
    }),
];

/// Room in the ring, unless asked otherwise.
const RING_BYTES: usize = 1 << 20;

#[repr(align(4096))]
struct Aligned([u8; 4096]);

fn writing(folder: &Path, name: &str) -> Result<File> {
    let path = folder.join(name);
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| path.display().to_string())
}

/// Tells the parent that this filesystem or kernel has no such thing.
fn skip(_: &Path) -> Result<()> {
    std::process::exit(77)
}

fn xattr(folder: &Path, name: &str, value: &[u8]) -> Result<()> {
    match rustix::fs::setxattr(folder.join("a"), name, value, XattrFlags::empty()) {
        Err(rustix::io::Errno::OPNOTSUPP) => skip(folder),
        other => Ok(other?),
    }
}

fn mmap_store(folder: &Path) -> Result<()> {
    let file = writing(folder, "a")?;
    file.set_len(4096)?;
    let fd = file.as_raw_fd();
    // SAFETY: a fresh shared mapping of one page of a file that is as long; it
    // is written within its length and unmapped once.
    unsafe {
        let page = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        );
        ensure!(page != libc::MAP_FAILED, "mmap");
        drop(file);
        page.cast::<u8>().write_volatile(b'm');
        ensure!(libc::munmap(page, 4096) == 0, "munmap");
    }
    Ok(())
}

fn aio_write(folder: &Path) -> Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    let path = folder.join("aio");
    let file = options
        .clone()
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .or_else(|_| options.open(&path))?;
    let block = Aligned([3; 4096]);
    let mut context: u64 = 0;
    // struct iocb: data, key and flags, opcode 1 (pwrite), descriptor, buffer, length, offset.
    let mut iocb = [0u64; 8];
    iocb[2] = 1 | (u64::try_from(file.as_raw_fd())? << 32);
    iocb[3] = block.0.as_ptr() as u64;
    iocb[4] = 4096;
    let mut list = [iocb.as_mut_ptr()];
    let mut events = [0u64; 4];
    // SAFETY: the structures are laid out as the kernel's and outlive the calls.
    unsafe {
        ensure!(
            libc::syscall(libc::SYS_io_setup, 8, &raw mut context) == 0,
            "io_setup"
        );
        ensure!(
            libc::syscall(libc::SYS_io_submit, context, 1, list.as_mut_ptr()) == 1,
            "io_submit"
        );
        let null = std::ptr::null::<libc::timespec>();
        ensure!(
            libc::syscall(libc::SYS_io_getevents, context, 1, 1, events.as_mut_ptr(), null) == 1,
            "io_getevents"
        );
    }
    ensure!(events[2] == 4096, "aio wrote {}", events[2] as i64);
    Ok(())
}

/// One write through a ring of its own, by the plain system calls.
fn uring_write(folder: &Path) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(folder.join("uring"))?;
    let mut params = [0u32; 30];
    // SAFETY: the kernel fills the parameters (120 bytes).
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) };
    if ring < 0 {
        return skip(folder);
    }
    let ring = i32::try_from(ring)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let data = *b"by a ring";
    // SAFETY: both areas are mapped with room to spare and the offsets are
    // those that the kernel gave (sq_off at word 10: tail 1, mask 2, array 6).
    unsafe {
        let sq = libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, ring, 0).cast::<u8>();
        let entries = libc::mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            libc::MAP_SHARED,
            ring,
            0x1000_0000,
        )
        .cast::<u8>();
        ensure!(
            sq.cast() != libc::MAP_FAILED && entries.cast() != libc::MAP_FAILED,
            "mmap of the ring"
        );
        let sqe = entries.cast::<u64>();
        // opcode 23 (write), descriptor; offset; buffer; length.
        sqe.write(23 | (u64::try_from(file.as_raw_fd())? << 32));
        sqe.add(1).write(0);
        sqe.add(2).write(data.as_ptr() as u64);
        sqe.add(3).write(data.len() as u64);
        sq.add(params[10 + 6] as usize).cast::<u32>().write(0);
        sq.add(params[10 + 1] as usize).cast::<u32>().write_volatile(1);
        ensure!(
            libc::syscall(libc::SYS_io_uring_enter, ring, 1, 1, 1, 0, 0) == 1,
            "io_uring_enter"
        );
    }
    ensure!(
        file.metadata()?.len() == data.len() as u64,
        "io_uring wrote nothing"
    );
    Ok(())
}

fn show(event: &Event) -> String {
    let name = |d: &omirr::source::Dirent| format!("{}:{}", d.dir, String::from_utf8_lossy(&d.name));
    format!(
        "{}{}{}{} ino={} pid={} {}",
        event.op.name(),
        event
            .at
            .as_ref()
            .map(|d| format!(" {}", name(d)))
            .unwrap_or_default(),
        event
            .to
            .as_ref()
            .map(|d| format!(" -> {}", name(d)))
            .unwrap_or_default(),
        event
            .range
            .map(|(a, b)| format!(" [{a},{b})"))
            .unwrap_or_default(),
        event.ino,
        event.pid,
        event.comm(),
    )
}

fn open(
    folder: &Path,
    attach: &str,
    transport: &str,
    ring_bytes: usize,
) -> Result<(EbpfSource, mpsc::Receiver<Signal>)> {
    let meta = folder.metadata()?;
    let watch = Watch {
        path: folder.to_owned(),
        dev: meta.dev(),
        ino: meta.ino(),
    };
    let attach = match attach {
        "fentry" => Attach::Fentry,
        "kprobe" => Attach::Kprobe,
        _ => Attach::Auto,
    };
    let transport = match transport {
        "ring" => Transport::Ring,
        "perf" => Transport::Perf,
        _ => Transport::Auto,
    };
    let (send, receive) = mpsc::channel();
    let sink = Box::new(move |batch: Vec<Signal>| batch.into_iter().for_each(|s| drop(send.send(s))));
    let source = EbpfSource::open(
        &[watch],
        Options {
            attach,
            transport,
            ring_bytes,
            dirty_entries: std::env::var_os("OMIRR_MERGE").map(|_| 65_536),
            ..Options::default()
        },
        Some(std::process::id()),
        sink,
    )?;
    Ok((source, receive))
}

fn run(folder: &Path, attach: &str, transport: &str) -> Result<()> {
    std::fs::create_dir_all(folder.join("../elsewhere"))?;
    std::fs::create_dir_all(folder)?;
    let folder = &folder.canonicalize()?;
    let began = Instant::now();
    let (source, receive) = open(folder, attach, transport, RING_BYTES)?;
    println!("opened in {:?}: {}", began.elapsed(), source.about().reason);
    let (mut bad, mut skipped) = (0, 0);
    for (name, expected, _) in STEPS {
        let status = Command::new("/proc/self/exe")
            .arg("step")
            .arg(folder)
            .arg(name)
            .status()?;
        if status.code() == Some(77) {
            skipped += 1;
            println!("skip {name}");
            source.barrier(Duration::from_secs(20))?;
            receive.try_iter().for_each(drop);
            continue;
        }
        ensure!(status.success(), "{name}: {status}");
        source
            .barrier(Duration::from_secs(20))
            .with_context(|| (*name).to_owned())?;
        let mut events = Vec::new();
        for signal in receive.try_iter() {
            match signal {
                Signal::Event(event) => events.push(event),
                other => bail!("{name}: {other:?}"),
            }
        }
        let seen = expected
            .iter()
            .all(|op| events.iter().any(|e| e.op == *op || e.also.contains(*op)))
            && (!expected.is_empty() || events.is_empty());
        // Where the kernel has no function for it, that is known.
        let gap = *name == "chattr"
            && source
                .stats()
                .hooks
                .iter()
                .any(|h| h.hook == "vfs_fileattr_set" && !h.attached);
        let verdict = match (seen, gap) {
            (true, _) => "ok  ",
            (false, true) => "gap ",
            (false, false) => "FAIL",
        };
        bad += usize::from(!seen && !gap);
        println!(
            "{} {name}: {}",
            verdict,
            events.iter().map(show).collect::<Vec<_>>().join(" | ")
        );
    }
    // What this process does itself is passed over.
    std::fs::write(folder.join("own"), b"own")?;
    std::fs::remove_file(folder.join("own"))?;
    source.barrier(Duration::from_secs(20))?;
    let own: Vec<Signal> = receive.try_iter().collect();
    bad += usize::from(!own.is_empty());
    println!(
        "{} own changes: {own:?}",
        if own.is_empty() { "ok  " } else { "FAIL" }
    );
    let stats = source.stats();
    println!(
        "events {} dropped {} buffer {} high water {}",
        stats.events, stats.dropped, stats.buffer_bytes, stats.high_water_bytes
    );
    for hook in &stats.hooks {
        println!(
            "hook {} {} hits {} {}",
            hook.hook,
            if hook.attached { "on" } else { "off" },
            hook.hits,
            hook.note.as_deref().unwrap_or("")
        );
    }
    println!(
        "RESULT {attach}+{transport} {}: {bad} bad, {skipped} skipped",
        folder.display()
    );
    Ok(())
}

/// Many threads change files at once; every file must have been told of, or a
/// loss must have been.
fn burst(folder: &Path, attach: &str, transport: &str, files: usize, ring_bytes: usize) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let folder = &folder.canonicalize()?;
    let (source, receive) = open(folder, attach, transport, ring_bytes)?;
    let began = Instant::now();
    let status = Command::new("/proc/self/exe")
        .arg("storm")
        .arg(folder)
        .arg(files.to_string())
        .status()?;
    ensure!(status.success(), "storm: {status}");
    let took = began.elapsed();
    source.barrier(Duration::from_secs(60))?;
    let (mut names, mut lost, mut last, mut disorder, mut all) =
        (std::collections::HashSet::new(), 0, 0, 0, 0);
    for signal in receive.try_iter() {
        match signal {
            Signal::Event(event) => {
                all += 1;
                disorder += usize::from(event.time_ns < last);
                last = event.time_ns;
                if event.op == Op::Create {
                    names.extend(event.at.map(|d| d.name));
                }
            }
            Signal::Lost { count, .. } => lost += count,
            Signal::Compare | Signal::Recovered(_) | Signal::Doubt => {}
        }
    }
    let stats = source.stats();
    let fine = names.len() == files || lost > 0;
    println!(
        "RESULT burst {attach}+{transport} {}: {} of {files} creations, {all} events, lost {lost} (counted {}), {disorder} out of order, high water {} of {}, {took:?}: {}",
        folder.display(),
        names.len(),
        stats.dropped,
        stats.high_water_bytes,
        stats.buffer_bytes,
        if fine { "0 bad" } else { "1 bad" },
    );
    Ok(())
}

fn storm(folder: &Path, files: usize) -> Result<()> {
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                for n in (thread..files).step_by(8) {
                    let mut file =
                        File::create(folder.join(format!("burst-{n}"))).expect("a file is created");
                    file.write_all(b"content").expect("it is written");
                    file.seek(SeekFrom::Start(0)).expect("it is a file");
                }
            });
        }
    });
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let arg = |n: usize| args.get(n).map_or("", String::as_str);
    let folder = Path::new(arg(2));
    if std::env::var_os("OMIRR_LOG").is_some() {
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .init();
    }
    match arg(1) {
        "run" => run(folder, arg(3), arg(4)),
        "burst" => burst(
            folder,
            arg(3),
            arg(4),
            arg(5).parse()?,
            arg(6).parse().unwrap_or(RING_BYTES),
        ),
        "storm" => storm(folder, arg(3).parse()?),
        "step" => {
            let (_, _, step) = STEPS
                .iter()
                .find(|(name, ..)| *name == arg(3))
                .context("unknown step")?;
            step(folder).with_context(|| arg(3).to_owned())
        }
        "probe" => {
            for c in omirr::source::ebpf::probe::probe() {
                println!("{} {}: {}", if c.ok { "yes" } else { "no " }, c.name, c.detail);
            }
            Ok(())
        }
        _ => bail!(
            "usage: trace_probe run FOLDER ATTACH TRANSPORT | burst FOLDER ATTACH TRANSPORT FILES [RING_BYTES] | probe"
        ),
    }
}
