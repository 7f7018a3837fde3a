//! The CPU limits of pods: the quota is written at once, the API told of it later.
//!
//! A start that is to be boosted counts its CPUs within milliseconds, and a resize takes tenths of a second: so the quota is
//! written by hand, the pod's before its container's. The API hears of what has become of it after a second, and a few times
//! a minute at most for each container: what is over by then costs nobody a write. Until it has heard, a resize of anything in
//! the pod brings the quota back that it knows, which throttles and kills nobody, and is put right with the next throttled
//! period.
//!
//! Each patch carries what was raised by hand of memory in the same pod: the kubelet sets all of a container's limits with
//! any resize, and would kill.
//!
//! It must not tell the API of a limit before what it was is recorded on the pod.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use bellows_core::{
    CgroupId, Cpu, Reason,
    allowance::What,
    bucket::Urgency,
    pod::{
        Level,
        way::{Way, Whose},
    },
    quantity,
    units::Amount as _,
};
use kube::{Api, Client, core::Status};
use tokio::{
    runtime::Handle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    containers::{Containers, Moved, Owner, QuotaTimes},
    pod::Pod,
    resize::{Change, Order, Probed, RESIZE_TIMEOUT, Resizer, code_of},
};
use crate::{
    attribution::{
        api,
        pods::{cpu_limit_at, cpu_limit_is_ours},
    },
    cgroup::{Cgroup, quota::Quota},
    originals::{Original, Records},
    quota::{Most, NotSet, Quotas},
};

/// How soon it is looked again whether a container runs.
const STARTS: Duration = Duration::from_millis(500);

/// A container whose CPU limit is moved.
#[derive(Clone, Debug)]
pub struct CpuTarget {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Its uid: another may have its name.
    pub uid: String,
    /// The container's cgroup.
    pub cgroup: Cgroup,
    /// The container.
    pub container: String,
    /// Its index in the spec.
    pub index: usize,
    /// Whether the kubelet says what resources it has; `None` until the API says that it runs.
    pub is_reported: Option<bool>,
    /// The limit in the spec, as last seen or written.
    pub limit: String,
    /// What to write back.
    pub original_text: String,
    /// Whether that is recorded on the pod.
    pub is_recorded: bool,
    /// Whether the kubelet has put a resize of the pod off.
    pub is_put_off: bool,
    /// What it had, and what we have asked for.
    pub original: Original,
    /// Its pod's cgroup.
    pub pod: Option<Arc<Pod>>,
    /// One request of a pod at a time.
    pub order: Order,
    /// When its quota was moved and told.
    pub times: QuotaTimes,
    /// Whether a task tells the API.
    pub is_telling: bool,
    /// A raise that the API has refused: it is not asked again while the spec says the same.
    pub refused: Option<Refused>,
    /// Whether the kubelet says what resources the pod has, if that has some of its own.
    pub of_pod: Option<bool>,
}

/// A raise that the API has refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The limit in the spec then.
    in_spec: String,
    /// What the namespace allowed then.
    most: Option<u64>,
}

impl Refused {
    /// Whether the namespace allows more now than when it was refused. What else may have refused it tells nobody when it
    /// does not any more.
    fn is_over(&self, most: Option<u64>) -> bool {
        match (self.most, most) {
            (Some(then), Some(now)) => now > then,
            (then, now) => then.is_some() && now.is_none(),
        }
    }
}

impl CpuTarget {
    /// The limit in the spec, and whether more was refused.
    fn in_spec(&mut self) -> (Option<Cpu>, bool) {
        let limit = quantity::parse_cpu(&self.limit).ok();
        let mut refused = self.refused.iter();
        (limit, refused.any(|refused| refused.in_spec == self.limit))
    }
}

impl Moved for CpuTarget {
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
        self.pod.as_ref()
    }

    fn is_summed_up(&self) -> bool {
        self.of_pod.is_none()
    }

    fn times(&mut self) -> &mut QuotaTimes {
        &mut self.times
    }
}

/// Tells the API of CPU limits; clones share what they know.
#[derive(Clone)]
pub struct CpuResizer {
    client: Client,
    tasks: Handle,
    containers: Containers<CpuTarget>,
    memory: Resizer,
    /// Who decides, once it runs.
    quotas: Arc<OnceLock<Quotas>>,
}

impl std::fmt::Debug for CpuResizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("CpuResizer").finish_non_exhaustive()
    }
}

impl Owner for CpuResizer {
    type Target = CpuTarget;

    fn containers(&self) -> &Containers<CpuTarget> {
        &self.containers
    }

    fn most(&self, cgroup: CgroupId) -> Option<Most> {
        let (uid, container) = self.key(cgroup)?;
        let allowances = self.memory.allowances();
        let bound = allowances.cpu((&uid, &container));
        let bound = bound.map(|bound| Cpu(bound.most));
        let in_spec = self.containers.targets().of(cgroup, CpuTarget::in_spec);
        let (in_spec, is_refused) = in_spec?;
        // What is in the spec the API has allowed.
        let allowed = in_spec.filter(|_| is_refused || !allowances.are_known());
        let cpu = bound.into_iter().chain(allowed).min()?;
        Some(Most { cpu, is_refused })
    }

    fn set_quota(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), NotSet> {
        let targets = self.containers.targets();
        let is_put_off = targets.of(cgroup.id(), |target| target.is_put_off);
        if reason == Reason::BelowRest && is_put_off == Some(true) {
            return Err(NotSet::PutOff);
        }
        let key = self.key(cgroup.id());
        let key = key
            .as_ref()
            .map(|(uid, container)| (uid.as_str(), container.as_str()));
        let allowances = self.memory.allowances();
        if let Some(key) = key {
            allowances.lowered(key, What::CpuLimit, to.0);
            allowances.ask_cpu(key, to);
        }
        if let Err(why) = self.containers.set_quota(cgroup, to, reason) {
            if let Some(key) = key {
                allowances.refused(key, What::CpuLimit, to.0, false);
            }
            return Err(why);
        }
        self.tell(cgroup.id());
        Ok(())
    }

    fn rests(&self, cgroup: &Cgroup, at_rest: Cpu) {
        if !self.containers.rests(cgroup.id(), at_rest) {
            return;
        }
        if let Some((uid, container)) = self.key(cgroup.id()) {
            let allowances = self.memory.allowances();
            allowances.lowered((&uid, &container), What::CpuLimit, at_rest.0);
        }
        self.tell(cgroup.id());
    }
}

impl CpuResizer {
    /// One for a node's pods, beside what resizes their memory.
    #[must_use]
    pub fn new(client: Client, tasks: Handle, memory: Resizer) -> Self {
        Self {
            client,
            tasks,
            containers: Containers::new(Records::in_pods()),
            memory,
            quotas: Arc::default(),
        }
    }

    /// What namespaces allow has changed: what was refused may be allowed now.
    pub fn bounds_changed(&self) {
        let targets = self.containers.targets();
        let refused: Vec<CgroupId> = targets.with(|targets| {
            let refused = targets.iter();
            let refused = refused.filter(|(_, target)| target.refused.is_some());
            refused.map(|(&id, _)| id).collect()
        });
        for cgroup in refused {
            let most = self.allowed(cgroup);
            let is_over = targets.of(cgroup, |target| {
                let over = target.refused.take_if(|refused| refused.is_over(most));
                over.is_some()
            });
            if is_over == Some(true) {
                self.look(cgroup);
            }
        }
    }

    /// What its namespace allows it.
    fn allowed(&self, cgroup: CgroupId) -> Option<u64> {
        let (uid, container) = self.key(cgroup)?;
        let bound = self.memory.allowances().cpu((&uid, &container));
        bound.map(|bound| bound.most)
    }

    fn look(&self, cgroup: CgroupId) {
        if let Some(quotas) = self.quotas.get() {
            quotas.look(cgroup);
        }
    }

    /// Who decides is told when there is something to look at.
    pub fn tells(&self, quotas: Quotas) {
        if self.quotas.set(quotas).is_err() {
            tracing::error!("somebody else decides of CPU quotas already");
        }
    }

    /// Waits until the API may be asked to note what a limit was.
    pub async fn may_record(&self) {
        self.memory.may_ask(Urgency::Later).await;
    }

    /// The pod's uid and the container's name.
    fn key(&self, cgroup: CgroupId) -> Option<(String, String)> {
        let targets = self.containers.targets();
        targets.of(cgroup, |target| {
            (target.uid.clone(), target.container.clone())
        })
    }

    /// Sees to it that the API is told of a quota that it does not know.
    pub fn tell(&self, cgroup: CgroupId) {
        let targets = self.containers.targets();
        let is_new = targets.of(cgroup, |target| {
            !std::mem::replace(&mut target.is_telling, true)
        });
        if is_new == Some(true) {
            drop(self.tasks.spawn(self.clone().until_told(cgroup)));
        }
    }

    async fn until_told(self, cgroup: CgroupId) {
        loop {
            let due = self.containers.targets().of(cgroup, |target| {
                let due = target.times.due(target.original.quota.as_ref());
                target.is_telling = due.is_some();
                due.map(|due| (due, target.times.moved))
            });
            let Some(Some((due, moved))) = due else {
                return;
            };
            sleep_until(due).await;
            // That may be over, and this another one that is not due yet.
            let is_other = |target: &mut CpuTarget| target.times.moved != moved;
            if self.containers.targets().of(cgroup, is_other) == Some(true) {
                continue;
            }
            // Until it runs it is not known whether its kubelet resizes; and what it was must be recorded first.
            let is_starting =
                |target: &mut CpuTarget| target.is_reported.is_none() || !target.is_recorded;
            if self.containers.targets().of(cgroup, is_starting) == Some(true) {
                sleep(STARTS).await;
                continue;
            }
            self.memory.may_ask(Urgency::Later).await;
            self.tell_once(cgroup).await;
        }
    }

    async fn tell_once(&self, cgroup: CgroupId) {
        let targets = self.containers.targets();
        let Some(order) = targets.of(cgroup, |target| Arc::clone(&target.order)) else {
            return;
        };
        let turn = order.lock().await;
        // It may have been brought to rest meanwhile, or taken over from somebody else.
        let Some(target) = targets.of(cgroup, |target| target.clone()) else {
            return;
        };
        let due = target.times.due(target.original.quota.as_ref());
        if due.is_none() {
            return;
        }
        let Some(is_reported) = target.is_reported else {
            return;
        };
        // Whatever comes of it, the API is not asked again at once.
        targets.of(cgroup, |target| target.times.told = Some(Instant::now()));
        if !target.is_recorded {
            return;
        }
        let Some(quota) = self.containers.quota_to_write(cgroup) else {
            return;
        };
        let told = match self.way(&target, is_reported).await {
            // Nobody asks, and nobody is told.
            Ok(Way::Node) => Ok(()),
            Ok(way) => self.patch(&target, way, quota).await,
            Err(why) => Err(Untold {
                why,
                is_certain: true,
                is_refused: false,
            }),
        };
        drop(turn);
        match told {
            Ok(()) => {
                self.containers.quota_is_told(cgroup, quota, true);
                let known = target.original.quota.as_ref();
                // The kubelet sets it, even if it has come to rest meanwhile.
                if known.is_none_or(|known| known.cpu.at_rest != quota.cpu) {
                    self.look(cgroup);
                }
            }
            Err(Untold {
                why,
                is_certain,
                is_refused,
            }) => {
                tracing::warn!(pod.namespace = target.namespace, pod.name = target.name, cpu = %quota.cpu, why, "the API does not know a CPU limit yet");
                if is_certain {
                    self.containers.quota_is_told(cgroup, quota, false);
                }
                if is_refused {
                    let most = self.allowed(cgroup);
                    targets.of(cgroup, |target| {
                        let in_spec = target.limit.clone();
                        target.refused = Some(Refused { in_spec, most });
                    });
                    self.look(cgroup);
                }
            }
        }
    }

    async fn way(&self, target: &CpuTarget, is_reported: bool) -> Result<Way, String> {
        let level = Level::Container(target.index);
        let (same, other) = (target.limit.clone(), other_than(&target.limit)?);
        let probed = Probed {
            namespace: &target.namespace,
            name: &target.name,
            uid: &target.uid,
            whose: if target.of_pod.is_some() {
                Whose::Pod
            } else {
                Whose::Container
            },
            is_reported: is_reported && target.of_pod.unwrap_or(true),
            change: Change::cpu(level, same, other),
        };
        self.memory.ways().of(&probed).await
    }

    async fn patch(&self, target: &CpuTarget, way: Way, quota: Quota) -> Result<(), Untold> {
        let id = target.cgroup.id();
        let at_rest = target.original.quota.as_ref();
        let is_at_rest = at_rest.is_some_and(|known| known.cpu.at_rest == quota.cpu);
        let to = if is_at_rest {
            target.original_text.clone()
        } else {
            quota.cpu.to_string()
        };
        let level = Level::Container(target.index);
        let own = Change::cpu(level, target.limit.clone(), to);
        let named = (target.namespace.as_str(), target.name.as_str());
        let carries = self.memory.carries(&target.uid);
        let patched = self.memory.patch_beside(&target.uid, way, named, own);
        let (patched, is_uncertain) = patched.await;
        // One that was taken is not refused any more.
        let key = (target.uid.as_str(), target.container.as_str());
        let allowances = self.memory.allowances();
        allowances.refused(key, What::CpuLimit, quota.cpu.0, is_uncertain);
        match patched {
            Ok(Ok(patched)) => {
                self.is_in_spec(id, target.index, &patched);
                Ok(())
            }
            Ok(Err(kube::Error::Api(status))) => {
                let is_refused = is_refusal(&status);
                if status.code == 422 && !is_refused {
                    self.catch_up(id, target).await;
                }
                let in_spec = quantity::parse_cpu(&target.limit);
                Err(Untold {
                    why: status.to_string(),
                    is_certain: !is_uncertain,
                    // What comes down needs no leave, and is tried again; so is what memory beside it may have been refused for.
                    is_refused: is_refused
                        && !carries
                        && in_spec.is_ok_and(|in_spec| quota.cpu > in_spec),
                })
            }
            Ok(Err(error)) => Err(Untold {
                why: error.to_string(),
                is_certain: !is_uncertain,
                is_refused: false,
            }),
            Err(_elapsed) => Err(Untold {
                why: "no answer in time".to_owned(),
                is_certain: false,
                is_refused: false,
            }),
        }
    }

    fn is_in_spec(&self, cgroup: CgroupId, index: usize, pod: &api::Pod) {
        if let Some(limit) = cpu_limit_at(pod, index) {
            let targets = self.containers.targets();
            targets.of(cgroup, |target| target.limit = limit);
        }
    }

    /// Reads the limit in the spec: if it is a value of ours, only our knowledge was old.
    async fn catch_up(&self, cgroup: CgroupId, target: &CpuTarget) {
        let pods: Api<api::Pod> = Api::namespaced(self.client.clone(), &target.namespace);
        match timeout(RESIZE_TIMEOUT, pods.get(&target.name)).await {
            Ok(Ok(pod)) if cpu_limit_is_ours(&pod, target.index) => {
                self.is_in_spec(cgroup, target.index, &pod);
            }
            // Somebody else's is taken over by whoever watches the pod.
            _ => {}
        }
    }
}

/// Why the API does not know a limit.
struct Untold {
    why: String,
    /// Whether it is certain that nothing was changed.
    is_certain: bool,
    /// Whether it will not have the limit raised.
    is_refused: bool,
}

/// Whether the API will not have a change as such, rather than that the spec is not what the patch says it was: that is
/// answered without a word on the pod (`NewGenericServerResponse`, k8s.io/apimachinery/pkg/api/errors/errors.go).
fn is_refusal(status: &Status) -> bool {
    const TEST_FAILED: &str = "the server rejected our request due to an error in our request";
    match code_of(status) {
        403 => true,
        422 => !status.message.contains(TEST_FAILED),
        _ => false,
    }
}

/// Any other limit than a container has: no lower one, which might be below its request.
fn other_than(limit: &str) -> Result<String, String> {
    let limit = quantity::parse_cpu(limit)?;
    Ok(limit.plus(Cpu::millis(1)).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_over_when_more_is_allowed() {
        let refused = |most| Refused {
            in_spec: "250m".to_owned(),
            most,
        };
        assert!(refused(Some(100)).is_over(Some(101)) && refused(Some(100)).is_over(None));
        assert!(!refused(Some(100)).is_over(Some(100)) && !refused(Some(100)).is_over(Some(7)));
        // By something else than LimitRanges and quotas.
        assert!(!refused(None).is_over(None) && !refused(None).is_over(Some(100)));
    }

    #[test]
    fn a_refusal_is_told_from_a_patch_of_what_was() {
        let of = |code, message: &str| {
            is_refusal(&Status {
                code,
                message: message.to_owned(),
                ..Status::default()
            })
        };
        assert!(of(403, "pods \"web\" is forbidden: exceeded quota: all"));
        assert!(of(
            422,
            "Pod \"web\" is invalid: spec.containers[0].resources"
        ));
        assert!(!of(
            422,
            "the server rejected our request due to an error in our request"
        ));
        assert!(!of(409, "conflict") && !of(500, "internal"));
    }

    /// "must be less than or equal to cpu limit" would say nothing of whether limits can be changed.
    #[test]
    fn the_limit_that_is_asked_about_is_above_any_request() {
        for (limit, other) in [("10m", "11m"), ("250m", "251m"), ("2", "2001m")] {
            assert_eq!(other_than(limit).as_deref(), Ok(other));
        }
        other_than("two").unwrap_err();
    }
}
