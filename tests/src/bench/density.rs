//! `density`: how many dev containers a stated amount of memory carries, each of which rests at 64 MiB and builds now and then.
//!
//! All containers are those of one Deployment: what the build of one needs is learnt for all. The memory is the limit of the
//! cgroup above them, as a kubelet sets it for all pods of a node; one that is sized for its peak needs that much of it
//! always, so `n_peak_sized` is the memory over the peak that was measured in one without a limit.
//!
//! A build is the compilation of one small unit of C and, as a test run would, a program that grows to most of
//! the peak and keeps that for some seconds in which it sleeps: two emulated CPUs are then not the bound, which the record's
//! `cpu_busy` tells. Each container builds once in a window, at a time by the seed, and waits without doing anything; the window's duty cycle is in the record. Each
//! schedule is run without any limits first, and with the agent then, in the same containers: times are ratios of the two.
//!
//! The search begins at four times `n_peak_sized`, and goes up by `n_peak_sized` as far as `--n` allows, until one is too many;
//! `n_bellows` is 0 if the first is. Whoever does not build in a window rests, as part of what the memory has to carry.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

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
    build::SOURCES,
    pod_bursts::{is_guarded, ledger_of},
    record::{Records, parsed, percentile, rounded},
    storm::node_kills,
};
use crate::{
    containers::{Machine, Spec, Standalone, Started, policy_with},
    node::{shell, wait},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The most containers that are tried.
    #[arg(long, default_value_t = 32)]
    n: u64,
    /// Seed of the schedules.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds of a window.
    #[arg(long, default_value_t = 180)]
    seconds: u64,
}

/// What all containers may have together.
const MEMORY: Bytes = Bytes::mib(2048);
const LIMIT: Bytes = Bytes::mib(64);
const MAX: Bytes = Bytes::mib(1024);
/// What a container uses at rest, beside its shell.
const IDLE: Bytes = Bytes::mib(8);
/// What the test run of a build grows to, and for how long it keeps that.
const TEST: Bytes = Bytes::mib(240);
const TEST_MS: u64 = 6000;
/// The factor that is to be reached.
const FACTOR: u64 = 4;
/// A build may take so much longer than without any limits.
const SLOWER: f64 = 1.15;
const GUARDED: &str = "dev";
/// The end of the names of all pods of a Deployment, before their own five letters.
const HASH: &str = "5d8f7c9b6";
const LOOK: Duration = Duration::from_millis(100);
/// A build that takes longer is taken for stuck.
const LONGEST: Duration = Duration::from_secs(90);

/// What ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Part {
    /// One build alone, in a container without a limit.
    Alone,
    /// One build alone, guarded: what it needs is learnt.
    Learning,
    /// A window without any limits.
    Unlimited,
    /// A window with the agent.
    Bellows,
}

/// One build.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Build {
    container: usize,
    /// When it was asked for, in milliseconds of the window.
    at_ms: u64,
    /// Its exit code; `None` if it did not end.
    code: Option<i32>,
    ms: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    part: Part,
    seed: u64,
    memory: Bytes,
    /// Containers that build.
    n: u64,
    /// All that are there.
    containers: u64,
    builds: Vec<Build>,
    /// The highest demand of one container.
    peak: Bytes,
    /// The highest use of all together.
    used: Bytes,
    /// Kills in the containers, and on the whole node.
    oom_kill: u64,
    node_kills: u64,
    /// The share of the time in which the CPUs were busy.
    cpu_busy: f64,
    window_ms: u64,
    /// The agent's records of all of them.
    ledger: Vec<LedgerRecord>,
}

impl Record {
    fn mean_ms(&self) -> f64 {
        let sum: u64 = self.builds.iter().map(|build| build.ms).sum();
        sum as f64 / self.builds.len().max(1) as f64
    }

    fn failed(&self) -> u64 {
        self.builds
            .iter()
            .map(|build| u64::from(build.code != Some(0)))
            .sum()
    }

    fn kills(&self) -> u64 {
        self.oom_kill.max(self.node_kills).max(self.failed())
    }

    /// The longest time from a raise that was not granted at once to one that was, or to the end of asking, in seconds.
    fn longest_wait(&self) -> f64 {
        let mut longest = Nanos(0);
        let mut cgroups: Vec<_> = self.ledger.iter().map(LedgerRecord::cgroup).collect();
        cgroups.sort_unstable();
        cgroups.dedup();
        for cgroup in cgroups {
            let mut since = None;
            let own = self
                .ledger
                .iter()
                .filter(|record| record.cgroup() == cgroup);
            for record in own {
                match record {
                    LedgerRecord::Waits { at, .. } => {
                        since.get_or_insert(*at);
                    }
                    LedgerRecord::Intend {
                        at,
                        action: Action::Raise { .. } | Action::Release | Action::Shrink { .. },
                        ..
                    } => {
                        let waited = since.take().map_or(Nanos(0), |since| at.since(since));
                        longest = longest.max(waited);
                    }
                    _ => {}
                }
            }
        }
        longest.as_millis() as f64 / 1000.0
    }
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut bench = Bench {
        machine: Machine::start()?,
        containers: Vec::new(),
        asks: Vec::new(),
        asked: Vec::new(),
        options: options.clone(),
    };
    // Compiler and headers come from the disk into page cache that belongs to no container.
    shell("bellows-guest load burst --rest 1Mi --peak 2Mi")?;
    for line in compile("/tmp/warm").split(" && ") {
        shell(line)?;
    }
    bench.add()?;
    let alone = bench.window(Part::Alone, &[0])?;
    let peak = alone.peak;
    write(records, &alone)?;
    let sized = MEMORY.0 / peak.0.max(1);
    let first = FACTOR * sized;
    ensure!(
        options.n >= first,
        "{sized} containers fit by their peak of {peak}: --n must be {first} at least"
    );
    let sizes: Vec<u64> = (first..=options.n)
        .step_by(usize::try_from(sized)?)
        .collect();
    let most = *sizes.last().context("one size at least")?;
    while bench.containers.len() < usize::try_from(most)? {
        bench.add()?;
    }
    let mut unlimited = Vec::new();
    for &n in &sizes {
        let record = bench.window(Part::Unlimited, &bench.schedule(n))?;
        write(records, &record)?;
        ensure!(
            record.failed() == 0,
            "{} of {n} builds did not pass without any limit: this machine is too slow for so many in {} s, or --seconds is too short",
            record.failed(),
            options.seconds
        );
        unlimited.push(record);
    }
    bench.set_limits(true)?;
    let mut agent = Standalone::start(&policy_with(GUARDED, MAX, Nanos::millis(3000)))?;
    bench.wait_guarded()?;
    write(records, &bench.window(Part::Learning, &[0])?)?;
    for (&n, without) in sizes.iter().zip(&unlimited) {
        agent.check()?;
        let record = bench.window(Part::Bellows, &bench.schedule(n))?;
        write(records, &record)?;
        if !carries(&record, without) {
            break;
        }
    }
    Ok(())
}

/// Whether all passed, and hardly later than without any limits.
fn carries(with: &Record, without: &Record) -> bool {
    with.kills() == 0 && with.mean_ms() <= SLOWER * without.mean_ms()
}

fn write(records: &mut Records, record: &Record) -> Result<()> {
    eprintln!(
        "case {:?} {}: mean {:.0} ms, {} kills, peak {}, all {}, CPUs {:.2} busy, longest wait {} s",
        record.part,
        record.n,
        record.mean_ms(),
        record.kills(),
        record.peak,
        record.used,
        record.cpu_busy,
        record.longest_wait(),
    );
    records.write(record)
}

fn compile(out: &str) -> String {
    format!("mkdir -p {out} && cc -O0 -DBLOCKS=1 -c {SOURCES}/table.c -o {out}/unit.o")
}

struct Bench {
    machine: Machine,
    containers: Vec<Started>,
    /// Where each waits to be asked for a build.
    asks: Vec<File>,
    /// Builds of each so far.
    asked: Vec<u64>,
    options: Options,
}

impl Bench {
    /// One more container. It builds for each file with its next number.
    fn add(&mut self) -> Result<()> {
        let number = self.containers.len();
        let name = format!("{GUARDED}-{HASH}-{number:05}");
        let out = format!("/tmp/{GUARDED}-{number}-$i");
        // Whoever looks for a file again and again costs more than its builds, thirty-two times.
        let fifo = format!("/tmp/{GUARDED}-{number}");
        shell(&format!("mkfifo {fifo}"))?;
        self.asks
            .push(File::options().read(true).write(true).open(&fifo)?);
        let script = format!(
            "(sleep 1000000 | bellows-guest load touch {}) & i=0; while read _ < {fifo}; do s=$(date +%s%3N); \
             {} 1>&2 && bellows-guest load burst --rest 1Mi --peak {} --hold-ms {TEST_MS} 1>&2; c=$?; e=$(date +%s%3N); \
             rm -rf {out}; echo \"{{\\\"code\\\":$c,\\\"ms\\\":$((e-s))}}\"; i=$((i+1)); done",
            IDLE.0,
            compile(&out),
            TEST.0
        );
        let words = ["/bellows-guest", "load", "chroot", "/host", "sh", "-c"];
        let mut command = words.map(str::to_owned).to_vec();
        command.push(script);
        let labels = [("guard", GUARDED), ("pod-template-hash", HASH)];
        let started = self.machine.run(&Spec {
            limit: Some(LIMIT),
            container: Some("app"),
            binds: vec![("/host", "/")],
            labels: labels
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .to_vec(),
            ..Spec::of(&name, command)
        })?;
        set(&started.pod, Limit::Max)?;
        set(&started.cgroup, Limit::Max)?;
        self.containers.push(started);
        self.asked.push(0);
        Ok(())
    }

    /// Which container builds when, in milliseconds: container `n`'s entry is its time.
    fn schedule(&self, n: u64) -> Vec<u64> {
        let mut random = fastrand::Rng::with_seed(self.options.seed ^ (n << 32));
        (0..n)
            .map(|_| random.u64(0..self.options.seconds * 1000))
            .collect()
    }

    /// All get their limits at rest and the memory that is there for all; or none has any.
    fn set_limits(&self, limited: bool) -> Result<()> {
        let (own, all) = if limited {
            (Limit::At(LIMIT), Limit::At(MEMORY))
        } else {
            (Limit::Max, Limit::Max)
        };
        for started in &self.containers {
            set(&started.cgroup, own)?;
            set(&started.pod, own)?;
        }
        set(&pods()?, all)
    }

    fn wait_guarded(&self) -> Result<()> {
        wait("all are guarded", Duration::from_secs(120), || {
            let mut containers = self.containers.iter();
            Ok(containers.all(|started| is_guarded(&started.cgroup)))
        })
    }

    /// Has containers build by a schedule, and waits for all of them.
    fn window(&mut self, part: Part, schedule: &[u64]) -> Result<Record> {
        let kills_before = node_kills()?;
        let before: Vec<u64> = self.kills();
        let (cpu_before, from) = (cpu()?, now());
        let start = Instant::now();
        let mut builds: Vec<Build> = schedule
            .iter()
            .enumerate()
            .map(|(container, &at_ms)| Build {
                container,
                at_ms,
                code: None,
                ms: 0,
            })
            .collect();
        builds.sort_by_key(|build| build.at_ms);
        let mut begun = vec![false; builds.len()];
        let (mut peak, mut used) = (Bytes::ZERO, Bytes::ZERO);
        let longest = Duration::from_secs(self.options.seconds) + LONGEST;
        let pods = pods()?;
        while builds.iter().any(|build| build.code.is_none()) && start.elapsed() < longest {
            let elapsed = u64::try_from(start.elapsed().as_millis())?;
            for (build, begun) in builds.iter_mut().zip(&mut begun) {
                let turn = self.asked[build.container];
                let started = &self.containers[build.container];
                if !*begun && elapsed >= build.at_ms {
                    writeln!(self.asks[build.container])?;
                    *begun = true;
                } else if *begun && build.code.is_none() {
                    peak = peak.max(started.cgroup.stat()?.demand());
                    let said = Machine::said(started).into_iter();
                    let mut said = said.filter(|said| !said["code"].is_null());
                    if let Some(said) = said.nth(usize::try_from(turn)?) {
                        build.code = said["code"]
                            .as_i64()
                            .and_then(|code| i32::try_from(code).ok());
                        build.ms = said["ms"].as_u64().unwrap_or(0);
                    }
                }
            }
            used = used.max(pods.stat()?.demand());
            thread::sleep(LOOK);
        }
        for build in &builds {
            self.asked[build.container] += 1;
        }
        let window = start.elapsed();
        let kills = self.kills();
        let kills = kills
            .iter()
            .zip(&before)
            .map(|(after, before)| after - before);
        let mut ledger = Vec::new();
        for started in self.containers.iter().filter(|_| part == Part::Bellows) {
            let own = ledger_of(started.cgroup.id());
            ledger.extend(own.into_iter().filter(|record| record.at() >= from));
        }
        let cpu_after = cpu()?;
        let all = (cpu_after.0 - cpu_before.0).max(1);
        Ok(Record {
            part,
            seed: self.options.seed,
            memory: MEMORY,
            n: u64::try_from(schedule.len())?,
            containers: u64::try_from(self.containers.len())?,
            builds,
            peak,
            used,
            oom_kill: kills.sum(),
            node_kills: node_kills()?.saturating_sub(kills_before),
            cpu_busy: 1.0 - (cpu_after.1 - cpu_before.1) as f64 / all as f64,
            window_ms: u64::try_from(window.as_millis())?,
            ledger,
        })
    }

    fn kills(&self) -> Vec<u64> {
        let events = self
            .containers
            .iter()
            .map(|started| started.cgroup.events());
        events
            .map(|events| events.unwrap_or_default().oom_kill)
            .collect()
    }
}

fn set(cgroup: &Cgroup, limit: Limit) -> Result<()> {
    Ok(cgroup.set_limit("memory.max", limit)?)
}

/// The cgroup above all pods.
fn pods() -> Result<Cgroup> {
    Ok(Cgroup::open(&Path::new(CGROUP_ROOT).join("kubepods"))?)
}

/// All time of the CPUs and that in which they had nothing to do, in ticks.
fn cpu() -> Result<(u64, u64)> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .take(8)
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    let idle = ticks.iter().skip(3).take(2).sum();
    Ok((ticks.iter().sum(), idle))
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let of = |part: Part| records.iter().filter(move |record| record.part == part);
    let alone = of(Part::Alone).next().context("no build was measured")?;
    let sized = alone.memory.0 / alone.peak.0.max(1);
    let pairs: Vec<(&Record, &Record)> = of(Part::Bellows)
        .filter_map(|with| {
            Some((
                with,
                of(Part::Unlimited).find(|without| without.n == with.n)?,
            ))
        })
        .collect();
    let carried = pairs
        .iter()
        .filter(|(with, without)| carries(with, without));
    let carried = carried.max_by_key(|(with, _)| with.n);
    let ratio = |(with, without): &(&Record, &Record)| rounded(with.mean_ms() / without.mean_ms());
    let last = pairs.last().context("no window with the agent")?;
    let slowest = |record: &Record| {
        let times: Vec<f64> = record
            .builds
            .iter()
            .map(|build| build.ms as f64 / 1000.0)
            .collect();
        rounded(percentile(&times, 100.0))
    };
    // Of what is claimed; of what was tried where nothing is.
    let told = carried.unwrap_or(last);
    Ok(json!({
        "n_peak_sized": sized,
        "n_bellows": carried.map_or(0, |(with, _)| with.n),
        "kills": told.0.kills(),
        "longest_wait_s": rounded(told.0.longest_wait()),
        "time_ratio": ratio(told),
        "slowest_s": slowest(told.0),
        "slowest_unlimited_s": slowest(told.1),
        "kills_unlimited": told.1.kills(),
        "kills_learning": of(Part::Learning).map(Record::kills).sum::<u64>(),
        "most_tried": last.0.n,
        "most_tried_kills": last.0.kills(),
        "most_tried_ratio": ratio(last),
        "peak_mib": alone.peak.0 >> 20,
        "memory_mib": alone.memory.0 >> 20,
        "used_mib": told.0.used.0 >> 20,
        "used_unlimited_mib": told.1.used.0 >> 20,
        "cpu_busy": rounded(told.0.cpu_busy),
        "duty_cycle": rounded(alone.mean_ms() / told.0.window_ms as f64),
    }))
}
