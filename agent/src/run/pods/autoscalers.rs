//! The autoscalers of the cluster, as the API has them.
//!
//! VerticalPodAutoscalers are no part of Kubernetes: where there is no such resource it is looked for again now and then,
//! and nothing is said of that.
//!
//! One that cannot be read in some part counts as one that owns what that part would say.

use std::{
    collections::BTreeMap,
    pin::pin,
    time::{Duration, Instant},
};

use bellows_core::autoscalers::{Autoscaler, Control, Scales, Updates, Workload};
use futures::TryStreamExt as _;
use kube::{
    Api, Client, ResourceExt as _,
    api::{ApiResource, DynamicObject},
    core::GroupVersionKind,
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::Value;
use tokio::{
    sync::mpsc::{self, Receiver},
    time::sleep,
};

/// How often a resource is looked for that is not there.
const LOOK: Duration = Duration::from_secs(300);
/// Events that nobody has taken yet.
const EVENTS: usize = 64;
/// How often it is told that they cannot be read.
const TOLD: Duration = Duration::from_secs(600);

/// Both kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Vertical,
    Horizontal,
}

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

/// Watches both, as long as anybody takes what they say; none for who changes nothing.
pub(super) fn watch(client: &Client, acts: bool) -> Receiver<(Kind, Event)> {
    let (events, receiver) = mpsc::channel(EVENTS);
    if !acts {
        return receiver;
    }
    for kind in [Kind::Vertical, Kind::Horizontal] {
        let (client, events) = (client.clone(), events.clone());
        drop(tokio::spawn(async move {
            let resource = kind.resource();
            while !is_there(&client, &resource).await {
                sleep(LOOK).await;
            }
            let api = Api::all_with(client, &resource);
            let config = watcher::Config::default();
            let mut all = pin!(watcher(api, config).default_backoff());
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

/// Whether the API server knows it. One that does not answer is asked again.
async fn is_there(client: &Client, resource: &ApiResource) -> bool {
    let known = client.list_api_group_resources(&resource.api_version).await;
    known.is_ok_and(|known| {
        let mut known = known.resources.iter();
        known.any(|known| known.name == resource.plural)
    })
}

/// Those that are known, by namespace.
#[derive(Default)]
pub(super) struct Autoscalers {
    all: BTreeMap<String, Vec<Scales>>,
    by_name: BTreeMap<(Kind, String, String), Scales>,
    listing: BTreeMap<Kind, Vec<(String, String)>>,
    told: BTreeMap<Kind, Instant>,
}

impl Autoscalers {
    /// Those of a namespace.
    pub(super) fn of(&self, namespace: &str) -> &[Scales] {
        self.all.get(namespace).map_or(&[], Vec::as_slice)
    }

    /// Takes an event; returns whether there are others now.
    pub(super) fn take(&mut self, kind: Kind, event: Event) -> bool {
        let key = |object: &DynamicObject| {
            let namespace = object.namespace().unwrap_or_default();
            (kind, namespace, object.name_any())
        };
        match event {
            Ok(watcher::Event::Init) => drop(self.listing.insert(kind, Vec::new())),
            Ok(watcher::Event::InitApply(object)) => {
                let (_, namespace, name) = key(&object);
                self.listing
                    .entry(kind)
                    .or_default()
                    .push((namespace, name));
                self.set(key(&object), kind, &object);
            }
            Ok(watcher::Event::InitDone) => {
                let listed = self.listing.remove(&kind).unwrap_or_default();
                self.by_name.retain(|(own, namespace, name), _| {
                    *own != kind || listed.contains(&(namespace.clone(), name.clone()))
                });
            }
            Ok(watcher::Event::Apply(object)) => self.set(key(&object), kind, &object),
            Ok(watcher::Event::Delete(object)) => drop(self.by_name.remove(&key(&object))),
            Err(error) => self.failed(kind, &error),
        }
        let mut all: BTreeMap<String, Vec<Scales>> = BTreeMap::new();
        for ((_, namespace, _), scales) in &self.by_name {
            all.entry(namespace.clone())
                .or_default()
                .push(scales.clone());
        }
        all != std::mem::replace(&mut self.all, all.clone())
    }

    fn set(&mut self, key: (Kind, String, String), kind: Kind, object: &DynamicObject) {
        match read(kind, object) {
            Some(scales) => drop(self.by_name.insert(key, scales)),
            // It scales nothing.
            None => drop(self.by_name.remove(&key)),
        }
    }

    fn failed(&mut self, kind: Kind, error: &watcher::Error) {
        let status = match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        };
        // The resource definition is gone, and with it all that were there.
        if status == Some(404) {
            self.by_name.retain(|(own, _, _), _| *own != kind);
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
        let set = |name: &str| Ok(watcher::Event::Apply(object(name, &spec)));
        assert!(all.take(Kind::Vertical, set("a")));
        assert!(!all.take(Kind::Vertical, set("a")));
        let other = json!({ "scaleTargetRef": { "kind": "Deployment", "name": "web" } });
        let other = watcher::Event::Apply(object("h", &other));
        assert!(all.take(Kind::Horizontal, Ok(other)));
        assert_eq!((all.of("dev").len(), all.of("other").len()), (2, 0));
        // A list of one kind says nothing of the other.
        all.take(Kind::Vertical, Ok(watcher::Event::Init));
        all.take(
            Kind::Vertical,
            Ok(watcher::Event::InitApply(object("b", &spec))),
        );
        assert!(all.take(Kind::Vertical, Ok(watcher::Event::InitDone)));
        let names: Vec<&str> = all
            .of("dev")
            .iter()
            .map(|scales| scales.name.as_str())
            .collect();
        assert_eq!(names, ["b", "h"]);
        let gone = kube::core::Status {
            code: 404,
            ..kube::core::Status::default()
        };
        let gone = watcher::Error::InitialListFailed(kube::Error::Api(Box::new(gone)));
        assert!(all.take(Kind::Vertical, Err(gone)));
        assert_eq!(all.of("dev").len(), 1);
    }
}
