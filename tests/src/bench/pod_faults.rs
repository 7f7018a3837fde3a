//! `pod-faults`: what happens to the API under the agent, while pods burst.
//!
//! The API is away, or late, or refuses, from before the burst begins until some time after. Nobody may be killed or
//! restarted for that. When it is over, spec, runtime and cgroup must come to say the same, and at last what they said
//! before.

use std::{path::Path, thread, time::Duration};

use anyhow::{Result, bail};
use bellows::{
    cgroup::{Cgroup, Limit},
    clock::now,
    ledger::Record as LedgerRecord,
};
use bellows_core::{Action, Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::{burst_words, log_uniform, mib},
    gate,
    pod_bursts::{ledger_of, results},
    record::{Records, parsed, percentile, rounded},
    runner::Probe,
};
use crate::{
    agent::Agent,
    api_proxy::{ApiProxy, Way},
    load::BurstResult,
    node::{ApiServer, Node, log_text},
    pods::{self, Cluster, Spec, reached, wait},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Times that each happens.
    #[arg(long, default_value_t = 20)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only one of each kind.
    #[arg(long)]
    few: bool,
    #[command(flatten)]
    server: ApiServer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Fault {
    /// Nothing: what the others are compared with.
    None,
    /// The API server is killed, and started again.
    ApiStopped,
    /// etcd stands still: the API server takes requests and does not answer.
    EtcdPaused,
    /// Each request of the agent arrives 5 s late.
    Late,
    /// Each resize is refused with this code.
    Refused(u16),
}

const FAULTS: [Fault; 7] = [
    Fault::None,
    Fault::ApiStopped,
    Fault::EtcdPaused,
    Fault::Late,
    Fault::Refused(409),
    Fault::Refused(429),
    Fault::Refused(500),
];

/// Away, silent, and refusing.
const FEW: [Fault; 3] = [Fault::ApiStopped, Fault::EtcdPaused, Fault::Refused(500)];

/// How long etcd stands still. In a longer time a second step may have to be raised by hand while the first may still be stored,
/// and kill (docs/harm.md; seen with 14 s).
const PAUSE_MS: u64 = 10_000;
/// A fault begins so long before its burst.
const BEFORE_MS: u64 = 1500;
const LATE: Duration = Duration::from_secs(5);
/// From its start until a container bursts that has no gate: time to be adopted.
const REST_MS: u64 = 9000;
/// How often the kubelet looks at each pod without a reason (`syncFrequency`, its default).
const SYNC: Nanos = Nanos::millis(60_000);
/// A fault must last for so long after a raise was asked for.
const LEAST: Nanos = Nanos::millis(3000);
const BURSTS: Duration = Duration::from_secs(60);
const AGREES: Duration = Duration::from_secs(120);
const RESTORED: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    fault: Fault,
    limit: Bytes,
    peak: Bytes,
    threads: u64,
    /// From the beginning of the fault to its end.
    lasts_ms: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    /// Whether it burst while the fault lasted, which begins when it is guarded.
    attempted: bool,
    /// `CLOCK_MONOTONIC`.
    fault_at: u64,
    over_at: u64,
    oom_kill: u64,
    restarts: i32,
    phase: String,
    said: Vec<BurstResult>,
    /// Raises that were written by hand.
    by_hand: usize,
    highest_limit: Bytes,
    /// From the end of the fault until spec, runtime and cgroup had one limit.
    agreed_ms: Option<u64>,
    /// The same until that was the original again, in the pod's cgroup, too.
    restored_ms: Option<u64>,
    ledger: Vec<LedgerRecord>,
    /// What the agent has logged meanwhile, where somebody was killed or the case was none.
    log: Vec<String>,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let kubeconfig = Path::new("/etc/kubernetes/through-proxy");
    let proxy = ApiProxy::start(pods::client(), kubeconfig)?;
    let mut bench = Bench {
        cluster,
        proxy,
        probe: Probe::start()?,
        server: options.server.clone(),
    };
    let mut agent = Agent::start_with(kubeconfig)?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    let faults = if options.few { &FEW[..] } else { &FAULTS };
    let cases = options.n * u64::try_from(faults.len())?;
    let faults = faults.iter().cycle();
    for (index, &fault) in (0..cases).zip(faults) {
        let limit = Bytes(mib(log_uniform(&mut random, 48.0, 128.0)).0 >> 20 << 20);
        let case = Case {
            index,
            seed: options.seed,
            fault,
            limit,
            peak: limit.per_mille(random.u64(2500..8000)).min(Bytes::mib(700)),
            threads: random.u64(1..=4),
            lasts_ms: match fault {
                Fault::EtcdPaused => PAUSE_MS,
                _ => random.u64(8000..14_000),
            },
        };
        let record = bench.case(case)?;
        node.check()?;
        agent.check()?;
        eprintln!(
            "case {index}: {fault:?}, limit {limit}, peak {}, {} threads: {} kills, {} restarts, {} raises by hand, agreed after {:?} ms, restored after {:?} ms{}",
            case.peak,
            case.threads,
            record.oom_kill,
            record.restarts,
            record.by_hand,
            record.agreed_ms,
            record.restored_ms,
            if record.attempted {
                ""
            } else {
                ", NOT ATTEMPTED"
            },
        );
        records.write(&record)?;
    }
    Ok(())
}

struct Bench {
    cluster: Cluster,
    proxy: ApiProxy,
    probe: Probe,
    server: ApiServer,
}

impl Bench {
    fn begin(&self, fault: Fault) -> Result<()> {
        match fault {
            Fault::None => Ok(()),
            Fault::ApiStopped => self.server.control("stop apiserver"),
            Fault::EtcdPaused => self.server.control("pause etcd"),
            Fault::Late => self.proxy.set(Way::Late(LATE)),
            Fault::Refused(code) => self.proxy.set(Way::Refused(code)),
        }
    }

    fn end(&self, fault: Fault) -> Result<()> {
        match fault {
            Fault::None => Ok(()),
            Fault::ApiStopped => {
                self.server.control("start apiserver")?;
                wait("the API server answers", Duration::from_secs(60), || {
                    Ok(self.cluster.events("nobody").is_ok())
                })
            }
            Fault::EtcdPaused => self.server.control("resume etcd"),
            Fault::Late | Fault::Refused(_) => self.proxy.set(Way::Through),
        }
    }

    fn case(&mut self, case: Case) -> Result<Record> {
        let name = format!("fault-{}", case.index);
        let spec = bursting_after(gate::closed(), &name, case.limit, case.peak, case.threads);
        self.cluster.create(&spec)?;
        let cgroup = self.cluster.wait_running(&name)?;
        // It may be gone in the end.
        let pod = path_of_pod(&cgroup)?;
        let logged = log_text("bellows").len();
        let watched = cgroup.clone();
        let sampler = self.probe.sample(move || Some(watched.clone()));
        gate::wait_braked(&cgroup)?;
        let fault_at = now();
        self.begin(case.fault)?;
        thread::sleep(Duration::from_millis(BEFORE_MS));
        gate::open(&cgroup)?;
        thread::sleep(Duration::from_millis(case.lasts_ms - BEFORE_MS));
        let over = now();
        // The API may be away until here.
        self.end(case.fault)?;
        let has_burst = ledger_of(cgroup.id()).iter().any(|record| {
            matches!(record, LedgerRecord::Intend { at, action: Action::Raise { .. }, .. } if *at > fault_at && over.since(*at) > LEAST)
        });
        let over_at = now();
        let is_over =
            || Ok(!self.cluster.is_running(&name)? || !results(&self.cluster, &name)?.is_empty());
        let burst = wait("the burst is over", BURSTS, is_over);
        let agreed_ms = self.wait_for(&name, over_at, AGREES, |limits| {
            limits[0].is_some() && limits.windows(2).all(|pair| pair[0] == pair[1])
        })?;
        let rest = Some(case.limit);
        let restored_ms = self.wait_for(&name, over_at, RESTORED, |limits| limits == [rest; 3])?;
        let pod_limit = pod.limit("memory.max").map(Limit::bytes);
        let is_pod_restored = pod_limit.is_ok_and(|limit| limit == case.limit);
        let track = sampler.finish();
        let ledger = ledger_of(cgroup.id());
        let by_hand = |record: &&LedgerRecord| {
            matches!(
                record,
                LedgerRecord::Intend {
                    action: Action::RaiseByHand { .. },
                    ..
                }
            )
        };
        let attempted = has_burst && burst.is_ok();
        let log = log_text("bellows");
        let since = log.get(logged..).unwrap_or(&log).lines();
        let log = since.filter(|_| !attempted || track.oom_kill > 0);
        let record = Record {
            case,
            attempted,
            fault_at: fault_at.0,
            over_at: over_at.0,
            oom_kill: track.oom_kill,
            restarts: self.cluster.restarts(&name)?,
            phase: self.cluster.phase(&name)?,
            said: results(&self.cluster, &name)?,
            by_hand: ledger.iter().filter(by_hand).count(),
            highest_limit: track
                .samples
                .iter()
                .map(|sample| Bytes(sample.limit))
                .fold(case.limit, Bytes::max),
            agreed_ms,
            restored_ms: restored_ms.filter(|_| is_pod_restored),
            ledger,
            log: log.map(str::to_owned).collect(),
        };
        self.cluster.delete(&name)?;
        Ok(record)
    }

    /// Waits for what spec, runtime and cgroup say of the limit; `None` if it does not come.
    fn wait_for(
        &self,
        name: &str,
        from: Nanos,
        limit: Duration,
        is_met: impl Fn(&[Option<Bytes>]) -> bool,
    ) -> Result<Option<u64>> {
        while Duration::from_nanos(now().since(from).0) < limit {
            let look = || Ok((self.cluster.is_running(name)?, self.limits(name)?));
            match reached(look())? {
                Some((false, _)) => return Ok(None),
                Some((true, limits)) if is_met(&limits) => {
                    return Ok(Some(now().since(from).as_millis()));
                }
                _ => {}
            }
            thread::sleep(Duration::from_millis(200));
        }
        eprintln!(
            "{name}: spec, runtime and cgroup have {:?}",
            self.limits(name)?
        );
        Ok(None)
    }

    /// What spec, runtime (by way of the pod's status, 1.33 and later) and cgroup have for a limit.
    fn limits(&self, name: &str) -> Result<[Option<Bytes>; 3]> {
        let [in_spec, in_runtime] = self.cluster.said_limits(name)?;
        let cgroup = self.cluster.cgroup(name)?;
        let in_force = cgroup.and_then(|cgroup| cgroup.limit("memory.max").map(Limit::bytes).ok());
        Ok([in_spec, in_runtime, in_force])
    }
}

/// A guarded pod that rests for [`REST_MS`], bursts, and is there long enough to be looked at.
pub(super) fn bursting(name: &str, limit: Bytes, peak: Bytes, threads: u64) -> Spec {
    let rest = ["--rest-ms".to_owned(), REST_MS.to_string()];
    bursting_after(rest, name, limit, peak, threads)
}

/// The same after such a rest.
fn bursting_after(rest: [String; 2], name: &str, limit: Bytes, peak: Bytes, threads: u64) -> Spec {
    let more = ["--hold-ms", "4000", "--after-ms", "240000"];
    let words = ["/bellows-guest", "load"].map(str::to_owned).into_iter();
    let words = words.chain(burst_words(limit.per_mille(500), peak, threads));
    let words = words.chain(rest);
    Spec {
        name: name.to_owned(),
        limit,
        max: Some(peak.per_mille(1500).page_floor()),
        command: words.chain(more.map(str::to_owned)).collect(),
        host: false,
        liveness: None,
        whole_pod: false,
        cpu: None,
        restarts: false,
        raise_first: false,
    }
}

pub(super) fn path_of_pod(cgroup: &Cgroup) -> Result<Cgroup> {
    match cgroup.path().parent() {
        Some(path) => Ok(Cgroup::open(path)?),
        None => bail!("a container is in a pod"),
    }
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let faulty = || {
        records
            .iter()
            .filter(|record| record.case.fault != Fault::None)
    };
    let agreed: Vec<f64> = faulty()
        .map(|record| record.agreed_ms.map_or(f64::INFINITY, |ms| ms as f64 / 1e3))
        .collect();
    let slowest = percentile(&agreed, 100.0);
    let syncs = slowest * 1e9 / SYNC.0 as f64;
    let finite = |value: f64| value.is_finite().then(|| rounded(value));
    let by_fault: Vec<Value> = FAULTS
        .iter()
        .map(|&fault| {
            let own = || records.iter().filter(move |record| record.case.fault == fault);
            json!({
                "fault": fault,
                "cases": own().count(),
                "kills": own().map(|record| record.oom_kill).sum::<u64>(),
                "by_hand": own().map(|record| record.by_hand).sum::<usize>(),
                "slowest_agreed_ms": own().filter_map(|record| record.agreed_ms).max(),
                "longest_gap_ms": own().flat_map(|record| &record.said).map(|said| said.longest_gap_us / 1000).max(),
            })
        })
        .collect();
    Ok(json!({
        "cases": records.len(),
        "attempts": records.iter().filter(|record| record.attempted).count(),
        "kills": records.iter().map(|record| record.oom_kill).sum::<u64>(),
        "failed": records.iter().filter(|record| record.phase != "Running").count(),
        "restarts": records.iter().map(|record| record.restarts).sum::<i32>(),
        "by_hand": records.iter().map(|record| record.by_hand).sum::<usize>(),
        "agree_max_s": finite(slowest),
        "agree_vs_sync": finite(syncs),
        "left_raised": records.iter().filter(|record| record.restored_ms.is_none()).count(),
        "by_fault": by_fault,
    }))
}
