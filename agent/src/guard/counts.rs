//! What the controller tells of all of its guards together, for whoever looks at the node.

use bellows_core::{Bytes, arbiter::node_room};

use super::{Controller, Requester, room::node_memory};
use crate::signal::programs::Kernel;

/// Of all guards, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Containers that are guarded.
    pub guarded: usize,
    /// Those that are only watched.
    pub watched: usize,
    /// Those whose limit is above the one at rest.
    pub raised: usize,
    /// By how much, all together.
    pub raised_by: Bytes,
    /// Those that stand still for a raise.
    pub held: usize,
    /// Those whose raise finds no room.
    pub waiting: usize,
    /// Those that their namespace allows less than their policy.
    pub bounded: usize,
    /// What may be granted on the node; `None` where that is not known.
    pub budget: Option<Bytes>,
    /// Whether there are kernel programs.
    pub has_programs: bool,
    /// What is lost with those that this kernel does not take.
    pub lost: Vec<String>,
}

impl<R: Requester> Controller<R> {
    pub(super) fn counts(&self) -> Counts {
        let guards = || self.guards.values();
        let raised = || guards().filter(|guarded| guarded.limit > guarded.policy.original);
        let by = raised().map(|guarded| guarded.limit.minus(guarded.policy.original));
        let missing = self.kernel.as_ref().map(Kernel::missing);
        let lost = missing.unwrap_or_default().iter();
        let mut lost: Vec<String> = lost.map(|missing| missing.lost.to_owned()).collect();
        lost.sort();
        lost.dedup();
        Counts {
            guarded: self.guards.len(),
            watched: self.observed.len(),
            raised: raised().count(),
            raised_by: by.fold(Bytes::ZERO, Bytes::plus),
            held: guards()
                .filter(|guarded| guarded.held_since.is_some())
                .count(),
            waiting: guards().filter(|guarded| guarded.waiting.is_some()).count(),
            bounded: guards().filter(|guarded| guarded.bound.is_some()).count(),
            budget: node_memory().ok().map(|memory| node_room(&memory).free),
            has_programs: self.kernel.is_some(),
            lost,
        }
    }
}
