//! The CPU quota of one container: up with the first throttled period, down slowly.
//!
//! A quota that was used up stops every thread of a container until the next period, 50 ms on average, in the middle
//! of whatever they do. To raise it costs microseconds and ends the stop at once (`tg_set_cfs_bandwidth`,
//! kernel/sched/core.c), and nothing is lost by a quota that is not used: who runs is decided by weights. So there is
//! no need to know how much is wanted: the quota goes up by steps of [`STEP`], each at the next throttled period, and
//! is brought down to what was used lately.
//!
//! **Up** never beyond what the policy allows, nor beyond what the container uses and the node has idle: weights
//! share out what is there, and what was promised to others must not be slower for what was not promised.
//!
//! **Down** by what is needed, which is the highest use of late, forgotten over [`FORGET`]: the next burst is met by
//! what is left of the last. A busy node takes nothing back by itself: the container may be the one that keeps it
//! busy, and would be throttled for nobody.
//!
//! It must not plan a quota below the one at rest, nor below what a boost lends.

use serde::{Deserialize, Serialize};

use crate::{
    action::Reason,
    units::{Amount as _, Cpu, Nanos, PERCENT},
};

/// A raise goes to so many times the quota: 16 times in two steps.
const STEP: u64 = 4;
/// Use is taken over at least this long: a period of the kernel's is 100 ms.
pub const SHORTEST_LOOK: Nanos = Nanos::millis(80);
/// What was used is forgotten over this time.
const FORGET: Nanos = Nanos::millis(10_000);
/// The quota goes to so much of what is needed.
const MARGIN_PER_MILLE: u64 = 1500;
/// A quota that would be lowered to more than this share stays.
const WORTH_PER_MILLE: u64 = 800;
/// Nothing is lowered for so long after a throttled period.
const CALM: Nanos = Nanos::millis(1000);
/// The share of throttled periods is taken over so many at least.
const WINDOW_PERIODS: u64 = 100;
/// What was counted before a pause of so long tells nothing of now.
const STALE: Nanos = Nanos::millis(10_000);
/// Quotas between rest and maximum are whole hundredths of a CPU: systemd rounds others up, and what is read back must be
/// what was asked for.
const GRAIN: u64 = PERCENT;

/// The rules for one container's quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuPolicy {
    /// The quota at rest: never lowered below it.
    pub at_rest: Cpu,
    /// The quota that is never exceeded.
    pub max: Cpu,
    /// The share of periods that may be throttled, in thousandths.
    pub throttled_per_mille: u64,
}

/// What the kernel counts of a cgroup (`cpu.stat`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuCounters {
    /// CPU time used.
    pub used: Nanos,
    /// Periods in which it ran.
    pub periods: u64,
    /// Periods at whose end it was throttled.
    pub throttled: u64,
}

/// What was seen of one cgroup's use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuHistory {
    last: Option<(Nanos, CpuCounters)>,
    /// Use over the last look.
    pub used: Cpu,
    /// The highest use of late.
    pub needed: Cpu,
    /// When it was throttled last.
    pub throttled_at: Nanos,
    /// Counters at the start of the running window and of the one before: the share of throttled periods.
    windows: [CpuCounters; 2],
}

impl CpuHistory {
    /// Takes counters in. What is too soon after the last look tells nothing of use, and is left to the next.
    pub fn look(&mut self, at: Nanos, counters: CpuCounters) {
        let Some((before, last)) = self.last else {
            self.last = Some((at, counters));
            self.windows = [counters; 2];
            // Nothing is known of what it uses: nothing is taken away for a moment.
            self.throttled_at = at;
            return;
        };
        if counters.throttled > last.throttled {
            self.throttled_at = self.throttled_at.max(at);
        }
        let window = at.since(before);
        if window > STALE {
            self.windows = [counters; 2];
        }
        if window < SHORTEST_LOOK {
            return;
        }
        self.used = Cpu::of_usage(counters.used.since(last.used), window);
        let kept = FORGET.since(window);
        self.needed = self.used.max(self.needed.scaled(kept.0, FORGET.0));
        if counters.periods.saturating_sub(self.windows[0].periods) >= WINDOW_PERIODS {
            self.windows = [counters, self.windows[0]];
        }
        self.last = Some((at, counters));
    }

    /// It is throttled now, before any counter says so.
    pub fn throttled(&mut self, at: Nanos) {
        self.throttled_at = self.throttled_at.max(at);
    }

    /// Throttled periods in thousandths, the one that runs included, over the last one to two hundred.
    fn throttled_per_mille(&self) -> u64 {
        let [_, since] = self.windows;
        let now = self.last.map_or(since, |(_, now)| now);
        let throttled = now
            .throttled
            .saturating_sub(since.throttled)
            .saturating_add(1);
        let periods = now.periods.saturating_sub(since.periods);
        throttled.saturating_mul(1000) / periods.max(WINDOW_PERIODS)
    }
}

/// All that a decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuSnapshot {
    /// When it was taken.
    pub now: Nanos,
    /// The rules.
    pub policy: CpuPolicy,
    /// What was seen.
    pub history: CpuHistory,
    /// The quota in force.
    pub quota: Cpu,
    /// What a boost lends ([`crate::boost`]): a quota that is not gone below.
    pub boost: Option<Cpu>,
    /// Whether it is throttled at this moment, or was since the last look.
    pub is_throttled: bool,
    /// What nobody on the node uses, less what was given away since that was looked at.
    pub idle: Cpu,
}

/// The quota to set, and why; `None` to leave it.
#[must_use]
pub fn decide(snapshot: &CpuSnapshot) -> Option<(Cpu, Reason)> {
    let CpuSnapshot {
        now,
        policy,
        history,
        quota,
        boost,
        is_throttled,
        idle,
    } = *snapshot;
    let CpuPolicy { at_rest, max, .. } = policy;
    let least = at_rest.max(boost.unwrap_or(Cpu::ZERO));
    if quota < least {
        // Below the one at rest it was left behind by somebody, or the rules have changed.
        let reason = if quota < at_rest {
            Reason::BelowRest
        } else {
            Reason::Boosted
        };
        return Some((least, reason));
    }
    let max = max.max(least);
    if quota > max {
        return Some((max, Reason::Unused));
    }
    if is_throttled {
        let allowed = policy.throttled_per_mille;
        if allowed > 0 && history.throttled_per_mille() <= allowed {
            return None;
        }
        // What it used before it was throttled may be long ago: it has its quota at least.
        let there_is = history.used.max(quota).plus(idle);
        let to = quota.scaled(STEP, 1).min(there_is);
        let to = if to >= max {
            max
        } else {
            Cpu(to.0 - to.0 % GRAIN)
        };
        return (to > quota).then_some((to, Reason::Throttled));
    }
    let is_calm = now.since(history.throttled_at) >= CALM;
    let needed = history.needed.per_mille(MARGIN_PER_MILLE);
    let to = Cpu(needed.0.div_ceil(GRAIN).saturating_mul(GRAIN));
    let to = if needed <= least { least } else { to.min(max) };
    // The least is always worth it: what is near to it would otherwise stay raised for ever.
    let is_worth = to == least || to <= quota.per_mille(WORTH_PER_MILLE);
    (is_calm && is_worth && to < quota).then_some((to, Reason::Unused))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Nanos = Nanos::millis(100);

    /// A container with what the kernel would do to it: it wants so much, and is throttled at its quota.
    struct Model {
        at: Nanos,
        counters: CpuCounters,
        history: CpuHistory,
        quota: Cpu,
        /// What it and others leave idle.
        node: Cpu,
        idle: Cpu,
        policy: CpuPolicy,
        boost: Option<Cpu>,
    }

    impl Model {
        fn new() -> Self {
            let policy = CpuPolicy {
                at_rest: Cpu::millis(250),
                max: Cpu::millis(4000),
                throttled_per_mille: 0,
            };
            Self {
                at: Nanos::millis(10_000),
                counters: CpuCounters::default(),
                history: CpuHistory::default(),
                quota: policy.at_rest,
                node: Cpu::millis(8000),
                idle: Cpu::millis(8000),
                policy,
                boost: None,
            }
        }

        fn decide(&mut self, is_throttled: bool) -> Option<Reason> {
            let decided = decide(&CpuSnapshot {
                now: self.at,
                policy: self.policy,
                history: self.history,
                quota: self.quota,
                boost: self.boost,
                is_throttled,
                idle: self.idle,
            });
            let (to, reason) = decided?;
            assert_ne!(to, self.quota);
            assert!(to >= self.policy.at_rest);
            self.idle = self.idle.minus(to.minus(self.quota));
            self.quota = to;
            Some(reason)
        }

        /// One period; returns whether it was throttled and not raised.
        fn period(&mut self, wanted: Cpu) -> bool {
            self.at = Nanos(self.at.0 + TICK.0);
            self.counters.periods += 1;
            let mut is_throttled = wanted > self.quota;
            if is_throttled {
                self.history.throttled(self.at);
                while wanted > self.quota && self.decide(true).is_some() {}
                is_throttled = wanted > self.quota;
                self.counters.throttled += 1;
            }
            let used = wanted.min(self.quota);
            self.counters.used.0 += used.quota(100_000) * 1000;
            self.history.look(self.at, self.counters);
            self.idle = self.node.minus(used);
            self.decide(is_throttled);
            is_throttled
        }
    }

    #[test]
    fn a_burst_is_not_throttled_for_longer_than_it_takes_to_raise() {
        let mut model = Model::new();
        for _ in 0..100 {
            assert!(!model.period(Cpu::millis(100)));
        }
        assert_eq!(model.quota, Cpu::millis(250));
        for _ in 0..50 {
            assert!(!model.period(Cpu::millis(3000)));
        }
        // What it has is more than it uses, and not much.
        assert!(
            (3000..=4000).contains(&(model.quota.0 / 1000)),
            "{}",
            model.quota
        );
    }

    #[test]
    fn after_a_burst_the_quota_comes_to_rest_slowly() {
        let mut model = Model::new();
        for _ in 0..20 {
            model.period(Cpu::millis(2000));
        }
        let mut until_half = 0;
        let mut until_rest = 0;
        for period in 1..600 {
            model.period(Cpu::millis(50));
            until_half += u64::from(model.quota > Cpu::millis(2000));
            if model.quota > Cpu::millis(250) {
                until_rest = period;
            }
        }
        assert!((10..100).contains(&until_half), "{until_half}");
        assert!((100..400).contains(&until_rest), "{until_rest}");
    }

    #[test]
    fn no_more_than_the_policy_allows_and_the_node_has() {
        let mut model = Model::new();
        assert!(model.period(Cpu::millis(100_000)));
        assert_eq!(model.quota, Cpu::millis(4000));
        let mut model = Model::new();
        (model.node, model.idle) = (Cpu::millis(600), Cpu::millis(300));
        for _ in 0..10 {
            model.period(Cpu::millis(4000));
        }
        assert_eq!(model.quota, model.node);
    }

    #[test]
    fn a_share_of_throttled_periods_may_be_allowed() {
        let mut model = Model::new();
        model.policy.throttled_per_mille = 50;
        for _ in 0..200 {
            model.period(Cpu::millis(100));
        }
        let raised = |model: &Model| model.quota > model.policy.at_rest;
        for _ in 0..5 {
            assert!(model.period(Cpu::millis(300)) && !raised(&model));
            for _ in 0..30 {
                model.period(Cpu::millis(100));
            }
        }
        for _ in 0..20 {
            model.period(Cpu::millis(300));
        }
        assert!(raised(&model));
    }

    #[test]
    fn a_burst_after_a_long_quiet_time_is_raised_at_once() {
        for allowed in [0, 5] {
            let mut model = Model::new();
            model.policy.throttled_per_mille = allowed;
            model.history.look(model.at, model.counters);
            for quiet in [5000, 100_000] {
                // It runs, and nobody looks.
                model.at.0 += quiet * TICK.0;
                model.counters.periods += quiet;
                model.history.throttled(model.at);
                model.history.look(model.at, model.counters);
                assert_eq!(model.decide(true), Some(Reason::Throttled), "{quiet}");
                model.quota = model.policy.at_rest;
            }
        }
    }

    #[test]
    fn what_is_set_between_rest_and_maximum_is_whole() {
        let mut model = Model::new();
        model.policy.at_rest = Cpu(333_333);
        model.policy.max = Cpu(3_333_333);
        model.quota = Cpu(333_333);
        for period in 0..300 {
            model.period(Cpu::millis(if period < 50 { 2000 } else { 40 }));
            let is_whole = model.quota.0.is_multiple_of(GRAIN);
            let ends = [model.policy.at_rest, model.policy.max];
            assert!(is_whole || ends.contains(&model.quota), "{:?}", model.quota);
        }
        assert_eq!(model.quota, model.policy.at_rest);
    }

    #[test]
    fn rules_that_change_are_followed() {
        let mut model = Model::new();
        for _ in 0..20 {
            model.period(Cpu::millis(2000));
        }
        model.policy.max = Cpu::millis(500);
        assert_eq!(model.decide(false), Some(Reason::Unused));
        assert_eq!(model.quota, Cpu::millis(500));
        model.policy.at_rest = Cpu::millis(1000);
        assert_eq!(model.decide(false), Some(Reason::BelowRest));
        assert_eq!(model.quota, Cpu::millis(1000));
        // A maximum below what it has at rest takes nothing away.
        assert_eq!(model.decide(false), None);
    }

    #[test]
    fn who_is_seen_for_the_first_time_keeps_what_it_uses() {
        let mut model = Model::new();
        model.quota = Cpu::millis(4000);
        for _ in 0..30 {
            model.period(Cpu::millis(2000));
            assert!(model.quota >= Cpu::millis(3000), "{}", model.quota);
        }
    }

    #[test]
    fn a_boost_is_a_floor_and_no_ceiling() {
        let mut model = Model::new();
        // Whatever is idle: those that start together would each leave the next nothing.
        (model.node, model.idle) = (Cpu::ZERO, Cpu::ZERO);
        model.boost = Some(Cpu::millis(2000));
        assert_eq!(model.decide(false), Some(Reason::Boosted));
        for _ in 0..200 {
            model.period(Cpu::millis(10));
            assert_eq!(model.quota, Cpu::millis(2000));
        }
        (model.node, model.idle) = (Cpu::millis(8000), Cpu::millis(8000));
        assert!(!model.period(Cpu::millis(3000)));
        model.boost = None;
        for _ in 0..400 {
            model.period(Cpu::millis(10));
        }
        assert_eq!(model.quota, model.policy.at_rest);
    }

    #[test]
    fn where_nothing_but_a_boost_is_allowed_its_end_is_the_end() {
        let mut model = Model::new();
        model.policy.max = model.policy.at_rest;
        assert!(model.period(Cpu::millis(2000)));
        model.boost = Some(Cpu::millis(2000));
        model.decide(false);
        for _ in 0..20 {
            assert!(!model.period(Cpu::millis(2000)));
        }
        model.boost = None;
        assert_eq!(model.decide(false), Some(Reason::Unused));
        assert_eq!(model.quota, model.policy.at_rest);
    }

    #[test]
    fn counters_that_jump_do_no_harm() {
        let mut model = Model::new();
        for counters in [
            CpuCounters {
                used: Nanos(u64::MAX),
                periods: u64::MAX,
                throttled: u64::MAX,
            },
            CpuCounters::default(),
            CpuCounters {
                used: Nanos(u64::MAX),
                periods: 0,
                throttled: 0,
            },
        ] {
            model.at = Nanos(model.at.0 + TICK.0);
            model.history.look(model.at, counters);
            model.decide(true);
            model.decide(false);
            assert!(model.quota <= model.policy.max);
        }
        model.history.look(Nanos(0), CpuCounters::default());
    }
}
