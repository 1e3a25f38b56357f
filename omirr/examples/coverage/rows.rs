//! The rows: every change that omirr must see, and what must be reported of it.
//!
//! A row works in a folder of its own. `prepare` makes what was there before,
//! `act` is the change; what both leave in [`Held`] stays open until the source
//! has been asked what it saw, so that closing it tells nothing.

use std::any::Any;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Result;
use omirr::source::Op;
use serde::{Deserialize, Serialize};

use crate::place::Place;
use crate::sys::Mapping;
use crate::watchers::Look;
use crate::{attrs, data, elsewhere, mapping, names};

/// What every file has before its row: three pages.
pub const BEFORE: &[u8] = &[b'a'; 3 * 4096];

/// Where one row happens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stage {
    pub place: Place,
    /// The row's folder, as the changer sees it.
    pub dir: PathBuf,
    name: String,
}

impl Stage {
    pub fn new(place: &Place, name: &str) -> Self {
        Self {
            place: place.clone(),
            dir: place.changes.join(name),
            name: name.to_owned(),
        }
    }

    /// The row's folder in the watched share.
    pub fn seen_as(&self) -> PathBuf {
        self.place.share.join(&self.name)
    }

    /// A name of the row in the watched share; the empty one is the folder.
    pub fn full(&self, name: &str) -> PathBuf {
        if name.is_empty() {
            self.seen_as()
        } else {
            self.seen_as().join(name)
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Open until the row is over.
#[derive(Default)]
pub struct Held {
    pub maps: Vec<Mapping>,
    pub files: Vec<File>,
    pub others: Vec<Box<dyn Any>>,
    /// The change is complete no earlier than this; unless set, no earlier than
    /// it began.
    pub mark: Option<u64>,
}

/// This kernel or filesystem has no such change.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Lacking(pub String);

/// One event that must come.
#[derive(Clone, Copy)]
pub struct Expect {
    pub op: Op,
    pub at: Option<&'static str>,
    pub to: Option<&'static str>,
    pub range: Option<(u64, u64)>,
}

type Step = fn(&Stage, &mut Held) -> Result<()>;

pub struct Row {
    pub group: &'static str,
    pub name: &'static str,
    pub expect: Vec<Expect>,
    /// What the file is like when the change is complete.
    pub look: Option<Look>,
    pub prepare: Step,
    pub act: Step,
    /// The only filesystem that has it.
    only: Option<&'static str>,
    /// What the sources for comparison see of it depends on timing.
    pub varies: bool,
    /// It takes a folder beside the share on the same filesystem.
    beside: bool,
}

impl Row {
    /// Why the place cannot have this row.
    pub fn not_on(&self, place: &Place) -> Option<String> {
        match self.only {
            Some(only) if only != place.name => Some(format!("only {only} does this")),
            _ if self.beside && place.outside.is_none() => Some("the share is the whole mount".into()),
            _ => None,
        }
    }

    fn new(group: &'static str, name: &'static str, prepare: Step, act: Step) -> Self {
        Self {
            group,
            name,
            expect: Vec::new(),
            look: None,
            prepare,
            act,
            only: None,
            varies: false,
            beside: false,
        }
    }

    fn sees(mut self, op: Op, at: &'static str) -> Self {
        self.expect.push(Expect {
            op,
            at: Some(at),
            to: None,
            range: None,
        });
        self
    }

    fn sees_to(mut self, op: Op, at: Option<&'static str>, to: &'static str) -> Self {
        self.expect.push(Expect {
            op,
            at,
            to: Some(to),
            range: None,
        });
        self
    }

    fn sees_range(mut self, op: Op, at: &'static str, start: u64, end: u64) -> Self {
        self.expect.push(Expect {
            op,
            at: Some(at),
            to: None,
            range: Some((start, end)),
        });
        self
    }

    /// The kernel itself knows no name: the event names the inode alone.
    fn sees_nameless(mut self, op: Op) -> Self {
        self.expect.push(Expect {
            op,
            at: None,
            to: None,
            range: None,
        });
        self
    }

    /// The new bytes of a file.
    fn then(mut self, name: &'static str, at: u64, bytes: &'static [u8]) -> Self {
        self.look = Some(Look::bytes(Path::new(name), at, bytes));
        self
    }

    /// The new size of a file.
    fn then_size(mut self, name: &'static str, size: u64) -> Self {
        self.look = Some(Look::size(Path::new(name), size));
        self
    }

    /// `write` of a range, and the bytes that begin there.
    fn writes(self, start: u64, end: u64, bytes: &'static [u8]) -> Self {
        self.sees_range(Op::Write, "f", start, end)
            .then("f", start, bytes)
    }

    fn only(mut self, filesystem: &'static str) -> Self {
        self.only = Some(filesystem);
        self
    }

    fn varies(mut self) -> Self {
        self.varies = true;
        self
    }

    fn beside(mut self) -> Self {
        self.beside = true;
        self
    }
}

/// All rows, in the order of the table.
pub fn all() -> Vec<Row> {
    [data_rows(), name_rows(), attr_rows(), elsewhere_rows()]
        .into_iter()
        .flatten()
        .collect()
}

fn data_rows() -> Vec<Row> {
    let row = |name, act: Step| Row::new("data", name, data::file, act);
    let falls = |name, act: Step| {
        move |start, end, size| {
            row(name, act)
                .sees_range(Op::Fallocate, "f", start, end)
                .then_size("f", size)
        }
    };
    let mapped = |name, prepare: Step, act: Step| {
        Row::new("data", name, prepare, act)
            .sees(Op::Write, "f")
            .then("f", 0, b"m")
    };
    vec![
        row("write", data::write).writes(0, 5, b"hello"),
        row("write, the bytes arriving late", data::write_late).writes(0, 8192, b"l"),
        row("pwrite", data::pwrite).writes(100, 105, b"there"),
        row("writev", data::writev).writes(0, 4, b"abcd"),
        row("pwritev2", data::pwritev2).writes(4096, 4100, b"abcd"),
        row("O_APPEND", data::append).writes(12288, 12291, b"end"),
        row("O_DIRECT", data::direct).writes(4096, 8192, b"d"),
        row("O_DIRECT, the bytes arriving late", data::direct_late).writes(0, 8192, b"l"),
        row("AIO", data::aio).writes(0, 4096, b"d"),
        row("AIO, O_DIRECT", data::aio_direct).writes(0, 4096, b"d"),
        row("io_uring write", data::uring).writes(0, 4096, b"d"),
        row("io_uring write, O_DIRECT", data::uring_direct).writes(0, 4096, b"d"),
        row("sendfile", data::sendfile).writes(0, 10_000, b"g"),
        row("splice", data::splice).writes(0, 14, b"through a pipe"),
        row("copy_file_range", data::copy_file_range).writes(0, 5000, b"g"),
        row("FICLONE", data::clone_all).writes(0, 16384, b"g"),
        row("FICLONERANGE", data::clone_range).writes(4096, 8192, b"g"),
        row("truncate", data::truncate)
            .sees_range(Op::Truncate, "f", 50, 50)
            .then_size("f", 50),
        row("ftruncate", data::ftruncate)
            .sees_range(Op::Truncate, "f", 20_000, 20_000)
            .then_size("f", 20_000),
        row("O_TRUNC", data::o_trunc)
            .sees_range(Op::Truncate, "f", 0, 0)
            .then_size("f", 0),
        falls("fallocate, allocate", data::allocate)(0, 16384, 16384),
        row("fallocate, punch hole", data::punch)
            .sees_range(Op::Fallocate, "f", 0, 4096)
            .then("f", 0, b"\0"),
        row("fallocate, zero range", data::zero)
            .sees_range(Op::Fallocate, "f", 0, 4096)
            .then("f", 0, b"\0"),
        falls("fallocate, collapse range", data::collapse)(0, u64::MAX, 8192),
        falls("fallocate, insert range", data::insert)(0, u64::MAX, 16384),
        mapped("mmap store", data::file, mapping::first_store),
        mapped("mmap store, then msync", data::file, mapping::store_and_sync),
        Row::new(
            "data",
            "mmap store, then munmap, descriptor closed before",
            mapping::mapped_and_closed,
            mapping::store_and_unmap,
        )
        .sees(Op::Close, "f")
        .then("f", 0, b"m"),
        mapped(
            "mmap store long after the page fault",
            mapping::touched,
            mapping::late_store,
        ),
        mapped(
            "mmap store long after the page fault, descriptor closed before",
            mapping::touched_and_closed,
            mapping::late_store,
        ),
    ]
}

fn name_rows() -> Vec<Row> {
    let row = |name, prepare: Step, act: Step| Row::new("namespace", name, prepare, act);
    let moves =
        |name, prepare: Step, act: Step, to| row(name, prepare, act).sees_to(Op::Rename, Some("f"), to);
    vec![
        row("open(O_CREAT)", data::nothing, names::create).sees(Op::Create, "n"),
        row("mknod, file", data::nothing, names::mknod_file).sees(Op::Create, "n"),
        row("mknod, fifo", data::nothing, names::mknod_fifo).sees(Op::Mknod, "n"),
        row("mknod, socket", data::nothing, names::mknod_socket).sees(Op::Mknod, "n"),
        row("mknod, device", data::nothing, names::mknod_device).sees(Op::Mknod, "n"),
        row("bind of a unix socket", data::nothing, names::bind).sees(Op::Mknod, "n"),
        row("mkdir", data::nothing, names::mkdir).sees(Op::Mkdir, "n"),
        row("symlink", data::nothing, names::symlink).sees(Op::Symlink, "n"),
        row("link", data::file, names::link).sees_to(Op::Link, Some("f"), "n"),
        row("O_TMPFILE, then linkat", names::tmpfile, names::link_tmpfile).sees_to(Op::Link, None, "n"),
        // By a name that is not the file's own, eBPF tells of a write without its bytes.
        row(
            "O_TMPFILE, then linkat, then write",
            names::tmpfile_linked,
            names::write_held,
        )
        .sees(Op::Write, "n")
        .then("n", 7, b"hello"),
        row(
            "O_TMPFILE, then linkat, then write, the name not in the cache",
            names::tmpfile_forgotten,
            names::write_held,
        )
        .sees_nameless(Op::Write)
        .then("n", 7, b"hello")
        .varies(),
        row(
            "write by a name that is gone, another one stays",
            names::two_names,
            names::write_held,
        )
        .sees(Op::Write, "n")
        .then("n", 0, b"hello"),
        row("unlink", data::file, names::unlink).sees(Op::Unlink, "f"),
        row("rmdir", names::folders, names::rmdir).sees(Op::Rmdir, "a"),
        moves("rename", data::file, names::rename, "n"),
        moves(
            "rename across directories",
            names::folders,
            names::rename_across,
            "b/n",
        ),
        moves(
            "rename over an existing name",
            names::folders,
            names::rename_over,
            "over",
        ),
        row("rename out of the share", data::file, names::rename_out)
            .sees(Op::Rename, "f")
            .beside(),
        row("rename into the share", names::outside, names::rename_in)
            .sees_to(Op::Rename, None, "n")
            .beside(),
        moves(
            "renameat2, RENAME_NOREPLACE",
            data::file,
            names::rename_noreplace,
            "n",
        ),
        row("renameat2, RENAME_EXCHANGE", names::folders, names::exchange).sees_to(
            Op::Exchange,
            Some("f"),
            "a",
        ),
        row(
            "rename of a directory with 10,000 files",
            names::full_folder,
            names::rename_folder,
        )
        .sees_to(Op::Rename, Some("full"), "n"),
    ]
}

fn attr_rows() -> Vec<Row> {
    let row = |name, op, prepare: Step, act: Step| Row::new("attributes", name, prepare, act).sees(op, "f");
    vec![
        row("chmod", Op::Attr, data::file, attrs::chmod),
        row("fchmod", Op::Attr, attrs::opened, attrs::fchmod),
        Row::new(
            "attributes",
            "chmod of a directory",
            names::folders,
            attrs::chmod_folder,
        )
        .sees(Op::Attr, "a"),
        row("chown", Op::Attr, data::file, attrs::chown),
        row("fchown", Op::Attr, attrs::opened, attrs::fchown),
        row("utimensat", Op::Attr, data::file, attrs::utimens),
        row("futimens", Op::Attr, attrs::opened, attrs::futimens),
        row("setxattr", Op::Xattr, data::file, attrs::setxattr),
        row("fsetxattr", Op::Xattr, attrs::opened, attrs::fsetxattr),
        row("removexattr", Op::Xattr, attrs::with_xattr, attrs::removexattr),
        row("fremovexattr", Op::Xattr, attrs::with_xattr, attrs::fremovexattr),
        row("POSIX ACL", Op::Xattr, data::file, attrs::set_acl),
        row(
            "POSIX ACL, by descriptor",
            Op::Xattr,
            attrs::opened,
            attrs::fset_acl,
        ),
        row(
            "POSIX ACL, removed",
            Op::Xattr,
            attrs::with_acl,
            attrs::remove_acl,
        ),
        row(
            "POSIX ACL, removed by descriptor",
            Op::Xattr,
            attrs::with_acl,
            attrs::fremove_acl,
        ),
        row(
            "chattr, FS_IOC_SETFLAGS",
            Op::Attr,
            attrs::opened,
            attrs::setflags,
        ),
        row(
            "chattr, FS_IOC_FSSETXATTR",
            Op::Attr,
            attrs::opened,
            attrs::fssetxattr,
        ),
    ]
}

fn elsewhere_rows() -> Vec<Row> {
    let row = |name, prepare: Step, act: Step| Row::new("from elsewhere", name, prepare, act);
    vec![
        row(
            "write through a bind mount",
            elsewhere::bound,
            elsewhere::write_bound,
        )
        .writes(0, 5, b"hello"),
        row(
            "create through a bind mount",
            elsewhere::bound,
            elsewhere::create_bound,
        )
        .sees(Op::Create, "n"),
        row(
            "write from another mount namespace",
            data::file,
            elsewhere::write_in_namespace,
        )
        .writes(0, 5, b"hello"),
        row(
            "rename from another mount namespace",
            data::file,
            elsewhere::rename_in_namespace,
        )
        .sees_to(Op::Rename, Some("f"), "n"),
        row(
            "write that copies a file up from the lower directory",
            elsewhere::lower,
            elsewhere::copy_up,
        )
        .sees(Op::Write, "f")
        .then("f", 0, b"hello")
        .only("overlay"),
        row(
            "write by the loop driver",
            elsewhere::looped,
            elsewhere::write_looped,
        )
        .writes(0, 4096, b"d"),
        row(
            "write by the loop driver, O_DIRECT",
            elsewhere::looped_direct,
            elsewhere::write_looped,
        )
        .writes(0, 4096, b"d")
        .varies(),
        // The client writes whole pages.
        row(
            "write by an NFS client",
            elsewhere::exported,
            elsewhere::nfs_write,
        )
        .sees_range(Op::Write, "f", 0, 4096)
        .then("f", 0, b"hello"),
        row(
            "create by an NFS client",
            elsewhere::exported,
            elsewhere::nfs_create,
        )
        .sees(Op::Create, "n"),
        row(
            "rename by an NFS client",
            elsewhere::exported,
            elsewhere::nfs_rename,
        )
        .sees_to(Op::Rename, Some("f"), "n"),
        row(
            "unlink by an NFS client",
            elsewhere::exported,
            elsewhere::nfs_unlink,
        )
        .sees(Op::Unlink, "f"),
        row(
            "chmod by an NFS client",
            elsewhere::exported,
            elsewhere::nfs_chmod,
        )
        .sees(Op::Attr, "f"),
    ]
}
