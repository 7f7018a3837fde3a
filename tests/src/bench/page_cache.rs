//! `page-cache`: a file larger than the limit is no reason to raise it; anonymous memory beside a
//! file is, by as much as it needs itself.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use bellows::clock::now;
use bellows_core::{Bytes, Nanos};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::{Records, parsed, percentile, rounded},
    runner::{Outcome, Runner, set_thp},
};
use crate::node::wait;

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Pairs of cases.
    #[arg(long, default_value_t = 6)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Switch the multi-gen LRU off, or on again, in the middle of each case.
    #[arg(long)]
    flip_lru: bool,
    /// In a cgroup below the guarded one, as a nested container runtime would be.
    #[arg(long)]
    nested: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    seed: u64,
    /// How many milliseconds after the load's begin the multi-gen LRU was to be switched, and to what.
    flip: Option<(u64, bool)>,
    /// When that was done, `CLOCK_MONOTONIC`.
    flipped: Option<Nanos>,
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
            let flip = if options.flip_lru {
                Some((random.u64(300..=3000), !lru_is_on()?))
            } else {
                None
            };
            let flipping = flip.map(|flip| thread::spawn(move || switch(flip)));
            let bellows = runner.bellows(limit, limit.scaled(16, 1), &[], &load)?;
            let flipped = flipping.map(|flipping| {
                let joined = flipping.join();
                joined.map_err(|_panic| anyhow!("the thread that switches the LRU panicked"))?
            });
            let flipped = flipped.transpose().context(bellows.stderr.clone())?;
            fs::remove_file(FILE)?;
            eprintln!(
                "case {index}: limit {limit}, file {file}, anonymous {anonymous}, LRU {flip:?}: {}",
                bellows.stderr
            );
            records.write(&Record {
                seed: options.seed,
                flip,
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

/// Switches it in the middle of the load, and returns when that was. The load makes its file when it begins, which is
/// some time after `bellows exec` does.
///
/// The load is stopped meanwhile: whoever is at a limit while the kernel switches may be killed with nothing but page
/// cache, guarded or not, because its reclaim looks at the lists that are not filled yet (seen on 6.12; "mm/mglru: fix
/// cgroup OOM during MGLRU state switching", upstream a6a8c087dc).
fn switch((after_ms, on): (u64, bool)) -> Result<Nanos> {
    wait("the load begins", Duration::from_secs(120), || {
        Ok(Path::new(FILE).exists())
    })?;
    thread::sleep(Duration::from_millis(after_ms));
    let load = processes_of_load()?;
    let switched = switch_beside(&load, on);
    // Whatever became of that: the bench waits for the load's end.
    signal(&load, Signal::CONT);
    let at = switched?;
    ensure!(lru_is_on()? == on, "the LRU was not switched");
    Ok(at)
}

fn switch_beside(load: &[Pid], on: bool) -> Result<Nanos> {
    signal(load, Signal::STOP);
    wait("the load stands still", Duration::from_secs(30), || {
        Ok(load.iter().all(|&process| !goes_on(process)))
    })?;
    fs::write(LRU, if on { "y" } else { "n" }).context("switching the LRU")?;
    Ok(now())
}

/// Those of this program that read and write [`FILE`].
fn processes_of_load() -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = words.split(|&byte| byte == 0);
        let is_ours = words
            .next()
            .is_some_and(|program| program.ends_with(b"bellows-guest"));
        if is_ours && words.any(|word| word == FILE.as_bytes()) {
            found.extend(Pid::from_raw(process));
        }
    }
    ensure!(!found.is_empty(), "no load has {FILE} among its arguments");
    Ok(found)
}

/// One that has ended needs none.
fn signal(processes: &[Pid], signal: Signal) {
    for &process in processes {
        kill_process(process, signal).ok();
    }
}

/// Whether it is there and not stopped.
fn goes_on(process: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", process.as_raw_pid()));
    status.is_ok_and(|status| !status.contains("State:\tT"))
}

impl Record {
    /// Whether the LRU was switched while the load was at it.
    fn is_flipped_meanwhile(&self) -> bool {
        let said = |key: &str| self.bellows.said[key].as_u64();
        let (Some(flipped), Some(start), Some(end)) =
            (self.flipped, said("start_ns"), said("end_ns"))
        else {
            return false;
        };
        (start..=end).contains(&flipped.0)
    }
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
        "flips": records.iter().filter(|record| record.is_flipped_meanwhile()).count(),
        "killed": records.iter().filter(|record| record.bellows.killed()).count(),
        "demand_cache_only_per_mille_max": alone.iter().filter_map(demand).max(),
        "raises_cache_only": alone.iter().filter_map(raises).sum::<u64>(),
        "mixed_grant_ratio": rounded(percentile(&ratios, 50.0)),
        "mixed_grant_ratio_min": rounded(percentile(&ratios, 0.0)),
        "mixed_grant_ratio_max": rounded(percentile(&ratios, 100.0)),
    }))
}
