//! Limits that were raised, and for which nobody asks any more, are what they were.
//!
//! An agent that ends leaves limits as they are: its successor goes on with them. When its DaemonSet is deleted there
//! will be none, so the last thing that it does is to give back what it can: what is not in use, for as long as the
//! kubelet lets it live. It cannot do so once its account is gone, so whoever takes everything away deletes the
//! DaemonSet first ([`uninstall`]).

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bellows_core::{
    allowance::What,
    bucket::Urgency,
    elastic::Mode,
    pod::{self, CpuWish, Level, Raised, way::Way},
    quantity,
};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams},
};
use thiserror::Error;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep, timeout},
};

use super::{Key, RETRY, Watch, node, one};
use crate::{
    actuate::{
        containers::Owner as _,
        pod_cpu::CpuResizer,
        resize::{CARRIED_OUT, Change, Order, Probed, Resizer},
        shrink,
    },
    attribution::{api::Pod, pods::convert},
    cgroup::Cgroup,
    quota::Quotas,
    run::{RunError, api, restore::by_hand_back},
};

/// For how long an agent that ends for good gives back: less than the kubelet lets it live (`terminationGracePeriod` in
/// `deploy/chart/templates/daemonset.yaml`).
const LAST: Duration = Duration::from_secs(20);
/// How long it takes to find out whether it does.
const ASKED: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_secs(1);
/// How many limits are given back beside the watch at a time.
const AT_A_TIME: usize = 4;
/// How seldom at last what the API does not take.
const LONGEST: Duration = Duration::from_secs(60);
/// For how long the end of all agents is waited for. A node that does not answer must not keep Bellows installed.
const ALL_AGENTS: Duration = Duration::from_secs(180);

/// Limits that are given back beside the watch.
pub(super) struct GivingBack {
    tries: BTreeMap<(Key, What), Try>,
    few: Arc<Semaphore>,
}

/// The last try of a limit.
struct Try {
    task: JoinHandle<()>,
    begun: Instant,
    /// How often in a row the API has not taken it.
    in_vain: Arc<AtomicU32>,
}

/// Why a limit is not what it was.
#[derive(Debug, Error)]
enum NotBack {
    #[error("more than {0} is in use")]
    InUse(String),
    #[error("{0}")]
    Refused(String),
    /// It may come all the same.
    #[error("{0}")]
    Uncertain(String),
}

impl Default for GivingBack {
    fn default() -> Self {
        Self {
            tries: BTreeMap::new(),
            few: Arc::new(Semaphore::new(AT_A_TIME)),
        }
    }
}

impl GivingBack {
    /// Whether one may be tried now: with the turn, which is held until it has ended, and what counts its failures. Who has
    /// no turn does not wait for it: it is guarded if somebody asks for it meanwhile.
    fn may_begin(&self, own: &(Key, What)) -> Option<(OwnedSemaphorePermit, Arc<AtomicU32>)> {
        let before = self.tries.get(own);
        if before.is_some_and(|before| !before.may_be_repeated()) {
            return None;
        }
        let turn = Arc::clone(&self.few).try_acquire_owned().ok()?;
        let in_vain = before.map(|before| Arc::clone(&before.in_vain));
        Some((turn, in_vain.unwrap_or_default()))
    }

    pub(super) fn forget(&mut self, uid: &str) {
        self.tries.retain(|((own, _), _), _| own != uid);
    }
}

impl Try {
    fn may_be_repeated(&self) -> bool {
        let in_vain = self.in_vain.load(Ordering::Relaxed);
        self.task.is_finished() && self.begun.elapsed() >= not_before(in_vain)
    }
}

/// How long after a try that the API has not taken the next may begin. What is in use is not asked for, and is looked at with
/// the pod.
fn not_before(in_vain: u32) -> Duration {
    let doubled = in_vain.checked_sub(1).map(|doubled| doubled.min(5));
    let wait = doubled.map(|doubled| RETRY * (1 << doubled));
    wait.unwrap_or_default().min(LONGEST)
}

impl Watch {
    /// Gives back what is left raised of a pod and nobody asks for any more, beside the watch: to reclaim page cache takes
    /// seconds, and so may the API. It is tried again until the API says that it is so, few at a time and ever more seldom
    /// while the API refuses it: a policy that is deleted leaves all containers of a node at once.
    pub(super) fn give_back_left(&mut self, seen: &pod::Pod, wishes: &pod::Wishes) {
        for raised in pod::left_raised(seen) {
            let wish = wishes.get(&raised.container);
            let wish = wish.and_then(|wish| wish.as_ref().ok());
            if wish.is_some_and(|wish| wish.mode == Mode::Act) {
                continue;
            }
            self.pending.insert(seen.uid.clone());
            let key = (seen.uid.clone(), raised.container.clone());
            let change = back(&raised);
            self.try_back((key, What::MemoryLimit), seen, change, Some(raised));
        }
    }

    /// Gives back the CPU limit of a container that has ended while that stood raised: nobody lowers it any more.
    pub(super) fn give_back_cpu(&mut self, key: &Key, seen: &pod::Pod, wish: &CpuWish) {
        let level = Level::Container(wish.index);
        let (from, to) = (wish.limit_text.clone(), wish.original_text.clone());
        let change = (level, Change::cpu(level, from, to));
        self.pending.insert(seen.uid.clone());
        self.try_back((key.clone(), What::CpuLimit), seen, change, None);
    }

    /// Begins to give a limit back, unless it is too soon. Of memory room is made for it first.
    fn try_back(
        &mut self,
        own: (Key, What),
        seen: &pod::Pod,
        (level, change): (Level, Change),
        raised: Option<Raised>,
    ) {
        // With any resize the kubelet would take back another that stands on the node alone.
        if self.context.resizer.is_only_by_hand(&seen.uid, None) {
            return;
        }
        let Some((turn, in_vain)) = self.giving_back.may_begin(&own) else {
            return;
        };
        let (resizer, order) = (self.context.resizer.clone(), self.order(&seen.uid));
        let (seen, counted) = (seen.clone(), Arc::clone(&in_vain));
        let container = own.0.1.clone();
        let task = tokio::spawn(async move {
            let given = async {
                if let Some(raised) = &raised {
                    room_is_made(&seen, raised).await?;
                }
                given_back(&resizer, &order, &seen, (level, change)).await
            };
            let given = given.await;
            drop(turn);
            if let Err(why) = &given {
                not_given_back(&seen, &container, why);
            }
            until_carried_out(given, &counted).await;
        });
        let last = Try {
            task,
            begun: Instant::now(),
            in_vain,
        };
        self.giving_back.tries.insert(own, last);
    }

    /// Whether a container's memory limit is being given back: whoever guards it meanwhile would see it lowered in the middle
    /// of a burst.
    pub(super) fn is_given_back(&self, key: &Key) -> bool {
        let last = self
            .giving_back
            .tries
            .get(&(key.clone(), What::MemoryLimit));
        last.is_some_and(|last| !last.task.is_finished())
    }
}

fn not_given_back(seen: &pod::Pod, container: &str, why: &NotBack) {
    tracing::warn!(
        pod.namespace = seen.namespace,
        pod.name = seen.name,
        container,
        %why,
        "a limit is not given back yet"
    );
}

/// In the order of the pod's requests.
async fn given_back(
    resizer: &Resizer,
    order: &Order,
    seen: &pod::Pod,
    (level, change): (Level, Change),
) -> Result<(), NotBack> {
    resizer.may_ask(Urgency::Later).await;
    let way = way(resizer, seen, level, &change).await?;
    let _turn = order.lock().await;
    changed_back(resizer, way, seen, change).await
}

/// The API's answer is not the end of it: whoever guards the container before the kubelet has carried it out, and so takes the
/// limit in force for its own, is lowered in the middle of a burst.
async fn until_carried_out(given: Result<(), NotBack>, in_vain: &AtomicU32) {
    match given {
        Ok(()) => in_vain.store(0, Ordering::Relaxed),
        Err(NotBack::InUse(_)) => return,
        Err(NotBack::Refused(_) | NotBack::Uncertain(_)) => {
            in_vain.fetch_add(1, Ordering::Relaxed);
        }
    }
    if !matches!(given, Err(NotBack::Refused(_))) {
        sleep(CARRIED_OUT).await;
    }
}

/// The kubelet refuses a limit below usage, does not look again until the pod changes, and carries out no other resize of
/// the pod meanwhile.
async fn room_is_made(seen: &pod::Pod, raised: &Raised) -> Result<(), NotBack> {
    let Raised {
        level, rest, id, ..
    } = raised;
    let path = one::find(&seen.uid, *level, id.as_deref());
    let to = quantity::parse(rest).map_err(|error| NotBack::Refused(error.to_string()))?;
    if let Some(cgroup) = path.and_then(|path| Cgroup::open(&path).ok()) {
        let made = spawn_blocking(move || shrink::make_room_in(&cgroup, to));
        if !matches!(made.await, Ok(Ok(true))) {
            return Err(NotBack::InUse(rest.clone()));
        }
    }
    Ok(())
}

fn back(raised: &Raised) -> (Level, Change) {
    let (from, to) = (raised.limit.clone(), raised.rest.clone());
    (raised.level, Change::memory(raised.level, from, to))
}

async fn way(
    resizer: &Resizer,
    seen: &pod::Pod,
    level: Level,
    change: &Change,
) -> Result<Way, NotBack> {
    let probed = Probed::of(seen, level, change.clone());
    resizer.ways().of(&probed).await.map_err(NotBack::Refused)
}

/// Whoever is guarded in the same pod is told of it, and what was raised there by hand goes with it: with any resize the
/// kubelet sets all limits to what the spec says.
async fn changed_back(
    resizer: &Resizer,
    way: Way,
    seen: &pod::Pod,
    change: Change,
) -> Result<(), NotBack> {
    let named = (seen.namespace.as_str(), seen.name.as_str());
    let (patched, is_uncertain) = resizer.patch_beside(&seen.uid, way, named, change).await;
    match patched {
        Ok(Ok(_patched)) => Ok(()),
        Ok(Err(error)) if is_uncertain => Err(NotBack::Uncertain(error.to_string())),
        // It may have changed since, which will be told.
        Ok(Err(error)) => Err(NotBack::Refused(error.to_string())),
        Err(_elapsed) => Err(NotBack::Uncertain("the API does not answer".to_owned())),
    }
}

/// Who gives back when it ends for good.
pub(in crate::run) struct Leaving {
    pub(in crate::run) client: Client,
    pub(in crate::run) node: String,
    /// In the agent's own namespace.
    pub(in crate::run) daemon_set: String,
    pub(in crate::run) movers: Movers,
}

/// Whoever moves limits beside the controller: what is given back must not be raised again.
pub(in crate::run) struct Movers {
    pub(in crate::run) quotas: Quotas,
    pub(in crate::run) cpus: CpuResizer,
    pub(in crate::run) resizer: Resizer,
}

impl Movers {
    /// Ends them; tasks that are under way find nothing to do any more.
    fn stop(&self) {
        self.quotas.stop();
        self.cpus.containers().targets().with(BTreeMap::clear);
        self.resizer.targets().with(BTreeMap::clear);
    }
}

impl Leaving {
    /// The end of an agent whose controller has ended: gives back all that is raised on its node, if it is for good.
    pub(in crate::run) async fn leave(&self) {
        if !self.is_for_good().await {
            return;
        }
        tracing::info!("the DaemonSet is deleted: limits are given back");
        self.movers.stop();
        node::forget(&self.client, &self.node).await;
        let begun = Instant::now();
        loop {
            let rest = LAST.saturating_sub(begun.elapsed());
            match timeout(rest, self.give_back_all()).await {
                Ok(Ok(0)) => return,
                Ok(Ok(_some)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "limits are not given back yet"),
                Err(_elapsed) => {
                    tracing::error!("some limits stay raised: there was no time left");
                    return;
                }
            }
            sleep(AGAIN).await;
        }
    }

    /// A DaemonSet that is there has a successor for this agent, and so has one of which nothing is known.
    async fn is_for_good(&self) -> bool {
        let api: Api<DaemonSet> = Api::default_namespaced(self.client.clone());
        match timeout(ASKED, api.get_metadata_opt(&self.daemon_set)).await {
            Ok(Ok(found)) => found.is_none_or(|found| found.metadata.deletion_timestamp.is_some()),
            Ok(Err(error)) => {
                tracing::warn!(%error, "limits stay: it is not known whether this agent comes back");
                false
            }
            Err(_elapsed) => {
                tracing::warn!("limits stay: the API does not say whether this agent comes back");
                false
            }
        }
    }

    /// Returns how many limits were still raised.
    async fn give_back_all(&self) -> kube::Result<usize> {
        let api: Api<Pod> = Api::all(self.client.clone());
        let own = ListParams::default().fields(&format!("spec.nodeName={}", self.node));
        // What the API says does not tell of these.
        let by_hand = spawn_blocking(by_hand_back).await.unwrap_or(false);
        let mut found = usize::from(!by_hand);
        for pod in api.list(&own).await? {
            let seen = convert(&pod);
            for raised in pod::left_raised(&seen) {
                found += 1;
                if let Err(why) = self.give_back(&seen, &raised).await {
                    not_given_back(&seen, &raised.container, &why);
                }
            }
            let cpus = pod::cpu_wishes(&seen, &[]).into_values().flatten();
            let cpus = cpus.map(|wish| {
                let level = Level::Container(wish.index);
                (
                    level,
                    Change::cpu(level, wish.limit_text, wish.original_text),
                )
            });
            // Where there is no room the kubelet puts it off, and gives it back as soon as there is.
            let requests = pod::request_wishes(&seen, &[]).into_values().flatten();
            let requests = requests.map(|wish| {
                let (from, to) = (wish.request_text, wish.original_text);
                let change = Change::memory_request(wish.index, from, to);
                (Level::Container(wish.index), change)
            });
            for (level, change) in cpus.chain(requests) {
                found += 1;
                if let Err(why) = self.change_back(&seen, level, change).await {
                    tracing::warn!(
                        pod.namespace = seen.namespace,
                        pod.name = seen.name,
                        %why,
                        "a CPU limit or memory request is not given back yet"
                    );
                }
            }
        }
        Ok(found)
    }

    async fn give_back(&self, seen: &pod::Pod, raised: &Raised) -> Result<(), NotBack> {
        room_is_made(seen, raised).await?;
        let (level, change) = back(raised);
        self.change_back(seen, level, change).await
    }

    /// Nobody else moves anything any more: it is in nobody's order, and waits for no token.
    async fn change_back(
        &self,
        seen: &pod::Pod,
        level: Level,
        change: Change,
    ) -> Result<(), NotBack> {
        let resizer = &self.movers.resizer;
        let way = way(resizer, seen, level, &change).await?;
        changed_back(resizer, way, seen, change).await
    }
}

/// `bellows uninstall`: deletes a DaemonSet of this pod's namespace, and waits until its agents have ended. Returns
/// whether they have.
///
/// # Errors
///
/// When the API cannot be asked.
pub async fn uninstall(daemon_set: &str) -> Result<bool, RunError> {
    let config = api::config().await?;
    let api: Api<DaemonSet> = Api::default_namespaced(Client::try_from(config)?);
    // It is there until its pods have ended.
    match api.delete(daemon_set, &DeleteParams::foreground()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(true),
        Err(error) => return Err(error.into()),
        Ok(_deleting) => {}
    }
    let begun = Instant::now();
    while begun.elapsed() < ALL_AGENTS {
        match api.get_metadata_opt(daemon_set).await {
            Ok(None) => return Ok(true),
            Ok(Some(_)) => {}
            Err(error) => tracing::warn!(%error, "asked again"),
        }
        sleep(AGAIN).await;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use bellows_core::{Bytes, CgroupId, decide::ByHand, pod::MANAGER};
    use futures::FutureExt as _;
    use serde_json::json;

    use super::{
        super::bed::{Bed, key},
        *,
    };
    use crate::guard::Requester as _;

    /// A policy is gone while limits are raised: others go on being guarded, whatever the API does.
    #[tokio::test]
    async fn what_is_left_raised_is_given_back_beside_the_watch() {
        let mut bed = Bed::new().await;
        let app = key("app");
        let follow = |bed: &mut Bed, mode, limit| {
            bed.sees_of(mode, limit, MANAGER);
            let pod = bed.watch.pods["0f8c"].clone();
            bed.watch.apply(pod);
        };
        follow(&mut bed, "Act", "256Mi");
        assert!(!bed.watch.is_given_back(&app));
        follow(&mut bed, "Off", "256Mi");
        assert!(bed.watch.is_given_back(&app) && bed.watch.pending.contains("0f8c"));
        let task = |bed: &Bed| {
            bed.watch.giving_back.tries[&(app.clone(), What::MemoryLimit)]
                .task
                .id()
        };
        let first = task(&bed);
        follow(&mut bed, "Off", "256Mi");
        assert_eq!(task(&bed), first, "one at a time");
        // Nor is it guarded before that has ended.
        bed.sees_of("Act", "256Mi", MANAGER);
        bed.is_guarded();
        bed.watch.pending.clear();
        follow(&mut bed, "Act", "512Mi");
        assert_eq!(bed.limit().as_deref(), Some("256Mi"));
        assert!(bed.watch.pending.contains("0f8c"));
        bed.watch.forget("0f8c");
        assert!(bed.watch.giving_back.tries.is_empty());
    }

    /// A limit stays raised for as long as it is in use: that is no reason to raise it further.
    #[tokio::test]
    async fn who_is_only_watched_from_now_on_is_not_raised_while_its_limit_is_given_back() {
        for mode in ["Observe", "Recommend"] {
            let mut bed = Bed::new().await;
            let app = key("app");
            bed.sees_of("Act", "256Mi", MANAGER);
            bed.is_guarded();
            bed.sees_of(mode, "256Mi", MANAGER);
            let pod = bed.watch.pods["0f8c"].clone();
            bed.watch.apply(pod);
            assert!(bed.watch.is_given_back(&app));
            assert!(bed.watch.known[&app].cgroup.is_none(), "{mode}");
            let targets = bed.watch.context.resizer.targets();
            assert!(targets.with(|targets| targets.is_empty()), "{mode}");
        }
    }

    /// With the patch of one container the kubelet may set the limit of another: nobody raises that beyond it meanwhile, and
    /// nothing is asked for where the patch could not carry it.
    #[tokio::test]
    async fn whoever_is_guarded_beside_it_is_told() {
        let mut bed = Bed::new().await;
        bed.sees_of("Act", "64Mi", MANAGER);
        bed.is_guarded();
        bed.raised_by_hand(Some(Bytes::mib(128)));
        let (_, seen, _) = bed.wish();
        let resizer = bed.watch.context.resizer.clone();
        let may = || resizer.by_hand(CgroupId(1), Bytes::mib(256));
        let changed = || {
            let change = Change::memory(Level::Container(1), "512Mi".to_owned(), "64Mi".to_owned());
            changed_back(&resizer, Way::Resize, &seen, change)
        };
        assert_eq!(may(), ByHand::Yes);
        let mut asked = Box::pin(changed());
        assert!(asked.as_mut().now_or_never().is_none());
        assert_eq!(may(), ByHand::NotYet);
        let targets = resizer.targets();
        targets.with(|targets| {
            targets
                .values_mut()
                .for_each(|target| target.way = Way::Node);
        });
        let refused = changed().now_or_never();
        assert!(matches!(refused, Some(Err(NotBack::Refused(_)))));
    }

    #[tokio::test]
    async fn it_is_not_over_before_the_kubelet_has_carried_it_out() {
        let in_vain = AtomicU32::new(3);
        let ends = |given| until_carried_out(given, &in_vain).now_or_never().is_some();
        let why = || "for a reason".to_owned();
        assert!(ends(Err(NotBack::InUse(why()))));
        assert_eq!(in_vain.load(Ordering::Relaxed), 3);
        assert!(ends(Err(NotBack::Refused(why()))));
        assert!(!ends(Err(NotBack::Uncertain(why()))));
        assert_eq!(in_vain.load(Ordering::Relaxed), 5);
        assert!(!ends(Ok(())));
        assert_eq!(in_vain.load(Ordering::Relaxed), 0);
    }

    /// Of two containers one has ended while it was lent CPU, and is not started again.
    #[tokio::test]
    async fn a_cpu_limit_is_given_back_whose_container_has_ended() {
        let of = async |limit: &str, manager: &str, state: serde_json::Value| {
            let mut bed = Bed::new().await;
            let own = json!({ "f:resources": { "f:limits": { "f:cpu": {} } } });
            let fields = json!({ "f:spec": { "f:containers": { r#"k:{"name":"app"}"#: own } } });
            let pod = json!({
                "metadata": {
                    "name": "workspace", "namespace": "dev", "uid": "0f8c",
                    "annotations": { pod::ORIGINAL_CPU: "app=250m" },
                    "managedFields": [{ "manager": manager, "fieldsV1": fields }],
                },
                "spec": { "containers": [{ "name": "app", "resources": { "limits": { "cpu": limit } } }] },
                "status": { "phase": "Running", "containerStatuses": [{
                    "name": "app", "containerID": "containerd://1f", "state": state,
                }] },
            });
            let pod: Pod = serde_json::from_value(pod).unwrap();
            let seen = bed.watch.seen(&pod);
            bed.watch.follow_cpu(&pod, &seen);
            let own = (key("app"), What::CpuLimit);
            let is_begun = bed.watch.giving_back.tries.contains_key(&own);
            assert_eq!(is_begun, bed.watch.pending.contains("0f8c"));
            assert!(!bed.watch.is_given_back(&own.0), "of memory nothing is");
            is_begun
        };
        let ended = || json!({ "terminated": { "exitCode": 0 } });
        assert!(of("2", MANAGER, ended()).await);
        assert!(!of("250m", MANAGER, ended()).await);
        assert!(!of("2", "kubectl", ended()).await);
        assert!(!of("2", MANAGER, json!({ "running": {} })).await);
    }

    #[tokio::test]
    async fn few_are_given_back_at_a_time_and_what_is_refused_ever_more_seldom() {
        assert_eq!(not_before(0), Duration::ZERO);
        let waits = [1, 2, 5, 6, u32::MAX].map(|in_vain| not_before(in_vain).as_secs());
        assert_eq!(waits, [2, 4, 32, 60, 60]);
        let mut bed = Bed::new().await;
        let app = key("app");
        let few = Arc::clone(&bed.watch.giving_back.few);
        let others = few.acquire_many(u32::try_from(AT_A_TIME).unwrap()).await;
        let others = others.unwrap();
        let follow = |bed: &mut Bed| {
            bed.sees_of("Off", "256Mi", MANAGER);
            let pod = bed.watch.pods["0f8c"].clone();
            bed.watch.apply(pod);
            bed.watch.is_given_back(&key("app"))
        };
        assert!(!follow(&mut bed) && bed.watch.pending.contains("0f8c"));
        drop(others);
        assert!(follow(&mut bed));
        // In the order of whoever else comes to ask for something of the pod.
        assert!(bed.watch.orders.contains_key("0f8c"));
        let last = (app, What::MemoryLimit);
        let last = bed.watch.giving_back.tries.get_mut(&last).unwrap();
        last.task.abort();
        drop((&mut last.task).await);
        last.in_vain.store(1, Ordering::Relaxed);
        assert!(!follow(&mut bed), "too soon");
    }
}
