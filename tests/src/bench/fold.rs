//! `fold`: a limit that was raised by hand is live when the pod's CPU is resized, by us or by somebody else. With any resize the
//! kubelet sets all of a container's limits to what the spec says.
//!
//! What we ask for carries what was raised by hand: nobody may be killed for it. For that the API refuses the agent's resizes
//! until both memory and CPU stand above the spec, and takes them then. What somebody else asks for does not: it comes a
//! random time after the raise, with the API at work, and kills if it comes before our own resize is taken and after the burst
//! has passed the spec's limit. That window is measured. It is there only where limits are raised first (`memory.order`), or where
//! the API does not answer for two seconds.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit},
    clock::now,
};
use bellows_core::{Bytes, Cpu};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::{log_uniform, mib},
    pod_bursts::{is_guarded, results},
    pod_faults::bursting,
    pod_path::Looking,
    record::{Records, parsed, percentile, rounded},
    runner::Probe,
};
use crate::{
    agent::Agent,
    api_proxy::{ApiProxy, Way},
    load::BurstResult,
    node::{ApiServer, Node, wait},
    pods::{self, Cluster, Spec},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Resizes by us, and as many by somebody else.
    #[arg(long, default_value_t = 20)]
    n: u64,
    /// Seed of the bursts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    server: ApiServer,
}

/// Whose resize of the CPU it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Whose {
    Ours,
    Theirs,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    whose: Whose,
    limit: Bytes,
    peak: Bytes,
    threads: u64,
    /// From the raise to their resize; from when both are raised to the API's first answer that is no refusal.
    after_ms: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    /// Whether memory was raised by hand and not in the spec when the other resize was taken.
    is_live: bool,
    /// What was in force then, and what was used.
    in_force: Bytes,
    used: Bytes,
    /// From the raise by hand until the spec said as much; `None` if it was not seen to.
    window_ms: Option<u64>,
    /// Whether the CPU came to be what was asked for.
    is_resized: bool,
    oom_kill: u64,
    restarts: i32,
    phase: String,
    said: Vec<BurstResult>,
}

const OURS: &str = "fold-ours";
const THEIRS: &str = "fold-theirs";
/// What the CPU limit is, what a policy allows, and what somebody else asks for.
const CPU: Cpu = Cpu(300_000);
const MOST_CPU: &str = "2";
const THEIR_CPU: &str = "1500m";
const BURSTS: Duration = Duration::from_secs(90);
const LOOK: Duration = Duration::from_millis(5);
/// Longer than the API ever takes.
const WINDOW: Duration = Duration::from_secs(20);

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let memory = json!({ "max": "1Gi", "order": "RaiseFirst" });
    let cpu = json!({ "max": MOST_CPU });
    cluster.guard_labelled(OURS, &json!({ "memory": memory, "cpu": cpu }))?;
    cluster.guard_labelled(THEIRS, &json!({ "memory": memory }))?;
    let kubeconfig = Path::new("/etc/kubernetes/through-proxy");
    let proxy = ApiProxy::start(pods::client(), kubeconfig)?;
    let mut agent = Agent::start_with(kubeconfig)?;
    let bench = Bench {
        cluster,
        proxy,
        probe: Probe::start()?,
    };
    let mut random = fastrand::Rng::with_seed(options.seed);
    for index in 0..2 * options.n {
        let whose = if index % 2 == 0 {
            Whose::Ours
        } else {
            Whose::Theirs
        };
        let limit = Bytes(mib(log_uniform(&mut random, 48.0, 96.0)).0 >> 20 << 20);
        let case = Case {
            index,
            seed: options.seed,
            whose,
            limit,
            peak: limit.per_mille(random.u64(2500..5000)),
            threads: random.u64(1..=4),
            after_ms: random.u64(0..300),
        };
        let record = bench.case(case)?;
        node.check()?;
        agent.check()?;
        eprintln!(
            "case {index}: {whose:?} after {} ms: live {}, {} of {} used (limit {limit}), spec after {:?} ms, CPU resized {}; {} kills, {} restarts, {}",
            case.after_ms,
            record.is_live,
            record.used,
            record.in_force,
            record.window_ms,
            record.is_resized,
            record.oom_kill,
            record.restarts,
            record.phase,
        );
        records.write(&record)?;
    }
    Ok(())
}

struct Bench {
    cluster: Cluster,
    proxy: ApiProxy,
    probe: Probe,
}

impl Bench {
    fn case(&self, case: Case) -> Result<Record> {
        let name = format!("fold-{}", case.index);
        let spec = Spec {
            max: None,
            cpu: Some(CPU),
            ..bursting(&name, case.limit, case.peak, case.threads)
        };
        let label = match case.whose {
            Whose::Ours => OURS,
            Whose::Theirs => THEIRS,
        };
        self.cluster.create_labelled(&spec, Some(label))?;
        let cgroup = self.cluster.wait_running(&name)?;
        let watched = cgroup.clone();
        let sampler = self.probe.sample(move || Some(watched.clone()));
        wait("it is guarded", Duration::from_secs(30), || {
            Ok(is_guarded(&cgroup))
        })?;
        let looking = Looking::start(&name, case.limit);
        if case.whose == Whose::Ours {
            self.proxy.set(Way::Refused(500))?;
        }
        let is_raised = || Ok(cgroup.limit("memory.max").map(Limit::bytes)? > case.limit);
        let raised = until("it is raised", BURSTS, is_raised);
        let raised_at = now();
        if case.whose == Whose::Ours && raised.is_ok() {
            let quota = quota_of(&cgroup)?;
            // One that needs no more CPU is told of its memory alone, which is a case, too.
            drop(until("its CPU is raised", WINDOW, || {
                Ok(quota_of(&cgroup)? > quota)
            }));
        }
        thread::sleep(Duration::from_millis(case.after_ms));
        let in_force = cgroup.limit("memory.max").map_or(Bytes::ZERO, Limit::bytes);
        let used = cgroup.usage().unwrap_or_default();
        let resized_at = now();
        match case.whose {
            Whose::Ours => self.proxy.set(Way::Through)?,
            Whose::Theirs => self.cluster.resize_cpu(&name, THEIR_CPU)?,
        }
        let asked = (case.whose == Whose::Theirs).then_some(Cpu(1_500_000));
        let is_resized = until("its CPU is resized", WINDOW, || {
            let quota = quota_of(&cgroup)?;
            Ok(asked.map_or(quota > CPU, |asked| quota == asked))
        });
        let is_over =
            || Ok(!self.cluster.is_running(&name)? || !results(&self.cluster, &name)?.is_empty());
        let burst = wait("the burst is over", BURSTS, is_over);
        let track = sampler.finish();
        let in_spec = looking.finish()?;
        let is_later = in_spec.is_none_or(|in_spec| in_spec > resized_at);
        let record = Record {
            case,
            is_live: raised.is_ok() && is_later && in_force > case.limit,
            in_force,
            used,
            window_ms: in_spec.map(|in_spec| in_spec.since(raised_at).as_millis()),
            is_resized: is_resized.is_ok(),
            oom_kill: track.oom_kill,
            restarts: self.cluster.restarts(&name)?,
            phase: self.cluster.phase(&name)?,
            said: results(&self.cluster, &name)?,
        };
        self.cluster.delete(&name)?;
        ensure!(
            burst.is_ok() || record.oom_kill > 0,
            "case {}: its burst does not end",
            case.index
        );
        Ok(record)
    }
}

/// What a cgroup may use of CPU.
fn quota_of(cgroup: &Cgroup) -> Result<Cpu> {
    let quota = cgroup.quota()?;
    Ok(quota.map_or(Cpu(u64::MAX), |quota| quota.cpu))
}

/// Waits with short looks: what is looked for may be there for a moment only.
fn until(what: &str, longest: Duration, is_met: impl Fn() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < longest {
        if is_met()? {
            return Ok(());
        }
        thread::sleep(LOOK);
    }
    anyhow::bail!("{what}: not within {longest:?}")
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let of = |whose: Whose| {
        records
            .iter()
            .filter(move |record| record.case.whose == whose)
    };
    let kills = |whose: Whose| of(whose).map(|record| record.oom_kill).sum::<u64>();
    let live = |whose: Whose| of(whose).filter(|record| record.is_live).count();
    let windows: Vec<f64> = of(Whose::Theirs)
        .filter_map(|record| Some(record.window_ms? as f64))
        .collect();
    Ok(json!({
        "ours": of(Whose::Ours).count(),
        "ours_live": live(Whose::Ours),
        "kills_ours": kills(Whose::Ours),
        "theirs": of(Whose::Theirs).count(),
        "theirs_live": live(Whose::Theirs),
        "kills_theirs": kills(Whose::Theirs),
        "window_ms": rounded(percentile(&windows, 50.0)),
        "window_ms_max": rounded(percentile(&windows, 100.0)),
        "resized": records.iter().filter(|record| record.is_resized).count(),
        "restarts": records.iter().map(|record| record.restarts).sum::<i32>(),
    }))
}
