//! PID 1 of a guest: mounts, modules, the command from the kernel command line, power off.
//!
//! Where the guest is to run systemd, this prepares the disk, becomes systemd, and is called again by
//! a service of it for the rest.
//!
//! The host reads two things: the console, for people and for panics, and the second serial port,
//! for records and the verdict. Whatever goes wrong here ends in a verdict line and a power-off; a
//! guest that hangs is the host's to end.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_move},
    system::{RebootCommand, reboot},
};

use crate::control_plane;

/// The line by which the host knows that the guest has finished, followed by an exit code.
const VERDICT: &str = "bellows-guest-verdict:";
/// The kernel parameter that holds the command, words separated by commas.
const PARAMETER: &str = "bellows.run=";
/// The kernel parameter of a guest whose disk becomes its root, with a network.
const NODE_PARAMETER: &str = "bellows.node=1";
/// The kernel parameter of a guest whose disk becomes its root, with systemd as PID 1.
const SYSTEMD_PARAMETER: &str = "bellows.systemd=1";
const SYSTEMD: &str = "/usr/lib/systemd/systemd";
const RECORDS: &str = "/dev/ttyS1";

/// The body of PID 1.
pub(crate) fn run() -> ! {
    let prepared = prepare();
    if let Ok(Init::Systemd) = prepared {
        let error = become_systemd();
        finish(Err(error));
    }
    finish(prepared.and_then(|_ours| run_command()))
}

/// What systemd's service does: the command, then the end of the guest.
pub(crate) fn run_in_service() -> ! {
    finish(run_command())
}

/// Tells how it went and ends the guest.
fn finish(result: Result<i32>) -> ! {
    let code = match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bellows-guest: {error:#}");
            1
        }
    };
    // Without the records port there is only the console left to tell it.
    let told = File::options()
        .write(true)
        .open(RECORDS)
        .and_then(|mut port| {
            writeln!(port, "{VERDICT} {code}")?;
            port.flush()
        });
    println!("{VERDICT} {code} {told:?}");
    // The console is unbuffered; the serial ports are drained by the power-off.
    let error = reboot(RebootCommand::PowerOff);
    panic!("cannot power off: {error:?}");
}

/// Who is PID 1 from here on.
enum Init {
    Ours,
    Systemd,
}

fn prepare() -> Result<Init> {
    for (source, target, kind) in [
        ("proc", "/proc", "proc"),
        ("sysfs", "/sys", "sysfs"),
        ("devtmpfs", "/dev", "devtmpfs"),
        ("tmpfs", "/run", "tmpfs"),
        ("tmpfs", "/tmp", "tmpfs"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2"),
    ] {
        fs::create_dir_all(target)?;
        mount(
            source,
            target,
            kind,
            MountFlags::empty(),
            None::<&std::ffi::CStr>,
        )
        .with_context(|| format!("mount {target}"))?;
    }
    raw_mode(RECORDS)?;
    // In the order in which they depend on each other, as the host has numbered them.
    let mut modules: Vec<_> = fs::read_dir("/modules")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    modules.sort();
    for module in modules {
        busybox(&["insmod", &module.to_string_lossy()])?;
    }
    if Path::new("/dev/vda").exists() {
        fs::create_dir_all("/disk")?;
        mount(
            "/dev/vda",
            "/disk",
            "ext4",
            MountFlags::empty(),
            None::<&std::ffi::CStr>,
        )
        .context("mount /disk")?;
    }
    // No swap is configured, and a benchmark must not be told so by accident.
    ensure!(
        fs::read_to_string("/proc/swaps")?.lines().count() <= 1,
        "the guest has swap"
    );
    let parameters = fs::read_to_string("/proc/cmdline")?;
    let (node, systemd) = (
        parameters.contains(NODE_PARAMETER),
        parameters.contains(SYSTEMD_PARAMETER),
    );
    if node || systemd {
        change_root().context("make the disk the root")?;
    }
    if node {
        set_up_network().context("set the network up")?;
    }
    if systemd {
        return Ok(Init::Systemd);
    }
    if node {
        hand_out_controllers().context("hand the controllers out")?;
    }
    Ok(Init::Ours)
}

/// Makes the disk the root, with our binaries in it.
fn change_root() -> Result<()> {
    for name in ["bellows", "bellows-guest", "busybox"] {
        fs::copy(
            format!("/bin/{name}"),
            format!("/disk/usr/local/bin/{name}"),
        )?;
    }
    copy_directory("/build-load", "/disk/build-load")?;
    for directory in ["/deploy", control_plane::DIRECTORY] {
        if Path::new(directory).exists() {
            copy_directory(directory, &format!("/disk{directory}"))?;
        }
    }
    for name in ["kubelet", "etcd", "kube-apiserver"] {
        let program = Path::new("/bin").join(name);
        if program.exists() {
            fs::copy(&program, Path::new("/disk/usr/bin").join(name))?;
            // What is in the first root stays in memory.
            fs::remove_file(program)?;
        }
    }
    for directory in ["/proc", "/sys", "/dev", "/run", "/tmp"] {
        mount_move(directory, format!("/disk{directory}")).with_context(|| directory.to_owned())?;
    }
    std::env::set_current_dir("/disk")?;
    mount_move(".", "/").context("the disk to /")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")?;
    // Volumes of pods are mounted by one process and seen by another.
    mount_change(
        "/",
        MountPropagationFlags::SHARED | MountPropagationFlags::REC,
    )?;
    Ok(())
}

fn set_up_network() -> Result<()> {
    rustix::system::sethostname(b"node")?;
    for line in [
        "ip link set lo up",
        "ip link set eth0 up",
        "ip address add 10.0.2.15/24 dev eth0",
        "ip route add default via 10.0.2.2",
    ] {
        crate::node::shell(line)?;
    }
    Ok(())
}

/// As a node without systemd has its cgroups.
fn hand_out_controllers() -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    fs::create_dir_all(root.join("init"))?;
    fs::write(root.join("init/cgroup.procs"), "0")?;
    fs::write(
        root.join("cgroup.subtree_control"),
        "+cpuset +cpu +io +memory +pids +hugetlb",
    )?;
    Ok(())
}

/// Becomes systemd; returns only if that fails.
fn become_systemd() -> anyhow::Error {
    let unit = "[Unit]\n\
        Description=What this guest was booted for\n\
        Requires=basic.target\n\
        After=basic.target\n\
        [Service]\n\
        Type=oneshot\n\
        ExecStart=/usr/local/bin/bellows-guest in-service\n\
        StandardOutput=file:/dev/console\n\
        StandardError=file:/dev/console\n\
        LimitNOFILE=1048576\n\
        TasksMax=infinity\n";
    let written = fs::write("/etc/systemd/system/bellows-guest.service", unit)
        // A machine without an identity is booted for the first time, which asks questions.
        .and_then(|()| fs::write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n"));
    if let Err(error) = written {
        return error.into();
    }
    let error = Command::new(SYSTEMD)
        .arg("--unit=bellows-guest.service")
        .arg("--log-target=kmsg")
        .exec();
    anyhow::Error::new(error).context(SYSTEMD)
}

fn copy_directory(from: &str, to: &str) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), Path::new(to).join(entry.file_name()))?;
    }
    Ok(())
}

fn busybox(arguments: &[&str]) -> Result<()> {
    let status = Command::new("/bin/busybox")
        .args(arguments)
        .status()
        .context("busybox")?;
    ensure!(
        status.success(),
        "busybox {} failed: {status}",
        arguments.join(" ")
    );
    Ok(())
}

/// Switches off echo and translation on the records port.
fn raw_mode(port: &str) -> Result<()> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(port)
        .with_context(|| format!("open {port}"))?;
    let mut attributes = rustix::termios::tcgetattr(&file)?;
    attributes.make_raw();
    rustix::termios::tcsetattr(&file, rustix::termios::OptionalActions::Now, &attributes)?;
    Ok(())
}

fn run_command() -> Result<i32> {
    let parameters = fs::read_to_string("/proc/cmdline")?;
    let command = parameters
        .split_whitespace()
        .find_map(|parameter| parameter.strip_prefix(PARAMETER))
        .context("the kernel command line has no bellows.run=")?;
    let words: Vec<&str> = command.split(',').collect();
    let (program, arguments) = words.split_first().context("bellows.run= is empty")?;
    // A node finds its own at another place.
    let program = if Path::new(program).exists() {
        program
    } else {
        program.rsplit('/').next().unwrap_or(program)
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/local/bin:/bin:/sbin:/usr/bin:/usr/sbin")
        .env("HOME", "/")
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("run {program}"))?;
    Ok(child.wait()?.code().unwrap_or(128))
}
