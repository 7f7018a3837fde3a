//! Pods: annotations and limits as anybody who may edit a pod can write them.

use bellows::attribution::{api, pods::convert};
use bellows_core::{
    Bytes, Cpu, Nanos,
    elastic::{ContainerRules, CpuRules, ElasticPolicy, MemoryRules, Mode, Order, Selector},
    pod::{
        CONTAINER, CpuWish, Level, MANAGER, MAX_MEMORY, MODE, ORIGINAL, ORIGINAL_CPU, Pod,
        QosClass, Wish, cpu_wishes, left_raised, wishes, with_original,
    },
    quantity,
};
use serde_json::{Value, json};

const NAME: &str = "app";

/// The lines of a text: four annotations, the limit, its manager, switches, managed fields. An empty
/// line is something that the pod does not have.
pub(crate) fn annotations(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.splitn(8, '\n');
    let mut line = || lines.next().filter(|line| !line.is_empty());
    let mut annotations: serde_json::Map<String, Value> = [MODE, MAX_MEMORY, CONTAINER, ORIGINAL]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), json!(line()?))))
        .collect();
    // What fits for memory is tried for CPU as well.
    if let Some(original) = annotations.get(ORIGINAL).cloned() {
        annotations.insert(ORIGINAL_CPU.to_owned(), original);
    }
    let (limit, manager, switches) = (line(), line(), line().unwrap_or_default());
    let has = |switch| switches.contains(switch);
    // As the API has them, if what is there is JSON at all.
    let fields: Value = line()
        .and_then(|line| serde_json::from_str(line).ok())
        .unwrap_or_else(|| {
            json!({ "f:spec": { "f:containers": { "k:{\"name\":\"app\"}": {
                "f:resources": { "f:limits": { "f:memory": {} } },
            } } } })
        });
    let limits = json!({ "limits": limit.map(|limit| json!({ "memory": limit, "cpu": limit })) });
    let (of_pod, of_container) = if has('p') {
        (limits, json!({}))
    } else {
        (json!({}), limits)
    };
    let mut containers = vec![json!({
        "name": NAME,
        "resources": of_container,
        "resizePolicy": has('r')
            .then(|| json!([{ "resourceName": "memory", "restartPolicy": "RestartContainer" }])),
    })];
    if has('2') {
        containers.push(json!({ "name": "other" }));
    }
    let pod: api::Pod = serde_json::from_value(json!({
        "metadata": {
            "name": "pod",
            "namespace": "default",
            "uid": "0f8c-11aa",
            "annotations": annotations,
            "managedFields": [{ "manager": manager, "fieldsV1": fields }],
        },
        "spec": { "containers": containers, "resources": of_pod },
        "status": {
            "phase": if has('e') { "Failed" } else { "Running" },
            "qosClass": if has('g') { "Guaranteed" } else { "Burstable" },
            "containerStatuses": [{
                "name": NAME,
                "image": "",
                "imageID": "",
                "ready": true,
                "restartCount": 0,
                "containerID": "containerd://abcdef",
                "state": if has('w') { json!({ "waiting": {} }) } else { json!({ "running": {} }) },
            }],
        },
    }))
    .expect("a pod of the right shape");
    let pod = convert(&pod);
    let policies: Vec<ElasticPolicy> = has('l').then(policy).into_iter().collect();
    for wish in wishes(&pod, &policies).into_values() {
        match wish {
            Ok(wish) => is_allowed(&pod, &policies, &wish),
            Err(refusal) => {
                assert!(!refusal.reason().is_empty() && !refusal.to_string().is_empty());
            }
        }
    }
    for (name, wish) in cpu_wishes(&pod, &policies) {
        match wish {
            Ok(wish) => is_cpu_allowed(&pod, &policies, &name, &wish),
            Err(refusal) => {
                assert!(!refusal.reason().is_empty() && !refusal.to_string().is_empty());
            }
        }
    }
    for raised in left_raised(&pod) {
        assert_ne!(raised.limit, raised.rest);
    }
}

/// A policy that means every container.
fn policy() -> ElasticPolicy {
    ElasticPolicy {
        name: "default/all".to_owned(),
        selector: Selector::default(),
        mode: Mode::Act,
        containers: vec![ContainerRules {
            name: None,
            memory: Some(MemoryRules {
                max: Bytes::mib(4096),
                floor: Some(Bytes::mib(64)),
                shrink_after: Nanos::millis(5000),
                hold_at_most: None,
                order: Order::PatchFirst,
                parallelism: bellows_core::elastic::Parallelism::Unchanged,
                heap: None,
                requests: None,
            }),
            cpu: Some(CpuRules {
                max: Cpu::millis(4000),
                throttled_per_mille: 0,
            }),
            boosts: Vec::new(),
        }],
    }
}

fn is_allowed(pod: &Pod, policies: &[ElasticPolicy], meant: &Wish) {
    let mode = pod.annotations.get(MODE).map(|mode| mode.trim());
    assert_ne!(mode, Some("Off"));
    assert_ne!(meant.mode, Mode::Off);
    assert_ne!(pod.qos, QosClass::Guaranteed);
    let limit = match meant.level {
        Level::Pod => &pod.memory_limit,
        Level::Container(index) => {
            let container = &pod.containers[index];
            assert_eq!(container.name, meant.container);
            assert!(!container.restarts_on_resize);
            &container.memory_limit
        }
    };
    assert_eq!(limit.as_deref(), Some(meant.limit_text.as_str()));
    assert!(!pod.ending);
    assert!(meant.rest <= meant.ceiling);
    // Above what it was only where a request was raised beyond that.
    assert!(meant.rest <= meant.original.max(meant.limit));
    assert_eq!(quantity::parse(&meant.limit_text), Ok(meant.limit));
    assert_eq!(quantity::parse(&meant.original_text), Ok(meant.original));
    assert_eq!(quantity::parse(&meant.rest_text), Ok(meant.rest));
    if meant.policy.is_none() {
        let maximum = quantity::parse(&pod.annotations[MAX_MEMORY]);
        assert_eq!(maximum, Ok(meant.ceiling));
    }
    assert!(!meant.recorded || !meant.foreign);
    // What is recorded on the pod before the first raise is read back after it.
    let mut raised = pod.clone();
    let original = with_original(pod, ORIGINAL, &meant.container, &meant.original_text);
    raised.annotations.insert(ORIGINAL.to_owned(), original);
    let (limit, manager) = match meant.level {
        Level::Pod => (&mut raised.memory_limit, &mut raised.limit_manager),
        Level::Container(index) => {
            let container = &mut raised.containers[index];
            (&mut container.memory_limit, &mut container.limit_manager)
        }
    };
    *limit = Some(quantity::format(meant.ceiling));
    *manager = Some(MANAGER.to_owned());
    let again = wishes(&raised, policies)
        .remove(&meant.container)
        .expect("it was guarded before")
        .expect("it was allowed before");
    assert_eq!(again.original, meant.original);
    assert_eq!(again.original_text, meant.original_text);
    assert!(again.recorded && !again.foreign);
}

fn is_cpu_allowed(pod: &Pod, policies: &[ElasticPolicy], name: &str, meant: &CpuWish) {
    let container = &pod.containers[meant.index];
    assert_eq!(container.name, name);
    assert!(!pod.ending && !pod.is_static && !container.restarts_on_cpu_resize);
    assert_ne!(pod.qos, QosClass::Guaranteed);
    assert_eq!(
        container.cpu_limit.as_deref(),
        Some(meant.limit_text.as_str())
    );
    assert_eq!(quantity::parse_cpu(&meant.limit_text), Ok(meant.limit));
    assert_eq!(
        quantity::parse_cpu(&meant.original_text),
        Ok(meant.original)
    );
    assert!(!meant.recorded || !meant.foreign);
    // Without rules it is there only to be brought to rest.
    assert!(meant.has_rules() || meant.limit != meant.original);
    assert!(meant.rules.is_none_or(|rules| rules.max >= meant.original));
    if !meant.has_rules() {
        return;
    }
    let mut raised = pod.clone();
    let original = with_original(pod, ORIGINAL_CPU, name, &meant.original_text);
    raised.annotations.insert(ORIGINAL_CPU.to_owned(), original);
    let container = &mut raised.containers[meant.index];
    container.cpu_limit = Some("4".to_owned());
    container.cpu_limit_manager = Some(MANAGER.to_owned());
    let again = cpu_wishes(&raised, policies)
        .remove(name)
        .expect("it was meant before")
        .expect("it was allowed before");
    assert_eq!(again.original_text, meant.original_text);
    assert!(again.recorded && !again.foreign);
}
