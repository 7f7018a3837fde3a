//! What of the node's CPUs nobody uses.
//!
//! From the root cgroup's counter, which costs one read however many CPUs there are. It is looked at when somebody
//! asks, so what a first step after a long quiet time is measured against is the mean of that time.

use std::{fs, path::PathBuf};

use bellows_core::{Amount as _, Cpu, Nanos, cpu::SHORTEST_LOOK};

use crate::cgroup::quota::parse_counters;

/// What is idle, looked at when it is asked for.
pub(super) struct Idle {
    root: PathBuf,
    cpus: Cpu,
    /// When it was looked at, and CPU time used until then.
    last: Option<(Nanos, Nanos)>,
    idle: Cpu,
}

impl Idle {
    pub(super) fn new(root: PathBuf, cpus: u64) -> Self {
        let cpus = Cpu::millis(cpus.saturating_mul(1000));
        Self {
            root,
            cpus,
            last: None,
            idle: cpus,
        }
    }

    /// What was idle since the last look, less what was given since.
    pub(super) fn look(&mut self, at: Nanos) -> Cpu {
        if self
            .last
            .is_some_and(|(before, _)| at.since(before) < SHORTEST_LOOK)
        {
            return self.idle;
        }
        let content = fs::read_to_string(self.root.join("cpu.stat")).unwrap_or_default();
        if let Some(counters) = parse_counters(&content) {
            if let Some((before, used)) = self.last {
                let rate = Cpu::of_usage(counters.used.since(used), at.since(before));
                self.idle = self.cpus.minus(rate);
            }
            self.last = Some((at, counters.used));
        }
        self.idle
    }

    /// Takes away what somebody was given.
    pub(super) fn give(&mut self, from: Cpu, to: Cpu) {
        self.idle = self.idle.minus(to.minus(from));
    }
}
