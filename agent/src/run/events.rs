//! Events on pods: reasons from a closed list, one per state change.
//!
//! The list is [`REASONS`], and docs/events.md has what each means and what to do, which a test compares: whoever reads
//! an Event looks its reason up there.

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

/// All reasons.
pub(super) const REASONS: [&str; 38] = [
    "BoostPartlySupported",
    "CpuLimitNotRecorded",
    "CriticalPodNotSupported",
    "GrowthStopped",
    "GuaranteedNotSupported",
    "Guarded",
    "HorizontalPodAutoscalerInCharge",
    "HorizontalPodAutoscalerSeen",
    "InitContainerNotSupported",
    "InvalidAnnotation",
    "InvalidLimit",
    "InvalidPolicy",
    "LimitNotRecorded",
    "LimitRangeReached",
    "NoCpuLimit",
    "NoKernelPrograms",
    "NoMemoryLimit",
    "NoMemoryRequest",
    "NoRoomToMake",
    "OOMKillObserved",
    "PodLevelCpuNotSupported",
    "PodLevelRequestNotSupported",
    "QuotaUsedUp",
    "RaiseRecommended",
    "RaisedByHand",
    "RequestLowered",
    "RequestOwed",
    "RequestRaised",
    "RequestRefused",
    "RequestsNotEnabled",
    "ResizeRestartsContainer",
    "RoomMade",
    "SidecarNotSupported",
    "StaticCpuManager",
    "StaticPodNotSupported",
    "VerticalPodAutoscalerInCharge",
    "WaitsForMemory",
    "Watched",
];

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
        debug_assert!(REASONS.contains(&reason), "{reason} is not in the list");
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
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    /// String literals of several words without a space (`LikeThis`).
    fn literals(text: &str, found: &mut BTreeSet<String>) {
        let lines = text.lines();
        let lines = lines.filter(|line| !line.trim_start().starts_with("//"));
        for literal in lines.flat_map(|line| line.split('"').skip(1).step_by(2)) {
            let capitals = literal.bytes().filter(u8::is_ascii_uppercase).count();
            let is_word = literal.bytes().all(|byte| byte.is_ascii_alphabetic());
            let begins = literal.starts_with(|first: char| first.is_ascii_uppercase());
            if is_word && begins && capitals > 1 && literal.len() > capitals {
                found.insert(literal.to_owned());
            }
        }
    }

    /// Sources below a path, without their tests.
    fn sources(path: &Path) -> Vec<String> {
        // What the API calls things.
        const OTHERS: [&str; 3] = ["tests.rs", "allowances.rs", "autoscalers.rs"];
        if path.is_dir() {
            let entries = fs::read_dir(path).unwrap();
            return entries
                .flat_map(|entry| sources(&entry.unwrap().path()))
                .collect();
        }
        if OTHERS.iter().any(|other| path.ends_with(other)) {
            return Vec::new();
        }
        let text = fs::read_to_string(path).unwrap();
        let own = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        vec![own.to_owned()]
    }

    #[test]
    fn every_reason_is_in_the_list_and_in_the_documents() {
        let agent = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut found = BTreeSet::new();
        for text in sources(&agent.join("src/run")) {
            // The list itself is no use of it.
            let list = text.split_once("const REASONS").map(|(_, list)| list);
            let used = list.and_then(|list| list.split_once("\n];\n"));
            literals(used.map_or(&text, |(_, used)| used), &mut found);
        }
        let core = sources(&agent.join("core/src"));
        for text in core
            .iter()
            .map(String::as_str)
            .chain([include_str!("../../core/src/autoscalers.rs")])
        {
            for function in text.split("fn reason(").skip(1) {
                literals(function.split("\n    }\n").next().unwrap(), &mut found);
            }
        }
        for kind in ["ElasticNode", "ElasticPolicy"] {
            assert!(found.remove(kind));
        }
        found.extend(["Guarded", "Watched"].map(str::to_owned));
        assert_eq!(found, REASONS.map(str::to_owned).into());
        let documents = include_str!("../../../docs/events.md");
        let cells = documents.lines().filter_map(|line| line.split('|').nth(1));
        let named = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
        let mut named: Vec<&str> = named.collect();
        named.sort_unstable();
        assert_eq!(named, REASONS);
    }

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
