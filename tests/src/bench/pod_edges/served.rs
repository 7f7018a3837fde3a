//! Bursts that others would be killed in: with a probe, at the pod's own level, at once, and of more than there is.
//!
//! Each waits behind a gate until its container is guarded, because a burst before that proves nothing.
//!
//! It must not call a burst served for the want of a kill alone: it is over, its pod runs, and what its ledger says is what
//! the case is about.

use std::{
    fs::{self, File},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit},
    ledger::Record as LedgerRecord,
};
use bellows_core::{Action, Bytes, pod};
use serde_json::json;

use super::{original, spec};
use crate::{
    bench::{
        bursts::burst_words,
        gate,
        pod_bursts::{ledger_of, results},
    },
    pods::{Cluster, Spec, wait},
};

/// An exec probe that may not fail once leaves only the brake, which must do.
pub(super) fn braked_for_its_probe(cluster: &Cluster) -> Result<()> {
    let name = "probed";
    let command = ["/bellows-guest".to_owned(), "load".to_owned()]
        .into_iter()
        .chain(burst_words(Bytes::mib(32), Bytes::mib(200), 2))
        .chain(["--after-ms", "60000"].map(str::to_owned))
        .chain(gate::closed())
        .collect();
    let probe = json!({
        "exec": { "command": ["/bellows-guest", "load", "touch", "4096"] },
        "initialDelaySeconds": 2,
        "periodSeconds": 2,
        "timeoutSeconds": 10,
        "failureThreshold": 1,
    });
    cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        command,
        liveness: Some(probe),
        ..spec(name)
    })?;
    let cgroup = cluster.wait_running(name)?;
    gate::open_when_braked(&cgroup)?;
    wait("the burst is over", Duration::from_secs(60), || {
        Ok(!results(cluster, name)?.is_empty())
    })?;
    let restarts = cluster
        .status(name)?
        .map_or(-1, |status| status.restart_count);
    let records = ledger_of(cgroup.id());
    let did = |wanted: fn(&Action) -> bool| {
        records
            .iter()
            .any(|record| matches!(record, LedgerRecord::Intend { action, .. } if wanted(action)))
    };
    let phase = cluster.phase(name)?;
    cluster.delete(name)?;
    ensure!(
        phase == "Running" && restarts == 0,
        "it is {phase} after {restarts} restarts: {records:?}"
    );
    ensure!(
        did(|action| matches!(action, Action::Raise { .. }))
            && !did(|action| matches!(action, Action::Hold)),
        "{records:?}"
    );
    Ok(())
}

/// The containers of such a pod have no limit of their own; the kubelet gives them the pod's.
pub(super) fn whole_pod(cluster: &Cluster) -> Result<()> {
    let name = "whole";
    let command = ["/bellows-guest".to_owned(), "load".to_owned()]
        .into_iter()
        .chain(burst_words(Bytes::mib(32), Bytes::mib(200), 2))
        .chain(["--after-ms", "60000"].map(str::to_owned))
        .chain(gate::closed())
        .collect();
    cluster.create(&Spec {
        max: Some(Bytes::mib(512)),
        command,
        whole_pod: true,
        cpu: None,
        restarts: false,
        raise_first: false,
        ..spec(name)
    })?;
    let container = cluster.wait_running(name)?;
    let path = container
        .path()
        .parent()
        .context("a container is in a pod")?;
    let pod = Cgroup::open(path)?;
    gate::wait_braked(&pod)?;
    gate::open(&container)?;
    let outcome = wait("the burst is over", Duration::from_secs(60), || {
        Ok(!results(cluster, name)?.is_empty())
    })
    .and_then(|()| {
        wait("the limit is restored", Duration::from_secs(60), || {
            let limit = Limit::At(Bytes::mib(64));
            Ok(pod.limit("memory.max")? == limit)
        })
    });
    let records = ledger_of(pod.id());
    let phase = cluster.phase(name)?;
    cluster.delete(name)?;
    outcome.with_context(|| format!("it is {phase}: {records:?}"))?;
    ensure!(
        phase == "Running" && !records.is_empty(),
        "it is {phase}: {records:?}"
    );
    Ok(())
}

/// One reflex, one controller and one API server serve them all.
pub(super) fn at_once(cluster: &Cluster) -> Result<()> {
    const PODS: [&str; 4] = ["one", "two", "three", "four"];
    const START: &str = "/run/start";
    drop(fs::remove_file(START));
    for name in PODS {
        let command = ["/bellows-guest".to_owned(), "load".to_owned()]
            .into_iter()
            .chain(burst_words(Bytes::mib(32), Bytes::mib(300), 2))
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
    let cgroups = PODS.map(|name| cluster.wait_running(name));
    for name in PODS {
        original(cluster, name, "load=64Mi")?;
    }
    for cgroup in cgroups.iter().flatten() {
        gate::wait_braked(cgroup)?;
    }
    File::create(START)?;
    let (mut begins, mut ends) = (Vec::new(), Vec::new());
    let mut failures = Vec::new();
    for (name, cgroup) in PODS.iter().zip(cgroups) {
        let cgroup = cgroup?;
        let is_over = wait("the burst is over", Duration::from_secs(60), || {
            Ok(!results(cluster, name)?.is_empty())
        });
        let phase = cluster.phase(name)?;
        if is_over.is_err() || phase != "Running" {
            failures.push(format!("{name} is {phase}: {:?}", ledger_of(cgroup.id())));
        }
        let said = cluster.said(name)?;
        begins.extend(said.iter().filter_map(|said| said["start_ns"].as_u64()));
        ends.extend(results(cluster, name)?.iter().map(|burst| burst.end_ns));
    }
    for name in PODS {
        cluster.delete(name)?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    ensure!(
        begins.iter().max() < ends.iter().min(),
        "not at once: they began at {begins:?} and ended at {ends:?}"
    );
    Ok(())
}

/// Six jobs that need twice the maximum: without elastic parallelism some are killed, with it all end.
pub(super) fn jobs_wait(cluster: &Cluster) -> Result<()> {
    let max = "128Mi";
    let begin = "/run/begin-jobs";
    let script = format!(
        "until [ -e {begin} ]; do sleep 0.1; done; for n in 1 2 3 4 5 6; do bellows-guest load job 40Mi 600 & all=\"$all $!\"; done; \
         code=0; for one in $all; do wait $one || code=1; done; echo \"{{\\\"code\\\":$code}}\"; sleep 300"
    );
    let command = [
        "/bellows-guest",
        "load",
        "chroot",
        "/host",
        "sh",
        "-c",
        &script,
    ];
    let code_of = |name: &str, parallelism: &str| -> Result<(i64, u64)> {
        let spec = Spec {
            command: command.map(str::to_owned).to_vec(),
            host: true,
            ..spec(name)
        };
        let annotations = json!({
            pod::MODE: "Act", pod::MAX_MEMORY: max, pod::PARALLELISM: parallelism
        });
        drop(fs::remove_file(begin));
        cluster.create_with(&spec, &annotations, false)?;
        let cgroup = cluster.wait_running(name)?;
        gate::wait_braked(&cgroup)?;
        File::create(begin)?;
        let mut said = Vec::new();
        let is_over = wait("its jobs have ended", Duration::from_secs(120), || {
            said = cluster.said(name)?;
            Ok(!said.is_empty() || !cluster.is_running(name)?)
        });
        let kills = cgroup.events().map(|events| events.oom_kill);
        let told = ledger_of(cgroup.id());
        cluster.delete(name)?;
        is_over.with_context(|| format!("{told:?}"))?;
        let code = said.first().and_then(|said| said["code"].as_i64());
        Ok((code.unwrap_or(-1), kills.unwrap_or(1)))
    };
    let without = code_of("greedy", "Unchanged")?;
    ensure!(without.1 > 0, "nothing was killed without it: {without:?}");
    let with = code_of("patient", "Elastic")?;
    ensure!(with == (0, 0), "exit code and kills: {with:?}");
    Ok(())
}
