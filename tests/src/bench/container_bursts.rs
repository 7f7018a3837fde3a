//! `container-bursts`: bursts in containers on a real containerd without Kubernetes; every raise goes through the
//! runtime (CRI).

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit},
    clock::now,
    cri::memory_limit,
    ledger::Record as LedgerRecord,
};
use bellows_core::{Action, Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::{burst_words, log_uniform, mib, overgrant, thousandths},
    excused::{self, Ended},
    gate,
    movers::Movers,
    pod_bursts::{answers, ledger_of, raises},
    record::{Records, fate, parsed, percentile, rounded},
    runner::{HugePages, Probe, set_thp},
};
use crate::{
    containers::{Machine, Spec, Standalone, Started, policy},
    load::BurstResult,
    sampler::Sample,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Cases.
    #[arg(long, default_value_t = 20)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Which cases run with transparent huge pages.
    #[arg(long, value_enum, default_value_t)]
    thp: HugePages,
    /// Processes that move between cgroups without end, while which freezes come late.
    #[arg(long, default_value_t = 0)]
    movers: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    limit: Bytes,
    peak: Bytes,
    max: Bytes,
    threads: u64,
    thp: bool,
}

/// How one container went.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Outcome {
    exit_code: Option<i32>,
    oom_kill: u64,
    sleeps: u64,
    wall_ms: u64,
    /// What its burst said of itself.
    said: Option<BurstResult>,
    /// The longest time for which a CPU of the machine stood still while it grew.
    stood_still_us: u64,
    /// The same shortly before it was killed.
    #[serde(default)]
    stood_still_before_kill_us: u64,
    samples: Vec<Sample>,
    /// How long after its burst its limit was the original again, in its cgroup, in its pod's and for its runtime.
    restored_after_ms: Option<u64>,
    ledger: Vec<LedgerRecord>,
}

impl Outcome {
    fn killed(&self) -> bool {
        self.oom_kill > 0 || self.exit_code.is_some_and(|code| code != 0)
    }

    fn raises(&self) -> impl Iterator<Item = (Nanos, Bytes)> {
        raises(&self.ledger)
    }

    /// Whether it was braked below what it used, which nobody is woken from.
    fn was_braked(&self) -> bool {
        let is_brake = |record: &LedgerRecord| {
            matches!(
                record,
                LedgerRecord::Intend {
                    action: Action::Brake { .. },
                    ..
                }
            )
        };
        self.ledger.iter().any(is_brake)
    }

    /// What its raises took, in microseconds.
    fn answers(&self) -> Vec<u64> {
        answers(self.raises(), &self.samples)
    }
}

impl Ended for Outcome {
    fn killed(&self) -> bool {
        self.killed()
    }

    fn stood_still(&self) -> Nanos {
        Nanos(self.stood_still_before_kill_us * 1000)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    unlimited: Outcome,
    fixed: Outcome,
    bellows: Outcome,
    /// Runs with Bellows that ended with a kill while the machine itself stood still.
    #[serde(default)]
    stood_still: Vec<Outcome>,
    /// Of processes between cgroups, meanwhile.
    #[serde(default)]
    moves: u64,
}

/// A container that takes longer is taken for stuck.
const LONGEST: Nanos = Nanos::millis(180_000);
/// The same for a limit that does not come down.
const RESTORE_LIMIT: Nanos = Nanos::millis(60_000);
/// The label of those that are guarded.
const GUARDED: &str = "bursts";

fn cases(options: &Options) -> Vec<Case> {
    let mut random = fastrand::Rng::with_seed(options.seed);
    let thp = random.bool();
    (0..options.n)
        .map(|index| {
            let limit = mib(log_uniform(&mut random, 32.0, 192.0));
            let growth = log_uniform(&mut random, 2.0, 12.0);
            let peak = limit.per_mille(thousandths(growth)).min(Bytes::mib(1024));
            Case {
                index,
                seed: options.seed,
                limit,
                peak,
                max: Bytes::mib(2048),
                threads: random.u64(1..=8),
                thp: options.thp.in_turn(index, thp),
            }
        })
        .collect()
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut machine = Machine::start()?;
    let mut agent = Standalone::start(&policy(GUARDED, Bytes::mib(2048)))?;
    let probe = Probe::start()?;
    let movers = Movers::start(options.movers)?;
    for case in cases(options) {
        set_thp(case.thp)?;
        agent.check()?;
        let moves = movers.moves();
        let mut record = run_case(&mut machine, &probe, case)?;
        record.moves = movers.moves() - moves;
        ensure!(
            options.movers == 0 || record.moves > 0,
            "nothing was moved meanwhile"
        );
        eprintln!(
            "case {}: limit {}, peak {}, {} threads, thp {}: fixed {}, bellows {} ({} raises, {:?} ms, {} sleeps, restored {:?})",
            case.index,
            case.limit,
            case.peak,
            case.threads,
            case.thp,
            fate(record.fixed.killed(), "killed"),
            fate(record.bellows.killed(), "KILLED"),
            record.bellows.raises().count(),
            record
                .bellows
                .answers()
                .iter()
                .map(|us| us / 1000)
                .collect::<Vec<_>>(),
            record.bellows.sleeps,
            record.bellows.restored_after_ms,
        );
        records.write(&record)?;
    }
    Ok(())
}

fn run_case(machine: &mut Machine, probe: &Probe, case: Case) -> Result<Record> {
    let mut variant = |name: &str, limit: Bytes, is_guarded: bool, before: usize| {
        let words = burst_words(case.limit.per_mille(500), case.peak, case.threads);
        let rest = ["--rest-ms", "2000"].map(str::to_owned);
        let mut command: Vec<String> = ["/bellows-guest", "load"].map(str::to_owned).to_vec();
        command.extend(words.into_iter().chain(rest));
        let mut labels = Vec::new();
        if is_guarded {
            labels.push(("guard".to_owned(), GUARDED.to_owned()));
            command.extend(["--after-ms", "120000"].map(str::to_owned));
            command.extend(gate::closed());
        }
        let spec = Spec {
            name: excused::name(name, case.index, before),
            container: None,
            limit: Some(limit),
            pod_limit: None,
            cpu: None,
            command,
            binds: Vec::new(),
            labels,
        };
        observe(machine, probe, &spec, is_guarded)
    };
    let unlimited = variant("unlimited", case.max, false, 0)?;
    let fixed = variant("fixed", case.limit, false, 0)?;
    let (bellows, stood_still) =
        excused::repeated(|before| variant("bellows", case.limit, true, before))?;
    Ok(Record {
        case,
        unlimited,
        fixed,
        bellows,
        stood_still,
        moves: 0,
    })
}

/// Runs a container to its end or, a guarded one, until its limit is the original again, and observes it from
/// outside.
fn observe(machine: &mut Machine, probe: &Probe, spec: &Spec, is_guarded: bool) -> Result<Outcome> {
    let started = machine.run(spec)?;
    let watched = started.cgroup.clone();
    let sampler = probe.sample(move || Some(watched.clone()));
    let start = now();
    if is_guarded {
        gate::open_when_braked(&started.cgroup)?;
    }
    let (exit_code, restored_after_ms) = wait_end(machine, &started, spec, is_guarded)?;
    let wall_ms = now().since(start).as_millis();
    let track = sampler.finish();
    let said = said(&started);
    let stood_still = said.map_or(Nanos(0), |said| {
        let began = said.end_ns.saturating_sub(said.growth_us * 1000);
        probe.stood_still_within(Nanos(began), Nanos(said.end_ns))
    });
    let before_kill = probe.stood_still_before_kill(&track);
    let outcome = Outcome {
        exit_code,
        oom_kill: track.oom_kill,
        sleeps: track.sleeps,
        wall_ms,
        said,
        stood_still_us: stood_still.0 / 1000,
        stood_still_before_kill_us: before_kill.0 / 1000,
        samples: track.samples,
        restored_after_ms,
        ledger: if is_guarded {
            ledger_of(started.cgroup.id())
        } else {
            Vec::new()
        },
    };
    machine.remove(&started)?;
    Ok(outcome)
}

/// What its burst has said, when it is over.
pub(super) fn said(started: &Started) -> Option<BurstResult> {
    let mut values = Machine::said(started).into_iter();
    values.find_map(|value| serde_json::from_value(value).ok())
}

fn wait_end(
    machine: &Machine,
    started: &Started,
    spec: &Spec,
    is_guarded: bool,
) -> Result<(Option<i32>, Option<u64>)> {
    let start = now();
    while now().since(start) < LONGEST {
        thread::sleep(Duration::from_millis(100));
        if let Some(code) = machine.exit_code(started)? {
            return Ok((Some(code), None));
        }
        let Some(said) = said(started).filter(|_| is_guarded) else {
            continue;
        };
        let after = now().since(Nanos(said.end_ns));
        if is_at_rest(machine, started, spec.limit)? {
            return Ok((None, Some(after.as_millis())));
        }
        if after > RESTORE_LIMIT {
            return Ok((None, None));
        }
    }
    Ok((None, None))
}

/// Whether cgroup, pod and runtime all have the limit that the container was made with.
pub(super) fn is_at_rest(
    machine: &Machine,
    started: &Started,
    limit: Option<Bytes>,
) -> Result<bool> {
    Ok(limits(machine, started)? == [limit; 3])
}

/// The limits that its runtime, its cgroup and its pod's have.
pub(super) fn limits(machine: &Machine, started: &Started) -> Result<[Option<Bytes>; 3]> {
    let resources = machine.status(started)?.resources;
    let said = resources.and_then(|resources| memory_limit(&resources.linux?));
    let of = |cgroup: &Cgroup| cgroup.limit("memory.max").map(Limit::bytes).ok();
    Ok([said, of(&started.cgroup), of(&started.pod)])
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let count =
        |matches: &dyn Fn(&Record) -> bool| records.iter().filter(|record| matches(record)).count();
    let (mut stalls, mut answers, mut overgrants) = (Vec::new(), Vec::new(), Vec::new());
    for Record {
        case,
        unlimited,
        bellows,
        ..
    } in &records
    {
        let took = bellows.answers();
        answers.extend(took.iter().map(|&us| us as f64 / 1e6));
        overgrants.extend(overgrant(&bellows.samples, case.limit));
        let gap = |outcome: &Outcome| outcome.said.map(|said| said.longest_gap_us);
        if let (Some(with), Some(without), Some(&slowest)) =
            (gap(bellows), gap(unlimited), took.iter().max())
        {
            // One answer is short beside a pause of the machine, in which nobody could grow.
            let stall = with
                .saturating_sub(without)
                .saturating_sub(bellows.stood_still_us);
            stalls.push(stall as f64 / slowest.max(1) as f64);
        }
    }
    let raises = records.iter().map(|record| record.bellows.raises().count());
    let sleeps = records.iter().map(|record| record.bellows.sleeps);
    let p = |values: &[f64], percent| rounded(percentile(values, percent));
    Ok(json!({
        "bursts": records.len(),
        "kills_without": count(&|record| record.fixed.killed()),
        "kills_with": count(&|record| record.bellows.killed()),
        "kills_unlimited": count(&|record| record.unlimited.killed()),
        "raises_max": raises.max(),
        "sleeps_max": sleeps.max(),
        "stall_vs_cri_p50": p(&stalls, 50.0),
        "stall_vs_cri_max": p(&stalls, 100.0),
        "moves": records.iter().map(|record| record.moves).sum::<u64>(),
        "braked": count(&|record| record.bellows.was_braked()),
        "stood_still": records.iter().map(|record| record.stood_still.len()).sum::<usize>(),
        "cri_seconds_p50": p(&answers, 50.0),
        "cri_seconds_max": p(&answers, 100.0),
        "restored": count(&|record| record.bellows.restored_after_ms.is_some()),
        "overgrant_p50": p(&overgrants, 50.0),
    }))
}
