//! `cargo xtask codegen`: generates `agent/src/cri/v1.rs` from `agent/proto/cri.proto`.
//!
//! What is generated is checked in, so that neither a build nor a test needs the generator, which compiles for a
//! minute. Its first lines tell the checksums of the protocol and of the rest of the file, by which a unit test
//! (`cri::tests`) sees that one was changed without the other; `--check` generates it anew and compares. No `protoc`
//! is needed: the compiler of protocols is a crate.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};

const PROTOCOL: &str = "agent/proto/cri.proto";
const GENERATED: &str = "agent/src/cri/v1.rs";

fn main() -> ExitCode {
    let is_check = env::args().any(|argument| argument == "--check");
    let done = if is_check { check() } else { write() };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("{GENERATED} is not what {PROTOCOL} gives: run `cargo xtask codegen`");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("codegen: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn root() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = manifest.ancestors().nth(2);
    Ok(root.context("this crate is not where it was")?.to_owned())
}

fn write() -> Result<bool> {
    fs::write(root()?.join(GENERATED), generated()?)?;
    Ok(true)
}

/// Whether what is checked in is what would be generated.
fn check() -> Result<bool> {
    Ok(fs::read_to_string(root()?.join(GENERATED))? == generated()?)
}

fn generated() -> Result<String> {
    let protocol = root()?.join(PROTOCOL);
    let directory = protocol.parent().context("no directory")?.to_owned();
    let descriptors = protox::compile([&protocol], [directory])?;
    let output = tempfile::tempdir()?;
    tonic_prost_build::configure()
        .build_transport(false)
        // Only tests need a runtime that is not real.
        .server_mod_attribute("runtime.v1", "#[cfg(feature = \"fake-runtime\")]")
        .btree_map(".")
        .out_dir(output.path())
        .compile_fds(descriptors)?;
    let file = output.path().join("runtime.v1.rs");
    // As the rest of the repository is.
    let formatted = Command::new("rustfmt")
        .args(["--edition", "2024"])
        .arg(&file)
        .status()?;
    ensure!(formatted.success(), "rustfmt failed");
    let text = fs::read_to_string(file)?;
    let sum = |bytes: &[u8]| crc32fast::hash(bytes);
    Ok(format!(
        "// Generated from {PROTOCOL} by `cargo xtask codegen`.\n// {:08x} {:08x}\n{text}",
        sum(&fs::read(protocol)?),
        sum(text.as_bytes()),
    ))
}
