//! What the memory requests of a pod's containers may become, by policy.
//!
//! As with CPU there is no annotation for it but the one that opts out. What is left lowered of a container that nobody means
//! any more is a wish without rules: it is given back.
//!
//! A Guaranteed pod has its limits where its requests are, and stays Guaranteed only if both come down. A limit that comes down
//! kills whoever grows, and nobody guards such a pod: so neither is lowered.

use std::collections::BTreeMap;

use thiserror::Error;

use super::{
    Container, MANAGER, Pod, QosClass, meant, mode_beside,
    original::{Original, recorded},
    rest::request_at_rest,
};
use crate::{
    autoscalers::Claimant,
    elastic::{ElasticPolicy, Mode},
    quantity::{self, QuantityError},
    requests::RequestRules,
    units::Bytes,
};

/// Written by Bellows before it lowers one: `CONTAINER=REQUEST` of memory as they were, with commas between them.
pub const ORIGINAL_REQUESTS: &str = "bellows.dev/original-requests";

/// What a container's memory request may become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestWish {
    /// Its index in the spec.
    pub index: usize,
    /// The runtime's id while it runs.
    pub id: Option<String>,
    /// The request in the spec, as written.
    pub request_text: String,
    /// The same.
    pub request: Bytes,
    /// The request as it was, or less where somebody has lowered the limit below that meanwhile.
    pub original: Bytes,
    /// The same as it was written.
    pub original_text: String,
    /// What the kubelet has allotted to it, as written, where it says that.
    pub allotted: Option<String>,
    /// What it may become; `None` gives back what it was.
    pub rules: Option<RequestRules>,
    /// Its pod's priority.
    pub priority: i32,
    /// Whether the original stands on the pod already.
    pub recorded: bool,
    /// Whether what the spec says was set by us.
    pub is_ours: bool,
    /// Whether somebody else has changed it since the original was recorded: it is the new original then.
    pub foreign: bool,
}

/// Why a container's memory request is left alone although a policy means it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RequestRefusal {
    /// A size does not parse.
    #[error("container `{container}`: its memory request: {source}")]
    Request {
        /// The container.
        container: String,
        /// What is wrong.
        source: QuantityError,
    },
    /// The limit would have to follow.
    #[error(
        "the pod is Guaranteed: lowering its memory request alone would change its QoS class, which the API refuses; set a memory request below the limit"
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
    /// The pod has a request of its own.
    #[error(
        "the pod has a memory request at its own level, which is not moved: leave that out, or the policy's memory.requests"
    )]
    WholePod,
    /// An autoscaler sets it.
    #[error("container `{container}`: its memory request is left alone: {claimant}")]
    Claimed {
        /// The container.
        container: String,
        /// Which.
        claimant: Claimant,
    },
}

impl RequestRefusal {
    /// The reason of the Event.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Request { .. } => "NoMemoryRequest",
            Self::Guaranteed => "GuaranteedNotSupported",
            Self::Static => "StaticPodNotSupported",
            Self::Critical => "CriticalPodNotSupported",
            Self::RestartsOnResize(_) => "ResizeRestartsContainer",
            Self::Claimed { claimant, .. } => claimant.reason(),
            Self::WholePod => "PodLevelRequestNotSupported",
        }
    }
}

/// By container; `Err` for one that a policy means and that cannot have it.
pub type RequestWishes = BTreeMap<String, Result<RequestWish, RequestRefusal>>;

/// What the memory requests of a pod's containers may become; nothing if it is ending. Containers without a request are not
/// meant: there is nothing to lower.
#[must_use]
pub fn request_wishes(pod: &Pod, policies: &[ElasticPolicy]) -> RequestWishes {
    if pod.ending {
        return RequestWishes::new();
    }
    let containers = pod.containers.iter().enumerate();
    let wishes = containers.filter_map(|(index, container)| {
        let text = container.memory_request.as_ref()?;
        let wish = wish(pod, policies, index, container, text).transpose()?;
        Some((container.name.clone(), wish))
    });
    wishes.collect()
}

fn wish(
    pod: &Pod,
    policies: &[ElasticPolicy],
    index: usize,
    container: &Container,
    text: &str,
) -> Result<Option<RequestWish>, RequestRefusal> {
    let name = &container.name;
    let size = |text: &str| {
        quantity::parse(text).map_err(|source| RequestRefusal::Request {
            container: name.clone(),
            source,
        })
    };
    let rules = asked(pod, policies, container);
    let recorded = recorded(pod, ORIGINAL_REQUESTS, name);
    if rules.is_none() && recorded.is_none() {
        return Ok(None);
    }
    let request = size(text)?;
    let recorded = recorded.map(|original| Ok((size(original)?, original)));
    let recorded: Option<(Bytes, &str)> = recorded.transpose()?;
    let manager = container.request_manager.as_deref();
    let original = Original::of((request, text), manager, recorded);
    let at_rest = request_at_rest(pod, index, request, original.value);
    if rules.is_none() && (original.is_foreign || at_rest == request) {
        return Ok(None);
    }
    if let Some(refusal) = refusal(pod, container) {
        return Err(refusal);
    }
    Ok(Some(RequestWish {
        index,
        id: container.id.clone(),
        request_text: text.to_owned(),
        request,
        original: at_rest,
        original_text: if at_rest == original.value {
            original.text.to_owned()
        } else {
            quantity::format(at_rest)
        },
        allotted: container.allotted.clone(),
        rules,
        priority: pod.priority,
        recorded: original.is_recorded,
        is_ours: manager == Some(MANAGER),
        foreign: original.is_foreign,
    }))
}

/// What a policy says of a container's request.
fn asked(pod: &Pod, policies: &[ElasticPolicy], container: &Container) -> Option<RequestRules> {
    let own = mode_beside(pod).ok()?;
    let (policy, rules) = meant(pod, policies, &container.name)?;
    let is_meant = own.unwrap_or(policy.mode) == Mode::Act;
    let requests = rules.memory.and_then(|memory| memory.requests);
    requests.filter(|rules| is_meant && (rules.right_size || rules.make_room))
}

fn refusal(pod: &Pod, container: &Container) -> Option<RequestRefusal> {
    if pod.is_static {
        Some(RequestRefusal::Static)
    } else if pod.is_critical() {
        Some(RequestRefusal::Critical)
    } else if pod.qos == QosClass::Guaranteed {
        Some(RequestRefusal::Guaranteed)
    } else if pod.has_memory_request {
        Some(RequestRefusal::WholePod)
    } else if container.restarts_on_resize {
        Some(RequestRefusal::RestartsOnResize(container.name.clone()))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        elastic::{ContainerRules, MemoryRules, Order, Parallelism, Selector},
        pod::{MODE, tests::pod},
        units::Nanos,
    };

    fn policy() -> ElasticPolicy {
        ElasticPolicy {
            name: "requests".to_owned(),
            mode: Mode::Act,
            selector: Selector::default(),
            containers: vec![ContainerRules {
                name: None,
                memory: Some(MemoryRules {
                    max: Bytes::mib(1024),
                    floor: None,
                    shrink_after: Nanos::millis(5000),
                    hold_at_most: None,
                    order: Order::PatchFirst,
                    parallelism: Parallelism::Unchanged,
                    heap: None,
                    requests: Some(RequestRules {
                        right_size: true,
                        make_room: false,
                        floor: Bytes::mib(1),
                        margin_per_mille: 250,
                        observe: Nanos::millis(1000),
                    }),
                }),
                cpu: None,
                boosts: Vec::new(),
            }],
        }
    }

    fn wish(pod: &Pod, policies: &[ElasticPolicy]) -> Option<Result<RequestWish, RequestRefusal>> {
        request_wishes(pod, policies).into_values().next()
    }

    /// One that was lowered, by whom.
    fn lowered(to: &str, manager: &str) -> Pod {
        let mut pod = pod(&[(ORIGINAL_REQUESTS, "app=48Mi")]);
        pod.containers[0].memory_request = Some(to.to_owned());
        pod.containers[0].request_manager = Some(manager.to_owned());
        pod
    }

    #[test]
    fn whoever_is_not_meant_is_left_alone_and_what_was_lowered_is_given_back() {
        assert_eq!(wish(&pod(&[]), &[]), None);
        assert_eq!(wish(&pod(&[(MODE, "Off")]), &[policy()]), None);
        assert_eq!(wish(&pod(&[(MODE, "Observe")]), &[policy()]), None);
        assert!(
            wish(&pod(&[]), &[policy()])
                .unwrap()
                .unwrap()
                .rules
                .is_some()
        );
        let mut observing = policy();
        observing.mode = Mode::Observe;
        let mut asking = pod(&[(MODE, "Act")]);
        assert!(wish(&asking, std::slice::from_ref(&observing)).is_some());
        asking.is_only_of_memory = true;
        assert_eq!(wish(&asking, &[observing]), None);
        let left = wish(&lowered("16Mi", MANAGER), &[]).unwrap().unwrap();
        assert_eq!((left.rules, left.original), (None, Bytes::mib(48)));
        assert_eq!(wish(&lowered("48Mi", MANAGER), &[]), None);
    }

    #[test]
    fn a_change_by_somebody_else_is_the_new_original() {
        let ours = wish(&lowered("16Mi", MANAGER), &[policy()])
            .unwrap()
            .unwrap();
        assert_eq!((ours.original, ours.foreign), (Bytes::mib(48), false));
        let theirs = wish(&lowered("32Mi", "kubectl"), &[policy()])
            .unwrap()
            .unwrap();
        assert_eq!(theirs.original_text, "32Mi");
        assert!(theirs.foreign && !theirs.recorded);
        assert_eq!(wish(&lowered("32Mi", "kubectl"), &[]), None);
    }

    #[test]
    fn nobody_is_lowered_who_would_be_restarted_or_get_another_class() {
        type Case = (fn(&mut Pod), &'static str);
        let cases: [Case; 5] = [
            (
                |pod| pod.qos = QosClass::Guaranteed,
                "GuaranteedNotSupported",
            ),
            (|pod| pod.is_static = true, "StaticPodNotSupported"),
            (
                |pod| pod.priority = 2_000_000_000,
                "CriticalPodNotSupported",
            ),
            (
                |pod| pod.has_memory_request = true,
                "PodLevelRequestNotSupported",
            ),
            (
                |pod| pod.containers[0].restarts_on_resize = true,
                "ResizeRestartsContainer",
            ),
        ];
        for (change, reason) in cases {
            let mut pod = pod(&[]);
            change(&mut pod);
            let refused = wish(&pod, &[policy()]).unwrap().unwrap_err();
            assert_eq!(refused.reason(), reason);
        }
    }

    #[test]
    fn a_request_comes_back_below_a_limit_that_was_lowered_meanwhile() {
        let original = |limit: &str, manager: &str, policies: &[ElasticPolicy]| {
            let mut lowered = lowered("16Mi", MANAGER);
            let limits = [(crate::pod::ORIGINAL.to_owned(), "app=32Mi".to_owned())];
            lowered.annotations.extend(limits);
            lowered.containers[0].memory_limit = Some(limit.to_owned());
            lowered.containers[0].limit_manager = Some(manager.to_owned());
            let wish = wish(&lowered, policies)?.unwrap();
            assert_eq!(quantity::parse(&wish.original_text), Ok(wish.original));
            assert!(wish.recorded);
            Some(wish.original_text)
        };
        for policies in [&[policy()][..], &[]] {
            let is = |text: &str| Some(text.to_owned());
            assert_eq!(original("32Mi", "kubectl", policies), is("31Mi"));
            assert_eq!(original("48Mi", "kubectl", policies), is("48Mi"));
            // It stands raised, and comes down to what they have set.
            assert_eq!(original("64Mi", MANAGER, policies), is("31Mi"));
        }
        assert_eq!(original("16Mi", "kubectl", &[]), None);
    }

    /// Its limit at rest must hold what its request comes back to.
    #[test]
    fn a_limit_is_not_lowered_below_a_request_that_comes_back() {
        let mut policy = policy();
        policy.containers[0].memory.as_mut().unwrap().floor = Some(Bytes::mib(20));
        let wishes = crate::pod::wishes(&lowered("16Mi", MANAGER), &[policy]);
        assert_eq!(wishes["app"].as_ref().unwrap().rest, Bytes::mib(49));
    }
}
