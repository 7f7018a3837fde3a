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
    path::{Path, PathBuf},
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use bellows_core::{
    Actuation, Bytes, Patience, Policy, Signals, WHOLE,
    elastic::{self, ElasticPolicy, MemoryRules, Mode, Subject},
};
use tokio::{
    sync::Mutex as AsyncMutex,
    time::{Instant, sleep_until, timeout},
};
use tonic::Streaming;

use super::text;
use crate::{
    actuate::{targets::Targets, update::Target},
    attribution::{self, CGROUP_ROOT},
    cgroup::{Cgroup, Limit},
    cri::{Container, ContainerEventResponse, PodSandbox, Runtime, RuntimeError, memory_limit},
    guard::Input,
    originals::{self, Original},
};

/// How often the runtime is asked where it tells of containers by itself, and where it does not.
const SELDOM: Duration = Duration::from_secs(10);
const OFTEN: Duration = Duration::from_secs(1);
/// After this long without an event the runtime is asked: what starts together is looked at together.
const SETTLE: Duration = Duration::from_millis(20);

/// What the watch needs.
pub(super) struct Context {
    pub(super) runtime: Runtime,
    pub(super) policies: PathBuf,
    pub(super) inputs: SyncSender<Input>,
    pub(super) targets: Targets<Target>,
    pub(super) actuation: Actuation,
    pub(super) cpus: u64,
    pub(super) signals: Signals,
    pub(super) originals: PathBuf,
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
}

impl Known {
    fn new(container: &Container, pod: Option<&PodSandbox>) -> Self {
        let uid = pod.and_then(|pod| Some(pod.metadata.as_ref()?.uid.clone()));
        Self {
            subject: subject(container, pod),
            uid: uid.unwrap_or_default(),
            cgroup: None,
            policy: None,
            refusal: None,
        }
    }
}

/// Watches for ever. A change of the policies is taken over when the tick sees it.
pub(super) async fn watch(context: Context, policies: Vec<ElasticPolicy>) {
    let mut watch = Watch {
        policies,
        policies_changed: modified(&context.policies),
        known: BTreeMap::new(),
        is_silent: false,
        context,
    };
    let mut events = watch.events().await;
    loop {
        watch.reload();
        watch.look().await;
        let wait = if events.is_some() { SELDOM } else { OFTEN };
        let next = Instant::now() + wait;
        let Some(stream) = &mut events else {
            sleep_until(next).await;
            events = watch.events().await;
            continue;
        };
        tokio::select! {
            () = sleep_until(next) => {}
            event = settled(stream) => {
                if !event {
                    tracing::info!("the runtime's events have ended; it is asked instead");
                    events = None;
                }
            }
        }
    }
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

fn modified(path: &Path) -> Option<std::time::SystemTime> {
    std::fs::metadata(path)
        .and_then(|meta| meta.modified())
        .ok()
}

struct Watch {
    context: Context,
    policies: Vec<ElasticPolicy>,
    policies_changed: Option<std::time::SystemTime>,
    /// By the runtime's id.
    known: BTreeMap<String, Known>,
    /// Whether the runtime did not answer the last time.
    is_silent: bool,
}

impl Watch {
    /// The runtime's own events, where a second reader takes them from nobody.
    async fn events(&self) -> Option<Streaming<ContainerEventResponse>> {
        let (name, version) = self.context.runtime.version().await.ok()?;
        let version = version.trim_start_matches('v');
        let major = version
            .split('.')
            .next()
            .and_then(|major| major.parse().ok());
        if name != "containerd" || major.is_none_or(|major: u32| major < 2) {
            return None;
        }
        let events = self.context.runtime.events().await;
        events
            .inspect_err(|error| tracing::debug!(%error, "no events"))
            .ok()
    }

    /// Takes over policies that were changed; those that cannot be read change nothing.
    fn reload(&mut self) {
        let changed = modified(&self.context.policies);
        if changed == self.policies_changed {
            return;
        }
        self.policies_changed = changed;
        match crate::policies::read(&self.context.policies) {
            Ok(policies) => {
                tracing::info!(policies = policies.len(), "policies were read again");
                self.policies = policies;
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
        let running = self.context.runtime.running().await?;
        self.forget_all_but(&running);
        let is_new = |container: &Container| !self.known.contains_key(&container.id);
        let pods = if running.iter().any(is_new) {
            self.context.runtime.pods().await?
        } else {
            BTreeMap::new()
        };
        for container in running {
            let pod = pods.get(&container.pod_sandbox_id);
            let known = self.known.entry(container.id.clone());
            known.or_insert_with(|| Known::new(&container, pod));
            self.apply(&container.id).await;
        }
        Ok(())
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
                originals::remove(&self.context.originals, &id);
            }
        }
    }

    fn let_go(&self, cgroup: Option<&Cgroup>) {
        if let Some(cgroup) = cgroup {
            self.context
                .targets
                .with(|targets| drop(targets.remove(&cgroup.id())));
            self.send(Input::Forget(cgroup.id()));
        }
    }

    async fn apply(&mut self, id: &str) {
        let Some(known) = self.known.get(id) else {
            return;
        };
        let (subject, cgroup) = (known.subject.clone(), known.cgroup.clone());
        let memory = elastic::rules(&self.policies, &subject)
            .filter(|(policy, _)| policy.mode == Mode::Act)
            .and_then(|(_, rules)| rules.memory);
        let done = match (cgroup, memory) {
            (Some(cgroup), memory) => self.follow(id, &cgroup, memory).await,
            (None, Some(memory)) => self.adopt(id, &subject, memory).await,
            (None, None) => Ok(()),
        };
        let refusal = done.err();
        let Some(known) = self.known.get_mut(id) else {
            return;
        };
        if refusal.is_some() && known.refusal != refusal {
            let name = name(&subject);
            tracing::warn!(
                container = name,
                why = refusal,
                "a container is not guarded as it should be"
            );
        }
        known.refusal = refusal;
    }

    async fn adopt(
        &mut self,
        id: &str,
        subject: &Subject,
        memory: MemoryRules,
    ) -> Result<(), String> {
        let (status, process) = self.context.runtime.status(id).await.map_err(text)?;
        let root = Path::new(CGROUP_ROOT);
        let path = process.and_then(|process| attribution::of_process(root, process, id));
        let path = path.or_else(|| attribution::find_container(root, id));
        let cgroup = Cgroup::open(&path.ok_or("it has no cgroup (yet)")?).map_err(text)?;
        let Limit::At(limit) = cgroup.limit("memory.max").map_err(text)? else {
            return Err("it has no memory limit: there is nothing to raise".to_owned());
        };
        let said = status.resources.and_then(|resources| resources.linux);
        let said = said.unwrap_or_default();
        let uid = self.known.get(id).map(|known| known.uid.as_str());
        let (pod, pod_limit) = self.pod_of(&cgroup, uid.unwrap_or_default());
        let recorded = originals::read(&self.context.originals, id);
        // A limit that is none of ours was set by somebody else while nobody looked.
        let recorded = recorded.filter(|original| original.is_ours(limit));
        let original = recorded.unwrap_or_else(|| Original {
            id: id.to_owned(),
            name: name(subject),
            limit,
            asked: Vec::new(),
            pod_limit,
            path: cgroup.path().to_owned(),
        });
        if memory_limit(&said).is_some_and(|said| !original.is_ours(said.page_floor())) {
            let what = "its runtime has another limit than its cgroup";
            tracing::warn!(container = original.name, ?said, %limit, what);
        }
        let policy = self.policy(original.limit, memory)?;
        originals::write(&self.context.originals, &original).map_err(|error| {
            let directory = self.context.originals.display();
            format!("its limit cannot be written down in {directory}: {error}")
        })?;
        let order = self.order_of(pod.as_ref());
        let (target_id, full_name) = (cgroup.id(), original.name.clone());
        let target = Target {
            original,
            said,
            pod,
            requests: 0,
            order,
        };
        self.context
            .targets
            .with(|targets| drop(targets.insert(target_id, target)));
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
        let original = self
            .context
            .targets
            .of(cgroup.id(), |target| target.original.clone());
        let mut original = original.ok_or("it is not known any more")?;
        // What we ask for is written down before it is asked for.
        if !original.is_ours(limit) {
            self.take_over(cgroup, &mut original, limit).await?;
        }
        let wanted = match memory {
            Some(memory) => self.policy(original.limit, memory)?,
            // Nobody selects it any more: it is brought to rest and left.
            None if limit == original.limit => {
                let known = self.known.get_mut(id);
                let cgroup = known.and_then(|known| known.cgroup.take());
                self.let_go(cgroup.as_ref());
                originals::remove(&self.context.originals, id);
                return Ok(());
            }
            None => {
                let rest = MemoryRules {
                    max: original.limit,
                    floor: None,
                    shrink_after: bellows_core::Nanos::millis(1000),
                };
                self.policy(original.limit, rest)?
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

    /// Somebody else has set a limit, which is the new original.
    async fn take_over(
        &self,
        cgroup: &Cgroup,
        original: &mut Original,
        limit: Bytes,
    ) -> Result<(), String> {
        tracing::info!(container = original.name, %limit, "the limit was changed by somebody else, which is the new original");
        let (status, _) = self
            .context
            .runtime
            .status(&original.id)
            .await
            .map_err(text)?;
        original.limit = limit;
        original.asked.clear();
        let changed = original.clone();
        let pod = self.context.targets.of(cgroup.id(), |target| {
            target.original = changed;
            let said = status.resources.and_then(|resources| resources.linux);
            target.said = said.unwrap_or_default();
            target.pod.clone()
        });
        // What the pod has now, it has with all at rest but the others.
        if let Some(pod) = pod.flatten() {
            original.pod_limit = self.pod_at_rest(&pod);
            let limit = original.pod_limit;
            let targets = &self.context.targets;
            targets.of(cgroup.id(), |target| target.original.pod_limit = limit);
        }
        originals::write(&self.context.originals, original).map_err(text)
    }

    fn policy(&self, original: Bytes, memory: MemoryRules) -> Result<Policy, String> {
        let Context {
            actuation,
            cpus,
            signals,
            ..
        } = &self.context;
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

    /// The cgroup of a container's pod if that has a limit, and what that is with all at rest.
    fn pod_of(&self, cgroup: &Cgroup, uid: &str) -> (Option<Cgroup>, Option<Bytes>) {
        let pod = cgroup.path().parent().filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            attribution::is_pod(&name, uid)
        });
        let pod = pod.and_then(|path| Cgroup::open(path).ok());
        let at_rest = pod.as_ref().and_then(|pod| self.pod_at_rest(pod));
        (pod.filter(|_| at_rest.is_some()), at_rest)
    }

    fn pod_at_rest(&self, pod: &Cgroup) -> Option<Bytes> {
        let Ok(Limit::At(limit)) = pod.limit("memory.max") else {
            return None;
        };
        let raised = self.context.targets.with(|targets| {
            let same = targets
                .values()
                .filter(|target| target.pod.as_ref() == Some(pod));
            let raised = same.map(|target| target.original.raised_by());
            raised.fold(Bytes::ZERO, Bytes::plus)
        });
        Some(limit.minus(raised))
    }

    /// One order for all containers of a pod: each request moves the pod's limit too.
    fn order_of(&self, pod: Option<&Cgroup>) -> Arc<AsyncMutex<()>> {
        self.context.targets.with(|targets| {
            let mut same = targets.values();
            let same = same.find(|target| pod.is_some() && target.pod.as_ref() == pod);
            same.map(|target| Arc::clone(&target.order))
                .unwrap_or_default()
        })
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
