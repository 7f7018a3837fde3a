//! Carrying a plan out: requests on their way to others, their answers, and what to do when none comes.

use std::thread;

use bellows_core::{
    Action, Actuation, Bytes, CgroupId, Nanos, Reason,
    decide::{ByHand, SHRINK_REFUSED_FOR, SLAB_IN_USE_FOR},
};

use super::{Controller, GuardError, Input, Refused, Requester};
use crate::{
    actuate::{reflex::Command, shrink},
    clock::now,
    ledger::Record,
    metrics::METRICS,
};

/// A refused raise is not asked for again for this long.
const REFUSED_FOR: Nanos = Nanos::millis(10_000);

/// So long after it failed a raise by hand is tried again, and for who is held, whose patience may be over before that.
const BY_HAND_AGAIN: Nanos = Nanos::millis(1000);
const BY_HAND_AGAIN_HELD: Nanos = Nanos::millis(100);

/// A runtime that does not answer is asked for a lower limit again after this long: it may be about to be back.
const UNANSWERED_FOR: Nanos = Nanos::millis(2000);

/// How a request ended that was not carried out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// It was refused.
    Refused,
    /// A runtime did not answer.
    Unanswered,
    /// Nothing came of it.
    Silent,
}

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
        if guarded.is_making_room && matches!(action, Action::Shrink { .. }) {
            return Ok(());
        }
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
            Action::Raise { to, .. } => {
                if reason == Reason::CacheThrashes {
                    guarded.thrash.raised(at);
                }
                match guarded.policy.actuation {
                    Actuation::Direct => self.reflex.send(Command::Raise(id, to)),
                    Actuation::Requested { .. } => {
                        guarded.requested = Some((to, at));
                        guarded.request_failed = false;
                        self.requester
                            .raise(&guarded.cgroup, to, guarded.patience(at));
                    }
                }
            }
            Action::RaiseByHand { to, .. } => self.raise_by_hand(id, to),
            Action::Release => self.reflex.send(Command::Release(id, reason)),
            Action::Shrink { to, .. } => self.make_room(id, to)?,
            // The reflex holds and brakes by its table.
            Action::Hold | Action::Brake { .. } => {}
        }
        Ok(())
    }

    /// Raises a limit without whoever was asked for it.
    fn raise_by_hand(&mut self, id: CgroupId, to: Bytes) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let may = self.requester.by_hand(id, to);
        let raised = self.requester.raise_by_hand(&guarded.cgroup, to);
        let in_force = guarded.cgroup.limit_in_force();
        match (raised, in_force) {
            (Ok(()), Ok(limit)) if limit > guarded.limit => {
                METRICS.raises_by_hand.inc();
                // How long the answer takes is not learnt from what did not wait for it.
                guarded.requested = None;
                // One that may still come into force is guarded until it has.
                if may != ByHand::NotYet {
                    guarded.lowering = None;
                }
                guarded.limit_is(now(), limit);
                self.verify(id, None);
                self.arm(&self.guards[&id], None);
            }
            (raised, _) => {
                let again = guarded
                    .held_since
                    .map_or(BY_HAND_AGAIN, |_| BY_HAND_AGAIN_HELD);
                guarded.by_hand_not_before = Nanos(now().0.saturating_add(again.0));
                let why = raised.err();
                let why = why.unwrap_or_else(|| format!("the limit is not {to}"));
                tracing::warn!(path = %guarded.cgroup.path().display(), %to, why, "a limit cannot be raised by hand");
                guarded.report.failed(why);
            }
        }
    }

    /// Raises a limit that was left below the one at rest by other rules.
    pub(super) fn raise_to_rest(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get(&id) else {
            return;
        };
        let (from, to) = (guarded.limit, guarded.policy.original);
        let is_busy = guarded.requested.is_some() || now() < guarded.raise_not_before;
        if from < to
            && !is_busy
            && let Err(error) = self.carry_out(id, Action::Raise { from, to }, Reason::BelowRest)
        {
            tracing::warn!(cgroup.id = id.0, %error, "a limit stays below the one at rest");
        }
    }

    /// Makes room for a lower limit, on a thread of its own: giving back gibibytes of dirty page cache takes
    /// seconds, in which others must get their raises.
    fn make_room(&mut self, id: CgroupId, to: Bytes) -> Result<(), GuardError> {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return Ok(());
        };
        let (cgroup, policy) = (guarded.cgroup.clone(), guarded.policy);
        let is_foreign = guarded.foreign_brake.is_some();
        let answers = self.answers.clone();
        thread::Builder::new()
            .name("shrink".to_owned())
            .spawn(move || {
                let made = shrink::make_room(&cgroup, to, &policy, is_foreign);
                let made = Input::RoomMade {
                    cgroup: id,
                    to,
                    result: made.map_err(|error| error.to_string()),
                };
                // A controller that has ended lowers nothing.
                drop(answers.send(made));
            })
            .map_err(GuardError::Thread)?;
        guarded.is_making_room = true;
        Ok(())
    }

    /// Lowers a limit that room was made for, unless the container has come to need it meanwhile.
    pub(super) fn lower(&mut self, id: CgroupId, to: Bytes, made: Result<bool, String>) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        guarded.is_making_room = false;
        let is_busy = guarded.requested.is_some()
            || guarded.held_since.is_some()
            || !(guarded.policy.original..guarded.limit).contains(&to);
        // While that holds it is not asked for, so that nothing is known anew.
        let is_known = |at: Nanos| now().since(at) < SLAB_IN_USE_FOR;
        if made == Ok(false) && !guarded.slab_kept.is_some_and(is_known) {
            guarded.slab_kept = Some(now());
        }
        let has_room = made.unwrap_or_else(|error| {
            guarded.report.failed(error);
            false
        });
        if is_busy || !has_room {
            guarded.refuse_shrink(now(), SHRINK_REFUSED_FOR);
            // Puts the brake back where it belongs.
            return self.arm(&self.guards[&id], None);
        }
        // What was given back for it counts no more: a lower limit that is on its way is no reason to raise.
        if let Ok(stat) = guarded.cgroup.stat() {
            guarded.saw(now(), stat);
        }
        match guarded.policy.actuation {
            Actuation::Direct => self.reflex.send(Command::Lower(id, to)),
            Actuation::Requested { .. } => {
                guarded.requested = Some((to, now()));
                guarded.lowering = Some(to);
                // Before the request: the lower limit is guarded when it comes into force.
                self.arm(&self.guards[&id], None);
                let cgroup = &self.guards[&id].cgroup;
                self.requester.lower(cgroup, to);
            }
        }
    }

    pub(super) fn take_answer(&mut self, id: CgroupId, to: Bytes, result: Result<(), Refused>) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        if let Err(Refused {
            why: error,
            uncertain,
            is_passing,
        }) = result
        {
            tracing::warn!(path = %guarded.cgroup.path().display(), %to, %error, "a change of the limit failed");
            guarded.report.failed(error.clone());
            let is_meant = guarded
                .requested
                .is_some_and(|(requested, _)| requested == to);
            let by_hand = self.requester.by_hand(id, to);
            if is_meant
                && is_passing
                && to > guarded.limit
                && guarded.policy.by_hand_after.is_some()
                && by_hand != ByHand::No
            {
                guarded.request_failed = true;
            } else if is_meant && guarded.waits_on(now(), to) {
                tracing::debug!(cgroup.id = id.0, "the lower limit before it may still come");
            } else if is_meant {
                if uncertain {
                    let limit = guarded.limit;
                    self.requester.take_back(&guarded.cgroup, to, limit);
                }
                // An API is not asked that often: each question is a write.
                let is_runtime = guarded.policy.by_hand_after.is_none();
                let loss = if uncertain && is_runtime {
                    Loss::Unanswered
                } else {
                    Loss::Refused
                };
                self.give_up(id, loss);
            }
            self.verify(id, Some(error));
        }
        self.look_at(id);
    }

    /// A lowering got lost, and the limit in force may not be had back: it is guarded below the lower one on, and asked for
    /// once more.
    pub(super) fn lower_anew(&mut self, id: CgroupId, to: Bytes, most: Bytes) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        METRICS.requests_failed.inc();
        let path = guarded.cgroup.path().display();
        let limit = guarded.limit;
        tracing::warn!(%path, %to, %limit, %most, "a lower limit does not come into force");
        if let Some(anew) = guarded.lowers_anew(now(), to, most) {
            self.arm(&self.guards[&id], None);
            self.requester.lower(&self.guards[&id].cgroup, anew);
        }
    }

    /// A request was refused or got lost: what waited for it waits no more.
    pub(super) fn give_up(&mut self, id: CgroupId, loss: Loss) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        let Some((to, _)) = guarded.requested.take() else {
            return;
        };
        METRICS.requests_failed.inc();
        guarded.lowering = None;
        let was_raise = to >= guarded.limit;
        if !was_raise {
            match loss {
                Loss::Refused => guarded.refuse_shrink(at, SHRINK_REFUSED_FOR),
                Loss::Unanswered => guarded.refuse_shrink(at, UNANSWERED_FOR),
                Loss::Silent => guarded.lost_lowerings = guarded.lost_lowerings.saturating_add(1),
            }
        } else {
            guarded.raise_not_before = Nanos(at.0.saturating_add(REFUSED_FOR.0));
        }
        // Held or not: nobody is asked for a while, so a hold would only put off what must come.
        if was_raise || guarded.held_since.is_some() {
            self.reflex.send(Command::Release(id, Reason::HoldExpired));
        }
        self.arm(&self.guards[&id], None);
    }
}
