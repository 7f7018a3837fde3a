//! A limit of somebody else's that is moved for a while: what it was, and how ours is told from theirs.
//!
//! Nothing in the kernel says who has written a limit. So each value is noted before it is asked for, and one that
//! is neither noted nor the one at rest was set by somebody else, who wins: it is the new one at rest.
//!
//! A pod's limit must hold what its containers have, or they are killed by their pod: it goes up before a container
//! does, and down after it. By how much is computed anew each time from what it is at rest and what all of its
//! containers have, so that whatever was cut short is mended by the next step, whoever takes it.

use serde::{Deserialize, Serialize};

use crate::units::Amount;

/// How many of our own values are remembered: one may be under way, one may have been taken back.
const ASKED: usize = 4;

/// A limit that is moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedLimit<T> {
    /// What it is at rest: what somebody else has set.
    pub at_rest: T,
    /// What we have asked for, the latest first.
    pub asked: Vec<T>,
}

impl<T: Amount> MovedLimit<T> {
    /// One that was never moved.
    #[must_use]
    pub const fn new(at_rest: T) -> Self {
        Self {
            at_rest,
            asked: Vec::new(),
        }
    }

    /// Whether a value is one that we have set or may have set, or the one at rest.
    #[must_use]
    pub fn is_ours(&self, limit: T) -> bool {
        limit == self.at_rest || self.asked.contains(&limit)
    }

    /// Takes note of a value that is asked for while another is in force. That stays ours if it is, however often
    /// what is asked for does not come.
    pub fn ask(&mut self, limit: T, in_force: T) {
        let is_ours = self.is_ours(in_force);
        self.asked.retain(|&asked| asked != limit);
        self.asked.insert(0, limit);
        self.asked.truncate(ASKED);
        if is_ours && !self.is_ours(in_force) {
            self.asked.truncate(ASKED - 1);
            self.asked.push(in_force);
        }
    }

    /// It is at rest, and nothing is under way: whoever sets a value now that we have set before is somebody else.
    pub fn rest(&mut self) {
        self.asked.clear();
    }

    /// By how much it is above the one at rest, or may be at any moment: what was asked for last may not be in force
    /// yet, and a lower one may never be.
    #[must_use]
    pub fn raised_by(&self, in_force: T) -> T {
        let latest = self.asked.first().copied().unwrap_or(self.at_rest);
        latest.max(in_force).minus(self.at_rest)
    }
}

/// What is to be done with a pod's limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodStep<T> {
    /// It is what it must be.
    Keep,
    /// It must be raised, before any of its containers is.
    Raise(T),
    /// It may be lowered, if usage allows.
    Lower(T),
    /// Somebody else has set it: this is what it is at rest now.
    Foreign(T),
}

/// The next step for a pod whose limit is `in_force`, with containers that are raised by so much each.
#[must_use]
pub fn pod_step<T: Amount>(
    pod: &MovedLimit<T>,
    in_force: T,
    raised: impl IntoIterator<Item = T>,
) -> PodStep<T> {
    if !pod.is_ours(in_force) {
        return PodStep::Foreign(in_force);
    }
    let wanted = raised.into_iter().fold(pod.at_rest, T::plus);
    match in_force.cmp(&wanted) {
        std::cmp::Ordering::Less => PodStep::Raise(wanted),
        std::cmp::Ordering::Equal => PodStep::Keep,
        std::cmp::Ordering::Greater => PodStep::Lower(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn the_latest_values_are_ours_and_the_one_at_rest() {
        let mut limit = MovedLimit::new(Bytes::mib(64));
        let at_rest = limit.at_rest;
        for mib in [128, 256, 512, 1024, 512, 64] {
            limit.ask(Bytes::mib(mib), at_rest);
        }
        let ours = [64, 256, 512, 1024].map(|mib| limit.is_ours(Bytes::mib(mib)));
        assert_eq!(ours, [true; 4]);
        assert!(!limit.is_ours(Bytes::mib(128)) && !limit.is_ours(Bytes::mib(65)));
        // What is in force is not forgotten for what does not come.
        for mib in 600..700 {
            limit.ask(Bytes::mib(mib), Bytes::mib(512));
            assert!(limit.is_ours(Bytes::mib(512)) && limit.is_ours(Bytes::mib(mib)));
        }
        limit.rest();
        assert!(!limit.is_ours(Bytes::mib(512)) && limit.is_ours(Bytes::mib(64)));
    }

    #[test]
    fn what_is_on_its_way_counts_as_raised_and_so_does_what_has_not_come_down() {
        let mut limit = MovedLimit::new(Bytes::mib(64));
        assert_eq!(limit.raised_by(Bytes::mib(64)), Bytes::ZERO);
        limit.ask(Bytes::mib(96), Bytes::mib(64));
        assert_eq!(limit.raised_by(Bytes::mib(64)), Bytes::mib(32));
        limit.ask(Bytes::mib(64), Bytes::mib(96));
        assert_eq!(limit.raised_by(Bytes::mib(96)), Bytes::mib(32));
        assert_eq!(limit.raised_by(Bytes::mib(64)), Bytes::ZERO);
        // At rest below what the container was given: nothing is taken from the pod.
        assert_eq!(limit.raised_by(Bytes::mib(32)), Bytes::ZERO);
    }

    /// A pod of two containers, and whoever moves their limits.
    struct Model {
        pod: (MovedLimit<Bytes>, Bytes),
        containers: [(MovedLimit<Bytes>, Bytes); 2],
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Ask(usize, u64),
        Arrive(usize),
        Restart(usize),
        Settle,
        Foreign(u64),
    }

    impl Model {
        fn new() -> Self {
            let container = || (MovedLimit::new(Bytes::mib(10)), Bytes::mib(10));
            Self {
                pod: (MovedLimit::new(Bytes::mib(20)), Bytes::mib(20)),
                containers: [container(), container()],
            }
        }

        /// One step of the pod. All that it needs is written down: the agent may die after any.
        fn settle(&mut self, may_lower: bool) {
            let raised = self.containers.iter();
            let raised = raised.map(|(limit, in_force)| limit.raised_by(*in_force));
            let (pod, in_force) = &mut self.pod;
            match pod_step(pod, *in_force, raised) {
                PodStep::Keep => {}
                PodStep::Lower(_) if !may_lower => {}
                PodStep::Raise(to) | PodStep::Lower(to) => {
                    pod.ask(to, *in_force);
                    *in_force = to;
                }
                PodStep::Foreign(limit) => {
                    *pod = MovedLimit::new(limit);
                    self.settle(may_lower);
                }
            }
        }

        fn take(&mut self, step: Step) {
            match step {
                Step::Ask(which, mib) => {
                    let (limit, in_force) = &mut self.containers[which];
                    limit.ask(Bytes::mib(mib), *in_force);
                    self.settle(false);
                }
                Step::Arrive(which) => {
                    let (limit, in_force) = &mut self.containers[which];
                    *in_force = *limit.asked.first().unwrap_or(in_force);
                }
                Step::Restart(which) => {
                    self.containers[which] = (MovedLimit::new(Bytes::mib(10)), Bytes::mib(10));
                }
                Step::Settle => self.settle(true),
                Step::Foreign(mib) => self.pod.1 = Bytes::mib(mib),
            }
        }
    }

    #[test]
    fn whatever_happens_a_pod_holds_what_its_containers_have_and_comes_to_rest() {
        use Step::{Arrive, Ask, Foreign, Restart, Settle};
        let steps = [
            Ask(0, 15),
            Ask(0, 10),
            Ask(1, 40),
            Ask(1, 20),
            Arrive(0),
            Arrive(1),
            Restart(0),
            Settle,
            Foreign(33),
        ];
        let count = steps.len();
        for number in 0..count.pow(5) {
            let mut model = Model::new();
            let mut rest = number;
            let mut taken = Vec::new();
            // Until the next look nobody has answered what somebody else has set.
            let mut is_foreign = false;
            for _ in 0..5 {
                let step = steps[rest % count];
                rest /= count;
                taken.push(step);
                model.take(step);
                let extra =
                    |(limit, in_force): &(MovedLimit<Bytes>, Bytes)| in_force.minus(limit.at_rest);
                let needed = model.containers.iter().map(extra);
                let needed = needed.fold(model.pod.0.at_rest, Bytes::plus);
                is_foreign = match step {
                    Foreign(_) => true,
                    Ask(..) | Settle => false,
                    Arrive(_) | Restart(_) => is_foreign,
                };
                assert!(model.pod.1 >= needed || is_foreign, "{taken:?}");
            }
            for which in [0, 1] {
                model.take(Ask(which, 10));
                model.take(Arrive(which));
            }
            model.take(Settle);
            assert_eq!(model.pod.1, model.pod.0.at_rest, "{taken:?}");
        }
    }
}
