//! What of a pod LimitRanges and ResourceQuotas count, as core has it.
//!
//! As `podLimits` and `podRequests` do (plugin/pkg/admission/limitranger/admission.go, 1.37): containers and sidecars
//! together, or what the pod has of its own; and apart from that what init containers need before them.

use std::collections::BTreeMap;

use bellows_core::{
    allowance::{Amounts, CountedPod},
    quantity,
};
use kube::ResourceExt as _;

use super::api;

/// A pod as it is counted. What does not parse counts as not there.
#[must_use]
pub fn counted(pod: &api::Pod) -> CountedPod {
    let spec = pod.spec.as_ref();
    let containers = spec.iter().flat_map(|spec| &spec.containers);
    let containers: BTreeMap<String, Amounts> = containers
        .map(|container| {
            (
                container.name.clone(),
                amounts(container.resources.as_ref()),
            )
        })
        .collect();
    let (mut sidecars, mut before) = (Amounts::default(), Amounts::default());
    for init in spec.iter().flat_map(|spec| &spec.init_containers).flatten() {
        let own = amounts(init.resources.as_ref());
        if init.restart_policy.as_deref() == Some("Always") {
            sidecars = sidecars.plus(own);
        } else {
            before = before.greatest(own.plus(sidecars));
        }
    }
    let together = containers.values().copied().fold(sidecars, Amounts::plus);
    CountedPod {
        namespace: pod.namespace().unwrap_or_default(),
        uid: pod.uid().unwrap_or_default(),
        is_terminating: spec
            .and_then(|spec| spec.active_deadline_seconds)
            .is_some_and(|seconds| seconds >= 0),
        priority_class: spec
            .and_then(|spec| spec.priority_class_name.clone())
            .filter(|name| !name.is_empty()),
        crosses_namespaces: spec
            .and_then(|spec| spec.affinity.as_ref())
            .is_some_and(crosses),
        containers,
        own: amounts(spec.and_then(|spec| spec.resources.as_ref())),
        together,
        before,
        version: version(pod),
    }
}

/// The version that a pod has in the API's store, where that is a number.
fn version(pod: &api::Pod) -> Option<u64> {
    pod.metadata.resource_version.as_deref()?.parse().ok()
}

fn amounts(resources: Option<&api::Resources>) -> Amounts {
    let memory = |text: Option<String>| Some(quantity::parse(&text?).ok()?.0);
    let cpu = |text: Option<String>| Some(quantity::parse_cpu_amount(&text?)?.0);
    resources.map_or_else(Amounts::default, |resources| Amounts {
        memory_limit: memory(resources.memory_limit()),
        memory_request: memory(resources.memory_request()),
        cpu_limit: cpu(resources.cpu_limit()),
        cpu_request: cpu(resources.cpu_request()),
    })
}

/// `usesCrossNamespacePodAffinity`, pkg/quota/v1/evaluator/core/pods.go.
fn crosses(affinity: &api::Affinity) -> bool {
    let crosses = |term: &api::AffinityTerm| {
        term.namespaces.as_ref().is_some_and(|all| !all.is_empty())
            || term.namespace_selector.is_some()
    };
    let all = [&affinity.pod_affinity, &affinity.pod_anti_affinity];
    all.into_iter().flatten().any(|affinity| {
        let required = affinity.required.iter().flatten();
        let preferred = affinity.preferred.iter().flatten();
        let preferred = preferred.map(|weighted| &weighted.pod_affinity_term);
        required.chain(preferred).any(crosses)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(spec: &Value) -> CountedPod {
        let pod = json!({
            "metadata": { "namespace": "dev", "uid": "u", "resourceVersion": "17" },
            "spec": spec,
        });
        let pod: api::Pod = serde_json::from_value(pod).unwrap();
        let counted = counted(&pod);
        assert_eq!(counted.version, Some(17));
        counted
    }

    #[test]
    fn what_runs_together_is_counted_together() {
        let resources = |memory: &str, cpu: &str| json!({ "limits": { "memory": memory, "cpu": cpu }, "requests": { "memory": "1Mi" } });
        let pod = of(&json!({
            "containers": [
                { "name": "app", "resources": resources("64Mi", "1") },
                { "name": "side", "resources": resources("32Mi", "500m") },
                { "name": "none" },
            ],
            "initContainers": [
                { "name": "first", "resources": resources("1Gi", "9") },
                { "name": "proxy", "resources": resources("4Mi", "100m"), "restartPolicy": "Always" },
                { "name": "second", "resources": resources("1Gi", "1") },
            ],
            "resources": { "limits": { "memory": "2Gi" } },
        }));
        assert_eq!(pod.containers["app"].memory_limit, Some(64 << 20));
        assert_eq!(pod.containers["none"], Amounts::default());
        let Amounts {
            memory_limit,
            memory_request,
            cpu_limit,
            cpu_request,
        } = pod.together;
        assert_eq!(memory_limit, Some(100 << 20));
        assert_eq!(memory_request, Some(3 << 20));
        assert_eq!((cpu_limit, cpu_request), (Some(1_600_000), None));
        // With the sidecar that runs by then.
        let before = (pod.before.memory_limit, pod.before.cpu_limit);
        assert_eq!(before, (Some((1 << 30) + (4 << 20)), Some(9_000_000)));
        assert_eq!(pod.own.memory_limit, Some(2 << 30));
        assert!(!pod.is_terminating && !pod.crosses_namespaces && pod.priority_class.is_none());
    }

    #[test]
    fn scopes_are_told_from_the_spec() {
        let affinity = |term: &Value| {
            let weighted = json!([{ "weight": 1, "podAffinityTerm": term }]);
            let anti = json!({ "preferredDuringSchedulingIgnoredDuringExecution": weighted });
            of(&json!({ "containers": [], "affinity": { "podAntiAffinity": anti } }))
        };
        assert!(
            affinity(&json!({ "topologyKey": "x", "namespaceSelector": {} })).crosses_namespaces
        );
        assert!(affinity(&json!({ "topologyKey": "x", "namespaces": ["a"] })).crosses_namespaces);
        assert!(!affinity(&json!({ "topologyKey": "x", "namespaces": null })).crosses_namespaces);
        let pod = of(&json!({
            "containers": [], "activeDeadlineSeconds": 0, "priorityClassName": "high",
        }));
        assert!(pod.is_terminating);
        assert_eq!(pod.priority_class.as_deref(), Some("high"));
    }
}
