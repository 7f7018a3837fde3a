//! What the agent's own token may do (`daemonset`): what it needs, and nothing else.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use bellows_core::pod;
use k8s_openapi::api::core::v1::{Node as ApiNode, Pod};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use super::daemonset::{Bed, spec};
use crate::node;

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
    let elsewhere: Pod = serde_json::from_value(json!({
        "metadata": { "name": "elsewhere" },
        "spec": {
            "nodeName": "another",
            "containers": [{ "name": "load", "image": node::IMAGE, "resources": {
                "limits": { "memory": "64Mi" }, "requests": { "memory": "32Mi" } } }],
        },
    }))?;
    let admin: Api<Pod> = Api::namespaced(bed.client.clone(), "default");
    bed.tasks
        .block_on(admin.create(&PostParams::default(), &elsewhere))?;
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
    ];
    let mut wrong = Vec::new();
    for (what, method, path, body, is_allowed) in attempts {
        let code = ask(bed, &client, method, path, &body)?;
        let was_allowed = code < 300;
        eprintln!("case {what}: {code}");
        if was_allowed != is_allowed {
            wrong.push(format!("{what}: {code}"));
        }
    }
    bed.cluster.delete("own")?;
    bed.tasks
        .block_on(admin.delete("elsewhere", &DeleteParams::default().grace_period(0)))?;
    ensure!(wrong.is_empty(), "{}", wrong.join(", "));
    Ok(())
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
    let kind = if method == "PATCH" {
        "application/strategic-merge-patch+json"
    } else {
        "application/json"
    };
    let request = http::Request::builder()
        .method(method)
        .uri(format!("/api/v1/namespaces/default/{path}"))
        .header("Content-Type", kind)
        .body(body)?;
    match bed.tasks.block_on(client.request_text(request)) {
        Ok(_) => Ok(200),
        Err(kube::Error::Api(status)) => Ok(status.code),
        Err(error) => bail!("{method} {path}: {error}"),
    }
}
