//! `container-build`: the C++ build in containers without Kubernetes, at a quarter of the memory that it needs.
//!
//! It is built without a limit in the way (its time and its peak), at a fixed limit of a quarter of that peak, and
//! guarded; then a second time in the same container, after its limit has come down (which must not have cost it the
//! page cache that the build lives from) and where it was kept. Last come cycles of a part of the build and a
//! shrink, in which nothing may be killed.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bellows::ledger::Record as LedgerRecord;
use bellows_core::{Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    container_bursts::is_at_rest,
    pod_bursts::ledger_of,
    record::{Records, parsed, rounded},
    runner::Probe,
};
use crate::{
    containers::{Machine, Spec, Standalone, Started, policy_with},
    node::shell,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Cycles of a part of the build and a shrink.
    #[arg(long, default_value_t = 50)]
    n: u64,
    /// Translation units, 3 at least.
    #[arg(long, default_value_t = 12)]
    units: u64,
}

/// One build in a container, as it says itself.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Build {
    code: i32,
    ms: u64,
}

/// What happened in a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Outcome {
    /// Builds that were asked for.
    asked: u64,
    limit: Bytes,
    /// In their order; the second only after the limit was at rest again, or at once.
    builds: Vec<Build>,
    oom_kill: u64,
    peak: Bytes,
    highest_limit: Bytes,
    /// Milliseconds from the end of each build to its limit at rest.
    restored_ms: Vec<Option<u64>>,
    /// The agent's records of it.
    ledger: Vec<LedgerRecord>,
}

impl Outcome {
    fn passed(&self) -> bool {
        // One that ended before its builds has passed nothing.
        self.oom_kill == 0
            && self.builds.len() as u64 == self.asked
            && self.builds.iter().all(|build| build.code == 0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Part {
    Unlimited,
    Fixed,
    Shrunk,
    Kept,
    Cycles,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    part: Part,
    outcome: Outcome,
}

const ROOMY: Bytes = Bytes::mib(3500);
const MAX: Bytes = Bytes::mib(3072);
/// The limit of the cycles, less than half of what the compiler needs for one unit.
const SMALL: Bytes = Bytes::mib(64);
/// A build that takes longer is taken for stuck.
const LONGEST: Duration = Duration::from_secs(900);
/// The same for a limit that does not come down: one that was raised for page cache is kept for a minute.
const RESTORE: Duration = Duration::from_secs(120);

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let machine = Machine::start()?;
    let shrinking = policy_with("shrinking", MAX, Nanos::millis(3000));
    let keeping = policy_with("keeping", MAX, Nanos::millis(3_600_000));
    let agent = Standalone::start(&format!("{shrinking}---\n{keeping}"))?;
    let mut bench = Bench {
        machine,
        agent,
        probe: Probe::start()?,
        units: options.units,
    };
    // Compiler and headers come from the disk into page cache that belongs to no container.
    shell("make --silent -C /build-load -j2 O=/tmp/warm /tmp/warm/unit-1.o /tmp/warm/main.o")?;
    let mut write = |part, outcome: Outcome| records.write(&Record { part, outcome });
    let unlimited = bench.build("unlimited", ROOMY, None, 1, "")?;
    let limit = unlimited.peak.scaled(1, 4).page_floor();
    write(Part::Unlimited, unlimited)?;
    write(Part::Fixed, bench.build("fixed", limit, None, 1, "")?)?;
    let shrunk = bench.build("shrunk", limit, Some("shrinking"), 2, "")?;
    write(Part::Shrunk, shrunk)?;
    let kept = bench.build("kept", limit, Some("keeping"), 2, "")?;
    write(Part::Kept, kept)?;
    let part = "/tmp/$o/unit-1.o";
    let cycles = bench.build("cycles", SMALL, Some("shrinking"), options.n, part)?;
    write(Part::Cycles, cycles)
}

struct Bench {
    machine: Machine,
    agent: Standalone,
    probe: Probe,
    units: u64,
}

impl Bench {
    /// Builds `targets` so many times in one container.
    fn build(
        &mut self,
        name: &str,
        limit: Bytes,
        guard: Option<&str>,
        times: u64,
        targets: &str,
    ) -> Result<Outcome> {
        self.agent.check()?;
        eprintln!("build {name}: {times} times, limit {limit}");
        // Each build but the first waits for a file with its number; the first gives the agent time to adopt.
        let units = self.units;
        let script = format!(
            "sleep 3; i=0; while [ $i -lt {times} ]; do while [ $i -gt 0 ] && [ ! -e /tmp/{name}.$i ]; do sleep 0.1; done; \
             o={name}-$i; s=$(date +%s%3N); make --silent -C /build-load UNITS={units} -j8 O=/tmp/$o {targets} 1>&2; c=$?; \
             e=$(date +%s%3N); echo \"{{\\\"code\\\":$c,\\\"ms\\\":$((e-s))}}\"; rm -rf /tmp/$o; i=$((i+1)); done; sleep 600"
        );
        let words = ["/bellows-guest", "load", "chroot", "/host", "sh", "-c"];
        let mut command = words.map(str::to_owned).to_vec();
        command.push(script);
        let labels = guard.map(|guard| ("guard".to_owned(), guard.to_owned()));
        let spec = Spec {
            name: name.to_owned(),
            container: None,
            limit: Some(limit),
            pod_limit: None,
            cpu: None,
            command,
            binds: vec![("/host", "/")],
            labels: labels.into_iter().collect(),
        };
        let started = self.machine.run(&spec)?;
        let watched = started.cgroup.clone();
        let sampler = self.probe.sample(move || Some(watched.clone()));
        let mut outcome = Outcome {
            asked: times,
            limit,
            builds: Vec::new(),
            oom_kill: 0,
            peak: Bytes::ZERO,
            highest_limit: limit,
            restored_ms: Vec::new(),
            ledger: Vec::new(),
        };
        for number in 1..=times {
            let Some(build) = self.wait_build(&started, number)? else {
                break;
            };
            outcome.builds.push(build);
            if guard == Some("shrinking") {
                let restored = self.wait_rest(&started, limit)?;
                outcome.restored_ms.push(restored);
            }
            fs::write(format!("/tmp/{name}.{number}"), "")?;
        }
        outcome.peak = started.cgroup.peak()?.unwrap_or(Bytes::ZERO);
        let track = sampler.finish();
        outcome.oom_kill = track.oom_kill;
        let limits = track.samples.iter().map(|sample| Bytes(sample.limit));
        outcome.highest_limit = limits.fold(limit, Bytes::max);
        eprintln!(
            "build {name}: {:?}, {} kills, peak {}, at most {}, restored after {:?} ms",
            outcome.builds,
            outcome.oom_kill,
            outcome.peak,
            outcome.highest_limit,
            outcome.restored_ms
        );
        outcome.ledger = ledger_of(started.cgroup.id());
        self.machine.remove(&started)?;
        Ok(outcome)
    }

    /// Waits for the end of a build; `None` if its container has ended before.
    fn wait_build(&self, started: &Started, number: u64) -> Result<Option<Build>> {
        let start = Instant::now();
        loop {
            let mut builds = Machine::said(started).into_iter();
            let build = builds.nth(usize::try_from(number - 1)?);
            if let Some(build) = build {
                return Ok(Some(serde_json::from_value(build)?));
            }
            if self.machine.exit_code(started)?.is_some() {
                return Ok(None);
            }
            ensure!(start.elapsed() < LONGEST, "build {number} does not end");
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn wait_rest(&self, started: &Started, limit: Bytes) -> Result<Option<u64>> {
        let start = Instant::now();
        while start.elapsed() < RESTORE {
            if is_at_rest(&self.machine, started, Some(limit))? {
                return Ok(Some(u64::try_from(start.elapsed().as_millis())?));
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(None)
    }
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let find = |part| {
        let found = records.iter().find(|record| record.part == part);
        found
            .map(|record| &record.outcome)
            .context("a part of the bench is missing")
    };
    let (unlimited, fixed) = (find(Part::Unlimited)?, find(Part::Fixed)?);
    let (shrunk, kept, cycles) = (find(Part::Shrunk)?, find(Part::Kept)?, find(Part::Cycles)?);
    let ms = |outcome: &Outcome, nth: usize| {
        outcome
            .builds
            .get(nth)
            .map_or(f64::NAN, |build| build.ms as f64)
    };
    let ratio = |a: f64, b: f64| (b > 0.0 && a.is_finite()).then(|| rounded(a / b));
    Ok(json!({
        "passed_unlimited": unlimited.passed(),
        "passed_without": fixed.passed(),
        "passed_with": shrunk.passed() && kept.passed(),
        "time_ratio": ratio(ms(shrunk, 0), ms(unlimited, 0)),
        "second_build_ratio": ratio(ms(shrunk, 1), ms(kept, 1)),
        "kills_shrinking": cycles.oom_kill + shrunk.oom_kill,
        "cycles": cycles.builds.len(),
        "cycles_passed": cycles.builds.iter().filter(|build| build.code == 0).count(),
        "cycles_restored": cycles.restored_ms.iter().flatten().count(),
        "cycles_raised": cycles.highest_limit > cycles.limit,
        "limit": shrunk.limit,
        "peak": unlimited.peak,
        "highest_limit": shrunk.highest_limit,
    }))
}
