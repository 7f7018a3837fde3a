//! Whether the machine itself stood still: one thread for each CPU, at the highest priority, that measures how late it
//! is woken.
//!
//! An emulated CPU stops while its host gives it no time, and whatever waits for it in the guest waits with it, at any
//! priority, while the other CPU goes on. A burst that is killed then was not killed by what is measured. It must not be
//! taken for anything else: only a CPU on which nobody of the guest could run counts.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bellows::priority::{REFLEX, try_real_time};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// How often each CPU is tried.
const BEAT: Duration = Duration::from_millis(5);
/// Above all that is measured.
const ABOVE: i32 = REFLEX + 40;

/// The threads; they end with this.
pub(crate) struct Heartbeat {
    ended: Arc<AtomicBool>,
    latest_us: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Heartbeat {
    /// Starts one thread a CPU.
    ///
    /// # Errors
    ///
    /// When one cannot be had, or not on its CPU at its priority.
    pub(crate) fn start() -> Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let latest_us = Arc::new(AtomicU64::new(0));
        let all = sched_getaffinity(None)?;
        let cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu));
        let threads = cpus.map(|cpu| {
            let (ended, latest_us) = (Arc::clone(&ended), Arc::clone(&latest_us));
            let (ready, is_ready) = std::sync::mpsc::channel();
            let thread = thread::Builder::new().spawn(move || {
                let mut only = CpuSet::new();
                only.set(cpu);
                let prepared = sched_setaffinity(None, &only)
                    .map_err(std::io::Error::from)
                    .and_then(|()| try_real_time(ABOVE));
                let is_prepared = prepared.is_ok();
                if ready.send(prepared).is_ok() && is_prepared {
                    beat(&ended, &latest_us);
                }
            })?;
            is_ready
                .recv()
                .context("a heartbeat's thread")?
                .with_context(|| format!("a heartbeat on CPU {cpu}"))?;
            Ok(thread)
        });
        let threads = threads.collect::<Result<_>>()?;
        Ok(Self {
            ended,
            latest_us,
            threads,
        })
    }

    /// The longest time, in microseconds, for which a CPU has stood still since this was asked last.
    pub(crate) fn take(&self) -> u64 {
        self.latest_us.swap(0, Ordering::Relaxed)
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("a heartbeat panicked");
            }
        }
    }
}

fn beat(ended: &AtomicBool, latest_us: &AtomicU64) {
    while !ended.load(Ordering::Relaxed) {
        let before = Instant::now();
        thread::sleep(BEAT);
        let late = before.elapsed().saturating_sub(BEAT);
        let late = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
        latest_us.fetch_max(late, Ordering::Relaxed);
    }
}
