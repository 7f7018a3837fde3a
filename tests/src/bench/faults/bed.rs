//! One case: the fault is made at its moment, and what comes of it looked at until all is at rest.

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

use super::{
    super::{
        bursts::burst_words,
        container_bursts::{is_at_rest, limits, said},
        container_edges::recorded,
        deaths::is_held,
        gate,
        runner::Probe,
    },
    Case, Fault, Record, SOCKET, Step, Times, is_between,
};
use crate::{
    containers::{Machine, Spec, Standalone, Started, policy},
    node::{log_tail, shell, wait},
    proxy::Delays,
};

const GUARDED: &str = "faults";
const MAX: Bytes = Bytes::mib(1024);
/// How long a burst stays at its peak: no fault that comes right after its begin comes too late.
const HOLD_MS: u64 = 3000;
const METRICS: &str = "127.0.0.1:9464";
/// What takes the room of its state.
const FILLER: &str = "/run/bellows/filler";
const LATE_MS: u64 = 10_000;
/// Cgroups that come and go while the agent stands still; its ring holds a thousand.
const CGROUPS: u64 = 3000;
const MOMENT: Duration = Duration::from_secs(40);
const LONGEST: Nanos = Nanos::millis(90_000);

pub(super) struct Bed {
    pub(super) machine: Machine,
    pub(super) agent: Option<Standalone>,
    /// The agent's.
    pub(super) cgroup: Cgroup,
    pub(super) delays: Delays,
    pub(super) probe: Probe,
}

impl Bed {
    pub(super) fn start_agent(&mut self) -> Result<()> {
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

    pub(super) fn run_case(&mut self, case: Case) -> Result<Record> {
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
