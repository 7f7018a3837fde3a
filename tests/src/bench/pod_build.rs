//! `pod-build`: the build of `build`, in a pod on a real kubelet, without and with Bellows.

use std::{process::Command, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bellows_core::{Bytes, quantity};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    pod_bursts::{Outcome, observe},
    record::Records,
    runner::Probe,
};
use crate::{
    agent::Agent,
    node::{ApiServer, Node, shell},
    pods::{Cluster, Spec},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The fixed limit.
    #[arg(long, value_parser = quantity::parse, default_value = "256Mi")]
    memory: Bytes,
    /// The ceiling.
    #[arg(long, value_parser = quantity::parse, default_value = "3Gi")]
    max_memory: Bytes,
    #[command(flatten)]
    server: ApiServer,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    memory: Bytes,
    max_memory: Bytes,
    fixed: Outcome,
    bellows: Outcome,
    /// What `bellows explain` says.
    explained: String,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let Options {
        memory,
        max_memory,
        server,
    } = options;
    let _node = Node::start(server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let _agent = Agent::start()?;
    let probe = Probe::start()?;
    // Compiler and headers come from the disk into page cache that belongs to no pod.
    shell("make --silent -C /build-load -j2 O=/tmp/warm /tmp/warm/unit-1.o /tmp/warm/main.o")?;
    let build = |out: &str, wait: &str| -> Vec<String> {
        let script = format!("sleep {wait}; exec make --silent -C /build-load -j8 O=/tmp/{out}");
        [
            "/bellows-guest",
            "load",
            "chroot",
            "/host",
            "sh",
            "-c",
            &script,
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let spec = |name: &str, max| Spec {
        name: name.to_owned(),
        limit: *memory,
        max,
        // Time for the agent to adopt it.
        command: build(name, "4"),
        host: true,
        liveness: None,
        whole_pod: false,
        cpu: None,
        restarts: false,
        raise_first: false,
    };
    eprintln!("build -j8 in a pod with a fixed limit of {memory}");
    let fixed = observe(&cluster, &probe, &spec("fixed", None), None)?;
    eprintln!("build -j8 in a pod guarded by bellows run, {memory} to {max_memory}");
    let bellows = observe(&cluster, &probe, &spec("guarded", Some(*max_memory)), None)?;
    thread::sleep(Duration::from_millis(500));
    let explained = Command::new("bellows")
        .args(["explain", "default/guarded"])
        .output()
        .context("bellows explain")?;
    ensure!(
        explained.status.success(),
        "bellows explain failed: {}",
        String::from_utf8_lossy(&explained.stderr)
    );
    let explained = String::from_utf8_lossy(&explained.stdout).into_owned();
    eprint!("{explained}");
    records.write(&Record {
        memory: *memory,
        max_memory: *max_memory,
        fixed,
        bellows,
        explained,
    })?;
    Ok(())
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let record: Record = serde_json::from_value(records.first().context("no record")?.clone())?;
    let Record {
        fixed,
        bellows,
        explained,
        ..
    } = record;
    let seconds = |outcome: &Outcome| outcome.wall_ms as f64 / 1000.0;
    Ok(json!({
        "fixed_limit_passed": fixed.phase == "Succeeded",
        "bellows_passed": bellows.phase == "Succeeded",
        "fixed_seconds": seconds(&fixed),
        "bellows_seconds": seconds(&bellows),
        "fixed_kills": fixed.oom_kill,
        "bellows_kills": bellows.oom_kill,
        "raises": bellows.raises().count(),
        "peak": bellows.samples.last().map(|sample| sample.peak),
        "limit_reached": bellows.samples.iter().map(|sample| sample.limit).max(),
        "explained": explained,
    }))
}
