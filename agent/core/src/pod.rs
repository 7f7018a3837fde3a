//! What a pod asks of Bellows, and whether it can have it.
//!
//! Two annotations opt a pod in: `bellows.dev/mode: Act` and `bellows.dev/max-memory`; a third,
//! `bellows.dev/container`, names the container where there are several. Whatever does not parse is
//! refused with the value and the way out: a guess would act on somebody's pod.
//!
//! This knows nothing of the API's types: the shell converts them, once.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::{
    quantity::{self, QuantityError},
    units::Bytes,
};

/// `Act` opts in; `Off` and `Observe` do not.
pub const MODE: &str = "bellows.dev/mode";
/// The limit that is never exceeded.
pub const MAX_MEMORY: &str = "bellows.dev/max-memory";
/// The container that is meant, where a pod has several.
pub const CONTAINER: &str = "bellows.dev/container";
/// Written by Bellows at adoption: `CONTAINER=LIMIT` as they were.
pub const ORIGINAL: &str = "bellows.dev/original-memory";
/// The field manager of Bellows' own changes: by it the API itself tells them from others'.
pub const MANAGER: &str = "bellows";

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

/// A container as its pod's spec and status have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// The runtime's id while it runs.
    pub id: Option<String>,
    /// `resources.limits.memory` as written.
    pub memory_limit: Option<String>,
    /// The field manager that has set it to what it is; `None` where the API does not say.
    pub limit_manager: Option<String>,
    /// Whether `resizePolicy` restarts it when memory changes.
    pub restarts_on_resize: bool,
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
    /// Its containers in the order of the spec.
    pub containers: Vec<Container>,
    /// Whether the kubelet made it from a file: the API cannot resize it.
    pub is_static: bool,
    /// Whether it is being deleted or has ended.
    pub ending: bool,
}

/// What is guarded in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Index of the container in the spec.
    pub index: usize,
    /// Its name.
    pub container: String,
    /// The runtime's id.
    pub id: String,
    /// The limit in the spec, as written.
    pub limit_text: String,
    /// The same as a size.
    pub limit: Bytes,
    /// The limit at rest.
    pub original: Bytes,
    /// The same as it was written.
    pub original_text: String,
    /// The limit that is never exceeded.
    pub ceiling: Bytes,
    /// Whether the original stands on the pod already.
    pub recorded: bool,
    /// Whether somebody else has changed the limit since the original was recorded: the limit is the
    /// new original then.
    pub foreign: bool,
}

/// Why a pod that opted in is not guarded.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// The mode is none.
    #[error("annotation {MODE} is `{0}`: use Act, Observe or Off")]
    UnknownMode(String),
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
    #[error("annotation {CONTAINER} names `{0}`, which is no container of the pod")]
    NoSuchContainer(String),
    /// The container has no limit to raise.
    #[error("container `{0}` has no memory limit: there is nothing to raise")]
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
        "annotation {MAX_MEMORY} is {ceiling}, below the limit of {limit}: raise it, or lower the limit"
    )]
    MaximumBelowLimit {
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
    /// A resize would restart the container.
    #[error(
        "container `{0}` has resizePolicy RestartContainer for memory: a resize would restart it; use NotRequired"
    )]
    RestartsOnResize(String),
}

impl Refusal {
    /// The reason of the Event.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::UnknownMode(_)
            | Self::NoMaximum
            | Self::Quantity { .. }
            | Self::WhichContainer(_)
            | Self::NoSuchContainer(_)
            | Self::MaximumBelowLimit { .. } => "InvalidAnnotation",
            Self::NoLimit(_) | Self::Limit { .. } => "NoMemoryLimit",
            Self::Guaranteed => "GuaranteedNotSupported",
            Self::Static => "StaticPodNotSupported",
            Self::RestartsOnResize(_) => "ResizeRestartsContainer",
        }
    }
}

/// What to guard in a pod: nothing if it does not ask, or has no running container yet.
///
/// # Errors
///
/// [`Refusal`] when it asks for what it cannot have.
pub fn wish(pod: &Pod) -> Result<Option<Wish>, Refusal> {
    match pod.annotations.get(MODE).map(|mode| mode.trim()) {
        None | Some("Off" | "Observe") => return Ok(None),
        Some("Act") => {}
        Some(other) => return Err(Refusal::UnknownMode(other.to_owned())),
    }
    if pod.ending {
        return Ok(None);
    }
    let maximum = pod.annotations.get(MAX_MEMORY).ok_or(Refusal::NoMaximum)?;
    let ceiling = quantity::parse(maximum).map_err(|source| Refusal::Quantity {
        name: MAX_MEMORY,
        source,
    })?;
    let (index, container) = chosen(pod)?;
    let text = container
        .memory_limit
        .clone()
        .ok_or_else(|| Refusal::NoLimit(container.name.clone()))?;
    let limit = quantity::parse(&text).map_err(|source| Refusal::Limit {
        container: container.name.clone(),
        source,
    })?;
    if pod.is_static {
        return Err(Refusal::Static);
    }
    if pod.qos == QosClass::Guaranteed {
        return Err(Refusal::Guaranteed);
    }
    if container.restarts_on_resize {
        return Err(Refusal::RestartsOnResize(container.name.clone()));
    }
    let theirs = container
        .limit_manager
        .as_deref()
        .is_some_and(|manager| manager != MANAGER);
    let recorded = recorded_original(pod, &container.name)?;
    let foreign = theirs
        && recorded
            .as_ref()
            .is_some_and(|(original, _)| *original != limit);
    let recorded = recorded.filter(|_| !foreign);
    let (original, original_text) = recorded.clone().unwrap_or_else(|| (limit, text.clone()));
    if ceiling < original {
        return Err(Refusal::MaximumBelowLimit {
            limit: original,
            ceiling,
        });
    }
    let Some(id) = container.id.clone() else {
        return Ok(None);
    };
    Ok(Some(Wish {
        index,
        container: container.name.clone(),
        id,
        limit_text: text,
        limit,
        original,
        original_text,
        ceiling,
        recorded: recorded.is_some(),
        foreign,
    }))
}

fn chosen(pod: &Pod) -> Result<(usize, &Container), Refusal> {
    let mut containers = pod.containers.iter().enumerate();
    match pod.annotations.get(CONTAINER) {
        Some(name) => containers
            .find(|(_, container)| container.name == *name)
            .ok_or_else(|| Refusal::NoSuchContainer(name.clone())),
        None => match (containers.next(), containers.next()) {
            (Some(only), None) => Ok(only),
            _ => Err(Refusal::WhichContainer(pod.containers.len())),
        },
    }
}

/// The original that stands on the pod for this container.
fn recorded_original(pod: &Pod, container: &str) -> Result<Option<(Bytes, String)>, Refusal> {
    let Some(value) = pod.annotations.get(ORIGINAL) else {
        return Ok(None);
    };
    match value.split_once('=') {
        Some((name, size)) if name == container => quantity::parse(size)
            .map(|bytes| Some((bytes, size.to_owned())))
            .map_err(|source| Refusal::Quantity {
                name: ORIGINAL,
                source,
            }),
        Some(_) => Ok(None),
        None => {
            let source = QuantityError::NoNumber(value.clone());
            Err(Refusal::Quantity {
                name: ORIGINAL,
                source,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(annotations: &[(&str, &str)]) -> Pod {
        Pod {
            namespace: "dev".to_owned(),
            name: "workspace".to_owned(),
            uid: "u".to_owned(),
            qos: QosClass::Burstable,
            annotations: annotations
                .iter()
                .map(|&(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
            containers: vec![Container {
                name: "app".to_owned(),
                id: Some("c1".to_owned()),
                memory_limit: Some("64Mi".to_owned()),
                limit_manager: Some("kubectl".to_owned()),
                restarts_on_resize: false,
            }],
            is_static: false,
            ending: false,
        }
    }

    const ACT: (&str, &str) = (MODE, "Act");
    const MAX: (&str, &str) = (MAX_MEMORY, "1Gi");

    #[test]
    fn a_pod_that_does_not_ask_is_left_alone() {
        for annotations in [&[][..], &[(MODE, "Off"), MAX], &[(MODE, "Observe"), MAX]] {
            assert_eq!(wish(&pod(annotations)), Ok(None));
        }
    }

    #[test]
    fn the_only_container_is_meant() {
        let wish = wish(&pod(&[ACT, MAX])).unwrap().unwrap();
        assert_eq!(
            (wish.container.as_str(), wish.original, wish.recorded),
            ("app", Bytes::mib(64), false)
        );
    }

    #[test]
    fn the_recorded_original_holds_after_a_raise() {
        let mut raised = pod(&[ACT, MAX, (ORIGINAL, "app=64Mi")]);
        raised.containers[0].memory_limit = Some("640Mi".to_owned());
        for manager in [Some(MANAGER.to_owned()), None] {
            raised.containers[0].limit_manager = manager;
            let wish = wish(&raised).unwrap().unwrap();
            assert_eq!(
                (wish.limit, wish.original, wish.recorded, wish.foreign),
                (Bytes::mib(640), Bytes::mib(64), true, false)
            );
        }
    }

    #[test]
    fn a_limit_that_somebody_else_has_set_is_the_new_original() {
        let mut changed = pod(&[ACT, MAX, (ORIGINAL, "app=64Mi")]);
        changed.containers[0].memory_limit = Some("96Mi".to_owned());
        let wish = wish(&changed).unwrap().unwrap();
        assert_eq!(
            (wish.original, wish.recorded, wish.foreign),
            (Bytes::mib(96), false, true)
        );
    }

    #[test]
    fn bad_annotations_are_named() {
        let cases = [
            (vec![(MODE, "act"), MAX], "`act`"),
            (vec![ACT], MAX_MEMORY),
            (vec![ACT, (MAX_MEMORY, "4GB")], "`4GB`"),
            (vec![ACT, (MAX_MEMORY, "32Mi")], "below the limit"),
            (vec![ACT, MAX, (CONTAINER, "db")], "`db`"),
            (vec![ACT, MAX, (ORIGINAL, "nonsense")], "`nonsense`"),
        ];
        for (annotations, part) in cases {
            let refusal = wish(&pod(&annotations)).unwrap_err();
            assert!(refusal.to_string().contains(part), "{refusal}");
            assert_eq!(refusal.reason(), "InvalidAnnotation");
        }
    }

    #[test]
    fn what_a_resize_would_break_is_refused() {
        let mut guaranteed = pod(&[ACT, MAX]);
        guaranteed.qos = QosClass::Guaranteed;
        assert_eq!(wish(&guaranteed), Err(Refusal::Guaranteed));
        let mut restarting = pod(&[ACT, MAX]);
        restarting.containers[0].restarts_on_resize = true;
        assert!(matches!(
            wish(&restarting),
            Err(Refusal::RestartsOnResize(_))
        ));
        let mut unlimited = pod(&[ACT, MAX]);
        unlimited.containers[0].memory_limit = None;
        assert!(matches!(wish(&unlimited), Err(Refusal::NoLimit(_))));
    }
}
