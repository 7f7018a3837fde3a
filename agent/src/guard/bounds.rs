//! What a namespace allows, as the ceiling of a guard: asked at each decision, because others use it up meanwhile.
//!
//! Who may not be raised at all is at its ceiling: no hold and no brake are left of us. It is armed again when the
//! allowance has changed, which whoever watches that tells.

use bellows_core::{
    Action, Bytes, CgroupId, Policy, Snapshot,
    allowance::{Bound, Reached},
    decide::decide,
};

use super::{Controller, Guarded, Requester};
use crate::{clock::now, ledger::Record, machine, metrics::METRICS};

impl Guarded {
    /// Takes over what bounds it now; returns whether its ceiling is another.
    pub(super) fn take_bound(&mut self, bound: Option<Bound>) -> bool {
        let most = bound
            .as_ref()
            .map(|bound| machine::page_floor(Bytes(bound.most)));
        // What is in force was granted: below it nobody would look at the container any more.
        let most = most.map(|most| most.max(self.limit));
        let ceiling = most.map_or(self.asked_ceiling, |most| most.min(self.asked_ceiling));
        let ceiling = ceiling.max(self.policy.original);
        self.bound = bound.filter(|_| ceiling < self.asked_ceiling);
        ceiling != std::mem::replace(&mut self.policy.ceiling, ceiling)
    }

    /// Whether it is short of what another has: of room on the node, or of a quota of the namespace of both.
    pub(super) fn is_short_of(&self, other: &Self) -> bool {
        let namespace = |own: &Self| own.name.split('/').next().map(str::to_owned);
        let quota = self.bound.as_ref().filter(|_| self.is_cut);
        let is_by_quota = quota.is_some_and(|bound| bound.by.reason() == Reached::Quota);
        self.waiting.is_some() || (is_by_quota && namespace(self) == namespace(other))
    }

    /// Takes note of whether its raise is cut, and returns what it would be raised to. What it was told of is of another
    /// burst once it needs nothing any more.
    pub(super) fn take_cut(&mut self, snapshot: &Snapshot, actions: &[Action]) -> Option<Bytes> {
        let wanted = self.cut(snapshot, actions);
        self.is_cut = wanted.is_some();
        if !self.is_cut && self.is_calm() {
            self.told_bound = None;
        }
        wanted
    }

    /// The raise that it would be asked for if nothing bounded it, where that is more than it is asked for.
    fn cut(&self, snapshot: &Snapshot, actions: &[Action]) -> Option<Bytes> {
        self.bound.as_ref()?;
        let raise = |action: &Action| match action {
            Action::Raise { to, .. } => Some(*to),
            _ => None,
        };
        let policy = Policy {
            ceiling: self.asked_ceiling,
            ..snapshot.policy
        };
        let unbound = decide(&Snapshot {
            policy,
            ..*snapshot
        });
        let wanted = unbound.actions.iter().find_map(|(action, _)| raise(action));
        let asked = actions.iter().find_map(raise);
        wanted.filter(|wanted| asked.is_none_or(|asked| asked < *wanted))
    }
}

impl<R: Requester> Controller<R> {
    /// Asks what bounds a guard now, and arms it anew where that is another ceiling than before.
    pub(super) fn take_bound(&mut self, id: CgroupId) {
        let bound = self.requester.bound(id);
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        if guarded.take_bound(bound) {
            self.arm(&self.guards[&id], None);
        }
    }

    /// What others have asked for counts no more after a while, and nobody tells of that.
    pub(super) fn look_at_bounds(&mut self) {
        let bounded = self.guards.iter();
        let bounded = bounded.filter(|(_, guarded)| guarded.bound.is_some());
        let bounded: Vec<CgroupId> = bounded.map(|(&id, _)| id).collect();
        for id in bounded {
            self.take_bound(id);
        }
    }

    /// What namespaces allow has changed.
    pub(super) fn take_bounds(&mut self) {
        let ids: Vec<CgroupId> = self.guards.keys().copied().collect();
        for id in ids {
            self.take_bound(id);
        }
    }

    /// Tells that a raise to `wanted` is not allowed, once for each reason in a burst.
    pub(super) fn tell_of_bound(&mut self, id: CgroupId, wanted: Bytes) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let Some(bound) = &guarded.bound else {
            return;
        };
        let reason = bound.by.reason();
        if guarded.told_bound.replace(reason) == Some(reason) {
            return;
        }
        METRICS.raises_bounded.inc();
        let record = Record::Bounded {
            at: now(),
            cgroup: id,
            wanted,
            reason,
            why: bound.to_string(),
        };
        if let Err(error) = self.ledger.append(&record) {
            guarded.report.failed(error.to_string());
        }
        self.requester.record(&guarded.cgroup, &record);
    }
}

/// The same, for people.
#[must_use]
pub fn told_bound(wanted: Bytes, why: &str) -> String {
    format!("no raise to {wanted}: {why}")
}

#[cfg(test)]
mod tests {
    use bellows_core::{
        Nanos,
        allowance::{Amount, By, What},
        decide::ByHand,
    };

    use super::*;

    fn guarded() -> Guarded {
        let mut guarded = Guarded::stand_in(Bytes::mib(64));
        guarded.policy.by_hand_after = Some(Nanos(0));
        guarded
    }

    fn bound(most: Bytes) -> Bound {
        let amount = Amount { hard: 1, used: 1 };
        Bound {
            most: most.0,
            by: By::Quota {
                name: "q".to_owned(),
                what: What::MemoryLimit,
                amount,
                asked: 0,
            },
        }
    }

    #[test]
    fn a_ceiling_is_the_least_of_the_policys_and_what_is_allowed_and_no_less_than_at_rest() {
        let mut guarded = guarded();
        let mut under = |most: Option<u64>| {
            let is_new = guarded.take_bound(most.map(|mib| bound(Bytes::mib(mib))));
            (guarded.policy.ceiling, is_new, guarded.bound.is_some())
        };
        assert_eq!(under(None), (Bytes::mib(1024), false, false));
        assert_eq!(under(Some(2000)), (Bytes::mib(1024), false, false));
        assert_eq!(under(Some(100)), (Bytes::mib(100), true, true));
        assert_eq!(under(Some(100)), (Bytes::mib(100), false, true));
        assert_eq!(under(Some(1)), (Bytes::mib(64), true, true));
        assert_eq!(under(None), (Bytes::mib(1024), true, false));
        // What is in force is not cut, unless its own policy says so.
        guarded.limit = Bytes::mib(589);
        guarded.take_bound(Some(bound(Bytes::mib(499))));
        assert_eq!(guarded.policy.ceiling, Bytes::mib(589));
        guarded.limit = Bytes::mib(2000);
        guarded.take_bound(Some(bound(Bytes::mib(499))));
        assert_eq!(guarded.policy.ceiling, Bytes::mib(1024));
        guarded.limit = Bytes::mib(64);
        // Whose rules change is bounded all the same.
        guarded.take_bound(Some(bound(Bytes::mib(100))));
        let rules = Policy {
            ceiling: Bytes::mib(512),
            ..guarded.policy
        };
        guarded.follow(rules);
        assert!(guarded.take_bound(Some(bound(Bytes::mib(100)))));
        assert_eq!(guarded.policy.ceiling, Bytes::mib(100));
        guarded.take_bound(None);
        assert_eq!(guarded.policy.ceiling, Bytes::mib(512));
    }

    #[test]
    fn others_are_short_of_what_one_has_on_its_node_or_in_its_namespace() {
        let other = |name: &str| {
            let mut other = guarded();
            name.clone_into(&mut other.name);
            other
        };
        let mut one = guarded();
        assert!(!one.is_short_of(&other("a/d/e")));
        one.take_bound(Some(bound(Bytes::mib(64))));
        assert!(!one.is_short_of(&other("a/d/e")), "it wants no more");
        one.history.demand = Bytes::mib(63);
        let look = |one: &mut Guarded| {
            let snapshot = one.snapshot(Nanos::millis(1), ByHand::No);
            one.take_cut(&snapshot, &[]).is_some()
        };
        assert!(look(&mut one));
        one.told_bound = Some(Reached::Quota);
        assert!(one.is_short_of(&other("a/d/e")) && !one.is_short_of(&other("b/d/e")));
        let mut of_range = bound(Bytes::mib(64));
        of_range.by = By::RangeMax {
            name: "r".to_owned(),
            what: What::MemoryLimit,
            is_of_pod: false,
            max: 64 << 20,
        };
        one.take_bound(Some(of_range));
        assert!(!one.is_short_of(&other("a/d/e")), "nobody has it");
        // What it was told of lasts until it wants nothing any more, and not until it uses a little less.
        one.take_bound(Some(bound(Bytes::mib(64))));
        one.calm_down();
        assert!(look(&mut one) && one.told_bound.is_some());
        one.history.demand = Bytes::mib(10);
        assert!(!look(&mut one) && one.told_bound.is_none());
        assert!(!one.is_short_of(&other("a/d/e")));
    }

    /// What is written before the API is asked is bounded by the same.
    #[test]
    fn nothing_is_raised_beyond_what_is_allowed_and_what_is_cut_is_told() {
        let mut guarded = guarded();
        guarded.history.demand = Bytes::mib(63);
        let raises = |guarded: &Guarded| {
            let snapshot = guarded.snapshot(Nanos::millis(1), ByHand::Yes);
            let actions = decide(&snapshot).actions;
            let actions: Vec<Action> = actions.into_iter().map(|(action, _)| action).collect();
            let cut = guarded.cut(&snapshot, &actions);
            (actions, cut)
        };
        let (from, free) = (Bytes::mib(64), raises(&guarded));
        let [Action::Raise { to: wanted, .. }] = free.0[..] else {
            panic!("{free:?}")
        };
        assert!(wanted > Bytes::mib(100) && free.1.is_none());
        let to = Bytes::mib(100);
        guarded.take_bound(Some(bound(to)));
        assert_eq!(
            raises(&guarded),
            (vec![Action::Raise { from, to }], Some(wanted))
        );
        guarded.take_bound(Some(bound(from)));
        assert_eq!(raises(&guarded), (vec![], Some(wanted)));
        // Who is held goes on, and is killed where it would have been.
        guarded.held_since = Some(Nanos(0));
        assert_eq!(raises(&guarded).0, [Action::Release]);
    }
}
