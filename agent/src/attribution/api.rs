//! What is read of the API's pods, and no more.
//!
//! The generated types know every field of every kind of volume. An agent that needs a pod's limits, probes
//! and container ids would carry their decoders (a tenth of the program) and, for each pod of a list, what
//! they decode. What is unknown here is skipped by the parser without being kept. What the
//! API may leave out may be `null`, as in the generated types.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::{Resource, api::Resize, core::NamespaceResourceScope};
use serde::Deserialize;

/// A pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Pod {
    /// Its name, annotations, managed fields.
    #[serde(default)]
    pub metadata: ObjectMeta,
    pub(super) spec: Option<Spec>,
    pub(super) status: Option<Status>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    #[serde(default)]
    pub(super) containers: Vec<Container>,
    pub(super) init_containers: Option<Vec<InitContainer>>,
    pub(super) overhead: Option<BTreeMap<String, Quantity>>,
    pub(super) resources: Option<Resources>,
    pub(super) priority: Option<i32>,
    pub(super) priority_class_name: Option<String>,
    pub(super) active_deadline_seconds: Option<i64>,
    pub(super) affinity: Option<Affinity>,
}

/// Of affinity, whether it looks into other namespaces.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Affinity {
    pub(super) pod_affinity: Option<PodAffinity>,
    pub(super) pod_anti_affinity: Option<PodAffinity>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct PodAffinity {
    #[serde(rename = "requiredDuringSchedulingIgnoredDuringExecution")]
    pub(super) required: Option<Vec<AffinityTerm>>,
    #[serde(rename = "preferredDuringSchedulingIgnoredDuringExecution")]
    pub(super) preferred: Option<Vec<WeightedTerm>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WeightedTerm {
    pub(super) pod_affinity_term: AffinityTerm,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct AffinityTerm {
    pub(super) namespaces: Option<Vec<serde::de::IgnoredAny>>,
    pub(super) namespace_selector: Option<serde::de::IgnoredAny>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Container {
    pub(super) name: String,
    pub(super) resources: Option<Resources>,
    pub(super) resize_policy: Option<Vec<ResizePolicy>>,
    pub(super) liveness_probe: Option<Probe>,
    pub(super) startup_probe: Option<Probe>,
    pub(super) readiness_probe: Option<serde::de::IgnoredAny>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct InitContainer {
    #[serde(default)]
    pub(super) name: String,
    pub(super) resources: Option<Resources>,
    /// `Always` for one that runs beside the others.
    pub(super) restart_policy: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Resources {
    /// Quantities as they were written.
    pub(super) limits: Option<BTreeMap<String, Quantity>>,
    pub(super) requests: Option<BTreeMap<String, Quantity>>,
}

/// The API prints quantities as text, and takes numbers.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Quantity {
    Text(String),
    Number(serde_json::Number),
}

impl Quantity {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(number) => number.to_string(),
        }
    }
}

impl Resources {
    pub(super) fn is_empty(&self) -> bool {
        let lists = [&self.limits, &self.requests];
        lists.into_iter().flatten().all(BTreeMap::is_empty)
    }

    /// The memory limit as it was written.
    pub(super) fn memory_limit(&self) -> Option<String> {
        Some(self.limits.as_ref()?.get("memory")?.text())
    }

    /// The CPU limit as it was written.
    pub(super) fn cpu_limit(&self) -> Option<String> {
        Some(self.limits.as_ref()?.get("cpu")?.text())
    }

    /// The CPU request as it was written.
    pub(super) fn cpu_request(&self) -> Option<String> {
        Some(self.requests.as_ref()?.get("cpu")?.text())
    }

    /// The memory request as it was written.
    pub(super) fn memory_request(&self) -> Option<String> {
        Some(self.requests.as_ref()?.get("memory")?.text())
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ResizePolicy {
    pub(super) resource_name: String,
    pub(super) restart_policy: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Probe {
    /// Which command is of no interest.
    pub(super) exec: Option<serde::de::IgnoredAny>,
    pub(super) period_seconds: Option<i32>,
    pub(super) timeout_seconds: Option<i32>,
    pub(super) failure_threshold: Option<i32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Status {
    pub(super) phase: Option<String>,
    pub(super) qos_class: Option<String>,
    pub(super) container_statuses: Option<Vec<ContainerStatus>>,
    pub(super) init_container_statuses: Option<Vec<ContainerStatus>>,
    pub(super) conditions: Option<Vec<Condition>>,
    /// Whatever they are.
    pub(super) resources: Option<serde::de::IgnoredAny>,
    /// Of Kubernetes before 1.33.
    pub(super) resize: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Condition {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) status: String,
    pub(super) reason: Option<String>,
    pub(super) message: Option<String>,
    pub(super) observed_generation: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ContainerStatus {
    pub(super) name: String,
    #[serde(rename = "containerID")]
    pub(super) container_id: Option<String>,
    pub(super) state: Option<State>,
    pub(super) ready: Option<bool>,
    /// Whatever they are.
    pub(super) resources: Option<serde::de::IgnoredAny>,
    pub(super) allocated_resources: Option<BTreeMap<String, Quantity>>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct State {
    pub(super) running: Option<Running>,
    pub(super) terminated: Option<Terminated>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Terminated {
    pub(super) exit_code: Option<i32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Running {
    pub(super) started_at: Option<Time>,
}

impl Resource for Pod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Pod".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "pods".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Resize for Pod {}
