//! The hooks as the user side sees them: what each needs of the kernel and what
//! covers for it where the kernel lacks it.
//!
//! In: the kernel's types. Out: offsets and argument positions for the
//! programs, and for each hook whether it can be loaded or, in words, why not.

use omirr_common::{
    hooks::{self as id, HOOK_COUNT, HOOKS, Timing},
    settings::{ABSENT, AllSlots, NO_ARG, Offsets, Slots},
};

use super::btf::{BtfError, KernelTypes};

/// A parameter: its names over the versions, and the struct it points at.
type Parameter = (&'static str, Option<&'static str>);

/// Whether omirr can do without a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Without it changes would go unseen: this way of attaching fails.
    Always,
    /// It is one of several that see the same; the text says what covers.
    Covered(&'static str),
    /// A filesystem's own write: attached if a share lies on such a filesystem.
    Funnel,
    /// A filesystem's own `fallocate`: attached if a share lies on such a filesystem;
    /// `vfs_fallocate` is silent there then.
    Fallocate,
    /// A write above the filesystem: attached if a share lies on a filesystem
    /// whose own write is not known.
    AboveFunnel,
}

/// One hook.
pub struct Spec {
    pub id: u8,
    pub need: Need,
    parameters: &'static [Parameter],
}

impl Spec {
    pub fn function(&self) -> &'static str {
        HOOKS[usize::from(self.id)].0
    }

    pub fn timing(&self) -> Timing {
        HOOKS[usize::from(self.id)].1
    }

    /// The name of one of its programs; `flavour`: `fentry`, `kretprobe`, …
    pub fn program(&self, flavour: &str) -> String {
        format!("{flavour}_{}", self.function().trim_start_matches('_'))
    }
}

const DENTRY: Parameter = ("dentry", Some("dentry"));
const FILE: Parameter = ("file", Some("file"));
const IOCB: Parameter = ("iocb", Some("kiocb"));

macro_rules! specs {
    ($( $id:ident, $need:expr, [$($parameter:expr),*]; )*) => {
        &[ $( Spec { id: id::$id, need: $need, parameters: &[$($parameter),*] } ),* ]
    };
}

/// All hooks. A parameter's place in the list is the slot's letter.
pub const SPECS: &[Spec] = specs! {
    VFS_OPEN, Need::Always, [("path", Some("path")), FILE];
    VFS_CREATE, Need::Always, [DENTRY];
    VFS_MKDIR, Need::Always, [DENTRY];
    VFS_MKNOD, Need::Always, [DENTRY];
    VFS_SYMLINK, Need::Always, [DENTRY];
    VFS_LINK, Need::Always, [("old_dentry", Some("dentry")), ("new_dentry", Some("dentry"))];
    D_DELETE, Need::Always, [DENTRY];
    VFS_RENAME, Need::Always, [("rd", Some("renamedata"))];
    NOTIFY_CHANGE, Need::Always, [DENTRY, ("attr", Some("iattr"))];
    SETXATTR, Need::Covered("nothing: a changed extended attribute is found by the next full comparison"), [DENTRY];
    REMOVEXATTR, Need::Covered("nothing: a removed extended attribute is found by the next full comparison"), [DENTRY];
    SET_ACL, Need::Covered("__vfs_setxattr_noperm, which access lists pass on kernels without it"), [DENTRY];
    REMOVE_ACL, Need::Covered("__vfs_removexattr_locked, which access lists pass on kernels without it"), [DENTRY];
    FILEATTR_SET, Need::Covered("mnt_drop_write_file, which ends a chattr on kernels without it"), [DENTRY];
    VFS_FALLOCATE, Need::Covered("__fput: seen when the file is closed"), [FILE, ("offset", None), ("len", None), ("mode", None)];
    EXT4_WRITE, Need::Funnel, [IOCB];
    SHMEM_WRITE, Need::Funnel, [IOCB];
    GENERIC_WRITE, Need::Funnel, [IOCB];
    XFS_WRITE, Need::Funnel, [IOCB];
    BTRFS_WRITE, Need::Funnel, [IOCB];
    VFS_WRITE, Need::AboveFunnel, [FILE, ("pos", None)];
    VFS_WRITEV, Need::AboveFunnel, [FILE, ("pos", None)];
    VFS_ITER_WRITE, Need::AboveFunnel, [FILE, ("ppos", None)];
    VFS_IOCB_WRITE, Need::AboveFunnel, [FILE];
    SPLICE_WRITE, Need::AboveFunnel, [("out", Some("file")), ("ppos", None)];
    IO_WRITE, Need::AboveFunnel, [("req", Some("io_kiocb"))];
    AIO_COMPLETE, Need::Covered("__fput: an asynchronous write is seen when the file is closed"), [("kiocb", Some("kiocb")), ("res", None)];
    IO_COMPLETE, Need::Covered("__fput: an asynchronous write is seen when the file is closed"), [("kiocb", Some("kiocb")), ("res", None)];
    COPY_RANGE, Need::Covered("__fput: seen when the file is closed"), [("file_out", Some("file")), ("pos_out", None)];
    CLONE_RANGE, Need::Covered("__fput: seen when the file is closed"), [("file_out", Some("file")), ("pos_out", None)];
    PAGE_DIRTY, Need::Covered("__fput: a store through a mapping is seen when the last holder lets go of the file"), [("vmf", Some("vm_fault"))];
    FPUT, Need::Always, [FILE];
    WRITE_BACK, Need::Covered("__fput: a store into a mapping that stays open is seen when it is let go"), [("mapping", Some("address_space"))];
    DROP_WRITE, Need::Covered("vfs_fileattr_set"), [FILE];
    DIRECT_COMPLETE, Need::Covered("__fput: a direct write that the kernel's own threads queue is seen when they let go of the file"), [("dio", Some("iomap_dio"))];
    EXT4_FALLOCATE, Need::Fallocate, [FILE, ("offset", None), ("len", None), ("mode", None)];
    SHMEM_FALLOCATE, Need::Fallocate, [FILE, ("offset", None), ("len", None), ("mode", None)];
    XFS_FALLOCATE, Need::Fallocate, [FILE, ("offset", None), ("len", None), ("mode", None)];
    BTRFS_FALLOCATE, Need::Fallocate, [FILE, ("offset", None), ("len", None), ("mode", None)];
};

/// What tells of changes of contents beside a filesystem's own write and `fallocate`.
/// Where one of these is missing, a close is all that tells of some change, and
/// nothing tells of its bytes.
pub const CONTENT: [u8; 7] = [
    id::AIO_COMPLETE,
    id::IO_COMPLETE,
    id::COPY_RANGE,
    id::CLONE_RANGE,
    id::PAGE_DIRTY,
    id::WRITE_BACK,
    id::DIRECT_COMPLETE,
];

/// Filesystems of which the bytes are believed: those that have a first store into a
/// page of a mapping fault, so that it is told. Not tmpfs, where a page that a read
/// has mapped may take a store without.
pub const EXACT_FILESYSTEMS: [&str; 3] = ["btrfs", "ext4", "xfs"];

/// A filesystem's own write, by the type that the mount table shows. Where two
/// are named the first that the kernel has is the one.
pub fn funnels(filesystem: &str) -> &'static [u8] {
    match filesystem {
        "ext4" | "ext3" => &[id::EXT4_WRITE],
        "tmpfs" => &[id::SHMEM_WRITE, id::GENERIC_WRITE],
        "xfs" => &[id::XFS_WRITE],
        "btrfs" => &[id::BTRFS_WRITE],
        "vfat" | "ramfs" => &[id::GENERIC_WRITE],
        _ => &[],
    }
}

/// A filesystem's own `fallocate`, likewise.
pub fn fallocate_of(filesystem: &str) -> Option<u8> {
    match filesystem {
        "ext4" | "ext3" => Some(id::EXT4_FALLOCATE),
        "tmpfs" => Some(id::SHMEM_FALLOCATE),
        "xfs" => Some(id::XFS_FALLOCATE),
        "btrfs" => Some(id::BTRFS_FALLOCATE),
        _ => None,
    }
}

/// What the running kernel makes of the hooks.
pub struct Layout {
    pub offsets: Offsets,
    pub slots: AllSlots,
    /// By hook number: why it cannot be loaded; none if it can.
    pub missing: [Option<String>; HOOK_COUNT],
}

impl Layout {
    pub fn resolve(types: &KernelTypes) -> Result<Self, BtfError> {
        let mut offsets = Offsets::UNKNOWN;
        let mut absent = Vec::new();
        for (place, structure, path, size, needed) in members(&mut offsets) {
            let mut found = Err(BtfError::NoMember(format!("{structure}.{path}")));
            // One member under its names over the versions.
            for name in path.split(" or ") {
                found = found.or_else(|_| types.member_offset(structure, name, size));
            }
            match found {
                Ok(offset) => *place = offset,
                Err(error) if needed => return Err(error),
                Err(error) => absent.push((structure, error.to_string())),
            }
        }
        let mut slots = AllSlots([Slots::UNKNOWN; HOOK_COUNT]);
        let mut missing = [const { None }; HOOK_COUNT];
        for spec in SPECS {
            let index = usize::from(spec.id);
            match resolve_slots(types, spec) {
                Ok(found) => slots.0[index] = found,
                Err(error) => missing[index] = Some(error.to_string()),
            }
            // A hook that needs a member which is not there must not run.
            let needs = |name: &str| spec.parameters.iter().any(|(_, s)| *s == Some(name));
            for (structure, why) in &absent {
                let owner = match *structure {
                    "vm_area_struct" => "vm_fault",
                    // Of these two, only what leads from a mapping to a name.
                    "inode" | "dentry" => "address_space",
                    other => other,
                };
                if needs(owner) {
                    missing[index].get_or_insert_with(|| why.clone());
                }
            }
        }
        if missing[usize::from(id::FILEATTR_SET)].is_none() {
            missing[usize::from(id::DROP_WRITE)] = Some("not needed".to_owned());
        }
        Ok(Self {
            offsets,
            slots,
            missing,
        })
    }
}

fn resolve_slots(types: &KernelTypes, spec: &Spec) -> Result<Slots, BtfError> {
    let prototype = types.prototype(spec.function())?;
    let mut slots = Slots::UNKNOWN;
    for (place, (name, structure)) in [&mut slots.a, &mut slots.b, &mut slots.c, &mut slots.d]
        .into_iter()
        .zip(spec.parameters)
    {
        *place = prototype.position(name, *structure)?;
    }
    slots.ret = u8::try_from(prototype.parameter_count()).unwrap_or(NO_ARG);
    slots.ret_is_pointer = u8::from(prototype.returns_pointer());
    Ok(slots)
}

/// A `write_iter` or `fallocate` in a module: its parameters are what
/// `file_operations` says.
pub fn module_slots(need: Need) -> Slots {
    match need {
        // file, mode, offset, length
        Need::Fallocate => Slots {
            a: 0,
            b: 2,
            c: 3,
            d: 1,
            ret: 4,
            ..Slots::UNKNOWN
        },
        // iocb, from
        _ => Slots {
            a: 0,
            ret: 2,
            ..Slots::UNKNOWN
        },
    }
}

/// Every member: where its offset goes, its struct, its path, its size, and
/// whether nothing works without it.
fn members(o: &mut Offsets) -> Vec<(&mut u32, &'static str, &'static str, u32, bool)> {
    debug_assert_eq!(o.file_dentry, ABSENT);
    vec![
        (&mut o.file_dentry, "file", "f_path.dentry", 8, true),
        (&mut o.file_inode, "file", "f_inode", 8, true),
        (&mut o.file_mode, "file", "f_mode", 4, true),
        (&mut o.path_dentry, "path", "dentry", 8, true),
        (&mut o.dentry_parent, "dentry", "d_parent", 8, true),
        (&mut o.dentry_inode, "dentry", "d_inode", 8, true),
        (&mut o.dentry_name_len, "dentry", "d_name.len", 4, true),
        (&mut o.dentry_name, "dentry", "d_name.name", 8, true),
        (&mut o.dentry_hashed, "dentry", "d_hash.pprev", 8, true),
        (&mut o.inode_mode, "inode", "i_mode", 2, true),
        (&mut o.inode_sb, "inode", "i_sb", 8, true),
        (&mut o.inode_ino, "inode", "i_ino", 8, true),
        (&mut o.inode_generation, "inode", "i_generation", 4, true),
        (&mut o.inode_nlink, "inode", "i_nlink", 4, true),
        (&mut o.sb_dev, "super_block", "s_dev", 4, true),
        (&mut o.sb_root, "super_block", "s_root", 8, true),
        (&mut o.kiocb_file, "kiocb", "ki_filp", 8, false),
        (&mut o.kiocb_pos, "kiocb", "ki_pos", 8, false),
        (&mut o.kiocb_flags, "kiocb", "ki_flags", 4, false),
        (&mut o.rename_old_dentry, "renamedata", "old_dentry", 8, false),
        (&mut o.rename_new_dentry, "renamedata", "new_dentry", 8, false),
        (&mut o.rename_flags, "renamedata", "flags", 4, false),
        (&mut o.iattr_valid, "iattr", "ia_valid", 4, false),
        (&mut o.iattr_size, "iattr", "ia_size", 8, false),
        (&mut o.fault_vma, "vm_fault", "vma", 8, false),
        (&mut o.vma_file, "vm_area_struct", "vm_file", 8, false),
        (&mut o.io_kiocb_file, "io_kiocb", "file", 8, false),
        (&mut o.task_leader, "task_struct", "group_leader", 8, false),
        (&mut o.task_start, "task_struct", "start_boottime", 8, false),
        (&mut o.inode_mapping, "inode", "i_mapping", 8, true),
        (&mut o.dio_iocb, "iomap_dio", "iocb", 8, false),
        (&mut o.dio_flags, "iomap_dio", "flags", 4, false),
        (&mut o.kiocb_complete, "kiocb", "ki_complete", 8, true),
        (&mut o.mapping_host, "address_space", "host", 8, false),
        (
            &mut o.mapping_writable,
            "address_space",
            "i_mmap_writable",
            4,
            true,
        ),
        (&mut o.inode_first_alias, "inode", "i_dentry.first", 8, false),
        (&mut o.dentry_alias, "dentry", "d_u.d_alias or d_alias", 16, false),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hook_has_one_spec() {
        let mut ids: Vec<u8> = SPECS.iter().map(|s| s.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..HOOK_COUNT as u8).collect::<Vec<_>>());
    }

    #[test]
    fn program_names_have_no_leading_underscores() {
        let fput = &SPECS[usize::from(id::FPUT)];
        assert_eq!(fput.program("fentry"), "fentry_fput");
    }

    /// On a machine that shows its types, every hook that omirr cannot do
    /// without must be found.
    #[test]
    fn this_kernel_has_what_is_always_needed() {
        let Ok(types) = KernelTypes::of_this_kernel() else {
            println!("skipped: this kernel does not describe its types");
            return;
        };
        let layout = Layout::resolve(&types).unwrap();
        for spec in SPECS.iter().filter(|s| s.need == Need::Always) {
            let why = &layout.missing[usize::from(spec.id)];
            assert!(why.is_none(), "{}: {why:?}", spec.function());
        }
    }
}
