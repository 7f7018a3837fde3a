//! PID 1 of a kernel guest: mounts, modules, the command from the kernel command line, power off.
//!
//! The host reads two things: the console, for people and for panics, and the second serial port,
//! for records and the verdict. Whatever goes wrong here ends in a verdict line and a power-off; a
//! guest that hangs is the host's to end.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    mount::{MountFlags, mount},
    system::{RebootCommand, reboot},
};

/// The line by which the host knows that the guest has finished, followed by an exit code.
const VERDICT: &str = "bellows-guest-verdict:";
/// The kernel parameter that holds the command, words separated by commas.
const PARAMETER: &str = "bellows.run=";
const RECORDS: &str = "/dev/ttyS1";

/// Never returns.
pub(crate) fn run() -> ! {
    let code = match prepare().and_then(|()| run_command()) {
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

fn prepare() -> Result<()> {
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
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
        .env("HOME", "/")
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("run {program}"))?;
    Ok(child.wait()?.code().unwrap_or(128))
}
