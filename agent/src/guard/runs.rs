//! When a run begins and ends, and with it what is looked up and remembered of its like ([`super::learnt`]).
//!
//! A run begins with the first raise of a burst that is about to be answered, and ends with it, or with its container in the
//! middle of it: what that has used is looked at a last time then, because it may have ended before anybody else did. Its like
//! may have run beside it, so what is known is taken anew at both ends.
//!
//! It must not call it a run that nothing was raised for.

use bellows_core::{Bytes, CgroupId};

use super::{Controller, Requester, growers::Growers};
use crate::clock::now;

impl<R: Requester> Controller<R> {
    /// Looks what a burst is for that is about to be answered for the first time, and what that has needed before.
    pub(super) fn recall(&mut self, id: CgroupId) -> bool {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return false;
        };
        if guarded.trigger.is_some() {
            return false;
        }
        let growers = Growers::of(&guarded.cgroup);
        // Its like may have run in another replica, or before it was made anew.
        guarded.learnt = self.memory.of(&guarded.workload);
        guarded.recall(growers.map(|growers| growers.trigger).unwrap_or_default());
        guarded.policy.learnt.is_some()
    }

    /// Remembers what a burst that has just ended has needed.
    pub(super) fn remember(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        if let Some((trigger, part)) = guarded.ended.take() {
            // Its like may have run beside it.
            guarded.learnt = self.memory.of(&guarded.workload);
            guarded.learnt.ended(&trigger, part);
            self.memory.keep(&guarded.workload, guarded.learnt.clone());
        }
    }

    /// A container ends in the middle of a burst: that is the end of its run.
    pub(super) fn end_run(&mut self, id: CgroupId) {
        // Of a whole life: that of a command is one run.
        let is_one_run = !self.requester.shares_the_node();
        let counted = self.kernel.as_ref().filter(|_| is_one_run);
        let peak = counted.and_then(|kernel| kernel.growth(id));
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        if guarded.limit <= guarded.policy.original {
            return;
        }
        let at = now();
        if let Some(growth) = peak {
            // It may have ended before it was looked at.
            let peak = Bytes::from_pages(growth.peak_demand_pages);
            guarded.history.observe(at, peak);
            guarded.look_at_burst(at);
        }
        guarded.burst_is_over(at);
        self.remember(id);
    }
}
