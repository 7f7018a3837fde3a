//! Events on pods: reasons from a closed list, one per state change.

use k8s_openapi::{api::core::v1::ObjectReference, api::core::v1::Pod};
use kube::{
    Client, Resource as _,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

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
            note: Some(note),
            action: action.to_owned(),
            secondary: None,
        };
        let reference: ObjectReference = pod.object_ref(&());
        if let Err(error) = self.recorder.publish(&event, &reference).await {
            tracing::warn!(%error, reason, "an event could not be published");
        }
    }
}
