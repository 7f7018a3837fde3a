//! `page-cache`: a file larger than the limit is no reason to raise it; anonymous memory beside a
//! file is, by as much as it needs itself.

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use bellows_core::Bytes;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::{Records, percentile, rounded},
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
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    seed: u64,
    limit: Bytes,
    file: Bytes,
    /// Zero for cache alone.
    anonymous: Bytes,
    bellows: Outcome,
}

const FILE: &str = "/disk/cached";

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
            let load = runner.load(&[
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
            ]);
            let bellows = runner.bellows(limit, limit.scaled(16, 1), &[], &load)?;
            fs::remove_file(FILE)?;
            eprintln!(
                "case {index}: limit {limit}, file {file}, anonymous {anonymous}: {}",
                bellows.stderr
            );
            records.write(&Record {
                seed: options.seed,
                limit,
                file,
                anonymous,
                bellows,
            })?;
        }
    }
    Ok(())
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = records
        .iter()
        .map(|record| serde_json::from_value(record.clone()))
        .collect::<Result<_, _>>()?;
    let (alone, mixed): (Vec<_>, Vec<_>) = records
        .iter()
        .partition(|record| record.anonymous == Bytes::ZERO);
    let raises = |record: &&Record| record.bellows.report["report"]["raises"].as_u64();
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
        "killed": records.iter().filter(|record| record.bellows.killed()).count(),
        "raises_cache_only": alone.iter().filter_map(raises).sum::<u64>(),
        "mixed_grant_ratio": rounded(percentile(&ratios, 50.0)),
        "mixed_grant_ratio_min": rounded(percentile(&ratios, 0.0)),
        "mixed_grant_ratio_max": rounded(percentile(&ratios, 100.0)),
    }))
}
