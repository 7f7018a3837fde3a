//! What runs of a workload have needed: the peaks of the last ones, by what began them.
//!
//! A burst that is like one before starts with what that needed, in one raise. Like is: the same workload, which is whoever
//! makes its pods and the container's name in them and so outlives a pod, and the same trigger, the program that the memory
//! is for: `make` and the language server of one container have nothing to do with each other.
//!
//! **How much.** The highest peak of the last [`RUNS`] runs, and a margin, so that the watermark is not reached again. The
//! highest, because a build that has less to do now and then must not make the next whole one climb anew; of the last
//! ones, because a workload that has become smaller is to be believed after as many runs. What one more than that
//! needed is forgotten, whatever it was: a freak run costs its room for so many runs and no more.
//!
//! **What is one run.** A build has phases, between which its limit may come down. What begins again within [`CONTINUED`] for the
//! same belongs to the run before; else a run of four phases would forget its own first.
//!
//! **How long it pauses.** What grows again was not over: each time the limit came down for nothing, and had to be raised
//! anew. So the longest time in a run after which it went on is remembered, too, and the next is waited for half as long again
//! ([`quiet_after`]) before its limit comes down. What that costs is room that is kept for no more than a minute, and where
//! somebody waits for room it is not kept. Who builds every half minute is kept raised in between.
//!
//! **Where it errs.** A run that needs more than any of the last climbs from there, by steps, and is learnt. Runs of one
//! trigger that differ widely (a build of everything after three of one file) are granted too much or climb; nothing tells
//! them apart before they have grown. What is unlike anything before is granted by steps as if nothing was learnt.
//!
//! It must not forget what others need to remember something new without end: the triggers are bounded, too, and the one
//! that was seen longest ago goes first.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// Runs of one trigger that are remembered.
pub const RUNS: usize = 3;
/// What begins so soon after its like has ended is the same run.
pub const CONTINUED: Nanos = Nanos::millis(10_000);
/// What has paused is waited for so much longer than it did.
const PAUSE_PER_MILLE: u64 = 1500;
/// And at most for so long.
const LONGEST_QUIET: Nanos = Nanos::millis(60_000);
/// Triggers that are remembered of one workload.
pub const TRIGGERS: usize = 16;
/// What a burst needed is so much more than it used: the watermark must not be reached again.
const MARGIN_PER_MILLE: u64 = 1150;

/// One run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    trigger: String,
    /// The highest demand in it.
    peak: Bytes,
    /// The longest that it did not grow, and went on.
    #[serde(default)]
    pause: Nanos,
}

/// What was seen of a run that has ended, or of a part of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// The highest demand in it.
    pub peak: Bytes,
    /// The longest that it did not grow, and went on.
    pub pause: Nanos,
    /// Whether it belongs to the last run for the same.
    pub continues: bool,
}

/// For how long nothing must come of one that has paused for so long before it is over.
#[must_use]
pub fn quiet_after(pause: Nanos) -> Nanos {
    pause.per_mille(PAUSE_PER_MILLE).min(LONGEST_QUIET)
}

/// What is known of one workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learnt {
    /// The latest first.
    runs: Vec<Run>,
}

impl Learnt {
    /// A run has ended, or a further part of the last one.
    pub fn ended(&mut self, trigger: &str, part: Part) {
        let Part {
            peak,
            pause,
            continues,
        } = part;
        let mut last = self.runs.iter_mut();
        let last = last.find(|run| run.trigger == trigger);
        if let Some(last) = last.filter(|_| continues) {
            last.peak = last.peak.max(peak);
            last.pause = last.pause.max(pause);
            return;
        }
        let run = Run {
            trigger: trigger.to_owned(),
            peak,
            pause,
        };
        self.runs.insert(0, run);
        let mut known: Vec<(String, usize)> = Vec::new();
        self.runs.retain(|run| {
            let place = known
                .iter()
                .position(|(trigger, _)| *trigger == run.trigger);
            match place.and_then(|place| known.get_mut(place)) {
                Some((_, runs)) => {
                    *runs += 1;
                    *runs <= RUNS
                }
                None => {
                    known.push((run.trigger.clone(), 1));
                    known.len() <= TRIGGERS
                }
            }
        });
    }

    /// What a run with this trigger is expected to use, with the margin; `None` for one that is like none before.
    #[must_use]
    pub fn expected(&self, trigger: &str) -> Option<Bytes> {
        let runs = self.runs.iter().filter(|run| run.trigger == trigger);
        let peak = runs.map(|run| run.peak).max()?;
        Some(peak.per_mille(MARGIN_PER_MILLE))
    }

    /// The longest pause of runs with this trigger.
    #[must_use]
    pub fn pause(&self, trigger: &str) -> Nanos {
        let runs = self.runs.iter().filter(|run| run.trigger == trigger);
        runs.map(|run| run.pause).max().unwrap_or_default()
    }

    /// What the largest of all its triggers is expected to use.
    #[must_use]
    pub fn largest(&self) -> Option<Bytes> {
        let peaks = self.runs.iter().map(|run| run.peak);
        Some(peaks.max()?.per_mille(MARGIN_PER_MILLE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn part(mib: u64, continues: bool) -> Part {
        Part {
            peak: Bytes::mib(mib),
            pause: Nanos(0),
            continues,
        }
    }

    fn learnt(runs: &[(&str, u64)]) -> Learnt {
        let mut learnt = Learnt::default();
        for (trigger, mib) in runs {
            learnt.ended(trigger, part(*mib, false));
        }
        learnt
    }

    #[test]
    fn a_pause_is_remembered_for_as_many_runs() {
        let mut learnt = learnt(&[("make", 1000)]);
        let pause = |seconds: u64| Part {
            pause: Nanos::millis(seconds * 1000),
            ..part(100, seconds == 4)
        };
        for seconds in [7, 4, 2] {
            learnt.ended("make", pause(seconds));
        }
        assert_eq!(learnt.pause("make"), Nanos::millis(7000));
        learnt.ended("make", part(100, false));
        assert_eq!(learnt.pause("make"), Nanos::millis(7000));
        learnt.ended("make", part(100, false));
        assert_eq!(learnt.pause("make"), Nanos::millis(2000));
        assert_eq!(learnt.pause("node"), Nanos(0));
        assert_eq!(quiet_after(Nanos::millis(7000)), Nanos::millis(10_500));
        assert_eq!(quiet_after(Nanos(u64::MAX)), LONGEST_QUIET);
    }

    #[test]
    fn each_trigger_has_its_own_size() {
        let learnt = learnt(&[("make", 1000), ("node", 200)]);
        assert_eq!(learnt.expected("make"), Some(Bytes::mib(1150)));
        assert_eq!(learnt.expected("node"), Some(Bytes::mib(230)));
        assert_eq!(learnt.expected("cargo"), None);
        assert_eq!(learnt.largest(), Some(Bytes::mib(1150)));
        assert_eq!(Learnt::default().largest(), None);
    }

    #[test]
    fn one_small_run_unlearns_nothing_and_three_do() {
        let mut learnt = learnt(&[("make", 1000)]);
        for left in [Bytes::mib(1150), Bytes::mib(1150), Bytes::mib(115)] {
            learnt.ended("make", part(100, false));
            assert_eq!(learnt.expected("make"), Some(left));
        }
    }

    #[test]
    fn the_phases_of_a_run_are_one() {
        let mut learnt = learnt(&[("make", 1000)]);
        for mib in [500, 100, 100, 100, 100, 700, 100] {
            learnt.ended("make", part(mib, mib != 500));
        }
        let runs: Vec<Bytes> = learnt.runs.iter().map(|run| run.peak).collect();
        assert_eq!(runs, [Bytes::mib(700), Bytes::mib(1000)]);
        // One that continues what is not known is a run.
        learnt.ended("node", part(9, true));
        assert!(learnt.expected("node").is_some());
    }

    #[test]
    fn what_needs_more_is_learnt_at_once() {
        let learnt = learnt(&[("make", 100), ("make", 1000)]);
        assert_eq!(learnt.expected("make"), Some(Bytes::mib(1150)));
    }

    #[test]
    fn nothing_grows_without_end() {
        let mut learnt = learnt(&[("first", 1)]);
        for number in 0..10 * TRIGGERS {
            learnt.ended("make", part(7, false));
            learnt.ended(&format!("program-{number}"), part(1, false));
        }
        assert!(
            learnt.runs.len() <= TRIGGERS * RUNS,
            "{}",
            learnt.runs.len()
        );
        assert_eq!(learnt.expected("first"), None, "the longest ago");
        assert!(learnt.expected("make").is_some());
    }
}
