//! What else of its pod a resize touches.
//!
//! With a resize of anything in a pod the kubelet carries out what the spec says of everything in it, or nothing: a limit that was
//! raised by hand beside it would come down with no regard to usage, and a lowering that is refused holds up a raise. So a patch
//! carries what stands raised by hand, takes back what waits to come down, and what it may bring about is known as coming to
//! each of the others until it is answered.
//!
//! It must not decide what a limit is to be.

use std::collections::BTreeMap;

use bellows_core::{Bytes, CgroupId, pod::way::Way, quantity};
use tokio::time::{error::Elapsed, timeout};

use super::{
    Change, RESIZE_TIMEOUT, Resizer, Target,
    answer::{counted, is_uncertain, only_by_hand},
    limits_patch, patched,
};
use crate::{attribution::api::Pod, cgroup::Limit, guard::Refused};

impl Resizer {
    /// A resize of something else in a pod begins: with it the kubelet sets the limit of the pod's cgroup, too, and may set
    /// those of all of its containers, to what the spec says then.
    pub(super) fn begins_in(&self, uid: &str, own: Option<CgroupId>) -> Vec<(CgroupId, Bytes)> {
        self.targets.with(|targets| {
            let others = targets
                .iter_mut()
                .filter(|(id, target)| target.uid == uid && own != Some(**id));
            let begun = others.filter_map(|(&id, target)| {
                let comes = target.by_hand.or_else(|| target.in_spec())?;
                target.asking.push(comes);
                Some((id, comes))
            });
            begun.collect()
        })
    }

    /// Changes something else in a pod than a memory limit that is guarded; returns whether it may still come, too. What was raised by hand
    /// of memory goes with it.
    pub(crate) async fn patch_beside(
        &self,
        uid: &str,
        way: Way,
        named: (&str, &str),
        own: Change,
    ) -> (Result<kube::Result<Pod>, Elapsed>, bool) {
        if self.is_only_by_hand(uid, None) {
            return (Ok(Err(only_by_hand())), false);
        }
        let begun = self.begins_in(uid, None);
        let by_hand = self.by_hand_in(uid, |_| false);
        let changes: Vec<Change> = [own].into_iter().chain(by_hand).collect();
        let patch = limits_patch(uid, &changes);
        let patched = timeout(RESIZE_TIMEOUT, patched(&self.client, way, named, &patch)).await;
        let is_uncertain = is_uncertain(&patched);
        counted(&patched);
        if let Ok(Ok(patched)) = &patched {
            self.is_taken_in(uid, patched);
        }
        self.ends_in(begun, is_uncertain);
        (patched, is_uncertain)
    }

    /// Whether a patch of something else in a pod carries what was raised by hand: what refuses it may be that.
    pub(in crate::actuate) fn carries(&self, uid: &str) -> bool {
        !self.by_hand_in(uid, |_| false).is_empty()
    }

    /// It has ended.
    pub(super) fn ends_in(&self, begun: Vec<(CgroupId, Bytes)>, is_uncertain: bool) {
        for (cgroup, comes) in begun {
            self.is_answered(cgroup, comes);
            if is_uncertain {
                self.note(cgroup, |target| target.may_come(comes));
            }
        }
    }

    /// What was raised by hand in a pod, for a patch of something else: with the next resize of any resource the kubelet sets
    /// what the spec says. But for those that the patch has anyway.
    pub(super) fn by_hand_in(&self, uid: &str, has: impl Fn(CgroupId) -> bool) -> Vec<Change> {
        self.targets.with(|targets| {
            let own = targets
                .iter()
                .filter(|&(&id, target)| target.uid == uid && !has(id));
            own.filter_map(|(_, target)| target.by_hand_change())
                .collect()
        })
    }

    /// Whether something else in a pod is raised on the node, and no patch would say so.
    #[must_use]
    pub fn is_only_by_hand(&self, uid: &str, own: Option<CgroupId>) -> bool {
        self.targets.with(|targets| {
            let mut others = targets.iter();
            others.any(|(id, target)| {
                target.uid == uid && own != Some(*id) && target.is_only_by_hand()
            })
        })
    }

    /// Whether a memory limit of a pod was raised of late, or is about to be.
    #[must_use]
    pub fn is_bursting(&self, uid: &str) -> bool {
        self.targets.with(|targets| {
            let mut own = targets.values().filter(|target| target.uid == uid);
            own.any(Target::is_bursting)
        })
    }

    /// Targets in one pod.
    pub(super) fn of_pod(&self, uid: &str) -> Vec<CgroupId> {
        self.targets.with(|targets| {
            let own = targets.iter().filter(|(_, target)| target.uid == uid);
            own.map(|(&cgroup, _)| cgroup).collect()
        })
    }

    /// Lowerings of a pod's other containers that are not in force. The kubelet carries out all of a pod's resize or
    /// nothing (`validateMemoryResizeAction`, pkg/kubelet/kuberuntime/kuberuntime_manager.go, 1.37): a raise must not wait
    /// for a lowering that it refuses, so it takes that back. It is asked for again later. None for a lowering.
    pub(super) fn lowerings_beside(
        &self,
        cgroup: CgroupId,
        to: Bytes,
    ) -> Result<BTreeMap<CgroupId, Change>, Refused> {
        let (uid, limit) = self.target(cgroup, |target| {
            (target.uid.clone(), quantity::parse(&target.limit))
        })?;
        if limit.is_ok_and(|limit| to <= limit) {
            return Ok(BTreeMap::new());
        }
        Ok(self.targets.with(|targets| {
            let beside = targets.iter();
            let beside = beside.filter(|(id, target)| **id != cgroup && target.uid == uid);
            let beside = beside.filter(|(_, target)| target.is_recorded);
            let waiting = beside.filter_map(|(&id, target)| {
                let Limit::At(in_force) = target.cgroup.limit("memory.max").ok()? else {
                    return None;
                };
                let in_spec = target.in_spec()?;
                let to = quantity::format(in_force);
                let change = Change::memory(target.level, target.limit.clone(), to);
                (in_spec < in_force).then_some((id, change))
            });
            waiting.collect()
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        actuate::resize::{target::tests::target, tests::resizer},
        cgroup::Cgroup,
    };

    /// What is asked of the API server fails otherwise.
    #[tokio::test]
    async fn nothing_of_a_pod_is_resized_while_a_limit_is_raised_on_the_node_alone() {
        let resizer = resizer();
        let asked = async |change: &dyn Fn(&mut Target)| {
            let mut first = target();
            change(&mut first);
            let of = |id| Cgroup::stand_in(Path::new("/nowhere"), CgroupId(id));
            let other = Target {
                cgroup: of(2),
                ..target()
            };
            resizer.targets.with(|targets| {
                targets.insert(CgroupId(1), first);
                targets.insert(CgroupId(2), other);
            });
            let own = Change::memory_request(0, "32Mi".to_owned(), "16Mi".to_owned());
            let named = ("dev", "workspace");
            let (patched, _) = resizer.patch_beside("u", Way::Resize, named, own).await;
            let raised = resizer.patch(CgroupId(2), Bytes::mib(128), BTreeMap::new());
            let is_asked = !matches!(patched, Ok(Err(kube::Error::Api(_))));
            let is_raised = raised.await.unwrap_err().1.is_none();
            assert_eq!(is_asked, is_raised);
            is_asked
        };
        assert!(asked(&|_| {}).await);
        assert!(asked(&|target| target.by_hand = Some(Bytes::mib(128))).await);
        let on_the_node = |target: &mut Target| {
            target.by_hand = Some(Bytes::mib(128));
            target.way = Way::Node;
        };
        assert!(!asked(&on_the_node).await);
    }
}
