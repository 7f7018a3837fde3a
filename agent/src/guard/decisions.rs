//! A guard is decided on: what is known of it becomes a snapshot, core's plan is bounded by what there is room for, and carried out.
//!
//! Core decides twice where the first answer to a burst is due and something was learnt of its like: what a burst is for is
//! looked up only then, because it costs a look at its processes. Who is asked for may have no patience left, and is decided
//! on again at once.
//!
//! It must not act on what core has not planned, nor raise beyond what was found to be there.

use bellows_core::{
    Action, CgroupId, Reason, Snapshot,
    decide::{ByHand, decide},
};

use super::{Controller, Requester, guarded::Guarded};
use crate::clock::now;

impl<R: Requester> Controller<R> {
    /// Decides, and has it carried out. Who was asked for just now may have to be raised by hand at once: that is raised
    /// first, or nothing is left of its patience.
    pub(super) fn decide(&mut self, id: CgroupId) {
        let is_asked = |guarded: &Guarded| {
            guarded.policy.by_hand_after.is_some() && guarded.requested.is_some()
        };
        let was_asked = self.guards.get(&id).is_some_and(is_asked);
        self.decide_once(id);
        if !was_asked && self.guards.get(&id).is_some_and(is_asked) {
            self.decide_once(id);
        }
        self.lend(id);
    }

    /// Whether somebody else waits for what a guard has. Who has nothing to give back keeps nothing from anybody.
    fn keeps_from_others(&self, id: CgroupId) -> bool {
        let own = self.guards.get(&id);
        let own = own.filter(|own| own.limit > own.policy.original);
        own.is_some_and(|own| {
            let mut others = self.guards.iter().filter(|(other, _)| **other != id);
            others.any(|(_, other)| other.is_short_of(own))
        })
    }

    fn decide_once(&mut self, id: CgroupId) {
        self.take_bound(id);
        let somebody_waits = self.keeps_from_others(id);
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        guarded.look_at_burst(at);
        let by_hand = match guarded.requested {
            Some((to, _)) if at >= guarded.by_hand_not_before => self.requester.by_hand(id, to),
            _ => ByHand::No,
        };
        let snapshot = |guarded: &Guarded| Snapshot {
            others_wait: somebody_waits,
            ..guarded.snapshot(at, by_hand)
        };
        let mut plan = decide(&snapshot(guarded));
        let is_raise = |(action, _): &(Action, _)| matches!(action, Action::Raise { .. });
        let is_burst = |(action, reason): &(Action, Reason)| {
            matches!(action, Action::Raise { .. }) && *reason != Reason::CacheThrashes
        };
        if !plan.actions.iter().any(is_raise) {
            // It does not need it any more.
            guarded.waiting = None;
            guarded.calm_down();
        } else if plan.actions.iter().any(is_burst)
            && self.recall(id)
            && let Some(guarded) = self.guards.get(&id)
        {
            plan = decide(&snapshot(guarded));
        }
        let planned: Vec<Action> = plan.actions.iter().map(|(action, _)| *action).collect();
        let cut = self.guards.get_mut(&id);
        if let Some(wanted) = cut.and_then(|guarded| guarded.take_cut(&snapshot(guarded), &planned))
        {
            self.tell_of_bound(id, wanted);
        }
        for (action, reason) in plan.actions {
            let action = match action {
                Action::Raise { from, to } => match self.room_for(id, from, to, reason) {
                    Some(to) => Action::Raise { from, to },
                    None => continue,
                },
                other => other,
            };
            if let Err(error) = self.carry_out(id, action, reason) {
                tracing::warn!(cgroup.id = id.0, ?action, ?reason, %error, "an action failed");
                if let Some(guarded) = self.guards.get_mut(&id) {
                    guarded.report.failed(error.to_string());
                }
            }
        }
    }
}
