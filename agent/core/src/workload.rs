//! What a pod is one of, by what outlives it: what a container has needed before is asked for by this.
//!
//! A pod's name is as good as its controller makes it. A StatefulSet's pods come back under their own names, and each of them
//! may be somebody else's workspace; a Deployment's never do, and all of them do the same.
//!
//! The controllers' rules (Kubernetes 1.37): a Deployment's ReplicaSet has the label `pod-template-hash` in its pods and at the end
//! of its name (`pkg/controller/deployment`), a `CronJob`'s Job has the minutes since 1970 there (`getJobName`,
//! pkg/controller/cronjob/utils.go), and whatever has pods made by `generateName` adds five letters
//! (`apiserver/pkg/storage/names`).
//!
//! It errs towards nothing learnt: a pod without a controller that is made under another name each time is new each time.

use std::collections::BTreeMap;

/// A pod's controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
}

const TEMPLATE_HASH: &str = "pod-template-hash";
const JOB: &str = "batch.kubernetes.io/job-name";
const STATEFUL: &str = "statefulset.kubernetes.io/pod-name";
const REVISION: &str = "controller-revision-hash";
/// Letters that are added to a generated name, and the dash before them.
const GENERATED: usize = 6;
/// Digits of the minutes since 1970, until the year 2160.
const MINUTES: usize = 8;

/// The part of a pod's name that its successor has, too. Its owner, where that is known; else its labels tell.
#[must_use]
pub fn workload(pod: &str, labels: &BTreeMap<String, String>, owner: Option<&Owner>) -> String {
    let label = |name: &str| labels.get(name).map(String::as_str);
    let of_template = |name: &str| {
        let hash = label(TEMPLATE_HASH)?;
        let place = name.rfind(&format!("-{hash}"))?;
        Some(name.get(..place)?.to_owned())
    };
    match owner.map(|owner| (owner.kind.as_str(), owner.name.as_str())) {
        Some(("StatefulSet", _)) => pod.to_owned(),
        Some(("Job", job)) => without_minutes(job).to_owned(),
        Some((_, name)) => of_template(name).unwrap_or_else(|| name.to_owned()),
        None if label(STATEFUL).is_some() => pod.to_owned(),
        None => match (label(JOB), of_template(pod), label(REVISION)) {
            (Some(job), ..) => without_minutes(job).to_owned(),
            (None, Some(name), _) => name,
            (None, None, Some(_)) => without_generated(pod).to_owned(),
            (None, None, None) => pod.to_owned(),
        },
    }
}

fn without_minutes(job: &str) -> &str {
    let minutes =
        |end: &&str| end.len() == MINUTES && end.bytes().all(|byte| byte.is_ascii_digit());
    let split = job.rsplit_once('-').filter(|(_, end)| minutes(end));
    split.map_or(job, |(name, _)| name)
}

fn without_generated(pod: &str) -> &str {
    let place = pod.len().checked_sub(GENERATED);
    let split = place.and_then(|place| pod.split_at_checked(place));
    match split {
        Some((name, end)) if end.starts_with('-') && !name.is_empty() => name,
        _ => pod,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pod: &str, labels: &[(&str, &str)], owner: Option<(&str, &str)>) -> String {
        let labels = labels.iter();
        let labels = labels.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let owner = owner.map(|(kind, name)| Owner {
            kind: kind.to_owned(),
            name: name.to_owned(),
        });
        workload(pod, &labels.collect(), owner.as_ref())
    }

    #[test]
    fn a_successor_is_known_by_its_owner() {
        let hash = [(TEMPLATE_HASH, "7d4b9c")];
        let replica_set = Some(("ReplicaSet", "ws-anna-7d4b9c"));
        assert_eq!(of("ws-anna-7d4b9c-x2k4j", &hash, replica_set), "ws-anna");
        assert_eq!(
            of("ws-0", &[(REVISION, "ws-6f")], Some(("StatefulSet", "ws"))),
            "ws-0"
        );
        assert_eq!(of("log-x2k4j", &[], Some(("DaemonSet", "log"))), "log");
        assert_eq!(
            of("ci-29012345-x2k4j", &[], Some(("Job", "ci-29012345"))),
            "ci"
        );
        assert_eq!(of("ci-7-x2k4j", &[], Some(("Job", "ci-7"))), "ci-7");
        assert_eq!(of("ide-x2k4j", &[], Some(("Workspace", "ide"))), "ide");
    }

    #[test]
    fn without_an_owner_labels_tell() {
        let hash = [(TEMPLATE_HASH, "7d4b9c")];
        assert_eq!(of("ws-anna-7d4b9c-x2k4j", &hash, None), "ws-anna");
        let stateful = [(REVISION, "ws-6f"), (STATEFUL, "ws-0")];
        assert_eq!(of("ws-0", &stateful, None), "ws-0");
        assert_eq!(of("log-x2k4j", &[(REVISION, "6f")], None), "log");
        assert_eq!(of("x2k4j", &[(REVISION, "6f")], None), "x2k4j");
        assert_eq!(of("ci-29012345-x2k4j", &[(JOB, "ci-29012345")], None), "ci");
        assert_eq!(of("alone", &[], None), "alone");
        // One that has a template's hash for something else.
        assert_eq!(of("alone", &hash, None), "alone");
    }
}
