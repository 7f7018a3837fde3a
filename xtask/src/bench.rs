//! `cargo xtask bench`: boot a guest, run the bench in it, keep its records, print its summary.
//!
//! The summary is recomputed from the records on the host, by the same binary that ran in the
//! guest, so that a stranger can do the same with the files alone.

mod cluster;

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use cluster::Cluster;

use crate::{
    arbiter,
    build::{self, Binaries},
    control_plane, debian,
    guest::{self, Guest},
    root,
    shell::{output, step},
    tools,
};

/// The benches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Name {
    Arbiter,
    Bursts,
    Ceiling,
    Plateau,
    PageCache,
    Thrash,
    Build,
    Parallelism,
    ExecCli,
    ContainerBursts,
    Throttle,
    Java,
    Churn,
    Faults,
    Storm,
    Learned,
    Leak,
    Density,
    ContainerBuild,
    ContainerEdges,
    Crio,
    Heaps,
    MakeRoom,
    RightSize,
    PodBursts,
    PodBuild,
    PodEdges,
    PodFaults,
    PodJava,
    PodKill,
    PodPath,
    PodThrottle,
    Fold,
    Daemonset,
    LeastPrivilege,
    Kill,
    Deaths,
    Reaction,
    HookCost,
    Idle,
    Bystander,
    Smoke,
}

impl Name {
    /// Whether it needs a machine that runs containers.
    const fn needs_containerd(self) -> bool {
        self.needs_node()
            || matches!(
                self,
                Self::ContainerBursts
                    | Self::ContainerBuild
                    | Self::ContainerEdges
                    | Self::Crio
                    | Self::Heaps
                    | Self::Throttle
                    | Self::Java
                    | Self::Churn
                    | Self::Faults
                    | Self::Learned
                    | Self::Leak
                    | Self::Density
                    | Self::Storm
            )
    }

    /// Whether it needs a kubelet and an API server.
    const fn needs_node(self) -> bool {
        matches!(
            self,
            Self::MakeRoom
                | Self::RightSize
                | Self::PodBursts
                | Self::PodBuild
                | Self::PodEdges
                | Self::PodFaults
                | Self::PodJava
                | Self::PodKill
                | Self::PodPath
                | Self::PodThrottle
                | Self::Fold
                | Self::Daemonset
                | Self::LeastPrivilege
                | Self::Kill
                | Self::Deaths
                | Self::Idle
                | Self::Plateau
        )
    }

    /// Whether pods must be placed, and made, as in a cluster.
    const fn needs_controllers(self) -> bool {
        matches!(self, Self::MakeRoom | Self::RightSize)
    }

    /// As it is typed.
    fn text(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// The kernel that benches run on unless told otherwise.
const DEFAULT_KERNEL: &str = "6.12";
/// The same of Kubernetes.
const DEFAULT_KUBERNETES: &str = "1.37";
/// What `--kernel all` means.
pub(crate) const KERNELS: [&str; 4] = ["6.1", "6.12", "6.18", "7.2"];

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Which bench.
    pub(crate) name: Name,
    /// The guest's kernel, such as 6.12; `all` for 6.1, 6.12, 6.18 and 7.2, one after the other.
    #[arg(long, default_value = DEFAULT_KERNEL)]
    pub(crate) kernel: String,
    /// Kubernetes of the benches in pods: a minor such as 1.33, or a release such as 1.33.5. Before 1.33 in-place resize
    /// is switched on, unless told otherwise.
    #[arg(long, default_value = DEFAULT_KUBERNETES)]
    pub(crate) kubernetes: String,
    /// Leave or switch in-place resize off (Kubernetes before 1.35).
    #[arg(long)]
    pub(crate) without_resize: bool,
    /// Cases; the most containers (density).
    #[arg(long)]
    pub(crate) n: Option<u64>,
    /// Seed of the cases.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Milliseconds by which each raise is held back.
    #[arg(long)]
    pub(crate) actuation_delay_ms: Option<u64>,
    /// Seconds at each limit (plateau) or size (idle), of each container (throttle), of a window (density), or in all (leak).
    #[arg(long)]
    pub(crate) seconds: Option<u64>,
    /// What grows: anonymous, shmem, tmpfs, populate, huge, forks, kernel and nested (both bursts only), or all
    /// (bursts, pod-bursts). Which builds: make, random, real or killed (parallelism).
    #[arg(long)]
    pub(crate) kind: Option<String>,
    /// Huge pages: alternate, always or never (bursts, pod-bursts).
    #[arg(long)]
    pub(crate) thp: Option<String>,
    /// Most threads of a burst (pod-bursts).
    #[arg(long)]
    pub(crate) threads: Option<u64>,
    /// Only cases whose names have this word in them (pod-edges).
    #[arg(long)]
    pub(crate) case: Option<String>,
    /// Translation units (build).
    #[arg(long)]
    pub(crate) units: Option<u64>,
    /// Swap: disk or zram (bursts).
    #[arg(long)]
    pub(crate) swap: Option<String>,
    /// Guard from cgroup files, without kernel programs (bursts).
    #[arg(long)]
    pub(crate) without_bpf: bool,
    /// Containers that start at once (java), or real ones (churn).
    #[arg(long)]
    pub(crate) starts: Option<u64>,
    /// Processes that move between cgroups without end, while which freezes come late (container-bursts).
    #[arg(long)]
    pub(crate) movers: Option<u64>,
    /// Seconds for which the policy lets a container be held (storm).
    #[arg(long)]
    pub(crate) hold_at_most: Option<u64>,
    /// Switch the multi-gen LRU off, or on again, while a case is under way (page-cache).
    #[arg(long)]
    pub(crate) flip_lru: bool,
    /// In a cgroup below the guarded one (page-cache).
    #[arg(long)]
    pub(crate) nested: bool,
    /// With the kubelet's MemoryQoS, which throttles below the limit (pod-bursts).
    #[arg(long)]
    pub(crate) memory_qos: bool,
    /// Raise limits first, and ask the API right after (pod-bursts).
    #[arg(long)]
    pub(crate) raise_first: bool,
    /// With containerd 1.6 and runc 1.1 of Debian bookworm: the oldest that in-place resize supports is 1.6.9
    /// (container-bursts, container-edges, faults).
    #[arg(long)]
    pub(crate) old_containerd: bool,
    /// With systemd as PID 1 (exec-cli, and the benches in pods, whose cgroup driver it is then).
    #[arg(long)]
    pub(crate) systemd: bool,
    /// With etcd and kube-apiserver in the guest, where they share its two CPUs with the node, and not beside it (benches in
    /// pods; not pod-faults, make-room and right-size). The guest has 2 GiB more memory for them, which its pods cannot
    /// have. The run leaves target/bench/NAME-control-plane-inside.json.
    #[arg(long)]
    pub(crate) control_plane_inside: bool,
    /// Only what no other bench has (faults), or one of each kind (pod-faults).
    #[arg(long)]
    pub(crate) few: bool,
    /// Measure what follows, too (java).
    #[arg(long)]
    pub(crate) steady: bool,
    /// Leave out the run at the fixed limit (java), or with fewer jobs (parallelism).
    #[arg(long)]
    pub(crate) without_fixed: bool,
    /// Leave out the run without a limit (build, bursts).
    #[arg(long)]
    pub(crate) without_unlimited: bool,
    /// Leave out whether changes to it are noticed (arbiter).
    #[arg(long)]
    pub(crate) without_mutants: bool,
    /// The directory below target/ for the evidence.
    #[arg(skip = "bench")]
    pub(crate) directory: &'static str,
}

impl Options {
    /// A bench with its defaults.
    pub(crate) fn of(name: Name) -> Self {
        Self {
            name,
            kernel: DEFAULT_KERNEL.to_owned(),
            kubernetes: DEFAULT_KUBERNETES.to_owned(),
            without_resize: false,
            n: None,
            seed: None,
            actuation_delay_ms: None,
            seconds: None,
            kind: None,
            thp: None,
            threads: None,
            units: None,
            case: None,
            swap: None,
            starts: None,
            movers: None,
            hold_at_most: None,
            without_bpf: false,
            flip_lru: false,
            nested: false,
            memory_qos: false,
            raise_first: false,
            old_containerd: false,
            systemd: false,
            control_plane_inside: false,
            few: false,
            steady: false,
            without_fixed: false,
            without_unlimited: false,
            without_mutants: false,
            directory: "bench",
        }
    }

    /// The name of the evidence files: a variant has its own.
    fn file_name(&self) -> String {
        let mut name = self.name.text();
        if self.kernel != DEFAULT_KERNEL {
            name += &format!("-{}", self.kernel);
        }
        if self.kubernetes != DEFAULT_KUBERNETES {
            name += &format!("-kubernetes-{}", self.kubernetes);
        }
        if let Some(delay) = self.actuation_delay_ms {
            name += &format!("-delay-{delay}");
        }
        for (what, value) in [
            ("", &self.kind),
            ("thp-", &self.thp),
            ("swap-", &self.swap),
            ("case-", &self.case),
        ] {
            if let Some(value) = value {
                name += &format!("-{what}{value}");
            }
        }
        if let Some(threads) = self.threads {
            name += &format!("-threads-{threads}");
        }
        if let Some(starts) = self.starts {
            name += &format!("-starts-{starts}");
        }
        if let Some(movers) = self.movers {
            name += &format!("-movers-{movers}");
        }
        if let Some(seconds) = self.hold_at_most {
            name += &format!("-hold-at-most-{seconds}");
        }
        for (given, suffix) in [
            (self.without_resize, "-without-resize"),
            (self.without_bpf, "-without-bpf"),
            (self.flip_lru, "-flip-lru"),
            (self.nested, "-nested"),
            (self.memory_qos, "-memory-qos"),
            (self.raise_first, "-raise-first"),
            (self.old_containerd, "-old-containerd"),
            (self.systemd, "-systemd"),
            (self.control_plane_inside, "-control-plane-inside"),
            (self.steady, "-steady"),
            (self.without_mutants, "-without-mutants"),
        ] {
            if given {
                name += suffix;
            }
        }
        name
    }

    fn guest_command(&self) -> Vec<String> {
        let mut words = ["/bin/bellows-guest", "bench", "--records", "/dev/ttyS1"]
            .map(str::to_owned)
            .to_vec();
        words.push(self.name.text());
        for (flag, value) in [
            ("--n", self.n),
            ("--seed", self.seed),
            ("--actuation-delay-ms", self.actuation_delay_ms),
            ("--seconds", self.seconds),
            ("--threads", self.threads),
            ("--units", self.units),
            ("--starts", self.starts),
            ("--movers", self.movers),
            ("--hold-at-most", self.hold_at_most),
        ] {
            if let Some(value) = value {
                words.extend([flag.to_owned(), value.to_string()]);
            }
        }
        for (flag, value) in [
            ("--kind", &self.kind),
            ("--thp", &self.thp),
            ("--swap", &self.swap),
            ("--case", &self.case),
        ] {
            if let Some(value) = value {
                words.extend([flag.to_owned(), value.clone()]);
            }
        }
        for (given, flag) in [
            (self.without_bpf, "--without-bpf"),
            (self.flip_lru, "--flip-lru"),
            (self.nested, "--nested"),
            (self.memory_qos, "--memory-qos"),
            (self.raise_first, "--raise-first"),
            (self.control_plane_inside, "--control-plane-inside"),
            (self.few, "--few"),
            (self.steady, "--steady"),
            (self.without_fixed, "--without-fixed"),
            (self.without_unlimited, "--without-unlimited"),
        ] {
            if given {
                words.push(flag.to_owned());
            }
        }
        words
    }

    pub(crate) fn evidence(&self, extension: &str) -> Result<PathBuf> {
        let directory = root()?.join("target").join(self.directory);
        fs::create_dir_all(&directory)?;
        Ok(directory.join(format!("{}.{extension}", self.file_name())))
    }

    /// Of the guest.
    const fn memory_mib(&self) -> u32 {
        if self.control_plane_inside {
            4096 + control_plane::MEMORY_MIB
        } else {
            4096
        }
    }

    /// Generous: a guest that needs it is broken.
    fn limit(&self) -> Duration {
        let seconds = 1200 + 60 * self.n.unwrap_or(60) + 4 * self.seconds.unwrap_or(120);
        // Two emulated CPUs carry the control plane, too.
        let times = if self.control_plane_inside { 2 } else { 1 };
        Duration::from_secs(times * seconds)
    }
}

pub(crate) fn command(options: &Options) -> Result<bool> {
    cluster::check(options)?;
    if options.name == Name::Arbiter {
        return arbiter::command(options);
    }
    tools::packages()?;
    let binaries = build::binaries()?;
    let summary = if options.kernel == "all" {
        run_on_all(options, &binaries)?
    } else {
        run(options, &binaries)?
    };
    println!("{}", serde_json::to_string_pretty(&summary)?);
    Ok(true)
}

/// Runs a bench on each kernel; returns the summaries by kernel. Each has evidence files of its own.
fn run_on_all(options: &Options, binaries: &Binaries) -> Result<Value> {
    let mut summaries = serde_json::Map::new();
    for kernel in KERNELS {
        let options = Options {
            kernel: kernel.to_owned(),
            ..options.clone()
        };
        let file = run(&options, binaries)?;
        summaries.insert(kernel.to_owned(), file["summary"].clone());
    }
    Ok(json!({ "bench": options.file_name(), "by_kernel": summaries }))
}

/// Runs a bench and returns its summary.
pub(crate) fn run(options: &Options, binaries: &Binaries) -> Result<Value> {
    let kernel = debian::kernel(&options.kernel)?;
    let name = options.file_name();
    let (records, evidence) = (options.evidence("jsonl")?, options.evidence("json")?);
    for old in [&records, &evidence] {
        // A bench that fails must not leave a summary of another run beside its records.
        if old.exists() {
            fs::remove_file(old)?;
        }
    }
    let mut guest = Guest {
        name: &name,
        kernel: &kernel,
        binaries,
        memory_mib: options.memory_mib(),
        disk: disk(options)?,
        node: options.name.needs_containerd(),
        systemd: options.systemd,
        counts_instructions: options.name == Name::HookCost,
        files: Vec::new(),
        command: Vec::new(),
        skips: matches!(options.name, Name::Bursts | Name::ContainerEdges),
        limit: options.limit(),
    };
    let mut cluster = equip(&mut guest, options)?;
    // What an API server has kept of a boot before is none of this one's.
    let again = |guest: &mut Guest<'_>| {
        drop(cluster.take());
        cluster = equip(guest, options)?;
        Ok(())
    };
    let ended = step(
        &format!("bench {name} on kernel {}", options.kernel),
        || {
            guest::run(&mut guest, again, |line| {
                if line.starts_with("case ")
                    || line.starts_with("build ")
                    || line.starts_with("bellows:")
                    || line.starts_with("default/")
                    || line.starts_with("     ")
                {
                    eprintln!("      {line}");
                }
            })
        },
    )?;
    fs::write(&records, &ended.records)?;
    ensure!(
        ended.code == 0,
        "bench {name} failed; its console:\n{}",
        crate::shell::tail(&ended.console, 40)
    );
    let summary = summarize(options.name, binaries, &records)?;
    let file = json!({
        "bench": name,
        "kernel": options.kernel,
        "kubernetes": cluster.as_ref().map(|cluster| &cluster.release),
        "seed": options.seed.unwrap_or(1),
        "command": options.guest_command(),
        "summary": summary,
    });
    fs::write(
        evidence,
        format!("{}\n", serde_json::to_string_pretty(&file)?),
    )?;
    Ok(file)
}

/// Gives a guest what its bench is, and the cluster that it is in; `None` where it is in none.
fn equip(guest: &mut Guest<'_>, options: &Options) -> Result<Option<Cluster>> {
    guest.files = build_sources()?;
    guest.command = options.guest_command();
    let cluster = Cluster::of(options)?;
    if let Some(cluster) = &cluster {
        guest.files.extend_from_slice(&cluster.files);
        guest.command.extend_from_slice(&cluster.words);
    }
    Ok(cluster)
}

/// What a machine has that builds, runs containers, or has systemd.
const NODE_PACKAGES: [&str; 13] = [
    "ca-certificates",
    "conntrack",
    "containerd",
    "containernetworking-plugins",
    "g++",
    "iproute2",
    "iptables",
    "make",
    "mount",
    "openjdk-21-jre-headless",
    "runc",
    "systemd",
    "tomcat11",
];

/// What a machine has that runs containers as long ago.
const OLD_NODE_PACKAGES: [&str; 6] = [
    "containerd",
    "containernetworking-plugins",
    "iproute2",
    "mount",
    "runc",
    "systemd",
];

fn old_root() -> Result<PathBuf> {
    debian::root_image("old-node", "bookworm", &OLD_NODE_PACKAGES)
}

fn new_root() -> Result<PathBuf> {
    debian::root_image("node", "forky", &NODE_PACKAGES)
}

/// Makes the root file systems that benches need.
pub(crate) fn roots() -> Result<()> {
    new_root()?;
    old_root().map(drop)
}

/// The disk that a bench needs.
fn disk(options: &Options) -> Result<Option<PathBuf>> {
    match options.name {
        Name::PageCache | Name::Thrash => guest::empty_disk().map(Some),
        Name::Bursts if options.swap.is_some() => guest::empty_disk().map(Some),
        Name::ContainerBursts | Name::ContainerEdges | Name::Faults if options.old_containerd => {
            old_root().map(Some)
        }
        name if name.needs_containerd()
            || matches!(name, Name::Build | Name::Parallelism)
            || options.systemd =>
        {
            new_root().map(Some)
        }
        _ => Ok(None),
    }
}

/// The sources of the build load, for the guest.
pub(crate) fn build_sources() -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(root()?.join("tests/build-load"))? {
        let path = entry?.path();
        if let Some(name) = path.file_name() {
            files.push((format!("/build-load/{}", name.to_string_lossy()), path));
        }
    }
    Ok(files)
}

fn summarize(name: Name, binaries: &Binaries, records: &PathBuf) -> Result<Value> {
    let text = output(
        Command::new(&binaries.guest)
            .args(["summarize", &name.text()])
            .arg(records),
    )?;
    match serde_json::from_str(&text) {
        Ok(summary) => Ok(summary),
        Err(error) => bail!(
            "the summary of {} is no JSON ({error}): {text}",
            name.text()
        ),
    }
}
