//! `pod-bursts`: the same bursts in pods on a real kubelet; every raise goes through the API.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use bellows::{
    cgroup::{Cgroup, Limit},
    clock::now,
    explain::LEDGER,
    ledger::{self, Record as LedgerRecord},
};
use bellows_core::{Action, Bytes, CgroupId, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::{Kinds, burst_words, log_uniform, mib, overgrant, parse_kinds, thousandths},
    excused::{self, Ended},
    gate,
    record::{Records, fate, parsed, percentile, rounded},
    runner::{HugePages, Probe, set_thp},
};
use crate::{
    agent::Agent,
    load::{BurstResult, Kind},
    node::{ApiServer, Node, wait},
    pods::{Cluster, Spec, reached},
    sampler::Sample,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Cases.
    #[arg(long, default_value_t = 40)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Which cases run with transparent huge pages.
    #[arg(long, value_enum, default_value_t = HugePages::Never)]
    thp: HugePages,
    /// Most threads of a burst.
    #[arg(long, default_value_t = 4)]
    threads: u64,
    /// What grows: one kind, or `all` in turns.
    #[arg(long, value_parser = kinds_in_pods, default_value = "anonymous")]
    kind: Kinds,
    /// With the kubelet's MemoryQoS, throttling at 90 % of the way from request to limit.
    #[arg(long)]
    memory_qos: bool,
    /// Limits are raised first, and the API asked right after.
    #[arg(long)]
    raise_first: bool,
    /// Without the same burst at its maximum, which stalls are compared with.
    #[arg(long)]
    without_unlimited: bool,
    #[command(flatten)]
    server: ApiServer,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    limit: Bytes,
    peak: Bytes,
    max: Bytes,
    growth_per_mille: u64,
    kind: Kind,
    threads: u64,
    thp: bool,
    /// From the end of the burst to the next, which finds its limit raised, being lowered or lowered.
    again_after_ms: u64,
    raise_first: bool,
}

/// The kinds of growth without those that only a privileged container has: its own cgroups, and pipes for more
/// than 64 MiB (`fs.pipe-user-pages-soft`).
fn kinds_in_pods(text: &str) -> Result<Kinds, String> {
    let Kinds(mut kinds) = parse_kinds(text)?;
    kinds.retain(|kind| !matches!(kind, Kind::Nested | Kind::Kernel));
    if kinds.is_empty() {
        return Err(format!("{text} needs a privileged container"));
    }
    Ok(Kinds(kinds))
}

/// How one pod went.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) phase: String,
    reason: Option<String>,
    restarts: i32,
    pub(super) oom_kill: u64,
    /// Changes of its spec.
    pub(super) patches: i64,
    /// Times that the memory controller held a thread for 10 ms or more.
    pub(super) sleeps: u64,
    /// The longest time for which a CPU of the machine stood still shortly before it was killed.
    #[serde(default)]
    stood_still_us: u64,
    /// Milliseconds from when it was seen running to its end.
    pub(super) wall_ms: u64,
    /// What each burst said of itself.
    said: Vec<BurstResult>,
    pub(super) samples: Vec<Sample>,
    /// Milliseconds for which the API said less than the node had, and more.
    #[serde(default)]
    disagreed_ms: (u64, u64),
    /// Whether `memory.max` was the original again, and how long after the end of the last burst.
    restored_after_ms: Option<u64>,
    /// The ledger's records of this cgroup.
    ledger: Vec<LedgerRecord>,
}

impl Ended for Outcome {
    fn killed(&self) -> bool {
        self.killed()
    }

    fn stood_still(&self) -> Nanos {
        Nanos(self.stood_still_us * 1000)
    }
}

impl Outcome {
    pub(super) fn killed(&self) -> bool {
        self.oom_kill > 0 || self.phase == "Failed" || self.restarts > 0
    }

    /// Whether the agent adopted it.
    pub(super) fn was_guarded(&self) -> bool {
        is_adopted(&self.ledger)
    }

    pub(super) fn raises(&self) -> impl Iterator<Item = (Nanos, Bytes)> {
        raises(&self.ledger)
    }

    /// Raises of one of its bursts, of which the first is 0.
    fn raises_of(&self, burst: usize) -> impl Iterator<Item = (Nanos, Bytes)> {
        let end = |burst: usize| self.said.get(burst).map(|said| said.end_ns);
        let before = burst
            .checked_sub(1)
            .map(|before| end(before).unwrap_or(u64::MAX));
        let (before, end) = (before.unwrap_or(0), end(burst).unwrap_or(u64::MAX));
        self.raises()
            .filter(move |(at, _)| (before..end).contains(&at.0))
    }

    /// What it was granted from its start to the end of the first burst and, with `after`, on until
    /// that was taken back.
    fn first_samples(&self, after: bool) -> &[Sample] {
        let end = self
            .said
            .first()
            .map_or(u64::MAX, |said| said.end_ns / 1000);
        let burst = self.samples.partition_point(|sample| sample.at_us <= end);
        let lowered = self.samples[burst..]
            .windows(2)
            .position(|pair| pair[1].limit != pair[0].limit)
            .map_or(self.samples.len(), |index| burst + index + 1);
        &self.samples[..if after { lowered } else { burst }]
    }

    /// What the raises of one of its bursts took, in microseconds.
    fn api_times(&self, burst: usize) -> Vec<u64> {
        answers(self.raises_of(burst), &self.samples)
    }

    /// By how much longer a burst that was raised stood still than one without a limit, over the slowest raise until then:
    /// one for which a lowering is given up takes no time.
    fn stall(&self, burst: usize, unlimited: &Self) -> Option<f64> {
        let (with, without) = (self.said.get(burst)?, unlimited.said.first()?);
        self.raises_of(burst).next()?;
        let until_then = (0..=burst).flat_map(|burst| self.api_times(burst));
        let slowest = until_then.max()?.max(1);
        let longer = with.longest_gap_us.saturating_sub(without.longest_gap_us);
        Some(longer as f64 / slowest as f64)
    }
}

fn is_adopted(ledger: &[LedgerRecord]) -> bool {
    let adopts = |record: &LedgerRecord| matches!(record, LedgerRecord::Adopt { .. });
    ledger.iter().any(adopts)
}

/// Whether an agent that was started after `since` has adopted a cgroup.
pub(super) fn is_guarded_since(cgroup: &Cgroup, since: Nanos) -> bool {
    let ledger = ledger_of(cgroup.id());
    let mut records = ledger.iter();
    records.any(|record| matches!(record, LedgerRecord::Adopt { at, .. } if *at >= since))
}

/// Whether the agent has adopted a cgroup.
pub(super) fn is_guarded(cgroup: &Cgroup) -> bool {
    is_adopted(&ledger_of(cgroup.id()))
}

/// The raises in a ledger, and when they were asked for.
pub(super) fn raises(ledger: &[LedgerRecord]) -> impl Iterator<Item = (Nanos, Bytes)> {
    ledger.iter().filter_map(|record| match record {
        LedgerRecord::Intend {
            at,
            action: Action::Raise { to, .. },
            ..
        } => Some((*at, *to)),
        _ => None,
    })
}

/// For each raise, microseconds from its request to the new `memory.max` as seen from outside.
pub(super) fn answers(
    raises: impl Iterator<Item = (Nanos, Bytes)>,
    samples: &[Sample],
) -> Vec<u64> {
    raises
        .filter_map(|(at, to)| {
            let asked = at.0 / 1000;
            let seen = samples
                .iter()
                .find(|sample| sample.at_us >= asked && sample.limit >= to.page_floor().0)?;
            Some(seen.at_us - asked)
        })
        .collect()
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    unlimited: Option<Outcome>,
    fixed: Outcome,
    bellows: Outcome,
    /// Runs with Bellows that ended with a kill while the machine itself stood still.
    #[serde(default)]
    stood_still: Vec<Outcome>,
}

impl Record {
    /// Whether the second burst began while a lower limit was on its way, or just in force.
    fn second_while_lowering(&self) -> bool {
        let Some(first) = self.bellows.said.first() else {
            return false;
        };
        let second = Nanos(first.end_ns).0 + Nanos::millis(self.case.again_after_ms).0;
        self.bellows.ledger.iter().any(|record| {
            matches!(record, LedgerRecord::Intend { at, action: Action::Shrink { .. }, .. }
                if at.0 <= second && second - at.0 < Nanos::millis(1000).0)
        })
    }
}

const RESTORE_LIMIT: Duration = Duration::from_secs(60);
/// Time in which a pod must be guarded, however slow the machine.
const GUARDED: Duration = Duration::from_secs(60);
/// A pod that lasts longer is broken; the longest on purpose is a plateau of ten minutes.
const LONGEST: Nanos = Nanos::millis(1_800_000);

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let kubelet = if options.memory_qos {
        json!({ "featureGates": { "MemoryQoS": true }, "memoryThrottlingFactor": 0.9 })
    } else {
        json!({})
    };
    let mut node = Node::start_configured(&options.server, &kubelet)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let mut agent = Agent::start()?;
    let probe = Probe::start()?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    let Kinds(kinds) = &options.kind;
    let turns = kinds.len() as u64;
    for (index, &kind) in (0..options.n).zip(kinds.iter().cycle()) {
        let limit = Bytes(mib(log_uniform(&mut random, 64.0, 256.0)).0 >> 20 << 20);
        let growth_per_mille = thousandths(log_uniform(&mut random, 2.0, 16.0));
        let peak = limit.per_mille(growth_per_mille).min(Bytes::mib(2048));
        let case = Case {
            index,
            seed: options.seed,
            limit,
            peak,
            max: peak.per_mille(1500).page_floor(),
            growth_per_mille,
            kind,
            threads: random.u64(1..=options.threads),
            thp: options.thp.in_turn(index / turns, true),
            // The limit is lowered 5 s after the end of a burst, which takes the API half a second.
            again_after_ms: random.u64(4500..=7000),
            raise_first: options.raise_first,
        };
        set_thp(case.thp)?;
        let record = run_case(&cluster, &probe, case, options.without_unlimited)?;
        node.check()?;
        agent.check()?;
        eprintln!(
            "case {index}: {kind:?}, limit {limit}, peak {peak}, {} threads, thp {}: fixed {}, bellows {}, {} patches of {:?} ms, again after {} ms with {} more, restored after {:?} ms",
            case.threads,
            case.thp,
            fate(record.fixed.killed(), "killed"),
            fate(record.bellows.killed(), "KILLED"),
            record.bellows.raises_of(0).count(),
            record
                .bellows
                .api_times(0)
                .iter()
                .map(|us| us / 1000)
                .collect::<Vec<_>>(),
            case.again_after_ms,
            record.bellows.raises_of(1).count(),
            record.bellows.restored_after_ms,
        );
        records.write(&record)?;
    }
    Ok(())
}

fn run_case(
    cluster: &Cluster,
    probe: &Probe,
    case: Case,
    without_unlimited: bool,
) -> Result<Record> {
    let run = |variant, limit, max, before| {
        let name = excused::name(variant, case.index, before);
        run_pod(cluster, probe, case, name, limit, max)
    };
    let unlimited = || run("unlimited", case.max, None, 0);
    let unlimited = (!without_unlimited).then(unlimited).transpose()?;
    let fixed = run("fixed", case.limit, None, 0)?;
    let (bellows, stood_still) =
        excused::repeated(|before| run("bellows", case.limit, Some(case.max), before))?;
    Ok(Record {
        case,
        unlimited,
        fixed,
        bellows,
        stood_still,
    })
}

fn run_pod(
    cluster: &Cluster,
    probe: &Probe,
    case: Case,
    name: String,
    limit: Bytes,
    max: Option<Bytes>,
) -> Result<Outcome> {
    let words = burst_words(case.limit.per_mille(500), case.peak, case.threads);
    // Time for what comes of its start. What must have come is waited for at the gate.
    let mut command: Vec<String> = ["/bellows-guest", "load"]
        .into_iter()
        .map(str::to_owned)
        .chain(words)
        .chain(["--rest-ms", "4000", "--kind", &case.kind.text()].map(str::to_owned))
        .collect();
    if max.is_some() {
        let again = case.again_after_ms.to_string();
        command.extend(["--again-after-ms", &again, "--after-ms", "120000"].map(str::to_owned));
    }
    command.extend(gate::closed());
    observe(
        cluster,
        probe,
        &Spec {
            name,
            limit,
            max,
            command,
            host: false,
            liveness: None,
            whole_pod: false,
            cpu: None,
            restarts: false,
            raise_first: case.raise_first,
        },
        max.is_some().then_some(2),
    )
}

/// Runs a pod to its end, or until its limit is the original again after so many bursts, and
/// observes it from outside.
pub(super) fn observe(
    cluster: &Cluster,
    probe: &Probe,
    spec: &Spec,
    restored_after: Option<usize>,
) -> Result<Outcome> {
    let name = &spec.name;
    cluster.create(spec)?;
    let cgroup = cluster.wait_running(name)?;
    let watched = cgroup.clone();
    let sampler = probe.sample(move || Some(watched.clone()));
    let start = now();
    let looking = Looking::start(name, &cgroup);
    if spec.command.ends_with(&gate::closed()) {
        if spec.max.is_some() {
            wait("it is guarded", GUARDED, || Ok(is_guarded(&cgroup)))?;
            gate::wait_braked(&cgroup)?;
        }
        gate::open(&cgroup)?;
    }
    let restored_after_ms = wait_end(cluster, name, &cgroup, spec.limit, restored_after)?;
    let disagreed_ms = looking.finish()?;
    let wall_ms = now().since(start).as_millis();
    let track = sampler.finish();
    let stood_still = probe.stood_still_before_kill(&track);
    let pod = cluster.get(name)?;
    let status = cluster.status(name)?;
    let terminated = status
        .as_ref()
        .and_then(|status| status.state.as_ref()?.terminated.as_ref());
    let outcome = Outcome {
        phase: cluster.phase(name)?,
        reason: terminated
            .and_then(|state| state.reason.clone())
            .or_else(|| pod.status?.reason),
        restarts: status.as_ref().map_or(0, |status| status.restart_count),
        oom_kill: track.oom_kill,
        // The API counts the generations of a spec from 1.
        patches: pod.metadata.generation.unwrap_or(1) - 1,
        sleeps: track.sleeps,
        stood_still_us: stood_still.0 / 1000,
        wall_ms,
        said: results(cluster, name)?,
        samples: track.samples,
        disagreed_ms,
        restored_after_ms,
        ledger: if spec.max.is_some() {
            ledger_of(cgroup.id())
        } else {
            Vec::new()
        },
    };
    cluster.delete(name)?;
    Ok(outcome)
}

/// Looks what the API says of a limit while another has it in force.
struct Looking {
    is_over: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<(u64, u64)>>,
}

impl Looking {
    const LOOK: Duration = Duration::from_millis(25);

    fn start(name: &str, cgroup: &Cgroup) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let (name, cgroup, ended) = (name.to_owned(), cgroup.clone(), Arc::clone(&is_over));
        let thread = thread::spawn(move || {
            let cluster = Cluster::connect()?;
            let (mut less, mut more) = (Duration::ZERO, Duration::ZERO);
            let mut last = Instant::now();
            while !ended.load(Ordering::Relaxed) {
                thread::sleep(Self::LOOK);
                let (Ok([Some(says), _]), Ok(Limit::At(has))) =
                    (cluster.said_limits(&name), cgroup.limit("memory.max"))
                else {
                    last = Instant::now();
                    continue;
                };
                let passed = last.elapsed();
                last = Instant::now();
                match says.cmp(&has) {
                    std::cmp::Ordering::Less => less += passed,
                    std::cmp::Ordering::Greater => more += passed,
                    std::cmp::Ordering::Equal => {}
                }
            }
            let ms = |time: Duration| u64::try_from(time.as_millis());
            Ok((ms(less)?, ms(more)?))
        });
        Self { is_over, thread }
    }

    fn finish(self) -> Result<(u64, u64)> {
        self.is_over.store(true, Ordering::Relaxed);
        let looked = self.thread.join();
        looked.unwrap_or_else(|_| bail!("whoever looks at the API has panicked"))
    }
}

/// What each burst said when it was over.
pub(super) fn results(cluster: &Cluster, name: &str) -> Result<Vec<BurstResult>> {
    Ok(cluster
        .said(name)?
        .into_iter()
        .filter_map(|value| serde_json::from_value(value).ok())
        .collect())
}

/// Waits until the pod has ended or, for a guarded one, until its limit is the original again after
/// so many bursts.
fn wait_end(
    cluster: &Cluster,
    name: &str,
    cgroup: &Cgroup,
    original: Bytes,
    restored_after: Option<usize>,
) -> Result<Option<u64>> {
    let start = now();
    while now().since(start) < LONGEST {
        thread::sleep(Duration::from_millis(200));
        let Some(is_running) = reached(cluster.is_running(name))? else {
            continue;
        };
        if !is_running {
            return Ok(None);
        }
        let Some(bursts) = restored_after else {
            continue;
        };
        let said = reached(results(cluster, name))?.unwrap_or_default();
        let Some(last) = said.get(bursts - 1) else {
            continue;
        };
        let after = now().since(Nanos(last.end_ns));
        let limit = cgroup.limit("memory.max").map(Limit::bytes);
        if limit.is_ok_and(|limit| limit == original) {
            return Ok(Some(after.as_millis()));
        }
        if after.0 > u64::try_from(RESTORE_LIMIT.as_nanos())? {
            return Ok(None);
        }
    }
    Ok(None)
}

/// What the agent's ledger says of a cgroup.
pub(super) fn ledger_of(cgroup: CgroupId) -> Vec<LedgerRecord> {
    let path = Path::new(LEDGER);
    let read = |path: &Path| ledger::read(path).unwrap_or_default().records;
    let records = [read(&ledger::previous(path)), read(path)].concat();
    records
        .into_iter()
        .filter(|record| record.cgroup() == cgroup)
        .collect()
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let count =
        |matches: &dyn Fn(&Record) -> bool| records.iter().filter(|record| matches(record)).count();
    let (mut stalls, mut times) = (Vec::new(), Vec::new());
    let (mut second_stalls, mut second_times) = (Vec::new(), Vec::new());
    let (mut overgrants, mut growing) = (Vec::new(), Vec::new());
    for Record {
        case,
        unlimited,
        bellows,
        ..
    } in &records
    {
        overgrants.extend(overgrant(bellows.first_samples(true), case.limit));
        growing.extend(overgrant(bellows.first_samples(false), case.limit));
        let seconds = |us: u64| us as f64 / 1e6;
        times.extend(bellows.api_times(0).into_iter().map(seconds));
        second_times.extend(bellows.api_times(1).into_iter().map(seconds));
        let stall = |burst| bellows.stall(burst, unlimited.as_ref()?);
        stalls.extend(stall(0));
        second_stalls.extend(stall(1));
    }
    let sleeps: Vec<f64> = records
        .iter()
        .map(|record| record.bellows.sleeps as f64)
        .collect();
    let less = |record: &Record| record.bellows.disagreed_ms.0 as f64;
    let less: Vec<f64> = records.iter().map(less).collect();
    let gap = |record: &Record| Some(record.bellows.said.first()?.longest_gap_us as f64 / 1000.0);
    let gaps: Vec<f64> = records.iter().filter_map(gap).collect();
    let patches = |most: u64| {
        let within = records
            .iter()
            .filter(|record| record.case.growth_per_mille <= most);
        within
            .map(|record| record.bellows.raises_of(0).count())
            .max()
    };
    let p = |values: &[f64], percent| rounded(percentile(values, percent));
    let is_tried = records.iter().any(|record| record.unlimited.is_some());
    let kills_unlimited =
        is_tried.then(|| count(&|record| record.unlimited.as_ref().is_some_and(Outcome::killed)));
    Ok(json!({
        "bursts": records.len(),
        "kills_without": count(&|record| record.fixed.killed()),
        "kills_with": count(&|record| record.bellows.killed()),
        "kills_unlimited": kills_unlimited,
        "restarts": records.iter().map(|record| record.bellows.restarts).sum::<i32>(),
        "stood_still": records.iter().map(|record| record.stood_still.len()).sum::<usize>(),
        "raise_patches_max_x8": patches(8000),
        "raise_patches_max_x16": patches(16000),
        "stall_vs_api_p50": p(&stalls, 50.0),
        "stall_vs_api_max": p(&stalls, 100.0),
        "api_seconds_p50": p(&times, 50.0),
        "api_seconds_max": p(&times, 100.0),
        "longest_gap_ms_p50": p(&gaps, 50.0),
        "longest_gap_ms_max": p(&gaps, 100.0),
        "api_says_less_ms_p50": p(&less, 50.0),
        "api_says_less_ms_max": p(&less, 100.0),
        "restored": count(&|record| record.bellows.restored_after_ms.is_some()),
        "kills_shrinking": count(&|record| record.bellows.killed() && !record.bellows.said.is_empty()),
        "stall_vs_api_second_p50": p(&second_stalls, 50.0),
        "stall_vs_api_second_max": p(&second_stalls, 100.0),
        "api_seconds_second_p50": p(&second_times, 50.0),
        "api_seconds_second_max": p(&second_times, 100.0),
        "raise_patches_second_max": records.iter().map(|record| record.bellows.raises_of(1).count()).max(),
        "second_bursts": count(&|record| record.bellows.said.len() > 1),
        "second_while_lowering": count(&Record::second_while_lowering),
        "sleeps_p50": p(&sleeps, 50.0),
        "overgrant_p50": p(&overgrants, 50.0),
        "overgrant_max": p(&overgrants, 100.0),
        "overgrant_growing_p50": p(&growing, 50.0),
    }))
}
