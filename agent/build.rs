//! Embeds the kernel programs that `cargo xtask build-ebpf` has built, or nothing.
//!
//! Plain `cargo build` and `cargo check` must work without the BPF toolchain, so a missing object
//! is an empty one: the binary then says at run time what it lacks.

use std::{env, fs, path::PathBuf};

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let object = manifest.join("../target/ebpf/bellows.o");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("bellows.o");
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = fs::read(&object).unwrap_or_default();
    fs::write(out, bytes).expect("OUT_DIR is writable");
}
