//! The API's pods as core's: converted here, once, so that generated types go no further.

use bellows_core::{
    Nanos,
    patience::{Probe, ProbeKind},
    pod::{Container, MANAGER, Pod, QosClass, WHOLE_POD},
};
use k8s_openapi::api::core::v1;
use kube::ResourceExt as _;
use serde_json::json;

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
            limit_manager: limit_manager(pod, &container.name),
            restarts_on_resize: restarts
                .filter(|policy| policy.resource_name == "memory")
                .any(|policy| policy.restart_policy == "RestartContainer"),
            probes: [&container.liveness_probe, &container.startup_probe]
                .into_iter()
                .flatten()
                .map(probe)
                .collect(),
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
        memory_limit: spec
            .resources
            .as_ref()
            .and_then(|resources| resources.limits.as_ref()?.get("memory"))
            .map(|quantity| quantity.0.clone()),
        limit_manager: limit_manager(pod, WHOLE_POD),
        is_static: pod.annotations().contains_key(MIRROR),
        ending: ended || pod.metadata.deletion_timestamp.is_some(),
    }
}

/// A probe with the API's own defaults for what it leaves open.
fn probe(probe: &v1::Probe) -> Probe {
    let seconds = |value: Option<i32>, default: u64| {
        let seconds = value.and_then(|value| u64::try_from(value).ok());
        Nanos::millis(seconds.filter(|&value| value > 0).unwrap_or(default) * 1000)
    };
    let failures = probe
        .failure_threshold
        .and_then(|value| u64::try_from(value).ok());
    Probe {
        kind: if probe.exec.is_some() {
            ProbeKind::Exec
        } else {
            ProbeKind::Network
        },
        period: seconds(probe.period_seconds, 10),
        timeout: seconds(probe.timeout_seconds, 1),
        failures: failures.filter(|&value| value > 0).unwrap_or(3),
    }
}

/// The field manager that owns the memory limit of a container, or of [`WHOLE_POD`]: the API moves it to whoever changes the
/// value. Ours comes first where several have set the same one.
#[must_use]
pub fn limit_manager(pod: &v1::Pod, container: &str) -> Option<String> {
    let key = format!("k:{}", json!({ "name": container }));
    let of_container = [
        "f:spec",
        "f:containers",
        &key,
        "f:resources",
        "f:limits",
        "f:memory",
    ];
    let path = if container == WHOLE_POD {
        &["f:spec", "f:resources", "f:limits", "f:memory"][..]
    } else {
        &of_container
    };
    let mut managers: Vec<&str> = pod
        .managed_fields()
        .iter()
        .filter(|entry| {
            let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
            path.iter()
                .fold(fields, |fields, part| fields?.get(part))
                .is_some()
        })
        .filter_map(|entry| entry.manager.as_deref())
        .collect();
    managers.sort_by_key(|manager| *manager != MANAGER);
    managers.first().map(|&manager| manager.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(managers: &[&str]) -> v1::Pod {
        let fields = json!({ "f:spec": { "f:containers": { "k:{\"name\":\"app\"}": {
            "f:resources": { "f:limits": { ".": {}, "f:memory": {} } },
        } } } });
        let entry = |manager: &&str| json!({ "manager": manager, "fieldsV1": fields });
        let other = json!({ "manager": "kubelet", "fieldsV1": { "f:status": { "f:phase": {} } } });
        let entries: Vec<_> = std::iter::once(other)
            .chain(managers.iter().map(entry))
            .collect();
        serde_json::from_value(json!({ "metadata": { "managedFields": entries } })).unwrap()
    }

    #[test]
    fn the_owner_of_the_limit_is_found() {
        let owner = |managers| limit_manager(&pod(managers), "app");
        assert_eq!(owner(&[]), None);
        assert_eq!(owner(&["kubectl"]).as_deref(), Some("kubectl"));
        assert_eq!(owner(&["argocd", MANAGER]).as_deref(), Some(MANAGER));
        assert_eq!(limit_manager(&pod(&["kubectl"]), "other"), None);
    }
}
