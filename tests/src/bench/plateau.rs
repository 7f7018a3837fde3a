//! `plateau`: a program that fills 95 % of its limit and stays there is no burst.
//!
//! Three sizes at once, each under `bellows exec` and in a pod under `bellows run`, all in one guest.

use std::thread;

use anyhow::Result;
use bellows_core::{Bytes, quantity};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    pod_bursts::{self, observe},
    record::{Records, parsed},
    runner::{self, Probe, Runner, set_thp},
};
use crate::{
    agent::Agent,
    node::{ApiServer, Node},
    pods::{Cluster, Spec},
    sampler::Sample,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Seconds at each limit.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    #[command(flatten)]
    server: ApiServer,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    limit: Bytes,
    seconds: u64,
    exec: runner::Outcome,
    pod: pod_bursts::Outcome,
}

const LIMITS: [Bytes; 3] = [Bytes::mib(32), Bytes::mib(256), Bytes::mib(1024)];
/// A pod's first seconds pass before the agent knows it.
const UNGUARDED_SECONDS: u64 = 4;

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let _node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    set_thp(false)?;
    let _agent = Agent::start()?;
    let runner = Runner::new()?;
    let outcomes: Vec<Result<(runner::Outcome, pod_bursts::Outcome)>> = thread::scope(|scope| {
        let running = LIMITS.map(|limit| {
            let (runner, cluster) = (&runner, &cluster);
            let exec = scope.spawn(move || {
                let words = words(limit, options.seconds);
                let load = runner.load(&words.each_ref().map(String::as_str));
                runner.bellows(limit, limit.scaled(4, 1), &[], &load)
            });
            let pod = scope.spawn(move || in_pod(cluster, runner.probe(), limit, options.seconds));
            (exec, pod)
        });
        let joined = |panic| anyhow::anyhow!("a thread panicked: {panic:?}");
        running
            .into_iter()
            .map(|(exec, pod)| {
                let (exec, pod) = (exec.join().map_err(joined)?, pod.join().map_err(joined)?);
                Ok((exec?, pod?))
            })
            .collect()
    });
    for (limit, outcome) in LIMITS.into_iter().zip(outcomes) {
        let (exec, pod) = outcome?;
        eprintln!(
            "case {limit}: {}; in a pod {}, {} raises, {} patches, {} sleeps",
            exec.stderr,
            pod.phase,
            pod.raises().count(),
            pod.patches,
            pod.sleeps,
        );
        records.write(&Record {
            limit,
            seconds: options.seconds,
            exec,
            pod,
        })?;
    }
    Ok(())
}

fn words(limit: Bytes, seconds: u64) -> [String; 7] {
    let (size, breath) = (
        limit.per_mille(950).0.to_string(),
        limit.per_mille(10).0.to_string(),
    );
    let seconds = seconds.to_string();
    [
        "plateau",
        "--size",
        &size,
        "--breath",
        &breath,
        "--seconds",
        &seconds,
    ]
    .map(str::to_owned)
}

fn in_pod(
    cluster: &Cluster,
    probe: &Probe,
    limit: Bytes,
    seconds: u64,
) -> Result<pod_bursts::Outcome> {
    let command = ["/bellows-guest".to_owned(), "load".to_owned()]
        .into_iter()
        .chain(words(limit, seconds + UNGUARDED_SECONDS))
        .collect();
    let spec = Spec {
        name: format!("plateau-{}", quantity::format(limit).to_lowercase()),
        limit,
        max: Some(limit.scaled(4, 1)),
        command,
        host: false,
        liveness: None,
        whole_pod: false,
        cpu: None,
        restarts: false,
        raise_first: false,
    };
    observe(cluster, probe, &spec, None)
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let exec_raises = |record: &Record| {
        record.exec.report["report"]["raises"]
            .as_u64()
            .unwrap_or(u64::MAX)
    };
    let completed = |record: &&Record| !record.exec.killed() && record.pod.phase == "Succeeded";
    let reached = |samples: &[Sample], limit: Bytes| {
        samples
            .last()
            .map_or(0, |sample| sample.peak * 1000 / limit.0)
    };
    let reached_by = |samples: fn(&Record) -> &[Sample]| -> Vec<u64> {
        records
            .iter()
            .map(|record| reached(samples(record), record.limit))
            .collect()
    };
    let (exec, pod) = (
        reached_by(|record| &record.exec.samples),
        reached_by(|record| &record.pod.samples),
    );
    Ok(json!({
        "limits": records.len(),
        "seconds": records.iter().map(|record| record.seconds).min(),
        "completed": records.iter().filter(completed).count(),
        "guarded_pods": records.iter().filter(|record| record.pod.was_guarded()).count(),
        "peak_per_mille_of_limit_min": exec.iter().chain(&pod).min(),
        "peak_per_mille_of_limit_exec": exec,
        "peak_per_mille_of_limit_pod": pod,
        "raises": records.iter().map(|record| exec_raises(record).saturating_add(record.pod.raises().count() as u64)).fold(0, u64::saturating_add),
        "sleeps": records.iter().map(|record| record.exec.sleeps + record.pod.sleeps).sum::<u64>(),
        "patches": records.iter().map(|record| record.pod.patches).sum::<i64>(),
    }))
}
