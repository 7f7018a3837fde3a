//! `faults`: what happens to a node under its agent, while a container bursts.
//!
//! A container that is killed although its agent lived was killed for want of care (`avoidable_kills`). After a fault
//! cgroup, pod and runtime must agree soon, compared with what the runtime itself takes for an update, and all be at
//! rest in the end. Whatever the agent has lost on the way must be seen in its metrics.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    sync::atomic::Ordering,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
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
    container_bursts::{is_at_rest, limits, said},
    container_edges::recorded,
    deaths::is_held,
    excused, gate,
    record::{Records, parsed, percentile, rounded},
    runner::Probe,
};
use crate::{
    containers::{Machine, Spec, Standalone, Started, policy},
    node::{CONTAINERD_SOCKET, has_systemd, log_tail, shell, wait},
    proxy::{self, Delays},
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

const GUARDED: &str = "faults";
const MAX: Bytes = Bytes::mib(1024);
/// How long a burst stays at its peak: no fault that comes right after its begin comes too late.
const HOLD_MS: u64 = 3000;
const SOCKET: &str = "/run/late/late.sock";
const METRICS: &str = "127.0.0.1:9464";
/// Where the agent has its state, and what takes its room.
const STATE: &str = "/run/bellows";
const FILLER: &str = "/run/bellows/filler";
const LATE_MS: u64 = 10_000;
/// Cgroups that come and go while the agent stands still; its ring holds a thousand.
const CGROUPS: u64 = 3000;
const UPDATES: u64 = 20;
const MOMENT: Duration = Duration::from_secs(40);
const LONGEST: Nanos = Nanos::millis(90_000);

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

struct Bed {
    machine: Machine,
    agent: Option<Standalone>,
    /// The agent's.
    cgroup: Cgroup,
    delays: Delays,
    probe: Probe,
}

impl Bed {
    fn start_agent(&mut self) -> Result<()> {
        // A boost that nobody gets: the kernel then tells of each new cgroup.
        let policies = format!(
            "{}  - boosts: [{{on: {{start: true}}, cpu: 1, until: {{atMost: 1m}}}}]\n    name: nobody\n",
            policy(GUARDED, MAX)
        );
        let arguments = ["--runtime-endpoint", SOCKET, "--metrics", METRICS];
        let agent = Standalone::start_with(&policies, &arguments, Some(&self.cgroup))?;
        self.agent = Some(agent);
        wait("its metrics are served", Duration::from_secs(30), || {
            Ok(metrics().is_ok())
        })
        .with_context(|| log_tail("bellows", 20))
    }

    fn run_case(&mut self, case: Case) -> Result<Record> {
        let before = metrics()?;
        let mut times = Times::default();
        if case.fault == Fault::RingOverflow {
            times.fault = now().0;
            self.cgroup.write("cgroup.freeze", "1")?;
        }
        let started = self.machine.run(&spec(case))?;
        let watched = started.cgroup.clone();
        let sampler = self.probe.sample(move || Some(watched.clone()));
        let came = self.make(case, &started, &mut times)?;
        let (agreed_ms, restored_ms) = self.settle(case, &started, times)?;
        let track = sampler.finish();
        let said = Machine::said(&started);
        let mut wrong = self.wrong(&started, case, track.oom_kill > 0);
        let after = metrics()?;
        self.machine.remove(&started)?;
        let is_left = wait("its record is removed", Duration::from_secs(30), || {
            Ok(recorded(&started).is_none())
        });
        wrong.extend(is_left.err().map(|error| error.to_string()));
        if let Some(agent) = &mut self.agent {
            agent.check()?;
        }
        let counted = after.into_iter().map(|(name, value)| {
            let grown = value - before.get(&name).copied().unwrap_or(0.0);
            (name, grown)
        });
        let counted: BTreeMap<String, f64> = counted.filter(|&(_, grown)| grown != 0.0).collect();
        if counted
            .get("state_failures")
            .is_some_and(|&failed| failed > 0.0)
        {
            wrong.push("something could not be written down".to_owned());
        }
        Ok(Record {
            case,
            attempted: came && (!case.fault.meets_burst() || is_between(&said, times)),
            said,
            times,
            oom_kill: track.oom_kill,
            killed_at: track.killed_at_ns,
            stood_still_before_kill_us: self.probe.stood_still_before_kill(&track).0 / 1000,
            agreed_ms,
            restored_ms,
            wrong,
            counted,
        })
    }

    /// Makes the fault, and ends it; returns whether its moment came.
    fn make(&mut self, case: Case, started: &Started, times: &mut Times) -> Result<bool> {
        if case.fault == Fault::RingOverflow {
            self.overflow(times)?;
            gate::wait_braked(&started.cgroup)?;
            times.unguarded = Some((times.over, now().0));
            gate::open(&started.cgroup)?;
            return Ok(true);
        }
        gate::wait_braked(&started.cgroup)?;
        if let Fault::AgentKilled(step) = case.fault {
            return self.kill_agent(step, case, started, times);
        }
        self.disturb(case, started, times)
    }

    /// Makes a fault beside an agent that lives.
    fn disturb(&mut self, case: Case, started: &Started, times: &mut Times) -> Result<bool> {
        let apart = Duration::from_millis(case.after_ms);
        let lasts = Duration::from_millis(case.lasts_ms);
        // What lasts no time comes when there is something to be lost.
        if case.fault == Fault::DaemonReload {
            gate::open(&started.cgroup)?;
            if !comes(started, || is_raised(case, started)) {
                times.over = now().0;
                return Ok(false);
            }
            times.is_raised = true;
        } else if !case.is_first {
            gate::open(&started.cgroup)?;
            thread::sleep(apart);
        }
        let begins_later = || {
            if !case.is_first {
                return Ok(());
            }
            thread::sleep(apart);
            gate::open(&started.cgroup)
        };
        times.fault = now().0;
        match case.fault {
            Fault::RuntimeKilled => {
                self.machine.kill_containerd()?;
                begins_later()?;
                thread::sleep(lasts);
                self.machine.start_containerd()?;
            }
            Fault::RequestsLate | Fault::AnswersLate => {
                let delays = &self.delays;
                let late = if case.fault == Fault::RequestsLate {
                    &delays.requests
                } else {
                    &delays.answers
                };
                late.store(LATE_MS, Ordering::Relaxed);
                begins_later()?;
                thread::sleep(Duration::from_millis(LATE_MS) + lasts);
                late.store(0, Ordering::Relaxed);
            }
            Fault::DaemonReload => drop(shell("systemctl daemon-reload")?),
            Fault::StateFull => {
                fill(Path::new(FILLER))?;
                begins_later()?;
                thread::sleep(Duration::from_millis(LATE_MS));
                fs::remove_file(FILLER)?;
            }
            Fault::RingOverflow | Fault::AgentKilled(_) => {}
        }
        times.over = now().0;
        Ok(true)
    }

    /// More begins than the ring of an agent holds that stands still; then it goes on.
    fn overflow(&self, times: &mut Times) -> Result<()> {
        let passing = Path::new(CGROUP_ROOT).join("passing");
        for _ in 0..CGROUPS {
            fs::create_dir(&passing)?;
            fs::remove_dir(&passing)?;
        }
        self.cgroup.write("cgroup.freeze", "0")?;
        times.over = now().0;
        Ok(())
    }

    fn kill_agent(
        &mut self,
        step: Step,
        case: Case,
        started: &Started,
        times: &mut Times,
    ) -> Result<bool> {
        let asked = || Some(*recorded(started)?.limit?.asked.first()?);
        let is_now = || match step {
            Step::Rest => true,
            Step::Held => is_held(&started.cgroup),
            Step::Asked => {
                asked().is_some_and(|to| to > case.limit) && limit_of(started) == Some(case.limit)
            }
            Step::Raised => is_raised(case, started),
            Step::Lowering => {
                let (asked, limit) = (asked(), limit_of(started));
                is_raised(case, started) && asked.is_some() && asked < limit
            }
        };
        if step != Step::Rest {
            gate::open(&started.cgroup)?;
        }
        if !comes(started, is_now) {
            times.over = now().0;
            return Ok(false);
        }
        times.fault = now().0;
        times.is_raised = is_raised(case, started);
        self.cgroup.write("cgroup.kill", "1")?;
        drop(self.agent.take());
        thread::sleep(Duration::from_millis(500));
        self.start_agent()?;
        // Until it has a brake again, or a limit without one, it is nobody's: so long the fault lasts.
        let again = wait("it is guarded again", MOMENT, || {
            let high = started.cgroup.limit("memory.high");
            let max = started.cgroup.limit("memory.max");
            Ok(match (high, max) {
                (Ok(high), Ok(max)) => high != Limit::Max || max.bytes() >= MAX,
                // It is dead.
                _ => true,
            })
        });
        times.over = now().0;
        times.unguarded = Some((times.fault, times.over));
        again?;
        if step == Step::Rest {
            gate::open(&started.cgroup)?;
        }
        Ok(true)
    }

    /// Waits until all agree that it is raised, and then until all is as before.
    fn settle(
        &self,
        case: Case,
        started: &Started,
        times: Times,
    ) -> Result<(Option<u64>, Option<u64>)> {
        let over = Nanos(times.over);
        let (mut agreed, mut end) = (None, None);
        let mut raised = times.is_raised.then_some(over);
        loop {
            if self.machine.exit_code(started)?.is_some() {
                return Ok((agreed, None));
            }
            // At rest all agree on what nobody has touched. Whose burst is over has been raised.
            if raised.is_none() && (is_raised(case, started) || said(started).is_some()) {
                raised = Some(now());
            }
            if let Some(raised) = raised
                && agreed.is_none()
                && self.do_agree(started)?
            {
                agreed = Some(now().since(raised).as_millis());
            }
            end = end.or_else(|| said(started).map(|said| Nanos(said.end_ns).max(over)));
            if let Some(end) = end
                && is_at_rest(&self.machine, started, Some(case.limit))?
            {
                // They may have come to agree since the look above.
                let agreed = agreed.or_else(|| Some(now().since(raised?).as_millis()));
                return Ok((agreed, Some(now().since(end).as_millis())));
            }
            if now().since(end.unwrap_or(over)) > LONGEST {
                return Ok((agreed, None));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn do_agree(&self, started: &Started) -> Result<bool> {
        let [told, own, pod] = limits(&self.machine, started)?;
        Ok(own.is_some() && own == told && pod >= own && !is_held(&started.cgroup))
    }

    /// What is not as it should be in the end.
    fn wrong(&self, started: &Started, case: Case, was_killed: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        let pod = || started.pod.limit("memory.max").map(Limit::bytes);
        // A pod comes down a while after a container of its own has ended.
        let is_low = wait("the pod's limit", Duration::from_secs(30), || {
            Ok(pod()? == case.limit)
        });
        if is_low.is_err() {
            wrong.push(format!("its pod has {:?}", pod().ok()));
        }
        if was_killed {
            return wrong;
        }
        match is_at_rest(&self.machine, started, Some(case.limit)) {
            Ok(true) => {}
            Ok(false) => wrong.push(format!(
                "it has {:?}, and its runtime says {:?}",
                started.cgroup.limit("memory.max").ok(),
                self.machine
                    .status(started)
                    .ok()
                    .and_then(|status| status.resources)
            )),
            Err(error) => wrong.push(error.to_string()),
        }
        if is_held(&started.cgroup) {
            wrong.push("it is held".to_owned());
        }
        wrong
    }
}

/// Waits for a moment for as long as the container lives; returns whether it came. The runtime is not asked: it answers
/// nobody while it updates, which is when some of these moments are.
fn comes(started: &Started, is_now: impl Fn() -> bool) -> bool {
    let begun = now();
    while !is_now() {
        let lives = started.cgroup.populated().unwrap_or(false);
        if !lives || now().since(begun) > LONGEST {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

fn spec(case: Case) -> Spec {
    let words = burst_words(case.limit.per_mille(500), case.peak, case.threads);
    let more = ["--hold-ms", &HOLD_MS.to_string(), "--after-ms", "300000"].map(str::to_owned);
    let mut command = ["/bellows-guest", "load"].map(str::to_owned).to_vec();
    command.extend(words.into_iter().chain(gate::closed()).chain(more));
    Spec {
        limit: Some(case.limit),
        labels: vec![("guard".to_owned(), GUARDED.to_owned())],
        ..Spec::of(&format!("fault-{}", case.index), command)
    }
}

/// Its limit, while it lives.
fn limit_of(started: &Started) -> Option<Bytes> {
    started.cgroup.limit("memory.max").map(Limit::bytes).ok()
}

fn is_raised(case: Case, started: &Started) -> bool {
    limit_of(started).is_some_and(|limit| limit > case.limit)
}

/// Whether a burst had begun before a fault was over, and was not over before the fault; by what the load has said.
fn is_between(said: &[Value], times: Times) -> bool {
    let of = |key: &str| said.iter().find_map(|said| said[key].as_u64());
    let has_begun = of("start_ns").is_some_and(|begun| begun <= times.over);
    // One that was killed has not said when it ended.
    has_begun && of("end_ns").is_none_or(|ended| ended >= times.fault)
}

/// Takes all room that is left.
fn fill(path: &Path) -> Result<()> {
    let mut file = fs::File::create(path)?;
    let page = [0; 4096];
    loop {
        match file.write(&page) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
            Err(error) => bail!(error),
        }
    }
}

/// The metrics that tell of losses, summed up over their labels.
fn metrics() -> Result<BTreeMap<String, f64>> {
    let mut stream = TcpStream::connect(METRICS)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    ensure!(head.contains(" 200 "), "{head}");
    ensure!(body.ends_with("# EOF\n"), "the metrics are cut off: {body}");
    let mut sums = BTreeMap::<String, f64>::new();
    for line in body.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').context("a metric without a value")?;
        let name = series.split('{').next().unwrap_or(series);
        let name = match name {
            "bellows_runtime_calls_total" if !series.contains("result=\"ok\"") => {
                "runtime_failures"
            }
            "bellows_raises_by_hand_total" => "raises_by_hand",
            "bellows_runtime_late_total" => "runtime_late",
            "bellows_state_full_total" => "state_full",
            "bellows_state_failures_total" => "state_failures",
            "bellows_events_lost_total" => "events_lost",
            "bellows_requests_failed_total" => "requests_failed",
            _ => continue,
        };
        *sums.entry(name.to_owned()).or_default() += value.parse::<f64>()?;
    }
    Ok(sums)
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
