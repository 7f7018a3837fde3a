//! `thrash`: page cache that is a working set and does not fit its limit, against page cache that only
//! passes through.
//!
//! A file of 1.5 times the limit, read again and again, is slow for as long as the limit stands. One of
//! six times the limit is as slow at any limit that Bellows may try: what was tried must be taken back.
//! Each case reads the hot file with room for it, at the fixed limit and under Bellows, and the hopeless
//! one under Bellows.

use std::path::Path;

use anyhow::{Result, ensure};
use bellows::cgroup::Limit;
use bellows_core::Bytes;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::{Records, parsed, percentile, rounded},
    runner::{Outcome, Runner, set_lru_gen, set_thp},
};
use crate::load::HotResult;

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Cases.
    #[arg(long, default_value_t = 2)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Times that the hot file is read.
    #[arg(long, default_value_t = 100)]
    passes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    seed: u64,
    limit: Bytes,
    file: Bytes,
    /// Whether the multi-gen LRU was on.
    lru_gen: bool,
    roomy: Outcome,
    fixed: Outcome,
    bellows: Outcome,
    /// A file of six times the limit, under Bellows.
    hopeless: Outcome,
}

const FILE: &str = "/disk/hot";

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    ensure!(Path::new("/disk").is_dir(), "the guest has no ext4 disk");
    let runner = Runner::new()?;
    set_thp(false)?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    for index in 0..options.n {
        let lru_gen = index % 2 == 0;
        set_lru_gen(lru_gen)?;
        let limit = Bytes::mib(random.u64(32..=64));
        let file = limit.per_mille(1500);
        let load = |size: Bytes, passes: u64| {
            runner.load(&[
                "hot",
                "--file",
                FILE,
                "--size",
                &size.0.to_string(),
                "--passes",
                &passes.to_string(),
            ])
        };
        let hot = load(file, options.passes);
        let (max, roomy) = (limit.scaled(8, 1), limit.scaled(3, 1));
        let record = Record {
            seed: options.seed,
            limit,
            file,
            lru_gen,
            roomy: runner.fixed(Limit::At(roomy), &hot)?,
            fixed: runner.fixed(Limit::At(limit), &load(file, options.passes / 10))?,
            bellows: runner.bellows(limit, max, &[], &hot)?,
            hopeless: runner.bellows(limit, max, &[], &load(limit.scaled(6, 1), 16))?,
        };
        eprintln!(
            "case {index}: limit {limit}, file {file}, multi-gen LRU {lru_gen}: a pass takes {:.1} ms with room, {:.1} ms without, {:.1} ms with Bellows: {}; hopeless: {}",
            pass_ms(&record.roomy),
            pass_ms(&record.fixed),
            pass_ms(&record.bellows),
            record.bellows.stderr,
            record.hopeless.stderr,
        );
        records.write(&record)?;
    }
    Ok(())
}

fn said(outcome: &Outcome) -> HotResult {
    serde_json::from_value(outcome.said.clone()).unwrap_or_default()
}

/// Milliseconds that one pass took in the mean.
fn pass_ms(outcome: &Outcome) -> f64 {
    let said = said(outcome);
    said.read_us as f64 / 1000.0 / said.passes.len().max(1) as f64
}

/// Passes in which something had to be read back that was just thrown out. A count, so a busy machine does
/// not change it as it changes a time.
fn refaulting_passes(outcome: &Outcome) -> usize {
    let said = said(outcome);
    let counts = std::iter::once(0).chain(said.passes.iter().map(|pass| pass.refaulted));
    let later = said.passes.iter().map(|pass| pass.refaulted);
    counts
        .zip(later)
        .filter(|(before, after)| after > before)
        .count()
}

/// The limit at the load's end.
fn last_limit(outcome: &Outcome) -> Option<u64> {
    outcome.samples.last().map(|sample| sample.limit)
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let raises = |outcome: &Outcome| outcome.report["report"]["raises"].as_u64().unwrap_or(0);
    let ratios = |pick: fn(&Record) -> &Outcome| -> Vec<f64> {
        records
            .iter()
            .map(|record| pass_ms(pick(record)) / pass_ms(&record.roomy).max(0.001))
            .collect()
    };
    let (with, without) = (
        ratios(|record| &record.bellows),
        ratios(|record| &record.fixed),
    );
    Ok(json!({
        "cases": records.len(),
        "killed": records.iter().filter(|record| record.bellows.killed() || record.hopeless.killed()).count(),
        "raised": records.iter().all(|record| raises(&record.bellows) > 0),
        "hopeless_raises_max": records.iter().map(|record| raises(&record.hopeless)).max(),
        "hopeless_taken_back": records.iter().all(|record| last_limit(&record.hopeless) == Some(record.limit.0)),
        "refaulting_passes_max": records.iter().map(|record| refaulting_passes(&record.bellows)).max(),
        "refaulting_passes_without_min": records.iter().map(|record| refaulting_passes(&record.fixed)).min(),
        "time_ratio": rounded(percentile(&with, 100.0)),
        "time_ratio_p50": rounded(percentile(&with, 50.0)),
        "time_ratio_without_p50": rounded(percentile(&without, 50.0)),
    }))
}
