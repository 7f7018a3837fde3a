//! What `right-size` and `make-room` have in common: pods that a real controller makes and a real scheduler places, that
//! reserve much and use little.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bellows::{
    attribution::{self, CGROUP_ROOT, container_id},
    cgroup::Cgroup,
};
use bellows_core::{Bytes, quantity, requests::shortage};
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::api::resource::Quantity};
use kube::ResourceExt as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    node::{self, IMAGE, wait},
    pods::Cluster,
};

/// What all of them may take to be there.
const THERE: Duration = Duration::from_secs(180);

/// Pods of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reserved {
    pub(super) app: &'static str,
    pub(super) replicas: usize,
    pub(super) request: Bytes,
    pub(super) uses: Bytes,
    /// The name of a priority class.
    pub(super) priority: Option<&'static str>,
    /// The label by which a policy means them.
    pub(super) guard: Option<&'static str>,
    /// A StatefulSet rather than a Deployment.
    pub(super) is_stateful: bool,
}

impl Reserved {
    /// The template of a pod.
    fn template(&self) -> Value {
        let (rest, peak) = (self.uses, self.uses.plus(Bytes::mib(1)));
        let mut labels = json!({ "app": self.app });
        if let Some(guard) = self.guard {
            labels["guard"] = json!(guard);
        }
        // It rests for ever: nobody makes that file.
        let command = [
            "/bellows-guest",
            "load",
            "burst",
            "--rest",
            &rest.0.to_string(),
            "--peak",
            &peak.0.to_string(),
            "--rest-until",
            "/never",
        ];
        let mut spec = json!({
            "hostNetwork": true,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "containers": [{
                "name": "load",
                "image": IMAGE,
                "imagePullPolicy": "Never",
                "command": command,
                "resources": {
                    "requests": { "memory": quantity::format(self.request) },
                    "limits": { "memory": quantity::format(self.request.plus(Bytes::mib(1024))) },
                },
            }],
        });
        if let Some(priority) = self.priority {
            spec["priorityClassName"] = json!(priority);
        }
        json!({ "metadata": { "labels": labels }, "spec": spec })
    }

    /// Has so many of them made, or taken away.
    pub(super) fn scale(&self, cluster: &Cluster, replicas: usize) -> Result<()> {
        let kind = if self.is_stateful {
            "StatefulSet"
        } else {
            "Deployment"
        };
        let mut spec = json!({
            "replicas": replicas,
            "selector": { "matchLabels": { "app": self.app } },
            "template": self.template(),
        });
        if self.is_stateful {
            spec["serviceName"] = json!(self.app);
        }
        cluster.apply(json!({
            "apiVersion": "apps/v1",
            "kind": kind,
            "metadata": { "name": self.app, "namespace": "default" },
            "spec": spec,
        }))
    }

    /// Makes all of them and waits until they rest.
    pub(super) fn start(&self, cluster: &Cluster) -> Result<Vec<Resting>> {
        self.scale(cluster, self.replicas)?;
        let mut resting = Vec::new();
        let what = format!("{} of {} rest", self.replicas, self.app);
        let waited = wait(&what, THERE, || {
            let pods = cluster.of_app(self.app)?;
            resting = pods.iter().filter_map(Resting::of).collect();
            let rests = |own: &Resting| own.cgroup.usage().is_ok_and(|usage| usage >= self.uses);
            Ok(resting.len() == self.replicas && resting.iter().all(rests))
        });
        waited.with_context(|| node::log_tail("kubelet", 10))?;
        Ok(resting)
    }

    /// Takes all of them away and waits until they are gone.
    pub(super) fn end(&self, cluster: &Cluster) -> Result<()> {
        self.scale(cluster, 0)?;
        let what = format!("{} are gone", self.app);
        wait(&what, THERE, || Ok(cluster.of_app(self.app)?.is_empty()))
    }
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub(super) struct Resting {
    pub(super) name: String,
    uid: String,
    cgroup: Cgroup,
}

impl Resting {
    fn of(pod: &Pod) -> Option<Self> {
        let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
        let id = statuses.first()?.container_id.as_deref()?;
        let uid = pod.uid()?;
        let path = attribution::find(CGROUP_ROOT.as_ref(), &uid, container_id(id))?;
        Some(Self {
            name: pod.name_any(),
            uid,
            cgroup: Cgroup::open(&path).ok()?,
        })
    }
}

impl Resting {
    /// What it uses, without the cache that costs nothing to give up.
    pub(super) fn working_set(&self) -> Result<Bytes> {
        Ok(self.cgroup.working_set()?)
    }
}

/// What has become of pods that ran.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Harm {
    /// OOM kills, and pods that have failed or are gone, by eviction or otherwise.
    pub(super) kills: u64,
    pub(super) restarts: i32,
}

impl Harm {
    pub(super) fn to(cluster: &Cluster, pods: &[Resting]) -> Result<Self> {
        let mut harm = Self::default();
        for own in pods {
            let pod = cluster.get(&own.name).ok();
            let pod = pod.filter(|pod| pod.uid().as_ref() == Some(&own.uid));
            let status = pod.and_then(|pod| pod.status);
            let phase = status.as_ref().and_then(|status| status.phase.as_deref());
            harm.kills += u64::from(phase != Some("Running"));
            harm.kills += own.cgroup.events().map_or(1, |events| events.oom_kill);
            let statuses = status.and_then(|status| status.container_statuses);
            let restarts = statuses.unwrap_or_default().into_iter();
            harm.restarts += restarts.map(|status| status.restart_count).sum::<i32>();
        }
        Ok(harm)
    }
}

/// What the spec of a pod's container requests.
pub(super) fn requested(pod: &Pod) -> Bytes {
    let containers = pod.spec.as_ref().map(|spec| &spec.containers);
    let container = containers.and_then(|containers| containers.first());
    let resources = container.and_then(|container| container.resources.as_ref());
    size(resources.and_then(|resources| resources.requests.as_ref()?.get("memory")))
}

/// What the kubelet has allotted to it.
pub(super) fn allotted(pod: &Pod) -> Bytes {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    let status = statuses.and_then(|statuses| statuses.first());
    size(status.and_then(|status| status.allocated_resources.as_ref()?.get("memory")))
}

fn size(quantity: Option<&Quantity>) -> Bytes {
    let size = quantity.and_then(|quantity| quantity::parse(&quantity.0).ok());
    size.unwrap_or_default()
}

/// Whether it has this condition, with this status.
pub(super) fn has_condition(pod: &Pod, kind: &str, status: &str) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    conditions.any(|condition| condition.type_ == kind && condition.status == status)
}

/// By how much its resize does not fit, if the kubelet has put it off.
pub(super) fn short(pod: &Pod) -> Option<Bytes> {
    let conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let mut pending = conditions.filter(|condition| condition.type_ == "PodResizePending");
    let message = pending.next()?.message.as_deref()?;
    Some(shortage(message)?.short())
}

/// Whether the scheduler has found no place for it.
pub(super) fn is_unschedulable(pod: &Pod) -> bool {
    has_condition(pod, "PodScheduled", "False")
}

/// Whether it has a place.
pub(super) fn is_placed(pod: &Pod) -> bool {
    pod.spec
        .as_ref()
        .is_some_and(|spec| spec.node_name.is_some())
}

/// Waits until all of these were looked at by the scheduler in vain.
pub(super) fn wait_unschedulable(cluster: &Cluster, app: &str, count: usize) -> Result<()> {
    wait(&format!("{app} find no place"), THERE, || {
        let pods = cluster.of_app(app)?;
        ensure!(!pods.iter().any(is_placed), "{app}: there was a place");
        Ok(pods.len() == count && pods.iter().all(is_unschedulable))
    })
}
