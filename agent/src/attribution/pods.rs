//! The API's pods as core's: converted here, once, so that generated types go no further.

use bellows_core::pod::{Container, Pod, QosClass};
use k8s_openapi::api::core::v1;
use kube::ResourceExt as _;

use super::container_id;

/// Marks a pod that mirrors a file on the node.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod as core sees it.
#[must_use]
pub fn convert(pod: &v1::Pod) -> Pod {
    let spec = pod.spec.clone().unwrap_or_default();
    let status = pod.status.clone().unwrap_or_default();
    let statuses = status.container_statuses.unwrap_or_default();
    let containers = spec.containers.iter().map(|container| {
        let running = statuses.iter().find(|status| {
            status.name == container.name
                && status
                    .state
                    .as_ref()
                    .is_some_and(|state| state.running.is_some())
        });
        let limits = container
            .resources
            .as_ref()
            .and_then(|resources| resources.limits.as_ref());
        let restarts = container.resize_policy.iter().flatten();
        Container {
            name: container.name.clone(),
            id: running
                .and_then(|status| status.container_id.as_deref())
                .map(|id| container_id(id).to_owned()),
            memory_limit: limits
                .and_then(|limits| limits.get("memory"))
                .map(|quantity| quantity.0.clone()),
            restarts_on_resize: restarts
                .filter(|policy| policy.resource_name == "memory")
                .any(|policy| policy.restart_policy == "RestartContainer"),
        }
    });
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    Pod {
        namespace: pod.namespace().unwrap_or_default(),
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        qos: match status.qos_class.as_deref() {
            Some("Guaranteed") => QosClass::Guaranteed,
            Some("BestEffort") => QosClass::BestEffort,
            _ => QosClass::Burstable,
        },
        annotations: pod.annotations().clone(),
        containers: containers.collect(),
        is_static: pod.annotations().contains_key(MIRROR),
        ending: ended || pod.metadata.deletion_timestamp.is_some(),
    }
}
