//! What is left raised of a pod whose container nobody guards any more.
//!
//! Nobody that lives needs to have raised it: an agent may have died, a policy may be gone, or the container. So it is known
//! by the pod alone: the limit was set by us, and is another than the original that stands there.
//!
//! It must not take a limit for ours that somebody else has set, whatever original stands on the pod.

use super::{Level, MANAGER, ORIGINAL, Pod, WHOLE_POD, original::entries, rest::at_rest};
use crate::quantity;

/// A limit that was left raised, of a container that is not guarded any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raised {
    /// The container's name, or [`WHOLE_POD`].
    pub container: String,
    /// Where it stands.
    pub level: Level,
    /// The limit, as written.
    pub limit: String,
    /// The limit at rest, as it is to be written: what it was, unless somebody has raised the request beyond that.
    pub rest: String,
    /// The runtime's id of the container while it runs.
    pub id: Option<String>,
}

/// What is left raised of a pod: its limit is ours, and another than at rest by the original that stands on it. It can be
/// so although nobody that lives has raised it.
#[must_use]
pub fn left_raised(pod: &Pod) -> Vec<Raised> {
    if pod.ending {
        return Vec::new();
    }
    let originals = entries(pod, ORIGINAL).filter_map(|entry| entry.split_once('='));
    originals
        .filter_map(|(name, original)| raised(pod, name, original))
        .collect()
}

pub(super) fn raised(pod: &Pod, name: &str, original: &str) -> Option<Raised> {
    let (level, limit, manager, id) = if name == WHOLE_POD {
        (Level::Pod, &pod.memory_limit, &pod.limit_manager, None)
    } else {
        let mut containers = pod.containers.iter().enumerate();
        let (index, container) = containers.find(|(_, container)| container.name == name)?;
        let (limit, manager) = (&container.memory_limit, &container.limit_manager);
        (
            Level::Container(index),
            limit,
            manager,
            container.id.clone(),
        )
    };
    let limit = limit.as_ref()?;
    let is_ours = manager.as_deref() == Some(MANAGER);
    let (now, before) = (
        quantity::parse(limit).ok()?,
        quantity::parse(original).ok()?,
    );
    let rest = at_rest(pod, level, now, before);
    // Above it, or, where a policy has a floor, below.
    (is_ours && now != rest).then(|| Raised {
        container: name.to_owned(),
        level,
        limit: limit.clone(),
        rest: if rest == before {
            original.to_owned()
        } else {
            quantity::format(rest)
        },
        id,
    })
}
