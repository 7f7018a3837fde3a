//! `ceiling`: a burst that exceeds `--max-memory` must end as it would at a fixed limit of that
//! size: the brake is gone, and the kernel kills as soon as it would have.

use anyhow::Result;
use bellows::cgroup::Limit;
use bellows_core::Bytes;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::{burst_words, log_uniform, mib, thousandths},
    record::{Records, parsed, percentile, rounded},
    runner::{Outcome, Runner, set_thp},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Cases.
    #[arg(long, default_value_t = 20)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    seed: u64,
    limit: Bytes,
    ceiling: Bytes,
    peak: Bytes,
    threads: u64,
    thp: bool,
    fixed: Outcome,
    bellows: Outcome,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let runner = Runner::new()?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    for index in 0..options.n {
        let limit = mib(log_uniform(&mut random, 32.0, 128.0));
        let ceiling = limit.per_mille(thousandths(log_uniform(&mut random, 1.5, 8.0)));
        let peak = ceiling.per_mille(thousandths(log_uniform(&mut random, 1.2, 2.0)));
        let (threads, thp) = (random.u64(1..=8), index % 2 == 0);
        set_thp(thp)?;
        let words = burst_words(limit.per_mille(500), peak, threads);
        let load = runner.load(&words.each_ref().map(String::as_str));
        let (fixed, bellows) = if random.bool() {
            let fixed = runner.fixed(Limit::At(ceiling), &load)?;
            (fixed, runner.bellows(limit, ceiling, &[], &load)?)
        } else {
            let bellows = runner.bellows(limit, ceiling, &[], &load)?;
            (runner.fixed(Limit::At(ceiling), &load)?, bellows)
        };
        let record = Record {
            seed: options.seed,
            limit,
            ceiling,
            peak,
            threads,
            thp,
            fixed,
            bellows,
        };
        eprintln!(
            "case {index}: limit {limit}, ceiling {ceiling}, peak {peak}: fixed {:?} ms, bellows {:?} ms: {}",
            time_to_kill(&record.fixed).map(|ns| ns / 1_000_000),
            time_to_kill(&record.bellows).map(|ns| ns / 1_000_000),
            record.bellows.stderr,
        );
        records.write(&record)?;
    }
    Ok(())
}

/// Nanoseconds from the start of the burst to its kill.
fn time_to_kill(outcome: &Outcome) -> Option<u64> {
    let start = outcome.said["start_ns"].as_u64()?;
    outcome.killed_at_ns.checked_sub(start)
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    // A kill counts only if the kernel's OOM killer did it, and at the ceiling.
    let killed = |outcome: &Outcome| outcome.oom_kill > 0;
    let reached = |record: &Record| {
        let limits = record
            .bellows
            .samples
            .iter()
            .map(|sample| sample.limit)
            .filter(|&limit| limit != u64::MAX);
        limits.max() == Some(record.ceiling.page_floor().0)
    };
    let same = records
        .iter()
        .filter(|record| killed(&record.fixed) == killed(&record.bellows) && reached(record))
        .count();
    let ratios: Vec<f64> = records
        .iter()
        .filter_map(|record| {
            Some(time_to_kill(&record.bellows)? as f64 / time_to_kill(&record.fixed)?.max(1) as f64)
        })
        .collect();
    Ok(json!({
        "cases": records.len(),
        "killed_fixed": records.iter().filter(|record| killed(&record.fixed)).count(),
        "timed": ratios.len(),
        "same_outcome": same,
        "time_to_kill_ratio_p50": rounded(percentile(&ratios, 50.0)),
        "time_to_kill_ratio_p90": rounded(percentile(&ratios, 90.0)),
    }))
}
