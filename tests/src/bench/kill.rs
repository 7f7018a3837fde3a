//! `kill`: SIGKILL of all of `bellows run` during a burst, started again a second later: in the even
//! cases at a random instant, in the odd ones at a random instant of a hold.

use std::{path::Path, thread, time::Duration};

use anyhow::Result;
use bellows::{
    actuate::reflex::now,
    cgroup::{Cgroup, Limit},
    explain::LEDGER,
    ledger,
};
use bellows_core::{Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::burst_words,
    pod_bursts::results,
    record::{Records, rounded},
    runner::set_thp,
};
use crate::{
    agent::Agent,
    node::{ApiServer, Node, wait},
    pods::{Cluster, Spec},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Cases.
    #[arg(long, default_value_t = 30)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    server: ApiServer,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    seed: u64,
    limit: Bytes,
    peak: Bytes,
    /// Milliseconds from the start of the burst to the kill.
    killed_after_ms: u64,
    /// Whether the container was frozen when the agent died.
    held: bool,
    /// Milliseconds from the new agent's start until brake and hold were seen lifted.
    released_after_ms: Option<u64>,
    phase: String,
    /// The limit thirty seconds after the end of the burst.
    limit_after: Option<u64>,
    unreadable: usize,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    set_thp(false)?;
    let mut agent = Agent::start()?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    for index in 0..options.n {
        let limit = Bytes::mib(random.u64(64..=160));
        let peak = limit.scaled(random.u64(4..=8), 1);
        let name = format!("kill-{index}");
        let command = ["/bellows-guest", "load"]
            .into_iter()
            .map(str::to_owned)
            .chain(burst_words(limit.per_mille(500), peak, random.u64(1..=4)))
            .chain(["--rest-ms", "4000", "--after-ms", "120000"].map(str::to_owned))
            .collect();
        let max = peak.per_mille(1500).page_floor();
        cluster.create(&Spec {
            name: name.clone(),
            limit,
            max: Some(max),
            command,
            host: false,
        })?;
        let cgroup = cluster.wait_running(&name)?;
        wait("the burst starts", Duration::from_secs(60), || {
            Ok(!cluster.said(&name)?.is_empty())
        })?;
        let start = now();
        if index % 2 == 0 {
            thread::sleep(Duration::from_millis(random.u64(0..=2000)));
        } else {
            wait_held(&cgroup);
            thread::sleep(Duration::from_millis(random.u64(0..=100)));
        }
        agent.kill_all()?;
        let killed_after_ms = now().since(start).as_millis();
        let held = is_held(&cgroup);
        let unreadable = ledger::read(Path::new(LEDGER))
            .unwrap_or_default()
            .unreadable;
        thread::sleep(Duration::from_secs(1));
        let started = now();
        agent.start_again()?;
        let released_after_ms = released(&cgroup, started);
        let limit_after = limit_after(&cluster, &name, &cgroup, limit)?;
        let phase = cluster.phase(&name)?;
        let record = Record {
            index,
            seed: options.seed,
            limit,
            peak,
            killed_after_ms,
            held,
            released_after_ms,
            phase,
            limit_after,
            unreadable,
        };
        eprintln!("case {index}: {record:?}");
        records.write(&record)?;
        cluster.delete(&name)?;
        node.check()?;
    }
    Ok(())
}

fn is_held(cgroup: &Cgroup) -> bool {
    cgroup
        .read("cgroup.freeze")
        .is_ok_and(|text| text.trim() == "1")
}

/// Waits for a hold; a burst may do without one.
fn wait_held(cgroup: &Cgroup) {
    let start = now();
    while !is_held(cgroup) && now().since(start) < Nanos::millis(3000) {
        thread::sleep(Duration::from_millis(1));
    }
}

/// When brake and hold were first seen lifted; a container that is gone needs neither.
fn released(cgroup: &Cgroup, started: Nanos) -> Option<u64> {
    while now().since(started) < Nanos::millis(20_000) {
        let high = cgroup.limit("memory.high");
        let frozen = cgroup.read("cgroup.freeze");
        match (high, frozen) {
            (Ok(Limit::Max), Ok(frozen)) if frozen.trim() == "0" => {
                return Some(now().since(started).as_millis());
            }
            (Err(_), _) | (_, Err(_)) => return Some(now().since(started).as_millis()),
            _ => {}
        }
        thread::sleep(Duration::from_millis(1));
    }
    None
}

/// The limit thirty seconds after the burst; `None` if the pod is dead.
fn limit_after(
    cluster: &Cluster,
    name: &str,
    cgroup: &Cgroup,
    original: Bytes,
) -> Result<Option<u64>> {
    let start = now();
    let mut end = None;
    while now().since(start) < Nanos::millis(120_000) {
        thread::sleep(Duration::from_millis(300));
        if matches!(cluster.phase(name)?.as_str(), "Failed" | "Succeeded") {
            return Ok(None);
        }
        let over = results(cluster, name)?;
        end = end.or_else(|| over.first().map(|said| Nanos(said.end_ns)));
        // A cgroup that is gone is a pod that died: nothing guarded it while the agent was dead.
        let Ok(limit) = cgroup.limit("memory.max").map(Limit::bytes) else {
            return Ok(None);
        };
        let late = end.is_some_and(|end| now().since(end) >= Nanos::millis(30_000));
        if end.is_some() && (limit == original || late) {
            return Ok(Some(limit.0));
        }
    }
    Ok(Some(cgroup.limit("memory.max")?.bytes().0))
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = records
        .iter()
        .map(|record| serde_json::from_value(record.clone()))
        .collect::<Result<_, _>>()?;
    let slowest = records
        .iter()
        .map(|record| record.released_after_ms.unwrap_or(u64::MAX))
        .max()
        .unwrap_or(0);
    let raised = records
        .iter()
        .filter(|record| {
            record
                .limit_after
                .is_some_and(|limit| limit != record.limit.0)
        })
        .count();
    Ok(json!({
        "kills": records.len(),
        "held_at_kill": records.iter().filter(|record| record.held).count(),
        "pods_dead": records.iter().filter(|record| record.limit_after.is_none()).count(),
        "released_after_start_max_s": rounded(slowest as f64 / 1000.0),
        "left_raised": raised,
        "ledger_unreadable": records.iter().map(|record| record.unreadable).sum::<usize>(),
    }))
}
