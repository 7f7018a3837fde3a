//! The autoscalers of the cluster, as the API has them.
//!
//! VerticalPodAutoscalers are no part of Kubernetes: where there is no such resource it is looked for again now and then,
//! and nothing is said of that.
//!
//! One that cannot be read in some part counts as one that owns what that part would say.
//!
//! Their statuses change every few seconds in every namespace, so an API server would have to tell every node of all of them.
//! An agent asks when it has come to have a pod of which something is to be moved, and nothing of it is before it is known what is
//! left alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    time::{Duration, Instant},
};

use bellows_core::{
    autoscalers::{Autoscaler, Control, Scales, Updates, Workload},
    elastic::Mode,
    pod::{self, Wishes},
};
use futures::TryStreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResourceList;
use kube::{
    Api, Client, ResourceExt as _,
    api::{ApiResource, DynamicObject},
    core::GroupVersionKind,
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::Value;
use tokio::{
    sync::{
        mpsc::{self, Receiver},
        watch,
    },
    time::sleep,
};

use super::Watch;
use crate::run::api::watched;

/// How often a resource is looked for that is not there.
const LOOK: Duration = Duration::from_secs(300);
/// How soon it is looked for again if the API did not say whether it is.
const AGAIN: Duration = Duration::from_secs(5);
/// Events that nobody has taken yet.
const EVENTS: usize = 64;
/// For how long nothing is moved because it is not known yet which there are.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is told that they cannot be read.
const TOLD: Duration = Duration::from_secs(600);

/// Both kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Vertical,
    Horizontal,
}

const KINDS: [Kind; 2] = [Kind::Vertical, Kind::Horizontal];

type Event = Result<watcher::Event<DynamicObject>, watcher::Error>;

impl Kind {
    fn resource(self) -> ApiResource {
        let (group, version, kind) = match self {
            Self::Vertical => ("autoscaling.k8s.io", "v1", "VerticalPodAutoscaler"),
            Self::Horizontal => ("autoscaling", "v2", "HorizontalPodAutoscaler"),
        };
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
    }
}

/// Watches both from when they are wanted, as long as anybody takes what they say.
pub(super) fn watch(client: &Client, wanted: &watch::Receiver<bool>) -> Receiver<(Kind, Event)> {
    let (events, receiver) = mpsc::channel(EVENTS);
    for kind in KINDS {
        let (client, events, mut wanted) = (client.clone(), events.clone(), wanted.clone());
        drop(tokio::spawn(async move {
            if wanted.wait_for(|wanted| *wanted).await.is_err() {
                return;
            }
            let resource = kind.resource();
            loop {
                let known = client.list_api_group_resources(&resource.api_version);
                let Some(wait) = is_missing(known.await, &resource) else {
                    break;
                };
                if wait == LOOK {
                    for event in [watcher::Event::Init, watcher::Event::InitDone] {
                        if events.send((kind, Ok(event))).await.is_err() {
                            return;
                        }
                    }
                }
                sleep(wait).await;
            }
            let api = Api::all_with(client, &resource);
            let mut all = pin!(watcher(api, watched()).default_backoff());
            loop {
                let event = match all.try_next().await {
                    Ok(None) => return,
                    Ok(Some(event)) => Ok(event),
                    Err(error) => Err(error),
                };
                if events.send((kind, event)).await.is_err() {
                    return;
                }
            }
        }));
    }
    receiver
}

/// How long to wait until it is looked for again; `None` for one that the API server knows.
fn is_missing(known: kube::Result<APIResourceList>, resource: &ApiResource) -> Option<Duration> {
    match known {
        Ok(known) => {
            let mut known = known.resources.iter();
            let is_there = known.any(|known| known.name == resource.plural);
            (!is_there).then_some(LOOK)
        }
        // It knows nothing of the group.
        Err(kube::Error::Api(status)) if status.code == 404 => Some(LOOK),
        Err(error) => {
            tracing::debug!(resource.plural, %error, "whether there are autoscalers is not known yet");
            Some(AGAIN)
        }
    }
}

/// Namespace, kind and name.
type Key = (String, Kind, String);

/// Those that are known, by namespace.
#[derive(Default)]
pub(super) struct Autoscalers {
    all: BTreeMap<String, Vec<Scales>>,
    by_name: BTreeMap<Key, Scales>,
    /// What is seen of lists that are not complete yet.
    listing: BTreeMap<Kind, BTreeSet<Key>>,
    /// Namespaces of which something has changed that is not in `all` yet.
    changed: BTreeMap<Kind, BTreeSet<String>>,
    told: BTreeMap<Kind, Instant>,
    /// Of which kinds the API has said which there are, or that there are none, or that it does not say it.
    answered: BTreeSet<Kind>,
    /// Since when they are.
    since: Option<Instant>,
    wanted: watch::Sender<bool>,
}

impl Autoscalers {
    /// Whether they are, from when on.
    pub(super) fn wanted(&self) -> watch::Receiver<bool> {
        self.wanted.subscribe()
    }

    /// Whether they are.
    pub(super) const fn are_wanted(&self) -> bool {
        self.since.is_some()
    }

    /// Something is to be moved.
    fn want(&mut self) {
        if self.since.is_none() {
            self.since = Some(Instant::now());
            self.wanted.send_replace(true);
        }
    }

    /// Whether it is known what is left alone, as far as it can be.
    pub(super) fn are_known(&self) -> bool {
        let is_late = |since: Instant| since.elapsed() >= PATIENCE;
        self.answered.len() == KINDS.len() || self.since.is_some_and(is_late)
    }

    /// Whether they are wanted, and it is not known which there are.
    pub(super) fn are_awaited(&self) -> bool {
        self.are_wanted() && !self.are_known()
    }

    /// Those of a namespace.
    pub(super) fn of(&self, namespace: &str) -> &[Scales] {
        self.all.get(namespace).map_or(&[], Vec::as_slice)
    }

    /// Takes an event; returns whether there are others now in a namespace that concerns us. While a list is read, those
    /// before it hold.
    pub(super) fn take(
        &mut self,
        kind: Kind,
        event: Event,
        concerns: impl Fn(&str) -> bool,
    ) -> bool {
        let key = |object: &DynamicObject| {
            let namespace = object.namespace().unwrap_or_default();
            (namespace, kind, object.name_any())
        };
        match event {
            Ok(watcher::Event::Init) => drop(self.listing.insert(kind, BTreeSet::new())),
            Ok(watcher::Event::InitApply(object)) => {
                self.listing.entry(kind).or_default().insert(key(&object));
                self.set(key(&object), read(kind, &object));
            }
            Ok(watcher::Event::InitDone) => {
                let listed = self.listing.remove(&kind).unwrap_or_default();
                self.keep(kind, &listed);
                self.answered.insert(kind);
            }
            Ok(watcher::Event::Apply(object)) => self.set(key(&object), read(kind, &object)),
            Ok(watcher::Event::Delete(object)) => self.set(key(&object), None),
            Err(error) => self.failed(kind, &error),
        }
        if self.listing.contains_key(&kind) {
            return false;
        }
        let changed = self.changed.remove(&kind).unwrap_or_default();
        for namespace in &changed {
            self.gather(namespace);
        }
        changed.iter().any(|namespace| concerns(namespace))
    }

    /// All of a namespace, as claims are looked for among them.
    fn gather(&mut self, namespace: &str) {
        let from = (namespace.to_owned(), Kind::Vertical, String::new());
        let own = self.by_name.range(from..);
        let own = own.take_while(|((own, _, _), _)| own == namespace);
        let own: Vec<Scales> = own.map(|(_, scales)| scales.clone()).collect();
        if own.is_empty() {
            self.all.remove(namespace);
        } else {
            self.all.insert(namespace.to_owned(), own);
        }
    }

    /// One is there, or is gone, or scales nothing.
    fn set(&mut self, key: Key, scales: Option<Scales>) {
        if self.by_name.get(&key) == scales.as_ref() {
            return;
        }
        let (namespace, kind, _) = &key;
        let changed = self.changed.entry(*kind).or_default();
        changed.insert(namespace.clone());
        match scales {
            Some(scales) => drop(self.by_name.insert(key, scales)),
            None => drop(self.by_name.remove(&key)),
        }
    }

    /// All others of a kind are gone.
    fn keep(&mut self, kind: Kind, listed: &BTreeSet<Key>) {
        let is_gone = |key: &Key| key.1 == kind && !listed.contains(key);
        let gone: Vec<Key> = self
            .by_name
            .keys()
            .filter(|key| is_gone(key))
            .cloned()
            .collect();
        for key in gone {
            self.set(key, None);
        }
    }

    fn failed(&mut self, kind: Kind, error: &watcher::Error) {
        let status = match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        };
        // What is overloaded, or about to start, has not answered.
        if matches!(status, Some(403 | 404)) {
            self.answered.insert(kind);
        }
        // The resource definition is gone, and with it all that were there.
        if status == Some(404) {
            self.listing.remove(&kind);
            self.keep(kind, &BTreeSet::new());
            return;
        }
        if self
            .told
            .get(&kind)
            .is_none_or(|told| told.elapsed() >= TOLD)
        {
            self.told.insert(kind, Instant::now());
            tracing::warn!(?kind, %error, "autoscalers cannot be read: what they set may be moved here, too");
        }
    }
}

#[cfg(test)]
impl Autoscalers {
    /// There are none.
    pub(super) fn none() -> Self {
        let mut none = Self::default();
        for kind in KINDS {
            none.take(kind, Ok(watcher::Event::InitDone), |_| false);
        }
        none
    }
}

impl Watch {
    /// Whether something of a pod is to be moved, and it is not known yet what of it is left alone.
    pub(super) fn waits_for_autoscalers(&mut self, seen: &pod::Pod, wishes: &Wishes) -> bool {
        let policies = self.policies.all();
        let acts = |wish: &pod::Wish| wish.mode == Mode::Act;
        let is_moved = wishes.values().flatten().any(acts)
            || !pod::cpu_wishes(seen, policies).is_empty()
            || !pod::request_wishes(seen, policies).is_empty();
        if self.context.only_observes || !is_moved {
            return false;
        }
        self.autoscalers.want();
        self.autoscalers.are_awaited()
    }
}

fn read(kind: Kind, object: &DynamicObject) -> Option<Scales> {
    let spec = &object.data["spec"];
    let (target, autoscaler) = match kind {
        Kind::Vertical => ("targetRef", vertical(spec)),
        Kind::Horizontal => ("scaleTargetRef", horizontal(spec)),
    };
    let part = |name: &str| Some(spec[target][name].as_str()?.to_owned());
    Some(Scales {
        name: object.name_any(),
        target: Workload {
            kind: part("kind")?,
            name: part("name")?,
        },
        autoscaler,
    })
}

fn vertical(spec: &Value) -> Autoscaler {
    let controls = spec["resourcePolicy"]["containerPolicies"].as_array();
    let controls = controls.into_iter().flatten().map(|policy| {
        let name = policy["containerName"].as_str();
        let resources = policy["controlledResources"].as_array();
        let has = |resource: &str| {
            resources.is_none_or(|all| all.iter().any(|own| own.as_str() == Some(resource)))
        };
        Control {
            container: name.filter(|name| *name != "*").map(str::to_owned),
            is_off: policy["mode"] == "Off",
            cpu: has("cpu"),
            memory: has("memory"),
            limits: policy["controlledValues"] != "RequestsOnly",
        }
    });
    Autoscaler::Vertical {
        updates: Updates::of(spec["updatePolicy"]["updateMode"].as_str()),
        controls: controls.collect(),
    }
}

fn horizontal(spec: &Value) -> Autoscaler {
    let metrics = spec["metrics"].as_array();
    let of = |resource: &str| {
        let metrics = metrics.into_iter().flatten();
        let found = metrics.filter_map(|metric| {
            let (source, container) = match metric["type"].as_str()? {
                "Resource" => (&metric["resource"], None),
                "ContainerResource" => {
                    let source = &metric["containerResource"];
                    (source, source["container"].as_str().map(str::to_owned))
                }
                _ => return None,
            };
            let is_it = source["name"] == resource && source["target"]["type"] == "Utilization";
            is_it.then_some(container)
        });
        found.collect()
    };
    Autoscaler::Horizontal {
        memory: of("memory"),
        cpu: of("cpu"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(name: &str, spec: &Value) -> DynamicObject {
        let metadata = json!({ "name": name, "namespace": "dev" });
        serde_json::from_value(json!({ "metadata": metadata, "spec": spec })).unwrap()
    }

    #[test]
    fn a_vertical_one_is_read() {
        let spec = json!({
            "targetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "web" },
            "updatePolicy": { "updateMode": "InPlaceOrRecreate" },
            "resourcePolicy": { "containerPolicies": [
                { "containerName": "*", "controlledResources": ["cpu"], "controlledValues": "RequestsOnly" },
                { "containerName": "side", "mode": "Off" },
            ] },
        });
        let scales = read(Kind::Vertical, &object("a", &spec)).unwrap();
        assert_eq!(
            (scales.target.kind.as_str(), scales.target.name.as_str()),
            ("Deployment", "web")
        );
        let control = |container: Option<&str>, is_off, memory, limits| Control {
            container: container.map(str::to_owned),
            is_off,
            cpu: true,
            memory,
            limits,
        };
        let controls = vec![
            control(None, false, false, false),
            control(Some("side"), true, true, true),
        ];
        let updates = Updates::Resizes;
        assert_eq!(
            scales.autoscaler,
            Autoscaler::Vertical { updates, controls }
        );
        assert!(read(Kind::Vertical, &object("a", &json!({}))).is_none());
    }

    #[test]
    fn a_horizontal_one_is_read() {
        let resource = |name: &str, kind: &str| json!({ "type": "Resource", "resource": { "name": name, "target": { "type": kind } } });
        let container = json!({ "type": "ContainerResource", "containerResource": {
            "name": "memory", "container": "app", "target": { "type": "Utilization", "averageUtilization": 80 } } });
        let spec = json!({
            "scaleTargetRef": { "kind": "StatefulSet", "name": "db" },
            "metrics": [resource("cpu", "Utilization"), resource("memory", "AverageValue"), container, { "type": "Pods" }],
        });
        let scales = read(Kind::Horizontal, &object("a", &spec)).unwrap();
        let (memory, cpu) = (vec![Some("app".to_owned())], vec![None]);
        assert_eq!(scales.autoscaler, Autoscaler::Horizontal { memory, cpu });
    }

    #[test]
    fn what_is_gone_is_gone_and_what_is_the_same_is_no_news() {
        let mut all = Autoscalers::default();
        let spec = json!({ "targetRef": { "kind": "Deployment", "name": "web" } });
        let apply = |name: &str| watcher::Event::Apply(object(name, &spec));
        let take =
            |all: &mut Autoscalers, kind, event| all.take(kind, Ok(event), |own| own == "dev");
        assert!(take(&mut all, Kind::Vertical, apply("a")));
        assert!(!take(&mut all, Kind::Vertical, apply("a")));
        let other = json!({ "scaleTargetRef": { "kind": "Deployment", "name": "web" } });
        let other = watcher::Event::Apply(object("h", &other));
        assert!(take(&mut all, Kind::Horizontal, other));
        assert_eq!((all.of("dev").len(), all.of("other").len()), (2, 0));
        // A list of one kind says nothing of the other.
        let names = |all: &Autoscalers| {
            let names = all.of("dev").iter().map(|scales| scales.name.clone());
            names.collect::<Vec<_>>()
        };
        assert!(!take(&mut all, Kind::Vertical, watcher::Event::Init));
        let b = watcher::Event::InitApply(object("b", &spec));
        // It says what it has to say once, and until then those before it hold.
        assert!(!take(&mut all, Kind::Vertical, b));
        assert_eq!(names(&all), ["a", "h"]);
        assert!(take(&mut all, Kind::Vertical, watcher::Event::InitDone));
        assert_eq!(names(&all), ["b", "h"]);
        // The same list again is no news.
        take(&mut all, Kind::Vertical, watcher::Event::Init);
        let b = watcher::Event::InitApply(object("b", &spec));
        take(&mut all, Kind::Vertical, b);
        assert!(!take(&mut all, Kind::Vertical, watcher::Event::InitDone));
        // One of a namespace that has nothing of ours is known, and is no news.
        let mut far = object("f", &spec);
        far.metadata.namespace = Some("far".to_owned());
        assert!(!take(&mut all, Kind::Vertical, watcher::Event::Apply(far)));
        assert_eq!(all.of("far").len(), 1);
        let gone = kube::core::Status {
            code: 404,
            ..kube::core::Status::default()
        };
        let gone = watcher::Error::InitialListFailed(kube::Error::Api(Box::new(gone)));
        assert!(all.take(Kind::Vertical, Err(gone), |_| true));
        assert_eq!((all.of("dev").len(), all.of("far").len()), (1, 0));
    }

    #[test]
    fn nothing_is_known_before_both_kinds_are_listed_or_cannot_be() {
        let mut all = Autoscalers::default();
        assert!(!all.are_wanted() && !all.are_known() && !all.are_awaited());
        all.want();
        assert!(all.are_awaited());
        for event in [watcher::Event::Init, watcher::Event::InitDone] {
            assert!(!all.are_known());
            all.take(Kind::Vertical, Ok(event), |_| true);
        }
        assert!(all.are_wanted() && !all.are_known());
        let refused = |code| {
            let status = kube::core::Status {
                code,
                ..kube::core::Status::default()
            };
            kube::Error::Api(Box::new(status))
        };
        for failed in [
            watcher::Error::NoResourceVersion,
            watcher::Error::InitialListFailed(refused(429)),
            watcher::Error::WatchStartFailed(refused(503)),
        ] {
            all.take(Kind::Horizontal, Err(failed), |_| true);
            assert!(all.are_awaited(), "it has not answered");
        }
        let refused = watcher::Error::InitialListFailed(refused(403));
        all.take(Kind::Horizontal, Err(refused), |_| true);
        assert!(all.are_known() && !all.are_awaited());
        // Nobody waits for ever.
        let since = Instant::now().checked_sub(PATIENCE);
        let all = Autoscalers {
            since,
            ..Autoscalers::default()
        };
        assert!(all.are_known());
    }

    #[tokio::test]
    async fn the_api_is_not_asked_for_them_before_somebody_wants_to_know() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let config = kube::Config::new(address.parse().unwrap());
        let client = Client::try_from(config).unwrap();
        let mut all = Autoscalers::default();
        let _events = watch(&client, &all.wanted());
        let soon = Duration::from_millis(200);
        let asked = tokio::time::timeout(soon, listener.accept());
        assert!(asked.await.is_err());
        all.want();
        let asked = tokio::time::timeout(Duration::from_secs(10), listener.accept());
        assert!(asked.await.is_ok());
    }

    #[test]
    fn one_that_does_not_answer_is_asked_again_soon() {
        let resource = Kind::Vertical.resource();
        let wait = |known| is_missing(known, &resource);
        let status = |code| {
            let status = kube::core::Status {
                code,
                ..kube::core::Status::default()
            };
            Err(kube::Error::Api(Box::new(status)))
        };
        assert_eq!(wait(status(404)), Some(LOOK));
        assert_eq!(wait(status(503)), Some(AGAIN));
        assert_eq!(wait(Ok(APIResourceList::default())), Some(LOOK));
        let known = json!({ "groupVersion": "autoscaling.k8s.io/v1", "resources": [{
            "name": "verticalpodautoscalers", "singularName": "", "namespaced": true, "kind": "VerticalPodAutoscaler", "verbs": [],
        }] });
        assert_eq!(wait(Ok(serde_json::from_value(known).unwrap())), None);
    }
}
