//! `container-edges`: what `bellows run --standalone` promises at its edges, one record a promise.

use std::{fs, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit, quota::Quota},
    originals::{Original, Records as Originals},
};
use bellows_core::{Bytes, Cpu};
use clap::Args;

use super::{
    boost_edges,
    bursts::burst_words,
    container_bursts::{is_at_rest, limits, said},
    exec_cli::Record,
    gate, observe_edges,
    record::Records,
    throttle::has_cpu,
    wait_edges,
};
use crate::{
    containers::{Machine, POLICIES, Spec, Standalone, Started, cpu_policy, policy},
    node::{log_tail, wait},
};

/// What a failure tells of the agent's log.
const LOG_LINES: usize = 60;
pub(super) const LIMIT: Bytes = Bytes::mib(64);
pub(super) const PEAK: Bytes = Bytes::mib(220);
pub(super) const MAX: Bytes = Bytes::mib(1024);
/// The label of those that are guarded.
pub(super) const GUARD: &str = "edges";
/// The agent looks at who is there every 10 s where the runtime tells of them itself.
const LOOKED: Duration = Duration::from_secs(40);
const RESTORED: Duration = Duration::from_secs(90);

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Promises that were looked at already, in a machine before this one.
    #[arg(long, default_value_t = 0)]
    skip: usize,
}

/// The machine, and the agent under test.
pub(super) struct Bed {
    pub(super) machine: Machine,
    pub(super) agent: Option<Standalone>,
}

pub(super) type Case = (&'static str, fn(&mut Bed) -> Result<()>);

const CASES: [Case; 12] = [
    ("a container from before the agent is guarded", earlier),
    (
        "a limit that somebody else has set is the new original",
        foreign,
    ),
    ("policies that are changed are followed", followed),
    (
        "a container that ends while it is raised ends nothing else",
        vanished,
    ),
    ("a container without a limit is left alone", without_limit),
    (
        "a runtime that hangs costs no life, however often a burst must be raised",
        runtime_frozen,
    ),
    (
        "a pod comes to rest whose containers were raised side by side",
        side_by_side,
    ),
    ("a limit at rest goes with its policy", floor_undone),
    (
        "a CPU limit that was raised outlives neither its agent nor somebody else's",
        quota,
    ),
    ("restore puts limits back", restored),
    ("a path that is no socket is told", no_socket),
    (
        "policies that are wrong are told with their line",
        wrong_policies,
    ),
];

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut bed = Bed {
        machine: Machine::start()?,
        agent: Some(Standalone::start(&policy(GUARD, MAX))?),
    };
    let cases = CASES.into_iter();
    let cases = cases.chain(boost_edges::CASES).chain(observe_edges::CASES);
    let cases = cases.chain(wait_edges::CASES);
    for (name, case) in cases.skip(options.skip) {
        // One that failed may have left none.
        if bed.agent.is_none() {
            bed.start_agent()?;
        }
        keep(records, name, case(&mut bed))?;
    }
    Ok(())
}

/// Tells what has become of a case, and keeps it, with the agent's last words where it failed.
pub(super) fn keep(records: &mut Records, name: &str, outcome: Result<()>) -> Result<()> {
    let failure = outcome.err().map(|error| {
        let log = log_tail("bellows", LOG_LINES);
        format!("{error:#}; the agent's log:\n{log}")
    });
    let told = if failure.is_some() { "FAILED" } else { "ok" };
    eprintln!("case {name}: {told}");
    records.write(&Record {
        case: name.to_owned(),
        failure,
    })
}

impl Bed {
    /// A container that grows to [`PEAK`] when its gate is opened, if it is, and then stays.
    pub(super) fn burst(&mut self, name: &str, guard: &str) -> Result<Started> {
        self.machine.run(&burst(name, guard, PEAK))
    }

    /// The same, which grows as soon as it is guarded.
    pub(super) fn guarded_burst(&mut self, name: &str) -> Result<Started> {
        let started = self.burst(name, GUARD)?;
        gate::open_when_braked(&started.cgroup)?;
        Ok(started)
    }

    /// Waits for the end of its burst, which it must survive.
    pub(super) fn survives(&self, started: &Started) -> Result<()> {
        wait("its burst is over", Duration::from_secs(60), || {
            let code = self.machine.exit_code(started)?;
            ensure!(code.is_none(), "it has ended with {code:?}");
            Ok(said(started).is_some())
        })?;
        let kills = started.cgroup.events()?.oom_kill;
        ensure!(kills == 0, "{kills} of its processes were killed");
        Ok(())
    }

    fn rests(&self, started: &Started, limit: Bytes) -> Result<()> {
        wait("its limit is at rest again", RESTORED, || {
            is_at_rest(&self.machine, started, Some(limit))
        })
    }

    fn start_agent(&mut self) -> Result<()> {
        self.agent = Some(Standalone::start(&policy(GUARD, MAX))?);
        Ok(())
    }
}

fn burst(name: &str, guard: &str, peak: Bytes) -> Spec {
    let words = burst_words(LIMIT.per_mille(500), peak, 2).to_vec();
    let more = ["--after-ms", "300000"].map(str::to_owned);
    let mut command = ["/bellows-guest", "load"].map(str::to_owned).to_vec();
    command.extend(words.into_iter().chain(gate::closed()).chain(more));
    Spec {
        name: name.to_owned(),
        container: None,
        limit: Some(LIMIT),
        pod_limit: None,
        cpu: None,
        command,
        binds: Vec::new(),
        labels: vec![("guard".to_owned(), guard.to_owned())],
    }
}

pub(super) fn recorded(started: &Started) -> Option<Original> {
    Originals::containers().read(&started.id)
}

fn is_raised(started: &Started) -> Result<bool> {
    Ok(started.cgroup.limit("memory.max")?.bytes() > LIMIT)
}

fn wait_raised(started: &Started) -> Result<()> {
    wait("its limit is raised", Duration::from_secs(60), || {
        is_raised(started)
    })
}

pub(super) fn wait_guarded(started: &Started) -> Result<()> {
    wait("it is guarded", LOOKED, || Ok(recorded(started).is_some()))
}

fn earlier(bed: &mut Bed) -> Result<()> {
    bed.agent = None;
    let started = bed.burst("earlier", GUARD)?;
    bed.start_agent()?;
    gate::open_when_braked(&started.cgroup)?;
    bed.survives(&started)?;
    ensure!(is_raised(&started)?, "it was not raised");
    bed.rests(&started, LIMIT)?;
    bed.machine.remove(&started)
}

fn foreign(bed: &mut Bed) -> Result<()> {
    let started = bed.burst("foreign", GUARD)?;
    wait_guarded(&started)?;
    let theirs = Bytes::mib(96);
    started.pod.set_limit("memory.max", Limit::At(theirs))?;
    bed.machine.update(&started, theirs)?;
    wait("the new original is recorded", LOOKED, || {
        Ok(recorded(&started)
            .is_some_and(|original| original.limit.is_some_and(|limit| limit.at_rest == theirs)))
    })?;
    gate::open_when_braked(&started.cgroup)?;
    bed.survives(&started)?;
    bed.rests(&started, theirs)?;
    // More than the policy allows: there is nothing to guard.
    bed.machine.update(&started, MAX.plus(MAX))?;
    wait("it is guarded no more", LOOKED, || {
        Ok(recorded(&started).is_none())
    })?;
    wait("it is told", LOOKED, || {
        Ok(log_tail("bellows", LOG_LINES).contains("is below the limit of 2 GiB"))
    })?;
    bed.machine.remove(&started)
}

fn followed(bed: &mut Bed) -> Result<()> {
    let started = bed.burst("followed", "late")?;
    // Whoever finds one that is younger has looked at this one.
    let younger = bed.burst("younger", GUARD)?;
    wait_guarded(&younger)?;
    bed.machine.remove(&younger)?;
    ensure!(
        recorded(&started).is_none(),
        "it is guarded without a policy"
    );
    let late = format!("{}---\n{}", policy(GUARD, MAX), policy("late", MAX));
    fs::write(POLICIES, &late)?;
    wait_guarded(&started)?;
    fs::write(POLICIES, late.replace("max:", "maximum:"))?;
    wait("the mistake is told", LOOKED, || {
        Ok(log_tail("bellows", LOG_LINES).contains("did you mean `max`"))
    })?;
    ensure!(recorded(&started).is_some(), "wrong policies were followed");
    fs::write(POLICIES, policy(GUARD, MAX))?;
    wait("it is guarded no more", LOOKED, || {
        Ok(recorded(&started).is_none())
    })?;
    bed.machine.remove(&started)
}

fn vanished(bed: &mut Bed) -> Result<()> {
    let started = bed.guarded_burst("vanished")?;
    wait_raised(&started)?;
    bed.machine.remove(&started)?;
    wait("its record is removed", LOOKED, || {
        Ok(recorded(&started).is_none())
    })?;
    let next = bed.guarded_burst("next")?;
    bed.survives(&next)?;
    bed.agent.as_mut().context("no agent")?.check()?;
    bed.machine.remove(&next)
}

fn without_limit(bed: &mut Bed) -> Result<()> {
    let started = bed.machine.run(&Spec {
        name: "unlimited".to_owned(),
        container: None,
        limit: None,
        pod_limit: None,
        cpu: None,
        command: ["/bellows-guest", "load", "pause"]
            .map(str::to_owned)
            .to_vec(),
        binds: Vec::new(),
        labels: vec![("guard".to_owned(), GUARD.to_owned())],
    })?;
    wait("it is told", LOOKED, || {
        Ok(log_tail("bellows", LOG_LINES).contains("nothing to raise"))
    })?;
    ensure!(recorded(&started).is_none(), "it is guarded");
    bed.machine.remove(&started)
}

/// Three raises are needed, and none is answered.
fn runtime_frozen(bed: &mut Bed) -> Result<()> {
    let peak = MAX.per_mille(800);
    let started = bed.machine.run(&burst("frozen", GUARD, peak))?;
    gate::wait_braked(&started.cgroup)?;
    bed.machine.freeze_containerd(true)?;
    // A raise waits until the call before it is given up, 5 s each.
    let grown = gate::open(&started.cgroup).and_then(|()| {
        wait("it has grown", Duration::from_secs(40), || {
            Ok(started.cgroup.usage()? >= peak)
        })
    });
    bed.machine.freeze_containerd(false)?;
    grown?;
    bed.survives(&started)?;
    bed.rests(&started, LIMIT)?;
    bed.machine.remove(&started)
}

/// One ends while it is raised, and the agent dies.
fn side_by_side(bed: &mut Bed) -> Result<()> {
    let pod_limit = LIMIT.plus(LIMIT);
    let mut ending = burst("ending", GUARD, PEAK);
    ending.pod_limit = Some(pod_limit);
    ending.command.truncate(ending.command.len() - 2);
    let ending = bed.machine.run(&ending)?;
    let other = bed
        .machine
        .run_beside(&ending, &burst("other", GUARD, PEAK))?;
    gate::wait_braked(&ending.cgroup)?;
    gate::open_when_braked(&other.cgroup)?;
    gate::open(&ending.cgroup)?;
    wait("the first has ended", Duration::from_secs(60), || {
        let code = bed.machine.exit_code(&ending)?;
        ensure!(
            code.is_none_or(|code| code == 0),
            "it has ended with {code:?}"
        );
        Ok(code.is_some())
    })?;
    bed.survives(&other)?;
    ensure!(is_raised(&other)?, "it is at rest already");
    bed.agent.take().context("no agent")?.kill_all()?;
    bed.start_agent()?;
    wait("pod and container are at rest", RESTORED, || {
        let of = |cgroup: &Cgroup| cgroup.limit("memory.max").map(Limit::bytes);
        Ok(of(&other.cgroup)? == LIMIT && of(&other.pod)? == pod_limit)
    })?;
    bed.machine.remove(&other)
}

fn floor_undone(bed: &mut Bed) -> Result<()> {
    let floor = LIMIT.per_mille(750);
    let with_floor = policy("floor", MAX).replace("max:", &format!("floor: {}, max:", floor.0));
    fs::write(POLICIES, format!("{}---\n{with_floor}", policy(GUARD, MAX)))?;
    let started = bed.burst("floor", "floor")?;
    wait("it has less at rest", LOOKED, || {
        Ok(started.cgroup.limit("memory.max")? == Limit::At(floor))
    })?;
    fs::write(POLICIES, policy(GUARD, MAX))?;
    bed.rests(&started, LIMIT)?;
    wait("it is guarded no more", LOOKED, || {
        Ok(recorded(&started).is_none())
    })?;
    bed.machine.remove(&started)
}

fn quota(bed: &mut Bed) -> Result<()> {
    let cpu = Cpu::millis(200);
    let policies = format!(
        "{}---\n{}",
        policy(GUARD, MAX),
        cpu_policy("cpu", Cpu::millis(2000))
    );
    fs::write(POLICIES, &policies)?;
    let words =
        "/bellows-guest load pulse --cycles 1 --rest-seconds 0 --work-seconds 8 --after-ms 1000000";
    let started = bed.machine.run(&Spec {
        cpu: Some(cpu),
        labels: vec![("guard".to_owned(), "cpu".to_owned())],
        ..Spec::of("cpu", words.split(' ').map(str::to_owned).collect())
    })?;
    let quota =
        |cgroup: &Cgroup| -> Result<Option<Cpu>> { Ok(cgroup.quota()?.map(|quota| quota.cpu)) };
    // It rests before it works; what its start needed is another matter.
    wait("it works", LOOKED, || {
        Ok(!Machine::said(&started).is_empty())
    })?;
    wait("it has room to work", LOOKED, || {
        let enough = Some(Cpu::millis(800));
        Ok(quota(&started.cgroup)? >= enough && quota(&started.pod)? >= enough)
    })?;
    bed.agent.take().context("no agent")?.kill_all()?;
    bed.agent = Some(Standalone::start(&policies)?);
    wait("it is at rest again", RESTORED, || {
        has_cpu(&bed.machine, &started, cpu)
    })?;
    // None that was asked for on the way down: those are whole hundredths.
    let theirs = Cpu::millis(315);
    let record = || Originals::containers().read(&started.id)?.quota;
    started.pod.set_quota(Quota {
        cpu: theirs,
        period: 100_000,
    })?;
    bed.machine.update_cpu(&started, theirs)?;
    wait("the new original is recorded", LOOKED, || {
        Ok(record().is_some_and(|quota| quota.cpu.at_rest == theirs))
    })?;
    ensure!(
        has_cpu(&bed.machine, &started, theirs)?,
        "it was changed again"
    );
    fs::write(POLICIES, policy(GUARD, MAX))?;
    wait("it is guarded no more", LOOKED, || {
        Ok(recorded(&started).is_none())
    })?;
    bed.machine.remove(&started)
}

fn restored(bed: &mut Bed) -> Result<()> {
    let started = bed.guarded_burst("restored")?;
    bed.survives(&started)?;
    ensure!(is_raised(&started)?, "it is at rest already");
    let refused = bellows(&["restore"])?;
    ensure!(refused.1.contains("another `bellows run`"), "{refused:?}");
    bed.agent.take().context("no agent")?.kill_all()?;
    let done = bellows(&["restore"])?;
    ensure!(done.0 && done.1.contains("as it was"), "{done:?}");
    // The dead agent may have begun to lower it: what its runtime was asked for then is carried out all the same.
    let rests = wait("it is at rest", LOOKED, || {
        is_at_rest(&bed.machine, &started, Some(LIMIT))
    });
    let left = limits(&bed.machine, &started)?;
    rests.with_context(|| format!("its limits are {left:?}"))?;
    ensure!(recorded(&started).is_none(), "its record is left");
    bed.start_agent()?;
    bed.machine.remove(&started)
}

fn no_socket(bed: &mut Bed) -> Result<()> {
    bed.agent.take().context("no agent")?.kill_all()?;
    let words = ["run", "--standalone", "--policies", POLICIES];
    let told = bellows(&[&words[..], &["--runtime-endpoint", "/etc/passwd"]].concat())?;
    ensure!(
        !told.0 && told.1.contains("/etc/passwd is no socket"),
        "{told:?}"
    );
    bed.start_agent()
}

fn wrong_policies(_bed: &mut Bed) -> Result<()> {
    let file = "/tmp/wrong.yaml";
    fs::write(file, policy("wrong", MAX).replace("mode: Act", "mode: act"))?;
    let told = bellows(&["check", file])?;
    ensure!(
        !told.0 && told.1.contains("/tmp/wrong.yaml:5:") && told.1.contains("did you mean `Act`"),
        "{told:?}"
    );
    let told = bellows(&["check", POLICIES])?;
    ensure!(told.0 && told.1.contains("memory up to 1 GiB"), "{told:?}");
    Ok(())
}

/// Whether it succeeded, and what it printed.
pub(super) fn bellows(words: &[&str]) -> Result<(bool, String)> {
    let output = Command::new("bellows").args(words).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}
