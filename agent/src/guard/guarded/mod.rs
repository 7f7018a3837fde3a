//! What the controller knows of one guarded cgroup, and what is told of it at the end.

mod lost;
mod run;

use std::{
    collections::{BTreeSet, VecDeque},
    path::PathBuf,
};

use bellows_core::{
    Actuation, Bytes, History, Learnt, Nanos, Policy, Reason, Snapshot, Thrash,
    allowance::{Bound, Reached},
    arbiter::Why,
    decide::ByHand,
    growth::{Nature, Spell},
    learnt::Part,
    parallel::Balance,
};

use super::{
    Named,
    foreign_brake::ForeignBrake,
    room::{Waiting, ancestors},
    seconds,
};
use crate::{
    actuate::{reflex::LET_GO_FOR, shrink},
    cgroup::{Cgroup, CgroupError, MemoryStat},
    ledger::Record,
    metrics::METRICS,
};
use run::LastRun;

/// How many raises the 95th percentile of their time is taken over.
const LATENCIES: usize = 20;
/// What happened to a guarded cgroup, for the summary and the benches.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    /// Limits over time, the first one at adoption.
    pub limits: Vec<(Nanos, Bytes)>,
    /// Raises.
    pub raises: u64,
    /// Shrinks.
    pub shrinks: u64,
    /// Times that it was held.
    pub holds: u64,
    /// Times that its brake was set below its usage, because it grew while it was held.
    pub brakes: u64,
    /// Total time that it was held.
    pub held: Nanos,
    /// Highest demand seen.
    pub peak_demand: Bytes,
    /// Times that the OOM killer was entered.
    pub ooms: u64,
    /// Longest time from a kernel event to the raise that answered it.
    pub slowest_reaction: Nanos,
    /// Verdicts and records lost on the way.
    pub lost: u64,
    /// What failed.
    pub errors: Vec<String>,
    /// Times that the kernel held a thread for 10 ms or more.
    pub sleeps: u64,
    /// Charges seen by the growth hook.
    pub charges: u64,
    /// Processes that were paused for want of memory.
    pub pauses: u64,
    /// Those that went on because nobody else did.
    pub standstills: u64,
    /// The first time that there was not memory for all jobs.
    pub lent: Option<Balance>,
    /// Times from the request of a raise to the limit in force, the latest first.
    pub latencies: Vec<Nanos>,
}

/// What a report keeps of each kind: a guard may live for months.
const KEPT: usize = 4096;

impl Report {
    pub(super) fn failed(&mut self, error: String) {
        if self.errors.len() < KEPT {
            self.errors.push(error);
        }
    }
}

pub(super) struct Guarded {
    pub(super) cgroup: Cgroup,
    /// What it is, for people.
    pub(super) name: String,
    /// Its rules; the ceiling is what is allowed now.
    pub(super) policy: Policy,
    /// The ceiling that its policy asks for.
    pub(super) asked_ceiling: Bytes,
    /// What allows less than that.
    pub(super) bound: Option<Bound>,
    /// Why, as it was told in this burst.
    pub(super) told_bound: Option<Reached>,
    /// Whether it would be raised now if nothing bounded it.
    pub(super) is_cut: bool,
    pub(super) history: History,
    pub(super) thrash: Thrash,
    /// `memory.high`, where it is not ours to move.
    pub(super) foreign_brake: Option<ForeignBrake>,
    pub(super) thrash_looked: Nanos,
    pub(super) limit: Bytes,
    pub(super) requested: Option<(Bytes, Nanos)>,
    /// A lower limit that was asked for and may come into force at any moment.
    pub(super) lowering: Option<Bytes>,
    /// What of its demand are the kernel's own caches, by the last look; none where they cannot be given back alone.
    pub(super) slab: Bytes,
    /// Whether they can.
    gives_slab: bool,
    /// When they were asked for in vain.
    pub(super) slab_kept: Option<Nanos>,
    /// Lowerings that got lost since the limit moved last.
    pub(super) lost_lowerings: u32,
    /// Whether page cache is being given back for a lower limit.
    pub(super) is_making_room: bool,
    pub(super) held_since: Option<Nanos>,
    /// When its patience began, if it had been held all the time: holds that follow each other share one.
    patient_since: Nanos,
    /// When it was let go before its raise was there.
    let_go: Option<Nanos>,
    pub(super) refused_shrink: Option<(Bytes, Nanos)>,
    pub(super) raise_not_before: Nanos,
    /// Whether what is requested could not be asked for, for a passing reason.
    pub(super) request_failed: bool,
    /// A raise that is not granted yet.
    pub(super) waiting: Option<Waiting>,
    /// When its burst began.
    pub(super) burst_since: Option<Nanos>,
    /// The most that it has used in that, or since it last came down without coming to rest.
    pub(super) burst_peak: Bytes,
    /// The longest that it did not grow meanwhile, and went on.
    pause: Nanos,
    /// The same of runs before it for the same.
    learnt_pause: Nanos,
    /// Since when it has more than at rest, and when it had grown last.
    raised_since: Option<Nanos>,
    grown: Nanos,
    /// What outlives it, for what it has learnt.
    pub(super) workload: String,
    /// What its runs have needed.
    pub(super) learnt: Learnt,
    /// The last of them and what it was for, while it is not written down yet.
    pub(super) ended: Option<(String, Part)>,
    last_run: Option<LastRun>,
    /// What its burst is for; `None` while there is none.
    pub(super) trigger: Option<String>,
    /// Its growth since it was at rest; `None` while it is.
    pub(super) spell: Option<Spell>,
    /// What was thought of that when it last asked for more, and when.
    pub(super) nature: Nature,
    /// The worst that was thought of its burst.
    worst: Nature,
    /// Why it was stopped, as far as that was told.
    pub(super) told_stop: Option<Why>,
    pub(super) judged: Nanos,
    /// When it was last looked at for a signal that waits for it.
    pub(super) endings_looked: Nanos,
    /// Whom one was waiting for then.
    pub(super) asked_to_end: BTreeSet<u32>,
    /// The limit up to which there is room for it.
    pub(super) reserved: Option<Bytes>,
    /// What its jobs were last said to have, and whether they are many; `None` where nobody looks at them.
    pub(super) may_have: Option<(Bytes, bool)>,
    /// Cgroups above it with limits that are not ours.
    pub(super) ancestors: Vec<PathBuf>,
    /// A raise by hand has failed; it is not tried again before.
    pub(super) by_hand_not_before: Nanos,
    /// How long the last raise took, if that was not asked for yet.
    answered: Option<Nanos>,
    pub(super) report: Report,
}

/// How long the latest raises took, of all guards: what those are told of that are only watched.
#[derive(Default)]
pub(super) struct Answers(VecDeque<Nanos>);

impl Answers {
    pub(super) fn learn(&mut self, guarded: &mut Guarded) {
        if let Some(answered) = guarded.answered.take() {
            self.0.truncate(LATENCIES - 1);
            self.0.push_front(answered);
        }
    }

    /// Their 95th percentile; `None` if there was none.
    pub(super) fn p95(&self) -> Option<Nanos> {
        p95(self.0.iter().copied())
    }
}

fn p95(times: impl Iterator<Item = Nanos>) -> Option<Nanos> {
    let mut times: Vec<Nanos> = times.collect();
    times.sort_unstable();
    let rank = (times.len() * 95).div_ceil(100);
    times.get(rank.saturating_sub(1)).copied()
}

impl Guarded {
    /// A cgroup that was just adopted with `limit` in force.
    pub(super) fn new(
        cgroup: Cgroup,
        Named { name, workload }: Named,
        policy: Policy,
        at: Nanos,
        limit: Bytes,
    ) -> Self {
        Self {
            ancestors: ancestors(&cgroup),
            gives_slab: shrink::spares_memory(&cgroup),
            cgroup,
            name,
            policy,
            asked_ceiling: policy.ceiling,
            bound: None,
            told_bound: None,
            is_cut: false,
            history: History {
                last_growth: at,
                ..History::default()
            },
            thrash: Thrash::default(),
            foreign_brake: None,
            thrash_looked: Nanos(0),
            limit,
            requested: None,
            lowering: None,
            slab: Bytes::ZERO,
            slab_kept: None,
            lost_lowerings: 0,
            is_making_room: false,
            held_since: None,
            patient_since: Nanos(0),
            let_go: None,
            refused_shrink: None,
            raise_not_before: Nanos(0),
            request_failed: false,
            waiting: None,
            burst_since: None,
            burst_peak: Bytes::ZERO,
            pause: Nanos(0),
            learnt_pause: Nanos(0),
            raised_since: (limit > policy.original).then_some(at),
            grown: at,
            workload,
            learnt: Learnt::default(),
            ended: None,
            last_run: None,
            trigger: None,
            spell: None,
            nature: Nature::Burst,
            worst: Nature::Burst,
            told_stop: None,
            judged: Nanos(0),
            endings_looked: Nanos(0),
            asked_to_end: BTreeSet::new(),
            reserved: None,
            may_have: None,
            by_hand_not_before: Nanos(0),
            answered: None,
            report: Report {
                limits: vec![(at, limit)],
                ..Report::default()
            },
        }
    }

    /// The ledger's record of its adoption.
    pub(super) fn adoption(&self, at: Nanos) -> Record {
        Record::Adopt {
            at,
            cgroup: self.cgroup.id(),
            path: self.cgroup.path().to_owned(),
            name: self.name.clone(),
            original: self.policy.original,
            limit: self.limit,
        }
    }

    /// The records that a new ledger begins with: whoever releases after our death must leave a brake alone
    /// that is somebody else's.
    pub(super) fn standing(&self, at: Nanos) -> impl Iterator<Item = Record> + use<> {
        let brake = Record::Brake {
            at,
            cgroup: self.cgroup.id(),
            foreign: self.foreign_brake.is_some(),
        };
        [self.adoption(at), brake].into_iter()
    }

    /// Takes the measured times of the latest requests into the policy.
    pub(super) fn learn_latency(&mut self) {
        let latest = &self.report.latencies;
        let recent = latest.iter().take(LATENCIES).copied();
        if let (Some(measured), Actuation::Requested { p95 }) =
            (p95(recent), &mut self.policy.actuation)
        {
            *p95 = measured;
        }
    }

    /// Takes new rules from whoever watches the pod; what was learnt stays.
    pub(super) fn follow(&mut self, policy: Policy) {
        self.asked_ceiling = policy.ceiling;
        self.policy = Policy {
            actuation: self.policy.actuation,
            usable_per_mille: self.policy.usable_per_mille,
            learnt: self.policy.learnt,
            ..policy
        };
        if self.limit <= self.policy.original {
            (self.raised_since, self.pause) = (None, Nanos(0));
        }
    }

    /// A hold has ended: that it did not grow meanwhile is no pause of its own.
    fn resumed(&mut self, at: Nanos) {
        self.history.resumed(at);
        self.grown = self.history.last_growth;
    }

    /// Looks at a brake that is somebody else's; returns whether that changes the rules.
    pub(super) fn look_at_brake(&mut self, at: Nanos) -> Result<bool, CgroupError> {
        let Some(brake) = &mut self.foreign_brake else {
            return Ok(false);
        };
        // Its own limit: those of its heirs are written later.
        let limit = self.cgroup.limit("memory.max")?;
        let high = self.cgroup.limit("memory.high")?.bytes();
        if self.cgroup.limit("memory.max")? != limit {
            // Both are being written.
            return Ok(false);
        }
        let usable_per_mille = brake.look(at, limit.bytes(), high);
        let is_new = usable_per_mille != self.policy.usable_per_mille;
        self.policy.usable_per_mille = usable_per_mille;
        Ok(is_new)
    }

    /// For how long it can still be held for a raise that was asked for.
    pub(super) fn patience(&self, at: Nanos) -> Nanos {
        let left = match self.held_since {
            Some(_) => {
                let held = at.since(self.patient_since);
                self.policy.last_moment().since(held)
            }
            None if self.is_let_go(at) => Nanos(0),
            None => Nanos(u64::MAX),
        };
        left.min(self.policy.answer_within())
    }

    /// Whether it was let go a moment ago, and needs its raise yet. After that it may be held again, or lives without.
    fn is_let_go(&self, at: Nanos) -> bool {
        self.let_go
            .is_some_and(|let_go| at.since(let_go) < LET_GO_FOR)
    }

    /// It is held from now on, until then at most.
    pub(super) fn is_held(&mut self, at: Nanos, until: Nanos) {
        let all = self.policy.allowance();
        self.held_since = Some(at);
        self.patient_since = at.min(Nanos(until.0.saturating_sub(all.0)));
        self.let_go = None;
    }

    /// It is held no more; returns for how long it was.
    pub(super) fn released(&mut self, at: Nanos, reason: Reason) -> Option<Nanos> {
        self.let_go = reason.lets_go().then_some(at);
        let held = at.since(self.held_since.take()?);
        if let Some(spell) = &mut self.spell {
            spell.held_for(held);
        }
        self.resumed(at);
        Some(held)
    }

    pub(super) const fn active(&self) -> bool {
        self.limit.0 != self.policy.original.0
            || self.held_since.is_some()
            || self.requested.is_some()
            || self.waiting.is_some()
    }

    pub(super) fn snapshot(&self, now: Nanos, by_hand: ByHand) -> Snapshot {
        Snapshot {
            now,
            policy: self.policy,
            history: self.history,
            thrash: self.thrash,
            limit: self.limit,
            requested: self.requested,
            lowering: self.lowering,
            held_since: self.held_since.map(|_| self.patient_since),
            is_let_go: self.is_let_go(now),
            refused_shrink: self.refused_shrink,
            raise_not_before: self.raise_not_before,
            request_failed: self.request_failed,
            by_hand,
            quiet: self.quiet(),
            others_wait: false,
            slab: self.slab,
            slab_kept: self.slab_kept,
        }
    }

    /// A lower limit was refused: not asked for again for so long, unless less is needed.
    pub(super) const fn refuse_shrink(&mut self, at: Nanos, lasts: Nanos) {
        let until = Nanos(at.0.saturating_add(lasts.0));
        self.refused_shrink = Some((self.history.demand, until));
    }

    /// Takes note of what it uses.
    pub(super) fn saw(&mut self, at: Nanos, stat: MemoryStat) {
        self.history.observe(at, stat.demand());
        if self.gives_slab {
            self.slab = stat.slab;
        }
    }

    pub(super) fn limit_is(&mut self, at: Nanos, limit: Bytes) {
        if limit == self.limit {
            return;
        }
        self.lost_lowerings = 0;
        let is_raise = limit > self.limit;
        METRICS.moved("memory", is_raise);
        if is_raise {
            self.burst_since.get_or_insert(at);
            self.report.raises += 1;
            (self.refused_shrink, self.slab_kept) = (None, None);
        } else {
            self.report.shrinks += 1;
            self.history.shrunk();
            self.thrash.lowered(at);
        }
        if let Some((to, asked)) = self.requested
            && (to == limit || (self.limit < to && to <= limit))
        {
            self.requested = None;
            self.lowering = None;
            // A lowering waits for the kubelet's look at usage: what a raise takes is not learnt from it.
            if is_raise {
                let latencies = &mut self.report.latencies;
                latencies.truncate(KEPT);
                latencies.insert(0, at.since(asked));
                METRICS.raise_seconds.observe(seconds(at.since(asked)));
                self.answered = Some(at.since(asked));
            }
        }
        self.limit = limit;
        self.let_go.take_if(|_| is_raise);
        if limit > self.policy.original {
            self.raised_since.get_or_insert(at);
        }
        if !is_raise {
            self.burst_is_over(at);
        } else if let Some(spell) = &mut self.spell {
            spell.raised(self.history.demand);
        }
        if limit <= self.policy.original {
            self.has_rested();
            self.raised_since = None;
        }
        if self.report.limits.len() < KEPT {
            self.report.limits.push((at, limit));
        }
    }
}

#[cfg(test)]
impl Guarded {
    /// One that no kernel knows, with 64 MiB at rest and this limit.
    pub(super) fn stand_in(limit: Bytes) -> Self {
        let id = bellows_core::CgroupId(1);
        let cgroup = Cgroup::stand_in(std::path::Path::new("/nowhere"), id);
        let policy = Policy {
            original: Bytes::mib(64),
            ceiling: Bytes::mib(1024),
            actuation: Actuation::Requested {
                p95: Nanos::millis(700),
            },
            signals: bellows_core::Signals::Programs,
            patience: bellows_core::Patience::UNPROBED,
            cpus: 2,
            shrink_after: Nanos::millis(5000),
            usable_per_mille: bellows_core::WHOLE,
            by_hand_after: None,
            priority: 0,
            parallelism: bellows_core::elastic::Parallelism::Unchanged,
            learnt: None,
        };
        let named = Named {
            name: "a/b-0/c".to_owned(),
            workload: "a/b/c".to_owned(),
        };
        Self::new(cgroup, named, policy, Nanos(0), limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Bytes = Bytes::mib(256);

    pub(super) fn guarded(to: Bytes, lost_lowerings: u32) -> Guarded {
        let mut guarded = Guarded::stand_in(LIMIT);
        guarded.requested = Some((to, Nanos(0)));
        guarded.lost_lowerings = lost_lowerings;
        guarded
    }

    /// Without `memory.reclaim` the kernel would swap out, or brake, for names and inodes that are in use.
    #[test]
    fn what_cannot_be_given_back_alone_keeps_the_limit_up() {
        let mut guarded = guarded(LIMIT, 0);
        let stat = MemoryStat {
            usage: Bytes::mib(200),
            file: Bytes::ZERO,
            slab: Bytes::mib(100),
        };
        let mut slab = |gives_slab| {
            guarded.gives_slab = gives_slab;
            guarded.saw(Nanos(1), stat);
            guarded.snapshot(Nanos(1), ByHand::No).slab
        };
        assert_eq!(slab(false), Bytes::ZERO);
        assert_eq!(slab(true), Bytes::mib(100));
    }

    #[test]
    fn only_raises_tell_how_long_a_raise_takes() {
        let mut lowered = guarded(Bytes::mib(64), 1);
        lowered.limit_is(Nanos::millis(6000), Bytes::mib(64));
        assert_eq!(lowered.report.latencies, []);
        assert_eq!((lowered.requested, lowered.lost_lowerings), (None, 0));
        let mut raised = guarded(Bytes::mib(512), 0);
        raised.limit_is(Nanos::millis(400), Bytes::mib(512));
        assert_eq!(raised.report.latencies, [Nanos::millis(400)]);
    }

    /// There was no room for it until its patience was over: whoever is asked then must not be waited for.
    #[test]
    fn who_was_let_go_without_a_raise_has_no_patience_left() {
        let mut own = guarded(Bytes::mib(512), 0);
        (own.requested, own.limit) = (None, Bytes::mib(64));
        let at = |seconds: u64| Nanos::millis(seconds * 1000);
        let all = own.policy.last_moment();
        assert_eq!(own.patience(at(1)), all);
        own.is_held(at(1), at(11));
        assert_eq!(own.patience(at(3)), all.since(at(2)));
        // Its raise is there.
        assert_eq!(own.released(at(10), Reason::RaiseArrived), Some(at(9)));
        assert_eq!(own.patience(at(10)), all);
        // Most of it was spent by the hold before.
        own.is_held(at(11), at(15));
        assert_eq!(own.patience(at(12)), all.since(at(7)));
        own.requested = Some((Bytes::mib(256), at(15)));
        own.released(at(15), Reason::HoldExpired);
        assert_eq!(own.patience(at(15)), Nanos(0));
        own.calm_down();
        assert!(own.is_let_go(at(15)), "it is under way");
        own.limit_is(at(22), Bytes::mib(256));
        assert_eq!(own.patience(at(22)), all);
        // Nor is who lives without it in a hurry, or who is held again.
        own.released(at(30), Reason::NoRoom);
        assert_eq!(
            [own.patience(at(31)), own.patience(at(60))],
            [Nanos(0), all]
        );
        own.released(at(70), Reason::HoldExpired);
        own.is_held(at(71), at(81));
        assert_eq!(own.patience(at(71)), all);
    }

    #[test]
    fn who_may_be_held_for_long_waits_for_an_answer_no_longer_than_others() {
        let mut own = guarded(Bytes::mib(512), 0);
        let all = own.policy.last_moment();
        own.policy.patience.longest = Nanos::millis(120_000);
        let at = |seconds: u64| Nanos::millis(seconds * 1000);
        own.is_held(at(1), at(121));
        assert_eq!(own.patience(at(2)), all);
        assert_eq!(own.patience(at(61)), all);
        assert_eq!(own.patience(at(90)), Nanos::millis(1000));
    }
}
