//! The reflex table: what to do at a watermark, decided before it is reached.
//!
//! A burst crosses the last 3 % of a small limit in a millisecond; nothing that thinks fits in
//! there. So core thinks beforehand: for each guarded cgroup it lays out the rungs that a burst
//! can climb, and the reflex only looks up the lowest rung whose watermark the demand has not
//! passed. The table holds raises only, and only up to the ceiling, so whatever the reflex does
//! was allowed. It must not hold anything that lowers a limit: lowering reclaims in the writer and
//! can block or kill.

use serde::{Deserialize, Serialize};

use crate::{
    policy::{Actuation, Policy},
    thresholds::Thresholds,
    units::{Bytes, Nanos},
};

/// A direct raise goes to 2.2 times the demand: with steps of about two, a burst of sixteen times
/// its limit takes four raises, and what is granted stays near 1.1 times 1.25 of what is used.
const DIRECT_STEP_PER_MILLE: u64 = 2200;

/// One step of a burst: when demand reaches `watermark`, the limit becomes `limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rung {
    /// Demand from which on this rung is needed.
    pub trigger: Bytes,
    /// The new `memory.max`.
    pub limit: Bytes,
    /// What to watch then; `None` at the ceiling, where the brake is removed.
    pub thresholds: Option<Thresholds>,
}

/// What holds a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hold {
    /// The freezer, and the brake for what grows on inside a system call.
    Freezer,
    /// The brake alone: a probe would fail too often in a frozen container.
    Brake,
}

/// What the reflex does in one cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reaction {
    /// Climb the rungs by writing `memory.max`.
    Raise {
        /// In rising order.
        rungs: Vec<Rung>,
    },
    /// Hold the container at this demand; the limit is raised by somebody else.
    Hold {
        /// Demand from which on to hold.
        at: Bytes,
        /// By what.
        by: Hold,
    },
    /// Nothing: the ceiling is reached.
    Nothing,
}

/// The thresholds of a limit under a policy; none at or above the ceiling.
#[must_use]
pub fn thresholds(policy: &Policy, limit: Bytes) -> Option<Thresholds> {
    (limit < policy.ceiling).then(|| Thresholds::under(policy, limit))
}

/// What the reflex does while the limit is `limit`.
#[must_use]
pub fn reaction(policy: &Policy, limit: Bytes) -> Reaction {
    let Some(at_limit) = thresholds(policy, limit) else {
        return Reaction::Nothing;
    };
    match policy.actuation {
        Actuation::Direct => Reaction::Raise {
            rungs: ladder(policy, limit, at_limit),
        },
        Actuation::Requested { .. } => Reaction::Hold {
            at: at_limit.hold,
            by: if policy.patience.may_freeze() {
                Hold::Freezer
            } else {
                Hold::Brake
            },
        },
    }
}

fn ladder(policy: &Policy, mut in_force: Bytes, mut current: Thresholds) -> Vec<Rung> {
    let mut rungs = Vec::new();
    loop {
        let trigger = current.watermark;
        let step = || {
            let usable = trigger.per_mille(DIRECT_STEP_PER_MILLE);
            let step = policy.limit_for(usable).round_up_mib();
            step.min(policy.ceiling)
        };
        // Without programs the watermark is so low that what was learnt may be in force already.
        let learnt = policy.learnt_for(trigger);
        let limit = learnt
            .filter(|&learnt| learnt > in_force)
            .unwrap_or_else(step);
        let next = thresholds(policy, limit);
        rungs.push(Rung {
            trigger,
            limit,
            thresholds: next,
        });
        in_force = limit;
        match next {
            Some(next) if next.watermark > trigger => current = next,
            _ => return rungs,
        }
    }
}

/// Whether growth must be held now rather than at the hold threshold: at this rate it would be at the limit
/// before the answer. What creeps is left running for as long as it may; what rushes in is held while there
/// is the most room left for what goes on inside system calls.
#[must_use]
pub fn is_rushing(limit: Bytes, demand: Bytes, rate_per_second: Bytes, answer: Nanos) -> bool {
    let grown_meanwhile = rate_per_second.scaled(answer.0, 1_000_000_000);
    grown_meanwhile.per_mille(1500) >= limit.minus(demand)
}

/// The rung for a demand: the lowest whose next watermark is above it.
#[must_use]
pub fn rung_for(rungs: &[Rung], demand: Bytes) -> Option<&Rung> {
    rungs.iter().rfind(|rung| demand >= rung.trigger)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Signals;

    fn policy(original: u64, ceiling: u64) -> Policy {
        Policy::direct(Bytes::mib(original), Bytes::mib(ceiling))
    }

    #[test]
    fn sixteen_fold_takes_at_most_five_rungs() {
        for original in 32..=256 {
            let policy = policy(original, original * 24);
            let Reaction::Raise { rungs } = reaction(&policy, policy.original) else {
                panic!("no ladder")
            };
            let needed = rungs
                .iter()
                .take_while(|rung| rung.trigger < Bytes::mib(original * 16))
                .count();
            assert!(needed <= 5, "{original}: {rungs:?}");
        }
    }

    #[test]
    fn the_ladder_rises_to_the_ceiling_and_stops() {
        let policy = policy(100, 1000);
        let Reaction::Raise { rungs } = reaction(&policy, policy.original) else {
            panic!("no ladder")
        };
        assert!(
            rungs
                .windows(2)
                .all(|pair| pair[0].limit < pair[1].limit && pair[0].trigger < pair[1].trigger)
        );
        let top = rungs.last().expect("not empty");
        assert_eq!((top.limit, top.thresholds), (policy.ceiling, None));
    }

    #[test]
    fn what_runs_before_have_needed_is_the_first_rung() {
        let policy = Policy {
            learnt: Some(Bytes::mib(700)),
            ..policy(100, 4000)
        };
        let limits = |policy: &Policy| match reaction(policy, policy.original) {
            Reaction::Raise { rungs } => rungs.iter().map(|rung| rung.limit).collect(),
            _ => Vec::new(),
        };
        assert_eq!(limits(&policy)[0], Bytes::mib(700));
        // And from there by steps.
        assert!(limits(&policy)[1] > Bytes::mib(1400));
        // What is used up is no help, and what is not allowed is not granted.
        for learnt in [Bytes::ZERO, Bytes::mib(100)] {
            let used_up = Policy {
                learnt: Some(learnt),
                ..policy
            };
            let unlearnt = Policy {
                learnt: None,
                ..policy
            };
            assert_eq!(limits(&used_up), limits(&unlearnt));
        }
        let small = Policy {
            ceiling: Bytes::mib(300),
            ..policy
        };
        assert_eq!(limits(&small), [Bytes::mib(300)]);
    }

    #[test]
    fn who_needs_more_than_was_learnt_goes_on_without_programs_too() {
        for signals in [Signals::Programs, Signals::Files] {
            for learnt in (100..=4000).step_by(50) {
                let policy = Policy {
                    learnt: Some(Bytes::mib(learnt)),
                    signals,
                    ..policy(100, 4000)
                };
                let Reaction::Raise { rungs } = reaction(&policy, policy.original) else {
                    panic!("no ladder")
                };
                assert!(rungs.windows(2).all(|pair| pair[0].limit < pair[1].limit));
                let top = rungs.last().map(|rung| rung.limit);
                assert_eq!(top, Some(policy.ceiling), "{learnt}");
            }
        }
    }

    #[test]
    fn a_jump_takes_the_rung_that_fits() {
        let policy = policy(100, 4000);
        let Reaction::Raise { rungs } = reaction(&policy, policy.original) else {
            panic!("no ladder")
        };
        assert_eq!(rung_for(&rungs, Bytes::mib(50)), None);
        let jumped = rung_for(&rungs, Bytes::mib(300)).expect("above the first watermark");
        assert!(jumped.limit > Bytes::mib(300));
    }

    #[test]
    fn a_leak_is_not_rushing_and_a_burst_is() {
        let (limit, demand) = (Bytes::mib(256), Bytes::mib(249));
        let answer = Nanos::millis(600);
        assert!(!is_rushing(limit, demand, Bytes::mib(1), answer));
        assert!(is_rushing(limit, demand, Bytes::mib(200), answer));
        assert!(!is_rushing(limit, demand, Bytes::ZERO, answer));
    }

    #[test]
    fn where_somebody_else_throttles_it_is_held_before() {
        let policy = Policy {
            actuation: Actuation::Requested {
                p95: Nanos::millis(700),
            },
            usable_per_mille: 900,
            ..policy(100, 1000)
        };
        let Reaction::Hold { at, .. } = reaction(&policy, policy.original) else {
            panic!("no hold")
        };
        assert!(at < Bytes::mib(90) && at > Bytes::mib(86), "{at}");
    }

    #[test]
    fn at_the_ceiling_there_is_nothing() {
        let policy = policy(100, 100);
        assert_eq!(reaction(&policy, policy.original), Reaction::Nothing);
    }
}
