//! Virtual machines: an initramfs around our binaries, QEMU, and a watch over its console.
//!
//! A guest ends in one of three ways: it writes its verdict and powers off; its kernel panics; or it
//! is silent for too long. The last two end the run with the console shown. KVM is used where the
//! processor offers it and `/dev/kvm` can be opened, emulation elsewhere.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::{
    build::Binaries,
    debian::Kernel,
    root,
    shell::{find, tail},
    tools,
};

const VERDICT: &str = "bellows-guest-verdict:";
const BUSYBOX_APPLETS: [&str; 14] = [
    "sh", "ls", "cat", "sleep", "echo", "dmesg", "insmod", "chroot", "mount", "env", "true",
    "false", "kill", "unshare",
];

/// What to boot.
pub(crate) struct Guest<'a> {
    pub(crate) name: &'a str,
    pub(crate) kernel: &'a Kernel,
    pub(crate) binaries: &'a Binaries,
    pub(crate) memory_mib: u32,
    /// An ext4 image; the guest's writes to it are thrown away.
    pub(crate) disk: Option<PathBuf>,
    /// Whether the disk becomes the root, with a network to this machine: a node.
    pub(crate) node: bool,
    /// Whether the disk becomes the root, with systemd as PID 1.
    pub(crate) systemd: bool,
    /// Whether its clock counts instructions: one CPU, emulated.
    pub(crate) counts_instructions: bool,
    /// Files to add: path in the guest, content on the host.
    pub(crate) files: Vec<(String, PathBuf)>,
    /// Program and arguments, without commas or blanks.
    pub(crate) command: Vec<String>,
    /// Whether the command takes `--skip N`, which leaves the first N of its records out.
    pub(crate) skips: bool,
    pub(crate) limit: Duration,
}

/// What a guest left behind.
pub(crate) struct Ended {
    pub(crate) code: i32,
    /// What it wrote to its records port.
    pub(crate) records: String,
    pub(crate) console: String,
}

/// Boots of one guest before the emulator's defect is given up on.
const ATTEMPTS: u32 = 3;
/// What the kernel says when it meets a breakpoint that it has already removed.
const STALE_BREAKPOINT: &str = "Oops: int3";
/// What it says, told to, of a processor that has not scheduled for two minutes: a machine that is itself a virtual
/// one may stand still for half a minute. (Reports of RCU stalls, once in 63 s, would begin that time anew.)
const LOCKUP: &str = "softlockup: hung tasks";

/// Boots a guest and waits for its verdict. `progress` sees each new line of the console.
///
/// QEMU's multi-threaded emulation can run a stale translation of an instruction that another
/// processor has just patched: the kernel patches with breakpoints (jump labels at boot, ftrace when
/// we attach), meets one that is long gone, and panics with `Oops: int3` (seen with QEMU 7.2, on a
/// bare boot too). If it looks at the place and finds no breakpoint there any more, it tries the instruction
/// again, and meets it again, for ever: both processors hung like that at the first instruction of a function
/// that a program was being attached to (`kprobe_int3_handler`, arch/x86/kernel/kprobes/core.c). It happens with
/// no hardware and says nothing of what is tested, so such a guest, and only such a one, is booted again, and
/// said so. What it had recorded stays where its command can go on from there: a bench that attaches for each of
/// its cases meets one in every 50 to 100.
///
/// `again` makes new, before another boot, what the one before has used up outside of its guest.
pub(crate) fn run(
    guest: &mut Guest<'_>,
    mut again: impl FnMut(&mut Guest<'_>) -> Result<()>,
    mut progress: impl FnMut(&str),
) -> Result<Ended> {
    let mut attempt = 1;
    let mut recorded = String::new();
    loop {
        let skip = recorded.lines().count();
        match boot(guest, skip, &mut progress) {
            Ok(Boot::Ended(ended)) => {
                let records = recorded + &ended.records;
                return Ok(Ended { records, ..ended });
            }
            Ok(Boot::Broke { error, records }) => {
                let is_stale = is_stale_breakpoint(&format!("{error:#}"));
                let records = whole_lines(&records);
                let has_gone_on = guest.skips && !records.is_empty();
                if accelerator() == KVM || !is_stale || (attempt == ATTEMPTS && !has_gone_on) {
                    return Err(error);
                }
                eprintln!(
                    "      the emulator ran a stale breakpoint (see guest::run); booting {} again",
                    guest.name
                );
                if has_gone_on {
                    recorded += records;
                } else {
                    attempt += 1;
                }
                again(guest)?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// All but a last line that is not complete.
fn whole_lines(text: &str) -> &str {
    &text[..text.rfind('\n').map_or(0, |end| end + 1)]
}

/// How one boot went.
enum Boot {
    Ended(Ended),
    Broke {
        error: anyhow::Error,
        /// What it wrote to its records port.
        records: String,
    },
}

/// Whether a guest's last words are those of a breakpoint that is not there any more.
fn is_stale_breakpoint(console: &str) -> bool {
    let is_first_instruction = |line: &str| {
        let place = line.split_once("RIP: 0010:").map(|(_, place)| place);
        place.is_some_and(|place| place.contains("+0x0/") || place.starts_with("asm_exc_int3"))
    };
    console.contains(STALE_BREAKPOINT)
        || (console.contains(LOCKUP) && console.lines().any(is_first_instruction))
}

fn boot(guest: &Guest<'_>, skip: usize, progress: &mut impl FnMut(&str)) -> Result<Boot> {
    let directory = root()?.join("target/guests").join(guest.name);
    fs::create_dir_all(&directory)?;
    let initramfs = initramfs(guest, &directory)?;
    let (console, records) = (directory.join("console"), directory.join("records"));
    for file in [&console, &records] {
        File::create(file)?;
    }
    let mut machine = Machine(qemu(guest, skip, &initramfs, &console, &records)?);
    let start = Instant::now();
    let mut shown = 0;
    let ended = loop {
        let text = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
        // Whole lines only: the rest comes with the next look.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        text.get(shown..whole)
            .unwrap_or_default()
            .lines()
            .for_each(&mut *progress);
        shown = whole;
        if text.contains("end Kernel panic") {
            break Err("its kernel panicked");
        }
        if machine.0.try_wait()?.is_some() {
            break Ok(());
        }
        if start.elapsed() > guest.limit {
            break Err("it did not end in time");
        }
        thread::sleep(Duration::from_millis(100));
    };
    drop(machine);
    let console = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
    let mut text = String::new();
    File::open(&records)?.read_to_string(&mut text)?;
    let broke = |why: &str| {
        let end = tail(&console, 90);
        anyhow!(
            "guest {}: {why}; the end of its console:\n{end}",
            guest.name
        )
    };
    let (records, verdict) = text.rsplit_once(VERDICT).unwrap_or((&text, ""));
    let records = records.to_owned();
    let error = match (ended, verdict.trim().parse()) {
        (Ok(()), Ok(code)) => {
            return Ok(Boot::Ended(Ended {
                code,
                records,
                console,
            }));
        }
        (Ok(()), Err(_)) => broke("it ended without a verdict"),
        (Err(why), _) => broke(why),
    };
    Ok(Boot::Broke { error, records })
}

/// Ends the machine when dropped, however the run ends.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // A machine that has ended already needs neither.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn qemu(
    guest: &Guest<'_>,
    skip: usize,
    initramfs: &Path,
    console: &Path,
    records: &Path,
) -> Result<Child> {
    let file = |path: &Path| format!("file:{}", path.display());
    let mut command = Command::new("qemu-system-x86_64");
    let mut words = guest.command.clone();
    if skip > 0 {
        words.extend(["--skip".to_owned(), skip.to_string()]);
    }
    if guest.counts_instructions {
        // One instruction is one nanosecond; idle time is skipped.
        command.args(["-accel", "tcg,thread=single", "-smp", "1"]);
        command.args(["-icount", "shift=0,sleep=off"]);
    } else {
        command.args(["-accel", accelerator(), "-smp", "2"]);
    }
    command
        .args(["-cpu", processor(), "-m"])
        .arg(guest.memory_mib.to_string())
        .args(["-no-reboot", "-nodefaults", "-display", "none"])
        .args(["-serial", &file(console), "-serial", &file(records)])
        .arg("-kernel")
        .arg(&guest.kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet panic=-1 softlockup_panic=1 watchdog_thresh=60 rcupdate.rcu_cpu_stall_suppress=1 mitigations=off {}{}bellows.run={}",
            if guest.node { "bellows.node=1 " } else { "" },
            if guest.systemd {
                "bellows.systemd=1 "
            } else {
                ""
            },
            words.join(",")
        ));
    if guest.node {
        command.args([
            "-netdev",
            "user,id=net",
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
        ]);
    }
    if let Some(disk) = &guest.disk {
        command.arg("-drive").arg(format!(
            "file={},format=raw,if=virtio,snapshot=on",
            disk.display()
        ));
    }
    let log = File::create(initramfs.with_file_name("qemu.log"))?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    command
        .spawn()
        .context("cannot run qemu-system-x86_64: install qemu-system-x86")
}

/// The guest's processor. An emulated one without what makes the kernel slow there: with `erms` it clears and copies pages by
/// `rep stosb` and `rep movsb`, which QEMU does byte by byte (arch/x86/lib/clear_page_64.S; a bench of bursts takes 1.5 times
/// as long), with `smap` each copy from or to user space ends two blocks of translated code, and with `la57` page tables have
/// one level more.
fn processor() -> &'static str {
    if accelerator() == KVM {
        "max"
    } else {
        "max,erms=off,smap=off,la57=off"
    }
}

const KVM: &str = "kvm";

/// KVM where it works; some hosts have the device but no hardware virtualisation behind it.
fn accelerator() -> &'static str {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let hardware = flags
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    let usable = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if hardware && usable {
        KVM
    } else {
        "tcg,thread=multi"
    }
}

fn initramfs(guest: &Guest<'_>, directory: &Path) -> Result<PathBuf> {
    let tree = directory.join("initramfs");
    drop(fs::remove_dir_all(&tree));
    for part in ["bin", "modules", "proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir_all(tree.join(part))?;
    }
    let busybox = find("busybox").context("busybox is missing: install busybox-static")?;
    fs::copy(busybox, tree.join("bin/busybox"))?;
    for applet in BUSYBOX_APPLETS {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    fs::copy(&guest.binaries.bellows, tree.join("bin/bellows"))?;
    fs::copy(&guest.binaries.guest, tree.join("bin/bellows-guest"))?;
    symlink("/bin/bellows-guest", tree.join("init"))?;
    for module in &guest.kernel.modules {
        let name = module.file_name().context("a module has a name")?;
        fs::copy(module, tree.join("modules").join(name))?;
    }
    for (path, content) in &guest.files {
        let to = tree.join(path.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a file has a directory")?)?;
        fs::copy(content, to)?;
    }
    let archive = directory.join("initramfs.cpio");
    pack(&tree, &archive)?;
    Ok(archive)
}

fn pack(tree: &Path, archive: &Path) -> Result<()> {
    let mut child = Command::new("cpio")
        .args(["--create", "--format=newc", "--quiet", "--null"])
        .current_dir(tree)
        .stdin(Stdio::piped())
        .stdout(File::create(archive)?)
        .spawn()
        .context("cannot run cpio")?;
    let mut names = Vec::new();
    list(tree, Path::new("."), &mut names)?;
    child
        .stdin
        .take()
        .context("cpio has an input")?
        .write_all(&names)?;
    ensure!(child.wait()?.success(), "cpio failed");
    Ok(())
}

fn list(tree: &Path, below: &Path, names: &mut Vec<u8>) -> Result<()> {
    names.extend_from_slice(below.as_os_str().as_encoded_bytes());
    names.push(0);
    let directory = tree.join(below);
    if fs::symlink_metadata(&directory)?.is_dir() {
        for entry in fs::read_dir(directory)? {
            list(tree, &below.join(entry?.file_name()), names)?;
        }
    }
    Ok(())
}

/// An empty ext4 image.
pub(crate) fn empty_disk() -> Result<PathBuf> {
    let disk = tools::cache()?.join("empty.ext4");
    if !tools::is_intact(&disk) {
        drop(fs::remove_file(&disk));
        let mke2fs = find("mke2fs").context("mke2fs is missing: install e2fsprogs")?;
        crate::shell::quiet(
            Command::new(mke2fs)
                .args(["-q", "-t", "ext4"])
                .arg(&disk)
                .arg("3G"),
        )?;
        tools::seal(&disk)?;
    }
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_was_cut_off_is_none() {
        for (text, whole) in [("", ""), ("{}", ""), ("{}\n", "{}\n"), ("{}\n{", "{}\n")] {
            assert_eq!(whole_lines(text), whole);
        }
    }

    #[test]
    fn only_a_stale_breakpoint_is_the_emulators() {
        for (console, is_stale) in [
            ("Oops: int3: 0000 [#1] SMP", true),
            (
                "RIP: 0010:mem_cgroup_handle_over_high+0x0/0x290\nKernel panic - not syncing: softlockup: hung tasks",
                true,
            ),
            (
                "RIP: 0010:smp_call_function_many_cond+0x120/0x500\nKernel panic - not syncing: softlockup: hung tasks",
                false,
            ),
            (
                "RIP: 0010:mem_cgroup_handle_over_high+0x0/0x290\nOops: 0000",
                false,
            ),
            ("Kernel panic - not syncing: Fatal exception", false),
        ] {
            assert_eq!(is_stale_breakpoint(console), is_stale, "{console}");
        }
    }
}
