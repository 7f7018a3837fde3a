//! `cargo xtask codegen`: generates `agent/src/cri/v1.rs` from `agent/proto/cri.proto`, and the same of NRI.
//!
//! What is generated is checked in, so that neither a build nor a test needs the generator, which compiles for a
//! minute. Its first lines tell the checksums of the protocol and of the rest of the file, by which a unit test
//! (`cri::tests`, `nri::tests`) sees that one was changed without the other; `--check` generates it anew and compares. No `protoc`
//! is needed: the compiler of protocols is a crate.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};

/// A protocol, what is generated from it, and what the generator calls that.
struct Part {
    protocol: &'static str,
    generated: &'static str,
    name: &'static str,
}

const PARTS: [Part; 2] = [
    Part {
        protocol: "agent/proto/cri.proto",
        generated: "agent/src/cri/v1.rs",
        name: "runtime.v1.rs",
    },
    Part {
        protocol: "agent/proto/nri.proto",
        generated: "agent/src/nri/v1alpha1.rs",
        name: "nri.v1alpha1.rs",
    },
];

fn main() -> ExitCode {
    let is_check = env::args().any(|argument| argument == "--check");
    let mut code = ExitCode::SUCCESS;
    for part in PARTS {
        let done = if is_check { part.check() } else { part.write() };
        let Part {
            protocol,
            generated,
            ..
        } = part;
        match done {
            Ok(true) => continue,
            Ok(false) => {
                eprintln!("{generated} is not what {protocol} gives: run `cargo xtask codegen`");
            }
            Err(error) => eprintln!("codegen: {protocol}: {error:#}"),
        }
        code = ExitCode::FAILURE;
    }
    code
}

fn root() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = manifest.ancestors().nth(2);
    Ok(root.context("this crate is not where it was")?.to_owned())
}

impl Part {
    fn write(&self) -> Result<bool> {
        fs::write(root()?.join(self.generated), self.text()?)?;
        Ok(true)
    }

    /// Whether what is checked in is what would be generated.
    fn check(&self) -> Result<bool> {
        Ok(fs::read_to_string(root()?.join(self.generated))? == self.text()?)
    }

    fn text(&self) -> Result<String> {
        let protocol = root()?.join(self.protocol);
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
        let file = output.path().join(self.name);
        // As the rest of the repository is.
        let formatted = Command::new("rustfmt")
            .args(["--edition", "2024"])
            .arg(&file)
            .status()?;
        ensure!(formatted.success(), "rustfmt failed");
        let text = fs::read_to_string(file)?;
        let sum = |bytes: &[u8]| crc32fast::hash(bytes);
        Ok(format!(
            "// Generated from {} by `cargo xtask codegen`.\n// {:08x} {:08x}\n{text}",
            self.protocol,
            sum(&fs::read(protocol)?),
            sum(text.as_bytes()),
        ))
    }
}
