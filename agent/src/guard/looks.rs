//! What nobody tells: at each tick guards are looked at through their files, and the ledger's page is turned.
//!
//! Those are looked at that are raised, held or lending, and those of which the kernel has told that they ended, were written
//! to or reclaimed from: to look costs the kernel a sum over all CPUs, so who is at rest is left alone. A limit that is found
//! to be another is in force by a request or by somebody else, who wins.
//!
//! It must not put a ledger aside while the reflex still has somebody to release by it.

use std::collections::BTreeSet;

use bellows_core::{Bytes, CgroupId, Nanos, thrash::Look};
use bellows_ebpf_common::{KIND_EXIT, KIND_RECLAIM, KIND_WRITTEN};

use super::{Controller, Requester, requests::Loss};
use crate::{actuate::reflex::Command, clock::now, ledger::Record, metrics::METRICS, state};

/// How long the reflex may take to release whom nobody guards any more; it may be too busy to say so.
const LONGEST_LEAVE: Nanos = Nanos::millis(10_000);
/// Shortest time between two looks at a guard's page cache.
const THRASH_INTERVAL: Nanos = Nanos::millis(900);

impl<R: Requester> Controller<R> {
    /// Begins a new ledger when this one is full. A failure is tried again at the next tick.
    fn turn_page(&mut self) -> std::io::Result<()> {
        let at = now();
        self.leaving
            .retain(|_, since| at.since(*since) < LONGEST_LEAVE);
        // The next ledger does not have those who leave, and a successor must release them until they are released.
        if self.leaving.is_empty() && self.ledger.is_full()? {
            let guarded: Vec<Record> = self
                .guards
                .values()
                .flat_map(|guarded| guarded.standing(at))
                .chain(self.observed.values().map(|watched| watched.record(at)))
                .collect();
            self.ledger.rotate(&guarded)?;
            self.reflex_is_behind = true;
        }
        if self.reflex_is_behind {
            self.reflex.send(Command::Ledger(self.ledger.another()?));
            self.reflex_is_behind = false;
        }
        Ok(())
    }

    pub(super) fn tick(&mut self) {
        if let Err(error) = self.turn_page() {
            tracing::warn!(%error, "a full ledger cannot be put aside: free memory on /run");
        }
        METRICS.lost(self.losses(), self.reflex.lost());
        state::renew_reserve();
        let mut exited = Vec::new();
        let (mut reclaimed, mut written) = (BTreeSet::new(), BTreeSet::new());
        match &mut self.kernel {
            Some(kernel) => kernel.drain_life(|event| match event.kind {
                KIND_EXIT => exited.push(CgroupId(event.cgroup_id)),
                KIND_RECLAIM => drop(reclaimed.insert(CgroupId(event.cgroup_id))),
                KIND_WRITTEN => drop(written.insert(CgroupId(event.cgroup_id))),
                _ => {}
            }),
            // Without the programs nobody tells who is reclaimed from.
            None => reclaimed.extend(self.guards.keys()),
        }
        for &id in &written {
            self.reflex.send(Command::PutBack(id));
        }
        for id in reclaimed {
            self.look_for_thrash(id);
        }
        let active: Vec<CgroupId> = self
            .guards
            .iter()
            .filter(|(id, guarded)| {
                let is_told = exited.contains(id) || written.contains(id);
                guarded.active() || guarded.is_lending() || is_told
            })
            .map(|(&id, _)| id)
            .collect();
        for id in active {
            self.look_at(id);
        }
        self.look_for_endings(now());
        self.look_at_bounds();
        self.look_at_observed();
    }

    /// Looks whether what is reclaimed from a guard is read back at once.
    fn look_for_thrash(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        // Looked at a moment ago: the faster tick has nothing to add.
        if at.since(guarded.thrash_looked) < THRASH_INTERVAL {
            return;
        }
        guarded.thrash_looked = at;
        match (guarded.cgroup.refaulted(), guarded.cgroup.stalled()) {
            (Ok(refaulted), Ok(stalled)) => {
                let look = Look {
                    at,
                    refaulted,
                    stalled,
                };
                guarded.thrash.look(guarded.limit, look);
                self.decide(id);
            }
            (Err(error), _) | (_, Err(error)) => guarded.report.failed(error.to_string()),
        }
    }

    /// Observes a guard through its files, and decides.
    pub(super) fn look_at(&mut self, id: CgroupId) {
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let at = now();
        match (guarded.cgroup.stat(), guarded.cgroup.limit_in_force()) {
            (Ok(stat), Ok(limit)) => {
                guarded.saw(at, stat);
                let is_new_brake = match guarded.look_at_brake(at) {
                    Ok(is_new) => is_new,
                    Err(error) => {
                        guarded.report.failed(error.to_string());
                        false
                    }
                };
                if limit != guarded.limit {
                    if guarded.requested.is_some() {
                        self.carried_out = at;
                    }
                    // In force by a request, or changed by somebody else, who wins.
                    guarded.limit_is(at, limit);
                    guarded.learn_latency();
                    self.verify(id, None);
                    self.remember(id);
                    self.arm(&self.guards[&id], None);
                } else if is_new_brake {
                    self.arm(&self.guards[&id], None);
                } else if let Some(to) = guarded.lost(at, self.carried_out) {
                    let most = self.requester.bound(id).map(|bound| Bytes(bound.most));
                    if let Some(most) = most.filter(|&most| to < limit && most < limit) {
                        // It may not have back what others have taken since.
                        self.lower_anew(id, to, most);
                    } else {
                        self.requester.take_back(&guarded.cgroup, to, limit);
                        self.give_up(id, Loss::Silent);
                        // What is asked for next must not be sent beside what is taken back.
                        return;
                    }
                }
                self.decide(id);
            }
            (Err(error), _) | (_, Err(error)) => {
                if error.is_gone() {
                    self.end_run(id);
                    drop(self.forget(id));
                } else {
                    guarded.report.failed(error.to_string());
                }
            }
        }
    }
}
