//! Moving a container's CPU quota: written at once, the runtime told of it later.
//!
//! The order is that of memory: the pod up before its container, and down after it. A quota kills nobody, so it is
//! written first, and the runtime, which needs tenths of a second for it, is told of what has become of it a few
//! times a minute at most. Until then it may set the quota again that it remembers, with whatever it is asked for;
//! that is known as ours, and the next throttled period raises it again.
//!
//! A quota that somebody else has set is not moved: the watch of containers takes it over first.

use bellows_core::{Amount as _, CgroupId, Cpu, Reason};
use tokio::time::Instant;

use super::{
    pod::{May, Pod},
    update::{Target, Updater},
};
use crate::{
    cgroup::{Cgroup, quota::Quota},
    cri::RuntimeError,
};

impl Updater {
    /// Sets the quota of a container at once, and has its runtime told.
    ///
    /// # Errors
    ///
    /// Why not, for people. The quota is as it was.
    pub fn set_quota(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), String> {
        let in_force = cgroup.quota().map_err(text)?;
        let in_force = in_force.ok_or("it has no CPU limit (any more)")?;
        let wanted = in_force.with(to);
        let known = self.target(cgroup.id(), |target| {
            let quota = target.original.quota.as_ref();
            let is_ours = quota.is_some_and(|quota| quota.is_ours(in_force));
            is_ours.then(|| (target.original.name.clone(), target.pod.clone()))
        });
        let known = known.map_err(|refused| refused.why)?;
        let (container, pod) = known.ok_or("somebody else has set it")?;
        let asked = self.change(cgroup.id(), |original| {
            if let Some(quota) = &mut original.quota {
                quota.cpu.ask(wanted.cpu, in_force.cpu);
            }
        });
        asked.map_err(|refused| refused.why)?;
        let pod = pod.as_deref();
        if to > in_force.cpu {
            self.settle_pod_quota(pod, May::Rise)?;
        }
        cgroup.set_quota(wanted).map_err(text)?;
        tracing::info!(container, from = %in_force.cpu, %to, ?reason, "CPU quota");
        if to < in_force.cpu {
            self.settle_pod_quota(pod, May::Fall)?;
        }
        let woken = self.wake(cgroup.id(), |target| {
            target.quota_moved.get_or_insert_with(Instant::now);
        });
        woken.map_err(|refused| refused.why)
    }

    /// Sees to it that the pod of a container holds what that has.
    ///
    /// # Errors
    ///
    /// Why it does not, for people.
    pub fn settle_pod_of(&self, cgroup: &Cgroup) -> Result<(), String> {
        let pod = self.target(cgroup.id(), |target| target.pod.clone());
        let pod = pod.map_err(|refused| refused.why)?;
        self.settle_pod_quota(pod.as_deref(), May::Rise)
    }

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
        let raised = || {
            self.targets().with(|targets| {
                let own = targets.values().filter(|target| target.is_in(pod));
                own.map(|target| of_target(target).unwrap_or(Cpu::ZERO))
                    .collect()
            })
        };
        pod.settle_quota(raised, may).map_err(text)
    }

    /// The quota of which the runtime is told with whatever it is asked for; that it may set it is written down.
    pub(super) fn quota_to_tell(&self, id: CgroupId) -> Option<Quota> {
        let noted = self.change(id, |original| {
            let quota = original.quota.as_mut()?;
            let latest = quota.latest();
            quota.telling = Some(latest.cpu);
            Some(latest)
        });
        noted.ok().flatten()
    }

    /// The runtime was told of a quota.
    pub(super) fn quota_is_told(
        &self,
        id: CgroupId,
        told: Quota,
        answer: &Result<(), RuntimeError>,
    ) {
        if answer.as_ref().is_err_and(RuntimeError::is_uncertain) {
            return;
        }
        let noted = self.change(id, |original| {
            if let Some(quota) = &mut original.quota {
                quota.telling = None;
                if answer.is_ok() {
                    quota.told = told.cpu;
                }
            }
        });
        let noted = noted.and_then(|()| {
            self.target(id, |target| {
                target.quota_told = Some(Instant::now());
                target.quota_moved = None;
            })
        });
        if let Err(refused) = noted {
            tracing::debug!(why = refused.why, "a CPU quota that was told is not noted");
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn text(error: impl ToString) -> String {
    error.to_string()
}
