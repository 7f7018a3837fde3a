//! What CPU limits were, written onto their pods beside everything else.
//!
//! A quota is written by hand at once, and nobody but the one who tells the API of it needs what it was to be recorded. So
//! nobody waits for that: containers that start together would each wait for an API request of the one before, and all of
//! them for one that hangs. One annotation holds those of all containers of a pod, so each pod has one under way at a time.
//!
//! A recording that the API refuses as such is tried again when the pod or a policy has changed, and not before: until then
//! the container stays at rest.

use std::collections::{BTreeMap, BTreeSet};

use bellows_core::pod::{self, ORIGINAL_CPU};
use kube::ResourceExt as _;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    Key, Watch,
    one::{NotRecorded, record},
};
use crate::attribution::api::Pod;

/// A recording that has ended.
pub(super) struct Recorded {
    key: Key,
    /// Of the pod, when it was begun.
    version: Option<String>,
    original: String,
    result: Result<(), NotRecorded>,
}

/// Those that are under way, and those that were refused.
pub(super) struct Recordings {
    /// To the watch.
    ended: UnboundedSender<Recorded>,
    /// Pods, by uid.
    running: BTreeSet<String>,
    /// With the version of the pod that it was tried with last; `None` if it is to be tried again with any.
    refused: BTreeMap<Key, Option<String>>,
}

impl Recordings {
    pub(super) const fn new(ended: UnboundedSender<Recorded>) -> Self {
        Self {
            ended,
            running: BTreeSet::new(),
            refused: BTreeMap::new(),
        }
    }

    /// Whether one may begin now, which it does then.
    fn begins(&mut self, key: &Key, version: Option<&String>) -> bool {
        let tried = self.refused.get(key).and_then(Option::as_ref);
        (tried.is_none() || tried != version) && self.running.insert(key.0.clone())
    }

    fn ends(&mut self, key: &Key, version: Option<String>, is_refused: bool) {
        self.running.remove(&key.0);
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
        self.running.remove(uid);
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
                version,
                original,
                result,
            };
            // A watch that has ended needs none.
            drop(ended.send(recorded));
        }));
    }

    /// A recording has ended.
    pub(super) fn recorded(&mut self, recorded: Recorded) {
        let Recorded {
            key,
            version,
            original,
            result,
        } = recorded;
        let Some(pod) = self.pods.get(&key.0).cloned() else {
            return;
        };
        let is_refused = result.as_ref().is_err_and(|not| not.is_refused);
        self.recordings.ends(&key, version, is_refused);
        match result {
            Ok(()) => {
                // What is seen of the pod may be older.
                let (uid, name) = key;
                self.originals.insert((uid, ORIGINAL_CPU, name), original);
            }
            Err(not) if is_refused => {
                self.refuse_cpu(&key, &pod, "CpuLimitNotRecorded", not.why);
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
        let seen = self.seen(&pod);
        if self.policies.are_known(&seen.namespace) {
            self.follow_cpu(&pod, &seen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        ("0f8c".to_owned(), name.to_owned())
    }

    #[tokio::test]
    async fn one_of_a_pod_is_under_way_and_a_refused_one_waits_for_a_change() {
        let (ended, _) = tokio::sync::mpsc::unbounded_channel();
        let mut recordings = Recordings::new(ended);
        let version = |text: &str| Some(text.to_owned());
        let (first, second) = (version("1"), version("2"));
        assert!(recordings.begins(&key("app"), first.as_ref()));
        assert!(!recordings.begins(&key("side"), first.as_ref()));
        recordings.ends(&key("app"), first.clone(), true);
        assert!(recordings.is_refused(&key("app")));
        // Not again for the same pod; another container's may.
        assert!(!recordings.begins(&key("app"), first.as_ref()));
        assert!(recordings.begins(&key("side"), first.as_ref()));
        recordings.ends(&key("side"), first.clone(), false);
        assert!(!recordings.is_refused(&key("side")));
        assert!(recordings.begins(&key("app"), second.as_ref()));
        recordings.ends(&key("app"), second.clone(), true);
        recordings.try_again();
        assert!(recordings.is_refused(&key("app")));
        assert!(recordings.begins(&key("app"), second.as_ref()));
        recordings.forget("0f8c");
        assert!(!recordings.is_refused(&key("app")));
    }
}
