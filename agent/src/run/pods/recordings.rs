//! What limits and requests were, written onto their pods beside everything else.
//!
//! Nobody waits for that: containers that start together would each wait for an API request of the one before, and all of
//! them, and whatever else the watches of the API say, for one that hangs. One annotation holds those of all containers of a
//! pod, so of each one is under way at a time.
//!
//! A CPU quota is written by hand at once, and nobody but the one who tells the API of it needs what it was to be recorded. A
//! memory limit is guarded, and a request moved, once it is. What somebody else has set meanwhile is followed at once: that it
//! was somebody else is not known afterwards. But the API is asked for no change of it before it is on the pod: whoever comes
//! after an agent that dies in between would take the one before for the original.
//!
//! What fails, or was overtaken by another change, is tried again with the pod; what arrived all the same is seen on it.
//!
//! A recording of a CPU limit that the API refuses as such is tried again when the pod or a policy has changed, and not
//! before: until then the container stays at rest.
//!
//! CPU limits take from the tokens that bound what a node asks of the API. The others do not: a pod that starts is to be
//! guarded before it bursts, and a start costs the API several writes as it is. They are few at a time instead.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bellows_core::pod::{self, ORIGINAL_CPU, ORIGINAL_REQUESTS};
use kube::ResourceExt as _;
use tokio::sync::{Semaphore, mpsc::UnboundedSender};

use super::{
    Key, Watch,
    one::{NotRecorded, record},
};
use crate::attribution::api::Pod;

/// So many that take no token are under way at a time.
const AT_A_TIME: usize = 4;

/// A recording that has ended.
pub(super) struct Recorded {
    key: Key,
    annotation: &'static str,
    /// Of the pod, when it was begun.
    version: Option<String>,
    original: String,
    result: Result<(), NotRecorded>,
}

/// Those that are under way, and those that were refused.
pub(super) struct Recordings {
    /// To the watch.
    ended: UnboundedSender<Recorded>,
    /// Pods, by uid, and annotations.
    running: BTreeSet<(String, &'static str)>,
    few: Arc<Semaphore>,
    /// CPU limits, with the version of the pod that it was tried with last; `None` if it is to be tried again with any.
    refused: BTreeMap<Key, Option<String>>,
}

impl Recordings {
    pub(super) fn new(ended: UnboundedSender<Recorded>) -> Self {
        Self {
            ended,
            running: BTreeSet::new(),
            few: Arc::new(Semaphore::new(AT_A_TIME)),
            refused: BTreeMap::new(),
        }
    }

    /// Whether one of a CPU limit may begin now, which it does then.
    fn begins(&mut self, key: &Key, version: Option<&String>) -> bool {
        let tried = self.refused.get(key).and_then(Option::as_ref);
        (tried.is_none() || tried != version) && self.running.insert((key.0.clone(), ORIGINAL_CPU))
    }

    fn ends(&mut self, key: &Key, version: Option<String>, is_refused: bool) {
        if is_refused {
            self.refused.insert(key.clone(), version);
        } else {
            self.refused.remove(key);
        }
    }

    /// Whether the API would not have it when it was asked last.
    pub(super) fn is_refused(&self, key: &Key) -> bool {
        self.refused.contains_key(key)
    }

    /// The policies have changed.
    pub(super) fn try_again(&mut self) {
        self.refused
            .values_mut()
            .for_each(|version| *version = None);
    }

    pub(super) fn forget(&mut self, uid: &str) {
        self.running.retain(|(own, _)| own != uid);
        self.refused.retain(|(own, _), _| own != uid);
    }
}

impl Watch {
    /// Has the CPU limit of a container as it was written onto its pod.
    pub(super) fn record_cpu(&mut self, key: &Key, pod: &Pod, seen: &pod::Pod, original: &str) {
        let version = pod.resource_version();
        if !self.recordings.begins(key, version.as_ref()) {
            return;
        }
        let value = pod::with_original(seen, ORIGINAL_CPU, &key.1, original);
        let (client, cpus) = (self.context.client.clone(), self.context.cpus.clone());
        let (namespace, name) = (seen.namespace.clone(), seen.name.clone());
        let (key, original) = (key.clone(), original.to_owned());
        let ended = self.recordings.ended.clone();
        drop(tokio::spawn(async move {
            cpus.may_record().await;
            let named = (namespace.as_str(), name.as_str());
            let result = record(&client, named, &key.0, ORIGINAL_CPU, &value).await;
            let recorded = Recorded {
                key,
                annotation: ORIGINAL_CPU,
                version,
                original,
                result,
            };
            // A watch that has ended needs none.
            drop(ended.send(recorded));
        }));
    }

    /// Has what a limit or request is written onto its pod, unless that of another of its containers is.
    pub(super) fn record_beside(
        &mut self,
        key: &Key,
        annotation: &'static str,
        seen: &pod::Pod,
        original: &str,
    ) {
        let begins = self.recordings.running.insert((key.0.clone(), annotation));
        if !begins {
            return;
        }
        let value = pod::with_original(seen, annotation, &key.1, original);
        let client = self.context.client.clone();
        let (namespace, name) = (seen.namespace.clone(), seen.name.clone());
        let (key, original) = (key.clone(), original.to_owned());
        let (ended, few) = (
            self.recordings.ended.clone(),
            Arc::clone(&self.recordings.few),
        );
        drop(tokio::spawn(async move {
            // Never closed.
            let _turn = few.acquire().await;
            let named = (namespace.as_str(), name.as_str());
            let result = record(&client, named, &key.0, annotation, &value).await;
            let recorded = Recorded {
                key,
                annotation,
                version: None,
                original,
                result,
            };
            // A watch that has ended needs none.
            drop(ended.send(recorded));
        }));
    }

    /// A recording has ended.
    pub(super) async fn recorded(&mut self, recorded: Recorded) {
        let Recorded {
            key,
            annotation,
            version,
            original,
            result,
        } = recorded;
        self.recordings.running.remove(&(key.0.clone(), annotation));
        let Some(pod) = self.pods.get(&key.0).cloned() else {
            return;
        };
        if annotation == ORIGINAL_CPU {
            return self.cpu_recorded(key, &pod, version, original, result);
        }
        match result {
            // What is seen of the pod may be older.
            Ok(()) => drop(self.originals.insert((key.0, annotation, key.1), original)),
            Err(not) if not.is_refused && annotation == ORIGINAL_REQUESTS => {
                self.request_not_recorded(&key, &pod, not.why);
            }
            Err(not) => {
                tracing::warn!(
                    pod.name = pod.name_any(),
                    container = key.1,
                    why = not.why,
                    "a limit or request is not recorded yet"
                );
                self.pending.insert(key.0);
                return;
            }
        }
        // Another of its containers may have waited for this, too.
        self.apply(pod).await;
    }

    fn cpu_recorded(
        &mut self,
        key: Key,
        pod: &Pod,
        version: Option<String>,
        original: String,
        result: Result<(), NotRecorded>,
    ) {
        let is_refused = result.as_ref().is_err_and(|not| not.is_refused);
        self.recordings.ends(&key, version, is_refused);
        match result {
            Ok(()) => {
                // What is seen of the pod may be older.
                let (uid, name) = key;
                self.originals.insert((uid, ORIGINAL_CPU, name), original);
            }
            Err(not) if is_refused => {
                self.refuse_cpu(&key, pod, "CpuLimitNotRecorded", not.why);
            }
            Err(not) => {
                tracing::warn!(
                    pod.name = pod.name_any(),
                    container = key.1,
                    why = not.why,
                    "a CPU limit is not recorded yet"
                );
                self.pending.insert(key.0);
                return;
            }
        }
        // Another of its containers may have waited for this.
        let seen = self.seen(pod);
        if self.policies.are_known(&seen.namespace) {
            self.follow_cpu(pod, &seen);
        }
    }
}

#[cfg(test)]
mod tests;
