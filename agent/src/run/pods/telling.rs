//! What people, and whoever sizes heaps, are told of this node's pods: once, or of each kind once a minute.
//!
//! It must not change what is guarded.

use std::time::Duration;

use bellows_core::{Bytes, CgroupId, elastic::Mode, pod};
use kube::ResourceExt as _;
use tokio::time::Instant;

use super::{Key, Watch};
use crate::{actuate::resize::Observed, attribution::api::Pod, nri};

/// Shortest time between two Events of one container that is only watched: one whose workers are killed one after the
/// other would fill the API with them.
const EVENTS: Duration = Duration::from_secs(60);

impl Watch {
    /// Hands policies on to whoever sizes heaps, or says that nobody does.
    pub(super) fn tell_of_heaps(&mut self) {
        if self.context.told.is_some() {
            // First what they come to in each pod: a policy without that is one that raises nobody.
            let pods: Vec<Pod> = self.pods.values().cloned().collect();
            for pod in &pods {
                let seen = self.seen(pod);
                let wishes = self.wished(pod, &seen);
                if !self.waits_for_autoscalers(&seen, &wishes) {
                    self.tell_of_rooms(&seen, &wishes);
                }
            }
        }
        let policies = self.policies.all();
        match &self.context.told {
            Some(told) => drop(told.policies.send_replace(policies.to_vec())),
            None if nri::is_wanted(policies) => tracing::warn!(
                "memory.heap of policies is not heeded: nri.enabled of the chart makes the agent a plugin of the runtime"
            ),
            None => {}
        }
    }

    /// Hands on how far heaps in a pod may go.
    pub(super) fn tell_of_rooms(&self, seen: &pod::Pod, wishes: &pod::Wishes) {
        if let Some(told) = &self.context.told {
            told.pod(&seen.uid, pod::rooms(seen, wishes));
        }
    }

    /// Tells once that a guarded pod has a HorizontalPodAutoscaler that goes by its requests, which are not ours to lower.
    pub(super) fn tell_of_horizontal(&mut self, pod: &Pod, wishes: &pod::Wishes) {
        let guarded = wishes.iter();
        let guarded =
            guarded.filter(|(_, wish)| wish.as_ref().is_ok_and(|wish| wish.mode == Mode::Act));
        let mut seen = guarded.filter_map(|(name, _)| self.claims(pod, name).utilization);
        let Some(name) = seen.next() else {
            return;
        };
        let note = format!(
            "the HorizontalPodAutoscaler `{name}` goes by what is used of requests: those that it goes by are left alone, limits are moved"
        );
        let uid = pod.uid().unwrap_or_default();
        if self.seen_horizontal.get(&uid) != Some(&name) {
            self.seen_horizontal.insert(uid, name);
            self.events.told(pod, "HorizontalPodAutoscalerSeen", note);
        }
    }

    /// Tells of a container that is only watched.
    pub(super) fn tell(&mut self, cgroup: CgroupId, observed: Observed) {
        let (note, is_kill) = match observed {
            Observed::NotGuarded => return self.try_again(cgroup),
            Observed::ByHand(note) => return self.tell_guarded(cgroup, "RaisedByHand", note),
            Observed::Waits(note) => return self.tell_guarded(cgroup, "WaitsForMemory", note),
            Observed::Stopped(note) => return self.tell_guarded(cgroup, "GrowthStopped", note),
            Observed::Bounded(reason, note) => return self.tell_guarded(cgroup, reason, note),
            Observed::Kill(note) => (note, true),
            Observed::Raise(note) => (note, false),
        };
        let Some(watched) = self.watched.get_mut(&cgroup) else {
            return;
        };
        if watched.told.is_some_and(|told| told.elapsed() < EVENTS) {
            return;
        }
        let pod = watched.pod.clone();
        if is_kill {
            watched.told = Some(Instant::now());
            self.events.killed(pod, note);
        } else if watched.mode == Mode::Recommend {
            // A kill that may follow is told all the same.
            self.events.recommended(pod, note);
        }
    }

    /// Tells of a container that is guarded, of each kind once a minute.
    pub(super) fn tell_guarded(&mut self, cgroup: CgroupId, reason: &'static str, note: String) {
        let mut known = self.known.iter_mut();
        let found = known.find(|(_, known)| known.cgroup == Some(cgroup));
        let Some(((uid, _), known)) = found else {
            return;
        };
        let told = known.told.get(reason);
        if told.is_some_and(|told| told.elapsed() < EVENTS) {
            return;
        }
        known.told.insert(reason, Instant::now());
        if let Some(pod) = self.pods.get(uid) {
            self.events.told(pod, reason, note);
        }
    }

    /// Tells of a guarded container to which its namespace allows nothing beyond what it has: once, and where that comes and
    /// goes once a minute.
    pub(super) fn tell_of_bound(&mut self, key: &Key) {
        let Some(known) = self.known.get_mut(key) else {
            return;
        };
        let Some(policy) = known.policy.filter(|_| known.mode == Mode::Act) else {
            return;
        };
        let bound = self.context.resizer.allowances();
        let bound = bound.memory((&key.0, &key.1));
        let bound = bound.filter(|bound| Bytes(bound.most) <= policy.original);
        let bound = bound.filter(|_| policy.original < policy.ceiling);
        let reached = bound.as_ref().map(|bound| bound.by.reason());
        if known.bounded == reached {
            return;
        }
        let (Some(bound), Some(pod)) = (bound, self.pods.get(&key.0)) else {
            known.bounded = reached;
            return;
        };
        let reason = bound.by.reason().reason();
        // It is told later if it is still so then.
        let told = known.told.get(reason);
        if told.is_some_and(|told| told.elapsed() < EVENTS) {
            return;
        }
        known.bounded = reached;
        known.told.insert(reason, Instant::now());
        let note = format!("container {}: it cannot be raised: {bound}", key.1);
        self.events.refused(pod, reason, note);
    }

    /// Tells why a container does not get what is asked for it, once.
    pub(super) fn refuse(&mut self, key: &Key, pod: &Pod, reason: &str, why: String) {
        let known = self.known.entry(key.clone()).or_default();
        if known.refusal.as_ref() != Some(&why) {
            known.refusal = Some(why.clone());
            self.events.refused(pod, reason, why);
        }
    }
}

#[cfg(test)]
mod tests {
    use bellows_core::allowance::{Amount, Amounts, CountedPod, Quota, Reached, What};

    use super::*;
    use crate::run::pods::bed::{Bed, key};

    #[tokio::test]
    async fn a_quota_that_is_used_up_again_and_again_is_told_of_once_a_minute() {
        let mut bed = Bed::new().await;
        let app = key("app");
        bed.sees("64Mi");
        bed.is_guarded();
        let amounts = Amounts {
            memory_limit: Some(Bytes::mib(64).0),
            ..Amounts::default()
        };
        let pod = CountedPod {
            namespace: "dev".to_owned(),
            uid: app.0.clone(),
            containers: [("app".to_owned(), amounts)].into(),
            ..CountedPod::default()
        };
        let allowances = bed.watch.context.resizer.allowances().clone();
        allowances.with(|all| all.pod(pod));
        let mut told = |left: u64| {
            let [hard, used] = [64 + left, 64].map(|mib| Bytes::mib(mib).0);
            let quota = Quota {
                amounts: [(What::MemoryLimit, Amount { hard, used })].into(),
                ..Quota::default()
            };
            allowances.with(|all| all.quota("dev", "q", Some(quota)));
            bed.watch.tell_of_bound(&app);
            let known = &bed.watch.known[&app];
            (known.bounded, known.told.get("QuotaUsedUp").copied())
        };
        let (bounded, at) = told(0);
        assert_eq!(bounded, Some(Reached::Quota));
        assert!(at.is_some());
        assert_eq!(told(64), (None, at));
        assert_eq!(told(0), (None, at), "it is told a minute later");
    }
}
