//! Samples what a cgroup is granted and what it uses, from outside and without Bellows.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bellows::{
    cgroup::{Cgroup, MemoryEvents},
    clock::now,
};
use serde::{Deserialize, Serialize};

/// One look at a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// `CLOCK_MONOTONIC` in microseconds.
    pub(crate) at_us: u64,
    /// `memory.max`.
    pub(crate) limit: u64,
    /// Highest `memory.current` so far (`memory.peak`).
    pub(crate) peak: u64,
}

/// What a cgroup looked like from its start to its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Track {
    pub(crate) samples: Vec<Sample>,
    pub(crate) oom_kill: u64,
    /// When the first kill was seen, `CLOCK_MONOTONIC` nanoseconds.
    pub(crate) killed_at_ns: u64,
    pub(crate) sleeps: u64,
}

const INTERVAL: Duration = Duration::from_millis(4);
/// A rising peak is recorded this often, an unchanged one that often.
const RISING_INTERVAL_US: u64 = 20_000;
const STILL_INTERVAL_US: u64 = 1_000_000;

pub(crate) struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Track>,
}

impl Sampler {
    /// Samples the cgroup as soon as it can be found, until stopped. `appeared` is told of it,
    /// `sleeps` is asked for its sleeps for as long as it exists.
    pub(crate) fn start(
        find: impl Fn() -> Option<Cgroup> + Send + 'static,
        appeared: impl Fn(&Cgroup) + Send + 'static,
        sleeps: impl Fn(&Cgroup) -> u64 + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut track = Track::default();
            let mut cgroup = None;
            // Once more after the end: a kill may have come since the look before.
            let mut is_last = false;
            while !is_last {
                is_last = stopped.load(Ordering::Relaxed);
                if cgroup.is_none() {
                    cgroup = find().inspect(&appeared);
                }
                if let Some(cgroup) = &cgroup {
                    look(cgroup, &mut track);
                    track.sleeps = track.sleeps.max(sleeps(cgroup));
                }
                if !is_last {
                    thread::sleep(INTERVAL);
                }
            }
            track
        });
        Self { stop, thread }
    }

    pub(crate) fn finish(self) -> Track {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

fn look(cgroup: &Cgroup, track: &mut Track) {
    let (Ok(limit), Ok(Some(peak))) = (cgroup.limit("memory.max"), cgroup.peak()) else {
        return;
    };
    let at_us = now().0 / 1000;
    let sample = Sample {
        at_us,
        limit: limit.bytes().0,
        peak: peak.0,
    };
    let due = track.samples.last().is_none_or(|last| {
        let since = sample.at_us - last.at_us;
        last.limit != sample.limit
            || since >= STILL_INTERVAL_US
            || (last.peak != sample.peak && since >= RISING_INTERVAL_US)
    });
    if due {
        track.samples.push(sample);
    }
    let MemoryEvents { oom_kill, .. } = cgroup.events().unwrap_or_default();
    if track.oom_kill == 0 && oom_kill > 0 {
        track.killed_at_ns = now().0;
    }
    track.oom_kill = track.oom_kill.max(oom_kill);
}
