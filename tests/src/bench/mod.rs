//! The benches: each runs its cases, writes a record per case, and can recompute its summary from
//! the records alone.

mod boost_edges;
mod build;
mod bursts;
mod bystander;
mod ceiling;
mod churn;
mod container_build;
mod container_bursts;
mod container_edges;
mod crio;
mod daemonset;
mod deaths;
mod density;
mod excused;
mod exec_cli;
mod faults;
mod fold;
mod gate;
mod heaps;
mod hook_cost;
mod idle;
mod inside;
mod java;
mod leak;
mod learned;
mod least_privilege;
mod make_room;
mod movers;
mod observe_edges;
mod page_cache;
mod parallelism;
mod plateau;
mod pod_build;
mod pod_bursts;
mod pod_edges;
mod pod_faults;
mod pod_java;
mod pod_kill;
mod pod_path;
mod pod_throttle;
mod reaction;
mod record;
mod reserved;
mod right_size;
mod runner;
mod smoke;
mod storm;
mod swap;
mod thrash;
mod throttle;
mod wait_edges;

use std::{
    fs::{self, File},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use serde::de::DeserializeOwned;
use serde_json::Value;

use record::Records;

#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Bursts at no limit, at a fixed limit, and under `bellows exec`.
    Bursts(bursts::Options),
    /// A ceiling below the peak, against a fixed limit of that size.
    Ceiling(ceiling::Options),
    /// Flat at 95 % of the limit.
    Plateau(plateau::Options),
    /// Files of four times the limit, alone and beside anonymous memory.
    PageCache(page_cache::Options),
    /// Page cache that is a working set and does not fit.
    Thrash(thrash::Options),
    /// A real C++ build without a limit, at a fixed one, and under `bellows exec`.
    Build(build::Options),
    /// Room for the resize of a pod of high priority on a full node.
    MakeRoom(make_room::Options),
    /// A node full of pods that use a tenth of what they request, and one more that is to run there.
    RightSize(right_size::Options),
    /// Bursts in pods on a real kubelet, raised through the API.
    PodBursts(pod_bursts::Options),
    /// Bursts in containers on a real containerd, raised through it.
    ContainerBursts(container_bursts::Options),
    /// What `bellows run --standalone` promises at its edges.
    ContainerEdges(container_edges::Options),
    /// The agent beside CRI-O, whose part is played.
    Crio,
    /// By which limit a JVM sizes its heap that starts during a burst.
    Heaps,
    /// A service with a CPU limit at its mean: fixed, with cpu.max.burst, with Bellows.
    Throttle(throttle::Options),
    /// Containers that come and go as fast as a node can make them.
    Churn(churn::Options),
    /// What happens to a node under its agent, while containers burst.
    Faults(faults::Options),
    /// Tomcat in a container with a quarter of a CPU.
    Java(java::Options),
    /// Builds whose jobs need more together than they may have.
    Parallelism(parallelism::Options),
    /// The C++ build in containers on a real containerd, without and with Bellows.
    ContainerBuild(container_build::Options),
    /// The C++ build in a pod, without and with Bellows.
    PodBuild(pod_build::Options),
    /// How many dev containers a node carries.
    Density(density::Options),
    /// One that grows for ever beside bursts that end.
    Leak(leak::Options),
    /// The same build again and again.
    Learned(learned::Options),
    /// More bursts at once than the node has memory for.
    Storm(storm::Options),
    /// The agent is killed at each step of a resize of a pod.
    PodKill(pod_kill::Options),
    /// A service in a pod with a CPU limit at its mean.
    PodThrottle(pod_throttle::Options),
    /// Tomcat in a pod with a quarter of a CPU.
    PodJava(pod_java::Options),
    /// What happens to the API under the agent, while pods burst.
    PodFaults(pod_faults::Options),
    /// From the watermark to the raised limit, by each path.
    PodPath(pod_path::Options),
    /// A resize of the CPU while memory is raised by hand.
    Fold(fold::Options),
    /// What `bellows run` promises at its edges: Events, and changes by others.
    PodEdges(pod_edges::Options),
    /// The agent as its manifest runs it.
    Daemonset(daemonset::Options),
    /// What the agent's own token may do.
    LeastPrivilege(daemonset::Options),
    /// SIGKILL of the agent in the middle of bursts.
    Kill(deaths::Options),
    /// The agent's end in every way, with a releaser beside it.
    Deaths(deaths::Options),
    /// What `bellows exec` promises at its edges: exit codes, signals, refusals, nothing left behind.
    ExecCli,
    /// From a crossing of the watermark to the limit written, against the least that takes.
    Reaction(reaction::Options),
    /// Instructions that the growth hook costs an allocator.
    HookCost(hook_cost::Options),
    /// The agent while nothing happens, with up to 1,000 guarded pods.
    Idle(idle::Options),
    /// A latency-sensitive process beside bursts.
    Bystander(bystander::Options),
    /// Load and attach every kernel program.
    Smoke,
}

pub(crate) fn run(bench: &Bench, records: &Path) -> Result<()> {
    let file = File::options()
        .write(true)
        .open(records)
        .with_context(|| records.display().to_string())?;
    let mut records = Records::new(file);
    match bench {
        Bench::Bursts(options) => bursts::run(options, &mut records),
        Bench::Ceiling(options) => ceiling::run(options, &mut records),
        Bench::Plateau(options) => plateau::run(options, &mut records),
        Bench::PageCache(options) => page_cache::run(options, &mut records),
        Bench::Thrash(options) => thrash::run(options, &mut records),
        Bench::Build(options) => build::run(options, &mut records),
        Bench::Parallelism(options) => parallelism::run(options, &mut records),
        Bench::MakeRoom(options) => make_room::run(options, &mut records),
        Bench::RightSize(options) => right_size::run(options, &mut records),
        Bench::PodBursts(options) => pod_bursts::run(options, &mut records),
        Bench::ContainerBursts(options) => container_bursts::run(options, &mut records),
        Bench::ContainerEdges(options) => container_edges::run(options, &mut records),
        Bench::Crio => crio::run(&mut records),
        Bench::Heaps => heaps::run(&mut records),
        Bench::ContainerBuild(options) => container_build::run(options, &mut records),
        Bench::Throttle(options) => throttle::run(options, &mut records),
        Bench::Churn(options) => churn::run(options, &mut records),
        Bench::Faults(options) => faults::run(options, &mut records),
        Bench::Java(options) => java::run(options, &mut records),
        Bench::PodBuild(options) => pod_build::run(options, &mut records),
        Bench::Density(options) => density::run(options, &mut records),
        Bench::Leak(options) => leak::run(options, &mut records),
        Bench::Learned(options) => learned::run(options, &mut records),
        Bench::Storm(options) => storm::run(options, &mut records),
        Bench::PodKill(options) => pod_kill::run(options, &mut records),
        Bench::PodThrottle(options) => pod_throttle::run(options, &mut records),
        Bench::PodJava(options) => pod_java::run(options, &mut records),
        Bench::PodFaults(options) => pod_faults::run(options, &mut records),
        Bench::PodPath(options) => pod_path::run(options, &mut records),
        Bench::Fold(options) => fold::run(options, &mut records),
        Bench::PodEdges(options) => pod_edges::run(options, &mut records),
        Bench::Daemonset(options) => daemonset::run(options, &mut records),
        Bench::LeastPrivilege(options) => daemonset::run_least_privilege(options, &mut records),
        Bench::Kill(options) => deaths::run_kill(options, &mut records),
        Bench::Deaths(options) => deaths::run_deaths(options, &mut records),
        Bench::Reaction(options) => reaction::run(options, &mut records),
        Bench::HookCost(options) => hook_cost::run(options, &mut records),
        Bench::Idle(options) => idle::run(options, &mut records),
        Bench::Bystander(options) => bystander::run(options, &mut records),
        Bench::ExecCli => exec_cli::run(&mut records),
        Bench::Smoke => smoke::run(&mut records),
    }
}

pub(crate) fn summarize(name: &str, path: &Path) -> Result<Value> {
    match name {
        "bursts" => bursts::summarize(&read(path)?),
        "ceiling" => ceiling::summarize(&read(path)?),
        "plateau" => plateau::summarize(&read(path)?),
        "page-cache" => page_cache::summarize(&read(path)?),
        "thrash" => thrash::summarize(&read(path)?),
        "parallelism" => parallelism::summarize(&read(path)?),
        "build" => build::summarize(&read(path)?),
        "make-room" => make_room::summarize(&read(path)?),
        "right-size" => right_size::summarize(&read(path)?),
        "pod-bursts" => pod_bursts::summarize(&read(path)?),
        "density" => density::summarize(&read(path)?),
        "leak" => leak::summarize(&read(path)?),
        "learned" => learned::summarize(&read(path)?),
        "storm" => storm::summarize(&read(path)?),
        "pod-kill" => pod_kill::summarize(&read(path)?),
        "pod-throttle" => pod_throttle::summarize(&read(path)?),
        "pod-java" => pod_java::summarize(&read(path)?),
        "pod-faults" => pod_faults::summarize(&read(path)?),
        "container-bursts" => container_bursts::summarize(&read(path)?),
        "container-build" => container_build::summarize(&read(path)?),
        "throttle" => throttle::summarize(&read(path)?),
        "churn" => churn::summarize(&read(path)?),
        "faults" => faults::summarize(&read(path)?),
        "java" => java::summarize(&read(path)?),
        "pod-build" => pod_build::summarize(&read(path)?),
        "kill" => deaths::summarize_kill(&read(path)?),
        "deaths" => deaths::summarize_deaths(&read(path)?),
        "exec-cli" | "pod-edges" | "container-edges" | "crio" | "heaps" => {
            exec_cli::summarize(&read(path)?)
        }
        "pod-path" => pod_path::summarize(&read(path)?),
        "fold" => fold::summarize(&read(path)?),
        "daemonset" | "least-privilege" => daemonset::summarize(&read(path)?),
        "reaction" => reaction::summarize(&read(path)?),
        "hook-cost" => hook_cost::summarize(&read(path)?),
        "idle" => idle::summarize(&read(path)?),
        "bystander" => bystander::summarize(&read(path)?),
        "smoke" => smoke::summarize(&read(path)?),
        _ => bail!("there is no bench {name}"),
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let content = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    content
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}
