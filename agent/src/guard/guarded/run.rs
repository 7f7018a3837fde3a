//! What a burst is and was for, as far as it is learnt: how much it has needed, and for how long it has paused.
//!
//! Of a leak, and of a raise for page cache, nothing is learnt: whoever comes after it would begin with more.
//!
//! It must not call what came after a first step down another run: a build would be taken for smaller than it is.

use bellows_core::{
    Actuation, Bytes, Nanos, Thresholds,
    growth::{Nature, UNTRIGGERED},
    learnt::{CONTINUED, Part, quiet_after},
};

use super::Guarded;

/// Who uses less than this share of the limit at rest, and was not raised, has no burst.
const CALM_PER_MILLE: u64 = 900;

/// A run that has ended, unless it goes on.
pub(super) struct LastRun {
    trigger: String,
    ended: Nanos,
    /// When it had grown last.
    grown: Nanos,
}

impl Guarded {
    /// For how long nothing must come before what it has more than at rest is taken from it. It has paused before, and went on.
    /// What no policy allows any more is not kept for that.
    pub(in crate::guard) fn quiet(&self) -> Nanos {
        if self.policy.ceiling <= self.policy.original {
            return Nanos(0);
        }
        quiet_after(self.learnt_pause.max(self.pause))
    }

    /// Takes note of what a burst uses.
    pub(in crate::guard) fn look_at_burst(&mut self, at: Nanos) {
        if let Some(spell) = &mut self.spell {
            spell.observe(at, self.history.demand);
            if spell.age(at) < UNTRIGGERED {
                self.nature = Nature::Burst;
            }
        }
        // A limit that comes down in steps has room for more of the same.
        if self.burst_since.is_some() || self.raised_since.is_some() {
            self.burst_peak = self.burst_peak.max(self.history.demand);
        }
        let grown = std::mem::replace(&mut self.grown, self.history.last_growth);
        if self.raised_since.is_some_and(|since| grown >= since) {
            self.pause = self.pause.max(self.grown.since(grown));
        }
    }

    /// Remembers what runs have needed that were for the same. Where the reflex raises by itself there is nobody to ask when
    /// it does: all runs are of one kind.
    pub(in crate::guard) fn recall(&mut self, trigger: String) {
        self.learnt_pause = self.learnt.pause(&trigger);
        let expected = self.learnt.expected(&trigger);
        self.policy.learnt = expected.map(|needed| self.policy.limit_for(needed).round_up_mib());
        self.trigger = Some(trigger);
    }

    /// What it needed is learnt, and room is kept for it no longer.
    pub(in crate::guard) fn burst_is_over(&mut self, at: Nanos) {
        let since = self.burst_since.take();
        self.reserved = None;
        self.told_bound = None;
        self.told_stop = None;
        let worst = std::mem::replace(&mut self.worst, Nature::Burst);
        let peak = std::mem::take(&mut self.burst_peak);
        let mut pause = std::mem::replace(&mut self.pause, Nanos(0));
        let last = self.last_run.take();
        // Without a raise it is what the last one was for that comes down further.
        let named = last.as_ref().filter(|_| since.is_none());
        let named = named.map(|last| last.trigger.clone());
        let trigger = self.trigger.take().or(named).unwrap_or_default();
        // Of a raise for page cache nothing is learnt, and of a leak neither: whoever comes after it would begin with more.
        if worst < Nature::Leak
            && Thresholds::under(&self.policy, self.policy.original).watermark <= peak
        {
            let is_soon =
                |last: &LastRun| since.is_none_or(|since| since.since(last.ended) < CONTINUED);
            let last = last.filter(|last| last.trigger == trigger && is_soon(last));
            if let (Some(last), Some(since)) = (&last, since) {
                pause = pause.max(since.since(last.grown));
            }
            let part = Part {
                peak,
                pause,
                continues: last.is_some(),
            };
            self.learnt.ended(&trigger, part);
            self.ended = Some((trigger.clone(), part));
            self.last_run = Some(LastRun {
                trigger: trigger.clone(),
                ended: at,
                grown: self.history.last_growth,
            });
        } else {
            self.last_run = last;
        }
        if self.policy.actuation == Actuation::Direct {
            self.recall(trigger);
        } else {
            self.policy.learnt = None;
        }
    }

    /// Takes note of what is thought of its growth.
    pub(in crate::guard) fn is_thought(&mut self, nature: Nature) {
        self.nature = nature;
        self.worst = self.worst.max(nature);
    }

    /// What it grows by from now on is another matter.
    pub(super) const fn has_rested(&mut self) {
        self.spell = None;
        self.nature = Nature::Burst;
    }

    /// Whether it is at rest, and uses less than who bursts.
    pub(in crate::guard) fn is_calm(&self) -> bool {
        let is_at_rest = self.limit <= self.policy.original && self.requested.is_none();
        is_at_rest && self.history.demand < self.limit.per_mille(CALM_PER_MILLE)
    }

    /// A burst that was expected did not come: what begins next may be for something else.
    pub(in crate::guard) fn calm_down(&mut self) {
        self.let_go.take_if(|_| self.requested.is_none());
        if self.is_calm() && self.policy.actuation != Actuation::Direct {
            (self.burst_since, self.trigger, self.policy.learnt) = (None, None, None);
            self.has_rested();
            self.burst_peak = Bytes::ZERO;
            self.learnt_pause = Nanos(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use bellows_core::{Learnt, Policy};

    use super::{super::tests::guarded, *};

    #[test]
    fn a_run_that_ends_is_learnt_by_what_it_was_for() {
        let mut run = guarded(Bytes::mib(512), 0);
        run.recall("make".to_owned());
        assert_eq!(run.policy.learnt, None);
        run.limit_is(Nanos::millis(400), Bytes::mib(512));
        run.history.observe(Nanos::millis(500), Bytes::mib(400));
        run.look_at_burst(Nanos::millis(500));
        run.limit_is(Nanos::millis(9000), Bytes::mib(64));
        let part = |continues, pause| Part {
            peak: Bytes::mib(400),
            pause: Nanos::millis(pause),
            continues,
        };
        assert_eq!(run.ended, Some(("make".to_owned(), part(false, 500))));
        for (trigger, learnt) in [("make", Some(Bytes::mib(460))), ("node", None)] {
            run.recall(trigger.to_owned());
            assert_eq!(run.policy.learnt, learnt);
        }
        // What begins again at once belongs to it, and later does not.
        for (seconds, continues, pause) in [(12, true, 11_500), (60, false, 0)] {
            run.recall("make".to_owned());
            run.limit_is(Nanos::millis(seconds * 1000), Bytes::mib(512));
            run.look_at_burst(Nanos::millis(seconds * 1000));
            run.limit_is(Nanos::millis(seconds * 1000 + 1), Bytes::mib(64));
            let ended = Some(("make".to_owned(), part(continues, pause)));
            assert_eq!(run.ended, ended);
        }
        run.recall("make".to_owned());
        // What is at rest and uses little has nothing under way.
        run.history.observe(Nanos::millis(70_000), Bytes::mib(10));
        run.calm_down();
        assert_eq!((run.trigger, run.policy.learnt), (None, None));
    }

    /// Seen: a build used more after its limit had come down a first time, and that was not remembered.
    #[test]
    fn what_comes_after_the_first_step_down_is_of_the_same_run() {
        let mut run = guarded(Bytes::mib(512), 0);
        let at = |run: &mut Guarded, seconds: u64, mib| {
            let at = Nanos::millis(seconds * 1000);
            run.history.observe(at, Bytes::mib(mib));
            run.look_at_burst(at);
        };
        run.limit = Bytes::mib(64);
        run.raised_since = None;
        at(&mut run, 1, 63);
        run.recall("make".to_owned());
        run.limit_is(Nanos::millis(1000), Bytes::mib(512));
        at(&mut run, 2, 300);
        run.limit_is(Nanos::millis(7000), Bytes::mib(375));
        at(&mut run, 9, 350);
        at(&mut run, 10, 360);
        run.limit_is(Nanos::millis(15_000), Bytes::mib(64));
        let part = Part {
            peak: Bytes::mib(360),
            pause: Nanos::millis(7000),
            continues: true,
        };
        assert_eq!(run.ended, Some(("make".to_owned(), part)));
        run.recall("make".to_owned());
        assert_eq!(run.policy.learnt, Some(Bytes::mib(414)));
        assert_eq!(run.quiet(), Nanos::millis(10_500));
        run.policy.ceiling = run.policy.original;
        assert_eq!(run.quiet(), Nanos(0));
    }

    #[test]
    fn a_hold_is_no_pause() {
        let mut held = guarded(Bytes::mib(512), 0);
        let at = |seconds: u64| Nanos::millis(seconds * 1000);
        held.limit_is(at(1), Bytes::mib(512));
        held.history.observe(at(2), Bytes::mib(300));
        held.look_at_burst(at(2));
        held.resumed(at(22));
        held.history.observe(at(23), Bytes::mib(400));
        held.look_at_burst(at(23));
        assert_eq!(held.quiet(), Nanos::millis(1500 * 2));
        // Nor is what somebody else has made its rest.
        held.follow(Policy {
            original: Bytes::mib(512),
            ..held.policy
        });
        held.history.observe(at(5000), Bytes::mib(500));
        held.look_at_burst(at(5000));
        assert_eq!(held.quiet(), Nanos(0));
    }

    #[test]
    fn of_a_raise_for_page_cache_nothing_is_learnt() {
        let mut run = guarded(Bytes::mib(512), 0);
        run.limit_is(Nanos::millis(400), Bytes::mib(512));
        run.history.observe(Nanos::millis(500), Bytes::mib(40));
        run.look_at_burst(Nanos::millis(500));
        run.limit_is(Nanos::millis(9000), Bytes::mib(64));
        assert_eq!(run.learnt, Learnt::default());
    }
}
