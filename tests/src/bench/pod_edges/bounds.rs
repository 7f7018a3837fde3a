//! How far a limit goes: as its namespace's LimitRange and quota allow, and no heap is sized beyond it.
//!
//! What a namespace allows is shared by all of its pods, so it counts what all were granted together, at every moment: looked
//! at every few milliseconds, because the sum is right at the end in any case.
//!
//! It must not have the API server refuse a raise and pass: that is what all of it is about. What is refused for
//! a while because the machine is slow is none of it.

use std::{
    fs::{self, File},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit},
    ledger::Record as LedgerRecord,
};
use bellows_core::{Action, Bytes, pod, quantity};
use serde_json::{Value, json};

use super::{LONG, braked_below, guarded, is_told, original, spec};
use crate::{
    bench::{
        bursts::burst_words,
        gate, heaps,
        pod_bursts::{ledger_of, results},
    },
    node::log_text,
    pods::{Cluster, Spec, wait},
};

/// The raises that a container was granted, and what the API server has refused of them.
fn raises(cgroup: &Cgroup) -> (Vec<Bytes>, Vec<String>) {
    let (mut granted, mut refused) = (Vec::new(), Vec::new());
    let (mut at_rest, mut is_raise) = (Bytes::ZERO, false);
    for record in ledger_of(cgroup.id()) {
        match record {
            LedgerRecord::Adopt { original, .. } => at_rest = original,
            LedgerRecord::Intend { action, .. } => match action {
                Action::Raise { to, .. } => {
                    granted.push(to);
                    is_raise = to > at_rest;
                }
                Action::RaiseByHand { to, .. } => granted.push(to),
                Action::Shrink { .. } => is_raise = false,
                Action::Hold | Action::Release | Action::Brake { .. } => {}
            },
            LedgerRecord::Verify {
                error: Some(error), ..
            } if is_raise && is_refusal(&error) => refused.push(error),
            _ => {}
        }
    }
    (granted, refused)
}

/// Whether it is an answer of the API server that will not pass. Nothing but its text has the code; one that has just started
/// forbids all.
fn is_refusal(error: &str) -> bool {
    let codes = ["code: 403", "code: 422"];
    codes.iter().any(|code| error.contains(code))
        && !error.contains("not yet ready to handle request")
}

/// Raised before the API is asked, and no further.
pub(super) fn limit_range(cluster: &Cluster) -> Result<()> {
    let (name, most) = ("ranged", Bytes::mib(160));
    cluster.apply(json!({
        "apiVersion": "v1",
        "kind": "LimitRange",
        "metadata": { "name": "edges", "namespace": "default" },
        "spec": { "limits": [{ "type": "Container", "max": { "memory": "160Mi" } }] },
    }))?;
    let command = ["/bellows-guest".to_owned(), "load".to_owned()]
        .into_iter()
        .chain(burst_words(Bytes::mib(32), Bytes::mib(120), 2))
        .chain(["--after-ms", "60000"].map(str::to_owned))
        .chain(gate::closed())
        .collect();
    cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        command,
        raise_first: true,
        ..spec(name)
    })?;
    let cgroup = cluster.wait_running(name)?;
    gate::open_when_braked(&cgroup)?;
    let is_over = wait("the burst is over", Duration::from_secs(60), || {
        Ok(!results(cluster, name)?.is_empty())
    });
    let told = is_told(cluster, name, "LimitRangeReached", "`edges`");
    let (granted, refused) = raises(&cgroup);
    let phase = cluster.phase(name)?;
    cluster.delete(name)?;
    cluster.remove("v1", "LimitRange", "edges")?;
    is_over.with_context(|| format!("it is {phase}: {granted:?} {refused:?}"))?;
    told?;
    ensure!(
        phase == "Running" && refused.is_empty() && granted.iter().max() == Some(&most),
        "it is {phase}: {granted:?} {refused:?}"
    );
    Ok(())
}

/// A quota of limits, with what of it is used: nobody counts it here but the API server, with each pod.
fn quota(cluster: &Cluster, most: Bytes) -> Result<()> {
    let hard = json!({ "limits.memory": quantity::format(most) });
    cluster.apply(json!({
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": { "name": "edges", "namespace": "default" },
        "spec": { "hard": hard },
    }))?;
    cluster.say_used(
        "edges",
        &json!({ "hard": hard, "used": { "limits.memory": "0" } }),
    )?;
    // A pod that is made before the API server knows the quota is charged to nobody.
    wait("the quota is in force", LONG, || {
        cluster.is_beyond_quota(&Spec {
            limit: most.plus(Bytes::mib(1)),
            ..spec("beyond")
        })
    })
}

pub(super) fn used_up(cluster: &Cluster) -> Result<()> {
    let name = "used-up";
    // As much as the pod has.
    quota(cluster, Bytes::mib(64))?;
    let cgroup = guarded(cluster, name)?;
    let told = is_told(cluster, name, "QuotaUsedUp", "`edges`");
    let left_alone = wait("it is left alone", Duration::from_secs(30), || {
        Ok(cgroup.limit("memory.high")? == Limit::Max)
    });
    // More room, and it is guarded as ever.
    let again = quota(cluster, Bytes::mib(1024)).and_then(|()| braked_below(&cgroup, 64));
    cluster.delete(name)?;
    cluster.remove("v1", "ResourceQuota", "edges")?;
    told?;
    left_alone?;
    again
}

/// Each wants more than there is for all. The API server never has to refuse.
pub(super) fn under_one_quota(cluster: &Cluster) -> Result<()> {
    const PODS: usize = 20;
    const START: &str = "/run/start-quota";
    drop(fs::remove_file(START));
    let hard = Bytes::mib(20 * 64 + 500);
    quota(cluster, hard)?;
    let names: Vec<String> = (0..PODS).map(|index| format!("quota-{index}")).collect();
    for name in &names {
        let command = ["/bellows-guest".to_owned(), "load".to_owned()]
            .into_iter()
            .chain(burst_words(Bytes::mib(16), Bytes::mib(90), 1))
            .chain(["--after-ms", "60000"].map(str::to_owned))
            .chain(["--rest-until".to_owned(), format!("/host{START}")])
            .collect();
        cluster.create(&Spec {
            max: Some(Bytes::mib(512)),
            command,
            host: true,
            ..spec(name)
        })?;
    }
    let mut cgroups = Vec::new();
    for name in &names {
        cgroups.push(cluster.wait_running(name)?);
    }
    for name in &names {
        original(cluster, name, "load=64Mi")?;
    }
    for cgroup in &cgroups {
        gate::wait_braked(cgroup)?;
    }
    File::create(START)?;
    let (mut most, begun) = (Bytes::ZERO, Instant::now());
    while begun.elapsed() < Duration::from_secs(40) {
        let limits = cgroups.iter().map(|cgroup| {
            // One that was killed has none any more.
            let limit = cgroup.limit("memory.max").unwrap_or(Limit::Max);
            if limit == Limit::Max {
                Bytes::mib(64)
            } else {
                limit.bytes()
            }
        });
        most = most.max(limits.fold(Bytes::ZERO, Bytes::plus));
        thread::sleep(Duration::from_millis(20));
    }
    let all: Vec<(Vec<Bytes>, Vec<String>)> = cgroups.iter().map(raises).collect();
    let raised = all
        .iter()
        .filter(|(granted, _)| !granted.is_empty())
        .count();
    let refused: Vec<&String> = all.iter().flat_map(|(_, refused)| refused).collect();
    eprintln!("{raised} of {PODS} were raised, to {most} together of {hard}; refused: {refused:?}");
    for name in &names {
        cluster.delete(name)?;
    }
    cluster.remove("v1", "ResourceQuota", "edges")?;
    ensure!(refused.is_empty(), "{refused:?}");
    ensure!(
        raised > 0 && most > Bytes::mib(20 * 64) && most <= hard,
        "{raised} to {most}"
    );
    Ok(())
}

/// One policy for three pods, of which two are never raised to its maximum.
pub(super) fn heaps(cluster: &Cluster) -> Result<()> {
    let label = "heaps";
    let max = Bytes::mib(1024);
    let rules = json!({ "memory": { "max": quantity::format(max), "heap": "Maximum" } });
    cluster.guard_labelled(label, &rules)?;
    wait("the agent is a plugin of the runtime", LONG, || {
        Ok(log_text("bellows").contains(heaps::CONNECTED))
    })?;
    let told = |name: &str, annotations: Value, is_guaranteed: bool| -> Result<String> {
        let metadata = json!({ "labels": { "guard": label }, "annotations": annotations });
        cluster.create_as(&spec(name), &metadata, is_guaranteed)?;
        let processes = cluster.wait_running(name)?.processes()?;
        let process = processes.first().context("nobody runs in it")?;
        let environment = fs::read_to_string(format!("/proc/{process}/environ"))?;
        cluster.delete(name)?;
        let mut variables = environment.split('\0');
        let heap = variables.find_map(|one| one.strip_prefix("JAVA_TOOL_OPTIONS="));
        Ok(heap.unwrap_or_default().to_owned())
    };
    let own = spec(label).limit;
    let annotated = Bytes::mib(512);
    let found = [
        told("raised", json!({}), false)?,
        told("guaranteed", json!({}), true)?,
        told(
            "annotated",
            json!({ pod::MODE: "Act", pod::MAX_MEMORY: quantity::format(annotated) }),
            false,
        )?,
    ];
    cluster.remove("bellows.dev/v1alpha1", "ElasticPolicy", label)?;
    let wanted = [max, own, annotated].map(|most| format!("-XX:MaxRAM={}", most.0));
    ensure!(found == wanted, "{found:?} in place of {wanted:?}");
    Ok(())
}
