//! What the controller knows of one guarded cgroup, and what is told of it at the end.

use bellows_core::{Actuation, Bytes, History, Nanos, Policy, Snapshot, Thrash};

use crate::{cgroup::Cgroup, ledger::Record};

/// How many requests the 95th percentile of their time is taken over.
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
    /// Times from a request to the limit in force, the latest first.
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
    pub(super) policy: Policy,
    pub(super) history: History,
    pub(super) thrash: Thrash,
    /// Whether `memory.high` is not ours to move.
    pub(super) foreign_brake: bool,
    pub(super) thrash_looked: Nanos,
    pub(super) limit: Bytes,
    pub(super) requested: Option<(Bytes, Nanos)>,
    /// A lower limit that was asked for and may come into force at any moment.
    pub(super) lowering: Option<Bytes>,
    pub(super) held_since: Option<Nanos>,
    pub(super) refused_shrink: Option<(Bytes, Nanos)>,
    pub(super) raise_not_before: Nanos,
    pub(super) report: Report,
}

impl Guarded {
    /// A cgroup that was just adopted with `limit` in force.
    pub(super) fn new(
        cgroup: Cgroup,
        name: String,
        policy: Policy,
        at: Nanos,
        limit: Bytes,
    ) -> Self {
        Self {
            cgroup,
            name,
            policy,
            history: History {
                last_growth: at,
                ..History::default()
            },
            thrash: Thrash::default(),
            foreign_brake: false,
            thrash_looked: Nanos(0),
            limit,
            requested: None,
            lowering: None,
            held_since: None,
            refused_shrink: None,
            raise_not_before: Nanos(0),
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

    /// Takes the measured times of the latest requests into the policy.
    pub(super) fn learn_latency(&mut self) {
        let latest = &self.report.latencies;
        let mut recent = latest[..latest.len().min(LATENCIES)].to_vec();
        recent.sort_unstable();
        let rank = (recent.len() * 95).div_ceil(100);
        if let (Some(&measured), Actuation::Requested { p95 }) = (
            recent.get(rank.saturating_sub(1)),
            &mut self.policy.actuation,
        ) {
            *p95 = measured;
        }
    }

    pub(super) const fn active(&self) -> bool {
        self.limit.0 != self.policy.original.0
            || self.held_since.is_some()
            || self.requested.is_some()
    }

    pub(super) const fn snapshot(&self, now: Nanos) -> Snapshot {
        Snapshot {
            now,
            policy: self.policy,
            history: self.history,
            thrash: self.thrash,
            limit: self.limit,
            requested: self.requested,
            lowering: self.lowering,
            held_since: self.held_since,
            refused_shrink: self.refused_shrink,
            raise_not_before: self.raise_not_before,
        }
    }

    pub(super) fn limit_is(&mut self, at: Nanos, limit: Bytes) {
        if limit == self.limit {
            return;
        }
        if limit > self.limit {
            self.report.raises += 1;
            self.refused_shrink = None;
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
            let latencies = &mut self.report.latencies;
            latencies.truncate(KEPT);
            latencies.insert(0, at.since(asked));
        }
        self.limit = limit;
        if self.report.limits.len() < KEPT {
            self.report.limits.push((at, limit));
        }
    }
}
