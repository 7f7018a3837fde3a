//! `right-size`: a node full of pods that use a tenth of what they request, and one more that finds no place until a policy
//! lets them come down.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use bellows::clock::now;
use bellows_core::Bytes;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::{Records, parsed, percentile, rounded},
    reserved::{Harm, Reserved, Resting, allotted, is_placed, requested, wait_unschedulable},
};
use crate::{
    agent::Agent,
    node::{ApiServer, Node, wait},
    pods::Cluster,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Times that it is done.
    #[arg(long, default_value_t = 3)]
    n: u64,
    #[command(flatten)]
    server: ApiServer,
}

const GUARDED: &str = "right-size";
/// Pods that fill the node.
const PODS: usize = 8;
/// For how long the late pod has found no place before the policy is there.
const PENDING: Duration = Duration::from_secs(10);
const PLACED: Duration = Duration::from_secs(120);

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    /// What each pod requests, at first and when the late one had its place.
    request: Bytes,
    lowered: Vec<Bytes>,
    /// What the late one requests.
    late: Bytes,
    /// Whether it ran, and how long after the policy.
    scheduled: bool,
    scheduled_after_ms: u64,
    harm: Harm,
    /// Whether all requests were what they had been after the policy was gone.
    restored: bool,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let mut agent = Agent::start()?;
    let request = Bytes(((cluster.allocatable()?.0 / PODS as u64) >> 20) << 20);
    let fillers = Reserved {
        app: "filler",
        replicas: PODS,
        request,
        uses: request.per_mille(100),
        priority: None,
        guard: Some(GUARDED),
        is_stateful: false,
    };
    let late = Reserved {
        app: "late",
        replicas: 1,
        request: request.plus(request.per_mille(500)),
        guard: None,
        ..fillers
    };
    let resting = fillers.start(&cluster)?;
    for index in 0..options.n {
        node.check()?;
        agent.check()?;
        let record = observe(&cluster, &fillers, &late, &resting, index)?;
        eprintln!(
            "case {index}: scheduled {} after {} ms; requests {} to {:?}; {:?}; restored {}",
            record.scheduled,
            record.scheduled_after_ms,
            record.request,
            record.lowered.iter().max(),
            record.harm,
            record.restored,
        );
        records.write(&record)?;
    }
    Ok(())
}

fn requests(cluster: &Cluster, pods: &[Resting]) -> Result<Vec<Bytes>> {
    let requests = pods
        .iter()
        .map(|own| Ok(requested(&cluster.get(&own.name)?)));
    requests.collect()
}

fn observe(
    cluster: &Cluster,
    fillers: &Reserved,
    late: &Reserved,
    resting: &[Resting],
    index: u64,
) -> Result<Record> {
    late.scale(cluster, 1)?;
    wait_unschedulable(cluster, late.app, 1)?;
    thread::sleep(PENDING);
    wait_unschedulable(cluster, late.app, 1)?;
    cluster.guard_labelled(
        GUARDED,
        &json!({ "memory": {
            "max": "4Gi",
            "requests": { "rightSize": true, "floor": "32Mi", "observe": "10s" },
        } }),
    )?;
    let begun = now();
    let placed = wait("the late one has a place", PLACED, || {
        let pods = cluster.of_app(late.app)?;
        let runs = |pod| is_placed(pod) && is_running(pod);
        Ok(pods.len() == 1 && pods.iter().all(runs))
    });
    let scheduled_after_ms = now().since(begun).as_millis();
    // Whoever is to be harmed by having come down is by now.
    thread::sleep(PENDING);
    let lowered = requests(cluster, resting)?;
    let harm = Harm::to(cluster, resting)?;
    late.end(cluster)?;
    cluster.remove("bellows.dev/v1alpha1", "ElasticPolicy", GUARDED)?;
    let restored = wait("requests are what they were", PLACED, || {
        // What the spec says and the kubelet does not carry out is not there.
        let all = resting.iter().map(|own| {
            let pod = cluster.get(&own.name)?;
            Ok(requested(&pod).min(allotted(&pod)) == fillers.request)
        });
        let all: Vec<bool> = all.collect::<Result<_>>()?;
        Ok(all.into_iter().all(|is_whole| is_whole))
    });
    Ok(Record {
        index,
        request: fillers.request,
        lowered,
        late: late.request,
        scheduled: placed.is_ok(),
        scheduled_after_ms,
        harm,
        restored: restored.is_ok(),
    })
}

fn is_running(pod: &k8s_openapi::api::core::v1::Pod) -> bool {
    let status = pod.status.as_ref();
    status.and_then(|status| status.phase.as_deref()) == Some("Running")
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let lowest = |record: &Record| {
        let lowered = record.lowered.iter().max().copied().unwrap_or_default();
        lowered.0 as f64 / record.request.0 as f64
    };
    for record in &records {
        ensure!(record.lowered.len() == PODS, "{record:?}");
    }
    let after = records
        .iter()
        .map(|record| record.scheduled_after_ms as f64);
    let after: Vec<f64> = after.collect();
    let parts: Vec<f64> = records.iter().map(lowest).collect();
    Ok(json!({
        "n": records.len(),
        "scheduled": records.iter().all(|record| record.scheduled),
        "scheduled_after_ms_p50": percentile(&after, 50.0),
        "request_left": rounded(percentile(&parts, 100.0)),
        "kills": records.iter().map(|record| record.harm.kills).max(),
        "restarts": records.iter().map(|record| record.harm.restarts).max(),
        "restored": records.iter().filter(|record| record.restored).count(),
    }))
}
