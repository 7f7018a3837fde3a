//! What people are told, and what is not touched meanwhile: pods that cannot be guarded, or are only watched.
//!
//! Whoever asked for something that cannot be had reads why in an Event of the pod, with what to do, and finds the pod as it
//! was. So each case of a pod looks at both: an Event without a limit that stands, or the other way round, is a failure.
//!
//! It must not take any Event of a pod for the one that is meant: the reason and a part of its text are compared.

use std::{process::Command, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bellows::{cgroup::Limit, ledger::Record as LedgerRecord};
use bellows_core::{Bytes, pod};
use serde_json::{Value, json};

use super::{LONG, spec};
use crate::{
    bench::{bursts::burst_words, gate, pod_bursts::ledger_of},
    pods::{Cluster, Spec, wait},
};

pub(super) fn refused(
    cluster: &Cluster,
    name: &str,
    annotations: &Value,
    guaranteed: bool,
    reason: &str,
    part: &str,
) -> Result<()> {
    cluster.create_with(&spec(name), annotations, guaranteed)?;
    let cgroup = cluster.wait_running(name)?;
    let mut last = Vec::new();
    let told = wait(
        &format!("an Event {reason}"),
        Duration::from_secs(30),
        || {
            last = cluster.events(name)?;
            Ok(last
                .iter()
                .any(|(seen, note)| seen == reason && note.contains(part)))
        },
    );
    let limit = cgroup.limit("memory.max")?;
    let high = cgroup.limit("memory.high")?;
    cluster.delete(name)?;
    told.map_err(|error| error.context(format!("{last:?}")))?;
    ensure!(
        limit == Limit::At(Bytes::mib(64)) && high == Limit::Max,
        "it was acted upon: {limit:?}, {high:?}"
    );
    Ok(())
}

pub(super) fn watched(cluster: &Cluster) -> Result<()> {
    let (name, limit) = ("watched", Bytes::mib(64));
    let mut command = spec(name).command;
    command.truncate(2);
    command.extend(burst_words(limit.per_mille(500), Bytes::mib(256), 2));
    command.extend(gate::closed());
    let spec = Spec {
        command,
        ..spec(name)
    };
    let annotations = json!({ pod::MODE: "Observe", pod::MAX_MEMORY: "1Gi" });
    cluster.create_with(&spec, &annotations, false)?;
    let cgroup = cluster.wait_running(name)?;
    wait("it is watched", LONG, || {
        let ledger = ledger_of(cgroup.id());
        let mut records = ledger.iter();
        Ok(records.any(|record| matches!(record, LedgerRecord::Observe { .. })))
    })?;
    gate::open(&cgroup)?;
    while cgroup.populated().unwrap_or(false) {
        if let (Ok(limit), Ok(high)) = (cgroup.limit("memory.max"), cgroup.limit("memory.high")) {
            ensure!(
                limit == Limit::At(spec.limit) && high == Limit::Max,
                "it was acted upon: {limit:?}, {high:?}"
            );
        }
        thread::sleep(Duration::from_millis(10));
    }
    let mut last = Vec::new();
    let told = wait("its kill is an Event", Duration::from_secs(30), || {
        last = cluster.events(name)?;
        Ok(last.iter().any(|(reason, note)| {
            reason == "OOMKillObserved" && note.contains("it would have lived")
        }))
    });
    cluster.delete(name)?;
    told.with_context(|| format!("{last:?}"))
}

pub(super) fn explain_unknown() -> Result<()> {
    let output = Command::new("bellows")
        .args(["explain", "default/nobody"])
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && stderr.contains("`default/nobody` was not guarded"),
        "{stderr}"
    );
    Ok(())
}
