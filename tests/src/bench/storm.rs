//! `storm`: more bursts at once than the node has memory for, beside many cgroups that do nothing.
//!
//! Nothing may be promised that is not there, nobody who was granted what it asked for may be killed, and whoever is not
//! served in the end must have been told why. Who is refused dies at its limit, as it would have without Bellows: that is
//! counted, and is no failure of the arbiter's. So does who was granted what there was, told that it is less than it asked
//! for, and needs more than that (`kills_granted_less`), or was granted something after it had been let go
//! (`kills_granted_too_late`).

use std::{collections::BTreeMap, fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    attribution::CGROUP_ROOT,
    cgroup::{Cgroup, Limit},
    clock::now,
    ledger::Record as LedgerRecord,
};
use bellows_core::{Action, Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::burst_words,
    pod_bursts::{is_guarded, ledger_of},
    record::{Records, parsed, rounded},
};
use crate::{
    containers::{Machine, Spec, Standalone, Started, policy_of},
    kmsg::OomKills,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Storms.
    #[arg(long, default_value_t = 1)]
    n: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Containers that burst at once.
    #[arg(long, default_value_t = 20)]
    starts: u64,
    /// Seconds for which the policy lets each be held; as long as usual, if left out.
    #[arg(long)]
    hold_at_most: Option<u64>,
}

const LIMIT: Bytes = Bytes::mib(48);
const MAX: Bytes = Bytes::mib(512);
/// Cgroups that do nothing.
const QUIET: u64 = 180;
/// From the first container's start to all bursts, for each: so long does one take to be started and adopted.
const PER_CONTAINER: Nanos = Nanos::millis(5000);
/// How long all may take.
const LONGEST: Nanos = Nanos::millis(240_000);
/// The exit code of what SIGKILL has ended: nobody else sends one here.
const KILLED: i32 = 137;
const LOOK: Duration = Duration::from_millis(50);
/// A grant of less is told why and made in one decision.
const SAME_DECISION: Nanos = Nanos::millis(100);

/// One container.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Outcome {
    peak: Bytes,
    threads: u64,
    /// Its exit code; `None` if it did not end.
    code: Option<i32>,
    oom_kill: u64,
    /// When it was killed first, by the kernel's own log.
    killed_at: Option<Nanos>,
    highest_limit: Bytes,
    /// Milliseconds from the beginning of the storm to its end.
    ended_ms: Option<u64>,
    ledger: Vec<LedgerRecord>,
}

impl Outcome {
    fn is_served(&self) -> bool {
        self.code == Some(0) && self.oom_kill == 0
    }

    /// Whether it was told why it is not served.
    fn is_told(&self) -> bool {
        self.ledger.iter().any(is_wait)
    }

    /// What it was told last before it was killed, if that was a grant. Who has waited for so long that nothing held it any
    /// more may be granted something when it is dead.
    fn killed_granted(&self) -> Option<Grant> {
        let killed = self.killed_at?;
        let mut words = self.ledger.iter().rev().filter_map(Word::of);
        let is_answer = |word: &Word| matches!(word, Word::Granted(..) | Word::Waits(..));
        let Word::Granted(at, to) = words.find(|word| word.at() < killed && is_answer(word))?
        else {
            return None;
        };
        if matches!(
            words.clone().find(|word| !matches!(word, Word::Waits(..))),
            Some(Word::LetGo(_))
        ) {
            return Some(Grant::TooLate);
        }
        // Why it is less is told right before, each time anew.
        let is_less = matches!(words.next(), Some(Word::Waits(told, wanted)) if wanted > to && at.since(told) < SAME_DECISION);
        Some(if is_less { Grant::OfLess } else { Grant::OfAll })
    }
}

/// How much of what it asked for somebody was granted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Grant {
    OfAll,
    OfLess,
    /// It had been let go already, for there was no room until its patience was over.
    TooLate,
}

/// What the ledger tells one that asks for more: when, and of which limit.
enum Word {
    Held(Nanos),
    LetGo(Nanos),
    Granted(Nanos, Bytes),
    Waits(Nanos, Bytes),
}

impl Word {
    const fn of(record: &LedgerRecord) -> Option<Self> {
        match *record {
            LedgerRecord::Intend {
                at,
                action: Action::Raise { to, .. },
                ..
            } => Some(Self::Granted(at, to)),
            LedgerRecord::Intend {
                at,
                action: Action::Hold,
                ..
            } => Some(Self::Held(at)),
            LedgerRecord::Intend {
                at,
                action: Action::Release,
                reason,
                ..
            } if reason.lets_go() => Some(Self::LetGo(at)),
            LedgerRecord::Waits { at, wanted, .. } => Some(Self::Waits(at, wanted)),
            _ => None,
        }
    }

    const fn at(&self) -> Nanos {
        match *self {
            Self::Held(at) | Self::LetGo(at) | Self::Granted(at, _) | Self::Waits(at, _) => at,
        }
    }
}

const fn is_wait(record: &LedgerRecord) -> bool {
    matches!(record, LedgerRecord::Waits { .. })
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    seed: u64,
    outcomes: Vec<Outcome>,
    /// The most that was certainly promised beyond what there was, at any look (see [`Look`]), and how many looks
    /// there were.
    overcommit: Bytes,
    looks: u64,
    /// What was available when the storm began, and at least.
    available: Bytes,
    least_available: Bytes,
    /// Kills by the node's own want of memory.
    global_kills: u64,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let root = Cgroup::open(Path::new(CGROUP_ROOT))?;
    let quiet = root.create_child("quiet")?;
    for number in 0..QUIET {
        quiet.create_child(&format!("cgroup-{number}"))?;
    }
    let mut machine = Machine::start()?;
    let hold = options
        .hold_at_most
        .map(|seconds| format!(", holdAtMost: {seconds}s"));
    let hold = hold.unwrap_or_default();
    let rules = format!("memory: {{max: {}, shrinkAfter: 3s{hold}}}", MAX.0);
    let mut agent = Standalone::start(&policy_of("storm", &rules))?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    for index in 0..options.n {
        agent.check()?;
        let record = storm(&mut machine, index, options, &mut random)?;
        for outcome in &record.outcomes {
            eprintln!(
                "case {index}: peak {}, {} threads: code {:?}, {} kills, at most {}, ended after {:?} ms, told {}",
                outcome.peak,
                outcome.threads,
                outcome.code,
                outcome.oom_kill,
                outcome.highest_limit,
                outcome.ended_ms,
                outcome.is_told(),
            );
        }
        records.write(&record)?;
    }
    Ok(())
}

/// What each container that runs may use and uses, by its number.
///
/// Twenty cannot be looked at in one instant, and what one grows by meanwhile is promised no more but used: what is
/// available is read between two looks, and only what is promised in both counts, with the more that it used in either.
/// One that has ended is promised nothing, whatever its limit still says.
struct Look(BTreeMap<usize, [Bytes; 2]>);

impl Look {
    fn at(watched: &[Watched]) -> Self {
        let running = watched.iter().enumerate().filter_map(|(number, one)| {
            let cgroup = &one.started.cgroup;
            let Limit::At(limit) = cgroup.limit("memory.max").ok()? else {
                return None;
            };
            let usage = cgroup.usage().ok()?;
            let is_raised = limit > LIMIT && cgroup.populated().unwrap_or(false);
            is_raised.then_some((number, [limit, usage]))
        });
        Self(running.collect())
    }

    fn overcommit(&self, later: &Self, available: Bytes) -> Bytes {
        let promised = self.0.iter().filter_map(|(number, [limit, usage])| {
            let [limit_later, usage_later] = later.0.get(number)?;
            Some(limit.min(limit_later).minus(*usage.max(usage_later)))
        });
        promised.fold(Bytes::ZERO, Bytes::plus).minus(available)
    }
}

/// A container of the storm, as it is watched.
struct Watched {
    started: Started,
    /// Its processes before it bursts.
    processes: Vec<u32>,
    outcome: Outcome,
}

fn storm(
    machine: &mut Machine,
    index: u64,
    options: &Options,
    random: &mut fastrand::Rng,
) -> Result<Record> {
    let all_at = Nanos(now().0 + PER_CONTAINER.0 * options.starts);
    let mut watched = Vec::new();
    for number in 0..options.starts {
        let peak = Bytes::mib(random.u64(200..=360));
        let threads = random.u64(1..=2);
        let rest = all_at.since(now()).as_millis().to_string();
        let words = ["/bellows-guest", "load"].map(str::to_owned).into_iter();
        let words = words.chain(burst_words(LIMIT.per_mille(500), peak, threads));
        let more = ["--rest-ms", &rest, "--hold-ms", "1500"];
        let started = machine.run(&Spec {
            limit: Some(LIMIT),
            labels: vec![("guard".to_owned(), "storm".to_owned())],
            ..Spec::of(
                &format!("storm-{index}-{number}"),
                words.chain(more.map(str::to_owned)).collect(),
            )
        })?;
        let outcome = Outcome {
            peak,
            threads,
            code: None,
            oom_kill: 0,
            killed_at: None,
            highest_limit: LIMIT,
            ended_ms: None,
            ledger: Vec::new(),
        };
        watched.push(Watched {
            started,
            processes: Vec::new(),
            outcome,
        });
    }
    // Whoever is not guarded yet when it bursts is nobody's failure but the machine's.
    let are_guarded = || watched.iter().all(|one| is_guarded(&one.started.cgroup));
    while now() < all_at && !are_guarded() {
        thread::sleep(LOOK);
    }
    ensure!(
        now() < all_at,
        "this machine is too slow to start {} containers in {} s",
        options.starts,
        PER_CONTAINER.as_millis() * options.starts / 1000
    );
    for one in &mut watched {
        one.processes = one.started.cgroup.processes()?;
    }
    let mut record = Record {
        index,
        seed: options.seed,
        outcomes: Vec::new(),
        overcommit: Bytes::ZERO,
        looks: 0,
        available: available()?,
        least_available: Bytes(u64::MAX),
        global_kills: 0,
    };
    let kills_before = node_kills()?;
    watch(machine, &mut watched, all_at, &mut record)?;
    let own: u64 = watched.iter().map(|one| one.outcome.oom_kill).sum();
    record.global_kills = node_kills()?
        .saturating_sub(kills_before)
        .saturating_sub(own);
    for Watched {
        started,
        mut outcome,
        ..
    } in watched
    {
        outcome.ledger = ledger_of(started.cgroup.id());
        machine.remove(&started)?;
        record.outcomes.push(outcome);
    }
    Ok(record)
}

/// Looks at all until all have ended.
fn watch(
    machine: &Machine,
    watched: &mut [Watched],
    all_at: Nanos,
    record: &mut Record,
) -> Result<()> {
    let mut kills = OomKills::begin()?;
    while now().since(all_at) < LONGEST && watched.iter().any(|one| one.outcome.code.is_none()) {
        kills.look()?;
        let before = Look::at(watched);
        let available = available()?;
        let after = Look::at(watched);
        record.least_available = record.least_available.min(available);
        let overcommit = before.overcommit(&after, available);
        record.overcommit = record.overcommit.max(overcommit);
        record.looks += 1;
        let mut ended = Vec::new();
        for (number, one) in watched.iter_mut().enumerate() {
            if one.outcome.code.is_some() {
                continue;
            }
            let cgroup = &one.started.cgroup;
            // One that has just ended is asked for below.
            if let (Ok(Limit::At(limit)), Ok(events)) =
                (cgroup.limit("memory.max"), cgroup.events())
            {
                one.outcome.highest_limit = one.outcome.highest_limit.max(limit);
                one.outcome.oom_kill = one.outcome.oom_kill.max(events.oom_kill);
            }
            if !cgroup.populated().unwrap_or(false) {
                ended.push(number);
            }
        }
        for number in ended {
            let one = &mut watched[number];
            if let Some(code) = machine.exit_code(&one.started)? {
                one.outcome.code = Some(code);
                // Its cgroup was gone before its last kill was seen.
                if code == KILLED {
                    one.outcome.oom_kill = one.outcome.oom_kill.max(1);
                }
                one.outcome.ended_ms = Some(now().since(all_at).as_millis());
            }
        }
        thread::sleep(LOOK);
    }
    kills.look()?;
    for one in watched {
        let at = kills.of(&one.processes);
        ensure!(
            at.is_some() || one.outcome.oom_kill == 0,
            "the kernel's log does not tell of the kill in {}",
            one.started.cgroup.path().display()
        );
        one.outcome.killed_at = at;
    }
    Ok(())
}

/// A field of a file of names and numbers.
fn field(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.with_context(|| format!("{path} has no {name}"))
}

pub(super) fn available() -> Result<Bytes> {
    Ok(Bytes(field("/proc/meminfo", "MemAvailable:")? << 10))
}

/// Processes that were killed for want of memory, in a cgroup or on the node.
pub(super) fn node_kills() -> Result<u64> {
    field("/proc/vmstat", "oom_kill ")
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let all = || records.iter().flat_map(|record| &record.outcomes);
    let count = |is_so: &dyn Fn(&Outcome) -> bool| all().filter(|outcome| is_so(outcome)).count();
    let killed_granted = |grant| count(&|outcome| outcome.killed_granted() == Some(grant));
    let ended: BTreeMap<u64, u64> = records
        .iter()
        .map(|record| {
            let ended = record
                .outcomes
                .iter()
                .filter_map(|outcome| outcome.ended_ms);
            (record.index, ended.max().unwrap_or(0))
        })
        .collect();
    Ok(json!({
        "bursts": all().count(),
        "served": count(&Outcome::is_served),
        "kills": count(&|outcome| outcome.oom_kill > 0),
        "kills_granted": killed_granted(Grant::OfAll),
        "kills_granted_less": killed_granted(Grant::OfLess),
        "kills_granted_too_late": killed_granted(Grant::TooLate),
        "starved": count(&|outcome| !outcome.is_served() && !outcome.is_told()),
        "told": count(&Outcome::is_told),
        "looks": records.iter().map(|record| record.looks).min(),
        "overcommit_bytes": records.iter().map(|record| record.overcommit.0).max(),
        "global_kills": records.iter().map(|record| record.global_kills).sum::<u64>(),
        "available_mib": records.iter().map(|record| record.available.0 >> 20).min(),
        "least_available_mib": records.iter().map(|record| record.least_available.0 >> 20).min(),
        "needed_mib": all().map(|outcome| outcome.peak.0 >> 20).sum::<u64>(),
        "ended_max_s": rounded(ended.values().max().map_or(0.0, |&ms| ms as f64 / 1000.0)),
    }))
}
