//! Whether the machine itself stood still: one thread for each CPU, at the highest priority, that measures how late it
//! is woken.
//!
//! An emulated CPU stops while its host gives it no time, and whatever waits for it in the guest waits with it, at any
//! priority, while the other CPU goes on. A burst that is killed then was not killed by what is measured. It must not be
//! taken for anything else: only a CPU on which nobody of the guest could run counts.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bellows::{
    clock::now,
    priority::{REFLEX, try_real_time},
};
use bellows_core::Nanos;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// How often each CPU is tried.
const BEAT: Nanos = Nanos::millis(5);
/// Above all that is measured.
const ABOVE: i32 = REFLEX + 40;

/// What is shorter is not kept.
const LATE: Nanos = Nanos::millis(10);

/// A time for which a CPU stood still.
#[derive(Clone, Copy, Debug)]
struct Standstill {
    from: Nanos,
    to: Nanos,
}

/// The threads; they end with this.
pub(crate) struct Heartbeat {
    ended: Arc<AtomicBool>,
    standstills: Arc<Mutex<Vec<Standstill>>>,
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
        let standstills = Arc::<Mutex<Vec<Standstill>>>::default();
        let all = sched_getaffinity(None)?;
        let cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu));
        let threads = cpus.map(|cpu| {
            let (ended, standstills) = (Arc::clone(&ended), Arc::clone(&standstills));
            let (ready, is_ready) = std::sync::mpsc::channel();
            let thread = thread::Builder::new().spawn(move || {
                let mut only = CpuSet::new();
                only.set(cpu);
                let prepared = sched_setaffinity(None, &only)
                    .map_err(std::io::Error::from)
                    .and_then(|()| try_real_time(ABOVE));
                let is_prepared = prepared.is_ok();
                if ready.send(prepared).is_ok() && is_prepared {
                    beat(&ended, &standstills);
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
            standstills,
            threads,
        })
    }

    /// The longest time for which a CPU has stood still that was not over before `from`, and had begun before `to`.
    pub(crate) fn longest(&self, from: Nanos, to: Nanos) -> Nanos {
        let all = self.standstills.lock();
        longest(&all.unwrap_or_else(PoisonError::into_inner), from, to)
    }

    /// The same without what was before `from`.
    pub(crate) fn longest_after(&self, from: Nanos, to: Nanos) -> Nanos {
        let all = self.standstills.lock();
        let mut all = all.unwrap_or_else(PoisonError::into_inner).clone();
        for one in &mut all {
            one.from = one.from.max(from);
        }
        longest(&all, from, to)
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

fn longest(all: &[Standstill], from: Nanos, to: Nanos) -> Nanos {
    let within = all.iter().filter(|one| one.to >= from && one.from <= to);
    let longest = within.map(|one| one.to.since(one.from)).max();
    longest.unwrap_or(Nanos(0))
}

fn beat(ended: &AtomicBool, standstills: &Mutex<Vec<Standstill>>) {
    while !ended.load(Ordering::Relaxed) {
        let due = Nanos(now().0 + BEAT.0);
        thread::sleep(Duration::from_nanos(BEAT.0));
        let woken = now();
        if woken.since(due) >= LATE {
            let mut all = standstills.lock().unwrap_or_else(PoisonError::into_inner);
            all.push(Standstill {
                from: due,
                to: woken,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_shortly_before_counts() {
        let still = |from, to| Standstill {
            from: Nanos::millis(from),
            to: Nanos::millis(to),
        };
        let all = [still(100, 900), still(2000, 2150), still(5000, 5500)];
        let longest = |from, to| longest(&all, Nanos::millis(from), Nanos::millis(to)).as_millis();
        assert_eq!(longest(0, 10_000), 800);
        assert_eq!(longest(1000, 3000), 150);
        assert_eq!(longest(2100, 2100), 150, "it lasted then");
        assert_eq!(longest(3000, 4000), 0);
    }
}
