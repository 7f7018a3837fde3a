//! What a build or a guest needs from the machine: installed where we may, named where not.

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::shell::{find, has, output, quiet, step};

/// Goes with the LLVM of the compiler in rust-toolchain.toml.
const BPF_LINKER: &str = "0.10.3";
const CARGO_MUTANTS: &str = "27.1.0";
pub(crate) const MUSL: &str = "x86_64-unknown-linux-musl";

/// A file by which a Debian package is recognised, and the package.
const PACKAGES: [(&str, &str); 11] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("mke2fs", "e2fsprogs"),
    ("xz", "xz-utils"),
    ("musl-gcc", "musl-tools"),
    ("mmdebstrap", "mmdebstrap"),
    ("depmod", "kmod"),
    ("openssl", "openssl"),
    ("curl", "curl"),
    ("make", "make"),
];

/// The cache directory: never needed, only faster.
pub(crate) fn cache() -> Result<PathBuf> {
    let directory = env::var_os("BELLOWS_CACHE").map(PathBuf::from).or_else(|| {
        let user = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        user.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))
            .map(|cache| cache.join("bellows"))
    });
    let directory = directory
        .context("neither BELLOWS_CACHE nor HOME is set: set BELLOWS_CACHE to a directory")?;
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    Ok(directory)
}

/// Installs the Debian packages that guests need.
pub(crate) fn packages() -> Result<()> {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(program, _)| !has(program))
        .map(|&(_, package)| package)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        install(&missing)
    }
}

/// Installs Debian packages, or says how.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let names = packages.join(", ");
    let install = format!(
        "apt-get install -y --no-install-recommends {}",
        packages.join(" ")
    );
    ensure!(
        has("apt-get"),
        "missing: {names}. This machine has no apt-get; install them by its own means"
    );
    if output(Command::new("id").arg("-u"))?.trim() != "0" {
        bail!("missing: {names}. Run: sudo {install}");
    }
    step(&format!("install {names}"), || {
        quiet(Command::new("apt-get").args(["update", "-qq"]))?;
        let mut command = Command::new("apt-get");
        command.args(install.split_whitespace().skip(1));
        quiet(command.env("DEBIAN_FRONTEND", "noninteractive"))
    })
}

/// The standard library for a static binary.
pub(crate) fn musl_target() -> Result<()> {
    if output(Command::new("rustup").args(["target", "list", "--installed"]))?.contains(MUSL) {
        return Ok(());
    }
    step("install the musl target", || {
        quiet(Command::new("rustup").args(["target", "add", MUSL]))
    })
}

/// The sources of `core`, for the BPF target.
pub(crate) fn rust_src() -> Result<()> {
    if output(Command::new("rustup").args(["component", "list", "--installed"]))?
        .contains("rust-src")
    {
        return Ok(());
    }
    step("install rust-src", || {
        quiet(Command::new("rustup").args(["component", "add", "rust-src"]))
    })
}

/// The directory of the pinned bpf-linker.
pub(crate) fn bpf_linker() -> Result<PathBuf> {
    let program = pinned("bpf-linker", &["--version"], BPF_LINKER)?;
    let directory = program.parent().context("bpf-linker is in no directory")?;
    Ok(directory.to_owned())
}

/// The pinned cargo-mutants.
pub(crate) fn cargo_mutants() -> Result<PathBuf> {
    pinned("cargo-mutants", &["mutants", "--version"], CARGO_MUTANTS)
}

/// A program in its pinned version, from crates.io unless it is there; `asking` makes it tell its version.
fn pinned(name: &str, asking: &[&str], pin: &str) -> Result<PathBuf> {
    let is_pinned = |program: &Path| {
        let version = output(Command::new(program).args(asking));
        version.is_ok_and(|version| version.split_whitespace().any(|word| word == pin))
    };
    if let Some(program) = find(name).filter(|found| is_pinned(found)) {
        return Ok(program);
    }
    let root = cache()?.join("tools");
    let program = root.join("bin").join(name);
    if !is_pinned(&program) {
        step(&format!("install {name} {pin}"), || {
            let mut command = Command::new("cargo");
            command.args(["install", name, "--version", pin]);
            command.args(["--locked", "--force", "--root"]);
            // Not into our own target directory, and not with our own flags.
            quiet(
                command
                    .arg(&root)
                    .env_remove("CARGO_TARGET_DIR")
                    .env_remove("RUSTFLAGS")
                    .current_dir(&root_of(&root)?),
            )
        })?;
    }
    Ok(program)
}

/// A program that is built from its Go module, with the dependencies that the module pins.
pub(crate) fn go_program(name: &str, version: &str, package: &str) -> Result<PathBuf> {
    let directory = cache()?.join("go").join(format!("{name}-{version}"));
    let program = directory.join(name);
    if is_intact(&program) {
        return Ok(program);
    }
    go()?;
    step(&format!("build {name} {version} (minutes, once)"), || {
        let mut command = Command::new("go");
        command
            .args(["install", "-trimpath", "-ldflags", "-s -w"])
            .arg(format!("{package}@v{version}"))
            .env("GOBIN", &directory)
            .env("CGO_ENABLED", "0")
            .env("GOTOOLCHAIN", "auto")
            .env("GOFLAGS", "")
            .current_dir(root_of(&directory)?);
        quiet(&mut command)?;
        seal(&program)
    })?;
    Ok(program)
}

/// The Go compiler; it fetches the release that a module wants.
pub(crate) fn go() -> Result<()> {
    if has("go") {
        Ok(())
    } else {
        install(&["golang-go"])
    }
}

fn root_of(directory: &Path) -> Result<PathBuf> {
    fs::create_dir_all(directory)?;
    Ok(directory.to_owned())
}

/// Checks a cached artifact against the checksum that was written when it was made; once, as long as it does not change:
/// a root file system takes ten seconds, and there are forty guests in a test.
pub(crate) fn is_intact(file: &Path) -> bool {
    static INTACT: Mutex<BTreeSet<(PathBuf, SystemTime)>> = Mutex::new(BTreeSet::new());
    let Ok(changed) = fs::metadata(file).and_then(|metadata| metadata.modified()) else {
        return false;
    };
    let key = (file.to_owned(), changed);
    let mut intact = INTACT.lock().unwrap_or_else(PoisonError::into_inner);
    if intact.contains(&key) {
        return true;
    }
    let is_intact = is_as_sealed(file);
    if is_intact {
        intact.insert(key);
    }
    is_intact
}

fn is_as_sealed(file: &Path) -> bool {
    let Ok(expected) = fs::read_to_string(checksum_file(file)) else {
        return false;
    };
    checksum(file).is_ok_and(|sum| sum == expected.trim())
}

/// Keeps other processes from what is there or to be made there, as long as it is held: one may make it ahead.
pub(crate) fn only_user(file: &Path) -> Result<fs::File> {
    let mut name = file.as_os_str().to_owned();
    name.push(".lock");
    let lock = fs::File::create(&name)?;
    if lock.try_lock().is_err() {
        let what = file.file_name().unwrap_or_default().to_string_lossy();
        step(
            &format!("wait for another process that uses {what}"),
            || Ok(lock.lock()?),
        )?;
    }
    Ok(lock)
}

/// Writes the checksum of an artifact that has been made completely.
pub(crate) fn seal(file: &Path) -> Result<()> {
    fs::write(checksum_file(file), checksum(file)?)?;
    Ok(())
}

fn checksum_file(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".sha256");
    PathBuf::from(name)
}

/// The SHA-256 of a file.
fn checksum(file: &Path) -> Result<String> {
    let text = output(Command::new("sha256sum").arg(file))?;
    text.split_whitespace()
        .next()
        .map(str::to_owned)
        .context("sha256sum said nothing")
}

/// The SHA-256 of bytes.
pub(crate) fn sha256(bytes: &[u8]) -> Result<String> {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run sha256sum")?;
    let mut input = child.stdin.take().context("sha256sum has no input")?;
    input.write_all(bytes)?;
    drop(input);
    let said = child.wait_with_output()?;
    ensure!(said.status.success(), "sha256sum failed");
    let text = String::from_utf8(said.stdout)?;
    let sum = text.split_whitespace().next();
    Ok(sum.context("sha256sum said nothing")?.to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_checked_and_changed_is_checked_again() {
        let directory = env::temp_dir().join(format!("bellows-intact-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("artifact");
        fs::write(&file, "made").unwrap();
        assert!(!is_intact(&file), "nobody has sealed it");
        seal(&file).unwrap();
        assert!(is_intact(&file) && is_intact(&file));
        let later = fs::metadata(&file).unwrap().modified().unwrap() + Duration::from_secs(1);
        fs::write(&file, "torn").unwrap();
        fs::File::open(&file).unwrap().set_modified(later).unwrap();
        assert!(!is_intact(&file));
        fs::remove_dir_all(&directory).unwrap();
    }
}
