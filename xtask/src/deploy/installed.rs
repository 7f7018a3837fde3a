//! The chart, installed by Helm: a real API server takes what it gives, upgrades it, and is rid of it.
//!
//! There are no nodes and no controllers: nobody runs the agent here, which the bench `daemonset` does.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::CHART;
use crate::{
    checks::Checks,
    control_plane::{ControlPlane, TOKEN},
    kubernetes, root,
    shell::{output, quiet},
    tools,
};

const NAMESPACE: &str = "bellows";
/// A pod in `dev`, and the node where it would run.
const POD: &str = "placed";
const NODE: &str = "somewhere";
/// For how long an API server may go by admission policies as they were.
const IN_FORCE: Duration = Duration::from_secs(20);

struct Cluster<'a> {
    helm: &'a Path,
    configuration: PathBuf,
    url: String,
    _control: ControlPlane,
}

type Case = (&'static str, fn(&Cluster<'_>) -> Result<()>);

/// Each goes on where the one before it has ended.
const CASES: [Case; 8] = [
    ("helm install: an agent that may only watch", install),
    (
        "helm upgrade: it may act, by policies of the chart",
        upgrade,
    ),
    ("admission: it changes no request", no_requests),
    ("helm upgrade: every option but privileges", all_options),
    (
        "admission: it changes memory requests that are there, and nothing else of them",
        memory_requests,
    ),
    (
        "LimitRanges and quotas are judged as the agent judges them",
        allowances,
    ),
    (
        "admission: it writes its own node's ElasticNode, and what is said of policies",
        own_node,
    ),
    ("helm uninstall: nothing is left but policies", uninstall),
];

pub(super) fn checks(checks: &mut Checks, helm: &Path) -> Result<()> {
    tools::packages()?;
    let control = ControlPlane::start(&kubernetes::binaries(kubernetes::VERSION)?, None)?;
    let url = format!("https://127.0.0.1:{}", control.port);
    let configuration = root()?.join("target/guests/control-plane/kubeconfig");
    let file = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "it", "cluster": { "server": url, "insecure-skip-tls-verify": true } }],
        "users": [{ "name": "it", "user": { "token": TOKEN } }],
        "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
        "current-context": "it",
    });
    fs::write(&configuration, file.to_string())?;
    let cluster = Cluster {
        helm,
        configuration,
        url,
        _control: control,
    };
    for (name, case) in CASES {
        checks.check(name, case(&cluster));
    }
    Ok(())
}

impl Cluster<'_> {
    fn helm(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(self.helm);
        command
            .arg("--kubeconfig")
            .arg(&self.configuration)
            .args(["--namespace", NAMESPACE])
            .args(arguments);
        quiet(command.current_dir(root()?))
    }

    /// What the API server says; `None` where nothing is.
    fn ask(&self, path: &str, body: Option<&Value>) -> Result<Option<Value>> {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--insecure", "--max-time", "30"])
            .args(["--header", "Content-Type: application/json", "--header"])
            .arg(format!("Authorization: Bearer {TOKEN}"));
        if let Some(body) = body {
            command.args(["--data", &body.to_string()]);
        }
        let said = output(command.arg(format!("{}{path}", self.url)))?;
        let said: Value = serde_json::from_str(&said)?;
        if said["kind"] != "Status" {
            return Ok(Some(said));
        }
        match said["code"].as_u64() {
            Some(404) => Ok(None),
            _ => bail!("{path}: {said}"),
        }
    }

    /// Whether the agent's account may do something to all pods.
    fn may(&self, verb: &str, subresource: &str) -> Result<bool> {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": format!("system:serviceaccount:{NAMESPACE}:agent"),
                "resourceAttributes": { "resource": "pods", "subresource": subresource, "verb": verb },
            },
        });
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let said = self.ask(path, Some(&review))?.unwrap_or_default();
        Ok(said["status"]["allowed"] == true)
    }

    /// What becomes of a change of the pod by the agent of its node.
    fn patched(&self, subresource: &str, patch: &Value) -> Result<Value> {
        let path = format!("/api/v1/namespaces/dev/pods/{POD}{subresource}");
        self.as_agent("PATCH", "strategic-merge-patch+json", &path, patch)
    }

    /// What becomes of what an agent on that node applies.
    fn applied(&self, path: &str, object: &Value) -> Result<Value> {
        let path = format!("/apis/bellows.dev/v1alpha1{path}?fieldManager=bellows&force=true");
        self.as_agent("PATCH", "apply-patch+yaml", &path, object)
    }

    /// The same of anything it asks for.
    fn as_agent(&self, method: &str, kind: &str, path: &str, body: &Value) -> Result<Value> {
        let agent = [
            format!("Impersonate-User: system:serviceaccount:{NAMESPACE}:agent"),
            "Impersonate-Group: system:authenticated".to_owned(),
            format!("Impersonate-Extra-authentication.kubernetes.io%2Fnode-name: {NODE}"),
        ];
        self.sent(&agent, (method, kind), path, body)
    }

    /// What becomes of a change by an administrator.
    fn merged(&self, path: &str, patch: &Value) -> Result<Value> {
        self.sent(&[], ("PATCH", "merge-patch+json"), path, patch)
    }

    fn sent(
        &self,
        headers: &[String],
        (method, kind): (&str, &str),
        path: &str,
        body: &Value,
    ) -> Result<Value> {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--insecure", "--max-time", "30"])
            .args(["--request", method, "--header"])
            .arg(format!("Content-Type: application/{kind}"))
            .arg("--header")
            .arg(format!("Authorization: Bearer {TOKEN}"));
        for header in headers {
            command.args(["--header", header]);
        }
        let body = body.to_string();
        command.args(["--data", &body, &format!("{}{path}", self.url)]);
        Ok(serde_json::from_str(&output(&mut command)?)?)
    }

    /// What becomes of a memory limit of this many MiB.
    fn limited(&self, mib: u64) -> Result<Value> {
        let limits = json!({ "memory": format!("{mib}Mi") });
        let container = json!({ "name": "app", "resources": { "limits": limits } });
        self.patched("/resize", &json!({ "spec": { "containers": [container] } }))
    }

    /// The same, of what its container requests.
    fn requested(&self, requests: &Value) -> Result<Value> {
        let container = json!({ "name": "app", "resources": { "requests": requests } });
        self.patched("/resize", &json!({ "spec": { "containers": [container] } }))
    }

    fn agent(&self) -> Result<Option<Value>> {
        self.ask(
            &format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/agent"),
            None,
        )
    }

    fn policy(&self, namespace: &str) -> Result<Option<Value>> {
        let api = "/apis/bellows.dev/v1alpha1";
        let path = format!("{api}/namespaces/{namespace}/elasticpolicies/default");
        self.ask(&path, None)
    }
}

fn install(cluster: &Cluster<'_>) -> Result<()> {
    cluster.helm(&["install", "bellows", CHART, "--create-namespace"])?;
    ensure!(cluster.agent()?.is_some(), "there is no DaemonSet");
    ensure!(cluster.may("list", "")? && cluster.may("watch", "")?);
    for (verb, subresource) in [
        ("patch", ""),
        ("update", ""),
        ("patch", "resize"),
        ("get", "log"),
    ] {
        ensure!(
            !cluster.may(verb, subresource)?,
            "it may {verb} pods/{subresource}"
        );
    }
    Ok(())
}

fn upgrade(cluster: &Cluster<'_>) -> Result<()> {
    for name in ["dev", "ci"] {
        let namespace =
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } });
        drop(cluster.ask("/api/v1/namespaces", Some(&namespace))?);
    }
    cluster.helm(&[
        "upgrade",
        "bellows",
        CHART,
        "--values",
        "deploy/chart/ci/act.yaml",
    ])?;
    ensure!(cluster.may("patch", "")? && cluster.may("patch", "resize")?);
    for (verb, subresource) in [("update", ""), ("delete", ""), ("create", "eviction")] {
        ensure!(
            !cluster.may(verb, subresource)?,
            "it may {verb} pods/{subresource}"
        );
    }
    let policy = cluster.policy("ci")?.unwrap_or_default();
    ensure!(policy["spec"]["mode"] == "Act", "{policy}");
    Ok(())
}

fn all_options(cluster: &Cluster<'_>) -> Result<()> {
    // A namespace that is there is not the release's to make, and this API server allows no privileges.
    let values = "namespace.create=false,privileged=false";
    cluster.helm(&[
        "upgrade",
        "bellows",
        CHART,
        "--values",
        "deploy/chart/ci/all.yaml",
        "--set",
        values,
    ])?;
    let agent = cluster.agent()?.unwrap_or_default();
    let spec = &agent["spec"]["template"]["spec"];
    let plugins = &spec["volumes"][2]["hostPath"]["path"];
    ensure!(plugins == "/var/run/nri", "{spec}");
    ensure!(cluster.policy("dev")?.is_some() && cluster.policy("ci")?.is_none());
    Ok(())
}

/// Whether a change was taken, or refused by the agent's admission policy.
fn is(said: &Value, taken: bool) -> bool {
    let message = said["message"].as_str().unwrap_or_default();
    if taken {
        said["kind"] == "Pod"
    } else {
        said["code"] == 403 && message.contains("'bellows-agent' denied request")
    }
}

/// The same, as soon as the policy is in force.
fn eventually(taken: bool, ask: impl Fn() -> Result<Value>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let said = ask()?;
        if is(&said, taken) {
            return Ok(());
        }
        ensure!(begun.elapsed() < IN_FORCE, "{said}");
        thread::sleep(Duration::from_secs(1));
    }
}

fn original() -> Value {
    json!({ "metadata": { "annotations": { "bellows.dev/original-requests": "app=64Mi" } } })
}

fn no_requests(cluster: &Cluster<'_>) -> Result<()> {
    // Nobody is there, but who resizes is asked for the pod's node.
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": NODE },
        "status": {
            "capacity": { "cpu": "2", "memory": "4Gi", "pods": "9" },
            "allocatable": { "cpu": "2", "memory": "4Gi", "pods": "9" },
            "nodeInfo": {
            "machineID": "", "systemUUID": "", "bootID": "", "kernelVersion": "", "osImage": "",
            "containerRuntimeVersion": "", "kubeProxyVersion": "", "operatingSystem": "linux",
            "architecture": "amd64", "kubeletVersion": format!("v{}", kubernetes::VERSION),
            },
        },
    });
    cluster.ask("/api/v1/nodes", Some(&node))?;
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": POD },
        "spec": {
            "nodeName": NODE,
            "containers": [{
                "name": "app",
                "image": "app",
                "resources": {
                    "requests": { "memory": "64Mi", "cpu": "100m" },
                    "limits": { "memory": "128Mi" },
                },
            }],
        },
    });
    cluster.ask("/api/v1/namespaces/dev/pods", Some(&pod))?;
    let limit = json!({ "name": "app", "resources": { "limits": { "memory": "256Mi" } } });
    let limit = json!({ "spec": { "containers": [limit] } });
    eventually(true, || cluster.patched("/resize", &limit))?;
    eventually(false, || cluster.requested(&json!({ "memory": "32Mi" })))?;
    eventually(false, || cluster.patched("", &original()))
}

fn memory_requests(cluster: &Cluster<'_>) -> Result<()> {
    eventually(true, || cluster.patched("", &original()))?;
    eventually(true, || cluster.requested(&json!({ "memory": "32Mi" })))?;
    for refused in [
        json!({ "cpu": "50m" }),
        json!({ "memory": "16Mi", "cpu": "200m" }),
    ] {
        let said = cluster.requested(&refused)?;
        ensure!(is(&said, false), "{refused}: {said}");
    }
    let other = json!({ "metadata": { "annotations": { "other": "1" } } });
    let said = cluster.patched("", &other)?;
    ensure!(is(&said, false), "another annotation: {said}");
    Ok(())
}

/// The most that a limit of `from` may become, as the agent has it (`bellows_core::allowance`), is what is taken, and no
/// more.
fn most_is(cluster: &Cluster<'_>, from: u64, mib: u64) -> Result<()> {
    let begun = Instant::now();
    loop {
        // What admission goes by comes to it a moment later.
        let said = cluster.limited(mib + 1)?;
        if said["code"] == 403 {
            break;
        }
        ensure!(begun.elapsed() < IN_FORCE, "{mib} MiB and one more: {said}");
        cluster.limited(from)?;
        thread::sleep(Duration::from_secs(1));
    }
    let said = cluster.limited(mib)?;
    ensure!(said["kind"] == "Pod", "{mib} MiB: {said}");
    Ok(())
}

/// The pod requests 32 MiB.
fn allowances(cluster: &Cluster<'_>) -> Result<()> {
    let core = "/api/v1/namespaces/dev";
    let range = |item: Value| {
        json!({
            "apiVersion": "v1", "kind": "LimitRange", "metadata": { "name": "range" },
            "spec": { "limits": [item] },
        })
    };
    let ranges = format!("{core}/limitranges");
    let ratio = json!({ "type": "Container", "maxLimitRequestRatio": { "memory": "9" } });
    drop(cluster.ask(&ranges, Some(&range(ratio)))?);
    most_is(cluster, 256, 9 * 32)?;
    let one = format!("{ranges}/range");
    for kind in ["Container", "Pod"] {
        let most = if kind == "Pod" { 270 } else { 280 };
        let max = json!({ "type": kind, "max": { "memory": format!("{most}Mi") } });
        cluster.merged(&one, &range(max))?;
        most_is(cluster, 256, most)?;
    }
    cluster.sent(&[], ("DELETE", "json"), &one, &json!({}))?;
    let hard = json!({ "limits.memory": "512Mi" });
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "quota" },
        "spec": { "hard": hard, "scopes": ["NotTerminating"] },
    });
    drop(cluster.ask(&format!("{core}/resourcequotas"), Some(&quota))?);
    let quota = format!("{core}/resourcequotas/quota");
    let status = json!({ "hard": hard, "used": { "limits.memory": "270Mi" } });
    cluster.merged(&format!("{quota}/status"), &json!({ "status": status }))?;
    most_is(cluster, 270, 512)?;
    // At once, and before the pod: what is taken is counted.
    let said = cluster.ask(&quota, None)?.unwrap_or_default();
    ensure!(said["status"]["used"]["limits.memory"] == "512Mi", "{said}");
    cluster.sent(&[], ("DELETE", "json"), &quota, &json!({}))?;
    Ok(())
}

/// Whether an admission policy, or a right that is missing, has refused it.
fn is_refused(said: &Value) -> bool {
    said["code"] == 403 || said["code"] == 422
}

fn own_node(cluster: &Cluster<'_>) -> Result<()> {
    let object = |kind: &str, name: &str, more: Value| {
        let mut object = json!({
            "apiVersion": "bellows.dev/v1alpha1", "kind": kind, "metadata": { "name": name },
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            object[key] = value.clone();
        }
        object
    };
    let node = |name: &str, more: Value| object("ElasticNode", name, more);
    let owned = |owner: &str| {
        let owner = json!({ "apiVersion": "v1", "kind": "Node", "name": owner, "uid": "1" });
        json!({ "metadata": { "name": NODE, "ownerReferences": [owner] } })
    };
    let own = format!("/elasticnodes/{NODE}");
    let made = cluster.applied(&own, &node(NODE, owned(NODE)))?;
    ensure!(made["kind"] == "ElasticNode", "{made}");
    let status = json!({ "status": { "mode": "Act", "guarded": 3, "way": "Resize" } });
    let said = cluster.applied(&format!("{own}/status"), &node(NODE, status.clone()))?;
    ensure!(said["status"]["guarded"] == 3, "{said}");
    let wrong = json!({ "status": { "way": "Magic" } });
    let said = cluster.applied(&format!("{own}/status"), &node(NODE, wrong))?;
    ensure!(is_refused(&said), "{said}");
    // Somebody else's.
    for name in ["another", "third"] {
        let path = format!("/elasticnodes/{name}");
        let said = cluster.applied(&path, &node(name, json!({})))?;
        ensure!(is_refused(&said), "{said}");
        let all = "/apis/bellows.dev/v1alpha1/elasticnodes";
        drop(cluster.ask(all, Some(&node(name, json!({}))))?);
        let said = cluster.applied(&format!("{path}/status"), &node(name, status.clone()))?;
        ensure!(is_refused(&said), "{said}");
        let there = format!("{all}/{name}");
        let said = cluster.as_agent("DELETE", "json", &there, &json!({}))?;
        ensure!(is_refused(&said), "{said}");
        ensure!(cluster.ask(&there, None)?.is_some(), "it is gone");
    }
    let said = cluster.applied(&own, &node(NODE, owned("another")))?;
    ensure!(is_refused(&said), "{said}");
    // Of a policy it says whether it can be read, and no more.
    let condition = json!({
        "type": "Accepted", "status": "True", "reason": "Valid", "message": "", "observedGeneration": 1,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let policy = |more: Value| object("ElasticPolicy", "default", more);
    let path = "/namespaces/dev/elasticpolicies/default";
    let status = policy(json!({ "status": { "conditions": [condition] } }));
    let said = cluster.applied(&format!("{path}/status"), &status)?;
    ensure!(
        said["status"]["conditions"][0]["status"] == "True",
        "{said}"
    );
    let spec = policy(json!({ "spec": { "containers": [{ "memory": { "max": "9Gi" } }] } }));
    let said = cluster.applied(path, &spec)?;
    ensure!(is_refused(&said), "{said}");
    let there = format!("/apis/bellows.dev/v1alpha1{own}");
    drop(cluster.as_agent("DELETE", "json", &there, &json!({}))?);
    ensure!(cluster.ask(&there, None)?.is_none(), "it is not gone");
    Ok(())
}

fn uninstall(cluster: &Cluster<'_>) -> Result<()> {
    let own = json!({
        "apiVersion": "bellows.dev/v1alpha1",
        "kind": "ElasticPolicy",
        "metadata": { "name": "default", "namespace": "ci" },
        "spec": { "containers": [{ "memory": { "max": "1Gi" } }] },
    });
    let path = "/apis/bellows.dev/v1alpha1/namespaces/ci/elasticpolicies";
    drop(cluster.ask(path, Some(&own))?);
    // Nobody is here to run the hook.
    cluster.helm(&["uninstall", "bellows", "--no-hooks"])?;
    ensure!(cluster.agent()?.is_none(), "the DaemonSet is left");
    ensure!(!cluster.may("list", "")?, "its rights are left");
    let admission = "/apis/admissionregistration.k8s.io/v1";
    for path in [
        format!("{admission}/validatingadmissionpolicies/bellows-agent"),
        format!("{admission}/validatingadmissionpolicies/bellows-nodes"),
        format!("{admission}/validatingadmissionpolicybindings/bellows-originals"),
        format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/agent"),
        format!("/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies/agent"),
    ] {
        ensure!(cluster.ask(&path, None)?.is_none(), "{path} is left");
    }
    ensure!(
        cluster.policy("dev")?.is_none(),
        "the chart's policy is left"
    );
    // What people have written outlives the agent; it means nothing without.
    ensure!(cluster.policy("ci")?.is_some(), "somebody's policy is gone");
    Ok(())
}
