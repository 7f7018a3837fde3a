//! Pods: annotations and limits as anybody who may edit a pod can write them.

use bellows::attribution::{api, pods::convert};
use bellows_core::{
    pod::{CONTAINER, Level, MANAGER, MAX_MEMORY, MODE, ORIGINAL, Pod, QosClass, Wish, wish},
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
    let annotations: serde_json::Map<String, Value> = [MODE, MAX_MEMORY, CONTAINER, ORIGINAL]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), json!(line()?))))
        .collect();
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
    let limits = json!({ "limits": limit.map(|limit| json!({ "memory": limit })) });
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
    match wish(&pod) {
        Ok(None) => {}
        Ok(Some(wish)) => is_allowed(&pod, &wish),
        Err(refusal) => {
            assert!(!refusal.reason().is_empty() && !refusal.to_string().is_empty());
        }
    }
}

fn is_allowed(pod: &Pod, meant: &Wish) {
    assert_eq!(pod.annotations[MODE].trim(), "Act");
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
    assert!(meant.original <= meant.ceiling);
    assert_eq!(quantity::parse(&meant.limit_text), Ok(meant.limit));
    assert_eq!(quantity::parse(&meant.original_text), Ok(meant.original));
    assert_eq!(
        quantity::parse(&pod.annotations[MAX_MEMORY]),
        Ok(meant.ceiling)
    );
    assert!(!meant.recorded || !meant.foreign);
    // What is recorded on the pod before the first raise is read back after it.
    let mut raised = pod.clone();
    let original = format!("{}={}", meant.container, meant.original_text);
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
    let again = wish(&raised)
        .expect("it was allowed before")
        .expect("it was guarded before");
    assert_eq!(again.original, meant.original);
    assert_eq!(again.original_text, meant.original_text);
    assert!(again.recorded && !again.foreign);
}
