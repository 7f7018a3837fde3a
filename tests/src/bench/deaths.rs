//! `kill` and `deaths`: the agent dies while it guards a pod, and is started again.
//!
//! `kill` ends all of `bellows run` at once and starts it again a second later; nobody else is there.
//! `deaths` ends it in every way that it can end, with a releaser beside it as in a DaemonSet, and
//! measures how long brake and hold outlive it.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::Result;
use bellows::{
    cgroup::{Cgroup, Limit},
    clock::now,
    explain::LEDGER,
    ledger,
};
use bellows_core::{Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    bursts::burst_words,
    gate,
    pod_bursts::results,
    record::{Records, parsed, rounded},
    runner::set_thp,
};
use crate::{
    agent::{Agent, Death, Releaser},
    heartbeat::Heartbeat,
    node::{ApiServer, Node},
    pods::{Cluster, Spec, reached, wait},
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

/// What the guarded pod is doing when the agent dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Moment {
    /// Resting below its brake.
    Rest,
    /// A random instant of a burst.
    Burst,
    /// A random instant of a hold, if the burst is held at all.
    Hold,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    limit: Bytes,
    peak: Bytes,
    threads: u64,
    moment: Moment,
    /// Milliseconds into that moment.
    delay_ms: u64,
    death: Death,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    /// Whether the container was frozen when the agent died.
    held: bool,
    /// Whether it was braked or frozen then.
    restrained: bool,
    /// Milliseconds from the death until brake and hold were seen lifted, with nobody started again; of no meaning
    /// for one that was not restrained.
    released_after_death_ms: Option<u64>,
    /// The longest time, in milliseconds, for which a CPU of the machine stood still meanwhile.
    stood_still_ms: u64,
    /// Milliseconds from the new agent's start until brake and hold of the old one were seen lifted.
    released_after_start_ms: Option<u64>,
    phase: String,
    /// The limit a minute after the end of the burst at the latest; `None` if the pod is dead.
    limit_after: Option<u64>,
    /// Whether the new agent guards the pod.
    guarded_again: bool,
    /// Lines of the ledgers, but for torn ends.
    unreadable: usize,
}

pub(crate) fn run_kill(options: &Options, records: &mut Records) -> Result<()> {
    let cases = |index: u64, random: &mut fastrand::Rng| {
        if index.is_multiple_of(2) {
            (Moment::Burst, random.u64(0..=2000), Death::All)
        } else {
            (Moment::Hold, random.u64(0..=100), Death::All)
        }
    };
    run(options, records, None, cases)
}

pub(crate) fn run_deaths(options: &Options, records: &mut Records) -> Result<()> {
    let cases = |index: u64, random: &mut fastrand::Rng| {
        let moment = if index.is_multiple_of(2) {
            Moment::Rest
        } else {
            Moment::Hold
        };
        let deaths = Death::ALL;
        let death = deaths[usize::try_from(index / 2).unwrap_or(0) % deaths.len()];
        (moment, random.u64(0..=100), death)
    };
    run(options, records, Some(Releaser::start()?), cases)
}

fn run(
    options: &Options,
    records: &mut Records,
    mut releaser: Option<Releaser>,
    cases: impl Fn(u64, &mut fastrand::Rng) -> (Moment, u64, Death),
) -> Result<()> {
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    set_thp(false)?;
    let mut agent = Agent::start()?;
    let heartbeat = Heartbeat::start()?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    for index in 0..options.n {
        let limit = Bytes::mib(random.u64(64..=160));
        let peak = limit.scaled(random.u64(4..=8), 1);
        let threads = random.u64(1..=4);
        let (moment, delay_ms, death) = cases(index, &mut random);
        let case = Case {
            index,
            seed: options.seed,
            limit,
            peak,
            threads,
            moment,
            delay_ms,
            death,
        };
        let record = run_case(&cluster, &mut agent, &heartbeat, releaser.is_some(), case)?;
        eprintln!("case {index}: {record:?}");
        records.write(&record)?;
        node.check()?;
        if let Some(releaser) = &mut releaser {
            releaser.check()?;
        }
    }
    Ok(())
}

fn run_case(
    cluster: &Cluster,
    agent: &mut Agent,
    heartbeat: &Heartbeat,
    with_releaser: bool,
    case: Case,
) -> Result<Record> {
    let name = format!("death-{}", case.index);
    let cgroup = start_pod(cluster, &name, case)?;
    wait_for(cluster, &name, &cgroup, case)?;
    // Before the death: a releaser may be sooner than the next look.
    let held = is_held(&cgroup);
    let restrained = held
        || cgroup
            .limit("memory.high")
            .is_ok_and(|high| high != Limit::Max);
    let died = now();
    agent.die(case.death)?;
    let released_after_death_ms = if with_releaser {
        released(&cgroup, died)
    } else {
        thread::sleep(Duration::from_secs(1));
        None
    };
    let stood_still_ms = heartbeat.longest_after(died, now()).as_millis();
    agent.end()?;
    let unreadable = [LEDGER.into(), ledger::previous(Path::new(LEDGER))]
        .map(|path| unreadable(&path))
        .into_iter()
        .sum();
    let started = now();
    agent.start_again()?;
    let released_after_start_ms = (!with_releaser)
        .then(|| released(&cgroup, started))
        .flatten();
    let guarded_again = guarded_again(&cgroup, case.limit);
    let limit_after = if case.moment == Moment::Rest {
        cgroup.limit("memory.max").ok().map(|limit| limit.bytes().0)
    } else {
        limit_after(cluster, &name, &cgroup, case.limit)?
    };
    let phase = cluster.phase(&name)?;
    cluster.delete(&name)?;
    Ok(Record {
        case,
        held,
        restrained,
        released_after_death_ms,
        stood_still_ms,
        released_after_start_ms,
        phase,
        limit_after,
        guarded_again,
        unreadable,
    })
}

/// Lines of a ledger that cannot be read, but for a last one without an end: that is torn by the death, and was never written.
fn unreadable(path: &Path) -> usize {
    let bytes = fs::read(path).unwrap_or_default();
    let whole = bytes.iter().rposition(|&byte| byte == b'\n');
    ledger::parse(&bytes[..whole.unwrap_or(0)]).unreadable
}

fn start_pod(cluster: &Cluster, name: &str, case: Case) -> Result<Cgroup> {
    let command = ["/bellows-guest", "load"]
        .into_iter()
        .map(str::to_owned)
        .chain(burst_words(
            case.limit.per_mille(500),
            case.peak,
            case.threads,
        ))
        .chain(["--after-ms", "120000"].map(str::to_owned))
        .chain(gate::closed())
        .collect();
    cluster.create(&Spec {
        name: name.to_owned(),
        limit: case.limit,
        max: Some(case.peak.per_mille(1500).page_floor()),
        command,
        host: false,
        liveness: None,
        whole_pod: false,
        cpu: None,
        restarts: false,
        raise_first: false,
    })?;
    cluster.wait_running(name)
}

/// Waits for the moment of death.
fn wait_for(cluster: &Cluster, name: &str, cgroup: &Cgroup, case: Case) -> Result<()> {
    if case.moment == Moment::Rest {
        wait("the brake is set", Duration::from_secs(30), || {
            Ok(cgroup.limit("memory.high")? != Limit::Max)
        })?;
    } else {
        gate::open_when_braked(cgroup)?;
        wait("the burst starts", Duration::from_secs(60), || {
            Ok(!cluster.said(name)?.is_empty())
        })?;
    }
    let start = now();
    while case.moment == Moment::Hold
        && !is_held(cgroup)
        && now().since(start) < Nanos::millis(3000)
    {
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(case.delay_ms));
    Ok(())
}

pub(super) fn is_held(cgroup: &Cgroup) -> bool {
    cgroup
        .read("cgroup.freeze")
        .is_ok_and(|text| text.trim() == "1")
}

/// When brake and hold were first seen lifted; a container that is gone needs neither.
fn released(cgroup: &Cgroup, since: Nanos) -> Option<u64> {
    while now().since(since) < Nanos::millis(20_000) {
        let high = cgroup.limit("memory.high");
        let frozen = cgroup.read("cgroup.freeze");
        match (high, frozen) {
            (Ok(Limit::Max), Ok(frozen)) if frozen.trim() == "0" => {
                return Some(now().since(since).as_millis());
            }
            (Err(_), _) | (_, Err(_)) => return Some(now().since(since).as_millis()),
            _ => {}
        }
        thread::sleep(Duration::from_millis(1));
    }
    None
}

/// Whether there is a brake again, or a limit at which there is none; a container that is gone has
/// nothing to guard.
fn guarded_again(cgroup: &Cgroup, original: Bytes) -> bool {
    let again = wait(
        "the brake is set again",
        Duration::from_secs(20),
        || match (cgroup.limit("memory.high"), cgroup.limit("memory.max")) {
            (Ok(high), Ok(limit)) => Ok(high != Limit::Max || limit.bytes() > original),
            _ => Ok(true),
        },
    );
    again.is_ok()
}

/// The limit a minute after the burst; `None` if the pod is dead.
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
        let Some(is_running) = reached(cluster.is_running(name))? else {
            continue;
        };
        if !is_running {
            return Ok(None);
        }
        let over = reached(results(cluster, name))?.unwrap_or_default();
        end = end.or_else(|| over.first().map(|said| Nanos(said.end_ns)));
        // A cgroup that is gone is a pod that died: nothing guarded it while the agent was dead.
        let Ok(limit) = cgroup.limit("memory.max").map(Limit::bytes) else {
            return Ok(None);
        };
        let late = end.is_some_and(|end| now().since(end) >= Nanos::millis(60_000));
        if end.is_some() && (limit == original || late) {
            return Ok(Some(limit.0));
        }
    }
    Ok(Some(cgroup.limit("memory.max")?.bytes().0))
}

/// Milliseconds as seconds; what never came counts as for ever.
fn slowest_seconds<'a>(
    records: impl Iterator<Item = &'a Record>,
    pick: fn(&Record) -> Option<u64>,
) -> f64 {
    let slowest = records
        .map(|record| pick(record).unwrap_or(u64::MAX))
        .max()
        .unwrap_or(0);
    rounded(slowest as f64 / 1000.0)
}

fn left_raised(records: &[Record]) -> usize {
    let raised = |record: &&Record| {
        record
            .limit_after
            .is_some_and(|limit| limit != record.case.limit.0)
    };
    records.iter().filter(raised).count()
}

pub(crate) fn summarize_kill(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    Ok(json!({
        "kills": records.len(),
        "held_at_kill": records.iter().filter(|record| record.held).count(),
        "pods_dead": records.iter().filter(|record| record.limit_after.is_none()).count(),
        "released_after_start_max_s": slowest_seconds(records.iter(), |record| record.released_after_start_ms),
        "left_raised": left_raised(&records),
        "ledger_unreadable": records.iter().map(|record| record.unreadable).sum::<usize>(),
    }))
}

pub(crate) fn summarize_deaths(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let restrained = || records.iter().filter(|record| record.restrained);
    // Without the time in which nobody could run on a CPU.
    let release = |record: &Record| {
        let after = record.released_after_death_ms?;
        Some(after.saturating_sub(record.stood_still_ms))
    };
    let mut slowest = Map::new();
    for death in Death::ALL {
        let mut of = restrained().filter(|record| record.case.death == death);
        // A death at which nothing was restrained says nothing of the release.
        let seconds = of.clone().next().map(|_| slowest_seconds(&mut of, release));
        slowest.insert(format!("{death:?}"), json!(seconds));
    }
    let wrong = records
        .iter()
        .filter(|record| !record.guarded_again || record.unreadable > 0)
        .count();
    Ok(json!({
        "deaths": records.len(),
        "restrained_at_death": restrained().count(),
        "held_at_death": records.iter().filter(|record| record.held).count(),
        "pods_dead": records.iter().filter(|record| record.limit_after.is_none()).count(),
        "brake_release_max_s": slowest_seconds(restrained(), release),
        "brake_release_max_s_by_death": slowest,
        "stood_still_max_s": slowest_seconds(restrained(), |record| Some(record.stood_still_ms)),
        "left_raised": left_raised(&records),
        "wrong_state": wrong,
    }))
}
