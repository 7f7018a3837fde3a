//! This node's pods: who opts in is adopted, who is gone is forgotten, who cannot be guarded is told.

use std::{
    collections::BTreeMap,
    path::Path,
    pin::pin,
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use bellows_core::{
    Actuation, CgroupId, Nanos, Policy, Signals, WHOLE,
    elastic::Mode,
    pod::{self, Level, ORIGINAL, Raised, Wish},
};
use futures::TryStreamExt as _;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Api, Client, Resource as _, ResourceExt as _,
    api::Patch,
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::json;
use tokio::{
    sync::mpsc::UnboundedReceiver,
    time::{Instant, MissedTickBehavior},
};

use super::events::Events;
use crate::{
    actuate::{
        resize::{Observed, TIMEOUT, Target, limit_patch, parameters},
        targets::Targets,
    },
    attribution::{self, CGROUP_ROOT, api::Pod, pods::convert},
    cgroup::Cgroup,
    guard::{Input, Watching},
};

/// What the watch needs.
pub(super) struct Context {
    pub(super) client: Client,
    pub(super) node: String,
    pub(super) inputs: SyncSender<Input>,
    pub(super) targets: Targets<Target>,
    pub(super) cpus: u64,
    pub(super) actuation: Actuation,
    pub(super) signals: Signals,
    pub(super) shrink_after: Nanos,
    /// What is told of those that are only watched.
    pub(super) observed: UnboundedReceiver<(CgroupId, Observed)>,
}

/// How often a pod is tried again that could not be guarded for a passing reason.
const RETRY: Duration = Duration::from_secs(2);
/// Shortest time between two Events of one container that is only watched: one whose workers are killed one after the
/// other would fill the API with them.
const EVENTS: Duration = Duration::from_secs(60);

/// A pod that is guarded or watched, or was refused.
#[derive(Default)]
struct Known {
    mode: Mode,
    cgroup: Option<CgroupId>,
    /// The runtime's ids of the containers that run in it.
    containers: Vec<String>,
    policy: Option<Policy>,
    refusal: Option<String>,
}

/// Watches for ever; broken connections are taken up again with a backoff.
pub(super) async fn pods(context: Context) {
    let api: Api<Pod> = Api::all(context.client.clone());
    let config = watcher::Config::default().fields(&format!("spec.nodeName={}", context.node));
    let mut stream = pin!(watcher(api, config).default_backoff());
    let mut watch = Watch {
        events: Events::new(context.client.clone(), &context.node),
        context,
        known: BTreeMap::new(),
        pending: BTreeMap::new(),
        watched: BTreeMap::new(),
    };
    let mut listed: Vec<String> = Vec::new();
    let mut retry = tokio::time::interval(RETRY);
    // Not polled while there is nothing to try again: a quiet node is not woken for it.
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            // In this order: who was killed must be told before its pod is gone.
            biased;
            Some((cgroup, observed)) = watch.context.observed.recv() => {
                watch.tell(cgroup, observed);
                continue;
            }
            event = stream.try_next() => event,
            _ = retry.tick(), if !watch.pending.is_empty() => {
                watch.retry().await;
                continue;
            }
        };
        match event {
            Ok(Some(watcher::Event::Init)) => listed.clear(),
            Ok(Some(watcher::Event::InitApply(pod))) => {
                listed.extend(pod.uid());
                watch.apply(pod).await;
            }
            Ok(Some(watcher::Event::InitDone)) => watch.keep_only(&listed),
            Ok(Some(watcher::Event::Apply(pod))) => watch.apply(pod).await,
            Ok(Some(watcher::Event::Delete(pod))) => watch.forget(&pod.uid().unwrap_or_default()),
            Ok(None) => return,
            Err(error) => tracing::warn!(%error, "the pod watch is interrupted"),
        }
    }
}

struct Watch {
    context: Context,
    events: Events,
    known: BTreeMap<String, Known>,
    /// Pods that could not be guarded for a passing reason, by uid.
    pending: BTreeMap<String, Pod>,
    /// Those that are or were only watched, by their cgroup.
    watched: BTreeMap<CgroupId, Watched>,
}

/// A pod that is or was only watched. What is told of it may come when its container is gone already.
struct Watched {
    uid: String,
    pod: ObjectReference,
    mode: Mode,
    /// When an Event was last published.
    told: Option<Instant>,
}

impl Watch {
    async fn retry(&mut self) {
        for pod in std::mem::take(&mut self.pending).into_values() {
            self.apply(pod).await;
        }
    }

    async fn apply(&mut self, pod: Pod) {
        let seen = convert(&pod);
        self.pending.remove(&seen.uid);
        match pod::wish(&seen) {
            Ok(None) => {
                self.give_back(&seen).await;
                self.forget(&seen.uid);
            }
            Ok(Some(wish)) => {
                let done = match wish.mode {
                    Mode::Act => self.guard(&pod, &seen, &wish).await,
                    Mode::Off | Mode::Observe | Mode::Recommend => {
                        self.give_back(&seen).await;
                        self.observe(&pod, &seen, &wish)
                    }
                };
                if let Err(error) = done {
                    tracing::warn!(pod.namespace = seen.namespace, pod.name = seen.name, %error, "a pod is not guarded");
                    self.pending.insert(seen.uid.clone(), pod);
                }
            }
            Err(refusal) => {
                self.give_back(&seen).await;
                self.forget_cgroup(&seen.uid);
                self.refuse(&pod, &seen.uid, refusal.reason(), refusal.to_string());
            }
        }
    }

    fn policy(&self, wish: &Wish) -> Result<Policy, String> {
        let Context {
            cpus,
            actuation,
            signals,
            shrink_after,
            ..
        } = &self.context;
        let policy = Policy {
            original: wish.original,
            ceiling: wish.ceiling,
            actuation: *actuation,
            signals: *signals,
            patience: wish.patience,
            cpus: *cpus,
            shrink_after: *shrink_after,
            usable_per_mille: WHOLE,
        };
        policy.validate().map_err(|error| error.to_string())
    }

    async fn guard(&mut self, pod: &Pod, seen: &pod::Pod, wish: &Wish) -> Result<(), String> {
        let known = self.known.get(&seen.uid);
        if let Some((cgroup, policy)) = known
            .filter(|known| known.containers == wish.running && known.mode == wish.mode)
            .and_then(|known| Some((known.cgroup?, known.policy?)))
        {
            return self.follow(pod, seen, wish, cgroup, policy).await;
        }
        self.forget_cgroup(&seen.uid);
        let policy = self.policy(wish)?;
        let cgroup = cgroup(seen, wish)?;
        if !wish.recorded {
            self.record_original(seen, &wish.container, &wish.original_text)
                .await?;
        }
        let target = Target {
            namespace: seen.namespace.clone(),
            name: seen.name.clone(),
            container: wish.container.clone(),
            level: wish.level,
            limit: wish.limit_text.clone(),
            original: (policy.original, wish.original_text.clone()),
            order: Arc::default(),
        };
        self.context
            .targets
            .with(|targets| drop(targets.insert(cgroup.id(), target)));
        let known = Known {
            mode: wish.mode,
            cgroup: Some(cgroup.id()),
            containers: wish.running.clone(),
            policy: Some(policy),
            refusal: None,
        };
        self.known.insert(seen.uid.clone(), known);
        let name = format!("{}/{}/{}", seen.namespace, seen.name, wish.container);
        self.send(Input::Adopt(cgroup, policy, name));
        let note = format!(
            "container {}: limit {}, at most {}",
            wish.container, policy.original, policy.ceiling
        );
        self.events.guarded(pod, note);
        Ok(())
    }

    /// Watches a pod, and changes nothing.
    fn observe(&mut self, pod: &Pod, seen: &pod::Pod, wish: &Wish) -> Result<(), String> {
        let policy = self.policy(&Wish {
            original: wish.limit,
            ..wish.clone()
        });
        let known = self.known.get(&seen.uid);
        let is_same = |known: &Known| {
            known.containers == wish.running
                && known.mode == wish.mode
                && known.policy == policy.as_ref().ok().copied()
        };
        if known.is_some_and(|known| known.cgroup.is_some() && is_same(known)) {
            return Ok(());
        }
        // It may have been guarded until now.
        self.forget_cgroup(&seen.uid);
        let policy = policy?;
        if self.context.signals == Signals::Files {
            let why = "without kernel programs nobody is only watched: `bellows doctor` on the node tells what is missing";
            self.refuse(pod, &seen.uid, "NoKernelPrograms", why.to_owned());
            return Ok(());
        }
        let cgroup = cgroup(seen, wish)?;
        let before = known_cgroups(&self.watched, &seen.uid);
        for old in before.into_iter().rev().skip(1) {
            self.watched.remove(&old);
        }
        let watched = Watched {
            uid: seen.uid.clone(),
            pod: pod.object_ref(&()),
            mode: wish.mode,
            told: None,
        };
        self.watched.insert(cgroup.id(), watched);
        let known = Known {
            mode: wish.mode,
            cgroup: Some(cgroup.id()),
            containers: wish.running.clone(),
            policy: Some(policy),
            refusal: None,
        };
        self.known.insert(seen.uid.clone(), known);
        let name = format!("{}/{}/{}", seen.namespace, seen.name, wish.container);
        self.send(Input::Observe(Watching {
            cgroup,
            policy,
            name,
            recommends: wish.mode == Mode::Recommend,
        }));
        let note = format!(
            "container {}: only watched; limit {}, in mode Act at most {}",
            wish.container, policy.original, policy.ceiling
        );
        self.events.watched(pod, note);
        Ok(())
    }

    /// Tells of a pod that is only watched.
    fn tell(&mut self, cgroup: CgroupId, observed: Observed) {
        let Some(watched) = self.watched.get_mut(&cgroup) else {
            return;
        };
        if watched.told.is_some_and(|told| told.elapsed() < EVENTS) {
            return;
        }
        let pod = watched.pod.clone();
        match observed {
            Observed::Kill(note) => {
                watched.told = Some(Instant::now());
                self.events.killed(pod, note);
            }
            // A kill that may follow is told all the same.
            Observed::Raise(note) if watched.mode == Mode::Recommend => {
                self.events.recommended(pod, note);
            }
            Observed::Raise(_) => {}
        }
    }

    /// Tells why a pod does not get what it asks for, once.
    fn refuse(&mut self, pod: &Pod, uid: &str, reason: &str, why: String) {
        let known = self.known.entry(uid.to_owned()).or_default();
        if known.refusal.as_ref() != Some(&why) {
            known.refusal = Some(why.clone());
            self.events.refused(pod, reason, why);
        }
    }

    /// A guarded pod has changed: by us, or by somebody else, who then wins.
    async fn follow(
        &mut self,
        pod: &Pod,
        seen: &pod::Pod,
        wish: &Wish,
        cgroup: CgroupId,
        policy: Policy,
    ) -> Result<(), String> {
        let wanted = self.policy(wish)?;
        if !wish.recorded {
            self.record_original(seen, &wish.container, &wish.original_text)
                .await?;
        }
        if wanted.original != policy.original {
            let note = format!(
                "the limit was changed to {} by somebody else, which is the new original",
                wish.limit
            );
            self.events.guarded(pod, note);
        }
        // Only now: a change that could not be recorded must be seen as one again.
        self.context.targets.of(cgroup, |target| {
            target.limit.clone_from(&wish.limit_text);
            target.original = (wanted.original, wish.original_text.clone());
        });
        if wanted != policy {
            if let Some(known) = self.known.get_mut(&seen.uid) {
                known.policy = Some(wanted);
            }
            self.send(Input::Policy(cgroup, wanted));
        }
        Ok(())
    }

    /// Writes the limit as it was onto the pod, before anything is changed.
    async fn record_original(
        &self,
        seen: &pod::Pod,
        container: &str,
        original: &str,
    ) -> Result<(), String> {
        let patch = json!({ "metadata": { "annotations": { ORIGINAL: format!("{container}={original}") } } });
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &seen.namespace);
        let (parameters, patch) = (parameters(), Patch::Merge(patch));
        let patched = api.patch_metadata(&seen.name, &parameters, &patch);
        match tokio::time::timeout(TIMEOUT, patched).await {
            Ok(Ok(_patched)) => Ok(()),
            Ok(Err(error)) => Err(format!("its original limit cannot be recorded: {error}")),
            Err(_elapsed) => {
                Err("its original limit cannot be recorded: the API does not answer".to_owned())
            }
        }
    }

    fn send(&self, input: Input) {
        if self.context.inputs.send(input).is_err() {
            tracing::error!("the controller has ended");
        }
    }

    /// A pod that opts out while its limit is raised gets its original back. The kubelet carries it
    /// out when usage allows (it refuses a limit below usage and tries again).
    async fn give_back(&self, seen: &pod::Pod) {
        let Some(Raised {
            level,
            limit,
            original,
        }) = pod::left_raised(seen)
        else {
            return;
        };
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &seen.namespace);
        let (parameters, patch) = (parameters(), limit_patch(level, &limit, &original));
        let patched = api.patch_resize(&seen.name, &parameters, &patch);
        match tokio::time::timeout(TIMEOUT, patched).await {
            Ok(Ok(_patched)) => {}
            failed => tracing::warn!(
                pod.name = seen.name,
                ?failed,
                "a limit could not be given back"
            ),
        }
    }

    fn forget_cgroup(&mut self, uid: &str) {
        if let Some(cgroup) = self
            .known
            .get_mut(uid)
            .and_then(|known| known.cgroup.take())
        {
            self.context
                .targets
                .with(|targets| drop(targets.remove(&cgroup)));
            self.send(Input::Forget(cgroup));
        }
    }

    fn forget(&mut self, uid: &str) {
        self.forget_cgroup(uid);
        self.watched.retain(|_, watched| watched.uid != uid);
        self.known.remove(uid);
        self.pending.remove(uid);
    }

    fn keep_only(&mut self, listed: &[String]) {
        let gone: Vec<String> = self
            .known
            .keys()
            .filter(|uid| !listed.contains(uid))
            .cloned()
            .collect();
        for uid in gone {
            self.forget(&uid);
        }
    }
}

/// The cgroups in which a pod was watched, the latest last: their ids grow.
fn known_cgroups(watched: &BTreeMap<CgroupId, Watched>, uid: &str) -> Vec<CgroupId> {
    let own = watched.iter().filter(|(_, watched)| watched.uid == uid);
    own.map(|(&cgroup, _)| cgroup).collect()
}

/// The cgroup whose limit is meant.
fn cgroup(seen: &pod::Pod, wish: &Wish) -> Result<Cgroup, String> {
    let root = Path::new(CGROUP_ROOT);
    let path = match &wish.id {
        Some(id) => attribution::find(root, &seen.uid, id),
        None => attribution::find_pod(root, &seen.uid),
    };
    let path = path.ok_or_else(|| format!("`{}` has no cgroup yet", wish.container))?;
    let cgroup = Cgroup::open(&path).map_err(|error| error.to_string())?;
    match wish.level {
        Level::Pod => cgroup.with_heirs().map_err(|error| error.to_string()),
        Level::Container(_) => Ok(cgroup),
    }
}
