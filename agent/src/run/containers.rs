//! The containers of this machine, from its runtime: who a policy selects is adopted, who is gone is forgotten, who
//! cannot be guarded is told.
//!
//! The runtime is asked again and again, because it may be restarted under its containers and because what it tells
//! of by itself can be lost; where its events may be read beside a kubelet, they only make it sooner. While it does
//! not answer, nothing is concluded: who is guarded stays guarded.
//!
//! It must not change a limit: that is the controller's, through the runtime.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, mpsc::SyncSender},
    time::{Duration, SystemTime},
};

use bellows_core::{
    Actuation, Bytes, Nanos, Patience, Policy, Signals, WHOLE,
    elastic::{self, ElasticPolicy, MemoryRules, Mode, Subject},
    moved::MovedLimit,
};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::Streaming;

use super::text;
use crate::{
    actuate::{
        pod::{May, Pod},
        update::{Target, Updater, recorded_pods},
    },
    attribution::{self, CGROUP_ROOT},
    cgroup::{Cgroup, Limit},
    cri::{Container, ContainerEventResponse, PodSandbox, Runtime, RuntimeError, memory_limit},
    guard::Input,
    originals::{Original, PodOriginal, Records},
};

/// How often the runtime is asked where it tells of containers by itself, and where it does not.
const SELDOM: Duration = Duration::from_secs(10);
const OFTEN: Duration = Duration::from_secs(1);
/// After this long without an event the runtime is asked: what starts together is looked at together.
const SETTLE: Duration = Duration::from_millis(20);

/// How soon a container is looked at again that could not be guarded, and how seldom at last.
const AGAIN: Duration = Duration::from_secs(1);
const SELDOM_AGAIN: Duration = Duration::from_secs(60);

/// What the watch needs.
pub(super) struct Context {
    pub(super) updater: Updater,
    pub(super) policies: PathBuf,
    pub(super) inputs: SyncSender<Input>,
    pub(super) actuation: Actuation,
    pub(super) cpus: u64,
    pub(super) signals: Signals,
    pub(super) pods: Records<PodOriginal>,
}

/// A container that runs.
#[derive(Debug)]
struct Known {
    /// How policies see it: a container's names and its pod's labels do not change.
    subject: Subject,
    /// The uid of its pod.
    uid: String,
    /// `None` while it is not guarded.
    cgroup: Option<Cgroup>,
    policy: Option<Policy>,
    /// Why it is not guarded.
    refusal: Option<String>,
    /// When that is looked at again, and how long it was waited for.
    again: Option<(Instant, Duration)>,
    /// Whether a predecessor has left it, and may have raised it.
    is_left: bool,
}

impl Known {
    fn new(container: &Container, pod: Option<&PodSandbox>, is_left: bool) -> Self {
        let uid = pod.and_then(|pod| Some(pod.metadata.as_ref()?.uid.clone()));
        Self {
            subject: subject(container, pod),
            uid: uid.unwrap_or_default(),
            cgroup: None,
            policy: None,
            refusal: None,
            again: None,
            is_left,
        }
    }

    /// Takes note of how guarding it went; returns whether there is something new to tell.
    fn went(&mut self, refusal: Option<String>) -> bool {
        let is_new = refusal.is_some() && self.refusal != refusal;
        self.again = refusal.as_ref().map(|_| {
            let before = self.again.filter(|_| !is_new);
            let wait = before.map_or(AGAIN, |(_, wait)| (wait * 2).min(SELDOM_AGAIN));
            (Instant::now() + wait, wait)
        });
        self.refusal = refusal;
        is_new
    }
}

/// Watches for ever. A change of the policies is taken over when the tick sees it.
pub(super) async fn watch(context: Context, policies: Vec<ElasticPolicy>) {
    let mut watch = Watch {
        policies,
        policies_changed: stamp(&context.policies),
        known: BTreeMap::new(),
        pods: Vec::new(),
        is_silent: false,
        has_begun: false,
        context,
    };
    let mut events = Events::Untried;
    loop {
        watch.reload();
        watch.look().await;
        if watch.is_silent {
            // Who answers next may be another version.
            events = Events::Untried;
        } else if matches!(events, Events::Untried) {
            events = watch.events().await;
        }
        let wait = match events {
            Events::Told(_) => SELDOM,
            Events::Untried | Events::Others => OFTEN,
        };
        let next = Instant::now() + wait;
        let Events::Told(stream) = &mut events else {
            sleep_until(next).await;
            continue;
        };
        tokio::select! {
            () = sleep_until(next) => {}
            event = settled(stream) => {
                if !event {
                    tracing::info!("the runtime's events have ended; it is asked instead");
                    events = Events::Untried;
                }
            }
        }
    }
}

/// What is known of a runtime's events.
enum Events {
    /// Nothing yet.
    Untried,
    /// They belong to somebody else.
    Others,
    /// They are read.
    Told(Box<Streaming<ContainerEventResponse>>),
}

/// Waits for an event, and then until none comes for a moment; returns whether more may come.
async fn settled(stream: &mut Streaming<ContainerEventResponse>) -> bool {
    let mut next = stream.message().await;
    while next.is_ok_and(|event| event.is_some()) {
        match timeout(SETTLE, stream.message()).await {
            Ok(event) => next = event,
            Err(_elapsed) => return true,
        }
    }
    false
}

/// What changes when a file is written or replaced.
fn stamp(path: &Path) -> Option<(SystemTime, u64, u64)> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len(), meta.ino()))
}

struct Watch {
    context: Context,
    policies: Vec<ElasticPolicy>,
    policies_changed: Option<(SystemTime, u64, u64)>,
    /// By the runtime's id.
    known: BTreeMap<String, Known>,
    /// Pods whose limit was moved or may have to be.
    pods: Vec<Arc<Pod>>,
    /// Whether the runtime did not answer the last time.
    is_silent: bool,
    /// Whether all containers were looked at once.
    has_begun: bool,
}

impl Watch {
    const fn runtime(&self) -> &Runtime {
        self.context.updater.runtime()
    }

    const fn records(&self) -> &Records<Original> {
        self.context.updater.records()
    }

    /// The runtime's own events, where a second reader takes them from nobody.
    async fn events(&self) -> Events {
        let Ok((name, version)) = self.runtime().version().await else {
            return Events::Untried;
        };
        let version = version.trim_start_matches('v');
        let major = version
            .split('.')
            .next()
            .and_then(|major| major.parse().ok());
        if name != "containerd" || major.is_none_or(|major: u32| major < 2) {
            return Events::Others;
        }
        match self.runtime().events().await {
            Ok(stream) => Events::Told(Box::new(stream)),
            Err(error) => {
                tracing::debug!(%error, "no events");
                Events::Untried
            }
        }
    }

    /// Takes over policies that were changed; those that cannot be read change nothing, and nor does a file that is
    /// empty: it is being written.
    fn reload(&mut self) {
        let changed = stamp(&self.context.policies);
        if changed == self.policies_changed {
            return;
        }
        self.policies_changed = changed;
        match crate::policies::read(&self.context.policies) {
            Ok(policies) if policies.is_empty() && !self.policies.is_empty() => {
                tracing::error!(
                    "the file of the policies is empty: they stay as they were; to guard nothing, give them mode Off"
                );
            }
            Ok(policies) => {
                tracing::info!(policies = policies.len(), "policies were read again");
                self.policies = policies;
                for known in self.known.values_mut() {
                    known.again = None;
                }
            }
            Err(error) => tracing::error!(%error, "the policies stay as they were"),
        }
    }

    async fn look(&mut self) {
        match self.look_around().await {
            Ok(()) => {
                if std::mem::take(&mut self.is_silent) {
                    tracing::info!("the runtime answers again");
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.is_silent, true) {
                    tracing::warn!(%error, "the runtime does not answer; who is guarded stays guarded");
                }
            }
        }
    }

    async fn look_around(&mut self) -> Result<(), RuntimeError> {
        let running = self.runtime().running().await?;
        self.forget_all_but(&running);
        let mut known: BTreeSet<String> = self.known.keys().cloned().collect();
        let pods = if running
            .iter()
            .any(|container| !known.contains(&container.id))
        {
            self.runtime().pods().await?
        } else {
            BTreeMap::new()
        };
        for container in running {
            let pod = pods.get(&container.pod_sandbox_id);
            if known.insert(container.id.clone()) {
                let is_left = self.records().read(&container.id).is_some();
                let known = Known::new(&container, pod, is_left);
                self.known.insert(container.id.clone(), known);
            }
            self.apply(&container.id).await;
        }
        if !std::mem::replace(&mut self.has_begun, true) {
            self.begin();
        }
        self.settle_pods().await;
        Ok(())
    }

    /// What a predecessor has left: pods that it raised, and records of what is gone.
    fn begin(&mut self) {
        for pod in recorded_pods(&self.context.pods) {
            let is_known = |known: &Arc<Pod>| known.cgroup() == pod.cgroup();
            if !self.pods.iter().any(is_known) {
                self.pods.push(Arc::new(pod));
            }
        }
        for original in self.records().all() {
            if !self.known.contains_key(&original.id) && !original.path.exists() {
                self.records().remove(&original.id);
            }
        }
    }

    /// Brings pods to where their containers need them: containers end while they are raised, and others set limits.
    async fn settle_pods(&mut self) {
        let mut kept = Vec::new();
        for pod in std::mem::take(&mut self.pods) {
            let settled = self.context.updater.settle_pod(Some(&pod), May::Fall).await;
            // Whoever has it beside us is one of its containers.
            if Arc::strong_count(&pod) == 1 && pod.is_left().await {
                continue;
            }
            if let Err(refused) = settled {
                let (path, why) = (pod.cgroup().path().display(), refused.why);
                tracing::warn!(%path, why, "the limit of a pod is not what it should be");
            }
            kept.push(pod);
        }
        self.pods = kept;
    }

    fn forget_all_but(&mut self, running: &[Container]) {
        let running: BTreeSet<&str> = running.iter().map(|one| one.id.as_str()).collect();
        let gone: Vec<String> = self
            .known
            .keys()
            .filter(|id| !running.contains(id.as_str()))
            .cloned()
            .collect();
        for id in gone {
            let known = self.known.remove(&id);
            let cgroup = known.and_then(|known| known.cgroup);
            self.let_go(cgroup.as_ref());
            // A runtime may lose sight of a container that lives on, and see it again later.
            let lives = cgroup.is_some_and(|cgroup| cgroup.populated().unwrap_or(false));
            if !lives {
                self.records().remove(&id);
            }
        }
    }

    fn let_go(&self, cgroup: Option<&Cgroup>) {
        if let Some(cgroup) = cgroup {
            let targets = self.context.updater.targets();
            targets.with(|targets| drop(targets.remove(&cgroup.id())));
            self.send(Input::Forget(cgroup.id()));
        }
    }

    async fn apply(&mut self, id: &str) {
        let Some(known) = self.known.get(id) else {
            return;
        };
        let is_early = known.again.is_some_and(|(again, _)| Instant::now() < again);
        if known.cgroup.is_none() && is_early {
            return;
        }
        let is_left = known.is_left;
        let (subject, cgroup) = (known.subject.clone(), known.cgroup.clone());
        let memory = elastic::rules(&self.policies, &subject)
            .filter(|(policy, _)| policy.mode == Mode::Act)
            .and_then(|(_, rules)| rules.memory);
        let done = match (cgroup, memory) {
            (Some(cgroup), memory) => self.follow(id, &cgroup, memory).await,
            (None, Some(memory)) => self.adopt(id, &subject, Some(memory)).await,
            // Nobody selects it, but a predecessor may have raised it for somebody who did.
            (None, None) if is_left => self.adopt(id, &subject, None).await,
            (None, None) => Ok(()),
        };
        let Some(known) = self.known.get_mut(id) else {
            return;
        };
        if known.went(done.err()) {
            let (container, why) = (name(&subject), &known.refusal);
            tracing::warn!(container, why, "a container is not guarded as it should be");
        }
    }

    async fn adopt(
        &mut self,
        id: &str,
        subject: &Subject,
        memory: Option<MemoryRules>,
    ) -> Result<(), String> {
        let (status, process) = self.runtime().status(id).await.map_err(text)?;
        let root = Path::new(CGROUP_ROOT);
        let path = process.and_then(|process| attribution::of_process(root, process, id));
        let path = path.or_else(|| attribution::find_container(root, id));
        let cgroup = Cgroup::open(&path.ok_or("it has no cgroup (yet)")?).map_err(text)?;
        let Limit::At(limit) = cgroup.limit("memory.max").map_err(text)? else {
            return Err("it has no memory limit: there is nothing to raise".to_owned());
        };
        let said = status.resources.and_then(|resources| resources.linux);
        let said = said.unwrap_or_default();
        let recorded = self.records().read(id);
        // A limit that is none of ours was set by somebody else while nobody looked.
        let recorded = recorded.filter(|original| original.limit.is_ours(limit));
        let original = recorded.unwrap_or_else(|| Original {
            id: id.to_owned(),
            name: name(subject),
            limit: MovedLimit::new(limit),
            path: cgroup.path().to_owned(),
        });
        if memory_limit(&said).is_some_and(|said| !original.limit.is_ours(said.page_floor())) {
            let what = "its runtime has another limit than its cgroup";
            tracing::warn!(container = original.name, ?said, %limit, what);
        }
        let policy = self.policy(original.limit.at_rest, memory)?;
        self.records().write(&original).map_err(text)?;
        let uid = self.known.get(id).map(|known| known.uid.clone());
        let pod = self.pod_of(&cgroup, &uid.unwrap_or_default());
        if let Some(pod) = &pod {
            pod.adopt().await.map_err(text)?;
        }
        let full_name = original.name.clone();
        let target = Target::new(cgroup.clone(), original, said, pod);
        let targets = self.context.updater.targets();
        targets.with(|targets| drop(targets.insert(cgroup.id(), target)));
        if let Some(known) = self.known.get_mut(id) {
            known.cgroup = Some(cgroup.clone());
            known.policy = Some(policy);
        }
        tracing::info!(container = full_name, limit = %policy.original, max = %policy.ceiling, "guarded");
        self.send(Input::Adopt(cgroup, policy, full_name));
        Ok(())
    }

    /// A guarded container: its rules or its limit may have been changed by somebody else.
    async fn follow(
        &mut self,
        id: &str,
        cgroup: &Cgroup,
        memory: Option<MemoryRules>,
    ) -> Result<(), String> {
        let limit = cgroup.limit("memory.max").map_err(text)?.bytes();
        // What we ask for is written down before it is asked for: this is read after the limit.
        let targets = self.context.updater.targets();
        let known = targets.of(cgroup.id(), |target| {
            (target.original.limit.clone(), target.is_telling())
        });
        let (mut moved, is_telling) = known.ok_or("it is not known any more")?;
        // What is on its way may be ours, or replace theirs: that is seen when it has arrived.
        if !moved.is_ours(limit) && !is_telling {
            moved = self.take_over(id, cgroup, limit).await?;
        }
        if memory.is_none() && limit == moved.at_rest {
            // Nobody selects it any more, and it is at rest.
            self.leave(id);
            return Ok(());
        }
        if memory.is_none() && limit < moved.at_rest && !is_telling {
            // It had less at rest by a policy's rules, which are gone.
            self.context.updater.send(cgroup.id(), moved.at_rest);
        }
        let wanted = match self.policy(moved.at_rest, memory) {
            Ok(wanted) => wanted,
            Err(why) => {
                // Somebody else has set more than the policy allows.
                if limit == moved.at_rest {
                    self.leave(id);
                }
                return Err(why);
            }
        };
        let Some(known) = self.known.get_mut(id) else {
            return Ok(());
        };
        if known.policy != Some(wanted) {
            known.policy = Some(wanted);
            self.send(Input::Policy(cgroup.id(), wanted));
        }
        Ok(())
    }

    /// Leaves a container alone that is at rest.
    fn leave(&mut self, id: &str) {
        let cgroup = self.known.get_mut(id).and_then(|known| {
            known.is_left = false;
            known.cgroup.take()
        });
        self.let_go(cgroup.as_ref());
        self.records().remove(id);
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
        let original = targets.of(cgroup.id(), |target| {
            target.said = said.unwrap_or_default();
            target.original.limit = moved.clone();
            target.original.clone()
        });
        let original = original.ok_or("it is not known any more")?;
        tracing::info!(container = original.name, %limit, "the limit was changed by somebody else, which is the new original");
        self.records().write(&original).map_err(text)?;
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
            shrink_after: Nanos::millis(1000),
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

    fn send(&self, input: Input) {
        if self.context.inputs.send(input).is_err() {
            tracing::error!("the controller has ended");
        }
    }
}

/// A container as policies look at it. What a kubelet has written into its labels comes before what the sandbox
/// was named, which is the same there.
fn subject(container: &Container, pod: Option<&PodSandbox>) -> Subject {
    let named = |label: &str| container.labels.get(label).cloned();
    let metadata = pod.and_then(|pod| pod.metadata.clone()).unwrap_or_default();
    let own = container.metadata.clone().unwrap_or_default();
    Subject {
        namespace: named("io.kubernetes.pod.namespace").unwrap_or(metadata.namespace),
        pod: named("io.kubernetes.pod.name").unwrap_or(metadata.name),
        container: named("io.kubernetes.container.name").unwrap_or(own.name),
        labels: pod.map(|pod| pod.labels.clone()).unwrap_or_default(),
    }
}

fn name(subject: &Subject) -> String {
    let Subject {
        namespace,
        pod,
        container,
        ..
    } = subject;
    format!("{namespace}/{pod}/{container}")
}
