//! Containers of the benches on a real containerd, without a kubelet: its part is played here, through the same
//! interface (CRI), with the cgroups and limits that it would give a pod.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bellows::{
    attribution::{self, CGROUP_ROOT},
    cgroup::{Cgroup, Limit, field, quota::Quota},
    clock::now,
    cri::{
        api::{
            ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus,
            ContainerStatusRequest, CreateContainerRequest, ImageSpec, LinuxContainerConfig,
            LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
            LinuxSandboxSecurityContext, ListPodSandboxRequest, Mount, NamespaceMode,
            NamespaceOption, PodSandboxConfig, PodSandboxMetadata, RemovePodSandboxRequest,
            RunPodSandboxRequest, StartContainerRequest, StopContainerRequest,
            StopPodSandboxRequest, UpdateContainerResourcesRequest,
            runtime_service_client::RuntimeServiceClient,
        },
        with_memory, with_quota,
    },
};
use bellows_core::{Bytes, Cpu, Nanos};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use crate::{
    agent::logged,
    node::{self, Containerd, Service, has_systemd, shell, wait},
};

const NAMESPACE: &str = "dev";
/// Microseconds of a period of a CPU quota, as the kubelet has it.
const PERIOD: u64 = 100_000;
const LOGS: &str = "/var/log/pods";

/// A machine that runs containers.
pub(crate) struct Machine {
    tasks: Runtime,
    client: RuntimeServiceClient<Channel>,
    /// `None` while it is killed.
    containerd: Option<Containerd>,
    /// Pods made so far.
    pods: u64,
}

/// What a container should be.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// Its pod's name.
    pub(crate) name: String,
    /// Its own where that is another.
    pub(crate) container: Option<&'static str>,
    pub(crate) limit: Option<Bytes>,
    /// What its pod may have where that is not the same.
    pub(crate) pod_limit: Option<Bytes>,
    /// Its CPU limit, and its pod's.
    pub(crate) cpu: Option<Cpu>,
    pub(crate) command: Vec<String>,
    /// What of the machine is mounted into it: where, and which directory.
    pub(crate) binds: Vec<(&'static str, &'static str)>,
    /// Labels of its pod.
    pub(crate) labels: Vec<(String, String)>,
}

impl Spec {
    /// A container without limits or labels.
    pub(crate) fn of(name: &str, command: Vec<String>) -> Self {
        Self {
            name: name.to_owned(),
            container: None,
            limit: None,
            pod_limit: None,
            cpu: None,
            command,
            binds: Vec::new(),
            labels: Vec::new(),
        }
    }
}

/// A container, and its pod.
pub(crate) struct Started {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) cgroup: Cgroup,
    pub(crate) pod: Cgroup,
    /// When its start was asked for.
    pub(crate) at: Nanos,
    sandbox: Sandbox,
}

impl Started {
    /// Microseconds for which it was throttled, by its own quota and by its pod's.
    pub(crate) fn throttled_us(&self) -> Result<u64> {
        let of = |cgroup: &Cgroup| -> Result<u64> {
            Ok(field(&cgroup.read("cpu.stat")?, "throttled_usec").unwrap_or(0))
        };
        Ok(of(&self.cgroup)? + of(&self.pod)?)
    }
}

/// A pod's sandbox.
#[derive(Clone)]
struct Sandbox {
    id: String,
    uid: String,
    config: PodSandboxConfig,
}

impl Machine {
    pub(crate) fn start() -> Result<Self> {
        let containerd = Containerd::start()?;
        let tasks = Runtime::new()?;
        let client = {
            let _context = tasks.enter();
            let endpoint = Endpoint::from_shared(format!("unix://{}", node::CONTAINERD_SOCKET))?;
            RuntimeServiceClient::new(endpoint.connect_lazy())
        };
        if !has_systemd() {
            hand_out(&[])?;
        }
        Ok(Self {
            tasks,
            client,
            containerd: Some(containerd),
            pods: 0,
        })
    }

    /// Starts a container in a pod of its own.
    pub(crate) fn run(&mut self, spec: &Spec) -> Result<Started> {
        self.pods += 1;
        let uid = format!("4d0e7f00-0000-4000-8000-{:012}", self.pods);
        let limit = spec.pod_limit.or(spec.limit);
        let parent = pod_cgroup(&uid, limit, spec.cpu)?;
        let config = sandbox(spec, &uid, &parent);
        let mut client = self.client.clone();
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            ..RunPodSandboxRequest::default()
        };
        let sandbox = self.tasks.block_on(client.run_pod_sandbox(request))?;
        let id = sandbox.into_inner().pod_sandbox_id;
        // systemd makes the slice with the first scope in it.
        if has_systemd() {
            let memory = limit.map(|limit| format!("MemoryMax={}", limit.0));
            // Per cent, as systemd has it, and rounded up as a kubelet does.
            let cpu = spec
                .cpu
                .map(|cpu| format!("CPUQuota={}%", cpu.0.div_ceil(10_000)));
            for property in memory.into_iter().chain(cpu) {
                shell(&format!(
                    "systemctl set-property --runtime {parent} {property}"
                ))?;
            }
        }
        self.start_in(Sandbox { id, uid, config }, spec)
    }

    /// Starts a container in the pod of another.
    pub(crate) fn run_beside(&self, other: &Started, spec: &Spec) -> Result<Started> {
        self.start_in(other.sandbox.clone(), spec)
    }

    fn start_in(&self, sandbox: Sandbox, spec: &Spec) -> Result<Started> {
        let mut client = self.client.clone();
        let (id, at) = self.tasks.block_on(async {
            let request = CreateContainerRequest {
                pod_sandbox_id: sandbox.id.clone(),
                config: Some(container(spec)),
                sandbox_config: Some(sandbox.config.clone()),
            };
            let id = client.create_container(request).await?.into_inner();
            let id = id.container_id;
            let request = StartContainerRequest {
                container_id: id.clone(),
            };
            let at = now();
            client.start_container(request).await?;
            Ok::<_, anyhow::Error>((id, at))
        })?;
        let root = Path::new(CGROUP_ROOT);
        let path =
            attribution::find(root, &sandbox.uid, &id).context("the container has no cgroup")?;
        let pod = path.parent().context("a cgroup has a parent")?;
        Ok(Started {
            cgroup: Cgroup::open(&path)?,
            pod: Cgroup::open(pod)?,
            id,
            at,
            name: spec.name.clone(),
            sandbox,
        })
    }

    /// What the runtime says of it.
    pub(crate) fn status(&self, started: &Started) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: started.id.clone(),
            verbose: false,
        };
        let mut client = self.client.clone();
        let answer = self.tasks.block_on(client.container_status(request))?;
        answer.into_inner().status.context("no status")
    }

    /// The exit code, once it has ended.
    pub(crate) fn exit_code(&self, started: &Started) -> Result<Option<i32>> {
        let status = self.status(started)?;
        let has_ended = status.state() == ContainerState::ContainerExited;
        Ok(has_ended.then_some(status.exit_code))
    }

    /// What it has printed that is JSON, one value a line.
    pub(crate) fn said(started: &Started) -> Vec<Value> {
        node::said_in(&Self::log(started))
    }

    /// What it has printed, each line with its time.
    pub(crate) fn log(started: &Started) -> String {
        let path = Path::new(&started.sandbox.config.log_directory).join(log_of(&started.name));
        fs::read_to_string(path).unwrap_or_default()
    }

    /// Sets its limit, as somebody else might.
    pub(crate) fn update(&self, started: &Started, limit: Bytes) -> Result<()> {
        let resources = with_memory(limit, &LinuxContainerResources::default());
        self.update_resources(started, resources)
    }

    /// Sets its CPU limit, as somebody else might.
    pub(crate) fn update_cpu(&self, started: &Started, cpu: Cpu) -> Result<()> {
        let period = PERIOD;
        let resources = with_quota(LinuxContainerResources::default(), Quota { cpu, period });
        self.update_resources(started, resources)
    }

    fn update_resources(&self, started: &Started, linux: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: started.id.clone(),
            linux: Some(linux),
            ..UpdateContainerResourcesRequest::default()
        };
        let mut client = self.client.clone();
        self.tasks
            .block_on(client.update_container_resources(request))?;
        Ok(())
    }

    /// Ends it; its pod stays.
    pub(crate) fn stop(&self, started: &Started) -> Result<()> {
        let request = StopContainerRequest {
            container_id: started.id.clone(),
            timeout: 0,
        };
        let mut client = self.client.clone();
        self.tasks.block_on(client.stop_container(request))?;
        Ok(())
    }

    /// SIGKILL of the runtime; its containers live on.
    pub(crate) fn kill_containerd(&mut self) -> Result<()> {
        self.containerd
            .take()
            .context("no containerd runs")
            .map(drop)
    }

    /// Stops the runtime (SIGSTOP), or lets it go on: it takes what it is asked, and does not answer.
    pub(crate) fn freeze_containerd(&self, frozen: bool) -> Result<()> {
        let containerd = self.containerd.as_ref().context("no containerd runs")?;
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        Ok(kill_process(containerd.process()?, signal)?)
    }

    /// Starts the runtime again.
    pub(crate) fn start_containerd(&mut self) -> Result<()> {
        self.containerd = Some(Containerd::start_again()?);
        wait("containerd answers", Duration::from_secs(60), || {
            let mut client = self.client.clone();
            let request = ListPodSandboxRequest::default();
            Ok(self
                .tasks
                .block_on(client.list_pod_sandbox(request))
                .is_ok())
        })
    }

    /// Ends it and its pod.
    pub(crate) fn remove(&self, started: &Started) -> Result<()> {
        let mut client = self.client.clone();
        let pod_sandbox_id = started.sandbox.id.clone();
        self.tasks.block_on(async {
            let stop = StopPodSandboxRequest {
                pod_sandbox_id: pod_sandbox_id.clone(),
            };
            client.stop_pod_sandbox(stop).await?;
            let remove = RemovePodSandboxRequest { pod_sandbox_id };
            client.remove_pod_sandbox(remove).await
        })?;
        if !has_systemd() {
            let pod = started.pod.path();
            // A cgroup lives on until its last process is gone.
            wait("the pod's cgroup is empty", Duration::from_secs(10), || {
                Ok(fs::remove_dir(pod).is_ok() || !pod.exists())
            })?;
        }
        Ok(())
    }
}

/// The log of a container in its pod's directory.
fn log_of(name: &str) -> String {
    format!("{name}.log")
}

/// Makes the cgroup of a pod with its limit, as a kubelet does; returns what the runtime calls it.
fn pod_cgroup(uid: &str, limit: Option<Bytes>, cpu: Option<Cpu>) -> Result<String> {
    if has_systemd() {
        let uid = uid.replace('-', "_");
        return Ok(format!("kubepods-burstable-pod{uid}.slice"));
    }
    let pod = format!("pod{uid}");
    let path = hand_out(&["kubepods", "burstable", &pod])?;
    if let Some(limit) = limit {
        Cgroup::open(&path)?.set_limit("memory.max", Limit::At(limit))?;
    }
    if let Some(cpu) = cpu {
        let period = PERIOD;
        Cgroup::open(&path)?.set_quota(Quota { cpu, period })?;
    }
    Ok(format!("/kubepods/burstable/{pod}"))
}

/// Makes cgroups below each other that hand out their controllers.
pub(crate) fn hand_out(names: &[&str]) -> Result<PathBuf> {
    let mut path = PathBuf::from(CGROUP_ROOT);
    let controllers = "+cpu +cpuset +io +memory +pids";
    fs::write(path.join("cgroup.subtree_control"), controllers)?;
    for name in names {
        path.push(name);
        fs::create_dir_all(&path)?;
        fs::write(path.join("cgroup.subtree_control"), controllers)?;
    }
    Ok(path)
}

fn sandbox(spec: &Spec, uid: &str, parent: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: spec.name.clone(),
            uid: uid.to_owned(),
            namespace: NAMESPACE.to_owned(),
            attempt: 0,
        }),
        log_directory: format!("{LOGS}/{}", spec.name),
        labels: spec.labels.iter().cloned().collect(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: parent.to_owned(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(host_network()),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

fn host_network() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Node.into(),
        ..NamespaceOption::default()
    }
}

fn container(spec: &Spec) -> ContainerConfig {
    let limit = spec.limit.and_then(|limit| i64::try_from(limit.0).ok());
    let quota = spec.cpu.map(|cpu| cpu.quota(PERIOD).cast_signed());
    let mounts = spec.binds.iter().map(|(container, host)| Mount {
        container_path: (*container).to_owned(),
        host_path: (*host).to_owned(),
        ..Mount::default()
    });
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: spec
                .container
                .map_or_else(|| spec.name.clone(), str::to_owned),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: node::IMAGE.to_owned(),
            ..ImageSpec::default()
        }),
        command: spec.command.clone(),
        mounts: mounts.collect(),
        log_path: log_of(&spec.name),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                memory_limit_in_bytes: limit.unwrap_or(0),
                cpu_quota: quota.unwrap_or(0),
                cpu_period: quota.map_or(0, |_| PERIOD.cast_signed()),
                ..LinuxContainerResources::default()
            }),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(host_network()),
                ..LinuxContainerSecurityContext::default()
            }),
        }),
        ..ContainerConfig::default()
    }
}

/// The file with the agent's policies.
pub(crate) const POLICIES: &str = "/etc/bellows/policies.yaml";

/// `bellows run --standalone` with policies, as a service of the machine: a parent and its child.
pub(crate) struct Standalone(Service);

impl Standalone {
    /// Starts it with these policies.
    pub(crate) fn start(policies: &str) -> Result<Self> {
        Self::start_with(policies, &[], None)
    }

    /// The same with more arguments, in a cgroup of its own.
    pub(crate) fn start_with(
        policies: &str,
        arguments: &[&str],
        cgroup: Option<&Cgroup>,
    ) -> Result<Self> {
        fs::create_dir_all("/etc/bellows")?;
        fs::write(POLICIES, policies)?;
        let mut command = logged(&["run", "--standalone", "--policies", POLICIES])?;
        command.args(arguments);
        if let Some(cgroup) = cgroup {
            cgroup.admit(&mut command)?;
        }
        let child = command.spawn().context("run bellows run --standalone")?;
        Ok(Self(Service(child)))
    }

    /// The agent proper, its child.
    pub(crate) fn agent(&self) -> Result<u32> {
        let parent = self.0.0.id();
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
        let child = children.split_whitespace().next();
        Ok(child.context("the agent has ended")?.parse()?)
    }

    /// SIGKILL of both of its processes, the agent first: its parent would let it end.
    pub(crate) fn kill_all(self) -> Result<()> {
        let child = i32::try_from(self.agent()?)?;
        kill_process(Pid::from_raw(child).context("no process")?, Signal::KILL)?;
        drop(self);
        Ok(())
    }

    /// Fails if it has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.0.check("bellows run --standalone", "bellows")
    }
}

/// A policy for the containers of the pods with the label `guard: NAME`.
pub(crate) fn policy(name: &str, max: Bytes) -> String {
    policy_with(name, max, Nanos::millis(5000))
}

/// The same with the quiet time before a shrink.
pub(crate) fn policy_with(name: &str, max: Bytes, shrink_after: Nanos) -> String {
    let seconds = shrink_after.as_millis() / 1000;
    policy_of(
        name,
        &format!("memory: {{max: {}, shrinkAfter: {seconds}s}}", max.0),
    )
}

/// What their runtime says of their CPU limit.
pub(crate) fn said_cpu(status: ContainerStatus) -> Option<Cpu> {
    let linux = status.resources?.linux?;
    Cpu::of_quota(linux.cpu_quota.try_into().ok()?, PERIOD)
}

/// A policy for their CPU.
pub(crate) fn cpu_policy(name: &str, max: Cpu) -> String {
    policy_of(name, &format!("cpu: {{max: {max}}}"))
}

/// A policy for them with rules as they are written, such as `cpu: {max: 2}`.
pub(crate) fn policy_of(name: &str, rules: &str) -> String {
    format!(
        "apiVersion: bellows.dev/v1alpha1\n\
         kind: ElasticPolicy\n\
         metadata: {{name: {name}}}\n\
         spec:\n  mode: Act\n  selector:\n    namespaces: [{NAMESPACE}]\n    matchLabels: {{guard: {name}}}\n  \
         containers:\n  - {rules}\n"
    )
}
