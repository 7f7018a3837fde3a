//! `learned`: the same build again and again in a container, whose limit comes to rest after each.
//!
//! The first run climbs to what it needs, by steps. The third must start right: one raise, nobody held by the memory controller,
//! and hardly more granted than it uses. Then the container is made anew, after the agent was, too: what was learnt outlives both.
//! The first build is also run three times under `bellows exec`, each time another agent.
//!
//! What is granted counts from the first raise to the end of the build, against 1.25 times the most that this run has used
//! (without page cache), for as long: unlike elsewhere not against what it has used until then, because to have it all from
//! the beginning is what is wanted here.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bellows::{clock::now, ledger::Record as LedgerRecord};
use bellows_core::{Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    container_bursts::is_at_rest,
    pod_bursts::{ledger_of, raises},
    record::{Records, parsed, rounded},
    runner::{Probe, Runner},
};
use crate::{
    containers::{Machine, Spec, Standalone, Started, policy_with},
    node::shell,
    sampler::Sample,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Builds, each of which is run four times.
    #[arg(long, default_value_t = 2)]
    n: u64,
    /// Seed of the builds.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// One build.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    limit: Bytes,
    units: u64,
    jobs: u64,
    width: u64,
}

/// Where it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Place {
    Container,
    Exec,
}

/// One run of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    place: Place,
    /// The first is 1.
    run: u64,
    /// Whether the container was made anew for it.
    is_anew: bool,
    code: i32,
    ms: u64,
    /// Of the agent's clock.
    began: Nanos,
    ended: Nanos,
    oom_kill: u64,
    raises: u64,
    sleeps: u64,
    /// The most that it has used, without page cache.
    peak: Bytes,
    /// The limit over time.
    samples: Vec<Sample>,
    /// Whether its limit came to rest.
    is_restored: bool,
    /// The agent's records of its container during the run.
    ledger: Vec<LedgerRecord>,
}

/// A build, as it says itself.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Said {
    code: i32,
    ms: u64,
}

impl Record {
    /// Granted byte-seconds over 1.25 times the peak's, from the first raise to the end.
    fn overgrant(&self) -> Option<f64> {
        let end = self.ended.0 / 1000;
        let is_raised = |sample: &&Sample| sample.limit > self.case.limit.0 && sample.at_us < end;
        let raised: Vec<&Sample> = self
            .samples
            .iter()
            // Before it has its limit at rest it has none.
            .skip_while(|sample| sample.limit > self.case.limit.0)
            .skip_while(|sample| !is_raised(sample))
            .collect();
        let first = raised.first()?.at_us;
        let mut granted = 0.0;
        for (index, sample) in raised.iter().enumerate() {
            let until = raised
                .get(index + 1)
                .map_or(end, |next| next.at_us.min(end));
            granted += sample.limit as f64 * until.saturating_sub(sample.at_us) as f64;
        }
        let used = 1.25 * self.peak.0 as f64 * (end - first) as f64;
        (used > 0.0).then(|| granted / used)
    }
}

const MAX: Bytes = Bytes::mib(3072);
const LIMIT: Bytes = Bytes::mib(64);
const GUARDED: &str = "learned";
/// Runs in one container.
const RUNS: u64 = 3;
/// A build that takes longer is taken for stuck.
const LONGEST: Duration = Duration::from_secs(300);
/// The same for a limit that does not come down: one that was raised for page cache is kept for a minute.
const RESTORE: Duration = Duration::from_secs(120);
/// What follows sooner is taken for a part of the run before.
const BETWEEN: Duration = Duration::from_secs(12);
const LOOK: Duration = Duration::from_millis(40);

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut machine = Machine::start()?;
    let rules = policy_with(GUARDED, MAX, Nanos::millis(3000));
    let runner = Runner::new()?;
    let probe = runner.probe().clone();
    // Compiler and headers come from the disk into page cache that belongs to no container.
    shell("make --silent -C /build-load -j2 O=/tmp/warm /tmp/warm/unit-1.o /tmp/warm/main.o")?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    let cases: Vec<Case> = (0..options.n)
        .map(|index| Case {
            index,
            seed: options.seed,
            limit: LIMIT,
            units: random.u64(3..=5),
            jobs: random.u64(2..=4),
            width: random.u64(20..=40),
        })
        .collect();
    for run in 1..=RUNS {
        if let Some(case) = cases.first() {
            write(records, &build_alone(&runner, *case, run)?)?;
        }
    }
    let mut agent = Standalone::start(&rules)?;
    for case in &cases {
        let started = start(&mut machine, *case)?;
        for run in 1..=RUNS {
            agent.check()?;
            write(records, &build(&machine, &probe, &started, *case, run)?)?;
            thread::sleep(BETWEEN);
        }
        machine.remove(&started)?;
    }
    agent.kill_all()?;
    let mut agent = Standalone::start(&rules)?;
    for case in &cases {
        let started = start(&mut machine, *case)?;
        agent.check()?;
        write(
            records,
            &build(&machine, &probe, &started, *case, RUNS + 1)?,
        )?;
        machine.remove(&started)?;
    }
    Ok(())
}

fn write(records: &mut Records, record: &Record) -> Result<()> {
    eprintln!(
        "case {} in {:?} run {}: code {}, {} ms, peak {}, {} raises, {} sleeps, overgrant {:?}, restored {}",
        record.case.index,
        record.place,
        record.run,
        record.code,
        record.ms,
        record.peak,
        record.raises,
        record.sleeps,
        record.overgrant(),
        record.is_restored,
    );
    records.write(record)
}

/// The container of a build, under the same name each time. Each of its builds begins when there is a file with its number.
fn start(machine: &mut Machine, case: Case) -> Result<Started> {
    let Case {
        index,
        units,
        jobs,
        width,
        limit,
        ..
    } = case;
    let script = format!(
        "i=1; while true; do while [ ! -e /tmp/{GUARDED}-{index}.$i ]; do sleep 0.1; done; s=$(date +%s%3N); \
         make --silent -C /build-load UNITS={units} WIDTH={width} -j{jobs} O=/tmp/{GUARDED}-{index}-$i 1>&2; c=$?; \
         e=$(date +%s%3N); rm -rf /tmp/{GUARDED}-{index}-$i /tmp/{GUARDED}-{index}.$i; \
         echo \"{{\\\"code\\\":$c,\\\"ms\\\":$((e-s))}}\"; i=$((i+1)); done"
    );
    let words = ["/bellows-guest", "load", "chroot", "/host", "sh", "-c"];
    let mut command = words.map(str::to_owned).to_vec();
    command.push(script);
    let started = machine.run(&Spec {
        limit: Some(limit),
        binds: vec![("/host", "/")],
        labels: vec![("guard".to_owned(), GUARDED.to_owned())],
        ..Spec::of(&format!("{GUARDED}-{index}"), command)
    })?;
    // Time for the agent to adopt it.
    thread::sleep(Duration::from_secs(3));
    Ok(started)
}

/// Has it built once, and waits for its limit at rest.
fn build(
    machine: &Machine,
    probe: &Probe,
    started: &Started,
    case: Case,
    run: u64,
) -> Result<Record> {
    let is_anew = run > RUNS;
    let number = if is_anew { 1 } else { run };
    let watched = started.cgroup.clone();
    let sampler = probe.sample(move || Some(watched.clone()));
    let before = started.cgroup.events()?.oom_kill;
    // Of its builds, and of a container of that name before it.
    let said_before = Machine::said(started).len();
    let began = now();
    fs::write(format!("/tmp/{GUARDED}-{}.{number}", case.index), "")?;
    let mut peak = Bytes::ZERO;
    let start = Instant::now();
    let said: Said = loop {
        let mut all = Machine::said(started).into_iter();
        if let Some(said) = all.nth(said_before) {
            break serde_json::from_value(said)?;
        }
        if let Some(code) = machine.exit_code(started)? {
            break Said { code, ms: 0 };
        }
        ensure!(
            start.elapsed() < LONGEST,
            "build {} does not end",
            case.index
        );
        if let Ok(stat) = started.cgroup.stat() {
            peak = peak.max(stat.demand());
        }
        thread::sleep(LOOK);
    };
    let ended = now();
    let start = Instant::now();
    let mut is_restored = false;
    while said.code == 0 && !is_restored && start.elapsed() < RESTORE {
        thread::sleep(Duration::from_millis(100));
        is_restored = is_at_rest(machine, started, Some(case.limit))?;
    }
    let track = sampler.finish();
    let ledger = ledger_of(started.cgroup.id());
    let is_meant = |record: &LedgerRecord| (began..ended).contains(&record.at());
    let ledger: Vec<LedgerRecord> = ledger.into_iter().filter(is_meant).collect();
    Ok(Record {
        case,
        place: Place::Container,
        raises: u64::try_from(raises(&ledger).count())?,
        run,
        is_anew,
        code: said.code,
        ms: said.ms,
        began,
        ended,
        oom_kill: track.oom_kill.saturating_sub(before),
        sleeps: track.sleeps,
        peak,
        samples: track.samples,
        is_restored,
        ledger,
    })
}

/// Has it built under `bellows exec`.
fn build_alone(runner: &Runner, case: Case, run: u64) -> Result<Record> {
    let Case {
        units,
        width,
        jobs,
        limit,
        ..
    } = case;
    let out = format!("/tmp/{GUARDED}-exec");
    let words =
        format!("make --silent -C /build-load UNITS={units} WIDTH={width} -j{jobs} O={out}");
    let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    let began = now();
    let outcome = runner.bellows_again(limit, MAX, &[], &words)?;
    shell(&format!("rm -rf {out}"))?;
    let report = &outcome.report["report"];
    let number = |name: &str| report[name].as_u64().with_context(|| format!("no {name}"));
    Ok(Record {
        case,
        place: Place::Exec,
        run,
        is_anew: run > 1,
        code: outcome.code,
        ms: outcome.wall_us / 1000,
        began,
        ended: Nanos(began.0 + outcome.wall_us * 1000),
        oom_kill: outcome.oom_kill,
        raises: number("raises")?,
        sleeps: outcome.sleeps,
        peak: Bytes(number("peak_demand")?),
        samples: outcome.samples,
        // Its cgroup is gone.
        is_restored: true,
        ledger: Vec::new(),
    })
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let at = |place: Place, run: u64| {
        let meant = move |record: &&Record| record.place == place && record.run == run;
        records.iter().filter(meant)
    };
    let of = |run: u64| at(Place::Container, run);
    let raises = |run: u64| of(run).map(|record| record.raises).max();
    let exec = |run: u64| at(Place::Exec, run).next();
    let overgrant = |run: u64| -> Result<f64> {
        let all = of(run).map(|record| record.overgrant().context("a run was never raised"));
        let all = all.collect::<Result<Vec<f64>>>()?;
        Ok(rounded(all.into_iter().fold(0.0, f64::max)))
    };
    Ok(json!({
        "builds": of(RUNS).count(),
        "patches": raises(RUNS),
        "sleeps": of(RUNS).map(|record| record.sleeps).max(),
        "overgrant": overgrant(RUNS)?,
        "patches_first": raises(1),
        "sleeps_first": of(1).map(|record| record.sleeps).max(),
        "overgrant_first": overgrant(1)?,
        "patches_anew": raises(RUNS + 1),
        "sleeps_anew": of(RUNS + 1).map(|record| record.sleeps).max(),
        "overgrant_anew": overgrant(RUNS + 1)?,
        "exec_raises_first": exec(1).map(|record| record.raises),
        "exec_raises": exec(RUNS).map(|record| record.raises),
        "exec_sleeps": exec(RUNS).map(|record| record.sleeps),
        "exec_overgrant": exec(RUNS).and_then(Record::overgrant).map(rounded),
        "failed": records.iter().filter(|record| record.code != 0 || record.oom_kill > 0).count(),
        "restored": records.iter().filter(|record| record.is_restored).count(),
        "runs": records.len(),
    }))
}
