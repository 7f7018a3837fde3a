//! `parallelism`: builds whose jobs need more together than they may have, with and without elastic parallelism.
//!
//! The jobs of `make` and `random` are loads that grow with the CPU time that they use; those of `real` are compilers.
//! ninja and cargo are not on the guest's disk: a load speaks the protocol of job tokens in their place, as a client of
//! make's and as a server.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit},
    ledger,
};
use bellows_core::{Bytes, quantity};
use clap::{Args, ValueEnum};
use fastrand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    build::{ROOT, SOURCES, prepare},
    record::{Records, parsed, percentile, rounded},
    runner::{BELLOWS, Outcome, Runner, forget_learnt},
};
use crate::node::wait;

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Builds by make that need twice their ceiling.
    #[arg(long, default_value_t = 20)]
    n: u64,
    /// Random builds.
    #[arg(long, default_value_t = 50)]
    units: u64,
    /// Seed of the cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only these.
    #[arg(long)]
    kind: Option<Kind>,
    /// Leave out with how many jobs at once a build would be fastest.
    #[arg(long)]
    without_fixed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum Kind {
    /// `make -j8` that needs twice its ceiling.
    Make,
    /// Anything.
    Random,
    /// `make -j8` of real compilers that need twice their ceiling.
    Real,
    /// `bellows exec` is killed while jobs are paused.
    Killed,
}

/// How a build's jobs are begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Tool {
    MakeFifo,
    MakePipe,
    /// Makes below a make, some of which end before the others.
    SubMakes,
    /// A client of make's jobserver, as ninja is one.
    LikeNinja,
    /// A jobserver of its own, as cargo is one.
    LikeCargo,
    Shell,
    /// Each of two waits for the other's end.
    Pipes,
    Compilers,
}

const TOOLS: [Tool; 6] = [
    Tool::MakeFifo,
    Tool::MakePipe,
    Tool::LikeNinja,
    Tool::LikeCargo,
    Tool::Shell,
    Tool::Pipes,
];

const KILLED: [Tool; 4] = [
    Tool::MakeFifo,
    Tool::MakePipe,
    Tool::LikeCargo,
    Tool::SubMakes,
];

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Job {
    size: Bytes,
    work_ms: u64,
}

/// How a build went.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Ended {
    code: i32,
    oom_kill: u64,
    wall_us: u64,
    /// From the build's begin to its end, if it came to that.
    build_ms: Option<u64>,
    peak: Option<u64>,
    /// Times that make found job tokens missing at its end.
    tokens_missing: usize,
    report: Value,
    last_lines: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    seed: u64,
    index: u64,
    kind: Kind,
    tool: Tool,
    at_once: usize,
    ceiling: Bytes,
    jobs: Vec<Job>,
    without: Option<Ended>,
    with: Option<Ended>,
    /// By `-j`.
    fixed: Vec<(usize, Ended)>,
    killed: Option<Killed>,
}

/// The end of a guard, and what came after it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Killed {
    /// How many were paused right before it.
    stopped: usize,
    /// How many tokens were withheld then.
    withheld: usize,
    /// Milliseconds until nobody was stopped.
    resumed_ms: u64,
    /// Whether the build passed then, and make had all its tokens.
    passed: bool,
}

/// Where the loads are, seen from within the root.
const PLACE: &str = "/tmp/parallelism";
/// A build that takes longer stands still.
const DEADLINE_S: u64 = 240;
const DEADLINE_CODE: i32 = 124;
/// What `make`, shells and page tables need.
const REST: Bytes = Bytes::mib(16);

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    prepare()?;
    let place = format!("{ROOT}{PLACE}");
    fs::create_dir_all(&place)?;
    for name in ["cc1", "ninja", "cargo"] {
        let path = format!("{place}/{name}");
        fs::copy(std::env::current_exe()?, &path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let runner = Runner::new()?;
    let is_meant = |kind| options.kind.is_none_or(|only| only == kind);
    let bench = Bench {
        runner,
        seed: options.seed,
        fewer: if options.without_fixed {
            &[]
        } else {
            &[4, 3, 2]
        },
    };
    if is_meant(Kind::Make) {
        for index in 0..options.n {
            records.write(&bench.make(index)?)?;
        }
    }
    if is_meant(Kind::Random) {
        for index in 0..options.units {
            records.write(&bench.random(index)?)?;
        }
    }
    if is_meant(Kind::Killed) {
        let (mut stopped, mut withheld) = (0, 0);
        for index in 0..8 {
            let record = bench.killed(index)?;
            stopped += record.killed.map_or(0, |killed| killed.stopped);
            withheld += record.killed.map_or(0, |killed| killed.withheld);
            records.write(&record)?;
        }
        ensure!(
            stopped > 0 && withheld > 0,
            "nothing was there to be undone: {stopped} paused, {withheld} tokens withheld"
        );
    }
    if is_meant(Kind::Real) {
        records.write(&bench.real()?)?;
    }
    Ok(())
}

struct Bench {
    runner: Runner,
    seed: u64,
    /// Jobs at once, of which the fastest is to be compared with.
    fewer: &'static [usize],
}

/// Words that run a script in the root, for as long as a build may take, and say when it began and ended: `bellows exec`
/// loads its programs first, which takes seconds on an emulated machine and is not the build's time.
fn in_root(script: &str) -> Vec<String> {
    let deadline = DEADLINE_S.to_string();
    let timed = format!(
        "read began rest < /proc/uptime\n({script})\ncode=$?\nread ended rest < /proc/uptime\necho \"{{\\\"began\\\": $began, \\\"ended\\\": $ended}}\"\nexit $code"
    );
    [
        "chroot", ROOT, "timeout", "-k", "5", &deadline, "sh", "-c", &timed,
    ]
    .map(str::to_owned)
    .to_vec()
}

impl Tool {
    /// A script that does the jobs.
    fn script(self, jobs: &[Job], at_once: usize) -> Result<String> {
        let cc1 = format!("{PLACE}/cc1 load job");
        let load = |job: &Job| format!("{cc1} {} {}", job.size.0, job.work_ms);
        let specifications: Vec<String> = jobs
            .iter()
            .map(|job| format!("{}:{}", job.size.0, job.work_ms))
            .collect();
        let specifications = specifications.join(" ");
        let like = |name: &str| {
            format!(
                "{PLACE}/{name} load jobs --at-once {at_once} --program {PLACE}/cc1 {specifications}"
            )
        };
        let waited = |commands: Vec<String>| {
            let begun = commands
                .iter()
                .map(|command| format!("{command} & all=\"$all $!\"\n"));
            let begun: String = begun.collect();
            format!("{begun}for one in $all; do wait $one || exit 1; done")
        };
        Ok(match self {
            Self::MakeFifo | Self::MakePipe | Self::Compilers => {
                let rules: String = jobs
                    .iter()
                    .enumerate()
                    .map(|(n, job)| format!("job{n}:\n\t@{}\n", load(job)))
                    .collect();
                let all: Vec<String> = (0..jobs.len()).map(|n| format!("job{n}")).collect();
                let all = all.join(" ");
                write_makefile(&format!("all: {all}\n.PHONY: all {all}\n{rules}"))?;
                let style = if self == Self::MakePipe {
                    "pipe"
                } else {
                    "fifo"
                };
                format!("exec make -f {PLACE}/Makefile -j{at_once} --jobserver-style={style}")
            }
            Self::SubMakes => {
                let groups: Vec<String> = (0..jobs.len())
                    .step_by(4)
                    .map(|n| format!("group{n}"))
                    .collect();
                let groups = groups.join(" ");
                let mut rules = String::new();
                for (n, group) in jobs.chunks(4).enumerate() {
                    let all: Vec<String> = (0..group.len())
                        .map(|m| format!("job{}", 4 * n + m))
                        .collect();
                    let all = all.join(" ");
                    rules += &format!("group{}:\n\t@+$(MAKE) -f {PLACE}/Makefile {all}\n", 4 * n);
                    for (m, job) in group.iter().enumerate() {
                        rules += &format!("job{}:\n\t@{}\n", 4 * n + m, load(job));
                    }
                }
                write_makefile(&format!("all: {groups}\n.PHONY: all {groups}\n{rules}"))?;
                format!("exec make -f {PLACE}/Makefile -j{at_once} --jobserver-style=pipe")
            }
            Self::LikeNinja => {
                write_makefile(&format!("all:\n\t@+{} --client\n", like("ninja")))?;
                format!("exec make -f {PLACE}/Makefile -j{at_once}")
            }
            Self::LikeCargo => format!("{}; exit $?", like("cargo")),
            Self::Shell => waited(jobs.iter().map(&load).collect()),
            Self::Pipes => {
                let pairs = jobs.chunks(2).map(|pair| match pair {
                    [one, other] => format!("({} | {} --waits)", load(one), load(other)),
                    rest => rest.iter().map(&load).collect(),
                });
                waited(pairs.collect())
            }
        })
    }
}

fn write_makefile(text: &str) -> Result<()> {
    let path = format!("{ROOT}{PLACE}/Makefile");
    fs::write(&path, text).context(path)
}

impl Ended {
    fn of(outcome: &Outcome) -> Self {
        let lines: Vec<&str> = outcome.stderr.lines().collect();
        let report = &outcome.report["report"];
        let kept = ["pauses", "standstills", "lent", "raises", "errors", "lost"];
        let kept = kept.map(|name| (name.to_owned(), report[name].clone()));
        Self {
            code: outcome.code,
            oom_kill: outcome.oom_kill,
            wall_us: outcome.wall_us,
            build_ms: built_in(&outcome.said),
            peak: outcome.samples.last().map(|sample| sample.peak),
            tokens_missing: lines
                .iter()
                .filter(|line| line.contains("INTERNAL: Exiting with"))
                .count(),
            report: Value::Object(kept.into_iter().collect()),
            last_lines: lines
                .iter()
                .rev()
                .take(6)
                .map(|line| (*line).to_owned())
                .collect(),
        }
    }

    const fn passed(&self) -> bool {
        self.code == 0 && self.oom_kill == 0 && self.build_ms.is_some()
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "milliseconds of minutes"
)]
fn built_in(said: &Value) -> Option<u64> {
    let (began, ended) = (said["began"].as_f64()?, said["ended"].as_f64()?);
    Some(((ended - began) * 1000.0).max(1.0) as u64)
}

impl Bench {
    fn with(&self, ceiling: Bytes, script: &str) -> Result<Ended> {
        let memory = ceiling.per_mille(250).max(Bytes::mib(16));
        let outcome =
            self.runner
                .bellows(memory, ceiling, &["--elastic".to_owned()], &in_root(script))?;
        Ok(Ended::of(&outcome))
    }

    fn fixed(&self, limit: Limit, script: &str) -> Result<Ended> {
        Ok(Ended::of(&self.runner.fixed(limit, &in_root(script))?))
    }

    /// Eight jobs at once that need twice their ceiling.
    fn make(&self, index: u64) -> Result<Record> {
        let mut random = Rng::with_seed(self.seed ^ (index << 20));
        let mean = Bytes::mib(random.u64(24..=48));
        let job = |random: &mut Rng| Job {
            size: mean.per_mille(random.u64(800..=1200)),
            work_ms: random.u64(150..=300),
        };
        let jobs: Vec<Job> = (0..24).map(|_| job(&mut random)).collect();
        let ceiling = mean.scaled(4, 1).plus(REST);
        let tool = if index.is_multiple_of(2) {
            Tool::MakeFifo
        } else {
            Tool::MakePipe
        };
        let script = |at_once| tool.script(&jobs, at_once);
        let without = self.fixed(Limit::At(ceiling), &script(8)?)?;
        let with = self.with(ceiling, &script(8)?)?;
        let mut fixed = Vec::new();
        for &at_once in self.fewer {
            fixed.push((at_once, self.fixed(Limit::At(ceiling), &script(at_once)?)?));
        }
        let record = Record {
            seed: self.seed,
            index,
            kind: Kind::Make,
            tool,
            at_once: 8,
            ceiling,
            jobs,
            without: Some(without),
            with: Some(with),
            fixed,
            killed: None,
        };
        tell(&record);
        Ok(record)
    }

    fn random(&self, index: u64) -> Result<Record> {
        let mut random = Rng::with_seed(self.seed ^ 0x51ed ^ (index << 20));
        let tool = TOOLS[usize::try_from(index)? % TOOLS.len()];
        let at_once = random.usize(3..=8);
        let ceiling = Bytes::mib(random.u64(96..=256));
        // Together from as much as there is to two and a half times that, and none too large to be alone.
        let mean = ceiling.scaled(random.u64(1000..=2500), 1000 * u64::try_from(at_once)?);
        let count = if matches!(tool, Tool::Shell | Tool::Pipes) {
            at_once
        } else {
            random.usize(8..=20)
        };
        let largest = ceiling.per_mille(350);
        let jobs: Vec<Job> = (0..count)
            .map(|_| Job {
                size: mean.per_mille(random.u64(300..=1500)).min(largest),
                work_ms: random.u64(50..=500),
            })
            .collect();
        let with = self.with(ceiling.plus(REST), &tool.script(&jobs, at_once)?)?;
        let without = self.fixed(Limit::At(ceiling.plus(REST)), &tool.script(&jobs, at_once)?)?;
        let record = Record {
            seed: self.seed,
            index,
            kind: Kind::Random,
            tool,
            at_once,
            ceiling: ceiling.plus(REST),
            jobs,
            without: Some(without),
            with: Some(with),
            fixed: Vec::new(),
            killed: None,
        };
        tell(&record);
        Ok(record)
    }

    /// Compilers of real code.
    fn real(&self) -> Result<Record> {
        let mut random = Rng::with_seed(self.seed);
        let rules: String = (0..12)
            .map(|n| {
                let blocks = random.u64(3..=5);
                format!("unit{n}.o:\n\t@cc -O0 -DBLOCKS={blocks} -c {SOURCES}/table.c -o {PLACE}/unit{n}.o\n")
            })
            .collect();
        let all: Vec<String> = (0..12).map(|n| format!("unit{n}.o")).collect();
        let all = all.join(" ");
        write_makefile(&format!("all: {all}\n.PHONY: all {all}\n{rules}"))?;
        let script = |at_once: usize| format!("exec make -f {PLACE}/Makefile -j{at_once}");
        // Compiler and headers come from the disk, in no measured cgroup.
        let warm = Command::new("chroot")
            .args([
                ROOT,
                "cc",
                "-DBLOCKS=1",
                "-c",
                &format!("{SOURCES}/table.c"),
                "-o",
                "/tmp/warm.o",
            ])
            .status()?;
        ensure!(warm.success(), "the guest's compiler does not work: {warm}");
        let unlimited = self.fixed(Limit::Max, &script(8))?;
        let ceiling = Bytes(unlimited.peak.context("no peak")?).scaled(1, 2);
        let without = self.fixed(Limit::At(ceiling), &script(8))?;
        let with = self.with(ceiling, &script(8))?;
        let mut fixed = Vec::new();
        for &at_once in self.fewer {
            fixed.push((at_once, self.fixed(Limit::At(ceiling), &script(at_once))?));
        }
        let record = Record {
            seed: self.seed,
            index: 0,
            kind: Kind::Real,
            tool: Tool::Compilers,
            at_once: 8,
            ceiling,
            jobs: Vec::new(),
            without: Some(without),
            with: Some(with),
            fixed,
            killed: None,
        };
        tell(&record);
        Ok(record)
    }

    /// Who is paused when the guard is killed, and for how long after it.
    fn killed(&self, index: u64) -> Result<Record> {
        let jobs: Vec<Job> = vec![
            Job {
                size: Bytes::mib(48),
                work_ms: 800
            };
            16
        ];
        let ceiling = Bytes::mib(4 * 48).plus(REST);
        let tool = KILLED[usize::try_from(index)? % KILLED.len()];
        let marker = format!("{ROOT}{PLACE}/passed");
        drop(fs::remove_file(&marker));
        let script = tool.script(&jobs, 8)?;
        let script = format!("({script}) 2>{PLACE}/said && touch {PLACE}/passed");
        let (memory, max) = (ceiling.per_mille(250).0.to_string(), ceiling.0.to_string());
        forget_learnt()?;
        let mut guard = Command::new(BELLOWS)
            .args([
                "exec",
                "--elastic",
                "--memory",
                &memory,
                "--max-memory",
                &max,
                "--",
            ])
            .args(["chroot", ROOT, "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let path = Path::new("/sys/fs/cgroup").join(format!("bellows-exec-{}", guard.id()));
        wait("somebody is paused", Duration::from_secs(60), || {
            Ok(count_stopped(&path) > 0)
        })?;
        // The later, the more tokens are withheld.
        thread::sleep(Duration::from_millis(600 * index));
        let mut counted = (0, 0);
        wait("somebody waits", Duration::from_secs(10), || {
            counted = (count_stopped(&path), count_withheld(guard.id())?);
            Ok(counted != (0, 0))
        })?;
        guard.kill()?;
        let start = Instant::now();
        // What follows is about who goes on, not about who fits.
        Cgroup::open(&path)?.set_limit("memory.max", Limit::Max)?;
        wait("all go on", Duration::from_secs(30), || {
            Ok(count_stopped(&path) == 0)
        })?;
        let resumed_ms = u64::try_from(start.elapsed().as_millis())?;
        let (stopped, withheld) = counted;
        guard.wait()?;
        eprintln!(
            "case Killed {index}: {stopped} paused and {withheld} tokens withheld, all go on after {resumed_ms} ms"
        );
        wait("the build's end", Duration::from_secs(60), || {
            Ok(!path.exists())
        })
        .with_context(|| standing(&path))?;
        let said = fs::read_to_string(format!("{ROOT}{PLACE}/said"))?;
        let record = Record {
            seed: self.seed,
            index,
            kind: Kind::Killed,
            tool,
            at_once: 8,
            ceiling,
            jobs,
            without: None,
            with: None,
            fixed: Vec::new(),
            killed: Some(Killed {
                stopped,
                withheld,
                resumed_ms,
                passed: Path::new(&marker).exists() && !said.contains("INTERNAL"),
            }),
        };
        tell(&record);
        eprintln!("case said: {said}");
        Ok(record)
    }
}

/// Tokens that the guard with this number withholds, by its own records.
fn count_withheld(guard: u32) -> Result<usize> {
    let ledger = Path::new(ledger::DIRECTORY).join(format!("exec-{guard}.ledger"));
    let records = match ledger::read(&ledger::paused(&ledger)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        contents => contents?.records,
    };
    let mut withheld = BTreeMap::new();
    for record in records {
        if let ledger::Record::Tokens { place, taken, .. } = record {
            withheld.insert(place, taken.len());
        }
    }
    Ok(withheld.values().sum())
}

fn count_stopped(cgroup: &Path) -> usize {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let is_stopped = |pid: &&str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('T'))
    };
    processes.lines().filter(is_stopped).count()
}

/// What processes are in a cgroup, and what they wait for.
fn standing(cgroup: &Path) -> String {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let told = processes.lines().map(|pid| {
        let read =
            |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let stat: Vec<String> = read("stat").split(' ').take(4).map(str::to_owned).collect();
        format!("{} in {}", stat.join(" "), read("wchan"))
    });
    told.collect::<Vec<String>>().join("; ")
}

fn tell(record: &Record) {
    let Record {
        index,
        kind,
        tool,
        ceiling,
        without,
        with,
        fixed,
        killed,
        ..
    } = record;
    let ended = |ended: &Ended| {
        let fate = if ended.passed() { "passed" } else { "FAILED" };
        format!(
            "{fate} ({}) in {:?} of {} ms",
            ended.code,
            ended.build_ms,
            ended.wall_us / 1000
        )
    };
    let told = |which: &Option<Ended>| which.as_ref().map(&ended).unwrap_or_default();
    let pauses = with
        .as_ref()
        .map(|with| with.report.to_string())
        .unwrap_or_default();
    let fixed: Vec<String> = fixed
        .iter()
        .map(|(at_once, one)| format!("-j{at_once} {}", ended(one)))
        .collect();
    eprintln!(
        "case {kind:?} {index} {tool:?} {} with {}, without {}; {} {killed:?} {pauses}",
        quantity::format(*ceiling),
        told(with),
        told(without),
        fixed.join(", "),
    );
    for failed in with.iter().filter(|with| !with.passed()) {
        eprintln!("case failed: {:?}", failed.last_lines);
    }
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let of = |kind: Kind| records.iter().filter(move |record| record.kind == kind);
    let passed = |which: &Option<Ended>| which.as_ref().is_some_and(Ended::passed);
    let count = |kind, which: fn(&Record) -> &Option<Ended>| {
        of(kind).filter(|record| passed(which(record))).count()
    };
    let without: fn(&Record) -> &Option<Ended> = |record| &record.without;
    let with: fn(&Record) -> &Option<Ended> = |record| &record.with;
    let ratio = |record: &Record| {
        let fixed = record.fixed.iter().filter(|(_, fixed)| fixed.passed());
        let best = fixed.filter_map(|(_, fixed)| fixed.build_ms).min()?;
        let with = record.with.as_ref().filter(|with| with.passed())?;
        Some(with.build_ms? as f64 / best as f64)
    };
    let ratios = |kind| -> Vec<f64> { of(kind).filter_map(ratio).collect() };
    let made = ratios(Kind::Make);
    let all = || records.iter().filter_map(|record| record.with.as_ref());
    let sum = |name: &str| {
        all()
            .filter_map(|with| with.report[name].as_u64())
            .sum::<u64>()
    };
    let real = of(Kind::Real).next();
    let seconds = |ended: Option<&Ended>| Some(rounded(ended?.build_ms? as f64 / 1000.0));
    let killed: Vec<Killed> = records.iter().filter_map(|record| record.killed).collect();
    let resumed_ms = killed.iter().map(|killed| killed.resumed_ms).max();
    Ok(json!({
        "n": of(Kind::Make).count(),
        "passed_without": count(Kind::Make, without),
        "passed_with": count(Kind::Make, with),
        "time_vs_best_fixed_j": rounded(percentile(&made, 50.0)),
        "time_vs_best_fixed_j_max": rounded(percentile(&made, 100.0)),
        "deadlocks": all().filter(|with| with.code == DEADLINE_CODE || with.code == 137 && with.oom_kill == 0).count(),
        "random": of(Kind::Random).count(),
        "random_passed_without": count(Kind::Random, without),
        "random_passed_with": count(Kind::Random, with),
        "real_passed_without": count(Kind::Real, without),
        "real_passed_with": count(Kind::Real, with),
        "real_kills_without": real.and_then(|real| Some(real.without.as_ref()?.oom_kill)),
        "real_kills_with": real.and_then(|real| Some(real.with.as_ref()?.oom_kill)),
        "real_seconds_without": seconds(real.and_then(|real| real.without.as_ref())),
        "real_seconds_with": seconds(real.and_then(|real| real.with.as_ref())),
        "real_waits": real.and_then(|real| Some(real.with.as_ref()?.report["lent"].clone())),
        "real_time_vs_best_fixed_j": ratios(Kind::Real).first().copied().map(rounded),
        "resumed_after_kill_s": resumed_ms.map(|ms| ms as f64 / 1000.0),
        "killed": killed.len(),
        "killed_passed": killed.iter().filter(|killed| killed.passed).count(),
        "killed_stopped": killed.iter().map(|killed| killed.stopped).sum::<usize>(),
        "killed_withheld": killed.iter().map(|killed| killed.withheld).sum::<usize>(),
        "pauses": sum("pauses"),
        "standstills": sum("standstills"),
        "tokens_missing": all().map(|with| with.tokens_missing).sum::<usize>(),
    }))
}
