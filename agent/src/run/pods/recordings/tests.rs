use bellows_core::{
    Bytes,
    pod::{MODE, ORIGINAL, way::Server},
};
use tokio::sync::mpsc::unbounded_channel;

use super::*;
use crate::run::pods::bed::{Bed, key};

#[tokio::test]
async fn one_of_a_pod_is_under_way_and_a_refused_one_waits_for_a_change() {
    let (ended, _) = unbounded_channel();
    let mut recordings = Recordings::new(ended);
    let version = |text: &str| Some(text.to_owned());
    let (first, second) = (version("1"), version("2"));
    assert!(recordings.begins(&key("app"), first.as_ref()));
    assert!(!recordings.begins(&key("side"), first.as_ref()));
    let ends = |recordings: &mut Recordings, name, version: &Option<String>, is_refused| {
        recordings.running.clear();
        recordings.ends(&key(name), version.clone(), is_refused);
    };
    ends(&mut recordings, "app", &first, true);
    assert!(recordings.is_refused(&key("app")));
    // Not again for the same pod; another container's may.
    assert!(!recordings.begins(&key("app"), first.as_ref()));
    assert!(recordings.begins(&key("side"), first.as_ref()));
    ends(&mut recordings, "side", &first, false);
    assert!(!recordings.is_refused(&key("side")));
    assert!(recordings.begins(&key("app"), second.as_ref()));
    ends(&mut recordings, "app", &second, true);
    recordings.try_again();
    assert!(recordings.is_refused(&key("app")));
    assert!(recordings.begins(&key("app"), second.as_ref()));
    recordings.forget("0f8c");
    assert!(recordings.running.is_empty());
    assert!(!recordings.is_refused(&key("app")));
}

impl Bed {
    /// The recording that is under way ends so.
    fn ends(&mut self, original: &str, result: Result<String, NotRecorded>) {
        let recorded = Recorded {
            key: key("app"),
            annotation: ORIGINAL,
            version: None,
            original: original.to_owned(),
            result,
        };
        self.watch.recorded(recorded);
    }

    fn is_recording(&self) -> bool {
        !self.watch.recordings.running.is_empty()
    }
}

#[tokio::test]
async fn what_somebody_else_has_set_is_recorded_beside_the_watch() {
    let mut bed = Bed::new().await;
    bed.sees("64Mi");
    bed.is_guarded();
    assert_eq!(bed.follows().as_deref(), Some("64Mi"));
    assert!(!bed.is_recording());
    // Nobody waits for the API, and nothing is changed meanwhile.
    bed.raised_by_hand(Some(Bytes::mib(256)));
    bed.sees("96Mi");
    assert_eq!(bed.follows(), None);
    assert!(bed.is_recording());
    // What was raised by hand is theirs once, not what is raised since.
    assert_eq!(bed.raised_by_hand(Some(Bytes::mib(256))), None);
    assert_eq!(bed.follows(), None);
    assert_eq!(bed.raised_by_hand(None), Some(Bytes::mib(256)));
    assert_eq!(
        bed.watch.known[&key("app")].policy.unwrap().original,
        Bytes::mib(96)
    );
    // Another one comes, and the first fails: the second is recorded.
    bed.sees("128Mi");
    assert_eq!(bed.follows(), None);
    let overtaken = NotRecorded {
        why: "it was changed meanwhile".to_owned(),
        is_refused: false,
    };
    bed.ends("96Mi", Err(overtaken));
    assert!(!bed.is_recording() && bed.watch.pending.contains("0f8c"));
    assert_eq!(bed.follows(), None);
    assert!(bed.is_recording());
    bed.ends("128Mi", Ok("app=128Mi".to_owned()));
    assert_eq!(bed.follows().as_deref(), Some("128Mi"));
    assert!(!bed.is_recording());
}

#[tokio::test]
async fn a_recording_may_end_after_its_pod_or_another_change() {
    let mut bed = Bed::new().await;
    bed.sees("64Mi");
    bed.is_guarded();
    bed.sees("96Mi");
    assert_eq!(bed.follows(), None);
    // It was stored before the next change.
    bed.sees("128Mi");
    bed.ends("96Mi", Ok("app=96Mi".to_owned()));
    assert_eq!(bed.follows(), None, "the one before is recorded");
    assert!(bed.is_recording());
    bed.watch.forget("0f8c");
    bed.ends("128Mi", Ok("app=128Mi".to_owned()));
    assert!(bed.watch.originals.is_empty() && bed.watch.recordings.stored.is_empty());
}

/// The answer of a resize of ours comes after the watch has told of what somebody else has set since.
#[tokio::test]
async fn what_is_recorded_while_older_news_hold_is_looked_at_again() {
    let mut bed = Bed::new().await;
    bed.watch.context.resizer.ways().knows(Server {
        minor: 36,
        has_resize: true,
        takes_patch: None,
    });
    bed.sees("64Mi");
    bed.is_guarded();
    assert_eq!(bed.follows().as_deref(), Some("64Mi"));
    assert!(bed.watch.pending.is_empty());
    bed.sees("96Mi");
    assert_eq!(bed.follows(), None);
    let targets = bed.watch.context.resizer.targets().clone();
    let is_told = |limit: &str| {
        let told = targets.with(|targets| {
            let mut all = targets.values_mut();
            all.next().map(|target| target.limit = limit.to_owned())
        });
        told.unwrap();
    };
    is_told("512Mi");
    bed.ends("96Mi", Ok("app=96Mi".to_owned()));
    assert_eq!(bed.limit(), None);
    assert!(bed.watch.pending.contains("0f8c"));
    is_told("96Mi");
    bed.watch.retry();
    assert_eq!(bed.limit().as_deref(), Some("96Mi"));
    assert!(bed.watch.pending.is_empty());
}

#[tokio::test]
async fn a_memory_limit_whose_recording_is_refused_is_told_of_and_tried_again() {
    let mut bed = Bed::new().await;
    bed.sees("64Mi");
    bed.is_guarded();
    bed.sees("96Mi");
    assert_eq!(bed.follows(), None);
    bed.watch.pending.clear();
    let refused = || NotRecorded {
        why: "no annotations here".to_owned(),
        is_refused: true,
    };
    bed.ends("96Mi", Err(refused()));
    assert!(bed.watch.pending.contains("0f8c"));
    let told = |bed: &Bed| bed.watch.known[&key("app")].refusal.clone();
    assert_eq!(told(&bed), Some(refused().why));
    // It stays told, so that it is told once.
    assert_eq!(bed.follows(), None);
    assert!(bed.is_recording());
    assert_eq!(told(&bed), Some(refused().why));
}

/// What is seen of the pod is older than what was stored last.
#[tokio::test]
async fn a_recording_goes_on_from_what_was_stored_last() {
    let mut bed = Bed::new().await;
    bed.sees("64Mi");
    bed.ends("96Mi", Ok("app=96Mi".to_owned()));
    let (pod, ..) = bed.wish();
    let annotations = bed.watch.recordings.annotations(&pod);
    assert_eq!(annotations[ORIGINAL], "app=96Mi");
    assert_eq!(annotations[MODE], "Act");
}
