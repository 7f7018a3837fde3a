//! What the reflex has told is taken into its guards' histories.
//!
//! The reflex has written or held by then, so nothing here is urgent: whoever reached a watermark is noted as due, and decided
//! on once all that was told by then is taken. A limit that has changed is read back and recorded as it is, not as it was asked
//! for.
//!
//! It must not decide by an event, whose container may have died since, nor believe the clock of whoever has sent it.

use bellows_core::{Bytes, CgroupId, History, Nanos, decide::SHRINK_REFUSED_FOR};
use bellows_ebpf_common::{KIND_OOM, KIND_WATERMARK, MemoryEvent};

use super::{Controller, Requester, foreign_brake::ForeignBrake, guarded::Guarded, seconds};
use crate::{actuate::reflex::Verdict, clock::now, ledger::Record, metrics::METRICS};

impl<R: Requester> Controller<R> {
    pub(super) fn take_verdict(&mut self, verdict: Verdict) {
        let at = now();
        match verdict {
            Verdict::Event(event) => self.take_event(&event),
            Verdict::Raised {
                cgroup,
                event_at,
                at,
                limit,
            } => self.update(cgroup, |guarded| {
                guarded.report.slowest_reaction =
                    guarded.report.slowest_reaction.max(at.since(event_at));
                guarded.limit_is(at, limit);
            }),
            Verdict::Held {
                cgroup,
                at,
                until,
                braked,
            } => self.update(cgroup, |guarded| {
                guarded.is_held(at, until);
                METRICS.holds.inc();
                guarded.report.holds += 1;
                guarded.report.brakes += u64::from(braked);
            }),
            Verdict::ForeignBrake { cgroup } => {
                self.update(cgroup, |guarded| {
                    guarded.foreign_brake = Some(ForeignBrake::default());
                });
                self.look_at(cgroup);
            }
            Verdict::Braked { cgroup } => self.update(cgroup, |guarded| guarded.report.brakes += 1),
            Verdict::Released {
                cgroup,
                reason,
                error,
            } => self.update(cgroup, |guarded| {
                if let Some(held) = guarded.released(at, reason) {
                    METRICS.held_seconds.inc_by(seconds(held));
                    guarded.report.held = Nanos(guarded.report.held.0 + held.0);
                }
                if let Some(error) = error {
                    tracing::warn!(cgroup.id = cgroup.0, %error, "a release was not without fault");
                    guarded.report.failed(error);
                }
            }),
            Verdict::Lowered { cgroup, limit } => {
                self.update(cgroup, |guarded| guarded.limit_is(at, limit));
            }
            Verdict::LowerRefused { cgroup } => self.update(cgroup, |guarded| {
                guarded.refuse_shrink(at, SHRINK_REFUSED_FOR);
            }),
            Verdict::LimitRose { cgroup, limit } => {
                let risen = self.guards.get(&cgroup);
                if risen.is_some_and(|risen| risen.requested.is_some()) {
                    self.carried_out = at;
                }
                self.update(cgroup, |guarded| {
                    guarded.limit_is(at, limit);
                    guarded.learn_latency();
                });
            }
            Verdict::Forgotten { cgroup } => drop(self.leaving.remove(&cgroup)),
            Verdict::Failed { cgroup, error } => {
                tracing::warn!(cgroup.id = cgroup.0, %error, "the reflex could not act");
                self.update(cgroup, |guarded| guarded.report.failed(error));
            }
        }
    }

    fn update(&mut self, id: CgroupId, change: impl FnOnce(&mut Guarded)) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let before = guarded.limit;
        change(guarded);
        if guarded.limit != before {
            self.verify(id, None);
            self.remember(id);
            self.lend(id);
        }
    }

    /// Reads the limit back and records it.
    pub(super) fn verify(&mut self, id: CgroupId, error: Option<String>) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        self.raise_times.learn(guarded);
        let (limit, error) = match guarded.cgroup.limit_in_force() {
            Ok(limit) => (limit, error),
            Err(read) => (guarded.limit, Some(read.to_string())),
        };
        let record = Record::Verify {
            at: now(),
            cgroup: id,
            limit,
            error,
        };
        if let Err(error) = self.ledger.append(&record) {
            guarded.report.failed(error.to_string());
        }
        self.requester.record(&guarded.cgroup, &record);
    }

    fn take_event(&mut self, event: &MemoryEvent) {
        let id = CgroupId(event.cgroup_id);
        let Some(guarded) = self.guards.get_mut(&id) else {
            return self.take_observed(event);
        };
        match event.kind {
            KIND_OOM => {
                METRICS.ooms.inc();
                guarded.report.ooms += 1;
            }
            KIND_WATERMARK => {
                observe(&mut guarded.history, event, now());
                self.due.insert(id);
            }
            _ => {}
        }
    }
}

/// Takes a watermark event into a history.
///
/// A record may have been sent by a program of another build: a time after `now` would keep the burst
/// from ever being over, and the limit from coming down.
pub fn observe(history: &mut History, event: &MemoryEvent, now: Nanos) {
    let demand = Bytes::from_pages(event.usage_pages.saturating_sub(event.file_pages));
    history.observe(Nanos(event.at_ns).min(now), demand);
    history.observe_rate(
        Bytes::from_pages(event.window_pages),
        Nanos(event.window_ns),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_never_later_than_now() {
        let mut history = History::default();
        let event = MemoryEvent {
            at_ns: u64::MAX,
            usage_pages: 100,
            ..MemoryEvent::default()
        };
        observe(&mut history, &event, Nanos(7));
        assert_eq!(history.last_growth, Nanos(7));
    }
}
