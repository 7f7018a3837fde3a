//! What is tried again, and what is left raised by hand with nobody to ask for it.
//!
//! It must not wait: what is reclaimed for a lower limit is reclaimed on a thread of its own.

use std::{
    ffi::OsStr,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bellows_core::CgroupId;
use tokio::time::Instant;

use super::{super::restore::quotas_in_pods_back, Watch};
use crate::{
    actuate::{containers::Owner as _, pod_cpu::CpuTarget, resize::Target},
    attribution::{self, pods::convert},
};

/// For how long they are, one after the other.
const RETRIES: Duration = Duration::from_secs(1);

impl Watch {
    pub(super) fn is_anything_left(&self) -> bool {
        !self.pending.is_empty() || self.is_any_left.load(Ordering::Relaxed)
    }

    /// Tries pods again, in turn: on a full node that takes its time, and what is new must not wait for all of them.
    pub(super) fn retry(&mut self) {
        let begun = Instant::now();
        for _ in 0..self.pending.len() {
            self.retry_next();
            if begun.elapsed() >= RETRIES {
                return;
            }
        }
        // One further on: of several that ask the same thing only the first may.
        let next = self.pending.range(self.retried.clone()..).next();
        if let Some(first) = next.or_else(|| self.pending.first()) {
            self.retried = format!("{first}\0");
        }
    }

    fn retry_next(&mut self) {
        let next = self.pending.range(self.retried.clone()..).next();
        let next = next.or_else(|| self.pending.iter().next()).cloned();
        let Some(uid) = next else {
            return;
        };
        self.pending.remove(&uid);
        if let Some(pod) = self.pods.get(&uid) {
            self.apply(pod.clone());
        }
        // The next one after it.
        self.retried = uid + "\0";
    }

    /// What those have waited for is known.
    pub(super) fn apply_pending(&mut self) {
        let pending = self.pending.iter();
        let pods = pending.filter_map(|uid| self.pods.get(uid));
        for pod in pods.cloned().collect::<Vec<_>>() {
            self.follow_pod(pod);
        }
        self.step_requests();
    }

    /// The controller could not guard or watch a container.
    pub(super) fn try_again(&mut self, cgroup: CgroupId) {
        let mut known = self.known.iter_mut();
        if let Some((key, known)) = known.find(|(_, known)| known.cgroup == Some(cgroup)) {
            known.cgroup = None;
            self.pending.insert(key.0.clone());
        }
    }

    /// Gives back what was raised by hand where nobody asks for it any more: the API says what it was all the time. What
    /// must be reclaimed for that takes its time, and nobody waits for it.
    pub(super) fn lower_left(&mut self) {
        if let Some(lowering) = &self.lowering {
            if !lowering.is_finished() {
                return;
            }
            self.lowering = None;
        }
        let is_any_left = self.is_any_left.swap(false, Ordering::Relaxed);
        let spared = is_any_left.then(|| self.spared());
        let Some([memory_spared, cpu_spared]) = spared.flatten() else {
            self.is_any_left.fetch_or(is_any_left, Ordering::Relaxed);
            return;
        };
        // Asked anew for each: somebody may come to be responsible while others are lowered.
        let memory = self.context.resizer.targets().clone();
        let has_memory = move |path: &Path| {
            let is_it = |target: &Target| target.cgroup.path() == path;
            memory.with(|targets| targets.values().any(is_it))
        };
        let cpus = self.context.cpus.containers().targets().clone();
        let has_cpu = move |path: &Path| {
            let is_it = |target: &CpuTarget| target.cgroup.path() == path;
            cpus.with(|targets| targets.values().any(is_it))
        };
        let by_hands = self.context.resizer.by_hands().clone();
        let resizer = self.context.resizer.clone();
        let is_left = Arc::clone(&self.is_any_left);
        self.lowering = Some(tokio::task::spawn_blocking(move || {
            let is_any = by_hands.lower_left(has_memory, |path| is_in(&memory_spared, path));
            if !is_any {
                resizer.are_lowered();
            }
            let are_back = quotas_in_pods_back(has_cpu, |path| is_in(&cpu_spared, path));
            is_left.fetch_or(is_any || !are_back, Ordering::Relaxed);
        }));
    }

    /// Pods of which nothing is lowered of memory, and of CPU: somebody in them is about to be guarded, or a policy may say so
    /// that cannot be read. `None` while nothing is of any.
    fn spared(&self) -> Option<[Vec<String>; 2]> {
        if !self.is_listed || self.context.only_observes {
            return None;
        }
        let pending: Vec<String> = self.pending.iter().cloned().collect();
        let (mut memory, mut cpu) = (pending.clone(), pending);
        for (uid, pod) in &self.pods {
            let seen = convert(pod);
            if !self.knows(&seen) {
                memory.push(uid.clone());
            }
            if !self.policies.are_known(&seen.namespace) {
                cpu.push(uid.clone());
            }
        }
        Some([memory, cpu])
    }
}

/// Whether a cgroup is that of one of these pods, or below it.
fn is_in(pods: &[String], path: &Path) -> bool {
    let above = path.ancestors().filter_map(Path::file_name);
    let mut above = above.map(OsStr::to_string_lossy);
    above.any(|name| pods.iter().any(|uid| attribution::is_pod(&name, uid)))
}

#[cfg(test)]
mod tests {
    use bellows_core::pod::MAX_MEMORY;

    use crate::run::pods::bed::Bed;

    #[tokio::test]
    async fn whoever_may_be_meant_by_what_is_not_known_keeps_nobody_else_raised() {
        let mut bed = Bed::new().await;
        assert_eq!(bed.watch.spared(), None);
        bed.watch.is_listed = true;
        bed.sees("64Mi");
        let own = || vec!["0f8c".to_owned()];
        assert_eq!(bed.watch.spared(), Some([Vec::new(), own()]));
        let pod = bed.watch.pods.get_mut("0f8c").unwrap();
        let annotations = pod.metadata.annotations.as_mut().unwrap();
        annotations.remove(MAX_MEMORY);
        assert_eq!(bed.watch.spared(), Some([own(), own()]));
    }
}
