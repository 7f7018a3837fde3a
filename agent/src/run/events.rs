//! Events on pods: reasons from a closed list, one per state change.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client, Resource as _,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

use crate::{actuate::resize::TIMEOUT, attribution::api::Pod};

/// Bytes of a note that the API takes (`NoteLengthLimit`, pkg/apis/core/validation/events.go).
const LONGEST_NOTE: usize = 1024;
/// Bytes that are kept of a longer one's end, where it says what to do.
const NOTE_END: usize = 320;

/// A note that the API takes: an annotation that is quoted in it may have 256 KiB.
pub(super) fn fitting(note: String) -> String {
    const GAP: &str = " … ";
    if note.len() <= LONGEST_NOTE {
        return note;
    }
    let start = note.floor_char_boundary(LONGEST_NOTE - NOTE_END - GAP.len());
    let end = note.ceil_char_boundary(note.len() - NOTE_END);
    [&note[..start], GAP, &note[end..]].concat()
}

/// Publishes events of this agent.
pub(super) struct Events {
    client: Client,
    reporter: Reporter,
}

impl Events {
    pub(super) fn new(client: Client, node: &str) -> Self {
        Self {
            client,
            reporter: Reporter {
                controller: "bellows.dev/agent".to_owned(),
                instance: Some(node.to_owned()),
            },
        }
    }

    pub(super) fn refused(&self, pod: &Pod, reason: &str, note: String) {
        self.publish(pod.object_ref(&()), EventType::Warning, reason, note);
    }

    pub(super) fn guarded(&self, pod: &Pod, note: String) {
        self.publish(pod.object_ref(&()), EventType::Normal, "Guarded", note);
    }

    pub(super) fn watched(&self, pod: &Pod, note: String) {
        self.publish(pod.object_ref(&()), EventType::Normal, "Watched", note);
    }

    /// What happens to a guarded pod: `RaisedByHand`, `WaitsForMemory`, `GrowthStopped`.
    pub(super) fn told(&self, pod: &Pod, reason: &'static str, note: String) {
        self.publish(pod.object_ref(&()), EventType::Normal, reason, note);
    }

    /// A policy that cannot be read.
    pub(super) fn rejected(&self, policy: ObjectReference, note: String) {
        self.publish(policy, EventType::Warning, "InvalidPolicy", note);
    }

    /// A kill of a pod that is only watched.
    pub(super) fn killed(&self, pod: ObjectReference, note: String) {
        self.publish(pod, EventType::Warning, "OOMKillObserved", note);
    }

    /// A raise that a pod would have got.
    pub(super) fn recommended(&self, pod: ObjectReference, note: String) {
        self.publish(pod, EventType::Normal, "RaiseRecommended", note);
    }

    /// Publishes beside whatever goes on: nobody waits for it. Each has a recorder of its own, since one
    /// keeps what it has published for a series, and what is told here again is minutes apart.
    fn publish(&self, reference: ObjectReference, type_: EventType, reason: &str, note: String) {
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(fitting(note)),
            action: "Guard".to_owned(),
            secondary: None,
        };
        let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
        drop(tokio::spawn(async move {
            let published = recorder.publish(&event, &reference);
            match tokio::time::timeout(TIMEOUT, published).await {
                Ok(Ok(())) => {}
                failed => tracing::warn!(?failed, event.reason, "an event could not be published"),
            }
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_note_keeps_its_ends() {
        assert_eq!(fitting("short".to_owned()), "short");
        for letter in ["a", "ä", "…", "🫁"] {
            for length in 1000..1100 {
                let note = fitting(format!("begin{}end", letter.repeat(length)));
                assert!(note.len() <= LONGEST_NOTE, "{letter} {length}");
                assert!(note.starts_with("begin") && note.ends_with("end"));
            }
        }
    }
}
