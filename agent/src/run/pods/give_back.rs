//! Limits that were raised, and for which nobody asks any more, are what they were.
//!
//! An agent that ends leaves limits as they are: its successor goes on with them. When its DaemonSet is deleted there
//! will be none, so the last thing that it does is to give back what it can: what is not in use, for as long as the
//! kubelet lets it live. It cannot do so once its account is gone, so whoever takes everything away deletes the
//! DaemonSet first ([`uninstall`]).

use std::{collections::BTreeMap, time::Duration};

use bellows_core::{
    elastic::Mode,
    pod::{self, Level, Raised},
    quantity,
};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams},
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

use super::{Key, Watch, node, one};
use crate::{
    actuate::{
        containers::Owner as _,
        pod_cpu::CpuResizer,
        resize::{Change, Order, Probed, Resizer, TIMEOUT, Ways, limits_patch, patched},
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
/// For how long the end of all agents is waited for. A node that does not answer must not keep Bellows installed.
const ALL_AGENTS: Duration = Duration::from_secs(180);

impl Watch {
    /// Gives back what is left raised of a pod and nobody asks for any more, beside the watch: to reclaim page cache takes
    /// seconds, and so may the API. It is tried again until the API says that it is so.
    pub(super) fn give_back_left(&mut self, seen: &pod::Pod, wishes: &pod::Wishes) {
        for raised in pod::left_raised(seen) {
            let wish = wishes.get(&raised.container);
            let wish = wish.and_then(|wish| wish.as_ref().ok());
            if wish.is_some_and(|wish| wish.mode == Mode::Act) {
                continue;
            }
            self.pending.insert(seen.uid.clone());
            let key = (seen.uid.clone(), raised.container.clone());
            // With any resize the kubelet would take back another that stands on the node alone.
            let resizer = &self.context.resizer;
            if self.is_given_back(&key) || resizer.is_only_by_hand(&seen.uid, None) {
                continue;
            }
            let (client, ways) = (self.context.client.clone(), resizer.ways().clone());
            let (order, seen) = (self.order(&seen.uid), seen.clone());
            let giving = tokio::spawn(async move {
                if let Err(why) = give_back(&client, &ways, order, &seen, &raised).await {
                    tracing::warn!(
                        pod.namespace = seen.namespace,
                        pod.name = seen.name,
                        container = raised.container,
                        why,
                        "a limit is not given back yet"
                    );
                }
            });
            self.giving_back.insert(key, giving);
        }
    }

    /// Whether a container's limit is being given back: whoever guards it meanwhile would see it lowered in the middle of a
    /// burst.
    pub(super) fn is_given_back(&self, key: &Key) -> bool {
        let giving = self.giving_back.get(key);
        giving.is_some_and(|giving| !giving.is_finished())
    }
}

/// As soon as usage allows it: the kubelet refuses a limit below usage, does not look again until the pod changes, and
/// carries out no other resize of the pod meanwhile.
async fn give_back(
    client: &Client,
    ways: &Ways,
    order: Order,
    seen: &pod::Pod,
    raised: &Raised,
) -> Result<(), String> {
    let Raised {
        level,
        limit,
        original,
        id,
        ..
    } = raised;
    let path = one::find(&seen.uid, *level, id.as_deref());
    let to = quantity::parse(original).map_err(|error| error.to_string())?;
    if let Some(cgroup) = path.and_then(|path| Cgroup::open(&path).ok()) {
        let made = spawn_blocking(move || shrink::make_room_in(&cgroup, to));
        if !matches!(made.await, Ok(Ok(true))) {
            return Err(format!("more than {original} is in use"));
        }
    }
    let _turn = order.lock_owned().await;
    let change = Change::memory(*level, limit.clone(), original.clone());
    changed_back(client, ways, seen, *level, change).await
}

async fn changed_back(
    client: &Client,
    ways: &Ways,
    seen: &pod::Pod,
    level: Level,
    change: Change,
) -> Result<(), String> {
    let patch = limits_patch(&seen.uid, std::slice::from_ref(&change));
    let way = ways.of(&Probed::of(seen, level, change)).await?;
    let named = (seen.namespace.as_str(), seen.name.as_str());
    match timeout(TIMEOUT, patched(client, way, named, &patch)).await {
        Ok(Ok(_patched)) => Ok(()),
        // It has changed since, which will be told.
        Ok(Err(kube::Error::Api(status))) if [404, 409, 422].contains(&status.code) => {
            tracing::debug!(pod.name = seen.name, %status, "a limit is not what it was");
            Ok(())
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err("the API does not answer".to_owned()),
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
                let (client, ways) = (&self.client, self.movers.resizer.ways());
                let given = give_back(client, ways, Order::default(), &seen, &raised).await;
                if let Err(why) = given {
                    tracing::warn!(
                        pod.namespace = seen.namespace,
                        pod.name = seen.name,
                        container = raised.container,
                        why,
                        "a limit is not given back yet"
                    );
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
                let (client, ways) = (&self.client, self.movers.resizer.ways());
                if let Err(why) = changed_back(client, ways, &seen, level, change).await {
                    tracing::warn!(
                        pod.namespace = seen.namespace,
                        pod.name = seen.name,
                        why,
                        "a CPU limit or memory request is not given back yet"
                    );
                }
            }
        }
        Ok(found)
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
    use bellows_core::pod::MANAGER;

    use super::super::bed::{Bed, key};

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
        let task = bed.watch.giving_back[&app].id();
        follow(&mut bed, "Off", "256Mi");
        assert_eq!(bed.watch.giving_back[&app].id(), task, "one at a time");
        // Nor is it guarded before that has ended.
        bed.sees_of("Act", "256Mi", MANAGER);
        bed.is_guarded();
        bed.watch.pending.clear();
        follow(&mut bed, "Act", "512Mi");
        assert_eq!(bed.limit().as_deref(), Some("256Mi"));
        assert!(bed.watch.pending.contains("0f8c"));
        bed.watch.forget("0f8c");
        assert!(bed.watch.giving_back.is_empty());
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
}
