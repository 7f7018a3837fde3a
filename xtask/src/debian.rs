//! Debian packages for guests: kernels and root file systems, by suite name.
//!
//! The mirror is the one that this machine's apt is configured with (or `$BELLOWS_DEBIAN_MIRROR`, or, on a
//! system that is not Debian, the one that mmdebstrap would use); the suites beyond its own are
//! added in a configuration of our own, so that the machine's is not touched. apt checks
//! signatures; forky's Release file may be expired, which is no reason not to build a test guest.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    shell::{find, output, quiet, step},
    tools,
};

const SUITES: [&str; 4] = ["bookworm", "trixie", "trixie-backports", "forky"];
/// Asked only for a kernel that none of the others has: mirrors drop old suites one day.
const OLD_SUITES: [&str; 1] = ["bullseye"];
const ARCHIVE_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Kernel modules that a guest loads, in order: its disk, its network, containerd's snapshots, swap in
/// memory.
const MODULES: [&str; 6] = [
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "overlay",
    "zram",
];

/// A kernel and the modules that a guest loads.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    /// Uncompressed, in the order in which they are loaded.
    pub(crate) modules: Vec<PathBuf>,
}

/// apt with our own suites and directories.
struct Apt {
    directory: PathBuf,
    /// Held as long as it is used: apt waits for nobody else who uses the same lists.
    _lock: fs::File,
}

impl Apt {
    fn new() -> Result<Self> {
        Self::with("apt", &SUITES)
    }

    fn with(name: &str, suites: &[&str]) -> Result<Self> {
        let directory = tools::cache()?.join(name);
        for part in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let lock = tools::only_user(&directory)?;
        let apt = Self {
            directory,
            _lock: lock,
        };
        let mirror = mirror()?;
        let sources: Vec<String> = suites
            .iter()
            .map(|suite| format!("deb [signed-by={ARCHIVE_KEYRING}] {mirror} {suite} main\n"))
            .collect();
        let path = |part: &str| apt.directory.join(part).display().to_string();
        let configuration = format!(
            "Dir::Etc::SourceList \"{}\";\nDir::Etc::SourceParts \"-\";\nDir::State::Lists \"{}\";\n\
             Dir::State::Status \"{}\";\nDir::Cache \"{}\";\nAcquire::Check-Valid-Until \"false\";\n\
             APT::Architecture \"amd64\";\nAPT::Sandbox::User \"root\";\n",
            path("sources.list"),
            path("lists"),
            path("status"),
            path(""),
        );
        let fresh = fs::read_to_string(apt.directory.join("sources.list")).ok()
            == Some(sources.concat())
            && apt.directory.join("updated").exists();
        fs::write(apt.directory.join("sources.list"), sources.concat())?;
        fs::write(apt.directory.join("apt.conf"), configuration)?;
        fs::write(apt.directory.join("status"), "")?;
        if !fresh {
            apt.update()?;
        }
        Ok(apt)
    }

    fn update(&self) -> Result<()> {
        step("fetch Debian package lists", || {
            quiet(self.command("apt-get").args(["update", "-qq"]))
        })?;
        fs::write(self.directory.join("updated"), "")?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.directory.join("apt.conf"));
        command
    }

    /// The newest package `PREFIX-RELEASE.N…-cloud-amd64`, if there is one.
    fn newest(&self, prefix: &str, release: &str) -> Result<Option<String>> {
        let names = output(
            self.command("apt-cache")
                .args(["pkgnames", &format!("{prefix}-{release}.")]),
        )?;
        let mut found: Vec<(Vec<u64>, String)> = names
            .lines()
            .filter(|name| {
                let flavour = name.strip_suffix("-unsigned").unwrap_or(name);
                flavour.ends_with("-cloud-amd64")
            })
            .map(|name| (numbers(name), name.to_owned()))
            .collect();
        found.sort();
        Ok(found.pop().map(|(_, name)| name))
    }

    /// Downloads packages and unpacks them into a directory; a stale list is renewed once.
    fn unpack(&self, packages: &[String], directory: &Path) -> Result<()> {
        let downloads = directory.with_extension("debs");
        fs::create_dir_all(&downloads)?;
        let download = || {
            quiet(
                self.command("apt-get")
                    .arg("download")
                    .args(packages)
                    .current_dir(&downloads),
            )
        };
        if download().is_err() {
            self.update()?;
            download()?;
        }
        for entry in fs::read_dir(&downloads)? {
            quiet(
                Command::new("dpkg-deb")
                    .arg("-x")
                    .arg(entry?.path())
                    .arg(directory),
            )?;
        }
        fs::remove_dir_all(&downloads)?;
        Ok(())
    }
}

/// The numbers in a name, for sorting versions.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// The mirror of Debian's main archive.
pub(crate) fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("BELLOWS_DEBIAN_MIRROR") {
        return Ok(mirror);
    }
    let targets = || {
        let format = "$(ORIGIN)|$(LABEL)|$(REPO_URI)";
        output(Command::new("apt-get").args(["indextargets", "--format", format])).map(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("Debian|Debian|"))
                .map(|uri| uri.trim_end_matches('/').to_owned())
        })
    };
    if let Some(mirror) = targets()? {
        return Ok(mirror);
    }
    // A machine whose lists were never fetched.
    quiet(Command::new("apt-get").args(["update", "-qq"]))?;
    if let Some(mirror) = targets()? {
        return Ok(mirror);
    }
    let script = fs::read_to_string("/usr/bin/mmdebstrap").unwrap_or_default();
    let default = script
        .split(['"', '\''])
        .find(|word| word.starts_with("http") && word.ends_with("/debian"));
    match default {
        Some(mirror) => Ok(mirror.to_owned()),
        None => bail!("apt knows no Debian mirror: set BELLOWS_DEBIAN_MIRROR to one"),
    }
}

/// The newest Debian cloud kernel of a release such as `6.12`.
pub(crate) fn kernel(release: &str) -> Result<Kernel> {
    let directory = tools::cache()?.join("kernels").join(release);
    let list = directory.join("modules.list");
    let wanted = MODULES.join(" ");
    let is_wanted = fs::read_to_string(directory.join("wanted")).ok().as_deref() == Some(&wanted);
    if let Some(kernel) = cached_kernel(&directory, &list).filter(|_| is_wanted) {
        return Ok(kernel);
    }
    let (apt, packages) = kernel_packages(release)?;
    step(
        &format!("fetch kernel {release} ({})", packages.join(", ")),
        || {
            let unpacked = directory.join("unpacked");
            drop(fs::remove_dir_all(&directory));
            fs::create_dir_all(&unpacked)?;
            apt.unpack(&packages, &unpacked)?;
            let files = files_below(&unpacked)?;
            let image = files
                .iter()
                .find(|file| file_name(file).starts_with("vmlinuz"));
            let to = directory.join("vmlinuz");
            fs::copy(image.context("the package has no kernel image")?, &to)?;
            tools::seal(&to)?;
            let mut names = String::new();
            for (index, module) in load_order(&unpacked)?.iter().enumerate() {
                let name = format!("{index:02}-{}.ko", module_name(module));
                uncompress(module, &directory.join(&name))?;
                tools::seal(&directory.join(&name))?;
                names += &format!("{name}\n");
            }
            fs::write(&list, names)?;
            tools::seal(&list)?;
            fs::write(directory.join("wanted"), &wanted)?;
            fs::remove_dir_all(&unpacked)?;
            Ok(())
        },
    )?;
    cached_kernel(&directory, &list).context("the kernel that was just fetched is not intact")
}

/// The packages of a kernel, and the apt that has them.
fn kernel_packages(release: &str) -> Result<(Apt, Vec<String>)> {
    for (name, suites) in [("apt", &SUITES[..]), ("apt-old", &OLD_SUITES)] {
        let apt = Apt::with(name, suites)?;
        // From 7.x on the image package is empty and depends on these two.
        let split = ["linux-binary", "linux-modules"]
            .iter()
            .filter_map(|prefix| apt.newest(prefix, release).transpose())
            .collect::<Result<Vec<_>>>()?;
        if split.len() == 2 {
            return Ok((apt, split));
        }
        if let Some(image) = apt.newest("linux-image", release)? {
            return Ok((apt, vec![image]));
        }
    }
    bail!(
        "no Debian suite of {}, {} has a cloud kernel {release}",
        SUITES.join(", "),
        OLD_SUITES.join(", ")
    )
}

fn cached_kernel(directory: &Path, list: &Path) -> Option<Kernel> {
    let names = fs::read_to_string(list)
        .ok()
        .filter(|_| tools::is_intact(list))?;
    let modules: Vec<PathBuf> = names.lines().map(|name| directory.join(name)).collect();
    let image = directory.join("vmlinuz");
    let intact = std::iter::once(&image)
        .chain(&modules)
        .all(|file| tools::is_intact(file));
    intact.then_some(Kernel { image, modules })
}

/// The modules that a guest needs with all that they depend on, in the order of loading. What is built
/// into the kernel is no file and needs none.
fn load_order(unpacked: &Path) -> Result<Vec<PathBuf>> {
    // Newer packages have /usr/lib only; depmod looks in /lib.
    if !unpacked.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", unpacked.join("lib"))?;
    }
    let modules = unpacked.join("lib/modules");
    let version = fs::read_dir(&modules)?
        .next()
        .context("the package has no modules")??
        .file_name();
    let depmod = find("depmod").context("depmod is missing: install kmod")?;
    quiet(Command::new(depmod).arg("-b").arg(unpacked).arg(&version))?;
    let directory = modules.join(version);
    let dependencies = fs::read_to_string(directory.join("modules.dep"))?;
    let mut order: Vec<PathBuf> = Vec::new();
    for wanted in MODULES {
        let line = dependencies.lines().find(|line| {
            line.split(':')
                .next()
                .is_some_and(|path| module_name(Path::new(path)) == wanted)
        });
        // modules.dep names a module and what it needs, the last of which comes first.
        let (module, needs) = line
            .and_then(|line| line.split_once(':'))
            .unwrap_or_default();
        let paths = needs
            .split_whitespace()
            .rev()
            .chain(std::iter::once(module));
        for path in paths
            .filter(|path| !path.is_empty())
            .map(|path| directory.join(path))
        {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// `virtio_blk` of `…/virtio_blk.ko.xz`.
fn module_name(path: &Path) -> String {
    file_name(path)
        .split('.')
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// One file of a Debian package, unpacked into the cache.
pub(crate) fn file(package: &str, suite: &str, path: &str) -> Result<PathBuf> {
    let directory = tools::cache()?.join("packages").join(package);
    drop(fs::remove_dir_all(&directory));
    fs::create_dir_all(&directory)?;
    Apt::new()?.unpack(&[format!("{package}/{suite}")], &directory)?;
    Ok(directory.join(path))
}

/// A Debian root file system as an ext4 image with the given packages.
pub(crate) fn root_image(name: &str, suite: &str, packages: &[&str]) -> Result<PathBuf> {
    let image = tools::cache()?.join(format!("{name}-{suite}.ext4"));
    let recipe = image.with_extension("recipe");
    let wanted = format!("{suite} {}\n", packages.join(" "));
    let _maker = tools::only_user(&image)?;
    if fs::read_to_string(&recipe).ok().as_deref() == Some(&wanted) && tools::is_intact(&image) {
        return Ok(image);
    }
    let mirror = mirror()?;
    step(
        &format!("make a {suite} root with {}", packages.join(", ")),
        || {
            let tree = image.with_extension("tree");
            drop(fs::remove_dir_all(&tree));
            drop(fs::remove_file(&image));
            quiet(
                Command::new("mmdebstrap")
                    .args([
                        "--quiet",
                        "--variant=minbase",
                        "--format=directory",
                        "--architectures=amd64",
                    ])
                    .args([
                        "--aptopt=Acquire::Check-Valid-Until \"false\"",
                        "--dpkgopt=path-exclude=/usr/share/doc/*",
                    ])
                    .args([
                        "--dpkgopt=path-exclude=/usr/share/man/*",
                        "--dpkgopt=path-exclude=/usr/share/locale/*",
                        // A JRE is not installed without it (update-alternatives makes links to its manual there).
                        "--essential-hook=mkdir -p \"$1\"/usr/share/man/man1",
                    ])
                    .arg(format!("--keyring={ARCHIVE_KEYRING}"))
                    .arg(format!("--include={}", packages.join(",")))
                    .arg(suite)
                    .arg(&tree)
                    .arg(format!("deb {mirror} {suite} main")),
            )?;
            let mke2fs = find("mke2fs").context("mke2fs is missing: install e2fsprogs")?;
            let options = [
                "-q",
                "-t",
                "ext4",
                "-O",
                "^has_journal",
                "-E",
                "root_owner=0:0",
                "-d",
            ];
            quiet(
                Command::new(mke2fs)
                    .args(options)
                    .arg(&tree)
                    .arg(&image)
                    .arg("4G"),
            )?;
            fs::remove_dir_all(&tree)?;
            tools::seal(&image)?;
            fs::write(&recipe, &wanted)?;
            Ok(())
        },
    )?;
    Ok(image)
}

fn uncompress(from: &Path, to: &Path) -> Result<()> {
    if from.extension().is_some_and(|extension| extension == "xz") {
        let file = fs::File::create(to)?;
        let status = Command::new("xz")
            .arg("-dc")
            .arg(from)
            .stdout(file)
            .status()?;
        anyhow::ensure!(status.success(), "xz cannot uncompress {}", from.display());
    } else {
        fs::copy(from, to)?;
    }
    Ok(())
}

fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else {
            files.push(entry.path());
        }
    }
    Ok(files)
}
