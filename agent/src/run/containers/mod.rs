//! The containers of this machine, from its runtime: who a policy selects is adopted, who is gone is forgotten, who
//! cannot be guarded is told.
//!
//! The runtime is asked again and again, because it may be restarted under its containers and because what it tells
//! of by itself can be lost; where its events may be read beside a kubelet, they only make it sooner. While it does
//! not answer, nothing is concluded: who is guarded stays guarded.
//!
//! It must not change a limit: that is the controller's, through the runtime.

pub(super) mod cpu;
mod events;
mod memory;
mod one;
mod watched;

use events::Events;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, mpsc::SyncSender},
    time::{Duration, SystemTime},
};

use bellows_core::{
    Actuation, Signals,
    elastic::{self, ElasticPolicy, Mode, Subject},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use super::{hands::Lent, text};
use crate::{
    actuate::{
        containers::Owner as _,
        pod::{May, Pod, PodRecords},
        update::{Target, Updater},
    },
    attribution::{CGROUP_ROOT, places::Places},
    cgroup::Cgroup,
    cri::{Container, ContainerState, PodSandbox, Runtime, RuntimeError},
    guard::Input,
    metrics::METRICS,
    originals::{Original, Records},
    quota::Quotas,
};
use one::Known;

/// How often the runtime is asked where it tells of containers by itself, and where it does not.
const SELDOM: Duration = Duration::from_secs(10);
const OFTEN: Duration = Duration::from_secs(1);
/// So long after a look the runtime is not asked because of somebody who is new: what starts together is looked at
/// together.
const SETTLE: Duration = Duration::from_millis(20);

/// What the watch needs.
pub(super) struct Context {
    pub(super) updater: Updater,
    pub(super) policies: PathBuf,
    pub(super) inputs: SyncSender<Input>,
    pub(super) actuation: Actuation,
    pub(super) signals: Signals,
    pub(super) quotas: Quotas,
    pub(super) pods: PodRecords,
    /// Paths of cgroups as they are made.
    pub(super) made: mpsc::Receiver<String>,
    /// What is lent of memory.
    pub(super) lent: Arc<Lent>,
    /// Policies, for whoever decides when containers are made.
    pub(super) told: watch::Sender<Vec<ElasticPolicy>>,
}

/// Watches for ever. A change of the policies is taken over when the tick sees it.
pub(super) async fn watch(context: Context, policies: Vec<ElasticPolicy>) {
    let mut watch = Watch {
        policies,
        policies_changed: stamp(&context.policies),
        known: BTreeMap::new(),
        pods: Vec::new(),
        places: Places::default(),
        is_silent: false,
        has_begun: false,
        context,
    };
    let is_watching =
        |policy: &ElasticPolicy| matches!(policy.mode, Mode::Observe | Mode::Recommend);
    if watch.context.signals == Signals::Files && watch.policies.iter().any(is_watching) {
        tracing::warn!(
            "without kernel programs nobody is only watched: `bellows doctor` tells what is missing"
        );
    }
    let mut events = Events::Untried;
    // When everybody is looked at again, and not only who is new.
    let mut all_at = Instant::now();
    loop {
        let is_new = watch.reload();
        let of = if is_new || Instant::now() >= all_at {
            Of::All
        } else {
            Of::New
        };
        watch.look(of).await;
        if watch.is_silent {
            // Who answers next may be another version.
            events = Events::Untried;
        } else if matches!(events, Events::Untried) {
            events = Events::of(watch.runtime()).await;
        }
        let now = Instant::now();
        let wait = match events {
            Events::Read(_) => SELDOM,
            Events::Untried | Events::Others => OFTEN,
        };
        all_at = match of {
            Of::All => now + wait,
            // It may have been told of by events until now.
            Of::New => all_at.min(now + wait),
        };
        let earliest = now + SETTLE;
        loop {
            match watch.wait(&mut events, all_at).await {
                Woken::ForNothing => {}
                Woken::By(Of::All) => {
                    all_at = Instant::now();
                    break;
                }
                Woken::By(Of::New) => {
                    sleep_until(earliest).await;
                    break;
                }
            }
        }
    }
}

/// Who is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    All,
    /// Where many come, those that were there would be looked at as often as one comes.
    New,
}

/// What was waited for.
enum Woken {
    /// By something that concerns this many.
    By(Of),
    ForNothing,
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
    /// Cgroups of containers, as they were told of.
    places: Places,
    /// Whether the runtime did not answer the last time.
    is_silent: bool,
    /// Whether all containers were looked at once.
    has_begun: bool,
}

impl Watch {
    /// Waits for something that makes a look worthwhile, or until `all_at`.
    async fn wait(&mut self, events: &mut Events, all_at: Instant) -> Woken {
        let told = async {
            match events {
                Events::Read(reader) => reader.wait().await,
                Events::Untried | Events::Others => pending().await,
            }
        };
        // Who does not answer is asked once in a while, whoever waits for it.
        let again = self.known.values().filter_map(Known::again_at).min();
        let again = again.filter(|_| !self.is_silent);
        tokio::select! {
            () = sleep_until(all_at) => Woken::By(Of::All),
            () = sleep_until(again.unwrap_or(all_at)), if again.is_some() => Woken::By(Of::New),
            () = self.context.lent.wait() => Woken::By(Of::New),
            Some(path) = self.context.made.recv() => {
                let root = Path::new(CGROUP_ROOT);
                let mut is_one = self.places.add(root, &path);
                while let Ok(path) = self.context.made.try_recv() {
                    is_one |= self.places.add(root, &path);
                }
                // Without boosts it is early enough when the runtime says that it runs.
                if is_one && self.lends() { Woken::By(Of::New) } else { Woken::ForNothing }
            }
            is_going_on = told => {
                if !is_going_on {
                    tracing::info!("the runtime's events have ended; it is asked instead");
                    *events = Events::Untried;
                }
                Woken::By(Of::New)
            }
        }
    }

    const fn runtime(&self) -> &Runtime {
        self.context.updater.runtime()
    }

    const fn records(&self) -> &Records<Original> {
        self.context.updater.records()
    }

    /// Takes over policies that were changed; those that cannot be read change nothing, and nor does a file that is
    /// empty: it is being written.
    ///
    /// Returns whether there are others.
    fn reload(&mut self) -> bool {
        let changed = stamp(&self.context.policies);
        if changed == self.policies_changed {
            return false;
        }
        self.policies_changed = changed;
        match crate::policies::read(&self.context.policies) {
            Ok(policies) if policies.is_empty() && !self.policies.is_empty() => {
                METRICS.policies_rejected.inc();
                tracing::error!(
                    "the file of the policies is empty: they stay as they were; to guard nothing, give them `mode: \"Off\"`"
                );
            }
            Ok(policies) => {
                tracing::info!(policies = policies.len(), "policies were read again");
                self.context.told.send_replace(policies.clone());
                self.policies = policies;
                self.known.values_mut().for_each(Known::look_again);
                return true;
            }
            Err(error) => {
                METRICS.policies_rejected.inc();
                tracing::error!(%error, "the policies stay as they were");
            }
        }
        false
    }

    async fn look(&mut self, of: Of) {
        match self.look_around(of).await {
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

    async fn look_around(&mut self, of: Of) -> Result<(), RuntimeError> {
        let alive = self.alive().await?;
        let lent = self.context.lent.take();
        self.forget_all_but(&alive);
        let is_new = |container: &Container| !self.known.contains_key(&container.id);
        let pods = if alive.iter().any(is_new) {
            self.runtime().pods().await?
        } else {
            BTreeMap::new()
        };
        for container in alive {
            let pod = pods.get(&container.pod_sandbox_id);
            let mut is_due = of == Of::All;
            if !self.known.contains_key(&container.id) {
                let is_left = self.records().read(&container.id).is_some();
                let known = Known::new(&container, pod, is_left);
                self.known.insert(container.id.clone(), known);
                is_due = true;
            }
            if let Some(known) = self.known.get_mut(&container.id) {
                let is_lent = |cgroup: &Cgroup| lent.contains(&cgroup.id());
                is_due |= known.is_starting || known.again_at().is_some();
                is_due |= known.cgroup.as_ref().is_some_and(is_lent);
                if container.state() == ContainerState::ContainerRunning {
                    known.has_started();
                }
            }
            if is_due {
                self.apply(&container.id).await;
            }
        }
        if !std::mem::replace(&mut self.has_begun, true) {
            self.begin();
        }
        let refused = self.known.values().filter_map(Known::refusal).count();
        METRICS
            .refused
            .set(i64::try_from(refused).unwrap_or(i64::MAX));
        if of == Of::All {
            self.settle_pods().await;
            self.prepare().await?;
        }
        Ok(())
    }

    /// Asks the runtime what it says of those that are guarded, before that is needed in a hurry. One of which it says
    /// nothing is asked for again with the next look: the runtime itself is there, and so are the others.
    async fn prepare(&self) -> Result<(), RuntimeError> {
        let updater = &self.context.updater;
        let unasked: Vec<Target> = updater.targets().with(|targets| {
            let unasked = targets.values().filter(|target| target.said.is_none());
            unasked.cloned().collect()
        });
        for target in unasked {
            match updater.said(&target).await {
                Ok(_) => {}
                Err(error) if error.is_answer() => {
                    let container = &target.original.name;
                    tracing::debug!(container, %error, "what the runtime says of a container is not known beforehand");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Those that run; and those that are about to, if a policy lends them something.
    async fn alive(&self) -> Result<Vec<Container>, RuntimeError> {
        let mut alive = BTreeMap::new();
        // In this order: one that starts meanwhile is in both.
        if self.lends() {
            let created = self.runtime().containers(ContainerState::ContainerCreated);
            for container in created.await? {
                alive.insert(container.id.clone(), container);
            }
        }
        for container in self.runtime().running().await? {
            alive.insert(container.id.clone(), container);
        }
        Ok(alive.into_values().collect())
    }

    /// Whether a policy lends anybody something.
    fn lends(&self) -> bool {
        let mut rules = self.policies.iter().flat_map(|policy| &policy.containers);
        rules.any(|rules| !rules.boosts.is_empty())
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
            let settled = updater.settle_pod(Some(&pod), May::Fall, None).await;
            let settled = settled.map_err(|refused| refused.why);
            let settled = settled.and(updater.containers().settle_pod_quota(Some(&pod), May::Fall));
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

    fn forget_all_but(&mut self, alive: &[Container]) {
        let alive: BTreeSet<&str> = alive.iter().map(|one| one.id.as_str()).collect();
        let gone: Vec<String> = self
            .known
            .keys()
            .filter(|id| !alive.contains(id.as_str()))
            .cloned()
            .collect();
        for id in gone {
            self.stop_watching(&id);
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
        self.context.updater.forget(cgroup.id());
        self.send(Input::Forget(cgroup.id()));
        self.context.quotas.forget(cgroup.id());
    }

    async fn apply(&mut self, id: &str) {
        let Some(known) = self.known.get(id).filter(|known| known.is_due()) else {
            return;
        };
        let subject = known.subject.clone();
        let (mut acting, mut watched) = (None, None);
        if let Some((policy, rules)) = elastic::rules(&self.policies, &subject) {
            match policy.mode {
                Mode::Act => acting = Some(rules.clone()),
                Mode::Observe | Mode::Recommend => {
                    watched = rules.memory.map(|memory| (policy.mode, memory));
                }
                Mode::Off => {}
            }
        }
        if watched.is_none() {
            // Before it is guarded: the watermark is another's then.
            self.stop_watching(id);
        }
        let mut done = self.follow(id, acting.as_ref()).await;
        if done.is_ok() {
            done = self.follow_watched(id, watched).await;
        }
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

/// What it is one of.
fn workload(subject: &Subject) -> String {
    let Subject {
        namespace,
        pod,
        container,
        labels,
    } = subject;
    let workload = bellows_core::workload::workload(pod, labels, None);
    format!("{namespace}/{workload}/{container}")
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
