//! `faults`: what happens to a node under its agent, while a container bursts.
//!
//! A container that is killed although its agent lived was killed for want of care (`avoidable_kills`). After a fault
//! cgroup, pod and runtime must agree soon, compared with what the runtime itself takes for an update, and all be at
//! rest in the end. Whatever the agent has lost on the way must be seen in its metrics.

mod bed;

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::Result;
use bellows::{attribution::CGROUP_ROOT, cgroup::Cgroup, clock::now};
use bellows_core::{Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::bed::Bed;
use super::{
    excused,
    record::{Records, parsed, percentile, rounded},
    runner::Probe,
};
use crate::{
    containers::{Machine, Spec},
    node::{CONTAINERD_SOCKET, has_systemd, shell},
    proxy,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Times that each happens.
    #[arg(long, default_value_t = 3)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only what no other bench has.
    #[arg(long)]
    few: bool,
}

/// What the agent was doing when it was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Step {
    /// Its container is at rest.
    Rest,
    /// Its container is held.
    Held,
    /// A raise is written down, and not in force.
    Asked,
    /// A raise is in force.
    Raised,
    /// A lowering is written down, and not in force.
    Lowering,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Fault {
    /// containerd is killed, and started again.
    RuntimeKilled,
    /// What containerd is asked arrives 10 s late.
    RequestsLate,
    /// What it answers does.
    AnswersLate,
    /// systemd reads its units again.
    DaemonReload,
    /// The file system of the agent's state is full.
    StateFull,
    /// The agent gets no CPU while more begins than a ring holds, this container among it.
    RingOverflow,
    /// SIGKILL of all of the agent, which is started again.
    AgentKilled(Step),
}

const FAULTS: [Fault; 11] = [
    Fault::RuntimeKilled,
    Fault::RequestsLate,
    Fault::AnswersLate,
    Fault::DaemonReload,
    Fault::StateFull,
    Fault::RingOverflow,
    Fault::AgentKilled(Step::Rest),
    Fault::AgentKilled(Step::Held),
    Fault::AgentKilled(Step::Asked),
    Fault::AgentKilled(Step::Raised),
    Fault::AgentKilled(Step::Lowering),
];

impl Fault {
    /// Whether something like it is in no other bench: a runtime that hangs is in `container-edges`, deaths while it rests
    /// or holds in `deaths`.
    fn is_only_here(self) -> bool {
        ![
            Self::RequestsLate,
            Self::AnswersLate,
            Self::AgentKilled(Step::Rest),
            Self::AgentKilled(Step::Held),
            Self::AgentKilled(Step::Asked),
        ]
        .contains(&self)
    }

    /// Whether it must be there while the container bursts. Two of the others are over before that, by what they are, and a
    /// limit comes down after it.
    fn meets_burst(self) -> bool {
        ![
            Self::RingOverflow,
            Self::AgentKilled(Step::Rest),
            Self::AgentKilled(Step::Lowering),
        ]
        .contains(&self)
    }

    /// The metric that must tell of it.
    const fn metric(self) -> Option<&'static str> {
        match self {
            Self::RuntimeKilled => Some("runtime_failures"),
            Self::RequestsLate | Self::AnswersLate => Some("runtime_late"),
            Self::StateFull => Some("state_full"),
            Self::RingOverflow => Some("events_lost"),
            Self::DaemonReload | Self::AgentKilled(_) => None,
        }
    }
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    fault: Fault,
    limit: Bytes,
    peak: Bytes,
    threads: u64,
    /// Whether it comes before the burst, where it lasts until that; else after the burst's begin.
    is_first: bool,
    /// Milliseconds from the one to the other, where nothing else is waited for.
    after_ms: u64,
    /// How long it lasts.
    lasts_ms: u64,
}

/// When something was so, `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Times {
    fault: u64,
    over: u64,
    /// From when to when there was no agent that guarded it.
    unguarded: Option<(u64, u64)>,
    /// Whether a raise was in force before what comes after the fault is looked at.
    is_raised: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    /// Whether the moment for it came, and it was there while the container burst.
    attempted: bool,
    /// What the load has said, such as when its burst began and ended.
    said: Vec<Value>,
    times: Times,
    oom_kill: u64,
    /// When its first kill was seen.
    killed_at: u64,
    /// The longest time for which a CPU of the machine stood still shortly before that.
    #[serde(default)]
    stood_still_before_kill_us: u64,
    /// From the fault's end, or from the first raise where that came later, until cgroup, pod and runtime agreed, and
    /// nobody was held; `None` if it was dead.
    agreed_ms: Option<u64>,
    /// From the end of its burst, or of the fault, until all was as before.
    restored_ms: Option<u64>,
    /// What was wrong at the end.
    wrong: Vec<String>,
    /// By how much metrics have grown.
    counted: BTreeMap<String, f64>,
}

impl Record {
    /// Whether it was killed while its agent lived, or could have.
    fn is_avoidable(&self) -> bool {
        let is_unguarded = |(from, to)| (from..=to).contains(&self.killed_at);
        self.oom_kill > 0 && !self.times.unguarded.is_some_and(is_unguarded) && !self.is_excused()
    }

    /// Whether it was killed while the machine itself stood still.
    fn is_excused(&self) -> bool {
        let stood_still = Nanos(self.stood_still_before_kill_us * 1000);
        self.oom_kill > 0 && excused::is_excuse(stood_still)
    }

    fn is_uncounted(&self) -> bool {
        let metric = self.case.fault.metric();
        metric.is_some_and(|metric| self.counted.get(metric).is_none_or(|&grown| grown <= 0.0))
    }
}

/// How long updates took that nobody disturbed, in milliseconds.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    Case(Box<Record>),
    Updates(Vec<u64>),
}

const SOCKET: &str = "/run/late/late.sock";
/// Where the agent has its state.
const STATE: &str = "/run/bellows";
const UPDATES: u64 = 20;

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    // Small enough to be filled.
    fs::create_dir_all(STATE)?;
    shell(&format!("mount -t tmpfs -o size=8m tmpfs {STATE}"))?;
    let mut machine = Machine::start()?;
    let delays = proxy::start(Path::new(SOCKET), Path::new(CONTAINERD_SOCKET))?;
    let updates = time_updates(&mut machine)?;
    eprintln!("updates took {updates:?} ms");
    records.write(&Line::Updates(updates))?;
    let mut bed = Bed {
        agent: None,
        cgroup: Cgroup::open(Path::new(CGROUP_ROOT))?.create_child("agent-under-test")?,
        machine,
        delays,
        probe: Probe::start()?,
    };
    bed.start_agent()?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    let is_possible = |fault: &Fault| {
        (*fault != Fault::DaemonReload || has_systemd()) && (!options.few || fault.is_only_here())
    };
    let possible = FAULTS.into_iter().filter(is_possible);
    let possible: Vec<Fault> = possible.collect();
    for round in 0..options.n {
        for (number, &fault) in possible.iter().enumerate() {
            let limit = Bytes::mib(random.u64(32..=96));
            let case = Case {
                index: round * u64::try_from(possible.len())? + u64::try_from(number)?,
                seed: options.seed,
                fault,
                limit,
                peak: limit.scaled(random.u64(3..=6), 1),
                threads: random.u64(1..=4),
                is_first: random.bool(),
                after_ms: random.u64(0..=300),
                lasts_ms: random.u64(1000..=6000),
            };
            let record = bed.run_case(case)?;
            eprintln!("case {}: {record:?}", case.index);
            records.write(&Line::Case(Box::new(record)))?;
        }
    }
    Ok(())
}

/// How long the runtime takes for updates of a container that does nothing.
fn time_updates(machine: &mut Machine) -> Result<Vec<u64>> {
    let command = ["/bellows-guest", "load", "pause"].map(str::to_owned);
    let started = machine.run(&Spec {
        limit: Some(Bytes::mib(64)),
        ..Spec::of("updated", command.to_vec())
    })?;
    let mut took = Vec::new();
    for number in 0..UPDATES {
        let begun = now();
        machine.update(&started, Bytes::mib(64 + number % 2))?;
        took.push(now().since(begun).as_millis());
    }
    machine.remove(&started)?;
    Ok(took)
}

/// Whether a burst had begun before a fault was over, and was not over before the fault; by what the load has said.
fn is_between(said: &[Value], times: Times) -> bool {
    let of = |key: &str| said.iter().find_map(|said| said[key].as_u64());
    let has_begun = of("start_ns").is_some_and(|begun| begun <= times.over);
    // One that was killed has not said when it ended.
    has_begun && of("end_ns").is_none_or(|ended| ended >= times.fault)
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let lines: Vec<Line> = parsed(records)?;
    let (mut cases, mut updates) = (Vec::new(), Vec::new());
    for line in &lines {
        match line {
            Line::Case(record) => cases.push(record),
            Line::Updates(took) => updates.extend(took.iter().map(|&ms| ms as f64)),
        }
    }
    let count = |is: &dyn Fn(&Record) -> bool| cases.iter().filter(|record| is(record)).count();
    let p99 = percentile(&updates, 99.0);
    let agreed = cases.iter().filter_map(|record| record.agreed_ms);
    let agreed: Vec<f64> = agreed.map(|ms| ms as f64).collect();
    let mut by_fault = BTreeMap::<String, (u64, f64)>::new();
    for record in &cases {
        let (attempts, slowest) = by_fault
            .entry(format!("{:?}", record.case.fault))
            .or_default();
        *attempts += u64::from(record.attempted);
        *slowest = slowest.max(record.agreed_ms.unwrap_or(0) as f64 / p99);
    }
    let by_fault = by_fault.into_iter().map(|(fault, (attempts, slowest))| {
        let told = json!({ "attempts": attempts, "recovery_vs_cri": rounded(slowest) });
        (fault, told)
    });
    let unguarded = cases.iter().filter_map(|record| {
        let (from, to) = record.times.unguarded?;
        Some(to - from)
    });
    let never = |record: &Record| record.oom_kill == 0 && record.agreed_ms.is_none();
    Ok(json!({
        "attempts": count(&|record| record.attempted),
        "moments_missed": count(&|record| !record.attempted),
        "kills": count(&|record| record.oom_kill > 0),
        "avoidable_kills": count(&Record::is_avoidable),
        "stood_still": count(&Record::is_excused),
        "never_agreed": count(&never),
        "unguarded_max_s": rounded(unguarded.max().unwrap_or(0) as f64 / 1e9),
        "recovery_vs_cri_p99": rounded(percentile(&agreed, 99.0) / p99),
        "cri_p99_s": rounded(p99 / 1000.0),
        "wrong_state": count(&|record| !record.wrong.is_empty()),
        "losses_uncounted": count(&Record::is_uncounted),
        "by_fault": by_fault.collect::<serde_json::Map<_, _>>(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_meets_a_burst_that_it_overlaps() {
        let times = Times {
            fault: 100,
            over: 200,
            ..Times::default()
        };
        let said = |begun: u64, ended: Option<u64>| {
            let begun = [json!({ "start_ns": begun })].into_iter();
            let ended = ended.map(|ended| json!({ "end_ns": ended }));
            begun.chain(ended).collect::<Vec<_>>()
        };
        assert!(is_between(&said(150, Some(300)), times));
        assert!(is_between(&said(50, Some(150)), times));
        assert!(is_between(&said(50, None), times), "it was killed");
        assert!(!is_between(&said(201, Some(300)), times), "it came later");
        assert!(!is_between(&said(50, Some(99)), times), "it was over");
        assert!(!is_between(&[], times), "there was none");
    }
}
