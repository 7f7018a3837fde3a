//! What was seen of one cgroup, reduced to what decisions need.
//!
//! It keeps peaks and times, no samples: the memory per cgroup is constant. It must not judge;
//! [`crate::decide`] does.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// The observed past of one cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// Highest demand ever seen.
    pub peak_demand: Bytes,
    /// Highest demand since the last shrink.
    pub burst_peak: Bytes,
    /// When demand last rose by more than 1 % above what it was, and by more than a twentieth of what the burst had at most.
    pub last_growth: Nanos,
    /// When demand was last above half of what the burst had at most: since then most of it is gone.
    pub last_large: Nanos,
    /// Demand at [`Self::last_growth`].
    pub grown_to: Bytes,
    /// Growth per second over the kernel's last complete window.
    pub rate_per_second: Bytes,
    /// The last observed demand.
    pub demand: Bytes,
}

/// What is less than this share of a burst is no part of it: after it a shell that polls, or a probe, begins a process every
/// few moments, and a container that has become small grows by as much as it has each time. A shrink leaves five times as
/// much room.
const OF_BURST_PER_MILLE: u64 = 50;

impl History {
    /// Takes in an observation of demand at `now`.
    pub fn observe(&mut self, now: Nanos, demand: Bytes) {
        self.demand = demand;
        self.peak_demand = self.peak_demand.max(demand);
        self.burst_peak = self.burst_peak.max(demand);
        if demand > self.burst_peak.per_mille(500) {
            self.last_large = now;
        }
        let is_more = demand > self.grown_to.per_mille(1010);
        let is_of_the_burst =
            demand.minus(self.grown_to) > self.burst_peak.per_mille(OF_BURST_PER_MILLE);
        if is_more && is_of_the_burst {
            self.grown_to = demand;
            self.last_growth = now;
        } else if demand < self.grown_to.per_mille(900) {
            // Fallen: growth from here on is growth again.
            self.grown_to = demand;
        }
    }

    /// Takes in the growth over a window of the kernel's.
    pub fn observe_rate(&mut self, grown: Bytes, window: Nanos) {
        if window.0 > 0 {
            self.rate_per_second = grown.scaled(1_000_000_000, window.0);
        }
    }

    /// A hold has ended: that it did not grow until now says nothing.
    pub fn resumed(&mut self, now: Nanos) {
        self.last_growth = self.last_growth.max(now);
    }

    /// Starts a new burst after the limit was lowered.
    pub const fn shrunk(&mut self) {
        self.burst_peak = self.demand;
        self.rate_per_second = Bytes::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saw_tooth_of_a_percent_is_not_growth() {
        let mut history = History::default();
        history.observe(Nanos(1), Bytes::mib(100));
        for round in 2..100 {
            history.observe(
                Nanos(round),
                Bytes::mib(if round % 2 == 0 { 101 } else { 100 }),
            );
        }
        assert_eq!(history.last_growth, Nanos(1));
    }

    /// Seen: after a build of 1.2 GiB a shell that polled for a file kept the limit raised.
    #[test]
    fn what_polls_after_a_burst_is_no_part_of_it() {
        let mut history = History::default();
        history.observe(Nanos(1), Bytes::mib(1200));
        for round in 1..100 {
            history.observe(Nanos(2 * round), Bytes::mib(1));
            history.observe(Nanos(2 * round + 1), Bytes::mib(3));
        }
        assert_eq!(history.last_growth, Nanos(1));
        // Slow growth counts in the end.
        for mib in 3..70 {
            history.observe(Nanos(1000 + mib), Bytes::mib(mib));
        }
        assert_eq!(history.last_growth, Nanos(1062));
    }

    #[test]
    fn a_hold_is_no_quiet_time() {
        let mut history = History::default();
        history.observe(Nanos(1), Bytes::mib(100));
        history.resumed(Nanos(9));
        assert_eq!(history.last_growth, Nanos(9));
    }

    #[test]
    fn what_has_fallen_to_half_is_large_no_more() {
        let mut history = History::default();
        for (at, mib) in [(1, 100), (2, 51), (3, 50), (4, 3)] {
            history.observe(Nanos(at), Bytes::mib(mib));
        }
        assert_eq!(history.last_large, Nanos(2));
        history.observe(Nanos(5), Bytes::mib(60));
        assert_eq!(history.last_large, Nanos(5));
    }

    #[test]
    fn growth_after_a_fall_counts_again() {
        let mut history = History::default();
        history.observe(Nanos(1), Bytes::mib(100));
        history.observe(Nanos(2), Bytes::mib(10));
        history.observe(Nanos(3), Bytes::mib(20));
        assert_eq!(history.last_growth, Nanos(3));
    }
}
