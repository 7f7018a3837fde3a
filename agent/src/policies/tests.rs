use bellows_core::{
    Bytes, Cpu,
    boost::{Program, Ready, Trigger, Until},
    heap::Heap,
    requests::RequestRules,
};

use super::*;

const GOOD: &str = "\
apiVersion: bellows.dev/v1alpha1
kind: ElasticPolicy
metadata:
  name: workspaces
spec:
  mode: Act
  selector:
    namespaces: [dev]
    matchLabels:
      app: workspace
  containers:
  - name: ide
    memory:
      max: 4Gi
      floor: 128Mi
      shrinkAfter: 1m30s
      requests: {makeRoom: true, floor: 64Mi, margin: 10%}
      heap: 512Mi
    cpu: {max: 1.5, throttleTarget: 2.5%}
  - memory: {max: 1073741824, parallelism: Elastic, holdAtMost: 5m}
    boosts:
    - on: {start: true}
      cpu: 1800m
      until: {idle: 7s, ready: {port: 80, path: /ok}}
    - on: {exec: java, arguments: [-jar]}
      memory: 2Gi
      until: {exit: true, atMost: 1h}
";

/// Where and why a file with one change is refused.
fn refused(from: &str, to: &str) -> (u64, String) {
    assert!(GOOD.contains(from), "{from}");
    let problem = parse(&GOOD.replacen(from, to, 1)).expect_err(to);
    (problem.line, problem.what)
}

#[test]
fn reads_what_it_documents() {
    let policies = parse(GOOD).unwrap();
    let [policy] = &policies[..] else {
        panic!("{policies:?}")
    };
    assert_eq!(
        (policy.name.as_str(), policy.mode),
        ("workspaces", Mode::Act)
    );
    assert_eq!(policy.selector.namespaces, ["dev"]);
    assert_eq!(policy.selector.labels["app"], "workspace");
    let [named, every] = &policy.containers[..] else {
        panic!("{policy:?}")
    };
    assert_eq!(named.name.as_deref(), Some("ide"));
    let memory = MemoryRules {
        max: Bytes::mib(4096),
        floor: Some(Bytes::mib(128)),
        shrink_after: Nanos::millis(90_000),
        hold_at_most: None,
        order: Order::PatchFirst,
        parallelism: Parallelism::Unchanged,
        heap: Some(Heap::At(Bytes::mib(512))),
        requests: Some(RequestRules {
            right_size: false,
            make_room: true,
            floor: Bytes::mib(64),
            margin_per_mille: 100,
            observe: Nanos::millis(3_600_000),
        }),
    };
    assert_eq!(named.memory, Some(memory));
    for (word, heap) in [("Original", Heap::Original), ("Maximum", Heap::Maximum)] {
        let policies = parse(&GOOD.replace("heap: 512Mi", &format!("heap: {word}")));
        let memory = policies.unwrap()[0].containers[0].memory;
        assert_eq!(memory.and_then(|memory| memory.heap), Some(heap));
    }
    let cpu = CpuRules {
        max: Cpu::millis(1500),
        throttled_per_mille: 25,
    };
    assert_eq!((named.cpu, every.cpu), (Some(cpu), None));
    let memory = every.memory.unwrap();
    assert_eq!(
        (memory.max, memory.shrink_after, memory.parallelism),
        (Bytes::mib(1024), SHRINK_AFTER, Parallelism::Elastic)
    );
    assert_eq!(memory.hold_at_most, Some(Nanos::millis(300_000)));
    let [start, exec] = &every.boosts[..] else {
        panic!("{every:?}")
    };
    assert_eq!(start.on, Trigger::Start);
    assert_eq!((start.cpu, start.memory), (Some(Cpu::millis(1800)), None));
    let until = Until {
        ready: Some(Ready {
            port: 80,
            path: Some("/ok".to_owned()),
        }),
        exit: false,
        idle: Some(Nanos::millis(7000)),
        at_most: Nanos::millis(120_000),
    };
    assert_eq!(start.until, until);
    let java = Program {
        file: "java".to_owned(),
        arguments: vec!["-jar".to_owned()],
    };
    assert_eq!(exec.on, Trigger::Exec(java));
    assert_eq!(exec.memory, Some(Bytes::mib(2048)));
    assert!(exec.until.exit && exec.until.at_most == Nanos::millis(3_600_000));
}

#[test]
fn the_example_is_one() {
    let text: String = EXAMPLE
        .lines()
        .skip(1)
        .map(|line| format!("{}\n", line.strip_prefix("  ").unwrap_or(line)))
        .collect();
    let policies = parse(&text).unwrap();
    assert_eq!(
        told(&policies),
        "workspaces (Act): dev, app=workspace: ide: memory up to 4 GiB, at rest 128 MiB, held for 10 s at most, jobs wait where it does not suffice, heaps by its own limit; request down for pods of higher priority, 64 MiB at least; CPU up to 2000m; at its start 2000m CPU; for make all 2 GiB of memory\n"
    );
}

#[test]
fn several_stand_in_one_file_and_observe_is_the_default() {
    let second = GOOD
        .replace("workspaces", "others")
        .replace("  mode: Act\n", "");
    let policies = parse(&format!("{GOOD}---\n{second}")).unwrap();
    assert_eq!(policies.len(), 2);
    assert_eq!(policies[1].mode, Mode::Observe);
    let problem = parse(&format!("{GOOD}---\n{GOOD}")).unwrap_err();
    assert_eq!(problem.line, 32);
    assert!(problem.what.contains("second policy"), "{problem}");
}

#[test]
fn what_is_wrong_is_named_with_its_line_and_what_to_write() {
    for (from, to, line, words) in [
        ("floor:", "flor:", 15, "did you mean `floor`"),
        ("selector:", "selectors:", 7, "did you mean `selector`"),
        (
            "matchLabels",
            "matchlabels",
            9,
            "did you mean `matchLabels`",
        ),
        ("mode: Act", "mode: act", 6, "did you mean `Act`"),
        ("max: 4Gi", "max: 4GB", 14, "unknown unit `GB`"),
        ("max: 4Gi", "max: -4Gi", 14, "no memory size"),
        ("max: 4Gi", "max: 100m", 14, "too small"),
        ("max: 4Gi", "max: 64Mi", 15, "above max"),
        ("shrinkAfter: 1m30s", "shrinkAfter: soon", 16, "such as 5s"),
        (
            "shrinkAfter: 1m30s",
            "shrinkAfter: 0s",
            16,
            "from 1s to 24h",
        ),
        (
            "shrinkAfter: 1m30s",
            "shrinkAfter: -5s",
            16,
            "from 1s to 24h",
        ),
        ("max: 1.5", "max: 1.5x", 19, "such as 2 or 250m"),
        ("max: 1.5", "max: 1m", 19, "at least 10m"),
        ("2.5%", "2.5", 19, "such as 5%"),
        ("2.5%", "60%", 19, "0% to 50%"),
        ("2.5%", "0.05%", 19, "0% to 50%"),
        (
            "throttleTarget",
            "throttledTarget",
            19,
            "did you mean `throttleTarget`",
        ),
        ("v1alpha1", "v1", 1, "write bellows.dev/v1alpha1"),
        ("kind: ElasticPolicy", "kind: Pod", 2, "write ElasticPolicy"),
        ("name: workspaces", "name: ''", 4, "needs a name"),
        ("{start: true}", "{}", 22, "write `start: true`"),
        ("start: true", "start: true, exec: x", 22, "two triggers"),
        ("start: true", "start: true, arguments: [x]", 22, "`exec`"),
        ("cpu: 1800m", "cpu: 1m", 23, "at least 10m"),
        ("cpu: 1800m", "cpus: 2", 23, "did you mean `cpu`"),
        ("      cpu: 1800m\n", "", 22, "a boost of nothing"),
        ("idle: 7s", "exit: true", 24, "a start has no `exit`"),
        ("idle: 7s", "idle: 7", 24, "such as 5s"),
        ("port: 80,", "port: 0,", 24, "no port 0"),
        ("port: 80,", "port: 70000,", 24, "check --help"),
        ("path: /ok", "path: ok", 24, "such as /healthz"),
        ("path: /ok", "path: '/o k'", 24, "such as /healthz"),
        ("exec: java", "exec: bin/", 25, "no program"),
        ("atMost: 1h", "atMost: 25h", 27, "from 1s to 24h"),
        ("floor: 64Mi", "floor: 64", 17, "too small"),
        ("makeRoom: true", "makeRoom: false", 17, "neither"),
        ("makeRoom", "makeroom", 17, "did you mean `makeRoom`"),
        ("margin: 10%", "margin: 10Mi", 17, "such as 25%"),
        ("margin: 10%", "margin: 500%", 17, "0% to 400%"),
        (
            "heap: 512Mi",
            "heap: original",
            18,
            "write Original, Maximum",
        ),
        ("heap: 512Mi", "heap: 5Gi", 18, "above max"),
        ("heap: 512Mi", "heap: 8Mi", 18, "at least 16Mi"),
        ("heap: 512Mi", "heaps: 512Mi", 18, "did you mean `heap`"),
        ("holdAtMost: 5m", "holdAtMost: 0s", 20, "from 1s to 24h"),
        ("holdAtMost", "holdatmost", 20, "did you mean `holdAtMost`"),
        ("- memory:", "- name: ide\n    memory:", 20, "take one out"),
    ] {
        let (at, what) = refused(from, to);
        assert_eq!(at, line, "{to}: {what}");
        assert!(what.contains(words), "{to}: {what}");
    }
    let text = GOOD.split("  containers:").next().unwrap();
    let problem = parse(&format!("{text}  containers: []\n")).unwrap_err();
    assert_eq!(problem.line, 11);
    assert!(parse(text).unwrap_err().what.contains("containers"));
}

#[test]
fn whatever_is_no_policy_is_an_error_and_no_panic() {
    for text in [
        "{",
        "a",
        "- - -",
        "\u{0}",
        "a: *b",
        "&a [*a]",
        "? :",
        "!!binary x",
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
    // Nothing is no policy, and nothing wrong.
    assert_eq!(parse("").unwrap(), []);
}

#[test]
fn an_object_of_the_api_is_a_policy_of_its_namespace() {
    let spec = serde_json::json!({
        "mode": "Act",
        "selector": { "matchLabels": { "app": "shop" } },
        "containers": [{ "memory": { "max": "4Gi", "shrinkAfter": "7s" } }],
    });
    let policy = of_object("dev/shop", "dev", &spec).unwrap();
    assert_eq!((policy.name.as_str(), policy.mode), ("dev/shop", Mode::Act));
    assert_eq!(policy.selector.namespaces, ["dev"]);
    assert_eq!(policy.containers[0].memory.unwrap().max, Bytes::mib(4096));
    for (spec, part) in [
        (serde_json::json!({ "containers": [] }), "no rules"),
        (
            serde_json::json!({ "containers": [{ "memory": { "maximum": 1 } }] }),
            "did you mean `max`",
        ),
        (
            serde_json::json!({ "selector": { "namespaces": ["a"] }, "containers": [{}] }),
            "its own namespace",
        ),
        (serde_json::Value::Null, ""),
    ] {
        let why = of_object("a/b", "a", &spec).unwrap_err();
        assert!(why.contains(part), "{why}");
    }
}

/// What the API server lets through and what is read are the same fields.
#[test]
fn the_resource_definition_has_every_field() {
    fn missing(document: &serde_json::Value, schema: &serde_json::Value, at: &str) -> Vec<String> {
        match document {
            serde_json::Value::Object(fields) if schema.get("additionalProperties").is_some() => {
                assert!(!fields.is_empty(), "{at}");
                Vec::new()
            }
            // What it does not know must reach whoever refuses it.
            serde_json::Value::Object(_)
                if schema["x-kubernetes-preserve-unknown-fields"] != true =>
            {
                vec![format!("{at} drops what it does not know")]
            }
            serde_json::Value::Object(fields) => fields
                .iter()
                .flat_map(|(name, value)| {
                    let at = format!("{at}.{name}");
                    let named = &schema["properties"][name];
                    if named.is_null() {
                        vec![at]
                    } else {
                        missing(value, named, &at)
                    }
                })
                .collect(),
            serde_json::Value::Array(items) => items
                .iter()
                .flat_map(|item| missing(item, &schema["items"], at))
                .collect(),
            _ => Vec::new(),
        }
    }
    let definition = include_str!("../../../deploy/elasticpolicies.yaml");
    let definition: serde_json::Value = serde_saphyr::from_str(definition).unwrap();
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let (_, example) = EXAMPLE.split_once(":\n").unwrap();
    let example: serde_json::Value = serde_saphyr::from_str(example).unwrap();
    let missing = missing(&example["spec"], &schema["properties"]["spec"], "spec");
    // A file has no namespace of its own.
    assert_eq!(missing, ["spec.selector.namespaces"]);
}
