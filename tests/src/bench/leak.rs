//! `leak`: one container grows for ever, beside honest bursts, on a node that has not enough for both for ever.
//!
//! The leak is a process that rests for longer than any start takes, then grows steadily and gives nothing back. Beside it are
//! three containers in which programs are started that burst, one after the other and every third time two at once, and
//! a server, whose one process bursts by itself, twice, and gives back. None of these may be killed, by whomsoever; the leak is to be
//! stopped before they would be, and told so. After its end bursts go on: what it had is theirs again.
//!
//! It stops growing where it would be the whole node's by itself; the record says how large it would have been at the end,
//! which with the bursts is more than there was.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bellows::{cgroup::Limit, clock::now, ledger::Record as LedgerRecord};
use bellows_core::{Action, Bytes, Nanos, arbiter::Why};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::burst_words,
    pod_bursts::ledger_of,
    record::{Records, parsed, rounded},
    storm::{available, node_kills},
};
use crate::containers::{Machine, Spec, Standalone, Started, policy_with};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Seed of the bursts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds in all.
    #[arg(long, default_value_t = 330)]
    seconds: u64,
}

const LIMIT: Bytes = Bytes::mib(48);
const REST: Bytes = Bytes::mib(24);
const MAX: Bytes = Bytes::mib(1024);
/// More than the node has.
const LEAK_MAX: Bytes = Bytes::mib(8192);
const LEAK_REST: Nanos = Nanos::millis(45_000);
const LEAK_MIB_A_SECOND: u64 = 10;
/// Containers in which bursts are started.
const HONEST: usize = 3;
/// From one burst to the next.
const PAUSE: Duration = Duration::from_secs(12);
const LOOK: Duration = Duration::from_millis(100);
/// The leak is looked at for the record this often.
const SAMPLED: Nanos = Nanos::millis(2000);
/// What is granted so soon after it was told is a part of the answer.
const WITH_IT: Nanos = Nanos::millis(1000);
/// The exit code of what SIGKILL has ended: nobody else sends one here.
const KILLED: i32 = 137;

/// A burst that was asked for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Burst {
    container: usize,
    peak: Bytes,
    at: Nanos,
}

/// The leak at one look.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Look {
    at: Nanos,
    limit: Bytes,
    usage: Bytes,
    available: Bytes,
}

/// What became of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Outcome {
    name: String,
    oom_kill: u64,
    /// Its exit code, if it has ended.
    code: Option<i32>,
    highest_limit: Bytes,
    /// Exit codes of its bursts.
    codes: Vec<i32>,
    ledger: Vec<LedgerRecord>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    seed: u64,
    began: Nanos,
    ended: Nanos,
    /// Before any of them had grown.
    available: Bytes,
    least_available: Bytes,
    bursts: Vec<Burst>,
    leak: Outcome,
    looks: Vec<Look>,
    honest: Vec<Outcome>,
    server: Outcome,
    /// Kills on the whole node.
    node_kills: u64,
}

/// A container that is watched.
struct Watched {
    started: Started,
    outcome: Outcome,
}

impl Watched {
    fn new(started: Started) -> Self {
        let outcome = Outcome {
            name: started.name.clone(),
            oom_kill: 0,
            code: None,
            highest_limit: LIMIT,
            codes: Vec::new(),
            ledger: Vec::new(),
        };
        Self { started, outcome }
    }

    /// Its limit and its usage; `None` once it has ended.
    fn look(&mut self, machine: &Machine) -> Result<Option<(Bytes, Bytes)>> {
        if self.outcome.code.is_some() {
            return Ok(None);
        }
        let cgroup = &self.started.cgroup;
        if let (Ok(Limit::At(limit)), Ok(usage), Ok(events)) =
            (cgroup.limit("memory.max"), cgroup.usage(), cgroup.events())
        {
            self.outcome.highest_limit = self.outcome.highest_limit.max(limit);
            self.outcome.oom_kill = self.outcome.oom_kill.max(events.oom_kill);
            if cgroup.populated().unwrap_or(false) {
                return Ok(Some((limit, usage)));
            }
        }
        self.outcome.code = machine.exit_code(&self.started)?;
        // Its cgroup may have been gone before its last kill was seen.
        let is_killed = self.outcome.code == Some(KILLED);
        self.outcome.oom_kill = self.outcome.oom_kill.max(u64::from(is_killed));
        Ok(None)
    }

    fn end(mut self, machine: &Machine) -> Result<Outcome> {
        self.look(machine)?;
        let said = Machine::said(&self.started).into_iter();
        let codes = said.filter_map(|value| i32::try_from(value["code"].as_i64()?).ok());
        self.outcome.codes = codes.collect();
        self.outcome.ledger = ledger_of(self.started.cgroup.id());
        machine.remove(&self.started)?;
        Ok(self.outcome)
    }
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut machine = Machine::start()?;
    let rules = [
        policy_with("honest", MAX, Nanos::millis(3000)),
        policy_with("leak", LEAK_MAX, Nanos::millis(3000)),
    ];
    let mut agent = Standalone::start(&rules.join("---\n"))?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    let kills_before = node_kills()?;
    let before = available()?;
    let mut honest = Vec::new();
    for number in 0..HONEST {
        honest.push(Watched::new(start(&mut machine, &honest_spec(number))?));
    }
    let mut server = Watched::new(start(&mut machine, &server_spec(&mut random))?);
    let mut leak = Watched::new(start(&mut machine, &leak_spec())?);
    let (began, start) = (now(), Instant::now());
    let mut record = Record {
        seed: options.seed,
        began,
        ended: began,
        available: before,
        least_available: before,
        bursts: Vec::new(),
        leak: leak.outcome.clone(),
        looks: Vec::new(),
        honest: Vec::new(),
        server: server.outcome.clone(),
        node_kills: 0,
    };
    let mut next_burst = PAUSE / 2;
    while start.elapsed() < Duration::from_secs(options.seconds) {
        agent.check()?;
        if start.elapsed() >= next_burst {
            next_burst += PAUSE;
            let turn = record.bursts.len();
            let at_once = 1 + usize::from(turn % 4 == 3);
            for number in turn..turn + at_once {
                let burst = burst(number, &honest, &mut random)?;
                record.bursts.push(burst);
            }
        }
        let seen = leak.look(&machine)?;
        for other in honest.iter_mut().chain([&mut server]) {
            other.look(&machine)?;
        }
        let available = available()?;
        record.least_available = record.least_available.min(available);
        let is_due = |last: &Look| {
            now().since(last.at) >= SAMPLED || Some(last.limit) != seen.map(|seen| seen.0)
        };
        if let Some((limit, usage)) = seen
            && record.looks.last().is_none_or(is_due)
        {
            eprintln!(
                "case {}: leak {usage} of {limit}, {available} available",
                record.looks.len()
            );
            let at = now();
            record.looks.push(Look {
                at,
                limit,
                usage,
                available,
            });
        }
        thread::sleep(LOOK);
    }
    record.ended = now();
    // The last has time to end.
    thread::sleep(PAUSE);
    record.leak = leak.end(&machine)?;
    for other in honest {
        record.honest.push(other.end(&machine)?);
    }
    record.server = server.end(&machine)?;
    record.node_kills = node_kills()?.saturating_sub(kills_before);
    records.write(&record)
}

fn start(machine: &mut Machine, spec: &Spec) -> Result<Started> {
    machine.run(spec)
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn guarded(name: &str, guard: &str, command: Vec<String>) -> Spec {
    Spec {
        limit: Some(LIMIT),
        binds: vec![("/host", "/")],
        labels: vec![("guard".to_owned(), guard.to_owned())],
        ..Spec::of(name, command)
    }
}

/// A container that begins a program for each file with the next number, and says how it ended.
fn honest_spec(number: usize) -> Spec {
    let script = format!(
        "i=0; while true; do while [ ! -e /tmp/honest-{number}.$i ]; do sleep 0.2; done; \
         bellows-guest load $(cat /tmp/honest-{number}.$i); echo \"{{\\\"code\\\":$?}}\"; i=$((i+1)); done"
    );
    let mut command = words(&["/bellows-guest", "load", "chroot", "/host", "sh", "-c"]);
    command.push(script);
    guarded(&format!("honest-{number}"), "honest", command)
}

/// One process that bursts by itself, long after it was started.
fn server_spec(random: &mut fastrand::Rng) -> Spec {
    let mut command = words(&["/bellows-guest", "load"]);
    command.extend(burst_words(REST, Bytes::mib(random.u64(150..=250)), 2));
    let rest = [
        "--rest-ms",
        "40000",
        "--hold-ms",
        "2000",
        "--again-after-ms",
        "90000",
    ];
    command.extend(words(&rest));
    command.extend(words(&["--after-ms", "3600000"]));
    guarded("server", "honest", command)
}

fn leak_spec() -> Spec {
    let mut command = words(&["/bellows-guest", "load", "leak"]);
    for (flag, value) in [
        ("--rest", REST.0),
        ("--rest-ms", LEAK_REST.as_millis()),
        ("--mib-a-second", LEAK_MIB_A_SECOND),
        ("--most", LEAK_MAX.0),
    ] {
        command.extend([flag.to_owned(), value.to_string()]);
    }
    guarded("leak", "leak", command)
}

/// Has the next container burst.
fn burst(number: usize, honest: &[Watched], random: &mut fastrand::Rng) -> Result<Burst> {
    let container = number % honest.len();
    let peak = Bytes::mib(random.u64(200..=320));
    let mut load = burst_words(REST, peak, random.u64(1..=4)).to_vec();
    load.extend(words(&["--hold-ms", "2000"]));
    // Whoever reads it reads it whole.
    let turn = number / honest.len();
    let path = format!("/tmp/honest-{container}.{turn}");
    fs::write(format!("{path}.new"), load.join(" "))?;
    fs::rename(format!("{path}.new"), &path)?;
    Ok(Burst {
        container,
        peak,
        at: now(),
    })
}

impl Record {
    /// When the leak was last told that it is not raised as it asks, and the limit that it was left with: with that answer it
    /// may get what is there beside what is kept for others.
    fn stopped(&self) -> Option<(Nanos, Bytes)> {
        let ledger = &self.leak.ledger;
        let is_told = |record: &LedgerRecord| {
            matches!(
                record,
                LedgerRecord::Waits {
                    why: Why::KeptForBursts(..) | Why::Leaks,
                    ..
                }
            )
        };
        let told = ledger.iter().rposition(is_told)?;
        let at = ledger[told].at();
        let look = self.looks.iter().rfind(|look| look.at <= at)?;
        let left = ledger.get(told + 1).and_then(|record| match record {
            LedgerRecord::Intend {
                at: then,
                action: Action::Raise { to, .. },
                ..
            } if then.since(at) < WITH_IT => Some(*to),
            _ => None,
        });
        Some((at, left.unwrap_or(look.limit)))
    }
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let [record] = records.as_slice() else {
        anyhow::bail!("one record is expected");
    };
    let honest = || record.honest.iter().chain([&record.server]);
    let own: u64 = honest().map(|outcome| outcome.oom_kill).sum();
    let of_node = record.node_kills.saturating_sub(record.leak.oom_kill);
    let failed = honest()
        .flat_map(|outcome| &outcome.codes)
        .filter(|code| **code != 0)
        .count();
    let stopped = record.stopped();
    // It was told, and had no more afterwards.
    let highest = stopped.map(|(at, _)| {
        let after = record.looks.iter().filter(|look| look.at >= at);
        after.map(|look| look.limit).max()
    });
    let is_stopped = match (stopped, highest) {
        (Some((_, limit)), Some(after)) => after.is_none_or(|after| after <= limit),
        _ => false,
    };
    let grew = record.ended.since(record.began).since(LEAK_REST);
    let would = Bytes::mib(grew.as_millis() / 1000 * LEAK_MIB_A_SECOND);
    let asked = record.bursts.len();
    let bursts = honest().map(|outcome| outcome.codes.len()).sum::<usize>();
    let at = stopped.map(|(at, _)| at.since(record.began).since(LEAK_REST));
    let last = record.looks.last().context("the leak was never seen")?;
    Ok(json!({
        "bursts_killed": own.max(of_node).max(u64::try_from(failed)?),
        "leak_stopped": is_stopped,
        "stopped_after_s": at.map(|at| rounded(at.as_millis() as f64 / 1000.0)),
        "stopped_at_mib": stopped.map(|(_, limit)| limit.0 >> 20),
        "leak_last_mib": last.usage.0 >> 20,
        "leak_kills": record.leak.oom_kill,
        "leak_would_be_mib": would.0 >> 20,
        "bursts": asked,
        "bursts_ended": bursts,
        "largest_burst_mib": record.bursts.iter().map(|burst| burst.peak.0 >> 20).max(),
        "available_mib": record.available.0 >> 20,
        "least_available_mib": record.least_available.0 >> 20,
    }))
}
