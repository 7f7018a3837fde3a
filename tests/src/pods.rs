//! Pods of the benches, through the real API.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use bellows::{
    attribution::{self, CGROUP_ROOT, container_id},
    cgroup::Cgroup,
};
use bellows_core::{Bytes, Cpu, pod, quantity};
use k8s_openapi::api::core::v1::{ContainerStatus, Event, Node as ApiNode, Pod, ResourceQuota};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::GroupVersionKind,
    discovery::pinned_kind,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::node;

const NAMESPACE: &str = "default";
const CONTAINER: &str = "load";

/// The API, for a bench that is no async program.
pub(crate) struct Cluster {
    runtime: Runtime,
    pods: Api<Pod>,
    nodes: Api<ApiNode>,
    events: Api<Event>,
}

/// A client of the real API server.
pub(crate) async fn client() -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(node::kubeconfig())?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Takes what is there already for made: the client asks again when an answer was late (504), and no two have one name at a
/// time.
pub(crate) fn made<T>(created: kube::Result<T>) -> Result<()> {
    done(created, 409)
}

/// The same of what is to be deleted, and is not there.
pub(crate) fn gone<T>(deleted: kube::Result<T>) -> Result<()> {
    done(deleted, 404)
}

fn done<T>(result: kube::Result<T>, already: u16) -> Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == already => Ok(()),
        result => Ok(result.map(drop)?),
    }
}

/// What a look at the API has found; nothing where it was not reached.
pub(crate) fn reached<T>(found: Result<T>) -> Result<Option<T>> {
    let is_answer = |error: &kube::Error| matches!(error, kube::Error::Api(_));
    match found {
        Err(error) if error.downcast_ref().is_some_and(|error| !is_answer(error)) => Ok(None),
        found => found.map(Some),
    }
}

/// Waits for what the API says, which may not be reached at each look.
pub(crate) fn wait(
    what: &str,
    limit: Duration,
    mut is_met: impl FnMut() -> Result<bool>,
) -> Result<()> {
    node::wait(what, limit, || Ok(reached(is_met())?.unwrap_or_default()))
}

/// What a pod should be.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) limit: Bytes,
    /// Opts in with this maximum.
    pub(crate) max: Option<Bytes>,
    pub(crate) command: Vec<String>,
    /// Mounts the node's root at /host.
    pub(crate) host: bool,
    /// Its liveness probe, as the API has it.
    pub(crate) liveness: Option<Value>,
    /// Its limit stands at the pod's own level, and its container has none.
    pub(crate) whole_pod: bool,
    /// Its CPU limit.
    pub(crate) cpu: Option<Cpu>,
    /// The kubelet starts its container again when that ends.
    pub(crate) restarts: bool,
    /// Its limit is raised first, and the API asked then.
    pub(crate) raise_first: bool,
}

impl Cluster {
    pub(crate) fn connect() -> Result<Self> {
        let runtime = Runtime::new()?;
        let client = runtime.block_on(client())?;
        let pods = Api::namespaced(client.clone(), NAMESPACE);
        let events = Api::namespaced(client.clone(), NAMESPACE);
        let nodes = Api::all(client);
        Ok(Self {
            runtime,
            pods,
            nodes,
            events,
        })
    }

    pub(crate) fn wait_node_ready(&self) -> Result<()> {
        wait("the node is Ready", Duration::from_secs(180), || {
            let node = self.runtime.block_on(self.nodes.get_opt(node::NAME))?;
            let conditions = node
                .and_then(|node| node.status?.conditions)
                .unwrap_or_default();
            Ok(conditions
                .iter()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True"))
        })
    }

    pub(crate) fn create(&self, spec: &Spec) -> Result<()> {
        let annotations = spec.max.map_or_else(
            || json!({}),
            |max| {
                let order = if spec.raise_first { "RaiseFirst" } else { "PatchFirst" };
                json!({ pod::MODE: "Act", pod::MAX_MEMORY: quantity::format(max), pod::ORDER: order })
            },
        );
        self.create_with(spec, &annotations, false)
    }

    /// Creates a pod with the label of a policy, if any.
    pub(crate) fn create_labelled(&self, spec: &Spec, label: Option<&str>) -> Result<()> {
        let labels = label.map_or_else(|| json!({}), |label| json!({ "guard": label }));
        self.create_as(spec, &json!({ "labels": labels }), false)
    }

    /// Creates a pod with these annotations; a Guaranteed one on demand.
    pub(crate) fn create_with(
        &self,
        spec: &Spec,
        annotations: &Value,
        guaranteed: bool,
    ) -> Result<()> {
        self.create_as(spec, &json!({ "annotations": annotations }), guaranteed)
    }

    /// Creates a pod with this metadata but for its name.
    pub(crate) fn create_as(&self, spec: &Spec, metadata: &Value, guaranteed: bool) -> Result<()> {
        let pod = manifest(spec, metadata, guaranteed)?;
        let parameters = PostParams::default();
        let created = self.pods.create(&parameters, &pod);
        made(self.runtime.block_on(created)).with_context(|| spec.name.clone())
    }

    /// Whether a quota would refuse a pod, which is not created.
    pub(crate) fn is_beyond_quota(&self, spec: &Spec) -> Result<bool> {
        let pod = manifest(spec, &json!({}), false)?;
        let parameters = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        let created = self.pods.create(&parameters, &pod);
        match self.runtime.block_on(created) {
            // It may be forbidden for the want of what is known of a quota, too.
            Err(kube::Error::Api(status)) if status.code == 403 => {
                Ok(status.message.contains("exceeded quota"))
            }
            created => Ok(created.map(|_pod| false)?),
        }
    }

    /// Says of a pod that its container runs under this id, in place of a kubelet; returns the pod's uid.
    pub(crate) fn say_running(&self, name: &str, id: &str) -> Result<String> {
        let status = json!({
            "name": CONTAINER,
            "image": node::IMAGE,
            "imageID": node::IMAGE,
            "containerID": format!("containerd://{id}"),
            "ready": true,
            "restartCount": 0,
            "state": { "running": { "startedAt": "2026-01-01T00:00:00Z" } },
        });
        let status = json!({ "status": { "phase": "Running", "containerStatuses": [status] } });
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(status));
        let patched = self.pods.patch_status(name, &parameters, &patch);
        Ok(self.runtime.block_on(patched)?.uid().unwrap_or_default())
    }

    /// Says what of a quota is used, in place of a controller.
    pub(crate) fn say_used(&self, name: &str, status: &Value) -> Result<()> {
        let client = self.nodes.clone().into_client();
        let quotas: Api<ResourceQuota> = Api::namespaced(client, NAMESPACE);
        let status = Patch::Merge(json!({ "status": status }));
        let parameters = PatchParams::default();
        self.runtime
            .block_on(quotas.patch_status(name, &parameters, &status))?;
        Ok(())
    }

    /// Reasons and notes of the Events about a pod.
    pub(crate) fn events(&self, name: &str) -> Result<Vec<(String, String)>> {
        let about = ListParams::default().fields(&format!("involvedObject.name={name}"));
        let events = self.runtime.block_on(self.events.list(&about))?;
        let text = |text: Option<String>| text.unwrap_or_default();
        Ok(events
            .into_iter()
            .map(|event| (text(event.reason), text(event.message)))
            .collect())
    }

    /// Resizes a pod as anybody might.
    pub(crate) fn resize(&self, name: &str, limit: &str) -> Result<()> {
        let container =
            json!({ "name": CONTAINER, "resources": { "limits": { "memory": limit } } });
        let patch = Patch::Strategic(json!({ "spec": { "containers": [container] } }));
        self.runtime.block_on(
            self.pods
                .patch_resize(name, &PatchParams::default(), &patch),
        )?;
        Ok(())
    }

    /// Resizes its CPU limit alone, as anybody might.
    pub(crate) fn resize_cpu(&self, name: &str, limit: &str) -> Result<()> {
        let container = json!({ "name": CONTAINER, "resources": { "limits": { "cpu": limit } } });
        let patch = Patch::Strategic(json!({ "spec": { "containers": [container] } }));
        let parameters = PatchParams::default();
        self.runtime
            .block_on(self.pods.patch_resize(name, &parameters, &patch))?;
        Ok(())
    }

    /// Revision of the API's storage: each write of anything is one.
    pub(crate) fn revision(&self) -> Result<u64> {
        let all = ListParams::default();
        let pods = self.runtime.block_on(self.pods.list(&all))?;
        let version = pods.metadata.resource_version;
        Ok(version.context("a list has a version")?.parse()?)
    }

    /// Changes the memory request of its container, as anybody might.
    pub(crate) fn request(&self, name: &str, request: Bytes) -> Result<()> {
        let requests = json!({ "memory": quantity::format(request) });
        let container = json!({ "name": CONTAINER, "resources": { "requests": requests } });
        let patch = Patch::Strategic(json!({ "spec": { "containers": [container] } }));
        let parameters = PatchParams::default();
        self.runtime
            .block_on(self.pods.patch_resize(name, &parameters, &patch))?;
        Ok(())
    }

    /// The pods with this value of the label `app`.
    pub(crate) fn of_app(&self, app: &str) -> Result<Vec<Pod>> {
        let selected = ListParams::default().labels(&format!("app={app}"));
        Ok(self.runtime.block_on(self.pods.list(&selected))?.items)
    }

    /// What the node has of memory for pods.
    pub(crate) fn allocatable(&self) -> Result<Bytes> {
        let node = self.runtime.block_on(self.nodes.get(node::NAME))?;
        let allocatable = node.status.and_then(|status| status.allocatable);
        let memory = allocatable.and_then(|all| Some(all.get("memory")?.0.clone()));
        Ok(quantity::parse(&memory.context("a node has memory")?)?)
    }

    /// Deletes an object without waiting.
    pub(crate) fn remove(&self, api_version: &str, kind: &str, name: &str) -> Result<()> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let kind = GroupVersionKind::gvk(group, version, kind);
        self.runtime.block_on(async {
            let client = self.nodes.clone().into_client();
            let (resource, _) = pinned_kind(&client, &kind).await?;
            let api: Api<DynamicObject> = Api::namespaced_with(client, NAMESPACE, &resource);
            gone(api.delete(name, &DeleteParams::default()).await)
        })
    }

    /// Deletes what a case that failed has left: pods, and what bounds or guards them.
    pub(crate) fn clear(&self) -> Result<()> {
        let kinds = [
            ("", "v1", "LimitRange"),
            ("", "v1", "ResourceQuota"),
            ("bellows.dev", "v1alpha1", "ElasticPolicy"),
        ];
        let (all, at_once) = (ListParams::default(), DeleteParams::default());
        self.runtime.block_on(async {
            for (group, version, kind) in kinds {
                let kind = GroupVersionKind::gvk(group, version, kind);
                let client = self.nodes.clone().into_client();
                let (resource, _) = pinned_kind(&client, &kind).await?;
                let api: Api<DynamicObject> = Api::namespaced_with(client, NAMESPACE, &resource);
                api.delete_collection(&at_once, &all).await?;
            }
            let at_once = at_once.grace_period(0);
            self.pods.delete_collection(&at_once, &all).await?;
            anyhow::Ok(())
        })?;
        wait("no pod is left", Duration::from_secs(120), || {
            Ok(self
                .runtime
                .block_on(self.pods.list(&all))?
                .items
                .is_empty())
        })
    }

    /// Adds annotations, as anybody might.
    pub(crate) fn annotate(&self, name: &str, annotations: &Value) -> Result<()> {
        let patch = Patch::Merge(json!({ "metadata": { "annotations": annotations } }));
        let parameters = PatchParams::default();
        self.runtime
            .block_on(self.pods.patch_metadata(name, &parameters, &patch))?;
        Ok(())
    }

    pub(crate) fn get(&self, name: &str) -> Result<Pod> {
        Ok(self.runtime.block_on(self.pods.get(name))?)
    }

    /// The status of its container.
    pub(crate) fn status(&self, name: &str) -> Result<Option<ContainerStatus>> {
        let statuses = self
            .get(name)?
            .status
            .and_then(|status| status.container_statuses);
        Ok(statuses.and_then(|statuses| statuses.into_iter().next()))
    }

    /// How often its container was started again.
    pub(crate) fn restarts(&self, name: &str) -> Result<i32> {
        let status = self.status(name)?;
        Ok(status.map_or(0, |status| status.restart_count))
    }

    /// Whether it has not ended.
    pub(crate) fn is_running(&self, name: &str) -> Result<bool> {
        Ok(!matches!(
            self.phase(name)?.as_str(),
            "Failed" | "Succeeded"
        ))
    }

    pub(crate) fn phase(&self, name: &str) -> Result<String> {
        Ok(self
            .get(name)?
            .status
            .and_then(|status| status.phase)
            .unwrap_or_default())
    }

    /// Waits until its container runs; returns its cgroup.
    pub(crate) fn wait_running(&self, name: &str) -> Result<Cgroup> {
        let mut found = None;
        let limit = Duration::from_secs(120);
        let waited = wait(&format!("pod {name} runs"), limit, || {
            let pod = self.get(name)?;
            if matches!(self.phase(name)?.as_str(), "Failed" | "Succeeded") {
                bail!("pod {name} ended before it was seen running");
            }
            let Some(id) = self.status(name)?.and_then(|status| status.container_id) else {
                return Ok(false);
            };
            let uid = pod.uid().unwrap_or_default();
            found = attribution::find(Path::new(CGROUP_ROOT), &uid, container_id(&id));
            Ok(found.is_some())
        });
        waited.with_context(|| node::log_tail("kubelet", 30))?;
        Ok(Cgroup::open(&found.context("no cgroup")?)?)
    }

    /// The memory limit of its container in the spec, and in its runtime as the pod's status has it (1.33 and later).
    pub(crate) fn said_limits(&self, name: &str) -> Result<[Option<Bytes>; 2]> {
        let pod = self.get(name)?;
        let container = pod.spec.and_then(|spec| spec.containers.into_iter().next());
        let statuses = pod.status.and_then(|status| status.container_statuses);
        let status = statuses.and_then(|statuses| statuses.into_iter().next());
        let limits = [
            container.and_then(|container| container.resources?.limits),
            status.and_then(|status| status.resources?.limits),
        ];
        Ok(limits.map(|limits| {
            let limit = quantity::parse(&limits?.get("memory")?.0);
            limit.ok().map(Bytes::page_floor)
        }))
    }

    /// Guards pods with a label by a policy with these rules for each of their containers.
    pub(crate) fn guard_labelled(&self, label: &str, rules: &Value) -> Result<()> {
        self.define_policies()?;
        self.apply(json!({
            "apiVersion": "bellows.dev/v1alpha1",
            "kind": "ElasticPolicy",
            "metadata": { "name": label, "namespace": NAMESPACE },
            "spec": {
                "selector": { "matchLabels": { "guard": label } },
                "mode": "Act",
                "containers": [rules],
            },
        }))
    }

    /// The CPU limits that its container has in the spec, in its cgroup and in its pod's.
    pub(crate) fn cpu_limits(
        &self,
        name: &str,
        cgroup: &Cgroup,
        pod: &Cgroup,
    ) -> Result<[Option<Cpu>; 3]> {
        let of = |cgroup: &Cgroup| cgroup.quota().ok().flatten().map(|quota| quota.cpu);
        let spec = self.get(name)?.spec.context("no spec")?;
        let container = spec.containers.into_iter().next();
        let limits = container.and_then(|container| container.resources?.limits);
        let in_spec = limits.and_then(|limits| quantity::parse_cpu(&limits.get("cpu")?.0).ok());
        Ok([in_spec, of(cgroup), of(pod)])
    }

    /// Applies a document, as `kubectl apply` does.
    pub(crate) fn apply(&self, document: Value) -> Result<()> {
        let object: DynamicObject = serde_json::from_value(document)?;
        let types = object.types.clone().context("a document without a kind")?;
        let kind = GroupVersionKind::try_from(&types)?;
        let name = object.name_any();
        let parameters = PatchParams::apply("kubectl").force();
        self.runtime.block_on(async {
            let client = self.nodes.clone().into_client();
            let (resource, _) = pinned_kind(&client, &kind).await?;
            let api: Api<DynamicObject> = match object.namespace() {
                Some(namespace) => Api::namespaced_with(client, &namespace, &resource),
                None => Api::all_with(client, &resource),
            };
            api.patch(&name, &parameters, &Patch::Apply(&object))
                .await?;
            Ok(())
        })
    }

    /// Applies the resource definition of policies, and waits until the API server knows it.
    pub(crate) fn define_policies(&self) -> Result<()> {
        let text = fs::read_to_string("/deploy/elasticpolicies.yaml")?;
        for document in serde_saphyr::from_multiple::<Value>(&text)? {
            self.apply(document)?;
        }
        let kind = GroupVersionKind::gvk("bellows.dev", "v1alpha1", "ElasticPolicy");
        wait("policies are defined", Duration::from_secs(60), || {
            let client = self.nodes.clone().into_client();
            Ok(self.runtime.block_on(pinned_kind(&client, &kind)).is_ok())
        })
    }

    /// Applies as much of the resource definition of VerticalPodAutoscalers as is read of them, and waits until the API
    /// server knows it.
    pub(crate) fn define_vertical_autoscalers(&self) -> Result<()> {
        let schema = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
        let version = json!({
            "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": schema },
        });
        self.apply(json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {
                "name": "verticalpodautoscalers.autoscaling.k8s.io",
                "annotations": { "api-approved.kubernetes.io": "unapproved, for a test" },
            },
            "spec": {
                "group": "autoscaling.k8s.io",
                "scope": "Namespaced",
                "names": {
                    "kind": "VerticalPodAutoscaler", "plural": "verticalpodautoscalers",
                    "singular": "verticalpodautoscaler", "listKind": "VerticalPodAutoscalerList",
                },
                "versions": [version],
            },
        }))?;
        let kind = GroupVersionKind::gvk("autoscaling.k8s.io", "v1", "VerticalPodAutoscaler");
        wait("autoscalers are defined", Duration::from_secs(60), || {
            let client = self.nodes.clone().into_client();
            Ok(self.runtime.block_on(pinned_kind(&client, &kind)).is_ok())
        })
    }

    /// The cgroup of its container while that runs.
    pub(crate) fn cgroup(&self, name: &str) -> Result<Option<Cgroup>> {
        let uid = self.get(name)?.uid().unwrap_or_default();
        let id = self.status(name)?.and_then(|status| status.container_id);
        let path =
            id.and_then(|id| attribution::find(Path::new(CGROUP_ROOT), &uid, container_id(&id)));
        Ok(path.and_then(|path| Cgroup::open(&path).ok()))
    }

    /// What the container has printed that is JSON, one value a line.
    pub(crate) fn said(&self, name: &str) -> Result<Vec<Value>> {
        Ok(node::said_in(&self.log(name)?))
    }

    /// What it has printed, of all its starts, the oldest first.
    pub(crate) fn log(&self, name: &str) -> Result<String> {
        let uid = self.get(name)?.uid().unwrap_or_default();
        let directory = PathBuf::from(format!(
            "/var/log/pods/{NAMESPACE}_{name}_{uid}/{CONTAINER}"
        ));
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        let texts = paths
            .iter()
            .map(|path| fs::read_to_string(path).unwrap_or_default());
        Ok(texts.collect())
    }

    /// Deletes it and waits until it is gone.
    pub(crate) fn delete(&self, name: &str) -> Result<()> {
        let at_once = DeleteParams::default().grace_period(0);
        gone(self.runtime.block_on(self.pods.delete(name, &at_once)))?;
        wait(
            &format!("pod {name} is gone"),
            Duration::from_secs(60),
            || Ok(self.runtime.block_on(self.pods.get_opt(name))?.is_none()),
        )
    }
}

/// What the API is asked for.
fn manifest(spec: &Spec, metadata: &Value, guaranteed: bool) -> Result<Pod> {
    let mut metadata = metadata.clone();
    metadata["name"] = json!(spec.name);
    let mut limits = json!({ "memory": quantity::format(spec.limit) });
    // Below the limit, so that the pod is Burstable and its limit may move alone.
    let mut requests = json!({ "memory": quantity::format(spec.limit.per_mille(500)) });
    if let Some(cpu) = spec.cpu {
        limits["cpu"] = json!(cpu.to_string());
        requests["cpu"] = json!("10m");
    }
    if guaranteed {
        limits["cpu"] = json!("100m");
        requests = limits.clone();
    }
    let mut container = json!({
        "name": CONTAINER,
        "image": node::IMAGE,
        "imagePullPolicy": "Never",
        "command": spec.command,
    });
    let resources = json!({ "limits": limits, "requests": requests });
    let mut whole = json!({});
    if spec.whole_pod {
        whole = resources;
    } else {
        container["resources"] = resources;
    }
    if let Some(liveness) = &spec.liveness {
        container["livenessProbe"] = liveness.clone();
    }
    let mut volumes = json!([]);
    if spec.host {
        container["volumeMounts"] = json!([{ "name": "host", "mountPath": "/host" }]);
        volumes = json!([{ "name": "host", "hostPath": { "path": "/" } }]);
    }
    let manifest = json!({
        "metadata": metadata,
        "spec": {
            "nodeName": node::NAME,
            "hostNetwork": true,
            "restartPolicy": if spec.restarts { "Always" } else { "Never" },
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "resources": whole,
            "containers": [container],
            "volumes": volumes,
        },
    });
    Ok(serde_json::from_value(manifest)?)
}
