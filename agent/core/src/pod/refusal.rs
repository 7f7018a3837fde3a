//! Why a pod that opted in is not guarded, for people: each says what is wrong, and what to do.
//!
//! Reasons of Events are a closed list, by which they are counted and looked for: each refusal has one.
//!
//! It must not decide whether a pod is refused, nor name a way out that does not lead there.

use thiserror::Error;

use super::{CONTAINER, EBPF_RESIZE, MAX_MEMORY, MODE, ORDER, PARALLELISM};
use crate::{autoscalers::Claimant, quantity::QuantityError, units::Bytes};

/// Why a pod that opted in is not guarded.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// The mode is none.
    #[error("annotation {MODE} is `{0}`: use Act, Recommend, Observe or \"Off\"")]
    UnknownMode(String),
    /// The order is none.
    #[error("annotation {ORDER} is `{0}`: use PatchFirst or RaiseFirst")]
    UnknownOrder(String),
    /// The parallelism is none.
    #[error("annotation {PARALLELISM} is `{0}`: use Unchanged or Elastic")]
    UnknownParallelism(String),
    /// The demo's annotation makes no sense.
    #[error(
        "annotation {EBPF_RESIZE} makes no sense ({0}): use {MODE} and {MAX_MEMORY} in its place"
    )]
    EbpfResize(String),
    /// There is no maximum.
    #[error(
        "annotation {MAX_MEMORY} is missing: set it to the most memory that the container may have, such as 4Gi"
    )]
    NoMaximum,
    /// A size does not parse.
    #[error("annotation {name}: {source}")]
    Quantity {
        /// The annotation.
        name: &'static str,
        /// What is wrong.
        source: QuantityError,
    },
    /// Several containers, none named.
    #[error("the pod has {0} containers: name one in the annotation {CONTAINER}")]
    WhichContainer(usize),
    /// The named container does not exist.
    #[error(
        "annotation {CONTAINER} names `{0}`, which is no container of the pod: name one of spec.containers"
    )]
    NoSuchContainer(String),
    /// A policy names a sidecar.
    #[error(
        "container `{0}` is a sidecar (an init container with restartPolicy Always): its limits are not moved; make it an ordinary container, or take it out of the policy"
    )]
    Sidecar(String),
    /// A policy names another init container.
    #[error(
        "container `{0}` is an init container: its limits are not moved; take it out of the policy"
    )]
    Init(String),
    /// The container has no limit to raise.
    #[error(
        "container `{0}` has no memory limit: there is nothing to raise; give it one (resources.limits.memory)"
    )]
    NoLimit(String),
    /// The limit in the spec does not parse.
    #[error("container `{container}`: {source}")]
    Limit {
        /// The container.
        container: String,
        /// What is wrong.
        source: QuantityError,
    },
    /// The maximum is below the limit.
    #[error(
        "{} is {ceiling}, below the limit of {limit}: raise it, or lower the limit",
        written(policy.as_deref())
    )]
    MaximumBelowLimit {
        /// The policy that says it; `None` where an annotation does.
        policy: Option<String>,
        /// The limit.
        limit: Bytes,
        /// The maximum.
        ceiling: Bytes,
    },
    /// Requests would have to follow.
    #[error(
        "the pod is Guaranteed: raising its limit alone would change its QoS class, which the API refuses; set a memory request below the limit"
    )]
    Guaranteed,
    /// The pod is static.
    #[error("the pod is static: the API cannot resize it; change its file on the node")]
    Static,
    /// The pod is critical.
    #[error(
        "the pod is critical to the system (priority class system-node-critical or system-cluster-critical): it is left alone"
    )]
    Critical,
    /// A resize would restart the container.
    #[error(
        "container `{0}` has resizePolicy RestartContainer for memory: a resize would restart it; use NotRequired"
    )]
    RestartsOnResize(String),
    /// An autoscaler sets it.
    #[error("container `{container}`: its memory limit is left alone: {claimant}")]
    Claimed {
        /// The container.
        container: String,
        /// Which.
        claimant: Claimant,
    },
}

impl Refusal {
    /// The reason of the Event.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::UnknownMode(_)
            | Self::UnknownOrder(_)
            | Self::UnknownParallelism(_)
            | Self::EbpfResize(_)
            | Self::NoMaximum
            | Self::Quantity { .. }
            | Self::WhichContainer(_)
            | Self::NoSuchContainer(_)
            | Self::MaximumBelowLimit { policy: None, .. } => "InvalidAnnotation",
            Self::MaximumBelowLimit { .. } => "InvalidLimit",
            Self::NoLimit(_) | Self::Limit { .. } => "NoMemoryLimit",
            Self::Sidecar(_) => "SidecarNotSupported",
            Self::Init(_) => "InitContainerNotSupported",
            Self::Guaranteed => "GuaranteedNotSupported",
            Self::Static => "StaticPodNotSupported",
            Self::Critical => "CriticalPodNotSupported",
            Self::RestartsOnResize(_) => "ResizeRestartsContainer",
            Self::Claimed { claimant, .. } => claimant.reason(),
        }
    }
}

/// Where a maximum is written.
fn written(policy: Option<&str>) -> String {
    policy.map_or_else(
        || format!("annotation {MAX_MEMORY}"),
        |policy| format!("memory.max of the policy {policy}"),
    )
}
