//! A kernel's description of its types, damaged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omirr::source::ebpf::btf::KernelTypes;

fuzz_target!(|data: &[u8]| {
    let Ok(types) = KernelTypes::parse(data) else {
        return;
    };
    for (structure, member, size) in [
        ("thing", "b", 4),
        ("thing", "c.a", 4),
        ("file", "f_inode", 8),
        ("DirtyKey", "ino", 8),
    ] {
        if let Ok(offset) = types.member_offset(structure, member, size) {
            assert!(offset <= u32::from(u16::MAX));
        }
    }
    for function in ["make_thing", "vfs_write", "take_entry"] {
        if let Ok(prototype) = types.prototype(function) {
            let _ = prototype.position("y", Some("thing"));
            let _ = prototype.returns_pointer();
        }
    }
});
