//! A container runtime that is not real: it says that there are as many containers as a test wants, as fast as it
//! wants, and writes the limits that it is asked for into their cgroups. Or it is another than those that can be had
//! here ([`Kind::Crio`]), as far as others can tell.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Result;
use bellows::{
    cgroup::{Cgroup, Limit, quota::Quota},
    cri::api::{
        Container, ContainerEventResponse, ContainerMetadata, ContainerResources, ContainerState,
        ContainerStatus, ContainerStatusRequest, ContainerStatusResponse, CreateContainerRequest,
        CreateContainerResponse, GetEventsRequest, LinuxContainerResources, ListContainersRequest,
        ListContainersResponse, ListPodSandboxRequest, ListPodSandboxResponse, PodSandbox,
        PodSandboxMetadata, RemoveContainerRequest, RemoveContainerResponse,
        RemovePodSandboxRequest, RemovePodSandboxResponse, RunPodSandboxRequest,
        RunPodSandboxResponse, RuntimeConfigRequest, RuntimeConfigResponse, StartContainerRequest,
        StartContainerResponse, StopContainerRequest, StopContainerResponse, StopPodSandboxRequest,
        StopPodSandboxResponse, UpdateContainerResourcesRequest, UpdateContainerResourcesResponse,
        VersionRequest, VersionResponse,
        runtime_service_server::{RuntimeService, RuntimeServiceServer},
    },
};
use bellows_core::{Bytes, Cpu};
use hyper::server::conn::http2;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use serde_json::json;
use tokio::{net::UnixListener, runtime::Runtime, time::sleep};
use tonic::{Request, Response, Status, async_trait, codegen::tokio_stream::Stream};

/// Which runtime it is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// None that exists.
    Own,
    /// CRI-O with crun. What it sets of memory it sets of swap, too, and `unified` it drops (`toOCIResources`,
    /// server/container_update_resources.go); it tells of no containers by itself unless it is configured to (the
    /// stream ends at once: server/container_events.go).
    Crio,
}

/// A container, as it says.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    /// Its pod's uid.
    pub(crate) uid: String,
    pub(crate) name: String,
    /// Where its limits are set: in more than one cgroup where its runtime makes another below the first.
    pub(crate) cgroups: Vec<PathBuf>,
    pub(crate) limit: Bytes,
    /// `None` without a CPU limit.
    pub(crate) quota: Option<Quota>,
    /// Labels of its pod.
    pub(crate) labels: BTreeMap<String, String>,
}

/// What it knows.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// The containers that run, by id.
    pub(crate) running: BTreeMap<String, Said>,
    /// What it was asked for: of whom, and which memory limit.
    pub(crate) updates: Vec<(String, i64)>,
    /// Whether it takes what it is asked for and does not answer.
    pub(crate) hangs: bool,
}

/// How often is looked whether it still hangs.
const LOOK: Duration = Duration::from_millis(20);

/// The runtime; ends with its owner.
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    _tasks: Runtime,
}

impl Fake {
    /// One that listens at a socket.
    pub(crate) fn start(socket: &Path, kind: Kind) -> Result<Self> {
        let tasks = Runtime::new()?;
        let state = Arc::<Mutex<State>>::default();
        if let Some(directory) = socket.parent() {
            fs::create_dir_all(directory)?;
        }
        let listener = {
            let _context = tasks.enter();
            UnixListener::bind(socket)?
        };
        let service = RuntimeServiceServer::new(Service {
            state: Arc::clone(&state),
            kind,
        });
        tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = TowerToHyperService::new(service.clone());
                tokio::spawn(async move {
                    let connection = http2::Builder::new(TokioExecutor::new());
                    let served = connection.serve_connection(TokioIo::new(stream), service);
                    if let Err(error) = served.await {
                        tracing::debug!(%error, "a connection has ended");
                    }
                });
            }
        });
        Ok(Self {
            state,
            _tasks: tasks,
        })
    }

    /// What it knows, to look at and to change.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Service {
    state: Arc<Mutex<State>>,
    kind: Kind,
}

impl Service {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn not_here<T>() -> Answer<T> {
    Err(Status::unimplemented("nobody asks a fake for that"))
}

impl Said {
    fn resources(&self, kind: Kind) -> ContainerResources {
        let memory = self.limit.0.cast_signed();
        let quota = self.quota.map(|quota| quota.cpu.quota(quota.period));
        let period = self.quota.map_or(0, |quota| quota.period);
        ContainerResources {
            linux: Some(LinuxContainerResources {
                memory_limit_in_bytes: memory,
                memory_swap_limit_in_bytes: if kind == Kind::Crio { memory } else { 0 },
                cpu_quota: quota.unwrap_or(0).cast_signed(),
                cpu_period: period.cast_signed(),
                ..LinuxContainerResources::default()
            }),
        }
    }

    /// What it says beside the interface.
    fn info(&self) -> BTreeMap<String, String> {
        let innermost = self.cgroups.last().and_then(|path| {
            let processes = fs::read_to_string(path.join("cgroup.procs")).ok()?;
            processes.lines().next()?.parse::<u32>().ok()
        });
        let info = json!({
            "sandboxID": self.uid,
            "pid": innermost.unwrap_or(0),
            "runtimeSpec": { "ociVersion": "1.2.1" },
            "privileged": false,
        });
        [("info".to_owned(), info.to_string())].into()
    }

    /// Sets what is named, and leaves alone what is zero.
    fn set(&mut self, asked: &LinuxContainerResources) -> Result<()> {
        let memory = u64::try_from(asked.memory_limit_in_bytes).ok();
        let limit = memory.filter(|&limit| limit > 0).map(Bytes);
        let period = u64::try_from(asked.cpu_period).unwrap_or(0);
        let quota = u64::try_from(asked.cpu_quota).ok();
        let quota = quota.filter(|&quota| quota > 0 && period > 0);
        let quota = quota.and_then(|quota| Cpu::of_quota(quota, period));
        let quota = quota.map(|cpu| Quota { cpu, period });
        for path in &self.cgroups {
            let cgroup = Cgroup::open(path)?;
            if let Some(limit) = limit {
                cgroup.set_limit("memory.max", Limit::At(limit))?;
            }
            if let Some(quota) = quota {
                cgroup.set_quota(quota)?;
            }
        }
        self.limit = limit.unwrap_or(self.limit);
        self.quota = quota.or(self.quota);
        Ok(())
    }
}

#[async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        let (name, version) = match self.kind {
            Kind::Own => ("fake", "1"),
            Kind::Crio => ("cri-o", "1.33.4"),
        };
        Ok(Response::new(VersionResponse {
            runtime_name: name.to_owned(),
            runtime_version: version.to_owned(),
            ..VersionResponse::default()
        }))
    }

    async fn list_pod_sandbox(
        &self,
        _: Request<ListPodSandboxRequest>,
    ) -> Answer<ListPodSandboxResponse> {
        let state = self.state();
        let items = state.running.values().map(|said| PodSandbox {
            id: said.uid.clone(),
            metadata: Some(PodSandboxMetadata {
                name: said.name.clone(),
                uid: said.uid.clone(),
                namespace: "dev".to_owned(),
                attempt: 0,
            }),
            labels: said.labels.clone(),
            ..PodSandbox::default()
        });
        Ok(Response::new(ListPodSandboxResponse {
            items: items.collect(),
        }))
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Answer<ListContainersResponse> {
        let filter = request.into_inner().filter.and_then(|filter| filter.state);
        let running = ContainerState::ContainerRunning;
        let is_meant = filter.is_none_or(|filter| filter.state() == running);
        let state = self.state();
        let containers = state.running.iter().filter(|_| is_meant);
        let containers = containers.map(|(id, said)| Container {
            id: id.clone(),
            pod_sandbox_id: said.uid.clone(),
            metadata: Some(ContainerMetadata {
                name: said.name.clone(),
                attempt: 0,
            }),
            state: running.into(),
            ..Container::default()
        });
        Ok(Response::new(ListContainersResponse {
            containers: containers.collect(),
        }))
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Answer<ContainerStatusResponse> {
        let ContainerStatusRequest {
            container_id: id,
            verbose,
        } = request.into_inner();
        let state = self.state();
        let Some(said) = state.running.get(&id) else {
            return Err(Status::not_found(id));
        };
        let status = ContainerStatus {
            id,
            state: ContainerState::ContainerRunning.into(),
            resources: Some(said.resources(self.kind)),
            ..ContainerStatus::default()
        };
        let tells = verbose && self.kind == Kind::Crio;
        Ok(Response::new(ContainerStatusResponse {
            status: Some(status),
            info: if tells { said.info() } else { BTreeMap::new() },
        }))
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        let UpdateContainerResourcesRequest {
            container_id: id,
            linux,
            ..
        } = request.into_inner();
        let asked = linux.unwrap_or_default();
        while self.state().hangs {
            sleep(LOOK).await;
        }
        let mut state = self.state();
        state
            .updates
            .push((id.clone(), asked.memory_limit_in_bytes));
        let Some(said) = state.running.get_mut(&id) else {
            return Err(Status::not_found(id));
        };
        said.set(&asked)
            .map_err(|error| Status::internal(format!("{error:#}")))?;
        Ok(Response::new(UpdateContainerResourcesResponse {}))
    }

    type GetContainerEventsStream =
        Pin<Box<dyn Stream<Item = Result<ContainerEventResponse, Status>> + Send>>;

    async fn get_container_events(
        &self,
        _: Request<GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        not_here()
    }

    async fn run_pod_sandbox(
        &self,
        _: Request<RunPodSandboxRequest>,
    ) -> Answer<RunPodSandboxResponse> {
        not_here()
    }

    async fn stop_pod_sandbox(
        &self,
        _: Request<StopPodSandboxRequest>,
    ) -> Answer<StopPodSandboxResponse> {
        not_here()
    }

    async fn remove_pod_sandbox(
        &self,
        _: Request<RemovePodSandboxRequest>,
    ) -> Answer<RemovePodSandboxResponse> {
        not_here()
    }

    async fn create_container(
        &self,
        _: Request<CreateContainerRequest>,
    ) -> Answer<CreateContainerResponse> {
        not_here()
    }

    async fn start_container(
        &self,
        _: Request<StartContainerRequest>,
    ) -> Answer<StartContainerResponse> {
        not_here()
    }

    async fn stop_container(
        &self,
        _: Request<StopContainerRequest>,
    ) -> Answer<StopContainerResponse> {
        not_here()
    }

    async fn remove_container(
        &self,
        _: Request<RemoveContainerRequest>,
    ) -> Answer<RemoveContainerResponse> {
        not_here()
    }

    async fn runtime_config(
        &self,
        _: Request<RuntimeConfigRequest>,
    ) -> Answer<RuntimeConfigResponse> {
        not_here()
    }
}
