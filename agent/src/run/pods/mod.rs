//! This node's pods: who opts in, by annotations or by a policy, is guarded or watched, who is gone is forgotten, who
//! cannot be guarded is told.
//!
//! Pods and policies come from two watches of the API, each of which is taken up again with a backoff. A cluster without
//! the resource definition of policies is one without policies.
//!
//! It must not change a limit that somebody waits for: that is the controller's.

mod again;
mod allowances;
mod autoscalers;
#[cfg(test)]
mod bed;
mod conditions;
mod cpu;
mod give_back;
mod node;
mod one;
mod policies;
mod record;
mod recordings;
mod requests;
mod starts;
mod telling;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::SyncSender,
    },
    time::Duration,
};

use backon::ExponentialBuilder;
use bellows_core::{
    Actuation, CgroupId, Nanos, Policy, Signals,
    allowance::Reached,
    autoscalers::{Claims, claims},
    elastic::Mode,
    pod::{self, Refusal},
};
use futures::TryStreamExt as _;
use k8s_openapi::api::core::v1::{LimitRange, ObjectReference, ResourceQuota};
use kube::{
    Api, Client, ResourceExt as _,
    runtime::{WatchStreamExt as _, utils::ResetTimerBackoff, watcher},
};
use tokio::{
    sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};

pub use give_back::uninstall;
pub(super) use give_back::{Leaving, Movers};

use super::{api::watched, events::Events};
use crate::{
    actuate::{
        pod_cpu::CpuResizer,
        requests::RequestResizer,
        resize::{Observed, Order, Resizer},
    },
    attribution::{api::Pod, counted::counted, pods::convert, workloads::workloads},
    explain::LEDGER,
    guard::Input,
    nri,
    quota::Quotas,
};
use allowances::{Allowed, News};
use autoscalers::Autoscalers;
use conditions::Conditions;
use cpu::KnownCpu;
use give_back::GivingBack;
use node::Teller;
use policies::Policies;
use recordings::Recordings;
use requests::Requests;
use starts::{Begun, Early};

/// What the watch needs.
pub(super) struct Context {
    pub(super) client: Client,
    pub(super) node: String,
    pub(super) inputs: SyncSender<Input>,
    pub(super) resizer: Resizer,
    pub(super) cpus: CpuResizer,
    pub(super) requests: RequestResizer,
    pub(super) quotas: Quotas,
    /// Paths of cgroups as they are made.
    pub(super) made: Receiver<String>,
    pub(super) actuation: Actuation,
    pub(super) signals: Signals,
    pub(super) shrink_after: Nanos,
    /// Whether mode Act counts as Observe, and nothing is given back.
    pub(super) only_observes: bool,
    /// Whether memory requests may be changed where a policy asks for it.
    pub(super) moves_requests: bool,
    /// Set once this node's pods were listed.
    pub(super) knows: Arc<AtomicBool>,
    /// To whoever decides when containers are made; `None` where nobody does.
    pub(super) told: Option<nri::Told>,
    /// What is told of those that are only watched.
    pub(super) observed: UnboundedReceiver<(CgroupId, Observed)>,
}

/// How often a pod is tried again that could not be guarded for a passing reason.
const RETRY: Duration = Duration::from_secs(2);

/// A container, by its pod's uid and its own name ([`pod::WHOLE_POD`] for all of the pod).
type Key = (String, String);

/// A container that is guarded or watched, or was refused.
#[derive(Default)]
struct Known {
    mode: Mode,
    cgroup: Option<CgroupId>,
    /// The runtime's ids of the containers that run in it.
    containers: Vec<String>,
    policy: Option<Policy>,
    refusal: Option<String>,
    /// When Events were last published, by their reason.
    told: BTreeMap<&'static str, Instant>,
    /// Why its namespace allows it nothing, as it was told.
    bounded: Option<Reached>,
    /// The limit that somebody else has set, as written, until it is recorded.
    theirs: Option<String>,
}

/// A container that is or was only watched. What is told of it may come when it is gone already.
struct Watched {
    key: Key,
    pod: ObjectReference,
    mode: Mode,
    /// When an Event was last published.
    told: Option<Instant>,
}

/// A watch of pods that failed is taken up again after this long at least, and after at most `PODS_AGAIN_LAST` and as much of
/// chance. The library's own longest (30 s, client-go's) leaves a pod that starts when the API is back unguarded for a minute:
/// it was seen not to be guarded 20 s after it started. What is listed is one node's pods.
const PODS_AGAIN: Duration = Duration::from_millis(800);
const PODS_AGAIN_LAST: Duration = Duration::from_secs(4);
/// Without a failure for this long the next is a first one.
const PODS_WELL: Duration = Duration::from_secs(30);

/// Watches for ever; broken connections are taken up again with a backoff.
pub(super) async fn watch(context: Context) {
    let api: Api<Pod> = Api::all(context.client.clone());
    let config = watched().fields(&format!("spec.nodeName={}", context.node));
    let again = ExponentialBuilder::new()
        .with_min_delay(PODS_AGAIN)
        .with_max_delay(PODS_AGAIN_LAST)
        .with_jitter()
        .without_max_times();
    let again = ResetTimerBackoff::new(watcher::ExponentialBackoff::from(again), PODS_WELL);
    let mut pods = pin!(watcher(api, config).backoff(again));
    let mut rules = pin!(watcher(policies::api(&context.client), watched()).default_backoff());
    let ranges: Api<LimitRange> = Api::all(context.client.clone());
    let mut ranges = pin!(watcher(ranges, watched()).default_backoff());
    let quotas: Api<ResourceQuota> = Api::all(context.client.clone());
    let mut quotas = pin!(watcher(quotas, watched()).default_backoff());
    let autoscalers = Autoscalers::default();
    let mut scaling = autoscalers::watch(&context.client, &autoscalers.wanted());
    let (begun, mut begun_here) = tokio::sync::mpsc::unbounded_channel();
    let (changed, mut requests_changed) = tokio::sync::mpsc::unbounded_channel();
    let (recorded, mut recorded_here) = tokio::sync::mpsc::unbounded_channel();
    let (way_found, mut way_found_here) = tokio::sync::mpsc::unbounded_channel();
    let conditions = Conditions::new(context.client.clone(), context.node.clone());
    let owed = Arc::new(AtomicU64::new(0));
    let teller = Teller {
        client: context.client.clone(),
        node: context.node.clone(),
        inputs: context.inputs.clone(),
        ways: context.resizer.ways().clone(),
        only_observes: context.only_observes,
        owed: Arc::clone(&owed),
    };
    let _telling = teller.start();
    let mut watch = Watch {
        events: Events::new(context.client.clone(), &context.node),
        allowed: Allowed::new(context.resizer.allowances().clone()),
        context,
        policies: Policies::with(conditions),
        autoscalers,
        seen_horizontal: BTreeMap::new(),
        pods: BTreeMap::new(),
        known: BTreeMap::new(),
        pending: BTreeSet::new(),
        retried: String::new(),
        watched: BTreeMap::new(),
        originals: BTreeMap::new(),
        orders: BTreeMap::new(),
        // A predecessor may have raised by hand what nobody asks for any more.
        is_any_left: Arc::new(AtomicBool::new(true)),
        lowering: None,
        giving_back: GivingBack::default(),
        asking: None,
        way_found,
        is_listed: false,
        begun,
        starting: BTreeMap::new(),
        early: Early::default(),
        recordings: Recordings::new(recorded),
        cpus: BTreeMap::new(),
        cpu_refused: BTreeMap::new(),
        requests: Requests::new(Path::new(LEDGER), changed, owed),
    };
    let mut listed: Vec<String> = Vec::new();
    let mut retry = tokio::time::interval(RETRY);
    // Not polled while there is nothing to try again: a quiet node is not woken for it.
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sample = tokio::time::interval(requests::SAMPLE);
    sample.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            // In this order: who was killed must be told before its pod is gone.
            biased;
            Some((cgroup, observed)) = watch.context.observed.recv() => {
                watch.tell(cgroup, observed);
                continue;
            }
            Some(begun) = begun_here.recv() => {
                watch.begin(begun);
                continue;
            }
            Some(recorded) = recorded_here.recv() => {
                watch.recorded(recorded);
                continue;
            }
            Some(()) = way_found_here.recv() => {
                watch.apply_pending();
                continue;
            }
            Some(path) = watch.context.made.recv() => {
                watch.made(&path);
                continue;
            }
            Some(news) = requests_changed.recv() => {
                watch.take_request_news(news);
                continue;
            }
            event = rules.try_next() => {
                if watch.policies.take(event) {
                    watch.recordings.try_again();
                    watch.tell_of_heaps();
                    watch.apply_all();
                }
                continue;
            }
            // Who changes nothing may not read these, and need not; nothing is asked of a watch that nobody takes from.
            event = ranges.try_next(), if watch.autoscalers.are_wanted() => {
                let news = watch.allowed.take_range(event);
                watch.take_news(news);
                continue;
            }
            event = quotas.try_next(), if watch.autoscalers.are_wanted() => {
                let news = watch.allowed.take_quota(event);
                watch.take_news(news);
                continue;
            }
            Some((kind, event)) = scaling.recv() => {
                let pods = watch.pods.values();
                let has_pods = |namespace: &str| {
                    pods.clone().any(|pod| pod.metadata.namespace.as_deref() == Some(namespace))
                };
                let were_known = watch.autoscalers.are_known();
                let is_new = watch.autoscalers.take(kind, event, has_pods);
                if is_new || watch.autoscalers.are_known() != were_known {
                    watch.apply_all();
                }
                continue;
            }
            event = pods.try_next() => event,
            _ = sample.tick(), if watch.requests.is_any() => {
                watch.requests.sample();
                continue;
            }
            _ = retry.tick(), if watch.is_anything_left() => {
                watch.retry();
                watch.lower_left();
                continue;
            }
        };
        match event {
            Ok(Some(watcher::Event::Init)) => {
                listed.clear();
                watch.context.resizer.ways().forget();
            }
            Ok(Some(watcher::Event::InitApply(pod))) => {
                listed.extend(pod.uid());
                watch.apply(pod);
            }
            Ok(Some(watcher::Event::InitDone)) => {
                watch.keep_only(&listed);
                watch.is_listed = true;
                watch.context.knows.store(true, Ordering::Relaxed);
            }
            Ok(Some(watcher::Event::Apply(pod))) => watch.apply(pod),
            Ok(Some(watcher::Event::Delete(pod))) => {
                watch.forget(&pod.uid().unwrap_or_default());
                watch.step_requests();
            }
            Ok(None) => return,
            Err(error) => tracing::warn!(%error, "the pod watch is interrupted"),
        }
    }
}

struct Watch {
    context: Context,
    events: Events,
    policies: Policies,
    allowed: Allowed,
    autoscalers: Autoscalers,
    /// Which HorizontalPodAutoscaler was told of a pod, by its uid.
    seen_horizontal: BTreeMap<String, String>,
    /// This node's, by uid: policies may come to mean them.
    pods: BTreeMap<String, Pod>,
    known: BTreeMap<Key, Known>,
    /// Pods of which something could not be guarded for a passing reason, by uid.
    pending: BTreeSet<String>,
    /// Where among them the next is looked for.
    retried: String,
    /// Those that are or were only watched, by their cgroup.
    watched: BTreeMap<CgroupId, Watched>,
    /// Originals that were written onto pods: what the API says of a pod may be older than that.
    originals: BTreeMap<(String, &'static str, String), String>,
    /// Of each pod with something guarded in it.
    orders: BTreeMap<String, Order>,
    /// Whether a limit may be raised by hand for which nobody is responsible any more.
    is_any_left: Arc<AtomicBool>,
    /// While such limits are lowered.
    lowering: Option<JoinHandle<()>>,
    /// While limits are given back that the API knows, and nobody asks for any more.
    giving_back: GivingBack,
    /// While the API is asked how limits are changed here.
    asking: Option<JoinHandle<()>>,
    /// To this watch: that is known.
    way_found: UnboundedSender<()>,
    /// To this watch: cgroups of containers that start, once they have limits.
    begun: UnboundedSender<Begun>,
    /// Their paths, until the API says whose they are.
    starting: BTreeMap<Key, PathBuf>,
    /// Cgroups of pods that the API has not told of yet.
    early: Early,
    /// What limits and requests were, on its way onto their pods.
    recordings: Recordings,
    cpus: BTreeMap<Key, KnownCpu>,
    /// Why a container does not get what a policy says of CPU, as it was told, by the reason.
    cpu_refused: BTreeMap<(Key, &'static str), String>,
    requests: Requests,
    /// Whether this node's pods were listed: until then whom they are for is not known.
    is_listed: bool,
}

impl Watch {
    /// What is asked for a pod, whether it runs or not, without what autoscalers claim.
    fn wished(&self, pod: &Pod, seen: &pod::Pod) -> pod::Wishes {
        let mut wishes = pod::all_wishes(seen, self.policies.all());
        if self.context.only_observes {
            pod::only_observe(&mut wishes);
        }
        pod::yield_limits(&mut wishes, |container| self.claims(pod, container));
        wishes
    }

    /// Whether it is known what is asked for a pod.
    fn knows(&self, seen: &pod::Pod) -> bool {
        self.policies.are_known(&seen.namespace) || !pod::needs_policies(seen)
    }

    /// The policies have changed, or what else the wishes of pods come from.
    fn apply_all(&mut self) {
        let pods: Vec<Pod> = self.pods.values().cloned().collect();
        for pod in pods {
            self.follow_pod(pod);
        }
        // Among all of them, not among those so far.
        self.step_requests();
    }

    fn apply(&mut self, pod: Pod) {
        self.follow_pod(pod);
        self.step_requests();
    }

    fn follow_pod(&mut self, pod: Pod) {
        let seen = self.seen(&pod);
        let uid = seen.uid.clone();
        let allowances = self.context.resizer.allowances();
        allowances.with(|all| all.pod(counted(&pod)));
        // What it requests others cannot have, whatever is not known of it yet.
        self.summarize(&seen);
        self.pending.remove(&uid);
        let are_known = self.knows(&seen);
        let mut wishes = self.wished(&pod, &seen);
        // As soon as it is placed here, before anything of it runs: its containers may be about to be made.
        if self.waits_for_autoscalers(&seen, &wishes) {
            self.pods.insert(uid.clone(), pod);
            self.pending.insert(uid);
            return;
        }
        self.tell_of_rooms(&seen, &wishes);
        pod::only_running(&mut wishes);
        self.tell_of_horizontal(&pod, &wishes);
        if !are_known {
            // A policy may yet say it.
            wishes.retain(|_, wish| !matches!(wish, Err(Refusal::NoMaximum)));
        }
        if are_known && !self.context.only_observes {
            self.give_back_left(&seen, &wishes);
        }
        let others = self
            .keys(&uid)
            .filter(|(_, name)| !wishes.contains_key(name));
        let others: Vec<Key> = others.cloned().collect();
        for key in others {
            self.forget_cgroup(&key);
            self.known.remove(&key);
        }
        for (name, wish) in wishes {
            let key = (uid.clone(), name);
            let done = match wish {
                // Who is not to be raised any more is not: that lets go of the controller's mode, and changes no limit.
                Ok(wish) if wish.mode == Mode::Act && self.is_given_back(&key) => {
                    self.pending.insert(uid.clone());
                    Ok(())
                }
                Ok(wish) if wish.mode == Mode::Act => self.guard(&key, &pod, &seen, &wish),
                Ok(wish) => self.observe(&key, &pod, &seen, &wish),
                Err(refusal) => {
                    self.forget_cgroup(&key);
                    self.refuse(&key, &pod, refusal.reason(), refusal.to_string());
                    Ok(())
                }
            };
            if let Err(error) = done {
                tracing::warn!(pod.namespace = seen.namespace, pod.name = seen.name, container = key.1, %error, "a container is not guarded");
                self.pending.insert(uid.clone());
            }
        }
        if self.policies.are_known(&seen.namespace) && !self.context.only_observes {
            self.follow_cpu(&pod, &seen);
        }
        self.follow_requests(&pod, &seen);
        self.pods.insert(uid.clone(), pod);
        self.made_before(&uid);
        let keys: Vec<Key> = self.keys(&uid).cloned().collect();
        for key in keys {
            self.tell_of_bound(&key);
        }
    }

    /// What autoscalers claim of a container.
    fn claims(&self, pod: &Pod, container: &str) -> Claims {
        let namespace = pod.namespace().unwrap_or_default();
        let all = self.autoscalers.of(&namespace);
        if all.is_empty() {
            return Claims::default();
        }
        claims(&workloads(pod), container, all)
    }

    /// A pod as the API has it, with what was written onto it since.
    fn seen(&self, pod: &Pod) -> pod::Pod {
        let mut seen = convert(pod);
        let own = self
            .originals
            .range((seen.uid.clone(), "", String::new())..);
        let own = own.take_while(|((uid, _, _), _)| *uid == seen.uid);
        let written: Vec<(&str, &str, &str)> = own
            .map(|((_, annotation, name), original)| {
                (*annotation, name.as_str(), original.as_str())
            })
            .collect();
        for (annotation, name, original) in written {
            let value = pod::with_original(&seen, annotation, name, original);
            seen.annotations.insert(annotation.to_owned(), value);
        }
        seen
    }

    /// What is known of a pod's containers.
    fn keys<'a>(&'a self, uid: &'a str) -> impl Iterator<Item = &'a Key> {
        let from = (uid.to_owned(), String::new());
        let known = self.known.range(from..).map(|(key, _)| key);
        known.take_while(move |(own, _)| own == uid)
    }

    /// What namespaces allow has changed, or has come to be known.
    fn take_news(&mut self, news: News) {
        if news == News::None {
            return;
        }
        self.bounds_changed();
        if news == News::Rules {
            self.apply_all();
        }
    }

    fn bounds_changed(&mut self) {
        self.send(Input::Bounds);
        self.context.cpus.bounds_changed();
        let keys: Vec<Key> = self.known.keys().cloned().collect();
        for key in keys {
            self.tell_of_bound(&key);
        }
    }

    fn send(&self, input: Input) {
        if self.context.inputs.send(input).is_err() {
            tracing::error!("the controller has ended");
        }
    }

    /// Held while a request of a pod is under way.
    fn order(&mut self, uid: &str) -> Order {
        Order::clone(self.orders.entry(uid.to_owned()).or_default())
    }

    fn forget_cgroup(&mut self, key: &Key) {
        let known = self.known.get_mut(key);
        if let Some(cgroup) = known.and_then(|known| known.cgroup.take()) {
            let targets = self.context.resizer.targets();
            targets.with(|targets| drop(targets.remove(&cgroup)));
            self.send(Input::Forget(cgroup));
            self.is_any_left.store(true, Ordering::Relaxed);
        }
    }

    fn forget(&mut self, uid: &str) {
        let cpus = self.cpus.keys().filter(|(own, _)| own == uid);
        let cpus: Vec<Key> = cpus.cloned().collect();
        for key in cpus {
            self.forget_cpu(&key);
        }
        self.starting.retain(|(own, _), _| own != uid);
        self.cpu_refused.retain(|((own, _), _), _| own != uid);
        self.recordings.forget(uid);
        self.giving_back.forget(uid);
        let keys: Vec<Key> = self.keys(uid).cloned().collect();
        for key in keys {
            self.forget_cgroup(&key);
            self.known.remove(&key);
        }
        self.watched.retain(|_, watched| watched.key.0 != uid);
        self.seen_horizontal.remove(uid);
        let allowances = self.context.resizer.allowances();
        allowances.with(|all| all.forget(uid));
        self.requests.forget_pod(uid);
        if let Some(told) = &self.context.told {
            told.forget(uid);
        }
        self.originals.retain(|(own, _, _), _| own != uid);
        self.orders.remove(uid);
        self.pods.remove(uid);
        self.pending.remove(uid);
    }

    fn keep_only(&mut self, listed: &[String]) {
        let gone = self.pods.keys().filter(|uid| !listed.contains(uid));
        let gone: Vec<String> = gone.cloned().collect();
        for uid in gone {
            self.forget(&uid);
        }
        self.requests.keep_only(listed);
    }
}
