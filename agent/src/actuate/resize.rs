//! Changing a pod's limit through the API: the `resize` subresource (Kubernetes 1.33 and later).
//!
//! A JSON patch with a `test` on the old value, so that a change by somebody else is a conflict and
//! not overwritten; a resourceVersion would conflict with every status update. Only the memory limit
//! of one container is touched. The patch returning means that the API has taken it; that it is in
//! force is seen in the cgroup, which is why success is not answered here.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError, mpsc::SyncSender},
    time::Duration,
};

use bellows_core::{Bytes, CgroupId, quantity};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::runtime::Handle;

use crate::{
    cgroup::Cgroup,
    guard::{Input, Requester},
    ledger::Record,
};

/// Longest time that the API may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Own values that are remembered, to tell them from somebody else's.
const REMEMBERED: usize = 16;

/// Where a guarded cgroup's limit is written in the API.
#[derive(Clone, Debug)]
pub struct Target {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Index of the container in the spec.
    pub index: usize,
    /// The limit in the spec, as last seen or written.
    pub limit: String,
    /// What we have asked for lately.
    pub asked: VecDeque<String>,
}

/// The targets, shared between the pod watch and the requests.
pub type Targets = Arc<Mutex<BTreeMap<CgroupId, Target>>>;

/// Sends resizes.
#[derive(Clone)]
pub struct Resizer {
    client: Client,
    runtime: Handle,
    targets: Targets,
    inputs: SyncSender<Input>,
}

impl std::fmt::Debug for Resizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Resizer").finish_non_exhaustive()
    }
}

impl Resizer {
    /// A requester for a node's pods.
    #[must_use]
    pub const fn new(
        client: Client,
        runtime: Handle,
        targets: Targets,
        inputs: SyncSender<Input>,
    ) -> Self {
        Self {
            client,
            runtime,
            targets,
            inputs,
        }
    }

    fn send(&self, cgroup: CgroupId, to: Bytes) {
        let this = self.clone();
        self.runtime.spawn(async move {
            let result = match tokio::time::timeout(TIMEOUT, this.patch(cgroup, to)).await {
                Ok(result) => result,
                Err(_elapsed) => Err(format!(
                    "the API did not answer within {} s",
                    TIMEOUT.as_secs()
                )),
            };
            if let Err(error) = result {
                // A controller that has ended needs no answer.
                drop(this.inputs.try_send(Input::Answered {
                    cgroup,
                    to,
                    result: Err(error),
                }));
            }
        });
    }

    async fn patch(&self, cgroup: CgroupId, to: Bytes) -> Result<(), String> {
        let value = quantity::format(to);
        let target = {
            let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
            let target = targets
                .get_mut(&cgroup)
                .ok_or_else(|| "the pod is gone".to_owned())?;
            // Before the request: the watch may see it before the answer is here.
            target.asked.push_back(value.clone());
            if target.asked.len() > REMEMBERED {
                target.asked.pop_front();
            }
            target.clone()
        };
        let path = format!("/spec/containers/{}/resources/limits/memory", target.index);
        let operations = json!([
            { "op": "test", "path": path, "value": target.limit },
            { "op": "replace", "path": path, "value": value },
        ]);
        let patch = serde_json::from_value(operations).map_err(|error| error.to_string())?;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &target.namespace);
        let patched = pods
            .patch_resize(
                &target.name,
                &PatchParams::default(),
                &Patch::<()>::Json(patch),
            )
            .await
            .map_err(|error| {
                format!(
                    "resize of {}/{} to {value}: {error}",
                    target.namespace, target.name
                )
            })?;
        let containers = patched.spec.unwrap_or_default().containers;
        let limits = containers
            .into_iter()
            .nth(target.index)
            .and_then(|container| container.resources?.limits);
        if let Some(limit) = limits.and_then(|mut limits| limits.remove("memory")) {
            let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(target) = targets.get_mut(&cgroup) {
                target.limit = limit.0;
            }
        }
        Ok(())
    }
}

impl Requester for Resizer {
    fn raise(&mut self, cgroup: &Cgroup, _from: Bytes, to: Bytes) {
        self.send(cgroup.id(), to);
    }

    fn lower(&mut self, cgroup: &Cgroup, _from: Bytes, to: Bytes) {
        self.send(cgroup.id(), to);
    }

    fn take_back(&mut self, cgroup: &Cgroup, _to: Bytes, limit: Bytes) {
        self.send(cgroup.id(), limit);
    }

    fn record(&mut self, cgroup: &Cgroup, record: &Record) {
        tracing::info!(path = %cgroup.path().display(), ?record, "ledger");
    }
}
