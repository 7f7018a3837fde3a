//! The CPU limits of a pod's containers: taken over when somebody else sets them, moved by a policy's rules, brought to rest
//! without any.
//!
//! What it was is written onto the pod beside that ([`super::recordings`]): a start does not wait for the API, and the API is
//! told of no limit before.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use bellows_core::{
    Cpu,
    allowance::What,
    boost::{BoostRules, Boosts, Trigger},
    cpu::CpuPolicy,
    moved::MovedLimit,
    pod::{self, CpuWish, CpuWishes, LEAST_CPU, Level},
};

use super::{
    Key, Watch,
    one::{self, OLD},
};
use crate::{
    actuate::{
        containers::{Containers, Owner as _, QuotaTimes},
        pod::{Pod as PodCgroup, PodRecords},
        pod_cpu::CpuTarget,
    },
    attribution::{self, api::Pod, places::id_in},
    cgroup::{Cgroup, quota::Quota},
    originals::{MovedQuota, Original, Records, key_of},
    quota::{Rules, Watched},
    run::is_young,
};

/// The kubelet's own (`cpuCFSQuotaPeriod`), microseconds.
const PERIOD: u64 = 100_000;

const MEMORY_BOOST: &str = "memory of a boost is not lent to pods: only its cpu is; leave memory out of the policy's boosts, and let memory.max cover it";

/// A container whose CPU limit is followed.
pub(super) struct KnownCpu {
    cgroup: Cgroup,
    rules: Option<Rules>,
}

impl Watch {
    /// What the containers of a pod may have of CPU: by policies, and as far as no autoscaler sets it.
    pub(super) fn cpu_wishes(&self, pod: &Pod, seen: &pod::Pod) -> CpuWishes {
        let mut wishes = pod::cpu_wishes(seen, self.policies.all());
        pod::yield_cpu(&mut wishes, |container| self.claims(pod, container));
        wishes
    }

    /// Follows what policies say of the CPU of a pod's containers.
    pub(super) fn follow_cpu(&mut self, pod: &Pod, seen: &pod::Pod) {
        let uid = seen.uid.clone();
        let wishes = self.cpu_wishes(pod, seen);
        let known = self.cpus.range((uid.clone(), String::new())..);
        let known = known.take_while(|((own, _), _)| *own == uid);
        let others: Vec<Key> = known
            .filter(|((_, name), _)| !matches!(wishes.get(name), Some(Ok(_))))
            .map(|(key, _)| key.clone())
            .collect();
        for key in others {
            if !self.bring_cpu_to_rest(&key, seen.ending) {
                self.pending.insert(uid.clone());
            } else {
                self.forget_cpu(&key);
            }
        }
        for name in pod::memory_boosts(seen, self.policies.all()) {
            // Who is lent CPU, too, is told of it with whatever else that lacks.
            let has_boosts = |wish: &CpuWish| !wish.boosts.is_empty();
            let wish = wishes.get(name).and_then(|wish| wish.as_ref().ok());
            if !wish.is_some_and(has_boosts) {
                let key = (uid.clone(), name.to_owned());
                self.refuse_cpu(&key, pod, "BoostPartlySupported", MEMORY_BOOST.to_owned());
            }
        }
        for (name, wish) in wishes {
            let key = (uid.clone(), name);
            match wish {
                Ok(wish) => {
                    if let Some(refusal) = &wish.refusal {
                        self.refuse_cpu(&key, pod, refusal.reason(), refusal.to_string());
                    }
                    if let Err(error) = self.follow_one(&key, pod, seen, &wish) {
                        tracing::warn!(pod.namespace = seen.namespace, pod.name = seen.name, container = key.1, %error, "a container's CPU limit is not followed");
                        self.pending.insert(uid.clone());
                    }
                }
                Err(refusal) => {
                    self.refuse_cpu(&key, pod, refusal.reason(), refusal.to_string());
                }
            }
        }
    }

    /// Tells why a container does not get what is asked for it, once.
    pub(super) fn refuse_cpu(&mut self, key: &Key, pod: &Pod, reason: &'static str, why: String) {
        let told = self.cpu_refused.entry((key.clone(), reason)).or_default();
        if *told != why {
            self.events.refused(pod, reason, why.clone());
            *told = why;
        }
    }

    pub(super) fn follow_one(
        &mut self,
        key: &Key,
        pod: &Pod,
        seen: &pod::Pod,
        wish: &CpuWish,
    ) -> Result<(), String> {
        let asked = wish;
        let without_rules;
        let wish = if self.recordings.is_refused(key) && !wish.recorded {
            // Nobody may come to find it raised who does not find what it was.
            without_rules = wish.without_rules();
            &without_rules
        } else {
            wish
        };
        if let Some(why) = lost(seen, wish) {
            self.refuse_cpu(key, pod, "BoostPartlySupported", why.to_owned());
        }
        let found = one::find(&seen.uid, Level::Container(wish.index), wish.id.as_deref());
        let starting = self.starting.get(key).cloned();
        let path = match (found, starting) {
            // What starts is newer than what the API says.
            (_, Some(path)) if path.exists() => path,
            (Some(path), _) => path,
            (None, _) => {
                self.has_no_cgroup(key, seen, wish);
                return Ok(());
            }
        };
        let id = path.to_str().and_then(id_in);
        let is_starting = id.is_none() || wish.id.as_deref() != id;
        if !is_starting {
            self.starting.remove(key);
        }
        let cgroup = Cgroup::open(&path).map_err(|error| error.to_string())?;
        let known = self.cpus.get(key).map(|known| known.cgroup.id());
        if known != Some(cgroup.id()) {
            self.replace_cpu(key);
            self.adopt_cpu(key, seen, wish, &cgroup)?;
            let note = format!(
                "container {}: CPU limit {}, {}",
                key.1,
                wish.original,
                told(wish)
            );
            self.events.guarded(pod, note);
        }
        self.update_cpu(seen, wish, &cgroup)?;
        self.give_rules(key, seen, wish, &cgroup, is_starting);
        if !asked.recorded && asked.has_rules() {
            self.record_cpu(key, pod, seen, asked);
        }
        Ok(())
    }

    /// A container that has ended while its limit stood raised leaves that to nobody: who decided of it has forgotten it.
    fn has_no_cgroup(&mut self, key: &Key, seen: &pod::Pod, wish: &CpuWish) {
        // It may be about to begin, or to be told that it has ended.
        let known = self.cpus.get(key);
        let is_any = known.is_some_and(|known| known.cgroup.path().exists());
        if wish.id.is_some() || is_any {
            return;
        }
        self.forget_cpu(key);
        if wish.is_left() {
            self.give_back_cpu(key, seen, wish);
        }
    }

    fn containers(&self) -> &Containers<CpuTarget> {
        self.context.cpus.containers()
    }

    fn adopt_cpu(
        &mut self,
        key: &Key,
        seen: &pod::Pod,
        wish: &CpuWish,
        cgroup: &Cgroup,
    ) -> Result<(), String> {
        let id = key_of(cgroup.path()).to_owned();
        let recorded = self.containers().records().read(&id);
        let mut original = recorded.unwrap_or_else(|| Original {
            id,
            name: format!("{}/{}/{}", seen.namespace, seen.name, key.1),
            limit: None,
            quota: None,
            boosts: Boosts::none(),
            has_begun: false,
            path: cgroup.path().to_owned(),
        });
        let quota = cgroup.quota().map_err(|error| error.to_string())?;
        let is_same = |known: &MovedQuota| {
            is_near(
                known.cpu.at_rest,
                wish.original.max(LEAST_CPU),
                known.period,
            )
        };
        let known = original.quota.take();
        original.quota = known.clone().filter(is_same).or_else(|| {
            let quota = quota.unwrap_or(Quota {
                cpu: wish.limit,
                period: PERIOD,
            });
            Some(quota_of(wish, quota, known.as_ref()))
        });
        let order = self.order(&seen.uid);
        let target = CpuTarget {
            namespace: seen.namespace.clone(),
            name: seen.name.clone(),
            uid: seen.uid.clone(),
            cgroup: cgroup.clone(),
            container: key.1.clone(),
            index: wish.index,
            is_reported: None,
            limit: wish.limit_text.clone(),
            original_text: wish.original_text.clone(),
            is_recorded: wish.recorded,
            is_put_off: seen.is_resize_pending,
            original,
            pod: self.pod_cgroup(cgroup),
            order,
            times: QuotaTimes::default(),
            is_telling: false,
            refused: None,
            of_pod: of_pod(seen),
        };
        let targets = self.containers().targets();
        targets.with(|targets| drop(targets.insert(cgroup.id(), target)));
        // Written down before anything is moved.
        self.containers().change(cgroup.id(), |_| {})?;
        let known = KnownCpu {
            cgroup: cgroup.clone(),
            rules: None,
        };
        self.cpus.insert(key.clone(), known);
        Ok(())
    }

    /// Takes over what the API says.
    fn update_cpu(&self, seen: &pod::Pod, wish: &CpuWish, cgroup: &Cgroup) -> Result<(), String> {
        let id = cgroup.id();
        let targets = self.containers().targets();
        let is_old = targets.of(id, |target| {
            let is_old = target.times.told.is_some_and(|told| told.elapsed() < OLD);
            target.is_recorded = wish.recorded;
            target.is_put_off = seen.is_resize_pending;
            let container = seen.containers.get(wish.index);
            let running = container.filter(|container| container.id.is_some());
            target.is_reported = running.map(|container| container.reports_resources);
            target.of_pod = of_pod(seen);
            if !is_old || wish.foreign {
                target.limit.clone_from(&wish.limit_text);
                target.original_text.clone_from(&wish.original_text);
            }
            is_old
        });
        let quota = cgroup.quota().map_err(|error| error.to_string())?;
        let at_rest = self.containers().change(id, |original| {
            let known = original.quota.as_mut()?;
            if !is_near(known.cpu.at_rest, wish.original.max(LEAST_CPU), known.period) {
                let quota = quota.unwrap_or(Quota {
                    cpu: wish.limit,
                    period: known.period,
                });
                tracing::info!(pod.name = seen.name, cpu = %wish.original, "the CPU limit was changed by somebody else, which is the new original");
                *known = taken_over(wish, quota, known);
            } else if is_old == Some(false) && known.telling.is_none() {
                known.told = told_as(wish, known.cpu.at_rest, known.period);
            }
            Some(known.cpu.at_rest)
        })?;
        // The kubelet may have set what nobody needs any more.
        if quota.is_some_and(|quota| Some(quota.cpu) != at_rest) {
            self.context.quotas.look(id);
        }
        // Whatever a predecessor has not told.
        self.context.cpus.tell(id);
        Ok(())
    }

    fn give_rules(
        &mut self,
        key: &Key,
        seen: &pod::Pod,
        wish: &CpuWish,
        cgroup: &Cgroup,
        is_starting: bool,
    ) {
        let targets = self.containers().targets();
        let known = targets.of(cgroup.id(), |target| {
            let quota = target.original.quota.as_ref()?;
            Some(quota.cpu.at_rest)
        });
        let at_rest = known.flatten().unwrap_or(wish.original);
        let ready = seen.containers.get(wish.index);
        let ready = ready.and_then(|container| container.is_ready);
        let wanted = Rules {
            is_ready: Some(ready.unwrap_or(false) && !is_starting),
            cpu: Some(CpuPolicy {
                at_rest,
                max: wish.rules.map_or(at_rest, |rules| rules.max.max(at_rest)),
                throttled_per_mille: wish.rules.map_or(0, |rules| rules.throttled_per_mille),
            }),
            boosts: Arc::from(wish.boosts.as_slice()),
            is_starting,
        };
        let Some(known) = self.cpus.get_mut(key) else {
            return;
        };
        match known.rules.replace(wanted.clone()) {
            Some(before) if before == wanted => {}
            Some(_) => self.context.quotas.rules(cgroup.id(), wanted),
            None => self.watch_cpu(key, seen, wish, cgroup, wanted),
        }
    }

    fn watch_cpu(&self, key: &Key, seen: &pod::Pod, wish: &CpuWish, cgroup: &Cgroup, rules: Rules) {
        let targets = self.containers().targets();
        let known = targets.of(cgroup.id(), |target| {
            let pod = target.pod.as_ref().map(|pod| pod.cgroup().id());
            (
                pod,
                target.original.boosts.clone(),
                target.original.has_begun,
            )
        });
        let Some((pod, boosts, has_begun)) = known else {
            return;
        };
        let started = seen.containers.get(wish.index);
        let started = started.and_then(|container| container.started_at);
        let started = started.map(|at| SystemTime::UNIX_EPOCH + Duration::from_secs(at));
        let is_missed = !has_begun && is_young(started, &rules.boosts);
        let is_expected = rules.is_starting || is_missed;
        tracing::info!(container = key.1, cpu = %wish.original, is_expected, rules = told(wish), "guarded");
        self.context.quotas.watch(Watched {
            cgroup: cgroup.clone(),
            rules,
            boosts,
            is_expected,
            pod,
        });
    }

    /// Brings a container to rest that no policy means any more; returns whether it is. Of a pod that is ending, which may
    /// take its hour, the API need not know it: nobody resizes that.
    fn bring_cpu_to_rest(&mut self, key: &Key, is_ending: bool) -> bool {
        let Some(known) = self.cpus.get(key) else {
            return true;
        };
        let cgroup = known.cgroup.clone();
        let targets = self.containers().targets();
        let original = targets.of(cgroup.id(), |target| target.original.quota.clone());
        let (Some(Some(original)), Ok(Some(quota))) = (original, cgroup.quota()) else {
            return true;
        };
        let at_rest = original.cpu.at_rest;
        let is_at_rest = original.is_settled(quota) || (is_ending && quota.cpu == at_rest);
        if is_at_rest || !original.is_ours(quota) {
            return true;
        }
        let rules = Rules {
            cpu: Some(CpuPolicy {
                at_rest,
                max: at_rest,
                throttled_per_mille: 0,
            }),
            boosts: Arc::from([]),
            is_starting: false,
            is_ready: Some(false),
        };
        if let Some(known) = self.cpus.get_mut(key) {
            known.rules = Some(rules.clone());
            // The same once more, too: somebody may have set another quota since.
            self.context.quotas.rules(cgroup.id(), rules);
        }
        false
    }

    pub(super) fn forget_cpu(&mut self, key: &Key) {
        if let Some(cgroup) = self.leave_cpu(key) {
            let records = self.containers().records();
            records.remove(key_of(cgroup.path()));
        }
    }

    /// The container has another cgroup now. If the one before lives, and what we have raised there stands, it was
    /// somebody else's: what is written down of it stays, and brings it down (`quotas_in_pods_back`).
    fn replace_cpu(&mut self, key: &Key) {
        let Some(cgroup) = self.leave_cpu(key) else {
            return;
        };
        let records = self.containers().records();
        let id = key_of(cgroup.path());
        let known = records.read(id).and_then(|original| original.quota);
        let in_force = cgroup.quota().ok().flatten();
        if !is_left_raised(known.as_ref(), in_force) {
            records.remove(id);
        }
    }

    /// Nobody is responsible for a container any more; returns its cgroup.
    fn leave_cpu(&mut self, key: &Key) -> Option<Cgroup> {
        let cgroup = self.cpus.remove(key)?.cgroup;
        self.is_any_left.store(true, Ordering::Relaxed);
        let id = cgroup.id();
        self.context.quotas.forget(id);
        let targets = self.containers().targets();
        let at_rest = targets.of(id, |target| {
            let quota = target.original.quota.as_ref()?;
            Some(quota.cpu.at_rest)
        });
        self.containers().forget(id);
        // What it had asked for comes no more.
        if let Some(at_rest) = at_rest.flatten() {
            let allowances = self.context.resizer.allowances();
            allowances.lowered((&key.0, &key.1), What::CpuLimit, at_rest.0);
        }
        Some(cgroup)
    }

    /// A container's pod, one for all of its containers: each moves its quota.
    fn pod_cgroup(&mut self, cgroup: &Cgroup) -> Option<Arc<PodCgroup>> {
        let path = cgroup.path().parent()?;
        let same = |target: &CpuTarget| {
            let pod = target.pod.as_ref()?;
            (pod.cgroup().path() == path).then(|| Arc::clone(pod))
        };
        let known = self
            .containers()
            .targets()
            .with(|targets| targets.values().find_map(same));
        known.or_else(|| {
            let cgroup = Cgroup::open(path).ok()?;
            let records = PodRecords {
                limits: Records::pods(),
                quotas: Records::pod_quotas(),
            };
            Some(Arc::new(PodCgroup::new(cgroup, records)))
        })
    }
}

/// A pod with resources of its own is resized as such or not at all, its containers, too (`ValidatePodResize`,
/// pkg/apis/core/validation/validation.go).
fn of_pod(seen: &pod::Pod) -> Option<bool> {
    seen.has_resources.then_some(seen.reports_resources)
}

/// Whether a quota that was moved is so still, and by us.
fn is_left_raised(known: Option<&MovedQuota>, in_force: Option<Quota>) -> bool {
    let (Some(known), Some(in_force)) = (known, in_force) else {
        return false;
    };
    in_force.cpu != known.cpu.at_rest && known.is_ours(in_force)
}

/// What of a boost cannot be had for a pod, for people.
fn lost(seen: &pod::Pod, wish: &CpuWish) -> Option<&'static str> {
    let any = |is_so: &dyn Fn(&BoostRules) -> bool| wish.boosts.iter().any(is_so);
    let has_probe = seen
        .containers
        .get(wish.index)
        .is_some_and(|container| container.is_ready.is_some());
    if any(&|boost| boost.memory.is_some()) {
        Some(MEMORY_BOOST)
    } else if any(&|boost| boost.until.ready.is_some()) && !has_probe {
        Some(
            "a boost is to end when the container is ready, but that has no readiness probe: it ends otherwise",
        )
    } else if any(&|boost| boost.until.exit || asks_for_arguments(boost))
        && !attribution::sees_processes()
    {
        Some(
            "the agent does not see the node's processes: a boost that asks for a program's arguments does not begin, and one that waits for its end lasts until it is idle or too long; set hostPID for it",
        )
    } else {
        None
    }
}

fn asks_for_arguments(boost: &BoostRules) -> bool {
    matches!(&boost.on, Trigger::Exec(program) if !program.arguments.is_empty())
}

/// A quota that is `quota` now, and was what the pod says. It is ours if the pod says that it is so now, too, or if it was
/// `known` before: else whoever has set it sees to it.
fn quota_of(wish: &CpuWish, quota: Quota, known: Option<&MovedQuota>) -> MovedQuota {
    let at_rest = at_rest(wish, quota);
    let mut cpu = MovedLimit::new(at_rest);
    let is = |own: Cpu| own.is_set_as(quota.cpu, quota.period);
    let is_ours = is(wish.limit.max(LEAST_CPU)) || known.is_some_and(|known| known.is_ours(quota));
    if is_ours && !is(at_rest) {
        cpu.ask(quota.cpu, at_rest);
    }
    MovedQuota {
        cpu,
        period: quota.period,
        told: told_as(wish, at_rest, quota.period),
        telling: None,
    }
}

/// The same of what somebody else has changed. What stands raised stays so while it is needed, but they are not told of it
/// for that: their own is about to come into force.
fn taken_over(wish: &CpuWish, quota: Quota, known: &MovedQuota) -> MovedQuota {
    let mut moved = quota_of(wish, quota, Some(known));
    let at_rest = moved.cpu.at_rest;
    if moved.told == at_rest && quota.cpu != at_rest {
        moved.cpu.ask(at_rest, quota.cpu);
    }
    moved
}

/// The limit that was, as it is read back: of periods that a thousandth of a CPU does not divide others round differently.
fn at_rest(wish: &CpuWish, quota: Quota) -> Cpu {
    let original = wish.original.max(LEAST_CPU);
    if is_near(quota.cpu, original, quota.period) {
        quota.cpu
    } else {
        quota.with(original).cpu
    }
}

/// What the API says, as the quota that it stands for.
fn told_as(wish: &CpuWish, at_rest: Cpu, period: u64) -> Cpu {
    let limit = wish.limit.max(LEAST_CPU);
    if is_near(limit, at_rest, period) {
        at_rest
    } else {
        limit
    }
}

/// Whether two are the same but for rounding.
fn is_near(a: Cpu, b: Cpu, period: u64) -> bool {
    a.quota(period).abs_diff(b.quota(period)) <= 1
}

/// What a container may have, for people.
fn told(wish: &CpuWish) -> String {
    let most = wish.rules.map(|rules| format!("at most {}", rules.max));
    let lent = wish.boosts.iter().filter_map(|boost| boost.cpu).max();
    let lent = lent.map(|cpu| format!("lent {cpu} for a time"));
    let parts: Vec<String> = most.into_iter().chain(lent).collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests;
