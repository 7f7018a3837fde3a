//! `bursts`: does a burst that a fixed limit kills survive under `bellows exec`, and at what cost?
//!
//! Each case is one burst run three times in one boot, in random order: without a limit (its
//! time), at the fixed limit (its death), under Bellows. Times are compared within the case only.

use anyhow::Result;
use bellows::cgroup::Limit;
use bellows_core::{Bytes, Signals, Thresholds};
use clap::{Args, ValueEnum as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    excused,
    record::{Records, fate, parsed, percentile, rounded},
    runner::{HugePages, Outcome, Runner, set_thp},
    swap::Swap,
};
use crate::{
    load::{BurstResult, Kind},
    sampler::Sample,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Cases.
    #[arg(long, default_value_t = 60)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Milliseconds by which each raise is held back.
    #[arg(long)]
    actuation_delay_ms: Option<u64>,
    /// What grows: one kind, or `all` in turns.
    #[arg(long, value_parser = parse_kinds, default_value = "anonymous")]
    kind: Kinds,
    /// Which cases run with transparent huge pages.
    #[arg(long, value_enum, default_value_t)]
    thp: HugePages,
    /// Guard from cgroup files, without kernel programs.
    #[arg(long)]
    without_bpf: bool,
    /// Leave out the run without a limit, and with it what is compared with it.
    #[arg(long)]
    without_unlimited: bool,
    /// Leave the first cases out: they have been recorded.
    #[arg(long, default_value_t = 0)]
    skip: usize,
    /// With swap, the size of the guest's memory.
    #[arg(long)]
    swap: Option<Swap>,
}

/// The kinds of growth that take turns.
#[derive(Clone, Debug)]
pub(super) struct Kinds(pub(super) Vec<Kind>);

pub(super) fn parse_kinds(text: &str) -> Result<Kinds, String> {
    if text == "all" {
        Ok(Kinds(Kind::value_variants().to_vec()))
    } else {
        Kind::from_str(text, false).map(|kind| Kinds(vec![kind]))
    }
}

/// One burst.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    limit: Bytes,
    peak: Bytes,
    max: Bytes,
    kind: Kind,
    threads: u64,
    thp: bool,
    delay_ms: u64,
    without_bpf: bool,
    without_unlimited: bool,
    swap: Option<Swap>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    /// `None` if it was left out.
    unlimited: Option<Outcome>,
    fixed: Outcome,
    bellows: Outcome,
    /// Runs that ended with a kill while the machine itself stood still, and say nothing.
    #[serde(default)]
    stood_still: Vec<Outcome>,
}

const LARGEST_PEAK: Bytes = Bytes::mib(2048);
/// CPUs of the guest.
const CPUS: u64 = 2;

impl Case {
    /// Whether a brake can hold it until a late answer is there. What grows inside a system call is not
    /// frozen. A huge page that is charged there does not sleep, so that anything may be left below the limit
    /// when none fits any more; of small pages the kernel charges each thread for up to two batches before it
    /// sleeps for the first time.
    fn brake_suffices(&self) -> bool {
        let batches = Bytes::from_pages(2 * 64).scaled(self.threads, 1);
        let watermark = Thresholds::of(self.limit, CPUS, Signals::Programs).watermark;
        let has_huge_pages = self.thp && self.kind == Kind::Populate;
        let has_room = self.limit.minus(watermark) >= batches;
        !self.kind.grows_in_system_calls() || (has_room && !has_huge_pages)
    }
}

fn cases(options: &Options) -> Vec<Case> {
    let mut random = fastrand::Rng::with_seed(options.seed);
    let thp = random.bool();
    let Kinds(kinds) = &options.kind;
    let turns = kinds.len() as u64;
    (0..options.n)
        .zip(kinds.iter().cycle())
        .map(|(index, &kind)| {
            let limit = log_uniform(&mut random, 32.0, 256.0);
            let growth = log_uniform(&mut random, 2.0, 16.0);
            let limit = mib(limit);
            let peak = limit.per_mille(thousandths(growth)).min(LARGEST_PEAK);
            Case {
                index,
                seed: options.seed,
                limit,
                peak,
                max: peak.per_mille(1500),
                kind,
                threads: random.u64(1..=8),
                thp: options.thp.in_turn(index / turns, thp),
                delay_ms: options.actuation_delay_ms.unwrap_or(0),
                without_bpf: options.without_bpf,
                without_unlimited: options.without_unlimited,
                swap: options.swap,
            }
        })
        .collect()
}

pub(super) fn log_uniform(random: &mut fastrand::Rng, low: f64, high: f64) -> f64 {
    (low.ln() + random.f64() * (high.ln() - low.ln())).exp()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a positive size below 2^20 MiB"
)]
pub(super) fn mib(value: f64) -> Bytes {
    Bytes((value * 1_048_576.0) as u64 / 4096 * 4096)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a positive factor below 1000"
)]
pub(super) fn thousandths(value: f64) -> u64 {
    (value * 1000.0) as u64
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let runner = Runner::new()?;
    if let Some(swap) = options.swap {
        swap.on()?;
    }
    for case in cases(options).into_iter().skip(options.skip) {
        let record = run_case(&runner, case)?;
        eprintln!(
            "case {}: {:?}, limit {}, peak {}, {} threads, thp {}: fixed {}, bellows {} ({} sleeps) {}",
            case.index,
            case.kind,
            case.limit,
            case.peak,
            case.threads,
            case.thp,
            fate(record.fixed.killed(), "killed"),
            fate(record.bellows.killed(), "KILLED"),
            record.bellows.sleeps,
            record.bellows.stderr,
        );
        if record.bellows.killed() {
            eprintln!("{}", last_seconds(&record.bellows));
        }
        records.write(&record)?;
    }
    Ok(())
}

/// What became of one that was killed, for whoever has nothing but this.
fn last_seconds(outcome: &Outcome) -> String {
    let last = outcome.samples.iter().rev().take(24).rev();
    let last: Vec<String> = last
        .map(|sample| {
            let Sample { at_us, limit, peak } = *sample;
            format!("{} ms {}/{}", at_us / 1000, Bytes(peak), Bytes(limit))
        })
        .collect();
    format!(
        "killed at {} ms, a CPU stood still for {} ms at most, peak/limit: {}; report {}",
        outcome.killed_at_ns / 1_000_000,
        outcome.stood_still_us / 1000,
        last.join(", "),
        outcome.report
    )
}

fn run_case(runner: &Runner, case: Case) -> Result<Record> {
    set_thp(case.thp)?;
    let mut words = burst_words(case.limit.per_mille(500), case.peak, case.threads).to_vec();
    words.extend(["--kind".to_owned(), case.kind.text()]);
    let load = runner.load(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let delay = case.delay_ms.to_string();
    let mut options: Vec<String> = if case.delay_ms > 0 {
        vec!["--actuation-delay-ms".to_owned(), delay]
    } else {
        Vec::new()
    };
    if case.without_bpf {
        options.push("--without-bpf".to_owned());
    }
    let mut order = [0, 1, 2];
    fastrand::Rng::with_seed(case.seed ^ 0x0bde_4b1e ^ (case.index << 32)).shuffle(&mut order);
    let (mut unlimited, mut fixed, mut bellows) = (None, Outcome::default(), Outcome::default());
    let mut stood_still = Vec::new();
    for variant in order {
        match variant {
            0 if case.without_unlimited => {}
            0 => unlimited = Some(runner.fixed(Limit::Max, &load)?),
            1 => fixed = runner.fixed(Limit::At(case.limit), &load)?,
            _ => {
                let run = |_| runner.bellows(case.limit, case.max, &options, &load);
                (bellows, stood_still) = excused::repeated(run)?;
            }
        }
    }
    Ok(Record {
        case,
        unlimited,
        fixed,
        bellows,
        stood_still,
    })
}

/// The load `burst`.
pub(super) fn burst_words(rest: Bytes, peak: Bytes, threads: u64) -> [String; 7] {
    let (rest, peak, threads) = (rest.0.to_string(), peak.0.to_string(), threads.to_string());
    [
        "burst",
        "--rest",
        &rest,
        "--peak",
        &peak,
        "--threads",
        &threads,
    ]
    .map(str::to_owned)
}

fn said(outcome: &Outcome) -> Option<BurstResult> {
    serde_json::from_value(outcome.said.clone()).ok()
}

/// Granted byte-seconds over 1.25 times the running peak's, from the first raise on.
pub(super) fn overgrant(samples: &[Sample], original: Bytes) -> Option<f64> {
    // Before its first limit is set the cgroup has none, which is no raise.
    let limited = samples
        .iter()
        .position(|sample| sample.limit <= original.0)?;
    let first = limited
        + samples[limited..]
            .iter()
            .position(|sample| sample.limit > original.0)?;
    let (mut granted, mut used) = (0.0, 0.0);
    for pair in samples[first..].windows(2) {
        let seconds = (pair[1].at_us - pair[0].at_us) as f64;
        granted += pair[0].limit as f64 * seconds;
        used += pair[0].peak.midpoint(pair[1].peak) as f64 * seconds;
    }
    (used > 0.0).then(|| granted / (1.25 * used))
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let killed = |pick: fn(&Record) -> &Outcome| {
        records
            .iter()
            .filter(|record| pick(record).killed())
            .count()
    };
    let mut time_ratios = Vec::new();
    let mut stalls = Vec::new();
    let mut small_page_stalls = Vec::new();
    let mut overgrants = Vec::new();
    let mut finals = Vec::new();
    let mut raises = Vec::new();
    let mut sleeps = Vec::new();
    for record in &records {
        let Record {
            case,
            unlimited,
            bellows,
            ..
        } = record;
        raises.push(bellows.report["report"]["raises"].as_f64().unwrap_or(0.0));
        sleeps.push(bellows.sleeps as f64);
        overgrants.extend(overgrant(&bellows.samples, case.limit));
        if let Some(last) = bellows.samples.last() {
            finals.push(last.limit as f64 / case.peak.0 as f64);
        }
        time_ratios.extend(time_ratio(record));
        if case.delay_ms > 0
            && let (Some(with), Some(without)) = (said(bellows), unlimited.as_ref().and_then(said))
        {
            let stall = with.longest_gap_us.saturating_sub(without.longest_gap_us) as f64;
            let ratio = stall / (case.delay_ms as f64 * 1000.0);
            stalls.push(ratio);
            if !case.thp {
                small_page_stalls.push(ratio);
            }
        }
    }
    let kills_by_page = |thp| {
        records
            .iter()
            .filter(|record| record.case.thp == thp && record.bellows.killed())
            .count()
    };
    let p = |values: &[f64], percent| rounded(percentile(values, percent));
    let ratio = |percent| (!time_ratios.is_empty()).then(|| p(&time_ratios, percent));
    let mut summary = json!({
        "bursts": records.len(),
        "kills_without": killed(|record| &record.fixed),
        "kills_with": killed(|record| &record.bellows),
        "stood_still": records.iter().map(|record| record.stood_still.len()).sum::<usize>(),
        "kills_unlimited": kills_unlimited(&records),
        "time_ratio_p50": ratio(50.0),
        "time_ratio_p90": ratio(90.0),
        "time_ratio_p99": ratio(99.0),
        "sleeps_p50": p(&sleeps, 50.0),
        "sleeps_p90": p(&sleeps, 90.0),
        "sleeps_p99": p(&sleeps, 99.0),
        "sleeps_max": p(&sleeps, 100.0),
        "raises_max": p(&raises, 100.0),
        "overgrant_p50": p(&overgrants, 50.0),
        "overgrant_max": p(&overgrants, 100.0),
        "final_ratio_p50": p(&finals, 50.0),
    });
    if records
        .iter()
        .any(|record| record.case.kind != Kind::Anonymous)
    {
        summary["by_kind"] = by_kind(&records);
    }
    if !stalls.is_empty() {
        summary["stall_vs_delay_p50"] = json!(p(&stalls, 50.0));
        summary["stall_vs_delay_max"] = json!(p(&stalls, 100.0));
        summary["stall_vs_delay_p50_small_pages"] = json!(p(&small_page_stalls, 50.0));
        summary["kills_with_small_pages"] = json!(kills_by_page(false));
        summary["kills_with_huge_pages"] = json!(kills_by_page(true));
    }
    if records.iter().any(|record| record.case.delay_ms > 0) {
        let within = records.iter().filter(|record| record.case.brake_suffices());
        let killed = within.clone().filter(|record| record.bellows.killed());
        summary["kills_where_brake_suffices"] = json!(killed.count());
        summary["where_brake_suffices"] = json!(within.count());
    }
    Ok(summary)
}

/// The same by what grows.
fn by_kind(records: &[Record]) -> Value {
    let mut kinds = serde_json::Map::new();
    for kind in Kind::value_variants() {
        let of_kind: Vec<&Record> = records
            .iter()
            .filter(|record| record.case.kind == *kind)
            .collect();
        let count = |pick: fn(&Record) -> &Outcome| {
            of_kind
                .iter()
                .filter(|record| pick(record).killed())
                .count()
        };
        let ratios: Vec<f64> = of_kind
            .iter()
            .filter_map(|record| time_ratio(record))
            .collect();
        kinds.insert(
            kind.text(),
            json!({
                "bursts": of_kind.len(),
                "kills_unlimited": kills_unlimited(of_kind.iter().copied()),
                "kills_without": count(|record| &record.fixed),
                "kills_with": count(|record| &record.bellows),
                "time_ratio_p50": (!ratios.is_empty()).then(|| rounded(percentile(&ratios, 50.0))),
                "sleeps_max": of_kind.iter().map(|record| record.bellows.sleeps).max(),
            }),
        );
    }
    Value::Object(kinds)
}

/// Kills without a limit; `None` where none was tried.
fn kills_unlimited<'a>(records: impl IntoIterator<Item = &'a Record>) -> Option<usize> {
    let mut tried = records
        .into_iter()
        .filter_map(|record| record.unlimited.as_ref())
        .peekable();
    tried.peek()?;
    Some(tried.filter(|outcome| outcome.killed()).count())
}

/// How long it grew under Bellows against without a limit.
fn time_ratio(record: &Record) -> Option<f64> {
    let (with, without) = (said(&record.bellows)?, said(record.unlimited.as_ref()?)?);
    Some(with.growth_us as f64 / without.growth_us.max(1) as f64)
}
