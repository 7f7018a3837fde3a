//! How far the heaps in a pod's containers may go: [`crate::heap`] knows what a policy names, this knows whose limit is
//! ever raised, and by how much.
//!
//! It must not depend on what runs: heaps are sized before their container does.

use std::collections::BTreeMap;

use super::{Container, ORIGINAL, Pod, WHOLE_POD, Wishes, left::raised, original};
use crate::{elastic::Mode, heap::Room, quantity, units::Bytes};

/// By container. Whoever is not in here is never raised: init containers, sidecars too.
pub type Rooms = BTreeMap<String, Room>;

/// The room of heaps in a pod's containers, by all that is wished for it ([`super::all_wishes`]).
#[must_use]
pub fn rooms(pod: &Pod, wishes: &Wishes) -> Rooms {
    let rooms = pod
        .containers
        .iter()
        .map(|container| (container.name.clone(), room(pod, wishes, container)));
    rooms.collect()
}

fn room(pod: &Pod, wishes: &Wishes, container: &Container) -> Room {
    // Without a limit of its own it has its pod's.
    let name = match container.memory_limit {
        Some(_) => container.name.as_str(),
        None => WHOLE_POD,
    };
    match wishes.get(name) {
        Some(Ok(wish)) => Room {
            ceiling: (wish.mode == Mode::Act).then_some(wish.ceiling),
            original: Some(wish.original),
        },
        Some(Err(_)) | None => Room {
            ceiling: None,
            original: original_of_raised(pod, name),
        },
    }
}

/// What a limit was that we have raised, and that nobody guards any more.
fn original_of_raised(pod: &Pod, name: &str) -> Option<Bytes> {
    let original = original::recorded(pod, ORIGINAL, name)?;
    let raised = raised(pod, name, original)?;
    quantity::parse(&raised.rest).ok()
}

#[cfg(test)]
mod tests {
    use super::{super::tests::pod, *};
    use crate::{
        autoscalers::{Claimant, Claims},
        elastic::{ContainerRules, ElasticPolicy, MemoryRules, Order, Parallelism, Selector},
        heap::Heap,
        pod::{
            CONTAINER, MANAGER, MAX_MEMORY, MODE, QosClass, all_wishes, only_observe, yield_limits,
        },
        units::Nanos,
    };

    fn policies() -> Vec<ElasticPolicy> {
        vec![ElasticPolicy {
            name: "heaps".to_owned(),
            selector: Selector::default(),
            mode: Mode::Act,
            containers: vec![ContainerRules {
                name: None,
                memory: Some(MemoryRules {
                    max: Bytes::mib(4096),
                    floor: None,
                    shrink_after: Nanos::millis(5000),
                    hold_at_most: None,
                    order: Order::PatchFirst,
                    parallelism: Parallelism::Unchanged,
                    heap: Some(Heap::Maximum),
                    requests: None,
                }),
                cpu: None,
                boosts: Vec::new(),
            }],
        }]
    }

    /// Ceiling and original in MiB.
    fn of(pod: &Pod, container: &str) -> (Option<u64>, Option<u64>) {
        let rooms = rooms(pod, &all_wishes(pod, &policies()));
        let mib = |bytes: Option<Bytes>| bytes.map(|bytes| bytes.0 >> 20);
        (
            mib(rooms[container].ceiling),
            mib(rooms[container].original),
        )
    }

    #[test]
    fn who_is_raised_has_room_to_its_ceiling_before_it_runs() {
        let mut pod = pod(&[]);
        assert_eq!(of(&pod, "app"), (Some(4096), Some(64)));
        pod.containers[0].id = None;
        assert_eq!(of(&pod, "app"), (Some(4096), Some(64)));
    }

    #[test]
    fn who_is_never_raised_has_none() {
        let change = |change: &dyn Fn(&mut Pod)| {
            let mut pod = pod(&[]);
            change(&mut pod);
            of(&pod, "app")
        };
        let none = (None, None);
        assert_eq!(change(&|pod| pod.qos = QosClass::Guaranteed), none);
        assert_eq!(change(&|pod| pod.priority = 2_000_000_000), none);
        assert_eq!(change(&|pod| pod.is_static = true), none);
        let restarts = change(&|pod| pod.containers[0].restarts_on_resize = true);
        assert_eq!(restarts, none);
        let too_large = change(&|pod| pod.containers[0].memory_limit = Some("8Gi".to_owned()));
        assert_eq!(too_large, none);
        assert_eq!(of(&pod(&[(MODE, "Off")]), "app"), none);
        let pod = pod(&[]);
        let mut claimed = all_wishes(&pod, &policies());
        yield_limits(&mut claimed, |_| Claims {
            memory_limit: Some(Claimant::Vertical("v".to_owned())),
            ..Claims::default()
        });
        assert_eq!(rooms(&pod, &claimed)["app"], Room::default());
        let mut watched = all_wishes(&pod, &policies());
        only_observe(&mut watched);
        assert_eq!(rooms(&pod, &watched)["app"].ceiling, None);
    }

    #[test]
    fn annotations_come_before_the_policy() {
        let sized = pod(&[(MAX_MEMORY, "1Gi")]);
        assert_eq!(of(&sized, "app"), (Some(1024), Some(64)));
        let mut one = pod(&[(MAX_MEMORY, "1Gi"), (CONTAINER, "app")]);
        one.containers.push(Container {
            name: "other".to_owned(),
            ..one.containers[0].clone()
        });
        assert_eq!(of(&one, "app"), (Some(1024), Some(64)));
        assert_eq!(of(&one, "other"), (None, None));
    }

    #[test]
    fn the_original_is_what_the_limit_was_before_it_was_raised() {
        let mut raised = pod(&[(ORIGINAL, "app=64Mi")]);
        raised.containers[0].memory_limit = Some("1536Mi".to_owned());
        raised.containers[0].limit_manager = Some(MANAGER.to_owned());
        assert_eq!(of(&raised, "app"), (Some(4096), Some(64)));
        raised.qos = QosClass::Guaranteed;
        assert_eq!(of(&raised, "app"), (None, Some(64)));
        // Somebody else's is the new one.
        raised.containers[0].limit_manager = Some("kubectl".to_owned());
        assert_eq!(of(&raised, "app"), (None, None));
        raised.qos = QosClass::Burstable;
        assert_eq!(of(&raised, "app"), (Some(4096), Some(1536)));
    }

    #[test]
    fn without_a_limit_of_its_own_a_container_has_its_pods() {
        let mut whole = pod(&[(MODE, "Act"), (MAX_MEMORY, "1Gi")]);
        whole.memory_limit = Some("256Mi".to_owned());
        whole.containers[0].memory_limit = None;
        assert_eq!(of(&whole, "app"), (Some(1024), Some(256)));
    }
}
