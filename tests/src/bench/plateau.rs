//! `plateau`: a program that fills 95 % of its limit and stays there is no burst.

use anyhow::Result;
use bellows_core::Bytes;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::Records,
    runner::{Outcome, Runner, set_thp},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Seconds at each limit.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    limit: Bytes,
    seconds: u64,
    bellows: Outcome,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut runner = Runner::new()?;
    set_thp(false)?;
    for limit in [32, 256, 1024].map(Bytes::mib) {
        let (size, breath) = (
            limit.per_mille(950).0.to_string(),
            limit.per_mille(10).0.to_string(),
        );
        let seconds = options.seconds.to_string();
        let load = runner.load(&[
            "plateau",
            "--size",
            &size,
            "--breath",
            &breath,
            "--seconds",
            &seconds,
        ]);
        let bellows = runner.bellows(limit, limit.scaled(4, 1), &[], &load)?;
        eprintln!("case {limit}: {}", bellows.stderr);
        records.write(&Record {
            limit,
            seconds: options.seconds,
            bellows,
        })?;
    }
    Ok(())
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = records
        .iter()
        .map(|record| serde_json::from_value(record.clone()))
        .collect::<Result<_, _>>()?;
    let raises = |record: &Record| {
        record.bellows.report["report"]["raises"]
            .as_u64()
            .unwrap_or(u64::MAX)
    };
    let reached = |record: &Record| {
        record
            .bellows
            .samples
            .last()
            .map_or(0, |sample| sample.peak * 1000 / record.limit.0)
    };
    Ok(json!({
        "limits": records.len(),
        "completed": records.iter().filter(|record| !record.bellows.killed()).count(),
        "peak_per_mille_of_limit": records.iter().map(reached).collect::<Vec<_>>(),
        "raises": records.iter().map(raises).max(),
        "sleeps": records.iter().map(|record| record.bellows.sleeps).sum::<u64>(),
        // `exec` has no API to patch.
        "patches": 0,
    }))
}
