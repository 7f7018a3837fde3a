//! The tier `deploy`: what the chart gives for which values, and what an API server makes of it.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{CHART, RENDERED, codegen, helm, installed, kustomize, template};
use crate::{
    checks::Checks,
    root,
    shell::{output, quiet},
};

/// Runs the tier.
pub(crate) fn tier(checks: &mut Checks) -> Result<()> {
    let helm = helm()?;
    let kustomize = kustomize()?;
    for (name, values) in VALUES {
        checks.check(&format!("helm lint: {name}"), lint(&helm, values));
        let judged = rendered("bellows", values).and_then(|all| judge(&all, values));
        checks.check(&format!("helm template: {name}"), judged);
    }
    checks.check(
        "the policies of admission follow the namespace, and nothing else",
        follows_namespace(),
    );
    for (set, part) in WRONG {
        checks.check(&format!("refused: {set}"), refused(&helm, set, part));
    }
    let built = codegen(true).and_then(|is_same| {
        ensure!(is_same, "something is not what the chart gives");
        Ok(())
    });
    checks.check("what is generated from the chart is up to date", built);
    for mode in ["observe", "act"] {
        checks.check(&format!("kustomize: {mode}"), overlay(&kustomize, mode));
    }
    installed::checks(checks, &helm)
}

/// Values that the chart is rendered with.
const VALUES: [(&str, Option<&str>); 5] = [
    ("default", None),
    ("act", Some("deploy/chart/ci/act.yaml")),
    ("all options", Some("deploy/chart/ci/all.yaml")),
    (
        "words that YAML takes for something else",
        Some("deploy/chart/ci/words.yaml"),
    ),
    ("as in deploy/bellows.yaml", Some(RENDERED)),
];

/// Values that are refused, and a part of what is said of each.
const WRONG: [(&str, &str); 12] = [
    ("moed=Act", "moed"),
    ("mode=act", "mode"),
    ("mode=Recommend", "mode"),
    ("metrics.enable=true", "enable"),
    ("metrics.enabled=yes", "enabled"),
    ("metrics.port=0", "port"),
    ("health.port=65536", "port"),
    ("policy.namespaces={dev}", "max"),
    ("policy.memory.max=4GB", "max"),
    ("requests.enabled=yes", "enabled"),
    ("image.digest=sha256:12", "digest"),
    ("resources.agent.limit.memory=1Gi", "limit"),
];

fn lint(helm: &Path, values: Option<&str>) -> Result<()> {
    let mut command = Command::new(helm);
    command.args(["lint", "--strict", CHART]);
    command.args(values.into_iter().flat_map(|file| ["--values", file]));
    quiet(command.current_dir(root()?))
}

fn refused(helm: &Path, set: &str, part: &str) -> Result<()> {
    let mut command = Command::new(helm);
    command.args(["template", "bellows", CHART, "--set", set]);
    let Err(error) = quiet(command.current_dir(root()?)) else {
        bail!("it was taken");
    };
    let text = format!("{error:#}");
    let about = "values don't meet the specifications of the schema";
    let is_named = text
        .split_once(about)
        .is_some_and(|(_, why)| why.contains(part));
    ensure!(is_named, "{text}");
    Ok(())
}

fn rendered(namespace: &str, values: Option<&str>) -> Result<Vec<Value>> {
    let options: Vec<&str> = values.iter().flat_map(|file| ["--values", file]).collect();
    parsed(&template(namespace, &options)?)
}

/// The documents of a file in YAML.
fn parsed(text: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text)?;
    Ok(documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect())
}

fn of_kind<'a>(all: &'a [Value], kind: &str) -> Vec<&'a Value> {
    all.iter().filter(|object| object["kind"] == kind).collect()
}

fn only<'a>(all: &'a [Value], kind: &str) -> Result<&'a Value> {
    match of_kind(all, kind)[..] {
        [only] => Ok(only),
        ref found => bail!("{} of kind {kind}", found.len()),
    }
}

fn only_named<'a>(all: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let mut found = of_kind(all, kind).into_iter();
    let found = found.find(|object| object["metadata"]["name"] == name);
    found.with_context(|| format!("no {kind} {name}"))
}

/// What must hold whatever the options are, and what must follow them.
fn judge(all: &[Value], values: Option<&str>) -> Result<()> {
    let values: Value = match values {
        Some(file) => serde_saphyr::from_str(&fs::read_to_string(root()?.join(file))?)?,
        None => json!({}),
    };
    let acts = values["mode"] == "Act";
    may_do(all, acts)?;
    ends(all, acts)?;
    let spec = &only(all, "DaemonSet")?["spec"]["template"]["spec"];
    let containers = spec["containers"].as_array().context("no containers")?;
    let [agent, releaser] = &containers[..] else {
        bail!("not two containers");
    };
    ensure!(agent["name"] == "agent" && releaser["name"] == "releaser");
    let moves_requests = acts && values["requests"]["enabled"] == true;
    ensure!(has(&agent["args"], "--requests") == moves_requests);
    for container in containers {
        let context = &container["securityContext"];
        ensure!(context["readOnlyRootFilesystem"] == true);
        ensure!(container["resources"]["limits"]["memory"].is_string());
        ensure!(container["image"] == image(&values));
        let mut env = container["env"].as_array().into_iter().flatten();
        let log = env.find(|own| own["name"] == "BELLOWS_LOG");
        let log = log.map(|log| &log["value"]);
        let wanted = values["log"].as_str().unwrap_or("info");
        ensure!(log.is_some_and(|log| log == wanted), "{log:?}");
    }
    let is_privileged = values["privileged"] == true;
    ensure!(agent["securityContext"]["privileged"] == is_privileged);
    for context in [&agent["securityContext"], &releaser["securityContext"]]
        .into_iter()
        .skip(usize::from(is_privileged))
    {
        ensure!(context["allowPrivilegeEscalation"] == false);
        ensure!(context["capabilities"]["drop"] == json!(["ALL"]));
    }
    ensure!(
        (spec["hostPID"] == true)
            == (values["hostPID"] == true || values["elasticParallelism"] == true)
    );
    let class = values["priorityClassName"].as_str();
    let class = class.unwrap_or("system-node-critical");
    let own = spec["priorityClassName"].as_str().unwrap_or_default();
    ensure!(own == class, "{}", spec["priorityClassName"]);
    for field in ["hostNetwork", "hostIPC"] {
        ensure!(spec[field].is_null(), "{field}");
    }
    let volumes = spec["volumes"].as_array().context("no volumes")?;
    let paths: Vec<&Value> = volumes
        .iter()
        .map(|volume| &volume["hostPath"]["path"])
        .collect();
    let mut expected = vec![json!("/sys/fs/cgroup"), json!("/run/bellows")];
    let is_plugin = acts && values["nri"]["enabled"] == true;
    if is_plugin {
        expected.push(json!("/var/run/nri"));
    }
    ensure!(has(&agent["args"], "--nri") == is_plugin);
    ensure!(paths == expected.iter().collect::<Vec<_>>(), "{paths:?}");
    // At whatever address the kubelet asks: pods may have none of IPv4.
    let args = agent["args"].as_array().into_iter().flatten();
    let mut args = args.filter_map(Value::as_str);
    let address = args.find(|word| *word == "--health").and(args.next());
    let port = values["health"]["port"].as_u64().unwrap_or(9465);
    ensure!(
        address == Some(format!("[::]:{port}").as_str()),
        "{address:?}"
    );
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        ensure!(agent[probe]["httpGet"]["port"] == "health", "{probe}");
    }
    let has_metrics = values["metrics"]["enabled"] == true;
    ensure!(has(&agent["args"], "--metrics") == has_metrics);
    let ports = agent["ports"].as_array().map_or(0, Vec::len);
    ensure!(ports == 1 + usize::from(has_metrics));
    let network = &only(all, "NetworkPolicy")?["spec"];
    let ingress = network["ingress"].as_array().map_or(0, Vec::len);
    ensure!(ingress == ports, "the network lets in more than is served");
    ensure!(
        network["podSelector"]["matchLabels"]
            == only(all, "DaemonSet")?["spec"]["selector"]["matchLabels"]
    );
    let wanted = values["policy"]["namespaces"].as_array();
    let policies = of_kind(all, "ElasticPolicy");
    ensure!(policies.len() == wanted.map_or(0, Vec::len));
    for (policy, namespace) in policies.iter().zip(wanted.into_iter().flatten()) {
        ensure!(policy["metadata"]["namespace"] == *namespace);
        ensure!(policy["spec"]["mode"] == values["mode"]);
        let max = &policy["spec"]["containers"][0]["memory"]["max"];
        ensure!(*max == values["policy"]["memory"]["max"]);
    }
    Ok(())
}

/// What the chart makes of the values of an image.
fn image(values: &Value) -> String {
    let image = &values["image"];
    match (image["repository"].as_str(), image["digest"].as_str()) {
        (Some(repository), Some(digest)) => format!("{repository}@{digest}"),
        _ => "bellows.dev/agent:dev".to_owned(),
    }
}

fn has(list: &Value, word: &str) -> bool {
    list.as_array()
        .is_some_and(|list| list.iter().any(|item| item == word))
}

/// Whether the agent is told to act, and may, or neither.
fn may_do(all: &[Value], acts: bool) -> Result<()> {
    let role = only(all, "ClusterRole")?;
    let mut rights: Vec<String> = Vec::new();
    for rule in role["rules"].as_array().context("no rules")? {
        let words = |key: &str| {
            let words = rule[key].as_array().into_iter().flatten();
            words
                .filter_map(Value::as_str)
                .collect::<Vec<_>>()
                .join(" ")
        };
        rights.push(format!("{}: {}", words("resources"), words("verbs")));
    }
    let pods: &[&str] = if acts {
        &[
            "pods: get list watch patch",
            "pods/resize: patch",
            "limitranges resourcequotas: list watch",
            "horizontalpodautoscalers verticalpodautoscalers: list watch",
        ]
    } else {
        &["pods: list watch"]
    };
    let others = [
        "elasticpolicies: list watch",
        "elasticpolicies/status: patch",
        "elasticnodes: create patch delete",
        "elasticnodes/status: patch",
        "events: create",
    ];
    let expected: Vec<&str> = pods.iter().chain(&others).copied().collect();
    ensure!(rights == expected, "it may {rights:?}");
    let daemons = only(all, "DaemonSet")?;
    let args = &daemons["spec"]["template"]["spec"]["containers"][0]["args"];
    ensure!(args[0] == "run" && has(args, "--observe") != acts, "{args}");
    ensure!(has(args, "--restore-with") == acts, "{args}");
    let moves_requests = has(args, "--requests");
    for part in [
        "name == \"memory\" || old.resources.requests",
        "-cpu\", \"bellows.dev/original-requests\"] ||",
    ] {
        let agents = only_named(all, "ValidatingAdmissionPolicy", "bellows-agent")?;
        let text = agents["spec"]["validations"]
            .as_array()
            .context("no validations")?;
        let mut expressions = text.iter().filter_map(|own| own["expression"].as_str());
        ensure!(
            expressions.any(|own| own.contains(part)) == moves_requests,
            "{part}"
        );
    }
    let roles = of_kind(all, "Role");
    let own = |role: &&Value| role["metadata"]["name"] == "agent";
    ensure!(roles.into_iter().any(|role| own(&role)) == acts);
    // Whoever may act is kept to its own node, and its annotation to itself.
    for kind in [
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ] {
        let found = of_kind(all, kind);
        let names: Vec<&Value> = found
            .iter()
            .map(|object| &object["metadata"]["name"])
            .collect();
        let expected = ["bellows-agent", "bellows-nodes", "bellows-originals"];
        ensure!(names == expected, "{names:?}");
    }
    Ok(())
}

/// Whether what agents have raised is given back at the end: where they may act, they are waited for before their
/// rights are taken away.
fn ends(all: &[Value], acts: bool) -> Result<()> {
    let jobs = of_kind(all, "Job");
    ensure!(jobs.len() == usize::from(acts));
    for job in jobs {
        ensure!(job["metadata"]["annotations"]["helm.sh/hook"] == "pre-delete");
        let spec = &job["spec"]["template"]["spec"];
        ensure!(spec["securityContext"]["runAsNonRoot"] == true);
        ensure!(spec["containers"][0]["args"] == json!(["uninstall", "agent"]));
        // It may do that, and nothing else.
        let own = |object: &&&Value| object["metadata"]["name"] == "uninstall";
        let roles = of_kind(all, "Role");
        let rules = roles.iter().find(own).map(|role| &role["rules"]);
        let rule = json!([{
            "apiGroups": ["apps"], "resources": ["daemonsets"], "resourceNames": ["agent"],
            "verbs": ["get", "delete"],
        }]);
        ensure!(rules == Some(&rule), "{rules:?}");
    }
    Ok(())
}

fn follows_namespace() -> Result<()> {
    let here = rendered("bellows", None)?;
    let there = rendered("kube-system", None)?;
    let kind = "ValidatingAdmissionPolicy";
    for (here, there) in of_kind(&here, kind).iter().zip(of_kind(&there, kind)) {
        let (here, there) = (here.to_string(), there.to_string());
        let moved = here.replace(
            "system:serviceaccount:bellows:agent",
            "system:serviceaccount:kube-system:agent",
        );
        ensure!(moved != here, "it names no account");
        ensure!(moved == there, "{there}");
    }
    let subject = &only(&there, "ClusterRoleBinding")?["subjects"][0];
    ensure!(subject["namespace"] == "kube-system", "{subject}");
    Ok(())
}

fn overlay(kustomize: &Path, mode: &str) -> Result<()> {
    let mut command = Command::new(kustomize);
    command.args(["build", &format!("deploy/kustomize/{mode}")]);
    let all = parsed(&output(command.current_dir(root()?))?)?;
    may_do(&all, mode == "act")?;
    let mut base = Vec::new();
    for name in ["bellows.yaml", "elasticnodes.yaml", "elasticpolicies.yaml"] {
        let text = fs::read_to_string(root()?.join("deploy").join(name))?;
        base.extend(parsed(&text)?);
    }
    // Nothing is lost on the way, and nothing else is touched.
    let touched: &[&str] = match mode {
        "act" => &[],
        _ => &["DaemonSet", "ClusterRole", "Role", "RoleBinding"],
    };
    let gone = if mode == "act" { 0 } else { 2 };
    ensure!(all.len() + gone == base.len(), "{} objects", all.len());
    let same = |object: &&Value| !touched.iter().any(|kind| object["kind"] == *kind);
    let all: Vec<Value> = all.into_iter().map(folded).collect();
    for object in base.iter().filter(same) {
        let name = (&object["kind"], &object["metadata"]["name"]);
        ensure!(all.contains(&folded(object.clone())), "it changes {name:?}");
    }
    Ok(())
}

/// With one space for all white space in texts: kustomize writes line breaks of folded ones twice, which means nothing
/// in CEL and in descriptions.
fn folded(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(text.split_whitespace().collect::<Vec<_>>().join(" ")),
        Value::Array(items) => Value::Array(items.into_iter().map(folded).collect()),
        Value::Object(fields) => Value::Object(
            fields
                .into_iter()
                .map(|(name, value)| (name, folded(value)))
                .collect(),
        ),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_)) => other,
    }
}
