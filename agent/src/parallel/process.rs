//! The processes of a cgroup, as `/proc` shows them, and signals to exactly one of them.
//!
//! A number is used again as soon as its process has ended, so nobody is signalled by number: the process is opened
//! first (`pidfd_open`), and only then compared with the one that was meant.
//!
//! Reading must not wait for a memory lock: `stat` and `statm` do not take it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
};

use bellows_core::{
    Bytes, Nanos,
    parallel::{ProcessId, Seen},
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{
    cgroup::{Cgroup, CgroupError},
    machine,
};

/// Those that others need to go on, or that a person talks to. A name is cut off after 15 bytes.
const NEEDED: [&str; 17] = [
    "ash",
    "bash",
    "busybox",
    "cargo",
    "csh",
    "dash",
    "fish",
    "gmake",
    "ksh",
    "make",
    "ninja",
    "screen",
    "sh",
    "sshd",
    "tcsh",
    "tmux: server",
    "zsh",
];
/// Those that stop when their command does (util-linux's `continue_as_child` in sys-utils/nsenter.c and
/// `create_watching_parent` in login-utils/su-common.c, sudo's `handle_sigchld_nopty`): whoever resumes that does not
/// resume them.
const STOP_WITH_CHILD: [&str; 4] = ["nsenter", "runuser", "su", "sudo"];
/// What the runtime has begun beside the first process and has one leaf alone is taken for a probe for so long, in seconds:
/// while that waits the kubelet takes the container for dead. Whoever builds by such a command has more leaves than one.
const PROBE_S: u64 = 30;
/// A clock tick of `/proc` (`USER_HZ` is 100 wherever the kernel programs run).
pub(crate) const TICK: Nanos = Nanos::millis(10);
/// So many are a second.
const TICKS: u64 = 100;

/// The time since boot, by which `/proc` tells when a process began, in clock ticks.
pub(super) fn since_boot() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let ticks = u64::try_from(time.tv_nsec).unwrap_or(0) / TICK.0;
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(TICKS).saturating_add(ticks)
}

/// One line of `/proc/PID/stat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) id: ProcessId,
    pub(crate) program: String,
    pub(crate) parent: i32,
    /// Its process group: a job, in a shell's sense.
    pub(crate) group: i32,
    state: char,
    leads_on_terminal: bool,
    cpu: Nanos,
}

impl Process {
    /// Whether it was stopped, and not continued since.
    pub(crate) const fn is_stopped(&self) -> bool {
        self.state == 'T'
    }
}

/// What a process's `stat` says.
#[must_use]
pub(super) fn parse_stat(text: &str) -> Option<Process> {
    // The name may have spaces and parentheses in it.
    let (pid, rest) = text.split_once(" (")?;
    let (program, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<i64>().ok();
    let ticks = number(11)?.checked_add(number(12)?)?;
    let pid: i32 = pid.trim().parse().ok()?;
    let (group, terminal) = (number(2)?, number(4)?);
    Some(Process {
        id: ProcessId {
            began: fields.get(19)?.parse().ok()?,
            pid,
        },
        program: program.to_owned(),
        parent: i32::try_from(number(1)?).ok()?,
        group: i32::try_from(group).ok()?,
        state: fields.first()?.chars().next()?,
        leads_on_terminal: group == i64::from(pid) && terminal != 0,
        cpu: Nanos(u64::try_from(ticks).ok()?.saturating_mul(TICK.0)),
    })
}

/// Anonymous memory by a process's `statm`, which counts in pages.
#[must_use]
pub(crate) fn parse_statm(text: &str) -> Option<Bytes> {
    let mut fields = text.split_ascii_whitespace().skip(1);
    let mut number = || fields.next()?.parse::<u64>().ok();
    let (resident, shared) = (number()?, number()?);
    Some(machine::pages(resident.saturating_sub(shared)))
}

/// The process with this number now; none if that is certain.
///
/// # Errors
///
/// When it cannot be told.
pub(crate) fn read(pid: i32) -> io::Result<Option<Process>> {
    parse_read(fs::read_to_string(format!("/proc/{pid}/stat")))
}

fn parse_read(text: io::Result<String>) -> io::Result<Option<Process>> {
    let is_gone = |error: &io::Error| {
        // It may end between open and read.
        error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
    };
    match text {
        Ok(text) => {
            let unreadable = || io::Error::new(io::ErrorKind::InvalidData, text.clone());
            parse_stat(&text).map(Some).ok_or_else(unreadable)
        }
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the process that is meant is there yet.
///
/// # Errors
///
/// When it cannot be told.
pub(super) fn is_there(id: ProcessId) -> io::Result<bool> {
    Ok(read(id.pid)?.is_some_and(|process| process.id == id))
}

/// A cgroup's processes, with those of the cgroups below.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    processes: BTreeMap<i32, Process>,
    /// Whether there are some, and this process may not see any.
    pub(crate) is_unseen: bool,
}

impl Tree {
    /// Those that are there now. A process outside of this process's own view has number 0 there, and is none.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when the cgroup's own processes cannot be read.
    pub(crate) fn of(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        Ok(Self::among(cgroup.processes()?))
    }

    /// Those of these numbers that are there now.
    pub(crate) fn among(pids: Vec<u32>) -> Self {
        let is_unseen = !pids.is_empty() && pids.iter().all(|&pid| pid == 0);
        let pids = pids.into_iter().filter_map(|pid| i32::try_from(pid).ok());
        let processes = pids.filter_map(|pid| Some((pid, read(pid).ok()??)));
        Self {
            processes: processes.collect(),
            is_unseen,
        }
    }

    pub(super) fn get(&self, id: ProcessId) -> Option<&Process> {
        self.processes
            .get(&id.pid)
            .filter(|process| process.id == id)
    }

    /// All of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Process> {
        self.processes.values()
    }

    /// A process's ancestors in the tree, the parent first.
    pub(crate) fn ancestors(&self, id: ProcessId) -> Vec<&Process> {
        let mut ancestors: Vec<&Process> = Vec::new();
        let mut next = self.get(id).map(|process| process.parent);
        while let Some(parent) = next.and_then(|parent| self.processes.get(&parent)) {
            if ancestors.iter().any(|known| known.id == parent.id) {
                break;
            }
            ancestors.push(parent);
            next = Some(parent.parent);
        }
        ancestors
    }

    /// Leaves that are alone below what the runtime has begun beside the first process, a moment ago.
    fn of_probes(&self, now: u64) -> BTreeSet<ProcessId> {
        let parents = self.parents();
        let first = self.processes.values().map(|process| process.id).min();
        let mut leaves: BTreeMap<ProcessId, Vec<ProcessId>> = BTreeMap::new();
        let all = self.processes.values().map(|process| process.id);
        for leaf in all.filter(|id| !parents.contains(&id.pid)) {
            let root = self.ancestors(leaf).last().map_or(leaf, |root| root.id);
            leaves.entry(root).or_default().push(leaf);
        }
        let is_young = |root: ProcessId| now.saturating_sub(root.began) < PROBE_S * TICKS;
        let probes = leaves
            .into_iter()
            .filter(|(root, own)| Some(*root) != first && own.len() == 1 && is_young(*root));
        probes.flat_map(|(_, own)| own).collect()
    }

    fn parents(&self) -> BTreeSet<i32> {
        let processes = self.processes.values();
        processes.map(|process| process.parent).collect()
    }

    /// What core is told of them, at a time since boot in clock ticks.
    pub(super) fn seen(&self, now: u64) -> Vec<Seen> {
        let of_probes = self.of_probes(now);
        let parents = self.parents();
        let seen = self.processes.values().filter_map(|process| {
            let is_leaf = !parents.contains(&process.id.pid);
            let parent = self.processes.get(&process.parent);
            let would_stop_parent =
                parent.is_some_and(|parent| STOP_WITH_CHILD.contains(&&*parent.program));
            // Traced: its tracer decides.
            let is_traced = process.state == 't';
            let is_job = is_leaf
                && parent.is_some()
                && !would_stop_parent
                && !process.leads_on_terminal
                && !NEEDED.contains(&&*process.program);
            let may_pause = is_job && !is_traced && !of_probes.contains(&process.id);
            // What others have is not theirs to give up. Who is exempt for now is told with what it has: the next moment it
            // may not be, and it would have been small until then.
            let memory = if is_job {
                let statm = fs::read_to_string(format!("/proc/{}/statm", process.id.pid));
                parse_statm(&statm.ok()?)?
            } else {
                Bytes::ZERO
            };
            Some(Seen {
                id: process.id,
                program: process.program.clone(),
                memory,
                cpu: process.cpu,
                is_stopped: process.is_stopped(),
                may_pause,
            })
        });
        seen.collect()
    }
}

#[cfg(test)]
impl Tree {
    /// A process and all below it.
    pub(super) fn below(root: i32) -> Self {
        let numbers = fs::read_dir("/proc").unwrap().flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let all = numbers.filter_map(|pid| Some((pid, read(pid).ok()??)));
        let mut tree = Self {
            processes: all.collect(),
            is_unseen: false,
        };
        let is_root = |known: &&Process| known.id.pid == root;
        let is_below =
            |known: &Process| known.id.pid == root || tree.ancestors(known.id).iter().any(is_root);
        let below = tree.processes.clone();
        let below = below.into_iter().filter(|(_, known)| is_below(known));
        tree.processes = below.collect();
        tree
    }

    pub(super) fn named(&self, program: &str) -> Option<ProcessId> {
        let mut known = self.processes.values();
        Some(known.find(|known| known.program == program)?.id)
    }
}

/// Sends a signal to the process that is meant; `false` if it has ended.
///
/// # Errors
///
/// When it may not be signalled, or it cannot be told whether it has ended.
pub(super) fn signal(id: ProcessId, signal: Signal) -> io::Result<bool> {
    let Some(pid) = Pid::from_raw(id.pid) else {
        return Ok(false);
    };
    let opened = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(false),
        opened => opened?,
    };
    if !is_there(id)? {
        return Ok(false);
    }
    match pidfd_send_signal(opened, signal) {
        Err(rustix::io::Errno::SRCH) => Ok(false),
        sent => Ok(sent.map(|()| true)?),
    }
}

/// Whether a process listens on a socket: others need it to go on.
pub(super) fn is_server(pid: i32) -> bool {
    let sockets: BTreeSet<String> = descriptors(pid)
        .into_iter()
        .filter_map(|(_, target)| {
            let inode = target
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect();
    // A socket's state: TCP_LISTEN in the one (include/net/tcp_states.h), __SO_ACCEPTCON among the flags of the other.
    !sockets.is_empty()
        && [
            ("tcp", 3, "0A", 9),
            ("tcp6", 3, "0A", 9),
            ("unix", 3, "00010000", 6),
        ]
        .into_iter()
        .any(|(table, state, listens, inode)| {
            let table = fs::read_to_string(format!("/proc/{pid}/net/{table}"));
            table.unwrap_or_default().lines().any(|line| {
                let fields: Vec<&str> = line.split_ascii_whitespace().collect();
                fields.get(state) == Some(&listens)
                    && fields
                        .get(inode)
                        .is_some_and(|inode| sockets.contains(*inode))
            })
        })
}

/// What a process has open: number and target.
pub(super) fn descriptors(pid: i32) -> Vec<(i32, PathBuf)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    let descriptors = entries.flatten().filter_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some((number, fs::read_link(entry.path()).ok()?))
    });
    descriptors.collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        net::TcpListener,
        os::unix::net::UnixListener,
        process::{Command, Stdio},
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn a_name_may_have_anything_in_it() {
        let text =
            "42 (a ) b (c) S 7 42 9 34816 42 4194560 1 2 3 4 150 50 1 2 20 0 1 0 9999 1000 20\n";
        let process = parse_stat(text).unwrap();
        assert_eq!(process.program, "a ) b (c");
        assert_eq!((process.id.pid, process.id.began), (42, 9999));
        assert_eq!((process.parent, process.state), (7, 'S'));
        assert_eq!(process.cpu, Nanos::millis(2000));
        assert!(process.leads_on_terminal);
        for text in [
            "",
            "42",
            "42 (sh) S",
            "x (sh) S 7 42 9 0 0 0 0 0 0 0 1 1 0 0 0 0 0 0 1",
        ] {
            assert_eq!(parse_stat(text), None, "{text}");
        }
        assert_eq!(parse_statm("100 30 10 1 0 5 0"), Some(machine::pages(20)));
        assert_eq!(parse_statm("100"), None);
    }

    /// A line of `/proc` for a process that was begun so many ticks after boot.
    fn process(pid: i32, program: &str, parent: i32, began: u64) -> (i32, Process) {
        let text = format!(
            "{pid} ({program}) S {parent} {pid} 9 0 -1 0 1 2 3 4 1 1 1 2 20 0 1 0 {began} 1000 20"
        );
        (pid, parse_stat(&text).unwrap())
    }

    /// A probe's command is no job, a build that was begun in the same way is.
    #[test]
    fn what_a_probe_has_begun_is_not_paused() {
        let process = |pid, parent, began| process(pid, "java", parent, began);
        let tree = |processes: Vec<(i32, Process)>| Tree {
            processes: processes.into_iter().collect(),
            is_unseen: false,
        };
        let exempt = |tree: &Tree, now: u64| -> Vec<i32> {
            tree.of_probes(now).into_iter().map(|id| id.pid).collect()
        };
        // The container's own, and what it runs; a probe, and what that runs.
        let mut all = vec![
            process(10, 1, 100),
            process(11, 10, 200),
            process(30, 1, 9000),
            process(31, 30, 9001),
        ];
        assert_eq!(exempt(&tree(all.clone()), 9500), [31]);
        assert!(exempt(&tree(all.clone()), 12_000).is_empty());
        all.push(process(32, 30, 9002));
        assert!(exempt(&tree(all), 9500).is_empty());
    }

    /// The first of a build's jobs is alone for a moment: that it comes to be one of two must not make it larger.
    #[test]
    fn who_is_exempt_for_now_is_told_with_what_it_has() {
        let own = i32::try_from(std::process::id()).unwrap();
        let first = process(1, "sleep", 0, 100);
        let seen = |program: &str, now: u64| {
            let began_beside = process(2, "make", 0, 9000);
            let leaf = process(own, program, 2, 9001);
            let tree = Tree {
                processes: [first.clone(), began_beside, leaf].into(),
                is_unseen: false,
            };
            let mut seen = tree.seen(now).into_iter();
            let leaf = seen.find(|seen| seen.id.pid == own).unwrap();
            (leaf.may_pause, leaf.memory > Bytes::ZERO)
        };
        assert_eq!(seen("cc1", 9500), (false, true));
        assert_eq!(seen("cc1", 12_000), (true, true));
        assert_eq!(seen("sh", 12_000), (false, false));
    }

    /// It would stop, too, and stay so.
    #[test]
    fn whose_parent_stops_with_it_is_not_paused() {
        let own = i32::try_from(std::process::id()).unwrap();
        let may_pause = |parent: &str| {
            let tree = Tree {
                processes: [process(1, parent, 0, 100), process(own, "cc1", 1, 101)].into(),
                is_unseen: false,
            };
            let seen = tree.seen(12_000);
            seen.iter().any(|seen| seen.id.pid == own && seen.may_pause)
        };
        for parent in STOP_WITH_CHILD {
            assert!(!may_pause(parent), "{parent}");
        }
        assert!(may_pause("sh"));
    }

    /// For want of descriptors or memory nobody has ended.
    #[test]
    fn what_cannot_be_read_has_not_ended() {
        let failed = |code| parse_read(Err(io::Error::from_raw_os_error(code)));
        for code in [libc::ENOENT, libc::ESRCH] {
            assert_eq!(failed(code).unwrap(), None);
        }
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EACCES] {
            failed(code).unwrap_err();
        }
        parse_read(Ok("42 (sh) S".to_owned())).unwrap_err();
    }

    fn state(pid: i32) -> Option<char> {
        read(pid).unwrap().map(|process| process.state)
    }

    pub(crate) fn until(what: &str, is_met: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_met() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn exactly_the_process_that_is_meant_is_stopped() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let id = read(pid).unwrap().unwrap().id;
        let other = ProcessId {
            began: id.began + 1,
            ..id
        };
        assert!(!signal(other, Signal::STOP).unwrap());
        assert_ne!(state(pid), Some('T'));
        assert!(signal(id, Signal::STOP).unwrap());
        until("it stops", || state(pid) == Some('T'));
        assert!(signal(id, Signal::CONT).unwrap());
        until("it goes on", || state(pid) != Some('T'));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!signal(id, Signal::STOP).unwrap());
    }

    #[test]
    fn who_listens_is_a_server() {
        let own = i32::try_from(std::process::id()).unwrap();
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        assert!(!is_server(i32::try_from(child.id()).unwrap()));
        child.kill().unwrap();
        child.wait().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(is_server(own));
        drop(tcp);
        let path = std::env::temp_dir().join(format!("bellows-server-{own}"));
        let unix = UnixListener::bind(&path).unwrap();
        assert!(is_server(own));
        drop(unix);
        fs::remove_file(path).unwrap();
    }
}
