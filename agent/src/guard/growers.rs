//! Who grows: which program a burst's memory is for, and how old the processes are that have it.
//!
//! A job in the shell's sense is a process group: an interactive shell puts each command with all that it starts into
//! one, and make, ninja and cargo leave their children in their own. So what a burst is for is the first program of the
//! group of the process that has most, shells aside: `make` of `sh`, `make`, `sh`, `g++`, `cc1plus`. Where nobody has a
//! terminal all of a container may be one group; then it is the program that its shell has started.
//!
//! It reads `/proc`, in which there is nobody to see for an agent in a namespace of processes of its own. Then all runs
//! of a workload are of one kind.
//!
//! It must not wait for a memory lock: `stat` and `statm` do not take it. It is the controller that reads, and all other
//! containers wait for it: of one with more than [`MOST`] processes none is looked at.

use std::fs;

use bellows_core::{Bytes, Nanos};
use rustix::time::{ClockId, clock_gettime};

use crate::{
    cgroup::Cgroup,
    clock::now,
    parallel::process::{Process, TICK, Tree, parse_statm},
};

/// Whoever has begun in this time before is young.
const YOUNG: Nanos = Nanos::millis(60_000);
/// The share of all memory that the young must have to be those who grow.
const YOUNG_PER_MILLE: u64 = 250;
/// Two files each: tens of milliseconds of the controller's time.
const MOST: usize = 1000;
const SHELLS: [&str; 9] = [
    "ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "sh", "zsh",
];

/// The processes of a container, with what each has.
pub(super) struct Growers {
    /// What the largest of those that grow is for.
    pub(super) trigger: String,
    /// When each began, and its memory.
    processes: Vec<(Nanos, Bytes)>,
}

impl Growers {
    /// Those of a cgroup; `None` where they are not to be seen, or are too many.
    pub(super) fn of(cgroup: &Cgroup) -> Option<Self> {
        let pids = cgroup.processes().ok();
        let tree = Tree::among(pids.filter(|pids| pids.len() <= MOST)?);
        let tree = Some(tree).filter(|tree| !tree.is_unseen)?;
        let since_boot = since_boot();
        let mut seen: Vec<(&Process, Nanos, Bytes)> = Vec::new();
        for process in tree.all() {
            let statm = fs::read_to_string(format!("/proc/{}/statm", process.id.pid));
            let memory = statm.ok().and_then(|text| parse_statm(&text));
            let age = since_boot.since(Nanos(process.id.began.saturating_mul(TICK.0)));
            let began = Nanos(now().0.saturating_sub(age.0));
            seen.push((process, began, memory.unwrap_or_default()));
        }
        let sum = |from: Nanos| {
            let young = seen.iter().filter(|(_, began, _)| *began >= from);
            young.fold(Bytes::ZERO, |sum, (_, _, memory)| sum.plus(*memory))
        };
        let recently = Nanos(now().0.saturating_sub(YOUNG.0));
        let grow = sum(recently) >= sum(Nanos(0)).per_mille(YOUNG_PER_MILLE);
        let from = if grow { recently } else { Nanos(0) };
        let those = seen.iter().filter(|(_, began, _)| *began >= from);
        let (largest, ..) = those.max_by_key(|(_, _, memory)| *memory)?;
        Some(Self {
            trigger: job(&tree, largest),
            processes: seen
                .iter()
                .map(|&(_, began, memory)| (began, memory))
                .collect(),
        })
    }

    /// What those have that began at this time or later.
    pub(super) fn younger_than(&self, from: Nanos) -> Bytes {
        let young = self.processes.iter().filter(|(began, _)| *began >= from);
        young.fold(Bytes::ZERO, |sum, (_, memory)| sum.plus(*memory))
    }
}

/// The first program of a process's group that is no shell.
fn job(tree: &Tree, process: &Process) -> String {
    let above = tree.ancestors(process.id).into_iter();
    let group = above.take_while(|above| above.group == process.group);
    let job = group.filter(|above| !SHELLS.contains(&above.program.as_str()));
    job.last().unwrap_or(process).program.clone()
}

/// The clock of `/proc`.
fn since_boot() -> Nanos {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

#[cfg(test)]
mod tests {
    use std::{
        env,
        io::{BufRead as _, BufReader},
        os::unix::process::CommandExt as _,
        process::{self, Command, Stdio},
    };

    use bellows_core::CgroupId;

    use super::*;

    /// What `sh -c SCRIPT` has begun once it prints a line, as a cgroup would list it.
    fn growers(name: &str, script: &str) -> Growers {
        let mut shell = Command::new("sh")
            .args(["-c", script])
            .process_group(0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(shell.stdout.take().unwrap()).lines();
        let pids = lines.next().unwrap().unwrap();
        let directory = env::temp_dir().join(format!("bellows-growers-{}-{name}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        let pids = format!("{} {pids}", shell.id()).replace(' ', "\n");
        fs::write(directory.join("cgroup.procs"), pids).unwrap();
        let growers = Growers::of(&Cgroup::stand_in(&directory, CgroupId(1)));
        let group = format!("-{}", shell.id());
        Command::new("kill")
            .args(["-9", "--", &group])
            .status()
            .unwrap();
        shell.wait().unwrap();
        fs::remove_dir_all(directory).unwrap();
        growers.unwrap()
    }

    #[test]
    fn too_many_are_not_looked_at() {
        let directory = env::temp_dir().join(format!("bellows-many-{}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        let own = process::id();
        let cgroup = Cgroup::stand_in(&directory, CgroupId(1));
        let looked_at = |count: usize| {
            let pids = vec![own.to_string(); count].join("\n");
            fs::write(directory.join("cgroup.procs"), pids).unwrap();
            Growers::of(&cgroup).is_some()
        };
        assert!(looked_at(MOST));
        assert!(!looked_at(MOST + 1));
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_job_is_what_its_shell_has_started() {
        let before = now();
        // `env` stands for make, which runs a shell that runs a compiler.
        let script = "timeout 60 sh -c 'tail -f /dev/null & echo $PPID $$ $!; wait'";
        let growers = growers("job", script);
        assert_eq!(growers.trigger, "timeout");
        let all = growers.younger_than(Nanos(0));
        assert!(all > Bytes::ZERO);
        // Ticks are of 10 ms.
        assert_eq!(growers.younger_than(Nanos(before.0 - TICK.0)), all);
        assert_eq!(growers.younger_than(Nanos(now().0 + TICK.0)), Bytes::ZERO);
    }
}
