//! `daemonset`: the agent as `deploy/bellows.yaml` runs it: a pod of its own, with its own service account, roles and
//! capabilities; one record a promise.
//!
//! There are neither controllers nor a scheduler here. What they would do is done in their place: the pod of the
//! DaemonSet is made from its template, with the token that the ServiceAccount admission plugin would mount, and the
//! node's way to the API's service address is a forwarder where kube-proxy has a rule.

use std::{
    cell::RefCell,
    fs,
    io::copy,
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bellows::cgroup::{Cgroup, Limit};
use bellows_core::{Bytes, pod};
use clap::Args;
use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::Pod};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{DeleteParams, DynamicObject, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::GroupVersionKind,
    discovery::pinned_kind,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::{
    bursts::burst_words,
    exec_cli, gate,
    least_privilege::{Attempt, Privileges, least_privilege},
    pod_bursts::results,
    record::{Records, parsed},
};
use crate::{
    node::{self, ApiServer, Node, import_image, shell},
    pods::{Cluster, Spec, gone, made, wait},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    server: ApiServer,
}

const MANIFESTS: [&str; 3] = [
    "/deploy/elasticpolicies.yaml",
    "/deploy/elasticnodes.yaml",
    "/deploy/bellows.yaml",
];
const AUTHORITY: &str = "/deploy/ca.crt";
const NAMESPACE: &str = "bellows";
const AGENT: &str = "agent-node";
const IMAGE: &str = "bellows.dev/agent:dev";
const BINARY: &str = "/usr/local/bin/bellows";
/// Where pods look for the API, and where a service account's token is mounted.
const SERVICE: &str = "10.96.0.1";
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const METRICS: &str = "127.0.0.1:9464";

pub(super) struct Bed {
    pub(super) tasks: Runtime,
    pub(super) client: Client,
    pub(super) cluster: Cluster,
    pub(super) server: ApiServer,
    /// Of the DaemonSet's pods.
    template: Value,
    pub(super) privileges: RefCell<Option<Privileges>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    case: String,
    failure: Option<String>,
    privileges: Option<Privileges>,
}

type Case = (&'static str, fn(&Bed) -> Result<()>);

const PRIVILEGES: &str = "its token changes nothing that it should not";

const CASES: [Case; 8] = [
    (
        "the agent runs with its own account and capabilities, without privileges",
        runs,
    ),
    ("a burst in a pod survives and is restored", burst),
    (
        "policies that are wrong are refused by the API server",
        wrong_policies,
    ),
    (
        "a policy guards each container that has a limit, and no longer than it is there",
        by_policy,
    ),
    (
        "its ElasticNode says what it guards, and is owned by its node",
        own_node,
    ),
    (PRIVILEGES, least_privilege),
    (
        "what it has braked is let go when its pod is deleted",
        deleted,
    ),
    (
        "what it has raised is given back when its DaemonSet is deleted",
        given_back,
    ),
];

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    run_cases(options, &CASES, records)
}

/// Only what its token may do.
pub(crate) fn run_least_privilege(options: &Options, records: &mut Records) -> Result<()> {
    let only = CASES.into_iter().filter(|(case, _)| *case == PRIVILEGES);
    run_cases(options, &only.collect::<Vec<_>>(), records)
}

fn run_cases(options: &Options, cases: &[Case], records: &mut Records) -> Result<()> {
    let _node = Node::start(&options.server)?;
    import_image(IMAGE, Path::new(BINARY), &["/bellows"])?;
    forward(&options.server)?;
    let tasks = Runtime::new()?;
    let client = tasks.block_on(async {
        let kubeconfig = Kubeconfig::read_from(node::kubeconfig())?;
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        Ok::<_, anyhow::Error>(Client::try_from(config)?)
    })?;
    let mut bed = Bed {
        tasks,
        client,
        cluster: Cluster::connect()?,
        server: options.server.clone(),
        template: Value::Null,
        privileges: RefCell::default(),
    };
    bed.cluster.wait_node_ready()?;
    bed.template = bed.apply_all()?;
    bed.start_agent()?;
    for (case, check) in cases {
        let failure = check(&bed).err().map(|error| {
            let logs = ["agent", "releaser"].map(|container| bed.log(container));
            format!("{error:#}; its containers' logs:\n{}", logs.join("\n---\n"))
        });
        eprintln!("case {case}: {}", failure.as_deref().unwrap_or("ok"));
        records.write(&Record {
            case: (*case).to_owned(),
            failure,
            privileges: bed.privileges.take(),
        })?;
    }
    Ok(())
}

/// Passes on what is said at the API's service address.
fn forward(server: &ApiServer) -> Result<()> {
    shell(&format!("ip address add {SERVICE}/32 dev lo"))?;
    let listener = TcpListener::bind((SERVICE, 443))?;
    let target = server.api.trim_start_matches("https://").to_owned();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(&target) else {
                continue;
            };
            for (from, to) in [(&client, &server), (&server, &client)] {
                let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else {
                    continue;
                };
                thread::spawn(move || {
                    // Whoever ends the connection ends it for the other, too.
                    drop(copy(&mut from, &mut to));
                    drop(to.shutdown(Shutdown::Both));
                });
            }
        }
    });
    Ok(())
}

impl Bed {
    /// Applies the manifest; returns the template of the DaemonSet's pods.
    fn apply_all(&self) -> Result<Value> {
        let mut documents: Vec<Value> = Vec::new();
        for manifest in MANIFESTS {
            documents.extend(serde_saphyr::from_multiple::<Value>(&fs::read_to_string(
                manifest,
            )?)?);
        }
        let mut template = None;
        for document in documents {
            if document["kind"] == "DaemonSet" {
                template = Some(document["spec"]["template"].clone());
            }
            let kind = document["kind"].clone();
            self.apply(document).with_context(|| kind.to_string())?;
        }
        // What the controllers publish in each namespace.
        self.apply(json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": "kube-root-ca.crt", "namespace": NAMESPACE },
            "data": { "ca.crt": fs::read_to_string(AUTHORITY)? },
        }))?;
        template.context("the manifest has no DaemonSet")
    }

    pub(super) fn apply(&self, document: Value) -> Result<()> {
        self.cluster.apply(document)
    }

    /// An object of ours, as the API has it.
    pub(super) fn object(&self, kind: &str, namespace: Option<&str>, name: &str) -> Result<Value> {
        let kind = GroupVersionKind::gvk("bellows.dev", "v1alpha1", kind);
        self.tasks.block_on(async {
            let (resource, _) = pinned_kind(&self.client, &kind).await?;
            let client = self.client.clone();
            let api: Api<DynamicObject> = match namespace {
                Some(namespace) => Api::namespaced_with(client, namespace, &resource),
                None => Api::all_with(client, &resource),
            };
            Ok(api.get(name).await?.data)
        })
    }

    /// The kinds and names of the owners of a cluster-wide object of ours.
    fn owners(&self, kind: &str, name: &str) -> Result<Vec<(String, String)>> {
        let kind = GroupVersionKind::gvk("bellows.dev", "v1alpha1", kind);
        self.tasks.block_on(async {
            let (resource, _) = pinned_kind(&self.client, &kind).await?;
            let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
            let owners = api.get(name).await?.metadata.owner_references;
            let owners = owners.unwrap_or_default().into_iter();
            Ok(owners.map(|owner| (owner.kind, owner.name)).collect())
        })
    }

    fn remove_policy(&self) -> Result<()> {
        let kind = GroupVersionKind::gvk("bellows.dev", "v1alpha1", "ElasticPolicy");
        self.tasks.block_on(async {
            let (resource, _) = pinned_kind(&self.client, &kind).await?;
            let policies: Api<DynamicObject> =
                Api::namespaced_with(self.client.clone(), "default", &resource);
            gone(policies.delete("elastic", &DeleteParams::default()).await)
        })
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// Makes the pod that the DaemonSet's controller would make, as the admission plugin would complete it.
    fn start_agent(&self) -> Result<()> {
        let mut pod = self.template.clone();
        pod["metadata"]["name"] = json!(AGENT);
        let spec = &mut pod["spec"];
        spec["nodeName"] = json!(node::NAME);
        // There is no network of pods here.
        spec["hostNetwork"] = json!(true);
        let token = json!({
            "name": "kube-api-access",
            "projected": { "sources": [
                { "serviceAccountToken": { "path": "token", "expirationSeconds": 3607 } },
                { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
                { "downwardAPI": { "items": [{ "path": "namespace", "fieldRef": { "fieldPath": "metadata.namespace" } }] } },
            ] },
        });
        let volumes = spec["volumes"].as_array_mut().context("no volumes")?;
        volumes.push(token);
        for container in spec["containers"].as_array_mut().context("no containers")? {
            container["imagePullPolicy"] = json!("Never");
            let mounts = container["volumeMounts"].as_array_mut();
            mounts
                .context("no mounts")?
                .push(json!({ "name": "kube-api-access", "mountPath": TOKEN, "readOnly": true }));
        }
        let pod: Pod = serde_json::from_value(pod)?;
        let (pods, parameters) = (self.pods(), PostParams::default());
        made(self.tasks.block_on(pods.create(&parameters, &pod)))
    }

    pub(super) fn agent(&self) -> Result<Pod> {
        Ok(self.tasks.block_on(self.pods().get(AGENT))?)
    }

    fn log(&self, container: &str) -> String {
        let uid = self
            .agent()
            .ok()
            .and_then(|pod| pod.uid())
            .unwrap_or_default();
        let directory = format!("/var/log/pods/{NAMESPACE}_{AGENT}_{uid}/{container}");
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let texts = entries.filter_map(|entry| fs::read_to_string(entry.path()).ok());
        texts.collect::<Vec<_>>().concat()
    }
}

fn is_ready(bed: &Bed) -> Result<()> {
    let ready = wait(
        "both of its containers run, and it is alive",
        Duration::from_secs(120),
        || {
            let status = bed.agent()?.status.unwrap_or_default();
            let statuses = status.container_statuses.unwrap_or_default();
            Ok(statuses.len() == 2 && statuses.iter().all(|status| status.ready))
        },
    );
    ready.with_context(|| node::log_tail("kubelet", 30))
}

fn runs(bed: &Bed) -> Result<()> {
    is_ready(bed)?;
    wait("its metrics are served", Duration::from_secs(60), || {
        Ok(TcpStream::connect(METRICS).is_ok())
    })?;
    thread::sleep(Duration::from_secs(5));
    let log = bed.log("agent");
    let first = "released what a predecessor held";
    ensure!(log.contains(first), "not its log, or not whole: `{log}`");
    for sign in [
        "do not work",
        "no real-time priority",
        "memory is not locked",
        "limits how many",
    ] {
        ensure!(!log.contains(sign), "a capability is missing: `{sign}`");
    }
    restarts(bed)
}

fn restarts(bed: &Bed) -> Result<()> {
    let status = bed.agent()?.status.unwrap_or_default();
    let statuses = status.container_statuses.unwrap_or_default();
    let restarts: i32 = statuses.iter().map(|status| status.restart_count).sum();
    ensure!(
        restarts == 0,
        "its containers were restarted {restarts} times"
    );
    Ok(())
}

const LIMIT: Bytes = Bytes::mib(64);

pub(super) fn spec(name: &str, words: &[String]) -> Spec {
    let mut command = ["/bellows-guest", "load"].map(str::to_owned).to_vec();
    command.extend_from_slice(words);
    Spec {
        name: name.to_owned(),
        limit: LIMIT,
        max: Some(Bytes::mib(1024)),
        command,
        host: false,
        liveness: None,
        whole_pod: false,
        cpu: None,
        restarts: false,
        raise_first: false,
    }
}

fn is_not_found(error: &anyhow::Error) -> bool {
    let of_api = error.downcast_ref::<kube::Error>();
    of_api.is_some_and(|error| matches!(error, kube::Error::Api(status) if status.code == 404))
}

/// Waits for the end of its burst, which it must survive, and for its limit at rest.
fn survives(bed: &Bed, name: &str, cgroup: &Cgroup) -> Result<()> {
    wait("its burst is over", Duration::from_secs(60), || {
        let phase = bed.cluster.phase(name)?;
        ensure!(phase == "Running", "it is {phase}");
        Ok(!results(&bed.cluster, name)?.is_empty())
    })?;
    ensure!(cgroup.events()?.oom_kill == 0, "it was killed");
    wait("its limit is at rest", Duration::from_secs(60), || {
        Ok(cgroup.limit("memory.max")? == Limit::At(LIMIT))
    })
}

fn burst(bed: &Bed) -> Result<()> {
    bed.cluster.create(&spec("burst", &bursting()))?;
    let cgroup = bed.cluster.wait_running("burst")?;
    gate::open_when_braked(&cgroup)?;
    survives(bed, "burst", &cgroup)?;
    bed.cluster.delete("burst")?;
    restarts(bed)
}

fn policy(rules: &Value) -> Value {
    json!({
        "apiVersion": "bellows.dev/v1alpha1",
        "kind": "ElasticPolicy",
        "metadata": { "name": "elastic", "namespace": "default" },
        "spec": {
            "mode": "Act",
            "selector": { "matchLabels": { "app": "elastic" } },
            "containers": [rules],
        },
    })
}

fn wrong_policies(bed: &Bed) -> Result<()> {
    for (rules, part) in [
        (
            json!({ "memory": { "max": "1Gi", "floor": "2Gi" } }),
            "floor is above max",
        ),
        (
            json!({ "memory": { "max": "4GB" } }),
            "no size of 1Mi or more",
        ),
        (json!({ "memory": { "max": 17 } }), "expected string"),
        (json!({ "memory": {} }), "max"),
        (
            json!({ "memory": { "max": "1Gi", "shrinkAfter": "soon" } }),
            "shrinkAfter",
        ),
        (json!({ "cpu": { "max": "1m" } }), "cpu.max"),
        (json!({ "cpu": { "max": 0 } }), "cpu.max"),
        (
            json!({ "memory": { "max": "1Gi", "shrinkAfter": "25h" } }),
            "no time from 1s to 24h",
        ),
        (
            json!({ "memory": { "max": "1Gi", "holdAtMost": "500ms" } }),
            "holdAtMost",
        ),
        (json!({ "boosts": [{ "on": {}, "cpu": 2 }] }), "one trigger"),
        (
            json!({ "boosts": [{ "on": { "start": true } }] }),
            "a boost of nothing",
        ),
        (
            json!({ "boosts": [{ "on": { "start": true }, "cpu": 2, "until": { "exit": true } }] }),
            "a start has no exit",
        ),
    ] {
        match bed.apply(policy(&rules)) {
            Ok(()) => bail!("it was taken: {rules}"),
            Err(error) => {
                let text = format!("{error:#}");
                ensure!(text.contains(part), "{rules}: {text}");
            }
        }
    }
    // What the server does not know is refused by the agent.
    bed.apply(policy(
        &json!({ "memory": { "maximum": "2Gi", "max": "1Gi" } }),
    ))?;
    let mut last = Vec::new();
    let told = wait("an Event InvalidPolicy", Duration::from_secs(30), || {
        last = bed.cluster.events("elastic")?;
        Ok(last
            .iter()
            .any(|(reason, note)| reason == "InvalidPolicy" && note.contains("`max`")))
    });
    told.with_context(|| format!("{last:?}"))?;
    accepted(bed, "False", "`max`")?;
    bed.remove_policy()
}

/// Waits until the policy's condition says that.
fn accepted(bed: &Bed, status: &str, part: &str) -> Result<()> {
    let mut last = Value::Null;
    let said = wait("its condition is written", Duration::from_secs(40), || {
        let object = bed.object("ElasticPolicy", Some("default"), "elastic")?;
        last = object["status"]["conditions"][0].clone();
        Ok(last["type"] == "Accepted"
            && last["status"] == status
            && last["message"]
                .as_str()
                .is_some_and(|text| text.contains(part)))
    });
    said.with_context(|| last.to_string())
}

/// Bursts when it is let, and then lets time pass with next to nothing.
fn bursting() -> Vec<String> {
    let mut words = burst_words(LIMIT.per_mille(500), Bytes::mib(220), 2).to_vec();
    words.extend(["--after-ms", "120000"].map(str::to_owned));
    words.extend(gate::closed());
    words
}

/// A pod that the policy means; the first of its containers is what is waited for.
fn elastic(bed: &Bed, containers: &[(&str, Vec<String>)]) -> Result<Cgroup> {
    let containers = containers.iter().map(|(name, words)| {
        let mut command = ["/bellows-guest", "load"].map(str::to_owned).to_vec();
        command.extend_from_slice(words);
        json!({
            "name": name, "image": node::IMAGE, "imagePullPolicy": "Never", "command": command,
            "resources": { "limits": { "memory": "64Mi" }, "requests": { "memory": "32Mi" } },
        })
    });
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": "elastic", "labels": { "app": "elastic" } },
        "spec": {
            "nodeName": node::NAME,
            "hostNetwork": true,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "containers": containers.collect::<Vec<_>>(),
        },
    }))?;
    let pods: Api<Pod> = Api::namespaced(bed.client.clone(), "default");
    let parameters = PostParams::default();
    made(bed.tasks.block_on(pods.create(&parameters, &pod)))?;
    bed.cluster.wait_running("elastic")
}

fn by_policy(bed: &Bed) -> Result<()> {
    bed.apply(policy(&json!({
        "memory": { "max": "1Gi", "shrinkAfter": "3s" },
        "boosts": [{ "on": { "start": true }, "cpu": 2, "until": { "idle": "5s", "atMost": "2m" } }],
    })))?;
    let cgroup = elastic(
        bed,
        &[("load", bursting()), ("side", vec!["pause".to_owned()])],
    )?;
    let both = || -> Result<Vec<Limit>> {
        let pod = cgroup.path().parent().context("a pod")?;
        let mut brakes = Vec::new();
        for entry in fs::read_dir(pod)?.flatten() {
            if entry.file_type()?.is_dir()
                && let Ok(inner) = Cgroup::open(&entry.path())
                && inner.limit("memory.max")? != Limit::Max
            {
                brakes.push(inner.limit("memory.high")?);
            }
        }
        Ok(brakes)
    };
    wait("both are braked", Duration::from_secs(60), || {
        let brakes = both()?;
        Ok(brakes.len() == 2 && brakes.iter().all(|&high| high != Limit::Max))
    })?;
    gate::open(&cgroup)?;
    survives(bed, "elastic", &cgroup)?;
    accepted(bed, "True", "memory up to 1 GiB")?;
    let originals = bed
        .cluster
        .get("elastic")?
        .annotations()
        .get(pod::ORIGINAL)
        .cloned();
    let originals = originals.unwrap_or_default();
    ensure!(
        originals.contains("load=64Mi") && originals.contains("side=64Mi"),
        "the originals are `{originals}`"
    );
    bed.remove_policy()?;
    wait(
        "nothing of it is guarded any more",
        Duration::from_secs(60),
        || Ok(both()?.iter().all(|&high| high == Limit::Max)),
    )?;
    bed.cluster.delete("elastic")
}

fn own_node(bed: &Bed) -> Result<()> {
    bed.cluster.create(&spec("told", &["pause".to_owned()]))?;
    bed.cluster.wait_running("told")?;
    let mut last = Value::Null;
    let said = wait("its ElasticNode says it", Duration::from_secs(60), || {
        let object = bed.object("ElasticNode", None, node::NAME);
        last = object.map_or(Value::Null, |object| object["status"].clone());
        Ok(last["guarded"] == 1
            && last["way"] == "Resize"
            && last["signals"] == "Programs"
            && last["budget"].is_string())
    });
    let owners = bed.owners("ElasticNode", node::NAME);
    bed.cluster.delete("told")?;
    said.with_context(|| last.to_string())?;
    let owners = owners?;
    ensure!(
        owners
            .iter()
            .any(|(kind, name)| kind == "Node" && name == node::NAME),
        "it is owned by {owners:?}"
    );
    Ok(())
}

fn deleted(bed: &Bed) -> Result<()> {
    bed.cluster
        .create(&spec("resting", &["pause".to_owned()]))?;
    let cgroup = bed.cluster.wait_running("resting")?;
    wait("it is braked", Duration::from_secs(60), || {
        Ok(cgroup.limit("memory.high")? != Limit::Max)
    })?;
    let parameters = DeleteParams::default().grace_period(0);
    gone(bed.tasks.block_on(bed.pods().delete(AGENT, &parameters)))?;
    wait("its brake is lifted", Duration::from_secs(30), || {
        Ok(cgroup.limit("memory.high")? == Limit::Max)
    })?;
    bed.cluster.delete("resting")
}

/// What the chart's hook does at its end: the agents' rights are still there.
fn given_back(bed: &Bed) -> Result<()> {
    bed.start_agent()?;
    is_ready(bed)?;
    // By itself it would lower nothing meanwhile.
    bed.apply(policy(
        &json!({ "memory": { "max": "1Gi", "shrinkAfter": "1h" } }),
    ))?;
    let cgroup = elastic(bed, &[("load", bursting())])?;
    gate::open_when_braked(&cgroup)?;
    wait("its burst is over", Duration::from_secs(60), || {
        Ok(!results(&bed.cluster, "elastic")?.is_empty())
    })?;
    let raised = cgroup.limit("memory.max")?;
    ensure!(raised.bytes() > LIMIT, "its limit is {raised:?}");
    let daemons: Api<DaemonSet> = Api::namespaced(bed.client.clone(), NAMESPACE);
    let parameters = DeleteParams::foreground();
    gone(bed.tasks.block_on(daemons.delete("agent", &parameters)))?;
    // Which the garbage collector does.
    let parameters = DeleteParams::default();
    gone(bed.tasks.block_on(bed.pods().delete(AGENT, &parameters)))?;
    wait("its limit is what it was", Duration::from_secs(60), || {
        Ok(cgroup.limit("memory.max")? == Limit::At(LIMIT))
    })?;
    ensure!(cgroup.events()?.oom_kill == 0, "it was killed");
    let node = bed.object("ElasticNode", None, node::NAME).err();
    ensure!(
        node.as_ref().is_some_and(is_not_found),
        "its ElasticNode is left, or nobody knows: {node:?}"
    );
    // Its releaser has not kept it for all of its grace period.
    wait("it has ended", Duration::from_secs(25), || {
        Ok(bed.agent().is_err())
    })?;
    bed.remove_policy()?;
    bed.cluster.delete("elastic")
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let mut summary = exec_cli::summarize(records)?;
    let records: Vec<Record> = parsed(records)?;
    let privileges = records.into_iter().find_map(|record| record.privileges);
    if let Some(Privileges { attempts, reads }) = privileges {
        let count =
            |is: fn(&Attempt) -> bool| attempts.iter().filter(|attempt| is(attempt)).count();
        summary["attempts"] = json!(attempts.len());
        summary["writes_allowed"] = json!(count(Attempt::is_harm));
        summary["secrets_readable"] = json!(count(Attempt::reads_secret));
        summary["reads_listed"] = json!(reads);
    }
    Ok(summary)
}
