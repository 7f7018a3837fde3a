//! Moving a container's CPU quota: written at once, the runtime told of it later.
//!
//! The order is that of memory: the pod up before its container, and down after it. A quota kills nobody, so it is
//! written first, and the runtime, which needs tenths of a second for it, is told of what has become of it a few
//! times a minute at most. Until then it may set the quota again that it remembers, with whatever it is asked for;
//! that is known as ours, and the next throttled period raises it again.
//!
//! A quota that somebody else has set is not moved: the watch of containers takes it over first.

use bellows_core::{Amount as _, Cpu, Reason};

use super::{
    pod::{May, Pod},
    update::{Target, Updater},
};
use crate::{
    cgroup::{Cgroup, quota::Quota},
    quota::Setter,
};

impl Setter for Updater {
    fn set(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), String> {
        let in_force = cgroup
            .quota()
            .map_err(text)?
            .ok_or("it has no CPU limit (any more)")?;
        let wanted = in_force.with(to);
        let asked = self.target(cgroup.id(), |target| {
            let quota = target.original.quota.as_mut()?;
            if !quota.is_ours(in_force) {
                return None;
            }
            quota.cpu.ask(wanted.cpu);
            Some((target.original.clone(), target.pod.clone()))
        });
        let asked = asked.map_err(|refused| refused.why)?;
        let (original, pod) = asked.ok_or("somebody else has set it")?;
        self.records().write(&original).map_err(text)?;
        let pod = pod.as_deref();
        if to > in_force.cpu {
            self.settle_pod_quota(pod, May::Rise)?;
        }
        cgroup.set_quota(wanted).map_err(text)?;
        tracing::info!(container = original.name, from = %in_force.cpu, %to, ?reason, "CPU quota");
        if to < in_force.cpu {
            self.settle_pod_quota(pod, May::Fall)?;
        }
        self.wake(cgroup.id(), |_| {})
            .map_err(|refused| refused.why)
    }
}

impl Updater {
    /// Brings the CPU quota of a pod to where its containers need it.
    ///
    /// # Errors
    ///
    /// Why it could not be, for people.
    pub fn settle_pod_quota(&self, pod: Option<&Pod>, may: May) -> Result<(), String> {
        let Some(pod) = pod else {
            return Ok(());
        };
        let of_target = |target: &Target| {
            let quota = target.original.quota.clone()?;
            let in_force = target.cgroup.quota().ok()??;
            Some(quota.cpu.raised_by(in_force.cpu))
        };
        let raised: Vec<Cpu> = self.targets().with(|targets| {
            let own = targets.values().filter(|target| target.is_in(pod));
            own.map(|target| of_target(target).unwrap_or(Cpu::ZERO))
                .collect()
        });
        pod.settle_quota(&raised, may).map_err(text)
    }

    /// The runtime knows a quota.
    pub(super) fn quota_is_told(&self, target: &Target, told: Quota) {
        let original = self.target(target.cgroup.id(), |target| {
            target.quota_told = Some(tokio::time::Instant::now());
            target.original.quota.as_mut()?.told = told.cpu;
            Some(target.original.clone())
        });
        if let Ok(Some(original)) = original
            && let Err(error) = self.records().write(&original)
        {
            tracing::warn!(container = original.name, %error, "a CPU quota is not written down");
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn text(error: impl ToString) -> String {
    error.to_string()
}
