//! `throttle`: a service that works a little at fixed times and then without a pause, its CPU limit at its mean:
//! without a limit, at the limit, at the limit with `cpu.max.burst`, and with Bellows.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::{Cgroup, field, quota::Quota},
    clock::now,
};
use bellows_core::{Bytes, Cpu, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::record::{Records, parsed, percentile, rounded};
use crate::{
    containers::{Machine, Spec, Standalone, Started, cpu_policy, said_cpu},
    load::{Pieces, PulseEnd, PulseStart},
    node::{log_text, wait},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Times that all four are run.
    #[arg(long, default_value_t = 1)]
    n: u64,
    /// Seconds of each; rounded down to whole rests and works, of which there is one at least.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Seconds of a rest and of a work, and what the first uses.
const REST_SECONDS: u64 = 15;
const WORK_SECONDS: u64 = 5;
const AT_REST: Cpu = Cpu::millis(100);
/// The mean of what it uses, rounded up to hundredths of a CPU as systemd does.
pub(super) const MEAN: Cpu = {
    let used = AT_REST.0 * REST_SECONDS + 1_000_000 * WORK_SECONDS;
    Cpu(used
        .div_ceil((REST_SECONDS + WORK_SECONDS) * 10_000)
        .saturating_mul(10_000))
};
pub(super) const MAX: Cpu = Cpu::millis(2000);
const GUARDED: &str = "throttle";
/// How long the quota may take to be at rest again.
const RESTORED: Nanos = Nanos::millis(60_000);

/// How one container went.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Outcome {
    pieces: Vec<Pieces>,
    /// Microseconds for which it was throttled by its own quota and by its pod's (`cpu.stat`).
    pub(super) throttled_us: u64,
    /// Periods in which it ran, and those that were throttled.
    periods: u64,
    throttled_periods: u64,
    /// Times that its quota was raised and lowered.
    raises: usize,
    lowerings: usize,
    /// How long after its work its quota was at rest again, in its cgroup, in its pod's and for its runtime.
    restored_after_ms: Option<u64>,
}

impl Outcome {
    /// Takes away what was counted before.
    pub(super) fn since(&mut self, before: &Self) {
        self.throttled_us -= before.throttled_us;
        self.periods -= before.periods;
        self.throttled_periods -= before.throttled_periods;
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    limit: Cpu,
    unlimited: Outcome,
    fixed: Outcome,
    /// At the limit, with `cpu.max.burst` as large as it may be.
    burst: Outcome,
    bellows: Outcome,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut machine = Machine::start()?;
    let mut agent = Standalone::start(&cpu_policy(GUARDED, MAX))?;
    let cycles = cycles_in(options.seconds);
    for index in 0..options.n {
        agent.check()?;
        let mut run = |name: &str, limit, how| {
            let name = format!("{name}-{index}");
            observe(&mut machine, &name, limit, how, cycles)
        };
        let record = Record {
            index,
            limit: MEAN,
            unlimited: run("unlimited", None, How::Alone)?,
            fixed: run("fixed", Some(MEAN), How::Alone)?,
            burst: run("burst", Some(MEAN), How::Burst)?,
            bellows: run("bellows", Some(MEAN), How::Guarded)?,
        };
        eprintln!(
            "case {index}: p99 {:.1} ms unlimited, {:.1} fixed, {:.1} burst, {:.1} bellows; throttled {}, {}, {} ms; {} raises, {} lowerings, restored {:?}",
            p99(&record.unlimited),
            p99(&record.fixed),
            p99(&record.burst),
            p99(&record.bellows),
            record.fixed.throttled_us / 1000,
            record.burst.throttled_us / 1000,
            record.bellows.throttled_us / 1000,
            record.bellows.raises,
            record.bellows.lowerings,
            record.bellows.restored_after_ms,
        );
        records.write(&record)?;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Alone,
    Burst,
    Guarded,
}

/// What runs the load so many times.
pub(super) fn pulse(cycles: u64) -> Vec<String> {
    let mut command = ["/bellows-guest", "load", "pulse", "--after-ms", "600000"]
        .map(str::to_owned)
        .to_vec();
    for (flag, value) in [
        ("--cycles", cycles),
        ("--rest-seconds", REST_SECONDS),
        ("--work-seconds", WORK_SECONDS),
    ] {
        command.extend([flag.to_owned(), value.to_string()]);
    }
    command
}

/// How often it fits into so many seconds, once at least.
pub(super) fn cycles_in(seconds: u64) -> u64 {
    (seconds / (REST_SECONDS + WORK_SECONDS)).max(1)
}

/// How long so many may take.
pub(super) fn longest(cycles: u64) -> Duration {
    Duration::from_secs(cycles * (REST_SECONDS + WORK_SECONDS) * 2 + 60)
}

fn observe(
    machine: &mut Machine,
    name: &str,
    limit: Option<Cpu>,
    how: How,
    cycles: u64,
) -> Result<Outcome> {
    let command = pulse(cycles);
    let guard = (how == How::Guarded).then(|| ("guard".to_owned(), GUARDED.to_owned()));
    let started = machine.run(&Spec {
        limit: Some(Bytes::mib(256)),
        cpu: limit,
        labels: guard.into_iter().collect(),
        ..Spec::of(name, command)
    })?;
    if let (How::Burst, Some(limit)) = (how, limit) {
        let quota = limit.quota(PERIOD).to_string();
        for cgroup in [&started.cgroup, &started.pod] {
            cgroup.write("cpu.max.burst", &quota)?;
        }
    }
    // Its start is another matter (`java`): what is measured begins when it works and the agent has seen it.
    wait("it has started", Duration::from_secs(60), || {
        Ok(said::<PulseStart>(Machine::said(&started)).is_some())
    })?;
    let before = counted(&started.cgroup, started.throttled_us()?, Vec::new())?;
    wait("its work is done", longest(cycles), || {
        let code = machine.exit_code(&started)?;
        ensure!(code.is_none(), "it has ended with {code:?}");
        Ok(said::<PulseEnd>(Machine::said(&started)).is_some())
    })?;
    let said_by_it = Machine::said(&started);
    let mut outcome = counted(&started.cgroup, started.throttled_us()?, said_by_it.clone())?;
    outcome.since(&before);
    if how == How::Guarded {
        let end = said::<PulseEnd>(said_by_it).context("it has not ended")?;
        outcome.restored_after_ms = restored_after(machine, &started, end)?;
        let log = log_text("bellows");
        let of = |reason: &str| {
            let name = format!("/{name}\"");
            let lines = log.lines().filter(|line| line.contains("CPU quota"));
            lines
                .filter(|line| line.contains(&name) && line.contains(reason))
                .count()
        };
        (outcome.raises, outcome.lowerings) = (of("reason=Throttled"), of("reason=Unused"));
    }
    machine.remove(&started)?;
    Ok(outcome)
}

/// The kernel's usual period, microseconds.
const PERIOD: u64 = 100_000;

/// The last that it said of a kind.
pub(super) fn said<T: DeserializeOwned>(said: Vec<Value>) -> Option<T> {
    said.into_iter()
        .filter_map(|value| serde_json::from_value(value).ok())
        .next_back()
}

/// What is counted of a container until now.
pub(super) fn counted(cgroup: &Cgroup, throttled_us: u64, said: Vec<Value>) -> Result<Outcome> {
    let stat = cgroup.read("cpu.stat")?;
    let of = |name| field(&stat, name).unwrap_or(0);
    Ok(Outcome {
        pieces: said
            .into_iter()
            .filter_map(|value| serde_json::from_value(value).ok())
            .collect(),
        throttled_us,
        periods: of("nr_periods"),
        throttled_periods: of("nr_throttled"),
        raises: 0,
        lowerings: 0,
        restored_after_ms: None,
    })
}

/// When its quota is what it was, everywhere; `None` if it does not come to that.
fn restored_after(machine: &Machine, started: &Started, end: PulseEnd) -> Result<Option<u64>> {
    let end = Nanos(end.end_ns);
    while now().since(end) < RESTORED {
        if has_cpu(machine, started, MEAN)? {
            return Ok(Some(now().since(end).as_millis()));
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(None)
}

/// Whether this is its CPU limit, in its cgroup, in its pod's and for its runtime.
pub(super) fn has_cpu(machine: &Machine, started: &Started, cpu: Cpu) -> Result<bool> {
    let of = |cgroup: &Cgroup| cgroup.quota().ok().flatten().map(|quota: Quota| quota.cpu);
    let said = said_cpu(machine.status(started)?);
    Ok([said, of(&started.cgroup), of(&started.pod)] == [Some(cpu); 3])
}

/// Milliseconds that a piece of work took at the 99th percentile.
pub(super) fn p99(outcome: &Outcome) -> f64 {
    let took = outcome.pieces.iter().flat_map(|pieces| &pieces.took_us);
    let took: Vec<f64> = took.map(|&us| us as f64 / 1000.0).collect();
    percentile(&took, 99.0)
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let of = |value: &dyn Fn(&Record) -> f64| -> Vec<f64> { records.iter().map(value).collect() };
    let worst = |values: &[f64]| rounded(percentile(values, 100.0));
    let throttled = |outcome: &Outcome| outcome.throttled_us as f64;
    let ratio = |with: f64, without: f64| {
        if without > 0.0 {
            with / without
        } else {
            f64::MAX
        }
    };
    let restored = records
        .iter()
        .filter(|record| record.bellows.restored_after_ms.is_some());
    Ok(json!({
        "runs": records.len(),
        "p99_ms_with": worst(&of(&|record| p99(&record.bellows))),
        "p99_ms_fixed": worst(&of(&|record| p99(&record.fixed))),
        "throttled_ms_with": worst(&of(&|record| throttled(&record.bellows) / 1000.0)),
        "throttled_ms_fixed": worst(&of(&|record| throttled(&record.fixed) / 1000.0)),
        "p99_ratio": worst(&of(&|record| ratio(p99(&record.bellows), p99(&record.unlimited)))),
        "p99_ratio_fixed": worst(&of(&|record| ratio(p99(&record.fixed), p99(&record.unlimited)))),
        "p99_ratio_burst": worst(&of(&|record| ratio(p99(&record.burst), p99(&record.unlimited)))),
        "throttled_vs_fixed": worst(&of(&|record| ratio(throttled(&record.bellows), throttled(&record.fixed)))),
        "throttled_vs_burst": worst(&of(&|record| ratio(throttled(&record.bellows), throttled(&record.burst)))),
        "raises_max": records.iter().map(|record| record.bellows.raises).max(),
        "lowerings_max": records.iter().map(|record| record.bellows.lowerings).max(),
        "restored": restored.count(),
    }))
}
