//! Building the kernel programs and the static binaries.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    root,
    shell::{quiet, step},
    tools,
};

const BPF_TARGET: &str = "bpfel-unknown-none";
/// A target directory of its own: build scripts look at RUSTC_BOOTSTRAP, and would be run again at
/// every change between the two builds.
const BPF_DIRECTORY: &str = "target/ebpf/build";

/// Static binaries, by their paths.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    pub(crate) bellows: PathBuf,
    pub(crate) guest: PathBuf,
}

/// Builds the kernel programs; returns the object.
pub(crate) fn ebpf() -> Result<PathBuf> {
    tools::rust_src()?;
    let linker = tools::bpf_linker()?;
    let root = root()?;
    let object = root.join("target/ebpf/bellows.o");
    step("build the kernel programs", || {
        quiet(bpf_cargo(&linker, "build")?.current_dir(&root))?;
        let built = root
            .join(BPF_DIRECTORY)
            .join(BPF_TARGET)
            .join("release/bellows-ebpf");
        let bytes = fs::read(&built).with_context(|| built.display().to_string())?;
        check_object(&bytes)?;
        // The agent's build looks at the time of change: an equal object must not rebuild it.
        if fs::read(&object).ok().as_deref() != Some(&bytes) {
            fs::create_dir_all(object.parent().context("the object has a directory")?)?;
            fs::write(&object, &bytes)?;
        }
        Ok(())
    })?;
    Ok(object)
}

/// `cargo SUBCOMMAND` for the BPF target on the stable toolchain.
pub(crate) fn bpf_cargo(linker: &Path, subcommand: &str) -> Result<Command> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(
        std::iter::once(linker.to_owned()).chain(std::env::split_paths(&path)),
    )?;
    let flags = [
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        "--cfg=bpf_target_arch=\"x86_64\"",
    ];
    let mut command = Command::new("cargo");
    command
        .args([
            subcommand,
            "--locked",
            "-Z",
            "build-std=core",
            "--target",
            BPF_TARGET,
            "--release",
        ])
        .args(["--target-dir", BPF_DIRECTORY])
        .args(["-p", "bellows-ebpf"])
        .env("PATH", path)
        // build-std and the BPF target are unstable; the compiler is pinned, so they do not move.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env_remove("RUSTFLAGS");
    Ok(command)
}

/// The kernel refuses tracing programs without BTF and GPL-only helpers without the license.
fn check_object(bytes: &[u8]) -> Result<()> {
    let contains = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    ensure!(bytes.starts_with(b"\x7fELF"), "the object is no ELF file");
    // The magic number of a little-endian BTF section, version 1.
    ensure!(
        contains(&[0x9f, 0xeb, 1, 0]),
        "the object has no BTF: was it linked with --btf?"
    );
    ensure!(
        contains(b"\0.BTF\0") || contains(b".BTF\0"),
        "the object has no .BTF section"
    );
    ensure!(
        contains(b"Dual MIT/GPL\0"),
        "the object has no GPL-compatible license string"
    );
    Ok(())
}

/// Builds `bellows` with its kernel programs, and `bellows-guest`, as static binaries.
pub(crate) fn binaries() -> Result<Binaries> {
    ebpf()?;
    tools::musl_target()?;
    let root = root()?;
    step("build bellows", || {
        let mut command = Command::new("cargo");
        command
            .args(["build", "--locked", "--release", "--target", tools::MUSL])
            .args(["-p", "bellows", "-p", "bellows-tests"])
            .env("CC_x86_64_unknown_linux_musl", "musl-gcc")
            .current_dir(&root);
        quiet(&mut command)
    })?;
    let directory = root.join("target").join(tools::MUSL).join("release");
    Ok(Binaries {
        bellows: directory.join("bellows"),
        guest: directory.join("bellows-guest"),
    })
}
