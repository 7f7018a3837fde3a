//! The memory limit of one container: taken over when somebody else sets it, guarded by its rules, left alone at rest
//! without any.

use bellows_core::{
    Bytes, Nanos, Patience, Policy, WHOLE,
    elastic::{MemoryRules, Order, Parallelism},
    moved::MovedLimit,
};

use super::{Context, Watch, text, workload};
use crate::{
    actuate::update::Target,
    cgroup::{Cgroup, Limit},
    cri::{memory_limit, resources},
    guard::{Input, Named},
    machine,
};

/// Quiet time before a limit is lowered that no policy allows any more.
const AT_ONCE: Nanos = Nanos::millis(1000);

impl Watch {
    /// Follows rules for memory, or brings it to rest without any.
    pub(super) async fn follow_memory(
        &mut self,
        id: &str,
        cgroup: &Cgroup,
        rules: Option<MemoryRules>,
    ) -> Result<(), String> {
        let targets = self.context.updater.targets();
        let is_unguarded = |target: &mut Target| std::mem::take(&mut target.is_unguarded);
        if targets.of(cgroup.id(), is_unguarded) == Some(true)
            && let Some(known) = self.known.get_mut(id)
        {
            known.memory = None;
        }
        let is_guarded = self
            .known
            .get(id)
            .is_some_and(|known| known.memory.is_some());
        // The limit before what is known of it: what we ask for is written down before it is asked for.
        let limit = cgroup.limit("memory.max").map_err(text)?;
        let targets = self.context.updater.targets();
        let known = targets.of(cgroup.id(), |target| {
            let original = target.original.limit.clone();
            let boost = target.original.boosts.memory();
            (original, boost, target.is_moving(), target.is_telling())
        });
        let (moved, boost, is_moving, is_telling) = known.ok_or("it is not known any more")?;
        if rules.is_none() && boost.is_none() && moved.is_none() {
            return Ok(());
        }
        let Limit::At(limit) = limit else {
            if !is_telling {
                self.leave_memory(id, cgroup)?;
            }
            return Err("it has no memory limit: there is nothing to raise".to_owned());
        };
        let moved = match moved {
            // What is on its way may be ours, or replace theirs: that is seen when it has arrived.
            Some(moved) if moved.is_ours(limit) || is_moving => moved,
            Some(_) => self.take_over(id, cgroup, limit).await?,
            None => {
                let moved = MovedLimit::new(limit);
                self.record(cgroup, |original| original.limit = Some(moved.clone()))?;
                moved
            }
        };
        if !is_telling && !moved.asked.is_empty() {
            self.settle_doubt(id, cgroup, limit).await?;
        }
        let is_at_rest = limit == moved.at_rest && !self.is_telling(cgroup);
        let is_wanted = rules.is_some() || boost.is_some();
        if !is_wanted && is_at_rest {
            return self.leave_memory(id, cgroup);
        }
        if is_at_rest && !moved.asked.is_empty() {
            self.record(cgroup, |original| {
                original.limit.iter_mut().for_each(MovedLimit::rest);
            })?;
        }
        if !is_wanted && limit < moved.at_rest && !is_moving {
            // It had less at rest by a policy's rules, which are gone.
            self.context.updater.send(cgroup.id(), moved.at_rest);
        }
        let (wanted, refusal) = match self.policy(moved.at_rest, rules, boost) {
            Ok(wanted) => (wanted, None),
            // Somebody else has set more than the policy allows, or the policy has changed.
            Err(why) if is_at_rest => {
                self.leave_memory(id, cgroup)?;
                return Err(why);
            }
            Err(why) => (self.policy(moved.at_rest, None, boost)?, Some(why)),
        };
        if !is_guarded {
            self.adopt_memory(id, cgroup, wanted, limit)?;
        }
        if let Some(known) = self.known.get_mut(id) {
            let before = known.memory.replace(wanted);
            if is_guarded && before != Some(wanted) {
                self.send(Input::Policy(cgroup.id(), wanted));
            }
        }
        // In place of a lowering that is under way, too.
        let asked = moved.asked.first().copied().unwrap_or(limit);
        if boost.is_some() && asked < wanted.original {
            self.context.updater.send(cgroup.id(), wanted.original);
        }
        refusal.map_or(Ok(()), Err)
    }

    /// Whether something is asked for that the runtime does not know yet.
    fn is_telling(&self, cgroup: &Cgroup) -> bool {
        let targets = self.context.updater.targets();
        let told = targets.of(cgroup.id(), |target| target.is_telling());
        told.unwrap_or(false)
    }

    /// Tells the runtime of a limit that a predecessor has set, if it does not know it: it was killed in between. With
    /// its next update of anything else the runtime would set the one that it remembers.
    async fn settle_doubt(
        &mut self,
        id: &str,
        cgroup: &Cgroup,
        limit: Bytes,
    ) -> Result<(), String> {
        if !self.known.get(id).is_some_and(|known| known.is_in_doubt) {
            return Ok(());
        }
        let (status, _) = self.runtime().status(id).await.map_err(text)?;
        let said = memory_limit(&resources(status));
        if said.map(machine::page_floor) != Some(limit) {
            tracing::warn!(id, %limit, ?said, "a predecessor has not told the runtime of this limit: it is told now");
            self.context.updater.send(cgroup.id(), limit);
        }
        if let Some(known) = self.known.get_mut(id) {
            known.is_in_doubt = false;
        }
        Ok(())
    }

    fn adopt_memory(
        &self,
        id: &str,
        cgroup: &Cgroup,
        policy: Policy,
        limit: Bytes,
    ) -> Result<(), String> {
        let known = self.known.get(id);
        let targets = self.context.updater.targets();
        let target = targets.of(cgroup.id(), |target| target.clone());
        let target = target.ok_or("it is not known any more")?;
        let moved = target.original.limit.as_ref();
        let is_ours = |said: Bytes| moved.is_some_and(|moved| moved.is_ours(said));
        let said = target.said.as_ref().and_then(memory_limit);
        if let Some(said) = said.filter(|said| !is_ours(machine::page_floor(*said))) {
            let container = &target.original.name;
            tracing::warn!(container, %said, %limit, "its runtime has another limit than its cgroup");
        }
        if let Some(pod) = &target.pod {
            pod.adopt().map_err(text)?;
        }
        let (container, id) = (target.original.name, target.original.id);
        let path = cgroup.path().display();
        tracing::info!(container, id, %path, limit = %policy.original, max = %policy.ceiling, "guarded");
        let workload = known.map_or_else(|| container.clone(), |known| workload(&known.subject));
        let named = Named {
            name: container,
            workload,
        };
        self.send(Input::Adopt(cgroup.clone().with_inner(), policy, named));
        Ok(())
    }

    /// Leaves the memory limit of a container alone.
    fn leave_memory(&mut self, id: &str, cgroup: &Cgroup) -> Result<(), String> {
        let known = self.known.get_mut(id);
        if known.and_then(|known| known.memory.take()).is_some() {
            self.send(Input::Forget(cgroup.id()));
        }
        self.record(cgroup, |original| original.limit = None)
    }

    /// Somebody else has set a limit, which is the new original.
    async fn take_over(
        &self,
        id: &str,
        cgroup: &Cgroup,
        limit: Bytes,
    ) -> Result<MovedLimit<Bytes>, String> {
        let (status, _) = self.runtime().status(id).await.map_err(text)?;
        let moved = MovedLimit::new(limit);
        let targets = self.context.updater.targets();
        targets.of(cgroup.id(), |target| {
            target.said = Some(resources(status));
        });
        let container = self.record(cgroup, |original| {
            original.limit = Some(moved.clone());
            original.name.clone()
        })?;
        tracing::info!(container, %limit, "the limit was changed by somebody else, which is the new original");
        Ok(moved)
    }

    /// The rules for a container whose limit at rest is `original`; without any it is brought there. What a boost lends
    /// is at rest for as long as that lasts.
    pub(super) fn policy(
        &self,
        original: Bytes,
        memory: Option<MemoryRules>,
        boost: Option<Bytes>,
    ) -> Result<Policy, String> {
        let Context {
            actuation, signals, ..
        } = &self.context;
        let memory = memory.unwrap_or(MemoryRules {
            max: original,
            floor: None,
            shrink_after: AT_ONCE,
            hold_at_most: None,
            order: Order::PatchFirst,
            parallelism: Parallelism::Unchanged,
            heap: None,
            requests: None,
        });
        if memory.order == Order::RaiseFirst {
            let why = "memory.order RaiseFirst is for pods of Kubernetes: leave it out, or write PatchFirst";
            return Err(why.to_owned());
        }
        let least = boost.unwrap_or(Bytes::ZERO);
        let original = memory.floor.map_or(original, |floor| floor.min(original));
        let policy = Policy {
            original: original.max(least),
            ceiling: memory.max.max(least),
            actuation: *actuation,
            signals: *signals,
            patience: Patience::UNPROBED.for_at_most(memory.hold_at_most),
            cpus: machine::online_cpus(),
            shrink_after: memory.shrink_after,
            usable_per_mille: WHOLE,
            by_hand_after: None,
            priority: 0,
            parallelism: memory.parallelism,
            learnt: None,
        };
        policy.validate(machine::pages(1)).map_err(text)
    }
}
