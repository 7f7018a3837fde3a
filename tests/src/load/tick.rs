//! `tick`: a latency-sensitive process: wakes at fixed times, does a little work, and says how late it
//! was each time.
//!
//! The times are fixed beforehand: what is late makes the next ones late too, as requests would pile up,
//! and none is left out. The work is a small part of the time between two, also on an emulated machine
//! that is busy: where it is not, the pile grows for ever and tells nothing (seen with four times the
//! work every 4 ms: a median of 38 ms).

use std::{
    io::{self, Read as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::Result;
use bellows::clock::now;
use clap::Args;
use rustix::{
    thread::clock_nanosleep_absolute,
    time::{ClockId, Timespec},
};
use serde::{Deserialize, Serialize};

use super::{growth::Mapping, say};

#[derive(Args, Clone, Debug)]
pub(crate) struct Tick {
    /// Microseconds from one time to the next.
    #[arg(long, default_value_t = 10_000)]
    period_us: u64,
    /// Pages of fresh memory that are touched each time.
    #[arg(long, default_value_t = 8)]
    pages: usize,
}

/// What it says of itself at the end of its input.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Ticks {
    /// When it was to wake, `CLOCK_MONOTONIC` nanoseconds, and how many later its work was done.
    pub(crate) done_after: Vec<(u64, u64)>,
}

/// Room for ten minutes, so that nothing is allocated on the way.
const ROOM: usize = 60_000;

pub(super) fn run(tick: &Tick) -> Result<()> {
    let is_over = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&is_over);
    thread::spawn(move || {
        // Whatever ends the input, an error included, is the end.
        drop(io::stdin().read_to_end(&mut Vec::new()));
        over.store(true, Ordering::Relaxed);
    });
    say(&"ticking")?;
    let mut ticks = Ticks {
        done_after: Vec::with_capacity(ROOM),
    };
    let mut due = now().0;
    while !is_over.load(Ordering::Relaxed) {
        due += tick.period_us * 1000;
        let until = Timespec {
            tv_sec: i64::try_from(due / 1_000_000_000)?,
            tv_nsec: i64::try_from(due % 1_000_000_000)?,
        };
        clock_nanosleep_absolute(ClockId::Monotonic, &until)?;
        let fresh = Mapping::new(tick.pages * super::growth::PAGE)?;
        fresh.touch(0, fresh.length);
        drop(fresh);
        ticks.done_after.push((due, now().0 - due));
    }
    say(&ticks)
}
