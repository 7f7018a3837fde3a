//! A pod as its spec and status have it, and no more of it than Bellows goes by.
//!
//! Quantities stand here as they were written: what is compared with what the API has must be the same text, and whoever
//! needs a size says what becomes of one that does not parse. `None` is what is not said, which is not zero.
//!
//! It must not know of policies or annotations' meaning, nor of the API's types.

use std::collections::BTreeMap;

use crate::{patience::Probe, units::Bytes};

/// The least priority of pods that are critical to the system: `system-cluster-critical` and `system-node-critical`
/// (`SystemCriticalPriority`, pkg/apis/scheduling/types.go), which nobody else may have.
const CRITICAL: i32 = 2_000_000_000;

/// Quality of service class of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QosClass {
    /// Requests equal limits.
    Guaranteed,
    /// Some requests or limits.
    Burstable,
    /// None.
    BestEffort,
}

/// Where in a spec a limit stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// `spec.resources`.
    Pod,
    /// `spec.containers` at this index.
    Container(usize),
}

/// A resize that the kubelet does not carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutOff {
    /// Whether it never will (Infeasible), rather than when there is room (Deferred).
    pub is_infeasible: bool,
    /// Why, in its own words.
    pub message: String,
    /// Whether it speaks of what the spec says now.
    pub is_current: bool,
}

/// A container as its pod's spec and status have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// The runtime's id while it runs.
    pub id: Option<String>,
    /// Whether it is ready; `None` without a readiness probe: it is said to be at once then.
    pub is_ready: Option<bool>,
    /// When it was started, in seconds since 1970, while it runs.
    pub started_at: Option<u64>,
    /// Whether the kubelet says what resources it has while it runs.
    pub reports_resources: bool,
    /// `resources.limits.memory` as written.
    pub memory_limit: Option<String>,
    /// `resources.limits.cpu` as written.
    pub cpu_limit: Option<String>,
    /// The field manager that has set it to what it is.
    pub cpu_limit_manager: Option<String>,
    /// `resources.requests.cpu` as written: no limit may be below it.
    pub cpu_request: Option<String>,
    /// Whether `resizePolicy` restarts it when CPU changes.
    pub restarts_on_cpu_resize: bool,
    /// `resources.requests.memory` as written: no limit may be below it.
    pub memory_request: Option<String>,
    /// The field manager that has set it to what it is.
    pub request_manager: Option<String>,
    /// What the kubelet has allotted to it (`allocatedResources`, 1.33 and later), while it runs.
    pub allotted: Option<String>,
    /// The field manager that has set it to what it is; `None` where the API does not say.
    pub limit_manager: Option<String>,
    /// Whether `resizePolicy` restarts it when memory changes.
    pub restarts_on_resize: bool,
    /// Its liveness and startup probes.
    pub probes: Vec<Probe>,
}

/// An init container, or a sidecar: nobody moves its limits, but its cgroup may be taken for another's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitContainer {
    /// Its name.
    pub name: String,
    /// Whether it is a sidecar (`restartPolicy: Always`): it runs beside the others.
    pub is_sidecar: bool,
    /// The runtime's id while it runs.
    pub id: Option<String>,
    /// `resources.limits.memory` as written.
    pub memory_limit: Option<String>,
    /// `resources.limits.cpu` as written.
    pub cpu_limit: Option<String>,
    /// Whether it has done what it was for, and is not started again.
    pub is_done: bool,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its class.
    pub qos: QosClass,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Whether its mode among these is that of its annotation [`EBPF_RESIZE`](super::EBPF_RESIZE), which is of memory limits alone.
    pub is_only_of_memory: bool,
    /// What is wrong with that annotation.
    pub misread: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its containers in the order of the spec.
    pub containers: Vec<Container>,
    /// The runtime's ids of containers without a memory limit of their own that run, init containers too: the kubelet gives
    /// them the pod's.
    pub heirs: Vec<String>,
    /// Its init containers, sidecars among them.
    pub init_containers: Vec<InitContainer>,
    /// `spec.resources.limits.memory` as written.
    pub memory_limit: Option<String>,
    /// The field manager that has set it to what it is.
    pub limit_manager: Option<String>,
    /// Whether it has a memory request of its own (`spec.resources.requests.memory`): those of its containers do not count.
    pub has_memory_request: bool,
    /// Whether it has a CPU limit of its own (`spec.resources.limits.cpu`).
    pub has_cpu_limit: bool,
    /// Whether it has any resources of its own (`spec.resources`).
    pub has_resources: bool,
    /// Whether the kubelet says what resources it has as a whole (`status.resources`).
    pub reports_resources: bool,
    /// Whether the kubelet says that there is no room for what the spec says (PodResizePending; before 1.33
    /// `status.resize`, which is Deferred or Infeasible).
    pub is_resize_pending: bool,
    /// Whether that may pass (Deferred) or cannot be (Infeasible), and its message.
    pub put_off: Option<PutOff>,
    /// What a scheduler counts of its memory; nothing once it has ended.
    pub requested: Bytes,
    /// Whether it is about to carry that out, or tries to (PodResizeInProgress; before 1.33 Proposed or InProgress).
    pub is_resize_in_progress: bool,
    /// Its priority (`spec.priority`), 0 without one.
    pub priority: i32,
    /// Whether the kubelet made it from a file: the API cannot resize it.
    pub is_static: bool,
    /// Whether it is being deleted or has ended.
    pub ending: bool,
}

impl Pod {
    /// Whether the node or the cluster depends on it: nobody moves a limit or request of it.
    pub(super) const fn is_critical(&self) -> bool {
        self.priority >= CRITICAL
    }
}
