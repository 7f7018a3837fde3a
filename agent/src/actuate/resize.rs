//! Changing a pod's limit through the API: the `resize` subresource (Kubernetes 1.33 and later).
//!
//! A JSON patch with a `test` on the old value, so that a change by somebody else is a conflict and
//! not overwritten; a resourceVersion would conflict with every status update. Only the memory limit
//! of one container is touched. The patch returning means that the API has taken it; that it is in
//! force is seen in the cgroup, which is why success is not answered here.

use std::{
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
    cgroup::Cgroup,
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
    /// The container.
    pub container: String,
    /// Where its limit stands in the spec.
    pub level: Level,
    /// The limit in the spec, as last seen or written.
    pub limit: String,
    /// The limit at rest, as it was written: what to write back.
    pub original: (Bytes, String),
    /// One request at a time: a raise must not overtake the lowering that it answers.
    pub order: Arc<tokio::sync::Mutex<()>>,
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

/// What is told of a container that is only watched.
#[derive(Clone, Debug)]
pub enum Observed {
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
        let first = self.patch(cgroup, to).await;
        // 422: the test on the old value failed, or the value itself is refused. If the value in the
        // spec is ours, it was the former, and only our knowledge was old.
        match first {
            Err((refused, Some(422))) if self.catch_up(cgroup).await? => {
                tracing::debug!(
                    why = refused.why,
                    "patching again from the value in the spec"
                );
                self.patch(cgroup, to).await.map_err(|(refused, _)| refused)
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

    async fn patch(&self, cgroup: CgroupId, to: Bytes) -> Result<(), (Refused, Option<u16>)> {
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
        let patch = limit_patch(target.level, &target.limit, &value);
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
        if let Some(limit) = limit_at(&patched, target.level) {
            self.target(cgroup, |target| target.limit = limit)
                .map_err(|refused| (refused, None))?;
        }
        Ok(())
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

/// Replaces a memory limit if it is still `from`.
#[must_use]
pub fn limit_patch(level: Level, from: &str, to: &str) -> Patch<()> {
    let limit = ["resources", "limits", "memory"];
    let path = match level {
        Level::Pod => PointerBuf::from_tokens(["spec"].into_iter().chain(limit)),
        Level::Container(index) => {
            let index = index.to_string();
            PointerBuf::from_tokens(["spec", "containers", &index].into_iter().chain(limit))
        }
    };
    Patch::Json(json_patch::Patch(vec![
        PatchOperation::Test(TestOperation {
            path: path.clone(),
            value: from.into(),
        }),
        PatchOperation::Replace(ReplaceOperation {
            path,
            value: to.into(),
        }),
    ]))
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
}
