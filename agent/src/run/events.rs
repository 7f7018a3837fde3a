//! Events on pods: reasons from a closed list, one per state change.

use k8s_openapi::{api::core::v1::ObjectReference, api::core::v1::Pod};
use kube::{
    Client, Resource as _,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

/// Bytes of a note that the API takes (`NoteLengthLimit`, pkg/apis/core/validation/events.go).
const LONGEST_NOTE: usize = 1024;
/// Bytes that are kept of a longer one's end, where it says what to do.
const NOTE_END: usize = 320;

/// A note that the API takes: an annotation that is quoted in it may have 256 KiB.
fn fitting(note: String) -> String {
    const GAP: &str = " … ";
    if note.len() <= LONGEST_NOTE {
        return note;
    }
    let start = note.floor_char_boundary(LONGEST_NOTE - NOTE_END - GAP.len());
    let end = note.ceil_char_boundary(note.len() - NOTE_END);
    [&note[..start], GAP, &note[end..]].concat()
}

/// Publishes events of this agent.
#[derive(Clone)]
pub(super) struct Events {
    recorder: Recorder,
}

impl Events {
    pub(super) fn new(client: Client, node: &str) -> Self {
        let reporter = Reporter {
            controller: "bellows.dev/agent".to_owned(),
            instance: Some(node.to_owned()),
        };
        Self {
            recorder: Recorder::new(client, reporter),
        }
    }

    pub(super) async fn refused(&self, pod: &Pod, reason: &str, note: String) {
        self.publish(pod, EventType::Warning, reason, "Guard", note)
            .await;
    }

    pub(super) async fn guarded(&self, pod: &Pod, note: String) {
        self.publish(pod, EventType::Normal, "Guarded", "Guard", note)
            .await;
    }

    async fn publish(&self, pod: &Pod, type_: EventType, reason: &str, action: &str, note: String) {
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(fitting(note)),
            action: action.to_owned(),
            secondary: None,
        };
        let reference: ObjectReference = pod.object_ref(&());
        if let Err(error) = self.recorder.publish(&event, &reference).await {
            tracing::warn!(%error, reason, "an event could not be published");
        }
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
