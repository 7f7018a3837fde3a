//! What the controller knows of one guarded cgroup, and what is told of it at the end.

use std::{collections::VecDeque, path::PathBuf};

use bellows_core::{
    Actuation, Bytes, History, Learnt, Nanos, Policy, Reason, Snapshot, Thrash, Thresholds,
    allowance::{Bound, Reached},
    arbiter::Why,
    decide::ByHand,
    growth::{Nature, Spell, UNTRIGGERED},
    learnt::{CONTINUED, Part, quiet_after},
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

/// How many raises the 95th percentile of their time is taken over.
const LATENCIES: usize = 20;
/// A raise that is not in force after this long got lost or was deferred.
const RAISE_LOST: Nanos = Nanos::millis(15_000);
/// A lowering that is not in force after this long is asked for again: the kubelet compares with usage that
/// it read up to 15 s before, reports a refusal after 12.9 s (measured on 1.37), and looks again only when the
/// pod changes.
const LOWERING_LOST: Nanos = Nanos::millis(7_000);
/// A kubelet that carries out twenty resizes takes its time over each (one a second where 20 pods give back at once, on
/// two emulated CPUs): as long as any other comes into force none is lost, for so many times as long at most. Who takes
/// his own back meanwhile doubles what it has to do.
const LOWERING_LAST: u64 = 4;
/// So many lowerings in a row are waited for as long: by then the kubelet has read its figures again.
const LOWERINGS: u32 = 3;
/// Who uses less than this share of the limit at rest, and was not raised, has no burst.
const CALM_PER_MILLE: u64 = 900;
/// From then on each is waited for twice as long as the one before, so many times.
const LOWERING_DOUBLES: u32 = 5;
/// How much more than a lost lowering is asked for where the limit in force may not be had back.
const LOWERED_ANEW_BY: Bytes = Bytes::mib(1);

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

/// A run that has ended, unless it goes on.
struct LastRun {
    trigger: String,
    ended: Nanos,
    /// When it had grown last.
    grown: Nanos,
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

    /// The request that was not carried out in time, where any other was carried out last at `others`.
    pub(super) fn lost(&self, at: Nanos, others: Nanos) -> Option<Bytes> {
        let (to, asked) = self.requested?;
        let (mut since, mut last) = (asked, Nanos(u64::MAX));
        let patience = if to < self.limit {
            let doubles = self
                .lost_lowerings
                .saturating_add(1)
                .saturating_sub(LOWERINGS);
            let patience = LOWERING_LOST.0 << doubles.min(LOWERING_DOUBLES);
            since = since.max(others);
            last = Nanos(patience.saturating_mul(LOWERING_LAST));
            Nanos(patience)
        } else {
            RAISE_LOST
        };
        (at.since(since) >= patience || at.since(asked) >= last).then_some(to)
    }

    /// A lowering was not carried out in time, and no more than `most` may be asked for in its place. Returns a limit a
    /// little above it, since who has refused the one looks again only at another; `None` where that is not allowed either,
    /// and it waits on.
    pub(super) fn lowers_anew(&mut self, at: Nanos, to: Bytes, most: Bytes) -> Option<Bytes> {
        let anew = to.plus(LOWERED_ANEW_BY);
        let anew = (anew <= most && anew < self.limit).then_some(anew);
        self.requested = Some((anew.unwrap_or(to), at));
        self.lowering = self.requested.map(|(to, _)| to);
        self.lost_lowerings = self.lost_lowerings.saturating_add(1);
        anew
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

    /// For how long it can still be held for a raise.
    pub(super) fn patience(&self, at: Nanos) -> Nanos {
        let all = self.policy.last_moment();
        match self.held_since {
            Some(_) => all.since(at.since(self.patient_since)),
            None if self.is_let_go(at) => Nanos(0),
            None => all,
        }
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
        let is_let_go = matches!(reason, Reason::HoldExpired | Reason::NoRoom);
        self.let_go = is_let_go.then_some(at);
        let held = at.since(self.held_since.take()?);
        self.resumed(at);
        Some(held)
    }

    pub(super) const fn active(&self) -> bool {
        self.limit.0 != self.policy.original.0
            || self.held_since.is_some()
            || self.requested.is_some()
            || self.waiting.is_some()
    }

    /// For how long nothing must come before what it has more than at rest is taken from it. It has paused before, and went on.
    /// What no policy allows any more is not kept for that.
    pub(super) fn quiet(&self) -> Nanos {
        if self.policy.ceiling <= self.policy.original {
            return Nanos(0);
        }
        quiet_after(self.learnt_pause.max(self.pause))
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

    /// Takes note of what it uses.
    pub(super) fn saw(&mut self, at: Nanos, stat: MemoryStat) {
        self.history.observe(at, stat.demand());
        if self.gives_slab {
            self.slab = stat.slab;
        }
    }

    /// Takes note of what a burst uses.
    pub(super) fn look_at_burst(&mut self, at: Nanos) {
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
    pub(super) fn recall(&mut self, trigger: String) {
        self.learnt_pause = self.learnt.pause(&trigger);
        let expected = self.learnt.expected(&trigger);
        self.policy.learnt = expected.map(|needed| self.policy.limit_for(needed).round_up_mib());
        self.trigger = Some(trigger);
    }

    /// What it needed is learnt, and room is kept for it no longer.
    pub(super) fn burst_is_over(&mut self, at: Nanos) {
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
    pub(super) fn is_thought(&mut self, nature: Nature) {
        self.nature = nature;
        self.worst = self.worst.max(nature);
    }

    /// What it grows by from now on is another matter.
    const fn has_rested(&mut self) {
        self.spell = None;
        self.nature = Nature::Burst;
    }

    /// A burst that was expected did not come: what begins next may be for something else.
    pub(super) fn calm_down(&mut self) {
        self.let_go.take_if(|_| self.requested.is_none());
        let is_at_rest = self.limit <= self.policy.original && self.requested.is_none();
        let is_calm = self.history.demand < self.limit.per_mille(CALM_PER_MILLE);
        if is_at_rest && is_calm {
            self.told_bound = None;
        }
        if is_at_rest && is_calm && self.policy.actuation != Actuation::Direct {
            (self.burst_since, self.trigger, self.policy.learnt) = (None, None, None);
            self.has_rested();
            self.burst_peak = Bytes::ZERO;
            self.learnt_pause = Nanos(0);
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
mod tests {
    use std::path::Path;

    use bellows_core::{CgroupId, Patience, Signals, WHOLE};

    use super::*;

    const LIMIT: Bytes = Bytes::mib(256);

    fn guarded(to: Bytes, lost_lowerings: u32) -> Guarded {
        let cgroup = Cgroup::stand_in(Path::new("/nowhere"), CgroupId(1));
        let policy = Policy {
            original: Bytes::mib(64),
            ceiling: Bytes::mib(1024),
            actuation: Actuation::Requested {
                p95: Nanos::millis(700),
            },
            signals: Signals::Programs,
            patience: Patience::UNPROBED,
            cpus: 2,
            shrink_after: Nanos::millis(5000),
            usable_per_mille: WHOLE,
            by_hand_after: None,
            priority: 0,
            parallelism: bellows_core::elastic::Parallelism::Unchanged,
            learnt: None,
        };
        let named = Named {
            name: "a/b-0/c".to_owned(),
            workload: "a/b/c".to_owned(),
        };
        let mut guarded = Guarded::new(cgroup, named, policy, Nanos(0), LIMIT);
        guarded.requested = Some((to, Nanos(0)));
        guarded.lost_lowerings = lost_lowerings;
        guarded
    }

    fn patience_seconds(to: Bytes, lost_lowerings: u32) -> Option<u64> {
        let guarded = guarded(to, lost_lowerings);
        let lost = |seconds| guarded.lost(Nanos::millis(seconds * 1000), Nanos(0));
        (0..1000).find(|&seconds| lost(seconds).is_some())
    }

    /// Twenty that are given back at once are carried out one after another.
    #[test]
    fn a_lowering_is_not_lost_while_others_are_carried_out() {
        let seconds = |at: u64| Nanos::millis(at * 1000);
        let waits = |others| {
            let guarded = guarded(Bytes::mib(64), 0);
            (0..1000).find(|&at| guarded.lost(seconds(at), others).is_some())
        };
        assert_eq!(waits(seconds(9)), Some(16));
        assert_eq!(waits(seconds(600)), Some(28));
        let raise = guarded(Bytes::mib(512), 0);
        assert_eq!(raise.lost(seconds(15), seconds(14)), Some(Bytes::mib(512)));
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
    fn a_lowering_is_asked_for_again_soon_and_then_ever_more_seldom() {
        let patience = |lost| patience_seconds(Bytes::mib(64), lost).unwrap();
        assert_eq!([0, 1, 2, 3, 4].map(patience), [7, 7, 7, 14, 28]);
        assert_eq!(patience(u32::MAX), 224);
    }

    #[test]
    fn a_lost_lowering_is_asked_for_a_little_otherwise_as_far_as_that_is_allowed() {
        let at = Nanos::millis(7000);
        let mut lowered = guarded(Bytes::mib(64), 0);
        let allowed = lowered.lowers_anew(at, Bytes::mib(64), Bytes::mib(65));
        assert_eq!(allowed, Some(Bytes::mib(65)));
        assert_eq!(lowered.requested, Some((Bytes::mib(65), at)));
        assert_eq!(lowered.lowering, Some(Bytes::mib(65)));
        let again = lowered.lowers_anew(at, Bytes::mib(65), Bytes::mib(65));
        assert_eq!((again, lowered.lost_lowerings), (None, 2));
        assert_eq!(lowered.requested, Some((Bytes::mib(65), at)));
    }

    #[test]
    fn a_raise_is_waited_for_longer_than_a_lowering() {
        assert_eq!(patience_seconds(Bytes::mib(512), 3), Some(15));
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
    fn of_a_raise_for_page_cache_nothing_is_learnt() {
        let mut run = guarded(Bytes::mib(512), 0);
        run.limit_is(Nanos::millis(400), Bytes::mib(512));
        run.history.observe(Nanos::millis(500), Bytes::mib(40));
        run.look_at_burst(Nanos::millis(500));
        run.limit_is(Nanos::millis(9000), Bytes::mib(64));
        assert_eq!(run.learnt, Learnt::default());
    }
}
