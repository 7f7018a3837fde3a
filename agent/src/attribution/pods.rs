//! The API's pods as core's: converted here, once, so that the API's types go no further.

use bellows_core::{
    Bytes, Nanos,
    patience::{Probe, ProbeKind},
    pod::{Container, InitContainer, Level, MANAGER, Pod, PutOff, QosClass, WHOLE_POD},
    quantity,
    workload::Owner,
};
use kube::ResourceExt as _;
use serde_json::json;

use super::{api, container_id, ebpf_resize};

/// Marks a pod that mirrors a file on the node.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod as core sees it.
#[must_use]
pub fn convert(pod: &api::Pod) -> Pod {
    let status = pod.status.as_ref();
    let statuses = status.and_then(|status| status.container_statuses.as_deref());
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let containers = containers.map(|container| {
        let running = statuses.unwrap_or_default().iter().find(|status| {
            status.name == container.name
                && status
                    .state
                    .as_ref()
                    .is_some_and(|state| state.running.is_some())
        });
        let restarts_on = |resource: &str| {
            let policies = container.resize_policy.iter().flatten();
            policies
                .filter(|policy| policy.resource_name == resource)
                .any(|policy| policy.restart_policy == "RestartContainer")
        };
        Container {
            name: container.name.clone(),
            id: running
                .and_then(|status| status.container_id.as_deref())
                .map(|id| container_id(id).to_owned()),
            reports_resources: running.is_some_and(|status| status.resources.is_some()),
            is_ready: container.readiness_probe.is_some().then(|| {
                let ready = running.and_then(|status| status.ready);
                ready.unwrap_or(false)
            }),
            started_at: running
                .and_then(|status| status.state.as_ref()?.running.as_ref()?.started_at.as_ref())
                .and_then(|time| u64::try_from(time.0.as_second()).ok()),
            memory_limit: container
                .resources
                .as_ref()
                .and_then(api::Resources::memory_limit),
            memory_request: container
                .resources
                .as_ref()
                .and_then(api::Resources::memory_request),
            request_manager: manager_of(pod, &container.name, ["f:requests", "f:memory"]),
            allotted: running.and_then(|status| {
                let allotted = status.allocated_resources.as_ref()?.get("memory")?;
                Some(allotted.text())
            }),
            limit_manager: limit_manager(pod, &container.name),
            cpu_limit: container
                .resources
                .as_ref()
                .and_then(api::Resources::cpu_limit),
            cpu_request: container
                .resources
                .as_ref()
                .and_then(api::Resources::cpu_request),
            cpu_limit_manager: manager_of(pod, &container.name, ["f:limits", "f:cpu"]),
            restarts_on_resize: restarts_on("memory"),
            restarts_on_cpu_resize: restarts_on("cpu"),
            probes: [&container.liveness_probe, &container.startup_probe]
                .into_iter()
                .flatten()
                .map(probe)
                .collect(),
        }
    });
    let conditions = status.and_then(|status| status.conditions.as_deref());
    let has_condition = |kind: &str| {
        let mut conditions = conditions.unwrap_or_default().iter();
        conditions.any(|condition| condition.kind == kind && condition.status == "True")
    };
    let resize = status.and_then(|status| status.resize.as_deref());
    let mut annotations = pod.annotations().clone();
    let understood = ebpf_resize::understand(&mut annotations);
    let phase = status.and_then(|status| status.phase.as_deref());
    let ended = matches!(phase, Some("Succeeded" | "Failed"));
    Pod {
        namespace: pod.namespace().unwrap_or_default(),
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        qos: match status.and_then(|status| status.qos_class.as_deref()) {
            Some("Guaranteed") => QosClass::Guaranteed,
            Some("BestEffort") => QosClass::BestEffort,
            _ => QosClass::Burstable,
        },
        annotations,
        is_only_of_memory: understood == Ok(true),
        misread: understood.err(),
        labels: pod.labels().clone(),
        containers: containers.collect(),
        heirs: heirs(pod),
        init_containers: init_containers(pod),
        memory_limit: limit_at(pod, Level::Pod),
        limit_manager: limit_manager(pod, WHOLE_POD),
        has_memory_request: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.resources.as_ref()?.memory_request())
            .is_some(),
        has_cpu_limit: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.resources.as_ref()?.cpu_limit())
            .is_some(),
        has_resources: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.resources.as_ref())
            .is_some_and(|resources| !resources.is_empty()),
        reports_resources: status.is_some_and(|status| status.resources.is_some()),
        is_resize_pending: has_condition("PodResizePending")
            || matches!(resize, Some("Deferred" | "Infeasible")),
        is_resize_in_progress: has_condition("PodResizeInProgress")
            || matches!(resize, Some("Proposed" | "InProgress")),
        put_off: put_off(pod),
        requested: if ended { Bytes::ZERO } else { requested(pod) },
        priority: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.priority)
            .unwrap_or(0),
        is_static: pod.annotations().contains_key(MIRROR),
        ending: ended || pod.metadata.deletion_timestamp.is_some(),
    }
}

/// Running containers that have no memory limit of their own.
fn heirs(pod: &api::Pod) -> Vec<String> {
    let (Some(spec), Some(status)) = (&pod.spec, &pod.status) else {
        return Vec::new();
    };
    let has_none = |resources: &Option<api::Resources>| {
        let limit = resources.as_ref().and_then(api::Resources::memory_limit);
        limit.is_none()
    };
    let own = spec.containers.iter();
    let own = own.map(|container| (&container.name, has_none(&container.resources)));
    let init = spec.init_containers.iter().flatten();
    let init = init.map(|container| (&container.name, has_none(&container.resources)));
    let without: Vec<&String> = own
        .chain(init)
        .filter_map(|(name, has_none)| has_none.then_some(name))
        .collect();
    let statuses = [&status.container_statuses, &status.init_container_statuses];
    let statuses = statuses.into_iter().flatten().flatten();
    let running = statuses.filter(|status| {
        let state = status.state.as_ref();
        without.contains(&&status.name) && state.is_some_and(|state| state.running.is_some())
    });
    let ids = running.filter_map(|status| status.container_id.as_deref());
    ids.map(|id| container_id(id).to_owned()).collect()
}

fn init_containers(pod: &api::Pod) -> Vec<InitContainer> {
    let status = pod.status.as_ref();
    let statuses = status.and_then(|status| status.init_container_statuses.as_deref());
    let spec = pod.spec.as_ref();
    let containers = spec.and_then(|spec| spec.init_containers.as_deref());
    let containers = containers.unwrap_or_default().iter();
    let containers = containers.map(|container| {
        let mut statuses = statuses.unwrap_or_default().iter();
        let status = statuses.find(|status| status.name == container.name);
        let state = status.and_then(|status| status.state.as_ref());
        let is_running = state.is_some_and(|state| state.running.is_some());
        let ended = state.and_then(|state| state.terminated.as_ref());
        let has_ended = ended.is_some_and(|ended| ended.exit_code == Some(0));
        let id = status.and_then(|status| status.container_id.as_deref());
        let resources = container.resources.as_ref();
        InitContainer {
            name: container.name.clone(),
            is_sidecar: container.restart_policy.as_deref() == Some("Always"),
            id: id
                .filter(|_| is_running)
                .map(|id| container_id(id).to_owned()),
            memory_limit: resources.and_then(api::Resources::memory_limit),
            cpu_limit: resources.and_then(api::Resources::cpu_limit),
            is_done: has_ended && container.restart_policy.as_deref() != Some("Always"),
        }
    });
    containers.collect()
}

/// What a scheduler counts of a pod's memory (`PodRequests`, k8s.io/component-helpers/resource/helpers.go). What does not
/// parse counts as nothing.
fn requested(pod: &api::Pod) -> Bytes {
    let Some(spec) = &pod.spec else {
        return Bytes::ZERO;
    };
    let size = |text: Option<String>| {
        let size = text.and_then(|text| quantity::parse(&text).ok());
        size.unwrap_or_default()
    };
    let of = |resources: &Option<api::Resources>| {
        size(resources.as_ref().and_then(api::Resources::memory_request))
    };
    let (mut beside, mut most) = (Bytes::ZERO, Bytes::ZERO);
    for container in spec.init_containers.iter().flatten() {
        let own = of(&container.resources);
        most = most.max(beside.plus(own));
        if container.restart_policy.as_deref() == Some("Always") {
            beside = beside.plus(own);
        }
    }
    let containers = spec.containers.iter();
    let together = containers.fold(beside, |sum, container| sum.plus(of(&container.resources)));
    let whole = spec
        .resources
        .as_ref()
        .and_then(api::Resources::memory_request);
    let requested = whole.map_or(together.max(most), |whole| size(Some(whole)));
    let overhead = spec.overhead.as_ref();
    let overhead = overhead.and_then(|overhead| Some(overhead.get("memory")?.text()));
    requested.plus(size(overhead))
}

/// The controller that has made it, and would make another.
#[must_use]
pub fn owner(pod: &api::Pod) -> Option<Owner> {
    let mut owners = pod.owner_references().iter();
    let owner = owners.find(|owner| owner.controller == Some(true))?;
    Some(Owner {
        kind: owner.kind.clone(),
        name: owner.name.clone(),
    })
}

/// What the kubelet says of a resize that it does not carry out.
fn put_off(pod: &api::Pod) -> Option<PutOff> {
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let pending = conditions
        .find(|condition| condition.kind == "PodResizePending" && condition.status == "True")?;
    // Without the number (before 1.34) it is not known to be older.
    let said = pending.observed_generation.or(pod.metadata.generation);
    Some(PutOff {
        is_infeasible: pending.reason.as_deref() == Some("Infeasible"),
        message: pending.message.clone().unwrap_or_default(),
        is_current: said == pod.metadata.generation,
    })
}

/// The memory limit in the spec, as it was written.
#[must_use]
pub fn limit_at(pod: &api::Pod, level: Level) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let resources = match level {
        Level::Pod => spec.resources.as_ref(),
        Level::Container(index) => spec.containers.get(index)?.resources.as_ref(),
    };
    resources?.memory_limit()
}

/// The CPU limit of a container in the spec, as it was written.
#[must_use]
pub fn cpu_limit_at(pod: &api::Pod, index: usize) -> Option<String> {
    let container = pod.spec.as_ref()?.containers.get(index)?;
    container.resources.as_ref()?.cpu_limit()
}

/// Whether that was set by us.
#[must_use]
pub fn cpu_limit_is_ours(pod: &api::Pod, index: usize) -> bool {
    let containers = pod.spec.as_ref().map(|spec| &spec.containers);
    let container = containers.and_then(|containers| containers.get(index));
    let manager =
        container.and_then(|container| manager_of(pod, &container.name, ["f:limits", "f:cpu"]));
    manager.as_deref() == Some(MANAGER)
}

/// A probe with the API's own defaults for what it leaves open.
fn probe(probe: &api::Probe) -> Probe {
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
pub fn limit_manager(pod: &api::Pod, container: &str) -> Option<String> {
    manager_of(pod, container, ["f:limits", "f:memory"])
}

/// The same of a limit or request of any resource, as managed fields name them.
fn manager_of(pod: &api::Pod, container: &str, [kind, resource]: [&str; 2]) -> Option<String> {
    let key = format!("k:{}", json!({ "name": container }));
    let of_container = [
        "f:spec",
        "f:containers",
        &key,
        "f:resources",
        kind,
        resource,
    ];
    let path = if container == WHOLE_POD {
        &["f:spec", "f:resources", kind, resource][..]
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

    fn pod(managers: &[&str]) -> api::Pod {
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

    /// As the API prints one, with a part of what is not read.
    #[test]
    fn a_pod_of_the_api_is_understood() {
        let pod: api::Pod = serde_json::from_value(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": "web", "namespace": "dev", "uid": "0f8c", "annotations": null, "generation": 2 },
            "spec": {
                "overhead": { "memory": "1Mi", "cpu": "1m" },
                "initContainers": [
                    { "name": "proxy", "restartPolicy": "Always", "resources": { "requests": { "memory": "8Mi" } } },
                    { "name": "once", "resources": { "requests": { "memory": "16Mi" }, "limits": { "cpu": "1" } } },
                ],
                "volumes": [{ "name": "token", "projected": { "sources": [{}] } }],
                "resources": { "limits": { "memory": "2Gi", "cpu": 2 } },
                "containers": [{
                    "name": "app",
                    "image": "app:1",
                    "env": null,
                    "resources": { "limits": { "memory": 67108864 }, "requests": { "memory": "32Mi" } },
                    "resizePolicy": [{ "resourceName": "memory", "restartPolicy": "RestartContainer" }],
                    "livenessProbe": { "exec": { "command": ["true"] }, "periodSeconds": 5 },
                    "startupProbe": { "httpGet": { "port": 80 }, "failureThreshold": 30 },
                }, { "name": "side", "resources": {} }],
            },
            "status": {
                "phase": "Running",
                "qosClass": "Burstable",
                "resources": { "limits": { "memory": "2Gi", "cpu": 2 } },
                "conditions": [{
                    "type": "PodResizePending", "status": "True", "reason": "Deferred",
                    "message": "no room", "observedGeneration": 2,
                }],
                "initContainerStatuses": [
                    { "name": "proxy", "containerID": "containerd://ghi", "state": { "running": {} } },
                    { "name": "once", "containerID": "containerd://jkl", "state": { "terminated": { "exitCode": 0 } } },
                ],
                "containerStatuses": [
                    {
                        "name": "app", "containerID": "containerd://abc", "state": { "running": { "startedAt": null } },
                        "allocatedResources": { "cpu": "10m", "memory": "24Mi" },
                    },
                    { "name": "side", "containerID": "containerd://def", "state": { "waiting": {} } },
                ],
            },
        }))
        .unwrap();
        let seen = convert(&pod);
        // What waits or has ended has no cgroup.
        assert_eq!(seen.heirs, ["ghi"]);
        assert_eq!(seen.memory_limit.as_deref(), Some("2Gi"));
        assert!(seen.has_resources && seen.reports_resources);
        assert_eq!(seen.requested, Bytes::mib(32 + 8 + 1));
        assert_eq!((seen.qos, seen.ending), (QosClass::Burstable, false));
        assert!(seen.is_resize_pending);
        let put_off = PutOff {
            is_infeasible: false,
            message: "no room".to_owned(),
            is_current: true,
        };
        assert_eq!(seen.put_off, Some(put_off));
        let [proxy, once] = &seen.init_containers[..] else {
            panic!("{seen:?}")
        };
        assert_eq!((proxy.id.as_deref(), proxy.is_done), (Some("ghi"), false));
        assert!(proxy.is_sidecar && !once.is_sidecar);
        assert_eq!((once.id.as_deref(), once.is_done), (None, true));
        assert_eq!(once.cpu_limit.as_deref(), Some("1"));
        let [app, side] = &seen.containers[..] else {
            panic!("{seen:?}")
        };
        assert_eq!(app.memory_limit.as_deref(), Some("67108864"));
        assert_eq!(app.memory_request.as_deref(), Some("32Mi"));
        assert_eq!(app.allotted.as_deref(), Some("24Mi"));
        assert_eq!(app.id.as_deref(), Some("abc"));
        assert!(app.restarts_on_resize);
        assert!(!app.reports_resources && !seen.is_resize_in_progress);
        let kinds: Vec<_> = app.probes.iter().map(|probe| probe.kind).collect();
        assert_eq!(kinds, [ProbeKind::Exec, ProbeKind::Network]);
        assert_eq!(
            (side.id.as_deref(), side.memory_limit.as_deref()),
            (None, None)
        );
    }

    /// `status.resize` and resources in the status, as Kubernetes 1.31 prints them.
    #[test]
    fn an_older_status_is_understood() {
        let seen = |resize: &str| {
            let pod: api::Pod = serde_json::from_value(json!({
                "metadata": {},
                "spec": { "containers": [{ "name": "app" }] },
                "status": { "resize": resize, "containerStatuses": [
                    { "name": "app", "state": { "running": {} }, "resources": { "limits": { "memory": "64Mi" } } },
                ] },
            }))
            .unwrap();
            convert(&pod)
        };
        assert!(seen("").containers[0].reports_resources);
        assert!(!seen("").has_resources && !seen("").reports_resources);
        let of = |resize| {
            (
                seen(resize).is_resize_pending,
                seen(resize).is_resize_in_progress,
            )
        };
        assert_eq!(of(""), (false, false));
        for resize in ["Deferred", "Infeasible"] {
            assert_eq!(of(resize), (true, false));
        }
        for resize in ["Proposed", "InProgress"] {
            assert_eq!(of(resize), (false, true));
        }
    }
}
