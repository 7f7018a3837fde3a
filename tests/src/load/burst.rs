//! `burst`: rest at a size, then grow at full speed to another.

use std::{
    path::PathBuf,
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use bellows::clock::now;
use bellows_core::{Bytes, quantity};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    growth::{Growth, Kind, enter_nested_cgroup},
    say, size,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Burst {
    /// Memory touched before the burst.
    #[arg(long, value_parser = quantity::parse)]
    pub(crate) rest: Bytes,
    /// Memory touched at its end.
    #[arg(long, value_parser = quantity::parse)]
    pub(crate) peak: Bytes,
    /// What grows.
    #[arg(long, value_enum, default_value_t = Kind::Anonymous)]
    pub(crate) kind: Kind,
    /// Threads that share it.
    #[arg(long, default_value_t = 1)]
    pub(crate) threads: u64,
    /// Milliseconds at rest before the burst.
    #[arg(long, default_value_t = 300)]
    pub(crate) rest_ms: u64,
    /// Rests at least until this file is there: several begin at once.
    #[arg(long)]
    pub(crate) rest_until: Option<PathBuf>,
    /// Milliseconds at the peak.
    #[arg(long, default_value_t = 200)]
    pub(crate) hold_ms: u64,
    /// Milliseconds at rest, the burst's memory given back, before it bursts a second time.
    #[arg(long)]
    pub(crate) again_after_ms: Option<u64>,
    /// Milliseconds to go on at rest, the burst's memory given back.
    #[arg(long, default_value_t = 0)]
    pub(crate) after_ms: u64,
}

/// What a burst says of itself on standard output.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct BurstResult {
    /// Microseconds from the start of growth until the last thread was done.
    pub(crate) growth_us: u64,
    /// Longest time in any thread between two touched MiB.
    pub(crate) longest_gap_us: u64,
    /// When its memory was given back, `CLOCK_MONOTONIC` nanoseconds.
    pub(crate) end_ns: u64,
}

pub(super) fn run(burst: &Burst) -> Result<()> {
    if burst.kind == Kind::Nested {
        enter_nested_cgroup()?;
    }
    burst_once(burst, burst.rest_ms)?;
    if let Some(pause) = burst.again_after_ms {
        burst_once(burst, pause)?;
    }
    if burst.after_ms > 0 {
        let mut growth = Growth::new(burst.kind, size(burst.rest)?)?;
        growth.grow_to(size(burst.rest)?)?;
        thread::sleep(Duration::from_millis(burst.after_ms));
    }
    Ok(())
}

/// Rests for `rest_ms`, grows, gives the memory back and says how it went.
fn burst_once(burst: &Burst, rest_ms: u64) -> Result<()> {
    let threads = usize::try_from(burst.threads)?.max(1);
    let (rest, peak) = (size(burst.rest)? / threads, size(burst.peak)? / threads);
    let barrier = Arc::new(Barrier::new(threads + 1));
    let mut workers = Vec::new();
    for _ in 0..threads {
        let barrier = Arc::clone(&barrier);
        let kind = burst.kind;
        workers.push(thread::spawn(move || -> Result<Duration> {
            // Whatever fails, the others wait for this thread at each barrier.
            let mut growth = Growth::new(kind, peak).and_then(|mut growth| {
                growth.grow_to(rest)?;
                Ok(growth)
            });
            barrier.wait();
            barrier.wait();
            let longest = match &mut growth {
                Ok(growth) => growth.grow_to(peak),
                Err(error) => Err(anyhow::anyhow!("{error:#}")),
            };
            barrier.wait();
            barrier.wait();
            longest
        }));
    }
    barrier.wait();
    thread::sleep(Duration::from_millis(rest_ms));
    while burst.rest_until.as_ref().is_some_and(|file| !file.exists()) {
        thread::sleep(Duration::from_millis(5));
    }
    // A burst that is killed has said when it began.
    say(&serde_json::json!({ "start_ns": now().0 }))?;
    let start = Instant::now();
    barrier.wait();
    barrier.wait();
    let growth = start.elapsed();
    thread::sleep(Duration::from_millis(burst.hold_ms));
    barrier.wait();
    let mut longest = Duration::ZERO;
    for worker in workers {
        let gap = worker
            .join()
            .map_err(|_panic| anyhow::anyhow!("a thread panicked"))??;
        longest = longest.max(gap);
    }
    say(&BurstResult {
        growth_us: micros(growth),
        longest_gap_us: micros(longest),
        end_ns: now().0,
    })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
