//! What the agent's own token may do (`daemonset`): what it needs, and nothing else.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use bellows_core::pod;
use k8s_openapi::api::{
    authorization::v1::SelfSubjectRulesReview,
    core::v1::{Node as ApiNode, Pod},
};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::daemonset::{Bed, spec};
use crate::{
    node::{self, wait},
    pods::{gone, made},
};

/// What the agent's token may do, as it was tried and as the API server says.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Privileges {
    pub(super) attempts: Vec<Attempt>,
    /// What it may read: the kinds, with the verbs.
    pub(super) reads: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Attempt {
    what: String,
    method: String,
    path: String,
    code: u16,
    is_meant: bool,
}

impl Attempt {
    fn is_allowed(&self) -> bool {
        self.code < 300
    }

    /// Something was written that should not be.
    pub(super) fn is_harm(&self) -> bool {
        self.method != "GET" && self.is_allowed() && !self.is_meant
    }

    pub(super) fn reads_secret(&self) -> bool {
        self.method == "GET" && self.is_allowed() && self.path.contains("secrets")
    }
}

const READS: [&str; 3] = ["get", "list", "watch"];
const HORIZONTAL: &str = "/apis/autoscaling/v2/namespaces/default/horizontalpodautoscalers";
const ELASTIC: &str = "/apis/bellows.dev/v1alpha1";

/// The agent's own token, as the kubelet has mounted it.
fn token(bed: &Bed) -> Result<String> {
    let uid = bed.agent()?.uid().context("no uid")?;
    let path = PathBuf::from(format!(
        "/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected/kube-api-access/token"
    ));
    Ok(fs::read_to_string(path)?)
}

pub(super) fn least_privilege(bed: &Bed) -> Result<()> {
    bed.cluster.create(&spec("own", &["pause".to_owned()]))?;
    bed.cluster.wait_running("own")?;
    wait("it has an ElasticNode", Duration::from_secs(60), || {
        Ok(bed.object("ElasticNode", None, node::NAME).is_ok())
    })?;
    let elsewhere: Pod = serde_json::from_value(json!({
        "metadata": { "name": "elsewhere" },
        "spec": {
            "nodeName": "another",
            "containers": [{ "name": "load", "image": node::IMAGE, "resources": {
                "limits": { "memory": "64Mi" }, "requests": { "memory": "32Mi" } } }],
        },
    }))?;
    let admin: Api<Pod> = Api::namespaced(bed.client.clone(), "default");
    let parameters = PostParams::default();
    made(bed.tasks.block_on(admin.create(&parameters, &elsewhere)))?;
    // One that has room: what refuses a resize there must be the policy.
    bed.apply(json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "another" } }))?;
    let nodes: Api<ApiNode> = Api::all(bed.client.clone());
    let room = json!({ "cpu": "2", "memory": "4Gi", "pods": "110" });
    let room = Patch::Merge(json!({ "status": { "capacity": room, "allocatable": room } }));
    bed.tasks
        .block_on(nodes.patch_status("another", &PatchParams::default(), &room))?;
    let mut config = Config::new(bed.server.api.parse()?);
    config.accept_invalid_certs = true;
    config.auth_info.token = Some(token(bed)?.into());
    let client = bed.tasks.block_on(async { Client::try_from(config) })?;
    let elastic_node = |name: &str| json!({ "apiVersion": "bellows.dev/v1alpha1", "kind": "ElasticNode", "metadata": { "name": name } });
    let labels = json!({ "metadata": { "labels": { "a": "b" } } });
    let nodes_path = format!("{ELASTIC}/elasticnodes");
    let policies_path = format!("{ELASTIC}/namespaces/default/elasticpolicies");
    let autoscaler = json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": { "name": "a" },
        "spec": { "maxReplicas": 2, "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "a" } },
    });
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": "a" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin" },
    });
    let attempts = [
        (
            "a limit of its own node",
            "PATCH",
            "pods/own/resize",
            limits("65Mi"),
            true,
        ),
        (
            "its annotation",
            "PATCH",
            "pods/own",
            annotation(pod::ORIGINAL),
            true,
        ),
        (
            "a limit of another node",
            "PATCH",
            "pods/elsewhere/resize",
            limits("65Mi"),
            false,
        ),
        (
            "an annotation there",
            "PATCH",
            "pods/elsewhere",
            annotation(pod::ORIGINAL),
            false,
        ),
        (
            "a CPU limit",
            "PATCH",
            "pods/own/resize",
            json!({ "spec": { "containers": [{ "name": "load", "resources": { "limits": { "cpu": "1" } } }] } }),
            false,
        ),
        (
            "a request",
            "PATCH",
            "pods/own/resize",
            requests("33Mi"),
            false,
        ),
        (
            "a foreign annotation",
            "PATCH",
            "pods/own",
            annotation("example.com/other"),
            false,
        ),
        (
            "a label",
            "PATCH",
            "pods/own",
            json!({ "metadata": { "labels": { "a": "b" } } }),
            false,
        ),
        (
            "a finalizer",
            "PATCH",
            "pods/own",
            json!({ "metadata": { "finalizers": ["a.b/c"] } }),
            false,
        ),
        (
            "an image",
            "PATCH",
            "pods/own",
            json!({ "spec": { "containers": [{ "name": "load", "image": "other" }] } }),
            false,
        ),
        (
            "a status",
            "PATCH",
            "pods/own/status",
            json!({ "status": { "phase": "Failed" } }),
            false,
        ),
        (
            "a new pod",
            "POST",
            "pods",
            serde_json::to_value(&elsewhere)?,
            false,
        ),
        ("a deletion", "DELETE", "pods/own", json!({}), false),
        (
            "an eviction",
            "POST",
            "pods/own/eviction",
            json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": "own" } }),
            false,
        ),
        ("secrets", "GET", "secrets", json!(null), false),
        ("config maps", "GET", "configmaps", json!(null), false),
        ("logs", "GET", "pods/own/log", json!(null), false),
        (
            "a token",
            "POST",
            "serviceaccounts/default/token",
            json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {} }),
            false,
        ),
        ("limit ranges", "GET", "limitranges", json!(null), true),
        (
            "a limit range",
            "POST",
            "limitranges",
            json!({ "apiVersion": "v1", "kind": "LimitRange", "metadata": { "name": "a" }, "spec": { "limits": [] } }),
            false,
        ),
        (
            "a quota",
            "POST",
            "resourcequotas",
            json!({ "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "a" } }),
            false,
        ),
        ("autoscalers", "GET", HORIZONTAL, json!(null), true),
        ("an autoscaler", "POST", HORIZONTAL, autoscaler, false),
        (
            "its node's ElasticNode",
            "PATCH",
            &format!("{nodes_path}/{}", node::NAME),
            labels.clone(),
            true,
        ),
        (
            "another node's ElasticNode",
            "POST",
            &nodes_path,
            elastic_node("another"),
            false,
        ),
        (
            "a policy",
            "POST",
            &policies_path,
            json!({ "apiVersion": "bellows.dev/v1alpha1", "kind": "ElasticPolicy", "metadata": { "name": "a" }, "spec": {} }),
            false,
        ),
        ("nodes", "GET", "/api/v1/nodes", json!(null), false),
        (
            "its own node",
            "PATCH",
            &format!("/api/v1/nodes/{}", node::NAME),
            labels.clone(),
            false,
        ),
        (
            "a namespace",
            "PATCH",
            "/api/v1/namespaces/default",
            labels,
            false,
        ),
        ("all secrets", "GET", "/api/v1/secrets", json!(null), false),
        (
            "the cluster",
            "POST",
            "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
            binding,
            false,
        ),
    ];
    let mut wrong = Vec::new();
    let mut privileges = Privileges::default();
    for (what, method, path, body, is_meant) in attempts {
        let code = ask(bed, &client, method, path, &body)?;
        eprintln!("case {what}: {code}");
        let attempt = Attempt {
            what: what.to_owned(),
            method: method.to_owned(),
            path: path.to_owned(),
            code,
            is_meant,
        };
        // What is refused for another reason than that it may not is not tried.
        let is_refused = matches!(code, 401 | 403 | 422);
        if attempt.is_allowed() != is_meant || !(is_meant || is_refused) {
            wrong.push(format!("{what}: {code}"));
        }
        privileges.attempts.push(attempt);
    }
    privileges.reads = reads(bed, &client)?;
    *bed.privileges.borrow_mut() = Some(privileges);
    bed.cluster.delete("own")?;
    let at_once = DeleteParams::default().grace_period(0);
    gone(bed.tasks.block_on(admin.delete("elsewhere", &at_once)))?;
    ensure!(wrong.is_empty(), "{}", wrong.join(", "));
    Ok(())
}

/// What the API server says that may be read.
fn reads(bed: &Bed, client: &Client) -> Result<Vec<String>> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": { "namespace": "default" },
    });
    let request = http::Request::post("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews")
        .header("Content-Type", "application/json")
        .body(serde_json::to_vec(&review)?)?;
    let review: SelfSubjectRulesReview = bed.tasks.block_on(client.request(request))?;
    let status = review.status.context("the API server says nothing")?;
    let rules = status.resource_rules.into_iter();
    let mut reads: Vec<String> = rules
        .filter_map(|rule| {
            let verbs = rule.verbs.into_iter();
            let verbs: Vec<String> = verbs
                .filter(|verb| verb == "*" || READS.contains(&verb.as_str()))
                .collect();
            let resources = rule.resources.unwrap_or_default().join(", ");
            (!verbs.is_empty()).then(|| format!("{resources}: {}", verbs.join(", ")))
        })
        .collect();
    reads.sort();
    Ok(reads)
}

fn limits(memory: &str) -> Value {
    json!({ "spec": { "containers": [{ "name": "load", "resources": { "limits": { "memory": memory } } }] } })
}

fn requests(memory: &str) -> Value {
    json!({ "spec": { "containers": [{ "name": "load", "resources": { "requests": { "memory": memory } } }] } })
}

fn annotation(name: &str) -> Value {
    json!({ "metadata": { "annotations": { name: "load=64Mi" } } })
}

/// The code of the API's answer.
fn ask(bed: &Bed, client: &Client, method: &str, path: &str, body: &Value) -> Result<u16> {
    let body = if body.is_null() {
        Vec::new()
    } else {
        serde_json::to_vec(body)?
    };
    let kind = if method == "PATCH" && path.starts_with(ELASTIC) {
        "application/merge-patch+json"
    } else if method == "PATCH" {
        "application/strategic-merge-patch+json"
    } else {
        "application/json"
    };
    let request = http::Request::builder()
        .method(method)
        .uri(if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("/api/v1/namespaces/default/{path}")
        })
        .header("Content-Type", kind)
        .body(body)?;
    match bed.tasks.block_on(client.request_text(request)) {
        Ok(_) => Ok(200),
        Err(kube::Error::Api(status)) => Ok(status.code),
        Err(error) => bail!("{method} {path}: {error}"),
    }
}
