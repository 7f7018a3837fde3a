//! `pod-kill`: the agent is killed at each step of a resize of a pod, all of it at once as when its pod is deleted by force,
//! and started again: whatever it was doing, spec, runtime, cgroup and the pod's cgroup are at last what they were.
//!
//! A container may die in the seconds without an agent, as it would without Bellows. That is counted, and what is left of
//! it must go, too.

use std::{path::Path, thread, time::Duration};

use anyhow::Result;
use bellows::{
    actuate::by_hand::ByHands,
    cgroup::{Cgroup, Limit},
    clock::now,
    ledger::Record as LedgerRecord,
};
use bellows_core::{Action, Bytes, Nanos, pod::ORIGINAL, quantity};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::{log_uniform, mib},
    deaths::is_held,
    pod_bursts::{ledger_of, results},
    pod_faults::{bursting, path_of_pod},
    record::{Records, parsed, rounded},
};
use crate::{
    agent::Agent,
    api_proxy::{ApiProxy, Way},
    node::{ApiServer, Node, wait},
    pods::{self, Cluster},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Cases, of all steps in turn.
    #[arg(long, default_value_t = 40)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    server: ApiServer,
}

/// What the agent was doing when it was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Step {
    /// Its container is held.
    Held,
    /// A raise is written down, and not in force.
    Asked,
    /// A raise is in force.
    Raised,
    /// A raise is in force that the API refuses to hear of.
    ByHand,
    /// A lowering is written down, and not in force.
    Lowering,
    /// The same of a limit that was raised by hand.
    LoweringByHand,
}

const STEPS: [Step; 6] = [
    Step::Held,
    Step::Asked,
    Step::Raised,
    Step::ByHand,
    Step::Lowering,
    Step::LoweringByHand,
];

impl Step {
    const fn is_by_hand(self) -> bool {
        matches!(self, Self::ByHand | Self::LoweringByHand)
    }
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    step: Step,
    limit: Bytes,
    peak: Bytes,
    threads: u64,
    /// Milliseconds from the kill to the start of the next agent.
    away_ms: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    /// Whether the step was seen.
    attempted: bool,
    /// What spec, runtime, cgroup and pod had when the agent was killed.
    at_kill: [Option<Bytes>; 4],
    /// Whether its container died.
    is_dead: bool,
    /// From the start of the next agent, or the end of the burst where that came later, until all was as before.
    restored_ms: Option<u64>,
    /// What was wrong at the end.
    wrong: Vec<String>,
}

const STEP: Duration = Duration::from_secs(60);
const RESTORED: Duration = Duration::from_secs(120);

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let kubeconfig = Path::new("/etc/kubernetes/through-proxy");
    let proxy = ApiProxy::start(pods::client(), kubeconfig)?;
    let mut bench = Bench {
        cluster,
        proxy,
        agent: Agent::start_with(kubeconfig)?,
    };
    let mut random = fastrand::Rng::with_seed(options.seed);
    for (index, &step) in (0..options.n).zip(STEPS.iter().cycle()) {
        let limit = Bytes(mib(log_uniform(&mut random, 48.0, 128.0)).0 >> 20 << 20);
        let record = bench.case(Case {
            index,
            seed: options.seed,
            step,
            limit,
            peak: limit.per_mille(random.u64(2500..6000)),
            threads: random.u64(1..=4),
            away_ms: random.u64(0..=3000),
        })?;
        node.check()?;
        bench.agent.check()?;
        eprintln!("case {index}: {record:?}");
        records.write(&record)?;
    }
    Ok(())
}

struct Bench {
    cluster: Cluster,
    proxy: ApiProxy,
    agent: Agent,
}

impl Bench {
    fn case(&mut self, case: Case) -> Result<Record> {
        let name = format!("kill-{}", case.index);
        let spec = bursting(&name, case.limit, case.peak, case.threads);
        self.cluster.create(&spec)?;
        let cgroup = self.cluster.wait_running(&name)?;
        let pod = path_of_pod(&cgroup)?;
        wait("it is guarded", Duration::from_secs(30), || {
            Ok(!ledger_of(cgroup.id()).is_empty())
        })?;
        if case.step.is_by_hand() {
            self.proxy.set(Way::Refused(500))?;
        }
        let attempted = wait_for(case, &cgroup);
        self.agent.kill_all()?;
        let at_kill = self.limits(&name, &cgroup, &pod)?;
        thread::sleep(Duration::from_millis(case.away_ms));
        self.proxy.set(Way::Through)?;
        self.agent.start_again()?;
        let started = now();
        let mut record = Record {
            case,
            attempted,
            at_kill,
            is_dead: false,
            restored_ms: None,
            wrong: Vec::new(),
        };
        while Duration::from_nanos(now().since(started).0) < RESTORED {
            record.is_dead = !self.cluster.is_running(&name)?;
            // Before the burst is over all may be well for a moment, and what was begun is yet to come.
            let burst = results(&self.cluster, &name)?.first().copied();
            let is_over = record.is_dead || burst.is_some();
            record.wrong = self.wrong(&name, case.limit, &cgroup, &pod, record.is_dead)?;
            if !is_over {
                record.wrong.push("its burst is not over".to_owned());
            }
            if record.wrong.is_empty() {
                let end = burst.map_or(started, |burst| Nanos(burst.end_ns).max(started));
                record.restored_ms = Some(now().since(end).as_millis());
                break;
            }
            thread::sleep(Duration::from_millis(200));
        }
        self.cluster.delete(&name)?;
        Ok(record)
    }

    /// What spec, runtime, cgroup and pod have for a limit.
    fn limits(&self, name: &str, cgroup: &Cgroup, pod: &Cgroup) -> Result<[Option<Bytes>; 4]> {
        let [spec, runtime] = self.cluster.said_limits(name)?;
        let of = |cgroup: &Cgroup| cgroup.limit("memory.max").map(Limit::bytes).ok();
        Ok([spec, runtime, of(cgroup), of(pod)])
    }

    fn wrong(
        &self,
        name: &str,
        limit: Bytes,
        cgroup: &Cgroup,
        pod: &Cgroup,
        is_dead: bool,
    ) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        if ByHands::default().contains(cgroup.path()) {
            wrong.push("it is written down as raised by hand".to_owned());
        }
        if is_dead {
            return Ok(wrong);
        }
        let limits = self.limits(name, cgroup, pod)?;
        if limits != [Some(limit); 4] {
            wrong.push(format!("spec, runtime, cgroup and pod have {limits:?}"));
        }
        if is_held(cgroup) {
            wrong.push("it is held".to_owned());
        }
        let original = self.cluster.get(name)?.metadata.annotations;
        let original = original.and_then(|all| all.get(ORIGINAL).cloned());
        let meant = format!("load={}", quantity::format(limit));
        if original.as_ref() != Some(&meant) {
            wrong.push(format!("its original is {original:?}"));
        }
        Ok(wrong)
    }
}

/// Waits for the moment; returns whether it came.
fn wait_for(case: Case, cgroup: &Cgroup) -> bool {
    let begun = now();
    let limit = || cgroup.limit("memory.max").map(Limit::bytes).ok();
    let intends = |wanted: fn(&Action) -> bool| {
        ledger_of(cgroup.id())
            .iter()
            .any(|record| matches!(record, LedgerRecord::Intend { action, .. } if wanted(action)))
    };
    let by_hand = || ByHands::default().contains(cgroup.path());
    let is_raised = || limit().is_some_and(|limit| limit > case.limit);
    let lowers = || intends(|action| matches!(action, Action::Shrink { .. })) && is_raised();
    while Duration::from_nanos(now().since(begun).0) < STEP {
        let is_now = match case.step {
            Step::Held => is_held(cgroup),
            Step::Asked => intends(|action| matches!(action, Action::Raise { .. })) && !is_raised(),
            Step::Raised => is_raised(),
            Step::ByHand => by_hand() && is_raised(),
            Step::Lowering => lowers(),
            Step::LoweringByHand => by_hand() && lowers(),
        };
        if is_now {
            return true;
        }
        thread::sleep(Duration::from_millis(1));
    }
    false
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let restored = records.iter().filter_map(|record| record.restored_ms).max();
    let by_step: Vec<Value> = STEPS
        .iter()
        .map(|&step| {
            let own = || {
                records
                    .iter()
                    .filter(move |record| record.case.step == step)
            };
            json!({
                "step": step,
                "attempts": own().filter(|record| record.attempted).count(),
                "dead": own().filter(|record| record.is_dead).count(),
                "wrong": own().filter(|record| !record.wrong.is_empty()).count(),
            })
        })
        .collect();
    Ok(json!({
        "cases": records.len(),
        "attempts": records.iter().filter(|record| record.attempted).count(),
        "wrong_state_after_restart": records.iter().filter(|record| !record.wrong.is_empty()).count(),
        "dead": records.iter().filter(|record| record.is_dead).count(),
        "restored_max_s": restored.map(|ms| rounded(ms as f64 / 1000.0)),
        "by_step": by_step,
    }))
}
