//! A pod, as far as others' requests are concerned: what it counts on the node, and what the kubelet says of it.
//!
//! The kubelet's word is about what a pod asked for when it was said. Of one that has asked for something else since it says
//! nothing, and what it will say is known here before: of what it counts of each and what the node has. What it does not say
//! of any pod is not guessed.
//!
//! It must not remember more of a pod than was seen of it last, but for when it came and that it waits in vain.

use std::collections::BTreeMap;

use bellows_core::{
    Bytes,
    pod::{self, PutOff},
    quantity,
    requests::{Shortage, shortage},
};
use tokio::time::Instant;

use super::Watch;

/// A pod, as far as others' requests are concerned.
pub(super) struct Summary {
    /// For people.
    pub(super) name: String,
    pub(super) priority: i32,
    pub(super) requested: Bytes,
    /// What its containers request, without all else that a scheduler counts.
    pub(super) own: Bytes,
    /// What the kubelet has allotted to them; what they request where it does not say.
    pub(super) allotted: Bytes,
    pub(super) put_off: Option<PutOff>,
    /// Whether the kubelet has said of the same as it asks for now that it does not get it, and not for memory. Anything that
    /// changes in its spec makes that word an old one.
    pub(super) was_in_vain: bool,
    /// Whether what was allotted is a guess: it waits for more, and some of it does not run.
    pub(super) is_guessed: bool,
    /// Whether it is on its way out: it gets nothing more.
    pub(super) is_ending: bool,
    /// When it was first seen.
    pub(super) arrived: Instant,
}

impl Summary {
    /// Whether its containers ask for more than the kubelet has allotted to them, of which it has not said anything yet.
    pub(super) fn is_not_judged(&self) -> bool {
        let is_judged = self.said().is_some() || self.waits_in_vain();
        !is_judged && !self.is_ending && self.own > self.allotted
    }

    /// What the kubelet says of what it asks for now.
    fn said(&self) -> Option<&PutOff> {
        self.put_off.as_ref().filter(|said| said.is_current)
    }

    /// What it is short of, as the kubelet says. Nobody lends to one that is on its way out.
    pub(super) fn shortage(&self) -> Option<Shortage> {
        let said = self.said().filter(|said| !said.is_infeasible);
        shortage(&said?.message).filter(|_| !self.is_ending)
    }

    /// Whether it does not get what it asks for, and it is not for memory, or it is on its way out: that is free to others.
    pub(super) fn waits_in_vain(&self) -> bool {
        if self.is_ending {
            return self.own > self.allotted;
        }
        self.said().map_or(self.was_in_vain, |said| {
            said.is_infeasible || shortage(&said.message).is_none()
        })
    }

    /// Whether it asks for the same as before, in vain.
    fn is_in_vain_as(&self, before: &Self) -> bool {
        let is_same = (self.own, self.allotted) == (before.own, before.allotted);
        is_same && before.waits_in_vain()
    }

    /// What nobody else can have of what the node has.
    pub(super) fn claimed(&self) -> Bytes {
        if self.waits_in_vain() {
            self.counted()
        } else {
            self.requested
        }
    }

    /// What the kubelet counts of it: what it has allotted, and what is no container's.
    fn counted(&self) -> Bytes {
        if self.requested == Bytes::ZERO {
            return Bytes::ZERO;
        }
        self.requested.minus(self.own).plus(self.allotted)
    }
}

/// What the kubelet will say of a pod that it has not judged yet; `None` where it has room, and where the whole node has less.
pub(super) fn expected(
    pods: &BTreeMap<String, Summary>,
    uid: &str,
    capacity: Option<Bytes>,
) -> Option<Shortage> {
    let pod = pods.get(uid).filter(|pod| pod.is_not_judged())?;
    // What somebody has who waits and does not run the kubelet does not say.
    if pods.values().any(|pod| pod.is_guessed) {
        return None;
    }
    let others = pods.iter().filter(|(other, _)| *other != uid);
    let used = others.map(|(_, pod)| pod.counted());
    let shortage = Shortage {
        requested: pod.requested,
        used: used.fold(Bytes::ZERO, Bytes::plus),
        capacity: capacity?,
    };
    let is_possible = shortage.requested <= shortage.capacity;
    (is_possible && shortage.short() > Bytes::ZERO).then_some(shortage)
}

impl Watch {
    /// Takes over what others' requests depend on.
    pub(in crate::run::pods) fn summarize(&mut self, seen: &pod::Pod) {
        let size = |text: &Option<String>| {
            let text = text.as_deref()?;
            quantity::parse(text).ok()
        };
        let allotted = seen.containers.iter().map(|container| {
            let said = size(&container.allotted).or_else(|| size(&container.memory_request));
            said.unwrap_or_default()
        });
        let are_all_said = seen.containers.iter().all(|own| own.allotted.is_some());
        let own = seen.containers.iter();
        let own = own.map(|container| size(&container.memory_request).unwrap_or_default());
        let before = self.requests.pods.get(&seen.uid);
        let mut summary = Summary {
            name: format!("{}/{}", seen.namespace, seen.name),
            priority: seen.priority,
            requested: seen.requested,
            own: own.fold(Bytes::ZERO, Bytes::plus),
            allotted: allotted.fold(Bytes::ZERO, Bytes::plus),
            put_off: seen.put_off.clone(),
            was_in_vain: false,
            is_guessed: seen.put_off.is_some() && !are_all_said,
            is_ending: seen.ending,
            arrived: before.map_or_else(Instant::now, |before| before.arrived),
        };
        summary.was_in_vain = before.is_some_and(|before| summary.is_in_vain_as(before));
        let is_less = before.is_some_and(|before| summary.requested < before.requested);
        self.requests.pods.insert(seen.uid.clone(), summary);
        if is_less {
            self.requests.try_again();
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
