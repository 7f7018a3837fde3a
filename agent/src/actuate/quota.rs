//! Moving a container's CPU quota: written at once, its owner (the runtime, or the API) told of it later.
//!
//! The order is that of memory: the pod up before its container, and down after it. A quota kills nobody, so it is
//! written first, and its owner, who needs tenths of a second for it, is told of what has become of it a few
//! times a minute at most. Until then that may set the quota again that it remembers, with whatever it is asked for;
//! that is known as ours, and the next throttled period raises it again.
//!
//! A quota that somebody else has set is not moved: the watch of containers takes it over first.

use std::ptr;

use bellows_core::{Amount as _, CgroupId, Cpu, Reason};
use tokio::time::Instant;

use super::{
    containers::{Containers, Moved, QuotaTimes},
    pod::{May, Pod},
};
use crate::cgroup::{Cgroup, quota::Quota};

impl<T: Moved> Containers<T> {
    /// Sets the quota of a container at once. Whoever owns it is to be told.
    ///
    /// # Errors
    ///
    /// Why not, for people. The quota is as it was.
    pub fn set_quota(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), String> {
        let in_force = cgroup.quota().map_err(text)?;
        let in_force = in_force.ok_or("it has no CPU limit (any more)")?;
        let wanted = in_force.with(to);
        let known = self.targets().of(cgroup.id(), |target| {
            let quota = target.original().quota.as_ref();
            let is_ours = quota.is_some_and(|quota| quota.is_ours(in_force));
            is_ours.then(|| (target.original().name.clone(), target.pod().cloned()))
        });
        let known = known.ok_or("the container is gone")?;
        let (container, pod) = known.ok_or("somebody else has set it")?;
        self.change(cgroup.id(), |original| {
            if let Some(quota) = &mut original.quota {
                quota.cpu.ask(wanted.cpu, in_force.cpu);
            }
        })?;
        let pod = pod.as_deref();
        if to > in_force.cpu {
            self.settle_pod_quota(pod, May::Rise)?;
        }
        cgroup.set_quota(wanted).map_err(text)?;
        tracing::info!(container, from = %in_force.cpu, %to, ?reason, "CPU quota");
        if to < in_force.cpu {
            self.settle_pod_quota(pod, May::Fall)?;
        }
        self.targets().of(cgroup.id(), |target| {
            target.times().moved.get_or_insert_with(Instant::now);
        });
        Ok(())
    }

    /// Sees to it that the pod of a container holds what that has.
    ///
    /// # Errors
    ///
    /// Why it does not, for people.
    pub fn settle_pod_of(&self, cgroup: &Cgroup) -> Result<(), String> {
        let pod = self
            .targets()
            .of(cgroup.id(), |target| target.pod().cloned());
        let pod = pod.flatten();
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
        let of_target = |target: &T| {
            let quota = target.original().quota.clone()?;
            let in_force = target.cgroup().quota().ok()??;
            Some(quota.cpu.raised_by(in_force.cpu))
        };
        let raised = || {
            self.targets().with(|targets| {
                let is_in = |target: &&T| target.pod().is_some_and(|own| ptr::eq(&**own, pod));
                let own = targets.values().filter(is_in);
                own.map(|target| of_target(target).unwrap_or(Cpu::ZERO))
                    .collect()
            })
        };
        pod.settle_quota(raised, may).map_err(text)
    }

    /// The quota of which its owner is told with whatever it is asked for; that it may set it is written down.
    pub(super) fn quota_to_tell(&self, id: CgroupId) -> Option<Quota> {
        let noted = self.change(id, |original| {
            let quota = original.quota.as_mut()?;
            let latest = quota.latest();
            quota.telling = Some(latest.cpu);
            Some(latest)
        });
        noted.ok().flatten()
    }

    /// Its owner was told of a quota, and has taken it or refused.
    pub(super) fn quota_is_told(&self, id: CgroupId, told: Quota, is_taken: bool) {
        let noted = self.change(id, |original| {
            if let Some(quota) = &mut original.quota {
                quota.telling = None;
                if is_taken {
                    quota.told = told.cpu;
                }
            }
        });
        self.targets().of(id, |target| {
            *target.times() = QuotaTimes {
                moved: None,
                told: Some(Instant::now()),
            };
        });
        if let Err(why) = noted {
            tracing::debug!(why, "a CPU quota that was told is not noted");
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn text(error: impl ToString) -> String {
    error.to_string()
}
