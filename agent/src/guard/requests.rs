//! Carrying a plan out: requests on their way to others, their answers, and what to do when none comes.

use bellows_core::{Action, Actuation, Bytes, CgroupId, Nanos, Reason};

use super::{Controller, GuardError, Guarded, Refused, Requester};
use crate::{
    actuate::{reflex::Command, shrink},
    clock::now,
    ledger::Record,
};

/// A refused raise is not asked for again for this long.
const REFUSED_FOR: Nanos = Nanos::millis(10_000);
impl<R: Requester> Controller<R> {
    pub(super) fn carry_out(
        &mut self,
        id: CgroupId,
        action: Action,
        reason: Reason,
    ) -> Result<(), GuardError> {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return Ok(());
        };
        let at = now();
        let record = Record::Intend {
            at,
            cgroup: id,
            action,
            reason,
            demand: guarded.history.demand,
        };
        self.ledger.append(&record)?;
        self.requester.record(&guarded.cgroup, &record);
        match action {
            Action::Raise { from, to } => {
                if reason == Reason::CacheThrashes {
                    guarded.thrash.raised(at);
                }
                match guarded.policy.actuation {
                    Actuation::Direct => self.reflex.send(Command::Raise(id, to)),
                    Actuation::Requested { .. } => {
                        guarded.requested = Some((to, at));
                        self.requester.raise(&guarded.cgroup, from, to);
                    }
                }
            }
            Action::Release => self.reflex.send(Command::Release(id, reason)),
            Action::Shrink { from, to } => self.shrink(id, from, to)?,
            // The reflex holds and brakes by its table.
            Action::Hold | Action::Brake { .. } => {}
        }
        Ok(())
    }

    fn shrink(&mut self, id: CgroupId, from: Bytes, to: Bytes) -> Result<(), GuardError> {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return Ok(());
        };
        let Guarded {
            cgroup,
            policy,
            history,
            foreign_brake,
            ..
        } = guarded;
        if !shrink::make_room(cgroup, to, policy, *foreign_brake)? {
            guarded.refused_shrink = Some((history.demand, now()));
            self.arm(&self.guards[&id], None);
            return Ok(());
        }
        match policy.actuation {
            Actuation::Direct => self.reflex.send(Command::Lower(id, to)),
            Actuation::Requested { .. } => {
                guarded.requested = Some((to, now()));
                guarded.lowering = Some(to);
                // Before the request: the lower limit is guarded when it comes into force.
                self.arm(&self.guards[&id], None);
                let cgroup = &self.guards[&id].cgroup;
                self.requester.lower(cgroup, from, to);
            }
        }
        Ok(())
    }

    pub(super) fn take_answer(&mut self, id: CgroupId, to: Bytes, result: Result<(), Refused>) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        if let Err(Refused {
            why: error,
            uncertain,
        }) = result
        {
            tracing::warn!(path = %guarded.cgroup.path().display(), %to, %error, "a change of the limit failed");
            guarded.report.failed(error.clone());
            if guarded
                .requested
                .is_some_and(|(requested, _)| requested == to)
            {
                if uncertain {
                    let limit = guarded.limit;
                    self.requester.take_back(&guarded.cgroup, to, limit);
                }
                self.give_up(id);
            }
            self.verify(id, Some(error));
        }
        self.look_at(id);
    }

    /// A request was refused or got lost: what waited for it waits no more.
    pub(super) fn give_up(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        let Some((to, _)) = guarded.requested.take() else {
            return;
        };
        guarded.lowering = None;
        if to < guarded.limit {
            guarded.refused_shrink = Some((guarded.history.demand, at));
        } else {
            guarded.raise_not_before = Nanos(at.0.saturating_add(REFUSED_FOR.0));
        }
        if guarded.held_since.is_some() {
            self.reflex.send(Command::Release(id, Reason::HoldExpired));
        }
        self.arm(&self.guards[&id], None);
    }
}
