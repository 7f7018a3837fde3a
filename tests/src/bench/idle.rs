//! `idle`: what the agent costs while nothing happens, with 10, 100 and 1,000 guarded pods.
//!
//! The real `bellows run` against the real API server. A thousand pods fit on no kubelet, and an idle
//! agent needs none: the pods are created with this node's name, their status says that they run, and
//! their cgroups are made by hand where a kubelet would have made them. Everything that the agent looks
//! at is as it would be.
//!
//! Counted from outside: context switches of all threads of the agent and its parent (each wake-up ends
//! in one), reads of files in the pods' cgroups (inotify sees each, two of the same file in a row as one),
//! and resident memory.

use std::{
    fs,
    mem::MaybeUninit,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use bellows::{
    cgroup::Limit,
    explain::LEDGER,
    ledger::{self, Record as LedgerRecord},
};
use bellows_core::Bytes;
use clap::Args;
use rustix::fs::inotify;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    inside,
    record::{Records, parsed, rounded},
};
use crate::{
    agent::Agent,
    control_plane::ControlPlane,
    node::{self, ApiServer, wait},
    pods::{Cluster, Spec},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Seconds of quiet at each size.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The most pods; sizes above it are left out.
    #[arg(long, default_value_t = 1000)]
    n: u64,
    #[command(flatten)]
    server: ApiServer,
}

/// What was counted of one process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Counted {
    /// Its name and its threads' names, with the context switches of each.
    switches: Vec<(String, u64)>,
    /// `syscr` of `/proc/PID/io`: read calls of any kind.
    read_calls: u64,
    /// `VmRSS`, `RssAnon` and `RssFile` in KiB.
    rss_kib: u64,
    anonymous_kib: u64,
    file_kib: u64,
}

/// One size.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    cgroups: u64,
    milliseconds: u64,
    /// Reads of files in the pods' cgroups.
    cgroup_reads: u64,
    /// The parent and the agent, before and after.
    before: Vec<Counted>,
    after: Vec<Counted>,
}

const SIZES: [u64; 3] = [10, 100, 1000];
const LIMIT: Bytes = Bytes::mib(64);
/// After the last pod was adopted: Events are still on their way.
const SETTLE: Duration = Duration::from_secs(15);

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    node::write_kubeconfig(&options.server)?;
    let _control_plane = ControlPlane::start(&options.server)?;
    let cluster = Cluster::connect()?;
    let mut agent = Agent::start()?;
    let mut pods = 0;
    let mut reads = Reads::new()?;
    for size in SIZES.into_iter().filter(|&size| size <= options.n) {
        for directory in create(&cluster, pods..size)? {
            reads.watch(&directory)?;
        }
        pods = size;
        wait("every pod is guarded", Duration::from_secs(600), || {
            agent.check()?;
            Ok(adopted()? == size)
        })?;
        thread::sleep(SETTLE);
        // Who adopts must read: what sees nothing of that would see nothing later.
        ensure!(reads.take()? > 0, "reads of files are not seen");
        let before = agent_processes(&agent)?;
        let start = Instant::now();
        thread::sleep(Duration::from_secs(options.seconds));
        let milliseconds = u64::try_from(start.elapsed().as_millis())?;
        let after = agent_processes(&agent)?;
        let record = Record {
            cgroups: size,
            milliseconds,
            cgroup_reads: reads.take()?,
            before,
            after,
        };
        eprintln!(
            "case {size}: {:.2} wake-ups a second, {} reads, {} KiB",
            record.wakeups_per_second(),
            record.cgroup_reads,
            rss(&record.after)
        );
        records.write(&record)?;
    }
    Ok(())
}

/// Pods that the agent has taken on.
fn adopted() -> Result<u64> {
    let path = Path::new(LEDGER);
    if !path.exists() {
        return Ok(0);
    }
    let records = ledger::read(path)?.records;
    let adopted = records
        .iter()
        .filter(|record| matches!(record, LedgerRecord::Adopt { .. }));
    Ok(u64::try_from(adopted.count())?)
}

/// Creates pods that run nowhere but in their status; returns their containers' cgroups.
fn create(cluster: &Cluster, indexes: std::ops::Range<u64>) -> Result<Vec<PathBuf>> {
    let mut directories = Vec::new();
    for index in indexes {
        let spec = Spec {
            name: format!("idle-{index}"),
            limit: LIMIT,
            max: Some(LIMIT.scaled(8, 1)),
            command: vec!["/bellows-guest".to_owned()],
            host: false,
            liveness: None,
            whole_pod: false,
            cpu: None,
            restarts: false,
            raise_first: false,
        };
        cluster.create(&spec)?;
        // As long as the ids of containerd.
        let id = format!("{index:064x}");
        let uid = cluster.say_running(&spec.name, &id)?;
        let cgroup = inside::create(&format!("kubepods/burstable/pod{uid}/{id}"))?;
        cgroup.set_limit("memory.max", Limit::At(LIMIT))?;
        directories.push(cgroup.path().to_owned());
    }
    Ok(directories)
}

/// Counts reads of files in directories.
struct Reads(std::os::fd::OwnedFd);

impl Reads {
    fn new() -> Result<Self> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let queue = "/proc/sys/fs/inotify/max_queued_events";
        fs::write(queue, "1000000")?;
        Ok(Self(inotify::init(flags)?))
    }

    fn watch(&mut self, directory: &Path) -> Result<()> {
        inotify::add_watch(&self.0, directory, inotify::WatchFlags::ACCESS)?;
        Ok(())
    }

    /// Reads since the last look.
    fn take(&mut self) -> Result<u64> {
        let mut buffer = [MaybeUninit::uninit(); 65_536];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut reads = 0;
        loop {
            match reader.next() {
                Ok(event) => {
                    ensure!(
                        !event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW),
                        "more reads than can be counted"
                    );
                    reads += 1;
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(reads),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn agent_processes(agent: &Agent) -> Result<Vec<Counted>> {
    let processes = agent.processes()?;
    ensure!(processes.len() == 2, "the agent is {processes:?}");
    processes.iter().map(|&process| count(process)).collect()
}

fn count(process: u32) -> Result<Counted> {
    let directory = PathBuf::from(format!("/proc/{process}"));
    let mut switches = Vec::new();
    for entry in fs::read_dir(directory.join("task"))? {
        let status = fs::read_to_string(entry?.path().join("status"))?;
        let name = status.lines().find_map(|line| line.strip_prefix("Name:"));
        let sum = ["voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"]
            .map(|name| number(&status, name))
            .iter()
            .sum();
        switches.push((name.unwrap_or_default().trim().to_owned(), sum));
    }
    let io = fs::read_to_string(directory.join("io"))?;
    let status = fs::read_to_string(directory.join("status"))?;
    Ok(Counted {
        switches,
        read_calls: number(&io, "syscr"),
        rss_kib: number(&status, "VmRSS"),
        anonymous_kib: number(&status, "RssAnon"),
        file_kib: number(&status, "RssFile"),
    })
}

/// The number of a line `name: number`.
fn number(text: &str, name: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn rss(processes: &[Counted]) -> u64 {
    processes.iter().map(|process| process.rss_kib).sum()
}

fn switches(processes: &[Counted]) -> u64 {
    processes
        .iter()
        .flat_map(|process| &process.switches)
        .map(|(_, switches)| switches)
        .sum()
}

impl Record {
    fn wakeups_per_second(&self) -> f64 {
        let switches = switches(&self.after).saturating_sub(switches(&self.before));
        switches as f64 * 1000.0 / self.milliseconds as f64
    }

    fn growth_kib(&self) -> u64 {
        rss(&self.after).saturating_sub(rss(&self.before))
    }
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let most =
        |value: &dyn Fn(&Record) -> f64| rounded(records.iter().map(value).fold(0.0, f64::max));
    let by_size = |value: &dyn Fn(&Record) -> Value| -> Value {
        records
            .iter()
            .map(|record| (record.cgroups.to_string(), value(record)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let mib = |kib: u64| rounded(kib as f64 / 1024.0);
    let largest = records.iter().find(|record| record.cgroups == 1000);
    Ok(json!({
        "seconds": records.iter().map(|record| record.milliseconds / 1000).min(),
        "wakeups_per_s": most(&Record::wakeups_per_second),
        "wakeups_per_s_by_cgroups": by_size(&|record| json!(rounded(record.wakeups_per_second()))),
        "file_reads_per_quiet_cgroup": most(&|record| record.cgroup_reads as f64 / record.cgroups as f64),
        "rss_mib_1000": largest.map(|record| mib(rss(&record.after))),
        "rss_mib_by_cgroups": by_size(&|record| json!(mib(rss(&record.after)))),
        "rss_growth_kib": most(&|record| record.growth_kib() as f64),
    }))
}
