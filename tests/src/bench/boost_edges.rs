//! What boosts promise at their edges; a part of `container-edges`.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use anyhow::{Result, ensure};
use bellows::{clock::now, originals::Records};
use bellows_core::{Bytes, Cpu};

use super::{
    container_bursts::is_at_rest,
    container_edges::{Bed, Case, wait_guarded},
    gate,
    pod_bursts::is_guarded_since,
    throttle::has_cpu,
};
use crate::{
    containers::{POLICIES, Spec, Standalone, Started, policy_of},
    node::wait,
};

pub(super) const CASES: [Case; 2] = [
    (
        "a program that a policy names is lent what it says until it ends, also where the agent dies meanwhile",
        program,
    ),
    (
        "what a start is lent ends when its service is ready, or with its policy",
        start,
    ),
];

const CPU: Cpu = Cpu::millis(250);
const LENT_CPU: Cpu = Cpu::millis(1500);
const LIMIT: Bytes = Bytes::mib(64);
const LENT: Bytes = Bytes::mib(256);
const BEGUN: Duration = Duration::from_secs(60);
const OVER: Duration = Duration::from_secs(90);

/// A container with limits that runs programs of the machine.
fn spec(name: &str, guard: &str, words: &[&str]) -> Spec {
    Spec {
        limit: Some(LIMIT),
        cpu: Some(CPU),
        binds: ["/usr", "/bin", "/lib", "/lib64"]
            .map(|path| (path, path))
            .to_vec(),
        labels: vec![("guard".to_owned(), guard.to_owned())],
        ..Spec::of(name, words.iter().map(|&word| word.to_owned()).collect())
    }
}

fn lent_cpu(started: &Started) -> Result<bool> {
    let quota = started.cgroup.quota()?;
    Ok(quota.is_some_and(|quota| quota.cpu == LENT_CPU))
}

fn rests(bed: &Bed, started: &Started) -> Result<()> {
    wait("all of it is at rest", OVER, || {
        Ok(has_cpu(&bed.machine, started, CPU)? && is_at_rest(&bed.machine, started, Some(LIMIT))?)
    })
}

/// Kills the agent, if there is one.
fn stop(bed: &mut Bed) -> Result<()> {
    bed.agent.take().map_or(Ok(()), Standalone::kill_all)
}

/// The same, and starts the next.
fn restart(bed: &mut Bed, policies: &str) -> Result<()> {
    stop(bed)?;
    bed.agent = Some(Standalone::start(policies)?);
    Ok(())
}

/// Those of a container's processes that are what its boost is for.
fn programs(started: &Started) -> Result<BTreeSet<u32>> {
    let is_one = |process: &u32| {
        let words = fs::read(format!("/proc/{process}/cmdline"));
        words.is_ok_and(|words| words.starts_with(b"/bin/dash\0-e\0"))
    };
    let processes = started.cgroup.processes()?;
    Ok(processes.into_iter().filter(is_one).collect())
}

fn program(bed: &mut Bed) -> Result<()> {
    let lent = format!("cpu: {LENT_CPU}, memory: {}", LENT.0);
    let policies = policy_of(
        "program",
        &format!(
            "boosts: [{{on: {{exec: dash, arguments: ['-e']}}, {lent}, until: {{exit: true, atMost: 5m}}}}]"
        ),
    );
    restart(bed, &policies)?;
    // What the program has begun goes on after it.
    let words = [
        "/bin/sh",
        "-c",
        "until [ -e /begin ]; do sleep 0.1; done; \
         /bin/dash -e -c 'until [ -e /over ]; do sleep 0.1; done & until [ -e /end ]; do sleep 0.1; done'; \
         sleep 600",
    ];
    let started = bed.machine.run(&spec("program", "program", &words))?;
    wait_guarded(&started)?;
    ensure!(!lent_cpu(&started)?, "another program is lent something");
    gate::open(&started.cgroup)?;
    wait("it is lent both", BEGUN, || {
        Ok(lent_cpu(&started)? && started.cgroup.limit("memory.max")?.bytes() == LENT)
    })?;
    wait("what it has begun is written down", BEGUN, || {
        let record = Records::containers().read(&started.id);
        let noted: BTreeSet<u32> = record
            .iter()
            .flat_map(|one| one.boosts.processes())
            .collect();
        let running = programs(&started)?;
        Ok(running.len() == 2 && running.is_subset(&noted))
    })?;
    let died = now();
    stop(bed)?;
    // It ends while there is no agent, which leaves what it has begun.
    gate::make(&started.cgroup, "/end")?;
    wait("the program has ended", BEGUN, || {
        Ok(programs(&started)?.len() == 1)
    })?;
    restart(bed, &policies)?;
    wait("the next agent knows of it", BEGUN, || {
        Ok(is_guarded_since(&started.cgroup, died))
    })?;
    // Time to end it, if that were what it does.
    thread::sleep(Duration::from_secs(2));
    ensure!(lent_cpu(&started)?, "the next agent has ended it");
    gate::make(&started.cgroup, "/over")?;
    rests(bed, &started)?;
    bed.machine.remove(&started)
}

/// Answers with a page once it is let begin, each time that it is asked.
const SERVICE: &str = "use IO::Socket::INET; select(undef, undef, undef, 0.1) until -e '/begin'; \
    my $s = IO::Socket::INET->new(Listen => 5, LocalPort => 8099, ReuseAddr => 1) or die; \
    while (my $c = $s->accept) { my $l = <$c>; print $c \"HTTP/1.1 200 OK\\r\\n\\r\\n\"; close $c }";

fn start(bed: &mut Bed) -> Result<()> {
    let boost = |until: &str| {
        let lent = format!("cpu: {LENT_CPU}, memory: {}", LENT.0);
        format!("boosts: [{{on: {{start: true}}, {lent}, until: {{{until}atMost: 5m}}}}]")
    };
    let ready = policy_of("ready", &boost("ready: {port: 8099, path: /}, "));
    let long = policy_of("long", &boost(""));
    restart(bed, &format!("{ready}---\n{long}"))?;
    let words = ["/usr/bin/perl", "-e", SERVICE];
    let service = bed.machine.run(&spec("service", "ready", &words))?;
    let words = ["/bin/sleep", "600"];
    let other = bed.machine.run(&spec("long", "long", &words))?;
    wait("both are lent it", BEGUN, || {
        Ok(lent_cpu(&service)? && lent_cpu(&other)?)
    })?;
    gate::open(&service.cgroup)?;
    rests(bed, &service)?;
    let code = bed.machine.exit_code(&service)?;
    ensure!(code.is_none(), "the service has ended with {code:?}");
    ensure!(lent_cpu(&other)?, "another's boost has ended, too");
    fs::write(POLICIES, ready)?;
    rests(bed, &other)?;
    bed.machine.remove(&service)?;
    bed.machine.remove(&other)
}
