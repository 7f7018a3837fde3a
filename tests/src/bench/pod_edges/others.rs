//! What somebody else does beside the agent, its predecessor among them: limits, brakes and autoscalers.
//!
//! Whoever sets a limit means it, so it becomes what the agent comes back to, whether it was seen or found afterwards. What a
//! dead agent has raised is nobody's wish. Between the two stands only what is written on the pod, so agents are killed here,
//! not stopped.
//!
//! It must not look only at what the agent says of itself: cgroups and the API are asked.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use bellows::{cgroup::Limit, clock::now};
use bellows_core::{Bytes, pod};
use serde_json::json;

use super::{Bed, LONG, braked_below, guarded, is_told, original, spec};
use crate::{
    bench::{bursts::burst_words, gate, pod_bursts::is_guarded_since},
    pods::{Cluster, Spec, wait},
};

/// Without an agent for as long as `meanwhile` takes.
fn without_agent(bed: &mut Bed, meanwhile: impl FnOnce(&Cluster) -> Result<()>) -> Result<()> {
    bed.agent.kill_all()?;
    let result = meanwhile(&bed.cluster);
    bed.agent.start_again()?;
    result
}

pub(super) fn foreign_change(cluster: &Cluster) -> Result<()> {
    let name = "foreign";
    let cgroup = guarded(cluster, name)?;
    original(cluster, name, "load=64Mi")?;
    cluster.resize(name, "96Mi")?;
    original(cluster, name, "load=96Mi")?;
    braked_below(&cgroup, 96)?;
    cluster.delete(name)
}

pub(super) fn foreign_change_unseen(bed: &mut Bed) -> Result<()> {
    let name = "unseen";
    let cgroup = guarded(&bed.cluster, name)?;
    original(&bed.cluster, name, "load=64Mi")?;
    without_agent(bed, |cluster| cluster.resize(name, "80Mi"))?;
    original(&bed.cluster, name, "load=80Mi")?;
    braked_below(&cgroup, 80)?;
    bed.cluster.delete(name)
}

/// The limit of a pod that an agent has raised is nobody's wish: the next agent lowers it.
pub(super) fn raised_by_a_predecessor(bed: &mut Bed) -> Result<()> {
    let name = "inherited";
    let burst = burst_words(Bytes::mib(32), Bytes::mib(200), 1);
    let command = ["/bellows-guest".to_owned(), "load".to_owned()]
        .into_iter()
        .chain(burst)
        .chain(["--hold-ms", "3000", "--after-ms", "60000"].map(str::to_owned))
        .chain(gate::closed())
        .collect();
    bed.cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        command,
        ..spec(name)
    })?;
    let cgroup = bed.cluster.wait_running(name)?;
    gate::open_when_braked(&cgroup)?;
    let limit_becomes = |what: &str, is_met: &dyn Fn(Bytes) -> bool| {
        wait(what, Duration::from_secs(60), || {
            Ok(is_met(cgroup.limit("memory.max")?.bytes()))
        })
    };
    limit_becomes("the limit is raised", &|limit| limit >= Bytes::mib(200))?;
    without_agent(bed, |_| Ok(()))?;
    limit_becomes("the limit is the original again", &|limit| {
        limit == Bytes::mib(64)
    })?;
    original(&bed.cluster, name, "load=64Mi")?;
    bed.cluster.delete(name)
}

/// As the kubelet's MemoryQoS sets one: it must outlive adoption, the agent's death and its successor.
pub(super) fn foreign_brake(bed: &mut Bed) -> Result<()> {
    let name = "qos";
    bed.cluster.create(&spec(name))?;
    let cgroup = bed.cluster.wait_running(name)?;
    let theirs = Limit::At(Bytes::mib(48));
    cgroup.set_limit("memory.high", theirs)?;
    let opt_in = json!({ pod::MODE: "Act", pod::MAX_MEMORY: "512Mi" });
    bed.cluster.annotate(name, &opt_in)?;
    original(&bed.cluster, name, "load=64Mi")?;
    let died = now();
    without_agent(bed, |_| Ok(()))?;
    wait("the next agent guards it", LONG, || {
        Ok(is_guarded_since(&cgroup, died))
    })?;
    // What it may do to the brake.
    thread::sleep(Duration::from_secs(3));
    let high = cgroup.limit("memory.high")?;
    bed.cluster.delete(name)?;
    ensure!(high == theirs, "memory.high has become {high:?}");
    Ok(())
}

pub(super) fn brake_is_set_again(cluster: &Cluster) -> Result<()> {
    let name = "lifted";
    let cgroup = guarded(cluster, name)?;
    braked_below(&cgroup, 64)?;
    cgroup.set_limit("memory.high", Limit::Max)?;
    braked_below(&cgroup, 64)?;
    cluster.delete(name)
}

pub(super) fn autoscaled(cluster: &Cluster) -> Result<()> {
    let (name, owner) = ("autoscaled", "edges");
    let target = json!({ "apiVersion": "apps/v1", "kind": "StatefulSet", "name": owner });
    let vertical = |mode: &str| {
        json!({
            "apiVersion": "autoscaling.k8s.io/v1",
            "kind": "VerticalPodAutoscaler",
            "metadata": { "name": "vertical", "namespace": "default" },
            "spec": { "targetRef": target, "updatePolicy": { "updateMode": mode } },
        })
    };
    cluster.apply(vertical("InPlaceOrRecreate"))?;
    let owners = json!([{
        "apiVersion": "apps/v1", "kind": "StatefulSet", "name": owner, "controller": true,
        "uid": "00000000-0000-0000-0000-000000000001",
    }]);
    let annotations = json!({ pod::MODE: "Act", pod::MAX_MEMORY: "512Mi" });
    let metadata = json!({ "annotations": annotations, "ownerReferences": owners });
    cluster.create_as(&spec(name), &metadata, false)?;
    let cgroup = cluster.wait_running(name)?;
    let told = is_told(cluster, name, "VerticalPodAutoscalerInCharge", "`vertical`");
    let high = cgroup.limit("memory.high")?;
    // It only recommends from now on.
    cluster.apply(vertical("Off"))?;
    let guarded = braked_below(&cgroup, 64);
    let resource =
        json!({ "name": "memory", "target": { "type": "Utilization", "averageUtilization": 80 } });
    cluster.apply(json!({
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": { "name": "horizontal", "namespace": "default" },
        "spec": {
            "scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 3,
            "metrics": [{ "type": "Resource", "resource": resource }],
        },
    }))?;
    let seen = is_told(cluster, name, "HorizontalPodAutoscalerSeen", "`horizontal`");
    let still = braked_below(&cgroup, 64);
    cluster.delete(name)?;
    cluster.remove("autoscaling/v2", "HorizontalPodAutoscaler", "horizontal")?;
    cluster.remove("autoscaling.k8s.io/v1", "VerticalPodAutoscaler", "vertical")?;
    told?;
    ensure!(high == Limit::Max, "it is braked at {high:?}");
    guarded?;
    seen?;
    still
}
