//! One container of a pod: guarded, followed when somebody changes it, or only watched.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use bellows_core::{
    Bytes, CgroupId, Nanos, Policy, Signals, WHOLE,
    elastic::{Mode, Order as RaiseOrder},
    pod::{
        self, Level, Wish,
        way::{Way, Whose},
    },
    quantity, workload,
};
use kube::Resource as _;

use super::{Context, Key, Known, Watch, Watched};
use crate::{
    actuate::{
        by_hand::PINNED,
        resize::{Change, Probed, Target},
    },
    attribution::{self, CGROUP_ROOT, api::Pod},
    cgroup::Cgroup,
    guard::{Input, Named, Watching},
    machine,
};

/// What the API says within this time of our own change may be older than that.
pub(super) const OLD: Duration = Duration::from_secs(2);
/// A raise that the API and the kubelet have not brought after this time is written by hand.
const BY_HAND_AFTER: Nanos = Nanos::millis(2000);

impl Watch {
    pub(super) fn policy(&self, wish: &Wish) -> Result<Policy, String> {
        let Context {
            actuation,
            signals,
            shrink_after,
            resizer,
            ..
        } = &self.context;
        let policy = Policy {
            original: wish.rest,
            ceiling: wish.ceiling,
            actuation: *actuation,
            signals: *signals,
            patience: wish.patience,
            cpus: machine::online_cpus(),
            shrink_after: wish.shrink_after.unwrap_or(*shrink_after),
            usable_per_mille: WHOLE,
            priority: wish.priority,
            parallelism: wish.parallelism,
            learnt: None,
            by_hand_after: Some(match wish.order {
                // Only within what is known to be allowed.
                RaiseOrder::RaiseFirst if resizer.allowances().are_known() => Nanos(0),
                RaiseOrder::RaiseFirst | RaiseOrder::PatchFirst => BY_HAND_AFTER,
            }),
        };
        policy
            .validate(machine::pages(1))
            .map_err(|error| error.to_string())
    }

    pub(super) fn guard(
        &mut self,
        key: &Key,
        pod: &Pod,
        seen: &pod::Pod,
        wish: &Wish,
    ) -> Result<(), String> {
        let known = self.known.get(key);
        if let Some((cgroup, policy)) = known
            .filter(|known| known.containers == wish.running && known.mode == wish.mode)
            .and_then(|known| Some((known.cgroup?, known.policy?)))
        {
            return self.follow(key, pod, seen, wish, cgroup, policy);
        }
        self.forget_cgroup(key);
        let Some(way) = self.way(seen, wish) else {
            return Ok(());
        };
        let wish = &on_way(wish, way);
        let policy = match self.policy(wish) {
            Ok(policy) => policy,
            Err(why) => {
                self.refuse(key, pod, "InvalidLimit", why);
                return Ok(());
            }
        };
        let cgroup = cgroup(seen, wish)?;
        if way == Way::Node && cgroup.is_pinned() {
            let why = format!(
                "container {}: its limit could be raised on the node only, and is not: {PINNED}; use Kubernetes 1.{} or later, whose API resizes",
                wish.container,
                Whose::of(seen, wish.level).resized_since()
            );
            self.refuse(key, pod, "StaticCpuManager", why);
            return Ok(());
        }
        if !wish.recorded {
            self.record_memory(key, pod, seen, wish);
            // It is about to be guarded.
            self.pending.insert(key.0.clone());
            return Ok(());
        }
        let order = self.order(&seen.uid);
        let mut target = Target::new(seen, wish, cgroup.clone(), (policy.original, way), order);
        let is_by_hand = self.context.resizer.by_hands().contains(cgroup.path());
        if is_by_hand {
            // A predecessor's: the API is to come to know it, or it comes down.
            let in_force = cgroup.limit_in_force().map_err(|error| error.to_string())?;
            target.by_hand = Some(in_force);
        }
        let resizer = &self.context.resizer;
        if target.pod_follows {
            match resizer.by_hands().make_whole(&cgroup) {
                Ok(false) => {}
                Ok(true) => {
                    tracing::warn!(path = %cgroup.path().display(), "its pod had less than its containers, and is raised to that");
                }
                Err(why) => tracing::warn!(path = %cgroup.path().display(), why, "its pod"),
            }
        }
        let targets = resizer.targets();
        targets.with(|targets| drop(targets.insert(cgroup.id(), target)));
        if is_by_hand && way != Way::Node {
            resizer.agree(cgroup.id());
        }
        self.remember(key, wish, cgroup.id(), policy);
        let named = Named {
            name: name(seen, wish),
            workload: workload(pod, seen, wish),
        };
        self.send(Input::Adopt(cgroup, policy, named));
        let note = format!(
            "container {}: limit {}, at most {}{}{}",
            wish.container,
            policy.original,
            policy.ceiling,
            by(wish),
            match way {
                Way::Resize | Way::Patch => "",
                Way::Node =>
                    "; raised on the node: this API server, this kubelet or the admission policy in force cannot raise and lower it in place",
            }
        );
        self.events.guarded(pod, note);
        Ok(())
    }

    /// How the limit of a container is changed. Where that is not known the API is asked beside the watch, and the pod is
    /// tried again.
    fn way(&mut self, seen: &pod::Pod, wish: &Wish) -> Option<Way> {
        // Any other than it has.
        let other = quantity::format(wish.limit.plus(Bytes::mib(1)));
        let change = Change::memory(wish.level, wish.limit_text.clone(), other);
        let ways = self.context.resizer.ways();
        let way = ways.known_of(&Probed::of(seen, wish.level, change.clone()));
        if way.is_some() {
            return way;
        }
        self.pending.insert(seen.uid.clone());
        let asking = self.asking.as_ref();
        if asking.is_some_and(|asking| !asking.is_finished()) {
            return None;
        }
        let (ways, level, seen) = (ways.clone(), wish.level, seen.clone());
        let found = self.way_found.clone();
        self.asking = Some(tokio::spawn(async move {
            match ways.of(&Probed::of(&seen, level, change)).await {
                // A watch that has ended needs none.
                Ok(_known_to_all) => drop(found.send(())),
                Err(why) => {
                    tracing::warn!(
                        why,
                        "how limits are changed is not known yet: nobody more is guarded"
                    );
                }
            }
        }));
        None
    }

    /// How it is changed from now on. The API server may have become another one, and the kubelet, too. What stands raised
    /// is first lowered in the way that it was raised in, unless the API can come to say it.
    fn way_now(&mut self, seen: &pod::Pod, wish: &Wish, cgroup: CgroupId) -> Way {
        let way = self.way(seen, wish);
        let targets = self.context.resizer.targets();
        let known = targets.of(cgroup, |target| target.way).unwrap_or_default();
        let Some(way) = way else {
            return known;
        };
        let changed = targets.of(cgroup, |target| target.goes(way));
        if changed == Some(true) {
            tracing::info!(
                pod.namespace = seen.namespace,
                pod.name = seen.name,
                ?way,
                "its limit is changed in another way from now on"
            );
            if way != Way::Node {
                self.context.resizer.agree(cgroup);
            }
        }
        targets.of(cgroup, |target| target.way).unwrap_or(known)
    }

    fn remember(&mut self, key: &Key, wish: &Wish, cgroup: CgroupId, policy: Policy) {
        let known = Known {
            mode: wish.mode,
            cgroup: Some(cgroup),
            containers: wish.running.clone(),
            policy: Some(policy),
            refusal: None,
            told: BTreeMap::new(),
            bounded: None,
            theirs: None,
        };
        self.known.insert(key.clone(), known);
    }

    /// Watches a container, and changes nothing.
    pub(super) fn observe(
        &mut self,
        key: &Key,
        pod: &Pod,
        seen: &pod::Pod,
        wish: &Wish,
    ) -> Result<(), String> {
        let policy = self.policy(&Wish {
            rest: wish.limit,
            ..wish.clone()
        });
        // Nothing is raised: whether it would be raised first changes nothing.
        let policy = policy.map(|policy| Policy {
            by_hand_after: None,
            ..policy
        });
        let is_same = |known: &Known| {
            known.containers == wish.running
                && known.mode == wish.mode
                && known.policy == policy.as_ref().ok().copied()
        };
        let known = self.known.get(key);
        if known.is_some_and(|known| known.cgroup.is_some() && is_same(known)) {
            return Ok(());
        }
        // It may have been guarded until now.
        self.forget_cgroup(key);
        let policy = match policy {
            Ok(policy) => policy,
            Err(why) => {
                self.refuse(key, pod, "InvalidLimit", why);
                return Ok(());
            }
        };
        if self.context.signals == Signals::Files {
            let why = "without kernel programs nobody is only watched: `bellows doctor` on the node tells what is missing";
            self.refuse(key, pod, "NoKernelPrograms", why.to_owned());
            return Ok(());
        }
        let cgroup = cgroup(seen, wish)?;
        self.forget_watched(key);
        let watched = Watched {
            key: key.clone(),
            pod: pod.object_ref(&()),
            mode: wish.mode,
            told: None,
        };
        self.watched.insert(cgroup.id(), watched);
        self.remember(key, wish, cgroup.id(), policy);
        self.send(Input::Observe(Watching {
            cgroup,
            policy,
            name: name(seen, wish),
            recommends: wish.mode == Mode::Recommend,
        }));
        let note = format!(
            "container {}: only watched; limit {}, in mode Act at most {}{}",
            wish.container,
            policy.original,
            policy.ceiling,
            by(wish)
        );
        self.events.watched(pod, note);
        Ok(())
    }

    /// Forgets the cgroups that a container had before its last one: their ids grow.
    fn forget_watched(&mut self, key: &Key) {
        let own = self
            .watched
            .iter()
            .filter(|(_, watched)| watched.key == *key);
        let old: Vec<CgroupId> = own.map(|(&cgroup, _)| cgroup).rev().skip(1).collect();
        for cgroup in old {
            self.watched.remove(&cgroup);
        }
    }

    /// A guarded container has changed: by us, or by somebody else, who then wins. What they have set is followed at once, and
    /// not changed before it is on the pod.
    fn follow(
        &mut self,
        key: &Key,
        pod: &Pod,
        seen: &pod::Pod,
        wish: &Wish,
        cgroup: CgroupId,
        policy: Policy,
    ) -> Result<(), String> {
        let way = self.way_now(seen, wish, cgroup);
        let wish = &on_way(wish, way);
        let wanted = self.policy(wish)?;
        let known = self.known.get_mut(key);
        if known.is_some_and(|known| known.is_new_of_theirs(wish)) {
            self.context.resizer.is_theirs(cgroup);
            let note = format!(
                "the limit was changed to {} by somebody else, which is the new original",
                wish.limit
            );
            self.events.guarded(pod, note);
        }
        let targets = self.context.resizer.targets();
        let is_recorded = targets.of(cgroup, |target| {
            target.follow(seen, wish, wanted.original);
            target.is_recorded
        });
        if wish.recorded && is_recorded == Some(false) {
            // What the pod says may be older than what the API took last, and no event of it may come to say more.
            self.pending.insert(key.0.clone());
        }
        if !wish.recorded {
            self.record_memory(key, pod, seen, wish);
        }
        if wanted != policy {
            if let Some(known) = self.known.get_mut(key) {
                known.policy = Some(wanted);
            }
            self.send(Input::Policy(cgroup, wanted));
        }
        if wish.limit < wish.rest && wish.recorded {
            // Other rules had a floor.
            self.send(Input::ToRest(cgroup));
            return Err("its limit is below the one at rest, and is raised to it".to_owned());
        }
        Ok(())
    }
}

impl Known {
    /// Whether somebody else has set a limit that was not seen yet. Once what that is is recorded, nothing tells whose it was.
    fn is_new_of_theirs(&mut self, wish: &Wish) -> bool {
        let theirs = wish.foreign.then(|| wish.limit_text.clone());
        let is_new = theirs.is_some() && theirs != self.theirs;
        self.theirs = theirs;
        is_new
    }
}

/// Where limits are moved on the node alone nobody lets the API say less than it does: a floor is not reached.
fn on_way(wish: &Wish, way: Way) -> Wish {
    let mut wish = wish.clone();
    if way == Way::Node {
        wish.rest = wish.limit;
        wish.rest_text.clone_from(&wish.limit_text);
    }
    wish
}

/// What a container is, for people.
fn name(seen: &pod::Pod, wish: &Wish) -> String {
    format!("{}/{}/{}", seen.namespace, seen.name, wish.container)
}

/// What it is one of.
fn workload(pod: &Pod, seen: &pod::Pod, wish: &Wish) -> String {
    let owner = attribution::pods::owner(pod);
    let workload = workload::workload(&seen.name, &seen.labels, owner.as_ref());
    format!("{}/{workload}/{}", seen.namespace, wish.container)
}

/// Whose wish it is.
fn by(wish: &Wish) -> String {
    let policy = wish.policy.as_ref();
    policy.map_or_else(String::new, |policy| format!(" (policy {policy})"))
}

/// Where the cgroup of a limit is; `None` for a container that does not run.
pub(super) fn find(uid: &str, level: Level, id: Option<&str>) -> Option<PathBuf> {
    let root = Path::new(CGROUP_ROOT);
    match level {
        Level::Pod => attribution::find_pod(root, uid),
        Level::Container(_) => attribution::find(root, uid, id?),
    }
}

/// Whether a cgroup of a pod is that of a container without a limit of its own.
fn inherits(seen: &pod::Pod, cgroup: &Path) -> bool {
    let name = cgroup.file_name().unwrap_or_default().to_string_lossy();
    let mut ids = seen.heirs.iter();
    ids.any(|id| attribution::is_container(&name, id))
}

/// The cgroup whose limit is meant.
fn cgroup(seen: &pod::Pod, wish: &Wish) -> Result<Cgroup, String> {
    let path = find(&seen.uid, wish.level, wish.id.as_deref());
    let path = path.ok_or_else(|| format!("`{}` has no cgroup yet", wish.container))?;
    let cgroup = Cgroup::open(&path).map_err(|error| error.to_string())?;
    match wish.level {
        Level::Pod => Ok(cgroup.with_heirs(|path| inherits(seen, path))),
        Level::Container(_) => Ok(cgroup.with_inner()),
    }
}
