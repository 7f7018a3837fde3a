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
    pod::{May, Pod, Shares},
};
use crate::{
    cgroup::{Cgroup, quota::Quota},
    originals::MovedQuota,
    quota::NotSet,
};

impl<T: Moved> Containers<T> {
    /// Sets the quota of a container at once. Whoever owns it is to be told.
    ///
    /// # Errors
    ///
    /// [`NotSet`].
    pub fn set_quota(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), NotSet> {
        let in_force = cgroup.quota().map_err(text)?;
        let in_force = in_force.ok_or_else(|| text("it has no CPU limit (any more)"))?;
        let wanted = in_force.with(to);
        let known = self.targets().of(cgroup.id(), |target| {
            let quota = target.original().quota.as_ref();
            let is_ours = quota.is_some_and(|quota| quota.is_ours(in_force));
            is_ours.then(|| (target.original().name.clone(), target.pod().cloned()))
        });
        let known = known.ok_or_else(|| text("the container is gone"))?;
        let (container, pod) = known.ok_or(NotSet::Foreign)?;
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
        // The container is lowered, whatever becomes of its pod, and whoever owns it is to know.
        if to < in_force.cpu
            && let Err(why) = self.settle_pod_quota(pod, May::Fall)
        {
            tracing::warn!(container, why, "the CPU limit of a pod stays for now");
        }
        self.has_moved(cgroup.id());
        Ok(())
    }

    /// From when on its owner does not know what it is meant to be: not from a raise on that was over before that was told.
    fn has_moved(&self, id: CgroupId) {
        self.targets().of(id, |target| {
            let quota = target.original().quota.as_ref();
            let is_told = quota.is_none_or(MovedQuota::is_told);
            let moved = &mut target.times().moved;
            *moved = (!is_told).then(|| moved.unwrap_or_else(Instant::now));
        });
    }

    /// A container was seen at rest, and nothing is lent to it. What was asked for before is over, and would be told for
    /// ever: whoever has set the quota anew has undone it. Returns whether there was any.
    pub fn rests(&self, cgroup: CgroupId, at_rest: Cpu) -> bool {
        let is_over = |quota: &MovedQuota| {
            quota.cpu.at_rest == at_rest && quota.latest().cpu != quota.cpu.at_rest
        };
        let is_any = self.targets().of(cgroup, |target| {
            target.original().quota.as_ref().is_some_and(is_over)
        });
        if is_any != Some(true) {
            return false;
        }
        let noted = self.change(cgroup, |original| {
            if let Some(quota) = original.quota.as_mut().filter(|quota| is_over(quota)) {
                quota.cpu.ask(at_rest, at_rest);
            }
        });
        if let Err(why) = &noted {
            tracing::debug!(why, "it is not noted that a CPU quota is at rest");
        }
        self.has_moved(cgroup);
        noted.is_ok()
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
        let shares = || {
            self.targets().with(|targets| {
                let is_in = |target: &&T| target.pod().is_some_and(|own| ptr::eq(&**own, pod));
                shares(targets.values().filter(is_in))
            })
        };
        pod.settle_quota(shares, may).map_err(text)
    }

    /// The quota of which its owner is told with whatever it is asked for; that it may set it is written down.
    pub(super) fn quota_to_tell(&self, id: CgroupId) -> Option<Quota> {
        self.to_tell(id, |_, latest| latest)
    }

    /// The same of an owner that is told by a text.
    pub(super) fn quota_to_write(&self, id: CgroupId) -> Option<Quota> {
        self.to_tell(id, MovedQuota::as_text)
    }

    fn to_tell(&self, id: CgroupId, told: impl Fn(&MovedQuota, Cpu) -> Cpu) -> Option<Quota> {
        let noted = self.change(id, |original| {
            let quota = original.quota.as_mut()?;
            let latest = quota.latest();
            let cpu = told(quota, latest.cpu);
            quota.telling = Some(cpu);
            Some(Quota { cpu, ..latest })
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
        let pod = self.targets().of(id, |target| {
            *target.times() = QuotaTimes {
                moved: None,
                told: Some(Instant::now()),
            };
            target.pod().cloned()
        });
        // What it has had is nobody's any more once all of it is known to be at rest.
        let settled = self.settle_pod_quota(pod.flatten().as_deref(), May::Fall);
        if let Err(why) = noted.and(settled) {
            tracing::debug!(why, "a CPU quota that was told is not noted");
        }
    }
}

/// What containers of one pod have. One that is gone has nothing.
fn shares<'a, T: Moved + 'a>(targets: impl Iterator<Item = &'a T>) -> Shares {
    let mut shares = Shares {
        raised: Vec::new(),
        at_rest: Cpu::ZERO,
        are_settled: true,
    };
    for target in targets {
        let (Some(quota), Ok(Some(in_force))) =
            (target.original().quota.as_ref(), target.cgroup().quota())
        else {
            continue;
        };
        let at_rest = quota.cpu.at_rest;
        shares.raised.push(quota.cpu.raised_by(in_force.cpu));
        shares.are_settled &= quota.is_told() && quota.latest().cpu == at_rest;
        if target.is_summed_up() {
            shares.at_rest = shares.at_rest.plus(at_rest);
        }
    }
    shares
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn text(error: impl ToString) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process, sync::Arc};

    use bellows_core::boost::Boosts;

    use super::*;
    use crate::{
        actuate::pod::PodRecords,
        originals::{Original, Records},
    };

    struct One {
        cgroup: Cgroup,
        original: Original,
        pod: Arc<Pod>,
        times: QuotaTimes,
    }

    impl Moved for One {
        fn cgroup(&self) -> &Cgroup {
            &self.cgroup
        }

        fn original(&self) -> &Original {
            &self.original
        }

        fn original_mut(&mut self) -> &mut Original {
            &mut self.original
        }

        fn pod(&self) -> Option<&Arc<Pod>> {
            Some(&self.pod)
        }

        fn times(&mut self) -> &mut QuotaTimes {
            &mut self.times
        }
    }

    const ID: CgroupId = CgroupId(7);
    const REST: Cpu = Cpu::millis(250);

    /// One container, in directories that look like its pod's cgroup and its own.
    struct Bed {
        containers: Containers<One>,
        cgroup: Cgroup,
        pod: Arc<Pod>,
    }

    impl Bed {
        fn new(name: &str) -> Self {
            let above = env::temp_dir().join(format!("bellows-moved-{name}-{}", process::id()));
            let path = above.join("one");
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("cpu.max"), "25000 100000\n").unwrap();
            fs::write(above.join("cpu.max"), "50000 100000\n").unwrap();
            let records = PodRecords {
                limits: Records::at(above.join("limits")),
                quotas: Records::at(above.join("quotas")),
            };
            let pod = Arc::new(Pod::new(Cgroup::open(&above).unwrap(), records));
            let cgroup = Cgroup::stand_in(&path, ID);
            let containers = Containers::new(Records::at(above.join("records")));
            let one = One {
                cgroup: cgroup.clone(),
                original: Original {
                    id: "one".to_owned(),
                    name: "one".to_owned(),
                    limit: None,
                    quota: Some(MovedQuota::new(Quota {
                        cpu: REST,
                        period: 100_000,
                    })),
                    boosts: Boosts::none(),
                    has_begun: false,
                    path,
                },
                pod: Arc::clone(&pod),
                times: QuotaTimes::default(),
            };
            containers.targets().with(|all| drop(all.insert(ID, one)));
            Self {
                containers,
                cgroup,
                pod,
            }
        }

        fn set(&self, millis: u64) {
            let set =
                self.containers
                    .set_quota(&self.cgroup, Cpu::millis(millis), Reason::Throttled);
            set.unwrap();
        }

        fn is_due(&self) -> bool {
            let due = |one: &mut One| one.times.due(one.original.quota.as_ref()).is_some();
            self.containers.targets().of(ID, due).unwrap()
        }

        fn moved(&self) -> Option<Instant> {
            let targets = self.containers.targets();
            targets.of(ID, |one| one.times.moved).unwrap()
        }

        /// Its owner is told of what it has become, and has taken it.
        fn is_told(&self) {
            let told = self.containers.quota_to_tell(ID).unwrap();
            self.containers.quota_is_told(ID, told, true);
        }

        fn pod_settled(&self) -> Cpu {
            let settled = self.containers.settle_pod_quota(Some(&self.pod), May::Fall);
            settled.unwrap();
            self.pod.cgroup().quota().unwrap().unwrap().cpu
        }
    }

    impl Drop for Bed {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(self.pod.cgroup().path()));
        }
    }

    #[test]
    fn what_a_pod_had_is_forgotten_when_the_owner_knows_that_it_is_at_rest() {
        let bed = Bed::new("forgotten");
        let kubelet = || {
            let path = bed.pod.cgroup().path().join("cpu.max");
            fs::write(path, "175000 100000\n").unwrap();
        };
        bed.set(1500);
        assert_eq!(bed.pod_settled(), Cpu::millis(1750));
        bed.is_told();
        bed.set(250);
        kubelet();
        assert_eq!(bed.pod_settled(), Cpu::millis(500));
        bed.is_told();
        kubelet();
        assert_eq!(bed.pod_settled(), Cpu::millis(1750));
    }

    #[test]
    fn a_raise_that_was_over_before_it_was_told_does_not_hurry_the_next() {
        let bed = Bed::new("over");
        bed.set(4000);
        let first = bed.moved();
        bed.set(2000);
        assert!(first.is_some() && bed.moved() == first);
        bed.set(250);
        assert_eq!((bed.moved(), bed.is_due()), (None, false));
        bed.set(4000);
        assert!(bed.moved() > first);
        fs::write(bed.cgroup.path().join("cpu.max"), "25000 100000\n").unwrap();
        assert!(bed.containers.rests(ID, REST) && bed.moved().is_none());
    }

    #[test]
    fn a_lowering_is_told_although_the_pod_was_not_lowered() {
        let bed = Bed::new("pod-stays");
        bed.set(1500);
        bed.is_told();
        assert!(!bed.is_due());
        let of_pod = bed.pod.cgroup().path().join("cpu.max");
        let before = fs::read(&of_pod).unwrap();
        fs::write(&of_pod, "?").unwrap();
        bed.set(250);
        assert!(bed.is_due() && bed.moved().is_some());
        // It comes down when that is told.
        fs::write(&of_pod, before).unwrap();
        bed.is_told();
        let quota = bed.pod.cgroup().quota().unwrap().unwrap();
        assert_eq!(quota.cpu, Cpu::millis(500));
    }

    #[test]
    fn a_raise_that_somebody_has_undone_is_not_told_any_more() {
        let bed = Bed::new("undone");
        bed.set(4000);
        assert!(bed.is_due());
        fs::write(bed.cgroup.path().join("cpu.max"), "25000 100000\n").unwrap();
        assert!(bed.containers.rests(ID, REST));
        assert!(!bed.is_due() && !bed.containers.rests(ID, REST));
        // One that its owner knows is told of all the same, or it would come back for ever.
        bed.set(4000);
        bed.is_told();
        assert!(!bed.is_due());
        assert!(bed.containers.rests(ID, REST) && bed.is_due());
    }
}
