//! `pod-throttle`: the service of `throttle` in pods: without a limit, with one at its mean, and with Bellows by policy, the
//! API told of what has become of its limit.

use std::{fs, thread, time::Duration};

use anyhow::{Context as _, Result};
use bellows::{
    cgroup::{Cgroup, field},
    clock::now,
};
use bellows_core::{Bytes, Cpu, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::{Records, parsed, percentile, rounded},
    throttle::{MAX, MEAN, Outcome, counted, cycles_in, longest, p99, pulse, said},
};
use crate::{
    agent::Agent,
    load::{PulseEnd, PulseStart},
    node::{ApiServer, Node, wait},
    pods::{Cluster, Spec},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Times that all three are run.
    #[arg(long, default_value_t = 1)]
    n: u64,
    /// Seconds of each; rounded down to whole rests and works, of which there is one at least.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    #[command(flatten)]
    server: ApiServer,
}

const GUARDED: &str = "throttle";
const RESTORED: Nanos = Nanos::millis(90_000);

/// How one pod went.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Pod {
    outcome: Outcome,
    /// Changes of its spec, and seconds from its start until it was at rest.
    spec_writes: i64,
    seconds: f64,
    restarts: i32,
    /// How long after its work its limit was what it was, in the spec, its cgroup and its pod's.
    restored_after_ms: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    limit: Cpu,
    unlimited: Pod,
    fixed: Pod,
    bellows: Pod,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    cluster.guard_labelled(GUARDED, &json!({ "cpu": { "max": MAX.to_string() } }))?;
    let mut agent = Agent::start()?;
    let cycles = cycles_in(options.seconds);
    for index in 0..options.n {
        node.check()?;
        agent.check()?;
        let run = |name: &str, limit, is_guarded| {
            observe(
                &cluster,
                &format!("{name}-{index}"),
                limit,
                is_guarded,
                cycles,
            )
        };
        let record = Record {
            index,
            limit: MEAN,
            unlimited: run("unlimited", None, false)?,
            fixed: run("fixed", Some(MEAN), false)?,
            bellows: run("bellows", Some(MEAN), true)?,
        };
        eprintln!(
            "case {index}: p99 {:.1} ms unlimited, {:.1} fixed, {:.1} bellows; throttled {}, {} ms; {} writes, restored {:?}",
            p99(&record.unlimited.outcome),
            p99(&record.fixed.outcome),
            p99(&record.bellows.outcome),
            record.fixed.outcome.throttled_us / 1000,
            record.bellows.outcome.throttled_us / 1000,
            record.bellows.spec_writes,
            record.bellows.restored_after_ms,
        );
        records.write(&record)?;
    }
    Ok(())
}

fn observe(
    cluster: &Cluster,
    name: &str,
    cpu: Option<Cpu>,
    is_guarded: bool,
    cycles: u64,
) -> Result<Pod> {
    let spec = Spec {
        name: name.to_owned(),
        limit: Bytes::mib(256),
        max: None,
        command: pulse(cycles),
        host: false,
        liveness: None,
        whole_pod: false,
        cpu,
        restarts: false,
        raise_first: false,
    };
    cluster.create_labelled(&spec, is_guarded.then_some(GUARDED))?;
    let begun = now();
    let cgroup = cluster.wait_running(name)?;
    let pod = Cgroup::open(cgroup.path().parent().context("a container is in a pod")?)?;
    wait("it has started", Duration::from_secs(60), || {
        Ok(said::<PulseStart>(cluster.said(name)?).is_some())
    })?;
    let before = counted(&cgroup, throttled_us(&cgroup, &pod)?, Vec::new())?;
    wait("its work is done", longest(cycles), || {
        Ok(said::<PulseEnd>(cluster.said(name)?).is_some())
    })?;
    let all = cluster.said(name)?;
    let mut outcome = counted(&cgroup, throttled_us(&cgroup, &pod)?, all.clone())?;
    outcome.since(&before);
    let end = Nanos(said::<PulseEnd>(all).context("it has ended")?.end_ns);
    let mut restored_after_ms = None;
    while is_guarded && now().since(end) < RESTORED {
        if cluster.cpu_limits(name, &cgroup, &pod)? == [Some(MEAN); 3] {
            restored_after_ms = Some(now().since(end).as_millis());
            break;
        }
        thread::sleep(Duration::from_millis(200));
    }
    let status = cluster.status(name)?.context("it has a status")?;
    let generation = cluster.get(name)?.metadata.generation.unwrap_or(1);
    let seconds = Duration::from_nanos(now().since(begun).0).as_secs_f64();
    cluster.delete(name)?;
    Ok(Pod {
        outcome,
        // The API counts from 1.
        spec_writes: generation - 1,
        seconds,
        restarts: status.restart_count,
        restored_after_ms,
    })
}

/// For how long a container was throttled, by its own quota and by its pod's.
fn throttled_us(cgroup: &Cgroup, pod: &Cgroup) -> Result<u64> {
    let of = |cgroup: &Cgroup| -> Result<u64> {
        let stat = fs::read_to_string(cgroup.path().join("cpu.stat"))?;
        Ok(field(&stat, "throttled_usec").unwrap_or(0))
    };
    Ok(of(cgroup)? + of(pod)?)
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let of = |value: &dyn Fn(&Record) -> f64| -> Vec<f64> { records.iter().map(value).collect() };
    let worst = |values: &[f64]| rounded(percentile(values, 100.0));
    let ratio = |with: f64, without: f64| {
        if without > 0.0 {
            with / without
        } else {
            f64::MAX
        }
    };
    let throttled = |pod: &Pod| pod.outcome.throttled_us as f64;
    let writes = |record: &Record| {
        record.bellows.spec_writes as f64 * 60.0 / record.bellows.seconds.max(60.0)
    };
    let all = || {
        let pods = |record: &Record| {
            [&record.unlimited, &record.fixed, &record.bellows].map(|pod| pod.restarts)
        };
        records.iter().flat_map(pods)
    };
    Ok(json!({
        "runs": records.len(),
        "p99_ms_with": worst(&of(&|record| p99(&record.bellows.outcome))),
        "p99_ms_fixed": worst(&of(&|record| p99(&record.fixed.outcome))),
        "p99_ratio": worst(&of(&|record| ratio(p99(&record.bellows.outcome), p99(&record.unlimited.outcome)))),
        "throttled_ms_with": worst(&of(&|record| throttled(&record.bellows) / 1000.0)),
        "throttled_ms_fixed": worst(&of(&|record| throttled(&record.fixed) / 1000.0)),
        "throttled_vs_fixed": worst(&of(&|record| ratio(throttled(&record.bellows), throttled(&record.fixed)))),
        "api_writes_per_minute": worst(&of(&writes)),
        "restart_count_total": all().sum::<i32>(),
        "restored": records.iter().filter(|record| record.bellows.restored_after_ms.is_some()).count(),
    }))
}
