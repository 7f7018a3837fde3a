//! `crio`: the agent beside CRI-O, one record a promise.
//!
//! CRI-O itself is not to be had here, so its part is played ([`Kind::Crio`]) with real cgroups in its two layouts:
//! with the cgroupfs driver `crio-ID` and, beside it, its monitor's; with systemd's `crio-ID.scope`, in which crun makes
//! a second one for the container's processes and sets the same limits in both (`find_systemd_subgroup`,
//! libcrun/cgroup-systemd.c; `libcrun_update_cgroup_resources`, libcrun/cgroup.c). What is raised in one of them only is
//! not raised.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit, field, quota::Quota},
    originals::Records as Originals,
};
use bellows_core::{Bytes, Cpu};

use super::{bursts::burst_words, container_edges::keep, gate, record::Records};
use crate::{
    containers::{Standalone, cpu_policy, hand_out, policy},
    fake::{Fake, Kind, Said},
    node::{GUEST, wait},
};

const SOCKET: &str = "/run/crio/crio.sock";
const MEMORY: &str = "memory";
const CPU: &str = "cpu";
const LIMIT: Bytes = Bytes::mib(64);
const PEAK: Bytes = Bytes::mib(220);
const MAX: Bytes = Bytes::mib(512);
const QUOTA: Quota = Quota {
    cpu: Cpu::millis(200),
    period: 100_000,
};
const MOST: Cpu = Cpu::millis(2000);
/// Time in which one that is new must be guarded: the runtime tells of nobody, and is asked once a second.
const FOUND: Duration = Duration::from_secs(10);
/// The same of the first, for which the agent has to start.
const FIRST_FOUND: Duration = Duration::from_secs(60);
const RESTED: Duration = Duration::from_secs(40);
/// For how long the runtime does not answer: longer than a burst takes, shorter than a hold may last twice.
const SILENCE: Duration = Duration::from_secs(8);

/// How cgroups are named.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Cgroupfs,
    /// By systemd, as crun has it.
    Systemd,
}

struct Bed {
    fake: Fake,
    agent: Standalone,
    /// Containers made so far.
    made: u64,
}

/// A container that runs.
struct Started {
    id: String,
    pod: Cgroup,
    /// From the outermost to the one that its process is in.
    cgroups: Vec<Cgroup>,
    monitor: Cgroup,
    process: Child,
}

type Case = (&'static str, fn(&mut Bed) -> Result<()>);

const CASES: [Case; 5] = [
    (
        "its socket is found, and a burst is raised by it (cgroupfs)",
        |bed| burst(bed, Layout::Cgroupfs),
    ),
    ("the same in both cgroups of a container (systemd)", |bed| {
        burst(bed, Layout::Systemd)
    }),
    (
        "a burst lives in both cgroups while the runtime does not answer",
        silent,
    ),
    (
        "a CPU quota is raised without the runtime (cgroupfs)",
        |bed| throttled(bed, Layout::Cgroupfs),
    ),
    (
        "the same in both cgroups of a container, of which the inner one is throttled (systemd)",
        |bed| throttled(bed, Layout::Systemd),
    ),
];

pub(crate) fn run(records: &mut Records) -> Result<()> {
    hand_out(&["kubepods", "burstable"])?;
    hand_out(&["kubepods.slice", "kubepods-burstable.slice"])?;
    let fake = Fake::start(Path::new(SOCKET), Kind::Crio)?;
    // Nobody tells it where the runtime is.
    let policies = format!("{}---\n{}", policy(MEMORY, MAX), cpu_policy(CPU, MOST));
    let mut bed = Bed {
        fake,
        agent: Standalone::start(&policies)?,
        made: 0,
    };
    for (name, case) in CASES {
        keep(records, name, case(&mut bed))?;
        // It must not be in the next one's way.
        let mut state = bed.fake.state();
        state.running.clear();
        state.updates.clear();
        state.hangs = false;
    }
    Ok(())
}

impl Bed {
    /// Runs a load in a container of its own, whose pod has the label `guard`.
    fn run(&mut self, guard: &str, layout: Layout, words: &[String]) -> Result<Started> {
        self.made += 1;
        let uid = format!("4d0e7f00-0000-4000-a000-{:012}", self.made);
        let id = format!("{:064x}", 0xc710_0000 + self.made);
        let (pod, outer, monitor) = match layout {
            Layout::Cgroupfs => (
                hand_out(&["kubepods", "burstable", &format!("pod{uid}")])?,
                format!("crio-{id}"),
                format!("crio-conmon-{id}"),
            ),
            Layout::Systemd => {
                let slice = format!("kubepods-burstable-pod{}.slice", uid.replace('-', "_"));
                (
                    hand_out(&["kubepods.slice", "kubepods-burstable.slice", &slice])?,
                    format!("crio-{id}.scope"),
                    format!("crio-conmon-{id}.scope"),
                )
            }
        };
        let pod = Cgroup::open(&pod)?;
        let monitor = pod.create_child(&monitor)?;
        let mut cgroups = vec![pod.create_child(&outer)?];
        if layout == Layout::Systemd {
            cgroups[0].write("cgroup.subtree_control", "+cpu +memory +pids")?;
            cgroups.push(cgroups[0].create_child("container")?);
        }
        for cgroup in cgroups.iter().chain([&pod]) {
            cgroup.set_limit("memory.max", Limit::At(LIMIT))?;
            cgroup.set_quota(QUOTA)?;
        }
        let mut command = Command::new(GUEST);
        command.arg("load").args(words);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        cgroups
            .last()
            .context("a container has a cgroup")?
            .admit(&mut command)?;
        let process = command.spawn().context("start a load")?;
        let said = Said {
            uid,
            name: guard.to_owned(),
            cgroups: cgroups.iter().map(|one| one.path().to_owned()).collect(),
            limit: LIMIT,
            quota: Some(QUOTA),
            labels: [("guard".to_owned(), guard.to_owned())].into(),
        };
        self.fake.state().running.insert(id.clone(), said);
        let started = Started {
            id,
            pod,
            cgroups,
            monitor,
            process,
        };
        let found = if self.made == 1 { FIRST_FOUND } else { FOUND };
        wait("it is guarded", found, || {
            Ok(Originals::containers().read(&started.id).is_some())
        })?;
        Ok(started)
    }

    /// Its runtime's own word.
    fn said(&self, started: &Started) -> Result<Said> {
        let state = self.fake.state();
        let said = state.running.get(&started.id);
        said.cloned().context("the runtime does not know it")
    }

    /// Waits until its limits are what they were, everywhere.
    fn rests(&self, started: &Started) -> Result<()> {
        wait("all of it is at rest", RESTED, || {
            let said = self.said(started)?;
            let mut all = started.cgroups.iter().chain([&started.pod]);
            let are_theirs = all.try_fold(true, |are, cgroup| {
                let (limit, quota) = (cgroup.limit("memory.max")?, cgroup.quota()?);
                Ok::<_, anyhow::Error>(are && limit == Limit::At(LIMIT) && quota == Some(QUOTA))
            })?;
            Ok(are_theirs && (said.limit, said.quota) == (LIMIT, Some(QUOTA)))
        })?;
        let monitor = started.monitor.limit("memory.max")?;
        ensure!(monitor == Limit::Max, "its monitor has {monitor:?}");
        let updates = self.fake.state().updates.clone();
        let others = updates.iter().filter(|(id, _)| *id != started.id);
        ensure!(others.count() == 0, "another was updated: {updates:?}");
        self.fake.state().updates.clear();
        Ok(())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // One that has ended already needs neither.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// A load that bursts when its gate is opened.
fn bursting() -> Result<Vec<String>> {
    gate::close()?;
    let mut words = burst_words(Bytes::mib(8), PEAK, 1).to_vec();
    words.extend(gate::closed());
    Ok(words)
}

/// Waits for the end of its burst, which it must survive.
fn survives(started: &mut Started) -> Result<()> {
    let mut status = None;
    wait("its burst is over", Duration::from_secs(40), || {
        status = started.process.try_wait()?;
        Ok(status.is_some())
    })?;
    let kills = started.cgroups[0].events()?.oom_kill;
    ensure!(
        kills == 0 && status.is_some_and(|status| status.success()),
        "it has ended with {status:?}, {kills} killed"
    );
    Ok(())
}

fn burst(bed: &mut Bed, layout: Layout) -> Result<()> {
    bed.agent.check()?;
    let mut started = bed.run(MEMORY, layout, &bursting()?)?;
    gate::open_when_braked(&started.cgroups[0])?;
    survives(&mut started)?;
    let raised = bed.fake.state().updates.clone();
    ensure!(
        raised.iter().any(|&(_, to)| to > LIMIT.0.cast_signed()),
        "it was not raised by its runtime: {raised:?}"
    );
    bed.rests(&started)
}

fn silent(bed: &mut Bed) -> Result<()> {
    let mut started = bed.run(MEMORY, Layout::Systemd, &bursting()?)?;
    gate::wait_braked(&started.cgroups[0])?;
    bed.fake.state().hangs = true;
    let survived = gate::open(&started.cgroups[0]).and_then(|()| survives(&mut started));
    let asked = bed.fake.state().updates.clone();
    thread::sleep(SILENCE.saturating_sub(Duration::from_secs(5)));
    bed.fake.state().hangs = false;
    survived?;
    ensure!(asked.is_empty(), "it has answered: {asked:?}");
    bed.rests(&started)
}

fn throttled(bed: &mut Bed, layout: Layout) -> Result<()> {
    let words = "pulse --before-ms 3000 --cycles 1 --rest-seconds 0 --work-seconds 4";
    let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    let mut started = bed.run(CPU, layout, &words)?;
    bed.fake.state().hangs = true;
    let enough = Cpu::millis(800);
    wait(
        "all of it has room to work",
        Duration::from_secs(15),
        || {
            let all = started.cgroups.iter().chain([&started.pod]);
            let quotas: Result<Vec<_>, _> = all.map(Cgroup::quota).collect();
            let has_room = |quota: &Option<Quota>| quota.is_some_and(|quota| quota.cpu >= enough);
            Ok(quotas?.iter().all(has_room))
        },
    )?;
    bed.fake.state().hangs = false;
    let throttled = |cgroup: &Cgroup| -> Result<u64> {
        Ok(field(&cgroup.read("cpu.stat")?, "throttled_usec").unwrap_or(0))
    };
    let before: Vec<u64> = started
        .cgroups
        .iter()
        .map(throttled)
        .collect::<Result<_>>()?;
    wait("its work is done", Duration::from_secs(40), || {
        Ok(started.process.try_wait()?.is_some())
    })?;
    let after: Vec<u64> = started
        .cgroups
        .iter()
        .map(throttled)
        .collect::<Result<_>>()?;
    eprintln!("      throttled for {before:?} us until it had room, {after:?} in the end");
    bed.rests(&started)
}
