//! `bystander`: what a burst under Bellows costs a process that has nothing to do with it.
//!
//! A latency-sensitive process in a cgroup of its own ticks while another cgroup bursts: at a limit
//! that suffices from the start, without Bellows, and under `bellows exec`, in random order within one
//! boot. Both bursts compete for the same CPUs, so the ratio leaves what Bellows adds: raises on a
//! real-time thread, the controller, the programs on every charge, the bystander's own included. What
//! counts is the time from the start of the growth to the end of the burst.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use bellows::cgroup::{Cgroup, Limit};
use bellows_core::Bytes;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::{burst_words, log_uniform, mib},
    inside,
    record::{Records, parsed, percentile, rounded},
    runner::{BELLOWS, set_thp},
};
use crate::load::{BurstResult, Ticks};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Bursts of each kind.
    #[arg(long, default_value_t = 20)]
    n: u64,
    /// Seed of the bursts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Variant {
    /// At a limit that suffices, without Bellows.
    Sufficient,
    /// Under `bellows exec`, from the small limit.
    Bellows,
}

/// One burst, and what the bystander felt of it.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    seed: u64,
    variant: Variant,
    limit: Bytes,
    peak: Bytes,
    threads: u64,
    /// The command's exit code.
    code: Option<i32>,
    growth_us: u64,
    /// Times from when the bystander was to wake to when its work was done, nanoseconds.
    done_after_ns: Vec<u64>,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    set_thp(false)?;
    let own = inside::create("bystander")?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    for index in 0..options.n {
        let limit = mib(log_uniform(&mut random, 48.0, 96.0));
        let peak = mib(log_uniform(&mut random, 384.0, 768.0));
        let threads = random.u64(1..=2);
        let mut order = [Variant::Sufficient, Variant::Bellows];
        random.shuffle(&mut order);
        for variant in order {
            let burst = Burst {
                limit,
                peak,
                threads,
            };
            let bystander = Bystander::start(&own)?;
            let (code, start_ns, result) = burst.run(variant)?;
            let ticks = bystander.finish()?;
            let done_after_ns: Vec<u64> = ticks
                .done_after
                .iter()
                .filter(|(due, _)| (start_ns..result.end_ns).contains(due))
                .map(|&(_, after)| after)
                .collect();
            eprintln!(
                "case {index}: {variant:?}, limit {limit}, peak {peak}, {threads} threads: {} ms, {} ticks",
                result.growth_us / 1000,
                done_after_ns.len()
            );
            records.write(&Record {
                index,
                seed: options.seed,
                variant,
                limit,
                peak,
                threads,
                code,
                growth_us: result.growth_us,
                done_after_ns,
            })?;
        }
    }
    Ok(())
}

/// The process that is disturbed.
struct Bystander {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Bystander {
    fn start(cgroup: &Cgroup) -> Result<Self> {
        let mut child = inside::load(cgroup, &["tick"])?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut output = BufReader::new(child.stdout.take().context("no output")?);
        output.read_line(&mut String::new())?;
        Ok(Self { child, output })
    }

    fn finish(mut self) -> Result<Ticks> {
        drop(self.child.stdin.take());
        let mut text = String::new();
        self.output.read_to_string(&mut text)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the bystander has died: {status}");
        Ok(serde_json::from_str(&text)?)
    }
}

struct Burst {
    limit: Bytes,
    peak: Bytes,
    threads: u64,
}

impl Burst {
    /// Returns the exit code, when the growth began, and what the burst said at its end.
    fn run(&self, variant: Variant) -> Result<(Option<i32>, u64, BurstResult)> {
        let words = burst_words(self.limit.per_mille(500), self.peak, self.threads);
        let words = words.each_ref().map(String::as_str);
        let max = self.peak.per_mille(1500);
        let mut own = None;
        let mut command = match variant {
            Variant::Sufficient => {
                let cgroup = inside::create("burst")?;
                cgroup.set_limit("memory.max", Limit::At(max))?;
                let command = inside::load(&cgroup, &words)?;
                own = Some(cgroup);
                command
            }
            Variant::Bellows => {
                let (memory, max) = (self.limit.0.to_string(), max.0.to_string());
                let mut command = Command::new(BELLOWS);
                command
                    .args(["exec", "--memory", &memory, "--max-memory", &max, "--"])
                    .arg(std::env::current_exe()?)
                    .arg("load")
                    .args(words);
                command
            }
        };
        let output = command.stdin(Stdio::null()).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let mut lines = text.lines();
        let mut line = || -> Result<Value> {
            let why = || String::from_utf8_lossy(&output.stderr).into_owned();
            Ok(serde_json::from_str(lines.next().with_context(why)?)?)
        };
        let start = line()?["start_ns"].as_u64().context("no start")?;
        let result = serde_json::from_value(line()?)?;
        if let Some(cgroup) = own {
            cgroup.remove()?;
        }
        Ok((output.status.code(), start, result))
    }
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let micros = |variant| -> Vec<f64> {
        let of = records.iter().filter(|record| record.variant == variant);
        of.flat_map(|record| &record.done_after_ns)
            .map(|&after| after as f64 / 1000.0)
            .collect()
    };
    let (with, without) = (micros(Variant::Bellows), micros(Variant::Sufficient));
    let ratio = |percent| rounded(percentile(&with, percent) / percentile(&without, percent));
    Ok(json!({
        "bursts": records.len() / 2,
        "failed": records.iter().filter(|record| record.code != Some(0)).count(),
        "ticks_with": with.len(),
        "ticks_without": without.len(),
        "p50_ratio": ratio(50.0),
        "p90_ratio": ratio(90.0),
        "p99_ratio": ratio(99.0),
        "p99_us_with": rounded(percentile(&with, 99.0)),
        "p99_us_without": rounded(percentile(&without, 99.0)),
    }))
}
