//! `pod-path`: from the watermark to the raised limit, by each path that there is.
//!
//! By the API a container is held until the kubelet has carried out its resize; the kubelet's own part, from the spec that
//! says it, is beside that. By its cgroup it is raised by hand, and the API asked right after. The runtime is asked by the
//! bench itself, for a pod that nobody guards: the agent does so only where there is no Kubernetes.
//!
//! What a burst costs etcd is counted by revisions, from before the burst until its limit is the original again, less what
//! is written meanwhile anyway: the agent's patches, the kubelet's statuses and all Events are in it.

use std::{
    path::Path as FilePath,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use bellows::{
    attribution::container_id,
    cgroup::{Cgroup, Limit},
    clock::now,
    cri::{Runtime, resources, with_memory},
    ledger::Record as LedgerRecord,
};
use bellows_core::{Action, Bytes, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    bursts::{log_uniform, mib},
    pod_bursts::{is_guarded, ledger_of, raises},
    pod_faults::bursting,
    record::{Records, parsed, percentile, rounded},
    runner::Probe,
};
use crate::{
    agent::Agent,
    node::{ApiServer, CONTAINERD_SOCKET, Node, wait},
    pods::{Cluster, Spec},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Bursts by each path.
    #[arg(long, default_value_t = 20)]
    n: u64,
    /// Seed of the bursts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    server: ApiServer,
}

/// How a limit is raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Path {
    Api,
    Cgroup,
    Runtime,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    index: u64,
    seed: u64,
    path: Path,
    limit: Bytes,
    peak: Bytes,
    threads: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    case: Case,
    /// When it was seen to reach the watermark, or the runtime was asked.
    begun: Nanos,
    /// When the limit was seen to be raised, from outside.
    raised: Option<Nanos>,
    /// When the spec was seen to say so.
    in_spec: Option<Nanos>,
    /// Revisions of etcd meanwhile, and those that would have been anyway.
    writes: u64,
    writes_anyway: f64,
    /// Reasons of the Events among them.
    events: Vec<String>,
    raises: usize,
    oom_kill: u64,
    restarts: i32,
    is_restored: bool,
}

impl Record {
    fn took(&self) -> Option<f64> {
        Some(seconds(self.raised?.since(self.begun)))
    }

    /// What the kubelet took for it.
    fn kubelet(&self) -> Option<f64> {
        let in_spec = self.in_spec.filter(|_| self.case.path == Path::Api)?;
        Some(seconds(self.raised?.since(in_spec)))
    }
}

const PATHS: [Path; 3] = [Path::Api, Path::Cgroup, Path::Runtime];
/// For how long it is looked what is written while nothing happens.
const QUIET: Duration = Duration::from_secs(20);
/// What comes after a limit is the original again: Events, and the kubelet's last word.
const SETTLES: Duration = Duration::from_secs(3);
const RESTORED: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(20);

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let mut agent = Agent::start()?;
    let tasks = tokio::runtime::Runtime::new()?;
    let runtime = tasks.block_on(async { Runtime::at(FilePath::new(CONTAINERD_SOCKET)) })?;
    let mut bench = Bench {
        cluster,
        probe: Probe::start()?,
        tasks,
        runtime,
        writes_a_second: 0.0,
    };
    bench.writes_a_second = bench.writes_while_quiet()?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    let cases = options.n * u64::try_from(PATHS.len())?;
    for (index, &path) in (0..cases).zip(PATHS.iter().cycle()) {
        let limit = Bytes(mib(log_uniform(&mut random, 48.0, 128.0)).0 >> 20 << 20);
        let case = Case {
            index,
            seed: options.seed,
            path,
            limit,
            peak: limit.per_mille(random.u64(2000..4000)),
            threads: random.u64(1..=4),
        };
        let record = match path {
            Path::Runtime => bench.by_runtime(case)?,
            Path::Api | Path::Cgroup => bench.by_agent(case)?,
        };
        node.check()?;
        agent.check()?;
        eprintln!(
            "case {index}: {path:?}: raised after {:?} s, {:?} s by the kubelet; {} raises, {} writes of which {:.1} anyway and {:?} Events; {} kills, restored {}",
            record.took(),
            record.kubelet(),
            record.raises,
            record.writes,
            record.writes_anyway,
            record.events,
            record.oom_kill,
            record.is_restored,
        );
        records.write(&record)?;
    }
    Ok(())
}

struct Bench {
    cluster: Cluster,
    probe: Probe,
    tasks: tokio::runtime::Runtime,
    runtime: Runtime,
    /// Of etcd, while nothing happens.
    writes_a_second: f64,
}

impl Bench {
    fn writes_while_quiet(&self) -> Result<f64> {
        let (before, begun) = (self.cluster.revision()?, Instant::now());
        thread::sleep(QUIET);
        let writes = self.cluster.revision()?.saturating_sub(before);
        Ok(writes as f64 / begun.elapsed().as_secs_f64())
    }

    fn by_agent(&self, case: Case) -> Result<Record> {
        let name = format!("path-{}", case.index);
        let spec = Spec {
            raise_first: case.path == Path::Cgroup,
            ..bursting(&name, case.limit, case.peak, case.threads)
        };
        self.cluster.create(&spec)?;
        let cgroup = self.cluster.wait_running(&name)?;
        let watched = cgroup.clone();
        let sampler = self.probe.sample(move || Some(watched.clone()));
        wait("it is guarded", Duration::from_secs(8), || {
            Ok(is_guarded(&cgroup))
        })?;
        // What comes of its start has come, and it does not burst yet.
        thread::sleep(SETTLES);
        let events_before = self.cluster.events(&name)?.len();
        let (before, begun) = (self.cluster.revision()?, Instant::now());
        let looking = Looking::start(&name, case.limit);
        wait("it bursts", RESTORED, || {
            Ok(raises(&ledger_of(cgroup.id())).next().is_some())
        })?;
        let restored = wait("it is restored", RESTORED, || {
            let [in_spec, in_runtime] = self.cluster.said_limits(&name)?;
            let in_force = cgroup.limit("memory.max").map(Limit::bytes).ok();
            let all = [in_spec, in_runtime, in_force];
            Ok(all == [Some(case.limit); 3] && has_shrunk(&cgroup))
        });
        thread::sleep(SETTLES);
        let writes = self.cluster.revision()?.saturating_sub(before);
        let writes_anyway = self.writes_a_second * begun.elapsed().as_secs_f64();
        let events = self.cluster.events(&name)?.into_iter().skip(events_before);
        let events = events.map(|(reason, _)| reason).collect();
        let in_spec = looking.finish()?;
        let track = sampler.finish();
        let ledger = ledger_of(cgroup.id());
        let (asked, _) = raises(&ledger).next().context("it was not raised")?;
        let raised = track.samples.iter().find(|sample| {
            let is_later = Nanos(sample.at_us * 1000) >= begun_at(&ledger, asked);
            is_later && sample.limit > case.limit.0
        });
        let record = Record {
            case,
            begun: begun_at(&ledger, asked),
            raised: raised.map(|sample| Nanos(sample.at_us * 1000)),
            in_spec,
            writes,
            writes_anyway,
            events,
            raises: raises(&ledger).count(),
            oom_kill: track.oom_kill,
            restarts: self.cluster.restarts(&name)?,
            is_restored: restored.is_ok(),
        };
        self.cluster.delete(&name)?;
        Ok(record)
    }

    fn by_runtime(&self, case: Case) -> Result<Record> {
        let name = format!("path-{}", case.index);
        let spec = Spec {
            max: None,
            ..bursting(&name, case.limit, case.limit.per_mille(600), 1)
        };
        self.cluster.create(&spec)?;
        let cgroup = self.cluster.wait_running(&name)?;
        let status = self.cluster.status(&name)?.context("it has no status")?;
        let id = status.container_id.context("it has no id")?;
        let id = container_id(&id);
        let said = self.tasks.block_on(self.runtime.status(id))?;
        let to = case.limit.scaled(2, 1);
        let resources = with_memory(to, &resources(said.0));
        let is_over = Arc::new(AtomicBool::new(false));
        let (seen, ended) = (cgroup.clone(), Arc::clone(&is_over));
        let looking = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                if seen.limit("memory.max").ok() == Some(Limit::At(to)) {
                    return Some(now());
                }
                thread::sleep(Duration::from_millis(1));
            }
            None
        });
        let begun = now();
        let updated = self.tasks.block_on(self.runtime.update(id, resources));
        is_over.store(true, Ordering::Relaxed);
        let raised = looking.join();
        updated?;
        let Ok(raised) = raised else {
            bail!("whoever looks at the limit has panicked");
        };
        let record = Record {
            case,
            begun,
            // It may have been there between the last two looks.
            raised: raised.or_else(|| Some(now())),
            in_spec: None,
            writes: 0,
            writes_anyway: 0.0,
            events: Vec::new(),
            raises: 0,
            oom_kill: cgroup.events()?.oom_kill,
            restarts: self.cluster.restarts(&name)?,
            is_restored: true,
        };
        self.cluster.delete(&name)?;
        Ok(record)
    }
}

fn has_shrunk(cgroup: &Cgroup) -> bool {
    ledger_of(cgroup.id()).iter().any(|record| {
        matches!(
            record,
            LedgerRecord::Intend {
                action: Action::Shrink { .. },
                ..
            }
        )
    })
}

/// When the watermark of a raise was reached: it was held for that, or asked for at once.
fn begun_at(ledger: &[LedgerRecord], asked: Nanos) -> Nanos {
    let mut held = ledger.iter().filter_map(|record| match record {
        LedgerRecord::Intend {
            at,
            action: Action::Hold,
            ..
        } => Some(*at),
        _ => None,
    });
    held.rfind(|at| *at <= asked).unwrap_or(asked)
}

/// Looks when the spec first says more than the original.
pub(super) struct Looking {
    is_over: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<Option<Nanos>>>,
}

impl Looking {
    pub(super) fn start(name: &str, original: Bytes) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let (name, ended) = (name.to_owned(), Arc::clone(&is_over));
        let thread = thread::spawn(move || {
            let cluster = Cluster::connect()?;
            while !ended.load(Ordering::Relaxed) {
                if cluster.said_limits(&name)?[0].is_some_and(|says| says > original) {
                    return Ok(Some(now()));
                }
                thread::sleep(LOOK);
            }
            Ok(None)
        });
        Self { is_over, thread }
    }

    pub(super) fn finish(self) -> Result<Option<Nanos>> {
        self.is_over.store(true, Ordering::Relaxed);
        let looked = self.thread.join();
        looked.unwrap_or_else(|_| bail!("whoever looks at the API has panicked"))
    }
}

fn seconds(time: Nanos) -> f64 {
    time.0 as f64 / 1e9
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let of = |path: Path| {
        records
            .iter()
            .filter(move |record| record.case.path == path)
    };
    let took = |path: Path| -> Vec<f64> { of(path).filter_map(Record::took).collect() };
    let kubelet: Vec<f64> = records.iter().filter_map(Record::kubelet).collect();
    let by_agent = || {
        records
            .iter()
            .filter(|record| record.case.path != Path::Runtime)
    };
    let writes: Vec<f64> = by_agent()
        .map(|record| record.writes as f64 - record.writes_anyway)
        .collect();
    let half = |values: &[f64]| rounded(percentile(values, 50.0));
    let most = |values: &[f64]| rounded(percentile(values, 100.0));
    Ok(json!({
        "cases": records.len(),
        "raised": records.iter().filter(|record| record.raised.is_some()).count(),
        "api_p50_s": half(&took(Path::Api)),
        "api_max_s": most(&took(Path::Api)),
        "kubelet_p50_s": half(&kubelet),
        "cri_p50_s": half(&took(Path::Runtime)),
        "cri_max_s": most(&took(Path::Runtime)),
        "cgroup_p50_s": half(&took(Path::Cgroup)),
        "cgroup_max_s": most(&took(Path::Cgroup)),
        "etcd_writes_per_burst": half(&writes),
        "etcd_writes_per_burst_max": most(&writes),
        "raises_per_burst_max": by_agent().map(|record| record.raises).max(),
        "kills": records.iter().map(|record| record.oom_kill).sum::<u64>(),
        "restarts": records.iter().map(|record| record.restarts).sum::<i32>(),
        "restored": records.iter().filter(|record| record.is_restored).count(),
    }))
}
