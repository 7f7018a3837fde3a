//! `pod-java`: Tomcat in a pod with a quarter of a CPU: without a limit, and with a start boost by policy; then the same
//! container again, as the kubelet restarts it.
//!
//! What is measured is from the making of the container's cgroup to its first page: what scheduler and kubelet do before is
//! the same for all. Limits are compared in the spec, the container's cgroup and the pod's.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use bellows::cgroup::Cgroup;
use bellows_core::{Bytes, Cpu};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    java::{cpus_seen, died_of_emulator, is_ready, prepare, tomcat},
    record::{Records, parsed, percentile, rounded},
};
use crate::{
    agent::Agent,
    node::{ApiServer, Node},
    pods::{Cluster, Spec, wait},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Times that each is run.
    #[arg(long, default_value_t = 5)]
    n: u64,
    #[command(flatten)]
    server: ApiServer,
}

const LIMIT: Cpu = Cpu::millis(250);
const BOOST: u64 = 2;
const GUARDED: &str = "java";
const LONGEST: Duration = Duration::from_secs(900);
const RESTORED: Duration = Duration::from_secs(90);
const FIRST_PORT: u64 = 8200;
/// How often a JVM may die of the emulator (see `java`) before the bench fails.
const MOST_CRASHES: u64 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum How {
    Unlimited,
    Boosted,
    BoostedAgain,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    how: How,
    /// From the making of its cgroup to its first page.
    ready_ms: u64,
    cpus_seen: Option<u64>,
    /// From its first page until its limit was what it was, in its cgroup, its pod's and the spec.
    restored_ms: Option<u64>,
    /// Changes of the spec that it took.
    spec_writes: i64,
    /// Restarts that nobody asked for.
    restarts: i32,
    /// Seconds from its start until it was at rest.
    seconds: f64,
    crashes: u64,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    prepare()?;
    let mut node = Node::start(&options.server)?;
    let cluster = Cluster::connect()?;
    cluster.wait_node_ready()?;
    let boost = json!({
        "on": { "start": true },
        "cpu": BOOST.to_string(),
        "until": { "idle": "5s", "atMost": "15m" },
    });
    cluster.guard_labelled(GUARDED, &json!({ "boosts": [boost] }))?;
    let mut agent = Agent::start()?;
    let mut bench = Bench { cluster, ports: 0 };
    for index in 0..options.n {
        for how in [How::Unlimited, How::Boosted] {
            node.check()?;
            agent.check()?;
            for record in bench.pod(index, how)? {
                eprintln!("case {index}: {record:?}");
                records.write(&record)?;
            }
        }
    }
    Ok(())
}

struct Bench {
    cluster: Cluster,
    ports: u64,
}

impl Bench {
    fn pod(&mut self, index: u64, how: How) -> Result<Vec<Record>> {
        for crashes in 0..MOST_CRASHES {
            self.ports += 1;
            let port = FIRST_PORT + self.ports;
            let name = format!("tomcat-{port}");
            let words = ["/bellows-guest", "load", "chroot", "/host"].map(str::to_owned);
            let spec = Spec {
                name: name.clone(),
                limit: Bytes::mib(512),
                max: None,
                command: words.into_iter().chain(tomcat(port)).collect(),
                host: true,
                liveness: None,
                whole_pod: false,
                cpu: (how != How::Unlimited).then_some(LIMIT),
                restarts: how != How::Unlimited,
                raise_first: false,
            };
            let label = (how != How::Unlimited).then_some(GUARDED);
            self.cluster.create_labelled(&spec, label)?;
            let result = self.measure(&name, index, how, port, crashes);
            self.cluster.delete(&name)?;
            if let Some(records) = result? {
                return Ok(records);
            }
            eprintln!("case {index}, {how:?}: a JVM has died; again");
        }
        bail!("a JVM has died in {MOST_CRASHES} starts of {MOST_CRASHES}")
    }

    /// `None` if a JVM has died.
    fn measure(
        &self,
        name: &str,
        index: u64,
        how: How,
        port: u64,
        crashes: u64,
    ) -> Result<Option<Vec<Record>>> {
        let cgroup = self.cluster.wait_running(name)?;
        let Some(first) = self.start(name, &cgroup, index, how, port, crashes, 1, 0)? else {
            return Ok(None);
        };
        if how == How::Unlimited {
            return Ok(Some(vec![first]));
        }
        let generation = self.generation(name)?;
        cgroup.write("cgroup.kill", "1")?;
        let mut again = None;
        wait("the container runs again", Duration::from_secs(120), || {
            again = self
                .cluster
                .cgroup(name)?
                .filter(|now| now.id() != cgroup.id());
            Ok(again.is_some())
        })?;
        let again = again.context("it runs")?;
        let second = self.start(
            name,
            &again,
            index,
            How::BoostedAgain,
            port,
            crashes,
            generation,
            1,
        )?;
        Ok(second.map(|second| vec![first, second]))
    }

    #[expect(clippy::too_many_arguments, reason = "what a record has")]
    fn start(
        &self,
        name: &str,
        cgroup: &Cgroup,
        index: u64,
        how: How,
        port: u64,
        crashes: u64,
        // Of the spec, before the start: the API counts from 1.
        generation: i64,
        asked_restarts: i32,
    ) -> Result<Option<Record>> {
        let begun = fs::metadata(cgroup.path())?;
        let begun = SystemTime::UNIX_EPOCH
            + Duration::new(
                u64::try_from(begun.ctime())?,
                u32::try_from(begun.ctime_nsec())?,
            );
        while !is_ready(port) {
            let age = begun.elapsed()?;
            ensure!(age < LONGEST, "Tomcat does not start: {}", self.log(name)?);
            if self.has_died(name, cgroup, asked_restarts)? {
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(50));
        }
        let ready = begun.elapsed()?;
        let mut restored_ms = None;
        while how != How::Unlimited && begun.elapsed()? < ready + RESTORED {
            if self.has_died(name, cgroup, asked_restarts)? {
                return Ok(None);
            }
            if self.is_at_rest(name, cgroup)? {
                restored_ms = Some(u64::try_from((begun.elapsed()? - ready).as_millis())?);
                break;
            }
            thread::sleep(Duration::from_millis(200));
        }
        if self.has_died(name, cgroup, asked_restarts)? {
            return Ok(None);
        }
        let status = self.cluster.status(name)?.context("it has a status")?;
        let log = self.log(name)?;
        Ok(Some(Record {
            index,
            how,
            ready_ms: u64::try_from(ready.as_millis())?,
            cpus_seen: log
                .rsplit_once("Version: ")
                .and_then(|(_, last)| cpus_seen(last))
                .or_else(|| cpus_seen(&log)),
            restored_ms,
            spec_writes: self.generation(name)? - generation,
            restarts: status.restart_count - asked_restarts,
            seconds: begun.elapsed()?.as_secs_f64(),
            crashes,
        }))
    }

    fn generation(&self, name: &str) -> Result<i64> {
        Ok(self.cluster.get(name)?.metadata.generation.unwrap_or(1))
    }

    /// Whether its JVM has died of the emulator after so many restarts; fails if it has ended in any other way.
    fn has_died(&self, name: &str, cgroup: &Cgroup, restarts: i32) -> Result<bool> {
        if cgroup.populated().unwrap_or(false) {
            return Ok(false);
        }
        let code = self.exit_code(name, restarts)?;
        died_of_emulator(code, &self.log(name)?)?;
        Ok(true)
    }

    /// With what a container has ended after so many restarts.
    fn exit_code(&self, name: &str, restarts: i32) -> Result<i32> {
        let mut code = None;
        wait(
            "the kubelet says how it has ended",
            Duration::from_secs(60),
            || {
                let status = self.cluster.status(name)?.unwrap_or_default();
                // It may run again by now.
                let state = if status.restart_count > restarts {
                    status.last_state
                } else {
                    status.state
                };
                code = state.and_then(|state| Some(state.terminated?.exit_code));
                Ok(code.is_some())
            },
        )?;
        code.context("it has ended")
    }

    fn log(&self, name: &str) -> Result<String> {
        self.cluster.log(name)
    }

    fn is_at_rest(&self, name: &str, cgroup: &Cgroup) -> Result<bool> {
        let pod = cgroup.path().parent().unwrap_or(Path::new("/"));
        let pod = Cgroup::open(pod)?;
        Ok(self.cluster.cpu_limits(name, cgroup, &pod)? == [Some(LIMIT); 3])
    }
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let of = |how| -> Vec<&Record> { records.iter().filter(|record| record.how == how).collect() };
    let median = |how| {
        let ready: Vec<f64> = of(how)
            .iter()
            .map(|record| record.ready_ms as f64)
            .collect();
        percentile(&ready, 50.0)
    };
    let boosted: Vec<&Record> = [of(How::Boosted), of(How::BoostedAgain)].concat();
    let unlimited = median(How::Unlimited);
    let ratio = |ms: f64| (ms > 0.0 && unlimited > 0.0).then(|| rounded(ms / unlimited));
    let writes = boosted
        .iter()
        .map(|record| record.spec_writes as f64 * 60.0 / record.seconds.max(60.0));
    Ok(json!({
        "starts": boosted.len(),
        "ready_unlimited_s": rounded(unlimited / 1000.0),
        "ready_ratio_with": ratio(median(How::Boosted)),
        "ready_ratio_again": ratio(median(How::BoostedAgain)),
        "cpus_seen_as_policy": boosted.iter().filter(|record| record.cpus_seen == Some(BOOST)).count(),
        "restore_ok": boosted.iter().all(|record| record.restored_ms.is_some()),
        "restored_max_ms": boosted.iter().filter_map(|record| record.restored_ms).max(),
        "spec_writes_max": boosted.iter().map(|record| record.spec_writes).max(),
        "api_writes_per_minute": rounded(writes.fold(0.0, f64::max)),
        "restart_count_total": records.iter().map(|record| record.restarts).sum::<i32>(),
        "jvm_crashes": records.iter().map(|record| record.crashes).max(),
    }))
}
