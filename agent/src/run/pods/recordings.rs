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

use bellows_core::pod::{self, CpuWish, ORIGINAL_CPU, ORIGINAL_REQUESTS, Wish};
use kube::ResourceExt as _;
use tokio::sync::{Semaphore, mpsc::UnboundedSender};

use super::{
    Key, Watch,
    record::{NotRecorded, Place, Recording},
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
    /// The annotation as it was stored.
    result: Result<String, NotRecorded>,
}

/// Those that are under way, and those that were refused.
pub(super) struct Recordings {
    /// To the watch.
    ended: UnboundedSender<Recorded>,
    /// Pods, by uid, and annotations.
    running: BTreeSet<(String, &'static str)>,
    /// Their annotations as they were stored last: what is seen of a pod may be older.
    stored: BTreeMap<(String, &'static str), String>,
    few: Arc<Semaphore>,
    /// CPU limits, with the version of the pod that it was tried with last; `None` if it is to be tried again with any.
    refused: BTreeMap<Key, Option<String>>,
}

impl Recordings {
    pub(super) fn new(ended: UnboundedSender<Recorded>) -> Self {
        Self {
            ended,
            running: BTreeSet::new(),
            stored: BTreeMap::new(),
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

    /// The annotations of a pod, as far as it is known what the API has.
    fn annotations(&self, pod: &Pod) -> BTreeMap<String, String> {
        let mut annotations = pod.annotations().clone();
        let uid = pod.uid().unwrap_or_default();
        let stored = self.stored.iter().filter(|((own, _), _)| *own == uid);
        annotations.extend(stored.map(|((_, name), value)| ((*name).to_owned(), value.clone())));
        annotations
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
        self.stored.retain(|(own, _), _| own != uid);
        self.refused.retain(|(own, _), _| own != uid);
    }
}

impl Watch {
    /// Has the CPU limit of a container as it was written onto its pod.
    pub(super) fn record_cpu(&mut self, key: &Key, pod: &Pod, seen: &pod::Pod, wish: &CpuWish) {
        let version = pod.resource_version();
        if !self.recordings.begins(key, version.as_ref()) {
            return;
        }
        let cpus = self.context.cpus.clone();
        let turn = async move { cpus.may_record().await };
        let recording = self.recording(key, pod, seen, Place::Cpu(wish.index), &wish.original_text);
        self.begin_recording(key, version, recording, turn);
    }

    /// Has what a limit or request is written onto its pod, unless that of another of its containers is.
    pub(super) fn record_beside(
        &mut self,
        key: &Key,
        pod: &Pod,
        seen: &pod::Pod,
        place: Place,
        original: &str,
    ) {
        let own = (key.0.clone(), place.annotation());
        if !self.recordings.running.insert(own) {
            return;
        }
        // Never closed.
        let turn = Arc::clone(&self.recordings.few).acquire_owned();
        let recording = self.recording(key, pod, seen, place, original);
        self.begin_recording(key, None, recording, turn);
    }

    /// The same of a memory limit.
    pub(super) fn record_memory(&mut self, key: &Key, pod: &Pod, seen: &pod::Pod, wish: &Wish) {
        let place = Place::Memory(wish.level);
        self.record_beside(key, pod, seen, place, &wish.original_text);
    }

    fn recording(
        &self,
        key: &Key,
        pod: &Pod,
        seen: &pod::Pod,
        place: Place,
        original: &str,
    ) -> Recording {
        Recording {
            seen: seen.clone(),
            annotations: self.recordings.annotations(pod),
            place,
            container: key.1.clone(),
            in_spec: place.in_spec(seen).map(str::to_owned),
            original: original.to_owned(),
        }
    }

    /// Once it is its turn, which is held until it has ended.
    fn begin_recording<T: Send>(
        &self,
        key: &Key,
        version: Option<String>,
        recording: Recording,
        turn: impl Future<Output = T> + Send + 'static,
    ) {
        let (key, client) = (key.clone(), self.context.client.clone());
        let ended = self.recordings.ended.clone();
        drop(tokio::spawn(async move {
            let _turn = turn.await;
            let recorded = Recorded {
                key,
                annotation: recording.place.annotation(),
                version,
                original: recording.original.clone(),
                result: recording.write(&client).await,
            };
            // A watch that has ended needs none.
            drop(ended.send(recorded));
        }));
    }

    /// A recording has ended.
    pub(super) fn recorded(&mut self, recorded: Recorded) {
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
        let result = result.map(|value| {
            let own = (key.0.clone(), annotation);
            self.recordings.stored.insert(own, value);
        });
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
                self.pending.insert(key.0.clone());
                if not.is_refused {
                    self.refuse(&key, &pod, "LimitNotRecorded", not.why);
                } else {
                    tracing::warn!(
                        pod.name = pod.name_any(),
                        container = key.1,
                        why = not.why,
                        "a limit or request is not recorded yet"
                    );
                }
                return;
            }
        }
        // Another of its containers may have waited for this, too.
        self.apply(pod);
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
