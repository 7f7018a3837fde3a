//! The containers of this machine, from its runtime: who a policy selects is adopted, who is gone is forgotten, who
//! cannot be guarded is told.
//!
//! The runtime is asked again and again, because it may be restarted under its containers and because what it tells
//! of by itself can be lost; where its events may be read beside a kubelet, they only make it sooner. While it does
//! not answer, nothing is concluded: who is guarded stays guarded.
//!
//! It must not change a limit: that is the controller's, through the runtime.

mod one;

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, mpsc::SyncSender},
    time::{Duration, SystemTime},
};

use bellows_core::{
    Actuation, Signals,
    elastic::{self, ElasticPolicy, Mode, Subject},
};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::Streaming;

use super::text;
use crate::{
    actuate::{
        pod::{May, Pod, PodRecords},
        update::Updater,
    },
    cgroup::Cgroup,
    cri::{Container, ContainerEventResponse, PodSandbox, Runtime, RuntimeError},
    guard::Input,
    originals::{Original, Records},
    quota::Quotas,
};
use one::Known;

/// How often the runtime is asked where it tells of containers by itself, and where it does not.
const SELDOM: Duration = Duration::from_secs(10);
const OFTEN: Duration = Duration::from_secs(1);
/// After this long without an event the runtime is asked: what starts together is looked at together.
const SETTLE: Duration = Duration::from_millis(20);

/// What the watch needs.
pub(super) struct Context {
    pub(super) updater: Updater,
    pub(super) policies: PathBuf,
    pub(super) inputs: SyncSender<Input>,
    pub(super) actuation: Actuation,
    pub(super) cpus: u64,
    pub(super) signals: Signals,
    pub(super) quotas: Quotas,
    pub(super) pods: PodRecords,
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
                self.known.values_mut().for_each(Known::look_again);
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
        let is_new = |container: &Container| !self.known.contains_key(&container.id);
        let pods = if running.iter().any(is_new) {
            self.runtime().pods().await?
        } else {
            BTreeMap::new()
        };
        for container in running {
            let pod = pods.get(&container.pod_sandbox_id);
            if !self.known.contains_key(&container.id) {
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
        for pod in self.context.pods.living() {
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
            let updater = &self.context.updater;
            let settled = updater.settle_pod(Some(&pod), May::Fall).await;
            let settled = settled.map_err(|refused| refused.why);
            let settled = settled.and(updater.settle_pod_quota(Some(&pod), May::Fall));
            // Whoever has it beside us is one of its containers.
            if Arc::strong_count(&pod) == 1 && pod.is_left() {
                continue;
            }
            if let Err(why) = settled {
                let path = pod.cgroup().path().display();
                tracing::warn!(%path, why, "a pod does not have what it should");
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
            if let Some(cgroup) = &cgroup {
                self.let_go(cgroup);
            }
            // A runtime may lose sight of a container that lives on, and see it again later.
            let lives = cgroup.is_some_and(|cgroup| cgroup.populated().unwrap_or(false));
            if !lives {
                self.records().remove(&id);
            }
        }
    }

    fn let_go(&self, cgroup: &Cgroup) {
        let targets = self.context.updater.targets();
        targets.with(|targets| drop(targets.remove(&cgroup.id())));
        self.send(Input::Forget(cgroup.id()));
        self.context.quotas.forget(cgroup.id());
    }

    async fn apply(&mut self, id: &str) {
        let Some(known) = self.known.get(id).filter(|known| known.is_due()) else {
            return;
        };
        let subject = known.subject.clone();
        let rules = elastic::rules(&self.policies, &subject)
            .filter(|(policy, _)| policy.mode == Mode::Act)
            .map(|(_, rules)| rules.clone());
        let done = self.follow(id, rules.as_ref()).await;
        let Some(known) = self.known.get_mut(id) else {
            return;
        };
        if known.went(done.err()) {
            let (container, why) = (name(&subject), known.refusal());
            tracing::warn!(container, why, "a container is not guarded as it should be");
        }
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
