//! One container: what of it is guarded, and what is done when its rules or its limits change.
//!
//! Memory and CPU are guarded each by itself: a container may have a limit for one, or a policy for one, or somebody
//! who sets one.

use std::{path::Path, sync::Arc, time::Duration};

use bellows_core::{
    Bytes, Nanos, Patience, Policy, WHOLE,
    cpu::CpuPolicy,
    elastic::{ContainerRules, CpuRules, MemoryRules, Subject},
    moved::MovedLimit,
};
use tokio::time::Instant;

use super::{Context, Watch, name, subject, text};
use crate::{
    actuate::{pod::Pod, update::Target},
    attribution::{self, CGROUP_ROOT},
    cgroup::{Cgroup, Limit, quota::Quota},
    cri::{Container, PodSandbox, memory_limit},
    guard::Input,
    originals::{MovedQuota, Original},
    quota::Watched,
};

/// How soon a container is looked at again that could not be guarded, and how seldom at last.
const AGAIN: Duration = Duration::from_secs(1);
const SELDOM_AGAIN: Duration = Duration::from_secs(60);
/// Quiet time before a limit is lowered that no policy allows any more.
const AT_ONCE: Nanos = Nanos::millis(1000);

/// A container that runs.
#[derive(Debug)]
pub(super) struct Known {
    /// How policies see it: a container's names and its pod's labels do not change.
    pub(super) subject: Subject,
    /// The uid of its pod.
    uid: String,
    /// `None` while nothing of it is guarded.
    pub(super) cgroup: Option<Cgroup>,
    memory: Option<Policy>,
    quota: Option<CpuPolicy>,
    /// Why it is not guarded as it should be.
    refusal: Option<String>,
    /// When that is looked at again, and how long it was waited for.
    again: Option<(Instant, Duration)>,
    /// Whether a predecessor has left it, and may have raised it.
    is_left: bool,
}

impl Known {
    pub(super) fn new(container: &Container, pod: Option<&PodSandbox>, is_left: bool) -> Self {
        let uid = pod.and_then(|pod| Some(pod.metadata.as_ref()?.uid.clone()));
        Self {
            subject: subject(container, pod),
            uid: uid.unwrap_or_default(),
            cgroup: None,
            memory: None,
            quota: None,
            refusal: None,
            again: None,
            is_left,
        }
    }

    /// Whether it is time to look at it.
    pub(super) fn is_due(&self) -> bool {
        self.cgroup.is_some() || self.again.is_none_or(|(again, _)| Instant::now() >= again)
    }

    /// Its rules may have changed.
    pub(super) const fn look_again(&mut self) {
        self.again = None;
    }

    /// Takes note of how guarding it went; returns whether there is something new to tell.
    pub(super) fn went(&mut self, refusal: Option<String>) -> bool {
        let is_new = refusal.is_some() && self.refusal != refusal;
        self.again = refusal.as_ref().map(|_| {
            let before = self.again.filter(|_| !is_new);
            let wait = before.map_or(AGAIN, |(_, wait)| (wait * 2).min(SELDOM_AGAIN));
            (Instant::now() + wait, wait)
        });
        self.refusal = refusal;
        is_new
    }

    pub(super) fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }
}

impl Watch {
    /// Guards what the rules name, as they name it, and leaves alone what they do not.
    pub(super) async fn follow(
        &mut self,
        id: &str,
        rules: Option<&ContainerRules>,
    ) -> Result<(), String> {
        let memory = rules.and_then(|rules| rules.memory);
        let quota = rules.and_then(|rules| rules.cpu);
        let Some(known) = self.known.get(id) else {
            return Ok(());
        };
        let is_wanted = memory.is_some() || quota.is_some() || known.is_left;
        let cgroup = match known.cgroup.clone() {
            Some(cgroup) => cgroup,
            None if is_wanted => self.open(id).await?,
            None => return Ok(()),
        };
        let memory = self.follow_memory(id, &cgroup, memory).await;
        let quota = self.follow_quota(id, &cgroup, quota);
        let targets = self.context.updater.targets();
        let is_left = targets.of(cgroup.id(), |target| {
            target.original.limit.is_none() && target.original.quota.is_none()
        });
        if is_left.unwrap_or(true) {
            self.leave(id, &cgroup);
        }
        match (memory, quota) {
            (Err(memory), Err(quota)) => Err(format!("{memory}; {quota}")),
            (memory, quota) => memory.and(quota),
        }
    }

    /// Finds a container, and what is written down of it. Nothing of it is guarded yet.
    async fn open(&mut self, id: &str) -> Result<Cgroup, String> {
        let (status, process) = self.runtime().status(id).await.map_err(text)?;
        let root = Path::new(CGROUP_ROOT);
        let path = process.and_then(|process| attribution::of_process(root, process, id));
        let path = path.or_else(|| attribution::find_container(root, id));
        let cgroup = Cgroup::open(&path.ok_or("it has no cgroup (yet)")?).map_err(text)?;
        let said = status.resources.and_then(|resources| resources.linux);
        let said = said.unwrap_or_default();
        let known = self.known.get(id).ok_or("it is gone")?;
        let (name, uid) = (name(&known.subject), known.uid.clone());
        let recorded = self.records().read(id);
        let original = recorded.unwrap_or_else(|| Original {
            id: id.to_owned(),
            name,
            limit: None,
            quota: None,
            path: cgroup.path().to_owned(),
        });
        let pod = self.pod_of(&cgroup, &uid);
        let target = Target::new(cgroup.clone(), original, said, pod);
        let targets = self.context.updater.targets();
        targets.with(|targets| drop(targets.insert(cgroup.id(), target)));
        if let Some(known) = self.known.get_mut(id) {
            known.cgroup = Some(cgroup.clone());
        }
        Ok(cgroup)
    }

    /// Leaves a container alone that is at rest.
    fn leave(&mut self, id: &str, cgroup: &Cgroup) {
        if let Some(known) = self.known.get_mut(id) {
            known.is_left = false;
            known.cgroup = None;
        }
        self.let_go(cgroup);
        self.records().remove(id);
    }

    /// Changes what is known of a container, and writes it down.
    fn record<T>(
        &self,
        cgroup: &Cgroup,
        change: impl FnOnce(&mut Original) -> T,
    ) -> Result<T, String> {
        let changed = self.context.updater.change(cgroup.id(), change);
        changed.map_err(|refused| refused.why)
    }

    /// Follows rules for memory, or brings it to rest without any.
    async fn follow_memory(
        &mut self,
        id: &str,
        cgroup: &Cgroup,
        rules: Option<MemoryRules>,
    ) -> Result<(), String> {
        let is_guarded = self
            .known
            .get(id)
            .is_some_and(|known| known.memory.is_some());
        // The limit before what is known of it: what we ask for is written down before it is asked for.
        let limit = cgroup.limit("memory.max").map_err(text)?;
        let targets = self.context.updater.targets();
        let known = targets.of(cgroup.id(), |target| {
            let original = target.original.limit.clone();
            (original, target.is_moving(), target.is_telling())
        });
        let (moved, is_moving, is_telling) = known.ok_or("it is not known any more")?;
        if rules.is_none() && moved.is_none() {
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
        let is_at_rest = limit == moved.at_rest && !is_telling;
        if rules.is_none() && is_at_rest {
            return self.leave_memory(id, cgroup);
        }
        if is_at_rest && !moved.asked.is_empty() {
            self.record(cgroup, |original| {
                original.limit.iter_mut().for_each(MovedLimit::rest);
            })?;
        }
        if rules.is_none() && limit < moved.at_rest && !is_moving {
            // It had less at rest by a policy's rules, which are gone.
            self.context.updater.send(cgroup.id(), moved.at_rest);
        }
        let (wanted, refusal) = match self.policy(moved.at_rest, rules) {
            Ok(wanted) => (wanted, None),
            // Somebody else has set more than the policy allows, or the policy has changed.
            Err(why) if is_at_rest => {
                self.leave_memory(id, cgroup)?;
                return Err(why);
            }
            Err(why) => (self.policy(moved.at_rest, None)?, Some(why)),
        };
        if !is_guarded {
            self.adopt_memory(cgroup, wanted, limit)?;
        }
        if let Some(known) = self.known.get_mut(id) {
            let before = known.memory.replace(wanted);
            if is_guarded && before != Some(wanted) {
                self.send(Input::Policy(cgroup.id(), wanted));
            }
        }
        refusal.map_or(Ok(()), Err)
    }

    fn adopt_memory(&self, cgroup: &Cgroup, policy: Policy, limit: Bytes) -> Result<(), String> {
        let targets = self.context.updater.targets();
        let target = targets.of(cgroup.id(), |target| target.clone());
        let target = target.ok_or("it is not known any more")?;
        let moved = target.original.limit.as_ref();
        let is_ours = |said: Bytes| moved.is_some_and(|moved| moved.is_ours(said));
        if memory_limit(&target.said).is_some_and(|said| !is_ours(said.page_floor())) {
            let (container, said) = (&target.original.name, &target.said);
            tracing::warn!(container, ?said, %limit, "its runtime has another limit than its cgroup");
        }
        if let Some(pod) = &target.pod {
            pod.adopt().map_err(text)?;
        }
        let container = target.original.name;
        tracing::info!(container, limit = %policy.original, max = %policy.ceiling, "guarded");
        self.send(Input::Adopt(cgroup.clone(), policy, container));
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
        let said = status.resources.and_then(|resources| resources.linux);
        let moved = MovedLimit::new(limit);
        let targets = self.context.updater.targets();
        targets.of(cgroup.id(), |target| target.said = said.unwrap_or_default());
        let container = self.record(cgroup, |original| {
            original.limit = Some(moved.clone());
            original.name.clone()
        })?;
        tracing::info!(container, %limit, "the limit was changed by somebody else, which is the new original");
        Ok(moved)
    }

    /// The rules for a container whose limit at rest is `original`; without any it is brought there.
    fn policy(&self, original: Bytes, memory: Option<MemoryRules>) -> Result<Policy, String> {
        let Context {
            actuation,
            cpus,
            signals,
            ..
        } = &self.context;
        let memory = memory.unwrap_or(MemoryRules {
            max: original,
            floor: None,
            shrink_after: AT_ONCE,
        });
        let policy = Policy {
            original: memory.floor.map_or(original, |floor| floor.min(original)),
            ceiling: memory.max,
            actuation: *actuation,
            signals: *signals,
            patience: Patience::UNPROBED,
            cpus: *cpus,
            shrink_after: memory.shrink_after,
            usable_per_mille: WHOLE,
        };
        policy.validate().map_err(text)
    }

    /// Follows rules for the CPU quota, or brings it to rest without any.
    fn follow_quota(
        &mut self,
        id: &str,
        cgroup: &Cgroup,
        rules: Option<CpuRules>,
    ) -> Result<(), String> {
        let targets = self.context.updater.targets();
        let known = targets.of(cgroup.id(), |target| {
            (target.original.quota.clone(), target.is_telling())
        });
        let (moved, is_telling) = known.ok_or("it is not known any more")?;
        if rules.is_none() && moved.is_none() {
            return Ok(());
        }
        let Some(quota) = cgroup.quota().map_err(text)? else {
            if !is_telling {
                self.leave_quota(id, cgroup)?;
            }
            return Err("it has no CPU limit: there is nothing to raise".to_owned());
        };
        let moved = match moved {
            Some(moved) if moved.is_ours(quota) => moved,
            before => self.new_quota(cgroup, quota, before.is_some())?,
        };
        let at_rest = moved.cpu.at_rest;
        let is_settled = moved.is_settled(quota) && !is_telling;
        if rules.is_none() && is_settled {
            return self.leave_quota(id, cgroup);
        }
        if is_settled && !moved.cpu.asked.is_empty() {
            self.record(cgroup, |original| {
                original.quota.iter_mut().for_each(|quota| quota.cpu.rest());
            })?;
        }
        let refusal = rules.filter(|rules| rules.max < at_rest).map(|rules| {
            let max = rules.max;
            format!(
                "the maximum of {max} is below the CPU limit of {at_rest}: raise the maximum or lower the limit"
            )
        });
        if let (Some(why), true) = (&refusal, is_settled) {
            self.leave_quota(id, cgroup)?;
            return Err(why.clone());
        }
        let wanted = CpuPolicy {
            at_rest,
            max: rules.map_or(at_rest, |rules| rules.max.max(at_rest)),
            throttled_per_mille: rules.map_or(0, |rules| rules.throttled_per_mille),
        };
        let before = self
            .known
            .get_mut(id)
            .and_then(|known| known.quota.replace(wanted));
        match before {
            Some(before) if before == wanted && quota.cpu == at_rest => {}
            // What arrives late is looked at too.
            Some(_) => self.context.quotas.policy(cgroup.id(), wanted),
            None => self.watch_quota(cgroup, wanted),
        }
        refusal.map_or(Ok(()), Err)
    }

    fn watch_quota(&self, cgroup: &Cgroup, policy: CpuPolicy) {
        let targets = self.context.updater.targets();
        let known = targets.of(cgroup.id(), |target| {
            let pod = target.pod.as_ref().map(|pod| pod.cgroup().id());
            (target.original.name.clone(), pod)
        });
        let Some((container, pod)) = known else {
            return;
        };
        tracing::info!(container, cpu = %policy.at_rest, max = %policy.max, "guarded");
        self.context.quotas.watch(Watched {
            cgroup: cgroup.clone(),
            policy,
            pod,
        });
    }

    fn new_quota(
        &self,
        cgroup: &Cgroup,
        quota: Quota,
        is_foreign: bool,
    ) -> Result<MovedQuota, String> {
        let moved = MovedQuota::new(quota);
        let container = self.record(cgroup, |original| {
            original.quota = Some(moved.clone());
            original.name.clone()
        })?;
        if is_foreign {
            tracing::info!(container, cpu = %quota.cpu, "the CPU limit was changed by somebody else, which is the new original");
        }
        Ok(moved)
    }

    /// Leaves the CPU quota of a container alone.
    fn leave_quota(&mut self, id: &str, cgroup: &Cgroup) -> Result<(), String> {
        let known = self.known.get_mut(id);
        if known.and_then(|known| known.quota.take()).is_some() {
            self.context.quotas.forget(cgroup.id());
        }
        self.record(cgroup, |original| original.quota = None)
    }

    /// A container's pod, one for all of its containers: each moves its limit.
    fn pod_of(&mut self, cgroup: &Cgroup, uid: &str) -> Option<Arc<Pod>> {
        let path = cgroup.path().parent().filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            attribution::is_pod(&name, uid)
        })?;
        let known = self.pods.iter().find(|pod| pod.cgroup().path() == path);
        if let Some(known) = known {
            return Some(Arc::clone(known));
        }
        let cgroup = Cgroup::open(path).ok()?;
        let pod = Arc::new(Pod::new(cgroup, self.context.pods.clone()));
        self.pods.push(Arc::clone(&pod));
        Some(pod)
    }
}
