//! What a pod belongs to, from what the pod itself says.
//!
//! A pod names its owner, and a ReplicaSet's or Job's own owner is told from its name: a Deployment's ReplicaSets are
//! named after it and the hash that their pods have as a label (`getNewReplicaSet`,
//! pkg/controller/deployment/sync.go), a CronJob's Jobs after it and a time in minutes (`getJobName`,
//! pkg/controller/cronjob/utils.go). So nobody has to be asked, and no right is needed for it.

use bellows_core::autoscalers::Workload;
use kube::ResourceExt as _;

use super::api::Pod;

/// The controller of a pod, and who may own that.
#[must_use]
pub fn workloads(pod: &Pod) -> Vec<Workload> {
    let owners = pod.metadata.owner_references.iter().flatten();
    let mut owners = owners.filter(|owner| owner.controller == Some(true));
    let Some(owner) = owners.next() else {
        return Vec::new();
    };
    let workload = |kind: &str, name: &str| Workload {
        kind: kind.to_owned(),
        name: name.to_owned(),
    };
    let mut all = vec![workload(&owner.kind, &owner.name)];
    let before = |end: &str| owner.name.strip_suffix(end)?.strip_suffix('-');
    match owner.kind.as_str() {
        "ReplicaSet" => {
            for (label, kind) in [
                ("pod-template-hash", "Deployment"),
                ("rollouts-pod-template-hash", "Rollout"),
            ] {
                let hash = pod.labels().get(label);
                all.extend(hash.and_then(|hash| Some(workload(kind, before(hash)?))));
            }
        }
        "Job" => {
            let parts = owner.name.rsplit_once('-');
            let is_time = |time: &str| !time.is_empty() && time.bytes().all(|c| c.is_ascii_digit());
            let parts = parts.filter(|(_, time)| is_time(time));
            all.extend(parts.map(|(name, _)| workload("CronJob", name)));
        }
        _ => {}
    }
    all
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(kind: &str, name: &str, labels: &Value) -> Vec<String> {
        let owners = json!([
            { "apiVersion": "v1", "kind": "Other", "name": "no", "uid": "2" },
            { "apiVersion": "apps/v1", "kind": kind, "name": name, "uid": "1", "controller": true },
        ]);
        let metadata = json!({ "name": "p", "labels": labels, "ownerReferences": owners });
        let pod: Pod = serde_json::from_value(json!({ "metadata": metadata })).unwrap();
        let all = workloads(&pod).into_iter();
        all.map(|Workload { kind, name }| format!("{kind}/{name}"))
            .collect()
    }

    #[test]
    fn a_pods_owners_are_told_from_its_own_words() {
        let hash = json!({ "pod-template-hash": "7d9f" });
        let set = ["ReplicaSet/web-app-7d9f", "Deployment/web-app"];
        assert_eq!(of("ReplicaSet", "web-app-7d9f", &hash), set);
        let rollout = json!({ "rollouts-pod-template-hash": "7d9f" });
        assert_eq!(of("ReplicaSet", "web-7d9f", &rollout)[1], "Rollout/web");
        // A ReplicaSet of its own.
        assert_eq!(of("ReplicaSet", "web", &hash), ["ReplicaSet/web"]);
        assert_eq!(of("ReplicaSet", "7d9f", &hash), ["ReplicaSet/7d9f"]);
        assert_eq!(of("StatefulSet", "db", &json!({})), ["StatefulSet/db"]);
        assert_eq!(
            of("Job", "nightly-29384720", &json!({}))[1],
            "CronJob/nightly"
        );
        assert_eq!(of("Job", "one-off", &json!({})), ["Job/one-off"]);
        let pod: Pod = serde_json::from_value(json!({ "metadata": { "name": "p" } })).unwrap();
        assert!(workloads(&pod).is_empty());
    }
}
