//! Changing a pod's limit through the API: the `resize` subresource (Kubernetes 1.33 and later).
//!
//! A JSON patch with a `test` on the old value, so that a change by somebody else is a conflict and
//! not overwritten; a resourceVersion would conflict with every status update. Only memory limits
//! are touched: one container's, and those of others beside it whose lowering is taken back. The patch returning means
//! that the API has taken it; that it is in force is seen in the cgroup, which is why success is not answered here.

use std::{
    collections::BTreeMap,
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use bellows_core::{
    Bytes, CgroupId,
    pod::{Level, MANAGER},
    quantity,
};
use json_patch::{PatchOperation, ReplaceOperation, TestOperation, jsonptr::PointerBuf};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use tokio::{runtime::Handle, sync::mpsc::UnboundedSender};

use super::targets::Targets;
use crate::{
    attribution::{
        api::Pod,
        pods::{limit_at, limit_manager},
    },
    cgroup::{Cgroup, Limit},
    guard::{Input, Refused, Requester, told_kill, told_raise},
    ledger::Record,
    metrics::{self, Call, METRICS},
};

/// Longest time that the API may take to answer.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Where a guarded cgroup's limit is written in the API.
#[derive(Clone, Debug)]
pub struct Target {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Its uid: another may have its name.
    pub uid: String,
    /// The guarded cgroup.
    pub cgroup: Cgroup,
    /// The container.
    pub container: String,
    /// Where its limit stands in the spec.
    pub level: Level,
    /// The limit in the spec, as last seen or written.
    pub limit: String,
    /// The limit at rest, as it was written: what to write back.
    pub original: (Bytes, String),
    /// One request of a pod at a time: a raise must not overtake the lowering that it answers, and the kubelet carries
    /// out all of a pod's resize or nothing of it.
    pub order: Order,
}

/// Held while a request of a pod is under way.
pub type Order = Arc<tokio::sync::Mutex<()>>;

/// A change of one limit.
#[derive(Clone, Debug)]
pub struct Change {
    /// Where it stands.
    pub level: Level,
    /// What it must be.
    pub from: String,
    /// What it becomes.
    pub to: String,
}

/// Sends resizes.
#[derive(Clone)]
pub struct Resizer {
    client: Client,
    runtime: Handle,
    targets: Targets<Target>,
    inputs: SyncSender<Input>,
    observed: UnboundedSender<(CgroupId, Observed)>,
}

/// What the watch of pods is told of a container.
#[derive(Clone, Debug)]
pub enum Observed {
    /// It is neither guarded nor watched, although it should be.
    NotGuarded,
    /// A kill.
    Kill(String),
    /// A raise that it would have got.
    Raise(String),
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
        targets: Targets<Target>,
        inputs: SyncSender<Input>,
        observed: UnboundedSender<(CgroupId, Observed)>,
    ) -> Self {
        Self {
            client,
            runtime,
            targets,
            inputs,
            observed,
        }
    }

    fn send(&self, cgroup: CgroupId, to: Bytes) {
        let this = self.clone();
        self.runtime.spawn(async move {
            let result = match tokio::time::timeout(TIMEOUT, this.resize(cgroup, to)).await {
                Ok(result) => result,
                Err(_elapsed) => {
                    count(metrics::SILENT);
                    let why = format!("the API did not answer within {} s", TIMEOUT.as_secs());
                    Err(Refused {
                        why,
                        uncertain: true,
                    })
                }
            };
            if result.is_err() {
                // A controller that has ended needs no answer.
                drop(this.inputs.try_send(Input::Answered { cgroup, to, result }));
            }
        });
    }

    fn target<T>(
        &self,
        cgroup: CgroupId,
        change: impl FnOnce(&mut Target) -> T,
    ) -> Result<T, Refused> {
        self.targets.of(cgroup, change).ok_or_else(|| Refused {
            why: "the pod is gone".to_owned(),
            uncertain: false,
        })
    }

    async fn resize(&self, cgroup: CgroupId, to: Bytes) -> Result<(), Refused> {
        let order = self.target(cgroup, |target| Arc::clone(&target.order))?;
        let _turn = order.lock().await;
        let beside = self.lowerings_beside(cgroup, to)?;
        let is_alone = beside.is_empty();
        let first = self.patch(cgroup, to, beside).await;
        // 422: the test on the old value failed, or the value itself is refused. If the value in the
        // spec is ours, it was the former, and only our knowledge was old.
        match first {
            // What is known of those beside it may be old, too.
            Err((refused, Some(422))) if self.catch_up(cgroup).await? || !is_alone => {
                tracing::debug!(
                    why = refused.why,
                    "patching again from the value in the spec"
                );
                let patched = self.patch(cgroup, to, BTreeMap::new()).await;
                patched.map_err(|(refused, _)| refused)
            }
            result => result.map_err(|(refused, _)| refused),
        }
    }

    /// Reads the limit in the spec; returns whether it is a value of ours that we did not know of.
    async fn catch_up(&self, cgroup: CgroupId) -> Result<bool, Refused> {
        let target = self.target(cgroup, |target| target.clone())?;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &target.namespace);
        let pod = pods
            .get(&target.name)
            .await
            .map_err(|error| refusal(&error).0)?;
        let is_ours = limit_manager(&pod, &target.container).as_deref() == Some(MANAGER);
        let Some(limit) = limit_at(&pod, target.level).filter(|_| is_ours) else {
            return Ok(false);
        };
        self.target(cgroup, |target| {
            let is_new = target.limit != limit;
            target.limit = limit;
            is_new
        })
    }

    async fn patch(
        &self,
        cgroup: CgroupId,
        to: Bytes,
        beside: BTreeMap<CgroupId, Change>,
    ) -> Result<(), (Refused, Option<u16>)> {
        let (target, value) = self
            .target(cgroup, |target| {
                let (original, text) = &target.original;
                let value = if to == *original {
                    text.clone()
                } else {
                    quantity::format(to)
                };
                (target.clone(), value)
            })
            .map_err(|refused| (refused, None))?;
        let own = Change {
            level: target.level,
            from: target.limit.clone(),
            to: value.clone(),
        };
        let changes = [own].into_iter().chain(beside.values().cloned());
        let changes: Vec<Change> = changes.collect();
        let patch = limits_patch(&target.uid, &changes);
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &target.namespace);
        let patched = pods
            .patch_resize(&target.name, &parameters(), &patch)
            .await
            .inspect(|_| count(metrics::OK))
            .map_err(|error| {
                let (Refused { why, uncertain }, code) = refusal(&error);
                count(if uncertain {
                    metrics::SILENT
                } else {
                    metrics::REFUSED
                });
                let why = format!(
                    "resize of {}/{} to {value}: {why}",
                    target.namespace, target.name
                );
                (Refused { why, uncertain }, code)
            })?;
        for (cgroup, change) in beside {
            // One that is gone needs no limit.
            self.targets.of(cgroup, |target| target.limit = change.to);
        }
        if let Some(limit) = limit_at(&patched, target.level) {
            self.target(cgroup, |target| target.limit = limit)
                .map_err(|refused| (refused, None))?;
        }
        Ok(())
    }

    /// Lowerings of a pod's other containers that are not in force. The kubelet carries out all of a pod's resize or
    /// nothing (`validateMemoryResizeAction`, pkg/kubelet/kuberuntime/kuberuntime_manager.go, 1.37): a raise must not wait
    /// for a lowering that it refuses, so it takes that back. It is asked for again later. None for a lowering.
    fn lowerings_beside(
        &self,
        cgroup: CgroupId,
        to: Bytes,
    ) -> Result<BTreeMap<CgroupId, Change>, Refused> {
        let (uid, limit) = self.target(cgroup, |target| {
            (target.uid.clone(), quantity::parse(&target.limit))
        })?;
        if limit.is_ok_and(|limit| to <= limit) {
            return Ok(BTreeMap::new());
        }
        Ok(self.targets.with(|targets| {
            let beside = targets.iter();
            let beside = beside.filter(|(id, target)| **id != cgroup && target.uid == uid);
            let waiting = beside.filter_map(|(&id, target)| {
                let Limit::At(in_force) = target.cgroup.limit("memory.max").ok()? else {
                    return None;
                };
                let asked = quantity::parse(&target.limit).ok()?;
                let change = Change {
                    level: target.level,
                    from: target.limit.clone(),
                    to: quantity::format(in_force),
                };
                (asked.page_floor() < in_force).then_some((id, change))
            });
            waiting.collect()
        }))
    }
}

fn count(result: &'static str) {
    let counted = Call {
        call: "resize",
        result,
    };
    METRICS.api_calls.get_or_create(&counted).inc();
}

/// Patches are made under our own name: by it a change of ours is told from others'.
#[must_use]
pub fn parameters() -> PatchParams {
    PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    }
}

/// Replaces memory limits of a pod if each is still what it was.
#[must_use]
pub fn limits_patch(uid: &str, changes: &[Change]) -> Patch<()> {
    let limit = ["resources", "limits", "memory"];
    let test = |path, value: &str| {
        PatchOperation::Test(TestOperation {
            path,
            value: value.into(),
        })
    };
    let mut operations = vec![test(PointerBuf::from_tokens(["metadata", "uid"]), uid)];
    for Change { level, from, to } in changes {
        let path = match level {
            Level::Pod => PointerBuf::from_tokens(["spec"].into_iter().chain(limit)),
            Level::Container(index) => {
                let index = index.to_string();
                PointerBuf::from_tokens(["spec", "containers", &index].into_iter().chain(limit))
            }
        };
        operations.push(test(path.clone(), from));
        operations.push(PatchOperation::Replace(ReplaceOperation {
            path,
            value: to.as_str().into(),
        }));
    }
    Patch::Json(json_patch::Patch(operations))
}

/// What an error of the client means: an answer of the API is definite, anything else may have
/// reached it.
fn refusal(error: &kube::Error) -> (Refused, Option<u16>) {
    let code = match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    };
    let uncertain = code.is_none_or(|code| code >= 500);
    (
        Refused {
            why: error.to_string(),
            uncertain,
        },
        code,
    )
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
        let observed = match record {
            Record::ObservedKill { kill, .. } => Observed::Kill(told_kill(kill)),
            Record::WouldRaise { would, .. } => Observed::Raise(told_raise(would)),
            _ => return,
        };
        // A watch that has ended tells nobody.
        drop(self.observed.send((cgroup.id(), observed)));
    }

    fn not_guarded(&mut self, cgroup: CgroupId) {
        // A watch that has ended tries nobody again.
        drop(self.observed.send((cgroup, Observed::NotGuarded)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_tests_whose_it_is_and_what_was() {
        let change = |level, from: &str, to: &str| Change {
            level,
            from: from.to_owned(),
            to: to.to_owned(),
        };
        let changes = [
            change(Level::Container(1), "64Mi", "512Mi"),
            change(Level::Pod, "1Gi", "2Gi"),
        ];
        let Patch::Json(patch) = limits_patch("0f8c", &changes) else {
            panic!("no JSON patch")
        };
        let container = "/spec/containers/1/resources/limits/memory";
        let pod = "/spec/resources/limits/memory";
        let expected = serde_json::json!([
            { "op": "test", "path": "/metadata/uid", "value": "0f8c" },
            { "op": "test", "path": container, "value": "64Mi" },
            { "op": "replace", "path": container, "value": "512Mi" },
            { "op": "test", "path": pod, "value": "1Gi" },
            { "op": "replace", "path": pod, "value": "2Gi" },
        ]);
        assert_eq!(serde_json::to_value(patch).unwrap(), expected);
    }
}
