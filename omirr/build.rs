//! Puts the eBPF object into the binary, if it has been built.
//!
//! `cargo xtask build` makes it first; a build without it is a whole omirr that
//! says that it has no eBPF and watches by fanotify.

use std::path::PathBuf;

fn main() {
    let workspace = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("..");
    let object = workspace.join("target/bpf/omirr-ebpf.o");
    println!("cargo::rustc-check-cfg=cfg(ebpf_object)");
    println!("cargo::rerun-if-changed={}", object.display());
    // A path that does not exist counts as changed on every build; its folder
    // is what tells that it has come into being.
    if let Ok(path) = object.canonicalize() {
        println!("cargo::rustc-cfg=ebpf_object");
        println!("cargo::rustc-env=OMIRR_EBPF_OBJECT={}", path.display());
    }
}
