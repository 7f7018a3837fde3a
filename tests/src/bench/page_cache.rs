//! `page-cache`: a file larger than the limit is no reason to raise it; anonymous memory beside a
//! file is, by as much as it needs itself.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use bellows_core::Bytes;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::{Records, parsed, percentile, rounded},
    runner::{Outcome, Runner, set_thp},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Pairs of cases.
    #[arg(long, default_value_t = 6)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Switch the multi-gen LRU off, or on again, while a case is under way.
    #[arg(long)]
    flip_lru: bool,
    /// In a cgroup below the guarded one, as a nested container runtime would be.
    #[arg(long)]
    nested: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    seed: u64,
    /// Milliseconds after its start when the multi-gen LRU was switched, and to what.
    flipped: Option<(u64, bool)>,
    limit: Bytes,
    file: Bytes,
    /// Zero for cache alone.
    anonymous: Bytes,
    bellows: Outcome,
}

const FILE: &str = "/disk/cached";
const LRU: &str = "/sys/kernel/mm/lru_gen/enabled";

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    ensure!(Path::new("/disk").is_dir(), "the guest has no ext4 disk");
    let runner = Runner::new()?;
    set_thp(false)?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    for index in 0..options.n {
        let limit = Bytes::mib(random.u64(48..=160));
        for anonymous in [Bytes::ZERO, limit.per_mille(random.u64(1500..=4000))] {
            let file = if anonymous == Bytes::ZERO {
                limit.scaled(4, 1)
            } else {
                anonymous
            };
            let (size, memory) = (file.0.to_string(), anonymous.0.to_string());
            let nested = options.nested.then_some("--nested");
            let words = [
                "cache",
                "--file",
                FILE,
                "--size",
                &size,
                "--anonymous",
                &memory,
                "--passes",
                "2",
                "--hold-ms",
                "4000",
            ];
            let load = runner.load(&words.into_iter().chain(nested).collect::<Vec<_>>());
            let flipped = if options.flip_lru {
                Some((random.u64(300..=3000), !lru_is_on()?))
            } else {
                None
            };
            let flipping = thread::spawn(move || flipped.map_or(Ok(()), flip));
            let bellows = runner.bellows(limit, limit.scaled(16, 1), &[], &load)?;
            flipping
                .join()
                .map_err(|_panic| anyhow!("the thread that switches the LRU panicked"))??;
            fs::remove_file(FILE)?;
            eprintln!(
                "case {index}: limit {limit}, file {file}, anonymous {anonymous}, LRU {flipped:?}: {}",
                bellows.stderr
            );
            records.write(&Record {
                seed: options.seed,
                flipped,
                limit,
                file,
                anonymous,
                bellows,
            })?;
        }
    }
    Ok(())
}

fn lru_is_on() -> Result<bool> {
    let mask = fs::read_to_string(LRU).context("this kernel has no multi-gen LRU")?;
    Ok(mask.trim() != "0x0000")
}

fn flip((after_ms, on): (u64, bool)) -> Result<()> {
    thread::sleep(Duration::from_millis(after_ms));
    fs::write(LRU, if on { "y" } else { "n" })?;
    ensure!(lru_is_on()? == on, "the LRU was not switched");
    Ok(())
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let (alone, mixed): (Vec<_>, Vec<_>) = records
        .iter()
        .partition(|record| record.anonymous == Bytes::ZERO);
    let raises = |record: &&Record| record.bellows.report["report"]["raises"].as_u64();
    // What the kernel side took for demand, whatever was made of it.
    let demand = |record: &&Record| {
        let peak = record.bellows.report["report"]["peak_demand"].as_u64()?;
        Some(peak * 1000 / record.limit.0)
    };
    let ratios: Vec<f64> = mixed
        .iter()
        .filter_map(|record| {
            // While the load still lived: its end gives everything back.
            let end_us = record.bellows.said["end_ns"].as_u64()? / 1000;
            let last = record
                .bellows
                .samples
                .iter()
                .rfind(|sample| sample.at_us < end_us)?
                .limit;
            Some(last as f64 / (1.25 * record.anonymous.0 as f64))
        })
        .collect();
    Ok(json!({
        "cases": records.len(),
        "flips": records.iter().filter(|record| record.flipped.is_some()).count(),
        "killed": records.iter().filter(|record| record.bellows.killed()).count(),
        "demand_cache_only_per_mille_max": alone.iter().filter_map(demand).max(),
        "raises_cache_only": alone.iter().filter_map(raises).sum::<u64>(),
        "mixed_grant_ratio": rounded(percentile(&ratios, 50.0)),
        "mixed_grant_ratio_min": rounded(percentile(&ratios, 0.0)),
        "mixed_grant_ratio_max": rounded(percentile(&ratios, 100.0)),
    }))
}
