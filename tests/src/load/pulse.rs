//! `pulse`: a service that is mostly quiet: a little work at fixed times, and now and then nothing but work.
//!
//! Work is CPU time of its own, so a machine that is slow or busy gives it no less. Each piece says how long it took
//! from when it was due, or from when the last was done where it works without a pause: who is throttled in between
//! finds it in there.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use bellows::clock::now;
use clap::Args;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::say;

#[derive(Args, Clone, Debug)]
pub(crate) struct Pulse {
    /// Milliseconds before it begins.
    #[arg(long, default_value_t = 5000)]
    before_ms: u64,
    /// Times that it rests and works.
    #[arg(long, default_value_t = 3)]
    cycles: u64,
    /// Seconds of each rest.
    #[arg(long, default_value_t = 15)]
    rest_seconds: u64,
    /// Seconds of work without a pause.
    #[arg(long, default_value_t = 5)]
    work_seconds: u64,
    /// Milliseconds of CPU time in a piece of work.
    #[arg(long, default_value_t = 10)]
    piece_ms: u64,
    /// Milliseconds from one piece to the next at rest.
    #[arg(long, default_value_t = 100)]
    every_ms: u64,
    /// Milliseconds to go on without work at the end.
    #[arg(long, default_value_t = 0)]
    after_ms: u64,
}

/// What it says first.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct PulseStart {
    /// When, `CLOCK_MONOTONIC` nanoseconds.
    pub(crate) start_ns: u64,
}

/// What it says of one rest or work.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Pieces {
    /// Whether it worked without a pause.
    pub(crate) is_burst: bool,
    /// Microseconds that each piece took.
    pub(crate) took_us: Vec<u64>,
}

/// What it says at the end.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct PulseEnd {
    /// When, `CLOCK_MONOTONIC` nanoseconds.
    pub(crate) end_ns: u64,
}

pub(super) fn run(pulse: &Pulse) -> Result<()> {
    let piece = Duration::from_millis(pulse.piece_ms);
    thread::sleep(Duration::from_millis(pulse.before_ms));
    say(&PulseStart { start_ns: now().0 })?;
    for _ in 0..pulse.cycles {
        let mut rest = Vec::new();
        let mut due = Instant::now();
        let end = due + Duration::from_secs(pulse.rest_seconds);
        while due < end {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            work(piece);
            rest.push(due.elapsed());
            due += Duration::from_millis(pulse.every_ms);
        }
        tell(false, &rest)?;
        let mut burst = Vec::new();
        let end = Instant::now() + Duration::from_secs(pulse.work_seconds);
        let mut began = Instant::now();
        while began < end {
            work(piece);
            burst.push(began.elapsed());
            began = Instant::now();
        }
        tell(true, &burst)?;
    }
    say(&PulseEnd { end_ns: now().0 })?;
    thread::sleep(Duration::from_millis(pulse.after_ms));
    Ok(())
}

fn tell(is_burst: bool, took: &[Duration]) -> Result<()> {
    let micros = |took: &Duration| u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    say(&Pieces {
        is_burst,
        took_us: took.iter().map(micros).collect(),
    })
}

/// Works for so much of this thread's CPU time.
fn work(piece: Duration) {
    let end = used() + piece;
    let mut sum = 1_u64;
    while used() < end {
        for index in 0..2000_u64 {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(index));
        }
    }
}

fn used() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanos)
}
