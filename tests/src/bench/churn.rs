//! `churn`: containers that come and go as fast as a node can make them, each of which the agent must find, guard
//! under its own name and forget.
//!
//! First 200 cgroups a second whose runtime is not real ([`crate::fake`]), some of which burst and must be raised by
//! nobody else's limit; then real containers as fast as they start. What the agent says that it guards is compared
//! with what there was; what it has open and uses of memory, with what it had before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bellows::{
    attribution::CGROUP_ROOT,
    cgroup::{Cgroup, Limit},
    clock::now,
};
use bellows_core::{Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::burst_words,
    record::{Records, parsed, percentile, rounded},
};
use crate::{
    containers::{Machine, Spec, Standalone, hand_out, policy_of},
    fake::{Fake, Kind, Said},
    node::{GUEST, log_text, wait},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Cgroups that are made by the runtime that is not real.
    #[arg(long, default_value_t = 2000)]
    n: u64,
    /// Real containers.
    #[arg(long, default_value_t = 100)]
    starts: u64,
    /// Seed of their lives.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

const SOCKET: &str = "/run/fake/fake.sock";
const GUARDED: &str = "churn";
const EVERY: Nanos = Nanos::millis(5);
const LIMIT: Bytes = Bytes::mib(64);
const PEAK: Bytes = Bytes::mib(160);
const MAX: Bytes = Bytes::mib(512);
/// One in so many bursts.
const BURSTS: u64 = 100;
/// Whoever is to burst and is not guarded after so long does not.
const FOUND: Nanos = Nanos::millis(30_000);
/// Whoever lives for so long must have been guarded.
const LONG: Nanos = Nanos::millis(3000);
/// Containers before the measurement: what is allocated once is there then.
const BEFORE: u64 = 400;
/// Looks at what it has, of which the least counts.
const LOOKS: u64 = 5;
/// The files in which the agent keeps what containers had.
const RECORDS: &str = "/run/bellows/containers";

/// One container.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct One {
    id: String,
    path: PathBuf,
    is_real: bool,
    lived_ms: u64,
    /// Where the agent said that it was when it began to guard it.
    guarded: Option<PathBuf>,
    /// How its burst went, where it was guarded when that began.
    burst: Option<Burst>,
    /// Memory limits that were asked for it.
    updates: Vec<i64>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Burst {
    oom_kill: u64,
    /// `None` if it was ended by a signal.
    code: Option<i32>,
}

/// What the agent has of the machine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Has {
    files: u64,
    resident_kib: u64,
}

#[derive(Debug, Serialize, Deserialize)]
enum Record {
    One(One),
    /// What it had before and after.
    Has {
        is_real: bool,
        before: Has,
        after: Has,
    },
    /// What was asked for containers that are none.
    Unknown(Vec<String>),
    /// Cgroups that were made in so many milliseconds.
    Made {
        cgroups: u64,
        ms: u64,
    },
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let policies = policy_of(GUARDED, &format!("memory: {{max: {}}}", MAX.0));
    not_real(options, &policies, records)?;
    real(options, &policies, records)
}

fn not_real(options: &Options, policies: &str, records: &mut Records) -> Result<()> {
    hand_out(&["kubepods", "burstable"])?;
    let fake = Fake::start(Path::new(SOCKET), Kind::Own)?;
    let mut agent = Standalone::start_with(policies, &["--runtime-endpoint", SOCKET], None)?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    // What an agent has that is not there yet says nothing.
    let mut first = born(&fake, &mut random, BEFORE + options.n, false)?;
    wait_guarded(&first.one.id)?;
    gone(&fake, &mut first.one)?;
    churn(&fake, &mut random, 0..BEFORE, false)?;
    let before = settled(&agent)?;
    let (ones, made_ms) = churn(&fake, &mut random, BEFORE..BEFORE + options.n, true)?;
    let after = settled(&agent)?;
    agent.check()?;
    eprintln!("{} cgroups: {before:?}, then {after:?}", ones.len());
    let is_real = false;
    records.write(&Record::Has {
        is_real,
        before,
        after,
    })?;
    let known: BTreeSet<&str> = ones.iter().map(|one| one.id.as_str()).collect();
    let updates = fake.state().updates.clone().into_iter();
    let unknown = updates.map(|(id, _)| id);
    let unknown: Vec<String> = unknown.filter(|id| !known.contains(id.as_str())).collect();
    records.write(&Record::Unknown(unknown))?;
    records.write(&Record::Made {
        cgroups: options.n,
        ms: made_ms,
    })?;
    for one in ones {
        records.write(&Record::One(one))?;
    }
    Ok(())
}

struct Living {
    one: One,
    until: Nanos,
    born: Nanos,
    burst: Option<Waiting>,
}

/// A load that bursts when there is a file.
struct Waiting {
    process: Child,
    file: PathBuf,
    has_begun: bool,
}

impl Waiting {
    /// Has it begun as soon as it is guarded, of which its brake comes last. One that nobody guards is ended.
    fn follow(&mut self, cgroup: &Path, born: Nanos) -> Result<()> {
        if self.has_begun {
            return Ok(());
        }
        if Cgroup::open(cgroup)?.limit("memory.high")? != Limit::Max {
            File::create(&self.file)?;
            self.has_begun = true;
        } else if now().since(born) > FOUND {
            self.process.kill()?;
        }
        Ok(())
    }
}

/// Makes one after the other, each of which lives for its time, and waits until all are gone. Returns how long it took
/// to make them, too.
fn churn(
    fake: &Fake,
    random: &mut fastrand::Rng,
    numbers: std::ops::Range<u64>,
    has_bursts: bool,
) -> Result<(Vec<One>, u64)> {
    let begun = now();
    let (mut living, mut over) = (Vec::<Living>::new(), Vec::new());
    let (mut made, mut made_ms) = (0, 0);
    let mut numbers = numbers.peekable();
    while numbers.peek().is_some() || !living.is_empty() {
        while now().since(begun).0 >= made * EVERY.0
            && let Some(number) = numbers.next()
        {
            let bursts = has_bursts && number.is_multiple_of(BURSTS);
            living.push(born(fake, random, number, bursts)?);
            made += 1;
            made_ms = now().since(begun).as_millis();
        }
        for one in &mut living {
            if let Some(burst) = &mut one.burst {
                burst.follow(&one.one.path, one.born)?;
            }
        }
        for mut ended in take_ended(&mut living)? {
            ended.one.lived_ms = now().since(ended.born).as_millis();
            gone(fake, &mut ended.one)?;
            over.push(ended.one);
        }
        thread::sleep(Duration::from_millis(1));
    }
    let guarded = guarded();
    for one in &mut over {
        one.guarded = guarded.get(&one.id).cloned();
    }
    Ok((over, made_ms))
}

fn born(fake: &Fake, random: &mut fastrand::Rng, number: u64, bursts: bool) -> Result<Living> {
    let id: String = std::iter::repeat_with(|| format!("{:016x}", random.u64(..)))
        .take(4)
        .collect();
    let uid = format!("4d0e7f00-0000-4000-9000-{number:012}");
    let pod = Path::new(CGROUP_ROOT).join(format!("kubepods/burstable/pod{uid}"));
    let path = pod.join(&id);
    fs::create_dir(&pod)?;
    fs::write(pod.join("cgroup.subtree_control"), "+memory +cpu")?;
    fs::create_dir(&path)?;
    let cgroup = Cgroup::open(&path)?;
    cgroup.set_limit("memory.max", Limit::At(LIMIT))?;
    let said = Said {
        uid,
        name: format!("one-{number}"),
        cgroups: vec![path.clone()],
        limit: LIMIT,
        quota: None,
        labels: [("guard".to_owned(), GUARDED.to_owned())].into(),
    };
    fake.state().running.insert(id.clone(), said);
    let born = now();
    let burst = bursts.then(|| {
        let words = burst_words(Bytes::mib(8), PEAK, 1);
        let file = PathBuf::from(format!("/run/fake/begin-{number}"));
        let mut command = Command::new(GUEST);
        command.arg("load").args(words).arg("--rest-until");
        command
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        cgroup.admit(&mut command)?;
        let process = command.spawn().context("spawn a burst")?;
        Ok::<_, anyhow::Error>(Waiting {
            process,
            file,
            has_begun: false,
        })
    });
    let lives = Nanos::millis(random.u64(200..4000));
    Ok(Living {
        one: One {
            id,
            path,
            is_real: false,
            lived_ms: 0,
            guarded: None,
            burst: None,
            updates: Vec::new(),
        },
        until: Nanos(born.0 + lives.0),
        born,
        burst: burst.transpose()?,
    })
}

/// Those whose time is over, and whose burst is.
fn take_ended(living: &mut Vec<Living>) -> Result<Vec<Living>> {
    let (mut ended, mut left) = (Vec::new(), Vec::new());
    for mut one in living.drain(..) {
        if let Some(burst) = &mut one.burst {
            if let Some(status) = burst.process.try_wait()? {
                let oom_kill = Cgroup::open(&one.one.path)?.events()?.oom_kill;
                let code = status.code();
                one.one.burst = burst.has_begun.then_some(Burst { oom_kill, code });
                ended.push(one);
                continue;
            }
        } else if now() >= one.until {
            ended.push(one);
            continue;
        }
        left.push(one);
    }
    *living = left;
    Ok(ended)
}

fn gone(fake: &Fake, one: &mut One) -> Result<()> {
    let mut state = fake.state();
    state.running.remove(&one.id);
    let updates = state.updates.iter().filter(|(id, _)| *id == one.id);
    one.updates = updates.map(|&(_, limit)| limit).collect();
    drop(state);
    fs::remove_dir(&one.path)?;
    let pod = one.path.parent().context("a pod")?;
    Ok(fs::remove_dir(pod)?)
}

fn wait_guarded(id: &str) -> Result<()> {
    wait("the first is guarded", Duration::from_secs(60), || {
        Ok(guarded().contains_key(id))
    })
}

/// What the agent has said that it guards, by id.
fn guarded() -> BTreeMap<String, PathBuf> {
    let log = log_text("bellows");
    let told = log.lines().filter(|line| line.contains("guarded"));
    let told = told.filter_map(|line| {
        let (_, id) = line.split_once(" id=\"")?;
        let (_, path) = line.split_once(" path=")?;
        let path = path.split_whitespace().next()?;
        Some((id.split('"').next()?.to_owned(), PathBuf::from(path)))
    });
    told.collect()
}

/// The least that the agent has once it has forgotten everybody.
fn settled(agent: &Standalone) -> Result<Has> {
    wait(
        "the agent has forgotten all",
        Duration::from_secs(60),
        || {
            let left = fs::read_dir(RECORDS).map_or(0, Iterator::count);
            Ok(left == 0)
        },
    )?;
    // What is let go of asynchronously, or was opened for a moment.
    let mut least = looked(agent)?;
    for _ in 0..LOOKS {
        thread::sleep(Duration::from_secs(1));
        let Has {
            files,
            resident_kib,
        } = looked(agent)?;
        least.files = least.files.min(files);
        least.resident_kib = least.resident_kib.min(resident_kib);
    }
    Ok(least)
}

fn looked(agent: &Standalone) -> Result<Has> {
    let process = agent.agent()?;
    let files = fs::read_dir(format!("/proc/{process}/fd"))?.count();
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next());
    Ok(Has {
        files: u64::try_from(files)?,
        resident_kib: resident.context("VmRSS")?.parse()?,
    })
}

fn real(options: &Options, policies: &str, records: &mut Records) -> Result<()> {
    let mut machine = Machine::start()?;
    let mut agent = Standalone::start(policies)?;
    let spec = |name: &str| {
        let command = ["/bellows-guest", "load", "pause"].map(str::to_owned);
        Spec {
            limit: Some(LIMIT),
            labels: vec![("guard".to_owned(), GUARDED.to_owned())],
            ..Spec::of(name, command.to_vec())
        }
    };
    let first = machine.run(&spec("first"))?;
    wait_guarded(&first.id)?;
    machine.remove(&first)?;
    let before = settled(&agent)?;
    let mut started = Vec::new();
    for number in 0..options.starts {
        started.push((machine.run(&spec(&format!("real-{number}")))?, now()));
    }
    // All live, so all must be found; what is not is told by the records.
    let all = wait("all are guarded", Duration::from_secs(30), || {
        let guarded = guarded();
        Ok(started
            .iter()
            .all(|(started, _)| guarded.contains_key(&started.id)))
    });
    if let Err(error) = all {
        eprintln!("{error:#}");
    }
    let guarded = guarded();
    for (started, at) in &started {
        records.write(&Record::One(One {
            id: started.id.clone(),
            path: started.cgroup.path().to_owned(),
            is_real: true,
            lived_ms: now().since(*at).as_millis(),
            guarded: guarded.get(&started.id).cloned(),
            burst: None,
            updates: Vec::new(),
        }))?;
    }
    for (started, _) in &started {
        machine.remove(started)?;
    }
    let after = settled(&agent)?;
    agent.check()?;
    eprintln!("{} containers: {before:?}, then {after:?}", started.len());
    records.write(&Record::Has {
        is_real: true,
        before,
        after,
    })
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let ones = records.iter().filter_map(|record| match record {
        Record::One(one) => Some(one),
        Record::Has { .. } | Record::Unknown(_) | Record::Made { .. } => None,
    });
    let ones: Vec<&One> = ones.collect();
    let count = |is: &dyn Fn(&One) -> bool| ones.iter().filter(|one| is(one)).count();
    let has = |of: &dyn Fn(&Has) -> u64| {
        let grown = records.iter().filter_map(|record| match record {
            Record::Has { before, after, .. } => {
                Some(of(after).cast_signed() - of(before).cast_signed())
            }
            Record::One(_) | Record::Unknown(_) | Record::Made { .. } => None,
        });
        grown.max()
    };
    let unknown = records.iter().map(|record| match record {
        Record::Unknown(ids) => ids.len(),
        Record::One(_) | Record::Has { .. } | Record::Made { .. } => 0,
    });
    let made = records.iter().find_map(|record| match record {
        Record::Made { cgroups, ms } => Some(*cgroups as f64 * 1000.0 / *ms as f64),
        Record::One(_) | Record::Has { .. } | Record::Unknown(_) => None,
    });
    let is_elsewhere = |one: &One| one.guarded.as_ref().is_some_and(|path| *path != one.path);
    let is_for_nothing = |one: &One| one.burst.is_none() && !one.updates.is_empty();
    let killed = |one: &One| {
        one.burst
            .is_some_and(|burst| burst.oom_kill > 0 || burst.code != Some(0))
    };
    let lived: Vec<f64> = ones.iter().map(|one| one.lived_ms as f64).collect();
    Ok(json!({
        "attempts": ones.len(),
        "real": count(&|one| one.is_real),
        "guarded": count(&|one| one.guarded.is_some()),
        // Beyond what this machine can adopt in a second there are some.
        "missed": count(&|one| one.guarded.is_none() && !one.is_real && one.lived_ms >= LONG.as_millis()),
        "missed_real": count(&|one| one.guarded.is_none() && one.is_real),
        "misattributed": count(&is_elsewhere) + count(&is_for_nothing) + unknown.sum::<usize>(),
        "bursts": count(&|one| one.burst.is_some()),
        "bursts_killed": count(&killed),
        "made_per_s": made.map(rounded),
        "fd_growth": has(&|has| has.files),
        "rss_growth_kib": has(&|has| has.resident_kib),
        "lived_p50_s": rounded(percentile(&lived, 50.0) / 1000.0),
    }))
}
