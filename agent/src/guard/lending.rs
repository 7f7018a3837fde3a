//! What the thread is told that has jobs wait: who asks for it, and how much they may have.

use bellows_core::{
    Bytes, CgroupId, Nanos,
    elastic::Parallelism,
    parallel::{Balance, Resumed},
};

use super::{Controller, Guarded, Input, Requester};
use crate::{
    clock::now,
    ledger::{self, Record},
    parallel::Parallel,
};

impl Guarded {
    /// What its jobs may have, all in all: the maximum, or only what is in force where a raise was not granted.
    fn may_have(&self, at: Nanos) -> Bytes {
        let is_refused = at < self.raise_not_before
            || self.waiting.is_some_and(|waiting| waiting.told.is_some());
        let most = if is_refused {
            self.limit
        } else {
            self.policy.ceiling.max(self.limit)
        };
        self.policy.usable(most)
    }

    /// Whether its jobs are looked at: what they may have changes with time alone, where a raise was refused.
    pub(super) fn is_lending(&self) -> bool {
        self.may_have.is_some_and(|(_, is_bursting)| is_bursting)
    }

    /// Whether its jobs are to be looked at: it is raised, or cannot be.
    fn is_bursting(&self, at: Nanos) -> bool {
        self.active() || self.may_have(at) <= self.policy.usable(self.policy.original)
    }
}

impl<R: Requester> Controller<R> {
    /// Tells the thread that has jobs wait what has changed.
    pub(super) fn lend(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        let is_asked = guarded.policy.parallelism == Parallelism::Elastic;
        let wanted = is_asked.then(|| (guarded.may_have(at), guarded.is_bursting(at)));
        if wanted == guarded.may_have {
            return;
        }
        if is_asked && self.parallel.is_none() {
            let inputs = self.answers.clone();
            // What finds no room is not told: to wait for the controller would keep jobs waiting.
            let told = move |record| drop(inputs.try_send(Input::Lent(record)));
            match Parallel::start(&ledger::paused(self.ledger.path()), Box::new(told)) {
                Ok(parallel) => self.parallel = Some(parallel),
                Err(error) => {
                    tracing::warn!(%error, "jobs do not wait for memory");
                    return guarded.report.failed(error.to_string());
                }
            }
        }
        let Some(parallel) = &self.parallel else {
            return;
        };
        match (guarded.may_have, wanted) {
            (_, None) => parallel.forget(id),
            (before, Some((granted, is_bursting))) => {
                if before.is_none() {
                    parallel.watch(guarded.cgroup.clone());
                }
                parallel.may_have(id, granted, is_bursting);
            }
        }
        guarded.may_have = wanted;
    }

    pub(super) fn take_lent(&mut self, record: &Record) {
        let Some(guarded) = self.guards.get_mut(&record.cgroup()) else {
            return;
        };
        let report = &mut guarded.report;
        match record {
            Record::Pause { .. } => report.pauses += 1,
            Record::Resume { why, .. } => {
                let is_standstill = matches!(why, Resumed::Standstill | Resumed::NobodyEnds);
                report.standstills += u64::from(is_standstill);
            }
            Record::Lends { balance, .. } => {
                report.lent.get_or_insert(*balance);
                if let Err(error) = self.ledger.append(record) {
                    report.failed(error.to_string());
                }
                self.requester.record(&guarded.cgroup, record);
            }
            _ => {}
        }
    }
}

/// How many jobs run of those that there are, for people.
#[must_use]
pub fn told_balance(balance: &Balance) -> String {
    let Balance {
        jobs,
        need,
        granted,
        running,
    } = balance;
    format!("{jobs} jobs would need {need}, {granted} granted: running {running}")
}
