//! Cgroups that are made for containers whose start is boosted.
//!
//! What is lent to a start must be there before that counts its CPUs, and the API says which cgroup a container has only a
//! second after it runs. So the kernel's word of each cgroup that is made is taken, and whose it is told from the limits
//! that it is given (`starting` in core). Where several containers of a pod have the same limits that cannot be told, and
//! the boost begins when the API says that the container runs.
//!
//! The kernel may be faster than the API: the word of a cgroup whose pod is not known yet is kept for some seconds.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    time::Duration,
};

use bellows_core::{Bytes, pod};
use tokio::time::{Instant, sleep};

use super::Watch;
use crate::{
    attribution::{self, CGROUP_ROOT, places::id_in},
    cgroup::{Cgroup, Limit, quota::Quota},
};

/// How often a cgroup that was made is looked at for its limits, and for how long.
const LOOK: Duration = Duration::from_millis(5);
const LOOKS: u32 = 1000;
/// How long the API may take to tell of a pod some of which is made already.
const KEPT: Duration = Duration::from_secs(10);
/// More are not kept: no node starts as many pods in that time.
const MOST_KEPT: usize = 1024;

/// A cgroup that was made in a pod, with the limits that it was given.
#[derive(Debug)]
pub(super) struct Begun {
    uid: String,
    path: PathBuf,
    quota: Quota,
    memory: Option<Bytes>,
}

/// Cgroups that were made in pods that are not known yet.
#[derive(Debug, Default)]
pub(super) struct Early(VecDeque<(Instant, PathBuf)>);

impl Early {
    fn keep(&mut self, path: PathBuf, now: Instant) {
        self.0
            .retain(|(since, _)| now.duration_since(*since) < KEPT);
        if self.0.len() >= MOST_KEPT {
            self.0.pop_front();
        }
        self.0.push_back((now, path));
    }

    /// Those of a pod that has come to be known.
    fn take(&mut self, uid: &str) -> Vec<PathBuf> {
        let (own, others) = std::mem::take(&mut self.0)
            .into_iter()
            .partition(|(_, path)| attribution::is_pod(&pod_of(path), uid));
        self.0 = others;
        let own: VecDeque<(Instant, PathBuf)> = own;
        own.into_iter().map(|(_, path)| path).collect()
    }
}

/// The name of the cgroup that one is in.
fn pod_of(path: &Path) -> String {
    let parent = path.parent().and_then(Path::file_name);
    parent.unwrap_or_default().to_string_lossy().into_owned()
}

impl Watch {
    /// A cgroup was made: if it can be that of a container whose start is boosted, its limits are waited for.
    pub(super) fn made(&mut self, path: &str) {
        if self.context.only_observes {
            return;
        }
        let path = Path::new(CGROUP_ROOT).join(path.trim_start_matches('/'));
        let parent = pod_of(&path);
        if !attribution::is_a_pod(&parent) {
            return;
        }
        let mut uids = self.pods.keys();
        match uids.find(|uid| attribution::is_pod(&parent, uid)).cloned() {
            Some(uid) => self.made_in(&uid, path),
            None => self.early.keep(path, Instant::now()),
        }
    }

    /// A pod has come to be known.
    pub(super) fn made_before(&mut self, uid: &str) {
        for path in self.early.take(uid) {
            self.made_in(uid, path);
        }
    }

    fn made_in(&self, uid: &str, path: PathBuf) {
        let Some(pod) = self.pods.get(uid) else {
            return;
        };
        let seen = self.seen(pod);
        let wishes = self.cpu_wishes(pod, &seen);
        let mut wishes = wishes.values().flatten();
        if !wishes.any(|wish| !wish.boosts.is_empty()) {
            return;
        }
        let (begun, uid) = (self.begun.clone(), uid.to_owned());
        drop(tokio::spawn(async move {
            if let Some((quota, memory)) = given(&path).await {
                // A watch that has ended boosts nobody.
                drop(begun.send(Begun {
                    uid,
                    path,
                    quota,
                    memory,
                }));
            }
        }));
    }

    /// A cgroup that was made has its limits.
    pub(super) fn begin(&mut self, begun: Begun) {
        let Begun {
            uid,
            path,
            quota,
            memory,
        } = begun;
        let Some(pod) = self.pods.get(&uid).cloned() else {
            return;
        };
        let id = path.to_str().and_then(id_in).unwrap_or_default();
        let seen = self.seen(&pod);
        if !self.policies.are_known(&seen.namespace) {
            return;
        }
        if self.autoscalers.are_awaited() {
            // Until then it may be theirs.
            return self.early.keep(path, Instant::now());
        }
        let wishes = self.cpu_wishes(&pod, &seen);
        let Some(name) = pod::starting(&seen, &wishes, id, (quota.cpu, quota.period), memory)
        else {
            return;
        };
        let key = (uid, name.to_owned());
        let Some(Ok(wish)) = wishes.get(name) else {
            return;
        };
        let wish = wish.clone();
        self.starting.insert(key.clone(), path);
        if let Err(error) = self.follow_one(&key, &pod, &seen, &wish) {
            tracing::warn!(container = key.1, %error, "a start is not boosted");
            self.pending.insert(key.0);
        }
    }
}

/// Waits for the limits that a cgroup is given; `None` if it is gone again, or never has a quota. systemd writes one after
/// the other: who has a quota alone may have a memory limit a moment later.
async fn given(path: &Path) -> Option<(Quota, Option<Bytes>)> {
    let mut has_quota = false;
    for _ in 0..LOOKS {
        let limits = limits(path).ok()?;
        let is_whole = limits.is_some_and(|(_, memory)| memory.is_some());
        if is_whole || (has_quota && limits.is_some()) {
            return limits;
        }
        has_quota = limits.is_some();
        sleep(LOOK).await;
    }
    None
}

/// The limits that a cgroup has; `None` while it has no quota.
fn limits(path: &Path) -> Result<Option<(Quota, Option<Bytes>)>, ()> {
    let cgroup = Cgroup::open(path).map_err(drop)?;
    // The controller may not be enabled yet.
    let Ok(Some(quota)) = cgroup.quota() else {
        return Ok(None);
    };
    let memory = match cgroup.limit("memory.max") {
        Ok(Limit::At(limit)) => Some(limit),
        Ok(Limit::Max) | Err(_) => None,
    };
    Ok(Some((quota, memory)))
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process};

    use bellows_core::Cpu;
    use tokio::task::yield_now;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_memory_limit_that_comes_after_the_quota_is_waited_for() {
        let path = env::temp_dir().join(format!("bellows-given-{}", process::id()));
        fs::create_dir_all(&path).unwrap();
        let writes = |file, text| fs::write(path.join(file), text).unwrap();
        writes("cpu.max", "max 100000\n");
        writes("memory.max", "max\n");
        let own = path.clone();
        let looks = tokio::spawn(async move { given(&own).await });
        yield_now().await;
        writes("cpu.max", "25000 100000\n");
        sleep(LOOK + LOOK / 2).await;
        assert!(!looks.is_finished());
        writes("memory.max", "67108864\n");
        let (quota, memory) = looks.await.unwrap().unwrap();
        assert_eq!(
            (quota.cpu, memory),
            (Cpu::millis(250), Some(Bytes::mib(64)))
        );
        // Who has none is not waited for any longer.
        writes("memory.max", "max\n");
        let begun = Instant::now();
        assert_eq!(given(&path).await, Some((quota, None)));
        assert!(begun.elapsed() < LOOK * 2);
        fs::remove_dir_all(&path).unwrap();
        assert_eq!(given(&path).await, None);
    }

    #[test]
    fn what_is_made_before_its_pod_is_known_is_kept_for_some_time() {
        let mut early = Early::default();
        let now = Instant::now();
        let path = |pod: &str, id: &str| Path::new(CGROUP_ROOT).join(pod).join(id);
        let slice = "kubepods-burstable-pod0f8c_1d.slice";
        early.keep(path(slice, "cri-containerd-a.scope"), now);
        early.keep(path("pod77", "b"), now);
        early.keep(path(slice, "cri-containerd-c.scope"), now + KEPT / 2);
        let own = early.take("0f8c-1d");
        assert_eq!(
            own,
            ["a", "c"].map(|id| path(slice, &format!("cri-containerd-{id}.scope")))
        );
        assert!(early.take("0f8c-1d").is_empty());
        // What nobody asks for goes, at the latest when there is too much.
        early.keep(path("pod78", "d"), now + KEPT);
        assert_eq!((early.take("77").len(), early.take("78").len()), (0, 1));
        for number in 0..2 * MOST_KEPT {
            early.keep(path("pod79", &number.to_string()), now);
        }
        assert_eq!(early.take("79").len(), MOST_KEPT);
    }
}
