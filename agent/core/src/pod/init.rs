//! Init containers, sidecars among them: nobody moves their limits.
//!
//! A policy for every container does not mean them. One that names one does, and would do nothing without a word.

use super::{InitContainer, Mode, Pod, Refusal, Wish, meant};
use crate::elastic::ElasticPolicy;

/// Those that a policy names, where the pod itself asks for nothing, or for this mode.
pub(super) fn refused(
    pod: &Pod,
    mode: Option<Mode>,
    policies: &[ElasticPolicy],
) -> impl Iterator<Item = (String, Result<Wish, Refusal>)> {
    let named = pod.init_containers.iter().filter(move |container| {
        let meant = meant(pod, policies, &container.name);
        meant.is_some_and(|(policy, rules)| {
            rules.name.is_some() && mode.unwrap_or(policy.mode) != Mode::Off
        })
    });
    named.map(|container| (container.name.clone(), Err(refusal(container))))
}

fn refusal(container: &InitContainer) -> Refusal {
    let name = container.name.clone();
    if container.is_sidecar {
        Refusal::Sidecar(name)
    } else {
        Refusal::Init(name)
    }
}
