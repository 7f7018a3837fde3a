//! The CPU quota of one container, and what it is lent: taken over when somebody else sets it, moved by its rules, left
//! alone at rest without any.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bellows_core::{
    Cpu, Nanos,
    boost::{BoostRules, Trigger},
    cpu::CpuPolicy,
    elastic::{ContainerRules, CpuRules},
};

use super::{Watch, text};
use crate::{
    cgroup::{Cgroup, quota::Quota},
    cri::LinuxContainerResources,
    originals::MovedQuota,
    quota::{Rules, Watched},
};

/// What is to be done with a quota.
struct Followed {
    policy: Option<CpuPolicy>,
    /// Whether it is as it should be already.
    is_at_rest: bool,
    refusal: Option<String>,
}

impl Followed {
    const fn nothing(refusal: Option<String>) -> Self {
        Self {
            policy: None,
            is_at_rest: true,
            refusal,
        }
    }
}

impl Watch {
    /// Follows rules for the CPU quota and for boosts, or brings it to rest without any.
    pub(super) fn follow_cpu(
        &mut self,
        id: &str,
        cgroup: &Cgroup,
        rules: Option<&ContainerRules>,
    ) -> Result<(), String> {
        let boosts = rules.map_or(&[][..], |rules| &rules.boosts);
        let Followed {
            policy,
            is_at_rest,
            refusal,
        } = self.follow_quota(id, cgroup, rules)?;
        let refused = refusal.map_or(Ok(()), Err);
        let targets = self.context.updater.targets();
        let is_lent = targets.of(cgroup.id(), |target| !target.original.boosts.is_empty());
        let Some(known) = self.known.get_mut(id) else {
            return refused;
        };
        // What was lent is ended by whoever lends, and written down.
        if policy.is_none() && boosts.is_empty() && is_lent != Some(true) {
            if known.rules.take().is_some() {
                self.context.quotas.forget(cgroup.id());
            }
            return refused;
        }
        let wanted = Rules {
            cpu: policy,
            boosts: Arc::from(boosts),
            is_starting: known.is_starting,
            is_ready: None,
        };
        match known.rules.replace(wanted.clone()) {
            Some(before) if before == wanted && is_at_rest => {}
            // What arrives late is looked at too.
            Some(_) => self.context.quotas.rules(cgroup.id(), wanted),
            None => self.watch_quota(id, cgroup, wanted),
        }
        refused
    }

    fn follow_quota(
        &mut self,
        id: &str,
        cgroup: &Cgroup,
        rules: Option<&ContainerRules>,
    ) -> Result<Followed, String> {
        let is_starting = self.known.get(id).is_some_and(|known| known.is_starting);
        let cpu = rules.and_then(|rules| rules.cpu);
        let lends = rules.is_some_and(|rules| rules.boosts.iter().any(|boost| boost.cpu.is_some()));
        let is_wanted = cpu.is_some() || lends;
        // The quota before what is known of it: what we ask for is written down before it is set.
        let quota = cgroup.quota();
        let targets = self.context.updater.targets();
        let known = targets.of(cgroup.id(), |target| {
            let said = target.said.as_ref().filter(|_| is_starting);
            let said = said.and_then(said_quota);
            (target.original.quota.clone(), said, target.is_telling())
        });
        let (moved, said, is_telling) = known.ok_or("it is not known any more")?;
        if !is_wanted && moved.is_none() {
            return Ok(Followed::nothing(None));
        }
        // One that starts has its limit only later.
        let Some(quota) = quota.map_err(text)?.or(said) else {
            if moved.is_some() && !is_telling {
                self.leave_quota(cgroup)?;
            }
            let why = "it has no CPU limit: there is nothing to raise";
            return Ok(Followed::nothing(Some(why.to_owned())));
        };
        let moved = match moved {
            Some(moved) if moved.is_ours(quota) => moved,
            before => self.new_quota(cgroup, quota, before.is_some())?,
        };
        let at_rest = moved.cpu.at_rest;
        let is_settled = moved.is_settled(quota) && !is_telling;
        if !is_wanted && is_settled {
            self.leave_quota(cgroup)?;
            return Ok(Followed::nothing(None));
        }
        if is_settled && !moved.cpu.asked.is_empty() {
            self.record(cgroup, |original| {
                // It may have been asked for more meanwhile.
                let quota = original.quota.iter_mut();
                let at_rest = quota.filter(|quota| quota.latest().cpu == quota.cpu.at_rest);
                at_rest.for_each(|quota| quota.cpu.rest());
            })?;
        }
        let refusal = too_low(cpu, at_rest);
        if refusal.is_some() && is_settled && !lends {
            self.leave_quota(cgroup)?;
            return Ok(Followed::nothing(refusal));
        }
        Ok(Followed {
            policy: Some(CpuPolicy {
                at_rest,
                max: cpu.map_or(at_rest, |rules| rules.max.max(at_rest)),
                throttled_per_mille: cpu.map_or(0, |rules| rules.throttled_per_mille),
            }),
            is_at_rest: quota.cpu == at_rest,
            refusal,
        })
    }

    fn watch_quota(&self, id: &str, cgroup: &Cgroup, rules: Rules) {
        let targets = self.context.updater.targets();
        let known = targets.of(cgroup.id(), |target| {
            let pod = target.pod.as_ref().map(|pod| pod.cgroup().id());
            let original = &target.original;
            (
                original.name.clone(),
                pod,
                original.boosts.clone(),
                original.has_begun,
            )
        });
        let (Some((container, pod, boosts, has_begun)), Some(own)) = (known, self.known.get(id))
        else {
            return;
        };
        let is_missed = !has_begun && is_young(own.started_at, &rules.boosts);
        let is_expected = own.is_starting || is_missed;
        if let Some(CpuPolicy { at_rest, max, .. }) = rules.cpu {
            tracing::info!(container, cpu = %at_rest, %max, is_expected, "guarded");
        }
        self.context.quotas.watch(Watched {
            cgroup: cgroup.clone(),
            rules,
            boosts,
            is_expected,
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

    /// Leaves the CPU quota of a container alone, unless it was asked for more meanwhile.
    fn leave_quota(&self, cgroup: &Cgroup) -> Result<(), String> {
        self.record(cgroup, |original| {
            let quota = original.quota.take();
            original.quota = quota.filter(|quota| quota.latest().cpu != quota.cpu.at_rest);
        })
    }
}

fn too_low(rules: Option<CpuRules>, at_rest: Cpu) -> Option<String> {
    let max = rules.map(|rules| rules.max).filter(|&max| max < at_rest)?;
    Some(format!(
        "the maximum of {max} is below the CPU limit of {at_rest}: raise the maximum or lower the limit"
    ))
}

/// The CPU limit that a runtime says it will set.
fn said_quota(said: &LinuxContainerResources) -> Option<Quota> {
    let period = u64::try_from(said.cpu_period).ok()?;
    let quota = u64::try_from(said.cpu_quota)
        .ok()
        .filter(|&quota| quota > 0)?;
    let cpu = Cpu::of_quota(quota, period)?;
    Some(Quota { cpu, period })
}

/// Whether it has started so lately that a boost of its start would not be over.
pub(in crate::run) fn is_young(started_at: Option<SystemTime>, boosts: &[BoostRules]) -> bool {
    let of_start = boosts.iter().filter(|boost| boost.on == Trigger::Start);
    let longest = of_start.map(|boost| boost.until.at_most).max();
    let age = started_at.and_then(|at| SystemTime::now().duration_since(at).ok());
    let is_younger =
        |Nanos(longest): Nanos| age.is_some_and(|age| age < Duration::from_nanos(longest));
    longest.is_some_and(is_younger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_runtime_says_is_a_quota_or_none() {
        let said = |cpu_quota, cpu_period| {
            said_quota(&LinuxContainerResources {
                cpu_quota,
                cpu_period,
                ..LinuxContainerResources::default()
            })
        };
        let quota = said(25_000, 100_000).unwrap();
        assert_eq!((quota.cpu, quota.period), (Cpu::millis(250), 100_000));
        for (quota, period) in [(0, 100_000), (-1, 100_000), (25_000, 0), (25_000, -1)] {
            assert_eq!(said(quota, period), None, "{quota} {period}");
        }
    }
}
